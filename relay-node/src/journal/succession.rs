//! From the files of one start to those of the next.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use turn_core::{Record, WorkerId};

use super::read::files;
use super::{Ends, Journal, MAX_LENGTH, WHOLE};

/// The files that a new start supersedes, the generation it writes, and how far it has come: the old files go when every
/// worker's log stands, and the mark [`WHOLE`] is there while none has failed.
#[derive(Debug)]
pub struct Succession {
    directory: PathBuf,
    generation: u64,
    workers: u16,
    /// Most bytes of one worker's file.
    pub(super) most: u64,
    pub(super) ends: Arc<Ends>,
    progress: Mutex<Progress>,
}

#[derive(Debug)]
struct Progress {
    old: Vec<PathBuf>,
    standing: HashSet<WorkerId>,
}

impl Succession {
    /// Looks at what `directory` holds; its files are superseded by those of `workers`.
    ///
    /// # Errors
    /// When it cannot be read. One that cannot be made or written is found out by the workers.
    pub fn begin(directory: &Path, workers: u16, ends: Arc<Ends>) -> io::Result<Arc<Self>> {
        Self::bounded(directory, workers, ends, MAX_LENGTH)
    }

    pub(super) fn bounded(directory: &Path, workers: u16, ends: Arc<Ends>, most: u64) -> io::Result<Arc<Self>> {
        let old = files(directory)?;
        Ok(Arc::new(Self {
            directory: directory.into(),
            generation: old.last().map_or(0, |(generation, _)| *generation) + 1,
            workers,
            most: most / u64::from(workers.max(1)),
            ends,
            progress: Mutex::new(Progress {
                old: old.into_iter().map(|(_, path)| path).collect(),
                standing: HashSet::new(),
            }),
        }))
    }

    /// Opens a worker's log in the new generation, with these records in it. On a disk that does not take it the log
    /// has failed, and tries again later.
    pub fn open(self: &Arc<Self>, worker: WorkerId, records: impl Iterator<Item = Record>, now: Instant) -> Journal {
        let path = self.directory.join(format!("{:010}-{:02}.log", self.generation, worker.0));
        let mut journal = Journal::new(Arc::clone(self), worker, path);
        journal.compact(records, now);
        journal
    }

    /// Makes the directory (0700) if it is not there.
    pub(super) fn make_directory(&self) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.directory)
    }

    /// A worker's log is whole. When all are, the old files go, and the mark is set.
    pub(super) fn stands(&self, worker: WorkerId) {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        progress.standing.insert(worker);
        if progress.standing.len() < usize::from(self.workers) {
            return;
        }
        if let Err(error) = self.remove(&mut progress.old).and_then(|()| self.mark()) {
            let directory = self.directory.display();
            tracing::warn!(%directory, %error, "old journals stay until the next start; allocations may come back that have ended");
        }
    }

    /// A worker's log lacks something.
    pub(super) fn fails(&self, worker: WorkerId) {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        progress.standing.remove(&worker);
        // Taking a name away needs no room; where even that is refused the next start trusts what there is.
        if let Err(error) = fs::remove_file(self.directory.join(WHOLE)) {
            tracing::debug!(%error, "the mark of a whole journal stays");
        }
    }

    /// Oldest first: whatever is left after a crash is newer than what is gone.
    fn remove(&self, old: &mut Vec<PathBuf>) -> io::Result<()> {
        while let Some(path) = old.first() {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => drop(old.remove(0)),
            }
        }
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            // A process died while it wrote this one; those of this generation may be being written.
            let is_ours = |name: &str| name.starts_with(&format!("{:010}-", self.generation));
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if path.extension().is_some_and(|extension| extension == "new") && !is_ours(name) {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    fn mark(&self) -> io::Result<()> {
        OpenOptions::new().create(true).append(true).mode(0o600).open(self.directory.join(WHOLE)).map(drop)
    }
}
