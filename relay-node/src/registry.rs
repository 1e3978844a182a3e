//! Node-wide slow-path state: which relayed ports are held, and how many allocations each user has. One per process,
//! behind a lock; the packet path never comes here.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use turn_core::wire::attribute::ReservationToken;
use turn_core::{BindError, BindRequest, Bound, Family, Meter, Meters, PortRequest, RESERVED_FOR, RelayedAddr};

use crate::dataplane::RelayIp;

/// Ports tried for one allocation while other programs hold the ones picked.
const ATTEMPTS: usize = 64;

/// Bounds of the node.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bounds {
    /// Relayed addresses of this node, 0 for no limit: one more is 508.
    pub max_allocations: usize,
    /// Relayed addresses of one user on this node, 0 for no limit: one more is 486.
    pub user_quota: usize,
}

/// Why the address of a restored record is not held.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Another allocation of this process has it.
    #[error("another allocation holds it")]
    Taken,
    /// The system refuses it.
    #[error(transparent)]
    Bind(#[from] io::Error),
}

/// Ports and shares in use.
pub struct Registry<S = Option<UdpSocket>> {
    relay_ips: Vec<RelayIp>,
    ports: RangeInclusive<u16>,
    state: Mutex<State<S>>,
}

struct State<S> {
    bounds: Bounds,
    /// One per relay IP.
    held: Vec<PortSet>,
    allocations: usize,
    /// No entry is zero, so there are never more than allocations.
    by_user: HashMap<Box<[u8]>, usize>,
    /// Of users who have allocations, or whose traffic is not paid for yet: who deletes an allocation and makes
    /// another goes on where it was.
    meters: HashMap<Box<[u8]>, Arc<Meter>>,
    node_meter: Arc<Meter>,
    /// Ports held for whoever brings their token, the oldest first. Each counts for the user who asked for it, so
    /// there are never more of them than quotas allow.
    reservations: VecDeque<Reservation<S>>,
    random: Random,
}

struct Reservation<S> {
    token: ReservationToken,
    relayed: RelayedAddr,
    socket: S,
    quota_key: Box<[u8]>,
    until: Instant,
}

impl<S> Registry<S> {
    /// Nothing is held yet. New ports come from `ports`; a restored one may lie outside.
    pub fn new(relay_ips: Vec<RelayIp>, ports: RangeInclusive<u16>, bounds: Bounds) -> Self {
        let held = relay_ips.iter().map(|_| PortSet::new()).collect();
        let state = State {
            bounds,
            held,
            allocations: 0,
            by_user: HashMap::new(),
            meters: HashMap::new(),
            node_meter: Arc::default(),
            reservations: VecDeque::new(),
            random: Random::default(),
        };
        Self { relay_ips, ports, state: Mutex::new(state) }
    }

    /// Sets [`Bounds::user_quota`] for allocations to come; those held stay.
    pub fn set_user_quota(&self, user_quota: usize) {
        self.lock().bounds.user_quota = user_quota;
    }

    /// Counts an allocation for a user and opens a socket for it with `open`, on a port that nobody can guess: each
    /// suitable free one is as likely. Held until [`Registry::release`].
    ///
    /// # Errors
    /// See [`BindError`]; nothing is held or counted then.
    pub fn bind(
        &self,
        request: BindRequest<'_>,
        open: impl FnMut(SocketAddr) -> io::Result<S>,
    ) -> Result<(Bound, S), BindError> {
        self.expire_reservations(Instant::now());
        let width = match request.port {
            PortRequest::Reserved(token) => return self.lock().claim(token, request.quota_key),
            PortRequest::Any | PortRequest::Even => 1,
            PortRequest::EvenAndNext => 2,
        };
        let (index, port, sockets) = self.open_any(request, width, open)?;
        let mut sockets = sockets.into_iter();
        let mut state = self.lock();
        let bound = (|| {
            let socket = sockets.next().ok_or(BindError::NoPort)?;
            let next = sockets.next().map(|socket| (self.relayed(index, port + 1), socket));
            let reservation = next.map(|(relayed, socket)| state.reserve(relayed, socket, request.quota_key));
            Ok((Bound { relayed: self.relayed(index, port), reservation: reservation.transpose()? }, socket))
        })();
        if bound.is_err() {
            state.discount(request.quota_key, width);
        }
        bound
    }

    /// As [`Registry::bind`] for a socket of another kind, which is no reservation's: any port, counted and held alike.
    ///
    /// # Errors
    /// See [`BindError`]; nothing is held or counted then.
    pub fn bind_any<T>(
        &self,
        request: BindRequest<'_>,
        open: impl FnMut(SocketAddr) -> io::Result<T>,
    ) -> Result<(RelayedAddr, T), BindError> {
        self.expire_reservations(Instant::now());
        let (index, port, sockets) = self.open_any(BindRequest { port: PortRequest::Any, ..request }, 1, open)?;
        let socket = sockets.into_iter().next().ok_or(BindError::NoPort)?;
        Ok((self.relayed(index, port), socket))
    }

    /// Counts `width` ports of a relay IP for a user and opens a socket on each: index of the IP, the first port.
    fn open_any<T>(
        &self,
        request: BindRequest<'_>,
        width: u16,
        mut open: impl FnMut(SocketAddr) -> io::Result<T>,
    ) -> Result<(usize, u16, Vec<T>), BindError> {
        let index = self.index_of(request.family).ok_or(BindError::FamilyUnsupported)?;
        self.lock().count(request.quota_key, width)?;
        // Ports that another program holds stay marked until the end, so that none is tried twice.
        let mut foreign = Vec::new();
        let mut opened = Err(BindError::NoPort);
        for _ in 0..ATTEMPTS {
            let Some(port) = self.lock().take_any(index, self.ports.clone(), request.port) else {
                break;
            };
            let ports = port..=port + (width - 1);
            match ports.clone().map(|port| open(self.relayed(index, port).bound)).collect::<io::Result<Vec<T>>>() {
                Ok(sockets) => {
                    opened = Ok((index, port, sockets));
                    break;
                }
                Err(error) => {
                    foreign.extend(ports);
                    if error.kind() != io::ErrorKind::AddrInUse {
                        let address = self.relayed(index, port).bound;
                        tracing::error!(%address, %error, "cannot open a relayed address");
                        break;
                    }
                }
            }
        }
        let mut state = self.lock();
        for port in foreign {
            state.held[index].free(port);
        }
        if opened.is_err() {
            state.discount(request.quota_key, width);
        }
        opened
    }

    /// Frees what was reserved and not claimed in time.
    pub fn expire_reservations(&self, now: Instant) {
        let mut state = self.lock();
        while let Some(reservation) = state.reservations.pop_front_if(|reservation| reservation.until <= now) {
            // The socket first: a port is not free while it is open.
            drop(reservation.socket);
            if let Some(index) = self.index_of(reservation.relayed.family()) {
                state.held[index].free(reservation.relayed.port());
            }
            state.discount(&reservation.quota_key, 1);
        }
    }

    /// What the allocations of a user share their bandwidth with.
    pub fn meters(&self, quota_key: &[u8]) -> Meters {
        let mut state = self.lock();
        let user = match state.meters.get(quota_key) {
            Some(meter) => Arc::clone(meter),
            None => Arc::clone(state.meters.entry(quota_key.into()).or_default()),
        };
        Meters { user: Some(user), node: Some(Arc::clone(&state.node_meter)), ..Meters::default() }
    }

    /// Frees what was reserved and not claimed in time, and the meters of users who have gone.
    pub fn tick(&self, now: Instant) {
        self.expire_reservations(now);
        let mut state = self.lock();
        let State { meters, by_user, .. } = &mut *state;
        meters.retain(|user, meter| by_user.contains_key(user) || !meter.is_settled(now));
    }

    /// Holds exactly `relayed` for a restored record, whatever the user's share: it was granted before.
    ///
    /// # Errors
    /// See [`RestoreError`]; nothing is held or counted then.
    pub fn restore(
        &self,
        relayed: RelayedAddr,
        quota_key: &[u8],
        open: impl FnOnce(SocketAddr) -> io::Result<S>,
    ) -> Result<S, RestoreError> {
        let index = self.index_of(relayed.family()).ok_or(RestoreError::Taken)?;
        {
            let mut state = self.lock();
            if !state.held[index].take(relayed.port()) {
                // Whoever holds a reserved port has claimed it, if its reservation comes back too.
                let claimed = state.reservations.iter().position(|held| held.relayed == relayed);
                let claimed = claimed.and_then(|at| state.reservations.remove(at)).ok_or(RestoreError::Taken)?;
                state.discount(&claimed.quota_key, 1);
                state.add(quota_key, 1);
                return Ok(claimed.socket);
            }
            state.add(quota_key, 1);
        }
        open(relayed.bound).map_err(|error| {
            self.release(relayed, quota_key);
            RestoreError::Bind(error)
        })
    }

    /// Holds the port above `first` under `token` again, as [`Registry::bind`] did for [`PortRequest::EvenAndNext`].
    /// One that an allocation holds has been claimed, and stays as it is.
    ///
    /// # Errors
    /// See [`RestoreError`]; nothing is held or counted then.
    pub fn restore_reservation(
        &self,
        first: RelayedAddr,
        token: ReservationToken,
        until: Instant,
        quota_key: &[u8],
        open: impl FnOnce(SocketAddr) -> io::Result<S>,
    ) -> Result<(), RestoreError> {
        let index = self.index_of(first.family()).ok_or(RestoreError::Taken)?;
        let port = first.port().checked_add(1).ok_or(RestoreError::Taken)?;
        let relayed = self.relayed(index, port);
        // Opened under the lock: who restores the claimer meanwhile finds the port free, or the reservation.
        let mut state = self.lock();
        if state.held[index].holds(port) {
            return Err(RestoreError::Taken);
        }
        let socket = open(relayed.bound)?;
        state.held[index].take(port);
        state.add(quota_key, 1);
        let later = state.reservations.partition_point(|held| held.until <= until);
        let reservation = Reservation { token, relayed, socket, quota_key: quota_key.into(), until };
        state.reservations.insert(later, reservation);
        Ok(())
    }

    /// Frees an address and its user's share. One that is not held is left alone, so that nothing is freed twice.
    pub fn release(&self, relayed: RelayedAddr, quota_key: &[u8]) {
        let Some(index) = self.index_of(relayed.family()) else {
            return;
        };
        let mut state = self.lock();
        if state.held[index].free(relayed.port()) {
            state.discount(quota_key, 1);
        }
    }

    /// The address of this node that `relayed` is now: the advertised IP is what peers and clients know, the bound one
    /// may differ on another machine. Nothing if it is not of this node.
    pub fn ours(&self, relayed: RelayedAddr) -> Option<RelayedAddr> {
        let index = self.relay_ips.iter().position(|ip| ip.advertised == relayed.advertised.ip())?;
        Some(self.relayed(index, relayed.port()))
    }

    fn index_of(&self, family: Family) -> Option<usize> {
        self.relay_ips.iter().position(|ip| Family::of(ip.advertised) == family)
    }

    fn relayed(&self, index: usize, port: u16) -> RelayedAddr {
        let ip = self.relay_ips[index];
        RelayedAddr { bound: SocketAddr::new(ip.bound, port), advertised: SocketAddr::new(ip.advertised, port) }
    }

    fn lock(&self) -> MutexGuard<'_, State<S>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S> State<S> {
    /// Takes a port of a relay IP that nobody can guess.
    fn take_any(&mut self, index: usize, range: RangeInclusive<u16>, wanted: PortRequest) -> Option<u16> {
        if wanted == PortRequest::Any
            && let Some(port) = self.held[index].take_guessed(range.clone(), self.random.next()?)
        {
            return Some(port);
        }
        self.held[index].take_any(range, wanted, self.random.next()?)
    }

    /// Counts `width` addresses for a user, or none.
    fn count(&mut self, quota_key: &[u8], width: u16) -> Result<(), BindError> {
        let reached = |count, bound| bound != 0 && count + usize::from(width) > bound;
        let of_user = self.by_user.get(quota_key).copied().unwrap_or(0);
        if reached(of_user, self.bounds.user_quota) {
            return Err(BindError::QuotaReached);
        }
        if reached(self.allocations, self.bounds.max_allocations) {
            return Err(BindError::NoPort);
        }
        self.add(quota_key, width);
        Ok(())
    }

    fn add(&mut self, quota_key: &[u8], width: u16) {
        self.allocations += usize::from(width);
        match self.by_user.get_mut(quota_key) {
            Some(count) => *count += usize::from(width),
            None => drop(self.by_user.insert(quota_key.into(), width.into())),
        }
    }

    fn discount(&mut self, quota_key: &[u8], width: u16) {
        self.allocations = self.allocations.saturating_sub(width.into());
        if let Some(count) = self.by_user.get_mut(quota_key) {
            *count = count.saturating_sub(width.into());
            if *count == 0 {
                self.by_user.remove(quota_key);
            }
        }
    }

    /// Holds a port, counted already, under a token that nobody can guess (RFC 8656 §18.10).
    fn reserve(&mut self, relayed: RelayedAddr, socket: S, quota_key: &[u8]) -> Result<ReservationToken, BindError> {
        let token = ReservationToken(self.random.next().ok_or(BindError::NoPort)?.to_be_bytes());
        let until = Instant::now() + RESERVED_FOR;
        self.reservations.push_back(Reservation { token, relayed, socket, quota_key: quota_key.into(), until });
        Ok(token)
    }

    /// Hands a reserved port over to the user who brings its token.
    fn claim(&mut self, token: ReservationToken, quota_key: &[u8]) -> Result<(Bound, S), BindError> {
        let index = self.reservations.iter().position(|held| held.token == token).ok_or(BindError::NoPort)?;
        let owner = self.reservations[index].quota_key.clone();
        // What was counted for the one is counted for the other, who must have room for it.
        self.discount(&owner, 1);
        if let Err(error) = self.count(quota_key, 1) {
            self.add(&owner, 1);
            return Err(error);
        }
        let held = self.reservations.remove(index).ok_or(BindError::NoPort)?;
        Ok((Bound { relayed: held.relayed, reservation: None }, held.socket))
    }
}

/// Random numbers of the system, fetched by the half kilobyte; each is used once.
#[derive(Default)]
struct Random {
    fetched: Vec<u64>,
}

impl Random {
    const FETCH: usize = 64;

    fn next(&mut self) -> Option<u64> {
        if self.fetched.is_empty() {
            let mut bytes = [0; Self::FETCH * 8];
            getrandom::fill(&mut bytes).ok()?;
            self.fetched.extend(bytes.as_chunks().0.iter().copied().map(u64::from_ne_bytes));
        }
        self.fetched.pop()
    }
}

/// A set of ports, one bit each.
struct PortSet(Box<[u64; 1024]>);

impl PortSet {
    fn new() -> Self {
        Self(Box::new([0; 1024]))
    }

    fn take(&mut self, port: u16) -> bool {
        let (word, bit) = (usize::from(port / 64), 1 << (port % 64));
        let free = self.0[word] & bit == 0;
        self.0[word] |= bit;
        free
    }

    fn holds(&self, port: u16) -> bool {
        self.0[usize::from(port / 64)] & 1 << (port % 64) != 0
    }

    fn free(&mut self, port: u16) -> bool {
        let (word, bit) = (usize::from(port / 64), 1 << (port % 64));
        let held = self.0[word] & bit != 0;
        self.0[word] &= !bit;
        held
    }

    /// Takes a port of `range` that is found to be free at the first or the second guess, as it is while many are. Free
    /// ports have the same chance each, but for a bias below 2^-16.
    fn take_guessed(&mut self, range: RangeInclusive<u16>, random: u64) -> Option<u16> {
        let width = u64::from(range.end().checked_sub(*range.start())?) + 1;
        [random & u64::from(u32::MAX), random >> 32].into_iter().find_map(|random| {
            let port = range.start() + u16::try_from((random * width) >> 32).ok()?;
            self.take(port).then_some(port)
        })
    }

    /// Takes one of the suitable free ports of `range`, each with the same chance (CSPRNG; predictable ports help
    /// spoofers); of a pair, which never leaves a word, the even one is said.
    fn take_any(&mut self, range: RangeInclusive<u16>, wanted: PortRequest, random: u64) -> Option<u16> {
        const EVEN: u64 = 0x5555_5555_5555_5555;
        let suitable = |free: u64| match wanted {
            PortRequest::Even => free & EVEN,
            PortRequest::EvenAndNext => free & free >> 1 & EVEN,
            PortRequest::Any | PortRequest::Reserved(_) => free,
        };
        let free_in = |set: &Self, word: u16| {
            let first = word * 64;
            let low = range.start().saturating_sub(first).min(64);
            let high = range.end().saturating_sub(first).min(63);
            if low > high || *range.end() < first {
                return 0;
            }
            let inside = (u64::MAX << low) & (u64::MAX >> (63 - high));
            suitable(inside & !set.0[usize::from(word)])
        };
        let words = range.start() / 64..=range.end() / 64;
        let free: u32 = words.clone().map(|word| free_in(self, word).count_ones()).sum();
        // The bias of a remainder over 64 random bits is below 2^-48.
        let mut skip = u32::try_from(random.checked_rem(u64::from(free))?).ok()?;
        for word in words {
            let mut bits = free_in(self, word);
            if skip >= bits.count_ones() {
                skip -= bits.count_ones();
                continue;
            }
            for _ in 0..skip {
                bits &= bits - 1;
            }
            let port = word * 64 + u16::try_from(bits.trailing_zeros()).ok()?;
            self.take(port);
            if wanted == PortRequest::EvenAndNext {
                self.take(port + 1);
            }
            return Some(port);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::net::UdpSocket;
    use std::time::Duration;

    use turn_core::PeerTransport;

    use super::*;

    fn registry<S>(ports: RangeInclusive<u16>, bounds: Bounds) -> Registry<S> {
        let loopback =
            RelayIp { bound: "127.0.0.1".parse().expect("literal"), advertised: "192.0.2.1".parse().expect("literal") };
        Registry::new(vec![loopback], ports, bounds)
    }

    fn any(family: Family, quota_key: &[u8]) -> BindRequest<'_> {
        BindRequest { family, transport: PeerTransport::Udp, quota_key, port: PortRequest::Any }
    }

    fn granted(_: SocketAddr) -> io::Result<()> {
        Ok(())
    }

    #[test]
    fn every_port_of_the_range_is_given_once_and_again_after_release() {
        // Odd ends: within a word, across words, one port, the highest.
        for range in [50_001..=50_003, 49_983..=50_113, 50_000..=50_000, 65_530..=65_535, 1..=64] {
            let registry = registry(range.clone(), Bounds::default());
            for round in 0..2 {
                let mut ports = HashSet::new();
                let mut addresses = Vec::new();
                for _ in range.clone() {
                    let (Bound { relayed, .. }, ()) =
                        registry.bind(any(Family::V4, b"u"), granted).expect("a port is left");
                    assert_eq!(relayed.bound.ip().to_string(), "127.0.0.1");
                    assert_eq!(relayed.advertised.ip().to_string(), "192.0.2.1");
                    assert!(range.contains(&relayed.port()));
                    assert!(ports.insert(relayed.port()), "round {round}: {relayed:?} twice");
                    addresses.push(relayed);
                }
                assert_eq!(registry.bind(any(Family::V4, b"u"), granted), Err(BindError::NoPort));
                for relayed in addresses {
                    registry.release(relayed, b"u");
                }
            }
        }
    }

    #[test]
    fn ports_are_spread_over_the_range() {
        let registry = registry(49_152..=65_535, Bounds::default());
        let ports: Vec<u16> =
            (0..64).map(|_| registry.bind(any(Family::V4, b"u"), granted).expect("free").0.relayed.port()).collect();
        let steps: HashSet<i32> = ports.windows(2).map(|pair| i32::from(pair[1]) - i32::from(pair[0])).collect();
        assert!(steps.len() > 50, "ports follow each other: {ports:?}");
        assert!(ports.iter().any(|port| *port < 55_000) && ports.iter().any(|port| *port > 60_000));
    }

    #[test]
    fn quotas_hold_and_are_freed_exactly_once() {
        let bounds = Bounds { max_allocations: 3, user_quota: 2 };
        let registry = registry(50_000..=50_100, bounds);
        let bind = |user: &[u8]| registry.bind(any(Family::V4, user), granted).map(|(bound, ())| bound.relayed);
        let first = bind(b"alice").expect("first");
        bind(b"alice").expect("second");
        assert_eq!(bind(b"alice"), Err(BindError::QuotaReached), "of the user");
        bind(b"bob").expect("another user");
        assert_eq!(bind(b"carol"), Err(BindError::NoPort), "of the node");
        registry.release(first, b"alice");
        registry.release(first, b"alice");
        bind(b"carol").expect("one is free");
        assert_eq!(bind(b"dave"), Err(BindError::NoPort), "released once, freed once");
    }

    #[test]
    fn meters_are_shared_by_user_and_outlast_their_allocations_while_in_debt() {
        let registry = registry(50_000..=50_100, Bounds::default());
        let now = Instant::now();
        let (first, second, other) = (registry.meters(b"alice"), registry.meters(b"alice"), registry.meters(b"bob"));
        let user = |meters: &Meters| Arc::clone(meters.user.as_ref().expect("of a user"));
        let node = |meters: &Meters| Arc::clone(meters.node.as_ref().expect("of the node"));
        assert!(Arc::ptr_eq(&user(&first), &user(&second)) && Arc::ptr_eq(&node(&first), &node(&other)));
        assert!(!Arc::ptr_eq(&user(&first), &user(&other)));
        assert!(user(&first).admit(turn_core::meter::Direction::ToPeer, now, 972, 100));
        registry.bind(any(Family::V4, b"bob"), granted).expect("free");
        registry.tick(now + Duration::from_secs(9));
        assert!(Arc::ptr_eq(&user(&first), &user(&registry.meters(b"alice"))), "in debt for 10 s");
        registry.tick(now + Duration::from_secs(11));
        assert!(!Arc::ptr_eq(&user(&first), &user(&registry.meters(b"alice"))));
        assert!(Arc::ptr_eq(&user(&other), &user(&registry.meters(b"bob"))), "bob has an allocation");
    }

    #[test]
    fn a_new_quota_counts_what_is_held() {
        let registry = registry(50_000..=50_100, Bounds { max_allocations: 0, user_quota: 1 });
        let bind = || registry.bind(any(Family::V4, b"alice"), granted).map(|(bound, ())| bound.relayed);
        bind().expect("first");
        registry.set_user_quota(2);
        bind().expect("second");
        registry.set_user_quota(1);
        assert_eq!(bind(), Err(BindError::QuotaReached));
        registry.set_user_quota(0);
        bind().expect("no limit");
    }

    #[test]
    fn a_refusal_counts_for_nobody() {
        let bounds = Bounds { max_allocations: 0, user_quota: 1 };
        let registry = registry(50_000..=50_000, bounds);
        assert_eq!(registry.bind(any(Family::V6, b"u"), granted), Err(BindError::FamilyUnsupported));
        let refuse = |_| Err::<(), _>(io::Error::from(io::ErrorKind::AddrInUse));
        assert_eq!(registry.bind(any(Family::V4, b"u"), refuse), Err(BindError::NoPort));
        registry.bind(any(Family::V4, b"u"), granted).expect("share and port are free");
    }

    #[test]
    fn ports_of_other_programs_are_passed_over() {
        let foreign = UdpSocket::bind("127.0.0.1:0").expect("a port");
        let port = foreign.local_addr().expect("bound").port();
        let (low, high) = (port.min(u16::MAX - 1), port.min(u16::MAX - 1) + 1);
        let registry = registry(low..=high, Bounds::default());
        let (Bound { relayed, .. }, _socket) =
            registry.bind(any(Family::V4, b"u"), UdpSocket::bind::<SocketAddr>).expect("the other port");
        assert_ne!(relayed.port(), port);
        assert!(registry.bind(any(Family::V4, b"u"), UdpSocket::bind::<SocketAddr>).is_err());
    }

    #[test]
    fn a_restored_port_is_given_to_nobody_else() {
        let registry = registry(50_000..=50_001, Bounds { max_allocations: 0, user_quota: 1 });
        let old = |port: u16| RelayedAddr {
            bound: SocketAddr::from(([10, 0, 0, 1], port)),
            advertised: SocketAddr::from(([192, 0, 2, 1], port)),
        };
        let relayed = registry.ours(old(50_000)).expect("by its advertised address");
        assert_eq!(relayed.bound.to_string(), "127.0.0.1:50000", "bound where this machine has it");
        registry.restore(relayed, b"u", granted).expect("free");
        assert!(matches!(registry.restore(relayed, b"u", granted), Err(RestoreError::Taken)));
        let beyond_quota = registry.ours(old(40_000)).expect("outside of the range");
        registry.restore(beyond_quota, b"u", granted).expect("granted before");
        assert_eq!(registry.bind(any(Family::V4, b"u"), granted), Err(BindError::QuotaReached));
        let (Bound { relayed: other, .. }, ()) = registry.bind(any(Family::V4, b"v"), granted).expect("one is left");
        assert_eq!(other.port(), 50_001);

        let refuse = |_| Err::<(), _>(io::Error::from(io::ErrorKind::AddrInUse));
        let taken = registry.ours(old(40_001)).expect("ours");
        assert!(registry.restore(taken, b"w", refuse).is_err());
        registry.restore(taken, b"w", granted).expect("a failure holds nothing");
        assert_eq!(registry.ours(RelayedAddr { advertised: "203.0.113.1:1".parse().expect("literal"), ..taken }), None);
    }

    #[test]
    fn a_reservation_is_restored_with_its_token_and_its_end() {
        let bounds = Bounds { max_allocations: 0, user_quota: 2 };
        let request = |quota_key, port| BindRequest { port, ..any(Family::V4, quota_key) };
        let now = Instant::now();
        let token = ReservationToken(*b"8 bytes!");
        let first = |registry: &Registry<()>| registry.relayed(0, 50_000);
        let restored = || {
            let registry: Registry<()> = registry(50_000..=50_003, bounds);
            registry.restore(first(&registry), b"alice", granted).expect("free");
            registry
                .restore_reservation(first(&registry), token, now + Duration::from_secs(20), b"alice", granted)
                .expect("free");
            registry
        };
        let registry = restored();
        assert_eq!(registry.bind(any(Family::V4, b"alice"), granted), Err(BindError::QuotaReached), "both count");
        let (bound, ()) = registry.bind(request(b"bob", PortRequest::Reserved(token)), granted).expect("held");
        assert_eq!(bound.relayed.port(), 50_001);

        let registry = restored();
        registry.expire_reservations(now + Duration::from_secs(20));
        assert_eq!(registry.bind(request(b"bob", PortRequest::Reserved(token)), granted), Err(BindError::NoPort));
        registry.bind(any(Family::V4, b"alice"), granted).expect("it counts no longer");

        // Claimed before the restart: the claimer's record may come before or after.
        let registry = restored();
        registry.restore(registry.relayed(0, 50_001), b"bob", granted).expect("a reservation makes room");
        assert_eq!(registry.bind(request(b"carol", PortRequest::Reserved(token)), granted), Err(BindError::NoPort));
        let again = registry.restore_reservation(first(&registry), token, now, b"alice", granted);
        assert!(matches!(again, Err(RestoreError::Taken)));
        assert!(registry.lock().reservations.is_empty());
        registry.bind(any(Family::V4, b"alice"), granted).expect("counted for bob");
    }

    #[test]
    fn even_ports_and_pairs() {
        let registry = registry(50_001..=50_009, Bounds::default());
        let request = |port| BindRequest { port, ..any(Family::V4, b"u") };
        let mut even = Vec::new();
        while let Ok((bound, ())) = registry.bind(request(PortRequest::Even), granted) {
            assert_eq!(bound.reservation, None);
            even.push(bound.relayed.port());
        }
        even.sort_unstable();
        assert_eq!(even, [50_002, 50_004, 50_006, 50_008]);
        for port in &even {
            registry.release(registry.relayed(0, *port), b"u");
        }
        let pairs: Vec<Bound> =
            (0..4).map(|_| registry.bind(request(PortRequest::EvenAndNext), granted).expect("four pairs").0).collect();
        assert!(pairs.iter().all(|pair| pair.relayed.port().is_multiple_of(2)));
        assert_eq!(registry.bind(request(PortRequest::EvenAndNext), granted), Err(BindError::NoPort));
        let (odd, ()) = registry.bind(request(PortRequest::Any), granted).expect("the odd one out");
        assert_eq!(odd.relayed.port(), 50_001);
        for pair in pairs {
            let token = pair.reservation.expect("of a pair");
            let (next, ()) = registry.bind(request(PortRequest::Reserved(token)), granted).expect("held");
            assert_eq!(next.relayed.port(), pair.relayed.port() + 1);
            assert_eq!(registry.bind(request(PortRequest::Reserved(token)), granted), Err(BindError::NoPort), "once");
        }
    }

    #[test]
    fn a_reservation_counts_and_ends() {
        let registry = registry(50_000..=50_001, Bounds { max_allocations: 0, user_quota: 2 });
        let request = |quota_key, port| BindRequest { port, ..any(Family::V4, quota_key) };
        let pair = |user| registry.bind(request(user, PortRequest::EvenAndNext), granted).map(|(bound, ())| bound);
        let first = pair(b"alice").expect("two shares");
        assert_eq!(registry.bind(any(Family::V4, b"alice"), granted), Err(BindError::QuotaReached), "both count");
        assert_eq!(pair(b"bob"), Err(BindError::NoPort));
        registry.expire_reservations(Instant::now() + RESERVED_FOR - Duration::from_secs(10));
        assert_eq!(registry.lock().reservations.len(), 1, "held for 30 s at least");
        registry.expire_reservations(Instant::now() + RESERVED_FOR);
        let token = first.reservation.expect("of a pair");
        let claim = request(b"bob", PortRequest::Reserved(token));
        assert_eq!(registry.bind(claim, granted), Err(BindError::NoPort), "too late");
        registry.release(first.relayed, b"alice");
        let again = pair(b"bob").expect("ports and shares are free");
        let claim = request(b"alice", PortRequest::Reserved(again.reservation.expect("of a pair")));
        registry.bind(claim, granted).expect("by anybody");
        assert_eq!(registry.lock().by_user.len(), 2, "and counts for who claimed it");
    }

    #[test]
    fn a_pair_is_opened_whole_or_not_at_all() {
        let registry = registry(50_000..=50_001, Bounds { max_allocations: 2, user_quota: 0 });
        let request = BindRequest { port: PortRequest::EvenAndNext, ..any(Family::V4, b"u") };
        let odd_is_taken = |address: SocketAddr| match address.port() {
            50_000 => Ok(()),
            _ => Err(io::Error::from(io::ErrorKind::AddrInUse)),
        };
        assert_eq!(registry.bind(request, odd_is_taken), Err(BindError::NoPort));
        registry.bind(request, granted).expect("nothing was held or counted");
    }
}
