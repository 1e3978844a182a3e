//! `ListKeys`, `RotateKeys` and `RetireKey`.

use tonic::Status;
use turnpike_proto::v1;

use super::refusal;
use crate::keys::{KeyInfo, KeyState, Origin, Ring, RotateError};
use crate::replica::Replica;

/// Every key, and what each relay has in force.
pub(super) async fn list(replica: &Replica) -> Result<v1::ListKeysResponse, Status> {
    let (revision, keys) = replica.keys.list().await.map_err(|error| answer(&error))?;
    let snapshot = replica.fleet.snapshot();
    let relays = snapshot
        .nodes
        .values()
        .map(|node| v1::RelaySettings { node_id: node.record.node_id.clone(), revision: node.load.settings_revision });
    Ok(v1::ListKeysResponse { keys: keys.iter().map(key).collect(), revision, relays: relays.collect() })
}

/// Begins rotations.
pub(super) async fn rotate(
    replica: &Replica,
    request: v1::RotateKeysRequest,
) -> Result<v1::RotateKeysResponse, Status> {
    let mut rings = request.rings.iter().map(|number| ring(*number)).collect::<Result<Vec<_>, _>>()?;
    rings.sort_unstable();
    rings.dedup();
    let mut configured = Vec::new();
    if rings.is_empty() {
        rings = Ring::ALL.to_vec();
        if replica.keys.rest_is_configured() {
            rings.retain(|ring| *ring != Ring::Rest);
            configured.push(v1::KeyRing::Rest.into());
        }
    }
    let secret = Some(request.secret.as_slice()).filter(|secret| !secret.is_empty());
    if secret.is_some() && rings != [Ring::Rest] {
        return Err(Status::invalid_argument("a secret is given for the rest ring alone"));
    }
    let (revision, keys) = replica.keys.rotate(&rings, secret).await.map_err(|error| answer(&error))?;
    replica.steward.wake();
    let next = keys.iter().filter(|key| key.state == KeyState::Next && rings.contains(&key.ring));
    let keys: Vec<_> = next.map(key).collect();
    Ok(v1::RotateKeysResponse { keys, revision, configured })
}

/// Takes a key away.
pub(super) async fn retire(replica: &Replica, request: v1::RetireKeyRequest) -> Result<v1::RetireKeyResponse, Status> {
    let ring = ring(request.ring)?;
    let id = u8::try_from(request.id).map_err(|_| answer_unknown(ring, request.id))?;
    replica.keys.retire(ring, id).await.map_err(|error| answer(&error))?;
    Ok(v1::RetireKeyResponse {})
}

/// The rings of a rotation, for the audit log.
pub(super) fn rings(request: &v1::RotateKeysRequest) -> String {
    let names = request.rings.iter().map(|number| name(*number));
    let names = if names.len() == 0 { "all rings".to_owned() } else { names.collect::<Vec<_>>().join(" ") };
    if request.secret.is_empty() { names } else { names + ", a secret that was given" }
}

/// The key to be retired, for the audit log.
pub(super) fn named(request: &v1::RetireKeyRequest) -> String {
    format!("{} {}", name(request.ring), request.id)
}

fn name(number: i32) -> String {
    ring(number).map_or_else(|_| format!("ring {number}"), |ring| ring.to_string())
}

fn ring(number: i32) -> Result<Ring, Status> {
    match v1::KeyRing::try_from(number) {
        Ok(v1::KeyRing::Rest) => Ok(Ring::Rest),
        Ok(v1::KeyRing::Nonce) => Ok(Ring::Nonce),
        Ok(v1::KeyRing::Record) => Ok(Ring::Record),
        Ok(v1::KeyRing::Unspecified) | Err(_) => Err(Status::invalid_argument("there is no such key ring")),
    }
}

fn key(info: &KeyInfo) -> v1::Key {
    let ring = match info.ring {
        Ring::Rest => v1::KeyRing::Rest,
        Ring::Nonce => v1::KeyRing::Nonce,
        Ring::Record => v1::KeyRing::Record,
    };
    let state = match info.state {
        KeyState::Next => v1::KeyState::Next,
        KeyState::Newest => v1::KeyState::Newest,
        KeyState::Accepted => v1::KeyState::Accepted,
        KeyState::Retiring => v1::KeyState::Retiring,
    };
    let origin = match info.origin {
        Origin::Made => v1::KeyOrigin::Made,
        Origin::Given => v1::KeyOrigin::Given,
        Origin::Configured => v1::KeyOrigin::Configured,
    };
    v1::Key {
        ring: ring.into(),
        id: info.id.into(),
        state: state.into(),
        origin: origin.into(),
        created_at: info.created_at,
        since: info.since,
        leaves_at: info.leaves_at.unwrap_or(0),
    }
}

fn answer(error: &RotateError) -> Status {
    match error {
        RotateError::Store(error) => refusal(error),
        RotateError::NotGiven(_) | RotateError::Length => Status::invalid_argument(error.to_string()),
        RotateError::Unknown(..) => Status::not_found(error.to_string()),
        RotateError::Random(_) => Status::internal(error.to_string()),
        _ => Status::failed_precondition(error.to_string()),
    }
}

fn answer_unknown(ring: Ring, id: u32) -> Status {
    Status::not_found(format!("the {ring} ring has no key {id}"))
}
