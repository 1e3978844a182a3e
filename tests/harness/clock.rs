//! A wall clock that can be stepped under a running program: libfaketime, because Linux has no namespace for
//! CLOCK_REALTIME. The monotonic clock is left alone, as `settimeofday` leaves it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::process::Around;

/// Where Debian's package `libfaketime` puts the library for programs of several threads.
const LIBRARY: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

/// The clock of one program, which links the C library dynamically.
#[derive(Debug)]
pub struct Clock {
    file: PathBuf,
}

impl Clock {
    /// A clock that is right; its offset is kept in `<directory>/<name>.clock`.
    ///
    /// # Errors
    /// libfaketime is not installed, or the file cannot be written.
    pub fn new(directory: &Path, name: &str) -> Result<Self> {
        ensure!(
            Path::new(LIBRARY).is_file(),
            "{LIBRARY} is missing: install Debian's package libfaketime (tests/run does)"
        );
        let clock = Self { file: directory.join(format!("{name}.clock")) };
        clock.step(0)?;
        Ok(clock)
    }

    /// Sets it to the right time plus so many seconds; seen within a second.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn step(&self, seconds: i64) -> Result<()> {
        // Whole at once: it is read while it is written.
        let new = self.file.with_extension("clock.new");
        fs::write(&new, format!("{seconds:+}\n")).with_context(|| format!("write {}", new.display()))?;
        Ok(fs::rename(new, &self.file)?)
    }

    /// Adds what a program is started in to have this clock.
    #[must_use]
    pub fn around(&self, mut around: Around) -> Around {
        let file = self.file.as_os_str().to_owned();
        around.variables.extend([
            ("LD_PRELOAD".into(), LIBRARY.into()),
            ("FAKETIME_TIMESTAMP_FILE".into(), file),
            ("FAKETIME_CACHE_DURATION".into(), "1".into()),
            ("FAKETIME_DONT_FAKE_MONOTONIC".into(), "1".into()),
        ]);
        around
    }
}
