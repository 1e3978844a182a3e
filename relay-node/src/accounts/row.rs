//! The words of a row: which allocation, what it has sent, whether it has ended (pure).

use std::sync::atomic::{AtomicU64, Ordering};

use turn_core::meter::Direction;
use turn_core::{AllocationId, EndReason};

use crate::sys::rows::Row;

/// Over the words that say whose row it is; 0 is a free row.
const CHECK: usize = 0;
const ID: usize = 1;
const ORIGIN: usize = 3;
/// Packets and bytes to peers, packets and bytes to the client: the owner's additions, in the cache line of the origin.
const OWN: usize = 4;
/// The same of other workers.
const FOREIGN: usize = 8;
/// Reason (8 bits), Unix ms above them; 0 while it lives.
const ENDED: usize = 12;
/// Flags (8 bits), then how many bytes the name here has (8 bits), then the first six of them.
const FLAGS: usize = 13;
/// The rest of the name.
const NAME: usize = 14;

/// Bytes of the longest USERNAME that stands in the row itself.
pub(super) const SHORT_NAME: usize = 22;

/// In the word [`ENDED`]: why is not known.
const UNKNOWN: u64 = 0xFF;

/// First word of the header.
const MAGIC: u64 = u64::from_be_bytes(*b"TPusage1");
const BOOT: usize = 1;
const COMPLETE: usize = 3;

/// Packets and bytes of application data in each direction.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct Totals {
    /// From the client to peers.
    pub packets_to_peer: u64,
    /// From the client to peers.
    pub bytes_to_peer: u64,
    /// From peers to the client.
    pub packets_to_client: u64,
    /// From peers to the client.
    pub bytes_to_client: u64,
}

/// When and why an allocation ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ended {
    /// Not known where it ended with the process that had it.
    pub reason: Option<EndReason>,
    /// Unix ms.
    pub at: u64,
}

/// What else is known of a row.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Flags(u64);

impl Flags {
    pub(super) const NONE: Self = Self(0);
    /// The allocation is older than the row.
    pub(super) const CONTINUED: Self = Self(1);
    /// The machine stopped under it.
    pub(super) const UNCLEAN: Self = Self(2);

    pub(super) fn has(self, flag: Self) -> bool {
        self.0 & flag.0 != 0
    }
}

/// What the first row says of the file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Header {
    /// The machine's start during which it was written.
    pub(super) boot: u128,
    /// Nothing was written since it was brought to the disk.
    pub(super) complete: bool,
}

pub(super) fn header(row: &Row) -> Option<Header> {
    let boot = u128::from(load(row, BOOT)) << 64 | u128::from(load(row, BOOT + 1));
    (load(row, CHECK) == MAGIC).then(|| Header { boot, complete: load(row, COMPLETE) == 1 })
}

pub(super) fn begin(row: &Row, header: Header) {
    store(row, BOOT, (header.boot >> 64) as u64);
    store(row, BOOT + 1, header.boot as u64);
    store(row, COMPLETE, header.complete.into());
    row[CHECK].store(MAGIC, Ordering::Release);
}

/// Gives a free row to an allocation, with its user's name if that is short.
pub(super) fn open(row: &Row, id: AllocationId, origin: u64, flags: Flags, user: &[u8]) {
    row.iter().skip(1).for_each(|word| word.store(0, Ordering::Relaxed));
    let (high, low) = halves(id);
    store(row, ID, high);
    store(row, ID + 1, low);
    store(row, FLAGS, flags.0);
    if user.len() <= SHORT_NAME {
        let mut name = [0; 24];
        name[1] = user.len() as u8;
        name[2..2 + user.len()].copy_from_slice(user);
        let (words, _) = name.as_chunks::<8>();
        store(row, FLAGS, flags.0 | u64::from_le_bytes(words[0]));
        store(row, NAME, u64::from_le_bytes(words[1]));
        store(row, NAME + 1, u64::from_le_bytes(words[2]));
    }
    store(row, ORIGIN, origin);
    // Last: a process that is killed before leaves a free row.
    row[CHECK].store(check(high, low, origin), Ordering::Release);
}

pub(super) fn free(row: &Row) {
    row[CHECK].store(0, Ordering::Relaxed);
    row[ORIGIN].store(0, Ordering::Release);
}

/// Whose row it is, what is known of it, and its end; nothing of a free or a damaged row.
pub(super) fn read(row: &Row) -> Option<(AllocationId, u64, Flags, Option<Ended>)> {
    let check_word = row[CHECK].load(Ordering::Acquire);
    let (high, low, origin) = (load(row, ID), load(row, ID + 1), load(row, ORIGIN));
    if check_word == 0 || check_word != check(high, low, origin) {
        return None;
    }
    let id = AllocationId((u128::from(high) << 64 | u128::from(low)).to_be_bytes());
    Some((id, origin, Flags(load(row, FLAGS) & 0xFF), read_end(load(row, ENDED))))
}

/// Whether a row that has been opened is this allocation's.
pub(super) fn is_of(row: &Row, id: AllocationId) -> bool {
    (load(row, ID), load(row, ID + 1)) == halves(id)
}

pub(super) fn origin(row: &Row) -> u64 {
    load(row, ORIGIN)
}

/// The name that stands in a row; none if it stands elsewhere.
pub(super) fn name(row: &Row) -> Option<Vec<u8>> {
    let words = [FLAGS, NAME, NAME + 1].map(|word| load(row, word).to_le_bytes());
    let [_, length, name @ ..] = words.as_flattened() else { return None };
    name.get(..usize::from(*length)).filter(|name| !name.is_empty()).map(<[u8]>::to_vec)
}

pub(super) fn end(row: &Row, ended: Ended) {
    let reason = ended.reason.map_or(UNKNOWN, |reason| reason as u64);
    row[ENDED].store(ended.at << 8 | reason, Ordering::Release);
}

pub(super) fn mark_unclean(row: &Row) {
    store(row, FLAGS, load(row, FLAGS) | Flags::UNCLEAN.0);
}

/// Adds to the owner's counters, which only one thread may, or to the others.
pub(super) fn add(row: &Row, direction: Direction, foreign: bool, packets: u64, bytes: u64) {
    let first = 2 * direction as usize;
    if foreign {
        row[FOREIGN + first].fetch_add(packets, Ordering::Relaxed);
        row[FOREIGN + first + 1].fetch_add(bytes, Ordering::Relaxed);
    } else {
        let bump = |word: &AtomicU64, by| word.store(word.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
        bump(&row[OWN + first], packets);
        bump(&row[OWN + first + 1], bytes);
    }
}

pub(super) fn totals(row: &Row) -> Totals {
    let both = |counter: usize| load(row, OWN + counter).wrapping_add(load(row, FOREIGN + counter));
    let [packets_to_peer, bytes_to_peer, packets_to_client, bytes_to_client] = [0, 1, 2, 3].map(both);
    Totals { packets_to_peer, bytes_to_peer, packets_to_client, bytes_to_client }
}

fn read_end(word: u64) -> Option<Ended> {
    use EndReason::{Closed, Deleted, Expired, Revoked};
    let reason = [Deleted, Expired, Closed, Revoked].into_iter().find(|reason| *reason as u64 == word & 0xFF);
    (word != 0).then_some(Ended { reason, at: word >> 8 })
}

fn halves(id: AllocationId) -> (u64, u64) {
    let id = u128::from_be_bytes(id.0);
    ((id >> 64) as u64, id as u64)
}

/// FNV-1a over the words, never 0: who is not whose row it is must not be taken for it.
fn check(high: u64, low: u64, origin: u64) -> u64 {
    let words = [MAGIC, high, low, origin];
    let sum = words.iter().fold(0xCBF2_9CE4_8422_2325_u64, |sum, word| {
        word.to_be_bytes().iter().fold(sum, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3))
    });
    sum | 1
}

fn load(row: &Row, word: usize) -> u64 {
    row[word].load(Ordering::Relaxed)
}

fn store(row: &Row, word: usize, value: u64) {
    row[word].store(value, Ordering::Relaxed);
}
