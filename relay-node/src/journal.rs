//! Append-only record log in the state directory; restore reads it.
//!
//! Each worker appends to a file of its own, named by generation (one per start) and worker, so that nobody waits for
//! anybody. A file is a header and entries: length, CRC-32, encoded change. Nothing is synced: what is written outlives
//! the process, and the store outlives the machine. A new start writes the live records into files of the next
//! generation, and only when all of them stand are the old ones removed.
//!
//! A file is rewritten when most of it is history, so it stays within a few times its live records, and within
//! [`MAX_LENGTH`] in any case. Ends are kept beyond that for as long as the store may not know them ([`Ends`]). A disk that
//! is full or read-only costs the journal, not the service: answers leave without it, the store alone has the records,
//! and the file is rewritten whole as soon as there is room. Until then the mark [`WHOLE`] is missing, which a start
//! takes as a reason to wait for the store.
//!
//! | file | what it does |
//! |---|---|
//! | `read` | entries of a file, the newest of each allocation |
//! | `write` | the log of one worker |
//! | `succession` | from the files of one start to those of the next |
//! | `ends` | allocations that have ended and may still be stored |

mod ends;
mod read;
mod succession;
mod write;

pub use self::ends::Ends;
pub use self::read::{Loaded, Refused, load};
pub use self::succession::Succession;
pub use self::write::Journal;

/// First bytes of every file: name and version of the format.
const HEADER: [u8; 8] = *b"TPJRNL\0\x01";
/// Length and CRC-32 before each change.
const ENTRY_HEADER: usize = 8;
/// Longest entry that is believed: a record with the most permissions and channels is far below.
const MAX_ENTRY: usize = 1 << 20;
/// Most bytes of all files of a start together: half a million records. Beyond it the journal fails as on a full disk.
pub const MAX_LENGTH: u64 = 256 << 20;
/// Name of the empty file that says: nothing is missing in the others.
pub const WHOLE: &str = "whole";

#[cfg(test)]
mod tests;
