//! The file under the embedded store: one table in redb, written by a thread of its own, several transactions a flush.

use std::collections::BTreeMap;
use std::fs::{OpenOptions, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;

use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError, TableDefinition, TableError};
use tokio::sync::oneshot;

use crate::store::{Entry, StoreError};

/// Key to (revision of its last change, value).
const ENTRIES: TableDefinition<'static, &str, (i64, &[u8])> = TableDefinition::new("entries");
/// The store's own numbers, by name.
const NUMBERS: TableDefinition<'static, &str, i64> = TableDefinition::new("numbers");
/// Name of the last revision.
const REVISION: &str = "revision";
/// Transactions that share a flush, at most.
const BURST: usize = 1024;

/// A change of the file.
pub(super) enum Write {
    Put(String, Vec<u8>),
    Delete(String),
}

struct Job {
    revision: i64,
    writes: Vec<Write>,
    done: oneshot::Sender<Result<(), StoreError>>,
}

/// The file and the thread that writes it, which ends with this.
pub(super) struct Disk {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    /// What went wrong once: memory is then ahead of the file, so nothing more is taken.
    failed: Arc<Mutex<Option<String>>>,
}

impl Disk {
    /// Opens or makes the file and reads all of it.
    pub(super) fn open(path: &Path) -> Result<(Self, BTreeMap<String, Entry>, i64), StoreError> {
        let refuse = |reason: String| StoreError::Refused(format!("{}: {reason}", path.display()));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(|error| refuse(format!("cannot be opened ({error}); give store.path a writable place")))?;
        // It holds the cluster's keys, whoever made it.
        file.set_permissions(Permissions::from_mode(0o600))
            .map_err(|error| refuse(format!("cannot be made private ({error})")))?;
        drop(file);
        let database = Database::builder()
            .set_check_integrity_on_open(true)
            .create(path)
            .map_err(|error| refuse(explain(&error)))?;
        let (entries, revision) = read(&database).map_err(|error| refuse(damaged(&error)))?;

        let (jobs, queue) = mpsc::channel();
        let failed = Arc::new(Mutex::new(None));
        let writer = Writer { database, path: path.to_owned(), failed: failed.clone() };
        let thread = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || writer.run(&queue))
            .map_err(|error| refuse(format!("no thread to write it: {error}")))?;
        let disk = Self { jobs: Some(jobs), thread: Some(thread), failed };
        Ok((disk, entries, revision))
    }

    /// Fails for ever once a write has failed.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        match &*self.failed.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(reason) => Err(StoreError::Unavailable(reason.clone())),
            None => Ok(()),
        }
    }

    /// Queues changes; the receiver hears when they are on disk.
    pub(super) fn write(
        &self,
        revision: i64,
        writes: Vec<Write>,
    ) -> Result<oneshot::Receiver<Result<(), StoreError>>, StoreError> {
        let (done, flushed) = oneshot::channel();
        let job = Job { revision, writes, done };
        let sent = self.jobs.as_ref().and_then(|jobs| jobs.send(job).ok());
        sent.ok_or_else(|| StoreError::Unavailable("the store's file is closed".to_owned()))?;
        Ok(flushed)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // What was queued is written, then the file's lock is free for the next one.
            let _ = thread.join();
        }
    }
}

struct Writer {
    database: Database,
    path: PathBuf,
    failed: Arc<Mutex<Option<String>>>,
}

impl Writer {
    fn run(self, queue: &mpsc::Receiver<Job>) {
        while let Ok(first) = queue.recv() {
            let mut burst = vec![first];
            burst.extend(queue.try_iter().take(BURST - 1));
            let result = self.flush(&burst);
            for job in burst {
                // A caller that no longer waits is fine.
                let _ = job.done.send(result.clone());
            }
        }
    }

    fn flush(&self, burst: &[Job]) -> Result<(), StoreError> {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if failed.is_none()
            && let Err(error) = write(&self.database, burst)
        {
            let reason = format!("{}: cannot be written ({error}); make room and start again", self.path.display());
            tracing::error!(reason, "the store takes no more changes");
            *failed = Some(reason);
        }
        match &*failed {
            Some(reason) => Err(StoreError::Unavailable(reason.clone())),
            None => Ok(()),
        }
    }
}

fn write(database: &Database, burst: &[Job]) -> Result<(), Box<redb::Error>> {
    let transaction = database.begin_write().map_err(boxed)?;
    {
        let mut entries = transaction.open_table(ENTRIES).map_err(boxed)?;
        let mut numbers = transaction.open_table(NUMBERS).map_err(boxed)?;
        for job in burst {
            for write in &job.writes {
                match write {
                    Write::Put(key, value) => {
                        entries.insert(key.as_str(), (job.revision, value.as_slice())).map_err(boxed)?;
                    }
                    Write::Delete(key) => {
                        entries.remove(key.as_str()).map_err(boxed)?;
                    }
                }
            }
            numbers.insert(REVISION, job.revision).map_err(boxed)?;
        }
    }
    transaction.commit().map_err(boxed)
}

fn read(database: &Database) -> Result<(BTreeMap<String, Entry>, i64), Box<redb::Error>> {
    let transaction = database.begin_read().map_err(boxed)?;
    let mut entries = BTreeMap::new();
    let table = match transaction.open_table(ENTRIES) {
        Ok(table) => table,
        // A new file.
        Err(TableError::TableDoesNotExist(_)) => return Ok((entries, 0)),
        Err(error) => return Err(boxed(error)),
    };
    for row in table.iter().map_err(boxed)? {
        let (key, value) = row.map_err(boxed)?;
        let (key, (revision, value)) = (key.value().to_owned(), value.value());
        let entry = Entry { key: key.clone(), value: value.to_vec(), revision, lease: None };
        entries.insert(key, entry);
    }
    let numbers = transaction.open_table(NUMBERS).map_err(boxed)?;
    let revision = numbers.get(REVISION).map_err(boxed)?.map_or(0, |number| number.value());
    Ok((entries, revision))
}

fn boxed(error: impl Into<redb::Error>) -> Box<redb::Error> {
    Box::new(error.into())
}

fn explain(error: &DatabaseError) -> String {
    match error {
        DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => {
            "another process has it open; stop that one, or give store.path another file".to_owned()
        }
        DatabaseError::Storage(StorageError::Io(error)) if error.kind() != ErrorKind::InvalidData => {
            format!("cannot be read ({error})")
        }
        other => damaged(other),
    }
}

fn damaged(error: &impl std::fmt::Display) -> String {
    format!("not a store or damaged ({error}); move it away to begin with an empty one: the relays report again")
}
