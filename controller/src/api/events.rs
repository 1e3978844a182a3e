//! `/v1/events`: relay events for pages, as server-sent events, and the module that follows them, `/turnpike.js`.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt as _;
use serde::Serialize;

use super::params::Params;
use super::rest::{ApiError, admit};
use super::view::transport_name;
use super::watch::MAX_NAMES;
use crate::health::Health;
use crate::push::{Body, Filter, Relay, RelayEventKind, Update};

/// Proxies close what is silent; a minute is common.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// A page without our module comes back after 2 to 6 s, so that a replica's end does not bring all at once.
const RETRY_MS: (u64, u64) = (2000, 6000);

/// `?region=eu,us&node=eu-1`: names separated by commas; none is all.
pub(super) async fn stream(State(health): State<Health>, params: Params) -> Result<Response, ApiError> {
    let replica = admit(&health, &params)?;
    let filter = Filter { regions: names(&params, "region")?, node_ids: names(&params, "node")? };
    let updates = match replica.push.subscribe(filter) {
        Ok(updates) => updates,
        Err(full) => {
            let mut refusal = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, full.to_string()).into_response();
            refusal.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("30"));
            return Ok(refusal);
        }
    };
    let (least, most) = RETRY_MS;
    let mut retry = Some(Duration::from_millis(least + getrandom::u64().unwrap_or_default() % (most - least)));
    let events = updates.map(move |update| {
        let event = encode(&update);
        Ok::<_, Infallible>(match retry.take() {
            Some(after) => event.retry(after),
            None => event,
        })
    });
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE).text("still here");
    let mut response = Sse::new(events).keep_alive(keep_alive).into_response();
    // nginx would hold events back until its buffer is full.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// The module, for pages of any kind.
pub(super) async fn module() -> Response {
    let kind = HeaderValue::from_static("text/javascript; charset=utf-8");
    ([(header::CONTENT_TYPE, kind)], include_str!("../../web/turnpike.js")).into_response()
}

fn names(params: &Params, name: &str) -> Result<Vec<String>, ApiError> {
    let text = params.text(name)?.unwrap_or_default();
    let names: Vec<String> =
        text.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect();
    if names.len() > MAX_NAMES {
        return Err(ApiError::new(StatusCode::BAD_REQUEST, format!("{name} takes at most {MAX_NAMES} names")));
    }
    Ok(names)
}

#[derive(Serialize)]
struct StatesJson<'a> {
    at: u64,
    complete: bool,
    relays: Vec<RelayJson<'a>>,
}

#[derive(Serialize)]
struct EventJson<'a> {
    at: u64,
    kind: &'static str,
    /// Only of `moved`: who served the address before.
    #[serde(skip_serializing_if = "Option::is_none")]
    former_node: Option<&'a str>,
    relay: RelayJson<'a>,
}

#[derive(Serialize)]
struct RelayJson<'a> {
    node: &'a str,
    region: &'a str,
    relay_address: String,
    relay_ips: Vec<String>,
    /// `udp://192.0.2.1:3478`.
    listeners: Vec<String>,
    public_host: &'a str,
    /// `ready`, `draining`, `suspect` or `lost`.
    condition: &'static str,
    draining: bool,
    /// Unix ms; `null` if not known.
    drain_deadline: Option<u64>,
    /// What is left until then, ms: clocks of browsers are often wrong.
    drain_ms: Option<u64>,
    since: u64,
}

impl<'a> RelayJson<'a> {
    fn new(relay: &'a Relay, at: u64) -> Self {
        let deadline = Some(relay.drain_deadline).filter(|deadline| *deadline > 0);
        Self {
            node: &relay.node_id,
            region: &relay.region,
            relay_address: relay.relay_address.to_string(),
            relay_ips: relay.relay_ips.iter().map(ToString::to_string).collect(),
            listeners: relay
                .listeners
                .iter()
                .map(|l| format!("{}://{}", transport_name(l.transport), l.address))
                .collect(),
            public_host: &relay.public_host,
            condition: relay.condition.name(),
            draining: relay.draining,
            drain_deadline: deadline,
            drain_ms: deadline.map(|deadline| deadline.saturating_sub(at)),
            since: relay.since,
        }
    }
}

/// `event: relays` is the state of all, `event: relay` a change of one.
fn encode(update: &Update) -> sse::Event {
    let at = update.at;
    let (name, json) = match &update.body {
        Body::States { relays, complete } => {
            let relays = relays.iter().map(|relay| RelayJson::new(relay, at)).collect();
            ("relays", serde_json::to_string(&StatesJson { at, complete: *complete, relays }))
        }
        Body::Event(event) => {
            let former_node = match &event.kind {
                RelayEventKind::Moved { former } => Some(former.as_str()),
                _ => None,
            };
            let relay = RelayJson::new(&event.relay, at);
            ("relay", serde_json::to_string(&EventJson { at, kind: event.kind.name(), former_node, relay }))
        }
    };
    match json {
        Ok(json) => sse::Event::default().id(&update.id).event(name).data(json),
        Err(error) => {
            tracing::error!(%error, "a relay event cannot be written");
            sse::Event::default().comment("an event was lost")
        }
    }
}
