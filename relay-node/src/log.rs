//! Log lines on standard error, and traces where a collector is configured.

use std::io::IsTerminal;

use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, Registry, fmt};
use turnpike_proto::trace::{self, Exporter, TraceError};

use crate::config::{LogFormat, Settings};

/// Starts logging; once per process.
///
/// # Errors
/// Traces cannot be exported as configured; nothing is logged then.
pub fn start(settings: &Settings) -> Result<Option<Exporter>, TraceError> {
    let exporter = trace::endpoint(settings.otlp_endpoint.as_deref())
        .map(|endpoint| Exporter::start(&endpoint, "turnpike-relay", env!("CARGO_PKG_VERSION"), &settings.node_id))
        .transpose()?;
    let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal()).with_target(false);
    let filter = EnvFilter::new(&settings.log);
    let registry = tracing_subscriber::registry().with(exporter.as_ref().map(Exporter::layer::<Registry>));
    match settings.log_format {
        LogFormat::Text => registry.with(lines.with_filter(filter)).init(),
        LogFormat::Json => registry.with(lines.json().flatten_event(true).with_filter(filter)).init(),
    }
    Ok(exporter)
}
