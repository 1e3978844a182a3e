//! A TURN client over a real socket, and a data plane to talk to.

#[path = "../../src/dataplane/sample.rs"]
mod sample;

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use openssl::ssl::{ErrorCode, SslStream};
use relay_node::dataplane::{
    ChangeReceiver, Dataplane, DataplaneConfig, DtlsLimits, Listen, RelayIp, RelayedMode, StreamConfig,
};
use relay_node::journal;
use turn_core::client::{Client, ClientConfig, Event, Extensions, Failure};
use turn_core::wire::stream::{Frame, frame};
use turn_core::wire::{ChannelNumber, Method};
use turn_core::{Key, KeyRing, Policy, Record, Settings, StaticUser, Transport};

use crate::dtls::{self, Datagrams};

/// Beyond any scheduling on a loaded machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
const PASSWORD: &[u8] = b"secret";

/// Asks until there is an answer.
/// Somebody has heard of what was made until now: its end will be told.
pub(crate) fn hear(changes: &mut ChangeReceiver) {
    while changes.try_recv().is_ok() {}
}

pub(crate) fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return Ok(answer);
        }
        if Instant::now() > deadline {
            bail!("not within {PATIENCE:?}: {what}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Users alice and bob; loopback is open to peers.
pub(crate) fn settings() -> Arc<Settings> {
    let user = |name: &[u8]| StaticUser { username: name.into(), password: PASSWORD.into() };
    Arc::new(Settings {
        realm: "test".into(),
        nonce_keys: KeyRing(vec![Key { id: 1, secret: vec![7; 32] }]),
        static_users: vec![user(b"alice"), user(b"bob")],
        policy: Policy { allow_loopback: true, ..Policy::default() },
        ..Settings::default()
    })
}

/// What `TURNPIKE_RELAYED` says.
pub(crate) fn mode() -> RelayedMode {
    match std::env::var("TURNPIKE_RELAYED").as_deref() {
        Ok("wildcard") => RelayedMode::Wildcard,
        _ => RelayedMode::Sockets,
    }
}

/// Ports for a test process. What is steered is bound by nobody, so each has its own of an address that they share.
fn relay_ports() -> RangeInclusive<u16> {
    match mode() {
        RelayedMode::Wildcard => {
            let low = 10_000 + (std::process::id() % 11) as u16 * 2000;
            low..=low + 1999
        }
        RelayedMode::Auto | RelayedMode::Sockets => 20_000..=29_999,
    }
}

/// A data plane on one loopback address; relayed addresses of IPv6 at ::1.
pub(crate) fn config(ip: &str, workers: u16, journal: &Path) -> DataplaneConfig {
    let mut config = sample::config(ip, workers, journal);
    let v6 = "::1".parse().expect("literal");
    config.listen.push(Listen { transport: Transport::Udp, bind: SocketAddr::new(v6, 0) });
    config.relay_ips.push(RelayIp { bound: v6, advertised: v6 });
    DataplaneConfig { relayed: mode(), relay_ports: relay_ports(), ..config }
}

/// Starts from what the journal holds.
pub(crate) fn start(config: &DataplaneConfig) -> Result<(Dataplane, ChangeReceiver)> {
    start_with(config, journal::load(&config.journal, &KeyRing::default())?.records)
}

/// Starts with these records.
pub(crate) fn start_with(config: &DataplaneConfig, records: Vec<Record>) -> Result<(Dataplane, ChangeReceiver)> {
    Dataplane::start(config.clone(), settings(), records)
}

/// The same configuration at the addresses that a first start chose, under the next epoch.
pub(crate) fn again(config: &DataplaneConfig, dataplane: &Dataplane) -> DataplaneConfig {
    DataplaneConfig { listen: dataplane.listen().to_vec(), epoch: config.epoch + 1, ..config.clone() }
}

/// Connections refused for a reason over all workers, once that has been published.
pub(crate) fn refused(dataplane: &Dataplane, label: &str) -> u64 {
    let snapshots = dataplane.snapshots();
    let of_label = snapshots.iter().flat_map(|worker| &worker.refused_connections).filter(|(name, _)| *name == label);
    of_label.map(|(_, count)| count).sum()
}

/// A count over all workers, once it has been published.
pub(crate) fn dropped(dataplane: &Dataplane, label: &str) -> u64 {
    let snapshots = dataplane.snapshots();
    let of_label = snapshots.iter().flat_map(|worker| &worker.dropped).filter(|(name, _)| *name == label);
    of_label.map(|(_, count)| count).sum()
}

/// What carries a stream's bytes.
pub(crate) trait Duplex: Read + Write {}
impl<T: Read + Write> Duplex for T {}

enum Wire {
    Udp(UdpSocket),
    Stream { stream: Box<dyn Duplex>, local: SocketAddr, unread: Vec<u8> },
    Dtls(SslStream<Datagrams>),
}

/// A client and its socket.
pub(crate) struct TurnClient {
    wire: Wire,
    client: Client,
    pub(crate) data: VecDeque<(SocketAddr, Vec<u8>)>,
    /// How many bytes a stream sends at once.
    pub(crate) piece: usize,
}

impl TurnClient {
    /// Over UDP from `local`, port chosen by the system, or TCP.
    pub(crate) fn new(transport: Transport, local: &str, relay: SocketAddr, user: &str) -> Result<Self> {
        if transport.is_stream() {
            let stream = connect(relay)?;
            let local = stream.local_addr()?;
            return Self::over(Box::new(stream), local, transport, user);
        }
        let socket = UdpSocket::bind((local, 0))?;
        socket.connect(relay)?;
        socket.set_read_timeout(Some(Duration::from_millis(10)))?;
        if transport == Transport::Dtls {
            return Self::by_session(dtls::handshake(socket)?, user);
        }
        Self::on(Wire::Udp(socket), relay.is_ipv6(), transport, user)
    }

    /// Over DTLS, by a session that is there already.
    pub(crate) fn by_session(stream: SslStream<Datagrams>, user: &str) -> Result<Self> {
        let is_v6 = stream.get_ref().0.peer_addr()?.is_ipv6();
        Self::on(Wire::Dtls(stream), is_v6, Transport::Dtls, user)
    }

    /// Over a stream that is there already, which does not wait long when it is read.
    pub(crate) fn over(stream: Box<dyn Duplex>, local: SocketAddr, transport: Transport, user: &str) -> Result<Self> {
        Self::on(Wire::Stream { stream, local, unread: Vec::new() }, local.is_ipv6(), transport, user)
    }

    fn on(wire: Wire, is_v6: bool, transport: Transport, user: &str) -> Result<Self> {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed)?;
        let client = Client::new(ClientConfig {
            transport,
            username: user.into(),
            password: PASSWORD.into(),
            family: is_v6.then_some(turn_core::Family::V6),
            lifetime: None,
            seed,
        });
        Ok(Self { wire, client, data: VecDeque::new(), piece: usize::MAX })
    }

    /// To the data plane's listener of a transport and family.
    pub(crate) fn to(dataplane: &Dataplane, transport: Transport, local: &str, user: &str) -> Result<Self> {
        let v6 = local.contains(':');
        let mut listen = dataplane.listen().iter();
        let listens = if transport == Transport::Dtls { Transport::Udp } else { transport };
        let found = listen.find(|listen| listen.transport == listens && listen.bind.is_ipv6() == v6);
        Self::new(transport, local, found.context("a listener")?.bind, user)
    }

    pub(crate) fn local(&self) -> Result<SocketAddr> {
        Ok(match &self.wire {
            Wire::Udp(socket) => socket.local_addr()?,
            Wire::Stream { local, .. } => *local,
            Wire::Dtls(stream) => stream.get_ref().0.local_addr()?,
        })
    }

    /// Sends what the client has, reads once, and hands out what happened.
    pub(crate) fn turn(&mut self) -> Result<Option<Event>> {
        if let Some(event) = self.client.poll_event() {
            return Ok(Some(event));
        }
        while let Some(packet) = self.client.poll_transmit() {
            self.transmit(&packet)?;
        }
        if self.client.poll_timeout().is_some_and(|at| at <= Instant::now()) {
            self.client.handle_timeout(Instant::now());
        }
        if let Some(packet) = self.read()? {
            self.client.handle_packet(Instant::now(), &packet);
            while let Some(event) = self.client.poll_event() {
                if let Event::Data(peer, range) = event {
                    self.data.push_back((peer, packet[range].to_vec()));
                } else {
                    return Ok(Some(event));
                }
            }
        }
        Ok(None)
    }

    fn transmit(&mut self, packet: &[u8]) -> Result<()> {
        match &mut self.wire {
            Wire::Udp(socket) => drop(socket.send(packet)?),
            Wire::Dtls(stream) => drop(stream.ssl_write(packet)?),
            Wire::Stream { stream, .. } => {
                packet
                    .chunks(self.piece)
                    .try_for_each(|piece| stream.write_all(piece).and_then(|()| stream.flush()))?;
            }
        }
        Ok(())
    }

    /// Sends bytes as they are.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.transmit(bytes)
    }

    /// Says close_notify.
    pub(crate) fn close(&mut self) -> Result<()> {
        if let Wire::Dtls(stream) = &mut self.wire {
            stream.shutdown()?;
        }
        Ok(())
    }

    /// One datagram or frame, if there is one soon. The end of a stream is an error.
    fn read(&mut self) -> Result<Option<Vec<u8>>> {
        let mut buffer = vec![0; 65_536];
        let quiet = |error: &std::io::Error| matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
        match &mut self.wire {
            Wire::Udp(socket) => match socket.recv(&mut buffer) {
                Ok(length) => {
                    buffer.truncate(length);
                    Ok(Some(buffer))
                }
                Err(error) if quiet(&error) => Ok(None),
                Err(error) => Err(error.into()),
            },
            Wire::Dtls(stream) => match stream.ssl_read(&mut buffer) {
                Ok(length) => {
                    buffer.truncate(length);
                    Ok(Some(buffer))
                }
                Err(error) if error.code() == ErrorCode::WANT_READ => Ok(None),
                Err(error) => Err(error.into()),
            },
            Wire::Stream { stream, unread, .. } => {
                if !matches!(frame(unread), Frame::Whole(_)) {
                    match stream.read(&mut buffer) {
                        Ok(0) => bail!("the relay closed the connection"),
                        Ok(length) => unread.extend(&buffer[..length]),
                        Err(error) if quiet(&error) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                match frame(unread) {
                    Frame::Whole(length) => Ok(Some(unread.drain(..length).collect())),
                    Frame::Partial(_) => Ok(None),
                    Frame::Invalid => bail!("the relay broke the framing"),
                }
            }
        }
    }

    /// Does something and waits for what comes of it.
    pub(crate) fn perform(&mut self, act: impl FnOnce(&mut Client, Instant)) -> Result<Event> {
        act(&mut self.client, Instant::now());
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(event) = self.turn()? {
                return Ok(event);
            }
        }
        bail!("the relay does not answer")
    }

    /// Allocates; the relayed address.
    pub(crate) fn allocate(&mut self) -> Result<SocketAddr> {
        match self.perform(Client::allocate)? {
            Event::Allocated { relayed, .. } => Ok(relayed),
            other => bail!("no allocation: {other:?}"),
        }
    }

    /// Allocates in vain; the error code.
    pub(crate) fn refused(&mut self) -> Result<u16> {
        match self.perform(Client::allocate)? {
            Event::Failed(Method::Allocate, Failure::Refused(code)) => Ok(code.code()),
            other => bail!("not refused: {other:?}"),
        }
    }

    pub(crate) fn permit(&mut self, peer: SocketAddr) -> Result<()> {
        match self.perform(|client, now| client.permit(now, &[peer.ip()]))? {
            Event::Permitted(_) => Ok(()),
            other => bail!("no permission: {other:?}"),
        }
    }

    pub(crate) fn bind_channel(&mut self, number: u16, peer: SocketAddr) -> Result<()> {
        let number = ChannelNumber::new(number).context("a channel number")?;
        match self.perform(|client, now| client.bind_channel(now, number, peer))? {
            Event::ChannelBound(..) => Ok(()),
            other => bail!("no channel: {other:?}"),
        }
    }

    /// Asks for more with its next allocation.
    pub(crate) fn extend(&mut self, extensions: Extensions) {
        self.client.extend(extensions);
    }

    /// The next event that is no application data.
    pub(crate) fn event(&mut self) -> Result<Event> {
        self.perform(|_, _| {})
    }

    /// Allocates as a mobile client; the relayed address and the ticket.
    pub(crate) fn allocate_mobile(&mut self) -> Result<(SocketAddr, Vec<u8>)> {
        self.extend(Extensions { mobility: true, ..Extensions::default() });
        let relayed = self.allocate()?;
        match self.event()? {
            Event::Ticket(ticket) => Ok((relayed, ticket)),
            other => bail!("no ticket: {other:?}"),
        }
    }

    /// Goes on with another socket of the same transport.
    pub(crate) fn rewire(&mut self, other: Self) {
        self.wire = other.wire;
    }

    /// Goes on with the allocation of a ticket; the next ticket.
    pub(crate) fn resume(&mut self, ticket: &[u8]) -> Result<Vec<u8>> {
        match self.perform(|client, now| client.resume(now, ticket))? {
            Event::Refreshed(_) => {}
            other => bail!("not resumed: {other:?}"),
        }
        match self.event()? {
            Event::Ticket(ticket) => Ok(ticket),
            other => bail!("no ticket: {other:?}"),
        }
    }

    /// Goes on in vain; the error code.
    pub(crate) fn not_resumed(&mut self, ticket: &[u8]) -> Result<u16> {
        match self.perform(|client, now| client.resume(now, ticket))? {
            Event::Failed(Method::Refresh, Failure::Refused(code)) => Ok(code.code()),
            other => bail!("not refused: {other:?}"),
        }
    }

    /// Sends application data that must not be fragmented.
    pub(crate) fn send_unfragmented(&mut self, to: SocketAddr, data: &[u8]) -> Result<()> {
        self.client.send_unfragmented(to, data);
        while let Some(packet) = self.client.poll_transmit() {
            self.transmit(&packet)?;
        }
        Ok(())
    }

    /// Ends the allocation.
    pub(crate) fn delete(&mut self) -> Result<()> {
        match self.perform(|client, now| client.refresh(now, 0))? {
            Event::Refreshed(0) => Ok(()),
            other => bail!("not deleted: {other:?}"),
        }
    }

    /// Sends application data, by the peer's channel if there is one.
    pub(crate) fn send(&mut self, to: SocketAddr, data: &[u8]) -> Result<()> {
        self.client.send(to, data);
        while let Some(packet) = self.client.poll_transmit() {
            self.transmit(&packet)?;
        }
        Ok(())
    }

    /// Application data, and who sent it, if there is some now or within one read.
    pub(crate) fn receive_soon(&mut self) -> Option<(SocketAddr, Vec<u8>)> {
        if self.data.is_empty() {
            self.turn().ok()?;
        }
        self.data.pop_front()
    }

    /// The next application data and who sent it.
    pub(crate) fn receive(&mut self) -> Result<(SocketAddr, Vec<u8>)> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(data) = self.data.pop_front() {
                return Ok(data);
            }
            if let Some(event) = self.turn()? {
                bail!("unexpected: {event:?}");
            }
        }
        bail!("nothing comes from the peer")
    }
}

/// A connection that does not wait long when it is read.
pub(crate) fn connect(to: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_millis(10)))?;
    Ok(stream)
}

/// A peer that the test reads and writes by hand.
pub(crate) fn peer(ip: &str) -> Result<UdpSocket> {
    let socket = UdpSocket::bind((ip, 0))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// What a peer received, and from whom.
pub(crate) fn heard(peer: &UdpSocket) -> Result<(SocketAddr, Vec<u8>)> {
    let mut buffer = vec![0; 65_536];
    let (length, from) = peer.recv_from(&mut buffer)?;
    buffer.truncate(length);
    Ok((from, buffer))
}
