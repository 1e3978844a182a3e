//! A client data connection and a peer data connection, joined (RFC 6062 §5.4): bytes go from one to the other as they
//! are, in the loop of the worker that accepted the client's.
//!
//! Each direction holds what one read brought at most: while the one side does not take it, the other is not read, and
//! its own window holds it back (RFC 6062 §3). The end of one direction is passed on behind the last byte of it.
//!
//! Where bandwidth is limited and used up, a side is not read either until there is some again. Sides wait in a queue, so
//! that those who share a limit have turns.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;
use slab::Slab;
use turn_core::{AccountId, ConnectionId, Limits, Meters, PeerConnectionId};

use super::counters::{Counters, Direction};
use super::peer_table::Claimed;
use super::transport::{Arrived, ByteStream, Scratch};
use super::worker::{Token, Worker};
use crate::sys::epoll::{Epoll, Interest, Readiness};

/// Bytes of one read: what a direction holds at most.
const READ: usize = 64 << 10;
/// Reads of one side before other connections have their turn.
const READ_BUDGET: usize = 4;
/// Memory of an empty queue above this is given back.
const KEPT_CAPACITY: usize = 4096;
/// A pipe of which one side has ended is closed when nothing has moved for so long: the other end cannot be told from
/// one that has closed altogether (RFC 6062 §5.5).
const HALF_CLOSED: Duration = Duration::from_secs(30);
/// How long a side waits for bandwidth at least: waking up more often brings no more bytes.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
/// How much longer one waits that has just had some: the sides that share a limit may be of several workers, whose timers
/// are exact to a millisecond.
const COURTESY: Duration = Duration::from_millis(2);
/// How long a side waits at most before it asks again: limits change.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A side of a pipe.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum End {
    Client,
    Peer,
}

impl End {
    /// Which way goes what comes from here.
    fn direction(self) -> Direction {
        match self {
            Self::Client => Direction::ToPeer,
            Self::Peer => Direction::ToClient,
        }
    }
}

/// The pipes of a worker.
pub(super) struct Pipes {
    table: Slab<Pipe>,
    by_id: FxHashMap<PeerConnectionId, usize>,
    buffer: Box<[u8]>,
    /// Sides that wait for bandwidth, whoever had some last at the end; and such of pipes that have ended.
    waiting: VecDeque<(PeerConnectionId, End)>,
    /// When the first of them asks again.
    resume_at: Option<Instant>,
}

impl Pipes {
    pub(super) fn new() -> Self {
        Self {
            table: Slab::new(),
            by_id: FxHashMap::default(),
            buffer: vec![0; READ].into(),
            waiting: VecDeque::new(),
            resume_at: None,
        }
    }

    /// When [`Worker::resume_pipes`] has something to do.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.resume_at
    }

    fn resume_by(&mut self, at: Instant) {
        self.resume_at = Some(self.resume_at.map_or(at, |before| before.min(at)));
    }
}

/// One pipe.
struct Pipe {
    id: PeerConnectionId,
    client: Side<ByteStream>,
    peer: Side<Socket>,
    /// What its bytes are charged to.
    meters: Meters,
    /// Whose traffic they are.
    account: AccountId,
    /// When bytes last moved.
    moved: Instant,
}

/// What is known of a side.
struct Side<S> {
    stream: S,
    /// Nothing more comes from it.
    ended: bool,
    /// It has been told that nothing more comes from the other.
    told: bool,
    /// It is gone in both directions.
    gone: bool,
    /// It is not read until then, and in the queue: there is no bandwidth.
    paused: Option<Instant>,
    /// What epoll has been told; nothing while epoll does not know it.
    interest: Option<Interest>,
    /// Reads and bytes of the other side that the kernel has not taken for this one as far as is known.
    owed: (u64, u64),
}

impl<S> Side<S> {
    fn new(stream: S) -> Self {
        Self { stream, ended: false, told: false, gone: false, paused: None, interest: None, owed: (0, 0) }
    }
}

/// A socket with what it did not take.
struct Socket {
    socket: TcpStream,
    unsent: VecDeque<u8>,
}

impl Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let taken = if self.unsent.is_empty() { self.write_some(bytes)? } else { 0 };
        self.unsent.extend(&bytes[taken..]);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            let (front, _) = self.unsent.as_slices();
            let taken = match (&self.socket).write(front) {
                Err(error) if is_transient(&error) => return Ok(()),
                taken => taken?,
            };
            self.unsent.drain(..taken);
        }
        self.unsent.shrink_to(KEPT_CAPACITY);
        Ok(())
    }

    fn write_some(&self, bytes: &[u8]) -> io::Result<usize> {
        match (&self.socket).write(bytes) {
            Err(error) if is_transient(&error) => Ok(0),
            taken => taken,
        }
    }
}

impl Pipe {
    /// Moves what can be moved after `from` has something to read, or `None`: all sides may.
    ///
    /// # Errors
    /// The pipe is of no use any more.
    fn pump(
        &mut self,
        from: Option<End>,
        buffer: &mut [u8],
        scratch: &mut Scratch,
        counters: &mut Counters,
        limits: &Limits,
        now: Instant,
    ) -> io::Result<()> {
        let flushed = (self.client.stream.flush(), self.peer.stream.flush());
        self.settle(counters);
        flushed.0.and(flushed.1)?;
        if from != Some(End::Peer) || self.client.stream.has_unread() {
            let mut reads = 0;
            // What no readiness tells of is read now.
            while (reads < READ_BUDGET || self.client.stream.has_unread()) && self.may_read(End::Client) {
                let Some(room) = self.room(End::Client, limits, now) else {
                    break;
                };
                reads += 1;
                let room = room.min(buffer.len());
                match self.client.stream.read(&mut buffer[..room], scratch) {
                    Arrived::Bytes(length) => {
                        self.charge(End::Client, length, limits, now);
                        self.peer.stream.write(&buffer[..length])?;
                        counters.relayed(Direction::ToPeer, length);
                        owe(&mut self.peer.owed, length);
                        self.settle(counters);
                        self.moved = now;
                    }
                    Arrived::Nothing => break,
                    Arrived::End => self.client.ended = true,
                }
            }
        }
        if from != Some(End::Client) {
            for _ in 0..READ_BUDGET {
                if !self.may_read(End::Peer) {
                    break;
                }
                let Some(room) = self.room(End::Peer, limits, now) else {
                    break;
                };
                let room = room.min(buffer.len());
                match (&self.peer.stream.socket).read(&mut buffer[..room]) {
                    Ok(0) => self.peer.ended = true,
                    Ok(length) => {
                        self.charge(End::Peer, length, limits, now);
                        self.client.stream.write([&buffer[..length], b"", b""], scratch)?;
                        counters.relayed(Direction::ToClient, length);
                        owe(&mut self.client.owed, length);
                        self.settle(counters);
                        self.moved = now;
                    }
                    Err(error) if is_transient(&error) => break,
                    Err(_) => (self.peer.ended, self.peer.gone) = (true, true),
                }
            }
        }
        self.pass_ends_on();
        Ok(())
    }

    /// Whether a side is to be read: it has not ended, does not wait for bandwidth, and the other takes what comes from
    /// it.
    fn may_read(&self, end: End) -> bool {
        match end {
            End::Client => !self.client.ended && self.client.paused.is_none() && self.peer.stream.unsent.is_empty(),
            End::Peer => !self.peer.ended && self.peer.paused.is_none() && self.client.stream.unsent() == 0,
        }
    }

    /// How many bytes the bandwidth allows to be read from a side; nothing, and it waits.
    fn room(&mut self, end: End, limits: &Limits, now: Instant) -> Option<usize> {
        if !limits.has_rates() {
            return Some(usize::MAX);
        }
        match self.meters.room(end.direction(), now, limits) {
            Ok(room) => Some(room),
            Err(again) => {
                let again = if self.moved == now { again + COURTESY } else { again };
                *self.paused(end) = Some(again.clamp(now + SHORTEST_PAUSE, now + LONGEST_PAUSE));
                None
            }
        }
    }

    fn charge(&self, end: End, bytes: usize, limits: &Limits, now: Instant) {
        if limits.has_rates() {
            self.meters.charge(end.direction(), now, bytes, limits);
        }
    }

    /// Charges what the kernel has taken by now, each read as a packet. What waits for a client with TLS is longer than
    /// the bytes in it: they are charged when all of it has left, at the latest.
    fn settle(&mut self, counters: &Counters) {
        let sides = [
            (Direction::ToPeer, &mut self.peer.owed, self.peer.stream.unsent.len()),
            (Direction::ToClient, &mut self.client.owed, self.client.stream.unsent()),
        ];
        for (direction, owed, unsent) in sides {
            let taken = owed.1.saturating_sub(unsent as u64);
            if taken > 0 {
                counters.pay(direction, owed.0, taken, self.account);
                *owed = (0, owed.1 - taken);
            }
        }
    }

    fn paused(&mut self, end: End) -> &mut Option<Instant> {
        match end {
            End::Client => &mut self.client.paused,
            End::Peer => &mut self.peer.paused,
        }
    }

    fn pass_ends_on(&mut self) {
        if self.client.ended && !self.peer.told && self.peer.stream.unsent.is_empty() {
            self.peer.told = true;
            // A side that is gone need not be told.
            let _ = self.peer.stream.socket.shutdown(Shutdown::Write);
        }
        if self.peer.ended && !self.client.told && self.client.stream.unsent() == 0 {
            self.client.stream.close();
            if self.client.stream.unsent() == 0 {
                self.client.told = true;
                let _ = self.client.stream.socket().shutdown(Shutdown::Write);
            }
        }
    }

    /// Whether nothing is left to be done.
    fn is_over(&self) -> bool {
        let nothing_for_client = self.client.stream.unsent() == 0 && self.peer.ended;
        let nothing_for_peer = self.peer.stream.unsent.is_empty() && self.client.ended;
        (self.client.told && self.peer.told)
            || (self.peer.gone && nothing_for_client)
            || (self.client.gone && nothing_for_peer)
    }

    /// Tells epoll what each side waits for. A side that waits for nothing is taken out of it: that it has hung up would
    /// be told over and over.
    fn watch(&mut self, key: usize, epoll: &Epoll) -> io::Result<()> {
        let wanted = |read: bool, write: bool| match (read, write) {
            (true, true) => Some(Interest::ReadWrite),
            (true, false) => Some(Interest::Read),
            (false, true) => Some(Interest::Write),
            (false, false) => None,
        };
        let client = wanted(self.may_read(End::Client), self.client.stream.unsent() > 0);
        let peer = wanted(self.may_read(End::Peer), !self.peer.stream.unsent.is_empty());
        let sides = [
            (self.client.stream.socket().as_fd(), Token::PipeClient(key), &mut self.client.interest, client),
            (self.peer.stream.socket.as_fd(), Token::PipePeer(key), &mut self.peer.interest, peer),
        ];
        for (socket, token, known, wanted) in sides {
            match (*known, wanted) {
                (known, wanted) if known == wanted => continue,
                (None, Some(interest)) => epoll.add(socket, token.encode(), interest)?,
                (Some(_), Some(interest)) => epoll.modify(socket, token.encode(), interest)?,
                (_, None) => epoll.remove(socket)?,
            }
            *known = wanted;
        }
        Ok(())
    }
}

impl Worker {
    /// Begins the pipes that were joined in this turn: the answers to their ConnectionBinds have left.
    pub(super) fn begin_pipes(&mut self) {
        while let Some((connection, id, claimed)) = self.relayed.peers.next_join() {
            // Either may have gone meanwhile.
            match (self.streams.take_piped(connection), claimed) {
                (Some(client), Some(peer)) => self.begin_pipe(id, client, peer),
                (client, _) => {
                    self.streams.piped -= usize::from(client.is_some());
                    self.relayed.peers.ended(id);
                }
            }
        }
    }

    fn begin_pipe(&mut self, id: PeerConnectionId, client: ByteStream, peer: Claimed) {
        // It is watched under another name from now on.
        if self.epoll.remove(client.socket().as_fd()).is_err() {
            self.streams.piped -= 1;
            self.relayed.peers.ended(id);
            return;
        }
        let Claimed { socket, meters, account } = peer;
        let peer = Socket { socket, unsent: VecDeque::new() };
        let pipe = Pipe { id, client: Side::new(client), peer: Side::new(peer), meters, account, moved: self.now.mono };
        let key = self.pipes.table.insert(pipe);
        self.pipes.by_id.insert(id, key);
        self.pump(key, None);
    }

    /// A side of a pipe has something to read, or room for what waits.
    pub(super) fn on_pipe(&mut self, key: usize, end: End, ready: Readiness) {
        let Some(pipe) = self.pipes.table.get_mut(key) else {
            return;
        };
        if ready.error {
            match end {
                End::Client => pipe.client.gone = true,
                End::Peer => pipe.peer.gone = true,
            }
        }
        // Room on one side is a reason to read the other.
        self.pump(key, if ready.writable || ready.error { None } else { Some(end) });
    }

    fn pump(&mut self, key: usize, from: Option<End>) {
        let Pipes { table, buffer, .. } = &mut self.pipes;
        let Some(pipe) = table.get_mut(key) else {
            return;
        };
        let (scratch, counters, limits) = (&mut self.streams.scratch, &mut self.counters, self.server.limits());
        let sides = [End::Client, End::Peer].map(|end| (end, pipe.paused(end).is_some()));
        let pumped = pipe.pump(from, buffer, scratch, counters, limits, self.now.mono);
        let begun = sides.map(|(end, before)| pipe.paused(end).filter(|_| !before).map(|until| (end, until)));
        if pumped.is_err() || pipe.is_over() || pipe.watch(key, &self.epoll).is_err() {
            let id = pipe.id;
            self.drop_pipe(key);
            self.relayed.peers.ended(id);
            return;
        }
        let id = pipe.id;
        for (end, until) in begun.into_iter().flatten() {
            self.pipes.waiting.push_back((id, end));
            self.pipes.resume_by(until);
        }
    }

    /// Reads the sides for which there is bandwidth again.
    pub(super) fn resume_pipes(&mut self) {
        let now = self.now.mono;
        if self.pipes.resume_at.is_none_or(|at| at > now) {
            return;
        }
        self.pipes.resume_at = None;
        let mut still = VecDeque::new();
        for (id, end) in std::mem::take(&mut self.pipes.waiting) {
            let Some(key) = self.pipes.by_id.get(&id).copied() else {
                continue;
            };
            let Some(pipe) = self.pipes.table.get_mut(key) else {
                continue;
            };
            let due = pipe.paused(end).is_none_or(|until| until <= now);
            if due && pipe.room(end, self.server.limits(), now).is_some() {
                *pipe.paused(end) = None;
                // If it is not enough it queues up again, behind those that had nothing.
                self.pump(key, Some(end));
            } else if let Some(until) = *pipe.paused(end) {
                still.push_back((id, end));
                self.pipes.resume_by(until);
            }
        }
        still.append(&mut self.pipes.waiting);
        self.pipes.waiting = still;
    }

    /// Both sides close.
    fn drop_pipe(&mut self, key: usize) {
        if let Some(mut pipe) = self.pipes.table.try_remove(key) {
            self.pipes.by_id.remove(&pipe.id);
            self.streams.piped -= 1;
            if !pipe.client.told {
                pipe.client.stream.close();
            }
        }
    }

    /// The allocation of a pipe has ended (RFC 6062 §5.5).
    pub(super) fn end_pipe_of(&mut self, id: PeerConnectionId) {
        self.relayed.peers.forget_claim(id);
        if let Some(key) = self.pipes.by_id.get(&id).copied() {
            self.drop_pipe(key);
        }
    }

    /// Closes pipes that one side has left and the other does not use.
    pub(super) fn end_half_closed_pipes(&mut self) {
        let now = self.now.mono;
        let idle = |pipe: &Pipe| {
            let waits = pipe.client.paused.is_some() || pipe.peer.paused.is_some();
            (pipe.client.ended || pipe.peer.ended) && !waits && pipe.moved + HALF_CLOSED <= now
        };
        let ended: Vec<_> = self.pipes.table.iter().filter(|(_, pipe)| idle(pipe)).map(|(key, _)| key).collect();
        for key in ended {
            let id = self.pipes.table[key].id;
            self.drop_pipe(key);
            self.relayed.peers.ended(id);
        }
    }

    /// See [`turn_core::Output::Join`].
    pub(super) fn join_soon(&mut self, connection: ConnectionId, peer: PeerConnectionId) {
        self.streams.join_soon(connection);
        self.relayed.peers.join(connection, peer);
    }
}

/// One read more, of so many bytes.
fn owe(owed: &mut (u64, u64), bytes: usize) {
    *owed = (owed.0 + 1, owed.1 + bytes as u64);
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
