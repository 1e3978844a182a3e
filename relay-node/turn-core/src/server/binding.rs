//! Binding (RFC 8489 §6.3.1.1): unauthenticated, and as small as can be (abuse.md D).

use std::net::SocketAddr;

use super::reply::Request;
use super::{DropReason, Server, Verdict};
use crate::wire::Class;
use crate::wire::attribute::XorMappedAddress;

/// The client's address for XOR-MAPPED-ADDRESS: as IPv4 also where an IPv6 socket took it in.
pub(super) fn mapped(client: SocketAddr) -> XorMappedAddress {
    XorMappedAddress(SocketAddr::new(client.ip().to_canonical(), client.port()))
}

impl Server {
    /// Tells a client its address.
    pub(super) fn binding(&mut self, request: &Request<'_>) -> Verdict {
        // RFC 8489 §9.2.4 asks nobody who it is here; whoever holds an allocation has said so.
        if self.table.by_five_tuple(&request.from).is_none() && !self.admit_stranger(request) {
            return Verdict::Drop(DropReason::TooManyStrangers);
        }
        if let Some(answer) = self.discover(request).or_else(|| self.refuse_unknown(request, None)) {
            return answer;
        }
        self.reply_with(request, Class::Success, None, |writer| {
            writer.attribute(&mapped(request.from.client));
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::lab::{Lab, addr};
    use super::*;
    use crate::wire::attribute::Software;
    use crate::wire::{AttributeType, Method, UnknownAttributes};

    #[test]
    fn answers_with_the_address_and_nothing_else() {
        let cases = [
            ("203.0.113.9:51234", "203.0.113.9:51234", 32),
            ("[2001:db8::9]:51234", "[2001:db8::9]:51234", 44),
            ("[::ffff:203.0.113.9]:51234", "203.0.113.9:51234", 32),
        ];
        for (client, expected, len) in cases {
            let mut lab = Lab::new();
            lab.client(addr(client));
            let reply = lab.unsigned(Method::Binding, |writer| {
                writer.attribute(&Software(b"client"));
            });
            let message = reply.message();
            assert_eq!(message.attribute(), Ok(Some(XorMappedAddress(addr(expected)))));
            assert_eq!(reply.bytes.len(), len);
        }
    }

    #[test]
    fn what_would_amplify_is_unknown() {
        // abuse.md D: CHANGE-REQUEST, PADDING, RESPONSE-PORT.
        for (attribute, value) in [(0x0003, &[0; 4][..]), (0x0026, &[0; 500]), (0x0027, &[0; 4]), (0x7FFF, &[])] {
            let mut lab = Lab::new();
            let packet = lab.packet(None, Method::Binding, |writer| writer.raw(attribute, value));
            let reply = lab.unsigned(Method::Binding, |writer| writer.raw(attribute, value));
            assert_eq!(reply.code(), 420);
            let Ok(Some(unknown)) = reply.message().attribute::<UnknownAttributes>() else {
                panic!("no UNKNOWN-ATTRIBUTES")
            };
            assert_eq!(unknown.iter().collect::<Vec<_>>(), [AttributeType(attribute)]);
            assert!(reply.bytes.len() + 28 <= 3 * (packet.len() + 28));
        }
    }

    #[test]
    fn grammar_gets_silence() {
        // abuse.md B.
        let lab = Lab::new();
        let right = lab.packet(None, Method::Binding, |_| {});
        let changed = |byte: usize, value: u8| {
            let mut packet = right.clone();
            packet[byte] = value;
            packet
        };
        let fingerprinted = {
            let mut packet = lab.packet(None, Method::Binding, |writer| {
                writer.fingerprint();
            });
            let last = packet.len() - 1;
            packet[last] ^= 1;
            packet
        };
        let cases: &[(&str, Vec<u8>, DropReason)] = &[
            ("empty", Vec::new(), DropReason::Malformed),
            ("cut", right[..19].to_vec(), DropReason::Malformed),
            ("one byte more", [&right[..], &[0]].concat(), DropReason::Malformed),
            ("wrong cookie", changed(4, 0), DropReason::Malformed),
            ("odd length", changed(3, 1), DropReason::Malformed),
            ("bad FINGERPRINT", fingerprinted, DropReason::Malformed),
            ("RTP", changed(0, 0x80), DropReason::Malformed),
            ("DTLS", changed(0, 22), DropReason::Malformed),
            ("unknown method", changed(1, 2), DropReason::Unexpected),
            ("Send request", changed(1, 6), DropReason::Unexpected),
            ("success response", changed(0, 1), DropReason::Unexpected),
            ("error response", [&[1, 0x11], &right[2..]].concat(), DropReason::Unexpected),
            ("Allocate indication", changed(1, 0x13), DropReason::Unexpected),
            ("Data indication", changed(1, 0x17), DropReason::Unexpected),
        ];
        for (what, packet, expected) in cases {
            let mut lab = Lab::new();
            assert_eq!(lab.client_packet(packet).dropped(), Some(*expected), "{what}");
        }
        // RFC 8489 §6.3.2: a Binding indication keeps NATs open and gets no answer.
        let mut lab = Lab::new();
        assert!(lab.client_packet(&changed(1, 0x11)).is_done());
    }
}
