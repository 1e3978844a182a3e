//! Append-only record log in the state directory; restore reads it.
//!
//! Each worker appends to a file of its own, named by generation (one per start) and worker, so that nobody waits for
//! anybody. A file is a header and entries: length, CRC-32, encoded change. Nothing is synced: what is written outlives
//! the process, and the store outlives the machine. A new start writes the live records into files of the next
//! generation, and only when all of them stand are the old ones removed.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use turn_core::record::{decode_change, encode_change};
use turn_core::{AllocationId, Change, KeyRing, Record, WorkerId};

/// First bytes of every file: name and version of the format.
const HEADER: [u8; 8] = *b"TPJRNL\0\x01";
/// Length and CRC-32 before each change.
const ENTRY_HEADER: usize = 8;
/// Longest entry that is believed: a record with the most permissions and channels is far below.
const MAX_ENTRY: usize = 1 << 20;
/// A file is rewritten when it is longer than this and than four times its live records.
const COMPACT_ABOVE: u64 = 1 << 20;
/// Between two log lines about failing writes.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// What a journal directory held.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The newest record of every allocation that had not ended.
    pub records: Vec<Record>,
    /// Entries that were damaged or of another seal, refused one by one.
    pub refused: u64,
    /// Log files found; 0 in a directory that is fresh or was deleted.
    pub files: usize,
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
                loaded.refused += 1;
                continue;
            }
        };
        read_entries(&bytes, |entry| match entry.and_then(|bytes| decode_change(bytes, keys).ok()) {
            Some(change) => merge(&mut newest, change),
            None => loaded.refused += 1,
        });
    }
    loaded.records = newest
        .into_values()
        .filter_map(|change| match change {
            Change::Put(record) => Some(*record),
            Change::End { .. } => None,
        })
        .collect();
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

/// Hands every entry to `each`, `None` for a damaged one; ends at a torn tail.
fn read_entries(bytes: &[u8], mut each: impl FnMut(Option<&[u8]>)) {
    let Some(mut rest) = bytes.strip_prefix(&HEADER) else {
        // Torn within the header: the process died before its first entry.
        if !HEADER.starts_with(bytes) {
            each(None);
        }
        return;
    };
    while let Some((header, behind)) = rest.split_first_chunk::<ENTRY_HEADER>() {
        let [l0, l1, l2, l3, c0, c1, c2, c3] = *header;
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if length > MAX_ENTRY {
            each(None);
            return;
        }
        let Some(entry) = behind.get(..length) else {
            return;
        };
        let intact = crc32fast::hash(entry) == u32::from_le_bytes([c0, c1, c2, c3]);
        each(intact.then_some(entry));
        rest = &behind[length..];
    }
}

/// The logs of a directory with their generations, oldest first; none if there is no directory.
fn files(directory: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
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

/// The files that a new start supersedes, and the generation it writes.
#[derive(Debug)]
pub struct Succession {
    directory: PathBuf,
    old: Vec<(u64, PathBuf)>,
}

impl Succession {
    /// Makes the directory (0700) if need be and looks at what it holds.
    ///
    /// # Errors
    /// As the file system says.
    pub fn begin(directory: &Path) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        Ok(Self { directory: directory.into(), old: files(directory)? })
    }

    /// Opens a worker's log in the new generation, with these records in it.
    ///
    /// # Errors
    /// As the file system says.
    pub fn open(&self, worker: WorkerId, records: impl Iterator<Item = Record>) -> io::Result<Journal> {
        let generation = self.old.last().map_or(0, |(generation, _)| *generation) + 1;
        let path = self.directory.join(format!("{generation:010}-{:02}.log", worker.0));
        let mut journal = Journal {
            file: rewrite(&path, &[])?,
            path,
            length: 0,
            compact_above: 0,
            buffer: Vec::new(),
            incomplete: false,
            errors: 0,
            logged: None,
        };
        journal.compact(records)?;
        Ok(journal)
    }

    /// Removes the old files; to be called when every worker's log stands. Oldest first: whatever is left after a
    /// crash is newer than what is gone.
    ///
    /// # Errors
    /// As the file system says. An old file that stays would bring ended allocations back.
    pub fn finish(self) -> io::Result<()> {
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            // A process died while it wrote this one.
            if path.extension().is_some_and(|extension| extension == "new") {
                fs::remove_file(path)?;
            }
        }
        self.old.iter().try_for_each(|(_, path)| fs::remove_file(path))
    }
}

/// Writes a whole file beside `path`, then puts it in its place; open for appending.
fn rewrite(path: &Path, entries: &[u8]) -> io::Result<File> {
    let beside = path.with_extension("new");
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&beside)?;
    file.write_all(&HEADER)?;
    file.write_all(entries)?;
    fs::rename(&beside, path)?;
    Ok(file)
}

/// The log of one worker.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    /// Of the file, as far as it is whole.
    length: u64,
    compact_above: u64,
    /// Entries of this turn.
    buffer: Vec<u8>,
    /// A write failed: the file lacks entries until it is rewritten.
    incomplete: bool,
    errors: u64,
    logged: Option<Instant>,
}

impl Journal {
    /// A log that is written to any file, to see when it is written.
    #[cfg(test)]
    pub(crate) fn of_file(file: File) -> Self {
        Self {
            file,
            path: PathBuf::new(),
            length: 0,
            compact_above: u64::MAX,
            buffer: Vec::new(),
            incomplete: false,
            errors: 0,
            logged: None,
        }
    }

    /// Notes a change for the next [`Journal::commit`].
    pub fn append(&mut self, change: &Change) {
        put_entry(&mut self.buffer, change);
    }

    /// Writes what was noted: one write. A failure (a full disk) is counted and logged once a minute; the service goes
    /// on, and the file is made whole by a later [`Journal::compact`].
    pub fn commit(&mut self) {
        if self.buffer.is_empty() {
            return;
        }
        match self.file.write_all(&self.buffer) {
            Ok(()) => self.length += self.buffer.len() as u64,
            Err(error) => {
                // What follows half an entry could not be read.
                let cut = self.file.set_len(self.length).and_then(|()| self.file.seek(io::SeekFrom::End(0)));
                self.failed(&cut.err().unwrap_or(error));
            }
        }
        self.buffer.clear();
    }

    /// Whether the file has grown far beyond its live records, or lacks some.
    pub fn wants_compaction(&self) -> bool {
        self.incomplete || self.length > self.compact_above
    }

    /// Replaces the file by one that holds `records` only. The old one stands until the new one is whole.
    ///
    /// # Errors
    /// As the file system says; the old file goes on.
    pub fn compact(&mut self, records: impl Iterator<Item = Record>) -> io::Result<()> {
        let mut entries = Vec::new();
        for record in records {
            put_entry(&mut entries, &Change::Put(Box::new(record)));
        }
        self.file = rewrite(&self.path, &entries)?;
        self.length = (HEADER.len() + entries.len()) as u64;
        self.compact_above = COMPACT_ABOVE.max(4 * self.length);
        self.incomplete = false;
        Ok(())
    }

    /// Counts a failed write and says so, once a minute.
    pub fn failed(&mut self, error: &io::Error) {
        self.errors += 1;
        self.incomplete = true;
        if self.logged.is_none_or(|logged| logged.elapsed() >= LOG_EVERY) {
            self.logged = Some(Instant::now());
            tracing::error!(
                file = %self.path.display(), %error, errors = self.errors,
                "the journal cannot be written: allocations made now end with this process"
            );
        }
    }

    /// Writes that failed.
    pub fn errors(&self) -> u64 {
        self.errors
    }
}

fn put_entry(buffer: &mut Vec<u8>, change: &Change) {
    let start = buffer.len();
    buffer.extend([0; ENTRY_HEADER]);
    // Not sealed: whoever can write here (mode 0700) could as well replace the relay. The checksum is against accidents.
    buffer.extend(encode_change(change, &KeyRing::default()));
    let entry = &buffer[start + ENTRY_HEADER..];
    let (length, crc) = (entry.len() as u32, crc32fast::hash(entry));
    buffer[start..start + 4].copy_from_slice(&length.to_le_bytes());
    buffer[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use turn_core::{EndReason, FiveTuple, PeerTransport, RelayedAddr, Transport};

    use super::*;

    fn record(id: u8, epoch: u64, sequence: u64) -> Record {
        Record {
            relay_address: [127, 0, 0, 1].into(),
            epoch,
            sequence,
            id: AllocationId([id; 16]),
            five_tuple: FiveTuple {
                transport: Transport::Udp,
                client: ([192, 0, 2, 1], 1).into(),
                server: ([127, 0, 0, 1], 3478).into(),
            },
            relayed: vec![RelayedAddr {
                bound: ([127, 0, 0, 1], 50_000).into(),
                advertised: ([192, 0, 2, 9], 50_000).into(),
            }],
            peer_transport: PeerTransport::Udp,
            session: None,
            username: b"alice".to_vec(),
            created_at: 1,
            expires_at: 2,
            family_expires_at: Vec::new(),
            mobility: None,
            permissions: Vec::new(),
            channels: Vec::new(),
        }
    }

    fn put(id: u8, epoch: u64, sequence: u64) -> Change {
        Change::Put(Box::new(record(id, epoch, sequence)))
    }

    fn end(id: u8, epoch: u64, sequence: u64) -> Change {
        Change::End { id: AllocationId([id; 16]), epoch, sequence, reason: EndReason::Deleted }
    }

    /// (id, sequence) of every record, by id.
    fn loaded(directory: &Path) -> (Vec<(u8, u64)>, u64) {
        let loaded = load(directory, &KeyRing::default()).expect("readable");
        let mut records: Vec<_> = loaded.records.iter().map(|record| (record.id.0[0], record.sequence)).collect();
        records.sort_unstable();
        (records, loaded.refused)
    }

    fn write(journal: &mut Journal, changes: &[Change]) {
        changes.iter().for_each(|change| journal.append(change));
        journal.commit();
    }

    fn none() -> std::iter::Empty<Record> {
        std::iter::empty()
    }

    #[test]
    fn the_newest_of_all_files_wins_and_tombstones_end() -> io::Result<()> {
        let directory = tempfile::tempdir()?;
        let directory = directory.path().join("journal");
        assert_eq!(load(&directory, &KeyRing::default())?.files, 0, "there is no directory");
        let succession = Succession::begin(&directory)?;
        let mut first = succession.open(WorkerId(0), none())?;
        let mut second = succession.open(WorkerId(1), none())?;
        write(&mut first, &[put(1, 1, 1), put(2, 1, 1), put(1, 1, 2), put(3, 1, 1), end(3, 1, 2), end(4, 2, 1)]);
        // Another worker's file, older and newer than the first: by (epoch, sequence), never by place.
        write(
            &mut second,
            &[put(1, 1, 1), put(2, 2, 7), put(2, 1, 9), put(3, 1, 1), put(4, 1, 9), end(5, 1, 1), put(5, 2, 1)],
        );
        assert_eq!(loaded(&directory), (vec![(1, 2), (2, 7), (5, 1)], 0));
        assert_eq!(load(&directory, &KeyRing::default())?.files, 2);
        Ok(())
    }

    #[test]
    fn a_torn_tail_is_normal_and_damage_costs_one_entry() -> io::Result<()> {
        let directory = tempfile::tempdir()?;
        let succession = Succession::begin(directory.path())?;
        let mut journal = succession.open(WorkerId(0), none())?;
        write(&mut journal, &[put(1, 1, 1)]);
        let first = fs::read(&journal.path)?.len();
        write(&mut journal, &[put(2, 1, 1)]);
        let second = fs::read(&journal.path)?.len();
        write(&mut journal, &[put(3, 1, 1)]);
        let whole = fs::read(&journal.path)?;
        for cut in 0..whole.len() {
            fs::write(&journal.path, &whole[..cut])?;
            let expected: &[(u8, u64)] = match cut {
                _ if cut < first => &[],
                _ if cut < second => &[(1, 1)],
                _ => &[(1, 1), (2, 1)],
            };
            assert_eq!(loaded(directory.path()), (expected.to_vec(), 0), "cut at {cut}");
        }
        let mut damaged = whole;
        damaged[first + ENTRY_HEADER + 3] ^= 1;
        fs::write(&journal.path, &damaged)?;
        assert_eq!(loaded(directory.path()), (vec![(1, 1), (3, 1)], 1));
        fs::write(&journal.path, b"another file altogether")?;
        assert_eq!(loaded(directory.path()), (vec![], 1));
        Ok(())
    }

    #[test]
    fn a_new_start_folds_the_old_files_without_a_gap() -> io::Result<()> {
        let directory = tempfile::tempdir()?;
        let directory = directory.path();
        let mut old = Succession::begin(directory)?.open(WorkerId(0), none())?;
        write(&mut old, &[put(1, 1, 1), put(2, 1, 1)]);

        let succession = Succession::begin(directory)?;
        assert_eq!(loaded(directory).0, [(1, 1), (2, 1)], "before");
        let mut zero = succession.open(WorkerId(0), [record(2, 1, 1)].into_iter())?;
        let mut one = succession.open(WorkerId(1), [record(1, 1, 1)].into_iter())?;
        assert_eq!(loaded(directory).0, [(1, 1), (2, 1)], "old and new together");
        write(&mut zero, &[put(2, 2, 2)]);
        write(&mut one, &[end(1, 2, 2)]);
        fs::write(directory.join("0000000001-07.new"), b"of a process that died")?;
        succession.finish()?;
        assert_eq!(loaded(directory).0, [(2, 2)]);
        assert_eq!(fs::read_dir(directory)?.count(), 2, "only the new files");
        Ok(())
    }

    #[test]
    fn compaction_keeps_the_live_records_and_goes_on() -> io::Result<()> {
        let directory = tempfile::tempdir()?;
        let mut journal = Succession::begin(directory.path())?.open(WorkerId(0), none())?;
        let mut sequence = 0;
        while !journal.wants_compaction() {
            sequence += 1;
            write(&mut journal, &[put(1, 1, sequence)]);
        }
        assert!(journal.length > COMPACT_ABOVE);
        journal.compact([record(1, 1, sequence)].into_iter())?;
        assert!(!journal.wants_compaction() && journal.length < 1000);
        write(&mut journal, &[put(2, 1, 1)]);
        assert_eq!(loaded(directory.path()).0, [(1, sequence), (2, 1)]);
        Ok(())
    }

    #[test]
    fn a_full_disk_is_counted_and_made_good_later() -> io::Result<()> {
        let directory = tempfile::tempdir()?;
        let mut journal = Succession::begin(directory.path())?.open(WorkerId(0), none())?;
        write(&mut journal, &[put(1, 1, 1)]);
        let good = std::mem::replace(&mut journal.file, OpenOptions::new().write(true).open("/dev/full")?);
        write(&mut journal, &[put(2, 1, 1)]);
        assert_eq!(journal.errors(), 1);
        assert!(journal.wants_compaction(), "an entry is missing");
        journal.file = good;
        write(&mut journal, &[put(3, 1, 1)]);
        assert_eq!(loaded(directory.path()).0, [(1, 1), (3, 1)], "the service goes on");
        journal.compact([record(1, 1, 1), record(2, 1, 1), record(3, 1, 1)].into_iter())?;
        assert_eq!(loaded(directory.path()).0, [(1, 1), (2, 1), (3, 1)]);
        assert!(!journal.wants_compaction());
        Ok(())
    }
}
