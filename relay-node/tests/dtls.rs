//! DTLS of the real binary: what strangers and sessions cost in memory.

#![allow(clippy::print_stderr, reason = "what the relay logs belongs to the test's output")]
#![allow(dead_code, reason = "tests share a module of which each uses a part")]

mod relay;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use openssl::ssl::{ErrorCode, Ssl, SslContext, SslMethod, SslOptions, SslStream, SslVerifyMode};
use relay::{PATIENCE, Relay, TurnClient, eventually, own_ip};

/// A relay with a certificate and a user.
fn start(directory: &Path, ip: Ipv4Addr) -> Relay {
    let made = rcgen::generate_simple_self_signed(["turn.example".to_owned()]).expect("a certificate");
    std::fs::write(directory.join("cert.pem"), made.cert.pem()).expect("written");
    std::fs::write(directory.join("key.pem"), made.signing_key.serialize_pem()).expect("written");
    let more = "certificates = [{ certificate = \"cert.pem\", key = \"key.pem\" }]\n\
                static_users = [{ username = \"alice\", password = \"secret\" }]";
    let relay = Relay::start(directory, ip, more);
    relay.wait_for("/readyz", 200);
    relay
}

/// A socket as OpenSSL uses it: a read or a write is a datagram.
#[derive(Debug)]
struct Datagrams(UdpSocket);

impl Read for Datagrams {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.recv(buffer)
    }
}

impl Write for Datagrams {
    fn write(&mut self, datagram: &[u8]) -> std::io::Result<usize> {
        self.0.send(datagram)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A session that has not begun.
fn session(relay: SocketAddr) -> SslStream<Datagrams> {
    let mut builder = SslContext::builder(SslMethod::dtls_client()).expect("a context");
    builder.set_verify(SslVerifyMode::NONE);
    builder.set_options(SslOptions::NO_QUERY_MTU);
    let mut ssl = Ssl::new(&builder.build()).expect("a session");
    ssl.set_connect_state();
    ssl.set_mtu(1400).expect("set");
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
    socket.connect(relay).expect("loopback");
    socket.set_read_timeout(Some(Duration::from_millis(20))).expect("set");
    SslStream::new(ssl, Datagrams(socket)).expect("a stream")
}

/// A session that is there.
fn established(relay: SocketAddr) -> SslStream<Datagrams> {
    let mut stream = session(relay);
    eventually("a session", || match stream.do_handshake() {
        Ok(()) => Some(()),
        Err(error) => {
            assert_eq!(error.code(), ErrorCode::WANT_READ, "{error}");
            None
        }
    });
    stream
}

/// A first ClientHello of OpenSSL.
fn first_hello() -> Vec<u8> {
    let catcher = UdpSocket::bind("127.0.0.1:0").expect("a port");
    let mut stream = session(catcher.local_addr().expect("bound"));
    assert!(stream.do_handshake().is_err());
    let mut buffer = [0; 2048];
    let length = catcher.recv(&mut buffer).expect("a hello");
    buffer[..length].to_vec()
}

/// abuse.md D: ClientHellos without cookies from 100,000 sources cost no memory and hurt nobody.
#[test]
fn strangers_cost_no_memory_and_no_call() {
    const SOURCES: u32 = 100_000;
    let directory = tempfile::tempdir().expect("a directory");
    let relay = start(directory.path(), own_ip());
    let to = relay.address();
    let mut call = established(to);
    let hello = first_hello();
    // What every relay needs after a while: slots, tables of the allocator.
    flood(to, &hello, 0..2000);
    let before = relay.memory();

    let mut request = *b"\x00\x01\x00\x00\x21\x12\xA4\x42abcdefghijkl";
    let mut buffer = [0; 2048];
    for part in 0..100 {
        flood(to, &hello, part * SOURCES / 100..(part + 1) * SOURCES / 100);
        // The session that was there goes on; loopback loses nothing as long as nobody floods faster than is read.
        request[8] = part as u8;
        let asked = Instant::now();
        assert_eq!(call.ssl_write(&request).expect("sealed"), request.len());
        let length = eventually("an answer amid the flood", || call.ssl_read(&mut buffer).ok());
        assert_eq!(&buffer[8..20], &request[8..20]);
        assert!(length > 20 && asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
    }
    let grown = relay.memory().saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes more after {SOURCES} sources");
    // Most of them were answered; the rest found the socket's buffer full.
    eventually("they are counted", || {
        let (_, metrics) = relay.get("/metrics")?;
        let counts = metrics.lines().filter(|line| line.starts_with("turn_dtls_hello_verify_requests_total{"));
        let total: f64 = counts.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum();
        (total > f64::from(SOURCES) / 2.0).then_some(())
    });

    // A newcomer, over UDP and over DTLS.
    let newcomer = Instant::now();
    TurnClient::new(to, "alice", "secret").allocate();
    drop(established(to));
    assert!(newcomer.elapsed() < PATIENCE / 4);
}

/// One ClientHello from each of these sources, 200 to an address.
fn flood(to: SocketAddr, hello: &[u8], sources: std::ops::Range<u32>) {
    let mut sockets = Vec::new();
    for source in sources {
        let ip = Ipv4Addr::from_bits(u32::from(Ipv4Addr::new(127, 240, 0, 1)) + source / 200);
        let socket = UdpSocket::bind((ip, 0)).expect("a port");
        socket.send_to(hello, to).expect("sent");
        // Ports must not come again within a batch.
        sockets.push(socket);
    }
}

/// The bound that is documented for `limits.dtls_sessions`.
#[test]
fn a_session_costs_what_is_documented() {
    const SESSIONS: u64 = 300;
    let directory = tempfile::tempdir().expect("a directory");
    let relay = start(directory.path(), own_ip());
    let warm: Vec<_> = (0..50).map(|_| established(relay.address())).collect();
    let before = relay.memory();
    let sessions: Vec<_> = (0..SESSIONS).map(|_| established(relay.address())).collect();
    let each = relay.memory().saturating_sub(before) / SESSIONS;
    assert!(each < 80 << 10, "{each} bytes a session");
    drop((warm, sessions));
}
