//! The versioned allocation record: what the journal and the store keep, and how two of them are merged.
//!
//! Encoding: a version byte, then sections of tag (1 byte), length (2 bytes, big endian) and value. Readers skip tags
//! they do not know, so a new tag needs no new version (promise P12). A list may be cut into several sections of its
//! tag. The seal is the last section: key id and 16 bytes of HMAC-SHA256 over everything before it.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use subtle::ConstantTimeEq;

use crate::wire::attribute::ReservationToken;
use crate::wire::error_code::AddressErrorCode;
use crate::wire::{ErrorCode, Integrity, TransactionId};
use crate::{FiveTuple, IntegrityKey, Key, KeyRing, PeerAddr, PeerTransport, RelayedAddr, Session, Ticket, Transport};

/// A ULID: 48 bits of Unix milliseconds, 80 random bits, big endian. Sorts by creation.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct AllocationId(pub [u8; 16]);

/// One allocation as of (epoch, sequence). Deadlines are Unix milliseconds: they outlive the process's clock.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Record {
    /// Identity of the owner's allocations; outlives the process.
    pub relay_address: IpAddr,
    /// Ownership under which this was written.
    pub epoch: u64,
    /// Grows with each change of this allocation.
    pub sequence: u64,
    /// Name of the allocation.
    pub id: AllocationId,
    /// The client.
    pub five_tuple: FiveTuple,
    /// Relayed addresses, at most one per family (RFC 8656 §7.2).
    pub relayed: Vec<RelayedAddr>,
    /// How it talks to its peers. A TCP allocation ends with its process (RFC 6062 §5.5): its record restores nothing.
    pub peer_transport: PeerTransport,
    /// Of a mobile client (RFC 8016); `five_tuple` is the old one during a move.
    pub mobility: Option<MobilityRecord>,
    /// The UDP proxy through which the client is reached; `five_tuple` names the client itself.
    pub proxy: Option<SocketAddr>,
    /// Of the Allocate, to know a retransmission of it (RFC 8656 §7.2, note). Older writers did not keep it.
    pub transaction_id: Option<TransactionId>,
    /// ADDRESS-ERROR-CODE of the Allocate's success answer.
    pub address_error: Option<AddressErrorCode>,
    /// RESERVATION-TOKEN of the Allocate's success answer, and Unix ms of its end. What is reserved is the port above the
    /// first of `relayed` (RFC 8656 §7.2).
    pub reservation: Option<(ReservationToken, u64)>,
    /// USERNAME of the Allocate, opaque bytes.
    pub username: Vec<u8>,
    /// What is left of the access token it was made with (RFC 7635).
    pub session: Option<Session>,
    /// Unix ms.
    pub created_at: u64,
    /// Unix ms of the last end of all of `relayed`.
    pub expires_at: u64,
    /// Unix ms of the end of each of `relayed` (RFC 8656 §8.1); empty where all end at `expires_at`.
    pub family_expires_at: Vec<u64>,
    /// (peer IP, Unix ms of expiry).
    pub permissions: Vec<(IpAddr, u64)>,
    /// (channel number, peer, Unix ms of expiry).
    pub channels: Vec<(u16, PeerAddr, u64)>,
}

/// What moves an allocation to another five-tuple (RFC 8016).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MobilityRecord {
    /// The ticket that moves it next.
    pub ticket: Ticket,
    /// A move that has not ended.
    pub moving: Option<MoveRecord>,
}

/// A move that has not ended: the client has not sent from there yet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MoveRecord {
    /// Where to.
    pub to: FiveTuple,
    /// The ticket that began it.
    pub by: Ticket,
    /// Of the request that began it, to know it again.
    pub transaction_id: [u8; 12],
}

/// Why an allocation ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum EndReason {
    /// Refresh with LIFETIME 0.
    Deleted = 1,
    /// Its lifetime ran out.
    Expired = 2,
    /// Its stream connection closed.
    Closed = 3,
    /// An operator revoked it.
    Revoked = 4,
}

/// A change of the record set.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Change {
    /// Created or changed.
    Put(Box<Record>),
    /// Ended: a tombstone until the store has acknowledged it.
    End {
        /// Which.
        id: AllocationId,
        /// Ownership under which it ended.
        epoch: u64,
        /// Above the sequence of every record of the allocation.
        sequence: u64,
        /// Why.
        reason: EndReason,
    },
}

/// Why bytes are not a record. Refused one by one, counted, never all.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// Cut short or inconsistent.
    #[error("the record is damaged")]
    Damaged,
    /// Of a version this binary cannot read.
    #[error("the record has version {0}, which this binary does not read")]
    Version(u8),
    /// The MAC is of no live key.
    #[error("the record's seal does not verify")]
    Seal,
}

/// The only version there is. It changes when a reader must not read on, not when a tag is added.
const VERSION: u8 = 1;

/// Section tags. Never reused.
mod tag {
    pub(super) const RELAY_ADDRESS: u8 = 1;
    pub(super) const EPOCH: u8 = 2;
    pub(super) const SEQUENCE: u8 = 3;
    pub(super) const ID: u8 = 4;
    pub(super) const FIVE_TUPLE: u8 = 5;
    pub(super) const RELAYED: u8 = 6;
    pub(super) const USERNAME: u8 = 7;
    pub(super) const CREATED_AT: u8 = 8;
    pub(super) const EXPIRES_AT: u8 = 9;
    pub(super) const PERMISSIONS: u8 = 10;
    pub(super) const CHANNELS: u8 = 11;
    /// Makes it a tombstone.
    pub(super) const ENDED: u8 = 12;
    /// REQUESTED-TRANSPORT's number; not there for UDP.
    pub(super) const PEER_TRANSPORT: u8 = 13;
    /// End of an access token (8 bytes) and its session key.
    pub(super) const SESSION: u8 = 15;
    /// Ticket; in a move also where to, by which ticket and transaction.
    pub(super) const MOBILITY: u8 = 14;
    pub(super) const FAMILY_EXPIRES_AT: u8 = 16;
    pub(super) const TRANSACTION_ID: u8 = 17;
    /// Family and code.
    pub(super) const ADDRESS_ERROR: u8 = 18;
    /// Token and its end.
    pub(super) const RESERVATION: u8 = 19;
    pub(super) const PROXY: u8 = 20;
    pub(super) const SEAL: u8 = 255;
}

/// Bytes that most records fit in.
const TYPICAL: usize = 256;

const MAC_LEN: usize = 16;
const SEAL_SECTION: usize = 3 + 1 + MAC_LEN;

impl Record {
    /// Encodes and appends a MAC under the newest key of the cluster's record ring (none without keys).
    pub fn seal(&self, keys: &KeyRing) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(TYPICAL);
        self.seal_into(keys, &mut bytes);
        bytes
    }

    fn seal_into(&self, keys: &KeyRing, out: &mut Vec<u8>) {
        let mut writer = Writer::new(out);
        writer.section(tag::RELAY_ADDRESS, |out| write_ip(out, self.relay_address));
        writer.number(tag::EPOCH, self.epoch);
        writer.number(tag::SEQUENCE, self.sequence);
        writer.section(tag::ID, |out| out.extend(self.id.0));
        writer.section(tag::FIVE_TUPLE, |out| {
            write_five_tuple(out, self.five_tuple);
        });
        if let Some(mobility) = &self.mobility {
            writer.section(tag::MOBILITY, |out| {
                out.extend(mobility.ticket.as_bytes());
                if let Some(moving) = &mobility.moving {
                    write_five_tuple(out, moving.to);
                    out.extend(moving.by.as_bytes());
                    out.extend(moving.transaction_id);
                }
            });
        }
        if let Some(proxy) = self.proxy {
            writer.section(tag::PROXY, |out| write_address(out, proxy));
        }
        writer.list(tag::RELAYED, &self.relayed, |out, relayed| {
            write_address(out, relayed.bound);
            write_address(out, relayed.advertised);
        });
        if self.peer_transport != PeerTransport::Udp {
            writer.section(tag::PEER_TRANSPORT, |out| out.push(self.peer_transport as u8));
        }
        // A request's USERNAME has at most 508 bytes; what no request can have brought is cut.
        let username = &self.username[..self.username.len().min(usize::from(u16::MAX))];
        writer.section(tag::USERNAME, |out| out.extend(username));
        if let Some(session) = &self.session {
            writer.section(tag::SESSION, |out| {
                out.extend(session.expires_at.to_be_bytes());
                out.extend(session.key.as_bytes());
            });
        }
        if let Some(TransactionId(id)) = self.transaction_id {
            writer.section(tag::TRANSACTION_ID, |out| out.extend(id));
        }
        if let Some(AddressErrorCode { family, error }) = self.address_error {
            writer.section(tag::ADDRESS_ERROR, |out| {
                out.push(family);
                out.extend(error.code().to_be_bytes());
            });
        }
        if let Some((ReservationToken(token), expires_at)) = self.reservation {
            writer.section(tag::RESERVATION, |out| {
                out.extend(token);
                out.extend(expires_at.to_be_bytes());
            });
        }
        writer.number(tag::CREATED_AT, self.created_at);
        writer.number(tag::EXPIRES_AT, self.expires_at);
        writer.list(tag::FAMILY_EXPIRES_AT, &self.family_expires_at, |out, end| out.extend(end.to_be_bytes()));
        writer.list(tag::PERMISSIONS, &self.permissions, |out, (ip, expires_at)| {
            write_ip(out, *ip);
            out.extend(expires_at.to_be_bytes());
        });
        writer.list(tag::CHANNELS, &self.channels, |out, (number, peer, expires_at)| {
            out.extend(number.to_be_bytes());
            write_address(out, peer.socket_addr());
            out.extend(expires_at.to_be_bytes());
        });
        writer.seal(keys);
    }

    /// Checks the MAC against the ring (skipped when the ring is empty) and decodes.
    ///
    /// # Errors
    /// See [`RecordError`]; a tombstone is [`RecordError::Damaged`] here.
    pub fn open(bytes: &[u8], keys: &KeyRing) -> Result<Self, RecordError> {
        match decode_change(bytes, keys)? {
            Change::Put(record) => Ok(*record),
            Change::End { .. } => Err(RecordError::Damaged),
        }
    }

    /// Merge order: (epoch, sequence), never clocks.
    pub fn supersedes(&self, epoch: u64, sequence: u64) -> bool {
        (self.epoch, self.sequence) > (epoch, sequence)
    }
}

/// Encodes a change: a put as [`Record::seal`] does, an end as a tombstone.
pub fn encode_change(change: &Change, keys: &KeyRing) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(TYPICAL);
    append_change(change, keys, &mut bytes);
    bytes
}

/// As [`encode_change`], behind what is in `out`.
pub fn append_change(change: &Change, keys: &KeyRing, out: &mut Vec<u8>) {
    match change {
        Change::Put(record) => record.seal_into(keys, out),
        Change::End { id, epoch, sequence, reason } => {
            let mut writer = Writer::new(out);
            writer.section(tag::ID, |out| out.extend(id.0));
            writer.number(tag::EPOCH, *epoch);
            writer.number(tag::SEQUENCE, *sequence);
            writer.section(tag::ENDED, |out| out.push(*reason as u8));
            writer.seal(keys);
        }
    }
}

/// Reads what [`encode_change`] or [`Record::seal`] wrote.
///
/// # Errors
/// See [`RecordError`].
pub fn decode_change(bytes: &[u8], keys: &KeyRing) -> Result<Change, RecordError> {
    match bytes.first() {
        Some(&VERSION) => {}
        Some(&other) => return Err(RecordError::Version(other)),
        None => return Err(RecordError::Damaged),
    }
    check_seal(bytes, keys)?;
    Sections::read(&bytes[1..]).and_then(Sections::into_change).ok_or(RecordError::Damaged)
}

/// Id of the key that bytes were sealed with, whether the seal holds or not; `None` of what carries none.
pub fn seal_key(bytes: &[u8]) -> Option<u8> {
    match bytes.last_chunk::<SEAL_SECTION>()? {
        [tag::SEAL, 0, len, id, ..] if usize::from(*len) == 1 + MAC_LEN => Some(*id),
        _ => None,
    }
}

fn check_seal(bytes: &[u8], keys: &KeyRing) -> Result<(), RecordError> {
    if keys.0.is_empty() {
        return Ok(());
    }
    let verified = (|| {
        let (sealed, section) = bytes.split_last_chunk::<SEAL_SECTION>()?;
        let [tag::SEAL, l0, l1, id, claimed @ ..] = section else {
            return None;
        };
        let key = keys.find(*id)?;
        let authentic: bool = mac(key, sealed).ct_eq(claimed).into();
        (authentic && usize::from(u16::from_be_bytes([*l0, *l1])) == 1 + MAC_LEN).then_some(())
    })();
    verified.ok_or(RecordError::Seal)
}

fn mac(key: &Key, sealed: &[u8]) -> [u8; MAC_LEN] {
    let mut mac = Hmac::<Sha256>::new_from_slice(&key.secret).expect("HMAC takes a key of any length");
    mac.update(b"turnpike record");
    mac.update(&[key.id]);
    mac.update(sealed);
    let mut short = [0; MAC_LEN];
    short.copy_from_slice(&mac.finalize().into_bytes()[..MAC_LEN]);
    short
}

/// Writes sections behind what is there.
struct Writer<'a> {
    out: &'a mut Vec<u8>,
    start: usize,
}

impl<'a> Writer<'a> {
    fn new(out: &'a mut Vec<u8>) -> Self {
        let start = out.len();
        out.push(VERSION);
        Self { out, start }
    }

    /// Appends a section; `write` must write at most 65,535 bytes.
    fn section(&mut self, tag: u8, write: impl FnOnce(&mut Vec<u8>)) {
        let header = self.out.len();
        self.out.extend([tag, 0, 0]);
        write(self.out);
        let len = (self.out.len() - header - 3) as u16;
        self.out[header + 1..header + 3].copy_from_slice(&len.to_be_bytes());
    }

    fn number(&mut self, tag: u8, number: u64) {
        self.section(tag, |out| out.extend(number.to_be_bytes()));
    }

    /// Appends a list in as many sections as it takes, none if it is empty.
    fn list<T>(&mut self, tag: u8, items: &[T], write: impl Fn(&mut Vec<u8>, &T)) {
        // No item is longer than 64 bytes.
        for chunk in items.chunks(1000) {
            self.section(tag, |out| chunk.iter().for_each(|item| write(out, item)));
        }
    }

    fn seal(mut self, keys: &KeyRing) {
        if let Some(key) = keys.newest() {
            let mac = mac(key, &self.out[self.start..]);
            self.section(tag::SEAL, |out| {
                out.push(key.id);
                out.extend(mac);
            });
        }
    }
}

fn write_ip(out: &mut Vec<u8>, ip: IpAddr) {
    match ip {
        IpAddr::V4(ip) => {
            out.push(4);
            out.extend(ip.octets());
        }
        IpAddr::V6(ip) => {
            out.push(6);
            out.extend(ip.octets());
        }
    }
}

fn write_five_tuple(out: &mut Vec<u8>, five_tuple: FiveTuple) {
    out.push(five_tuple.transport as u8);
    write_address(out, five_tuple.client);
    write_address(out, five_tuple.server);
}

fn write_address(out: &mut Vec<u8>, address: SocketAddr) {
    write_ip(out, address.ip());
    out.extend(address.port().to_be_bytes());
    if let SocketAddr::V6(address) = address {
        // A link-local client is reached by its scope.
        out.extend(address.scope_id().to_be_bytes());
    }
}

/// What the sections said so far.
#[derive(Default)]
struct Sections {
    relay_address: Option<IpAddr>,
    epoch: Option<u64>,
    sequence: Option<u64>,
    id: Option<AllocationId>,
    five_tuple: Option<FiveTuple>,
    mobility: Option<MobilityRecord>,
    proxy: Option<SocketAddr>,
    transaction_id: Option<TransactionId>,
    address_error: Option<AddressErrorCode>,
    reservation: Option<(ReservationToken, u64)>,
    relayed: Vec<RelayedAddr>,
    peer_transport: PeerTransport,
    username: Option<Vec<u8>>,
    session: Option<Session>,
    created_at: Option<u64>,
    expires_at: Option<u64>,
    family_expires_at: Vec<u64>,
    permissions: Vec<(IpAddr, u64)>,
    channels: Vec<(u16, PeerAddr, u64)>,
    ended: Option<EndReason>,
}

impl Sections {
    fn read(bytes: &[u8]) -> Option<Self> {
        let mut sections = Self::default();
        let mut rest = Reader(bytes);
        while !rest.0.is_empty() {
            let tag = rest.u8()?;
            let len = usize::from(rest.u16()?);
            let mut value = Reader(rest.take(len)?);
            match tag {
                tag::RELAY_ADDRESS => sections.relay_address = Some(value.ip()?),
                tag::EPOCH => sections.epoch = Some(value.u64()?),
                tag::SEQUENCE => sections.sequence = Some(value.u64()?),
                tag::ID => sections.id = Some(AllocationId(value.array()?)),
                tag::FIVE_TUPLE => sections.five_tuple = Some(value.five_tuple()?),
                tag::MOBILITY => sections.mobility = Some(value.mobility()?),
                tag::PROXY => sections.proxy = Some(value.address()?),
                tag::TRANSACTION_ID => sections.transaction_id = Some(TransactionId(value.array()?)),
                tag::ADDRESS_ERROR => {
                    let (family, error) = (value.u8()?, ErrorCode::new(value.u16()?)?);
                    sections.address_error = Some(AddressErrorCode { family, error });
                }
                tag::RESERVATION => {
                    sections.reservation = Some((ReservationToken(value.array()?), value.u64()?));
                }
                tag::RELAYED => value.list(&mut sections.relayed, |value| {
                    Some(RelayedAddr { bound: value.address()?, advertised: value.address()? })
                })?,
                tag::USERNAME => sections.username = Some(value.take(len)?.to_vec()),
                tag::CREATED_AT => sections.created_at = Some(value.u64()?),
                tag::EXPIRES_AT => sections.expires_at = Some(value.u64()?),
                tag::FAMILY_EXPIRES_AT => value.list(&mut sections.family_expires_at, Reader::u64)?,
                tag::PERMISSIONS => {
                    value.list(&mut sections.permissions, |value| Some((value.ip()?, value.u64()?)))?;
                }
                tag::CHANNELS => value.list(&mut sections.channels, |value| {
                    Some((value.u16()?, PeerAddr::new(value.address()?), value.u64()?))
                })?,
                tag::PEER_TRANSPORT => sections.peer_transport = PeerTransport::of(value.u8()?)?,
                tag::SESSION => {
                    let expires_at = value.u64()?;
                    let key = IntegrityKey::new(value.take(len.checked_sub(8)?)?, Integrity::Sha1)?;
                    sections.session = Some(Session { key, expires_at });
                }
                tag::ENDED => sections.ended = Some(end_reason(value.u8()?)?),
                // The seal, and what a newer writer added.
                _ => continue,
            }
            if !value.0.is_empty() {
                return None;
            }
        }
        Some(sections)
    }

    fn into_change(self) -> Option<Change> {
        let (id, epoch, sequence) = (self.id?, self.epoch?, self.sequence?);
        if let Some(reason) = self.ended {
            return Some(Change::End { id, epoch, sequence, reason });
        }
        if self.relayed.is_empty() {
            return None;
        }
        Some(Change::Put(Box::new(Record {
            relay_address: self.relay_address?,
            epoch,
            sequence,
            id,
            five_tuple: self.five_tuple?,
            mobility: self.mobility,
            proxy: self.proxy,
            transaction_id: self.transaction_id,
            address_error: self.address_error,
            reservation: self.reservation,
            relayed: self.relayed,
            peer_transport: self.peer_transport,
            username: self.username?,
            session: self.session,
            created_at: self.created_at?,
            expires_at: self.expires_at?,
            family_expires_at: self.family_expires_at,
            permissions: self.permissions,
            channels: self.channels,
        })))
    }
}

/// A reason that only a later version knows is an end all the same: an allocation must not come back for it.
fn end_reason(byte: u8) -> Option<EndReason> {
    use EndReason::{Closed, Deleted, Expired, Revoked};
    let known = [Deleted, Expired, Closed, Revoked].into_iter().find(|reason| *reason as u8 == byte);
    known.or((byte != 0).then_some(Deleted))
}

/// Reads values; `None` where the bytes end too soon or make no sense.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_be_bytes)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    fn ip(&mut self) -> Option<IpAddr> {
        match self.u8()? {
            4 => self.array::<4>().map(IpAddr::from),
            6 => self.array::<16>().map(IpAddr::from),
            _ => None,
        }
    }

    fn address(&mut self) -> Option<SocketAddr> {
        let ip = self.ip()?;
        let port = self.u16()?;
        Some(match ip {
            IpAddr::V4(_) => SocketAddr::new(ip, port),
            IpAddr::V6(ip) => SocketAddrV6::new(ip, port, 0, u32::from_be_bytes(self.array()?)).into(),
        })
    }

    fn five_tuple(&mut self) -> Option<FiveTuple> {
        let number = self.u8()?;
        let transport = [Transport::Udp, Transport::Tcp, Transport::Tls, Transport::Dtls]
            .into_iter()
            .find(|transport| *transport as u8 == number)?;
        Some(FiveTuple { transport, client: self.address()?, server: self.address()? })
    }

    fn mobility(&mut self) -> Option<MobilityRecord> {
        let ticket = Ticket::from_bytes(self.array()?);
        let moving = if self.0.is_empty() {
            None
        } else {
            Some(MoveRecord {
                to: self.five_tuple()?,
                by: Ticket::from_bytes(self.array()?),
                transaction_id: self.array()?,
            })
        };
        Some(MobilityRecord { ticket, moving })
    }

    fn list<T>(&mut self, items: &mut Vec<T>, read: impl Fn(&mut Self) -> Option<T>) -> Option<()> {
        while !self.0.is_empty() {
            items.push(read(self)?);
        }
        Some(())
    }
}

/// Crockford's base 32: no I, L, O and U.
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
const TEXT_LEN: usize = 26;

impl AllocationId {
    /// A new name: the time it was made, and 80 random bits.
    pub fn new(unix_millis: u64, random: [u8; 10]) -> Self {
        let mut id = [0; 16];
        id[..6].copy_from_slice(&unix_millis.to_be_bytes()[2..]);
        id[6..].copy_from_slice(&random);
        Self(id)
    }

    /// The 26-character text form (Crockford base 32).
    pub fn to_text(self) -> String {
        let bits = u128::from_be_bytes(self.0);
        let digit = |index: usize| ALPHABET[(bits >> (5 * index)) as usize & 31];
        (0..TEXT_LEN).rev().map(|index| char::from(digit(index))).collect()
    }

    /// Reads the text form, ignoring case.
    pub fn from_text(text: &str) -> Option<Self> {
        // 26 digits are 130 bits: the first one has three.
        if text.len() != TEXT_LEN || text.as_bytes()[0] > b'7' {
            return None;
        }
        let bits = text.bytes().try_fold(0_u128, |bits, character| {
            let character = character.to_ascii_uppercase();
            let digit = ALPHABET.iter().position(|known| *known == character)?;
            Some(bits << 5 | digit as u128)
        })?;
        Some(Self(bits.to_be_bytes()))
    }
}

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
