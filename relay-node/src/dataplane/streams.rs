//! The stream connections of a worker: accepted, read, ended.

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;
use slab::Slab;
use socket2::{SockRef, Socket};
use turn_core::{AllocationId, Change, ConnectionId, FiveTuple, Input, IpMeta, Path, Transport, WorkerId};

use super::apply::Origin;
use super::counters::{Counters, Loss};
use super::listen::ListenerSocket;
use super::outgoing::OutgoingQueue;
use super::packet::Packets;
use super::stream::{Arrived, Connection, Sent};
use super::udp;
use super::worker::{Token, Worker};
use crate::sys::epoll::{Interest, Readiness};

/// Connections accepted before others have their turn.
const ACCEPT_BUDGET: usize = 64;
/// Reads of one connection before others have their turn.
const READ_BUDGET: usize = 2;
/// A connection that sends nothing of use and has no allocation is closed after this; what was sent and never
/// acknowledged breaks one.
const IDLE: Duration = Duration::from_secs(30);
/// How long accepting rests when the process is out of descriptors.
const PAUSE: Duration = Duration::from_secs(1);
/// Unsent bytes in the kernel before it takes no more: the rest waits here, where media can still be dropped.
const KERNEL_QUEUE: u32 = 64 << 10;
/// Bits of a connection id that are its place in the table; above them a serial number, above that the worker.
const KEY_BITS: u32 = 24;
const WORKER_SHIFT: u32 = 56;

/// The connections.
pub(super) struct Streams {
    worker: WorkerId,
    send_cap: usize,
    most: usize,
    table: Slab<Connection>,
    serial: u32,
    by_allocation: FxHashMap<AllocationId, ConnectionId>,
    /// Whose frame is in the core's hands.
    speaking: Option<ConnectionId>,
    /// In the order of their deadlines: all wait equally long.
    idle: VecDeque<(Instant, ConnectionId)>,
    closing: Vec<ConnectionId>,
}

impl Streams {
    pub(super) fn new(worker: WorkerId, send_cap: usize, most: usize) -> Self {
        Self {
            worker,
            send_cap,
            most: most.min(1 << KEY_BITS),
            table: Slab::new(),
            serial: 0,
            by_allocation: FxHashMap::default(),
            speaking: None,
            idle: VecDeque::new(),
            closing: Vec::new(),
        }
    }

    /// Open connections.
    pub(super) fn open(&self) -> usize {
        self.table.len()
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

    fn insert(&mut self, socket: TcpStream, five_tuple: FiveTuple, now: Instant) -> (usize, &mut Connection) {
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
                    connection.send(outgoing.parts(item, packets), item.direction.is_none(), self.send_cap)
                }
                _ => Sent::Broken,
            };
            match sent {
                Sent::Taken => udp::count(outgoing, packets, position, counters),
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
    /// Accepts what waits at a TCP listener.
    pub(super) fn accept(&mut self, index: usize) {
        for _ in 0..ACCEPT_BUDGET {
            let listener = &self.listeners[index];
            let ListenerSocket::Tcp { listener: socket, .. } = &listener.socket else {
                return;
            };
            let accepted = SockRef::from(socket).accept4(libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC);
            let (socket, client) = match accepted {
                Ok((socket, address)) => (socket, address.as_socket()),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                        self.pause_accepting(index);
                        return;
                    }
                    Some(libc::EAGAIN) => return,
                    // One connection that ended before it was accepted (accept(2) names many errors).
                    _ => continue,
                },
            };
            if self.streams.table.len() >= self.streams.most {
                self.counters.lost(Loss::Connections);
                continue;
            }
            // What cannot even be set up is gone already.
            if let Some(client) = client {
                let _ = self.admit(socket, client);
            }
        }
    }

    fn admit(&mut self, socket: Socket, client: SocketAddr) -> std::io::Result<()> {
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_user_timeout(Some(IDLE))?;
        socket.set_tcp_notsent_lowat(KERNEL_QUEUE)?;
        let socket = TcpStream::from(socket);
        let five_tuple = FiveTuple { transport: Transport::Tcp, client, server: socket.local_addr()? };
        let (key, connection) = self.streams.insert(socket, five_tuple, self.now.mono);
        let token = Token::Connection(key).encode();
        let added = self.epoll.add(connection.socket().as_fd(), token, Interest::Read);
        if added.is_err() {
            self.streams.table.remove(key);
        }
        added
    }

    fn pause_accepting(&mut self, index: usize) {
        tracing::warn!("out of descriptors: new TCP connections wait; raise the limit (LimitNOFILE, ulimit -n)");
        self.watch_listener(index, Some(self.now.mono + PAUSE));
    }

    /// Accepts again where accepting has paused long enough.
    pub(super) fn resume_accepting(&mut self) {
        for index in 0..self.listeners.len() {
            if let ListenerSocket::Tcp { paused: Some(until), .. } = self.listeners[index].socket
                && until <= self.now.mono
            {
                self.watch_listener(index, None);
            }
        }
    }

    fn watch_listener(&mut self, index: usize, until: Option<Instant>) {
        let ListenerSocket::Tcp { listener, paused } = &mut self.listeners[index].socket else {
            return;
        };
        let interest = if until.is_some() { Interest::None } else { Interest::Read };
        // A listener that epoll knows cannot be refused a change.
        if self.epoll.modify(listener.as_fd(), Token::Listener(index).encode(), interest).is_ok() {
            *paused = until;
        }
    }

    /// A connection has something to read, or room for what waits.
    pub(super) fn on_connection(&mut self, key: usize, ready: Readiness) {
        if ready.writable
            && let Some(connection) = self.streams.table.get_mut(key)
        {
            if connection.send_unsent() == Sent::Broken {
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
        for _ in 0..READ_BUDGET {
            if self.packets.room() == 0 {
                // The rest is still readable in the next turn.
                return;
            }
            let Some(connection) = self.streams.table.get_mut(key) else {
                return;
            };
            if connection.closing {
                return;
            }
            let mut ended = false;
            let filled = self.packets.fill(|buffer| match connection.read(buffer) {
                Arrived::Bytes(length) => Some(((), length)),
                Arrived::Nothing => None,
                Arrived::End => {
                    ended = true;
                    None
                }
            });
            let Some(((), packet)) = filled else {
                if ended {
                    self.streams.close_soon(key);
                }
                return;
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
                let of_use = self.feed(origin, rest.range(0..length));
                self.streams.speaking = None;
                if of_use && let Some(connection) = self.streams.table.get_mut(key) {
                    connection.last_valid = self.now.mono;
                }
            }
        }
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
                self.handle(Input::Closed(id));
                self.streams.table.remove(key);
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
            if connection.allocation.is_none() && connection.last_valid + IDLE <= self.now.mono {
                self.streams.close_soon(key);
            } else {
                self.streams.idle.push_back((self.now.mono + IDLE, id));
            }
        }
    }
}
