//! ICMP errors for what a relayed address sent (RFC 8656 §11.5): Data indications with an ICMP attribute.

use std::time::{Duration, Instant};

use rand_core::Rng;

use super::{DropReason, Now, Out, Server, Verdict};
use crate::wire::attribute::{Icmp, XorPeerAddress};
use crate::wire::{Class, MessageWriter, Method, TransactionId};
use crate::{Family, FiveTuple, PeerAddr, RelayedAddr};

/// ICMP errors told to a client: so many at once, then one in each interval. Whoever can guess ports may forge them;
/// each becomes a packet to the client that is as large.
const BURST: u32 = 16;
const INTERVAL: Duration = Duration::from_millis(50);

/// How many ICMP errors an allocation was told lately, as the instant up to which they are paid for.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct IcmpBudget(Option<Instant>);

impl IcmpBudget {
    fn take(&mut self, now: Instant) -> bool {
        let start = self.0.map_or(now, |paid| paid.max(now));
        let left = start - now < INTERVAL * BURST;
        if left {
            self.0 = Some(start + INTERVAL);
        }
        left
    }
}

/// RFC 8656 §11.5: destination unreachable and time exceeded; in ICMPv6 packet too big too.
fn is_relayed(family: Family, kind: u8) -> bool {
    match family {
        Family::V4 => matches!(kind, 3 | 11),
        Family::V6 => matches!(kind, 1..=3),
    }
}

/// RFC 8656 §18.13: the MTU of the next hop where type and code carry one, else 0.
fn error_data(family: Family, kind: u8, code: u8, mtu: u32) -> u32 {
    match (family, kind, code) {
        (Family::V4, 3, 4) | (Family::V6, 2, _) => mtu,
        _ => 0,
    }
}

/// DF of what a Send indication with DONT-FRAGMENT becomes. RFC 8656 §13: the attribute is ignored where either side
/// of a UDP-to-UDP relay is IPv6; §15: not where the client comes over a stream.
pub(super) fn honours_dont_fragment(from: &FiveTuple, peer: PeerAddr) -> bool {
    from.transport.is_stream() || from.client.ip().to_canonical().is_ipv4() && peer.ip().is_ipv4()
}

impl Server {
    /// RFC 8656 §11.5: the permission is the one for the peer that the datagram was for, and a Data indication tells of
    /// it even where a channel is bound.
    pub(super) fn on_icmp(
        &mut self,
        now: Now,
        relayed: &RelayedAddr,
        peer: PeerAddr,
        (kind, code): (u8, u8),
        mtu: u32,
    ) -> Verdict {
        let family = relayed.family();
        if !is_relayed(family, kind) || Family::of(peer.ip()) != family {
            return Verdict::Drop(DropReason::Unexpected);
        }
        let Some(slot) = self.table.by_bound(&relayed.bound) else {
            return Verdict::Drop(DropReason::NoAllocation);
        };
        let allocation = self.table.get_mut(slot);
        if allocation.relays().live(family, now.mono).is_none() || allocation.peer_connections().is_some() {
            return Verdict::Drop(DropReason::NoAllocation);
        }
        if !allocation.permissions.allow(peer.ip(), now.mono) {
            return Verdict::Drop(DropReason::NoPermission);
        }
        if !allocation.icmp().take(now.mono) {
            return Verdict::Drop(DropReason::IcmpRate);
        }
        let (to, path) = (allocation.five_tuple(), allocation.path());
        let mut id = TransactionId::default();
        self.rng.fill_bytes(&mut id.0);
        let mut writer = MessageWriter::new(&mut self.reply[..], Class::Indication, Method::Data, id);
        let data = error_data(family, kind, code, mtu);
        writer.attribute(&XorPeerAddress(peer.socket_addr())).attribute(&Icmp { kind, code, data });
        match writer.finish() {
            Ok(len) => {
                self.reply_len = len;
                Verdict::Reply { out: Out::Client { to, path } }
            }
            // 56 bytes at most.
            Err(_) => Verdict::Done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lab::{Lab, addr};
    use super::super::{Input, IpMeta};
    use super::*;
    use crate::wire::attribute::{Data, DontFragment};
    use crate::wire::{AttributeType, Message};
    use crate::{ConnectionId, Path, Transport};

    const V4_PEER: &str = "192.0.2.1:9";
    const V6_PEER: &str = "[2001:db8:1::1]:9";

    fn icmp(lab: &mut Lab, peer: &str, kind: u8, code: u8, mtu: u32) -> Verdict {
        let peer = PeerAddr::new(addr(peer));
        let relayed = if peer.ip().is_ipv4() { lab.relayed() } else { lab.relayed_v6() };
        lab.input(Input::Icmp { relayed, peer, kind, code, mtu })
    }

    /// What the client is told.
    fn told(lab: &mut Lab, peer: &str, kind: u8, code: u8, mtu: u32) -> Option<Icmp> {
        let Verdict::Reply { out } = icmp(lab, peer, kind, code, mtu) else {
            return None;
        };
        let (to, path) = (lab.from, lab.path);
        assert_eq!(out, Out::Client { to, path });
        let message = Message::parse(lab.server.reply()).expect("our own message");
        assert_eq!((message.class(), message.method()), (Class::Indication, Method::Data));
        assert_eq!(message.attribute(), Ok(Some(XorPeerAddress(addr(peer)))));
        // RFC 8656 §11.4: DATA or ICMP.
        assert!(!message.contains(AttributeType::DATA));
        message.attribute().expect("well-formed")
    }

    fn permitted() -> Lab {
        let mut lab = Lab::dual();
        lab.permit("192.0.2.1");
        // A channel makes no difference (RFC 8656 §11.5, §12.7).
        assert_eq!(lab.bind(0x4000, V6_PEER), 0);
        lab.outputs();
        lab
    }

    #[test]
    fn errors_are_told_with_type_code_and_mtu() {
        let cases = [
            (V4_PEER, 3, 3, 1400, Some(0)),
            (V4_PEER, 3, 4, 1400, Some(1400)),
            (V4_PEER, 11, 0, 1400, Some(0)),
            (V4_PEER, 4, 0, 0, None),
            (V4_PEER, 12, 0, 0, None),
            (V4_PEER, 1, 0, 0, None),
            (V6_PEER, 1, 4, 1400, Some(0)),
            (V6_PEER, 2, 0, 1280, Some(1280)),
            (V6_PEER, 3, 0, 1400, Some(0)),
            (V6_PEER, 4, 1, 0, None),
            (V6_PEER, 11, 0, 0, None),
        ];
        for (peer, kind, code, mtu, expected) in cases {
            let mut lab = permitted();
            let told = told(&mut lab, peer, kind, code, mtu);
            assert_eq!(told, expected.map(|data| Icmp { kind, code, data }), "{peer} {kind}/{code}");
            assert!(lab.outputs().is_empty());
        }
    }

    #[test]
    fn only_of_permitted_peers() {
        // RFC 8656 §11.5: addresses, not ports.
        let mut lab = permitted();
        assert!(told(&mut lab, "192.0.2.1:77", 3, 3, 0).is_some());
        assert!(told(&mut lab, "192.0.2.1:0", 3, 3, 0).is_some());
        assert!(matches!(icmp(&mut lab, "192.0.2.2:9", 3, 3, 0), Verdict::Drop(DropReason::NoPermission)));
        lab.pass(300);
        assert!(matches!(icmp(&mut lab, V4_PEER, 3, 3, 0), Verdict::Drop(DropReason::NoPermission)));
        lab.pass(300);
        assert!(matches!(icmp(&mut lab, V4_PEER, 3, 3, 0), Verdict::Drop(DropReason::NoAllocation)));
        let mut lab = Lab::new();
        assert!(matches!(icmp(&mut lab, V4_PEER, 3, 3, 0), Verdict::Drop(DropReason::NoAllocation)));
    }

    #[test]
    fn a_flood_of_them_is_cut() {
        let mut lab = permitted();
        let told_in = |lab: &mut Lab| (0..1000).filter(|_| told(lab, V4_PEER, 3, 3, 0).is_some()).count();
        assert_eq!(told_in(&mut lab), 16);
        assert!(matches!(icmp(&mut lab, V4_PEER, 3, 3, 0), Verdict::Drop(DropReason::IcmpRate)));
        lab.pass(10);
        assert_eq!(told_in(&mut lab), 16, "a burst, whatever the silence before");
        lab.now.mono += Duration::from_millis(100);
        assert_eq!(told_in(&mut lab), 2);
    }

    #[test]
    fn dont_fragment_is_honoured_where_the_rfc_says() {
        // RFC 8656 §14: between IPv4 and IPv4; §13: ignored where IPv6 takes part; §15: over TCP for either.
        let cases = [
            ("203.0.113.9:51234", false, V4_PEER, true),
            ("203.0.113.9:51234", false, V6_PEER, false),
            ("[2001:db8::9]:51234", false, V4_PEER, false),
            ("[::ffff:203.0.113.9]:51234", false, V4_PEER, true),
            ("203.0.113.9:51234", true, V4_PEER, true),
            ("[2001:db8::9]:51234", true, V6_PEER, true),
        ];
        for (client, stream, peer, expected) in cases {
            let mut lab = Lab::new();
            lab.host.ipv6 = true;
            lab.client(addr(client));
            if stream {
                lab.from.transport = Transport::Tcp;
                lab.path = Path::Connection(ConnectionId(1));
            }
            let allocated = lab.request(Method::Allocate, |writer| {
                super::super::lab::udp(writer);
                writer.attribute(&crate::wire::attribute::AdditionalAddressFamily(2));
                // RFC 8656 §7.2, item 4: it is supported.
                writer.attribute(&DontFragment);
            });
            assert_eq!(allocated.code(), 0, "{client}");
            assert_eq!(lab.bind(0x4000, peer), 0);
            for with in [true, false] {
                let sent = lab.indication(Method::Send, |writer| {
                    writer.attribute(&XorPeerAddress(addr(peer))).attribute(&Data(b"x"));
                    if with {
                        writer.attribute(&DontFragment);
                    }
                });
                let sent = sent.sent().expect("permitted");
                assert_eq!(sent.ip, IpMeta { dont_fragment: with && expected, ..IpMeta::default() }, "{client} {peer}");
            }
            assert!(!lab.channel_data(0x4000, b"x").sent().expect("bound").ip.dont_fragment);
        }
    }
}
