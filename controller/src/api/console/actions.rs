//! What the console asks and does beyond looking at the picture: through the same services, with the same roles and the same
//! audit log as gRPC.

use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Status};
use turn_core::AllocationId;
use turnpike_proto::v1;
use turnpike_proto::v1::admin_server::Admin as _;

use super::Feed;
use super::access::visitor;
use crate::allocations::{Allocations, Filter, Found, ListError};
use crate::api::admin::AdminService;
use crate::api::params::Params;
use crate::api::rest::{ApiError, query};
use crate::api::view::AllocationJson;
use crate::audit::Via;
use crate::fleet::unix_ms;
use crate::health::Health;
use crate::identity::{Identity, Role};
use crate::replica::Replica;
use crate::steering::{Considered, Outcome};

/// Allocations found at most.
const FOUND: usize = 200;
/// Searches at once: each may read some thousand records.
pub(super) const SEARCHES: usize = 4;
/// Longest text to search for, in bytes.
const LONGEST: usize = 512;
/// Longest time to get empty in that can be given: a week.
const MAX_DEADLINE: Duration = Duration::from_secs(7 * 86_400);

type Answer = Result<Json<Value>, ApiError>;
type Shared = State<(Health, Feed)>;

/// `/v1/console/{session,allocations,explain,drain,uncordon,end}`.
pub(super) fn router() -> Router<(Health, Feed)> {
    Router::new()
        .route("/v1/console/session", get(session))
        .route("/v1/console/allocations", get(allocations))
        .route("/v1/console/explain", get(explain))
        .route("/v1/console/drain", post(drain))
        .route("/v1/console/uncordon", post(uncordon))
        .route("/v1/console/end", post(end))
}

/// Who asks, and what that person may do.
async fn session(State((health, _)): Shared, params: Params) -> Answer {
    let (replica, caller) = visitor(&health, &params)?;
    let may_act = caller.role.covers(Role::Operator);
    Ok(Json(json!({
        "name": caller.name,
        "role": caller.role.to_string(),
        "may_act": may_act,
        "can_sign_in": !replica.console_keys.is_empty(),
    })))
}

/// Allocations that contain a text: exactly the one, or those of the one relay, where it is an id; else by what stands in them.
async fn allocations(State((health, feed)): Shared, params: Params) -> Result<Response, ApiError> {
    let (replica, _) = visitor(&health, &params)?;
    let wanted = params.text("search")?.unwrap_or_default().trim();
    if wanted.len() > LONGEST {
        return Err(ApiError::new(StatusCode::BAD_REQUEST, format!("search is longer than {LONGEST} bytes")));
    }
    let busy = || ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "others are searching; try again");
    let _place = feed.searches.try_acquire().map_err(|_| busy())?;
    let (found, more) = search(replica, wanted).await?;
    let at = unix_ms();
    let found: Vec<AllocationJson> = found.iter().map(|found| AllocationJson::new(found, at)).collect();
    Ok(Json(json!({ "allocations": found, "more": more })).into_response())
}

async fn search(replica: &Replica, wanted: &str) -> Result<(Vec<Found>, bool), ApiError> {
    let allocations: &Allocations = &replica.allocations;
    let away = |error: &dyn std::fmt::Display| ApiError::new(StatusCode::SERVICE_UNAVAILABLE, error.to_string());
    if let Some(id) = AllocationId::from_text(wanted) {
        let found = allocations.get(id).await.map_err(|error| away(&error))?;
        return Ok((found.into_iter().collect(), false));
    }
    let mut filter = Filter::default();
    if replica.fleet.snapshot().nodes.contains_key(wanted) {
        filter.node_id = Some(wanted.to_owned());
    } else if !wanted.is_empty() {
        filter.text = Some(wanted.to_lowercase());
    }
    let listed = allocations.list(&filter, FOUND, "").await;
    let listed = listed.map_err(|error: ListError| away(&error))?;
    Ok((listed.allocations, listed.next.is_some()))
}

/// What `turnctl explain` says. Without `client` it is about who asks.
async fn explain(State((health, _)): Shared, params: Params) -> Answer {
    #[derive(Serialize)]
    struct Row {
        node: String,
        region: String,
        rtt_ms: u32,
        basis: String,
        age_s: Option<u64>,
        load_permille: u64,
        penalty_ms: u64,
        session_ms: u32,
        score_ms: u64,
        allocations: u64,
        state: String,
        outcome: String,
        place: Option<usize>,
    }
    let row = |node: Considered| {
        let place = match node.outcome {
            Outcome::Chosen { place } => Some(place),
            _ => None,
        };
        Row {
            node: node.node_id,
            region: node.region,
            rtt_ms: node.rtt.rtt_ms,
            basis: node.rtt.basis.to_string(),
            age_s: node.rtt.basis.age().map(|age| age.as_secs()),
            load_permille: node.load_permille,
            penalty_ms: node.penalty_ms,
            session_ms: node.session_ms,
            score_ms: node.score_ms,
            allocations: node.allocations,
            state: node.state.to_string(),
            outcome: node.outcome.to_string(),
            place,
        }
    };
    let (replica, _) = visitor(&health, &params)?;
    let query = query(replica, &params)?;
    let explanation = replica.discovery.explain(&query);
    let relays: Vec<String> = explanation.choice.relays.into_iter().map(|relay| relay.node_id).collect();
    let considered: Vec<Row> = explanation.considered.into_iter().map(row).collect();
    Ok(Json(json!({
        "client": query.client.map(|client| client.to_string()),
        "relays": relays,
        "refusal": explanation.choice.refusal,
        "evidence": explanation.evidence,
        "considered": considered,
    })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DrainBody {
    node: String,
    /// 0 is no deadline.
    #[serde(default)]
    deadline_seconds: u32,
    #[serde(default)]
    force: bool,
}

async fn drain(State((health, _)): Shared, params: Params) -> Answer {
    let (replica, caller) = visitor(&health, &params)?;
    let DrainBody { node, deadline_seconds, force } = body(&params)?;
    if Duration::from_secs(deadline_seconds.into()) > MAX_DEADLINE {
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "the deadline is a week away at most"));
    }
    let request = v1::DrainNodesRequest { node_ids: vec![node], deadline_seconds, force };
    let done = admin(replica).drain_nodes(of(request, caller)).await?.into_inner();
    Ok(Json(json!({ "unchanged": done.nodes.iter().all(|node| node.unchanged) })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UncordonBody {
    node: String,
}

async fn uncordon(State((health, _)): Shared, params: Params) -> Answer {
    let (replica, caller) = visitor(&health, &params)?;
    let UncordonBody { node } = body(&params)?;
    let request = v1::UncordonNodesRequest { node_ids: vec![node] };
    let done = admin(replica).uncordon_nodes(of(request, caller)).await?.into_inner();
    Ok(Json(json!({ "unchanged": done.nodes.iter().all(|node| node.unchanged) })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EndBody {
    allocation: String,
}

async fn end(State((health, _)): Shared, params: Params) -> Answer {
    let (replica, caller) = visitor(&health, &params)?;
    let EndBody { allocation } = body(&params)?;
    admin(replica).revoke_allocation(of(v1::RevokeAllocationRequest { id: allocation }, caller)).await?;
    Ok(Json(json!({})))
}

fn admin(replica: &std::sync::Arc<Replica>) -> AdminService {
    AdminService::new(replica.clone(), CancellationToken::new())
}

/// A request of the service in the name of who is at the console.
fn of<T>(message: T, caller: Identity) -> Request<T> {
    let mut request = Request::new(message);
    request.extensions_mut().insert(caller);
    request.extensions_mut().insert(Via::Console);
    request
}

/// A body of JSON, said to be that: what a form of another page can send is not taken.
fn body<T: DeserializeOwned>(params: &Params) -> Result<T, ApiError> {
    serde_json::from_slice(params.body()).map_err(|error| {
        ApiError::new(
            StatusCode::BAD_REQUEST,
            format!("the body is not the JSON (application/json) that is asked for: {error}"),
        )
    })
}

impl From<Status> for ApiError {
    fn from(status: Status) -> Self {
        let code = match status.code() {
            Code::InvalidArgument | Code::OutOfRange => StatusCode::BAD_REQUEST,
            Code::Unauthenticated => StatusCode::UNAUTHORIZED,
            Code::PermissionDenied => StatusCode::FORBIDDEN,
            Code::NotFound => StatusCode::NOT_FOUND,
            Code::FailedPrecondition | Code::Aborted | Code::AlreadyExists => StatusCode::CONFLICT,
            Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
            Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(code, status.message())
    }
}
