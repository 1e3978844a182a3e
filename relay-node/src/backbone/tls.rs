//! TLS of the links: both ends show a certificate of the cluster's authority. Which relay it is, is read afterwards
//! (`identity.rs`), the same way on both ends.
//!
//! No session is resumed and no data is early: whoever connects shows its certificate each time, and nothing can be
//! replayed.

use std::sync::Arc;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::identity::RelayCertificate;
use super::settings::{BackboneError, Identity};

/// The protocol of the links (ALPN); its number changes where frames of two versions cannot meet on one link.
const PROTOCOL: &[u8] = b"turnpike-backbone/1";
/// What a dialling relay asks for; the certificate is not looked up by it.
pub(super) const SERVER_NAME: &str = "relay.turnpike";

/// What handshakes are made with, from one identity.
#[derive(Clone)]
pub(super) struct Tls {
    pub(super) client: Arc<QuicClientConfig>,
    pub(super) server: Arc<QuicServerConfig>,
}

impl Tls {
    /// Of relay `node`.
    pub(super) fn new(identity: &Identity, node: &str) -> Result<Self, BackboneError> {
        let refused = |what: &'static str, error: &dyn std::fmt::Display| BackboneError::Identity {
            what,
            error: error.to_string(),
        };
        let provider = Arc::new(ring::default_provider());
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&identity.ca) {
            let certificate = certificate.map_err(|error| refused("authority", &error))?;
            roots.add(certificate).map_err(|error| refused("authority", &error))?;
        }
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&identity.certificate)
            .collect::<Result<_, _>>()
            .map_err(|error| refused("certificate", &error))?;
        let own = chain.first().ok_or_else(|| refused("certificate", &"there is none in the file"))?;
        if RelayCertificate::read(own).is_none_or(|certificate| certificate.node_id != node) {
            return Err(BackboneError::Foreign { node: node.to_owned() });
        }
        let key = PrivateKeyDer::from_pem_slice(&identity.key).map_err(|error| refused("key", &error))?;
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .map_err(|error| refused("authority", &error))?;

        let versions: &[_] = &[&rustls::version::TLS13];
        let mut server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)
            .map_err(|error| refused("certificate", &error))?
            .with_client_cert_verifier(Arc::clone(&verifier))
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(|error| refused("certificate", &error))?;
        server.alpn_protocols = vec![PROTOCOL.to_vec()];
        server.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        server.send_tls13_tickets = 0;

        let mut client = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)
            .map_err(|error| refused("certificate", &error))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(OfTheCluster { verifier, provider }))
            .with_client_auth_cert(chain, key)
            .map_err(|error| refused("certificate", &error))?;
        client.alpn_protocols = vec![PROTOCOL.to_vec()];
        client.resumption = Resumption::disabled();

        Ok(Self {
            client: Arc::new(QuicClientConfig::try_from(client).map_err(|error| refused("certificate", &error))?),
            server: Arc::new(QuicServerConfig::try_from(server).map_err(|error| refused("certificate", &error))?),
        })
    }
}

/// Verifies the far end's chain. Names in certificates of relays are identities, not hosts, so no name is compared here.
#[derive(Debug)]
struct OfTheCluster {
    verifier: Arc<dyn ClientCertVerifier>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for OfTheCluster {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        // A relay may dial and be dialled: its certificate is good for clients, and that is what is asked of both ends.
        self.verifier.verify_client_cert(end_entity, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
