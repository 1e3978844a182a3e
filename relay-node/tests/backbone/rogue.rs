//! A member that has been taken over: its certificate is good, and it sends what it likes.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result};
use bytes::Bytes;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, Endpoint};
use relay_node::backbone::{Identity, Member};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use turn_core::MemberId;

use crate::node::ip;

pub(crate) struct Rogue {
    pub(crate) runtime: tokio::runtime::Runtime,
    pub(crate) endpoint: Endpoint,
    pub(crate) config: ClientConfig,
    pub(crate) member: Member,
}

impl Rogue {
    /// Relay `number`, which does not listen.
    pub(crate) fn new(identity: &Identity, number: u8) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let endpoint = {
            let _context = runtime.enter();
            Endpoint::client((Ipv4Addr::LOCALHOST, 0).into())?
        };
        let chain = CertificateDer::pem_slice_iter(&identity.certificate).collect::<Result<Vec<_>, _>>()?;
        let key = PrivateKeyDer::from_pem_slice(&identity.key)?;
        let provider = Arc::new(ring::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Credulous(provider)))
            .with_client_auth_cert(chain, key)?;
        tls.alpn_protocols = vec![b"turnpike-backbone/1".to_vec()];
        let config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
        let member = Member {
            id: MemberId(number.into()),
            node_id: format!("relay-{number}").into(),
            addresses: Vec::new(),
            relay_ips: vec![ip(number)],
            relay_ports: 50_000..=50_999,
        };
        Ok(Self { runtime, endpoint, config, member })
    }

    pub(crate) fn connect(&self, to: SocketAddr) -> Result<Connection> {
        self.runtime.block_on(async {
            let connecting = self.endpoint.connect_with(self.config.clone(), to, "relay.turnpike")?;
            connecting.await.context("a good certificate")
        })
    }
}

/// The frame of a packet, IPv4 only.
pub(crate) fn data(kind: u8, first: SocketAddr, second: SocketAddr, payload: &[u8]) -> Bytes {
    let mut frame = vec![kind, 0, 0];
    for address in [first, second] {
        let SocketAddr::V4(address) = address else { panic!("IPv4 only") };
        frame.extend(address.ip().octets());
        frame.extend(address.port().to_be_bytes());
    }
    frame.extend(payload);
    frame.into()
}

/// Believes every certificate.
#[derive(Debug)]
struct Credulous(Arc<CryptoProvider>);

impl ServerCertVerifier for Credulous {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
