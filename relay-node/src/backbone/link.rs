//! The link to one member: its connection, what waits for it, what is known of it.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use quinn::{Connection, SendDatagramError, VarInt};
use rustc_hash::FxHashMap;
use tokio::sync::Notify;
use turn_core::MemberId;

use super::bucket::Bucket;
use super::frame::{self, Distance};
use super::identity::RelayCertificate;
use super::join::{self, Joiner};
use super::liveness::Liveness;
use super::measure::Measure;
use super::members::{MOST_MEMBERS, Member, NodeTag};
use super::path::{Chooser, Quality, Way};
use super::queue::FairQueue;
use super::report::{LinkCounts, LinkDrop, LinkPath, LinkReport};
use super::usability::Usability;

/// A link is asked as one that carries flows for so long behind the last packet.
const FLOWS_LAST: Duration = Duration::from_secs(2);
/// Two connections that came about this close together were dialled by both ends at once.
const AT_ONCE: Duration = Duration::from_secs(5);
/// What is on its way over a connection that another one has replaced has this long to arrive.
pub(super) const FAREWELL: Duration = Duration::from_secs(2);
/// A connection that is silent for so long is dialled anew beside it: the far end may have moved.
const GIVEN_UP: Duration = Duration::from_secs(2);
/// What a member has said of its distance to others is believed for so long.
const DISTANCES_LAST: Duration = Duration::from_secs(5);
/// Connections over third members, to one member.
const MOST_DETOURS: usize = 4;
/// What QUIC's queue counts for a datagram beside its bytes, at most.
const QUIC_OVERHEAD: usize = 64;

/// Why a connection is closed; the far end reads it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub(super) enum Close {
    /// The relay ends.
    Ending = 0,
    /// There is a newer one.
    Replaced = 1,
    /// The far end is not in the list of members.
    NotAMember = 2,
    /// Its certificate is revoked.
    Revoked = 3,
    /// It is not who was dialled.
    SomebodyElse = 4,
}

impl Close {
    /// Closes a connection for this reason.
    pub(super) fn close(self, connection: &Connection) {
        connection.close(VarInt::from_u32(self as u32), self.why().as_bytes());
    }

    /// In few words.
    pub(super) fn why(self) -> &'static str {
        match self {
            Self::Ending => "it ended",
            Self::Replaced => "replaced",
            Self::NotAMember => "not a member",
            Self::Revoked => "certificate revoked",
            Self::SomebodyElse => "somebody else",
        }
    }

    /// Of the far end's words.
    pub(super) fn read(error: &quinn::ConnectionError) -> &'static str {
        use quinn::ConnectionError as Error;
        match error {
            Error::ApplicationClosed(close) => match close.error_code.into_inner() {
                0 => Self::Ending.why(),
                1 => Self::Replaced.why(),
                2 => "not a member, it says",
                3 => "certificate revoked, it says",
                4 => "dialled somebody else",
                _ => "closed by it",
            },
            Error::TimedOut => "silent",
            Error::LocallyClosed => "closed here",
            Error::Reset => "it restarted",
            Error::ConnectionClosed(_) | Error::TransportError(_) => "refused",
            Error::VersionMismatch | Error::CidsExhausted => "broken",
        }
    }
}

/// One connection to a member.
pub(super) struct Channel {
    pub(super) connection: Connection,
    pub(super) certificate: RelayCertificate,
    /// This relay has dialled it.
    pub(super) is_ours: bool,
    /// The third member it goes over, where it does.
    pub(super) via: Option<MemberId>,
    since: Instant,
    has_answered: Cell<bool>,
    pub(super) joiner: RefCell<Joiner>,
}

impl Channel {
    pub(super) fn new(
        connection: Connection,
        certificate: RelayCertificate,
        is_ours: bool,
        via: Option<MemberId>,
        now: Instant,
    ) -> Self {
        Self {
            connection,
            certificate,
            is_ours,
            via,
            since: now,
            has_answered: Cell::new(false),
            joiner: RefCell::default(),
        }
    }

    /// Sends a datagram ahead of everything that waits.
    pub(super) fn send_ahead(&self, write: impl FnOnce(&mut BytesMut)) {
        let mut datagram = BytesMut::with_capacity(16);
        write(&mut datagram);
        // A connection that has ended says so elsewhere.
        let _ = self.connection.send_datagram(datagram.freeze());
    }
}

/// What becomes of a packet at the head of the queue.
pub(super) enum Next {
    /// Nothing waits, or there is no connection.
    Idle,
    /// QUIC has no room for this one.
    Full(Connection, Bytes),
    /// The link's rate is used up for so long.
    Wait(Duration),
}

/// The link to one member.
pub(super) struct Link {
    pub(super) id: MemberId,
    pub(super) tag: NodeTag,
    /// Its node id is before this relay's: of two connections, the one it has dialled stays.
    is_before_us: bool,
    member: RefCell<Rc<Member>>,
    state: RefCell<State>,
    /// Something waits that cannot be sent at once.
    pub(super) kick: Notify,
    /// There is something to dial, or no longer.
    pub(super) redial: Notify,
}

struct State {
    direct: Option<Rc<Channel>>,
    /// Connections over third members, whoever has dialled them, and whether they live.
    detours: Vec<(Rc<Channel>, Liveness)>,
    /// The one of all these that is in use.
    in_use: Option<Rc<Channel>>,
    /// Another one than at the last look.
    has_turned: bool,
    chooser: Chooser,
    /// A connection over a third member is being made.
    dials_detour: bool,
    /// What the far end has said of its other links.
    distances: FxHashMap<NodeTag, (Quality, Instant)>,
    queue: FairQueue,
    /// Datagrams that come before those of the queue: the rest of a frame that was cut.
    front: VecDeque<Bytes>,
    /// A task waits on behalf of the queue.
    sender_waits: bool,
    /// What QUIC takes now, as far as it is known: asked for anew with each batch.
    room: usize,
    /// Longest datagram of the connection.
    longest: usize,
    bucket: Option<Bucket>,
    counts: LinkCounts,
    liveness: Liveness,
    measure: Measure,
    acks: u64,
    last_flow: Option<Instant>,
    probe: u32,
    message: u32,
    why: &'static str,
    /// This relay has closed its connections.
    closed_for: Option<Close>,
    renew: bool,
}

impl Link {
    pub(super) fn new(member: &Member, own_node: &str) -> Self {
        Self {
            id: member.id,
            tag: NodeTag::of(&member.node_id),
            is_before_us: *member.node_id < *own_node,
            member: RefCell::new(Rc::new(member.clone())),
            state: RefCell::new(State {
                direct: None,
                detours: Vec::new(),
                in_use: None,
                has_turned: false,
                chooser: Chooser::default(),
                dials_detour: false,
                distances: FxHashMap::default(),
                queue: FairQueue::default(),
                front: VecDeque::new(),
                sender_waits: false,
                room: 0,
                longest: 0,
                bucket: None,
                counts: LinkCounts::default(),
                liveness: Liveness::default(),
                measure: Measure::default(),
                acks: 0,
                last_flow: None,
                probe: 0,
                message: 0,
                why: "not connected yet",
                closed_for: None,
                renew: false,
            }),
            kick: Notify::new(),
            redial: Notify::new(),
        }
    }

    pub(super) fn member(&self) -> Rc<Member> {
        Rc::clone(&self.member.borrow())
    }

    pub(super) fn set_member(&self, member: &Member) {
        *self.member.borrow_mut() = Rc::new(member.clone());
    }

    /// This relay dials first: it comes before the other one.
    pub(super) fn dials_first(&self) -> bool {
        !self.is_before_us
    }

    pub(super) fn is_connected(&self) -> bool {
        self.state.borrow().direct.is_some()
    }

    /// Whether a connection is wanted beside what there is.
    pub(super) fn wants_dialling(&self, now: Instant) -> bool {
        let state = self.state.borrow();
        match &state.direct {
            None => true,
            Some(channel) => (state.renew && channel.is_ours) || state.liveness.silent_for(now) >= GIVEN_UP,
        }
    }

    /// This relay's certificate is a new one.
    pub(super) fn renew(&self) {
        self.state.borrow_mut().renew = true;
        self.redial.notify_one();
    }

    /// Why there is no connection.
    pub(super) fn set_why(&self, why: &'static str) {
        self.state.borrow_mut().why = why;
    }

    /// Takes a connection into use, unless the one that is in use is to be kept: then the new one is given back.
    /// Otherwise the old one is.
    pub(super) fn adopt(&self, channel: Rc<Channel>, bucket: Option<Bucket>, now: Instant) -> Option<Rc<Channel>> {
        let state = &mut *self.state.borrow_mut();
        state.counts.connects += 1;
        if state.direct.as_ref().is_some_and(|old| self.stays(old, &channel, now)) {
            return Some(channel);
        }
        if channel.is_ours {
            state.renew = false;
        }
        state.bucket = bucket;
        // A handshake that is over here may yet be refused there: what comes back from now on counts.
        state.acks = channel.connection.stats().frame_rx.acks;
        state.measure.begin_anew();
        state.liveness.asked(now);
        state.ask(&channel);
        let old = state.direct.replace(channel);
        state.select();
        self.kick.notify_one();
        self.redial.notify_one();
        old
    }

    /// Whether a connection stays beside another one to the same end. Where both ends have dialled at once, they have to say
    /// the same, or each closes the one that the other keeps.
    fn stays(&self, old: &Channel, other: &Channel, now: Instant) -> bool {
        let is_first = |channel: &Channel| channel.is_ours != self.is_before_us;
        let at_once = now.saturating_duration_since(old.since) < AT_ONCE;
        at_once && old.connection.close_reason().is_none() && is_first(old) && !is_first(other)
    }

    /// Takes a connection over a third member into use, where that is the way that was chosen. Gives back one that it
    /// replaces.
    pub(super) fn adopt_detour(&self, channel: Rc<Channel>, now: Instant) -> Option<Rc<Channel>> {
        let state = &mut *self.state.borrow_mut();
        state.dials_detour &= !channel.is_ours;
        let same = state.detours.iter().position(|(other, _)| other.via == channel.via);
        if same.is_some_and(|at| self.stays(&state.detours[at].0, &channel, now)) {
            return Some(channel);
        }
        let old = same.or((state.detours.len() >= MOST_DETOURS).then_some(0)).map(|at| state.detours.remove(at).0);
        let mut liveness = Liveness::default();
        state.ask(&channel);
        liveness.asked(now);
        state.detours.push((channel, liveness));
        state.select();
        self.kick.notify_one();
        old
    }

    /// A connection has ended. Whether it was the direct one.
    pub(super) fn lost(&self, channel: &Rc<Channel>, why: &'static str, now: Instant) -> bool {
        let state = &mut *self.state.borrow_mut();
        state.detours.retain(|(detour, _)| !Rc::ptr_eq(detour, channel));
        let was_direct = state.direct.as_ref().is_some_and(|direct| Rc::ptr_eq(direct, channel));
        if was_direct {
            state.direct = None;
            state.liveness.lost(now);
            state.why = state.closed_for.take().map_or(why, Close::why);
            self.redial.notify_one();
        }
        if state.in_use.as_ref().is_some_and(|in_use| Rc::ptr_eq(in_use, channel)) {
            if channel.via.is_some() {
                state.chooser.failed();
            }
            state.select();
        }
        was_direct
    }

    /// The direct connection.
    pub(super) fn direct(&self) -> Option<Rc<Channel>> {
        self.state.borrow().direct.clone()
    }

    /// How packets for the member are to travel.
    pub(super) fn usability(&self, plain_udp: bool) -> Usability {
        let state = self.state.borrow();
        let (answers, trusted) = match &state.in_use {
            None => (false, false),
            // Those that do not answer are given up.
            Some(channel) if channel.via.is_some() => (true, true),
            Some(_) => (state.liveness.answers(), state.liveness.is_trusted()),
        };
        match plain_udp {
            true if trusted => Usability::Link,
            true => Usability::PlainUdp,
            // There is nothing better than a link that answers, trusted or not.
            false if answers => Usability::Link,
            false => Usability::Nothing,
        }
    }

    /// How good the direct connection is, where it is one to rely on.
    pub(super) fn quality(&self) -> Option<Quality> {
        let state = self.state.borrow();
        let channel = state.direct.as_ref().filter(|_| state.liveness.is_trusted())?;
        Some(Quality { rtt: channel.connection.rtt(), loss_permille: state.measure.loss_permille() })
    }

    /// The far end's distance to another member, as it says.
    pub(super) fn quality_to(&self, other: NodeTag, now: Instant) -> Option<Quality> {
        let (quality, said) = *self.state.borrow().distances.get(&other)?;
        (now.saturating_duration_since(said) < DISTANCES_LAST).then_some(quality)
    }

    /// The far end says how far others are from it.
    pub(super) fn heard(&self, distances: impl Iterator<Item = Distance>, now: Instant) {
        let state = &mut *self.state.borrow_mut();
        if state.distances.len() >= MOST_MEMBERS {
            state.distances.retain(|_, (_, said)| now.saturating_duration_since(*said) < DISTANCES_LAST);
        }
        for distance in distances {
            if state.distances.len() < MOST_MEMBERS || state.distances.contains_key(&distance.node) {
                let rtt = Duration::from_micros(distance.rtt_micros.into());
                state.distances.insert(distance.node, (Quality { rtt, loss_permille: distance.loss_permille }, now));
            }
        }
    }

    /// Chooses the way to the member, given those over others that work. Gives the third member over which a connection
    /// has to be made for it.
    pub(super) fn choose(&self, others: &[(MemberId, Quality)], now: Instant) -> Option<MemberId> {
        let direct = self.quality();
        let state = &mut *self.state.borrow_mut();
        let way = state.chooser.choose(now, direct, others);
        state.select();
        match way {
            Way::Via(via)
                if !state.dials_detour && !state.detours.iter().any(|(channel, _)| channel.via == Some(via)) =>
            {
                state.dials_detour = direct.is_none() || state.carries_flows(now);
                state.dials_detour.then_some(via)
            }
            _ => None,
        }
    }

    /// The detour that was chosen cannot be had now: it is tried again with the next choice, and until it stands packets
    /// go on as they did.
    pub(super) fn no_detour(&self) {
        self.state.borrow_mut().dials_detour = false;
    }

    pub(super) fn drop_for(&self, reason: LinkDrop) {
        self.state.borrow_mut().counts.drops.add(reason, 1);
    }

    /// A packet of the far end was handed to a worker.
    pub(super) fn received(&self, payload: usize, now: Instant) {
        let state = &mut *self.state.borrow_mut();
        state.counts.received_packets += 1;
        state.counts.received_bytes += payload as u64;
        state.last_flow = Some(now);
    }

    /// Begins a batch of [`Link::send`].
    pub(super) fn begin(&self) {
        self.state.borrow_mut().measure_room();
    }

    /// Sends a packet of a flow, or lets it wait. [`Link::flush`] is due behind a batch.
    pub(super) fn send(&self, flow: u64, frame: Bytes, payload: usize, now: Instant) {
        let state = &mut *self.state.borrow_mut();
        if state.in_use.is_none() {
            state.counts.drops.add(LinkDrop::NotUsable, 1);
            return;
        }
        state.counts.sent_packets += 1;
        state.counts.sent_bytes += payload as u64;
        state.send(flow, frame, now);
    }

    /// Sends what belongs to a connection over the far end, or over this relay to it; never over a second detour.
    pub(super) fn carry(&self, flow: u64, frame: Bytes, now: Instant) {
        let state = &mut *self.state.borrow_mut();
        if state.in_use.as_ref().is_none_or(|channel| channel.via.is_some()) {
            state.counts.drops.add(LinkDrop::NotPassedOn, 1);
            return;
        }
        state.counts.passed_on_packets += 1;
        state.send(flow, frame, now);
    }

    /// Sends what waits, as far as it goes. What does not go is left to the link's own task.
    pub(super) fn flush(&self, now: Instant) {
        let next = {
            let state = &mut *self.state.borrow_mut();
            if state.sender_waits {
                return;
            }
            state.flush(now)
        };
        let state = &mut *self.state.borrow_mut();
        match next {
            Next::Idle => return,
            Next::Full(_, datagram) => state.front.push_front(datagram),
            Next::Wait(_) => {}
        }
        state.sender_waits = true;
        self.kick.notify_one();
    }

    /// As [`Link::flush`], for the link's own task, which waits where it has to.
    pub(super) fn flush_and_wait(&self, now: Instant) -> Next {
        let state = &mut *self.state.borrow_mut();
        state.measure_room();
        let next = state.flush(now);
        state.sender_waits = !matches!(next, Next::Idle);
        next
    }

    /// Looks at the link: every 100 ms. Whether packets go another way than at the last time.
    pub(super) fn look(&self, now: Instant) -> bool {
        let state = &mut *self.state.borrow_mut();
        state.look_at_detours(now);
        if let Some(channel) = state.direct.clone() {
            self.look_at_direct(state, &channel, now);
        }
        std::mem::take(&mut state.has_turned)
    }

    fn look_at_direct(&self, state: &mut State, channel: &Channel, now: Instant) {
        let stats = channel.connection.stats();
        state.measure.note(now, stats.path.rtt, stats.path.sent_packets, stats.path.lost_packets);
        state.queue.set_elsewhere(state.measure.waits());
        let acks = stats.frame_rx.acks;
        // An acknowledgement shows that what is sent arrives, and that what comes back does.
        if acks != state.acks {
            state.acks = acks;
            state.liveness.answered(now);
        }
        if state.liveness.is_due(now, state.carries_flows(now)) {
            state.liveness.asked(now);
            state.ask(channel);
        }
        state.conclude(now);
        if state.liveness.silent_for(now) >= GIVEN_UP {
            self.redial.notify_one();
        }
    }

    /// The answer to a probe has come. Whether it is the first one over a direct connection.
    pub(super) fn answered(&self, channel: &Rc<Channel>, now: Instant) -> bool {
        let state = &mut *self.state.borrow_mut();
        if state.direct.as_ref().is_some_and(|direct| Rc::ptr_eq(direct, channel)) {
            state.liveness.answered(now);
            state.conclude(now);
            return !channel.has_answered.replace(true);
        }
        if let Some((_, liveness)) = state.detours.iter_mut().find(|(detour, _)| Rc::ptr_eq(detour, channel)) {
            liveness.answered(now);
            liveness.look(now, channel.connection.rtt());
            state.select();
        }
        false
    }

    /// Its state, for others.
    pub(super) fn report(
        &self,
        usability: Usability,
        is_private: impl Fn(&Connection) -> bool,
        node_of: impl Fn(MemberId) -> Option<std::sync::Arc<str>>,
    ) -> LinkReport {
        let state = self.state.borrow();
        let connection = state.direct.as_ref().map(|channel| &channel.connection);
        let path = connection.map(|connection| connection.stats().path).unwrap_or_default();
        LinkReport {
            member: self.id,
            node_id: self.member.borrow().node_id.clone(),
            usability,
            why: state.why,
            remote: connection.map(Connection::remote_address),
            private: connection.is_some_and(is_private),
            rtt: connection.map(|_| path.rtt),
            loss_permille: state.measure.loss_permille(),
            path: state
                .in_use
                .as_ref()
                .and_then(|channel| channel.via)
                .and_then(node_of)
                .map_or(LinkPath::Direct, |node_id| LinkPath::Via { node_id }),
            path_why: state.chooser.why(),
            congestion_window: path.cwnd,
            mtu: path.current_mtu,
            queued_bytes: state.queue.bytes() as u64,
            counts: state.counts,
        }
    }

    /// Closes what is open.
    pub(super) fn close(&self, why: Close) {
        let mut state = self.state.borrow_mut();
        state.closed_for = Some(why);
        for channel in state.direct.iter().chain(state.detours.iter().map(|(channel, _)| channel)) {
            why.close(&channel.connection);
        }
    }
}

impl State {
    /// Sends a probe, ahead of what waits.
    fn ask(&mut self, channel: &Channel) {
        self.probe = self.probe.wrapping_add(1);
        channel.send_ahead(|into| frame::put_probe(self.probe, into));
    }

    fn carries_flows(&self, now: Instant) -> bool {
        self.last_flow.is_some_and(|last| now.saturating_duration_since(last) < FLOWS_LAST)
    }

    /// Uses the connection of the way that was chosen; the direct one while there is none.
    fn select(&mut self) {
        let detour = match self.chooser.way() {
            Way::Direct => None,
            Way::Via(via) => self
                .detours
                .iter()
                .find(|(channel, liveness)| channel.via == Some(via) && liveness.is_trusted())
                .map(|(channel, _)| Rc::clone(channel)),
        };
        let before = std::mem::replace(&mut self.in_use, detour.or_else(|| self.direct.clone()));
        let via = |channel: &Option<Rc<Channel>>| channel.as_ref().map(|channel| channel.via);
        self.has_turned |= via(&before) != via(&self.in_use);
        if self.in_use.is_none() {
            let waited = self.queue.clear() + self.front.len();
            self.front.clear();
            self.counts.drops.add(LinkDrop::NotUsable, waited as u64);
        }
        self.measure_room();
    }

    fn look_at_detours(&mut self, now: Instant) {
        let Way::Via(via) = self.chooser.way() else { return };
        let Some(at) = self.detours.iter().position(|(channel, _)| channel.via == Some(via)) else { return };
        let (channel, liveness) = &mut self.detours[at];
        let channel = Rc::clone(channel);
        let was_trusted = liveness.is_trusted();
        liveness.look(now, channel.connection.rtt());
        if was_trusted && !liveness.is_trusted() {
            Close::Replaced.close(&channel.connection);
            self.detours.remove(at);
            self.chooser.failed();
            self.select();
        } else if liveness.is_due(now, true) {
            liveness.asked(now);
            self.ask(&channel);
        }
    }

    fn send(&mut self, flow: u64, frame: Bytes, now: Instant) {
        let Some(channel) = &self.in_use else { return };
        self.last_flow = Some(now);
        let cost = frame.len() + QUIC_OVERHEAD;
        let goes_at_once = self.bucket.is_none()
            && !self.sender_waits
            && self.front.is_empty()
            && self.queue.is_empty()
            && cost <= self.room
            && frame.len() <= self.longest;
        if !goes_at_once {
            self.queue.push(flow, frame, now, &mut self.counts.drops);
            return;
        }
        self.room -= cost;
        if channel.connection.send_datagram(frame).is_err() {
            self.counts.drops.add(LinkDrop::NotUsable, 1);
        }
    }

    fn conclude(&mut self, now: Instant) {
        let Some(channel) = &self.direct else { return };
        self.liveness.look(now, channel.connection.rtt());
        self.why = if self.liveness.is_trusted() {
            ""
        } else if self.liveness.answers() {
            "was silent, is watched"
        } else {
            "silent"
        };
    }

    fn measure_room(&mut self) {
        let connection = self.in_use.as_ref().map(|channel| &channel.connection);
        self.room = connection.map_or(0, Connection::datagram_send_buffer_space);
        self.longest = connection.and_then(Connection::max_datagram_size).unwrap_or(0);
    }

    fn flush(&mut self, now: Instant) -> Next {
        let Some(channel) = self.in_use.clone() else { return Next::Idle };
        loop {
            if self.front.is_empty() && self.queue.is_empty() {
                return Next::Idle;
            }
            if let Some(wait) = self.bucket.as_mut().and_then(|bucket| bucket.wait(now)) {
                return Next::Wait(wait);
            }
            let datagram = match self.front.pop_front() {
                Some(datagram) => datagram,
                None => match self.queue.pop(now, &mut self.counts.drops) {
                    Some(frame) if frame.len() > self.longest => {
                        self.cut(&frame);
                        continue;
                    }
                    Some(frame) => frame,
                    None => return Next::Idle,
                },
            };
            let cost = datagram.len() + QUIC_OVERHEAD;
            if cost > self.room {
                return Next::Full(channel.connection.clone(), datagram);
            }
            self.room -= cost;
            if let Some(bucket) = &mut self.bucket {
                bucket.take(datagram.len());
            }
            match channel.connection.send_datagram(datagram) {
                Ok(()) => {}
                // The path has become narrower in between.
                Err(SendDatagramError::TooLarge) => self.counts.drops.add(LinkDrop::TooLong, 1),
                Err(_) => self.counts.drops.add(LinkDrop::NotUsable, 1),
            }
        }
    }

    fn cut(&mut self, frame: &[u8]) {
        self.message = self.message.wrapping_add(1);
        match join::cut(self.message, frame, self.longest) {
            Some(parts) => self.front.extend(parts),
            None => self.counts.drops.add(LinkDrop::TooLong, 1),
        }
    }
}
