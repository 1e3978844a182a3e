//! Discovery over HTTP: TURN REST for servers (draft-uberti-behave-turn-rest), iceServers for browsers, and what there
//! is to choose from.

use std::sync::Arc;

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

use super::params::Params;
use super::view::NodeJson;
use crate::discovery::{Credential, DiscoveryError};
use crate::health::Health;
use crate::replica::Replica;
use crate::steering::{self, Choice, DEFAULT_LIMIT, MAX_LIMIT, Query};

/// What an HTTP request cannot be answered with: a status and `{"error": "..."}`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ApiError {
    status: StatusCode,
    message: String,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(json!({ "error": self.message }))).into_response();
        if self.status == StatusCode::UNAUTHORIZED {
            let challenge = HeaderValue::from_static("Bearer realm=\"turnpike\"");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
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

/// `/v1/turn`, `/v1/ice-servers`, `/v1/regions`, `/v1/nodes`, for pages of `origins` too.
pub fn router(health: Health, origins: &[String]) -> Router {
    Router::new()
        .route("/v1/turn", get(turn).post(turn))
        .route("/v1/ice-servers", get(ice_servers))
        .route("/v1/regions", get(regions))
        .route("/v1/nodes", get(nodes))
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
        .max_age(std::time::Duration::from_secs(3600))
}

/// The replica, if it is ready and the request carries an API key where one is asked for.
pub(super) fn admit<'a>(health: &'a Health, params: &Params) -> Result<&'a Arc<Replica>, ApiError> {
    let Some(replica) = health.replica() else {
        return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, health.waiting_for()));
    };
    let known = |given: &[u8]| {
        // Every key is compared: the time says nothing about which one was close.
        let matches = replica.api_keys.iter().map(|key| key.as_bytes().ct_eq(given).unwrap_u8());
        matches.fold(0, |all, one| all | one) == 1
    };
    if replica.api_keys.is_empty() || params.api_keys().any(known) {
        return Ok(replica);
    }
    Err(ApiError::new(
        StatusCode::UNAUTHORIZED,
        "an API key of this cluster is needed: Authorization: Bearer KEY, X-API-Key: KEY or ?key=KEY",
    ))
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
    let (choice, credential) = replica.discovery.discover(&query(&params)?, user.as_bytes(), None)?;
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
    let (choice, credential) = replica.discovery.discover(&query(&params)?, user.as_bytes(), None)?;
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

fn query(params: &Params) -> Result<Query, ApiError> {
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
    Ok(Query {
        region: params.text("region")?.filter(|region| !region.is_empty()).map(str::to_owned),
        transports: transports.collect::<Result<_, _>>()?,
        limit,
    })
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
