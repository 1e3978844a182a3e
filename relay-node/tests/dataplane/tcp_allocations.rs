//! TCP allocations (RFC 6062) over real sockets: connections out of and into relayed addresses, bound on whichever
//! worker accepts the client's data connection, over TCP and TLS.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use relay_node::certificates::{CertificateFiles, Certificates};
use relay_node::dataplane::{Dataplane, DataplaneConfig, StreamConfig};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig as TlsConfig, ClientConnection, RootCertStore, StreamOwned};
use turn_core::client::{Client, ClientConfig, Event, Failure};
use turn_core::wire::stream::{Frame, frame};
use turn_core::{AllocationId, Change, EndReason, Limits, PeerConnectionId, Settings, Transport};

use crate::client::{PATIENCE, TurnClient, again, config, dropped, eventually, peer, settings, start};

/// Long enough to be said not to have come.
const QUIET: Duration = Duration::from_millis(10);

/// A connection to the relay.
enum Wire {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Wire {
    /// To the relay; over TLS with a configuration.
    fn open(dataplane: &Dataplane, tls: Option<&Arc<TlsConfig>>) -> Result<Self> {
        let mut listen = dataplane.listen().iter();
        let relay = listen.find(|listen| listen.transport == Transport::Tcp).context("a TCP listener")?.bind;
        let stream = TcpStream::connect(relay)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(QUIET))?;
        Ok(match tls {
            None => Self::Plain(stream),
            Some(config) => {
                let session = ClientConnection::new(Arc::clone(config), ServerName::try_from("turn.example.org")?)?;
                Self::Tls(Box::new(StreamOwned::new(session, stream)))
            }
        })
    }

    fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => &stream.sock,
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Self::Plain(stream) => stream.write_all(bytes),
            Self::Tls(stream) => stream.write_all(bytes).and_then(|()| stream.flush()),
        }
    }
}

/// A client with its connection: a control connection, or one that becomes a data connection.
pub(crate) struct Session {
    wire: Wire,
    unread: Vec<u8>,
    client: Client,
}

impl Session {
    fn new(dataplane: &Dataplane, tls: Option<&Arc<TlsConfig>>, user: &str) -> Result<Self> {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed)?;
        let client = Client::new(ClientConfig {
            transport: if tls.is_some() { Transport::Tls } else { Transport::Tcp },
            username: user.into(),
            password: b"secret".into(),
            family: None,
            lifetime: None,
            seed,
        });
        Ok(Self { wire: Wire::open(dataplane, tls)?, unread: Vec::new(), client })
    }

    /// With a TCP allocation of alice; its relayed address.
    fn allocated(dataplane: &Dataplane, tls: Option<&Arc<TlsConfig>>) -> Result<(Self, SocketAddr)> {
        Self::allocated_by(dataplane, tls, "alice")
    }

    /// With a TCP allocation; its relayed address.
    pub(crate) fn allocated_by(
        dataplane: &Dataplane,
        tls: Option<&Arc<TlsConfig>>,
        user: &str,
    ) -> Result<(Self, SocketAddr)> {
        let mut session = Self::new(dataplane, tls, user)?;
        match session.perform(Client::allocate_tcp)? {
            Event::Allocated { relayed, .. } => Ok((session, relayed)),
            other => bail!("no allocation: {other:?}"),
        }
    }

    fn perform(&mut self, act: impl FnOnce(&mut Client, Instant)) -> Result<Event> {
        act(&mut self.client, Instant::now());
        self.next_event()
    }

    fn next_event(&mut self) -> Result<Event> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(event) = self.client.poll_event() {
                return Ok(event);
            }
            while let Some(packet) = self.client.poll_transmit() {
                self.wire.write(&packet)?;
            }
            if let Frame::Whole(length) = frame(&self.unread) {
                let packet: Vec<u8> = self.unread.drain(..length).collect();
                self.client.handle_packet(Instant::now(), &packet);
                continue;
            }
            let mut buffer = [0; 4096];
            match self.wire.read(&mut buffer) {
                Ok(0) => bail!("the relay closed the connection"),
                Ok(length) => self.unread.extend(&buffer[..length]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error.into()),
            }
        }
        bail!("the relay does not answer")
    }

    fn code(&mut self, act: impl FnOnce(&mut Client, Instant)) -> Result<u16> {
        match self.perform(act)? {
            Event::Failed(_, Failure::Refused(code)) => Ok(code.code()),
            other => bail!("not refused: {other:?}"),
        }
    }

    fn permit(&mut self, peer: SocketAddr) -> Result<()> {
        let event = self.perform(|client, now| client.permit(now, &[peer.ip()]))?;
        ensure!(matches!(event, Event::Permitted(_)), "no permission: {event:?}");
        Ok(())
    }

    /// Connects to a peer; the name of the connection.
    pub(crate) fn connect(&mut self, to: SocketAddr) -> Result<PeerConnectionId> {
        match self.perform(|client, now| client.connect(now, to))? {
            Event::Connected(peer, id) if peer == to => Ok(id),
            other => bail!("no connection: {other:?}"),
        }
    }

    /// Waits for a peer; its address and the name of its connection.
    fn attempt(&mut self) -> Result<(SocketAddr, PeerConnectionId)> {
        match self.next_event()? {
            Event::ConnectionAttempt(peer, id) => Ok((peer, id)),
            other => bail!("no ConnectionAttempt: {other:?}"),
        }
    }
}

/// A client data connection.
pub(crate) struct Data {
    wire: Wire,
    unread: Vec<u8>,
}

impl Data {
    /// Claims a connection of alice on a new connection, with `behind` in the same packet as the signed request.
    fn bind(dataplane: &Dataplane, tls: Option<&Arc<TlsConfig>>, id: PeerConnectionId, behind: &[u8]) -> Result<Self> {
        Self::bind_by(dataplane, tls, "alice", id, behind)
    }

    /// As [`Data::bind`], of any user.
    pub(crate) fn bind_by(
        dataplane: &Dataplane,
        tls: Option<&Arc<TlsConfig>>,
        user: &str,
        id: PeerConnectionId,
        behind: &[u8],
    ) -> Result<Self> {
        let mut session = Session::new(dataplane, tls, user)?;
        session.client.connection_bind(Instant::now(), id);
        // The first request is not authenticated, so nothing stands behind it.
        let packet = session.client.poll_transmit().context("a request")?;
        session.wire.write(&packet)?;
        let mut signed = false;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(packet) = session.client.poll_transmit() {
                session.wire.write(&[&packet, behind].concat())?;
                signed = true;
            }
            if let Frame::Whole(length) = frame(&session.unread) {
                let packet: Vec<u8> = session.unread.drain(..length).collect();
                session.client.handle_packet(Instant::now(), &packet);
            }
            match session.client.poll_event() {
                Some(Event::ConnectionBound(bound)) if bound == id && signed => {
                    return Ok(Self { wire: session.wire, unread: session.unread });
                }
                Some(other) => bail!("not bound: {other:?}"),
                None => {}
            }
            let mut buffer = [0; 4096];
            match session.wire.read(&mut buffer) {
                Ok(0) => bail!("the relay closed the data connection"),
                Ok(length) => session.unread.extend(&buffer[..length]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error.into()),
            }
        }
        bail!("no answer to the ConnectionBind")
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.wire.write(bytes)?)
    }

    /// Exactly so many bytes.
    pub(crate) fn read(&mut self, length: usize) -> Result<Vec<u8>> {
        let deadline = Instant::now() + PATIENCE;
        while self.unread.len() < length {
            ensure!(Instant::now() < deadline, "{} of {length} bytes have come", self.unread.len());
            let mut buffer = vec![0; 65_536];
            match self.wire.read(&mut buffer) {
                Ok(0) => bail!("the end after {} of {length} bytes", self.unread.len()),
                Ok(length) => self.unread.extend(&buffer[..length]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(self.unread.drain(..length).collect())
    }

    /// Waits for the end of the stream.
    pub(crate) fn ends(mut self) -> Result<()> {
        ensure!(self.unread.is_empty(), "{} bytes before the end", self.unread.len());
        ends(|buffer| self.wire.read(buffer))
    }
}

/// Waits for the end of a stream, or its reset.
fn ends(mut read: impl FnMut(&mut [u8]) -> std::io::Result<usize>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        match read(&mut [0; 64]) {
            Ok(0) => return Ok(()),
            Ok(length) => bail!("{length} bytes instead of the end"),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            // TLS without close_notify, or a reset.
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof) => {
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        }
    }
    bail!("still open")
}

fn peer_ends(mut peer: TcpStream) -> Result<()> {
    peer.set_read_timeout(Some(PATIENCE))?;
    ends(|buffer| peer.read(buffer))
}

/// A peer that accepts.
pub(crate) fn listener() -> Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

pub(crate) fn accept(listener: &TcpListener) -> Result<(TcpStream, SocketAddr)> {
    let (stream, from) = listener.accept()?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok((stream, from))
}

/// A relay with TLS, and what its clients trust.
pub(crate) fn secure(config: DataplaneConfig, directory: &Path) -> Result<(DataplaneConfig, Arc<TlsConfig>)> {
    let made = rcgen::generate_simple_self_signed(["turn.example.org".to_owned()])?;
    let files = CertificateFiles { certificate: directory.join("tls.pem"), key: directory.join("tls.key") };
    std::fs::write(&files.certificate, made.cert.pem())?;
    std::fs::write(&files.key, made.signing_key.serialize_pem())?;
    let certificates = Arc::new(Certificates::load(&[files]).map_err(|(_, error)| error)?);
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(made.cert.pem().as_bytes())?)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = TlsConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let streams = StreamConfig { certificates: Some(certificates), ..StreamConfig::default() };
    Ok((DataplaneConfig { streams, ..config }, Arc::new(tls)))
}

/// Bytes that are nowhere the same.
pub(crate) fn noise(length: usize) -> Vec<u8> {
    (0..length as u64).map(|index| (index.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8).collect()
}

#[test]
fn a_client_connects_to_peers_over_tcp_and_tls_on_any_worker() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (config, tls) = secure(config("127.1.2.1", 3, directory.path()), directory.path())?;
    let (dataplane, _changes) = start(&config)?;
    let (listener, address) = listener()?;
    let payload = noise(1_500_000);
    let mut moved = 0;
    for tls in [None, Some(&tls)] {
        let (mut control, relayed) = Session::allocated(&dataplane, tls)?;
        // The kernel spreads them over the workers.
        for round in 0..8 {
            // RFC 6062 §5.2: 446 while the one before is not known to have ended.
            let id = eventually("another connection to the peer", || control.connect(address).ok())?;
            let (mut peer, from) = accept(&listener)?;
            assert_eq!(from, relayed, "RFC 6062 §5.2: it comes from the relayed address");
            let mut data = Data::bind(&dataplane, tls, id, b"behind")?;
            let mut first = [0; 6];
            peer.read_exact(&mut first)?;
            assert_eq!(&first, b"behind", "{round}");

            let writer = std::thread::spawn({
                let (mut peer, payload) = (peer.try_clone()?, payload.clone());
                move || peer.write_all(&payload)
            });
            assert!(data.read(payload.len())? == payload, "{round}: from the peer");
            writer.join().expect("no panic")?;
            let reader = std::thread::spawn({
                let length = payload.len();
                move || {
                    let mut all = vec![0; length];
                    peer.read_exact(&mut all).map(|()| (peer, all))
                }
            });
            data.write(&payload)?;
            let (peer, all) = reader.join().expect("no panic")?;
            assert!(all == payload, "{round}: to the peer");
            moved += payload.len() as u64;
            drop(data);
            peer_ends(peer).context("RFC 6062 §5.5: the client has closed")?;
        }
        drop(control);
        eventually("the connection is gone", || {
            let open: u64 = dataplane.snapshots().iter().map(|worker| worker.connections).sum();
            (open == 0).then_some(())
        })?;
    }
    let bytes = |index: usize| dataplane.snapshots().iter().map(|worker| worker.bytes[index]).sum::<u64>();
    eventually("both directions are counted", || (bytes(0) == moved + 16 * 6 && bytes(1) == moved).then_some(()))?;
    Ok(())
}

#[test]
fn a_permitted_peer_is_announced_and_what_it_sent_before_is_kept() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (config, tls) = secure(config("127.1.2.2", 2, directory.path()), directory.path())?;
    let (dataplane, _changes) = start(&config)?;
    for tls in [None, Some(&tls)] {
        let (mut control, relayed) = Session::allocated(&dataplane, tls)?;
        peer_ends(TcpStream::connect(relayed)?).context("RFC 6062 §5.3: no permission")?;
        control.permit("127.0.0.1:0".parse()?)?;
        let mut peer = TcpStream::connect(relayed)?;
        let early = noise(100_000);
        peer.write_all(&early)?;
        let (from, id) = control.attempt()?;
        assert_eq!(from, peer.local_addr()?);
        let mut data = Data::bind(&dataplane, tls, id, b"")?;
        assert!(data.read(early.len())? == early);
        peer.write_all(b"later")?;
        assert_eq!(data.read(5)?, b"later");
        data.write(b"answer")?;
        let mut answer = [0; 6];
        peer.set_read_timeout(Some(PATIENCE))?;
        peer.read_exact(&mut answer)?;
        assert_eq!(&answer, b"answer");

        // Another one, closed by the peer.
        drop(peer);
        data.ends().context("RFC 6062 §5.5: the peer has closed")?;
    }
    eventually("the refusal is counted", || (dropped(&dataplane, "no_permission") == 2).then_some(()))?;
    Ok(())
}

#[test]
fn one_end_may_close_before_the_other() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&config("127.1.2.3", 2, directory.path()))?;
    let (listener, address) = listener()?;
    let (mut control, _) = Session::allocated(&dataplane, None)?;
    let id = control.connect(address)?;
    let (mut peer, _) = accept(&listener)?;
    let mut data = Data::bind(&dataplane, None, id, b"question")?;
    data.wire.socket().shutdown(Shutdown::Write)?;
    let mut question = Vec::new();
    peer.read_to_end(&mut question)?;
    assert_eq!(question, b"question");
    let answer = noise(3_000_000);
    let writer = std::thread::spawn({
        let answer = answer.clone();
        move || peer.write_all(&answer)
    });
    assert!(data.read(answer.len())? == answer);
    writer.join().expect("no panic")?;
    data.ends()?;
    // It has ended: the same peer again.
    eventually("the connection is forgotten", || control.connect(address).ok())?;
    Ok(())
}

#[test]
fn who_does_not_read_holds_the_other_back() -> Result<()> {
    const ENOUGH: usize = 64 << 20;
    let directory = tempfile::tempdir()?;
    let (config, tls) = secure(config("127.1.2.4", 1, directory.path()), directory.path())?;
    let (dataplane, _changes) = start(&config)?;
    let (listener, address) = listener()?;
    for tls in [None, Some(&tls)] {
        let (mut control, _) = Session::allocated(&dataplane, tls)?;
        let id = control.connect(address)?;
        let (mut peer, _) = accept(&listener)?;
        let mut data = Data::bind(&dataplane, tls, id, b"")?;
        // The peer sends until nothing more is taken for a while: what is between is bounded.
        peer.set_write_timeout(Some(Duration::from_millis(300)))?;
        let chunk = noise(65_536);
        let mut sent = 0;
        loop {
            match peer.write(&chunk[sent % chunk.len()..]) {
                Ok(taken) => sent += taken,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break,
                Err(error) => return Err(error.into()),
            }
            assert!(sent < ENOUGH, "nobody holds it back");
        }
        peer.shutdown(Shutdown::Write)?;
        let mut at = 0;
        while at < sent {
            let length = (sent - at).min(chunk.len());
            assert!(data.read(length)? == chunk[..length], "whole and in order");
            at += length;
        }
        // The end stands behind the last byte; while it waits, the worker turns no faster than its tick.
        data.ends()?;
        drop(peer);
    }
    Ok(())
}

#[test]
fn data_connections_end_with_the_allocation() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, mut changes) = start(&config("127.1.2.5", 3, directory.path()))?;
    let (listener, address) = listener()?;
    let mut newest = || -> Option<AllocationId> {
        let mut id = None;
        while let Ok(change) = changes.try_recv() {
            if let Change::Put(record) = change {
                id = Some(record.id);
            }
        }
        id
    };
    for way in ["Refresh 0", "control connection", "revoke"] {
        let (mut control, relayed) = Session::allocated(&dataplane, None)?;
        control.permit(address)?;
        let mut bound = Vec::new();
        for _ in 0..5 {
            let outside = TcpStream::connect(relayed)?;
            let (_, id) = control.attempt()?;
            bound.push((Data::bind(&dataplane, None, id, b"")?, outside));
        }
        let connected = control.connect(address)?;
        let (parked, _) = accept(&listener)?;
        match way {
            "Refresh 0" => {
                let event = control.perform(|client, now| client.refresh(now, 0))?;
                assert_eq!(event, Event::Refreshed(0));
            }
            "control connection" => drop(control),
            _ => dataplane.revoke(newest().context("a record")?),
        }
        for (data, outside) in bound {
            data.ends().context(way)?;
            peer_ends(outside).context(way)?;
        }
        peer_ends(parked).context(way)?;
        eventually("the relayed address is free", || TcpListener::bind(relayed).ok()).context(way)?;
        let code =
            Session::new(&dataplane, None, "alice")?.code(|client, now| client.connection_bind(now, connected))?;
        assert_eq!(code, 400, "{way}");
    }
    Ok(())
}

#[test]
fn what_is_refused() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&config("127.1.2.6", 2, directory.path()))?;
    let (listener, address) = listener()?;
    let (mut control, relayed) = Session::allocated(&dataplane, None)?;
    let id = control.connect(address)?;
    let _peer = accept(&listener)?;
    assert_eq!(control.code(|client, now| client.connect(now, address))?, 446);
    let closed = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    assert_eq!(control.code(|client, now| client.connect(now, closed))?, 447, "nobody listens there");
    let own = dataplane.listen()[1].bind;
    for (what, forbidden) in [
        ("own listener", own),
        ("own IP", SocketAddr::new(own.ip(), 22)),
        ("itself", relayed),
        ("private", "10.0.0.1:80".parse()?),
    ] {
        assert_eq!(control.code(|client, now| client.connect(now, forbidden))?, 403, "{what}");
    }
    let mut udp = TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice")?;
    let of_udp = udp.allocate()?;
    assert_eq!(control.code(|client, now| client.connect(now, of_udp))?, 403, "a UDP allocation");
    assert_eq!(control.code(|client, now| client.connection_bind(now, id))?, 400, "on the control connection");

    let bind = |user: &str, id| -> Result<u16> {
        Session::new(&dataplane, None, user)?.code(|client, now| client.connection_bind(now, id))
    };
    assert_eq!(bind("bob", id)?, 441, "another user's");
    assert_eq!(bind("alice", PeerConnectionId(id.0 ^ 1))?, 400, "unknown");
    let _data = Data::bind(&dataplane, None, id, b"")?;
    assert_eq!(bind("alice", id)?, 400, "bound already");
    assert_eq!(Session::new(&dataplane, None, "alice")?.code(|client, now| client.connect(now, address))?, 437);
    // A datagram to the relayed address is nobody's.
    peer("127.0.0.1")?.send_to(b"x", relayed)?;
    Ok(())
}

#[test]
fn two_allocations_of_one_relay_meet() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&config("127.1.2.7", 2, directory.path()))?;
    let (mut alice, of_alice) = Session::allocated(&dataplane, None)?;
    let (mut bob, of_bob) = Session::allocated(&dataplane, None)?;
    bob.permit(of_alice)?;
    let id = alice.connect(of_bob)?;
    let (from, bobs) = bob.attempt()?;
    assert_eq!(from, of_alice);
    let mut one = Data::bind(&dataplane, None, id, b"hello")?;
    let mut other = Data::bind(&dataplane, None, bobs, b"welcome")?;
    assert_eq!(other.read(5)?, b"hello");
    assert_eq!(one.read(7)?, b"welcome");
    drop(one);
    other.ends()?;
    Ok(())
}

#[test]
fn connections_are_bounded() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let config = DataplaneConfig { max_connections: 6, ..config("127.1.2.8", 1, directory.path()) };
    let (dataplane, _changes) = start(&config)?;
    let (listener, address) = listener()?;
    let limits = Limits { peer_connections_per_allocation: 2, ..Limits::default() };
    dataplane.configure(Arc::new(Settings { limits, ..(*settings()).clone() }));
    let (mut control, relayed) = Session::allocated(&dataplane, None)?;
    control.permit(address)?;
    control.connect(address)?;
    let _peer = accept(&listener)?;
    let _outside = TcpStream::connect(relayed)?;
    control.attempt()?;
    let (_other, other) = self::listener()?;
    assert_eq!(control.code(|client, now| client.connect(now, other))?, 508);
    peer_ends(TcpStream::connect(relayed)?).context("one too many of the allocation")?;
    eventually("it is counted", || (dropped(&dataplane, "peer_connections") == 1).then_some(()))?;

    // Of the node: as many as client connections.
    dataplane.configure(settings());
    let mut more = Vec::new();
    for _ in 0..4 {
        more.push(TcpStream::connect(relayed)?);
        control.attempt()?;
    }
    peer_ends(TcpStream::connect(relayed)?).context("one too many of the node")?;
    assert_eq!(control.code(|client, now| client.connect(now, other))?, 508);
    // A pipe is a connection still.
    drop(more.pop());
    Ok(())
}

#[test]
fn a_tcp_allocation_ends_with_the_process() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let config = config("127.1.2.9", 2, directory.path());
    let (dataplane, _changes) = start(&config)?;
    let (_control, relayed) = Session::allocated(&dataplane, None)?;
    let config = again(&config, &dataplane);
    dataplane.stop();
    let (_dataplane, mut changes) = start(&config)?;
    let Ok(Change::End { reason: EndReason::Closed, .. }) = changes.try_recv() else {
        bail!("the end is not reported");
    };
    assert!(TcpListener::bind(relayed).is_ok(), "nobody listens at its address");
    Ok(())
}
