//! A controller that answers what the test says, over real mTLS, and the command line against it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Certificate, Identity as TlsIdentity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status};
use turnctl::pki::{Ca, Identity, create_ca};
use turnpike_proto::v1::admin_server::{Admin, AdminServer};
use turnpike_proto::v1::steering_server::{Steering, SteeringServer};
use turnpike_proto::v1::{
    Allocation, AllocationUsage, AuditAction, CordonedNode, Credential, CredentialsRequest, DiscoverRequest,
    DiscoverResponse, DrainNodesRequest, DrainNodesResponse, Event, EventsRequest, ExplainRequest, ExplainResponse,
    GetAllocationRequest, Key, KeyState, ListAllocationsRequest, ListAllocationsResponse, ListAuditRequest,
    ListAuditResponse, ListKeysRequest, ListKeysResponse, ListLinksRequest, ListLinksResponse, ListNodesRequest,
    ListNodesResponse, ListUsageRequest, ListUsageResponse, NetcheckTarget, NetcheckTargetsRequest,
    NetcheckTargetsResponse, Node, NodeDrain, NodeState, RegionsRequest, RegionsResponse, ReinstateRelayRequest,
    ReinstateRelayResponse, RelaySettings, ReportNetcheckRequest, ReportNetcheckResponse, RetireKeyRequest,
    RetireKeyResponse, RevokeAllocationRequest, RevokeAllocationResponse, RevokeRelayRequest, RevokeRelayResponse,
    RevokedRelay, RotateKeysRequest, RotateKeysResponse, StatusRequest, StatusResponse, UncordonNodesRequest,
    UncordonNodesResponse, WatchRequest, WatchResponse,
};

/// What the controller answers with.
#[derive(Default)]
pub(crate) struct World {
    pub(crate) store_healthy: bool,
    pub(crate) nodes: Vec<Node>,
    pub(crate) allocations: Vec<Allocation>,
    pub(crate) events: Vec<Event>,
    pub(crate) discovery: DiscoverResponse,
    /// Status never comes.
    pub(crate) stuck: bool,
    /// What was asked for, for the test to look at.
    pub(crate) discover_requests: Vec<DiscoverRequest>,
    pub(crate) pages: usize,
    pub(crate) keys: Vec<Key>,
    pub(crate) relay_revision: u64,
    pub(crate) rotations: Vec<RotateKeysRequest>,
    pub(crate) usage: Vec<AllocationUsage>,
    pub(crate) links: ListLinksResponse,
    pub(crate) targets: Vec<NetcheckTarget>,
    pub(crate) reported: Vec<ReportNetcheckRequest>,
    pub(crate) actions: Vec<AuditAction>,
    /// A second and this many packets pass between two looks at the nodes.
    pub(crate) packets_per_second: u64,
}

type Shared = Arc<Mutex<World>>;

/// A controller on a loopback port, gone when dropped.
pub(crate) struct Fake {
    pub(crate) directory: TempDir,
    pub(crate) address: SocketAddr,
    pub(crate) world: Shared,
    _runtime: Runtime,
}

const DAY: Duration = Duration::from_secs(86_400);

impl Fake {
    /// Starts it with certificates of its own and one for `admin`.
    pub(crate) fn start(world: World) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let ca = create_ca("fake")?;
        ca.write(directory.path(), false)?;
        let own = ca.issue(&Identity::Controller("fake".into()), &[], &[], DAY)?;
        issue(&ca, directory.path())?;
        let world = Arc::new(Mutex::new(world));
        let tls = ServerTlsConfig::new()
            .identity(TlsIdentity::from_pem(own.certificate, own.key))
            .client_ca_root(Certificate::from_pem(ca.certificate()));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
        let address = listener.local_addr()?;
        let server = {
            let _guard = runtime.enter();
            Server::builder()
                .tls_config(tls)?
                .add_service(AdminServer::new(Answers(world.clone())))
                .add_service(SteeringServer::new(Answers(world.clone())))
        };
        runtime.spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Ok(Self { directory, address, world, _runtime: runtime })
    }

    /// `turnctl` with this controller as its only one.
    pub(crate) fn turnctl(&self, arguments: &[&str]) -> Result<Output> {
        Ok(self.command(arguments).output()?)
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = turnctl(self.directory.path());
        let files = Files::of(self.directory.path());
        command
            .env("TURNCTL_CONTROLLER", format!("https://{}", self.address))
            .env("TURNCTL_CA", files.ca)
            .env("TURNCTL_CERT", files.certificate)
            .env("TURNCTL_KEY", files.key)
            .args(arguments);
        command
    }
}

/// Where [`Fake::start`] and [`issue`] put things.
pub(crate) struct Files {
    pub(crate) ca: PathBuf,
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

impl Files {
    pub(crate) fn of(directory: &Path) -> Self {
        Self {
            ca: directory.join("ca.pem"),
            certificate: directory.join("admin-me.pem"),
            key: directory.join("admin-me.key"),
        }
    }
}

/// Writes the certificate of an administrator.
pub(crate) fn issue(ca: &Ca, directory: &Path) -> Result<()> {
    let me = Identity::Admin("me".into());
    ca.issue(&me, &[], &[], DAY)?.write(directory, &me.file_stem(), false)?;
    Ok(())
}

/// `turnctl` with nothing of this machine's configuration.
pub(crate) fn turnctl(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_turnctl"));
    command.env_clear().env("HOME", home).current_dir(home);
    command
}

/// Exit code, standard output, standard error.
pub(crate) fn parts(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

struct Answers(Shared);

impl Answers {
    fn world(&self) -> std::sync::MutexGuard<'_, World> {
        self.0.lock().expect("no test panics with the lock")
    }
}

#[tonic::async_trait]
impl Admin for Answers {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        if self.world().stuck {
            std::future::pending::<()>().await;
        }
        let world = self.world();
        Ok(Response::new(StatusResponse {
            controller_id: "fake".into(),
            store: "embedded".into(),
            store_healthy: world.store_healthy,
            nodes: world.nodes.len() as u32,
            healthy_nodes: world.nodes.iter().filter(|node| node.state() == NodeState::Ready).count() as u32,
            ..StatusResponse::default()
        }))
    }

    async fn list_nodes(&self, request: Request<ListNodesRequest>) -> Result<Response<ListNodesResponse>, Status> {
        let region = request.into_inner().region;
        let mut world = self.world();
        let packets = world.packets_per_second;
        for node in world.nodes.iter_mut().filter(|_| packets > 0) {
            node.last_report_at += 1000;
            node.load.get_or_insert_default().packets += packets;
        }
        let mut nodes = world.nodes.clone();
        nodes.retain(|node| region.is_empty() || node.region == region);
        Ok(Response::new(ListNodesResponse { nodes }))
    }

    async fn list_allocations(
        &self,
        request: Request<ListAllocationsRequest>,
    ) -> Result<Response<ListAllocationsResponse>, Status> {
        let request = request.into_inner();
        let mut world = self.world();
        world.pages += 1;
        let matching: Vec<_> =
            world.allocations.iter().filter(|it| request.user.is_empty() || it.username == request.user).collect();
        let start: usize = request.page_token.parse().unwrap_or(0);
        // Pages of two, so that there is more than one.
        let end = (start + 2).min(matching.len());
        let allocations = matching[start..end].iter().map(|it| (*it).clone()).collect();
        let next_page_token = if end < matching.len() { end.to_string() } else { String::new() };
        Ok(Response::new(ListAllocationsResponse { allocations, next_page_token }))
    }

    async fn get_allocation(&self, request: Request<GetAllocationRequest>) -> Result<Response<Allocation>, Status> {
        let id = request.into_inner().id;
        let found = self.world().allocations.iter().find(|it| it.id == id).cloned();
        found.map(Response::new).ok_or_else(|| Status::not_found(format!("no allocation {id}")))
    }

    async fn list_usage(&self, request: Request<ListUsageRequest>) -> Result<Response<ListUsageResponse>, Status> {
        let request = request.into_inner();
        let matching = |usage: &&AllocationUsage| request.user.is_empty() || usage.username == request.user;
        let usage = self.world().usage.iter().filter(matching).cloned().collect();
        Ok(Response::new(ListUsageResponse { usage, next_page_token: String::new() }))
    }

    type EventsStream = tokio_stream::wrappers::ReceiverStream<Result<Event, Status>>;

    async fn events(&self, _: Request<EventsRequest>) -> Result<Response<Self::EventsStream>, Status> {
        let (sender, receiver) = tokio::sync::mpsc::channel(16);
        let events = self.world().events.clone();
        tokio::spawn(async move {
            for event in events {
                if sender.send(Ok(event)).await.is_err() {
                    return;
                }
            }
            sender.closed().await;
        });
        Ok(Response::new(receiver.into()))
    }

    async fn revoke_allocation(
        &self,
        _: Request<RevokeAllocationRequest>,
    ) -> Result<Response<RevokeAllocationResponse>, Status> {
        Err(Status::permission_denied("this needs role operator"))
    }

    async fn drain_nodes(&self, request: Request<DrainNodesRequest>) -> Result<Response<DrainNodesResponse>, Status> {
        let request = request.into_inner();
        let mut world = self.world();
        let ready = |node: &&Node| node.state() == NodeState::Ready && !request.node_ids.contains(&node.node_id);
        if !request.force && world.nodes.iter().filter(ready).count() == 0 {
            return Err(Status::failed_precondition("the cluster would have no ready relay left"));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        let deadline = match request.deadline_seconds {
            0 => 0,
            seconds => now + u64::from(seconds) * 1000,
        };
        let drain = NodeDrain { since: now, deadline, by: "admin/me".into() };
        let mut nodes = Vec::new();
        for node_id in &request.node_ids {
            let node = world.nodes.iter_mut().find(|node| node.node_id == *node_id);
            let absent = node.is_none();
            let before = node.and_then(|node| {
                node.state = NodeState::Draining as i32;
                node.drain.replace(drain.clone())
            });
            let drain = Some(drain.clone());
            nodes.push(CordonedNode { node_id: node_id.clone(), unchanged: before.is_some(), absent, drain });
        }
        Ok(Response::new(DrainNodesResponse { nodes }))
    }

    async fn list_keys(&self, _: Request<ListKeysRequest>) -> Result<Response<ListKeysResponse>, Status> {
        let mut world = self.world();
        let answer = ListKeysResponse {
            keys: world.keys.clone(),
            revision: 7,
            relays: vec![RelaySettings { node_id: "eu-1".into(), revision: world.relay_revision }],
        };
        // What is being made known is the newest, and known, the next time somebody looks.
        world.keys.retain(|key| key.state() != KeyState::Newest || key.id != 0);
        world.keys.iter_mut().for_each(|key| key.state = KeyState::Newest.into());
        world.relay_revision = 7;
        Ok(Response::new(answer))
    }

    async fn rotate_keys(&self, request: Request<RotateKeysRequest>) -> Result<Response<RotateKeysResponse>, Status> {
        let request = request.into_inner();
        let mut world = self.world();
        let next = Key { ring: 2, id: 1, state: KeyState::Next.into(), ..Key::default() };
        world.keys.push(next);
        let configured = if request.rings.is_empty() { vec![1] } else { Vec::new() };
        world.rotations.push(request);
        Ok(Response::new(RotateKeysResponse { keys: vec![next], revision: 6, configured }))
    }

    async fn retire_key(&self, request: Request<RetireKeyRequest>) -> Result<Response<RetireKeyResponse>, Status> {
        match request.into_inner().id {
            3 => Ok(Response::new(RetireKeyResponse {})),
            id => Err(Status::not_found(format!("the rest ring has no key {id}"))),
        }
    }

    async fn list_links(&self, _: Request<ListLinksRequest>) -> Result<Response<ListLinksResponse>, Status> {
        Ok(Response::new(self.world().links.clone()))
    }

    async fn revoke_relay(
        &self,
        request: Request<RevokeRelayRequest>,
    ) -> Result<Response<RevokeRelayResponse>, Status> {
        let RevokeRelayRequest { node_id, serial } = request.into_inner();
        let mut world = self.world();
        let unchanged = world.links.revoked.iter().any(|revoked| revoked.node_id == node_id);
        let serials = if serial.is_empty() { Vec::new() } else { vec![serial] };
        world.links.revoked.push(RevokedRelay { node_id, serials, by: "admin/me".into(), ..RevokedRelay::default() });
        Ok(Response::new(RevokeRelayResponse { unchanged }))
    }

    async fn reinstate_relay(
        &self,
        request: Request<ReinstateRelayRequest>,
    ) -> Result<Response<ReinstateRelayResponse>, Status> {
        let node_id = request.into_inner().node_id;
        let mut world = self.world();
        let before = world.links.revoked.len();
        world.links.revoked.retain(|revoked| revoked.node_id != node_id);
        Ok(Response::new(ReinstateRelayResponse { unchanged: world.links.revoked.len() == before }))
    }

    async fn list_audit(&self, request: Request<ListAuditRequest>) -> Result<Response<ListAuditResponse>, Status> {
        let limit = request.into_inner().limit as usize;
        Ok(Response::new(ListAuditResponse { actions: self.world().actions.iter().take(limit).cloned().collect() }))
    }

    async fn uncordon_nodes(
        &self,
        request: Request<UncordonNodesRequest>,
    ) -> Result<Response<UncordonNodesResponse>, Status> {
        let mut world = self.world();
        let mut nodes = Vec::new();
        for node_id in request.into_inner().node_ids {
            let node = world.nodes.iter_mut().find(|node| node.node_id == node_id);
            let Some(node) = node else {
                return Err(Status::not_found(format!("there is no relay {node_id}")));
            };
            node.state = NodeState::Ready as i32;
            let unchanged = node.drain.take().is_none();
            nodes.push(CordonedNode { node_id, unchanged, ..CordonedNode::default() });
        }
        Ok(Response::new(UncordonNodesResponse { nodes }))
    }
}

#[tonic::async_trait]
impl Steering for Answers {
    async fn discover(&self, request: Request<DiscoverRequest>) -> Result<Response<DiscoverResponse>, Status> {
        let mut world = self.world();
        world.discover_requests.push(request.into_inner());
        Ok(Response::new(world.discovery.clone()))
    }

    async fn credentials(&self, _: Request<CredentialsRequest>) -> Result<Response<Credential>, Status> {
        Err(Status::unavailable("the store does not answer"))
    }

    async fn regions(&self, _: Request<RegionsRequest>) -> Result<Response<RegionsResponse>, Status> {
        Ok(Response::new(RegionsResponse::default()))
    }

    async fn explain(&self, _: Request<ExplainRequest>) -> Result<Response<ExplainResponse>, Status> {
        let refusal = "no relay can be offered: of 1 known, 1 draining".into();
        Ok(Response::new(ExplainResponse { refusal, ..ExplainResponse::default() }))
    }

    async fn netcheck_targets(
        &self,
        _: Request<NetcheckTargetsRequest>,
    ) -> Result<Response<NetcheckTargetsResponse>, Status> {
        let (targets, client) = (self.world().targets.clone(), "203.0.113.7".into());
        Ok(Response::new(NetcheckTargetsResponse { targets, client }))
    }

    async fn report_netcheck(
        &self,
        request: Request<ReportNetcheckRequest>,
    ) -> Result<Response<ReportNetcheckResponse>, Status> {
        let reported = request.into_inner();
        let taken = reported.regions.len() as u32;
        self.world().reported.push(reported);
        Ok(Response::new(ReportNetcheckResponse { taken }))
    }

    type WatchStream = tokio_stream::wrappers::ReceiverStream<Result<WatchResponse, Status>>;

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::resource_exhausted("there are as many watchers as there may be"))
    }
}
