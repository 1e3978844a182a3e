//! ARP (RFC 826, RFC 5227) and neighbour discovery (RFC 4861) as whole Ethernet frames (pure).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::sys::socket::Instruction;

/// Longest frame worth reading: Ethernet, IPv6, a neighbour message with its options.
pub const LONGEST: usize = 256;

const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;
const ICMPV6: u8 = 58;
const NEIGHBOR_SOLICITATION: u8 = 135;
const NEIGHBOR_ADVERTISEMENT: u8 = 136;
const BROADCAST: Mac = Mac([0xff; 6]);
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// A hardware address.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Somebody says that an address is theirs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Claim {
    /// The address.
    pub address: IpAddr,
    /// Who.
    pub mac: Mac,
}

/// What the socket receives: ARP, neighbour solicitations and advertisements.
pub fn filter() -> Vec<Instruction> {
    let instruction = |code, jump_true, jump_false, operand| Instruction { code, jump_true, jump_false, operand };
    let load_half = |at| instruction(0x28, 0, 0, at);
    let load_byte = |at| instruction(0x30, 0, 0, at);
    let equals = |value: u32, yes, no| instruction(0x15, yes, no, value);
    vec![
        load_half(12),
        equals(ARP.into(), 6, 0),
        equals(IPV6.into(), 0, 6),
        load_byte(20),
        equals(ICMPV6.into(), 0, 4),
        load_byte(54),
        equals(NEIGHBOR_ADVERTISEMENT.into(), 1, 0),
        equals(NEIGHBOR_SOLICITATION.into(), 0, 1),
        instruction(0x06, 0, 0, LONGEST as u32),
        instruction(0x06, 0, 0, 0),
    ]
}

/// Frames that tell the neighbours where an address is now: an ARP announcement (RFC 5227 §3) as request and as reply,
/// because devices differ in which they heed; or an unsolicited neighbour advertisement (RFC 4861 §7.2.6).
pub fn announcements(address: IpAddr, mac: Mac) -> Vec<Vec<u8>> {
    match address {
        IpAddr::V4(ip) => vec![arp(mac, 1, ip, Mac([0; 6]), ip), arp(mac, 2, ip, BROADCAST, ip)],
        IpAddr::V6(ip) => {
            // Override; not a router, not solicited. Then the option of the target's hardware address.
            let mut body = vec![NEIGHBOR_ADVERTISEMENT, 0, 0, 0, 0x20, 0, 0, 0];
            body.extend(ip.octets());
            body.extend([2, 1]);
            body.extend(mac.0);
            vec![icmpv6(mac, ip, ALL_NODES, body)]
        }
    }
}

/// A question that whoever has the address answers, and that claims nothing: an ARP probe (RFC 5227 §2.1.1), or the
/// solicitation of duplicate address detection (RFC 4862 §5.4.2).
pub fn probe(address: IpAddr, mac: Mac) -> Vec<u8> {
    match address {
        IpAddr::V4(ip) => arp(mac, 1, Ipv4Addr::UNSPECIFIED, Mac([0; 6]), ip),
        IpAddr::V6(ip) => {
            let mut body = vec![NEIGHBOR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
            body.extend(ip.octets());
            let [.., x, y, z] = ip.octets();
            let (y, z) = (u16::from(x), u16::from_be_bytes([y, z]));
            // RFC 4291 §2.7.1: the solicited-node address.
            icmpv6(mac, Ipv6Addr::UNSPECIFIED, Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | y, z), body)
        }
    }
}

/// Who claims which address in a frame. Probes claim none.
pub fn claim(frame: &[u8]) -> Option<Claim> {
    let (header, body) = frame.split_first_chunk::<14>()?;
    match u16::from_be_bytes([header[12], header[13]]) {
        ARP => {
            // Ethernet, IPv4, their lengths; request or reply.
            let body = body.first_chunk::<28>()?;
            if body[..6] != [0, 1, 8, 0, 6, 4] || !matches!(body[6..8], [0, 1 | 2]) {
                return None;
            }
            let address = Ipv4Addr::new(body[14], body[15], body[16], body[17]);
            let mac = Mac([body[8], body[9], body[10], body[11], body[12], body[13]]);
            (!address.is_unspecified()).then_some(Claim { address: address.into(), mac })
        }
        IPV6 => {
            let mac = Mac([header[6], header[7], header[8], header[9], header[10], header[11]]);
            let (ip, message) = body.split_first_chunk::<40>()?;
            let message = message.first_chunk::<24>()?;
            let at = |bytes: &[u8]| bytes.first_chunk::<16>().map(|octets| Ipv6Addr::from(*octets));
            // RFC 4861 §7.1: a hop limit of 255 shows that no router has passed it on.
            if ip[6] != ICMPV6 || ip[7] != 255 {
                return None;
            }
            let address = match message[0] {
                NEIGHBOR_ADVERTISEMENT => at(&message[8..]),
                NEIGHBOR_SOLICITATION => at(&ip[8..]),
                _ => None,
            };
            address.filter(|address| !address.is_unspecified()).map(|address| Claim { address: address.into(), mac })
        }
        _ => None,
    }
}

fn arp(mac: Mac, operation: u8, sender: Ipv4Addr, target_mac: Mac, target: Ipv4Addr) -> Vec<u8> {
    let mut frame = ethernet(BROADCAST, mac, ARP);
    frame.extend([0, 1, 8, 0, 6, 4, 0, operation]);
    frame.extend(mac.0);
    frame.extend(sender.octets());
    frame.extend(target_mac.0);
    frame.extend(target.octets());
    // The shortest frame of Ethernet.
    frame.resize(60, 0);
    frame
}

fn icmpv6(mac: Mac, source: Ipv6Addr, destination: Ipv6Addr, mut message: Vec<u8>) -> Vec<u8> {
    let length = message.len() as u16;
    let mut sum: u32 = u32::from(length) + u32::from(ICMPV6);
    for pair in [&source.octets()[..], &destination.octets(), &message].concat().chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    message[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    let [.., a, b, c, d] = destination.octets();
    let mut frame = ethernet(Mac([0x33, 0x33, a, b, c, d]), mac, IPV6);
    frame.extend([0x60, 0, 0, 0]);
    frame.extend(length.to_be_bytes());
    frame.extend([ICMPV6, 255]);
    frame.extend(source.octets());
    frame.extend(destination.octets());
    frame.extend(message);
    frame
}

fn ethernet(to: Mac, from: Mac, kind: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(90);
    frame.extend(to.0);
    frame.extend(from.0);
    frame.extend(kind.to_be_bytes());
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = Mac([2, 0, 0, 0, 0, 7]);
    const V4: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 7));
    const V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0x1234, 0x5678));

    #[test]
    fn rfc5227_an_announcement_claims_and_a_probe_does_not() {
        for address in [V4, V6] {
            let frames = announcements(address, MAC);
            assert!(frames.iter().all(|frame| claim(frame) == Some(Claim { address, mac: MAC })));
            assert_eq!(claim(&probe(address, MAC)), None, "{address}");
        }
        let frame = &announcements(V4, MAC)[0];
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[14..22], [0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!((&frame[28..32], &frame[38..42]), (&[198, 51, 100, 7][..], &[198, 51, 100, 7][..]));
        let frame = probe(V4, MAC);
        assert_eq!((&frame[28..32], &frame[38..42]), (&[0; 4][..], &[198, 51, 100, 7][..]));
    }

    #[test]
    fn rfc4861_section_7_neighbour_messages() {
        let advertisement = &announcements(V6, MAC)[0];
        assert_eq!(advertisement[..6], [0x33, 0x33, 0, 0, 0, 1]);
        assert_eq!((advertisement[54], advertisement[58]), (136, 0x20), "override");
        assert_eq!(advertisement[78..], [2, 1, 2, 0, 0, 0, 0, 7], "the target's hardware address");
        let probe = probe(V6, MAC);
        assert_eq!(probe[..6], [0x33, 0x33, 0xff, 0x34, 0x56, 0x78]);
        for frame in [advertisement, &probe] {
            // RFC 8200 §8.1: the sum over pseudo-header and message, checksum included, is all ones.
            let length = frame.len() - 54;
            let mut words = [&frame[22..54], &frame[54..]].concat();
            words.extend([0, length as u8, 0, 58]);
            let sum: u32 = words.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
            assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
            assert_eq!(frame[21], 255);
        }
        // A host that uses the address in a question claims it too; a router's echo of one does not.
        let mut question = probe;
        question[22..38].copy_from_slice(&"2001:db8::9".parse::<Ipv6Addr>().expect("literal").octets());
        assert_eq!(claim(&question).map(|claim| claim.address), "2001:db8::9".parse().ok());
        question[21] = 64;
        assert_eq!(claim(&question), None);
    }

    #[test]
    fn what_is_no_claim_is_none() {
        let announcement = &announcements(V4, MAC)[0];
        for cut in 0..42 {
            assert_eq!(claim(&announcement[..cut]), None, "cut at {cut}");
        }
        for at in [12, 15, 16, 18, 19, 20] {
            let mut other = announcement.clone();
            other[at] ^= 0x40;
            assert_eq!(claim(&other), None, "byte {at}");
        }
        let advertisement = &announcements(V6, MAC)[0];
        for cut in 0..78 {
            assert_eq!(claim(&advertisement[..cut]), None, "cut at {cut}");
        }
        assert_eq!(MAC.to_string(), "02:00:00:00:00:07");
    }
}
