//! The gRPC service `Steering`: decodes, asks [`Discovery`](crate::discovery::Discovery), encodes.

use std::sync::Arc;
use std::time::Duration;

use tonic::{Request, Response, Status};
use turnpike_proto::v1;
use turnpike_proto::v1::steering_server::Steering;

use crate::discovery::{Credential, DiscoveryError};
use crate::identity::{Role, require};
use crate::replica::Replica;
use crate::steering::{MAX_LIMIT, Query, regions};

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
        let request = request.into_inner();
        let query = query(&request)?;
        let discovery = &self.replica.discovery;
        let (choice, credential) = discovery.discover(&query, &request.user, ttl(request.ttl_seconds))?;
        Ok(Response::new(v1::DiscoverResponse {
            region: choice.region().to_owned(),
            relays: choice
                .relays
                .into_iter()
                .map(|relay| v1::Relay {
                    node_id: relay.node_id,
                    region: relay.region,
                    uris: relay.uris,
                    distance_ms: relay.distance_ms,
                })
                .collect(),
            credential: Some(encode(credential, discovery.realm())),
        }))
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
}

impl From<DiscoveryError> for Status {
    fn from(error: DiscoveryError) -> Self {
        match error {
            DiscoveryError::NoRelay(_) | DiscoveryError::Secret => Self::unavailable(error.to_string()),
            DiscoveryError::User | DiscoveryError::Ttl => Self::invalid_argument(error.to_string()),
        }
    }
}

fn query(request: &v1::DiscoverRequest) -> Result<Query, Status> {
    // Not by the generated accessor, which passes over what it does not know.
    let transports = request.transports.iter().map(|transport| match v1::Transport::try_from(*transport) {
        Ok(v1::Transport::Udp) => Ok(turn_core::Transport::Udp),
        Ok(v1::Transport::Tcp) => Ok(turn_core::Transport::Tcp),
        Ok(v1::Transport::Tls) => Ok(turn_core::Transport::Tls),
        Ok(v1::Transport::Dtls) => Ok(turn_core::Transport::Dtls),
        Ok(v1::Transport::Unspecified) | Err(_) => {
            Err(Status::invalid_argument("transports holds one this controller does not know"))
        }
    });
    let mut query = Query {
        region: Some(request.region.clone()).filter(|region| !region.is_empty()),
        transports: transports.collect::<Result<_, _>>()?,
        ..Query::default()
    };
    if request.limit > 0 {
        let limit = usize::try_from(request.limit).ok().filter(|limit| *limit <= MAX_LIMIT);
        query.limit = limit.ok_or_else(|| Status::invalid_argument(format!("limit is at most {MAX_LIMIT}")))?;
    }
    Ok(query)
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
