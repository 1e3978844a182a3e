//! DTLS between client and relay (RFC 7350, RFC 6347).

use std::io::{Read, Write};
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use openssl::ssl::{ErrorCode, Ssl, SslContext, SslMethod, SslOptions, SslStream, SslVerifyMode};
use relay_node::certificates::{CertificateFiles, Certificates};
use relay_node::dataplane::{Dataplane, DataplaneConfig, DtlsLimits, StreamConfig, WorkerSnapshot};
use turn_core::{Change, EndReason, Transport};

use crate::client::{self, PATIENCE, TurnClient, again, dropped, eventually, start};

/// A socket as OpenSSL uses it: a read or a write is a datagram.
#[derive(Debug)]
pub(crate) struct Datagrams(pub(crate) UdpSocket);

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

/// A client's session that has not begun.
fn session() -> Result<Ssl> {
    let mut builder = SslContext::builder(SslMethod::dtls_client())?;
    builder.set_verify(SslVerifyMode::NONE);
    builder.set_options(SslOptions::NO_QUERY_MTU);
    let mut ssl = Ssl::new(&builder.build())?;
    ssl.set_connect_state();
    ssl.set_mtu(1400)?;
    Ok(ssl)
}

/// Completes the handshake of a client.
pub(crate) fn handshake(socket: UdpSocket) -> Result<SslStream<Datagrams>> {
    let mut stream = SslStream::new(session()?, Datagrams(socket))?;
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = stream.do_handshake() {
        if error.code() != ErrorCode::WANT_READ || Instant::now() > deadline {
            return Err(error).context("no DTLS session");
        }
    }
    Ok(stream)
}

/// As [`client::config`], with a certificate.
pub(crate) fn config(ip: &str, workers: u16, journal: &Path) -> Result<DataplaneConfig> {
    let made = rcgen::generate_simple_self_signed(vec!["turn.example".to_owned()])?;
    let files = CertificateFiles { certificate: journal.join("dtls.pem"), key: journal.join("dtls.key") };
    std::fs::write(&files.certificate, made.cert.pem())?;
    std::fs::write(&files.key, made.signing_key.serialize_pem())?;
    let certificates = Certificates::load(&[files]).map_err(|(_, error)| error)?;
    let streams = StreamConfig { certificates: Some(Arc::new(certificates)), ..StreamConfig::default() };
    Ok(DataplaneConfig { streams, ..client::config(ip, workers, journal) })
}

fn sum(dataplane: &Dataplane, of: impl Fn(&WorkerSnapshot) -> u64) -> u64 {
    dataplane.snapshots().iter().map(of).sum()
}

fn client(dataplane: &Dataplane) -> Result<TurnClient> {
    TurnClient::to(dataplane, Transport::Dtls, "127.0.0.1", "alice")
}

fn connected(relay: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.connect(relay)?;
    socket.set_read_timeout(Some(Duration::from_millis(10)))?;
    Ok(socket)
}

/// The socket of a client that has none.
fn socket(dataplane: &Dataplane) -> Result<UdpSocket> {
    connected(dataplane.listen()[0].bind)
}

#[test]
fn a_client_and_a_peer_talk_over_dtls() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&config("127.1.5.1", 2, directory.path())?)?;
    for _ in 0..4 {
        crate::call(&mut client(&dataplane)?)?;
    }
    // Plain clients beside them.
    crate::call(&mut TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice")?)?;
    // Application bytes are counted, not those of the records around them.
    let bytes = |direction: usize| sum(&dataplane, |worker| worker.bytes[direction]);
    let expected = 5 * 2 * (1 + 5 + 172 + 1200 + 9000);
    eventually("bytes are counted", || (bytes(0) == expected && bytes(1) == expected).then_some(()))?;

    // Two of them meet, over IPv6.
    let client = |user| TurnClient::to(&dataplane, Transport::Dtls, "::1", user);
    let (mut alice, mut bob) = (client("alice")?, client("bob")?);
    let (of_alice, of_bob) = (alice.allocate()?, bob.allocate()?);
    alice.bind_channel(0x4000, of_bob)?;
    bob.permit(of_alice)?;
    for number in 0..100u32 {
        alice.send(of_bob, &number.to_be_bytes())?;
        assert_eq!(bob.receive()?, (of_alice, number.to_be_bytes().to_vec()));
        bob.send(of_alice, &number.to_be_bytes())?;
        assert_eq!(alice.receive()?, (of_bob, number.to_be_bytes().to_vec()));
    }
    Ok(())
}

#[test]
fn the_allocation_ends_with_its_session() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, mut changes) = start(&config("127.1.5.2", 2, directory.path())?)?;
    let mut stream = handshake(socket(&dataplane)?)?;
    stream.get_ref().0.set_read_timeout(Some(Duration::from_millis(10)))?;
    let copy = stream.get_ref().0.try_clone()?;
    let mut client = TurnClient::by_session(stream, "alice")?;
    let relayed = client.allocate()?;
    client::hear(&mut changes);
    // close_notify.
    client.close()?;
    eventually("the end is reported", || {
        matches!(changes.try_recv(), Ok(Change::End { reason: EndReason::Closed, .. })).then_some(())
    })?;
    eventually("the relayed address is free", || UdpSocket::bind(relayed).ok())?;
    eventually("the session is gone", || (sum(&dataplane, |worker| worker.dtls_sessions) == 0).then_some(()))?;
    // The same port begins anew.
    stream = handshake(copy)?;
    TurnClient::by_session(stream, "alice")?.allocate()?;
    Ok(())
}

/// RFC 6347 §4.2.8: the old session goes on until the new one's handshake is complete, and not longer.
#[test]
fn a_client_that_lost_its_session_begins_a_new_one() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, mut changes) = start(&config("127.1.5.3", 2, directory.path())?)?;
    let socket = socket(&dataplane)?;
    let mut old = TurnClient::by_session(handshake(socket.try_clone()?)?, "alice")?;
    let peer = client::peer("127.0.0.1")?;
    let relayed = old.allocate()?;
    old.permit(peer.local_addr()?)?;

    // Somebody who begins and does not finish takes nothing away.
    assert!(half_handshake(socket.try_clone()?, PATIENCE)?);
    old.send(peer.local_addr()?, b"still there")?;
    assert_eq!(client::heard(&peer)?, (relayed, b"still there".to_vec()));

    client::hear(&mut changes);
    let mut new = TurnClient::by_session(handshake(socket)?, "alice")?;
    eventually("the old allocation ends", || {
        matches!(changes.try_recv(), Ok(Change::End { reason: EndReason::Closed, .. })).then_some(())
    })?;
    let relayed = new.allocate()?;
    new.permit(peer.local_addr()?)?;
    new.send(peer.local_addr()?, b"again")?;
    assert_eq!(client::heard(&peer)?, (relayed, b"again".to_vec()));
    eventually("one session is left", || (sum(&dataplane, |worker| worker.dtls_sessions) == 1).then_some(()))?;
    Ok(())
}

/// Never sees a ServerHello.
#[derive(Debug)]
struct Deaf {
    socket: UdpSocket,
    verified: bool,
    missed: bool,
}

impl Read for Deaf {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let length = self.socket.recv(buffer)?;
        match buffer[13] {
            2 => {
                self.missed = true;
                Err(std::io::ErrorKind::WouldBlock.into())
            }
            kind => {
                self.verified |= kind == 3;
                Ok(length)
            }
        }
    }
}

impl Write for Deaf {
    fn write(&mut self, datagram: &[u8]) -> std::io::Result<usize> {
        self.socket.send(datagram)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Brings its cookie, and then says no more. Whether the relay began a handshake within this time.
fn half_handshake(socket: UdpSocket, patience: Duration) -> Result<bool> {
    let mut stream = SslStream::new(session()?, Deaf { socket, verified: false, missed: false })?;
    let deadline = Instant::now() + patience;
    while !stream.get_ref().missed {
        match stream.do_handshake() {
            Err(error) if error.code() == ErrorCode::WANT_READ => {}
            other => bail!("a handshake without a ServerHello: {other:?}"),
        }
        if Instant::now() > deadline {
            return Ok(false);
        }
    }
    assert!(stream.get_ref().verified, "a HelloVerifyRequest comes first");
    Ok(true)
}

#[test]
fn allocations_of_sessions_end_with_the_process() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let config = config("127.1.5.4", 2, directory.path())?;
    let (dataplane, _changes) = start(&config)?;
    let socket = socket(&dataplane)?;
    let mut client = TurnClient::by_session(handshake(socket.try_clone()?)?, "alice")?;
    let relayed = client.allocate()?;
    let config = again(&config, &dataplane);
    dataplane.stop();
    let (dataplane, mut changes) = start(&config)?;
    let Ok(Change::End { reason: EndReason::Closed, epoch: 2, .. }) = changes.try_recv() else {
        bail!("the end is not reported");
    };
    assert!(UdpSocket::bind(relayed).is_ok(), "nobody holds its address");
    // P5: its records mean nothing to the new process, which is silent.
    client.write(b"\x00\x01\x00\x00\x21\x12\xA4\x42abcdefghijkl")?;
    eventually("it is counted", || (dropped(&dataplane, "dtls_no_session") == 1).then_some(()))?;
    TurnClient::by_session(handshake(socket)?, "alice")?.allocate()?;
    Ok(())
}

/// The first ClientHello of OpenSSL, and one of the least that there can be.
fn first_hellos() -> Result<Vec<Vec<u8>>> {
    let catcher = UdpSocket::bind("127.0.0.1:0")?;
    let socket = connected(catcher.local_addr()?)?;
    let mut stream = SslStream::new(session()?, Datagrams(socket))?;
    assert!(stream.do_handshake().is_err());
    let mut buffer = [0; 2048];
    let length = catcher.recv(&mut buffer)?;
    let whole = buffer[..length].to_vec();
    // Its first fragment, cut behind the empty cookie.
    let mut least = whole[..60 + usize::from(whole[59]) + 1].to_vec();
    let record = (least.len() - 13) as u8;
    (least[11], least[12]) = (0, record);
    (least[22], least[23], least[24]) = (0, 0, record - 12);
    Ok(vec![whole, least])
}

/// abuse.md D: no state before the client's address is proved, and never more bytes than it sent.
#[test]
fn first_hellos_are_answered_without_remembering_anybody() -> Result<()> {
    const CLIENTS: usize = 200;
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&config("127.1.5.5", 2, directory.path())?)?;
    let mut cookies = std::collections::HashSet::new();
    let mut sockets = Vec::new();
    for hello in first_hellos()? {
        for _ in 0..CLIENTS {
            sockets.push(socket(&dataplane)?);
            let socket = sockets.last().context("pushed")?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.send(&hello)?;
            let mut answer = [0; 2048];
            let length = socket.recv(&mut answer)?;
            assert!(length <= hello.len(), "{length} bytes for {}", hello.len());
            assert_eq!((answer[0], answer[13]), (22, 3), "HelloVerifyRequest");
            cookies.insert(answer[28..length].to_vec());
        }
    }
    assert_eq!(cookies.len(), 2 * CLIENTS, "each address has its own");
    eventually("answers are counted", || {
        (sum(&dataplane, |worker| worker.hello_verify_requests) == 2 * CLIENTS as u64).then_some(())
    })?;
    assert_eq!(sum(&dataplane, |worker| worker.dtls_sessions), 0);

    // Noise in the range of DTLS, and what QUIC begins with (abuse.md D): silence, counted.
    let socket = socket(&dataplane)?;
    socket.send(&[22; 1200])?;
    socket.send(&[&[23, 0xFE, 0xFD, 0, 1][..], &[9; 100]].concat())?;
    eventually("records of nobody", || (dropped(&dataplane, "dtls_no_session") == 2).then_some(()))?;
    socket.send(&[0xC3; 1200])?;
    eventually("QUIC", || (dropped(&dataplane, "malformed") == 1).then_some(()))?;
    assert!(socket.recv(&mut [0; 100]).is_err());
    Ok(())
}

#[test]
fn handshakes_and_sessions_are_bounded() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let limits = DtlsLimits {
        sessions: 3,
        handshakes: 2,
        handshake_time: Duration::from_secs(3),
        idle_time: Duration::from_secs(1),
    };
    let config = DataplaneConfig { dtls_limits: limits, ..config("127.1.5.6", 1, directory.path())? };
    let (dataplane, _changes) = start(&config)?;
    let soon = Duration::from_millis(200);
    for _ in 0..3 {
        assert!(half_handshake(socket(&dataplane)?, PATIENCE)?, "one too many ends the oldest");
    }
    eventually("it is counted", || (dropped(&dataplane, "dtls_handshakes") == 1).then_some(()))?;
    assert_eq!(sum(&dataplane, |worker| worker.dtls_handshakes), 2);
    // Nobody is kept out by them.
    let mut client = client(&dataplane)?;
    client.allocate()?;
    // They end by themselves.
    eventually("handshakes time out", || (sum(&dataplane, |worker| worker.dtls_handshakes) == 0).then_some(()))?;

    // One session has an allocation; two without end after a while, and until then a fourth finds no room.
    let _idle = (handshake(socket(&dataplane)?)?, handshake(socket(&dataplane)?)?);
    let idle = Instant::now();
    let fourth = half_handshake(socket(&dataplane)?, soon)?;
    assert!(!fourth || idle.elapsed() > Duration::from_secs(1));
    eventually("idle sessions end", || (sum(&dataplane, |worker| worker.dtls_sessions) == 1).then_some(()))?;
    client.permit("127.0.0.1:9".parse()?)?;
    Ok(())
}
