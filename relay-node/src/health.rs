//! `/livez`, `/readyz`, `/metrics` on a plain local port.
//!
//! Liveness is not readiness: a controller or a store that is away restarts nobody and does not make a relay that has
//! credentials unready.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;

use crate::dataplane::Dataplane;

/// A worker that has not turned its loop for this long is stuck.
const STUCK: Duration = Duration::from_secs(5);

/// What health checks look at; written by whoever knows.
#[derive(Default)]
pub struct Status {
    /// Set once packets are served. Weak: health must not keep a data plane alive.
    dataplane: OnceLock<Weak<Dataplane>>,
    credentials: AtomicBool,
}

impl Status {
    /// Packets are being served.
    pub fn serves(&self, dataplane: &Arc<Dataplane>) {
        // A second data plane in one process there is none.
        self.dataplane.get_or_init(|| Arc::downgrade(dataplane));
    }

    /// Whether clients can be authenticated.
    pub fn set_credentials(&self, there: bool) {
        self.credentials.store(there, Ordering::Release);
    }

    fn is_alive(&self) -> bool {
        // Before the start there are no workers to be stuck.
        self.dataplane.get().is_none_or(|dataplane| dataplane.upgrade().is_some_and(|dataplane| dataplane.alive(STUCK)))
    }

    fn unready(&self) -> Option<&'static str> {
        if self.dataplane.get().is_none() {
            Some("not ready: starting")
        } else if !self.is_alive() {
            Some("not ready: a worker is stuck")
        } else if !self.credentials.load(Ordering::Acquire) {
            Some(
                "not ready: no credentials: no controller has answered yet, and neither rest_secrets nor static_users \
                 are configured",
            )
        } else {
            None
        }
    }
}

#[derive(Clone)]
struct Health {
    status: Arc<Status>,
    metrics: PrometheusHandle,
}

/// Serves until it is dropped.
///
/// # Errors
/// The listener's.
pub async fn serve(listener: TcpListener, status: Arc<Status>, metrics: PrometheusHandle) -> std::io::Result<()> {
    axum::serve(listener, router(Health { status, metrics })).await
}

/// Binds the port.
///
/// # Errors
/// One line that names the key.
pub async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .map_err(|error| anyhow::anyhow!("http: cannot listen on {address}: {error}; take another port or address"))
}

fn router(health: Health) -> Router {
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(health)
}

async fn livez(State(health): State<Health>) -> (StatusCode, &'static str) {
    if health.status.is_alive() {
        (StatusCode::OK, "alive\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "a worker has not turned its loop for 5 s\n")
    }
}

async fn readyz(State(health): State<Health>) -> (StatusCode, String) {
    match health.status.unready() {
        None => (StatusCode::OK, "ready\n".into()),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
    }
}

async fn metrics(State(health): State<Health>) -> impl IntoResponse {
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (kind, health.metrics.render())
}
