//! DTLS 1.2 between client and relay (RFC 7350, RFC 6347): a layer in front of the same worker. A client gets a session,
//! and with it a place in memory, only once it has brought the cookie that was sent to its address.
//!
//! To the core a session is a connection: its [`ConnectionId`] is the way to the client, and an allocation ends with it.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;
use slab::Slab;
use turn_core::wire::client_hello::ClientHello;
use turn_core::{AllocationId, Change, ConnectionId, DropReason, FiveTuple, IpMeta, Path, Transport, WorkerId};

use super::apply::{Gathered, Origin, listener_of};
use super::counters::{Counters, Loss};
use super::dtls_context::Contexts;
use super::dtls_hello::Cookies;
use super::dtls_session::{Exchange, Handshake, Opened, Session};
use super::outgoing::Target;
use super::packet::{PacketRef, Packets};
use super::worker::Worker;

/// How often handshakes are looked at: what was lost is sent again a second later at the earliest (RFC 6347 §4.2.4.1).
const POLL: Duration = Duration::from_millis(250);
/// Datagrams of handshakes that wait for another turn. What is beyond is lost; the client sends it again.
const WAITING: usize = 256;
/// A connection id with this bit is a session's; below it, as a stream's, the worker, a serial number, the place in the
/// table.
const SESSION: u64 = 1 << 63;
const KEY_BITS: u32 = 24;
const WORKER_SHIFT: u32 = 56;

/// Whether a connection id is a session's.
pub(super) fn is_session(id: ConnectionId) -> bool {
    id.0 & SESSION != 0
}

/// How many sessions a worker has, and for how long.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DtlsLimits {
    /// Sessions; one more is not begun.
    pub sessions: usize,
    /// Handshakes that are not complete. One more ends the oldest.
    pub handshakes: usize,
    /// How long a handshake may take.
    pub handshake_time: Duration,
    /// A session without an allocation ends when nothing of use has come for so long.
    pub idle_time: Duration,
}

impl Default for DtlsLimits {
    fn default() -> Self {
        Self {
            sessions: 10_000,
            handshakes: 1024,
            handshake_time: Duration::from_secs(10),
            idle_time: Duration::from_secs(45),
        }
    }
}

struct Entry {
    id: ConnectionId,
    five_tuple: FiveTuple,
    /// The way of its datagrams.
    way: Path,
    session: Session,
    /// Of the ClientHello that began it.
    random: [u8; 32],
    established: bool,
    began: Instant,
    last_valid: Instant,
    allocation: Option<AllocationId>,
    closing: bool,
}

/// The sessions of one client and server address.
#[derive(Clone, Copy, Default)]
struct Pair {
    current: Option<usize>,
    /// A client that lost its session begins a new one beside it (RFC 6347 §4.2.8).
    pending: Option<usize>,
}

/// The sessions.
pub(super) struct Sessions {
    worker: WorkerId,
    contexts: Option<Arc<Contexts>>,
    cookies: Cookies,
    limits: DtlsLimits,
    table: Slab<Entry>,
    serial: u32,
    by_address: HashMap<(SocketAddr, SocketAddr), Pair>,
    by_allocation: FxHashMap<AllocationId, ConnectionId>,
    /// Oldest first.
    half_open: VecDeque<ConnectionId>,
    next_poll: Instant,
    /// Datagrams of handshakes that had no share of their turn.
    waiting: VecDeque<(ConnectionId, IpMeta, Box<[u8]>)>,
    /// Whose record is in the core's hands.
    speaking: Option<ConnectionId>,
    /// In the order of their deadlines: all wait equally long.
    idle: VecDeque<(Instant, ConnectionId)>,
    closing: Vec<ConnectionId>,
    exchange: Exchange,
}

impl Sessions {
    /// Without `contexts` there is no DTLS. `secret` is what cookies are made with.
    pub(super) fn new(
        worker: WorkerId,
        contexts: Option<Arc<Contexts>>,
        limits: DtlsLimits,
        secret: [u8; 64],
        now: Instant,
    ) -> Self {
        Self {
            worker,
            contexts,
            cookies: Cookies::new(secret, now),
            limits: DtlsLimits { sessions: limits.sessions.min(1 << KEY_BITS), ..limits },
            table: Slab::new(),
            serial: 0,
            by_address: HashMap::new(),
            by_allocation: FxHashMap::default(),
            half_open: VecDeque::new(),
            next_poll: now,
            waiting: VecDeque::new(),
            speaking: None,
            idle: VecDeque::new(),
            closing: Vec::new(),
            exchange: Exchange::default(),
        }
    }

    /// Whether DTLS is served.
    pub(super) fn are_served(&self) -> bool {
        self.contexts.is_some()
    }

    /// Sessions, those with half a handshake too.
    pub(super) fn open(&self) -> usize {
        self.table.len()
    }

    /// Handshakes that are not complete.
    pub(super) fn half_open(&self) -> usize {
        self.half_open.len()
    }

    /// The place of a session, if there still is one.
    pub(super) fn key(&self, id: ConnectionId) -> Option<usize> {
        let key = (id.0 & ((1 << KEY_BITS) - 1)) as usize;
        self.table.get(key).filter(|entry| entry.id == id).map(|_| key)
    }

    /// The places of all sessions.
    pub(super) fn keys(&self) -> Vec<usize> {
        self.table.iter().map(|(key, _)| key).collect()
    }

    /// The place of a session that is not ending, and the way of its datagrams.
    pub(super) fn session(&self, id: ConnectionId) -> Option<(usize, Path)> {
        let key = self.key(id)?;
        let entry = &self.table[key];
        (!entry.closing).then_some((key, entry.way))
    }

    /// Whether a handshake waits for a turn.
    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// When handshakes want to be looked at.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        (!self.half_open.is_empty()).then_some(self.next_poll)
    }

    /// A session has no allocation any more: its client has moved (RFC 8016).
    pub(super) fn leave(&mut self, id: ConnectionId, now: Instant) {
        if let Some(key) = self.key(id) {
            self.table[key].last_valid = now;
            if let Some(allocation) = self.table[key].allocation.take() {
                self.by_allocation.remove(&allocation);
            }
        }
    }

    /// Keeps track of which session has an allocation.
    pub(super) fn note(&mut self, change: &Change, now: Instant) {
        match change {
            Change::Put(record) if record.five_tuple.transport == Transport::Dtls => {
                // A new allocation was made by the record just handed in.
                let Some(id) = self.by_allocation.get(&record.id).copied().or(self.speaking) else {
                    return;
                };
                if let Some(key) = self.key(id) {
                    self.table[key].allocation = Some(record.id);
                    self.by_allocation.insert(record.id, id);
                }
            }
            Change::Put(_) => {}
            Change::End { id, .. } => {
                if let Some(key) = self.by_allocation.remove(id).and_then(|id| self.key(id)) {
                    self.table[key].allocation = None;
                    self.table[key].last_valid = now;
                }
            }
        }
    }

    /// The session of a ClientHello that has brought its cookie: the one it began, or a new one.
    fn begin(
        &mut self,
        hello: &ClientHello<'_>,
        five_tuple: FiveTuple,
        way: Path,
        now: Instant,
        counters: &mut Counters,
    ) -> Option<usize> {
        let address = (five_tuple.client, five_tuple.server);
        let pair = self.by_address.get(&address).copied().unwrap_or_default();
        let random = hello.parameters.get(2..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; 32]);
        let known = [pair.pending, pair.current].into_iter().flatten().find(|key| self.table[*key].random == random);
        if let Some(key) = known {
            return Some(key);
        }
        if self.table.len() >= self.limits.sessions {
            counters.lost(Loss::DtlsSessions);
            return None;
        }
        if self.half_open.len() >= self.limits.handshakes {
            if let Some(key) = self.half_open.front().and_then(|id| self.key(*id)) {
                self.remove(key);
            }
            counters.lost(Loss::DtlsHandshakes);
        }
        let context = self.contexts.as_ref()?.current();
        let session = Session::new(&context, hello.message_sequence, hello.record_sequence, &mut self.exchange);
        let Some(session) = session else {
            counters.lost(Loss::DtlsNoSession);
            return None;
        };
        let entry = self.table.vacant_entry();
        let key = entry.key();
        self.serial = self.serial.wrapping_add(1);
        let id = SESSION | u64::from(self.worker.0) << WORKER_SHIFT | u64::from(self.serial) << KEY_BITS | key as u64;
        let id = ConnectionId(id);
        entry.insert(Entry {
            id,
            five_tuple,
            way,
            session,
            random,
            established: false,
            began: now,
            last_valid: now,
            allocation: None,
            closing: false,
        });
        if self.half_open.is_empty() {
            self.next_poll = now + POLL;
        }
        self.half_open.push_back(id);
        // Of two that have not been completed the newer one is the client's.
        if let Some(older) = self.by_address.entry(address).or_default().pending.replace(key) {
            self.forget(older);
        }
        Some(key)
    }

    /// Ends a handshake that has not come to its end; nobody is told.
    fn remove(&mut self, key: usize) {
        let five_tuple = self.table[key].five_tuple;
        let address = (five_tuple.client, five_tuple.server);
        if let Some(pair) = self.by_address.get_mut(&address) {
            pair.pending.take_if(|pending| *pending == key);
            pair.current.take_if(|current| *current == key);
            if pair.current.is_none() && pair.pending.is_none() {
                self.by_address.remove(&address);
            }
        }
        self.forget(key);
    }

    fn forget(&mut self, key: usize) {
        let entry = self.table.remove(key);
        if !entry.established {
            self.half_open.retain(|id| *id != entry.id);
        }
        if let Some(id) = entry.allocation {
            self.by_allocation.remove(&id);
        }
    }

    /// Its handshake is complete. The session that it takes the place of, if there is one.
    fn establish(&mut self, key: usize, now: Instant) -> Option<usize> {
        let entry = &mut self.table[key];
        entry.established = true;
        entry.last_valid = now;
        let (id, address) = (entry.id, (entry.five_tuple.client, entry.five_tuple.server));
        self.half_open.retain(|other| *other != id);
        self.idle.push_back((now + self.limits.idle_time, id));
        let pair = self.by_address.entry(address).or_default();
        pair.pending.take_if(|pending| *pending == key);
        pair.current.replace(key)
    }
}

impl Worker {
    /// Takes in a DTLS datagram of a client that this worker owns.
    pub(super) fn receive_dtls(&mut self, from: FiveTuple, way: Path, ip: IpMeta, packet: PacketRef) {
        let from = FiveTuple { transport: Transport::Dtls, ..from };
        if let Some(hello) = ClientHello::read(self.packets.bytes(packet)) {
            let now = self.now.mono;
            // The first hello of a client has no cookie to bring.
            if hello.message_sequence == 0 || !self.dtls.cookies.verify(from.client, from.server, &hello, now) {
                let request = self.dtls.cookies.request(from.client, from.server, &hello, now);
                self.counters.hello_verify_requests += 1;
                let body = self.outgoing.copy_reply(&request);
                self.queue_to_client(&from, &way, &Gathered::answer(body));
                return;
            }
            if let Some(key) = self.dtls.begin(&hello, from, way, now, &mut self.counters) {
                self.give(key, packet, ip);
            }
            return;
        }
        let Some(pair) = self.dtls.by_address.get(&(from.client, from.server)).copied() else {
            self.counters.lost(Loss::DtlsNoSession);
            return;
        };
        // Which of two is meant shows when one of them can open it.
        for key in [pair.pending, pair.current].into_iter().flatten() {
            self.give(key, packet, ip);
        }
    }

    /// Lets a session take in a datagram, and the core what was in it.
    fn give(&mut self, key: usize, packet: PacketRef, ip: IpMeta) {
        let Some(entry) = self.dtls.table.get(key).filter(|entry| !entry.closing) else {
            return;
        };
        let (id, from) = (entry.id, entry.five_tuple);
        if entry.established {
            self.dtls.exchange.bring(self.packets.bytes(packet));
        } else {
            if self.streams.half_open.is_spent() {
                self.put_off(id, ip, packet);
                return;
            }
            let began = Instant::now();
            let handshake = self.with_session(key, |session, exchange, packets| {
                exchange.bring(packets.bytes(packet));
                session.handshake(exchange)
            });
            self.streams.half_open.spend(began.elapsed());
            match handshake {
                Handshake::Pending => return,
                Handshake::Failed => {
                    self.dtls.remove(key);
                    return;
                }
                Handshake::Done => {}
            }
            if let Some(older) = self.dtls.establish(key, self.now.mono) {
                // RFC 6347 §4.2.8: abandoned, and nobody is left who could read a close_notify.
                self.mark_closing(older);
            }
        }
        let mut used = 0;
        loop {
            // A record shrinks when it is opened, so that what follows has not been overwritten.
            let mut end = false;
            let opened = self.with_session(key, |session, exchange, packets| {
                packets.rewrite(packet, used, |buffer| match session.open(exchange, buffer) {
                    Opened::Data(length) => Some(length),
                    Opened::Nothing => None,
                    Opened::End => {
                        end = true;
                        None
                    }
                })
            });
            if end {
                self.close_session(key);
            }
            let Some(plain) = opened else {
                return;
            };
            used += plain.len();
            self.dtls.speaking = Some(id);
            let of_use = self.feed(&Origin::Client { from, path: Path::Connection(id), ip }, plain);
            self.dtls.speaking = None;
            if of_use && let Some(entry) = self.dtls.table.get_mut(key) {
                entry.last_valid = self.now.mono;
            }
        }
    }

    /// Keeps a datagram of a handshake for a later turn: a storm of handshakes must not hold media back.
    fn put_off(&mut self, id: ConnectionId, ip: IpMeta, packet: PacketRef) {
        if self.dtls.waiting.len() < WAITING {
            self.dtls.waiting.push_back((id, ip, self.packets.bytes(packet).into()));
        } else {
            self.counters.lost(Loss::DtlsWaiting);
        }
    }

    /// Goes on with the handshakes that had no share of an earlier turn.
    pub(super) fn resume_handshakes(&mut self) {
        while !self.streams.half_open.is_spent() && self.packets.room() > 0 {
            let Some((id, ip, datagram)) = self.dtls.waiting.pop_front() else {
                return;
            };
            let filled = self.packets.fill(|buffer| {
                buffer.get_mut(..datagram.len())?.copy_from_slice(&datagram);
                Some(((), datagram.len()))
            });
            if let (Some(key), Some(((), packet))) = (self.dtls.key(id), filled) {
                self.give(key, packet, ip);
            }
        }
    }

    /// Does something with a session and queues what it sends.
    fn with_session<T>(&mut self, key: usize, act: impl FnOnce(&mut Session, &mut Exchange, &mut Packets) -> T) -> T {
        let entry = &mut self.dtls.table[key];
        let (to, path) = (entry.five_tuple, entry.way);
        let mut exchange = std::mem::take(&mut self.dtls.exchange);
        let result = act(&mut entry.session, &mut exchange, &mut self.packets);
        for datagram in exchange.outgoing() {
            let body = self.outgoing.copy_reply(datagram);
            self.queue_to_client(&to, &path, &Gathered::answer(body));
        }
        exchange.clear();
        self.dtls.exchange = exchange;
        result
    }

    /// Makes records of what this turn sends to sessions.
    pub(super) fn seal(&mut self) {
        if self.dtls.table.is_empty() {
            return;
        }
        let exchange = &mut self.dtls.exchange;
        for position in 0..self.outgoing.len() {
            let Target::Session(key) = self.outgoing.target(position) else {
                continue;
            };
            let Some(entry) = self.dtls.table.get_mut(key) else {
                continue;
            };
            let parts = self.outgoing.parts(self.outgoing.at(position), &self.packets);
            let sealed = entry.session.seal(exchange, parts);
            match exchange.outgoing().next() {
                Some(record) if sealed => {
                    if let Some(listener) = listener_of(entry.way) {
                        self.outgoing.seal(position, listener, record);
                    }
                }
                _ => self.counters.dropped(DropReason::TooLong),
            }
            exchange.clear();
        }
    }

    /// Sends again what handshakes have lost, and ends those that take too long.
    pub(super) fn poll_handshakes(&mut self) {
        if self.dtls.poll_timeout().is_none_or(|poll| poll > self.now.mono) {
            return;
        }
        self.dtls.next_poll = self.now.mono + POLL;
        for index in (0..self.dtls.half_open.len()).rev() {
            let Some(key) = self.dtls.half_open.get(index).and_then(|id| self.dtls.key(*id)) else {
                continue;
            };
            let late = self.dtls.table[key].began + self.dtls.limits.handshake_time <= self.now.mono;
            if late || self.with_session(key, |session, exchange, _| session.handshake(exchange)) == Handshake::Failed {
                self.dtls.remove(key);
            }
        }
    }

    /// Ends a session, with close_notify, once this turn's sends have left.
    pub(super) fn close_session(&mut self, key: usize) {
        if self.mark_closing(key) {
            self.with_session(key, |session, exchange, _| session.close(exchange));
        }
    }

    /// Whether it was not closing already.
    fn mark_closing(&mut self, key: usize) -> bool {
        let Some(entry) = self.dtls.table.get_mut(key).filter(|entry| !entry.closing) else {
            return false;
        };
        entry.closing = true;
        self.dtls.closing.push(entry.id);
        true
    }

    /// Ends the sessions that this turn closed, and their allocations with them.
    pub(super) fn end_closed_sessions(&mut self) {
        while let Some(id) = self.dtls.closing.pop() {
            if let Some(key) = self.dtls.key(id) {
                let five_tuple = self.dtls.table[key].five_tuple;
                self.tell_closed(id, &five_tuple);
                self.dtls.remove(key);
            }
        }
    }

    /// Ends sessions that were of no use for long.
    pub(super) fn end_idle_sessions(&mut self) {
        let idle_time = self.dtls.limits.idle_time;
        while let Some((deadline, id)) = self.dtls.idle.pop_front() {
            if deadline > self.now.mono {
                self.dtls.idle.push_front((deadline, id));
                return;
            }
            let Some(key) = self.dtls.key(id) else {
                continue;
            };
            let entry = &self.dtls.table[key];
            let has_moved_here = self.relayed.whereabouts().of_client(&entry.five_tuple).is_some();
            if !has_moved_here && entry.allocation.is_none() && entry.last_valid + idle_time <= self.now.mono {
                self.close_session(key);
            } else {
                self.dtls.idle.push_back((self.now.mono + idle_time, id));
            }
        }
    }
}
