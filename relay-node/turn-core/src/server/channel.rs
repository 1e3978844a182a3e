//! Channels (RFC 8656 §12): ChannelBind and ChannelData.

use std::cmp::Ordering;
use std::time::{Duration, Instant};

use smallvec::SmallVec;

use super::auth::User;
use super::permission::PERMISSION_LIFETIME;
use super::reply::Request;
use super::{DropReason, Host, IpMeta, Now, Route, Server, Verdict};
use crate::wire::attribute::{ChannelNumber as ChannelNumberAttribute, XorPeerAddress};
use crate::wire::{ChannelData, ChannelNumber, ErrorCode};
use crate::{Family, FiveTuple, PeerAddr, Policy};

/// RFC 8656 §12: a channel binding lasts for 10 minutes unless refreshed.
pub(super) const CHANNEL_LIFETIME: Duration = Duration::from_secs(600);

/// A channel binding (RFC 8656 §12).
#[derive(Clone, Copy, Debug)]
pub(super) struct Channel {
    pub(super) number: ChannelNumber,
    pub(super) peer: PeerAddr,
    pub(super) deadline: Instant,
}

/// The channel bindings of an allocation, found by number for what the client sends and by peer for what comes back. The
/// one that most clients have is in place.
#[derive(Debug, Default)]
pub(super) struct Channels {
    /// Sorted by number.
    by_number: SmallVec<[Channel; 1]>,
    /// The same, sorted by peer.
    by_peer: SmallVec<[ChannelNumber; 4]>,
}

impl Channels {
    /// The live binding of a number.
    #[inline]
    pub(super) fn by_number(&self, number: ChannelNumber, now: Instant) -> Option<&Channel> {
        let channel = match self.by_number.as_slice() {
            [only] => Some(only).filter(|channel| channel.number == number)?,
            channels => &channels[self.find(number).ok()?],
        };
        Some(channel).filter(|channel| channel.deadline > now)
    }

    /// The live binding of a peer.
    #[inline]
    pub(super) fn by_peer(&self, peer: PeerAddr, now: Instant) -> Option<&Channel> {
        let channel = match self.by_number.as_slice() {
            [only] => Some(only).filter(|channel| channel.peer == peer)?,
            channels => &channels[self.find(self.by_peer[self.find_peer(peer).ok()?]).ok()?],
        };
        Some(channel).filter(|channel| channel.deadline > now)
    }

    /// Binds or refreshes; false, and no change, if number or peer is bound otherwise, alive or not.
    pub(super) fn bind(&mut self, channel: Channel) -> bool {
        match (self.find(channel.number), self.find_peer(channel.peer)) {
            (Ok(index), Ok(_)) if self.by_number[index].peer == channel.peer => self.by_number[index] = channel,
            (Err(index), Err(peer_index)) => {
                self.by_number.insert(index, channel);
                self.by_peer.insert(peer_index, channel.number);
            }
            _ => return false,
        }
        true
    }

    /// Forgets what has ended.
    pub(super) fn purge(&mut self, now: Instant) {
        self.retain(|channel| channel.deadline > now);
    }

    /// Forgets what a policy forbids; whether there was any.
    pub(super) fn enforce(&mut self, policy: &Policy) -> bool {
        self.retain(|channel| policy.check(channel.peer).is_ok())
    }

    /// Forgets a family, whose relayed address has gone (RFC 8656 §8.1).
    pub(super) fn forget(&mut self, family: Family) {
        self.retain(|channel| Family::of(channel.peer.ip()) != family);
    }

    pub(super) fn len(&self) -> usize {
        self.by_number.len()
    }

    /// By number, those included that have ended since the last purge.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Channel> + '_ {
        self.by_number.iter()
    }

    fn retain(&mut self, keep: impl Fn(&Channel) -> bool) -> bool {
        let before = self.by_number.len();
        self.by_number.retain(|channel| keep(channel));
        if self.by_number.len() == before {
            return false;
        }
        let by_number = &self.by_number;
        self.by_peer.retain(|number| by_number.binary_search_by_key(number, |channel| channel.number).is_ok());
        true
    }

    fn find(&self, number: ChannelNumber) -> Result<usize, usize> {
        self.by_number.binary_search_by_key(&number, |channel| channel.number)
    }

    fn find_peer(&self, peer: PeerAddr) -> Result<usize, usize> {
        self.by_peer.binary_search_by(|number| match self.find(*number) {
            Ok(index) => self.by_number[index].peer.cmp(&peer),
            // Both lists have the same channels.
            Err(_) => Ordering::Less,
        })
    }
}

impl Server {
    /// RFC 8656 §12.2.
    pub(super) fn channel_bind(
        &mut self,
        request: &Request<'_>,
        user: &User<'_>,
        host: &impl Host,
    ) -> Result<Verdict, ErrorCode> {
        let slot = self.held(request, user)?;
        let (number, address) = match (request.message.attribute(), request.message.attribute()) {
            (Ok(Some(ChannelNumberAttribute(number))), Ok(Some(XorPeerAddress(address)))) => {
                (ChannelNumber::new(number).ok_or(ErrorCode::BAD_REQUEST)?, address)
            }
            _ => return Err(ErrorCode::BAD_REQUEST),
        };
        // RFC 6062 §4.5: data of a TCP allocation goes by its data connections.
        if self.table.get(slot).peer_connections().is_some() {
            return Err(ErrorCode::FORBIDDEN);
        }
        let peer = PeerAddr::new(address);
        let now = request.now.mono;
        self.purge_permissions(slot, now);
        let allocation = self.table.get_mut(slot);
        allocation.channels.purge(now);
        let bound = allocation.channels.by_number(number, now).map(|channel| channel.peer);
        let channel = allocation.channels.by_peer(peer, now).map(|channel| channel.number);
        if bound.is_some_and(|bound| bound != peer) || channel.is_some_and(|channel| channel != number) {
            return Err(ErrorCode::BAD_REQUEST);
        }
        // As written, not canonical: an IPv4-mapped address is of no IPv4 allocation's family and in no policy.
        if allocation.relays().of(Family::of(address.ip())).is_none() {
            return Err(ErrorCode::PEER_ADDRESS_FAMILY_MISMATCH);
        }
        let policy = &self.settings.policy;
        if policy.check_ip(address.ip()).is_err() || policy.check(peer).is_err() || host.route(peer) == Route::Nobody {
            return Err(ErrorCode::FORBIDDEN);
        }
        let limits = &self.settings.limits;
        if (bound.is_none() && allocation.channels.len() >= limits.channels_per_allocation)
            || allocation.permissions.len_with(&[peer.ip()]) > limits.permissions_per_allocation
        {
            return Err(ErrorCode::INSUFFICIENT_CAPACITY);
        }
        let deadline = now + CHANNEL_LIFETIME;
        if !allocation.channels.bind(Channel { number, peer, deadline }) {
            return Err(ErrorCode::BAD_REQUEST);
        }
        self.permit(slot, peer.ip(), now + PERMISSION_LIFETIME);
        self.heard_from(request.now, slot, &request.from);
        self.record(slot, request.now);
        Ok(self.success(request, user, |_| {}))
    }

    /// RFC 8656 §12.6. A bound channel is enough: the permission guards the way back.
    pub(super) fn on_channel_data(
        &mut self,
        now: Now,
        from: &FiveTuple,
        packet: &[u8],
        ip: IpMeta,
        host: &impl Host,
    ) -> Verdict {
        let Ok(data) = ChannelData::parse(packet) else {
            return Verdict::Drop(DropReason::Malformed);
        };
        let Some(slot) = self.live(now, from) else {
            return Verdict::Drop(DropReason::NoAllocation);
        };
        self.heard_from(now, slot, from);
        match self.table.get(slot).channels.by_number(data.channel(), now.mono) {
            Some(&Channel { peer, .. }) => self.relay_to_peer(now, slot, peer, data.range(), ip, host),
            None => Verdict::Drop(DropReason::NoChannel),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lab::{Lab, addr, ip};
    use super::*;
    use crate::wire::Method;
    use crate::wire::attribute::XorPeerAddress;
    use crate::{Change, Limits, Out};

    #[test]
    fn what_may_be_bound() {
        // RFC 8656 §12.2, after channel 0x4001 was bound to 192.0.2.1:9.
        let cases: &[(&str, u16, &str, u16)] = &[
            ("lowest number", 0x4000, "192.0.2.2:9", 0),
            ("highest number", 0x4FFF, "192.0.2.2:9", 0),
            ("below", 0x3FFF, "192.0.2.2:9", 400),
            ("above", 0x5000, "192.0.2.2:9", 400),
            ("RFC 5766's range", 0x7FFE, "192.0.2.2:9", 400),
            ("refresh", 0x4001, "192.0.2.1:9", 0),
            ("number of another peer", 0x4001, "192.0.2.2:9", 400),
            ("number of another port", 0x4001, "192.0.2.1:10", 400),
            ("peer of another number", 0x4002, "192.0.2.1:9", 400),
            ("another port of the peer", 0x4002, "192.0.2.1:10", 0),
            ("other family", 0x4002, "[2001:db8::1]:9", 443),
            ("IPv4-mapped", 0x4002, "[::ffff:192.0.2.2]:9", 443),
            ("private", 0x4002, "192.168.1.1:9", 403),
            ("port 0", 0x4002, "192.0.2.2:0", 403),
        ];
        for (what, number, peer, expected) in cases {
            let mut lab = Lab::allocated();
            assert_eq!(lab.bind(0x4001, "192.0.2.1:9"), 0);
            assert_eq!(lab.changes().len(), 1);
            assert_eq!(lab.bind(*number, peer), *expected, "{what}");
            assert_eq!(lab.changes().len(), usize::from(*expected == 0), "{what}");
        }
    }

    #[test]
    fn incomplete_or_malformed_is_400() {
        // RFC 8656 §12.2; abuse.md B: CHANNEL-NUMBER of 1 byte.
        let number = ChannelNumberAttribute(0x4000);
        let peer = XorPeerAddress(addr("192.0.2.1:9"));
        let mut lab = Lab::allocated();
        let replies = [
            lab.request(Method::ChannelBind, |_| {}),
            lab.request(Method::ChannelBind, |writer| _ = writer.attribute(&number)),
            lab.request(Method::ChannelBind, |writer| _ = writer.attribute(&peer)),
            lab.request(Method::ChannelBind, |writer| {
                writer.raw(0x000C, &[0x40]);
                writer.attribute(&peer);
            }),
            lab.request(Method::ChannelBind, |writer| {
                writer.attribute(&number);
                writer.raw(0x0012, &[]);
            }),
        ];
        assert!(replies.iter().all(|reply| reply.code() == 400));
        assert!(lab.changes().is_empty());
    }

    #[test]
    fn own_addresses_that_relay_nothing_are_forbidden() {
        // abuse.md A: own listeners.
        let mut lab = Lab::allocated();
        lab.configure(|settings| settings.policy.members.push(ip("198.51.100.7")));
        lab.host.set_route("198.51.100.7:3478", Route::Nobody);
        assert_eq!(lab.bind(0x4000, "198.51.100.7:3478"), 403);
        assert_eq!(lab.bind(0x4000, "198.51.100.7:50001"), 0);
    }

    #[test]
    fn data_goes_to_the_bound_peer() {
        let mut lab = Lab::allocated();
        assert_eq!(lab.bind(0x4000, "192.0.2.1:9"), 0);
        let cases: &[(&str, &[u8], &[u8])] = &[
            ("data", b"\x40\0\0\x05hello", b"hello"),
            ("padding is not relayed", b"\x40\0\0\x05hello\0\0\0", b"hello"),
            // RFC 8656 §12.6: the datagram is still formed and sent.
            ("zero length", b"\x40\0\0\0", b""),
        ];
        for (what, packet, expected) in cases {
            let sent = lab.client_packet(packet).sent().expect(what);
            assert_eq!(sent.bytes, *expected, "{what}");
            let Out::Peer { via, to } = sent.out else { panic!("{what}") };
            assert_eq!((via, to.socket_addr()), (lab.relayed(), addr("192.0.2.1:9")), "{what}");
        }
        let cases: &[(&str, &[u8], DropReason)] = &[
            ("shorter than its length", b"\x40\0\0\x06hello", DropReason::Malformed),
            ("unbound channel", b"\x40\x01\0\0", DropReason::NoChannel),
            ("reserved channel", b"\x50\0\0\0", DropReason::Malformed),
        ];
        for (what, packet, expected) in cases {
            assert_eq!(lab.client_packet(packet).dropped(), Some(*expected), "{what}");
        }
    }

    #[test]
    fn lasts_600_seconds_and_carries_no_permission_of_its_own() {
        let mut lab = Lab::allocated();
        assert_eq!(lab.bind(0x4000, "192.0.2.1:9"), 0);
        assert_eq!(lab.peer_packet("192.0.2.1:9", b"x").dropped(), None);
        lab.pass(300);
        lab.refresh(3600);
        // RFC 8656 §9: the permission has ended; §12.6: the channel has not.
        assert_eq!(lab.peer_packet("192.0.2.1:9", b"x").dropped(), Some(DropReason::NoPermission));
        assert_eq!(lab.channel_data(0x4000, b"x").dropped(), None);
        lab.pass(299);
        assert_eq!(lab.channel_data(0x4000, b"x").dropped(), None);
        lab.pass(1);
        assert_eq!(lab.channel_data(0x4000, b"x").dropped(), Some(DropReason::NoChannel));
        // RFC 8656 §12: once unbound, both can be bound otherwise.
        assert_eq!(lab.bind(0x4000, "192.0.2.2:9"), 0);
        assert_eq!(lab.bind(0x4001, "192.0.2.1:9"), 0);
    }

    #[test]
    fn data_does_not_refresh() {
        // RFC 8656 §12.6: MUST NOT refresh the channel binding or the permission.
        let mut lab = Lab::allocated();
        assert_eq!(lab.bind(0x4000, "192.0.2.1:9"), 0);
        for _ in 0..3 {
            lab.pass(99);
            lab.channel_data(0x4000, b"x");
            lab.peer_packet("192.0.2.1:9", b"x");
        }
        lab.pass(3);
        assert_eq!(lab.peer_packet("192.0.2.1:9", b"x").dropped(), Some(DropReason::NoPermission));
    }

    #[test]
    fn limits_are_508() {
        let mut lab = Lab::allocated();
        lab.configure(|settings| {
            settings.limits = Limits { channels_per_allocation: 2, permissions_per_allocation: 2, ..Limits::default() }
        });
        assert_eq!(lab.bind(0x4000, "192.0.2.1:9"), 0);
        assert_eq!(lab.bind(0x4001, "192.0.2.1:10"), 0);
        assert_eq!(lab.bind(0x4002, "192.0.2.1:11"), 508);
        // What is bound otherwise is bad before it is too much (RFC 8656 §12.2).
        assert_eq!(lab.bind(0x4002, "192.0.2.1:10"), 400);
        assert_eq!(lab.bind(0x4001, "192.0.2.1:11"), 400);
        // A refresh is no new channel.
        assert_eq!(lab.bind(0x4001, "192.0.2.1:10"), 0);
        lab.configure(|settings| settings.limits.channels_per_allocation = 9);
        assert_eq!(lab.bind(0x4002, "192.0.2.2:1"), 0);
        assert_eq!(lab.bind(0x4003, "192.0.2.3:1"), 508);
    }

    #[test]
    fn bindings_are_recorded() {
        let mut lab = Lab::allocated();
        lab.bind(0x4000, "192.0.2.1:9");
        let changes = lab.changes();
        let [Change::Put(record)] = &changes[..] else { panic!("{changes:?}") };
        let peer = PeerAddr::new(addr("192.0.2.1:9"));
        assert_eq!(record.channels, [(0x4000, peer, lab.now.wall + 600_000)]);
        assert_eq!(record.permissions, [(ip("192.0.2.1"), lab.now.wall + 300_000)]);
        assert_eq!(record.sequence, 2);
    }

    #[test]
    fn both_orders_of_the_bindings_agree() {
        let mut channels = Channels::default();
        let start = Instant::now();
        let channel = |number: u16, port: u16, seconds| Channel {
            number: ChannelNumber::new(number).expect("in range"),
            peer: PeerAddr::new(([192, 0, 2, 1], port).into()),
            deadline: start + Duration::from_secs(seconds),
        };
        for (number, port) in [(0x4003, 1), (0x4001, 3), (0x4002, 2)] {
            assert!(channels.bind(channel(number, port, u64::from(port))));
        }
        assert!(!channels.bind(channel(0x4001, 2, 9)), "number and peer of two others");
        channels.purge(start + Duration::from_secs(2));
        assert_eq!((channels.by_number.len(), channels.by_peer.len()), (1, 1));
        let left = channels.by_peer(PeerAddr::new(([192, 0, 2, 1], 3).into()), start);
        assert_eq!(left.map(|channel| channel.number.get()), Some(0x4001));
    }
}
