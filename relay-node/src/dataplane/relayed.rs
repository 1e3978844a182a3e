//! Relayed addresses: opens and closes their sockets, and knows which worker has which.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

use rustc_hash::FxHashMap;
use slab::Slab;
use socket2::{Domain, Socket, Type};
use turn_core::{
    AllocationId, BindError, BindRequest, Bound, Change, Family, Host, Meters, PeerAddr, PeerTransport, RelayedAddr,
    Route, WorkerId,
};

use super::RelayIp;
use super::worker::Token;
use crate::registry::{Registry, RestoreError};
use crate::sys::epoll::{Epoll, Interest};
use crate::sys::socket::{Fragmentation, receive_errors, set_fragmentation};

/// Who owns a peer's address, as far as this node is concerned. Read per packet by every worker.
pub(super) struct Routes {
    relay_ips: Vec<(RelayIp, PortTable)>,
    /// Where clients are served: nobody's peer.
    listeners: Vec<SocketAddr>,
    listener_ports: Vec<u16>,
}

/// Relayed port -> worker, for one relay IP.
struct PortTable(Box<[AtomicU8]>);

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
        }
    }

    fn route(&self, to: PeerAddr) -> Route {
        for (ip, table) in &self.relay_ips {
            if to.ip() == ip.bound || to.ip() == ip.advertised {
                // Relaxed: a packet that overtakes the change of its port is lost, as on any network.
                return match table.0[usize::from(to.port())].load(Ordering::Relaxed).checked_sub(1) {
                    Some(worker) => Route::Worker(WorkerId(worker.into())),
                    None => Route::Nobody,
                };
            }
        }
        if self.listener_ports.contains(&to.port()) && self.listeners.contains(&to.socket_addr()) {
            return Route::Nobody;
        }
        Route::Internet
    }

    fn set(&self, relayed: RelayedAddr, worker: Option<WorkerId>) {
        // 1..=64 workers: worker 0 is 1, nobody is 0.
        let owner = worker.map_or(0, |worker| worker.0 as u8 + 1);
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
    pub(super) socket: UdpSocket,
    /// Known since its first record.
    holder: Option<AllocationId>,
}

/// The relayed addresses of one worker; what its core asks of the process.
pub(super) struct Relayed {
    worker: WorkerId,
    registry: Arc<Registry>,
    routes: Arc<Routes>,
    epoll: Arc<Epoll>,
    sockets: Slab<RelayedSocket>,
    by_port: FxHashMap<(Family, u16), usize>,
    released: Vec<(RelayedAddr, Box<[u8]>)>,
}

impl Relayed {
    pub(super) fn new(worker: WorkerId, registry: Arc<Registry>, routes: Arc<Routes>, epoll: Arc<Epoll>) -> Self {
        Self {
            worker,
            registry,
            routes,
            epoll,
            sockets: Slab::new(),
            by_port: FxHashMap::default(),
            released: Vec::new(),
        }
    }

    /// The socket under a key, if it is still open.
    pub(super) fn socket(&self, key: usize) -> Option<&RelayedSocket> {
        self.sockets.get(key)
    }

    /// The key of the socket at a relayed address of this worker, by its bound or its advertised address.
    pub(super) fn find(&self, address: SocketAddr) -> Option<usize> {
        self.by_port.get(&(Family::of(address.ip()), address.port())).copied()
    }

    /// As [`Registry::ours`].
    pub(super) fn ours(&self, relayed: RelayedAddr) -> Option<RelayedAddr> {
        self.registry.ours(relayed)
    }

    /// Whether any worker of this process has the address.
    pub(super) fn is_held(&self, relayed: RelayedAddr) -> bool {
        matches!(self.routes.route(PeerAddr::new(relayed.advertised)), Route::Worker(_))
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
        let socket = self.registry.restore(relayed, quota_key, open)?;
        self.keep(relayed, socket).map_err(|error| {
            self.registry.release(relayed, quota_key);
            RestoreError::Bind(error)
        })
    }

    /// Nothing is sent to it any more; what this turn still sends from it leaves first.
    pub(super) fn release(&mut self, relayed: RelayedAddr, quota_key: Box<[u8]>) {
        self.routes.set(relayed, None);
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
                self.sockets.remove(key);
                self.registry.release(relayed, &quota_key);
            }
        }
    }

    fn keep(&mut self, relayed: RelayedAddr, socket: UdpSocket) -> io::Result<()> {
        let entry = self.sockets.vacant_entry();
        let token = Token::Relayed(entry.key()).encode();
        self.epoll.add(socket.as_fd(), token, Interest::Read)?;
        self.by_port.insert((relayed.family(), relayed.port()), entry.key());
        entry.insert(RelayedSocket { relayed, socket, holder: None });
        self.routes.set(relayed, Some(self.worker));
        Ok(())
    }
}

impl Host for Relayed {
    fn bind(&mut self, request: BindRequest<'_>) -> Result<Bound, BindError> {
        if request.transport == PeerTransport::Tcp {
            return Err(BindError::NoPort);
        }
        let (bound, socket) = self.registry.bind(request, open)?;
        self.keep(bound.relayed, socket).map_err(|error| {
            tracing::error!(%error, "cannot watch a relayed address");
            self.registry.release(bound.relayed, request.quota_key);
            BindError::NoPort
        })?;
        Ok(bound)
    }

    fn meters(&mut self, quota_key: &[u8]) -> Meters {
        self.registry.meters(quota_key)
    }

    fn route(&self, to: PeerAddr) -> Route {
        self.routes.route(to)
    }
}

fn open(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
        socket.set_recv_tclass_v6(true)?;
    } else {
        socket.set_recv_tos_v4(true)?;
    }
    receive_errors(socket.as_fd(), address.is_ipv6())?;
    // RFC 8656 §14, alternate behavior: the DF bit of what arrives is not known, and taken for 0.
    set_fragmentation(socket.as_fd(), address.is_ipv6(), Fragmentation::Allowed)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// Whether the relay IPs can be bound at all.
///
/// # Errors
/// One line that names the address and what to do.
pub(super) fn check(relay_ips: &[RelayIp]) -> anyhow::Result<()> {
    for ip in relay_ips {
        if let Err(error) = open(SocketAddr::new(ip.bound, 0)) {
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
        Ok((Relayed::new(WorkerId(3), registry, Arc::clone(&routes), epoll), routes))
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
