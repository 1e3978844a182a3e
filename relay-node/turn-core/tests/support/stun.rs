//! STUN by the letter of RFC 8489 §5 and §14, written apart from `turn_core::wire` so that the two check each other:
//! bytes in a `Vec`, attributes in a list, nothing clever.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use hmac::{Hmac, KeyInit, Mac};
use md5::{Digest, Md5};
use sha1::Sha1;
use sha2::Sha256;

pub const COOKIE: [u8; 4] = [0x21, 0x12, 0xA4, 0x42];

pub const BINDING: u16 = 0x001;
pub const ALLOCATE: u16 = 0x003;
pub const REFRESH: u16 = 0x004;
pub const SEND: u16 = 0x006;
pub const DATA_METHOD: u16 = 0x007;
pub const CREATE_PERMISSION: u16 = 0x008;
pub const CHANNEL_BIND: u16 = 0x009;
pub const CONNECT: u16 = 0x00A;
pub const CONNECTION_BIND: u16 = 0x00B;
pub const CONNECTION_ATTEMPT: u16 = 0x00C;

pub const MAPPED_ADDRESS: u16 = 0x0001;
pub const CHANGE_REQUEST: u16 = 0x0003;
pub const USERNAME: u16 = 0x0006;
pub const MESSAGE_INTEGRITY: u16 = 0x0008;
pub const ERROR_CODE: u16 = 0x0009;
pub const UNKNOWN_ATTRIBUTES: u16 = 0x000A;
pub const CHANNEL_NUMBER: u16 = 0x000C;
pub const LIFETIME: u16 = 0x000D;
pub const XOR_PEER_ADDRESS: u16 = 0x0012;
pub const DATA: u16 = 0x0013;
pub const REALM: u16 = 0x0014;
pub const NONCE: u16 = 0x0015;
pub const XOR_RELAYED_ADDRESS: u16 = 0x0016;
pub const REQUESTED_ADDRESS_FAMILY: u16 = 0x0017;
pub const EVEN_PORT: u16 = 0x0018;
pub const REQUESTED_TRANSPORT: u16 = 0x0019;
pub const DONT_FRAGMENT: u16 = 0x001A;
pub const ACCESS_TOKEN: u16 = 0x001B;
pub const MESSAGE_INTEGRITY_SHA256: u16 = 0x001C;
pub const PASSWORD_ALGORITHM: u16 = 0x001D;
pub const USERHASH: u16 = 0x001E;
pub const XOR_MAPPED_ADDRESS: u16 = 0x0020;
pub const RESERVATION_TOKEN: u16 = 0x0022;
pub const PADDING: u16 = 0x0026;
pub const RESPONSE_PORT: u16 = 0x0027;
pub const CONNECTION_ID: u16 = 0x002A;
pub const ADDITIONAL_ADDRESS_FAMILY: u16 = 0x8000;
pub const ADDRESS_ERROR_CODE: u16 = 0x8001;
pub const PASSWORD_ALGORITHMS: u16 = 0x8002;
pub const ICMP: u16 = 0x8004;
pub const SOFTWARE: u16 = 0x8022;
pub const ALTERNATE_SERVER: u16 = 0x8023;
pub const FINGERPRINT: u16 = 0x8028;
pub const RESPONSE_ORIGIN: u16 = 0x802B;
pub const OTHER_ADDRESS: u16 = 0x802C;
pub const THIRD_PARTY_AUTHORIZATION: u16 = 0x802E;
pub const MOBILITY_TICKET: u16 = 0x8030;

/// RFC 8489 §5: 0b00, 0b01, 0b10, 0b11.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Class {
    Request,
    Indication,
    Success,
    Error,
}

/// RFC 8489 §5, Figure 3, bit by bit: M11..M7 C1 M6..M4 C0 M3..M0.
pub fn message_type(class: Class, method: u16) -> u16 {
    let (c1, c0) = match class {
        Class::Request => (0, 0),
        Class::Indication => (0, 1),
        Class::Success => (1, 0),
        Class::Error => (1, 1),
    };
    let bit = |number: u16| (method >> number) & 1;
    let bits =
        [bit(11), bit(10), bit(9), bit(8), bit(7), c1, bit(6), bit(5), bit(4), c0, bit(3), bit(2), bit(1), bit(0)];
    bits.iter().fold(0, |value, bit| value << 1 | bit)
}

/// An attribute to be written: its value may depend on the transaction.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Item {
    Raw(u16, Vec<u8>),
    Xor(u16, SocketAddr),
}

pub fn raw(kind: u16, value: &[u8]) -> Item {
    Item::Raw(kind, value.to_vec())
}

pub fn peer(address: SocketAddr) -> Item {
    Item::Xor(XOR_PEER_ADDRESS, address)
}

pub fn transport(protocol: u8) -> Item {
    raw(REQUESTED_TRANSPORT, &[protocol, 0, 0, 0])
}

pub fn lifetime(seconds: u32) -> Item {
    raw(LIFETIME, &seconds.to_be_bytes())
}

pub fn channel(number: u16) -> Item {
    let [high, low] = number.to_be_bytes();
    raw(CHANNEL_NUMBER, &[high, low, 0, 0])
}

pub fn data(bytes: &[u8]) -> Item {
    raw(DATA, bytes)
}

pub fn family(number: u8) -> Item {
    raw(REQUESTED_ADDRESS_FAMILY, &[number, 0, 0, 0])
}

pub fn additional(number: u8) -> Item {
    raw(ADDITIONAL_ADDRESS_FAMILY, &[number, 0, 0, 0])
}

pub fn even_port(reserve: bool) -> Item {
    raw(EVEN_PORT, &[if reserve { 0x80 } else { 0 }])
}

pub fn token(token: [u8; 8]) -> Item {
    raw(RESERVATION_TOKEN, &token)
}

/// A message while it is written.
#[derive(Clone, Debug)]
pub struct Builder {
    bytes: Vec<u8>,
    transaction: [u8; 12],
}

impl Builder {
    pub fn new(class: Class, method: u16, transaction: [u8; 12]) -> Self {
        let mut bytes = message_type(class, method).to_be_bytes().to_vec();
        bytes.extend([0, 0]);
        bytes.extend(COOKIE);
        bytes.extend(transaction);
        Self { bytes, transaction }
    }

    pub fn item(self, item: &Item) -> Self {
        match item {
            Item::Raw(kind, value) => self.attribute(*kind, value),
            Item::Xor(kind, address) => {
                let value = xor_address(*address, self.transaction);
                self.attribute(*kind, &value)
            }
        }
    }

    pub fn items(self, items: &[Item]) -> Self {
        items.iter().fold(self, Self::item)
    }

    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        self.bytes.extend(kind.to_be_bytes());
        self.bytes.extend((value.len() as u16).to_be_bytes());
        self.bytes.extend(value);
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
        self.set_length(self.bytes.len() - 20);
        self
    }

    /// RFC 8489 §14.5: HMAC-SHA1 over the message before it, its length as if it ended behind the attribute.
    pub fn integrity(mut self, key: &[u8]) -> Self {
        self.set_length(self.bytes.len() - 20 + 24);
        let mac = hmac_sha1(key, &self.bytes);
        self.attribute(MESSAGE_INTEGRITY, &mac)
    }

    /// RFC 8489 §14.6.
    pub fn integrity_sha256(mut self, key: &[u8]) -> Self {
        self.set_length(self.bytes.len() - 20 + 36);
        let mac = hmac_sha256(key, &self.bytes);
        self.attribute(MESSAGE_INTEGRITY_SHA256, &mac)
    }

    /// RFC 8489 §14.7.
    pub fn fingerprint(mut self) -> Self {
        self.set_length(self.bytes.len() - 20 + 8);
        let crc = crc32fast::hash(&self.bytes) ^ 0x5354_554E;
        self.attribute(FINGERPRINT, &crc.to_be_bytes())
    }

    pub fn bytes(self) -> Vec<u8> {
        self.bytes
    }

    fn set_length(&mut self, length: usize) {
        self.bytes[2..4].copy_from_slice(&(length as u16).to_be_bytes());
    }
}

pub fn hmac_sha1(key: &[u8], bytes: &[u8]) -> Vec<u8> {
    let mut mac = Hmac::<Sha1>::new_from_slice(key).expect("any length");
    mac.update(bytes);
    mac.finalize().into_bytes().to_vec()
}

pub fn hmac_sha256(key: &[u8], bytes: &[u8]) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("any length");
    mac.update(bytes);
    mac.finalize().into_bytes().to_vec()
}

/// RFC 8489 §9.2.2: MD5 of user, realm and password with colons between them.
pub fn md5_key(user: &[u8], realm: &[u8], password: &[u8]) -> Vec<u8> {
    Md5::digest([user, b":", realm, b":", password].concat()).to_vec()
}

/// RFC 8489 §18.5.1.2: the same under SHA-256.
pub fn sha256_key(user: &[u8], realm: &[u8], password: &[u8]) -> Vec<u8> {
    Sha256::digest([user, b":", realm, b":", password].concat()).to_vec()
}

/// RFC 8489 §14.4.
pub fn userhash(user: &[u8], realm: &[u8]) -> Vec<u8> {
    Sha256::digest([user, b":", realm].concat()).to_vec()
}

/// RFC 8489 §14.2: XORed with cookie and transaction id.
pub fn xor_address(address: SocketAddr, transaction: [u8; 12]) -> Vec<u8> {
    let mask: Vec<u8> = [&COOKIE[..], &transaction[..]].concat();
    let (number, octets) = match address.ip() {
        IpAddr::V4(ip) => (1, ip.octets().to_vec()),
        IpAddr::V6(ip) => (2, ip.octets().to_vec()),
    };
    let port = address.port() ^ 0x2112;
    let mut value = vec![0, number];
    value.extend(port.to_be_bytes());
    value.extend(octets.iter().zip(&mask).map(|(octet, mask)| octet ^ mask));
    value
}

/// RFC 8489 §14.1: as it is.
pub fn address(address: SocketAddr) -> Vec<u8> {
    let (number, octets) = match address.ip() {
        IpAddr::V4(ip) => (1, ip.octets().to_vec()),
        IpAddr::V6(ip) => (2, ip.octets().to_vec()),
    };
    [&[0, number][..], &address.port().to_be_bytes(), &octets].concat()
}

/// The reverse of [`xor_address`].
pub fn read_xor_address(value: &[u8], transaction: [u8; 12]) -> Option<SocketAddr> {
    let mask: Vec<u8> = [&COOKIE[..], &transaction[..]].concat();
    let port = u16::from_be_bytes([*value.get(2)?, *value.get(3)?]) ^ 0x2112;
    let octets: Vec<u8> = value[4..].iter().zip(&mask).map(|(octet, mask)| octet ^ mask).collect();
    let ip = match (value[1], value.len()) {
        (1, 8) => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(octets).ok()?)),
        (2, 20) => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(octets).ok()?)),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// A message as it was read: every attribute in order.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Read {
    pub class: Class,
    pub method: u16,
    pub transaction: [u8; 12],
    pub attributes: Vec<(u16, Vec<u8>)>,
    pub bytes: Vec<u8>,
}

impl Read {
    /// Reads what must be well-formed, down to zero bits in the padding (RFC 8489 §14).
    ///
    /// # Panics
    /// If it is not.
    pub fn new(bytes: &[u8]) -> Self {
        assert!(bytes.len() >= 20, "a whole header");
        assert_eq!(bytes[0] & 0xC0, 0, "RFC 8489 §5: the two most significant bits are zero");
        assert_eq!(bytes[4..8], COOKIE, "RFC 8489 §5: the magic cookie");
        let length = usize::from(u16::from_be_bytes([bytes[2], bytes[3]]));
        assert_eq!(length, bytes.len() - 20, "RFC 8489 §5: the length is that of the message without its header");
        assert_eq!(length % 4, 0, "RFC 8489 §5: a multiple of 4");
        let number = u16::from_be_bytes([bytes[0], bytes[1]]);
        let (class, method) = [Class::Request, Class::Indication, Class::Success, Class::Error]
            .into_iter()
            .find_map(|class| {
                (0..0x1000).find(|method| message_type(class, *method) == number).map(|method| (class, method))
            })
            .expect("14 bits are a class and a method");
        let transaction = bytes[8..20].try_into().expect("12 bytes");
        let mut attributes = Vec::new();
        let mut rest = &bytes[20..];
        while !rest.is_empty() {
            let kind = u16::from_be_bytes([rest[0], rest[1]]);
            let length = usize::from(u16::from_be_bytes([rest[2], rest[3]]));
            let end = 4 + length.next_multiple_of(4);
            assert!(rest[4 + length..end].iter().all(|byte| *byte == 0), "RFC 8489 §14: padding is zero");
            attributes.push((kind, rest[4..4 + length].to_vec()));
            rest = &rest[end..];
        }
        Self { class, method, transaction, attributes, bytes: bytes.to_vec() }
    }

    pub fn has(&self, kind: u16) -> bool {
        self.find(kind).is_some()
    }

    /// The first of a type.
    pub fn find(&self, kind: u16) -> Option<&[u8]> {
        self.attributes.iter().find(|(found, _)| *found == kind).map(|(_, value)| &value[..])
    }

    pub fn all(&self, kind: u16) -> Vec<&[u8]> {
        self.attributes.iter().filter(|(found, _)| *found == kind).map(|(_, value)| &value[..]).collect()
    }

    /// The error code; 0 for success.
    pub fn code(&self) -> u16 {
        match self.class {
            Class::Success => 0,
            Class::Error => {
                let value = self.find(ERROR_CODE).expect("RFC 8489 §6.3.1.1: an error has ERROR-CODE");
                assert!(value[0] == 0 && value[1] == 0 && value[2] & 0xF8 == 0, "RFC 8489 §14.8: reserved bits are 0");
                assert!((3..=6).contains(&value[2]) && value[3] <= 99, "RFC 8489 §14.8: class and number");
                let reason = std::str::from_utf8(&value[4..]).expect("RFC 8489 §14.8: the reason is UTF-8");
                assert!(reason.chars().count() < 128, "RFC 8489 §14.8: the reason has fewer than 128 characters");
                u16::from(value[2]) * 100 + u16::from(value[3])
            }
            class => panic!("{class:?} is no answer"),
        }
    }

    pub fn lifetime(&self) -> Option<u32> {
        self.find(LIFETIME).map(|value| u32::from_be_bytes(value.try_into().expect("4 bytes")))
    }

    pub fn xor_addresses(&self, kind: u16) -> Vec<SocketAddr> {
        let read = |value: &&[u8]| read_xor_address(value, self.transaction).expect("a well-formed address");
        self.all(kind).iter().map(read).collect()
    }

    pub fn xor_address(&self, kind: u16) -> Option<SocketAddr> {
        self.xor_addresses(kind).first().copied()
    }

    /// Whether MESSAGE-INTEGRITY is there and made with this key.
    pub fn signed_with(&self, key: &[u8]) -> bool {
        self.signature(MESSAGE_INTEGRITY, 24).is_some_and(|(value, signed)| value == hmac_sha1(key, &signed))
    }

    /// Whether MESSAGE-INTEGRITY-SHA256 is there and made with this key.
    pub fn signed_sha256_with(&self, key: &[u8]) -> bool {
        self.signature(MESSAGE_INTEGRITY_SHA256, 36).is_some_and(|(value, signed)| value == hmac_sha256(key, &signed))
    }

    fn signature(&self, wanted: u16, length: usize) -> Option<(Vec<u8>, Vec<u8>)> {
        let mut at = 20;
        for (kind, value) in &self.attributes {
            if *kind == wanted {
                let mut signed = self.bytes[..at].to_vec();
                signed[2..4].copy_from_slice(&((at - 20 + length) as u16).to_be_bytes());
                return Some((value.clone(), signed));
            }
            at += 4 + value.len().next_multiple_of(4);
        }
        None
    }

    pub fn unknown_attributes(&self) -> Vec<u16> {
        let value = self.find(UNKNOWN_ATTRIBUTES).unwrap_or_default();
        value.chunks(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect()
    }
}

/// RFC 8656 §12.4, without padding.
pub fn channel_data(number: u16, data: &[u8]) -> Vec<u8> {
    [&number.to_be_bytes()[..], &(data.len() as u16).to_be_bytes()[..], data].concat()
}
