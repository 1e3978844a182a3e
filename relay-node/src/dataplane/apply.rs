//! What the core says about a packet, done: queued for a socket, handed to another worker or to another allocation of
//! this one.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

use turn_core::{
    AccountId, DropReason, FiveTuple, Head, Input, IpMeta, ListenerId, Out, Path, PeerAddr, RelayedAddr, Transport,
    Verdict, WorkerId,
};

use super::counters::{Direction, Loss};
use super::dtls;
use super::listen::{Listener, ListenerSocket};
use super::outgoing::{Body, Outgoing, Target};
use super::packet::PacketRef;
use super::ring::Meaning;
use super::udp::{Turn, Way};
use super::worker::Worker;

/// Where a packet came from.
#[derive(Clone, Copy)]
pub(super) enum Origin {
    Client { from: FiveTuple, path: Path, ip: IpMeta },
    Peer { relayed: RelayedAddr, from: PeerAddr, ip: IpMeta },
}

impl Origin {
    #[inline]
    fn input<'a>(&self, packet: &'a [u8]) -> Input<'a> {
        match *self {
            Self::Client { from, path, ip } => Input::FromClient { from, path, packet, ip },
            Self::Peer { relayed, from, ip } => Input::FromPeer { relayed, from, packet, ip },
        }
    }
}

/// What came of a verdict.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(super) enum Applied {
    /// It is on its way, or there was nothing to send.
    Done,
    /// It came to nothing.
    Dropped,
}

/// The bytes of something to send, and how.
#[derive(Clone, Copy)]
pub(super) struct Gathered<'a> {
    pub(super) head: &'a Head,
    pub(super) body: Body,
    pub(super) padding: u8,
    pub(super) ip: IpMeta,
    pub(super) direction: Option<Direction>,
    /// Whose traffic it is.
    pub(super) account: AccountId,
}

impl Gathered<'_> {
    /// What is no application data.
    pub(super) fn answer(body: Body) -> Self {
        Self { head: &Head::EMPTY, body, padding: 0, ip: IpMeta::default(), direction: None, account: AccountId::NONE }
    }
}

/// The datagram socket of a way to a client.
pub(super) fn listener_of(path: Path) -> Option<usize> {
    match path {
        Path::Listener(ListenerId(index)) | Path::Proxied(ListenerId(index), _) => Some(index.into()),
        Path::Connection(_) | Path::Ingress(_) => None,
    }
}

impl Worker {
    /// Hands a packet to the core and applies what it says. Whether the packet was of use.
    pub(super) fn feed(&mut self, origin: &Origin, packet: PacketRef) -> bool {
        if let Origin::Client { from, .. } = origin
            && let Some(worker) = self.served_elsewhere(from)
        {
            return self.pass_on(worker, origin, packet);
        }
        let stray = match origin {
            Origin::Client { from, path: Path::Listener(_), ip } if self.backbone.is_some() => Some((from, *ip)),
            _ => None,
        };
        if let Some((from, ip)) = stray
            && self.asks_of_elsewhere(from, packet)
            && self.pass_to_owner(from, ip, packet)
        {
            return true;
        }
        let input = origin.input(self.packets.bytes(packet));
        let verdict = self.server.handle_input(self.now, input, &mut self.relayed);
        match verdict {
            Verdict::Elsewhere(worker) => return self.pass_on(worker, origin, packet),
            Verdict::Drop(DropReason::NoAllocation) => {
                if let Some((from, ip)) = stray
                    && self.pass_to_owner(from, ip, packet)
                {
                    return true;
                }
            }
            _ => {}
        }
        let applied = self.apply(&verdict, packet);
        self.drain_outputs();
        applied == Applied::Done
    }

    /// Hands in what is no packet.
    pub(super) fn handle(&mut self, input: Input<'_>) {
        let verdict = self.server.handle_input(self.now, input, &mut self.relayed);
        self.apply(&verdict, PacketRef::EMPTY);
        self.drain_outputs();
    }

    fn apply(&mut self, verdict: &Verdict, packet: PacketRef) -> Applied {
        match verdict {
            Verdict::Send { out, head, payload, padding, ip, account } => {
                let (payload, padding, ip, account) = (packet.range(payload.clone()), *padding, *ip, *account);
                let gathered = |direction| {
                    let body = Body::Packet(payload);
                    Gathered { head, body, padding, ip, direction: Some(direction), account }
                };
                match out {
                    Out::Client { to, path } => self.queue_to_client(to, path, &gathered(Direction::ToClient)),
                    Out::Peer { via, to } => {
                        let Some(key) = self.relayed.find(via.bound) else {
                            self.counters.dropped(DropReason::NoAllocation);
                            return Applied::Dropped;
                        };
                        self.queue(Target::Relayed(key), to.socket_addr(), None, &gathered(Direction::ToPeer));
                        Applied::Done
                    }
                    Out::Worker { worker, via, to } => self.hand_over(*worker, (via, account), *to, head, payload, ip),
                    Out::Member { member, via, to } => {
                        self.send_to_member(*member, (via, account), *to, head, payload, ip)
                    }
                }
            }
            Verdict::Reply { out } => {
                let Out::Client { to, path } = out else {
                    self.counters.dropped(DropReason::Unexpected);
                    return Applied::Dropped;
                };
                let body = self.outgoing.copy_reply(self.server.reply());
                self.queue_to_client(to, path, &Gathered::answer(body))
            }
            // Of packets from clients only, which go on by another way.
            Verdict::Elsewhere(_) | Verdict::Done => Applied::Done,
            Verdict::Drop(reason) => {
                self.counters.dropped(*reason);
                Applied::Dropped
            }
        }
    }

    pub(super) fn queue_to_client(&mut self, to: &FiveTuple, path: &Path, gathered: &Gathered<'_>) -> Applied {
        if let Path::Connection(id) = *path
            && let Some(applied) = self.queue_to_connection(to, id, gathered)
        {
            return applied;
        }
        if let Some(applied) = self.queue_to_ingress(to, path, gathered) {
            return applied;
        }
        // The client is back here.
        let path = match *path {
            Path::Ingress(_) => self.listener_for(to.server).map_or(*path, Path::Listener),
            other => other,
        };
        // Where sockets are bound to no address, it is said which one to send from.
        let source = |index: usize| {
            let wildcard = self.listeners.get(index).is_some_and(Listener::is_wildcard);
            wildcard.then_some(to.server.ip())
        };
        let mut destination = to.client;
        let (target, from) = match path {
            Path::Listener(ListenerId(index)) => (Target::Listener(index.into()), source(index.into())),
            Path::Proxied(ListenerId(index), proxy) => {
                destination = proxy;
                (Target::Listener(index.into()), source(index.into()))
            }
            Path::Connection(id) if dtls::is_session(id) => match self.dtls.session(id) {
                Some((key, way)) => {
                    if let Path::Proxied(_, proxy) = way {
                        destination = proxy;
                    }
                    (Target::Session(key), listener_of(way).and_then(source))
                }
                None => {
                    self.counters.lost(Loss::DtlsNoSession);
                    return Applied::Dropped;
                }
            },
            Path::Connection(id) => match self.streams.key(id) {
                Some(key) => (Target::Connection(key), None),
                None => {
                    self.counters.lost(Loss::StreamClosed);
                    return Applied::Dropped;
                }
            },
            Path::Ingress(_) => {
                self.counters.dropped(DropReason::NoBackbone);
                return Applied::Dropped;
            }
        };
        self.queue(target, destination, from, gathered);
        Applied::Done
    }

    /// The datagram socket at a server address.
    fn listener_for(&self, server: SocketAddr) -> Option<ListenerId> {
        let index = self.listeners.iter().position(|listener| listener.serves(Transport::Udp, server))?;
        u16::try_from(index).ok().map(ListenerId)
    }

    #[inline]
    pub(super) fn queue(&mut self, target: Target, to: SocketAddr, from: Option<IpAddr>, gathered: &Gathered<'_>) {
        let Gathered { head: &head, body, padding, ip, direction, account } = *gathered;
        let (tos, dont_fragment) = (ip.dscp_ecn, ip.dont_fragment);
        let outgoing = Outgoing { to, from, tos, dont_fragment, head, body, padding, direction, account };
        self.outgoing.push(target, outgoing);
    }

    /// From one allocation of this node to another: for the first it has left, as if by the kernel, whatever the second
    /// says of it. One of this worker goes on at once, as from a peer: from there to a client and nowhere else.
    fn hand_over(
        &mut self,
        worker: WorkerId,
        (via, account): (&RelayedAddr, AccountId),
        to: PeerAddr,
        head: &Head,
        payload: PacketRef,
        ip: IpMeta,
    ) -> Applied {
        let from = PeerAddr::new(via.advertised);
        if worker != self.id {
            let meaning = Meaning::FromPeer { relayed: to, from, ip };
            let length = payload.len();
            if !self.send_to_worker(worker, meaning, head, payload) {
                return Applied::Dropped;
            }
            self.counters.sent(Direction::ToPeer, length, account);
            return Applied::Done;
        }
        let Some(relayed) = self.own_relayed(to) else {
            self.counters.dropped(DropReason::NobodyThere);
            return Applied::Dropped;
        };
        self.counters.sent(Direction::ToPeer, payload.len(), account);
        let input = Input::FromPeer { relayed, from, packet: self.packets.bytes(payload), ip };
        let verdict = self.server.handle_input(self.now, input, &mut self.relayed);
        self.apply(&verdict, payload)
    }

    /// Copies a packet into the ring to another worker; a full ring drops it.
    pub(super) fn send_to_worker(
        &mut self,
        worker: WorkerId,
        meaning: Meaning,
        head: &Head,
        packet: PacketRef,
    ) -> bool {
        let parts = [head.as_slice(), self.packets.bytes(packet), &[]];
        let outbox = self.outboxes.get_mut(usize::from(worker.0)).and_then(Option::as_mut);
        let pushed = outbox.is_some_and(|outbox| outbox.push(meaning, parts).is_ok());
        if !pushed {
            self.counters.lost(Loss::RingFull);
        }
        pushed
    }

    /// Sends what the turn gathered. What goes to peers leaves first: then released addresses can be closed, so that a
    /// client that is told of the end of an allocation finds its port and its share free.
    pub(super) fn flush(&mut self) {
        self.seal();
        self.outgoing.sort();
        let turn = Turn { outgoing: &self.outgoing, packets: &self.packets, now: self.now.mono };
        let mut position = 0;
        while let Some((Target::Relayed(key), run)) = turn.outgoing.run(position) {
            if self.relayed.is_wildcard() {
                // Those of other addresses leave by the same socket.
                let end = (run.end..self.outgoing.len()).find(|at| self.outgoing.relayed(*at).is_none());
                position = end.unwrap_or(self.outgoing.len());
                self.send_steered(run.start..position);
                break;
            }
            position = run.end;
            if let Some(socket) = self.relayed.connected(key, turn.outgoing, run.clone()) {
                self.sender.send_run(Way::Connected(socket.as_fd()), run, turn, &mut self.counters);
            } else if let Some(entry) = self.relayed.socket(key)
                && let Some(socket) = &entry.socket
            {
                let socket = (socket.as_fd(), entry.relayed.bound.is_ipv6());
                self.sender.send_to_peers(socket, run.clone(), turn, &mut self.counters);
                self.relayed.learn(key, turn.outgoing, run);
            }
        }
        self.relayed.close_released();
        while let Some((target, run)) = self.outgoing.run(position) {
            position = run.end;
            match target {
                Target::Connection(key) => {
                    self.streams.send_run(key, &self.outgoing, &self.packets, run, &mut self.counters);
                    self.update_interest(key);
                }
                Target::Listener(index) => {
                    if let ListenerSocket::Udp(socket) = &self.listeners[index].socket {
                        let turn = Turn { outgoing: &self.outgoing, packets: &self.packets, now: self.now.mono };
                        self.sender.send_run(Way::Open(socket.as_fd()), run, turn, &mut self.counters);
                    }
                }
                // The first have left; of the others no record could be made.
                Target::Relayed(_) | Target::Session(_) => {}
            }
        }
    }
}
