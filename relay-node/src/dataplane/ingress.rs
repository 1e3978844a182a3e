//! Clients whose packets arrive at a relay that does not have their allocation: an anycast route has flipped, or a load
//! balancer has forgotten. Such a packet goes by the backbone to the relay that has it, and so does what that relay
//! answers: it leaves where the client's packets arrive.
//!
//! Who has it is asked of a controller, off the packet path, for packets that make sense only with an allocation.
//! Whatever strangers send, nothing is stored for a source that has none: what was asked lately, and was nobody's, is
//! remembered in tables of fixed size, questions are bounded each second for every source prefix and in all, and nothing
//! is sent to whoever is unknown but what it would get anyway.

use std::hash::BuildHasher;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;
use turn_core::{DropReason, FiveTuple, IpMeta, MemberId, Path, Transport, WorkerId};

use super::apply::{Applied, Gathered, Origin};
use super::counters::Loss;
use super::delivery::BackboneEnd;
use super::listen::{Listener, ListenerSocket};
use super::outgoing::{Body, Outgoing, Target};
use super::packet::PacketRef;
use super::worker::Worker;
use crate::backbone::Outbound;

/// Clients of other members that send here, per worker; one more takes the place of the one silent for longest.
const OWNERS: usize = 4096;
/// Clients that are being asked about, per worker.
const ASKED: usize = 512;
/// An answer that has not come by then does not come.
const ANSWER: Duration = Duration::from_secs(1);
/// How long a client stays nobody's.
const NOBODY: Duration = Duration::from_secs(5);
/// A client of another member that is silent for so long is asked about anew.
const STALE: Duration = Duration::from_secs(60);
/// Questions a second, of one cell of prefixes and in all, per worker.
const PER_CELL: u16 = 8;
const IN_ALL: u16 = 1024;
/// Cells of prefixes, and of clients that are nobody's.
const CELLS: usize = 1024;
const STRANGERS: usize = 4096;
/// Clients of this relay that send elsewhere, per worker.
const STRAYS: usize = 4096;
/// For so long a client must be heard elsewhere, and not here, before what is for it leaves there: somebody who forges
/// its address elsewhere is not enough.
const SETTLED: Duration = Duration::from_millis(200);

/// A question for a controller: who has the allocation of a UDP client.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Lookup {
    /// Who asks.
    pub worker: WorkerId,
    /// About whom.
    pub client: SocketAddr,
}

/// What is known of clients whose packets arrive in the wrong place.
pub(super) struct Ingress {
    worker: WorkerId,
    lookups: tokio::sync::mpsc::Sender<Lookup>,
    /// Of other members, by client.
    owners: FxHashMap<SocketAddr, Owner>,
    asked: FxHashMap<SocketAddr, Instant>,
    /// Hash of a client that is nobody's, and the second in which that ends.
    strangers: Box<[(u32, u32)]>,
    cells: Box<[u16]>,
    in_all: u16,
    began: Instant,
    second: u32,
    hasher: std::hash::RandomState,
    /// Of this relay, by client.
    strays: FxHashMap<SocketAddr, Stray>,
    /// What this turn has for them.
    held: Vec<(Outbound, Outgoing)>,
    scratch: Vec<u8>,
}

struct Owner {
    member: MemberId,
    heard: Instant,
}

/// A client of this relay whose packets arrive at another member.
struct Stray {
    five_tuple: FiveTuple,
    member: MemberId,
    /// Where it sends to there.
    server: SocketAddr,
    since: Instant,
    /// What is for it leaves there.
    settled: bool,
}

/// Who has the allocation of a client, as far as is known.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Whose {
    Member(MemberId),
    Asking,
    Nobody,
}

impl Ingress {
    pub(super) fn new(worker: WorkerId, lookups: tokio::sync::mpsc::Sender<Lookup>, now: Instant) -> Self {
        Self {
            worker,
            lookups,
            owners: FxHashMap::default(),
            asked: FxHashMap::default(),
            strangers: vec![(0, 0); STRANGERS].into(),
            cells: vec![0; CELLS].into(),
            in_all: 0,
            began: now,
            second: 1,
            hasher: std::hash::RandomState::new(),
            strays: FxHashMap::default(),
            held: Vec::new(),
            scratch: Vec::new(),
        }
    }

    fn whose(&mut self, client: SocketAddr, now: Instant) -> Whose {
        if let Some(owner) = self.owners.get_mut(&client) {
            if now.saturating_duration_since(owner.heard) < STALE {
                owner.heard = now;
                return Whose::Member(owner.member);
            }
            self.owners.remove(&client);
        }
        if let Some(since) = self.asked.get(&client) {
            if now.saturating_duration_since(*since) < ANSWER {
                return Whose::Asking;
            }
            self.asked.remove(&client);
            self.note_nobody(client);
        }
        let (cell, tag) = self.stranger(client);
        let (known, until) = self.strangers[cell];
        if (known == tag && until > self.second) || !self.may_ask(client) {
            return Whose::Nobody;
        }
        if self.lookups.try_send(Lookup { worker: self.worker, client }).is_err() {
            return Whose::Nobody;
        }
        self.asked.insert(client, now);
        Whose::Asking
    }

    fn may_ask(&mut self, client: SocketAddr) -> bool {
        let prefix = match client.ip().to_canonical() {
            IpAddr::V4(ip) => u64::from(ip.to_bits() >> 8),
            IpAddr::V6(ip) => (ip.to_bits() >> 72) as u64,
        };
        let cell = self.hasher.hash_one(prefix) as usize % CELLS;
        if self.asked.len() >= ASKED || self.in_all >= IN_ALL || self.cells[cell] >= PER_CELL {
            return false;
        }
        self.in_all += 1;
        self.cells[cell] += 1;
        true
    }

    fn stranger(&self, client: SocketAddr) -> (usize, u32) {
        let hash = self.hasher.hash_one(client);
        (hash as usize % STRANGERS, (hash >> 32) as u32)
    }

    fn note_nobody(&mut self, client: SocketAddr) {
        let (cell, tag) = self.stranger(client);
        self.strangers[cell] = (tag, self.second + NOBODY.as_secs() as u32);
    }

    /// The answer to a question; one that was not asked, or long ago, is none.
    pub(super) fn located(&mut self, client: SocketAddr, member: Option<MemberId>, now: Instant) {
        if self.asked.remove(&client).is_none() {
            return;
        }
        let Some(member) = member else { return self.note_nobody(client) };
        if self.owners.len() >= OWNERS {
            let oldest = self.owners.iter().min_by_key(|(_, owner)| owner.heard).map(|(client, _)| *client);
            if let Some(oldest) = oldest {
                self.owners.remove(&oldest);
            }
        }
        self.owners.insert(client, Owner { member, heard: now });
    }

    /// A client of this relay was heard at another member.
    fn heard_elsewhere(&mut self, five_tuple: FiveTuple, (member, server): (MemberId, SocketAddr), now: Instant) {
        let room = self.strays.len() < STRAYS;
        match self.strays.get_mut(&five_tuple.client) {
            Some(stray) if (stray.member, stray.server) == (member, server) => {
                stray.settled |= now.saturating_duration_since(stray.since) >= SETTLED;
            }
            Some(stray) => *stray = Stray { five_tuple, member, server, since: now, settled: false },
            None if room => {
                self.strays.insert(five_tuple.client, Stray { five_tuple, member, server, since: now, settled: false });
            }
            None => {}
        }
    }

    /// A client was heard here: this is its place again.
    pub(super) fn heard_here(&mut self, client: SocketAddr) {
        if !self.strays.is_empty() {
            self.strays.remove(&client);
        }
    }

    /// Where what is for a client leaves, if not here.
    fn elsewhere(&self, client: SocketAddr) -> Option<(MemberId, SocketAddr)> {
        let stray = self.strays.get(&client).filter(|stray| stray.settled)?;
        Some((stray.member, stray.server))
    }

    /// Where a client was last heard, if not here.
    fn last_heard(&self, client: SocketAddr) -> Option<(MemberId, SocketAddr)> {
        self.strays.get(&client).map(|stray| (stray.member, stray.server))
    }

    /// Once a second: questions begin anew, and what has no allocation any more is forgotten.
    pub(super) fn tick(&mut self, now: Instant, serves: impl Fn(&FiveTuple) -> bool) {
        self.second = u32::try_from(now.saturating_duration_since(self.began).as_secs()).unwrap_or(u32::MAX - 60) + 1;
        self.in_all = 0;
        self.cells.fill(0);
        self.strays.retain(|_, stray| serves(&stray.five_tuple));
        self.owners.retain(|_, owner| now.saturating_duration_since(owner.heard) < STALE);
        let unanswered = |(client, since): (&SocketAddr, &Instant)| {
            (now.saturating_duration_since(*since) >= ANSWER).then_some(*client)
        };
        for client in self.asked.iter().filter_map(unanswered).collect::<Vec<_>>() {
            self.asked.remove(&client);
            self.note_nobody(client);
        }
    }
}

impl Worker {
    /// Whether a packet is a request about an allocation that is not here: Refresh, CreatePermission, ChannelBind.
    pub(super) fn asks_of_elsewhere(&self, from: &FiveTuple, packet: PacketRef) -> bool {
        let is_about_one = matches!(self.packets.bytes(packet), [0, 0x04 | 0x08 | 0x09, _, _, _, ..]);
        is_about_one && from.transport == Transport::Udp && !self.server.serves(self.now, from)
    }

    /// Passes a client's packet on to the member that has its allocation. Whether it is done with: else it is as of
    /// anybody.
    pub(super) fn pass_to_owner(&mut self, from: &FiveTuple, ip: IpMeta, packet: PacketRef) -> bool {
        let Some(backbone) = &mut self.backbone else { return false };
        match backbone.ingress.whose(from.client, self.now.mono) {
            Whose::Member(member) => {
                let what = Outbound::Ingress { member, client: from.client, server: from.server, ip };
                if backbone.outbox.push(what, [self.packets.bytes(packet), &[]]).is_err() {
                    self.counters.lost(Loss::RingFull);
                }
                true
            }
            // What is said meanwhile could be wrong; clients ask again.
            Whose::Asking => {
                self.counters.dropped(DropReason::NoAllocation);
                true
            }
            Whose::Nobody => false,
        }
    }

    /// A packet of a client that arrived at another member.
    pub(super) fn take_from_ingress(
        &mut self,
        (member, client, server): (MemberId, SocketAddr, SocketAddr),
        ip: IpMeta,
        packet: PacketRef,
    ) {
        let Some(five_tuple) = self.served_client(client) else {
            self.counters.dropped(DropReason::NoAllocation);
            return;
        };
        if let Some(backbone) = &mut self.backbone {
            backbone.ingress.heard_elsewhere(five_tuple, (member, server), self.now.mono);
        }
        // By this path it goes on to nobody else: one hop.
        self.feed(&Origin::Client { from: five_tuple, path: Path::Ingress(member), ip }, packet);
    }

    /// The five-tuple of a UDP client that is served here, whichever address of this relay it allocated at.
    fn served_client(&self, client: SocketAddr) -> Option<FiveTuple> {
        let is_udp = |listener: &&Listener| matches!(listener.socket, ListenerSocket::Udp(_));
        for address in self.listeners.iter().filter(is_udp).map(|listener| listener.address) {
            let everywhere = address.ip().is_unspecified();
            let ips = self.relayed.bound_ips(address.is_ipv4()).filter(|_| everywhere);
            for ip in ips.chain([address.ip()]) {
                let server = SocketAddr::new(ip, address.port());
                let five_tuple = FiveTuple { transport: Transport::Udp, client, server };
                if self.server.serves(self.now, &five_tuple) || self.served_elsewhere(&five_tuple).is_some() {
                    return Some(five_tuple);
                }
            }
        }
        None
    }

    /// What another member has for a client whose packets arrive here.
    pub(super) fn answer_from_owner(
        &mut self,
        (member, client, server): (MemberId, SocketAddr, SocketAddr),
        ip: IpMeta,
        packet: PacketRef,
    ) {
        let asked = self.backbone.as_ref().and_then(|backbone| backbone.ingress.owners.get(&client));
        let listener = self.listeners.iter().position(|listener| listener.serves(Transport::Udp, server));
        let (Some(owner), Some(listener)) = (asked, listener) else {
            self.counters.dropped(DropReason::NobodyThere);
            return;
        };
        if owner.member != member {
            self.counters.dropped(DropReason::NobodyThere);
            return;
        }
        let source = self.listeners[listener].is_wildcard().then_some(server.ip());
        let gathered = Gathered { ip, ..Gathered::answer(Body::Packet(packet)) };
        self.queue(Target::Listener(listener), client, source, &gathered);
    }

    /// Queues something for a client whose packets arrive at another member, if they do: an answer where its request came
    /// from, data once the client has settled there.
    pub(super) fn queue_to_ingress(&mut self, to: &FiveTuple, path: &Path, gathered: &Gathered<'_>) -> Option<Applied> {
        let ingress = &mut self.backbone.as_mut()?.ingress;
        let (member, server) = match *path {
            Path::Listener(_) => ingress.elsewhere(to.client)?,
            // An authenticated request has come by it: nothing has to settle.
            Path::Ingress(member) => {
                let there = ingress.last_heard(to.client).filter(|(heard, _)| *heard == member);
                there.or_else(|| ingress.elsewhere(to.client))?
            }
            Path::Proxied(..) | Path::Connection(_) => return None,
        };
        let Gathered { head: &head, body, padding, ip, direction, account } = *gathered;
        let what = Outbound::IngressReply { member, client: to.client, server, ip };
        let (tos, dont_fragment) = (ip.dscp_ecn, ip.dont_fragment);
        ingress.held.push((
            what,
            Outgoing { to: to.client, from: None, tos, dont_fragment, head, body, padding, direction, account },
        ));
        Some(Applied::Done)
    }

    /// Hands over what the turn has for clients elsewhere, once its records are in the journal.
    pub(super) fn flush_ingress(&mut self) {
        let Some(backbone) = &mut self.backbone else { return };
        let BackboneEnd { outbox, ingress, .. } = &mut **backbone;
        for (what, item) in ingress.held.drain(..) {
            let [head, body, padding] = self.outgoing.parts(&item, &self.packets);
            ingress.scratch.clear();
            ingress.scratch.extend_from_slice(body);
            ingress.scratch.extend_from_slice(padding);
            if outbox.push(what, [head, &ingress.scratch]).is_err() {
                self.counters.lost(Loss::RingFull);
            } else if let Some(direction) = item.direction {
                self.counters.sent(direction, body.len(), item.account);
            } else {
                self.counters.answered(body);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(number: u32) -> SocketAddr {
        SocketAddr::new(std::net::Ipv4Addr::from(0x0B00_0000 + number).into(), 5000)
    }

    fn ingress() -> (Ingress, tokio::sync::mpsc::Receiver<Lookup>, Instant) {
        let (lookups, asked) = tokio::sync::mpsc::channel(4096);
        let now = Instant::now();
        (Ingress::new(WorkerId(0), lookups, now), asked, now)
    }

    #[test]
    fn a_client_is_asked_about_once_and_remembered() {
        let (mut ingress, mut asked, now) = ingress();
        assert_eq!(ingress.whose(client(1), now), Whose::Asking);
        assert_eq!(ingress.whose(client(1), now), Whose::Asking);
        assert_eq!(asked.try_recv().expect("asked"), Lookup { worker: WorkerId(0), client: client(1) });
        assert!(asked.try_recv().is_err(), "once");
        ingress.located(client(1), Some(MemberId(7)), now);
        assert_eq!(ingress.whose(client(1), now), Whose::Member(MemberId(7)));
        // What nobody has asked is no answer.
        ingress.located(client(2), Some(MemberId(7)), now);
        assert_eq!(ingress.owners.len(), 1);
        assert_eq!(ingress.whose(client(3), now), Whose::Asking);
        ingress.located(client(3), None, now);
        assert_eq!(ingress.whose(client(3), now), Whose::Nobody);
        let later = now + NOBODY + Duration::from_secs(1);
        ingress.tick(later, |_| true);
        assert_eq!(ingress.whose(client(3), later), Whose::Asking, "it may have come meanwhile");
        assert_eq!(ingress.whose(client(1), now + STALE), Whose::Asking);
    }

    #[test]
    fn a_flood_fills_nothing_and_asks_little() {
        let (mut ingress, mut asked, now) = ingress();
        for number in 0..200_000 {
            ingress.whose(client(number), now);
        }
        let mut questions = 0;
        while asked.try_recv().is_ok() {
            questions += 1;
        }
        assert!(questions <= usize::from(IN_ALL) && ingress.asked.len() <= ASKED, "{questions}");
        ingress.tick(now + ANSWER, |_| true);
        assert!(ingress.asked.is_empty() && ingress.owners.is_empty());
        // One prefix cannot use up what is for all.
        let (mut ingress, mut asked, now) = self::ingress();
        for port in 1..1000 {
            ingress.whose(SocketAddr::new([11, 0, 0, 1].into(), port), now);
        }
        assert_eq!(std::iter::from_fn(|| asked.try_recv().ok()).count(), usize::from(PER_CELL));
        assert_eq!(ingress.whose(client(70_000), now), Whose::Asking);
    }

    #[test]
    fn what_is_for_a_client_follows_it_when_it_has_settled() {
        let (mut ingress, _asked, now) = ingress();
        let server = "198.51.100.7:3478".parse().expect("literal");
        let five_tuple = FiveTuple { transport: Transport::Udp, client: client(1), server };
        let there = (MemberId(2), "198.51.100.8:3478".parse().expect("literal"));
        ingress.heard_elsewhere(five_tuple, there, now);
        assert_eq!(ingress.elsewhere(client(1)), None, "one packet may be forged");
        ingress.heard_elsewhere(five_tuple, there, now + SETTLED / 2);
        ingress.heard_here(client(1));
        ingress.heard_elsewhere(five_tuple, there, now + SETTLED);
        assert_eq!(ingress.elsewhere(client(1)), None, "it was heard here meanwhile");
        ingress.heard_elsewhere(five_tuple, there, now + SETTLED * 2);
        assert_eq!(ingress.elsewhere(client(1)), Some(there));
        ingress.tick(now, |_| false);
        assert_eq!(ingress.elsewhere(client(1)), None, "its allocation has ended");
    }
}
