//! What a relay keeps on disk beside its journal: who it is, its epoch, what the last controller said.
//!
//! The directory may be deleted at any time (promise P2): everything in it is either found again in the store or only
//! saves the wait for a controller. Whoever holds its lock has proof that no other process serves from it.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use turn_core::{Key, KeyRing};

const LOCK: &str = "lock";
const NODE: &str = "node";
const EPOCH: &str = "epoch";
const SETTINGS: &str = "settings";
const MEMBERS: &str = "members";
const NONCE_KEY: &str = "nonce-key";
const JOURNAL: &str = "journal";
const USAGE: &str = "usage";
/// Stands from the first start without a journal until the store's records have been asked for.
const RESTORE: &str = "restore-wanted";
/// Stands while this relay owns its address as far as it knows.
const OWNER: &str = "owner";

/// Why a state directory cannot be used. One line, with what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// Another process holds the lock.
    #[error("state_dir {0} is in use by another relay-node; stop it, or give this one a directory of its own")]
    InUse(PathBuf),
    /// It was made by a relay of another name.
    #[error(
        "state_dir {directory} belongs to relay {owner:?}, this is {node_id:?}; use another directory or delete it"
    )]
    OtherNode {
        /// The directory.
        directory: PathBuf,
        /// Whose it is.
        owner: String,
        /// Who asked.
        node_id: String,
    },
    /// Others can read it, and its mode cannot be changed.
    #[error("state_dir {directory} is open to others (mode {mode:04o}) and {error}; make it 0700")]
    TooOpen {
        /// The directory.
        directory: PathBuf,
        /// Permission bits.
        mode: u32,
        /// Why the mode stays.
        error: io::Error,
    },
    /// The epoch must not restart: fenced writes depend on it.
    #[error("{0} holds no number; delete the state directory to start afresh from the store")]
    Epoch(PathBuf),
    /// The file system refuses.
    #[error("{path}: {error}; state_dir must be a directory this relay may write")]
    Io {
        /// What was touched.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
}

/// An open state directory; its lock ends with this value.
#[derive(Debug)]
pub struct StateDirectory {
    path: PathBuf,
    restore_wanted: bool,
    /// What could not be written yet, by file.
    unkept: Mutex<BTreeMap<&'static str, Vec<u8>>>,
    _lock: File,
}

impl StateDirectory {
    /// Makes the directory (0700) if it is not there, locks it and checks whose it is.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn open(path: &Path, node_id: &str) -> Result<Self, StateError> {
        let at = |path: &Path, error: io::Error| StateError::Io { path: path.into(), error };
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|error| at(path, error))?;
        close_to_others(path)?;
        let lock = path.join(LOCK);
        let file = match OpenOptions::new().create(true).write(true).truncate(false).mode(0o600).open(&lock) {
            // Locking needs no writing.
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => File::open(&lock),
            opened => opened,
        };
        let file = file.map_err(|error| at(&lock, error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StateError::InUse(path.into())),
            Err(TryLockError::Error(error)) => return Err(at(&lock, error)),
        }
        let mut directory = Self { path: path.into(), restore_wanted: false, unkept: Mutex::default(), _lock: file };
        match directory.read(NODE)? {
            Some(owner) if owner != node_id.as_bytes() => {
                return Err(StateError::OtherNode {
                    directory: path.into(),
                    owner: String::from_utf8_lossy(&owner).into_owned(),
                    node_id: node_id.into(),
                });
            }
            Some(_) => {}
            None => directory.write(NODE, node_id.as_bytes())?,
        }
        directory.restore_wanted = directory.read(RESTORE)?.is_some();
        if !directory.holds_journal() {
            directory.want_restore();
        }
        Ok(directory)
    }

    /// Where the journal lives.
    pub fn journal(&self) -> PathBuf {
        self.path.join(JOURNAL)
    }

    /// Where usage is counted.
    pub fn usage(&self) -> PathBuf {
        self.path.join(USAGE)
    }

    /// Whether the store may hold records that this directory has lost: it began without a journal, or with one that
    /// lacks something, and nobody has answered [`StateDirectory::restored`] yet, in this process or the ones before.
    pub fn wants_restore(&self) -> bool {
        self.restore_wanted
    }

    /// The journal lacks something.
    pub fn want_restore(&mut self) {
        if !std::mem::replace(&mut self.restore_wanted, true) {
            self.keep(RESTORE, b"");
        }
    }

    /// The store's records are back.
    pub fn restored(&mut self) {
        if !std::mem::take(&mut self.restore_wanted) {
            return;
        }
        self.lock().remove(RESTORE);
        if let Err(error) = std::fs::remove_file(self.path.join(RESTORE)) {
            tracing::debug!(%error, "the store is asked once more at the next start");
        }
    }

    /// Whether this relay was the owner of its address when it was last heard of: nobody has told it otherwise, in this
    /// process or the ones before. Only a relay that waits for its address asks.
    pub fn is_owner(&self) -> bool {
        self.path.join(OWNER).exists()
    }

    /// This relay owns its address.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn own(&self) -> Result<(), StateError> {
        if self.is_owner() { Ok(()) } else { self.write(OWNER, b"") }
    }

    /// Another node has the address, and with it the records: what this directory holds of them is dropped, and the
    /// store is asked before this relay serves again.
    ///
    /// # Errors
    /// [`StateError::Io`]. The mark of the owner goes first: a directory that is half dropped owns nothing.
    pub fn disown(&mut self) -> Result<(), StateError> {
        let owner = self.path.join(OWNER);
        match std::fs::remove_file(&owner) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(StateError::Io { path: owner, error });
            }
            _ => {}
        }
        self.write(RESTORE, b"")?;
        self.restore_wanted = true;
        // What was counted here goes on with the new owner, who counts from where it began.
        for path in [self.usage(), self.journal()] {
            match std::fs::remove_dir_all(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(StateError::Io { path, error }),
                _ => {}
            }
        }
        Ok(())
    }

    /// The next epoch, on disk before it is returned. On a disk that takes nothing it is the same after another start,
    /// and a controller that granted it before grants a higher one.
    ///
    /// # Errors
    /// [`StateError::Epoch`] for a damaged file, [`StateError::Io`] if it cannot be read.
    pub fn next_epoch(&self) -> Result<u64, StateError> {
        let last = match self.read(EPOCH)? {
            None => 0,
            Some(text) => std::str::from_utf8(&text)
                .ok()
                .and_then(|text| text.trim().parse::<u64>().ok())
                .ok_or_else(|| StateError::Epoch(self.path.join(EPOCH)))?,
        };
        let next = last + 1;
        self.keep_epoch(next);
        Ok(next)
    }

    /// Keeps an epoch that a controller granted; see [`StateDirectory::catch_up`].
    pub fn keep_epoch(&self, epoch: u64) {
        self.keep(EPOCH, format!("{epoch}\n").as_bytes());
    }

    /// The settings message of the last session.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn settings(&self) -> Result<Option<Vec<u8>>, StateError> {
        self.read(SETTINGS)
    }

    /// Keeps a settings message; see [`StateDirectory::catch_up`].
    pub fn keep_settings(&self, message: &[u8]) {
        self.keep(SETTINGS, message);
    }

    /// The members message of the last session.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn members(&self) -> Result<Option<Vec<u8>>, StateError> {
        self.read(MEMBERS)
    }

    /// Keeps a members message; see [`StateDirectory::catch_up`].
    pub fn keep_members(&self, message: &[u8]) {
        self.keep(MEMBERS, message);
    }

    /// Writes what a full or read-only disk did not take: what was to be kept is kept in memory until then, and the
    /// service goes on. To be called now and then.
    pub fn catch_up(&self) {
        let mut unkept = self.lock();
        while let Some(entry) = unkept.first_entry() {
            if self.write(entry.key(), entry.get()).is_err() {
                return;
            }
            entry.remove();
            if unkept.is_empty() {
                tracing::info!(state_dir = %self.path.display(), "the state directory can be written again");
            }
        }
    }

    fn keep(&self, name: &'static str, bytes: &[u8]) {
        match self.write(name, bytes) {
            Ok(()) => drop(self.lock().remove(name)),
            Err(error) => {
                let mut unkept = self.lock();
                if unkept.is_empty() {
                    tracing::error!("{error}; this relay goes on, and remembers after a restart what it knew before");
                }
                unkept.insert(name, bytes.to_vec());
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, Vec<u8>>> {
        self.unkept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The nonce key of a relay of its own: made at its first start, so that nonces outlive a restart.
    ///
    /// # Errors
    /// [`StateError::Io`], also when the system has no randomness.
    pub fn nonce_key(&self) -> Result<KeyRing, StateError> {
        let secret = match self.read(NONCE_KEY)? {
            Some(secret) if secret.len() == 32 => secret,
            _ => {
                let mut secret = vec![0; 32];
                getrandom::fill(&mut secret).map_err(|error| StateError::Io {
                    path: self.path.join(NONCE_KEY),
                    error: io::Error::other(error),
                })?;
                self.write(NONCE_KEY, &secret)?;
                secret
            }
        };
        Ok(KeyRing(vec![Key { id: 0, secret }]))
    }

    fn holds_journal(&self) -> bool {
        std::fs::read_dir(self.journal()).is_ok_and(|mut entries| entries.next().is_some())
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, StateError> {
        let path = self.path.join(name);
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StateError::Io { path, error }),
        }
    }

    /// Replaces a file whole: after a crash there is the old one or the new one.
    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), StateError> {
        let path = self.path.join(name);
        self.replace(&path, bytes).map_err(|error| StateError::Io { path, error })
    }

    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let new = path.with_extension("new");
        let written = (|| {
            let mut file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            std::fs::rename(&new, path)
        })();
        if written.is_err() {
            // An empty file takes room too. It may not even be there.
            let _ = std::fs::remove_file(&new);
        }
        written?;
        File::open(&self.path)?.sync_all()
    }
}

/// The directory holds secrets: nobody else may look in.
fn close_to_others(path: &Path) -> Result<(), StateError> {
    let metadata = std::fs::metadata(path).map_err(|error| StateError::Io { path: path.into(), error })?;
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o077 == 0 {
        return Ok(());
    }
    std::fs::set_permissions(path, Permissions::from_mode(0o700)).map_err(|error| StateError::TooOpen {
        directory: path.into(),
        mode,
        error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).expect("is there").permissions().mode() & 0o777
    }

    #[test]
    fn it_is_made_for_its_owner_alone() {
        let parent = tempfile::tempdir().expect("tempdir");
        let path = parent.path().join("a/b");
        let directory = StateDirectory::open(&path, "eu-1").expect("made");
        directory.nonce_key().expect("random");
        assert_eq!(mode(&path), 0o700);
        assert_eq!(mode(&path.join(NONCE_KEY)), 0o600);
        drop(directory);
        std::fs::set_permissions(&path, Permissions::from_mode(0o755)).expect("chmod");
        StateDirectory::open(&path, "eu-1").expect("repaired");
        assert_eq!(mode(&path), 0o700);
    }

    #[test]
    fn one_process_and_one_node_use_it() {
        let path = tempfile::tempdir().expect("tempdir");
        let first = StateDirectory::open(path.path(), "eu-1").expect("free");
        let second = StateDirectory::open(path.path(), "eu-1").expect_err("locked").to_string();
        assert!(second.contains("is in use by another relay-node"), "{second}");
        drop(first);
        let other = StateDirectory::open(path.path(), "eu-2").expect_err("another node").to_string();
        assert!(other.contains("belongs to relay \"eu-1\", this is \"eu-2\""), "{other}");
        StateDirectory::open(path.path(), "eu-1").expect("the lock ended with its holder");
    }

    #[test]
    fn epochs_grow_and_never_restart() {
        let path = tempfile::tempdir().expect("tempdir");
        let directory = StateDirectory::open(path.path(), "eu-1").expect("free");
        assert_eq!(directory.next_epoch().expect("written"), 1);
        directory.keep_epoch(7);
        assert_eq!(directory.next_epoch().expect("written"), 8);
        std::fs::write(path.path().join(EPOCH), "many").expect("written");
        let error = directory.next_epoch().expect_err("damaged").to_string();
        assert!(error.contains("holds no number"), "{error}");
    }

    #[test]
    fn the_store_is_asked_until_it_has_answered() {
        let path = tempfile::tempdir().expect("tempdir");
        let directory = StateDirectory::open(path.path(), "eu-1").expect("free");
        assert!(directory.wants_restore(), "there is no journal");
        std::fs::create_dir(directory.journal()).expect("made");
        std::fs::write(directory.journal().join("0.log"), "x").expect("written");
        drop(directory);
        let mut directory = StateDirectory::open(path.path(), "eu-1").expect("free");
        assert!(directory.wants_restore(), "nobody has answered yet");
        directory.restored();
        drop(directory);
        let directory = StateDirectory::open(path.path(), "eu-1").expect("free");
        assert!(!directory.wants_restore());
    }

    #[test]
    fn what_another_node_owns_is_dropped() {
        let path = tempfile::tempdir().expect("tempdir");
        let mut directory = StateDirectory::open(path.path(), "eu-1").expect("free");
        assert!(!directory.is_owner(), "nobody has said so yet");
        directory.own().expect("written");
        std::fs::create_dir(directory.journal()).expect("made");
        std::fs::write(directory.journal().join("0.log"), "x").expect("written");
        directory.restored();
        drop(directory);
        let mut directory = StateDirectory::open(path.path(), "eu-1").expect("free");
        assert!(directory.is_owner() && !directory.wants_restore());
        directory.disown().expect("dropped");
        directory.disown().expect("there is nothing left to drop");
        assert!(!directory.is_owner() && directory.wants_restore() && !directory.journal().exists());
        drop(directory);
        let directory = StateDirectory::open(path.path(), "eu-1").expect("free");
        assert!(!directory.is_owner() && directory.wants_restore());
    }

    #[test]
    fn what_a_disk_does_not_take_is_kept_until_it_does() {
        let path = tempfile::tempdir().expect("tempdir");
        let directory = StateDirectory::open(path.path(), "eu-1").expect("free");
        // Nobody can write a file where a directory is.
        let obstacle = path.path().join(EPOCH).with_extension("new");
        std::fs::create_dir(&obstacle).expect("made");
        assert_eq!(directory.next_epoch().expect("counted"), 1);
        directory.keep_epoch(5);
        directory.catch_up();
        assert!(directory.read(EPOCH).expect("read").is_none());
        std::fs::remove_dir(&obstacle).expect("removed");
        directory.catch_up();
        assert_eq!(directory.next_epoch().expect("written"), 6);
    }

    #[test]
    fn what_is_kept_comes_back() {
        let path = tempfile::tempdir().expect("tempdir");
        let directory = StateDirectory::open(path.path(), "eu-1").expect("free");
        assert_eq!(directory.settings().expect("read"), None);
        directory.keep_settings(b"s");
        directory.keep_members(b"m");
        let nonce_key = directory.nonce_key().expect("made");
        drop(directory);
        let directory = StateDirectory::open(path.path(), "eu-1").expect("free");
        assert_eq!(directory.settings().expect("read").as_deref(), Some(&b"s"[..]));
        assert_eq!(directory.members().expect("read").as_deref(), Some(&b"m"[..]));
        assert_eq!(directory.nonce_key().expect("kept"), nonce_key);
    }
}
