//! `ListLinks`, `RevokeRelay` and `ReinstateRelay`.

use tonic::Status;
use turnpike_proto::v1;

use super::refusal;
use crate::api::load;
use crate::fleet::revoked::{self, RevokedRecord, Serial};
use crate::identity::{Identity, is_name};
use crate::replica::Replica;

/// Every end of every link.
pub(super) fn list(replica: &Replica) -> v1::ListLinksResponse {
    let snapshot = replica.fleet.snapshot();
    let relays = snapshot.nodes.values().map(|node| v1::RelayLinks {
        node_id: node.record.node_id.clone(),
        region: node.record.region.clone(),
        backbone_addresses: node.record.backbone.iter().map(ToString::to_string).collect(),
        cluster_only: node.record.cluster_only,
        links: load::message(&node.load).links,
        reported_at: node.load.reported_at,
    });
    let revoked = |(node_id, record): (&String, &RevokedRecord)| v1::RevokedRelay {
        node_id: node_id.clone(),
        since: record.since,
        by: record.by.clone(),
        serials: record.numbers().map(|serial| serial.bytes().to_vec()).collect(),
    };
    v1::ListLinksResponse { relays: relays.collect(), revoked: snapshot.revoked.iter().map(revoked).collect() }
}

/// Refuses a relay's certificate, or all of them.
pub(super) async fn revoke(
    replica: &Replica,
    caller: &Identity,
    request: v1::RevokeRelayRequest,
) -> Result<v1::RevokeRelayResponse, Status> {
    let node_id = name(request.node_id)?;
    let certificate = Serial::new(&request.serial);
    if certificate.is_none() && !request.serial.is_empty() {
        return Err(Status::invalid_argument("a serial number has 1 to 20 bytes, not all of them zero"));
    }
    let revoked = revoked::revoke(&*replica.store, &node_id, certificate, &caller.to_string()).await;
    let unchanged = revoked.map_err(|error| refusal(&error))?;
    Ok(v1::RevokeRelayResponse { unchanged })
}

/// Takes a relay's certificates again.
pub(super) async fn reinstate(
    replica: &Replica,
    request: v1::ReinstateRelayRequest,
) -> Result<v1::ReinstateRelayResponse, Status> {
    let node_id = name(request.node_id)?;
    let unchanged = revoked::reinstate(&*replica.store, &node_id).await.map_err(|error| refusal(&error))?;
    Ok(v1::ReinstateRelayResponse { unchanged })
}

/// Which certificates are revoked, for the audit log.
pub(super) fn certificates(serial: &[u8]) -> String {
    if serial.is_empty() {
        return "every certificate".to_owned();
    }
    let digits: Vec<String> = serial.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("certificate {}", digits.join(":"))
}

fn name(node_id: String) -> Result<String, Status> {
    if is_name(&node_id) {
        return Ok(node_id);
    }
    Err(Status::invalid_argument("a relay's id is 1 to 63 letters, digits, '.', '_' and '-'"))
}
