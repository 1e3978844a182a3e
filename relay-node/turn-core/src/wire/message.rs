//! The STUN message (RFC 8489 §5): a borrowed one-pass reader and an in-place writer.

use std::ops::Range;

use hmac::Hmac;
use sha1::Sha1;
use sha2::Sha256;

use super::attribute::{Attribute, AttributeSet, AttributeType, XorPeerAddress, XorRelayedAddress};
use super::integrity::{self, FINGERPRINT_LEN, MESSAGE_INTEGRITY_LEN, MESSAGE_INTEGRITY_SHA256_LEN, PreparedKey};
use super::padded;

/// What stands in bytes 4..8 of every message (RFC 8489 §5).
pub const MAGIC_COOKIE: [u8; 4] = 0x2112_A442_u32.to_be_bytes();

/// Length of the header.
pub const HEADER: usize = 20;

/// Names a transaction (RFC 8489 §5): 96 bits, at random.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct TransactionId(pub [u8; 12]);

/// Class of a message (RFC 8489 §5).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Class {
    /// 0b00.
    Request = 0,
    /// 0b01: no answer is expected.
    Indication = 1,
    /// 0b10.
    Success = 2,
    /// 0b11.
    Error = 3,
}

/// Method of a message (RFC 8489 §18.2, RFC 8656 §17, RFC 6062 §6.1).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Method {
    /// 0x001 (RFC 8489).
    Binding,
    /// 0x003 (RFC 8656 §7).
    Allocate,
    /// 0x004 (RFC 8656 §8).
    Refresh,
    /// 0x006 (RFC 8656 §11), indications only.
    Send,
    /// 0x007 (RFC 8656 §11), indications only.
    Data,
    /// 0x008 (RFC 8656 §10).
    CreatePermission,
    /// 0x009 (RFC 8656 §12).
    ChannelBind,
    /// 0x00A (RFC 6062 §5.2).
    Connect,
    /// 0x00B (RFC 6062 §5.4).
    ConnectionBind,
    /// 0x00C (RFC 6062 §5.3), indications only.
    ConnectionAttempt,
    /// Any other, 0x000..=0xFFF.
    Other(u16),
}

impl Method {
    const fn from_number(number: u16) -> Self {
        match number {
            0x001 => Self::Binding,
            0x003 => Self::Allocate,
            0x004 => Self::Refresh,
            0x006 => Self::Send,
            0x007 => Self::Data,
            0x008 => Self::CreatePermission,
            0x009 => Self::ChannelBind,
            0x00A => Self::Connect,
            0x00B => Self::ConnectionBind,
            0x00C => Self::ConnectionAttempt,
            other => Self::Other(other),
        }
    }

    /// The number.
    pub const fn number(self) -> u16 {
        match self {
            Self::Binding => 0x001,
            Self::Allocate => 0x003,
            Self::Refresh => 0x004,
            Self::Send => 0x006,
            Self::Data => 0x007,
            Self::CreatePermission => 0x008,
            Self::ChannelBind => 0x009,
            Self::Connect => 0x00A,
            Self::ConnectionBind => 0x00B,
            Self::ConnectionAttempt => 0x00C,
            Self::Other(number) => number,
        }
    }
}

/// Parts class and method of a message type (RFC 8489 §5, Figure 3): the class bits stand at 0x0110.
const fn split_type(message_type: u16) -> (Class, Method) {
    let class = match message_type & 0x0110 {
        0x0000 => Class::Request,
        0x0010 => Class::Indication,
        0x0100 => Class::Success,
        _ => Class::Error,
    };
    let method = (message_type & 0x3E00) >> 2 | (message_type & 0x00E0) >> 1 | (message_type & 0x000F);
    (class, Method::from_number(method))
}

const fn join_type(class: Class, method: Method) -> u16 {
    let class = class as u16;
    let method = method.number();
    (method & 0x0F80) << 2 | (method & 0x0070) << 1 | (method & 0x000F) | (class & 2) << 7 | (class & 1) << 4
}

/// Why bytes are not a STUN message: silence is the answer (RFC 8489 §6.3).
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseError {
    /// Fewer than 20 bytes.
    #[error("shorter than the 20-byte header")]
    Truncated,
    /// The first two bits are not zero.
    #[error("the first two bits are not zero")]
    NotStun,
    /// Bytes 4..8 are something else.
    #[error("magic cookie is not 0x2112A442")]
    MagicCookie,
    /// Not a multiple of 4, or not what follows the header.
    #[error("length {0} is no multiple of 4 or not that of the datagram")]
    Length(u16),
    /// An attribute is longer than what is left.
    #[error("attribute {attribute:#06x} has length {len}, more than is left")]
    AttributeLength {
        /// Its type.
        attribute: u16,
        /// The length it claims.
        len: u16,
    },
    /// FINGERPRINT is wrong or not the last attribute (RFC 8489 §14.7).
    #[error("FINGERPRINT does not verify")]
    Fingerprint,
}

/// The value of an attribute is malformed: 400 in a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("attribute {0:?} is malformed")]
pub struct AttributeError(pub AttributeType);

/// A STUN message in a packet that stays where it is.
///
/// One pass checks the grammar and notes which attributes are there. What follows MESSAGE-INTEGRITY is left out,
/// because nobody signed it, but for MESSAGE-INTEGRITY-SHA256 and FINGERPRINT (RFC 8489 §14.5). Of several of one type
/// the first counts (RFC 8489 §14). Values are found again by walking: real messages have a handful of attributes, and
/// a table of places would cost every relayed packet more than the walk.
#[derive(Clone, Copy)]
pub struct Message<'a> {
    /// The whole message.
    bytes: &'a [u8],
    class: Class,
    method: Method,
    transaction_id: TransactionId,
    /// Known attributes that are there.
    present: AttributeSet,
    /// Whether a comprehension-required attribute without a name is there.
    nameless: bool,
    /// End of the attributes that count, as an index of `bytes`.
    end: usize,
}

impl std::fmt::Debug for Message<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Message")
            .field("class", &self.class)
            .field("method", &self.method)
            .field("transaction_id", &self.transaction_id)
            .field("len", &self.bytes.len())
            .finish_non_exhaustive()
    }
}

impl<'a> Message<'a> {
    /// Reads a datagram or a whole stream frame.
    ///
    /// # Errors
    /// See [`ParseError`].
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ParseError> {
        let (header, attributes) = bytes.split_first_chunk::<HEADER>().ok_or(ParseError::Truncated)?;
        let [t0, t1, l0, l1, c0, c1, c2, c3, id @ ..] = *header;
        if t0 & 0xC0 != 0 {
            return Err(ParseError::NotStun);
        }
        if [c0, c1, c2, c3] != MAGIC_COOKIE {
            return Err(ParseError::MagicCookie);
        }
        let len = u16::from_be_bytes([l0, l1]);
        if usize::from(len) != attributes.len() || len % 4 != 0 {
            return Err(ParseError::Length(len));
        }
        let (class, method) = split_type(u16::from_be_bytes([t0, t1]));
        let mut message = Self {
            bytes,
            class,
            method,
            transaction_id: TransactionId(id),
            present: AttributeSet::default(),
            nameless: false,
            end: bytes.len(),
        };
        message.note_attributes(attributes)?;
        Ok(message)
    }

    fn note_attributes(&mut self, attributes: &[u8]) -> Result<(), ParseError> {
        // What still counts: everything, then only what may follow an integrity attribute.
        let mut signed = false;
        let mut rest = attributes;
        while let Some((&[t0, t1, l0, l1], behind)) = rest.split_first_chunk::<4>() {
            let attribute = AttributeType(u16::from_be_bytes([t0, t1]));
            let len = u16::from_be_bytes([l0, l1]);
            rest = behind
                .get(padded(usize::from(len))..)
                .ok_or(ParseError::AttributeLength { attribute: attribute.0, len })?;
            match attribute {
                AttributeType::FINGERPRINT => {
                    let before = HEADER + attributes.len() - behind.len() - 4;
                    self.check_fingerprint(&behind[..usize::from(len)], before, rest)?;
                }
                // RFC 8489 §14.5: the one attribute that may follow MESSAGE-INTEGRITY and still counts.
                AttributeType::MESSAGE_INTEGRITY_SHA256 if !self.contains(attribute) => {}
                _ if signed => continue,
                _ => {}
            }
            let Some(slot) = attribute.slot() else {
                self.nameless |= attribute.is_comprehension_required();
                continue;
            };
            self.present.insert_slot(slot);
            if matches!(attribute, AttributeType::MESSAGE_INTEGRITY | AttributeType::MESSAGE_INTEGRITY_SHA256)
                && !signed
            {
                signed = true;
                self.end = HEADER + attributes.len() - rest.len();
            }
        }
        Ok(())
    }

    fn check_fingerprint(&self, value: &[u8], before: usize, behind: &[u8]) -> Result<(), ParseError> {
        let expected = integrity::fingerprint(&self.bytes[..before]);
        if value != expected.to_be_bytes() || !behind.is_empty() {
            return Err(ParseError::Fingerprint);
        }
        Ok(())
    }

    /// Its class.
    pub fn class(&self) -> Class {
        self.class
    }

    /// Its method.
    pub fn method(&self) -> Method {
        self.method
    }

    /// Its transaction.
    pub fn transaction_id(&self) -> TransactionId {
        self.transaction_id
    }

    /// How long it is in bytes, header included.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    /// Whether an attribute is there, well-formed or not.
    pub fn contains(&self, attribute: AttributeType) -> bool {
        self.present.contains(attribute)
    }

    /// Where the value of an attribute stands in the packet, without padding.
    pub fn range(&self, attribute: AttributeType) -> Option<Range<usize>> {
        if !self.present.contains(attribute) {
            return None;
        }
        // What does not count stands behind what does, so the first occurrence is the one that counts.
        Walk::new(self.bytes).find(|(found, _)| *found == attribute).map(|(_, range)| range)
    }

    /// Reads an attribute at its first occurrence.
    ///
    /// # Errors
    /// [`AttributeError`] if it is there, but malformed.
    pub fn attribute<A: Attribute<'a>>(&self) -> Result<Option<A>, AttributeError> {
        match self.range(A::TYPE) {
            None => Ok(None),
            Some(range) => match A::decode(&self.bytes[range], &self.transaction_id) {
                None => Err(AttributeError(A::TYPE)),
                value => Ok(value),
            },
        }
    }

    /// Every XOR-PEER-ADDRESS in order: all occurrences count (RFC 8656 §10.1).
    pub fn peer_addresses(&self) -> impl Iterator<Item = Result<XorPeerAddress, AttributeError>> + '_ {
        self.every()
    }

    /// Every XOR-RELAYED-ADDRESS in order: two for a dual allocation (RFC 8656 §7.2).
    pub fn relayed_addresses(&self) -> impl Iterator<Item = Result<XorRelayedAddress, AttributeError>> + '_ {
        self.every()
    }

    fn every<A: Attribute<'a>>(&self) -> impl Iterator<Item = Result<A, AttributeError>> + '_ {
        Walk::new(&self.bytes[..self.end]).filter(|(attribute, _)| *attribute == A::TYPE).map(|(attribute, range)| {
            A::decode(&self.bytes[range], &self.transaction_id).ok_or(AttributeError(attribute))
        })
    }

    /// The comprehension-required attributes that are in no name here or in `declined` (RFC 8489 §6.3.1).
    pub fn unknown_attributes(&self, declined: AttributeSet) -> UnknownAttributes {
        let mut unknown = UnknownAttributes::default();
        if !self.nameless && !self.present.intersects(declined) {
            return unknown;
        }
        for (attribute, _) in Walk::new(&self.bytes[..self.end]) {
            if attribute.is_comprehension_required()
                && (attribute.slot().is_none() || declined.contains(attribute))
                && !unknown.push(attribute)
            {
                break;
            }
        }
        unknown
    }

    /// Whether MESSAGE-INTEGRITY is there and made with `key` (RFC 8489 §14.5). Compares in constant time.
    pub fn verify_integrity(&self, key: &[u8]) -> bool {
        self.verify_sha1(integrity::keyed(key))
    }

    fn verify_sha1(&self, key: Hmac<Sha1>) -> bool {
        self.range(AttributeType::MESSAGE_INTEGRITY).is_some_and(|range| {
            let expected = integrity::message_integrity(key, &self.bytes[..range.start - 4]);
            integrity::constant_time_eq(&self.bytes[range], &expected)
        })
    }

    /// Whether MESSAGE-INTEGRITY-SHA256 is there and made with `key` (RFC 8489 §14.6), in one of the lengths the
    /// attribute may have: 16 to 32 bytes, a multiple of 4. Compares in constant time.
    ///
    /// Whether a truncated value will do is the usage's to say: see [`Message::range`] for its length.
    pub fn verify_integrity_sha256(&self, key: &[u8]) -> bool {
        self.verify_sha256(integrity::keyed(key))
    }

    fn verify_sha256(&self, key: Hmac<Sha256>) -> bool {
        self.range(AttributeType::MESSAGE_INTEGRITY_SHA256).is_some_and(|range| {
            if !matches!(range.len(), 16 | 20 | 24 | 28 | 32) {
                return false;
            }
            let before = &self.bytes[..range.start - 4];
            let expected = integrity::message_integrity_sha256(key, before, 4 + range.len());
            integrity::constant_time_eq(&self.bytes[range.clone()], &expected[..range.len()])
        })
    }

    /// Whether the attribute that the key is for is there, as [`Message::verify_integrity`] and
    /// [`Message::verify_integrity_sha256`] say.
    pub fn verify_prepared(&self, key: &PreparedKey) -> bool {
        match key.clone() {
            PreparedKey::Sha1(key) => self.verify_sha1(key),
            PreparedKey::Sha256(key) => self.verify_sha256(key),
        }
    }
}

/// Walks over the attributes of a message whose grammar was checked: type, and where the value stands.
struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Walk<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: HEADER }
    }
}

impl Iterator for Walk<'_> {
    type Item = (AttributeType, Range<usize>);

    fn next(&mut self) -> Option<Self::Item> {
        let &[t0, t1, l0, l1] = self.bytes.get(self.at..)?.first_chunk()?;
        let start = self.at + 4;
        let end = start + usize::from(u16::from_be_bytes([l0, l1]));
        self.at = padded(end);
        Some((AttributeType(u16::from_be_bytes([t0, t1])), start..end))
    }
}

/// Attribute types for UNKNOWN-ATTRIBUTES, each once: the first [`UnknownAttributes::MAX`] of them, so that an answer
/// is never larger than what asked for it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct UnknownAttributes {
    types: [u16; Self::MAX],
    len: usize,
}

impl UnknownAttributes {
    /// Most types that are listed.
    pub const MAX: usize = 16;

    /// The types in the order of the message.
    pub fn iter(&self) -> impl Iterator<Item = AttributeType> + '_ {
        self.types[..self.len].iter().copied().map(AttributeType)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a type unless it is there; false if there is no room for another.
    fn push(&mut self, attribute: AttributeType) -> bool {
        if self.types[..self.len].contains(&attribute.0) {
            return true;
        }
        if let Some(free) = self.types.get_mut(self.len) {
            *free = attribute.0;
            self.len += 1;
        }
        self.len < Self::MAX
    }
}

impl Attribute<'_> for UnknownAttributes {
    const TYPE: AttributeType = AttributeType::UNKNOWN_ATTRIBUTES;

    fn decode(value: &[u8], _: &TransactionId) -> Option<Self> {
        let (types, []) = value.as_chunks::<2>() else {
            return None;
        };
        let mut unknown = Self::default();
        for attribute in types {
            if !unknown.push(AttributeType(u16::from_be_bytes(*attribute))) {
                break;
            }
        }
        Some(unknown)
    }

    fn value_len(&self) -> usize {
        2 * self.len
    }

    fn encode(&self, value: &mut [u8], _: &TransactionId) {
        for (bytes, attribute) in value.chunks_exact_mut(2).zip(self.types) {
            bytes.copy_from_slice(&attribute.to_be_bytes());
        }
    }
}

/// What was written does not fit the buffer or the 16-bit length.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the message does not fit")]
pub struct WriteError;

/// Writes a message into a buffer. After a write that does not fit, all others do nothing and the end says so.
pub struct MessageWriter<'b> {
    buffer: &'b mut [u8],
    /// Bytes written, header included.
    len: usize,
    transaction_id: TransactionId,
    fits: bool,
}

impl<'b> MessageWriter<'b> {
    /// Begins a message at the start of `buffer`.
    pub fn new(buffer: &'b mut [u8], class: Class, method: Method, transaction_id: TransactionId) -> Self {
        let fits = if let Some(header) = buffer.first_chunk_mut::<HEADER>() {
            header[..2].copy_from_slice(&join_type(class, method).to_be_bytes());
            header[2..4].fill(0);
            header[4..8].copy_from_slice(&MAGIC_COOKIE);
            header[8..].copy_from_slice(&transaction_id.0);
            true
        } else {
            false
        };
        Self { buffer, len: HEADER, transaction_id, fits }
    }

    /// Appends an attribute, padded with zeros (RFC 8489 §14).
    pub fn attribute<'a, A: Attribute<'a>>(&mut self, attribute: &A) -> &mut Self {
        let transaction_id = self.transaction_id;
        if let Some(value) = self.append(A::TYPE, attribute.value_len()) {
            attribute.encode(value, &transaction_id);
        }
        self
    }

    /// Appends an attribute of any type and value, for tests of what no type here would write.
    #[cfg(test)]
    pub(crate) fn raw(&mut self, attribute: u16, value: &[u8]) {
        if let Some(out) = self.append(AttributeType(attribute), value.len()) {
            out.copy_from_slice(value);
        }
    }

    /// Appends MESSAGE-INTEGRITY over what was written so far. Only FINGERPRINT may follow.
    pub fn integrity(&mut self, key: &[u8]) -> &mut Self {
        self.sign_sha1(integrity::keyed(key))
    }

    fn sign_sha1(&mut self, key: Hmac<Sha1>) -> &mut Self {
        let before = self.len;
        if self.append(AttributeType::MESSAGE_INTEGRITY, MESSAGE_INTEGRITY_LEN - 4).is_some() {
            let (signed, attribute) = self.buffer.split_at_mut(before);
            attribute[4..MESSAGE_INTEGRITY_LEN].copy_from_slice(&integrity::message_integrity(key, signed));
        }
        self
    }

    /// Appends MESSAGE-INTEGRITY-SHA256, not truncated, over what was written so far. Only FINGERPRINT may follow.
    pub fn integrity_sha256(&mut self, key: &[u8]) -> &mut Self {
        self.sign_sha256(integrity::keyed(key))
    }

    fn sign_sha256(&mut self, key: Hmac<Sha256>) -> &mut Self {
        let before = self.len;
        if self.append(AttributeType::MESSAGE_INTEGRITY_SHA256, MESSAGE_INTEGRITY_SHA256_LEN - 4).is_some() {
            let (signed, attribute) = self.buffer.split_at_mut(before);
            let value = integrity::message_integrity_sha256(key, signed, MESSAGE_INTEGRITY_SHA256_LEN);
            attribute[4..MESSAGE_INTEGRITY_SHA256_LEN].copy_from_slice(&value);
        }
        self
    }

    /// Appends the attribute that the key is for, as [`MessageWriter::integrity`] and
    /// [`MessageWriter::integrity_sha256`] do.
    pub fn sign_prepared(&mut self, key: &PreparedKey) -> &mut Self {
        match key.clone() {
            PreparedKey::Sha1(key) => self.sign_sha1(key),
            PreparedKey::Sha256(key) => self.sign_sha256(key),
        }
    }

    /// Appends FINGERPRINT. Nothing may follow.
    pub fn fingerprint(&mut self) -> &mut Self {
        let before = self.len;
        if self.append(AttributeType::FINGERPRINT, FINGERPRINT_LEN - 4).is_some() {
            self.write_len(self.len);
            let crc = integrity::fingerprint(&self.buffer[..before]);
            self.buffer[before + 4..self.len].copy_from_slice(&crc.to_be_bytes());
        }
        self
    }

    /// Ends the message and says how long it is.
    ///
    /// # Errors
    /// [`WriteError`]; the buffer holds nothing useful then.
    pub fn finish(mut self) -> Result<usize, WriteError> {
        self.end(0)
    }

    /// Ends the message with a DATA attribute whose `len` bytes of value, and their padding, follow the buffer's.
    /// Says how long the part in the buffer is.
    ///
    /// # Errors
    /// [`WriteError`]; the buffer holds nothing useful then.
    pub fn finish_before_data(mut self, len: usize) -> Result<usize, WriteError> {
        let value = u16::try_from(len).map_err(|_| WriteError)?;
        let start = self.len;
        let header = self.buffer.get_mut(start..start + 4).ok_or(WriteError)?;
        header[..2].copy_from_slice(&AttributeType::DATA.0.to_be_bytes());
        header[2..].copy_from_slice(&value.to_be_bytes());
        self.len += 4;
        self.end(padded(len))
    }

    fn end(&mut self, behind: usize) -> Result<usize, WriteError> {
        if !self.fits || self.len - HEADER + behind > usize::from(u16::MAX) {
            return Err(WriteError);
        }
        self.write_len(self.len + behind);
        Ok(self.len)
    }

    /// Makes room for an attribute and gives its value, padding zeroed.
    fn append(&mut self, attribute: AttributeType, len: usize) -> Option<&mut [u8]> {
        let end = self.len + 4 + padded(len);
        self.fits = self.fits && end - HEADER <= usize::from(u16::MAX);
        let Some(bytes) = self.buffer.get_mut(self.len..end).filter(|_| self.fits) else {
            self.fits = false;
            return None;
        };
        self.len = end;
        let (header, value) = bytes.split_at_mut(4);
        header[..2].copy_from_slice(&attribute.0.to_be_bytes());
        // No longer than the message, whose length is 16 bits.
        header[2..].copy_from_slice(&(len as u16).to_be_bytes());
        let (value, padding) = value.split_at_mut(len);
        padding.fill(0);
        Some(value)
    }

    /// Sets the header's length for a message of `len` bytes.
    fn write_len(&mut self, len: usize) {
        self.buffer[2..4].copy_from_slice(&((len - HEADER) as u16).to_be_bytes());
    }
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
