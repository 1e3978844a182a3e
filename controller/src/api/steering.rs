//! The gRPC service `Steering`: decodes, asks [`Discovery`](crate::discovery::Discovery), encodes.

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};
use turnpike_proto::v1;
use turnpike_proto::v1::steering_server::Steering;

use super::netcheck::MAX_REGIONS;
use super::watch;
use crate::discovery::{Credential, DiscoveryError};
use crate::identity::{Role, require};
use crate::replica::Replica;
use crate::steering::estimate::Basis;
use crate::steering::{Considered, MAX_LIMIT, MAX_SESSION, Outcome, Query, Relay, regions};

/// The service.
#[derive(Clone)]
pub struct SteeringService {
    replica: Arc<Replica>,
}

impl SteeringService {
    /// Answers from `replica`.
    pub fn new(replica: Arc<Replica>) -> Self {
        Self { replica }
    }
}

#[tonic::async_trait]
impl Steering for SteeringService {
    async fn discover(&self, request: Request<v1::DiscoverRequest>) -> Result<Response<v1::DiscoverResponse>, Status> {
        require(&request, Role::Operator)?;
        let v1::DiscoverRequest { region, transports, user, limit, ttl_seconds, client, session, home } =
            request.into_inner();
        let query = Asked { region, transports, limit, client, session, home }.query()?;
        let discovery = &self.replica.discovery;
        let (choice, credential) = discovery.discover(&query, &user, ttl(ttl_seconds))?;
        Ok(Response::new(v1::DiscoverResponse {
            region: choice.region().to_owned(),
            relays: choice.relays.into_iter().map(relay).collect(),
            credential: Some(encode(credential, discovery.realm())),
        }))
    }

    async fn explain(&self, request: Request<v1::ExplainRequest>) -> Result<Response<v1::ExplainResponse>, Status> {
        require(&request, Role::Viewer)?;
        let v1::ExplainRequest { client, region, session, transports, limit, home } = request.into_inner();
        let query = Asked { region, transports, limit, client, session, home }.query()?;
        let explanation = self.replica.discovery.explain(&query);
        Ok(Response::new(v1::ExplainResponse {
            relays: explanation.choice.relays.into_iter().map(relay).collect(),
            refusal: explanation.choice.refusal.unwrap_or_default(),
            evidence: explanation.evidence,
            considered: explanation.considered.into_iter().map(considered).collect(),
        }))
    }

    async fn netcheck_targets(
        &self,
        request: Request<v1::NetcheckTargetsRequest>,
    ) -> Result<Response<v1::NetcheckTargetsResponse>, Status> {
        require(&request, Role::Viewer)?;
        let caller = caller(&request);
        let client = address(&request.into_inner().client)?.or(caller).ok_or_else(nowhere)?;
        let target = |target: crate::steering::Target| v1::NetcheckTarget {
            region: target.region,
            node_id: target.node_id,
            address: target.address.to_string(),
        };
        let targets = self.replica.discovery.targets(client).into_iter().map(target).collect();
        Ok(Response::new(v1::NetcheckTargetsResponse { targets, client: client.to_string() }))
    }

    async fn report_netcheck(
        &self,
        request: Request<v1::ReportNetcheckRequest>,
    ) -> Result<Response<v1::ReportNetcheckResponse>, Status> {
        require(&request, Role::Operator)?;
        let caller = caller(&request);
        let request = request.into_inner();
        let client = address(&request.client)?.or(caller).ok_or_else(nowhere)?;
        if request.regions.len() > MAX_REGIONS {
            return Err(Status::invalid_argument(format!("at most {MAX_REGIONS} regions can be reported")));
        }
        let rtts = request.regions.into_iter();
        let rtts: Vec<_> = rtts.map(|measured| (measured.region, measured.rtt_us as f32 / 1e3)).collect();
        let taken = self.replica.discovery.report(client, &rtts);
        Ok(Response::new(v1::ReportNetcheckResponse { taken: u32::try_from(taken).unwrap_or(u32::MAX) }))
    }

    async fn credentials(&self, request: Request<v1::CredentialsRequest>) -> Result<Response<v1::Credential>, Status> {
        require(&request, Role::Operator)?;
        let request = request.into_inner();
        let discovery = &self.replica.discovery;
        let credential = discovery.credential(&request.user, ttl(request.ttl_seconds))?;
        Ok(Response::new(encode(credential, discovery.realm())))
    }

    async fn regions(&self, request: Request<v1::RegionsRequest>) -> Result<Response<v1::RegionsResponse>, Status> {
        require(&request, Role::Viewer)?;
        let fleet = &self.replica.fleet;
        let regions = regions(&fleet.snapshot(), fleet.thresholds())
            .into_iter()
            .filter(|region| region.healthy > 0)
            .map(|region| v1::Region {
                name: region.name,
                healthy_nodes: region.healthy,
                nodes: region.nodes,
                allocations: region.allocations,
            })
            .collect();
        Ok(Response::new(v1::RegionsResponse { regions }))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::WatchResponse, Status>> + Send>>;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        require(&request, Role::Viewer)?;
        let filter = watch::filter(request.into_inner())?;
        let updates = self.replica.push.subscribe(filter);
        let updates = updates.map_err(|full| Status::resource_exhausted(full.to_string()))?;
        Ok(Response::new(Box::pin(updates.map(|update| Ok(watch::encode(update))))))
    }
}

impl From<DiscoveryError> for Status {
    fn from(error: DiscoveryError) -> Self {
        match error {
            DiscoveryError::NoRelay(_) | DiscoveryError::Secret => Self::unavailable(error.to_string()),
            DiscoveryError::User | DiscoveryError::Ttl => Self::invalid_argument(error.to_string()),
        }
    }
}

/// A question as the two requests carry it.
struct Asked {
    region: String,
    transports: Vec<i32>,
    limit: u32,
    client: String,
    session: Vec<u8>,
    home: String,
}

impl Asked {
    fn query(self) -> Result<Query, Status> {
        // Not by the generated accessor, which passes over what it does not know.
        let transports = self.transports.iter().map(|transport| match v1::Transport::try_from(*transport) {
            Ok(v1::Transport::Udp) => Ok(turn_core::Transport::Udp),
            Ok(v1::Transport::Tcp) => Ok(turn_core::Transport::Tcp),
            Ok(v1::Transport::Tls) => Ok(turn_core::Transport::Tls),
            Ok(v1::Transport::Dtls) => Ok(turn_core::Transport::Dtls),
            Ok(v1::Transport::Unspecified) | Err(_) => {
                Err(Status::invalid_argument("transports holds one this controller does not know"))
            }
        });
        if self.session.len() > MAX_SESSION {
            return Err(Status::invalid_argument(format!("session is longer than {MAX_SESSION} bytes")));
        }
        let mut query = Query {
            region: Some(self.region).filter(|region| !region.is_empty()),
            transports: transports.collect::<Result<_, _>>()?,
            client: address(&self.client)?,
            session: Some(self.session).filter(|session| !session.is_empty()),
            home: Some(self.home).filter(|home| !home.is_empty()),
            ..Query::default()
        };
        if self.limit > 0 {
            let limit = usize::try_from(self.limit).ok().filter(|limit| *limit <= MAX_LIMIT);
            query.limit = limit.ok_or_else(|| Status::invalid_argument(format!("limit is at most {MAX_LIMIT}")))?;
        }
        Ok(query)
    }
}

/// An address as written; empty is none.
fn address(text: &str) -> Result<Option<IpAddr>, Status> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| Status::invalid_argument("client must be an IP address"))
}

/// Where the call is from.
fn caller<T>(request: &Request<T>) -> Option<IpAddr> {
    request.remote_addr().map(|address| address.ip())
}

fn nowhere() -> Status {
    Status::invalid_argument("the address of this connection is not known: name the client")
}

fn relay(relay: Relay) -> v1::Relay {
    v1::Relay {
        node_id: relay.node_id,
        region: relay.region,
        uris: relay.uris,
        distance_ms: relay.rtt.rtt_ms,
        basis: basis(relay.rtt.basis).into(),
    }
}

fn basis(basis: Basis) -> v1::EstimateBasis {
    match basis {
        Basis::Measured { .. } => v1::EstimateBasis::Measured,
        Basis::Neighbours { .. } => v1::EstimateBasis::Neighbours,
        Basis::Geo => v1::EstimateBasis::Geo,
        Basis::Regions => v1::EstimateBasis::Regions,
        Basis::Unknown => v1::EstimateBasis::Unknown,
    }
}

fn considered(node: Considered) -> v1::ConsideredRelay {
    let age = node.rtt.basis.age().map_or(0, |age| age.as_secs());
    let place = match node.outcome {
        Outcome::Chosen { place } => place,
        _ => 0,
    };
    v1::ConsideredRelay {
        node_id: node.node_id,
        region: node.region,
        rtt_ms: node.rtt.rtt_ms,
        basis: basis(node.rtt.basis).into(),
        age_seconds: u32::try_from(age).unwrap_or(u32::MAX),
        load_permille: node.load_permille,
        penalty_ms: node.penalty_ms,
        session_ms: node.session_ms,
        score_ms: node.score_ms,
        allocations: node.allocations,
        own_picks: node.own_picks,
        state: node.state.to_string(),
        outcome: node.outcome.to_string(),
        place: u32::try_from(place).unwrap_or(u32::MAX),
    }
}

fn ttl(seconds: u32) -> Option<Duration> {
    (seconds > 0).then(|| Duration::from_secs(u64::from(seconds)))
}

fn encode(credential: Credential, realm: String) -> v1::Credential {
    v1::Credential {
        username: credential.username,
        password: credential.password,
        realm,
        // At most a month, checked where it was made.
        ttl_seconds: u32::try_from(credential.ttl.as_secs()).unwrap_or(u32::MAX),
        expires_at: credential.expires_at,
    }
}
