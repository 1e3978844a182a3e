//! The console: its files, embedded at build time, the event stream they live on, and what can be done there. One task samples the cluster
//! each second for all viewers; without a viewer it makes no pictures.

mod access;
mod actions;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use futures_util::{Stream, StreamExt as _};
use include_dir::{Dir, include_dir};
use serde::Serialize;
use tokio::sync::{Semaphore, broadcast, watch};
use tokio::time::{MissedTickBehavior, timeout};
use tokio_stream::wrappers::WatchStream;
use tokio_util::sync::CancellationToken;
use tower_http::set_header::SetResponseHeaderLayer;

use self::access::visitor;
use super::params::Params;
use super::rest::ApiError;
use super::view::{AllocationJson, EventJson, NodeJson};
use crate::audit::Action;
use crate::fleet::unix_ms;
use crate::health::Health;
use crate::replica::Replica;
use crate::steering::{Place, RegionView, regions};

/// Allocations in a picture, newest first.
const ALLOCATIONS: usize = 100;
/// Events in a picture, newest first.
const EVENTS: usize = 50;
/// Admin actions in a picture, newest first.
const ACTIONS: usize = 50;
/// Time to read the allocations of a picture, and the admin actions.
const READ: Duration = Duration::from_millis(500);
/// Pages that may watch at once.
const VIEWERS: usize = 64;

static FILES: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/web");

/// The picture of a second, as JSON; `None` before the first.
type Picture = Option<Arc<str>>;

/// Hands the pictures of [`Feed::run`] to every viewer.
#[derive(Clone)]
pub struct Feed {
    pictures: watch::Sender<Picture>,
    viewers: Arc<Semaphore>,
    searches: Arc<Semaphore>,
    shutdown: CancellationToken,
}

impl Feed {
    /// A feed whose viewers are let go at `shutdown`.
    pub fn new(shutdown: CancellationToken) -> Self {
        Self {
            pictures: watch::Sender::new(None),
            viewers: Arc::new(Semaphore::new(VIEWERS)),
            searches: Arc::new(Semaphore::new(actions::SEARCHES)),
            shutdown,
        }
    }

    /// Samples `replica` each second until shutdown.
    pub async fn run(self, replica: Arc<Replica>) {
        let mut fleet_events = replica.fleet.subscribe();
        let mut allocation_events = replica.allocations.subscribe();
        let mut events = VecDeque::with_capacity(EVENTS);
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                () = self.shutdown.cancelled() => return,
                _ = tick.tick() => {
                    replica.sample();
                    if self.pictures.receiver_count() > 0 {
                        self.pictures.send_replace(picture(&replica, &events).await);
                    }
                }
                event = fleet_events.recv() => keep(&mut events, event.map(|event| EventJson::of_node(&event))),
                event = allocation_events.recv() => {
                    keep(&mut events, event.map(|event| EventJson::of_allocation(&event, &replica.fleet.snapshot())));
                }
            }
        }
    }

    fn watch(&self) -> Option<impl Stream<Item = Result<sse::Event, Infallible>> + use<>> {
        let viewer = self.viewers.clone().try_acquire_owned().ok()?;
        let pictures = WatchStream::from_changes(self.pictures.subscribe()).filter_map(async |picture| picture);
        let events = pictures.map(move |picture| {
            // Moved in here, so that the place is given up with the stream.
            let _place = &viewer;
            Ok(sse::Event::default().data(&*picture))
        });
        Some(events.take_until(self.shutdown.clone().cancelled_owned()))
    }
}

/// Keeps the newest events; what was missed by lagging is older than what is kept.
fn keep(events: &mut VecDeque<EventJson>, event: Result<EventJson, broadcast::error::RecvError>) {
    if let Ok(event) = event {
        events.truncate(EVENTS - 1);
        events.push_front(event);
    }
}

#[derive(Serialize)]
struct PictureJson<'a> {
    at: u64,
    controller: ControllerJson<'a>,
    regions: Vec<RegionJson>,
    nodes: Vec<NodeJson>,
    allocations: Vec<AllocationJson>,
    events: &'a VecDeque<EventJson>,
    /// What was done to the cluster, newest first.
    actions: Vec<Action>,
}

#[derive(Serialize)]
struct RegionJson {
    #[serde(flatten)]
    region: RegionView,
    /// Latitude and longitude in degrees; `null` where the configuration does not say.
    place: Option<[f64; 2]>,
}

#[derive(Serialize)]
struct ControllerJson<'a> {
    id: &'a str,
    version: &'static str,
    store: &'static str,
    store_healthy: bool,
    /// What is wrong with it and what to do; empty when it is healthy.
    store_problem: String,
}

async fn picture(replica: &Replica, events: &VecDeque<EventJson>) -> Picture {
    let at = unix_ms();
    let snapshot = replica.fleet.snapshot();
    // While the store is away the console shows none rather than waiting for it.
    let (newest, actions) = tokio::join!(
        timeout(READ, replica.allocations.newest(ALLOCATIONS)),
        timeout(READ, replica.audit.newest(ACTIONS)),
    );
    let allocations = newest.map(Result::unwrap_or_default).unwrap_or_default();
    let place =
        |region: RegionView| RegionJson { place: replica.discovery.place(&region.name).map(Place::degrees), region };
    let health = replica.store_health();
    let picture = PictureJson {
        at,
        controller: ControllerJson {
            id: &replica.id,
            version: env!("CARGO_PKG_VERSION"),
            store: replica.store_kind,
            store_healthy: health.is_ok(),
            store_problem: health.err().map(|error| error.to_string()).unwrap_or_default(),
        },
        regions: regions(&snapshot, replica.fleet.thresholds()).into_iter().map(place).collect(),
        nodes: replica.node_views(),
        allocations: allocations.iter().map(|found| AllocationJson::new(found, at)).collect(),
        events,
        actions: actions.unwrap_or_default(),
    };
    match serde_json::to_string(&picture) {
        Ok(json) => Some(json.into()),
        Err(error) => {
            tracing::error!(%error, "the console's picture cannot be written");
            None
        }
    }
}

/// `/console` and its files, `/v1/console/events`, and `/` that leads there.
pub fn router(health: Health, feed: Feed) -> Router {
    let header = |name: HeaderName, value: &'static str| {
        SetResponseHeaderLayer::overriding(name, HeaderValue::from_static(value))
    };
    Router::new()
        .route("/", get(|| async { Redirect::temporary("/console") }))
        .route("/console", get(|| async { file("index.html") }))
        .route("/console/", get(|| async { file("index.html") }))
        .route("/console/{*path}", get(|Path(path): Path<String>| async move { file(&path) }))
        .layer(header(
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
             form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
        ))
        // The page's address may hold an API key.
        .layer(header(header::REFERRER_POLICY, "no-referrer"))
        .route("/v1/console/events", get(events))
        .merge(actions::router())
        .with_state((health, feed))
}

async fn events(State((health, feed)): State<(Health, Feed)>, params: Params) -> Result<Response, ApiError> {
    visitor(&health, &params)?;
    let stream = feed.watch().ok_or_else(|| {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, format!("{VIEWERS} consoles are open already"))
    })?;
    Ok(Sse::new(stream).keep_alive(KeepAlive::default()).into_response())
}

fn file(path: &str) -> Response {
    let Some(file) = FILES.get_file(path) else {
        return ApiError::new(StatusCode::NOT_FOUND, "there is no such file").into_response();
    };
    let kind = match path.rsplit_once('.').map(|(_, extension)| extension) {
        Some("html") => "text/html; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("svg") => "image/svg+xml",
        Some("png") => "image/png",
        _ => "application/octet-stream",
    };
    ([(header::CONTENT_TYPE, kind)], file.contents()).into_response()
}
