//! What the backbone's thread holds: the members, their links, and the way of frames between workers and links. Everything
//! here is of one thread; its tasks take turns.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::hash::BuildHasher;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use bytes::BytesMut;
use quinn::Connection;
use rustc_hash::{FxBuildHasher, FxHashMap, FxHashSet};
use turn_core::MemberId;

use super::asked::AskedReplies;
use super::bucket::Bucket;
use super::deliver::{Deliver, Inbound};
use super::detour::{Crossing, Detour};
use super::endpoint::Endpoints;
use super::frame::{self, Distance, Frame, MOST_DISTANCES, NoFrame, PacketKind};
use super::identity::RelayCertificate;
use super::link::{Channel, Close, FAREWELL, Link};
use super::members::{MOST_MEMBERS, MemberList, NodeTag};
use super::outbox::{Inbox, Outbound};
use super::report::{LinkDrop, LinkReport};
use super::rest::Rest;
use super::settings::Settings;
use super::tls::Tls;
use super::transport::Kind;
use super::usability::{Usabilities, Usability};

/// Packets taken from one ring before the others, and QUIC, have their turn.
const TURN: usize = 256;
/// Frames are written into pieces of memory of this size.
const CHUNK: usize = 64 << 10;

/// Everything.
pub(super) struct Hub {
    pub(super) settings: Settings,
    pub(super) endpoints: Rc<Endpoints>,
    pub(super) tls: RefCell<Tls>,
    pub(super) crossing: Arc<Crossing>,
    links: RefCell<Links>,
    revoked: RefCell<FxHashSet<Vec<u8>>>,
    deliver: RefCell<Box<dyn Deliver>>,
    asked: RefCell<AskedReplies>,
    usabilities: Usabilities,
    reports: Arc<ArcSwap<Vec<LinkReport>>>,
    /// Flows cannot be made to meet by who chooses addresses.
    seed: u64,
    /// Batches of packets were handed to workers who have not been woken.
    delivered: Cell<bool>,
    rest: Arc<Rest>,
}

#[derive(Default)]
struct Links {
    by_number: Vec<Option<Rc<Link>>>,
    by_node: BTreeMap<Arc<str>, MemberId>,
    by_tag: FxHashMap<NodeTag, MemberId>,
    /// Addresses that members dial from, or may.
    ips: FxHashSet<IpAddr>,
}

impl Links {
    fn get(&self, member: MemberId) -> Option<&Rc<Link>> {
        self.by_number.get(usize::from(member.0))?.as_ref()
    }

    fn named(&self, tag: NodeTag) -> Option<&Rc<Link>> {
        self.get(*self.by_tag.get(&tag)?)
    }
}

impl Hub {
    pub(super) fn new(
        settings: Settings,
        endpoints: Endpoints,
        tls: Tls,
        deliver: Box<dyn Deliver>,
        usabilities: Usabilities,
        reports: Arc<ArcSwap<Vec<LinkReport>>>,
        rest: Arc<Rest>,
    ) -> Self {
        endpoints.set_tls(&tls);
        let seed = getrandom::u64().unwrap_or_default();
        Self {
            settings,
            crossing: endpoints.crossing(),
            endpoints: Rc::new(endpoints),
            tls: RefCell::new(tls),
            links: RefCell::default(),
            revoked: RefCell::default(),
            deliver: RefCell::new(deliver),
            asked: RefCell::new(AskedReplies::new(seed)),
            usabilities,
            reports,
            seed,
            delivered: Cell::new(false),
            rest,
        }
    }

    // --- members ---------------------------------------------------------------------------------------------------

    /// Takes a list of members. Gives the links that are new.
    pub(super) fn set_members(&self, list: &MemberList) -> Vec<Rc<Link>> {
        *self.revoked.borrow_mut() = list.revoked_serials.iter().cloned().collect();
        let mut new = Vec::new();
        let mut links = self.links.borrow_mut();
        let mut gone = std::mem::take(&mut links.by_number);
        links.by_node.clear();
        links.by_tag.clear();
        links.ips.clear();
        for member in &list.members {
            let index = usize::from(member.id.0);
            if index >= MOST_MEMBERS || *member.node_id == *self.settings.node_id {
                continue;
            }
            if links.by_number.len() <= index {
                links.by_number.resize(index + 1, None);
            }
            let link = match gone.get_mut(index).and_then(Option::take) {
                Some(link) => {
                    link.set_member(member);
                    link
                }
                None => {
                    let link = Rc::new(Link::new(member, &self.settings.node_id));
                    new.push(Rc::clone(&link));
                    link
                }
            };
            links.by_tag.insert(link.tag, link.id);
            links.by_number[index] = Some(link);
            links.by_node.insert(member.node_id.clone(), member.id);
            links
                .ips
                .extend(member.addresses.iter().map(|address| address.ip()).chain(member.relay_ips.iter().copied()));
        }
        for link in gone.into_iter().flatten() {
            link.close(Close::NotAMember);
            // Its tasks see that they are no longer needed.
            link.kick.notify_one();
            link.redial.notify_one();
            self.usabilities.set(link.id, Usability::Nothing);
        }
        for link in links.by_number.iter().flatten() {
            if link.direct().is_some_and(|channel| self.is_revoked(&channel.certificate)) {
                link.close(Close::Revoked);
            }
            self.publish(link);
        }
        new
    }

    /// Whether a link is still one of a member.
    pub(super) fn is_current(&self, link: &Rc<Link>) -> bool {
        self.links.borrow().get(link.id).is_some_and(|current| Rc::ptr_eq(current, link))
    }

    /// All links.
    pub(super) fn links(&self) -> Vec<Rc<Link>> {
        self.links.borrow().by_number.iter().flatten().cloned().collect()
    }

    /// Whether a member may dial from this address.
    pub(super) fn is_of_member(&self, ip: IpAddr) -> bool {
        self.links.borrow().ips.contains(&ip)
    }

    /// What a connection to this address is.
    pub(super) fn kind_of(&self, address: SocketAddr) -> Kind {
        if Detour::of(address).is_some() {
            Kind::Detour
        } else if self.settings.is_private(address.ip()) {
            Kind::Private { capacity: self.settings.capacity }
        } else {
            Kind::Internet
        }
    }

    fn is_revoked(&self, certificate: &RelayCertificate) -> bool {
        self.revoked.borrow().contains(&certificate.serial)
    }

    /// Takes another certificate of this relay into use.
    pub(super) fn set_tls(&self, tls: Tls) {
        self.endpoints.set_tls(&tls);
        *self.tls.borrow_mut() = tls;
        for link in self.links() {
            link.renew();
        }
    }

    // --- connections -----------------------------------------------------------------------------------------------

    /// Takes a connection whose handshake is over; `dialled` is whom it was dialled to. What is no member's is closed.
    pub(super) fn adopt(
        self: &Rc<Self>,
        connection: Connection,
        dialled: Option<MemberId>,
    ) -> Result<(), &'static str> {
        let now = Instant::now();
        let refuse = |why: Close| {
            why.close(&connection);
            Err(why.why())
        };
        let Some(certificate) = RelayCertificate::of(&connection) else { return refuse(Close::NotAMember) };
        let link = {
            let links = self.links.borrow();
            links.by_node.get(&*certificate.node_id).and_then(|id| links.get(*id)).cloned()
        };
        let Some(link) = link else { return refuse(Close::NotAMember) };
        if self.is_revoked(&certificate) {
            return refuse(Close::Revoked);
        }
        if dialled.is_some_and(|member| member != link.id) {
            return refuse(Close::SomebodyElse);
        }
        let detour = Detour::of(connection.remote_address());
        if detour.is_some_and(|detour| detour.far != link.id) {
            return refuse(Close::SomebodyElse);
        }
        let is_private = self.settings.is_private(connection.remote_address().ip());
        let channel = |certificate| {
            let via = detour.map(|detour| detour.via);
            let channel = Rc::new(Channel::new(connection.clone(), certificate, dialled.is_some(), via, now));
            tokio::task::spawn_local(Rc::clone(self).read(Rc::clone(&link), Rc::clone(&channel)));
            channel
        };
        if detour.is_some() {
            if let Some(other) = link.adopt_detour(channel(certificate), now) {
                Close::Replaced.close(&other.connection);
            }
            return Ok(());
        }
        let bucket = is_private.then_some(self.settings.capacity).flatten().map(|capacity| Bucket::new(capacity, now));
        if let Some(other) = link.adopt(channel(certificate), bucket, now) {
            tokio::task::spawn_local(async move {
                tokio::time::sleep(FAREWELL).await;
                Close::Replaced.close(&other.connection);
            });
        }
        self.publish(&link);
        Ok(())
    }

    /// Reads a connection until it ends.
    async fn read(self: Rc<Self>, link: Rc<Link>, channel: Rc<Channel>) {
        use futures_util::FutureExt;
        let error = loop {
            match channel.connection.read_datagram().await {
                Ok(datagram) => self.receive(&link, &channel, &datagram, Instant::now()),
                Err(error) => break error,
            }
            // What has come with it is handed over with it: workers are woken once.
            let now = Instant::now();
            for _ in 1..TURN {
                match channel.connection.read_datagram().now_or_never() {
                    Some(Ok(datagram)) => self.receive(&link, &channel, &datagram, now),
                    _ => break,
                }
            }
            self.wake_workers();
        };
        let why = Close::read(&error);
        let was_direct = link.lost(&channel, why, Instant::now());
        if self.is_current(&link) {
            if was_direct {
                tracing::warn!(member = %channel.certificate.node_id, "a link of the backbone is lost: {why}");
            }
            self.publish(&link);
        }
    }

    /// Tells workers and others how a link is.
    pub(super) fn publish(&self, link: &Link) {
        self.usabilities.set(link.id, link.usability(self.settings.plain_udp));
    }

    /// Looks at every link, each 100 ms. Whether one has failed since the last time, and whether packets of one go another
    /// way.
    pub(super) fn look(&self, now: Instant) -> (bool, bool) {
        let (mut failed, mut turned) = (false, false);
        for link in self.links() {
            let was_good = link.quality().is_some();
            turned |= link.look(now);
            failed |= was_good && link.quality().is_none();
            self.publish(&link);
        }
        (failed, turned)
    }

    /// Shows every link to others: once a second, and where packets of one go another way.
    pub(super) fn report(&self) {
        let is_private = |connection: &Connection| self.settings.is_private(connection.remote_address().ip());
        let report = |link: &Rc<Link>| {
            let node_of = |member| Some(self.links.borrow().get(member)?.member().node_id.clone());
            link.report(self.usabilities.of(link.id), is_private, node_of)
        };
        self.reports.store(Arc::new(self.links().iter().map(report).collect()));
    }

    // --- from workers to links -------------------------------------------------------------------------------------

    /// Moves what workers have pushed to the links, as much as one turn takes.
    pub(super) fn drain(&self, inboxes: &mut [Inbox], memory: &mut BytesMut, touched: &mut Vec<Rc<Link>>) {
        let now = Instant::now();
        let mut moved = 0;
        let links = self.links.borrow();
        for inbox in inboxes {
            for _ in 0..TURN {
                let Some((what, length)) = inbox.pop() else { break };
                moved += 1;
                let Some(link) = links.get(what.member()) else {
                    inbox.skip(length);
                    continue;
                };
                if !touched.iter().any(|other| Rc::ptr_eq(other, link)) {
                    link.begin();
                    touched.push(Rc::clone(link));
                }
                if memory.capacity() < length + 64 {
                    memory.reserve(CHUNK.max(length + 64));
                }
                let flow = self.put(&what, memory, now);
                inbox.take(length, memory);
                link.send(flow, memory.split().freeze(), length, now);
            }
        }
        drop(links);
        for link in touched.drain(..) {
            link.flush(now);
        }
        self.rest.moved(moved);
    }

    /// Writes what stands before a packet, and says which flow it is of.
    fn put(&self, what: &Outbound, into: &mut BytesMut, now: Instant) -> u64 {
        let (kind, first, second, ip) = match *what {
            Outbound::Data { source, destination, ip, .. } => (PacketKind::Data, source, destination, ip),
            Outbound::Ingress { client, server, ip, member } => {
                self.asked.borrow_mut().ask(member, client, server, now);
                (PacketKind::Ingress, client, server, ip)
            }
            Outbound::IngressReply { client, server, ip, .. } => (PacketKind::IngressReply, client, server, ip),
        };
        frame::put_packet(kind, first, second, ip, into);
        self.flow(first, second)
    }

    fn flow(&self, first: SocketAddr, second: SocketAddr) -> u64 {
        FxBuildHasher.hash_one((self.seed, first, second))
    }

    // --- over third members ----------------------------------------------------------------------------------------

    /// Sends the packets of connections over third members to those.
    pub(super) fn send_detours(&self) {
        let now = Instant::now();
        while let Some((Detour { via, far }, packet)) = self.crossing.next() {
            let links = self.links.borrow();
            let (Some(via), Some(far)) = (links.get(via), links.get(far)) else { continue };
            let mut frame = BytesMut::with_capacity(frame::VIA_HEADER + packet.len());
            frame::put_via(far.tag, &mut frame);
            frame.extend_from_slice(&packet);
            via.begin();
            via.carry(FxBuildHasher.hash_one((self.seed, far.tag)), frame.freeze(), now);
            via.flush(now);
        }
    }

    /// Chooses the way to each member. Gives those that a connection over a third one has to be made to.
    pub(super) fn choose_paths(&self, now: Instant) -> Vec<(Rc<Link>, MemberId)> {
        let links = self.links();
        let near: Vec<_> = links.iter().filter_map(|link| Some((link, link.quality()?))).collect();
        let choose = |link: &Rc<Link>| {
            let others: Vec<_> = near
                .iter()
                .filter(|(via, _)| !Rc::ptr_eq(via, link))
                .filter_map(|(via, quality)| Some((via.id, quality.then(via.quality_to(link.tag, now)?))))
                .collect();
            let via = link.choose(&others, now);
            self.publish(link);
            Some((Rc::clone(link), via?))
        };
        links.iter().filter_map(choose).collect()
    }

    /// Tells every member how far the others are.
    pub(super) fn tell_distances(&self) {
        let links = self.links();
        let distances: Vec<_> = links
            .iter()
            .filter_map(|link| {
                let quality = link.quality()?;
                let rtt_micros = u32::try_from(quality.rtt.as_micros()).unwrap_or(u32::MAX);
                Some(Distance { node: link.tag, rtt_micros, loss_permille: quality.loss_permille })
            })
            .collect();
        for link in &links {
            let Some(channel) = link.direct() else { continue };
            for some in distances.chunks(MOST_DISTANCES) {
                let of_others = some.iter().copied().filter(|distance| distance.node != link.tag);
                channel.send_ahead(|into| frame::put_distances(of_others, into));
            }
        }
    }

    // --- from links to workers -------------------------------------------------------------------------------------

    fn receive(&self, link: &Rc<Link>, channel: &Rc<Channel>, datagram: &[u8], now: Instant) {
        let frame = match frame::read(datagram) {
            Ok(Frame::Part { message, index, count, bytes }) => {
                let mut unjoined = 0;
                let joined = channel.joiner.borrow_mut().take(now, (message, index, count), bytes, &mut unjoined);
                for _ in 0..unjoined {
                    link.drop_for(LinkDrop::Unjoined);
                }
                if let Some(whole) = joined {
                    match frame::read(&whole) {
                        // A piece is never in pieces itself.
                        Ok(Frame::Part { .. }) => link.drop_for(LinkDrop::Malformed),
                        frame => self.take(link, channel, frame, now),
                    }
                }
                return;
            }
            frame => frame,
        };
        self.take(link, channel, frame, now);
    }

    fn take(&self, link: &Rc<Link>, channel: &Rc<Channel>, frame: Result<Frame<'_>, NoFrame>, now: Instant) {
        let from = link.id;
        match frame {
            Ok(Frame::Data { source, destination, ip, payload }) => {
                if !link.member().owns(source) {
                    return link.drop_for(LinkDrop::NotItsSource);
                }
                if !self.settings.relay_ips.contains(&destination.ip()) {
                    return link.drop_for(LinkDrop::NotOurDestination);
                }
                self.hand_over(link, Inbound::Data { from, source, destination, ip }, payload, now);
            }
            Ok(Frame::Ingress { client, server, ip, payload }) => {
                self.hand_over(link, Inbound::Ingress { from, client, server, ip }, payload, now);
            }
            Ok(Frame::IngressReply { client, server, ip, payload }) => {
                // Else a member could have this relay send anything to anybody.
                if !self.asked.borrow().is_asked(from, client, server, now) {
                    return link.drop_for(LinkDrop::UnaskedReply);
                }
                self.hand_over(link, Inbound::IngressReply { from, client, server, ip }, payload, now);
            }
            Ok(Frame::Probe { number }) => channel.send_ahead(|into| frame::put_probe_answer(number, into)),
            Ok(Frame::ProbeAnswer { .. }) => {
                if link.answered(channel, now) {
                    tracing::info!(
                        member = %channel.certificate.node_id, remote = %channel.connection.remote_address(),
                        dialled = channel.is_ours, "a link of the backbone stands"
                    );
                }
                self.publish(link);
            }
            Ok(Frame::Distances(distances)) => link.heard(distances.iter(), now),
            // A detour has one hop: what comes over one is not sent over another.
            Ok(Frame::Via { .. } | Frame::Relayed { .. }) if channel.via.is_some() => {
                link.drop_for(LinkDrop::NotPassedOn);
            }
            Ok(Frame::Via { to, packet }) => self.pass_on(link, to, packet, now),
            Ok(Frame::Relayed { from, packet }) => {
                let far = self.links.borrow().named(from).map(|far| far.id);
                let by = far.filter(|far| *far != link.id).map(|far| Detour { via: link.id, far });
                if by.is_none_or(|by| !self.crossing.arrived(by, packet)) {
                    link.drop_for(LinkDrop::NotDelivered);
                }
            }
            Ok(Frame::Part { .. }) | Err(NoFrame::Malformed) => link.drop_for(LinkDrop::Malformed),
            Err(NoFrame::Unknown) => link.drop_for(LinkDrop::UnknownFrame),
        }
    }

    /// Sends a packet on to the member it is for.
    fn pass_on(&self, from: &Rc<Link>, to: NodeTag, packet: &[u8], now: Instant) {
        let target = self.links.borrow().named(to).filter(|target| !Rc::ptr_eq(target, from)).cloned();
        let Some(target) = target else { return from.drop_for(LinkDrop::NotPassedOn) };
        let mut frame = BytesMut::with_capacity(frame::VIA_HEADER + packet.len());
        frame::put_relayed(from.tag, &mut frame);
        frame.extend_from_slice(packet);
        target.begin();
        target.carry(FxBuildHasher.hash_one((self.seed, from.tag, to)), frame.freeze(), now);
        target.flush(now);
    }

    fn hand_over(&self, link: &Link, what: Inbound, packet: &[u8], now: Instant) {
        self.delivered.set(true);
        self.rest.moved(1);
        if self.deliver.borrow_mut().deliver(what, packet) {
            link.received(packet.len(), now);
        } else {
            link.drop_for(LinkDrop::NotDelivered);
        }
    }

    fn wake_workers(&self) {
        if self.delivered.take() {
            self.deliver.borrow_mut().flush();
        }
    }
}
