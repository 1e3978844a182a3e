//! Waiting for a condition.

use std::fmt::Debug;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(10);

/// Waits until `look` answers with a value, and tells how long that took.
///
/// # Errors
/// It did not within `limit`; the message says what was waited for and what the last look saw.
pub async fn eventually<T, E: Debug>(
    what: &str,
    limit: Duration,
    mut look: impl AsyncFnMut() -> Result<T, E>,
) -> Result<(T, Duration)> {
    let start = Instant::now();
    loop {
        match look().await {
            Ok(value) => return Ok((value, start.elapsed())),
            Err(seen) if start.elapsed() >= limit => bail!("{what}: not within {limit:?}; last seen: {seen:?}"),
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}
