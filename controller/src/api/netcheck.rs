//! `/v1/netcheck`: what a client should measure, and what it has measured.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::params::Params;
use super::rest::{ApiError, admit, too_often};
use crate::health::Health;
use crate::steering::Target;

/// Regions in a report, at most.
pub(super) const MAX_REGIONS: usize = 64;

/// `GET`: STUN servers of the regions that are worth measuring from here, nearest first by what is known.
pub(super) async fn targets(State(health): State<Health>, params: Params) -> Result<Json<Value>, ApiError> {
    let replica = admit(&health, &params)?;
    let client = params.connected(&replica.trusted_proxies).ok_or_else(nowhere)?;
    let targets = replica.discovery.targets(client);
    let target = |target: &Target| json!({ "region": target.region, "node": target.node_id, "stun": format!("stun:{}", target.address) });
    Ok(Json(json!({ "client": client, "targets": targets.iter().map(target).collect::<Vec<_>>() })))
}

/// The body of a report.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Report {
    /// Milliseconds by region.
    rtt_ms: BTreeMap<String, f32>,
}

/// `POST {"rtt_ms": {"eu": 23.4, ...}}`: counts for the network that the request comes from, whatever else it says.
pub(super) async fn report(State(health): State<Health>, params: Params) -> Result<Json<Value>, ApiError> {
    let replica = admit(&health, &params)?;
    let client = params.connected(&replica.trusted_proxies).ok_or_else(nowhere)?;
    replica.limiter.report(client).map_err(too_often)?;
    let report: Report = serde_json::from_slice(params.body()).map_err(|_| {
        let form = r#"write {"rtt_ms": {"REGION": MILLISECONDS, ...}} as application/json"#;
        ApiError::new(StatusCode::BAD_REQUEST, form)
    })?;
    if report.rtt_ms.len() > MAX_REGIONS {
        return Err(ApiError::new(StatusCode::BAD_REQUEST, format!("at most {MAX_REGIONS} regions")));
    }
    let rtts: Vec<_> = report.rtt_ms.into_iter().collect();
    Ok(Json(json!({ "taken": replica.discovery.report(client, &rtts) })))
}

fn nowhere() -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, "the address of this connection is not known")
}
