//! A small disk that can be full: a tmpfs in a mount namespace of its own, which ends with this value or with the test,
//! whichever way that ends.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::process::{Around, Host};

/// A tmpfs over a directory, for the programs that are started [`Volume::around`] it.
#[derive(Debug)]
pub struct Volume {
    /// Keeps the namespace: it reads from a pipe until nobody holds the other end.
    holder: Child,
    _pipe: ChildStdin,
    at: PathBuf,
}

impl Volume {
    /// Mounts `kib` KiB over `at`, which is made if it is not there.
    ///
    /// # Errors
    /// Not root, or the kernel refuses.
    pub fn mount(host: &Host, at: &Path, kib: u32) -> Result<Self> {
        fs::create_dir_all(at)?;
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c"]);
        command.arg("mount -t tmpfs -o mode=0700,size=$2k turnpike-test \"$1\" && echo mounted && exec cat").arg("sh");
        command.arg(at).arg(kib.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = host.spawn(command)?;
        let pipe = holder.stdin.take().context("a pipe was asked for")?;
        let mut line = String::new();
        BufReader::new(holder.stdout.take().context("a pipe was asked for")?).read_line(&mut line)?;
        ensure!(line == "mounted\n", "no tmpfs over {}", at.display());
        Ok(Self { holder, _pipe: pipe, at: at.to_owned() })
    }

    /// What a program is started in to see it.
    #[must_use]
    pub fn around(&self) -> Around {
        let namespace = format!("--mount=/proc/{}/ns/mnt", self.holder.id());
        Around { prefix: ["nsenter", &namespace, "--"].map(OsString::from).to_vec(), variables: Vec::new() }
    }

    /// Where this process sees it.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.holder.id()));
        root.join(self.at.strip_prefix("/").unwrap_or(&self.at))
    }

    /// Uses up all that is free.
    ///
    /// # Errors
    /// It fails otherwise than by being full.
    pub fn fill(&self) -> Result<()> {
        let mut ballast = fs::OpenOptions::new().create(true).append(true).open(self.ballast())?;
        // The last bytes too: in ever smaller pieces.
        for piece in [4096, 64, 1] {
            loop {
                match ballast.write_all(&vec![0; piece]) {
                    Ok(()) => {}
                    Err(error) if error.kind() == ErrorKind::StorageFull => break,
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    /// Gives back what [`Volume::fill`] used.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn free(&self) -> Result<()> {
        Ok(fs::remove_file(self.ballast())?)
    }

    /// Removes all that is in it, as somebody who deletes a state directory would.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn wipe(&self) -> Result<()> {
        for entry in fs::read_dir(self.path())? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                fs::remove_dir_all(entry.path())?;
            } else {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    fn ballast(&self) -> PathBuf {
        self.path().join("ballast")
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
