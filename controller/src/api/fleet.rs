//! The `Fleet` service: relays join, report, store their records and get them back.

mod guidance;
mod hello;
mod revocations;
mod session;
mod step_back;
mod waiting;
mod work;

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use turnpike_proto::v1::fleet_server::Fleet;
use turnpike_proto::v1::{
    ControllerMessage, LocateRequest, LocateResponse, Located, RelayMessage, RestoreBatch, RestoreRequest,
};

use self::revocations::Revocations;
use self::session::Joining;
use crate::allocations::{Directory, prefix_of};
use crate::fleet::revoked::Serial;
use crate::fleet::{FleetView, OwnerRecord, owner_key};
use crate::identity::{Role, require};
use crate::keys::Keys;
use crate::steering::Terms;
use crate::store::{Store, StoreError};

/// Messages on their way to a relay.
const OUTBOUND: usize = 64;
/// Records read from the store, and sent, at a time.
const RESTORE_PAGE: usize = 256;
/// Most clients located in a call.
const LOCATED: usize = 64;
/// Most bytes of records in a message.
const RESTORE_BYTES: usize = 1024 * 1024;

/// What the service is made with.
#[derive(Clone, Debug)]
pub struct FleetOptions {
    /// This replica.
    pub controller_id: String,
    /// Life of a node's lease, whole seconds, at least 2.
    pub lease: Duration,
    /// By which relays are told where to send clients they do not take.
    pub terms: Arc<Terms>,
}

/// Serves relays. Its sessions end when the last clone is dropped.
#[derive(Clone)]
pub struct FleetService {
    shared: Arc<Shared>,
}

struct Shared {
    store: Arc<dyn Store>,
    fleet: Arc<FleetView>,
    keys: Arc<Keys>,
    revocations: Arc<Revocations>,
    directory: Directory,
    options: FleetOptions,
    closing: watch::Sender<bool>,
    tasks: Mutex<JoinSet<()>>,
}

impl FleetService {
    /// Begins to serve over `store`.
    pub fn start(
        store: Arc<dyn Store>,
        fleet: Arc<FleetView>,
        keys: Arc<Keys>,
        directory: Directory,
        options: FleetOptions,
    ) -> Self {
        let revocations = Arc::new(Revocations::default());
        let mut tasks = JoinSet::new();
        tasks.spawn(revocations::follow(store.clone(), revocations.clone()));
        let shared = Shared {
            store,
            fleet,
            keys,
            revocations,
            directory,
            options,
            closing: watch::Sender::new(false),
            tasks: Mutex::new(tasks),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Ends every session with `UNAVAILABLE`, so that relays go to another replica at once. New ones are refused.
    pub fn close(&self) {
        self.shared.closing.send_replace(true);
    }

    /// Runs a task of a call; it ends with the service at the latest.
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.shared.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Fleet for FleetService {
    type SessionStream = Answers<ControllerMessage>;
    type RestoreStream = Answers<RestoreBatch>;

    async fn session(
        &self,
        request: Request<Streaming<RelayMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let identity = require(&request, Role::Relay)?;
        let certificate = certificate(&request);
        let shared = &self.shared;
        must_be_trusted(&shared.fleet, &identity.name, certificate.as_ref())?;
        let closing = shared.closing.subscribe();
        if *closing.borrow() {
            return Err(Status::unavailable("this controller is shutting down"));
        }
        let (out, answers) = mpsc::channel(OUTBOUND);
        let joining = Joining {
            node_id: identity.name,
            certificate,
            record: None,
            store: shared.store.clone(),
            keys: shared.keys.clone(),
            fleet: shared.fleet.clone(),
            revocations: shared.revocations.clone(),
            options: shared.options.clone(),
            closing,
            inbound: request.into_inner(),
            out,
        };
        self.spawn(joining.run());
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn restore(&self, request: Request<RestoreRequest>) -> Result<Response<Self::RestoreStream>, Status> {
        let identity = require(&request, Role::Relay)?;
        must_be_trusted(&self.shared.fleet, &identity.name, certificate(&request).as_ref())?;
        let request = request.into_inner();
        hello::is_its_own(&identity.name, &request.node_id)?;
        let relay_address = hello::address("relay_address", &request.relay_address)?;
        let store = self.shared.store.clone();
        let owner = store.get(&owner_key(relay_address)).await.map_err(|error| status(&error))?;
        let owner = owner.and_then(|entry| serde_json::from_slice::<OwnerRecord>(&entry.value).ok());
        if let Some(owner) = owner.filter(|owner| owner.node_id != identity.name) {
            let owner = owner.node_id;
            return Err(Status::failed_precondition(format!("{relay_address} is owned by {owner}")));
        }
        let (out, answers) = mpsc::channel(2);
        self.spawn(async move {
            if let Err(error) = restore(&*store, &prefix_of(relay_address), &out).await {
                // The relay may be gone; it asks again.
                let _ = out.send(Err(status(&error))).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn locate(&self, request: Request<LocateRequest>) -> Result<Response<LocateResponse>, Status> {
        let identity = require(&request, Role::Relay)?;
        must_be_trusted(&self.shared.fleet, &identity.name, certificate(&request).as_ref())?;
        let clients = request.into_inner().clients;
        if clients.len() > LOCATED {
            return Err(Status::invalid_argument(format!("at most {LOCATED} clients are looked up at once")));
        }
        let mut found = Vec::new();
        for client in clients {
            let address: Result<SocketAddr, _> = client.parse();
            let address = address.map_err(|_| Status::invalid_argument("a client is IP:port"))?;
            if let Some(node_id) = self.shared.directory.locate(address) {
                found.push(Located { client, node_id });
            }
        }
        Ok(Response::new(LocateResponse { found }))
    }
}

/// The caller's certificate.
fn certificate<T>(request: &Request<T>) -> Option<Serial> {
    Serial::of(request.peer_certs()?.first()?)
}

/// Refuses a relay whose certificate was revoked.
fn must_be_trusted(fleet: &FleetView, node_id: &str, certificate: Option<&Serial>) -> Result<(), Status> {
    match fleet.snapshot().revoked.get(node_id) {
        Some(revoked) if revoked.covers(certificate) => {
            let by = &revoked.by;
            Err(Status::permission_denied(format!("the certificate of relay {node_id} was revoked by {by}")))
        }
        _ => Ok(()),
    }
}

/// Sends what is stored under `prefix`, sealed as it is.
async fn restore(
    store: &dyn Store,
    prefix: &str,
    out: &mpsc::Sender<Result<RestoreBatch, Status>>,
) -> Result<(), StoreError> {
    let mut after: Option<String> = None;
    loop {
        let page = store.range(prefix, after.as_deref(), RESTORE_PAGE).await?;
        after = page.entries.last().map(|entry| entry.key.clone());
        let mut batch = RestoreBatch::default();
        let mut bytes = 0;
        for entry in page.entries {
            if bytes + entry.value.len() > RESTORE_BYTES && out.send(Ok(std::mem::take(&mut batch))).await.is_err() {
                return Ok(());
            }
            if batch.records.is_empty() {
                bytes = 0;
            }
            bytes += entry.value.len();
            batch.records.push(entry.value);
        }
        if !batch.records.is_empty() && out.send(Ok(batch)).await.is_err() {
            return Ok(());
        }
        if !page.more {
            return Ok(());
        }
    }
}

/// A store's failure as gRPC says it.
pub(super) fn status(error: &StoreError) -> Status {
    match error {
        StoreError::Refused(_) => Status::failed_precondition(error.to_string()),
        _ => Status::unavailable(error.to_string()),
    }
}
