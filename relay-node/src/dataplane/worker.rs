//! The loop of one worker thread: receive, ask the core, apply the verdict, write the journal, flush, arm the timer.
//!
//! A *turn* is what happens between two flushes: at most as many packets as there are slots. Everything a turn sends
//! leaves at its end, behind one write to the journal.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use turn_core::wire::{self, Kind};
use turn_core::{
    AllocationId, Change, ConnectionId, DropReason, EndReason, FiveTuple, Head, Input, IpMeta, ListenerId, Now, Output,
    Path, PeerAddr, Record, Redirected, RelayedAddr, Server, Transport, WorkerId,
};

use super::accept::Door;
use super::apply::Origin;
use super::changes::ChangeSender;
use super::commands::Command;
use super::counters::{Counters, Loss};
use super::delivery::BackboneEnd;
use super::dtls::{self, Sessions};
use super::fence::{Fence, FenceReason, Pause};
use super::listen::{Listener, ListenerSocket};
use super::outgoing::OutgoingQueue;
use super::packet::{PacketRef, Packets, Received};
use super::peer_table::Waiting;
use super::pipe::{End, Pipes};
use super::proxy::{self, Proxied};
use super::refusals::Refusals;
use super::relayed::Relayed;
use super::ring::{Inbox, Meaning, Outbox};
use super::streams::Streams;
use super::udp::Sender as DatagramSender;
use super::{WorkerSnapshot, shard};
use crate::accounts::Accounts;
use crate::journal::Journal;
use crate::sys::epoll::{Epoll, Events, Interest, Readiness, Waker};
use crate::sys::process::thread_cpu_time;
use crate::sys::socket::receive_icmp;

/// Events of one wait.
const EVENTS: usize = 256;
/// Datagrams taken from a listener before others have their turn; those that came coalesced are not taken apart.
const LISTENER_BUDGET: usize = 64;
/// The same of a relayed address, and of ICMP errors to it.
const RELAYED_BUDGET: usize = 16;
/// Packets taken from a ring before others have their turn.
const RING_BUDGET: usize = 64;
/// With fewer slots left the turn ends.
const LEAST_ROOM: usize = 16;
/// With as many packets to send the turn ends.
const MOST_OUTGOING: usize = 512;
/// Timeouts handed to the core in one turn.
const TIMEOUT_BUDGET: usize = 64;
/// Snapshots, idle connections and retries.
const TICK: Duration = Duration::from_secs(1);

/// What a descriptor is to its worker; travels through epoll as a number.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Token {
    Wake,
    Listener(usize),
    Relayed(usize),
    Connection(usize),
    /// The relayed address of a TCP allocation.
    PeerListener(usize),
    /// A connect to a peer on its way.
    Opening(usize),
    /// The client's end of a pipe.
    PipeClient(usize),
    /// The peer's end of a pipe.
    PipePeer(usize),
    /// Relayed addresses of a family that share a socket.
    Steered(usize),
    /// ICMP errors about what those sent.
    SteeredErrors(usize),
    /// The second socket of a relayed address.
    Connected(usize),
}

impl Token {
    pub(super) fn encode(self) -> u64 {
        let (kind, index) = match self {
            Self::Wake => (0, 0),
            Self::Listener(index) => (1, index),
            Self::Relayed(index) => (2, index),
            Self::Connection(index) => (3, index),
            Self::PeerListener(index) => (4, index),
            Self::Opening(index) => (5, index),
            Self::PipeClient(index) => (6, index),
            Self::PipePeer(index) => (7, index),
            Self::Steered(index) => (8, index),
            Self::SteeredErrors(index) => (9, index),
            Self::Connected(index) => (10, index),
        };
        kind << 32 | index as u64
    }

    fn decode(token: u64) -> Self {
        let index = (token & u64::from(u32::MAX)) as usize;
        match token >> 32 {
            1 => Self::Listener(index),
            2 => Self::Relayed(index),
            3 => Self::Connection(index),
            4 => Self::PeerListener(index),
            5 => Self::Opening(index),
            6 => Self::PipeClient(index),
            7 => Self::PipePeer(index),
            8 => Self::Steered(index),
            9 => Self::SteeredErrors(index),
            10 => Self::Connected(index),
            _ => Self::Wake,
        }
    }
}

/// What a worker shows to other threads.
pub(super) struct Shown {
    /// Milliseconds from `since` to the worker's last turn.
    turned: AtomicU64,
    since: Instant,
    snapshot: Mutex<WorkerSnapshot>,
}

impl Shown {
    pub(super) fn new() -> Self {
        Self { turned: AtomicU64::new(0), since: Instant::now(), snapshot: Mutex::default() }
    }

    pub(super) fn snapshot(&self) -> WorkerSnapshot {
        self.snapshot.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Time since the worker last turned its loop.
    pub(super) fn silence(&self) -> Duration {
        let turned = Duration::from_millis(self.turned.load(Ordering::Relaxed));
        self.since.elapsed().saturating_sub(turned)
    }

    fn turn(&self, now: Instant) {
        let milliseconds = now.saturating_duration_since(self.since).as_millis();
        self.turned.store(u64::try_from(milliseconds).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

/// What a worker is made of.
pub(super) struct Setup {
    pub(super) id: WorkerId,
    pub(super) workers: u16,
    pub(super) server: Server,
    pub(super) epoch: u64,
    pub(super) listeners: Vec<Listener>,
    pub(super) relayed: Relayed,
    pub(super) epoll: Arc<Epoll>,
    pub(super) waker: Arc<Waker>,
    pub(super) commands: Receiver<Command>,
    pub(super) outboxes: Vec<Option<Outbox>>,
    pub(super) inboxes: Vec<Inbox>,
    pub(super) shown: Arc<Shown>,
    pub(super) changes: ChangeSender,
    pub(super) stream_send_cap: usize,
    pub(super) max_connections: usize,
    pub(super) door: Arc<Door>,
    pub(super) dtls: Sessions,
    pub(super) fence: Arc<Fence>,
    pub(super) pause: Pause,
    pub(super) accounts: Arc<Accounts>,
}

/// A worker.
pub(super) struct Worker {
    pub(super) id: WorkerId,
    workers: u16,
    pub(super) server: Server,
    pub(super) epoch: u64,
    pub(super) listeners: Vec<Listener>,
    pub(super) relayed: Relayed,
    pub(super) streams: Streams,
    pub(super) dtls: Sessions,
    pub(super) pipes: Pipes,
    pub(super) epoll: Arc<Epoll>,
    waker: Arc<Waker>,
    pub(super) commands: Receiver<Command>,
    pub(super) outboxes: Vec<Option<Outbox>>,
    pub(super) inboxes: Vec<Inbox>,
    pub(super) backbone: Option<Box<BackboneEnd>>,
    pub(super) packets: Packets,
    pub(super) outgoing: OutgoingQueue,
    pub(super) sender: DatagramSender,
    pub(super) counters: Counters,
    pub(super) refusals: Refusals,
    pub(super) journal: Option<Journal>,
    /// Records that came while serving, a few of which are restored each turn; commands wait meanwhile.
    pub(super) late: VecDeque<Record>,
    pub(super) changes: ChangeSender,
    shown: Arc<Shown>,
    pub(super) fence: Arc<Fence>,
    pub(super) pause: Pause,
    pub(super) now: Now,
    ticked: Instant,
    /// Allocations that ended in this turn: once all they sent has left, their accounts end.
    ended: Vec<(AllocationId, EndReason)>,
    /// Who waits for the end of this turn.
    pub(super) finishing: Vec<tokio::sync::oneshot::Sender<()>>,
    /// Work is left that no descriptor will tell of.
    pub(super) unfinished: bool,
    pub(super) stopped: bool,
}

impl Worker {
    pub(super) fn new(setup: Setup) -> Self {
        let now = read_clocks();
        Self {
            id: setup.id,
            workers: setup.workers,
            server: setup.server,
            epoch: setup.epoch,
            listeners: setup.listeners,
            relayed: setup.relayed,
            streams: Streams::new(setup.id, setup.stream_send_cap, setup.max_connections, setup.door),
            dtls: setup.dtls,
            pipes: Pipes::new(),
            epoll: setup.epoll,
            waker: setup.waker,
            commands: setup.commands,
            outboxes: setup.outboxes,
            inboxes: setup.inboxes,
            backbone: None,
            packets: Packets::new(),
            outgoing: OutgoingQueue::default(),
            sender: DatagramSender::default(),
            counters: Counters::new(setup.accounts),
            refusals: Refusals::default(),
            journal: None,
            late: VecDeque::new(),
            changes: setup.changes,
            shown: setup.shown,
            fence: setup.fence,
            pause: setup.pause,
            now,
            ticked: now.mono,
            ended: Vec::new(),
            finishing: Vec::new(),
            unfinished: false,
            stopped: false,
        }
    }

    /// Reads clients and turns until told to stop.
    ///
    /// # Errors
    /// As epoll(7): the worker cannot go on.
    pub(super) fn run(mut self) -> io::Result<()> {
        self.epoll.add(self.waker.as_fd(), Token::Wake.encode(), Interest::Read)?;
        for (index, listener) in self.listeners.iter().enumerate() {
            let token = Token::Listener(index).encode();
            match &listener.socket {
                ListenerSocket::Udp(socket) => self.epoll.add(socket.as_fd(), token, Interest::Read)?,
                ListenerSocket::Tcp { listener, .. } => self.epoll.add(listener.as_fd(), token, Interest::Read)?,
            }
        }
        for (descriptor, token) in self.relayed.wildcard.iter().flat_map(|wildcard| wildcard.descriptors()) {
            self.epoll.add(descriptor, token.encode(), Interest::Read)?;
        }
        let mut events = Events::with_capacity(EVENTS);
        while !self.stopped {
            self.epoll.wait(&mut events, Some(self.patience()))?;
            self.waker.rise();
            self.now = read_clocks();
            if self.pause.turn() {
                // Before anything is read that came meanwhile.
                self.fence.raise(FenceReason::Lapse);
            }
            self.shown.turn(self.now.mono);
            self.unfinished = false;
            self.streams.half_open.begin_turn();
            self.resume_handshakes();
            self.resume_pipes();
            self.connect_proved();
            self.tell_steered();
            for index in 0..events.len() {
                if self.packets.room() < LEAST_ROOM || self.outgoing.len() >= MOST_OUTGOING {
                    self.finish_turn();
                }
                self.on_ready(events.at(index));
            }
            if !self.late.is_empty() {
                self.obey_commands();
            }
            self.take_from_rings();
            self.fire_timers();
            self.poll_handshakes();
            self.unfinished |= self.dtls.has_waiting();
            self.finish_turn();
            for answer in self.finishing.drain(..) {
                // Nobody waits any more: nothing to do.
                let _ = answer.send(());
            }
            self.tick();
        }
        self.publish();
        Ok(())
    }

    /// How long there is nothing to do unless a descriptor says otherwise. From here on other workers wake this one.
    fn patience(&self) -> Duration {
        if self.unfinished {
            return Duration::ZERO;
        }
        self.waker.doze();
        if self.inboxes.iter().any(|inbox| !inbox.is_empty()) {
            return Duration::ZERO;
        }
        let tick = self.ticked + TICK;
        let timeouts = [self.server.poll_timeout(), self.dtls.poll_timeout(), self.pipes.poll_timeout()];
        let next = timeouts.into_iter().flatten().fold(tick, Instant::min);
        next.saturating_duration_since(Instant::now())
    }

    fn on_ready(&mut self, ready: Readiness) {
        match Token::decode(ready.token) {
            Token::Wake => {
                self.waker.reset();
                self.obey_commands();
                self.read_letters();
            }
            Token::Listener(index) => match self.listeners[index].socket {
                ListenerSocket::Udp(_) => self.receive_from_clients(index),
                ListenerSocket::Tcp { .. } => self.accept(index),
            },
            Token::Relayed(key) => self.on_relayed(key, false, ready),
            Token::Connected(key) => self.on_relayed(key, true, ready),
            Token::Connection(key) => self.on_connection(key, ready),
            Token::PeerListener(key) => self.accept_peers(key),
            Token::Opening(key) => self.settle_connect(key),
            Token::PipeClient(key) => self.on_pipe(key, End::Client, ready),
            Token::PipePeer(key) => self.on_pipe(key, End::Peer, ready),
            Token::Steered(family) => self.receive_steered(family),
            Token::SteeredErrors(family) => self.receive_steered_errors(family),
        }
    }

    fn receive_from_clients(&mut self, index: usize) {
        let listener = &self.listeners[index];
        let ListenerSocket::Udp(socket) = &listener.socket else {
            return;
        };
        let address = listener.address;
        // An error here is "nothing there", or one that the next readiness tells again.
        let offered = listener.appetite.slots().min(self.packets.room());
        let Ok(slots) = self.packets.receive(socket.as_fd(), offered) else {
            return;
        };
        let (filled, mut datagrams) = (slots.len(), 0);
        for slot in slots {
            let Some(received) = self.packets.received(slot) else {
                continue;
            };
            datagrams += received.count();
            let from = FiveTuple {
                transport: Transport::Udp,
                client: received.source,
                server: received.local.map_or(address, |ip| SocketAddr::new(ip, address.port())),
            };
            let (listener, ip) = (ListenerId(index as u16), IpMeta { dscp_ecn: received.tos, ..IpMeta::default() });
            for packet in received.segments() {
                if self.fence.is_up() {
                    self.counters.lost(Loss::Fenced);
                } else {
                    self.take_segment(from, listener, ip, packet);
                }
            }
        }
        self.listeners[index].appetite.learn(offered, filled, datagrams, LISTENER_BUDGET);
    }

    /// A datagram as it came to a listener.
    fn take_segment(&mut self, mut from: FiveTuple, listener: ListenerId, ip: IpMeta, mut packet: PacketRef) {
        let mut path = Path::Listener(listener);
        match proxy::datagram(self.packets.bytes(packet)) {
            Proxied::No => {}
            Proxied::Header { length, ends } if self.streams.half_open.trusts(from.client.ip()) => {
                packet = packet.range(length..packet.len());
                if let Some((client, _)) = ends {
                    path = Path::Proxied(listener, from.client);
                    from.client = client;
                }
            }
            // Of somebody who is not to be believed, or broken.
            Proxied::Header { .. } | Proxied::Partial | Proxied::Malformed => {
                self.counters.lost(Loss::ProxyHeader);
                return;
            }
        }
        let owner = shard::worker(from.client, self.workers);
        if owner == self.id {
            self.take_datagram(from, path, ip, packet);
        } else {
            self.counters.crossed += 1;
            let meaning = Meaning::FromClient { from, path, ip };
            self.send_to_worker(owner, meaning, &Head::EMPTY, packet);
        }
    }

    /// A datagram of a client that this worker owns (RFC 7983 §7).
    fn take_datagram(&mut self, from: FiveTuple, path: Path, ip: IpMeta, packet: PacketRef) {
        if let Some(backbone) = &mut self.backbone {
            backbone.ingress.heard_here(from.client);
        }
        if self.dtls.are_served() && wire::kind(self.packets.bytes(packet)) == Kind::Dtls {
            self.receive_dtls(from, path, ip, packet);
        } else {
            self.feed(&Origin::Client { from, path, ip }, packet);
        }
    }

    /// A socket of a relayed address, the connected one or the first.
    fn on_relayed(&mut self, key: usize, connected: bool, ready: Readiness) {
        if ready.error {
            self.receive_errors(key, connected);
        }
        if ready.readable {
            self.receive_from_peers(key, connected);
        }
    }

    pub(super) fn receive_from_peers(&mut self, key: usize, connected: bool) {
        let Some(entry) = self.relayed.socket(key) else {
            return;
        };
        let (relayed, Some(socket)) = (entry.relayed, entry.socket(connected)) else {
            return;
        };
        let offered = entry.appetite.slots().min(self.packets.room());
        let Ok(slots) = self.packets.receive(socket.as_fd(), offered) else {
            return;
        };
        let (filled, mut datagrams) = (slots.len(), 0);
        for slot in slots {
            let Some(received) = self.packets.received(slot) else {
                continue;
            };
            datagrams += received.count();
            self.feed_from_peer(relayed, &received);
        }
        if let Some(entry) = self.relayed.socket_mut(key) {
            entry.appetite.learn(offered, filled, datagrams, RELAYED_BUDGET);
        }
    }

    /// Datagrams of one peer, as they came to a relayed address.
    pub(super) fn feed_from_peer(&mut self, relayed: RelayedAddr, received: &Received) {
        let (from, ip) = (PeerAddr::new(received.source), IpMeta { dscp_ecn: received.tos, ..IpMeta::default() });
        for packet in received.segments() {
            if self.fence.is_up() {
                self.counters.lost(Loss::Fenced);
            } else {
                self.feed(&Origin::Peer { relayed, from, ip }, packet);
            }
        }
    }

    /// ICMP errors for what a relayed address sent (RFC 8656 §11.5).
    fn receive_errors(&mut self, key: usize, connected: bool) {
        for _ in 0..RELAYED_BUDGET {
            let Some(entry) = self.relayed.socket(key) else {
                return;
            };
            let (relayed, Some(socket)) = (entry.relayed, entry.socket(connected)) else {
                return;
            };
            match receive_icmp(socket.as_fd()) {
                Ok(Some(error)) => self.handle(Input::Icmp {
                    relayed,
                    peer: PeerAddr::new(error.destination),
                    kind: error.kind,
                    code: error.code,
                    mtu: error.mtu,
                }),
                Ok(None) => {}
                Err(_) => {
                    // The queue is empty. What else the socket has against us is taken off it, or it would be reported
                    // for ever.
                    let _ = socket.take_error();
                    return;
                }
            }
        }
    }

    fn take_from_rings(&mut self) {
        for index in 0..self.inboxes.len() {
            for _ in 0..RING_BUDGET {
                if self.packets.room() == 0 {
                    self.finish_turn();
                }
                let inbox = &mut self.inboxes[index];
                let Some((meaning, packet)) = self.packets.fill(|buffer| inbox.pop(buffer)) else {
                    break;
                };
                self.take_crossed(meaning, packet);
            }
            self.unfinished |= !self.inboxes[index].is_empty();
        }
    }

    fn take_crossed(&mut self, meaning: Meaning, packet: PacketRef) {
        let origin = match meaning {
            Meaning::FromClient { from, path, ip } => return self.take_datagram(from, path, ip, packet),
            Meaning::FromPeer { relayed, from, ip } => match self.own_relayed(relayed) {
                Some(relayed) => Origin::Peer { relayed, from, ip },
                None => {
                    self.counters.dropped(DropReason::NobodyThere);
                    return;
                }
            },
            Meaning::Ingress { member, client, server, ip } => {
                return self.take_from_ingress((member, client, server), ip, packet);
            }
            Meaning::IngressReply { member, client, server, ip } => {
                return self.answer_from_owner((member, client, server), ip, packet);
            }
            Meaning::Moved(crossing) => return self.take_moved(crossing, packet),
        };
        self.feed(&origin, packet);
    }

    pub(super) fn own_relayed(&self, address: PeerAddr) -> Option<RelayedAddr> {
        let key = self.relayed.find(address.socket_addr())?;
        Some(self.relayed.socket(key)?.relayed)
    }

    fn fire_timers(&mut self) {
        for _ in 0..TIMEOUT_BUDGET {
            if self.server.poll_timeout().is_none_or(|timeout| timeout > self.now.mono) {
                return;
            }
            self.handle(Input::Timeout);
        }
    }

    #[inline]
    pub(super) fn drain_outputs(&mut self) {
        while let Some(output) = self.server.poll_output() {
            self.carry_out(output);
        }
    }

    fn carry_out(&mut self, output: Output) {
        match output {
            Output::Release { relayed, quota_key } => self.relayed.release(relayed, quota_key),
            Output::Permit { relayed, peer, until } => self.relayed.permit(relayed, peer, until),
            Output::Forbid { relayed, peer } => self.relayed.forbid(relayed, peer),
            Output::Record(change) => self.record(change),
            Output::Close(id) => self.close_soon(id),
            Output::Ticket { ticket, held } => self.relayed.whereabouts().hold(ticket, self.id, held),
            Output::Serve { five_tuple, path, served } => self.serve_client(five_tuple, path, served),
            Output::Pend { connection, username, client, meters, account } => {
                self.relayed.peers.pend(connection, Waiting { username, client, meters, account });
            }
            Output::Join { connection, peer } => self.join_soon(connection, peer),
            Output::ClosePeer(id) => self.relayed.peers.close(id),
        }
    }

    /// Journals a change and reports it.
    pub(super) fn record(&mut self, change: Change) {
        if let Change::End { .. } = change {
            let is_told = self.changes.send(change.clone());
            self.note(&change);
            if let Some(journal) = &mut self.journal {
                if is_told {
                    journal.append(&change, self.now.mono);
                } else {
                    journal.append_unheard(&change);
                }
            }
        } else {
            self.keep(&change);
            self.changes.send(change);
        }
    }

    /// Journals a change.
    pub(super) fn keep(&mut self, change: &Change) {
        self.note(change);
        if let Some(journal) = &mut self.journal {
            journal.append(change, self.now.mono);
        }
    }

    fn note(&mut self, change: &Change) {
        self.streams.note(change);
        self.dtls.note(change, self.now.mono);
        self.relayed.note(change);
        if let Change::End { id, reason, .. } = change {
            self.ended.push((*id, *reason));
        }
    }

    pub(super) fn close_soon(&mut self, id: ConnectionId) {
        if dtls::is_session(id) {
            if let Some(key) = self.dtls.key(id) {
                self.close_session(key);
            }
        } else if let Some(key) = self.streams.key(id) {
            self.streams.close_soon(key);
        }
    }

    /// Journal, then everything the turn sends, then what it closed; the slots are free again.
    pub(super) fn finish_turn(&mut self) {
        self.commit();
        self.flush_ingress();
        self.flush();
        self.begin_pipes();
        self.close_connections();
        self.end_closed_sessions();
        self.commit();
        // The addresses of those.
        self.relayed.close_released();
        for (id, reason) in self.ended.drain(..) {
            self.relayed.accounts.end(id, reason, self.now.wall);
        }
        self.outgoing.clear();
        self.packets.clear();
        for outbox in self.outboxes.iter_mut().flatten() {
            outbox.wake();
        }
        if let Some(backbone) = &mut self.backbone {
            backbone.outbox.wake();
        }
    }

    pub(super) fn commit(&mut self) {
        if let Some(journal) = &mut self.journal {
            journal.commit(self.now.mono);
        }
    }

    /// Once a second: what is not worth doing more often.
    fn tick(&mut self) {
        if self.now.mono.saturating_duration_since(self.ticked) < TICK {
            return;
        }
        self.ticked = self.now.mono;
        self.end_idle_connections();
        self.end_slow_openings();
        self.end_idle_sessions();
        self.resume_accepting();
        self.relayed.tick(self.now.mono);
        self.relayed.peers.resume_accepting();
        self.end_half_closed_pipes();
        let (server, now) = (&self.server, self.now);
        if let Some(backbone) = &mut self.backbone {
            backbone.ingress.tick(now.mono, |five_tuple| server.serves(now, five_tuple));
        }
        if let Some(journal) = &mut self.journal
            && journal.wants_compaction(self.now.mono)
        {
            journal.compact(self.server.records(self.now), self.now.mono);
        }
        self.publish();
    }

    pub(super) fn publish(&self) {
        let mut snapshot = self.counters.snapshot();
        snapshot.allocations = self.server.allocations() as u64;
        snapshot.by_transport = self.server.allocations_by_transport().map(|count| count as u64);
        let Redirected { draining, overloaded } = self.server.redirected();
        snapshot.redirected = [draining, overloaded];
        snapshot.cpu_micros = u64::try_from(thread_cpu_time().as_micros()).unwrap_or(u64::MAX);
        snapshot.journal_failed = self.journal.as_ref().is_some_and(Journal::is_failed);
        snapshot.journal_errors = self.journal.as_ref().map_or(0, Journal::errors);
        snapshot.connections = self.streams.open() as u64;
        snapshot.refused_connections = self.refusals.snapshot();
        snapshot.dtls_sessions = self.dtls.open() as u64;
        snapshot.dtls_handshakes = self.dtls.half_open() as u64;
        *self.shown.snapshot.lock().unwrap_or_else(PoisonError::into_inner) = snapshot;
    }
}

pub(super) fn read_clocks() -> Now {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Now { mono: Instant::now(), wall: u64::try_from(wall.as_millis()).unwrap_or(u64::MAX) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_travel_through_epoll() {
        for token in [Token::Wake, Token::Listener(3), Token::Relayed(70_000), Token::Connection(0), Token::PipePeer(9)]
        {
            assert_eq!(Token::decode(token.encode()), token);
        }
    }
}
