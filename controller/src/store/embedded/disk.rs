//! The file under the embedded store: one table in redb, written by a thread of its own, several transactions a flush.

use std::collections::BTreeMap;
use std::fs::{OpenOptions, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

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
/// Between two attempts to write what could not be written.
const RETRY: Duration = Duration::from_millis(500);

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
    /// What is wrong while memory is ahead of the file: nothing more is taken then.
    failed: Arc<Mutex<Option<StoreError>>>,
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
        let database = database(path).map_err(|error| refuse(explain(&error)))?;
        let (entries, revision) = read(&database).map_err(|error| refuse(damaged(&error)))?;

        let (jobs, queue) = mpsc::channel();
        let failed = Arc::new(Mutex::new(None));
        let writer =
            Writer { database: Some(database), path: path.to_owned(), failed: failed.clone(), owed: Vec::new() };
        let thread = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || writer.run(&queue))
            .map_err(|error| refuse(format!("no thread to write it: {error}")))?;
        let disk = Self { jobs: Some(jobs), thread: Some(thread), failed };
        Ok((disk, entries, revision))
    }

    /// Whether the file takes changes; after a failed write it does not until what is owed to it is written.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        match &*self.failed.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error.clone()),
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
    /// `None` after a failure: it has to be opened anew.
    database: Option<Database>,
    path: PathBuf,
    failed: Arc<Mutex<Option<StoreError>>>,
    /// What memory has and the file has not, in order.
    owed: Vec<(i64, Vec<Write>)>,
}

impl Writer {
    fn run(mut self, queue: &mpsc::Receiver<Job>) {
        loop {
            let first = if self.owed.is_empty() {
                queue.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                queue.recv_timeout(RETRY)
            };
            let mut waiting = Vec::new();
            match first {
                Ok(first) => {
                    for job in std::iter::once(first).chain(queue.try_iter().take(BURST - 1)) {
                        self.owed.push((job.revision, job.writes));
                        waiting.push(job.done);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    if !self.owed.is_empty() && self.flush().is_err() {
                        tracing::error!(changes = self.owed.len(), "the store ends without its last changes");
                    }
                    return;
                }
            }
            let result = self.flush();
            for done in waiting {
                // A caller that no longer waits is fine.
                let _ = done.send(result.clone());
            }
        }
    }

    /// Writes what is owed. While that fails, nothing more is taken; what was taken is written when it no longer does.
    fn flush(&mut self) -> Result<(), StoreError> {
        let result = self.write();
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(()) => {
                self.owed.clear();
                if failed.take().is_some() {
                    tracing::info!("the store takes changes again");
                }
                Ok(())
            }
            Err(error) => {
                // redb takes nothing more after a failure.
                self.database = None;
                let reason = format!(
                    "{} cannot be written ({error}); make room on its disk, then it goes on by itself",
                    self.path.display()
                );
                if failed.is_none() {
                    tracing::error!(reason, "the store takes no more changes");
                }
                *failed = Some(if is_full(&error) {
                    StoreError::Full(reason.clone())
                } else {
                    StoreError::Unavailable(reason.clone())
                });
                // It is in memory already, and will be in the file.
                Err(StoreError::Unavailable(reason))
            }
        }
    }

    fn write(&mut self) -> Result<(), Box<redb::Error>> {
        let database = match &mut self.database {
            Some(database) => database,
            None => self.database.insert(database(&self.path).map_err(boxed)?),
        };
        write(database, &self.owed)
    }
}

fn database(path: &Path) -> Result<Database, DatabaseError> {
    Database::builder().set_check_integrity_on_open(true).create(path)
}

fn is_full(error: &redb::Error) -> bool {
    matches!(error, redb::Error::Io(error)
        if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge))
}

fn write(database: &Database, owed: &[(i64, Vec<Write>)]) -> Result<(), Box<redb::Error>> {
    let transaction = database.begin_write().map_err(boxed)?;
    {
        let mut entries = transaction.open_table(ENTRIES).map_err(boxed)?;
        let mut numbers = transaction.open_table(NUMBERS).map_err(boxed)?;
        for (revision, writes) in owed {
            for write in writes {
                match write {
                    Write::Put(key, value) => {
                        entries.insert(key.as_str(), (*revision, value.as_slice())).map_err(boxed)?;
                    }
                    Write::Delete(key) => {
                        entries.remove(key.as_str()).map_err(boxed)?;
                    }
                }
            }
            numbers.insert(REVISION, *revision).map_err(boxed)?;
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
