//! One test: a runtime, a directory for everything it writes, a time limit, and the logs when it fails.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tempfile::TempDir;

/// Lines of each log shown when a test fails.
const TAIL: usize = 60;

/// What a test has to itself.
pub struct Scenario {
    directory: TempDir,
}

impl Scenario {
    /// Directory of the test; removed when it passes.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A path in the test's directory.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// Shows a figure that the test measured; nextest prints it, `tests/results/` keeps those of the long runs.
    #[allow(clippy::print_stdout, reason = "the figures are what the test is run for")]
    pub fn figure(&self, what: &str, value: impl std::fmt::Display) {
        println!("figure: {what}: {value}");
    }

    /// A directory in the test's directory, made if it is not there.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.file(name);
        fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(path)
    }
}

/// Prints the end of every log when the test leaves by an error or a panic.
struct Report<'a> {
    scenario: &'a Scenario,
    passed: bool,
}

impl Drop for Report<'_> {
    #[allow(clippy::print_stderr, reason = "a failing test must show what its processes said")]
    fn drop(&mut self) {
        if self.passed {
            return;
        }
        let Ok(entries) = fs::read_dir(self.scenario.path()) else {
            return;
        };
        let mut logs: Vec<PathBuf> =
            entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "log")).collect();
        logs.sort();
        for log in logs {
            let text = fs::read(&log).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            eprintln!("--- {} (last {TAIL} of {} lines)", log.file_name().unwrap_or_default().display(), lines.len());
            for line in lines.iter().skip(lines.len().saturating_sub(TAIL)) {
                eprintln!("{line}");
            }
        }
    }
}

/// A number that the environment may give a test, so that `.ci/long` makes it longer.
///
/// # Errors
/// It is given, and no such number.
pub fn number<N: FromStr<Err: Into<anyhow::Error>>>(variable: &str, default: N) -> Result<N> {
    match std::env::var(variable) {
        Ok(text) => text.parse().map_err(Into::into).with_context(|| format!("{variable}={text} is no number")),
        Err(_) => Ok(default),
    }
}

/// Runs a test that may take up to two minutes.
///
/// # Errors
/// Those of the test, or that it ran out of time.
pub fn run(test: impl AsyncFnOnce(&Scenario) -> Result<()>) -> Result<()> {
    run_within(Duration::from_secs(120), test)
}

/// Runs a test with a time limit of its own.
///
/// # Errors
/// Those of the test, or that it ran out of time.
pub fn run_within(limit: Duration, test: impl AsyncFnOnce(&Scenario) -> Result<()>) -> Result<()> {
    let scenario = Scenario { directory: tempfile::Builder::new().prefix("turnpike-test-").tempdir()? };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut report = Report { scenario: &scenario, passed: false };
    let outcome = runtime.block_on(async {
        tokio::time::timeout(limit, test(&scenario))
            .await
            .map_err(|_| anyhow!("the test did not end within {limit:?}"))?
    });
    report.passed = outcome.is_ok();
    drop(report);
    // Whatever blocks in a background thread must not keep a finished test.
    runtime.shutdown_background();
    outcome
}
