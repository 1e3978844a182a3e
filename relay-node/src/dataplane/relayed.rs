//! Relayed addresses: opens and closes their sockets, and knows which worker has which.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use rustc_hash::FxHashMap;
use slab::Slab;
use socket2::Socket;
use turn_core::wire::attribute::ReservationToken;
use turn_core::{
    AccountId, AllocationId, BindError, BindRequest, Bound, Change, ClaimError, ConnectError, Family, Host, Meters,
    Now, PeerAddr, PeerConnectionId, PeerTransport, RESERVED_FOR, RelayedAddr, Route, Ticket, Transport, WorkerId,
};

use super::RelayIp;
use super::connected::{Connected, Connections, Habit};
use super::listen::new_socket;
use super::members::MemberRoutes;
use super::packet::Appetite;
use super::peer_table::PeerTable;
use super::peers::{self, Peers};
use super::whereabouts::Whereabouts;
use super::wildcard::Wildcard;
use super::worker::Token;
use crate::accounts::Accounts;
use crate::registry::{Registry, RestoreError};
use crate::sys::epoll::{Epoll, Interest};
use crate::sys::link::set_freebind;
use crate::sys::socket::{Fragmentation, receive_coalesced, receive_errors, set_fragmentation};

/// Who owns a peer's address, as far as this node is concerned. Read per packet by every worker.
pub(super) struct Routes {
    relay_ips: Vec<(RelayIp, PortTable)>,
    /// Where clients are served: nobody's peer.
    listeners: Vec<SocketAddr>,
    listener_ports: Vec<u16>,
    whereabouts: Whereabouts,
    members: ArcSwap<MemberRoutes>,
}

/// Relayed port -> worker, for one relay IP.
struct PortTable(Box<[AtomicU8]>);

/// In a [`PortTable`]: the port accepts TCP, and no datagrams.
const TCP: u8 = 0x80;

/// Where a TCP connection to a peer goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum TcpRoute {
    /// Not ours.
    Internet,
    /// A TCP allocation of this node: where its relayed address is bound.
    Relayed(SocketAddr),
    /// An address of ours that relays no TCP: never reachable (abuse.md A).
    Nobody,
}

impl Routes {
    /// Routes without relayed addresses. A listener on every address stands for each of `local`.
    pub(super) fn new(relay_ips: &[RelayIp], listeners: &[SocketAddr], local: &[IpAddr]) -> Self {
        let mut addresses = Vec::new();
        for listener in listeners {
            if listener.ip().is_unspecified() {
                let of_family = local.iter().filter(|ip| ip.is_ipv4() == listener.is_ipv4());
                addresses.extend(of_family.map(|ip| SocketAddr::new(*ip, listener.port())));
            } else {
                addresses.push(*listener);
            }
        }
        let table = || PortTable((0..=u16::MAX).map(|_| AtomicU8::new(0)).collect());
        Self {
            relay_ips: relay_ips.iter().map(|ip| (*ip, table())).collect(),
            listener_ports: listeners.iter().map(SocketAddr::port).collect(),
            listeners: addresses,
            whereabouts: Whereabouts::default(),
            members: ArcSwap::default(),
        }
    }

    fn route(&self, to: PeerAddr) -> Route {
        for (ip, table) in &self.relay_ips {
            if to.ip() == ip.bound || to.ip() == ip.advertised {
                // Relaxed: a packet that overtakes the change of its port is lost, as on any network.
                return match table.0[usize::from(to.port())].load(Ordering::Relaxed) {
                    // Another member may have other ports of the same IP.
                    0 => self.members.load().route(to.socket_addr()).unwrap_or(Route::Nobody),
                    // A datagram has nobody to go to at an address of TCP.
                    TCP.. => Route::Nobody,
                    worker => Route::Worker(WorkerId(u16::from(worker) - 1)),
                };
            }
        }
        if let Some(route) = self.members.load().route(to.socket_addr()) {
            return route;
        }
        if self.listener_ports.contains(&to.port()) && self.listeners.contains(&to.socket_addr()) {
            return Route::Nobody;
        }
        Route::Internet
    }

    /// As [`Routes::route`], for TCP.
    pub(super) fn tcp_route(&self, to: PeerAddr) -> TcpRoute {
        for (ip, table) in &self.relay_ips {
            if to.ip() == ip.bound || to.ip() == ip.advertised {
                return match table.0[usize::from(to.port())].load(Ordering::Relaxed) {
                    TCP.. => TcpRoute::Relayed(SocketAddr::new(ip.bound, to.port())),
                    _ => TcpRoute::Nobody,
                };
            }
        }
        match self.route(to) {
            Route::Internet => TcpRoute::Internet,
            Route::Worker(_) | Route::Member(_) | Route::Nobody => TcpRoute::Nobody,
        }
    }

    /// Which worker has a relayed address of UDP of this node.
    pub(super) fn worker_of(&self, relayed: PeerAddr) -> Option<WorkerId> {
        let ours = self.relay_ips.iter().find(|(ip, _)| relayed.ip() == ip.advertised);
        match ours?.1.0[usize::from(relayed.port())].load(Ordering::Relaxed) {
            0 | TCP.. => None,
            worker => Some(WorkerId(u16::from(worker) - 1)),
        }
    }

    /// Other members, and what is known of the ways to them.
    pub(super) fn members(&self) -> &ArcSwap<MemberRoutes> {
        &self.members
    }

    /// A peer as clients know it: an allocation of this node is known by its advertised address.
    pub(super) fn advertised(&self, peer: PeerAddr) -> PeerAddr {
        let ours = self.relay_ips.iter().find(|(ip, _)| ip.bound == peer.ip());
        ours.map_or(peer, |(ip, _)| PeerAddr::new(SocketAddr::new(ip.advertised, peer.port())))
    }

    /// Whether anybody has a relayed address.
    fn is_held(&self, relayed: RelayedAddr) -> bool {
        let ours = self.relay_ips.iter().find(|(ip, _)| ip.advertised == relayed.advertised.ip());
        ours.is_some_and(|(_, table)| table.0[usize::from(relayed.port())].load(Ordering::Relaxed) != 0)
    }

    fn set(&self, relayed: RelayedAddr, worker: Option<WorkerId>, flag: u8) {
        // 1..=64 workers: worker 0 is 1, nobody is 0.
        let owner = worker.map_or(0, |worker| (worker.0 as u8 + 1) | flag);
        for (ip, table) in &self.relay_ips {
            if ip.advertised == relayed.advertised.ip() {
                table.0[usize::from(relayed.port())].store(owner, Ordering::Relaxed);
            }
        }
    }
}

/// A relayed address with its socket.
pub(super) struct RelayedSocket {
    pub(super) relayed: RelayedAddr,
    /// None where all share those of [`Relayed::wildcard`], or none is bound.
    pub(super) socket: Option<UdpSocket>,
    /// In the first case: to send bursts by, once it has sent one.
    pub(super) sender: Option<UdpSocket>,
    /// Where each has its own: one more for the peer it keeps sending to.
    pub(super) connected: Option<Box<Connected>>,
    pub(super) habit: Habit,
    pub(super) appetite: Appetite,
    /// Known since its first record.
    holder: Option<AllocationId>,
}

impl RelayedSocket {
    /// The connected socket, or the first.
    pub(super) fn socket(&self, connected: bool) -> Option<&UdpSocket> {
        if connected { self.connected.as_ref().map(|connected| &connected.socket) } else { self.socket.as_ref() }
    }
}

/// The relayed addresses of one worker; what its core asks of the process.
pub(super) struct Relayed {
    worker: WorkerId,
    registry: Arc<Registry>,
    routes: Arc<Routes>,
    epoll: Arc<Epoll>,
    sockets: Slab<RelayedSocket>,
    by_port: FxHashMap<(Family, u16), u32>,
    released: Vec<(RelayedAddr, Box<[u8]>)>,
    pub(super) accounts: Arc<Accounts>,
    /// They have no sockets: nothing reaches them from outside.
    private: bool,
    /// Of TCP allocations.
    pub(super) peers: Peers,
    pub(super) connections: Connections,
    /// What all relayed addresses of UDP share, if they do; away while it sends.
    pub(super) wildcard: Option<Box<Wildcard>>,
}

impl Relayed {
    pub(super) fn new(
        worker: WorkerId,
        registry: Arc<Registry>,
        routes: Arc<Routes>,
        table: Arc<PeerTable>,
        epoll: Arc<Epoll>,
        (wildcard, private): (Option<Box<Wildcard>>, bool),
        accounts: Arc<Accounts>,
    ) -> Self {
        Self {
            private,
            wildcard,
            peers: Peers::new(worker, table, Arc::clone(&routes), Arc::clone(&epoll)),
            worker,
            registry,
            routes,
            epoll,
            connections: Connections::default(),
            sockets: Slab::new(),
            by_port: FxHashMap::default(),
            released: Vec::new(),
            accounts,
        }
    }

    /// The socket under a key, if it is still open.
    pub(super) fn socket(&self, key: usize) -> Option<&RelayedSocket> {
        self.sockets.get(key)
    }

    /// As [`Relayed::socket`].
    pub(super) fn socket_mut(&mut self, key: usize) -> Option<&mut RelayedSocket> {
        self.sockets.get_mut(key)
    }

    /// The key of the socket at a relayed address of this worker, by its bound or its advertised address.
    pub(super) fn find(&self, address: SocketAddr) -> Option<usize> {
        self.by_port.get(&(Family::of(address.ip()), address.port())).map(|key| *key as usize)
    }

    /// Has a socket of a relayed address watched.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub(super) fn watch(&self, socket: &UdpSocket, token: Token) -> io::Result<()> {
        self.epoll.add(socket.as_fd(), token.encode(), Interest::Read)
    }

    /// Whether relayed addresses share a socket.
    pub(super) fn is_wildcard(&self) -> bool {
        self.wildcard.is_some()
    }

    /// The relayed address of this worker that is bound exactly there, if it shares a socket.
    pub(super) fn steered(&self, bound: SocketAddr) -> Option<RelayedAddr> {
        let entry = self.socket(self.find(bound)?)?;
        (entry.relayed.bound == bound && entry.socket.is_none()).then_some(entry.relayed)
    }

    /// See [`turn_core::Output::Permit`].
    pub(super) fn permit(&self, relayed: RelayedAddr, peer: IpAddr, until: Instant) {
        if let (Some(wildcard), Some(relayed)) = (&self.wildcard, self.steered(relayed.bound)) {
            wildcard.permit(relayed, peer, until);
        }
    }

    /// See [`turn_core::Output::Forbid`].
    pub(super) fn forbid(&self, relayed: RelayedAddr, peer: IpAddr) {
        if let (Some(wildcard), Some(relayed)) = (&self.wildcard, self.steered(relayed.bound)) {
            wildcard.forbid(relayed, peer);
        }
    }

    /// How the registry is to make sure of a port: by the socket it is to have, if it has one of its own.
    fn opener(&self) -> impl Fn(SocketAddr) -> io::Result<Option<UdpSocket>> + '_ {
        move |address| match &self.wildcard {
            _ if self.private => Ok(None),
            Some(wildcard) => wildcard.probe(address).map(|()| None),
            None => open(address).map(Some),
        }
    }

    /// What relayed sockets of a family bind.
    pub(super) fn bound_ips(&self, v4: bool) -> impl Iterator<Item = IpAddr> + '_ {
        self.routes.relay_ips.iter().map(|(ip, _)| ip.bound).filter(move |ip| ip.is_ipv4() == v4)
    }

    /// As [`Registry::ours`].
    pub(super) fn ours(&self, relayed: RelayedAddr) -> Option<RelayedAddr> {
        self.registry.ours(relayed)
    }

    /// Where clients that have moved are served.
    pub(super) fn whereabouts(&self) -> &Whereabouts {
        &self.routes.whereabouts
    }

    /// Whether any worker of this process has the address.
    pub(super) fn is_held(&self, relayed: RelayedAddr) -> bool {
        self.routes.is_held(relayed)
    }

    /// Keeps track of which allocation has which address.
    pub(super) fn note(&mut self, change: &Change) {
        let Change::Put(record) = change else {
            return;
        };
        for relayed in &record.relayed {
            if let Some(key) = self.find(relayed.advertised) {
                self.sockets[key].holder = Some(record.id);
            }
        }
    }

    /// The allocation of this worker at an address.
    pub(super) fn holder(&self, relayed: RelayedAddr) -> Option<AllocationId> {
        self.socket(self.find(relayed.advertised)?)?.holder
    }

    /// Holds the address of a restored record as it is on this machine.
    ///
    /// # Errors
    /// See [`RestoreError`].
    pub(super) fn restore(&mut self, relayed: RelayedAddr, quota_key: &[u8]) -> Result<(), RestoreError> {
        let socket = self.registry.restore(relayed, quota_key, self.opener())?;
        self.keep(relayed, socket).map_err(|error| {
            self.registry.release(relayed, quota_key);
            RestoreError::Bind(error)
        })
    }

    /// Reserves the port above `first` again, until a wall time in Unix milliseconds. One that cannot be had is let go:
    /// it is not an allocation yet.
    pub(super) fn restore_reservation(
        &self,
        first: RelayedAddr,
        (token, until): (ReservationToken, u64),
        quota_key: &[u8],
        now: Now,
    ) {
        let Some(left) = until.checked_sub(now.wall).filter(|left| *left > 0) else {
            return;
        };
        let until = now.mono + Duration::from_millis(left).min(RESERVED_FOR);
        if let Err(error) = self.registry.restore_reservation(first, token, until, quota_key, self.opener()) {
            tracing::debug!(port = first.port(), %error, "a reserved port is not restored");
        }
    }

    /// Nothing is sent to it any more; what this turn still sends from it leaves first.
    pub(super) fn release(&mut self, relayed: RelayedAddr, quota_key: Box<[u8]>) {
        self.routes.set(relayed, None, 0);
        if let Some(wildcard) = &self.wildcard
            && self.steered(relayed.bound).is_some()
        {
            wildcard.let_go(relayed);
        }
        self.released.push((relayed, quota_key));
    }

    /// As [`Registry::tick`].
    pub(super) fn tick(&self, now: Instant) {
        self.registry.tick(now);
    }

    /// Closes what was released, then gives ports and shares back.
    pub(super) fn close_released(&mut self) {
        for (relayed, quota_key) in self.released.drain(..) {
            if let Some(key) = self.by_port.remove(&(relayed.family(), relayed.port())) {
                let connected = self.sockets.remove(key as usize).connected;
                self.connections.closed(connected.is_some());
                self.registry.release(relayed, &quota_key);
            } else if self.peers.unwatch(relayed) {
                self.registry.release(relayed, &quota_key);
            }
        }
    }

    fn keep(&mut self, relayed: RelayedAddr, socket: Option<UdpSocket>) -> io::Result<()> {
        let entry = self.sockets.vacant_entry();
        if let Some(wildcard) = &self.wildcard {
            // From here on permitted peers find nobody else at this port.
            wildcard.steer(relayed);
        }
        if let Some(socket) = &socket {
            self.epoll.add(socket.as_fd(), Token::Relayed(entry.key()).encode(), Interest::Read)?;
        }
        // There are no more of them than ports.
        self.by_port.insert((relayed.family(), relayed.port()), entry.key() as u32);
        entry.insert(RelayedSocket {
            relayed,
            socket,
            sender: None,
            connected: None,
            habit: Habit::new(),
            appetite: Appetite::new(1),
            holder: None,
        });
        self.routes.set(relayed, Some(self.worker), 0);
        Ok(())
    }
}

impl Relayed {
    /// Binds the relayed address of a TCP allocation, which accepts from now on (RFC 6062 §5.1).
    fn listen(&mut self, request: BindRequest<'_>) -> Result<Bound, BindError> {
        let (relayed, listener) = self.registry.bind_any(request, peers::listen)?;
        self.peers.watch(relayed, listener).map_err(|error| {
            tracing::error!(%error, "cannot watch a relayed address");
            self.registry.release(relayed, request.quota_key);
            BindError::NoPort
        })?;
        self.routes.set(relayed, Some(self.worker), TCP);
        Ok(Bound { relayed, reservation: None })
    }
}

impl Host for Relayed {
    fn bind(&mut self, request: BindRequest<'_>) -> Result<Bound, BindError> {
        if request.transport == PeerTransport::Tcp {
            return self.listen(request);
        }
        let (bound, socket) = self.registry.bind(request, self.opener())?;
        self.keep(bound.relayed, socket).map_err(|error| {
            tracing::error!(%error, "cannot watch a relayed address");
            self.registry.release(bound.relayed, request.quota_key);
            BindError::NoPort
        })?;
        Ok(bound)
    }

    fn connect(&mut self, relayed: RelayedAddr, to: PeerAddr) -> Result<PeerConnectionId, ConnectError> {
        self.peers.connect(relayed, to)
    }

    fn claim(&mut self, connection: PeerConnectionId, username: &[u8]) -> Result<(), ClaimError> {
        self.peers.claim(connection, username)
    }

    fn control_of(&self, connection: PeerConnectionId) -> Option<SocketAddr> {
        self.peers.control_of(connection)
    }

    fn ticket_owner(&self, ticket: &Ticket) -> Option<WorkerId> {
        self.whereabouts().of_ticket(ticket)
    }

    fn meters(&mut self, quota_key: &[u8]) -> Meters {
        self.registry.meters(quota_key)
    }

    fn account(&mut self, id: AllocationId, username: &[u8], restored: bool) -> AccountId {
        self.accounts.take(id, username, restored)
    }

    fn route(&self, to: PeerAddr) -> Route {
        self.routes.route(to)
    }
}

/// A socket for a relayed address of its own.
pub(super) fn open(address: SocketAddr) -> io::Result<UdpSocket> {
    bind(new_socket(Transport::Udp, address)?, address)
}

/// A second socket for it, where the first one allows that.
pub(super) fn open_beside(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = new_socket(Transport::Udp, address)?;
    socket.set_reuse_address(true)?;
    bind(socket, address)
}

fn bind(socket: Socket, address: SocketAddr) -> io::Result<UdpSocket> {
    if address.is_ipv6() {
        socket.set_recv_tclass_v6(true)?;
    } else {
        socket.set_recv_tos_v4(true)?;
    }
    receive_errors(socket.as_fd(), address.is_ipv6())?;
    receive_coalesced(socket.as_fd())?;
    // RFC 8656 §14, alternate behavior: the DF bit of what arrives is not known, and taken for 0.
    set_fragmentation(socket.as_fd(), address.is_ipv6(), Fragmentation::Allowed)?;
    match socket.bind(&address.into()) {
        // [`check`] has seen that the address is here, or it comes later.
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
            set_freebind(socket.as_fd(), address.is_ipv6())?;
            socket.bind(&address.into())?;
        }
        bound => bound?,
    }
    Ok(socket.into())
}

/// Whether the relay IPs can be bound at all.
///
/// # Errors
/// One line that names the address and what to do.
pub(super) fn check(relay_ips: &[RelayIp]) -> anyhow::Result<()> {
    for ip in relay_ips {
        if let Err(error) = UdpSocket::bind(SocketAddr::new(ip.bound, 0)) {
            anyhow::bail!(
                "cannot open a relayed address at {}: {error}; set `relay_ip` (or `relay_ip6`) to an address of this \
                 machine",
                ip.bound
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use turn_core::{PeerTransport, PortRequest};

    use super::*;
    use crate::registry::Bounds;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("literal")
    }

    fn peer(text: &str) -> PeerAddr {
        PeerAddr::new(text.parse().expect("literal"))
    }

    fn request(family: Family) -> BindRequest<'static> {
        BindRequest { family, transport: PeerTransport::Udp, quota_key: b"u", port: PortRequest::Any }
    }

    fn relayed(max_allocations: usize) -> anyhow::Result<(Relayed, Arc<Routes>)> {
        let ips = vec![
            RelayIp { bound: ip("127.0.0.1"), advertised: ip("192.0.2.1") },
            RelayIp { bound: ip("::1"), advertised: ip("::1") },
        ];
        let listeners: Vec<SocketAddr> =
            ["0.0.0.0:3478", "127.0.0.7:3479"].iter().map(|text| text.parse().expect("literal")).collect();
        let routes = Arc::new(Routes::new(&ips, &listeners, &[ip("198.51.100.4"), ip("2001:db8::4")]));
        let bounds = Bounds { max_allocations, user_quota: 0 };
        let registry = Arc::new(Registry::new(ips, 50_000..=59_999, bounds));
        let epoll = Arc::new(Epoll::new()?);
        let table = Arc::new(PeerTable::new(9, &[]));
        let directory = tempfile::tempdir()?;
        let accounts = Arc::new(Accounts::open(directory.path(), 9, false)?);
        Ok((Relayed::new(WorkerId(3), registry, Arc::clone(&routes), table, epoll, (None, false), accounts), routes))
    }

    #[test]
    fn own_addresses_lead_to_a_worker_or_to_nobody() -> anyhow::Result<()> {
        let (mut relayed, routes) = relayed(0)?;
        let address = relayed.bind(request(Family::V4))?.relayed;
        let port = address.port();
        let other = if port == 50_000 { 50_001 } else { 50_000 };
        let cases = [
            (format!("192.0.2.1:{port}"), Route::Worker(WorkerId(3)), "advertised"),
            (format!("127.0.0.1:{port}"), Route::Worker(WorkerId(3)), "bound"),
            (format!("[::1]:{port}"), Route::Nobody, "the other family's table"),
            (format!("192.0.2.1:{other}"), Route::Nobody, "own IP, no allocation"),
            ("127.0.0.1:22".into(), Route::Nobody, "own IP, another service"),
            ("198.51.100.4:3478".into(), Route::Nobody, "own listener on every address"),
            ("127.0.0.7:3479".into(), Route::Nobody, "own listener"),
            ("198.51.100.4:5000".into(), Route::Internet, "the policy decides about the rest of this machine"),
            ("[2001:db8::4]:3478".into(), Route::Internet, "no listener of that family"),
            (format!("127.0.0.2:{port}"), Route::Internet, "a neighbour on loopback"),
            ("203.0.113.9:1".into(), Route::Internet, "a peer"),
        ];
        for (address, expected, what) in &cases {
            assert_eq!(relayed.route(peer(address)), *expected, "{what}");
        }
        relayed.release(address, (*b"u").into());
        assert_eq!(routes.route(peer(&format!("192.0.2.1:{port}"))), Route::Nobody, "at once");
        Ok(())
    }

    #[test]
    fn a_tcp_allocation_is_reached_by_tcp_alone() -> anyhow::Result<()> {
        let (mut relayed, routes) = relayed(0)?;
        let udp = relayed.bind(request(Family::V4))?.relayed;
        let request = BindRequest { transport: PeerTransport::Tcp, ..request(Family::V4) };
        let tcp = relayed.bind(request)?.relayed;
        for address in [tcp.advertised, tcp.bound] {
            assert_eq!(routes.route(PeerAddr::new(address)), Route::Nobody);
            assert_eq!(routes.tcp_route(PeerAddr::new(address)), TcpRoute::Relayed(tcp.bound));
        }
        assert!(relayed.is_held(tcp) && relayed.is_held(udp));
        let cases = [
            (udp.advertised.to_string(), TcpRoute::Nobody, "a UDP allocation"),
            ("127.0.0.1:22".into(), TcpRoute::Nobody, "own IP, another service"),
            ("198.51.100.4:3478".into(), TcpRoute::Nobody, "own listener"),
            ("203.0.113.9:1".into(), TcpRoute::Internet, "a peer"),
        ];
        for (address, expected, what) in &cases {
            assert_eq!(routes.tcp_route(peer(address)), *expected, "{what}");
        }
        assert_eq!(relayed.connect(tcp, PeerAddr::new(tcp.advertised)), Err(ConnectError::Forbidden), "itself");
        assert_eq!(routes.advertised(PeerAddr::new(tcp.bound)), PeerAddr::new(tcp.advertised));
        assert_eq!(routes.advertised(peer("203.0.113.9:1")), peer("203.0.113.9:1"));

        relayed.release(tcp, (*b"u").into());
        assert!(!relayed.is_held(tcp));
        relayed.close_released();
        assert!(std::net::TcpListener::bind(tcp.bound).is_ok(), "closed");
        Ok(())
    }

    #[test]
    fn a_released_address_is_closed_and_free_only_at_the_end_of_the_turn() -> anyhow::Result<()> {
        let (mut relayed, _) = relayed(1)?;
        let request = request(Family::V6);
        let address = relayed.bind(request)?.relayed;
        let key = relayed.find(address.advertised).expect("held");
        relayed.release(address, (*b"u").into());
        assert!(relayed.socket(key).is_some(), "what this turn sends can still leave");
        assert_eq!(relayed.bind(request), Err(BindError::NoPort));
        relayed.close_released();
        assert_eq!(relayed.find(address.bound), None);
        assert!(UdpSocket::bind(address.bound).is_ok(), "closed");
        relayed.bind(request)?;
        Ok(())
    }

    #[test]
    fn a_port_in_use_cannot_be_restored() -> anyhow::Result<()> {
        let (mut relayed, _) = relayed(0)?;
        let foreign = UdpSocket::bind("127.0.0.1:0")?;
        let bound = foreign.local_addr()?;
        let wanted = RelayedAddr { bound, advertised: SocketAddr::new(ip("192.0.2.1"), bound.port()) };
        assert!(matches!(relayed.restore(wanted, b"u"), Err(RestoreError::Bind(_))));
        drop(foreign);
        relayed.restore(wanted, b"u")?;
        assert_eq!(relayed.route(PeerAddr::new(wanted.advertised)), Route::Worker(WorkerId(3)));
        assert!(matches!(relayed.restore(wanted, b"u"), Err(RestoreError::Taken)));
        Ok(())
    }

    #[test]
    fn a_relay_ip_of_another_machine_is_named() {
        let foreign = RelayIp { bound: ip("192.0.2.1"), advertised: ip("192.0.2.1") };
        let error = check(&[foreign]).expect_err("not of this machine").to_string();
        assert!(error.contains("192.0.2.1") && error.contains("relay_ip"), "{error}");
    }
}
