//! Liveness and readiness. A controller is alive while it answers; it is ready from the moment it has read its store
//! once, and stays so: without the store it goes on answering from the fleet as last seen.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::json;

use crate::replica::Replica;

/// Whether this process is ready, and what it answers with once it is. Clones are the same.
#[derive(Clone, Default)]
pub struct Health(Arc<Inner>);

#[derive(Default)]
struct Inner {
    replica: OnceLock<Arc<Replica>>,
    waiting_for: Mutex<String>,
}

impl Health {
    /// What to answer with; `None` while not ready.
    pub fn replica(&self) -> Option<&Arc<Replica>> {
        self.0.replica.get()
    }

    /// Makes this process ready, once.
    pub fn ready(&self, replica: Arc<Replica>) {
        self.0.replica.get_or_init(|| replica);
    }

    /// Says what is being waited for.
    pub fn waits_for(&self, what: String) {
        *self.0.waiting_for.lock().unwrap_or_else(PoisonError::into_inner) = what;
    }

    /// What is being waited for, as a sentence.
    pub fn waiting_for(&self) -> String {
        let what = self.0.waiting_for.lock().unwrap_or_else(PoisonError::into_inner);
        format!("not ready: {what}")
    }
}

/// `/livez` and `/readyz`.
pub fn router(health: Health) -> Router {
    Router::new().route("/livez", get(|| async { "alive\n" })).route("/readyz", get(ready)).with_state(health)
}

async fn ready(State(health): State<Health>) -> Response {
    match health.replica() {
        Some(replica) => {
            let store = if replica.fleet.is_synced() { "reachable" } else { "away" };
            Json(json!({ "ready": true, "store": store })).into_response()
        }
        None => {
            let why = json!({ "error": health.waiting_for() });
            (StatusCode::SERVICE_UNAVAILABLE, Json(why)).into_response()
        }
    }
}
