//! Discovery over HTTP: TURN REST for servers (draft-uberti-behave-turn-rest), iceServers for browsers, and what there
//! is to choose from.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use serde_json::{Value, json};
use subtle::ConstantTimeEq as _;
use tower_http::cors::{AllowOrigin, CorsLayer};
use turn_core::Transport;

use super::limit::TooOften;
use super::params::Params;
use super::view::NodeJson;
use super::{events, netcheck};
use crate::discovery::{Credential, DiscoveryError};
use crate::health::Health;
use crate::replica::Replica;
use crate::steering::{self, Choice, DEFAULT_LIMIT, MAX_LIMIT, MAX_SESSION, Query};

/// What an HTTP request cannot be answered with: a status and `{"error": "..."}`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ApiError {
    status: StatusCode,
    message: String,
    /// Seconds.
    retry_after: Option<u64>,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), retry_after: None }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(json!({ "error": self.message }))).into_response();
        if self.status == StatusCode::UNAUTHORIZED {
            let challenge = HeaderValue::from_static("Bearer realm=\"turnpike\"");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
        }
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}

impl From<DiscoveryError> for ApiError {
    fn from(error: DiscoveryError) -> Self {
        let status = match error {
            DiscoveryError::NoRelay(_) | DiscoveryError::Secret => StatusCode::SERVICE_UNAVAILABLE,
            DiscoveryError::User | DiscoveryError::Ttl => StatusCode::BAD_REQUEST,
        };
        Self::new(status, error.to_string())
    }
}

/// The answer to who asks too often.
pub(super) fn too_often(TooOften(wait): TooOften) -> ApiError {
    let what = "this address or API key asks too often (the controller's rate.address, rate.key)";
    let retry_after = Some(wait.as_secs() + 1);
    ApiError { retry_after, ..ApiError::new(StatusCode::TOO_MANY_REQUESTS, what) }
}

/// `/v1/turn`, `/v1/ice-servers`, `/v1/netcheck`, `/v1/regions`, `/v1/nodes`, `/v1/events` and the module that follows them,
/// for pages of `origins` too.
pub fn router(health: Health, origins: &[String]) -> Router {
    Router::new()
        .route("/v1/turn", get(turn).post(turn))
        .route("/v1/ice-servers", get(ice_servers))
        .route("/v1/netcheck", get(netcheck::targets).post(netcheck::report))
        .route("/v1/regions", get(regions))
        .route("/v1/nodes", get(nodes))
        .route("/v1/events", get(events::stream))
        .route("/turnpike.js", get(events::module))
        // Inside of the layer, because a preflight is a method no route takes.
        .method_not_allowed_fallback(method_not_allowed)
        .layer(cors(origins))
        .with_state(health)
}

/// A path that does not take the method.
pub(super) async fn method_not_allowed() -> ApiError {
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "this path does not take this method")
}

fn cors(origins: &[String]) -> CorsLayer {
    let allowed = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()))
    };
    CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers([header::AUTHORIZATION, header::CONTENT_TYPE, HeaderName::from_static("x-api-key")])
        .max_age(Duration::from_secs(3600))
}

/// The replica, if it is ready and the request carries an API key where one is asked for.
pub(super) fn admit<'a>(health: &'a Health, params: &Params) -> Result<&'a Arc<Replica>, ApiError> {
    let Some(replica) = health.replica() else {
        return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, health.waiting_for()));
    };
    // Every key is compared: the time says nothing about which one was close.
    let place = |given: &[u8]| {
        let keys = replica.api_keys.iter().enumerate();
        keys.fold(None, |found, (place, key)| if bool::from(key.as_bytes().ct_eq(given)) { Some(place) } else { found })
    };
    let key = params.api_keys().find_map(place);
    if key.is_none() && !replica.api_keys.is_empty() {
        // Strangers are counted too, or keys could be guessed at any rate.
        replica.limiter.answer(params.connected(&replica.trusted_proxies), None).map_err(too_often)?;
        return Err(ApiError::new(
            StatusCode::UNAUTHORIZED,
            "an API key of this cluster is needed: Authorization: Bearer KEY, X-API-Key: KEY or ?key=KEY",
        ));
    }
    replica.limiter.answer(params.connected(&replica.trusted_proxies), key).map_err(too_often)?;
    Ok(replica)
}

#[derive(Serialize)]
struct TurnRest {
    username: String,
    password: String,
    ttl: u64,
    uris: Vec<String>,
}

async fn turn(State(health): State<Health>, params: Params) -> Result<Json<TurnRest>, ApiError> {
    let replica = admit(&health, &params)?;
    if let Some(service) = params.bytes("service")
        && service != b"turn"
    {
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "service must be turn"));
    }
    let user = params.text("username")?.unwrap_or_default();
    let (choice, credential) = replica.discovery.discover(&query(replica, &params)?, user.as_bytes(), None)?;
    Ok(Json(TurnRest {
        username: username(&credential),
        password: credential.password,
        ttl: credential.ttl.as_secs(),
        uris: uris(&choice),
    }))
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct IceServers {
    ice_servers: [IceServer; 1],
    ttl: u64,
    region: String,
    nodes: Vec<String>,
}

#[derive(Serialize)]
struct IceServer {
    urls: Vec<String>,
    username: String,
    credential: String,
}

async fn ice_servers(State(health): State<Health>, params: Params) -> Result<Json<IceServers>, ApiError> {
    let replica = admit(&health, &params)?;
    let user = params.text("user")?.unwrap_or_default();
    let (choice, credential) = replica.discovery.discover(&query(replica, &params)?, user.as_bytes(), ttl(&params)?)?;
    let server = IceServer { urls: uris(&choice), username: username(&credential), credential: credential.password };
    Ok(Json(IceServers {
        ice_servers: [server],
        ttl: credential.ttl.as_secs(),
        region: choice.region().to_owned(),
        nodes: choice.relays.into_iter().map(|relay| relay.node_id).collect(),
    }))
}

async fn regions(State(health): State<Health>, params: Params) -> Result<Json<Value>, ApiError> {
    let replica = admit(&health, &params)?;
    let regions = steering::regions(&replica.fleet.snapshot(), replica.fleet.thresholds());
    Ok(Json(json!({ "regions": regions })))
}

async fn nodes(State(health): State<Health>, params: Params) -> Result<Json<Value>, ApiError> {
    let replica = admit(&health, &params)?;
    let nodes: Vec<NodeJson> = replica.node_views();
    Ok(Json(json!({ "nodes": nodes })))
}

/// What relays are asked for.
pub(super) fn query(replica: &Replica, params: &Params) -> Result<Query, ApiError> {
    let limit = match params.text("limit")? {
        None => DEFAULT_LIMIT,
        Some(limit) => limit
            .parse()
            .ok()
            .filter(|limit| (1..=MAX_LIMIT).contains(limit))
            .ok_or_else(|| ApiError::new(StatusCode::BAD_REQUEST, format!("limit must be 1 to {MAX_LIMIT}")))?,
    };
    let transports = params.text("transport")?.unwrap_or_default();
    let transports = transports.split(',').map(str::trim).filter(|name| !name.is_empty()).map(transport);
    let session = params.bytes("session").filter(|session| !session.is_empty());
    if session.is_some_and(|session| session.len() > MAX_SESSION) {
        return Err(ApiError::new(StatusCode::BAD_REQUEST, format!("session is longer than {MAX_SESSION} bytes")));
    }
    Ok(Query {
        region: params.text("region")?.filter(|region| !region.is_empty()).map(str::to_owned),
        transports: transports.collect::<Result<_, _>>()?,
        limit,
        client: params.client(&replica.trusted_proxies)?,
        session: session.map(<[u8]>::to_vec),
        home: params.text("home")?.filter(|home| !home.is_empty()).map(str::to_owned),
    })
}

/// How long the credentials shall be good; too long is refused where they are made.
fn ttl(params: &Params) -> Result<Option<Duration>, ApiError> {
    let Some(seconds) = params.text("ttl")? else { return Ok(None) };
    match seconds.parse() {
        Ok(seconds @ 1..) => Ok(Some(Duration::from_secs(seconds))),
        _ => Err(ApiError::new(StatusCode::BAD_REQUEST, "ttl must be a number of seconds, at least 1")),
    }
}

fn transport(name: &str) -> Result<Transport, ApiError> {
    match name.to_ascii_lowercase().as_str() {
        "udp" => Ok(Transport::Udp),
        "tcp" => Ok(Transport::Tcp),
        "tls" => Ok(Transport::Tls),
        "dtls" => Ok(Transport::Dtls),
        _ => {
            Err(ApiError::new(StatusCode::BAD_REQUEST, "transport must be of udp, tcp, tls, dtls, separated by commas"))
        }
    }
}

fn uris(choice: &Choice) -> Vec<String> {
    choice.relays.iter().flat_map(|relay| relay.uris.iter().cloned()).collect()
}

/// Nothing is lost: the user it was made out to came as text.
fn username(credential: &Credential) -> String {
    String::from_utf8_lossy(&credential.username).into_owned()
}
