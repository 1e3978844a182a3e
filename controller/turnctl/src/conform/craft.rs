//! Messages byte by byte, also such as no correct client sends. Independent of `turn-core`'s writer on purpose: what
//! both ends got wrong in the same way would pass.

use std::net::{IpAddr, SocketAddr};

use hmac::{Hmac, KeyInit, Mac};
use sha1::Sha1;
use sha2::Sha256;
use turn_core::wire::AttributeType;

/// Methods (RFC 8489 §18.2, RFC 8656 §17, RFC 6062 §6.1).
pub(crate) const BINDING: u16 = 0x001;
pub(crate) const ALLOCATE: u16 = 0x003;
pub(crate) const REFRESH: u16 = 0x004;
pub(crate) const SEND: u16 = 0x006;
pub(crate) const DATA: u16 = 0x007;
pub(crate) const CREATE_PERMISSION: u16 = 0x008;
pub(crate) const CHANNEL_BIND: u16 = 0x009;
pub(crate) const CONNECT: u16 = 0x00A;
pub(crate) const CONNECTION_BIND: u16 = 0x00B;
pub(crate) const CONNECTION_ATTEMPT: u16 = 0x00C;

/// Classes (RFC 8489 §5).
pub(crate) const REQUEST: u16 = 0;
pub(crate) const INDICATION: u16 = 1;
pub(crate) const SUCCESS: u16 = 2;
pub(crate) const ERROR: u16 = 3;

/// REQUESTED-TRANSPORT for UDP and TCP.
pub(crate) const UDP: [u8; 4] = [17, 0, 0, 0];
pub(crate) const TCP: [u8; 4] = [6, 0, 0, 0];

/// The magic cookie.
pub(crate) const COOKIE: [u8; 4] = [0x21, 0x12, 0xA4, 0x42];

/// A message being written.
#[derive(Clone)]
pub(crate) struct Craft(Vec<u8>);

impl Craft {
    /// Begins a message under a fresh transaction id.
    pub(crate) fn of(class: u16, method: u16) -> Self {
        let mut id = [0; 12];
        // Without randomness of the system nothing here can be trusted; the id of zeros makes the check fail visibly.
        let _ = getrandom::fill(&mut id);
        let class = (class & 2) << 7 | (class & 1) << 4;
        let kind = (method & 0x0F80) << 2 | (method & 0x0070) << 1 | (method & 0x000F) | class;
        let mut bytes = kind.to_be_bytes().to_vec();
        bytes.extend([0, 0]);
        bytes.extend(COOKIE);
        bytes.extend(id);
        Self(bytes)
    }

    pub(crate) fn request(method: u16) -> Self {
        Self::of(REQUEST, method)
    }

    pub(crate) fn indication(method: u16) -> Self {
        Self::of(INDICATION, method)
    }

    /// Appends an attribute, padded with zeros.
    pub(crate) fn attr(self, attribute: AttributeType, value: &[u8]) -> Self {
        self.padded_with(attribute, value, 0)
    }

    /// Appends an attribute, padded with a byte that a receiver has to ignore.
    pub(crate) fn padded_with(mut self, attribute: AttributeType, value: &[u8], padding: u8) -> Self {
        self.0.extend(attribute.0.to_be_bytes());
        self.0.extend(u16::try_from(value.len()).unwrap_or(u16::MAX).to_be_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), padding);
        self.set_len(self.0.len());
        self
    }

    pub(crate) fn word(self, attribute: AttributeType, value: u32) -> Self {
        self.attr(attribute, &value.to_be_bytes())
    }

    /// Appends an address XORed with cookie and transaction id (RFC 8489 §14.2).
    pub(crate) fn xor_address(self, attribute: AttributeType, address: SocketAddr) -> Self {
        let value = xor_address(address, &self.0);
        self.attr(attribute, &value)
    }

    /// Appends XOR-PEER-ADDRESS.
    pub(crate) fn peer(self, address: SocketAddr) -> Self {
        self.xor_address(AttributeType::XOR_PEER_ADDRESS, address)
    }

    /// Appends CHANNEL-NUMBER.
    pub(crate) fn channel(self, number: u16) -> Self {
        self.word(AttributeType::CHANNEL_NUMBER, u32::from(number) << 16)
    }

    /// Appends MESSAGE-INTEGRITY over what stands there.
    pub(crate) fn integrity(mut self, key: &[u8]) -> Self {
        self.set_len(self.0.len() + 24);
        let mac = hmac_sha1(key, &self.0);
        self.attr(AttributeType::MESSAGE_INTEGRITY, &mac)
    }

    /// Appends the first `len` bytes of MESSAGE-INTEGRITY-SHA256 over what stands there.
    pub(crate) fn integrity_sha256(mut self, key: &[u8], len: usize) -> Self {
        self.set_len(self.0.len() + 4 + len.next_multiple_of(4));
        let mac = hmac_sha256(key, &self.0);
        self.attr(AttributeType::MESSAGE_INTEGRITY_SHA256, &mac[..len.min(32)])
    }

    pub(crate) fn fingerprint(mut self) -> Self {
        self.set_len(self.0.len() + 8);
        let crc = crc32fast::hash(&self.0) ^ 0x5354_554E;
        self.word(AttributeType::FINGERPRINT, crc)
    }

    /// The same message under a fresh transaction id. Not for one that holds IPv6 addresses: they depend on the id.
    pub(crate) fn again(&self) -> Self {
        let mut bytes = self.0.clone();
        bytes[8..20].copy_from_slice(&Self::request(BINDING).id());
        Self(bytes)
    }

    /// The transaction id.
    pub(crate) fn id(&self) -> [u8; 12] {
        self.0.get(8..20).and_then(|id| id.try_into().ok()).unwrap_or_default()
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The message as it stands, for changes of single bytes.
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    fn set_len(&mut self, len: usize) {
        let len = u16::try_from(len - 20).unwrap_or(u16::MAX);
        self.0[2..4].copy_from_slice(&len.to_be_bytes());
    }
}

/// The value of an address attribute, XORed with bytes 4..20 of `message`.
pub(crate) fn xor_address(address: SocketAddr, message: &[u8]) -> Vec<u8> {
    let mut value = plain_address(address);
    for (byte, mask) in value[2..4].iter_mut().zip(&message[4..]) {
        *byte ^= mask;
    }
    for (byte, mask) in value[4..].iter_mut().zip(&message[4..]) {
        *byte ^= mask;
    }
    value
}

/// The value of an address attribute as it is.
pub(crate) fn plain_address(address: SocketAddr) -> Vec<u8> {
    let mut value = vec![0, if address.is_ipv4() { 1 } else { 2 }];
    value.extend(address.port().to_be_bytes());
    match address.ip() {
        IpAddr::V4(ip) => value.extend(ip.octets()),
        IpAddr::V6(ip) => value.extend(ip.octets()),
    }
    value
}

/// A ChannelData message; `pad` as streams want it.
pub(crate) fn channel_data(number: u16, data: &[u8], pad: bool) -> Vec<u8> {
    let mut bytes = number.to_be_bytes().to_vec();
    bytes.extend(u16::try_from(data.len()).unwrap_or(u16::MAX).to_be_bytes());
    bytes.extend(data);
    if pad {
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

pub(crate) fn hmac_sha1(key: &[u8], text: &[u8]) -> Vec<u8> {
    // HMAC takes a key of any length, so there is always a MAC.
    Hmac::<Sha1>::new_from_slice(key)
        .map(|mut mac| {
            mac.update(text);
            mac.finalize().into_bytes().to_vec()
        })
        .unwrap_or_default()
}

pub(crate) fn hmac_sha256(key: &[u8], text: &[u8]) -> Vec<u8> {
    Hmac::<Sha256>::new_from_slice(key)
        .map(|mut mac| {
            mac.update(text);
            mac.finalize().into_bytes().to_vec()
        })
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use turn_core::wire::Message;
    use turn_core::wire::attribute::XorPeerAddress;

    use super::*;

    #[test]
    fn turn_core_reads_what_is_written_here() {
        let peer: SocketAddr = "[2001:db8::7]:4711".parse().expect("literal");
        let key = b"sixteen byte key";
        let bytes = Craft::request(CREATE_PERMISSION)
            .padded_with(AttributeType::SOFTWARE, b"abc", 0xFF)
            .peer(peer)
            .integrity(key)
            .fingerprint()
            .into_bytes();
        let message = Message::parse(&bytes).expect("a STUN message");
        assert_eq!(message.method().number(), CREATE_PERMISSION);
        assert_eq!(message.attribute(), Ok(Some(XorPeerAddress(peer))));
        assert!(message.verify_integrity(key));
        assert!(!message.verify_integrity(b"another"));
    }

    #[test]
    fn channel_data_is_padded_on_demand() {
        assert_eq!(channel_data(0x4001, b"x", false), b"\x40\x01\0\x01x");
        assert_eq!(channel_data(0x4001, b"x", true), b"\x40\x01\0\x01x\0\0\0");
    }
}
