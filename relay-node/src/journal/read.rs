//! What a journal directory holds.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use turn_core::record::{RecordError, decode_change};
use turn_core::{AllocationId, Change, KeyRing, Record};

use super::{ENTRY_HEADER, HEADER, MAX_ENTRY, WHOLE};

/// What a journal directory held.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The newest record of every allocation that had not ended.
    pub records: Vec<Record>,
    /// The tombstones: the store may not know them yet.
    pub ended: Vec<Change>,
    /// What could not be believed, one by one.
    pub refused: Refused,
    /// Log files found; 0 in a directory that is fresh or was deleted.
    pub files: usize,
    /// Every answered allocation is in `records`: nothing was refused, and every write had succeeded.
    pub whole: bool,
}

/// Entries, or whole files, that were refused, by reason.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Refused {
    /// The checksum is wrong, the file cannot be read, or what is written there is no change.
    pub damaged: u64,
    /// Of a version this binary does not read.
    pub version: u64,
}

impl Refused {
    /// All of them.
    pub fn total(self) -> u64 {
        self.damaged + self.version
    }
}

/// Why an entry is refused.
enum Refusal {
    Damaged,
    Version,
}

/// Reads every log in `directory`, newest (epoch, sequence) wins, tombstones end. A torn tail is normal, and so is a
/// directory that is not there.
///
/// # Errors
/// Only when the directory cannot be read.
pub fn load(directory: &Path, keys: &KeyRing) -> io::Result<Loaded> {
    let mut loaded = Loaded::default();
    let mut newest: HashMap<AllocationId, Change> = HashMap::new();
    for (_, path) in files(directory)? {
        loaded.files += 1;
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) => {
                tracing::error!(file = %path.display(), %error, "a journal cannot be read; its allocations are lost here");
                loaded.refused.damaged += 1;
                continue;
            }
        };
        read_entries(&bytes, |entry| {
            let change = entry.and_then(|bytes| {
                decode_change(bytes, keys).map_err(|error| match error {
                    RecordError::Version(_) => Refusal::Version,
                    _ => Refusal::Damaged,
                })
            });
            match change {
                Ok(change) => merge(&mut newest, change),
                Err(Refusal::Damaged) => loaded.refused.damaged += 1,
                Err(Refusal::Version) => loaded.refused.version += 1,
            }
        });
    }
    for change in newest.into_values() {
        match change {
            Change::Put(record) => loaded.records.push(*record),
            end @ Change::End { .. } => loaded.ended.push(end),
        }
    }
    loaded.whole = loaded.files > 0 && loaded.refused.total() == 0 && directory.join(WHOLE).exists();
    Ok(loaded)
}

fn merge(newest: &mut HashMap<AllocationId, Change>, change: Change) {
    let (id, version) = version(&change);
    match newest.get_mut(&id) {
        Some(known) if self::version(known).1 >= version => {}
        Some(known) => *known = change,
        None => drop(newest.insert(id, change)),
    }
}

fn version(change: &Change) -> (AllocationId, (u64, u64)) {
    match change {
        Change::Put(record) => (record.id, (record.epoch, record.sequence)),
        Change::End { id, epoch, sequence, .. } => (*id, (*epoch, *sequence)),
    }
}

/// Hands every entry to `each`; ends at a torn tail.
fn read_entries(bytes: &[u8], mut each: impl FnMut(Result<&[u8], Refusal>)) {
    let Some(mut rest) = bytes.strip_prefix(&HEADER) else {
        // Torn within the header: the process died before its first entry.
        if !HEADER.starts_with(bytes) {
            let name = HEADER.len() - 1;
            let is_ours = bytes.get(..name) == HEADER.get(..name);
            each(Err(if is_ours { Refusal::Version } else { Refusal::Damaged }));
        }
        return;
    };
    while let Some((header, behind)) = rest.split_first_chunk::<ENTRY_HEADER>() {
        let [l0, l1, l2, l3, c0, c1, c2, c3] = *header;
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if length > MAX_ENTRY {
            each(Err(Refusal::Damaged));
            return;
        }
        let Some(entry) = behind.get(..length) else {
            return;
        };
        let intact = crc32fast::hash(entry) == u32::from_le_bytes([c0, c1, c2, c3]);
        each(if intact { Ok(entry) } else { Err(Refusal::Damaged) });
        rest = &behind[length..];
    }
}

/// The logs of a directory with their generations, oldest first; none if there is no directory.
pub(super) fn files(directory: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let generation = name
            .strip_suffix(".log")
            .and_then(|name| name.split_once('-'))
            .and_then(|(generation, _)| generation.parse().ok());
        if let Some(generation) = generation {
            found.push((generation, path));
        }
    }
    found.sort();
    Ok(found)
}
