//! What the network between here and the cluster does to packets (RFC 5780): mapping, filtering, hairpin, which transports
//! pass.

mod verdict;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use serde::Serialize;
use turn_core::Transport;

pub(crate) use self::verdict::{Kind, advice, kind};
use crate::conform::craft::{BINDING, Craft};
use crate::conform::wire::{Got, Handshake, Trust, Untrusted, Wire};
use crate::stun::{self, Answer, CHANGE_IP, CHANGE_PORT};

/// An answer that has not come by then does not: filtering shows by silence.
const PATIENCE: Duration = Duration::from_millis(1800);
/// The same for the answer over a connection that stands.
const STREAM_PATIENCE: Duration = Duration::from_secs(3);

/// A server to try.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Server {
    /// As it was written.
    pub(crate) name: String,
    /// Host as its certificate names it.
    pub(crate) host: String,
    pub(crate) address: SocketAddr,
    pub(crate) transport: Transport,
}

/// How outside ports are given (RFC 4787 §4.1).
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Mapping {
    /// The outside sees the machine's own address.
    None,
    EndpointIndependent,
    AddressDependent,
    AddressAndPortDependent,
    /// It depends on the destination; there was no server to tell on what of it.
    Dependent,
}

/// Whose packets come in at an outside port (RFC 4787 §5).
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Filtering {
    EndpointIndependent,
    AddressDependent,
    AddressAndPortDependent,
}

/// What is known of UDP.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Udp {
    pub(crate) server: String,
    pub(crate) local: SocketAddr,
    pub(crate) mapped: SocketAddr,
    pub(crate) rtt_ms: f64,
    /// `None`: there was no second server address to tell.
    pub(crate) mapping: Option<Mapping>,
    /// `None`: no server answers from a second address (RFC 5780).
    pub(crate) filtering: Option<Filtering>,
    /// Whether two machines behind it reach each other by their outside addresses; `None` where that cannot be told.
    pub(crate) hairpin: Option<bool>,
}

/// Whether a server answers over TCP, TLS or DTLS.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub(crate) struct Reach {
    pub(crate) server: String,
    pub(crate) transport: &'static str,
    pub(crate) port: u16,
    pub(crate) works: bool,
    /// What went wrong.
    pub(crate) problem: String,
    /// The network lets it through, and clients refuse what answers.
    pub(crate) untrusted: Option<Untrusted>,
}

impl Reach {
    /// Whether the network lets it through, whatever clients think of what answers.
    pub(crate) fn passes(&self) -> bool {
        self.works || self.untrusted.is_some()
    }
}

/// Everything that was found out.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Findings {
    /// `None`: no server answered over UDP.
    pub(crate) udp: Option<Udp>,
    pub(crate) streams: Vec<Reach>,
}

/// Tries all servers; blocking, and at most some ten seconds long.
pub(crate) fn examine(servers: &[Server], trust: &Trust) -> io::Result<Findings> {
    let (datagrams, streams): (Vec<_>, Vec<_>) = servers.iter().partition(|server| server.transport == Transport::Udp);
    std::thread::scope(|scope| {
        let streams: Vec<_> = streams.into_iter().map(|server| scope.spawn(move || reach(server, trust))).collect();
        let udp = udp(&datagrams)?;
        let streams = streams.into_iter().filter_map(|stream| stream.join().ok()).collect();
        Ok(Findings { udp, streams })
    })
}

fn reach(server: &Server, trust: &Trust) -> Reach {
    let failed = ask_stream(server, trust).err();
    let untrusted = failed.as_ref().and_then(|error| error.get_ref()?.downcast_ref::<Untrusted>().cloned());
    let transport = match server.transport {
        Transport::Udp => "udp",
        Transport::Tcp => "tcp",
        Transport::Tls => "tls",
        Transport::Dtls => "dtls",
    };
    Reach {
        server: server.name.clone(),
        transport,
        port: server.address.port(),
        works: failed.is_none(),
        problem: failed.map(|error| error.to_string()).unwrap_or_default(),
        untrusted,
    }
}

fn ask_stream(server: &Server, trust: &Trust) -> io::Result<()> {
    let from = any(server.address);
    let mut wire = Wire::open(server.transport, server.address, from, &server.host, trust, Handshake::default())?;
    let request = Craft::request(BINDING);
    wire.send(request.bytes())?;
    let deadline = Instant::now() + STREAM_PATIENCE;
    match wire.receive(deadline) {
        Got::Packet(answer) if answer.get(8..20) == Some(&request.id()[..]) => Ok(()),
        Got::Packet(_) => Err(io::Error::other("something else than a STUN server answers")),
        Got::Nothing => Err(io::Error::other("connected, but no answer comes")),
        Got::Closed => Err(io::Error::other("connected, and closed by the server or something before it")),
    }
}

fn any(server: SocketAddr) -> SocketAddr {
    let ip: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    SocketAddr::new(ip, 0)
}

/// A socket and the first answer to it.
struct Seen<'a> {
    socket: UdpSocket,
    server: &'a Server,
    answer: Answer,
}

fn udp(servers: &[&Server]) -> io::Result<Option<Udp>> {
    let mut seen: Option<Seen<'_>> = None;
    for &server in servers {
        let socket = UdpSocket::bind(any(server.address))?;
        let Some(answer) = stun::binding(&socket, server.address, 0, PATIENCE)? else { continue };
        // One that can tell everything is looked for.
        let tells = |answer: &Answer| answer.other.is_some();
        if seen.as_ref().is_none_or(|seen| !tells(&seen.answer) && tells(&answer)) {
            seen = Some(Seen { socket, server, answer });
        }
        if seen.as_ref().is_some_and(|seen| tells(&seen.answer)) {
            break;
        }
    }
    let Some(seen) = seen else { return Ok(None) };
    let local = local_of(&seen)?;
    // Before anything is sent to the server's second address: some NATs remember whom anybody behind them has written to.
    let filtering = match seen.answer.other {
        Some(_) => Some(filtering(seen.server.address)?),
        None => None,
    };
    let mapping = if local == seen.answer.mapped { Some(Mapping::None) } else { mapping(&seen, servers)? };
    let hairpin = match mapping {
        Some(Mapping::EndpointIndependent) => hairpin(&seen)?,
        _ => None,
    };
    Ok(Some(Udp {
        server: seen.server.name.clone(),
        local,
        mapped: seen.answer.mapped,
        rtt_ms: (seen.answer.round_trip.as_secs_f64() * 1e6).round() / 1e3,
        mapping,
        filtering,
        hairpin,
    }))
}

/// The address that packets leave from: a connected socket knows.
fn local_of(seen: &Seen<'_>) -> io::Result<SocketAddr> {
    let probe = UdpSocket::bind(any(seen.server.address))?;
    probe.connect(seen.server.address)?;
    Ok(SocketAddr::new(probe.local_addr()?.ip(), seen.socket.local_addr()?.port()))
}

/// RFC 5780 §4.3, with another server where this one has no second address.
fn mapping(seen: &Seen<'_>, servers: &[&Server]) -> io::Result<Option<Mapping>> {
    let (first, mapped) = (seen.server.address, seen.answer.mapped);
    let ask = |to| Ok::<_, io::Error>(stun::binding(&seen.socket, to, 0, PATIENCE)?.map(|answer| answer.mapped));
    let Some(other) = seen.answer.other else {
        let elsewhere = servers
            .iter()
            .find(|server| server.address.ip() != first.ip() && server.address.is_ipv4() == first.is_ipv4());
        let Some(elsewhere) = elsewhere else { return Ok(None) };
        return Ok(ask(elsewhere.address)?
            .map(|second| if second == mapped { Mapping::EndpointIndependent } else { Mapping::Dependent }));
    };
    let Some(second) = ask(SocketAddr::new(other.ip(), first.port()))? else { return Ok(None) };
    if second == mapped {
        return Ok(Some(Mapping::EndpointIndependent));
    }
    Ok(ask(other)?.map(
        |third| {
            if third == second { Mapping::AddressDependent } else { Mapping::AddressAndPortDependent }
        },
    ))
}

/// RFC 5780 §4.4, from a port of its own: nothing must have been sent to the second address from it.
fn filtering(server: SocketAddr) -> io::Result<Filtering> {
    let socket = UdpSocket::bind(any(server))?;
    // The hole, if there is a NAT, is there before it is tried.
    stun::binding(&socket, server, 0, PATIENCE)?;
    if stun::binding(&socket, server, CHANGE_IP | CHANGE_PORT, PATIENCE)?.is_some() {
        return Ok(Filtering::EndpointIndependent);
    }
    if stun::binding(&socket, server, CHANGE_PORT, PATIENCE)?.is_some() {
        return Ok(Filtering::AddressDependent);
    }
    Ok(Filtering::AddressAndPortDependent)
}

/// Whether a packet to the first socket's outside address comes in from another socket behind the same NAT.
fn hairpin(seen: &Seen<'_>) -> io::Result<Option<bool>> {
    let second = UdpSocket::bind(any(seen.server.address))?;
    let Some(own) = stun::binding(&second, seen.server.address, 0, PATIENCE)? else { return Ok(None) };
    // Filters let in who was written to.
    let request = Craft::request(BINDING);
    let mut bytes = [0; 1500];
    let deadline = Instant::now() + PATIENCE;
    while let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        for (from, to) in [(&seen.socket, own.mapped), (&second, seen.answer.mapped)] {
            // What is not routed is no hairpin.
            if from.send_to(request.bytes(), to).is_err() {
                return Ok(Some(false));
            }
        }
        seen.socket.set_read_timeout(Some(left.min(Duration::from_millis(300))))?;
        match seen.socket.recv(&mut bytes) {
            Ok(len) if bytes[..len] == *request.bytes() => return Ok(Some(true)),
            _ => {}
        }
    }
    Ok(Some(false))
}
