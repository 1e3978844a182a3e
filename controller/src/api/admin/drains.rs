//! `DrainNodes` and `UncordonNodes`.

use std::time::Duration;

use tonic::Status;
use turnpike_proto::v1;

use super::refusal;
use crate::fleet::drain::{self, Objection};
use crate::fleet::{DrainRecord, Drains};
use crate::identity::{Identity, is_name};
use crate::replica::Replica;

/// Most nodes in a call.
const MANY: usize = 64;
/// How long a call waits for this replica's own picture to show what it has written.
const SHOWN: Duration = Duration::from_secs(2);

/// Tells nodes to drain. When it answers, discovery of this replica leaves them out.
pub(super) async fn drain(
    replica: &Replica,
    caller: &Identity,
    request: v1::DrainNodesRequest,
) -> Result<v1::DrainNodesResponse, Status> {
    let node_ids = names(request.node_ids)?;
    let snapshot = replica.fleet.snapshot();
    if !request.force
        && let Some(objection) = drain::objection(&snapshot, replica.fleet.thresholds(), &node_ids)
    {
        return Err(match objection {
            Objection::Unknown(_) => Status::not_found(objection.to_string()),
            Objection::Region(_) | Objection::Cluster => Status::failed_precondition(objection.to_string()),
        });
    }
    let within = (request.deadline_seconds > 0).then(|| Duration::from_secs(request.deadline_seconds.into()));
    let by = caller.to_string();
    let ordered = drain::order(&*replica.store, &node_ids, within, &by).await.map_err(|error| refusal(&error))?;
    let written = node_ids.iter().zip(&ordered);
    let written: Vec<_> = written.map(|(id, (record, _))| (id.clone(), record.clone())).collect();
    shown(replica, |drains| written.iter().all(|(id, record)| drains.get(id) == Some(record))).await;
    let nodes = node_ids.into_iter().zip(ordered).map(|(node_id, (record, unchanged))| v1::CordonedNode {
        absent: !snapshot.nodes.contains_key(&node_id),
        node_id,
        unchanged,
        drain: Some(message(&record)),
    });
    Ok(v1::DrainNodesResponse { nodes: nodes.collect() })
}

/// Takes back that nodes drain. When it answers, discovery of this replica offers them again.
pub(super) async fn uncordon(
    replica: &Replica,
    request: v1::UncordonNodesRequest,
) -> Result<v1::UncordonNodesResponse, Status> {
    let node_ids = names(request.node_ids)?;
    let snapshot = replica.fleet.snapshot();
    let known = |id: &String| snapshot.nodes.contains_key(id) || snapshot.drains.contains_key(id);
    if let Some(unknown) = node_ids.iter().find(|id| !known(id)) {
        return Err(Status::not_found(Objection::Unknown(unknown.clone()).to_string()));
    }
    let drained = drain::lift(&*replica.store, &node_ids).await.map_err(|error| refusal(&error))?;
    shown(replica, |drains| node_ids.iter().all(|id| !drains.contains_key(id))).await;
    let nodes = node_ids.into_iter().zip(drained).map(|(node_id, drained)| v1::CordonedNode {
        absent: !snapshot.nodes.contains_key(&node_id),
        node_id,
        unchanged: !drained,
        drain: None,
    });
    Ok(v1::UncordonNodesResponse { nodes: nodes.collect() })
}

/// How a drain was asked for, for the audit log.
pub(super) fn wish(request: &v1::DrainNodesRequest) -> String {
    let deadline = match request.deadline_seconds {
        0 => "no new deadline".to_owned(),
        seconds => format!("within {seconds} s"),
    };
    if request.force { deadline + ", by force" } else { deadline }
}

/// What an operator said, as operators are told it.
pub(super) fn message(record: &DrainRecord) -> v1::NodeDrain {
    v1::NodeDrain { since: record.since, deadline: record.deadline, by: record.by.clone() }
}

/// Node ids to act on, each once.
fn names(mut node_ids: Vec<String>) -> Result<Vec<String>, Status> {
    let mut seen = std::collections::HashSet::new();
    node_ids.retain(|id| seen.insert(id.clone()));
    if node_ids.is_empty() || node_ids.len() > MANY {
        return Err(Status::invalid_argument(format!("name 1 to {MANY} relays")));
    }
    match node_ids.iter().find(|id| !is_name(id)) {
        Some(_) => Err(Status::invalid_argument("a relay's id is 1 to 63 letters, digits, '.', '_' and '-'")),
        None => Ok(node_ids),
    }
}

/// Waits until the watched picture holds what was written. It is in the store in any case: a picture that lags is no
/// failure.
async fn shown(replica: &Replica, condition: impl Fn(&Drains) -> bool) {
    let mut drains = replica.fleet.drains();
    let shown = drains.wait_for(|drains| drains.as_deref().is_some_and(&condition));
    if tokio::time::timeout(SHOWN, shown).await.is_err() {
        tracing::debug!("the picture of the fleet lags behind the store");
    }
}
