//! Who is at the other end of a link: what its certificate says, once TLS has found it to be of this cluster.

use rustls::pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// What stands before the node id in the certificate of a relay.
const RELAY: &str = "turnpike://relay/";

/// A relay's certificate, read.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct RelayCertificate {
    /// The node id of its URI.
    pub(super) node_id: String,
    /// Its serial number without leading zeros.
    pub(super) serial: Vec<u8>,
}

impl RelayCertificate {
    /// Reads a certificate that has been verified; none where it is not a relay's.
    pub(super) fn read(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        let names = parsed.subject_alternative_name().ok().flatten()?;
        let node_id = names.value.general_names.iter().find_map(|name| match name {
            GeneralName::URI(uri) => uri.strip_prefix(RELAY),
            _ => None,
        })?;
        if node_id.is_empty() || node_id.contains('/') {
            return None;
        }
        let serial = parsed.raw_serial();
        let zeros = serial.iter().take_while(|byte| **byte == 0).count();
        Some(Self { node_id: node_id.to_owned(), serial: serial[zeros..].to_vec() })
    }

    /// Of the far end of a connection.
    pub(super) fn of(connection: &quinn::Connection) -> Option<Self> {
        let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
        Self::read(chain.first()?)
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType, SerialNumber};

    use super::*;

    fn certificate(uri: Option<&str>) -> Result<CertificateDer<'static>, Box<dyn std::error::Error>> {
        let mut params = CertificateParams::new(["relay.example".to_owned()])?;
        params.serial_number = Some(SerialNumber::from_slice(&[0, 0x81, 2]));
        if let Some(uri) = uri {
            params.subject_alt_names.push(SanType::URI(uri.to_owned().try_into()?));
        }
        Ok(params.self_signed(&KeyPair::generate()?)?.der().clone())
    }

    #[test]
    fn only_a_relay_is_a_relay() -> Result<(), Box<dyn std::error::Error>> {
        let read = RelayCertificate::read(&certificate(Some("turnpike://relay/eu-1"))?);
        assert_eq!(read, Some(RelayCertificate { node_id: "eu-1".into(), serial: vec![0x81, 2] }));
        for uri in [
            None,
            Some("turnpike://relay/"),
            Some("turnpike://relay/a/b"),
            Some("turnpike://controller/eu-1"),
            Some("turnpike://admin/relay"),
            Some("https://relay/eu-1"),
        ] {
            assert_eq!(RelayCertificate::read(&certificate(uri)?), None, "{uri:?}");
        }
        assert_eq!(RelayCertificate::read(&CertificateDer::from(vec![1, 2, 3])), None);
        Ok(())
    }
}
