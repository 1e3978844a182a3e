//! The stream connections of a worker: read, written, ended.

use std::collections::VecDeque;
use std::net::TcpStream;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;
use slab::Slab;
use turn_core::{AllocationId, Change, ConnectionId, FiveTuple, IpMeta, Path, WorkerId};

use super::accept::{Door, HalfOpen};
use super::apply::Origin;
use super::counters::{Counters, Loss};
use super::outgoing::OutgoingQueue;
use super::packet::Packets;
use super::refusals::Refusal;
use super::stream::{Connection, Sent};
use super::transport::{Arrived, ByteStream, Scratch};
use super::udp;
use super::worker::{Token, Worker};
use crate::sys::epoll::Readiness;

/// Reads of one connection before others have their turn.
const READ_BUDGET: usize = 2;
/// A connection that sends nothing of use and has no allocation is closed after this; what was sent and never
/// acknowledged breaks one.
pub(super) const IDLE: Duration = Duration::from_secs(30);
/// Bits of a connection id that are its place in the table; above them a serial number, above that the worker.
const KEY_BITS: u32 = 24;
const WORKER_SHIFT: u32 = 56;

/// The worker that has a connection.
pub(super) fn owner_of(id: ConnectionId) -> WorkerId {
    // At most 64 workers.
    WorkerId((id.0 >> WORKER_SHIFT) as u16 & 0x3F)
}

/// The connections.
pub(super) struct Streams {
    worker: WorkerId,
    send_cap: usize,
    most: usize,
    pub(super) table: Slab<Connection>,
    pub(super) half_open: HalfOpen,
    pub(super) scratch: Scratch,
    serial: u32,
    by_allocation: FxHashMap<AllocationId, ConnectionId>,
    /// Whose frame is in the core's hands.
    speaking: Option<ConnectionId>,
    /// In the order of their deadlines: all wait equally long.
    idle: VecDeque<(Instant, ConnectionId)>,
    closing: Vec<ConnectionId>,
    /// Those that have become pipes.
    pub(super) piped: usize,
}

impl Streams {
    pub(super) fn new(worker: WorkerId, send_cap: usize, most: usize, door: Arc<Door>) -> Self {
        Self {
            worker,
            send_cap,
            most: most.min(1 << KEY_BITS),
            table: Slab::new(),
            half_open: HalfOpen::new(door),
            scratch: Scratch::new(),
            serial: 0,
            by_allocation: FxHashMap::default(),
            speaking: None,
            idle: VecDeque::new(),
            closing: Vec::new(),
            piped: 0,
        }
    }

    /// Open connections.
    pub(super) fn open(&self) -> usize {
        self.table.len() + self.piped
    }

    /// Whether there are as many as there may be.
    pub(super) fn is_full(&self) -> bool {
        self.open() >= self.most
    }

    /// The place of a connection, if it is still open.
    pub(super) fn key(&self, id: ConnectionId) -> Option<usize> {
        let key = (id.0 & ((1 << KEY_BITS) - 1)) as usize;
        self.table.get(key).filter(|connection| connection.id == id).map(|_| key)
    }

    /// Closes a connection once this turn's sends have left.
    pub(super) fn close_soon(&mut self, key: usize) {
        if let Some(connection) = self.table.get_mut(key)
            && !connection.closing
        {
            connection.closing = true;
            self.closing.push(connection.id);
            self.settle(key);
        }
    }

    /// Whether a connection has not shown what it is, or not ended its handshake.
    pub(super) fn is_half_open(&self, key: usize) -> bool {
        self.table.get(key).is_some_and(|connection| connection.half_open)
    }

    /// A connection is half-open no longer.
    pub(super) fn settle(&mut self, key: usize) {
        if let Some(connection) = self.table.get_mut(key)
            && std::mem::take(&mut connection.half_open)
        {
            self.half_open.settled();
        }
    }

    /// A connection is of use: it does not count among those of its source prefix any more.
    pub(super) fn admitted(&mut self, key: usize) {
        if let Some(connection) = self.table.get_mut(key) {
            connection.place = None;
        }
    }

    /// What follows on a connection is no frame any more; it is taken out once this turn's sends have left.
    pub(super) fn join_soon(&mut self, id: ConnectionId) {
        if let Some(connection) = self.key(id).and_then(|key| self.table.get_mut(key)) {
            connection.joining = true;
        }
    }

    /// The bytes of a connection that becomes a pipe; nothing of one that closes.
    pub(super) fn take_piped(&mut self, id: ConnectionId) -> Option<ByteStream> {
        let key = self.key(id).filter(|key| !self.table[*key].closing)?;
        let connection = self.remove(key)?;
        self.piped += 1;
        Some(connection.bytes)
    }

    /// Takes a connection out.
    pub(super) fn remove(&mut self, key: usize) -> Option<Connection> {
        self.settle(key);
        self.table.try_remove(key)
    }

    /// A connection has no allocation any more: its client has moved (RFC 8016).
    pub(super) fn leave(&mut self, id: ConnectionId, now: Instant) {
        if let Some(key) = self.key(id) {
            self.table[key].last_valid = now;
            if let Some(allocation) = self.table[key].allocation.take() {
                self.by_allocation.remove(&allocation);
            }
        }
    }

    /// Keeps track of which connection has an allocation.
    pub(super) fn note(&mut self, change: &Change) {
        match change {
            Change::Put(record) if record.five_tuple.transport.is_stream() => {
                // A new allocation was made by the frame just handed in.
                let Some(id) = self.by_allocation.get(&record.id).copied().or(self.speaking) else {
                    return;
                };
                if let Some(key) = self.key(id) {
                    self.table[key].allocation = Some(record.id);
                    self.by_allocation.insert(record.id, id);
                    self.admitted(key);
                }
            }
            Change::Put(_) => {}
            Change::End { id, .. } => {
                if let Some(key) = self.by_allocation.remove(id).and_then(|id| self.key(id)) {
                    self.table[key].allocation = None;
                }
            }
        }
    }

    pub(super) fn insert(
        &mut self,
        socket: TcpStream,
        five_tuple: FiveTuple,
        now: Instant,
    ) -> (usize, &mut Connection) {
        let entry = self.table.vacant_entry();
        let key = entry.key();
        self.serial = self.serial.wrapping_add(1);
        let id =
            ConnectionId(u64::from(self.worker.0) << WORKER_SHIFT | u64::from(self.serial) << KEY_BITS | key as u64);
        self.idle.push_back((now + IDLE, id));
        (key, entry.insert(Connection::new(socket, id, five_tuple, now)))
    }

    /// Sends a run on one connection; counts what was taken and what was not.
    pub(super) fn send_run(
        &mut self,
        key: usize,
        outgoing: &OutgoingQueue,
        packets: &Packets,
        run: Range<usize>,
        counters: &mut Counters,
    ) {
        let mut broken = false;
        for position in run {
            let sent = match self.table.get_mut(key) {
                Some(connection) if !broken => {
                    let item = outgoing.at(position);
                    connection.send(
                        outgoing.parts(item, packets),
                        item.direction.is_none(),
                        self.send_cap,
                        &mut self.scratch,
                    )
                }
                _ => Sent::Broken,
            };
            match sent {
                Sent::Taken => {
                    let charged = udp::count_unpaid(outgoing, packets, position, counters);
                    if let (Some((bytes, account)), Some(connection)) = (charged, self.table.get_mut(key)) {
                        connection.owe(bytes, account, counters);
                    }
                }
                Sent::Dropped => counters.lost(Loss::StreamQueue),
                Sent::Broken => {
                    broken = true;
                    counters.lost(Loss::StreamClosed);
                }
            }
        }
        if broken {
            self.close_soon(key);
        }
    }
}

impl Worker {
    /// A connection has something to read, or room for what waits.
    pub(super) fn on_connection(&mut self, key: usize, ready: Readiness) {
        if ready.writable
            && let Some(connection) = self.streams.table.get_mut(key)
        {
            if connection.send_unsent(&self.counters) == Sent::Broken {
                self.streams.close_soon(key);
                return;
            }
            self.update_interest(key);
        }
        if ready.readable || ready.error {
            self.read_connection(key);
        }
    }

    fn read_connection(&mut self, key: usize) {
        let mut reads = 0;
        loop {
            let Some(connection) = self.streams.table.get_mut(key) else {
                return;
            };
            if connection.closing || connection.joining {
                return;
            }
            let handshaking = connection.opening.is_some() || connection.bytes.is_handshaking();
            if handshaking && self.streams.half_open.is_spent() {
                // It is still readable in the next turn.
                return;
            }
            if connection.opening.is_some() {
                if !self.read_opening(key) {
                    return;
                }
                continue;
            }
            // What no readiness tells of is read now, whatever it takes: it is little.
            if reads >= READ_BUDGET && !connection.bytes.has_unread() {
                break;
            }
            if self.packets.room() == 0 {
                if !connection.bytes.has_unread() {
                    break;
                }
                self.finish_turn();
                continue;
            }
            reads += 1;
            let (mut ended, scratch) = (false, &mut self.streams.scratch);
            let mut read = || {
                self.packets.fill(|buffer| match connection.read(buffer, scratch) {
                    Arrived::Bytes(length) => Some(((), length)),
                    Arrived::Nothing => None,
                    Arrived::End => {
                        ended = true;
                        None
                    }
                })
            };
            let filled = if handshaking { self.streams.half_open.charge(read) } else { read() };
            if handshaking {
                match (connection.bytes.is_handshaking(), ended) {
                    (true, true) => self.refusals.count(Refusal::Handshake),
                    (true, false) => {}
                    (false, _) => self.streams.settle(key),
                }
            }
            let Some(((), packet)) = filled else {
                if ended {
                    self.streams.close_soon(key);
                    return;
                }
                break;
            };
            let mut start = 0;
            loop {
                let rest = packet.range(start..packet.len());
                let Some(connection) = self.streams.table.get_mut(key) else {
                    return;
                };
                let length = match connection.next_frame(self.packets.bytes(rest)) {
                    Ok(Some(length)) => length,
                    Ok(None) => break,
                    Err(_) => {
                        self.streams.close_soon(key);
                        return;
                    }
                };
                let (id, from) = (connection.id, connection.five_tuple);
                start += length;
                let origin = Origin::Client { from, path: Path::Connection(id), ip: IpMeta::default() };
                self.streams.speaking = Some(id);
                let of_use = self.feed(&origin, rest.range(0..length));
                self.streams.speaking = None;
                if of_use && let Some(connection) = self.streams.table.get_mut(key) {
                    connection.last_valid = self.now.mono;
                    if connection.joining {
                        // What stands behind the ConnectionBind is the peer's already (RFC 6062 §5.4).
                        connection.bytes.put_back(self.packets.bytes(packet.range(start..packet.len())).to_vec());
                        return;
                    }
                }
            }
        }
        // Of TLS, something to say may be left.
        self.update_interest(key);
    }

    /// Tells epoll what a connection waits for now.
    pub(super) fn update_interest(&mut self, key: usize) {
        let Some(connection) = self.streams.table.get_mut(key) else {
            return;
        };
        let wanted = connection.wanted(self.streams.send_cap);
        if wanted == connection.interest {
            return;
        }
        let token = Token::Connection(key).encode();
        match self.epoll.modify(connection.socket().as_fd(), token, wanted) {
            Ok(()) => connection.interest = wanted,
            Err(_) => self.streams.close_soon(key),
        }
    }

    /// Ends the connections that this turn closed, and their allocations with them (RFC 8656 §5).
    pub(super) fn close_connections(&mut self) {
        while let Some(id) = self.streams.closing.pop() {
            if let Some(key) = self.streams.key(id) {
                let five_tuple = self.streams.table[key].five_tuple;
                self.tell_closed(id, &five_tuple);
                if let Some(mut connection) = self.streams.remove(key) {
                    connection.bytes.close();
                }
            }
        }
    }

    /// Closes connections that were of no use for long.
    pub(super) fn end_idle_connections(&mut self) {
        while let Some((deadline, id)) = self.streams.idle.pop_front() {
            if deadline > self.now.mono {
                self.streams.idle.push_front((deadline, id));
                return;
            }
            let Some(key) = self.streams.key(id) else {
                continue;
            };
            let connection = &self.streams.table[key];
            let has_moved_here = self.relayed.whereabouts().of_client(&connection.five_tuple).is_some();
            if !has_moved_here && connection.allocation.is_none() && connection.last_valid + IDLE <= self.now.mono {
                self.streams.close_soon(key);
            } else {
                self.streams.idle.push_back((self.now.mono + IDLE, id));
            }
        }
    }
}
