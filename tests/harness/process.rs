//! Child processes: where they run, what they log, and that none outlives its test.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait::eventually;

/// Where a program runs and sockets are opened.
#[derive(Clone, Debug)]
pub enum Host {
    /// This machine, as the test sees it.
    Machine,
    /// A network namespace of a lab.
    Device(patchbay::Device),
}

impl Host {
    /// Starts a program there.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(&self, mut command: Command) -> Result<Child> {
        let program = command.get_program().to_string_lossy().into_owned();
        match self {
            Self::Machine => command.spawn().map_err(anyhow::Error::from),
            Self::Device(device) => device.spawn_command_sync(command),
        }
        .with_context(|| format!("start {program} (`tests/run` installs and builds what the tests need)"))
    }

    /// Runs a program there to its end.
    ///
    /// # Errors
    /// It cannot be started.
    pub async fn output(&self, mut command: Command) -> Result<Output> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = self.spawn(command)?;
        Ok(tokio::task::spawn_blocking(|| child.wait_with_output()).await??)
    }

    /// Runs a future whose sockets are opened there.
    ///
    /// # Errors
    /// Those of the future.
    pub async fn run<T, F>(&self, future: F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        match self {
            Self::Machine => tokio::spawn(future).await?,
            Self::Device(device) => device.spawn(|_| future)?.await?,
        }
    }
}

/// What a program is started in: a command that runs it as its last arguments, and variables.
#[derive(Clone, Debug, Default)]
pub struct Around {
    /// Such as `nsenter --mount=… --`; it must become the program (`exec`), so that signals reach it.
    pub prefix: Vec<OsString>,
    /// Names and values.
    pub variables: Vec<(OsString, OsString)>,
}

impl Around {
    /// A command that starts `program` in it.
    pub fn command(&self, program: impl Into<OsString>) -> Command {
        let mut words = self.prefix.iter().cloned().chain([program.into()]);
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words).envs(self.variables.iter().map(|(name, value)| (name, value)));
        command
    }
}

/// A running program; killed when dropped. Its output goes to `<name>.log`.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command`, its output appended to `<directory>/<name>.log`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(host: &Host, directory: &Path, name: &str, mut command: Command) -> Result<Self> {
        let log = directory.join(format!("{name}.log"));
        let output = append_to(&log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        Ok(Self { name: name.to_owned(), child: host.spawn(command)?, log })
    }

    /// Takes charge of a child that was started otherwise.
    #[must_use]
    pub fn adopt(name: &str, child: Child, log: PathBuf) -> Self {
        Self { name: name.to_owned(), child, log }
    }

    /// What it has written so far.
    #[must_use]
    pub fn output(&self) -> String {
        fs::read(&self.log).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default()
    }

    /// Its exit status, if it has ended.
    ///
    /// # Errors
    /// The system does not tell.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits until it has ended by itself.
    ///
    /// # Errors
    /// It did not within `limit`.
    pub async fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let name = self.name.clone();
        let (status, _) = eventually(&format!("{name} ends"), limit, async || {
            self.child.try_wait().map_err(anyhow::Error::from)?.ok_or_else(|| anyhow!("still running"))
        })
        .await?;
        Ok(status)
    }

    /// SIGKILL, and waits until it is gone.
    ///
    /// # Errors
    /// The signal cannot be sent.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// SIGSTOP, or SIGCONT.
    ///
    /// # Errors
    /// The signal cannot be sent.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        self.signal(if frozen { Signal::SIGSTOP } else { Signal::SIGCONT })
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?;
        Ok(())
    }

    /// Fails unless it has a handler for this signal.
    pub(crate) fn must_catch(&self, signal: Signal) -> Result<()> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).context("no SigCgt")?;
        let caught = u64::from_str_radix(caught.trim(), 16)?;
        ensure!((caught >> (signal as i32 - 1)) & 1 == 1, "{} does not catch {signal}", self.name);
        Ok(())
    }

    /// SIGTERM, and waits for its orderly end.
    ///
    /// # Errors
    /// It did not end within `limit`.
    pub async fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait(limit).await
    }

    /// Process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Fails if the program has ended.
    ///
    /// # Errors
    /// It has; the message carries the last lines of its output.
    pub fn must_run(&mut self) -> Result<()> {
        match self.ended()? {
            None => Ok(()),
            Some(status) => {
                let output = self.output();
                let tail: Vec<&str> = output.lines().rev().take(5).collect();
                let tail: Vec<&str> = tail.into_iter().rev().collect();
                Err(anyhow!("{} has ended ({status}): {}", self.name, tail.join(" | ")))
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Opens a log for a child.
///
/// # Errors
/// The file cannot be opened.
pub fn append_to(log: &Path) -> Result<File> {
    OpenOptions::new().create(true).append(true).open(log).with_context(|| format!("open {}", log.display()))
}
