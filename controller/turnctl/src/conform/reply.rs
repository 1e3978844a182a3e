//! Messages as they came: every attribute in order, whatever it is.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use turn_core::wire::AttributeType;

use super::craft::{COOKIE, hmac_sha1, hmac_sha256};

/// A STUN message.
#[derive(Clone)]
pub(crate) struct Reply {
    bytes: Vec<u8>,
    /// Type, and where the value stands.
    attributes: Vec<(u16, std::ops::Range<usize>)>,
}

impl Reply {
    /// Reads a message; `None` if it breaks the grammar of RFC 8489 §5 and §14.
    pub(crate) fn parse(bytes: Vec<u8>) -> Option<Self> {
        let header = bytes.first_chunk::<20>()?;
        let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
        if header[0] & 0xC0 != 0 || header[4..8] != COOKIE || len % 4 != 0 || bytes.len() != 20 + len {
            return None;
        }
        let mut attributes = Vec::new();
        let mut at = 20;
        while at < bytes.len() {
            let &[t0, t1, l0, l1] = bytes.get(at..)?.first_chunk()?;
            let start = at + 4;
            let end = start + usize::from(u16::from_be_bytes([l0, l1]));
            at = end.next_multiple_of(4);
            if at > bytes.len() {
                return None;
            }
            attributes.push((u16::from_be_bytes([t0, t1]), start..end));
        }
        Some(Self { bytes, attributes })
    }

    fn kind(&self) -> u16 {
        u16::from_be_bytes([self.bytes[0], self.bytes[1]])
    }

    pub(crate) fn class(&self) -> u16 {
        (self.kind() >> 7) & 2 | (self.kind() >> 4) & 1
    }

    pub(crate) fn method(&self) -> u16 {
        let kind = self.kind();
        (kind & 0x3E00) >> 2 | (kind & 0x00E0) >> 1 | kind & 0x000F
    }

    pub(crate) fn id(&self) -> &[u8] {
        &self.bytes[8..20]
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Value of the first attribute of a type.
    pub(crate) fn get(&self, attribute: AttributeType) -> Option<&[u8]> {
        self.all(attribute).next()
    }

    /// Values of all attributes of a type.
    pub(crate) fn all(&self, attribute: AttributeType) -> impl Iterator<Item = &[u8]> {
        self.attributes
            .iter()
            .filter(move |(found, _)| *found == attribute.0)
            .map(|(_, range)| &self.bytes[range.clone()])
    }

    pub(crate) fn has(&self, attribute: AttributeType) -> bool {
        self.get(attribute).is_some()
    }

    /// Types in order.
    pub(crate) fn types(&self) -> impl Iterator<Item = u16> + '_ {
        self.attributes.iter().map(|(attribute, _)| *attribute)
    }

    pub(crate) fn word(&self, attribute: AttributeType) -> Option<u32> {
        self.get(attribute)?.try_into().ok().map(u32::from_be_bytes)
    }

    /// The error code; 0 in anything but an error response, 999 if there is none where one has to be.
    pub(crate) fn code(&self) -> u16 {
        if self.class() != super::craft::ERROR {
            return 0;
        }
        match self.get(AttributeType::ERROR_CODE).and_then(|value| value.first_chunk::<4>()) {
            Some([_, _, class, number]) => u16::from(class & 7) * 100 + u16::from(*number),
            None => 999,
        }
    }

    /// An address that is XORed with cookie and transaction id.
    pub(crate) fn xor_address(&self, attribute: AttributeType) -> Option<SocketAddr> {
        self.get(attribute).and_then(|value| self.read_address(value, true))
    }

    /// All of these.
    pub(crate) fn xor_addresses(&self, attribute: AttributeType) -> Vec<SocketAddr> {
        self.all(attribute).filter_map(|value| self.read_address(value, true)).collect()
    }

    /// An address as it is.
    pub(crate) fn address(&self, attribute: AttributeType) -> Option<SocketAddr> {
        self.get(attribute).and_then(|value| self.read_address(value, false))
    }

    fn read_address(&self, value: &[u8], xor: bool) -> Option<SocketAddr> {
        let mut value = value.to_vec();
        if xor {
            let mask = &self.bytes[4..20];
            value.get_mut(2..4)?.iter_mut().zip(mask).for_each(|(byte, mask)| *byte ^= mask);
            value.get_mut(4..)?.iter_mut().zip(mask).for_each(|(byte, mask)| *byte ^= mask);
        }
        let port = u16::from_be_bytes([*value.get(2)?, *value.get(3)?]);
        let ip = match (value.get(1)?, value.get(4..)?) {
            (1, ip) => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(ip).ok()?)),
            (2, ip) => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(ip).ok()?)),
            _ => return None,
        };
        Some(SocketAddr::new(ip, port))
    }

    /// Whether MESSAGE-INTEGRITY is there and right.
    pub(crate) fn signed_by(&self, key: &[u8]) -> bool {
        self.signature(AttributeType::MESSAGE_INTEGRITY).is_some_and(|(text, mac)| hmac_sha1(key, &text) == mac)
    }

    /// Whether MESSAGE-INTEGRITY-SHA256 is there, of full length and right.
    pub(crate) fn signed_by_sha256(&self, key: &[u8]) -> bool {
        self.signature(AttributeType::MESSAGE_INTEGRITY_SHA256)
            .is_some_and(|(text, mac)| hmac_sha256(key, &text) == mac)
    }

    /// What an integrity attribute covers, with the length RFC 8489 §14.5 wants, and its value.
    fn signature(&self, attribute: AttributeType) -> Option<(Vec<u8>, &[u8])> {
        let (_, range) = self.attributes.iter().find(|(found, _)| *found == attribute.0)?;
        let mut text = self.bytes[..range.start - 4].to_vec();
        let len = u16::try_from(range.end.next_multiple_of(4) - 20).ok()?;
        text[2..4].copy_from_slice(&len.to_be_bytes());
        Some((text, &self.bytes[range.clone()]))
    }
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let class = ["request", "indication", "success", "error"][usize::from(self.class() & 3)];
        write!(f, "method {:#05x} {class}", self.method())?;
        match self.code() {
            0 => Ok(()),
            code => write!(f, " {code}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::craft::{BINDING, Craft, ERROR};
    use super::*;

    #[test]
    fn reads_what_craft_writes() {
        let peer: SocketAddr = "192.0.2.9:7".parse().expect("literal");
        let bytes = Craft::of(ERROR, BINDING)
            .attr(AttributeType::ERROR_CODE, b"\0\0\x04\x14Unknown")
            .peer(peer)
            .integrity(b"key")
            .integrity_sha256(b"key", 32)
            .fingerprint()
            .into_bytes();
        let reply = Reply::parse(bytes.clone()).expect("a message");
        assert_eq!((reply.class(), reply.method(), reply.code()), (ERROR, BINDING, 420));
        assert_eq!(reply.xor_address(AttributeType::XOR_PEER_ADDRESS), Some(peer));
        assert!(reply.signed_by(b"key") && reply.signed_by_sha256(b"key"));
        assert!(!reply.signed_by(b"other") && !reply.signed_by_sha256(b"other"));
        assert!(Reply::parse(bytes[..bytes.len() - 4].to_vec()).is_none());
    }
}
