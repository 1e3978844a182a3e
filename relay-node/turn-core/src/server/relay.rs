//! Packets between the client and the peers of an allocation (RFC 8656 §11.3, §12.7, §14 to §16). No heap.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;

use rand_core::Rng;

use super::table::{Metered, Slot};
use super::{DropReason, Head, Host, IpMeta, Now, Out, Route, Server, Verdict};
use crate::meter::{Direction, Meter};
use crate::wire::attribute::XorPeerAddress;
use crate::wire::{ChannelData, Class, MessageWriter, Method, TransactionId, padded};
use crate::{Family, FiveTuple, PeerAddr, RelayedAddr, credential};

/// The two bits of ECN in [`IpMeta::dscp_ecn`].
const ECN: u8 = 0b11;

/// Most bytes a UDP datagram to this address carries.
fn max_datagram(to: SocketAddr) -> usize {
    // RFC 768 behind RFC 791 and RFC 8200; no jumbograms.
    if to.ip().to_canonical().is_ipv4() { 65_507 } else { 65_527 }
}

impl Server {
    /// The allocation of a five-tuple, if its time has not come.
    #[inline]
    pub(super) fn live(&self, now: Now, from: &FiveTuple) -> Option<Slot> {
        let slot = self.table.by_five_tuple(from)?;
        Some(slot).filter(|slot| self.table.get(*slot).is_live(now.mono))
    }

    /// Sends `payload` of the packet in hand to a peer that was found permitted, wherever that peer is.
    pub(super) fn relay_to_peer(
        &mut self,
        now: Now,
        slot: Slot,
        to: PeerAddr,
        payload: Range<usize>,
        ip: IpMeta,
        host: &impl Host,
    ) -> Verdict {
        let allocation = self.table.get(slot);
        let Some(via) = allocation.relays().live(Family::of(to.ip()), now.mono) else {
            return Verdict::Drop(DropReason::NoAllocation);
        };
        let out = match host.route(to) {
            Route::Internet => Out::Peer { via, to },
            Route::Worker(worker) => Out::Worker { worker, via, to },
            Route::Member(member) => Out::Member { member, via, to },
            Route::Nobody => return Verdict::Drop(DropReason::NobodyThere),
        };
        if payload.len() > max_datagram(to.socket_addr()) {
            return Verdict::Drop(DropReason::TooLong);
        }
        let ip = if allocation.five_tuple().transport.is_stream() {
            // RFC 8656 §15: DSCP of the connection, Not-ECT, DF where it was asked for.
            IpMeta { dscp_ecn: ip.dscp_ecn & !ECN, ttl: 0, ..ip }
        } else {
            ip
        };
        if let Err(reason) = self.admit(slot, Direction::ToPeer, now, payload.len()) {
            return Verdict::Drop(reason);
        }
        let account = self.table.get(slot).account;
        Verdict::Send { out, head: Head::EMPTY, payload, padding: 0, ip, account }
    }

    /// Whether the rates of the allocation, its user and the node allow for one packet more, of so many bytes.
    #[inline]
    fn admit(&mut self, slot: Slot, direction: Direction, now: Now, bytes: usize) -> Result<(), DropReason> {
        if self.settings.limits.has_rates() { self.meter(slot, direction, now, bytes) } else { Ok(()) }
    }

    fn meter(&mut self, slot: Slot, direction: Direction, now: Now, bytes: usize) -> Result<(), DropReason> {
        let limits = &self.settings.limits;
        let Metered { own, shared } = self.table.get_mut(slot).metered.get_or_insert_default().as_mut();
        let packet_of = |meter: &Option<Arc<Meter>>, rate| {
            meter.as_ref().is_none_or(|meter| meter.admit_packet(direction, now.mono, rate))
        };
        let bytes_of = |meter: &Option<Arc<Meter>>, rate| {
            meter.as_ref().is_none_or(|meter| meter.admit(direction, now.mono, bytes, rate))
        };
        if !own.admit_packet(direction, now.mono, limits.packets_per_allocation)
            || !packet_of(&shared.user, limits.packets_per_user)
        {
            return Err(DropReason::PacketRate);
        }
        let admitted = own.admit(direction, now.mono, bytes, limits.bytes_per_allocation)
            && bytes_of(&shared.user, limits.bytes_per_user)
            && bytes_of(&shared.node, limits.bytes_per_node);
        if admitted { Ok(()) } else { Err(DropReason::Bandwidth) }
    }

    /// Has what an allocation sends counted.
    pub(super) fn open_account(&mut self, slot: Slot, restored: bool, host: &mut impl Host) {
        let allocation = self.table.get_mut(slot);
        allocation.account = host.account(allocation.id, &allocation.username, restored);
    }

    /// Lets an allocation share in the bandwidth of its user and of the node, where that is limited.
    pub(super) fn join_meters(&mut self, slot: Slot, host: &mut impl Host) {
        if self.settings.limits.has_shared_rates() {
            let allocation = self.table.get_mut(slot);
            let meters = host.meters(credential::quota_key(&allocation.username));
            allocation.metered.get_or_insert_default().shared = meters;
        }
    }

    /// RFC 8656 §11.3 and §12.7.
    pub(super) fn on_peer(
        &mut self,
        now: Now,
        relayed: &RelayedAddr,
        from: PeerAddr,
        packet: &[u8],
        ip: IpMeta,
    ) -> Verdict {
        let Some(slot) = self.table.by_bound(&relayed.bound) else {
            return Verdict::Drop(DropReason::NoAllocation);
        };
        let allocation = self.table.get(slot);
        if !allocation.relays().is_live(relayed.family(), now.mono) || allocation.peer_connections().is_some() {
            return Verdict::Drop(DropReason::NoAllocation);
        }
        // RFC 8656 §9: only the IP is compared.
        if !allocation.permissions.allow(from.ip(), now.mono) {
            return Verdict::Drop(DropReason::NoPermission);
        }
        let to = allocation.five_tuple();
        let stream = to.transport.is_stream();
        let padding = padded(packet.len()) - packet.len();
        let mut head = Head::EMPTY;
        // RFC 8656 §12.5: a channel MUST be used where there is one.
        let padding = match allocation.channels.by_peer(from, now.mono) {
            Some(channel) => {
                let Ok(len) = u16::try_from(packet.len()) else {
                    return Verdict::Drop(DropReason::TooLong);
                };
                head.bytes[..ChannelData::HEADER].copy_from_slice(&ChannelData::header(channel.number, len));
                head.len = ChannelData::HEADER as u8;
                if stream { padding } else { 0 }
            }
            None => {
                let mut id = TransactionId::default();
                self.rng.fill_bytes(&mut id.0);
                let mut writer = MessageWriter::new(&mut head.bytes, Class::Indication, Method::Data, id);
                writer.attribute(&XorPeerAddress(from.socket_addr()));
                let Ok(len) = writer.finish_before_data(packet.len()) else {
                    return Verdict::Drop(DropReason::TooLong);
                };
                // At most Head::MAX.
                head.len = len as u8;
                padding
            }
        };
        if !stream && usize::from(head.len) + packet.len() + padding > max_datagram(to.client) {
            return Verdict::Drop(DropReason::TooLong);
        }
        let (path, account) = (allocation.path(), allocation.account);
        if let Err(reason) = self.admit(slot, Direction::ToClient, now, packet.len()) {
            return Verdict::Drop(reason);
        }
        Verdict::Send {
            out: Out::Client { to, path },
            head,
            payload: 0..packet.len(),
            padding: padding as u8,
            // RFC 8656 §16: on a stream the connection's own.
            ip: if stream { IpMeta::default() } else { ip },
            account,
        }
    }
}

#[cfg(test)]
#[path = "bandwidth_tests.rs"]
mod bandwidth;

#[cfg(test)]
mod tests {
    use super::super::lab::{Lab, addr, ip};
    use super::*;
    use crate::wire::Message;
    use crate::wire::attribute::Data;
    use crate::{ConnectionId, MemberId, Path, Transport, WorkerId};

    #[test]
    fn data_indication_without_a_channel() {
        // RFC 8656 §11.3.
        let mut lab = Lab::allocated();
        lab.permit("192.0.2.1");
        for payload in [&b""[..], b"1", b"12", b"123", b"1234"] {
            let sent = lab.peer_packet("192.0.2.1:9", payload).sent().expect("permitted");
            let message = Message::parse(&sent.bytes).expect("a whole message");
            assert_eq!((message.class(), message.method()), (Class::Indication, Method::Data));
            assert_eq!(message.attribute(), Ok(Some(XorPeerAddress(addr("192.0.2.1:9")))));
            assert_eq!(message.attribute(), Ok(Some(Data(payload))));
            let (to, path) = (lab.from, lab.path);
            assert_eq!(sent.out, Out::Client { to, path });
        }
        // Transaction ids differ.
        let mut id = || lab.peer_packet("192.0.2.1:9", b"x").sent().expect("permitted").bytes[8..20].to_vec();
        assert_ne!(id(), id());
    }

    #[test]
    fn channel_data_with_one() {
        // RFC 8656 §12.5: padded on streams only.
        for (stream, expected) in [(false, &b"\x40\0\0\x05hello"[..]), (true, b"\x40\0\0\x05hello\0\0\0")] {
            let mut lab = Lab::new();
            if stream {
                lab.from.transport = Transport::Tcp;
                lab.path = Path::Connection(ConnectionId(1));
            }
            assert_eq!(lab.allocate(), 0);
            assert_eq!(lab.bind(0x4000, "192.0.2.1:9"), 0);
            let sent = lab.peer_packet("192.0.2.1:9", b"hello").sent().expect("permitted");
            assert_eq!(sent.bytes, expected);
            // Another port of the peer: permitted, no channel.
            let sent = lab.peer_packet("192.0.2.1:10", b"hello").sent().expect("permitted");
            assert_eq!(sent.bytes[..2], [0x00, 0x17]);
            assert_eq!(sent.bytes.len() % 4, 0);
        }
    }

    #[test]
    fn ipv6_peers_fit_the_head() {
        let mut lab = Lab::allocated_v6();
        lab.permit("2001:db8::1");
        let sent = lab.peer_packet("[2001:db8::1]:9", b"hello").sent().expect("permitted");
        let message = Message::parse(&sent.bytes).expect("a whole message");
        assert_eq!(message.attribute(), Ok(Some(XorPeerAddress(addr("[2001:db8::1]:9")))));
        assert_eq!(message.attribute(), Ok(Some(Data(b"hello"))));
    }

    #[test]
    fn strangers_are_dropped() {
        let mut lab = Lab::allocated();
        lab.permit("192.0.2.1");
        assert_eq!(lab.peer_packet("192.0.2.2:9", b"x").dropped(), Some(DropReason::NoPermission));
        let nobody = RelayedAddr { bound: addr("10.0.0.5:1"), advertised: addr("198.51.100.7:1") };
        assert_eq!(lab.at_relayed(nobody, "192.0.2.1:9", b"x").dropped(), Some(DropReason::NoAllocation));
    }

    #[test]
    fn ip_header_fields() {
        // RFC 8656 §14: copied between datagrams; §15: no ECN from a stream; §16: the stream's own towards it.
        let marked = IpMeta { dscp_ecn: 0b1011_1010, ..IpMeta::default() };
        for (stream, to_peer, to_client) in [(false, 0b1011_1010, 0b1011_1010), (true, 0b1011_1000, 0)] {
            let mut lab = Lab::new();
            lab.ip = marked;
            if stream {
                lab.from.transport = Transport::Tcp;
                lab.path = Path::Connection(ConnectionId(1));
            }
            assert_eq!(lab.allocate(), 0);
            assert_eq!(lab.bind(0x4000, "192.0.2.1:9"), 0);
            let sent = lab.channel_data(0x4000, b"x").sent().expect("bound");
            assert_eq!(sent.ip.dscp_ecn, to_peer);
            let sent = lab.peer_packet("192.0.2.1:9", b"x").sent().expect("permitted");
            assert_eq!(sent.ip.dscp_ecn, to_client);
        }
    }

    #[test]
    fn routes() {
        let mut lab = Lab::allocated();
        lab.configure(|settings| settings.policy.members.push(ip("10.0.0.6")));
        let (via, to) = (lab.relayed(), PeerAddr::new(addr("10.0.0.6:50001")));
        let (worker, member) = (WorkerId(3), MemberId(4));
        assert_eq!(lab.bind(0x4000, "10.0.0.6:50001"), 0);
        let cases = [
            (Route::Internet, Out::Peer { via, to }),
            (Route::Worker(worker), Out::Worker { worker, via, to }),
            (Route::Member(member), Out::Member { member, via, to }),
        ];
        for (route, expected) in cases {
            lab.host.set_route("10.0.0.6:50001", route);
            let sent = lab.channel_data(0x4000, b"x").sent().expect("reachable");
            assert_eq!(sent.out, expected);
        }
        // abuse.md A: members' other ports never.
        lab.host.set_route("10.0.0.6:50001", Route::Nobody);
        assert_eq!(lab.channel_data(0x4000, b"x").dropped(), Some(DropReason::NobodyThere));
    }

    #[test]
    fn an_allocation_bound_to_itself_echoes_once() {
        // abuse.md A: loops.
        let mut lab = Lab::allocated();
        lab.configure(|settings| settings.policy.members.push(ip("198.51.100.7")));
        let own = lab.relayed().advertised.to_string();
        lab.host.set_route(&own, Route::Worker(WorkerId(0)));
        assert_eq!(lab.bind(0x4000, &own), 0);
        let sent = lab.channel_data(0x4000, b"ping").sent().expect("bound");
        let Out::Worker { via, to, .. } = sent.out else { panic!("{:?}", sent.out) };
        assert_eq!(to.socket_addr(), lab.relayed().advertised);
        // The worker hands it in at `to` as from `via`: it ends at the client.
        let echoed = lab.at_relayed(lab.relayed(), &via.advertised.to_string(), &sent.bytes);
        let sent = echoed.sent().expect("permitted");
        assert!(matches!(sent.out, Out::Client { .. }));
        assert_eq!(sent.bytes, b"\x40\0\0\x04ping");
    }

    #[test]
    fn what_the_next_hop_cannot_carry() {
        let mut lab = Lab::allocated();
        lab.permit("192.0.2.1");
        let fits = vec![7; 65_507 - 36 - 3];
        assert_eq!(lab.peer_packet("192.0.2.1:9", &fits).dropped(), None);
        let longest = vec![7; 65_507];
        assert_eq!(lab.peer_packet("192.0.2.1:9", &longest).dropped(), Some(DropReason::TooLong));
        assert_eq!(lab.bind(0x4000, "192.0.2.1:9"), 0);
        assert_eq!(lab.peer_packet("192.0.2.1:9", &longest).dropped(), Some(DropReason::TooLong));
        assert_eq!(lab.peer_packet("192.0.2.1:9", &longest[4..]).dropped(), None);
        assert_eq!(lab.peer_packet("192.0.2.1:9", &vec![7; 70_000]).dropped(), Some(DropReason::TooLong));
        let frame = [&[0x40, 0, 0xFF, 0xFF], &vec![7; 65_535][..]].concat();
        assert_eq!(lab.client_packet(&frame).dropped(), Some(DropReason::TooLong));
    }
}
