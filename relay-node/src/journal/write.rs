//! The log of one worker.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use turn_core::record::append_change;
use turn_core::{AllocationId, Change, KeyRing, Record, WorkerId};

use super::{ENTRY_HEADER, HEADER, Succession};

/// A file is rewritten when it is longer than this and than four times its live records.
const COMPACT_ABOVE: u64 = 1 << 20;
/// Bytes that are written at a time when a file is rewritten.
const PIECE: usize = 32 << 10;
/// From a failed write to the first attempt to make it good, and the longest between two. Each attempt encodes every
/// record of the worker.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(8));

/// The log of one worker.
#[derive(Debug)]
pub struct Journal {
    succession: Arc<Succession>,
    worker: WorkerId,
    path: PathBuf,
    file: Option<File>,
    /// Of the file, as far as it is whole.
    length: u64,
    compact_above: u64,
    /// Entries of this turn.
    buffer: Vec<u8>,
    /// The file lacks entries until it is rewritten.
    failed: bool,
    /// When to try to rewrite it, and how long to wait after that.
    retry: Option<(Instant, Duration)>,
    errors: u64,
}

impl Journal {
    pub(super) fn new(succession: Arc<Succession>, worker: WorkerId, path: PathBuf) -> Self {
        Self {
            succession,
            worker,
            path,
            file: None,
            length: 0,
            compact_above: 0,
            buffer: Vec::new(),
            failed: false,
            retry: None,
            errors: 0,
        }
    }

    /// A log that is written to any file, to see when it is written.
    #[cfg(test)]
    pub(crate) fn of_file(succession: Arc<Succession>, file: File) -> Self {
        let journal = Self::new(succession, WorkerId(0), PathBuf::new());
        Self { file: Some(file), compact_above: u64::MAX, ..journal }
    }

    /// Notes a change for the next [`Journal::commit`].
    pub fn append(&mut self, change: &Change, now: Instant) {
        self.succession.ends.note(self.worker, change, now);
        self.append_unheard(change);
    }

    /// The same, of an end that revives nothing if it is forgotten: the store has never heard of the allocation.
    pub fn append_unheard(&mut self, change: &Change) {
        // What fails is rewritten whole.
        if !self.failed {
            put_entry(&mut self.buffer, change);
        }
    }

    /// Writes what was noted: one write. A failure (a full disk) is counted, and said once; the service goes on, and
    /// the file is made whole by a later [`Journal::compact`].
    pub fn commit(&mut self, now: Instant) {
        if self.buffer.is_empty() {
            return;
        }
        let length = self.length + self.buffer.len() as u64;
        let written = if length > self.succession.most {
            Err(too_long(self.succession.most))
        } else {
            self.file.as_mut().map_or(Ok(()), |file| file.write_all(&self.buffer))
        };
        match written {
            Ok(()) => self.length = length,
            Err(error) => {
                if let Some(file) = &mut self.file {
                    // What follows half an entry could not be read; whatever that comes to, the file is replaced.
                    let _ = file.set_len(self.length).and_then(|()| file.seek(io::SeekFrom::End(0)));
                }
                self.fail(&error, now);
            }
        }
        self.buffer.clear();
    }

    /// Whether the file has grown far beyond its live records, or lacks some, and is to be rewritten now.
    pub fn wants_compaction(&self, now: Instant) -> bool {
        match self.retry {
            Some((at, _)) => at <= now,
            None => self.length > self.compact_above,
        }
    }

    /// Replaces the file by one that holds `records` only, and the ends that the store may not know. The old one stands
    /// until the new one is whole, and goes on if there is no room for both.
    pub fn compact(&mut self, records: impl Iterator<Item = Record>, now: Instant) {
        let ends = self.succession.ends.of(self.worker).into_iter();
        let entries = ends.chain(records.map(|record| Change::Put(Box::new(record))));
        let made = self.succession.make_directory();
        match made.and_then(|()| rewrite(&self.path, entries, self.succession.most)) {
            Ok((file, length)) => {
                self.file = Some(file);
                self.length = length;
                self.compact_above = COMPACT_ABOVE.max(4 * length).min(self.succession.most / 4 * 3).max(length + 1);
                self.retry = None;
                // What it was to hold besides is in `records`.
                self.buffer.clear();
                if std::mem::take(&mut self.failed) {
                    tracing::info!(file = %self.path.display(), "the journal can be written again and is whole");
                }
                self.succession.stands(self.worker);
            }
            Err(error) if self.failed || self.file.is_none() => self.fail(&error, now),
            // Nothing is missing; it is only longer than it need be.
            Err(_) => self.wait(now),
        }
    }

    fn fail(&mut self, error: &io::Error, now: Instant) {
        self.errors += 1;
        self.wait(now);
        if !std::mem::replace(&mut self.failed, true) {
            self.succession.fails(self.worker);
            tracing::error!(
                file = %self.path.display(), %error,
                "the journal cannot be written: the store alone keeps allocations from now on; make room, and it goes on \
                 by itself"
            );
        }
    }

    fn wait(&mut self, now: Instant) {
        let pause = self.retry.map_or(RETRY.0, |(_, pause)| (pause * 2).min(RETRY.1));
        self.retry = Some((now + pause, pause));
    }

    /// Whether allocations made now would end with this process, but for the store.
    pub fn is_failed(&self) -> bool {
        self.failed
    }

    /// Whether an allocation has ended here, by this process or one before it, and the store may not know.
    pub fn has_ended(&self, id: AllocationId) -> bool {
        self.succession.ends.contains(id)
    }

    /// Writes that failed.
    pub fn errors(&self) -> u64 {
        self.errors
    }
}

fn too_long(most: u64) -> io::Error {
    io::Error::new(io::ErrorKind::FileTooLarge, format!("it would be longer than {most} bytes"))
}

/// Writes a whole file of at most `most` bytes beside `path`, then puts it in its place; open for appending, with its
/// length. Piece by piece: the entries of a large node are megabytes.
fn rewrite(path: &Path, entries: impl Iterator<Item = Change>, most: u64) -> io::Result<(File, u64)> {
    let beside = path.with_extension("new");
    let written = (|| {
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&beside)?;
        let mut length = 0;
        let mut write = |piece: &mut Vec<u8>| {
            length += piece.len() as u64;
            if length > most {
                return Err(too_long(most));
            }
            file.write_all(piece)?;
            piece.clear();
            Ok(())
        };
        let mut piece = Vec::with_capacity(2 * PIECE);
        piece.extend(HEADER);
        for entry in entries {
            put_entry(&mut piece, &entry);
            if piece.len() >= PIECE {
                write(&mut piece)?;
            }
        }
        write(&mut piece)?;
        fs::rename(&beside, path)?;
        Ok((file, length))
    })();
    if written.is_err() {
        // Half a file takes room that others need. It may not even be there.
        let _ = fs::remove_file(&beside);
    }
    written
}

fn put_entry(buffer: &mut Vec<u8>, change: &Change) {
    let start = buffer.len();
    buffer.extend([0; ENTRY_HEADER]);
    // Not sealed: whoever can write here (mode 0700) could as well replace the relay. The checksum is against accidents.
    append_change(change, &KeyRing::default(), buffer);
    let entry = &buffer[start + ENTRY_HEADER..];
    let (length, crc) = (entry.len() as u32, crc32fast::hash(entry));
    buffer[start..start + 4].copy_from_slice(&length.to_le_bytes());
    buffer[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
}

#[cfg(test)]
impl Journal {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Puts another file in the place of the one that is open; answers the one that was.
    pub(super) fn swap_file(&mut self, file: File) -> Option<File> {
        self.file.replace(file)
    }
}
