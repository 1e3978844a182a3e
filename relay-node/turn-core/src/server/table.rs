//! The allocations and the indexes into them. The only file that may break an invariant: each allocation is found by
//! its five-tuple, each of its bound relayed addresses, its id and, if it has one, its connection, and has one timer.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};
use std::net::SocketAddr;
use std::time::Instant;

use rustc_hash::FxBuildHasher;

use super::channel::Channels;
use super::icmp::IcmpBudget;
use super::mobility::{Mobility, Move};
use super::permission::Permissions;
use super::relays::{Relay, Relays};
use super::tcp::PeerConnections;
use super::timer::Timers;
use crate::index::{Index, plain_hash};
use crate::meter::{Meters, OwnMeter};
use crate::ticket::Ticket;
use crate::wire::TransactionId;
use crate::wire::attribute::ReservationToken;
use crate::wire::error_code::AddressErrorCode;
use crate::{
    AccountId, AllocationId, ConnectionId, Family, FiveTuple, ListenerId, MemberId, Path, PeerTransport, Session,
    Transport,
};

/// Place of an allocation while it lives.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Slot(pub(super) u32);

impl Slot {
    pub(super) fn index(self) -> usize {
        self.0 as usize
    }
}

/// An allocation (RFC 8656 §6). What most have none of is on the heap, so that an idle one is small.
#[derive(Debug)]
pub(super) struct Allocation {
    pub(super) id: AllocationId,
    five_tuple: FiveTuple,
    way: Way,
    relays: Relays,
    /// USERNAME of the Allocate, or what stands for its access token.
    pub(super) username: Box<[u8]>,
    /// Of the Allocate, to know it again (RFC 8656 §7.2, note).
    pub(super) transaction_id: Option<TransactionId>,
    /// Unix milliseconds.
    pub(super) created_at: u64,
    /// Ownership under which it was last written.
    pub(super) epoch: u64,
    pub(super) sequence: u64,
    pub(super) account: AccountId,
    pub(super) permissions: Permissions,
    pub(super) channels: Channels,
    /// Where the bandwidth is limited.
    pub(super) metered: Option<Box<Metered>>,
    rare: Option<Box<Rare>>,
}

/// What counts for the bandwidth of an allocation.
#[derive(Debug, Default)]
pub(super) struct Metered {
    pub(super) own: OwnMeter,
    pub(super) shared: Meters,
}

/// What few allocations have.
#[derive(Debug, Default)]
struct Rare {
    address_error: Option<AddressErrorCode>,
    reservation: Option<(ReservationToken, u64)>,
    session: Option<Session>,
    icmp: IcmpBudget,
    /// Of a mobile client.
    mobility: Option<Box<Mobility>>,
    /// Of a TCP allocation.
    peer_connections: Option<PeerConnections>,
}

/// A [`Path`], small: the proxies of few clients are on the heap.
#[derive(Debug)]
enum Way {
    Listener(ListenerId),
    Proxied(Box<(ListenerId, SocketAddr)>),
    Connection(ConnectionId),
    Ingress(MemberId),
}

impl Way {
    fn new(path: Path) -> Self {
        match path {
            Path::Listener(listener) => Self::Listener(listener),
            Path::Proxied(listener, proxy) => Self::Proxied(Box::new((listener, proxy))),
            Path::Connection(connection) => Self::Connection(connection),
            Path::Ingress(member) => Self::Ingress(member),
        }
    }

    fn path(&self) -> Path {
        match self {
            Self::Listener(listener) => Path::Listener(*listener),
            Self::Proxied(proxied) => Path::Proxied(proxied.0, proxied.1),
            Self::Connection(connection) => Path::Connection(*connection),
            Self::Ingress(member) => Path::Ingress(*member),
        }
    }
}

/// What an allocation begins with; the rest of it is empty.
pub(super) struct Beginning {
    pub(super) id: AllocationId,
    pub(super) five_tuple: FiveTuple,
    pub(super) path: Path,
    /// At least one.
    pub(super) relays: Relays,
    pub(super) peer_transport: PeerTransport,
    pub(super) username: Box<[u8]>,
    pub(super) created_at: u64,
}

impl Allocation {
    pub(super) fn five_tuple(&self) -> FiveTuple {
        self.five_tuple
    }

    pub(super) fn path(&self) -> Path {
        self.way.path()
    }

    pub(super) fn relays(&self) -> &Relays {
        &self.relays
    }

    /// ADDRESS-ERROR-CODE of the success answer, for a retransmission of the request.
    pub(super) fn address_error(&self) -> Option<AddressErrorCode> {
        self.rare.as_ref()?.address_error
    }

    /// RESERVATION-TOKEN of the success answer, for a retransmission of the request, and Unix ms of its end.
    pub(super) fn reservation(&self) -> Option<(ReservationToken, u64)> {
        self.rare.as_ref()?.reservation
    }

    /// What is left of the access token it was made or last refreshed with (RFC 7635).
    pub(super) fn session(&self) -> Option<Session> {
        self.rare.as_ref()?.session
    }

    pub(super) fn set_session(&mut self, session: Option<Session>) {
        if session != self.session() {
            self.rare_mut().session = session;
        }
    }

    /// Keeps what the success answer says beside addresses and lifetime.
    pub(super) fn set_answer(
        &mut self,
        address_error: Option<AddressErrorCode>,
        reservation: Option<(ReservationToken, u64)>,
    ) {
        if address_error.is_some() || reservation.is_some() {
            let rare = self.rare_mut();
            (rare.address_error, rare.reservation) = (address_error, reservation);
        }
    }

    /// How much its client is told of the network's errors.
    pub(super) fn icmp(&mut self) -> &mut IcmpBudget {
        &mut self.rare_mut().icmp
    }

    /// Of a mobile client (RFC 8016).
    pub(super) fn mobility(&self) -> Option<&Mobility> {
        self.rare.as_ref()?.mobility.as_deref()
    }

    fn mobility_mut(&mut self) -> Option<&mut Mobility> {
        self.rare.as_mut()?.mobility.as_deref_mut()
    }

    fn rare_mut(&mut self) -> &mut Rare {
        self.rare.get_or_insert_default()
    }

    fn moving(&self) -> Option<&Move> {
        self.mobility()?.moving.as_ref()
    }

    /// Whether it is its only five-tuple, or one of the two it has during a move.
    fn has(&self, five_tuple: &FiveTuple) -> bool {
        self.five_tuple == *five_tuple || self.moving().is_some_and(|moving| moving.to == *five_tuple)
    }

    /// The way to one of its two five-tuples during a move, to its only one else.
    pub(super) fn path_of(&self, five_tuple: &FiveTuple) -> Path {
        match self.moving() {
            Some(moving) if moving.to == *five_tuple => moving.path,
            _ => self.path(),
        }
    }

    /// Whether any of its relayed addresses has not ended.
    pub(super) fn is_live(&self, now: Instant) -> bool {
        self.relays.last_end().is_some_and(|end| end > now)
    }

    pub(super) fn peer_transport(&self) -> PeerTransport {
        if self.peer_connections().is_some() { PeerTransport::Tcp } else { PeerTransport::Udp }
    }

    /// Of a TCP allocation (RFC 6062).
    pub(super) fn peer_connections(&self) -> Option<&PeerConnections> {
        self.rare.as_ref()?.peer_connections.as_ref()
    }
}

/// See the module.
pub(super) struct Table {
    slots: Vec<Option<Allocation>>,
    free: Vec<Slot>,
    secret: SecretState,
    slot_by_five_tuple: Index,
    /// By [`RelayedAddr::bound`]. The relay chose the ports and the ids below, so a plain hash is enough there.
    slot_by_bound: Index,
    slot_by_id: Index,
    slot_by_connection: HashMap<ConnectionId, Slot, FxBuildHasher>,
    slot_by_ticket: HashMap<Ticket, Slot, FxBuildHasher>,
    by_transport: [usize; 4],
    timers: Timers,
    /// Of peer connections that wait for something: the earliest of each allocation.
    connection_timers: Timers,
}

impl Table {
    /// `secret` keys the hash of client addresses.
    pub(super) fn new(secret: [u64; 2]) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            secret: SecretState(secret),
            slot_by_five_tuple: Index::default(),
            slot_by_bound: Index::default(),
            slot_by_id: Index::default(),
            slot_by_connection: HashMap::default(),
            slot_by_ticket: HashMap::default(),
            by_transport: [0; 4],
            timers: Timers::default(),
            connection_timers: Timers::default(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.slot_by_id.len()
    }

    /// Allocations by the transport of their clients, in the order of [`Transport`].
    pub(super) fn by_transport(&self) -> [usize; 4] {
        self.by_transport
    }

    pub(super) fn by_five_tuple(&self, five_tuple: &FiveTuple) -> Option<Slot> {
        let hash = self.secret.hash_one(five_tuple);
        self.slot_by_five_tuple.find(hash, |slot| self.get(Slot(slot)).has(five_tuple)).map(Slot)
    }

    pub(super) fn by_bound(&self, bound: &SocketAddr) -> Option<Slot> {
        self.slot_by_bound.find(plain_hash(bound), |slot| self.get(Slot(slot)).relays.has_bound(bound)).map(Slot)
    }

    pub(super) fn by_id(&self, id: AllocationId) -> Option<Slot> {
        self.slot_by_id.find(plain_hash(&id), |slot| self.get(Slot(slot)).id == id).map(Slot)
    }

    pub(super) fn by_connection(&self, connection: ConnectionId) -> Option<Slot> {
        self.slot_by_connection.get(&connection).copied()
    }

    /// By the ticket that moves it next, or by the one that began the move it is in.
    pub(super) fn by_ticket(&self, ticket: &Ticket) -> Option<Slot> {
        self.slot_by_ticket.get(ticket).copied()
    }

    /// The allocation of a slot that one of the lookups gave since the last removal.
    #[inline]
    pub(super) fn get(&self, slot: Slot) -> &Allocation {
        self.slots[slot.index()].as_ref().expect("slot of a live allocation")
    }

    /// As [`Table::get`].
    #[inline]
    pub(super) fn get_mut(&mut self, slot: Slot) -> &mut Allocation {
        self.slots[slot.index()].as_mut().expect("slot of a live allocation")
    }

    /// Every slot in use.
    pub(super) fn slots(&self) -> impl Iterator<Item = Slot> + '_ {
        (0..self.slots.len() as u32).map(Slot).filter(|slot| self.slots[slot.index()].is_some())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Allocation> + '_ {
        self.slots.iter().flatten()
    }

    /// Adds an allocation and arms its timer; `None`, and no change, if any of its names is taken.
    pub(super) fn insert(&mut self, beginning: Beginning) -> Option<Slot> {
        let Beginning { id, five_tuple, path, relays, peer_transport, username, created_at } = beginning;
        let connection = connection(path);
        let first_end = relays.first_end()?;
        if self.by_five_tuple(&five_tuple).is_some()
            || relays.iter().any(|relay| self.by_bound(&relay.address.bound).is_some())
            || self.by_id(id).is_some()
            || connection.is_some_and(|connection| self.slot_by_connection.contains_key(&connection))
        {
            return None;
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            Slot((self.slots.len() - 1) as u32)
        });
        let of_tcp = peer_transport == PeerTransport::Tcp;
        let rare = of_tcp.then(|| Rare { peer_connections: Some(PeerConnections::default()), ..Rare::default() });
        for relay in relays.iter() {
            self.slot_by_bound.insert(plain_hash(&relay.address.bound), slot.0);
        }
        self.slots[slot.index()] = Some(Allocation {
            id,
            five_tuple,
            way: Way::new(path),
            relays,
            username,
            transaction_id: None,
            created_at,
            epoch: 0,
            sequence: 0,
            account: AccountId::NONE,
            permissions: Permissions::default(),
            channels: Channels::default(),
            metered: None,
            rare: rare.map(Box::new),
        });
        self.slot_by_five_tuple.insert(self.secret.hash_one(five_tuple), slot.0);
        self.by_transport[place(five_tuple.transport)] += 1;
        self.slot_by_id.insert(plain_hash(&id), slot.0);
        if let Some(connection) = connection {
            self.slot_by_connection.insert(connection, slot);
        }
        self.timers.arm(slot, first_end);
        Some(slot)
    }

    /// Takes an allocation out, with its timer.
    pub(super) fn remove(&mut self, slot: Slot) -> Allocation {
        self.forget_move(slot);
        if let Some(mobility) = self.get(slot).mobility() {
            let ticket = mobility.ticket;
            self.slot_by_ticket.remove(&ticket);
        }
        let allocation = self.slots[slot.index()].take().expect("slot of a live allocation");
        self.free.push(slot);
        self.slot_by_five_tuple.remove(self.secret.hash_one(allocation.five_tuple), slot.0);
        self.by_transport[place(allocation.five_tuple.transport)] -= 1;
        for relay in allocation.relays.iter() {
            self.slot_by_bound.remove(plain_hash(&relay.address.bound), slot.0);
        }
        self.slot_by_id.remove(plain_hash(&allocation.id), slot.0);
        self.forget_connection(slot, allocation.path());
        self.timers.disarm(slot);
        self.connection_timers.disarm(slot);
        allocation
    }

    /// Gives an allocation its ticket; one that has begun no move.
    pub(super) fn make_mobile(&mut self, slot: Slot, mobility: Mobility) {
        let before = self.get_mut(slot).rare_mut().mobility.replace(Box::new(mobility));
        if let Some(before) = before {
            self.slot_by_ticket.remove(&before.ticket);
        }
        self.slot_by_ticket.insert(mobility.ticket, slot);
    }

    /// Gives a mobile allocation that is in no move a second five-tuple, which nobody has, and the ticket for the next.
    pub(super) fn begin_move(&mut self, slot: Slot, moving: Move, ticket: Ticket) {
        if let Some(mobility) = self.get_mut(slot).mobility_mut() {
            *mobility = Mobility { ticket, moving: Some(moving) };
            self.slot_by_five_tuple.insert(self.secret.hash_one(moving.to), slot.0);
            self.slot_by_ticket.insert(ticket, slot);
            if let Some(connection) = connection(moving.path) {
                self.slot_by_connection.insert(connection, slot);
            }
        }
    }

    /// The second five-tuple becomes the only one; what was the first, the way to it, and the ticket that began the move.
    pub(super) fn end_move(&mut self, slot: Slot) -> Option<(FiveTuple, Path, Ticket)> {
        let allocation = self.get_mut(slot);
        let moving = allocation.mobility_mut()?.moving.take()?;
        let from = std::mem::replace(&mut allocation.five_tuple, moving.to);
        let path = std::mem::replace(&mut allocation.way, Way::new(moving.path)).path();
        self.by_transport[place(from.transport)] -= 1;
        self.by_transport[place(moving.to.transport)] += 1;
        self.slot_by_five_tuple.remove(self.secret.hash_one(from), slot.0);
        self.slot_by_ticket.remove(&moving.by);
        self.forget_connection(slot, path);
        Some((from, path, moving.by))
    }

    /// The first five-tuple stays the only one. The ticket is good for another move.
    pub(super) fn cancel_move(&mut self, slot: Slot) -> Option<Move> {
        let moving = self.forget_move(slot)?;
        if let Some(mobility) = self.get_mut(slot).mobility_mut() {
            mobility.moving = None;
        }
        Some(moving)
    }

    /// Takes what is of a move out of the indexes.
    fn forget_move(&mut self, slot: Slot) -> Option<Move> {
        let moving = self.get(slot).mobility()?.moving?;
        self.slot_by_five_tuple.remove(self.secret.hash_one(moving.to), slot.0);
        self.slot_by_ticket.remove(&moving.by);
        self.forget_connection(slot, moving.path);
        Some(moving)
    }

    /// The connection of a mobile allocation has closed: it waits for its client until then at most.
    pub(super) fn disconnect(&mut self, slot: Slot, deadline: Instant) {
        self.forget_connection(slot, self.get(slot).path());
        self.get_mut(slot).relays.shorten(deadline);
        self.rearm(slot);
    }

    /// A connection may have closed before its allocation ended.
    fn forget_connection(&mut self, slot: Slot, path: Path) {
        if let Some(connection) = connection(path)
            && self.slot_by_connection.get(&connection) == Some(&slot)
        {
            self.slot_by_connection.remove(&connection);
        }
    }

    /// Moves the end of one family of an allocation, or of all there are.
    pub(super) fn set_deadline(&mut self, slot: Slot, family: Option<Family>, deadline: Instant) {
        self.get_mut(slot).relays.set_deadline(family, deadline);
        self.rearm(slot);
    }

    /// Takes one relayed address from an allocation that has another; `None`, and no change, if it has not.
    pub(super) fn remove_relay(&mut self, slot: Slot, family: Family) -> Option<Relay> {
        let relays = &mut self.get_mut(slot).relays;
        if relays.iter().count() < 2 {
            return None;
        }
        let relay = relays.remove(family)?;
        self.slot_by_bound.remove(plain_hash(&relay.address.bound), slot.0);
        self.rearm(slot);
        Some(relay)
    }

    fn rearm(&mut self, slot: Slot) {
        if let Some(first_end) = self.get(slot).relays.first_end() {
            self.timers.arm(slot, first_end);
        }
    }

    /// Changes the datagram way back to the client; a connection is for the life of the allocation.
    pub(super) fn set_datagram_path(&mut self, slot: Slot, five_tuple: &FiveTuple, path: Path) {
        let allocation = self.get_mut(slot);
        let held = allocation.path_of(five_tuple);
        if held == path || connection(held).is_some() || connection(path).is_some() {
            return;
        }
        match allocation.mobility_mut().and_then(|mobility| mobility.moving.as_mut()) {
            Some(moving) if moving.to == *five_tuple => moving.path = path,
            _ => allocation.way = Way::new(path),
        }
    }

    /// Changes the peer connections of a TCP allocation; nothing, of any other.
    pub(super) fn change_peer_connections<T>(
        &mut self,
        slot: Slot,
        change: impl FnOnce(&mut PeerConnections) -> T,
    ) -> Option<T> {
        let connections = self.get_mut(slot).rare.as_mut()?.peer_connections.as_mut()?;
        let changed = change(connections);
        match connections.next_deadline() {
            Some(deadline) => self.connection_timers.arm(slot, deadline),
            None => self.connection_timers.disarm(slot),
        }
        Some(changed)
    }

    /// The earliest end of an allocation, or of what a peer connection waits for.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        [&self.timers, &self.connection_timers].into_iter().filter_map(Timers::next).map(|(deadline, _)| deadline).min()
    }

    /// An allocation with a peer connection that has waited too long by `now`, if there is one.
    pub(super) fn connection_due(&self, now: Instant) -> Option<Slot> {
        self.connection_timers.next().filter(|(deadline, _)| *deadline <= now).map(|(_, slot)| slot)
    }

    /// An allocation with a relayed address that has ended by `now`, if there is one.
    pub(super) fn due(&self, now: Instant) -> Option<Slot> {
        self.timers.next().filter(|(deadline, _)| *deadline <= now).map(|(_, slot)| slot)
    }
}

/// Where a transport stands in [`Table::by_transport`].
fn place(transport: Transport) -> usize {
    transport as usize - Transport::Udp as usize
}

fn connection(path: Path) -> Option<ConnectionId> {
    match path {
        Path::Connection(connection) => Some(connection),
        Path::Listener(_) | Path::Proxied(..) | Path::Ingress(_) => None,
    }
}

/// Hashes five-tuples under a secret: an authenticated client with a /64 of its own could grind collisions of an unkeyed
/// multiplicative hash and turn the lookup of everybody's packets into a scan.
pub(super) struct SecretState(pub(super) [u64; 2]);

impl BuildHasher for SecretState {
    type Hasher = SecretHasher;

    fn build_hasher(&self) -> SecretHasher {
        SecretHasher {
            state: self.0[0],
            // Odd, so that no input bit is lost in the product.
            factor: self.0[1] | 1,
        }
    }
}

/// Multiplies each 8 bytes to 16 and folds them.
pub(super) struct SecretHasher {
    state: u64,
    factor: u64,
}

impl SecretHasher {
    fn mix(&mut self, word: u64) {
        let product = u128::from(self.state ^ word) * u128::from(self.factor);
        self.state = (product as u64) ^ ((product >> 64) as u64);
        // Keeps words of the same value in other places apart.
        self.state = self.state.rotate_left(23).wrapping_add(self.factor);
    }
}

impl Hasher for SecretHasher {
    fn finish(&self) -> u64 {
        let product = u128::from(self.state) * u128::from(self.factor);
        (product as u64) ^ ((product >> 64) as u64)
    }

    fn write(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.mix(u64::from_le_bytes(*word));
        }
        if !rest.is_empty() {
            let mut last = [0; 8];
            last[..rest.len()].copy_from_slice(rest);
            self.mix(u64::from_le_bytes(last));
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.mix(value.into());
    }

    fn write_u16(&mut self, value: u16) {
        self.mix(value.into());
    }

    fn write_u32(&mut self, value: u32) {
        self.mix(value.into());
    }

    fn write_u64(&mut self, value: u64) {
        self.mix(value);
    }

    fn write_usize(&mut self, value: usize) {
        self.mix(value as u64);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::time::Duration;

    use rand_chacha::ChaCha12Rng;
    use rand_core::{Rng, SeedableRng};

    use super::*;
    use crate::RelayedAddr;

    /// Every third has an IPv6 address that ends later.
    fn relays(number: u32, start: Instant) -> Relays {
        let relay = |ip: &str, seconds: u32| {
            let address = SocketAddr::new(ip.parse().expect("literal"), number as u16);
            let address = RelayedAddr { bound: address, advertised: address };
            Relay { address, deadline: start + Duration::from_secs(seconds.into()) }
        };
        let second = number.is_multiple_of(3).then(|| relay("2001:db8::7", number + 5));
        Relays::new([relay("198.51.100.7", number)].into_iter().chain(second))
    }

    fn beginning(number: u32, start: Instant) -> Beginning {
        let port = number as u16;
        let stream = number % 2 == 1;
        Beginning {
            id: AllocationId::new(number.into(), [0; 10]),
            five_tuple: FiveTuple {
                transport: if stream { Transport::Tcp } else { Transport::Udp },
                client: SocketAddr::from(([192, 0, 2, 1], port)),
                server: SocketAddr::from(([198, 51, 100, 7], 3478)),
            },
            path: if stream { Path::Connection(ConnectionId(number.into())) } else { Path::Listener(ListenerId(0)) },
            peer_transport: PeerTransport::Udp,
            relays: relays(number, start),
            username: Box::default(),
            created_at: 0,
        }
    }

    /// Every index knows exactly the allocations there are.
    fn check(table: &Table) {
        let (mut connections, mut bound) = (0, 0);
        for slot in table.slots() {
            let allocation = table.get(slot);
            assert_eq!(table.by_five_tuple(&allocation.five_tuple), Some(slot));
            for relay in allocation.relays.iter() {
                assert_eq!(table.by_bound(&relay.address.bound), Some(slot));
                bound += 1;
            }
            assert_eq!(table.by_id(allocation.id), Some(slot));
            if let Some(connection) = connection(allocation.path()) {
                assert_eq!(table.by_connection(connection), Some(slot));
                connections += 1;
            }
        }
        let len = table.slots().count();
        assert_eq!(table.len(), len);
        assert_eq!(table.iter().count(), len);
        assert_eq!(table.slot_by_five_tuple.len(), len);
        assert_eq!(table.slot_by_bound.len(), bound);
        assert_eq!(table.slot_by_id.len(), len);
        assert_eq!(table.slot_by_connection.len(), connections);
        assert_eq!(table.slots.len(), len + table.free.len());
        assert_eq!(table.next_deadline(), table.iter().filter_map(|allocation| allocation.relays.first_end()).min());
    }

    #[test]
    fn indexes_agree_through_any_history() {
        let start = Instant::now();
        let mut rng = ChaCha12Rng::from_seed([3; 32]);
        let mut table = Table::new([1, 2]);
        for _ in 0..3000 {
            let number = rng.next_u32() % 40;
            let known = table.by_id(AllocationId::new(number.into(), [0; 10]));
            match (rng.next_u32() % 4, known) {
                (0, Some(slot)) => {
                    table.remove(slot);
                }
                (1, Some(slot)) => {
                    let family = [None, Some(Family::V4), Some(Family::V6)][rng.next_u32() as usize % 3];
                    table.set_deadline(slot, family, start + Duration::from_secs(u64::from(rng.next_u32() % 50)));
                    let five_tuple = table.get(slot).five_tuple;
                    table.set_datagram_path(slot, &five_tuple, Path::Listener(ListenerId(1)));
                }
                (2, Some(slot)) => {
                    let before = table.get(slot).relays.iter().count();
                    let family = [Family::V4, Family::V6][rng.next_u32() as usize % 2];
                    assert_eq!(table.remove_relay(slot, family).is_some(), before == 2, "never the last one");
                }
                (_, known) => {
                    let inserted = table.insert(beginning(number, start));
                    assert_eq!(inserted.is_none(), known.is_some(), "number {number}");
                }
            }
            check(&table);
        }
    }

    #[test]
    fn an_idle_allocation_is_small() {
        // What every allocation of a node costs; what few have belongs into `Rare`.
        let bytes = size_of::<Option<Allocation>>();
        assert!(bytes <= 344, "{bytes} bytes");
    }

    #[test]
    fn a_taken_name_changes_nothing() {
        let start = Instant::now();
        let fresh = || beginning(7, start);
        let taken = || beginning(1, start);
        let mut table = Table::new([1, 2]);
        table.insert(taken()).expect("empty table");
        let cases: [(&str, Beginning); 4] = [
            ("five-tuple", Beginning { five_tuple: taken().five_tuple, ..fresh() }),
            ("relayed address", Beginning { relays: taken().relays, ..fresh() }),
            ("id", Beginning { id: taken().id, ..fresh() }),
            ("connection", Beginning { path: taken().path, ..fresh() }),
        ];
        for (what, beginning) in cases {
            assert!(table.insert(beginning).is_none(), "{what}");
            check(&table);
        }
        assert!(table.insert(fresh()).is_some());
    }

    #[test]
    fn due_is_in_order() {
        let start = Instant::now();
        let mut table = Table::new([1, 2]);
        for number in [3, 1, 2] {
            table.insert(beginning(number, start)).expect("all different");
        }
        assert_eq!(table.due(start), None);
        let mut ended = Vec::new();
        while let Some(slot) = table.due(start + Duration::from_secs(2)) {
            ended.extend(table.remove(slot).relays.of(Family::V4).map(|relay| relay.address.port()));
        }
        assert_eq!(ended, [1, 2]);
    }

    #[test]
    fn five_tuples_spread() {
        let state = SecretState([0x0123_4567_89AB_CDEF, 0xFEDC_BA98_7654_3210]);
        let hashes: Vec<u64> =
            (0..4096).map(|number| state.hash_one(beginning(number * 2, Instant::now()).five_tuple)).collect();
        assert_eq!(hashes.iter().collect::<HashSet<_>>().len(), hashes.len());
        // In 4,096 buckets a random function leaves about 63 % used.
        let buckets: HashSet<u64> = hashes.iter().map(|hash| hash % 4096).collect();
        assert!(buckets.len() > 2400, "{}", buckets.len());
        // Another secret, another order.
        let other = SecretState([1, 2]);
        assert_ne!(hashes[0], other.hash_one(beginning(0, Instant::now()).five_tuple));
    }
}
