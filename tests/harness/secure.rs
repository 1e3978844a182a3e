//! The encrypted ways to a server: TLS by rustls, DTLS by OpenSSL. Neither is what the relay is tested with alone: its TLS
//! meets Chromium, aioice and werift too, its DTLS `turnutils_uclient`.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use openssl::ssl::{ErrorCode, Ssl, SslConnector, SslMethod, SslStream, SslVerifyMode};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::certificate::Authority;

/// Longest a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How often OpenSSL is asked whether it has something to send again.
const RETRANSMIT: Duration = Duration::from_millis(100);
/// Fits every path of a test.
const MTU: u32 = 1400;

/// Whom a client trusts, and for whom it takes the server.
#[derive(Clone)]
pub struct Trust {
    tls: Arc<rustls::ClientConfig>,
    dtls: SslConnector,
    name: String,
}

impl Trust {
    /// A client that takes the server for `name`, a host name or an address.
    ///
    /// # Errors
    /// A library does not like the authority.
    pub fn new(authority: &Authority, name: &str) -> Result<Self> {
        let mut dtls = SslConnector::builder(SslMethod::dtls_client())?;
        dtls.set_ca_file(authority.root())?;
        dtls.set_verify(SslVerifyMode::PEER);
        Ok(Self { tls: authority.tls_client()?, dtls: dtls.build(), name: name.to_owned() })
    }

    /// A TLS connection from `from`.
    ///
    /// # Errors
    /// Not connected, or not trusted.
    pub async fn tls(&self, from: IpAddr, server: SocketAddr) -> Result<TlsStream<TcpStream>> {
        let socket = if from.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.bind((from, 0).into())?;
        let stream = socket.connect(server).await?;
        stream.set_nodelay(true)?;
        self.over(stream).await
    }

    /// TLS over a stream.
    ///
    /// # Errors
    /// Closed, or not trusted.
    pub async fn over<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S) -> Result<TlsStream<S>> {
        let name = ServerName::try_from(self.name.clone())?;
        let handshake = TlsConnector::from(Arc::clone(&self.tls)).connect(name, stream);
        Ok(tokio::time::timeout(HANDSHAKE, handshake).await.context("the TLS handshake did not end")??)
    }

    /// A DTLS association from `from`.
    ///
    /// # Errors
    /// No answer, or not trusted.
    pub async fn dtls(&self, from: IpAddr, server: SocketAddr) -> Result<Dtls> {
        let socket = UdpSocket::bind((from, 0)).await?;
        socket.connect(server).await?;
        let ssl = self.dtls.configure()?.into_ssl(&self.name)?;
        tokio::time::timeout(HANDSHAKE, Dtls::connect(ssl, socket)).await.context("the DTLS handshake did not end")?
    }
}

/// DER of the certificate that the server of a TLS connection showed.
///
/// # Errors
/// It showed none.
pub fn shown(stream: &TlsStream<TcpStream>) -> Result<Vec<u8>> {
    let certificates = stream.get_ref().1.peer_certificates();
    Ok(certificates.and_then(<[_]>::first).context("the server showed no certificate")?.to_vec())
}

/// A DTLS ClientHello without a cookie, as OpenSSL sends it.
///
/// # Errors
/// OpenSSL refuses.
pub fn client_hello() -> Result<Vec<u8>> {
    /// Keeps what is written; nothing ever comes.
    struct Mute(Vec<u8>);
    impl Read for Mute {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::WouldBlock.into())
        }
    }
    impl Write for Mute {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.extend(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let connector = SslConnector::builder(SslMethod::dtls_client())?.build();
    let mut ssl = connector.configure()?.into_ssl("turn.example.org")?;
    ssl.set_mtu(MTU)?;
    let mut stream = SslStream::new(ssl, Mute(Vec::new()))?;
    match stream.connect() {
        Err(error) if error.code() == ErrorCode::WANT_READ => Ok(std::mem::take(&mut stream.get_mut().0)),
        other => bail!("a DTLS client that does not wait for an answer: {other:?}"),
    }
}

/// A DTLS association.
pub struct Dtls {
    stream: SslStream<Datagrams>,
}

/// A connected UDP socket as OpenSSL takes it: a read is a datagram.
struct Datagrams(UdpSocket);

/// An ICMP error says that the server restarts: for a client that is silence.
fn or_nothing(outcome: io::Result<usize>) -> io::Result<usize> {
    outcome.map_err(|error| match error.kind() {
        io::ErrorKind::ConnectionRefused => io::ErrorKind::WouldBlock.into(),
        _ => error,
    })
}

impl Read for Datagrams {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        or_nothing(self.0.try_recv(buffer))
    }
}

impl Write for Datagrams {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        or_nothing(self.0.try_send(data))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Dtls {
    async fn connect(mut ssl: Ssl, socket: UdpSocket) -> Result<Self> {
        ssl.set_mtu(MTU)?;
        let mut stream = SslStream::new(ssl, Datagrams(socket))?;
        loop {
            match stream.connect() {
                Ok(()) => return Ok(Self { stream }),
                Err(error) if [ErrorCode::WANT_READ, ErrorCode::WANT_WRITE].contains(&error.code()) => {}
                Err(error) => bail!("DTLS: {error}"),
            }
            // Called again after a while OpenSSL repeats its flight.
            let _ = tokio::time::timeout(RETRANSMIT, stream.get_ref().0.readable()).await;
        }
    }

    /// DER of the certificate that the server showed.
    ///
    /// # Errors
    /// It showed none.
    pub fn shown(&self) -> Result<Vec<u8>> {
        Ok(self.stream.ssl().peer_certificate().context("the server showed no certificate")?.to_der()?)
    }

    /// Sends a datagram.
    ///
    /// # Errors
    /// The association has ended.
    pub async fn send(&mut self, data: &[u8]) -> Result<()> {
        loop {
            match self.stream.ssl_write(data) {
                Ok(_) => return Ok(()),
                Err(error) if error.code() == ErrorCode::WANT_WRITE => {
                    self.stream.get_ref().0.writable().await?;
                }
                Err(error) => bail!("DTLS: {error}"),
            }
        }
    }

    /// The next datagram. May be dropped at any time without losing anything.
    ///
    /// # Errors
    /// The association has ended.
    pub async fn receive(&mut self) -> Result<Vec<u8>> {
        let mut buffer = vec![0; 16_384];
        loop {
            match self.stream.ssl_read(&mut buffer) {
                Ok(0) => bail!("the server ended the DTLS association"),
                Ok(length) => {
                    buffer.truncate(length);
                    return Ok(buffer);
                }
                Err(error) if error.code() == ErrorCode::WANT_READ => {
                    self.stream.get_ref().0.readable().await?;
                }
                Err(error) => bail!("DTLS: {error}"),
            }
        }
    }
}
