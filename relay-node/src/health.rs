//! `/livez`, `/readyz`, `/metrics` on a plain local port.
//!
//! Liveness is not readiness: a controller or a store that is away restarts nobody and does not make a relay that has
//! credentials unready. A relay that drains is alive and not ready, so that whoever sends new clients by readiness (a
//! load balancer, a rollout) leaves it alone; one that is overloaded is ready, because it may have to serve.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, Weak};
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
    dataplane: RwLock<Option<Weak<Dataplane>>>,
    credentials: AtomicBool,
    /// Who owns the address this relay waits for; empty if nobody is known to.
    waits: RwLock<Option<String>>,
    draining: AtomicBool,
}

impl Status {
    /// Packets are being served.
    pub fn serves(&self, dataplane: &Arc<Dataplane>) {
        *self.dataplane.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::downgrade(dataplane));
    }

    /// Nothing is served any more.
    pub fn stops(&self) {
        *self.dataplane.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The relay waits for its address, which this node owns.
    pub fn waits(&self, owner: &str) {
        *self.waits.write().unwrap_or_else(PoisonError::into_inner) = Some(owner.to_owned());
    }

    /// The address is this relay's.
    pub fn owns(&self) {
        *self.waits.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Whether clients can be authenticated.
    pub fn set_credentials(&self, there: bool) {
        self.credentials.store(there, Ordering::Release);
    }

    /// Whether new clients are to go elsewhere; those there are go on.
    pub fn set_draining(&self, draining: bool) {
        self.draining.store(draining, Ordering::Release);
    }

    fn dataplane(&self) -> Option<Weak<Dataplane>> {
        self.dataplane.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn is_alive(&self) -> bool {
        // Before the start there are no workers to be stuck.
        self.dataplane().is_none_or(|dataplane| dataplane.upgrade().is_some_and(|dataplane| dataplane.alive(STUCK)))
    }

    fn unready(&self) -> Option<String> {
        match &*self.waits.read().unwrap_or_else(PoisonError::into_inner) {
            Some(owner) if owner.is_empty() => Some("not ready: waiting for the relay address".into()),
            Some(owner) => Some(format!("not ready: waiting for the relay address, which relay {owner:?} owns")),
            None => self.reason().map(Into::into),
        }
    }

    fn is_fenced(&self) -> bool {
        self.dataplane().and_then(|dataplane| dataplane.upgrade()).is_some_and(|dataplane| dataplane.fence().is_up())
    }

    /// What is wrong with a relay that serves all the same.
    fn detail(&self) -> &'static str {
        let dataplane = self.dataplane().and_then(|dataplane| dataplane.upgrade());
        let workers = dataplane.map(|dataplane| dataplane.snapshots()).unwrap_or_default();
        if workers.iter().any(|worker| worker.journal_failed) {
            "; the journal cannot be written: the store alone keeps allocations; make room in state_dir"
        } else {
            ""
        }
    }

    fn reason(&self) -> Option<&'static str> {
        if self.dataplane().is_none() {
            Some("not ready: starting")
        } else if self.is_fenced() {
            Some("not ready: the relay address is not this machine's for sure")
        } else if !self.is_alive() {
            Some("not ready: a worker is stuck")
        } else if !self.credentials.load(Ordering::Acquire) {
            Some(
                "not ready: no credentials: no controller has answered yet, and neither rest_secrets nor static_users \
                 are configured",
            )
        } else if self.draining.load(Ordering::Acquire) {
            Some("not ready: draining: takes no new clients, serves those it has")
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
        None => (StatusCode::OK, format!("ready{}\n", health.status.detail())),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
    }
}

async fn metrics(State(health): State<Health>) -> impl IntoResponse {
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (kind, health.metrics.render())
}
