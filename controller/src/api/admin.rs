//! The gRPC service `Admin`: decodes, asks the fleet and the allocations, encodes.

mod drains;
mod keys;
mod links;
mod usage;

use std::pin::Pin;
use std::sync::Arc;

use futures_util::{Stream, StreamExt as _, stream};
use prost::Message as _;
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use turn_core::AllocationId;
use turnpike_proto::v1;
use turnpike_proto::v1::admin_server::Admin;

use super::load;
use super::view::reason;
use crate::allocations::{AllocationChange, AllocationEvent, Allocations, Filter, Found, ListError};
use crate::audit::{Action, Attempt, Outcome};
use crate::fleet::{FleetChange, FleetEvent, NodeState, NodeView, Snapshot, unix_ms};
use crate::identity::{Role, require};
use crate::replica::Replica;
use crate::steering::regions;
use crate::store::StoreError;

/// A page ends once it is this long: callers refuse messages above 4 MiB, and records with hundreds of permissions
/// would get there.
const PAGE_BYTES: usize = 2 * 1024 * 1024;

/// Admin actions in a list where nobody says how many.
const DEFAULT_AUDIT: usize = 100;

/// The service.
#[derive(Clone)]
pub struct AdminService {
    replica: Arc<Replica>,
    shutdown: CancellationToken,
}

impl AdminService {
    /// Answers from `replica`; event streams end at `shutdown`.
    pub fn new(replica: Arc<Replica>, shutdown: CancellationToken) -> Self {
        Self { replica, shutdown }
    }
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn status(&self, request: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        require(&request, Role::Viewer)?;
        let replica = &self.replica;
        let store = replica.store_status().await;
        let snapshot = replica.fleet.snapshot();
        let (thresholds, now) = (replica.fleet.thresholds(), unix_ms());
        let regions = regions(&snapshot, thresholds);

        let mut warnings = Vec::new();
        if let Err(error) = &store {
            warnings.push(format!("{error}; relays go on, and discovery answers from memory"));
        }
        if snapshot.nodes.is_empty() {
            warnings.push("no relay has joined".to_owned());
        }
        let without = regions.iter().filter(|region| region.healthy == 0);
        warnings.extend(without.map(|region| format!("region {} has no ready relay", region.name)));
        let unready = snapshot.nodes.values().filter(|node| node.state(thresholds) != NodeState::Ready);
        warnings.extend(unready.map(|node| {
            let state = node.state(thresholds);
            format!("relay {} is {state}: {}", node.record.node_id, reason(node, thresholds, now))
        }));
        warnings.extend(degraded(&snapshot, replica.keys.current().message.revision));

        Ok(Response::new(v1::StatusResponse {
            controller_id: replica.id.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            store: replica.store_kind.to_owned(),
            store_healthy: store.is_ok(),
            store_problem: store.as_ref().err().map(ToString::to_string).unwrap_or_default(),
            store_version: store.map(|status| status.version).unwrap_or_default(),
            nodes: count(snapshot.nodes.len()),
            healthy_nodes: regions.iter().map(|region| region.healthy).sum(),
            regions: count(regions.len()),
            allocations: snapshot.nodes.values().map(|node| node.load.allocations).sum(),
            uptime_seconds: replica.started.elapsed().as_secs(),
            warnings,
        }))
    }

    async fn list_nodes(
        &self,
        request: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        require(&request, Role::Viewer)?;
        let region = request.into_inner().region;
        let snapshot = self.replica.fleet.snapshot();
        let everyone = snapshot.everyone();
        let wanted = everyone.iter().filter(|node| region.is_empty() || node.record.region == region);
        let nodes = wanted.map(|node| self.node(node)).collect();
        Ok(Response::new(v1::ListNodesResponse { nodes }))
    }

    async fn list_allocations(
        &self,
        request: Request<v1::ListAllocationsRequest>,
    ) -> Result<Response<v1::ListAllocationsResponse>, Status> {
        require(&request, Role::Viewer)?;
        let request = request.into_inner();
        let filter = Filter {
            node_id: Some(request.node_id).filter(|id| !id.is_empty()),
            region: Some(request.region).filter(|region| !region.is_empty()),
            user: Some(request.user).filter(|user| !user.is_empty()),
            text: None,
        };
        let size = usize::try_from(request.page_size).unwrap_or(usize::MAX);
        let listed = self.replica.allocations.list(&filter, size, &request.page_token).await;
        let listed = listed.map_err(|error| match error {
            ListError::Token => Status::invalid_argument(error.to_string()),
            ListError::Store(error) => refusal(&error),
        })?;
        let mut answer = v1::ListAllocationsResponse {
            allocations: Vec::with_capacity(listed.allocations.len()),
            next_page_token: listed.next.unwrap_or_default(),
        };
        let mut bytes = 0;
        let mut rest = listed.allocations.into_iter().peekable();
        while let Some(found) = rest.next() {
            let token = Allocations::token_after(&found);
            let next = allocation(found);
            bytes += next.encoded_len();
            answer.allocations.push(next);
            if bytes >= PAGE_BYTES && rest.peek().is_some() {
                answer.next_page_token = token;
                break;
            }
        }
        Ok(Response::new(answer))
    }

    async fn get_allocation(
        &self,
        request: Request<v1::GetAllocationRequest>,
    ) -> Result<Response<v1::Allocation>, Status> {
        require(&request, Role::Viewer)?;
        let id = allocation_id(&request.into_inner().id)?;
        let found = self.replica.allocations.get(id).await.map_err(|error| refusal(&error))?;
        let found = found.ok_or_else(|| not_found(id))?;
        Ok(Response::new(allocation(found)))
    }

    async fn list_usage(
        &self,
        request: Request<v1::ListUsageRequest>,
    ) -> Result<Response<v1::ListUsageResponse>, Status> {
        require(&request, Role::Viewer)?;
        usage::list(&self.replica, request.into_inner()).await.map(Response::new)
    }

    type EventsStream = Pin<Box<dyn Stream<Item = Result<v1::Event, Status>> + Send>>;

    async fn events(&self, request: Request<v1::EventsRequest>) -> Result<Response<Self::EventsStream>, Status> {
        require(&request, Role::Viewer)?;
        let nodes = BroadcastStream::new(self.replica.fleet.subscribe());
        let nodes = nodes.map(|event| event.map(node_event).map_err(|error| fell_behind(&error)));
        let allocations = BroadcastStream::new(self.replica.allocations.subscribe());
        let replica = self.replica.clone();
        let allocations = allocations.map(move |event| {
            let event = event.map_err(|error| fell_behind(&error))?;
            Ok(allocation_event(event, &replica))
        });
        let shutdown = self.shutdown.clone().cancelled_owned();
        Ok(Response::new(Box::pin(stream::select(nodes, allocations).take_until(shutdown))))
    }

    async fn revoke_allocation(
        &self,
        request: Request<v1::RevokeAllocationRequest>,
    ) -> Result<Response<v1::RevokeAllocationResponse>, Status> {
        let attempt = self.begin(&request, "revoke_allocation", request.get_ref().id.clone(), String::new());
        let answer = async {
            require(&request, Role::Operator)?;
            let id = allocation_id(&request.into_inner().id)?;
            if !self.replica.allocations.revoke(id).await.map_err(|error| refusal(&error))? {
                return Err(not_found(id));
            }
            Ok(Response::new(v1::RevokeAllocationResponse {}))
        };
        attempt.settle(answer.await)
    }

    async fn drain_nodes(
        &self,
        request: Request<v1::DrainNodesRequest>,
    ) -> Result<Response<v1::DrainNodesResponse>, Status> {
        let attempt =
            self.begin(&request, "drain", request.get_ref().node_ids.join(" "), drains::wish(request.get_ref()));
        let answer = async {
            let caller = require(&request, Role::Operator)?;
            drains::drain(&self.replica, &caller, request.into_inner()).await.map(Response::new)
        };
        attempt.settle(answer.await)
    }

    async fn list_keys(&self, request: Request<v1::ListKeysRequest>) -> Result<Response<v1::ListKeysResponse>, Status> {
        require(&request, Role::Viewer)?;
        keys::list(&self.replica).await.map(Response::new)
    }

    async fn rotate_keys(
        &self,
        request: Request<v1::RotateKeysRequest>,
    ) -> Result<Response<v1::RotateKeysResponse>, Status> {
        let attempt = self.begin(&request, "rotate_keys", keys::rings(request.get_ref()), String::new());
        let answer = async {
            require(&request, Role::Admin)?;
            keys::rotate(&self.replica, request.into_inner()).await.map(Response::new)
        };
        attempt.settle(answer.await)
    }

    async fn retire_key(
        &self,
        request: Request<v1::RetireKeyRequest>,
    ) -> Result<Response<v1::RetireKeyResponse>, Status> {
        let attempt = self.begin(&request, "retire_key", keys::named(request.get_ref()), String::new());
        let answer = async {
            require(&request, Role::Admin)?;
            keys::retire(&self.replica, request.into_inner()).await.map(Response::new)
        };
        attempt.settle(answer.await)
    }

    async fn uncordon_nodes(
        &self,
        request: Request<v1::UncordonNodesRequest>,
    ) -> Result<Response<v1::UncordonNodesResponse>, Status> {
        let attempt = self.begin(&request, "uncordon", request.get_ref().node_ids.join(" "), String::new());
        let answer = async {
            require(&request, Role::Operator)?;
            drains::uncordon(&self.replica, request.into_inner()).await.map(Response::new)
        };
        attempt.settle(answer.await)
    }

    async fn list_links(
        &self,
        request: Request<v1::ListLinksRequest>,
    ) -> Result<Response<v1::ListLinksResponse>, Status> {
        require(&request, Role::Viewer)?;
        Ok(Response::new(links::list(&self.replica)))
    }

    async fn revoke_relay(
        &self,
        request: Request<v1::RevokeRelayRequest>,
    ) -> Result<Response<v1::RevokeRelayResponse>, Status> {
        let revoked = request.get_ref();
        let attempt =
            self.begin(&request, "revoke_relay", revoked.node_id.clone(), links::certificates(&revoked.serial));
        let answer = async {
            let caller = require(&request, Role::Admin)?;
            links::revoke(&self.replica, &caller, request.into_inner()).await.map(Response::new)
        };
        attempt.settle(answer.await)
    }

    async fn reinstate_relay(
        &self,
        request: Request<v1::ReinstateRelayRequest>,
    ) -> Result<Response<v1::ReinstateRelayResponse>, Status> {
        let attempt = self.begin(&request, "reinstate_relay", request.get_ref().node_id.clone(), String::new());
        let answer = async {
            require(&request, Role::Admin)?;
            links::reinstate(&self.replica, request.into_inner()).await.map(Response::new)
        };
        attempt.settle(answer.await)
    }

    async fn list_audit(
        &self,
        request: Request<v1::ListAuditRequest>,
    ) -> Result<Response<v1::ListAuditResponse>, Status> {
        require(&request, Role::Viewer)?;
        let limit = match request.into_inner().limit {
            0 => DEFAULT_AUDIT,
            limit => usize::try_from(limit).unwrap_or(usize::MAX),
        };
        let actions = self.replica.audit.newest(limit).await.into_iter().map(action);
        Ok(Response::new(v1::ListAuditResponse { actions: actions.collect() }))
    }
}

impl AdminService {
    fn begin<T>(&self, request: &Request<T>, action: &'static str, on: String, detail: String) -> Attempt {
        self.replica.audit.begin(request, action, on, detail)
    }

    fn node(&self, node: &NodeView) -> v1::Node {
        let NodeView { record, epoch, load, drain } = node;
        let state = match node.state(self.replica.fleet.thresholds()) {
            NodeState::Ready => v1::NodeState::Ready,
            NodeState::Draining => v1::NodeState::Draining,
            NodeState::Overloaded => v1::NodeState::Overloaded,
            NodeState::Suspect => v1::NodeState::Suspect,
            NodeState::Standby => v1::NodeState::Standby,
        };
        let listener = |listener: &crate::fleet::NodeListener| v1::Listener {
            transport: load::transport(listener.transport).into(),
            address: listener.address.to_string(),
            ip_in_certificate: listener.ip_in_certificate,
        };
        v1::Node {
            node_id: record.node_id.clone(),
            region: record.region.clone(),
            zone: record.zone.clone(),
            version: record.version.clone(),
            relay_address: record.relay_address.to_string(),
            listeners: record.listeners.iter().map(listener).collect(),
            epoch: *epoch,
            state: state.into(),
            load: Some(load::message(load)),
            workers: record.workers,
            registered_at: record.registered_at,
            last_report_at: load.reported_at,
            public_host: record.public_host.clone(),
            drain: drain.as_ref().map(drains::message),
        }
    }
}

/// What relays that serve lack, and who is cordoned and not there, a line each.
fn degraded(snapshot: &Snapshot, revision: u64) -> Vec<String> {
    let mut warnings = Vec::new();
    for (id, node) in &snapshot.nodes {
        if node.load.journal_failed {
            warnings.push(format!("relay {id} cannot write its journal: its records are in the store alone"));
        }
        // 0 is of an older version, which does not say.
        if (1..revision).contains(&node.load.settings_revision) {
            warnings.push(format!("relay {id} runs with settings older than the newest"));
        }
    }
    let absent = snapshot.drains.keys().filter(|id| !snapshot.nodes.contains_key(*id));
    warnings.extend(absent.map(|id| format!("relay {id} is told to drain and is not there; uncordon it to forget it")));
    warnings
}

fn action(action: Action) -> v1::AuditAction {
    let outcome = match action.outcome {
        Outcome::Done => v1::AuditOutcome::Done,
        Outcome::Denied => v1::AuditOutcome::Denied,
        Outcome::Failed => v1::AuditOutcome::Failed,
        Outcome::Unknown => v1::AuditOutcome::Unknown,
    };
    v1::AuditAction {
        at: action.at,
        caller: action.caller,
        via: action.via.to_string(),
        controller: action.controller,
        action: action.action,
        on: action.on,
        outcome: outcome.into(),
        detail: action.detail,
    }
}

fn allocation(found: Found) -> v1::Allocation {
    let Found { record, node_id, region } = found;
    v1::Allocation {
        id: record.id.to_text(),
        node_id,
        region,
        relay_address: record.relay_address.to_string(),
        username: record.username,
        client: record.five_tuple.client.to_string(),
        server: record.five_tuple.server.to_string(),
        transport: load::transport(record.five_tuple.transport).into(),
        relayed: record.relayed.iter().map(|relayed| relayed.advertised.to_string()).collect(),
        permissions: record
            .permissions
            .into_iter()
            .map(|(peer, expires_at)| v1::Permission { peer_ip: peer.to_string(), expires_at })
            .collect(),
        channels: record
            .channels
            .into_iter()
            .map(|(number, peer, expires_at)| v1::Channel {
                number: number.into(),
                peer: peer.socket_addr().to_string(),
                expires_at,
            })
            .collect(),
        created_at: record.created_at,
        expires_at: record.expires_at,
        epoch: record.epoch,
        sequence: record.sequence,
    }
}

fn node_event(event: FleetEvent) -> v1::Event {
    let (kind, detail) = match event.change {
        FleetChange::Joined => (v1::EventKind::NodeJoined, String::new()),
        FleetChange::Left => (v1::EventKind::NodeLeft, String::new()),
        FleetChange::Changed(detail) => (v1::EventKind::NodeChanged, detail),
    };
    v1::Event {
        at: event.at,
        kind: kind.into(),
        node_id: event.node_id,
        region: event.region,
        allocation_id: String::new(),
        username: Vec::new(),
        detail,
    }
}

fn allocation_event(event: AllocationEvent, replica: &Replica) -> v1::Event {
    let kind = match event.change {
        AllocationChange::Created => v1::EventKind::AllocationCreated,
        AllocationChange::Ended => v1::EventKind::AllocationEnded,
    };
    let snapshot = replica.fleet.snapshot();
    let node = snapshot.node_of(event.relay_address).map(|node| &node.record);
    v1::Event {
        at: event.at,
        kind: kind.into(),
        node_id: node.map(|node| node.node_id.clone()).unwrap_or_default(),
        region: node.map(|node| node.region.clone()).unwrap_or_default(),
        allocation_id: event.id.to_text(),
        username: event.username,
        detail: format!("on {}", event.relay_address),
    }
}

fn allocation_id(text: &str) -> Result<AllocationId, Status> {
    AllocationId::from_text(text)
        .ok_or_else(|| Status::invalid_argument("an allocation id is a ULID, 26 characters, as the list shows it"))
}

fn not_found(id: AllocationId) -> Status {
    Status::not_found(format!("there is no allocation {}", id.to_text()))
}

fn refusal(error: &StoreError) -> Status {
    match error {
        StoreError::Refused(_) => Status::internal(error.to_string()),
        _ => Status::unavailable(error.to_string()),
    }
}

fn fell_behind(error: &BroadcastStreamRecvError) -> Status {
    let BroadcastStreamRecvError::Lagged(missed) = error;
    Status::data_loss(format!("this watcher fell behind and missed {missed} events; start again"))
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
