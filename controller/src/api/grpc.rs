//! Which gRPC services answer: health and reflection from the start, the rest once the store has been reached.

use std::convert::Infallible;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use axum::http::{Request, Response};
use futures_util::future::BoxFuture;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::body::Body;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tonic_reflection::server::v1::{ServerReflection, ServerReflectionServer as ReflectionServer};
use tower::Service;
use turnpike_proto::v1;
use turnpike_proto::v1::admin_server::{self, AdminServer};
use turnpike_proto::v1::fleet_server::{self, FleetServer};
use turnpike_proto::v1::steering_server::{self, SteeringServer};

use super::admin::AdminService;
use super::steering::SteeringService;
use crate::replica::Replica;
use crate::store::{MAX_OPS, MAX_VALUE};

/// Longest message of a relay: a batch of the most and longest records the store takes, and what is around them.
const MAX_BATCH: usize = (MAX_OPS + 1) * MAX_VALUE;

/// The services of this process. Clones are the same switch.
#[derive(Clone, Debug)]
pub struct Switch {
    early: Routes,
    full: Arc<OnceLock<Routes>>,
    reporter: HealthReporter,
}

impl Switch {
    /// Health (not serving) and reflection; everything else is `UNAVAILABLE`.
    ///
    /// # Errors
    /// If the descriptors in this binary do not decode.
    pub async fn new() -> Result<Self, tonic_reflection::server::Error> {
        let (reporter, health) = tonic_health::server::health_reporter();
        let switch = Self { early: Routes::new(health).add_service(reflection()?), full: Arc::default(), reporter };
        switch.report(ServingStatus::NotServing).await;
        Ok(switch)
    }

    /// Adds the services that need the store, once, and says so to those who watch health.
    pub async fn open(&self, replica: &Arc<Replica>, shutdown: CancellationToken) {
        self.full.get_or_init(|| {
            self.early
                .clone()
                .add_service(FleetServer::new(replica.relays.clone()).max_decoding_message_size(MAX_BATCH))
                .add_service(SteeringServer::new(SteeringService::new(replica.clone())))
                .add_service(AdminServer::new(AdminService::new(replica.clone(), shutdown)))
                .prepare()
        });
        self.report(ServingStatus::Serving).await;
    }

    async fn report(&self, status: ServingStatus) {
        for service in ["", fleet_server::SERVICE_NAME, steering_server::SERVICE_NAME, admin_server::SERVICE_NAME] {
            self.reporter.set_service_status(service, status).await;
        }
    }
}

impl Service<Request<Body>> for Switch {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let always = request.uri().path().starts_with("/grpc.");
        let mut routes = match self.full.get() {
            Some(full) => full.clone(),
            None if always => self.early.clone(),
            None => {
                let refusal = Status::unavailable("this controller has not reached its store yet; try again");
                return Box::pin(std::future::ready(Ok(refusal.into_http())));
            }
        };
        Box::pin(async move { routes.call(request).await })
    }
}

fn reflection() -> Result<ReflectionServer<impl ServerReflection>, tonic_reflection::server::Error> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(v1::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
}
