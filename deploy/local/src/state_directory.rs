//! The directory of a local cluster: one process at a time, readable by its user only.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::net::Ipv4Addr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

/// A directory of which this process is the only user; the lock ends with the value.
pub struct StateDirectory {
    path: PathBuf,
    _lock: File,
}

impl StateDirectory {
    /// Makes the directory when it is missing and locks it; with `fresh` everything of earlier runs is removed.
    ///
    /// # Errors
    /// One line for people, also when another process holds it.
    pub fn open(path: &Path, fresh: bool) -> Result<Self> {
        let path = std::path::absolute(path).context("cannot tell the current directory")?;
        make(&path)?;
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path.join("lock"))
            .with_context(|| format!("cannot write into {}", path.display()))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // Only for the message: an unreadable name is left out of it.
                let _ = lock.read_to_string(&mut holder);
                bail!(
                    "a local cluster already runs in {} (process {}); stop it, or choose another --dir and --port-offset",
                    path.display(),
                    holder.trim()
                );
            }
            Err(TryLockError::Error(error)) => return Err(error).context("cannot lock the state directory"),
        }
        lock.set_len(0)?;
        writeln!(lock, "{}", std::process::id())?;
        let directory = Self { path, _lock: lock };
        if fresh {
            for part in ["pki", "config", "controller", "relays", "logs", "turnctl.toml", "cluster.json"] {
                remove(&directory.path.join(part))?;
            }
        }
        for part in [directory.pki(), directory.config(), directory.logs(), directory.path.join("controller")] {
            make(&part)?;
        }
        Ok(directory)
    }

    /// The directory itself, absolute.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Certificates and keys.
    pub fn pki(&self) -> PathBuf {
        self.path.join("pki")
    }

    /// Configuration files.
    pub fn config(&self) -> PathBuf {
        self.path.join("config")
    }

    /// Output of the processes.
    pub fn logs(&self) -> PathBuf {
        self.path.join("logs")
    }

    /// The embedded store.
    pub fn store(&self) -> PathBuf {
        self.path.join("controller").join("store")
    }

    /// State directory of one relay, which makes it. Its journal belongs to an address, so each address has its own.
    pub fn relay(&self, id: &str, address: Ipv4Addr) -> PathBuf {
        self.path.join("relays").join(format!("{id}-{address}"))
    }
}

fn make(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot make the directory {}", path.display()))
}

fn remove(path: &Path) -> Result<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Writes a file whole or not at all; readers see the old or the new text.
///
/// # Errors
/// One line naming the file.
pub fn write_whole(path: &Path, text: &str) -> Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        file.write_all(text.as_bytes())?;
        fs::rename(&beside, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_cluster_in_the_same_directory_is_refused_with_the_first_ones_process() {
        let parent = tempfile::tempdir().expect("directory");
        let path = parent.path().join("cluster");
        let first = StateDirectory::open(&path, false).expect("first");
        let refused = StateDirectory::open(&path, false).err().expect("second").to_string();
        assert!(refused.contains(&format!("(process {})", std::process::id())), "{refused}");
        drop(first);
        StateDirectory::open(&path, false).expect("after the first ended");
    }

    #[test]
    fn fresh_forgets_state_but_not_files_of_others() {
        let parent = tempfile::tempdir().expect("directory");
        let directory = StateDirectory::open(parent.path(), false).expect("directory");
        fs::create_dir_all(directory.relay("eu-1", Ipv4Addr::LOCALHOST)).expect("relay state");
        fs::write(directory.path().join("notes.txt"), "mine").expect("a file");
        drop(directory);
        let directory = StateDirectory::open(parent.path(), true).expect("again");
        assert!(!directory.relay("eu-1", Ipv4Addr::LOCALHOST).exists());
        assert!(directory.path().join("notes.txt").exists());
    }
}
