//! The sockets of the backbone: whoever connects is taken in here, and members are dialled from here.
//!
//! Accepting never waits for a handshake. Whoever has not shown that it is where it says to be is asked to (Retry, RFC
//! 9000 §8.1.2) when it is no member's address or handshakes are many, and handshakes of strangers are few at a time: they
//! cost signatures.

use std::cell::Cell;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::{ClientConfig, Connection, Endpoint, Incoming, Runtime, ServerConfig, TokioRuntime};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::time::timeout;

use super::detour::{self, Crossing, Detour};
use super::reset::endpoint_config;
use super::settings::{BackboneError, Identity, Settings};
use super::tls::{SERVER_NAME, Tls};
use super::transport::{Kind, transport};
use crate::sys::socket::set_buffers;

/// From its first packet to a connection.
const HANDSHAKE: Duration = Duration::from_millis(2500);
/// Handshakes under way with addresses of members; beyond, packets are ignored.
const MOST_OF_MEMBERS: usize = 64;
/// And with others.
const MOST_OF_STRANGERS: usize = 8;
/// Where so many are under way, members' addresses are asked to prove themselves too: an address is easily forged.
const RETRY_FROM: usize = 8;
/// Handshakes of strangers a second.
const STRANGERS_PER_SECOND: u32 = 20;
/// First packets that QUIC keeps until they are looked at, and their bytes.
const MOST_WAITING: usize = 256;
const MOST_WAITING_BYTES: u64 = 1 << 20;
/// Of a socket, each way, as far as the system allows.
const SOCKET_BUFFER: i32 = 4 << 20;

/// Binds the addresses.
pub(super) fn bind(settings: &Settings) -> Result<Vec<UdpSocket>, BackboneError> {
    let families = |v6| settings.listen.iter().filter(|address| address.is_ipv6() == v6).count();
    if settings.listen.is_empty() || families(false) > 1 || families(true) > 1 {
        return Err(BackboneError::Addresses);
    }
    settings
        .listen
        .iter()
        .map(|address| bind_one(*address).map_err(|error| BackboneError::Bind { address: *address, error }))
        .collect()
}

fn bind_one(address: SocketAddr) -> std::io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    set_buffers(socket.as_fd(), SOCKET_BUFFER)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// The endpoints, one for each family.
pub(super) struct Endpoints {
    endpoints: Vec<Endpoint>,
    crossing: Arc<Crossing>,
    of_members: Cell<usize>,
    of_strangers: Cell<usize>,
    /// Handshakes of strangers in the second that began then.
    second: Cell<(Instant, u32)>,
}

impl Endpoints {
    /// In a context of tokio's.
    pub(super) fn new(sockets: Vec<UdpSocket>, identity: &Identity) -> std::io::Result<Self> {
        let crossing = Arc::new(Crossing::default());
        let mut endpoints = Vec::new();
        for socket in sockets {
            let mut socket = TokioRuntime.wrap_udp_socket(socket)?;
            if endpoints.is_empty() {
                // Connections over third members are at the first one.
                socket = Arc::new(detour::Socket { network: socket, crossing: Arc::clone(&crossing) });
            }
            let (config, runtime) = (endpoint_config(identity), Arc::new(TokioRuntime));
            endpoints.push(Endpoint::new_with_abstract_socket(config, None, socket, runtime)?);
        }
        Ok(Self {
            crossing,
            endpoints,
            of_members: Cell::new(0),
            of_strangers: Cell::new(0),
            second: Cell::new((Instant::now(), 0)),
        })
    }

    /// What is between the first socket and the links.
    pub(super) fn crossing(&self) -> Arc<Crossing> {
        Arc::clone(&self.crossing)
    }

    pub(super) fn all(&self) -> &[Endpoint] {
        &self.endpoints
    }

    /// Handshakes that begin from now on are made with this.
    pub(super) fn set_tls(&self, tls: &Tls) {
        for endpoint in &self.endpoints {
            endpoint.set_server_config(Some(server_config(tls, Kind::Internet)));
        }
    }

    /// Dials a member over another one.
    pub(super) async fn dial_detour(&self, detour: Detour, tls: &Tls) -> Result<Connection, &'static str> {
        let endpoint = self.endpoints.first().ok_or("no socket")?;
        let is_v6 = endpoint.local_addr().is_ok_and(|local| local.is_ipv6());
        Self::connect(endpoint, detour.address(is_v6), tls, Kind::Detour).await
    }

    /// Dials an address.
    pub(super) async fn dial(&self, address: SocketAddr, tls: &Tls, kind: Kind) -> Result<Connection, &'static str> {
        let of_family =
            |endpoint: &&Endpoint| endpoint.local_addr().is_ok_and(|local| local.is_ipv6() == address.is_ipv6());
        let endpoint = self.endpoints.iter().find(of_family).ok_or("no socket of its family")?;
        Self::connect(endpoint, address, tls, kind).await
    }

    async fn connect(
        endpoint: &Endpoint,
        address: SocketAddr,
        tls: &Tls,
        kind: Kind,
    ) -> Result<Connection, &'static str> {
        let mut config = ClientConfig::new(Arc::clone(&tls.client) as Arc<_>);
        config.transport_config(transport(kind));
        let connecting = endpoint.connect_with(config, address, SERVER_NAME).map_err(|error| {
            tracing::debug!(%address, %error, "a member cannot be dialled");
            "cannot be dialled"
        })?;
        match timeout(HANDSHAKE, connecting).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) => {
                tracing::debug!(%address, %error, "a member refuses the connection");
                Err(super::link::Close::read(&error))
            }
            Err(_) => Err("no answer"),
        }
    }

    /// What to do with somebody who wants to connect: a place while the handshake lasts, or none, and then the answer
    /// has been given.
    pub(super) fn admit(
        self: &Rc<Self>,
        incoming: Incoming,
        is_members: impl Fn(IpAddr) -> bool,
    ) -> Option<(Incoming, Place)> {
        let of_member = is_members(incoming.remote_address().ip().to_canonical());
        let (count, most) = match of_member {
            true => (&self.of_members, MOST_OF_MEMBERS),
            false => (&self.of_strangers, MOST_OF_STRANGERS),
        };
        let under_way = count.get();
        if !incoming.remote_address_validated() && (!of_member || under_way >= RETRY_FROM) {
            // What cannot be retried is refused.
            let _ = incoming.retry();
            return None;
        }
        if under_way >= most || (!of_member && !self.may_another_stranger()) {
            incoming.ignore();
            return None;
        }
        count.set(under_way + 1);
        Some((incoming, Place { endpoints: Rc::clone(self), of_member }))
    }

    fn may_another_stranger(&self) -> bool {
        let (began, count) = self.second.get();
        let now = Instant::now();
        let (began, count) =
            if now.saturating_duration_since(began) >= Duration::from_secs(1) { (now, 0) } else { (began, count) };
        self.second.set((began, count + 1));
        count < STRANGERS_PER_SECOND
    }
}

/// A place among the handshakes that are under way.
pub(super) struct Place {
    endpoints: Rc<Endpoints>,
    of_member: bool,
}

impl Place {
    /// The handshake of somebody who has a place.
    pub(super) async fn handshake(
        self,
        incoming: Incoming,
        tls: &Tls,
        kind: Kind,
    ) -> Result<Connection, quinn::ConnectionError> {
        let connecting = incoming.accept_with(Arc::new(server_config(tls, kind)))?;
        timeout(HANDSHAKE, connecting).await.unwrap_or(Err(quinn::ConnectionError::TimedOut))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let count = if self.of_member { &self.endpoints.of_members } else { &self.endpoints.of_strangers };
        count.set(count.get() - 1);
    }
}

fn server_config(tls: &Tls, kind: Kind) -> ServerConfig {
    let mut config = ServerConfig::with_crypto(Arc::clone(&tls.server) as Arc<_>);
    config.transport_config(transport(kind)).max_incoming(MOST_WAITING).incoming_buffer_size_total(MOST_WAITING_BYTES);
    config
}
