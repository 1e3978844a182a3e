//! A client's socket over every transport: whole packets in and out, and raw bytes where a check wants them.
//!
//! Blocking, because a check is a story told in order; checks run beside each other in threads.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use openssl::error::ErrorStack;
use openssl::nid::Nid;
use openssl::ssl::{ErrorCode, HandshakeError, Ssl, SslContext, SslMethod, SslOptions, SslStream};
use openssl::ssl::{SslVerifyMode, SslVersion};
use openssl::x509::{X509NameRef, X509StoreContextRef};
use serde::Serialize;
use turn_core::Transport;
use turn_core::wire::stream::{Frame, frame};

/// Longest a connection or a handshake may take.
const CONNECT: Duration = Duration::from_secs(5);

/// How certificates are judged.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trust {
    /// Not at all.
    pub(crate) insecure: bool,
    /// By this authority instead of those of the system.
    pub(crate) ca: Option<PathBuf>,
}

/// Why a server's certificate is not believed; what [`Wire::open`] fails with, inside of an [`io::Error`].
#[derive(Clone, Debug, Eq, PartialEq, Serialize, thiserror::Error)]
#[error("its certificate, issued by {issuer}, is not trusted: {reason}")]
pub(crate) struct Untrusted {
    /// Who signed it, as the certificate itself says.
    pub(crate) issuer: String,
    /// What OpenSSL found, such as "unable to get local issuer certificate".
    pub(crate) reason: String,
}

/// Where the verification of a handshake leaves what it found.
type Doubt = Arc<Mutex<Option<Untrusted>>>;

/// What of TLS and DTLS a check chooses.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Handshake {
    /// This version and no other.
    pub(crate) version: Option<SslVersion>,
    /// Protocol names in the form of RFC 7301 §3.1.
    pub(crate) alpn: Option<&'static [u8]>,
}

/// What came.
#[derive(Debug)]
pub(crate) enum Got {
    /// A datagram or a whole frame, padding included.
    Packet(Vec<u8>),
    /// Nothing in time.
    Nothing,
    /// The server closed the connection, or sent what cannot be framed.
    Closed,
}

enum Link {
    Udp(UdpSocket),
    Tcp(TcpStream),
    Tls(SslStream<TcpStream>),
    Dtls(SslStream<Datagrams>),
}

/// One socket to the server.
pub(crate) struct Wire {
    link: Link,
    /// Bytes of frames that are not whole yet.
    buffer: Vec<u8>,
    pub(crate) local: SocketAddr,
    pub(crate) server: SocketAddr,
    /// Where the last UDP packet came from.
    pub(crate) source: SocketAddr,
}

impl Wire {
    /// Opens a socket; handshakes where the transport has one.
    ///
    /// # Errors
    /// Those of the system and of the handshake; [`Untrusted`] where the certificate is all that is wrong.
    pub(crate) fn open(
        transport: Transport,
        server: SocketAddr,
        from: SocketAddr,
        name: &str,
        trust: &Trust,
        handshake: Handshake,
    ) -> io::Result<Self> {
        let (link, local) = match transport {
            Transport::Udp => {
                let socket = UdpSocket::bind(from)?;
                // What the server sees, if nobody translates: a connected socket of the same IP knows.
                let probe = UdpSocket::bind((from.ip(), 0))?;
                probe.connect(server)?;
                let local = SocketAddr::new(probe.local_addr()?.ip(), socket.local_addr()?.port());
                (Link::Udp(socket), local)
            }
            Transport::Dtls => {
                let socket = UdpSocket::bind(from)?;
                socket.connect(server)?;
                let local = socket.local_addr()?;
                (Link::Dtls(shake(ssl(true, name, trust, handshake)?, Datagrams(socket))?), local)
            }
            Transport::Tcp | Transport::Tls => {
                let stream = connect(server, from.ip())?;
                let local = stream.local_addr()?;
                if transport == Transport::Tls {
                    stream.set_read_timeout(Some(Duration::from_millis(100)))?;
                    (Link::Tls(shake(ssl(false, name, trust, handshake)?, stream)?), local)
                } else {
                    (Link::Tcp(stream), local)
                }
            }
        };
        Ok(Self { link, buffer: Vec::new(), local, server, source: server })
    }

    /// Sends bytes as they are: a datagram, or a piece of the stream.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.link {
            Link::Udp(socket) => socket.send_to(bytes, self.server).map(drop),
            Link::Tcp(stream) => stream.write_all(bytes),
            Link::Tls(stream) => stream.write_all(bytes),
            Link::Dtls(stream) => stream.write_all(bytes),
        }
    }

    /// The next packet before `deadline`.
    pub(crate) fn receive(&mut self, deadline: Instant) -> Got {
        loop {
            if !self.buffer.is_empty() {
                match frame(&self.buffer) {
                    Frame::Whole(len) => return Got::Packet(self.buffer.drain(..len).collect()),
                    Frame::Invalid => return Got::Closed,
                    Frame::Partial(_) => {}
                }
            }
            match self.read(deadline) {
                Read1::Bytes(bytes) if self.is_stream() => self.buffer.extend(bytes),
                Read1::Bytes(bytes) => return Got::Packet(bytes),
                Read1::Nothing => return Got::Nothing,
                Read1::Closed => return Got::Closed,
            }
        }
    }

    /// The next bytes before `deadline`, unframed: what was buffered comes first. Empty means nothing came, `None` that
    /// the server closed the connection.
    pub(crate) fn receive_raw(&mut self, deadline: Instant) -> Option<Vec<u8>> {
        if !self.buffer.is_empty() {
            return Some(std::mem::take(&mut self.buffer));
        }
        match self.read(deadline) {
            Read1::Bytes(bytes) => Some(bytes),
            Read1::Nothing => Some(Vec::new()),
            Read1::Closed => None,
        }
    }

    /// The protocol that TLS or DTLS agreed on by ALPN.
    pub(crate) fn alpn(&self) -> Option<Vec<u8>> {
        match &self.link {
            Link::Tls(stream) => stream.ssl().selected_alpn_protocol().map(<[u8]>::to_vec),
            Link::Dtls(stream) => stream.ssl().selected_alpn_protocol().map(<[u8]>::to_vec),
            Link::Udp(_) | Link::Tcp(_) => None,
        }
    }

    pub(crate) fn is_stream(&self) -> bool {
        matches!(self.link, Link::Tcp(_) | Link::Tls(_))
    }

    fn read(&mut self, deadline: Instant) -> Read1 {
        let mut bytes = vec![0; 66_000];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Read1::Nothing;
            }
            // A timeout of less than the clock's grain would be none at all.
            let left = Some(left.max(Duration::from_millis(1)));
            let got = match &mut self.link {
                Link::Udp(socket) => {
                    socket.set_read_timeout(left).and_then(|()| socket.recv_from(&mut bytes)).map(|(len, source)| {
                        self.source = source;
                        len
                    })
                }
                Link::Tcp(stream) => stream.set_read_timeout(left).and_then(|()| stream.read(&mut bytes)),
                Link::Tls(stream) => {
                    let _ = stream.get_ref().set_read_timeout(left);
                    ssl_read(stream, &mut bytes)
                }
                Link::Dtls(stream) => {
                    let _ = stream.get_ref().0.set_read_timeout(left);
                    ssl_read(stream, &mut bytes)
                }
            };
            match got {
                // An empty datagram is a packet, the empty read of a stream its end.
                Ok(0) if !matches!(self.link, Link::Udp(_)) => return Read1::Closed,
                Ok(len) => {
                    bytes.truncate(len);
                    return Read1::Bytes(bytes);
                }
                Err(error) if is_timeout(&error) => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && !self.is_stream() => {}
                Err(_) => return Read1::Closed,
            }
        }
    }
}

enum Read1 {
    Bytes(Vec<u8>),
    Nothing,
    Closed,
}

/// A connected UDP socket as the stream OpenSSL wants: one datagram a call.
#[derive(Debug)]
struct Datagrams(UdpSocket);

impl Read for Datagrams {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.recv(bytes)
    }
}

impl Write for Datagrams {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.send(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(crate) fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

/// A TCP connection from an address of ours.
pub(crate) fn connect(server: SocketAddr, from: IpAddr) -> io::Result<TcpStream> {
    let domain = socket2::Domain::for_address(server);
    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None)?;
    if !from.is_unspecified() {
        socket.bind(&SocketAddr::new(from, 0).into())?;
    }
    socket.connect_timeout(&server.into(), CONNECT)?;
    let stream = TcpStream::from(socket);
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(CONNECT))?;
    Ok(stream)
}

fn ssl(datagrams: bool, name: &str, trust: &Trust, handshake: Handshake) -> io::Result<(Ssl, Doubt)> {
    let doubt = Doubt::default();
    let make = || -> Result<Ssl, ErrorStack> {
        let mut context = SslContext::builder(if datagrams { SslMethod::dtls() } else { SslMethod::tls() })?;
        context.set_options(SslOptions::NO_QUERY_MTU);
        if trust.insecure {
            context.set_verify(SslVerifyMode::NONE);
        } else {
            let doubt = Arc::clone(&doubt);
            context.set_verify_callback(SslVerifyMode::PEER, move |is_good, chain| {
                if !is_good {
                    doubt.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| untrusted(chain));
                }
                is_good
            });
            match &trust.ca {
                Some(ca) => context.set_ca_file(ca)?,
                None => context.set_default_verify_paths()?,
            }
        }
        if let Some(version) = handshake.version {
            context.set_min_proto_version(Some(version))?;
            context.set_max_proto_version(Some(version))?;
        }
        if let Some(alpn) = handshake.alpn {
            context.set_alpn_protos(alpn)?;
        }
        let mut ssl = Ssl::new(&context.build())?;
        match name.parse::<IpAddr>() {
            Ok(ip) => ssl.param_mut().set_ip(ip)?,
            Err(_) => {
                ssl.set_hostname(name)?;
                ssl.param_mut().set_host(name)?;
            }
        }
        if datagrams {
            ssl.set_mtu(1200)?;
        }
        Ok(ssl)
    };
    Ok((make().map_err(io::Error::other)?, doubt))
}

/// What is wrong with the certificate that is looked at, and who issued the server's own.
fn untrusted(chain: &mut X509StoreContextRef) -> Untrusted {
    let own = chain.chain().and_then(|chain| chain.get(0)).or(chain.current_cert());
    Untrusted {
        issuer: own.map_or("nobody".into(), |own| in_words(own.issuer_name())),
        reason: chain.error().to_string(),
    }
}

/// The common name and the organization of who has this name; all there is, where it has neither.
fn in_words(name: &X509NameRef) -> String {
    let entry = |nid| name.entries_by_nid(nid).next()?.data().to_string().ok();
    match (entry(Nid::COMMONNAME), entry(Nid::ORGANIZATIONNAME)) {
        (Some(name), Some(organization)) if name != organization => format!("{name:?} of {organization:?}"),
        (Some(name), _) | (None, Some(name)) => format!("{name:?}"),
        (None, None) => format!("{name:?}"),
    }
}

fn shake<S>((ssl, doubt): (Ssl, Doubt), stream: S) -> io::Result<SslStream<S>>
where
    S: Read + Write + Timeouts + std::fmt::Debug,
{
    stream.read_timeout(Duration::from_millis(100))?;
    let deadline = Instant::now() + CONNECT;
    let mut outcome = ssl.connect(stream);
    loop {
        match outcome {
            Ok(stream) => return Ok(stream),
            // OpenSSL sends DTLS flights again by itself when it is called after their time.
            Err(HandshakeError::WouldBlock(middle)) if Instant::now() < deadline => outcome = middle.handshake(),
            Err(HandshakeError::WouldBlock(_)) => return Err(io::Error::other("no end of the TLS handshake")),
            Err(error) => {
                return Err(match doubt.lock().unwrap_or_else(PoisonError::into_inner).take() {
                    Some(untrusted) => io::Error::other(untrusted),
                    None => io::Error::other(format!("TLS handshake: {error}")),
                });
            }
        }
    }
}

trait Timeouts {
    fn read_timeout(&self, timeout: Duration) -> io::Result<()>;
}

impl Timeouts for TcpStream {
    fn read_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(timeout))
    }
}

impl Timeouts for Datagrams {
    fn read_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.0.set_read_timeout(Some(timeout))
    }
}

fn ssl_read<S: Read + Write>(stream: &mut SslStream<S>, bytes: &mut [u8]) -> io::Result<usize> {
    match stream.ssl_read(bytes) {
        Ok(len) => Ok(len),
        Err(error) if error.code() == ErrorCode::ZERO_RETURN => Ok(0),
        Err(error) if matches!(error.code(), ErrorCode::WANT_READ | ErrorCode::WANT_WRITE) => {
            Err(io::ErrorKind::WouldBlock.into())
        }
        Err(error) => Err(error.into_io_error().unwrap_or_else(io::Error::other)),
    }
}
