//! One type per attribute, with the names and numbers of the RFCs.
//!
//! Some are here only to be read and declined: a server that does not offer what they ask for treats them as unknown
//! (see [`crate::wire::Message::unknown_attributes`]).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::message::{MAGIC_COOKIE, TransactionId};

/// Number of an attribute (RFC 8489 §18.3).
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct AttributeType(pub u16);

impl AttributeType {
    /// Whether a receiver that does not know it must not process the message (RFC 8489 §14: below 0x8000).
    pub const fn is_comprehension_required(self) -> bool {
        self.0 < 0x8000
    }
}

/// Names the attributes and numbers the known ones through, so that a reader can note which ones are there.
macro_rules! attribute_types {
    ($($number:literal $name:ident $slot:literal $rfc:literal)*) => {
        impl AttributeType {
            $(#[doc = concat!("`", stringify!($name), "`, ", $rfc, ".")] pub const $name: Self = Self($number);)*

            /// Place of a known attribute: a bit of [`AttributeSet`].
            pub(super) const fn slot(self) -> Option<usize> {
                match self.0 {
                    $($number => Some($slot),)*
                    _ => None,
                }
            }

            /// The known attributes by place.
            #[cfg(test)]
            pub(super) const KNOWN: &[Self] = &[$(Self::$name),*];
        }
    };
}

attribute_types! {
    0x0001 MAPPED_ADDRESS 0 "RFC 8489 §14.1"
    0x0003 CHANGE_REQUEST 1 "RFC 5780 §7.2"
    0x0006 USERNAME 2 "RFC 8489 §14.3"
    0x0008 MESSAGE_INTEGRITY 3 "RFC 8489 §14.5"
    0x0009 ERROR_CODE 4 "RFC 8489 §14.8"
    0x000A UNKNOWN_ATTRIBUTES 5 "RFC 8489 §14.13"
    0x000C CHANNEL_NUMBER 6 "RFC 8656 §18.1"
    0x000D LIFETIME 7 "RFC 8656 §18.2"
    0x0012 XOR_PEER_ADDRESS 8 "RFC 8656 §18.3"
    0x0013 DATA 9 "RFC 8656 §18.4"
    0x0014 REALM 10 "RFC 8489 §14.9"
    0x0015 NONCE 11 "RFC 8489 §14.10"
    0x0016 XOR_RELAYED_ADDRESS 12 "RFC 8656 §18.5"
    0x0017 REQUESTED_ADDRESS_FAMILY 13 "RFC 8656 §18.6"
    0x0018 EVEN_PORT 14 "RFC 8656 §18.7"
    0x0019 REQUESTED_TRANSPORT 15 "RFC 8656 §18.8"
    0x001A DONT_FRAGMENT 16 "RFC 8656 §18.9"
    0x001B ACCESS_TOKEN 17 "RFC 7635 §6.2"
    0x001C MESSAGE_INTEGRITY_SHA256 18 "RFC 8489 §14.6"
    0x001D PASSWORD_ALGORITHM 19 "RFC 8489 §14.12"
    0x001E USERHASH 20 "RFC 8489 §14.4"
    0x0020 XOR_MAPPED_ADDRESS 21 "RFC 8489 §14.2"
    0x0022 RESERVATION_TOKEN 22 "RFC 8656 §18.10"
    0x0026 PADDING 23 "RFC 5780 §7.6"
    0x0027 RESPONSE_PORT 24 "RFC 5780 §7.5"
    0x002A CONNECTION_ID 25 "RFC 6062 §6.2.1"
    0x8000 ADDITIONAL_ADDRESS_FAMILY 26 "RFC 8656 §18.11"
    0x8001 ADDRESS_ERROR_CODE 27 "RFC 8656 §18.12"
    0x8002 PASSWORD_ALGORITHMS 28 "RFC 8489 §14.11"
    0x8003 ALTERNATE_DOMAIN 29 "RFC 8489 §14.16"
    0x8004 ICMP 30 "RFC 8656 §18.13"
    0x8022 SOFTWARE 31 "RFC 8489 §14.14"
    0x8023 ALTERNATE_SERVER 32 "RFC 8489 §14.15"
    0x8028 FINGERPRINT 33 "RFC 8489 §14.7"
    0x802B RESPONSE_ORIGIN 34 "RFC 5780 §7.3"
    0x802C OTHER_ADDRESS 35 "RFC 5780 §7.4"
    0x802E THIRD_PARTY_AUTHORIZATION 36 "RFC 7635 §6.1"
    0x8030 MOBILITY_TICKET 37 "RFC 8016 §3.2"
}

/// A set of known attributes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct AttributeSet(u64);

impl AttributeSet {
    /// The set of these; a type without a name in [`AttributeType`] is left out.
    pub const fn of(types: &[AttributeType]) -> Self {
        let mut bits = 0;
        let mut index = 0;
        while index < types.len() {
            if let Some(slot) = types[index].slot() {
                bits |= 1 << slot;
            }
            index += 1;
        }
        Self(bits)
    }

    /// Whether `attribute` is in it.
    pub const fn contains(self, attribute: AttributeType) -> bool {
        match attribute.slot() {
            Some(slot) => self.contains_slot(slot),
            None => false,
        }
    }

    /// Whether both have an attribute in common.
    pub const fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// What is in this one, in the other or in both.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// What is in this one and not in the other.
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    pub(super) const fn contains_slot(self, slot: usize) -> bool {
        self.0 & (1 << slot) != 0
    }

    pub(super) fn insert_slot(&mut self, slot: usize) {
        self.0 |= 1 << slot;
    }
}

/// An attribute that can be read from a message and written into one.
pub trait Attribute<'a>: Sized {
    /// Its number.
    const TYPE: AttributeType;

    /// Reads a value without its padding; `None` if it is malformed.
    fn decode(value: &'a [u8], transaction_id: &TransactionId) -> Option<Self>;

    /// Length of the value in bytes, without padding.
    fn value_len(&self) -> usize;

    /// Writes the value into exactly [`Attribute::value_len`] bytes.
    fn encode(&self, value: &mut [u8], transaction_id: &TransactionId);
}

/// Attributes whose value is an opaque byte string.
macro_rules! byte_strings {
    ($($(#[$doc:meta])* $name:ident = $type:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        pub struct $name<'a>(pub &'a [u8]);

        impl<'a> Attribute<'a> for $name<'a> {
            const TYPE: AttributeType = AttributeType::$type;

            fn decode(value: &'a [u8], _: &TransactionId) -> Option<Self> {
                Some(Self(value))
            }

            fn value_len(&self) -> usize {
                self.0.len()
            }

            fn encode(&self, value: &mut [u8], _: &TransactionId) {
                value.copy_from_slice(self.0);
            }
        }
    )*};
}

byte_strings! {
    /// USERNAME (RFC 8489 §14.3). Opaque here: the OpaqueString profile is the client's to apply.
    Username = USERNAME;
    /// REALM (RFC 8489 §14.9).
    Realm = REALM;
    /// NONCE (RFC 8489 §14.10).
    Nonce = NONCE;
    /// SOFTWARE (RFC 8489 §14.14).
    Software = SOFTWARE;
    /// DATA (RFC 8656 §18.4): application data; empty is allowed.
    Data = DATA;
    /// PADDING (RFC 5780 §7.6).
    Padding = PADDING;
    /// PASSWORD-ALGORITHM (RFC 8489 §14.12), undivided.
    PasswordAlgorithm = PASSWORD_ALGORITHM;
    /// PASSWORD-ALGORITHMS (RFC 8489 §14.11), undivided.
    PasswordAlgorithms = PASSWORD_ALGORITHMS;
    /// MESSAGE-INTEGRITY-SHA256 (RFC 8489 §14.6), 16..=32 bytes where well-formed.
    MessageIntegritySha256 = MESSAGE_INTEGRITY_SHA256;
    /// ALTERNATE-DOMAIN (RFC 8489 §14.16).
    AlternateDomain = ALTERNATE_DOMAIN;
    /// ACCESS-TOKEN (RFC 7635 §6.2), sealed.
    AccessToken = ACCESS_TOKEN;
    /// THIRD-PARTY-AUTHORIZATION (RFC 7635 §6.1): the authorization server's name.
    ThirdPartyAuthorization = THIRD_PARTY_AUTHORIZATION;
    /// MOBILITY-TICKET (RFC 8016 §3.2); empty in a request for one.
    MobilityTicket = MOBILITY_TICKET;
}

/// Attributes whose value is a fixed number of opaque bytes.
macro_rules! byte_arrays {
    ($($(#[$doc:meta])* $name:ident($len:literal) = $type:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        pub struct $name(pub [u8; $len]);

        impl Attribute<'_> for $name {
            const TYPE: AttributeType = AttributeType::$type;

            fn decode(value: &[u8], _: &TransactionId) -> Option<Self> {
                value.try_into().ok().map(Self)
            }

            fn value_len(&self) -> usize {
                $len
            }

            fn encode(&self, value: &mut [u8], _: &TransactionId) {
                value.copy_from_slice(&self.0);
            }
        }
    )*};
}

byte_arrays! {
    /// USERHASH (RFC 8489 §14.4).
    Userhash(32) = USERHASH;
    /// RESERVATION-TOKEN (RFC 8656 §18.10).
    ReservationToken(8) = RESERVATION_TOKEN;
    /// MESSAGE-INTEGRITY (RFC 8489 §14.5). Write it with [`crate::wire::MessageWriter::integrity`].
    MessageIntegrity(20) = MESSAGE_INTEGRITY;
}

/// Attributes that are a transport address, obfuscated with the cookie and the transaction id or not.
macro_rules! addresses {
    ($($(#[$doc:meta])* $name:ident = $type:ident, $xor:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        pub struct $name(pub SocketAddr);

        impl Attribute<'_> for $name {
            const TYPE: AttributeType = AttributeType::$type;

            fn decode(value: &[u8], transaction_id: &TransactionId) -> Option<Self> {
                decode_address(value, &mask(transaction_id, $xor)).map(Self)
            }

            fn value_len(&self) -> usize {
                if self.0.is_ipv4() { 8 } else { 20 }
            }

            fn encode(&self, value: &mut [u8], transaction_id: &TransactionId) {
                encode_address(self.0, value, &mask(transaction_id, $xor));
            }
        }
    )*};
}

addresses! {
    /// MAPPED-ADDRESS (RFC 8489 §14.1).
    MappedAddress = MAPPED_ADDRESS, false;
    /// XOR-MAPPED-ADDRESS (RFC 8489 §14.2).
    XorMappedAddress = XOR_MAPPED_ADDRESS, true;
    /// XOR-PEER-ADDRESS (RFC 8656 §18.3), as written: not canonical.
    XorPeerAddress = XOR_PEER_ADDRESS, true;
    /// XOR-RELAYED-ADDRESS (RFC 8656 §18.5).
    XorRelayedAddress = XOR_RELAYED_ADDRESS, true;
    /// ALTERNATE-SERVER (RFC 8489 §14.15).
    AlternateServer = ALTERNATE_SERVER, false;
    /// RESPONSE-ORIGIN (RFC 5780 §7.3).
    ResponseOrigin = RESPONSE_ORIGIN, false;
    /// OTHER-ADDRESS (RFC 5780 §7.4).
    OtherAddress = OTHER_ADDRESS, false;
}

/// What addresses are XORed with: magic cookie and transaction id (RFC 8489 §14.2), or nothing.
fn mask(transaction_id: &TransactionId, xor: bool) -> [u8; 16] {
    let mut mask = [0; 16];
    if xor {
        mask[..4].copy_from_slice(&MAGIC_COOKIE);
        mask[4..].copy_from_slice(&transaction_id.0);
    }
    mask
}

fn decode_address(value: &[u8], mask: &[u8; 16]) -> Option<SocketAddr> {
    let [_, family, port @ ..] = value.first_chunk::<4>()?;
    let port = u16::from_be_bytes(*port) ^ u16::from_be_bytes([mask[0], mask[1]]);
    // RFC 8489 §14.1: 32 bits for family 0x01, 128 bits for 0x02.
    let ip = match (*family, &value[4..]) {
        (1, octets) => {
            let octets: [u8; 4] = octets.try_into().ok()?;
            let mask = [mask[0], mask[1], mask[2], mask[3]];
            IpAddr::V4(Ipv4Addr::from_bits(u32::from_be_bytes(octets) ^ u32::from_be_bytes(mask)))
        }
        (2, octets) => {
            let octets: [u8; 16] = octets.try_into().ok()?;
            IpAddr::V6(Ipv6Addr::from_bits(u128::from_be_bytes(octets) ^ u128::from_be_bytes(*mask)))
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

fn encode_address(address: SocketAddr, value: &mut [u8], mask: &[u8; 16]) {
    value[0] = 0;
    value[1] = if address.is_ipv4() { 1 } else { 2 };
    let port = address.port() ^ u16::from_be_bytes([mask[0], mask[1]]);
    value[2..4].copy_from_slice(&port.to_be_bytes());
    match address.ip() {
        IpAddr::V4(ip) => value[4..].copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => value[4..].copy_from_slice(&ip.octets()),
    }
    for (byte, mask) in value[4..].iter_mut().zip(mask) {
        *byte ^= mask;
    }
}

/// Attributes of 4 bytes: how they become a value and back.
macro_rules! words {
    ($($(#[$doc:meta])* $name:ident($field:ty) = $type:ident, |$bytes:ident| $read:expr, |$value:ident| $write:expr;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        pub struct $name(pub $field);

        impl Attribute<'_> for $name {
            const TYPE: AttributeType = AttributeType::$type;

            fn decode(value: &[u8], _: &TransactionId) -> Option<Self> {
                let $bytes: [u8; 4] = value.try_into().ok()?;
                Some(Self($read))
            }

            fn value_len(&self) -> usize {
                4
            }

            fn encode(&self, value: &mut [u8], _: &TransactionId) {
                let $value = self.0;
                value.copy_from_slice(&$write);
            }
        }
    )*};
}

words! {
    /// CHANNEL-NUMBER (RFC 8656 §18.1), any number: see [`crate::wire::ChannelNumber`]. The RFFU half is ignored.
    ChannelNumber(u16) = CHANNEL_NUMBER, |b| u16::from_be_bytes([b[0], b[1]]), |v| [v.to_be_bytes()[0], v.to_be_bytes()[1], 0, 0];
    /// LIFETIME (RFC 8656 §18.2) in seconds.
    Lifetime(u32) = LIFETIME, |b| u32::from_be_bytes(b), |v| v.to_be_bytes();
    /// REQUESTED-ADDRESS-FAMILY (RFC 8656 §18.6): 1 is IPv4, 2 is IPv6, others are unassigned.
    RequestedAddressFamily(u8) = REQUESTED_ADDRESS_FAMILY, |b| b[0], |v| [v, 0, 0, 0];
    /// ADDITIONAL-ADDRESS-FAMILY (RFC 8656 §18.11): only 2 is valid in an Allocate.
    AdditionalAddressFamily(u8) = ADDITIONAL_ADDRESS_FAMILY, |b| b[0], |v| [v, 0, 0, 0];
    /// REQUESTED-TRANSPORT (RFC 8656 §18.8): an IP protocol number, 17 for UDP, 6 for TCP (RFC 6062 §4.1).
    RequestedTransport(u8) = REQUESTED_TRANSPORT, |b| b[0], |v| [v, 0, 0, 0];
    /// CONNECTION-ID (RFC 6062 §6.2.1): names a peer data connection.
    ConnectionId(u32) = CONNECTION_ID, |b| u32::from_be_bytes(b), |v| v.to_be_bytes();
    /// CHANGE-REQUEST (RFC 5780 §7.2): 4 asks for another IP, 2 for another port.
    ChangeRequest(u32) = CHANGE_REQUEST, |b| u32::from_be_bytes(b), |v| v.to_be_bytes();
    /// RESPONSE-PORT (RFC 5780 §7.5). The second half is ignored.
    ResponsePort(u16) = RESPONSE_PORT, |b| u16::from_be_bytes([b[0], b[1]]), |v| [v.to_be_bytes()[0], v.to_be_bytes()[1], 0, 0];
}

/// EVEN-PORT (RFC 8656 §18.7).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct EvenPort {
    /// The R bit: hold the next-higher port too.
    pub reserve_next: bool,
}

impl Attribute<'_> for EvenPort {
    const TYPE: AttributeType = AttributeType::EVEN_PORT;

    fn decode(value: &[u8], _: &TransactionId) -> Option<Self> {
        let [flags] = value else { return None };
        Some(Self { reserve_next: flags & 0x80 != 0 })
    }

    fn value_len(&self) -> usize {
        1
    }

    fn encode(&self, value: &mut [u8], _: &TransactionId) {
        value[0] = u8::from(self.reserve_next) << 7;
    }
}

/// DONT-FRAGMENT (RFC 8656 §18.9).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DontFragment;

impl Attribute<'_> for DontFragment {
    const TYPE: AttributeType = AttributeType::DONT_FRAGMENT;

    fn decode(value: &[u8], _: &TransactionId) -> Option<Self> {
        value.is_empty().then_some(Self)
    }

    fn value_len(&self) -> usize {
        0
    }

    fn encode(&self, _: &mut [u8], _: &TransactionId) {}
}

/// ICMP (RFC 8656 §18.13).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Icmp {
    /// ICMP type, of the family of XOR-PEER-ADDRESS.
    pub kind: u8,
    /// ICMP code.
    pub code: u8,
    /// Next-hop MTU where type and code carry one, else 0.
    pub data: u32,
}

impl Attribute<'_> for Icmp {
    const TYPE: AttributeType = AttributeType::ICMP;

    fn decode(value: &[u8], _: &TransactionId) -> Option<Self> {
        let &[_, _, kind, code, d0, d1, d2, d3] = value else {
            return None;
        };
        Some(Self { kind, code, data: u32::from_be_bytes([d0, d1, d2, d3]) })
    }

    fn value_len(&self) -> usize {
        8
    }

    fn encode(&self, value: &mut [u8], _: &TransactionId) {
        value[..4].copy_from_slice(&[0, 0, self.kind, self.code]);
        value[4..].copy_from_slice(&self.data.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Class, Message, MessageWriter, Method};

    const ID: TransactionId = TransactionId(*b"abcdefghijkl");

    #[test]
    fn slots_are_the_table_in_order() {
        for (slot, attribute) in AttributeType::KNOWN.iter().enumerate() {
            assert_eq!(attribute.slot(), Some(slot), "{attribute:?}");
        }
        assert!(AttributeType::KNOWN.len() <= 64, "one bit each");
        assert_eq!(AttributeType(0x7FFF).slot(), None);
    }

    fn round_trip<'a, A: Attribute<'a> + PartialEq + std::fmt::Debug>(attribute: A, buffer: &'a mut [u8]) {
        let mut writer = MessageWriter::new(buffer, Class::Request, Method::Binding, ID);
        writer.attribute(&attribute);
        let len = writer.finish().expect("fits");
        let message = Message::parse(&buffer[..len]).expect("our own message");
        assert_eq!(message.attribute::<A>(), Ok(Some(attribute)));
    }

    #[test]
    fn what_is_written_is_read() {
        let v4: SocketAddr = "192.0.2.1:32853".parse().expect("literal");
        let v6: SocketAddr = "[2001:db8:1234:5678:11:2233:4455:6677]:32853".parse().expect("literal");
        for address in [v4, v6] {
            round_trip(MappedAddress(address), &mut [0; 64]);
            round_trip(XorMappedAddress(address), &mut [0; 64]);
            round_trip(XorPeerAddress(address), &mut [0; 64]);
            round_trip(XorRelayedAddress(address), &mut [0; 64]);
            round_trip(AlternateServer(address), &mut [0; 64]);
        }
        for len in 0..9 {
            round_trip(Username(&b"somebody!"[..len]), &mut [0; 64]);
        }
        round_trip(ChannelNumber(0x4FFF), &mut [0; 64]);
        round_trip(Lifetime(u32::MAX), &mut [0; 64]);
        round_trip(RequestedAddressFamily(2), &mut [0; 64]);
        round_trip(RequestedTransport(17), &mut [0; 64]);
        round_trip(EvenPort { reserve_next: true }, &mut [0; 64]);
        round_trip(DontFragment, &mut [0; 64]);
        round_trip(ReservationToken(*b"12345678"), &mut [0; 64]);
        let icmp = Icmp { kind: 3, code: 4, data: 1400 };
        round_trip(icmp, &mut [0; 64]);
    }

    #[test]
    fn malformed_values_are_refused() {
        // (what, decodes, value)
        type Decode = fn(&[u8]) -> bool;
        let peer: Decode = |v| XorPeerAddress::decode(v, &ID).is_some();
        let channel: Decode = |v| ChannelNumber::decode(v, &ID).is_some();
        let even: Decode = |v| EvenPort::decode(v, &ID).is_some();
        let cases: &[(&str, Decode, &[u8])] = &[
            ("empty XOR-PEER-ADDRESS", peer, &[]),
            ("XOR-PEER-ADDRESS of family 0", peer, &[0, 0, 0, 0, 1, 2, 3, 4]),
            ("IPv4 of 3 bytes", peer, &[0, 1, 0, 0, 1, 2, 3]),
            ("IPv4 of 16 bytes", peer, &[0, 1, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6]),
            ("IPv6 of 4 bytes", peer, &[0, 2, 0, 0, 1, 2, 3, 4]),
            ("CHANNEL-NUMBER of 1 byte", channel, &[0x40]),
            ("CHANNEL-NUMBER of 5 bytes", channel, &[0x40, 0, 0, 0, 0]),
            ("empty EVEN-PORT", even, &[]),
        ];
        for (what, decodes, value) in cases {
            assert!(!decodes(value), "{what}");
        }
    }

    #[test]
    fn reserved_bits_are_ignored() {
        // RFC 8489 §14.1, RFC 8656 §18.1 and §18.8.
        let peer = XorPeerAddress::decode(&[0xFF, 1, 0x21, 0x12, 0x21, 0x12, 0xA4, 0x42], &ID);
        assert_eq!(peer, Some(XorPeerAddress("0.0.0.0:0".parse().expect("literal"))));
        assert_eq!(ChannelNumber::decode(&[0x40, 1, 0xFF, 0xFF], &ID), Some(ChannelNumber(0x4001)));
        assert_eq!(RequestedTransport::decode(&[17, 1, 2, 3], &ID), Some(RequestedTransport(17)));
    }
}
