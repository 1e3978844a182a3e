//! Traces by OTLP: from an Allocate on a relay to the transaction in the store, and of discovery. Off unless an endpoint is
//! configured; then spans are made by the tasks of the control plane, never by a thread that carries packets, and leave by a
//! thread of their own from a bounded queue (OpenTelemetry's batch processor: 2,048 spans, what is more is dropped).
//!
//! A trace goes from process to process as W3C Trace Context: `traceparent` in the metadata of a call or the head of an HTTP
//! request, and beside each record of a session, whose one call lasts for days.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use opentelemetry::trace::{
    SpanContext, SpanId, TraceContextExt as _, TraceFlags, TraceId, TraceState, TracerProvider as _,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::WithExportConfig as _;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
use tokio::runtime::Runtime;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::registry::LookupSpan;

/// Target of the spans that are exported. They are of level DEBUG, so that without an exporter they cost nothing.
pub const TARGET: &str = "turnpike::trace";
/// Header and metadata key of W3C Trace Context.
pub const TRACEPARENT: &str = "traceparent";

/// Longest one try to hand a batch over takes.
const EXPORT: Duration = Duration::from_secs(3);
/// Longest the end of the process waits for the last batch.
const LAST_BATCH: Duration = Duration::from_secs(2);

/// Why traces cannot be exported: one line that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// Not an address of a collector.
    #[error(
        "{0:?} is not an http://HOST:PORT of an OTLP collector (gRPC, without TLS: put an agent beside this process)"
    )]
    Endpoint(String),
    /// The exporter or its thread cannot be made.
    #[error("traces cannot be exported: {0}")]
    Exporter(String),
}

/// Hands spans over to a collector until it is shut down.
#[derive(Debug)]
pub struct Exporter {
    provider: SdkTracerProvider,
    runtime: Runtime,
}

/// Where traces go: `configured`, else what OpenTelemetry's environment says; `None` for nowhere.
pub fn endpoint(configured: Option<&str>) -> Option<String> {
    let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let environment =
        || variable("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT").or_else(|| variable("OTEL_EXPORTER_OTLP_ENDPOINT"));
    configured.filter(|endpoint| !endpoint.is_empty()).map(str::to_owned).or_else(environment)
}

impl Exporter {
    /// Begins to export to `endpoint` as `service` (`turnpike-relay`), this process being `instance` (a node id). What is kept of
    /// all traces is OpenTelemetry's own to say: `OTEL_TRACES_SAMPLER`.
    ///
    /// # Errors
    /// The endpoint is none, or the system has no thread for it.
    pub fn start(
        endpoint: &str,
        service: &'static str,
        version: &'static str,
        instance: &str,
    ) -> Result<Self, TraceError> {
        let uri: tonic::transport::Uri = endpoint.parse().map_err(|_| TraceError::Endpoint(endpoint.to_owned()))?;
        if uri.scheme_str() != Some("http") || uri.authority().is_none() {
            return Err(TraceError::Endpoint(endpoint.to_owned()));
        }
        let failed = |error: &dyn std::fmt::Display| TraceError::Exporter(error.to_string());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("otlp")
            .enable_all()
            .build()
            .map_err(|error| failed(&error))?;
        let entered = runtime.enter();
        let exporter =
            opentelemetry_otlp::SpanExporter::builder().with_tonic().with_endpoint(endpoint).with_timeout(EXPORT);
        let exporter = exporter.build().map_err(|error| failed(&error))?;
        let resource = Resource::builder()
            .with_service_name(service)
            .with_attribute(KeyValue::new("service.version", version))
            .with_attribute(KeyValue::new("service.instance.id", instance.to_owned()))
            .build();
        let exporter = SaysOnce { inner: exporter, endpoint: endpoint.to_owned(), failing: AtomicBool::new(false) };
        let provider = SdkTracerProvider::builder().with_resource(resource).with_batch_exporter(exporter).build();
        drop(entered);
        Ok(Self { provider, runtime })
    }

    /// Takes the spans of [`TARGET`] out of everything that is logged.
    pub fn layer<S>(&self) -> impl Layer<S> + use<S>
    where
        S: tracing::Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
    {
        let ours = filter_fn(|metadata| metadata.is_span() && metadata.target() == TARGET);
        tracing_opentelemetry::layer()
            .with_tracer(self.provider.tracer("turnpike"))
            .with_location(false)
            .with_threads(false)
            .with_target(false)
            .with_tracked_inactivity(false)
            .with_filter(ours.with_max_level_hint(LevelFilter::DEBUG))
    }

    /// Hands over what is left, for at most two seconds.
    pub fn shut_down(self) {
        // Said already if the collector is away.
        let _ = self.provider.shutdown_with_timeout(LAST_BATCH);
        self.runtime.shutdown_background();
    }
}

/// Says once that the collector is away, and once that it is back.
#[derive(Debug)]
struct SaysOnce {
    inner: opentelemetry_otlp::SpanExporter,
    endpoint: String,
    failing: AtomicBool,
}

impl SpanExporter for SaysOnce {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let endpoint = &self.endpoint;
        match self.inner.export(batch).await {
            Ok(()) => {
                if self.failing.swap(false, Ordering::Relaxed) {
                    tracing::info!(endpoint, "traces reach the collector again");
                }
            }
            Err(error) => {
                if !self.failing.swap(true, Ordering::Relaxed) {
                    tracing::warn!(endpoint, %error, "traces do not reach the collector: they are dropped until it is back, all else goes on");
                }
            }
        }
        Ok(())
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

/// The `traceparent` of a span; empty where it is not traced.
pub fn traceparent(span: &Span) -> String {
    if span.is_disabled() {
        return String::new();
    }
    let context = span.context();
    let span = context.span().span_context().clone();
    let mut text = String::new();
    if span.is_valid() {
        // Writing to a String does not fail.
        let _ = write!(text, "00-{}-{}-{:02x}", span.trace_id(), span.span_id(), span.trace_flags().to_u8());
    }
    text
}

/// Makes a span that has just been made the child of one of another process. What is no `traceparent` is passed over.
pub fn adopt(span: &Span, traceparent: &str) {
    if span.is_disabled() {
        return;
    }
    if let Some(parent) = parse(traceparent) {
        // Fails for a span that has begun, which this is not.
        let _ = span.set_parent(Context::new().with_remote_span_context(parent));
    }
}

/// <https://www.w3.org/TR/trace-context/#traceparent-header>: later versions may be longer.
fn parse(text: &str) -> Option<SpanContext> {
    let mut parts = text.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let lengths = [version.len(), trace.len(), span.len(), flags.len()] == [2, 32, 16, 2];
    let is_hex = |part: &str| part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    if !lengths || version == "ff" || (version == "00" && parts.next().is_some()) {
        return None;
    }
    if ![version, trace, span, flags].into_iter().all(is_hex) {
        return None;
    }
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?);
    let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
    let context = SpanContext::new(trace, span, flags, true, TraceState::default());
    context.is_valid().then_some(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traceparents_are_read_as_w3c_writes_them() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let read = parse(good).expect("good");
        assert_eq!(read.trace_id().to_string(), "0af7651916cd43dd8448eb211c80319c");
        assert!(read.is_sampled() && read.is_remote());
        let later = "cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00-more";
        assert!(!parse(later).expect("a later version").is_sampled());
        for bad in [
            "",
            "00",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319+-b7ad6b7169203331-01",
            "00-\u{e4}af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ] {
            assert!(parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn without_an_exporter_there_is_no_trace() {
        let span = tracing::debug_span!(target: TARGET, "nothing");
        adopt(&span, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        assert_eq!(traceparent(&span), "");
    }

    #[test]
    fn endpoints_are_plain_http() {
        for bad in ["", "collector:4317", "https://collector:4317", "http://", "not a uri"] {
            assert!(matches!(Exporter::start(bad, "s", "0", "i"), Err(TraceError::Endpoint(_))), "{bad}");
        }
        assert_eq!(endpoint(Some("http://a:1")), Some("http://a:1".to_owned()));
    }
}
