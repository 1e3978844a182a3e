//! Certificates made for one test, and clients that trust them.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use relay_node::certificates::{CertificateFiles, Certificates};
use relay_node::dataplane::{Dataplane, DataplaneConfig, Listen, StreamConfig};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, StreamOwned};
use turn_core::Transport;

use crate::client::{PATIENCE, TurnClient, config, connect};

/// An authority, and the directory its files go to.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    directory: PathBuf,
}

/// A TLS connection of a client.
pub(crate) type TlsStream = StreamOwned<ClientConnection, TcpStream>;

impl Authority {
    pub(crate) fn new(directory: &Path) -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key)?.der().clone();
        Ok(Self { issuer: Issuer::new(params, key), certificate, directory: directory.into() })
    }

    /// Writes a certificate for these names, or writes it anew.
    pub(crate) fn issue(&self, file: &str, names: &[&str]) -> Result<CertificateFiles> {
        let (certificate, key) = self.make(names)?;
        let files = CertificateFiles {
            certificate: self.directory.join(format!("{file}.pem")),
            key: self.directory.join(format!("{file}.key")),
        };
        std::fs::write(&files.certificate, certificate.pem())?;
        std::fs::write(&files.key, key.serialize_pem())?;
        Ok(files)
    }

    fn make(&self, names: &[&str]) -> Result<(rcgen::Certificate, KeyPair)> {
        let key = KeyPair::generate()?;
        let params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())?;
        Ok((params.signed_by(&key, &self.issuer)?, key))
    }

    /// What another server of these names runs on.
    pub(crate) fn server(&self, names: &[&str], protocols: &[&[u8]]) -> Result<Arc<ServerConfig>> {
        let (certificate, key) = self.make(names)?;
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
        let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)?;
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(Arc::new(config))
    }

    pub(crate) fn roots(&self) -> Result<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone())?;
        Ok(roots)
    }

    /// A client that trusts this authority and offers these protocols.
    pub(crate) fn client(&self, protocols: &[&[u8]]) -> Result<ClientConfig> {
        let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(self.roots()?)
            .with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(config)
    }

    /// Does a handshake with `to`, asking for `name`.
    pub(crate) fn dial(&self, to: SocketAddr, name: &str, protocols: &[&[u8]]) -> Result<TlsStream> {
        shake(connect(to)?, name, self.client(protocols)?)
    }

    /// A TURN client over TLS.
    pub(crate) fn turn_client(&self, to: SocketAddr, name: &str, user: &str) -> Result<TurnClient> {
        let stream = self.dial(to, name, &[b"stun.turn"])?;
        let local = stream.sock.local_addr()?;
        TurnClient::over(Box::new(stream), local, Transport::Tls, user)
    }
}

/// Does a handshake on a connection.
pub(crate) fn shake(stream: TcpStream, name: &str, config: ClientConfig) -> Result<TlsStream> {
    let name = ServerName::try_from(name.to_owned())?;
    let mut stream = StreamOwned::new(ClientConnection::new(Arc::new(config), name)?, stream);
    let deadline = Instant::now() + PATIENCE;
    while stream.conn.is_handshaking() {
        match stream.conn.complete_io(&mut stream.sock) {
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if Instant::now() > deadline {
                    bail!("the handshake does not end");
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(stream)
}

/// Whether the other end closes a connection, by an end or a reset.
pub(crate) fn is_closed(stream: &mut (impl Read + Write)) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        match stream.read(&mut [0; 4096]) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return Ok(()),
        }
    }
    bail!("still open")
}

/// A data plane with a TLS listener beside the others.
pub(crate) fn tls_config(
    ip: &str,
    workers: u16,
    journal: &Path,
    files: &[CertificateFiles],
) -> Result<DataplaneConfig> {
    let certificates = Certificates::load(files).map_err(|(_, error)| error)?;
    let mut config = config(ip, workers, journal);
    config.listen.push(Listen { transport: Transport::Tls, bind: SocketAddr::new(ip.parse()?, 0) });
    config.streams = StreamConfig { certificates: Some(Arc::new(certificates)), ..config.streams };
    Ok(config)
}

/// Where a data plane serves a transport.
pub(crate) fn address(dataplane: &Dataplane, transport: Transport) -> Result<SocketAddr> {
    let mut listen = dataplane.listen().iter();
    Ok(listen.find(|listen| listen.transport == transport).context("a listener")?.bind)
}

/// A STUN Binding request over a stream that waits little when read: whether it is answered.
pub(crate) fn is_served(stream: &mut (impl Read + Write)) -> Result<Vec<u8>> {
    stream.write_all(b"\x00\x01\x00\x00\x21\x12\xa4\x42abcdefghijkl")?;
    stream.flush()?;
    let (mut answer, deadline) = (Vec::new(), Instant::now() + PATIENCE);
    while answer.len() < 32 && Instant::now() < deadline {
        let mut buffer = [0; 256];
        match stream.read(&mut buffer) {
            Ok(0) => bail!("closed"),
            Ok(length) => answer.extend_from_slice(&buffer[..length]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if !answer.starts_with(&[1, 1]) {
        bail!("not a success: {answer:02x?}");
    }
    Ok(answer)
}

/// A moment for what must not happen.
pub(crate) const MOMENT: Duration = Duration::from_millis(300);
