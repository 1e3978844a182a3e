//! What `Steering.Watch` says, as messages.

use tonic::Status;
use turnpike_proto::v1;

use super::load;
use crate::push::{Body, Condition, Filter, Relay, RelayEventKind, Update};

/// Names in a filter, at most, of regions and of nodes.
pub(super) const MAX_NAMES: usize = 64;

/// The filter asked for.
pub(super) fn filter(request: v1::WatchRequest) -> Result<Filter, Status> {
    let v1::WatchRequest { regions, node_ids } = request;
    if regions.len() > MAX_NAMES || node_ids.len() > MAX_NAMES {
        return Err(Status::invalid_argument(format!(
            "at most {MAX_NAMES} regions and {MAX_NAMES} nodes can be named"
        )));
    }
    Ok(Filter { regions, node_ids })
}

/// An update as a message.
pub(super) fn encode(update: Update) -> v1::WatchResponse {
    let body = match update.body {
        Body::States { relays, complete } => {
            let relays = relays.into_iter().map(relay).collect();
            v1::watch_response::Body::States(v1::RelayStates { relays, complete })
        }
        Body::Event(event) => {
            let kind = match &event.kind {
                RelayEventKind::Ready => v1::RelayEventKind::Ready,
                RelayEventKind::Draining => v1::RelayEventKind::Draining,
                RelayEventKind::Suspect => v1::RelayEventKind::Suspect,
                RelayEventKind::Lost => v1::RelayEventKind::Lost,
                RelayEventKind::Restored => v1::RelayEventKind::Restored,
                RelayEventKind::Moved { .. } => v1::RelayEventKind::Moved,
            };
            let former_node_id = match event.kind {
                RelayEventKind::Moved { former } => former,
                _ => String::new(),
            };
            let relay = Some(relay(event.relay));
            v1::watch_response::Body::Event(v1::RelayEvent { kind: kind.into(), relay, former_node_id })
        }
    };
    v1::WatchResponse { id: update.id, at: update.at, body: Some(body) }
}

fn relay(relay: Relay) -> v1::RelayState {
    let condition = match relay.condition {
        Condition::Ready => v1::RelayCondition::Ready,
        Condition::Draining => v1::RelayCondition::Draining,
        Condition::Suspect => v1::RelayCondition::Suspect,
        Condition::Lost => v1::RelayCondition::Lost,
    };
    let listener = |listener: &crate::fleet::NodeListener| v1::Listener {
        transport: load::transport(listener.transport).into(),
        address: listener.address.to_string(),
        ip_in_certificate: listener.ip_in_certificate,
    };
    v1::RelayState {
        node_id: relay.node_id,
        region: relay.region,
        relay_address: relay.relay_address.to_string(),
        relay_ips: relay.relay_ips.iter().map(ToString::to_string).collect(),
        listeners: relay.listeners.iter().map(listener).collect(),
        public_host: relay.public_host,
        condition: condition.into(),
        draining: relay.draining,
        drain_deadline: relay.drain_deadline,
        since: relay.since,
    }
}
