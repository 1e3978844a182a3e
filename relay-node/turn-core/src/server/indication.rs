//! Indications (RFC 8656 §11): Send. They are never authenticated and never answered.

use super::icmp::honours_dont_fragment;

use super::{DropReason, Host, IpMeta, Now, Server, Verdict};
use crate::wire::attribute::XorPeerAddress;
use crate::wire::{AttributeType, Message};
use crate::{Family, FiveTuple, PeerAddr};

impl Server {
    /// RFC 8656 §11.2.
    pub(super) fn on_send(
        &mut self,
        now: Now,
        from: &FiveTuple,
        message: &Message<'_>,
        ip: IpMeta,
        host: &impl Host,
    ) -> Verdict {
        if !message.unknown_attributes(self.declined()).is_empty() {
            return Verdict::Drop(DropReason::Unexpected);
        }
        let (Ok(Some(XorPeerAddress(address))), Some(data)) = (message.attribute(), message.range(AttributeType::DATA))
        else {
            return Verdict::Drop(DropReason::Malformed);
        };
        let Some(slot) = self.live(now, from) else {
            return Verdict::Drop(DropReason::NoAllocation);
        };
        self.heard_from(now, slot, from);
        let allocation = self.table.get(slot);
        // RFC 6062 §4.5: data of a TCP allocation goes by its data connections.
        if allocation.peer_connections().is_some() {
            return Verdict::Drop(DropReason::Unexpected);
        }
        // As written, not canonical: an IPv4-mapped address is of no IPv4 allocation's family and in no policy.
        if allocation.relays().of(Family::of(address.ip())).is_none() {
            return Verdict::Drop(DropReason::FamilyMismatch);
        }
        let peer = PeerAddr::new(address);
        if self.settings.policy.check_ip(address.ip()).is_err() || self.settings.policy.check(peer).is_err() {
            return Verdict::Drop(DropReason::ForbiddenPeer);
        }
        if !allocation.permissions.allow(peer.ip(), now.mono) {
            return Verdict::Drop(DropReason::NoPermission);
        }
        let dont_fragment = message.contains(AttributeType::DONT_FRAGMENT) && honours_dont_fragment(from, peer);
        self.relay_to_peer(now, slot, peer, data, IpMeta { dont_fragment, ..ip }, host)
    }
}

#[cfg(test)]
mod tests {
    use super::super::lab::{Lab, addr};
    use super::*;
    use crate::Out;
    use crate::wire::attribute::Data;
    use crate::wire::{MessageWriter, Method};

    fn send(peer: &str, data: &'static [u8]) -> impl Fn(&mut MessageWriter<'_>) {
        let peer = XorPeerAddress(addr(peer));
        move |writer| {
            writer.attribute(&peer).attribute(&Data(data));
        }
    }

    #[test]
    fn goes_to_permitted_peers_at_any_port() {
        let mut lab = Lab::allocated();
        lab.permit("192.0.2.1");
        for (peer, data) in [("192.0.2.1:9", &b"hello"[..]), ("192.0.2.1:65535", b"12345678"), ("192.0.2.1:1", b"")] {
            let sent = lab.indication(Method::Send, send(peer, data)).sent().expect(peer);
            assert_eq!(sent.bytes, data);
            let Out::Peer { via, to } = sent.out else { panic!("{peer}") };
            assert_eq!((via, to.socket_addr()), (lab.relayed(), addr(peer)));
        }
    }

    #[test]
    fn what_is_discarded() {
        // RFC 8656 §11.2.
        type Case = (&'static str, fn(&mut MessageWriter<'_>), DropReason);
        let cases: &[Case] = &[
            ("no attributes", |_| {}, DropReason::Malformed),
            ("no peer", |w| w.raw(0x0013, b"x"), DropReason::Malformed),
            (
                "no data",
                |w| {
                    w.attribute(&XorPeerAddress(addr("192.0.2.1:9")));
                },
                DropReason::Malformed,
            ),
            (
                "empty peer",
                |w| {
                    w.raw(0x0012, &[]);
                    w.raw(0x0013, b"x");
                },
                DropReason::Malformed,
            ),
            ("no permission", |w| send("192.0.2.2:9", b"x")(w), DropReason::NoPermission),
            ("other family", |w| send("[2001:db8::1]:9", b"x")(w), DropReason::FamilyMismatch),
            ("IPv4-mapped", |w| send("[::ffff:192.0.2.1]:9", b"x")(w), DropReason::FamilyMismatch),
            ("private", |w| send("10.0.0.1:9", b"x")(w), DropReason::ForbiddenPeer),
            ("port 0", |w| send("192.0.2.1:0", b"x")(w), DropReason::ForbiddenPeer),
            (
                "unknown, required",
                |w| {
                    w.raw(0x7FFF, &[]);
                    send("192.0.2.1:9", b"x")(w);
                },
                DropReason::Unexpected,
            ),
        ];
        for (what, write, expected) in cases {
            let mut lab = Lab::allocated();
            lab.permit("192.0.2.1");
            assert_eq!(lab.indication(Method::Send, write).dropped(), Some(*expected), "{what}");
        }
        let mut lab = Lab::new();
        let dropped = lab.indication(Method::Send, send("192.0.2.1:9", b"x")).dropped();
        assert_eq!(dropped, Some(DropReason::NoAllocation));
    }

    #[test]
    fn never_refreshes_a_permission() {
        // RFC 8656 §11.2.
        let mut lab = Lab::allocated();
        lab.permit("192.0.2.1");
        lab.pass(299);
        assert_eq!(lab.indication(Method::Send, send("192.0.2.1:9", b"x")).dropped(), None);
        lab.pass(1);
        let dropped = lab.indication(Method::Send, send("192.0.2.1:9", b"x")).dropped();
        assert_eq!(dropped, Some(DropReason::NoPermission));
    }
}
