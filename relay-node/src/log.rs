//! Log lines on standard error.

use std::io::IsTerminal;

use crate::config::{LogFormat, Settings};

/// Starts logging; once per process.
pub fn start(settings: &Settings) {
    let log = tracing_subscriber::fmt()
        .with_env_filter(&settings.log)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    match settings.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
}
