//! Controller replicas in this process, over real mTLS, and relays that speak to them.

#[path = "../../../relay-node/turn-core/tests/support/sample.rs"]
mod sample;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use controller::allocations::Allocations;
use controller::api::fleet::{FleetOptions, FleetService};
use controller::fleet::{FleetView, NodeRecord, Thresholds, ViewOptions};
use controller::keys::{KeyOptions, Keys};
use controller::presence::Presence;
use controller::store::Store;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Server, ServerTlsConfig};
use tonic::{Status, Streaming};
use turn_core::{AllocationId, Key, KeyRing, Record};
use turnpike_proto::v1::controller_message::Body as Heard;
use turnpike_proto::v1::fleet_client::FleetClient;
use turnpike_proto::v1::fleet_server::FleetServer;
use turnpike_proto::v1::relay_message::Body as Said;
use turnpike_proto::v1::{self, ControllerMessage, RelayMessage};

/// Longest wait for what must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Replicas of this process, so that each has a name of its own.
static REPLICAS: AtomicUsize = AtomicUsize::new(0);

/// A cluster CA.
pub(crate) struct Pki {
    issuer: Issuer<'static, KeyPair>,
    ca: String,
}

impl Pki {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = parameters.self_signed(&key).expect("a certificate").pem();
        Self { issuer: Issuer::new(parameters, key), ca }
    }

    fn issue(&self, uri: &str) -> Identity {
        let key = KeyPair::generate().expect("a key");
        let mut parameters = CertificateParams::new(vec!["controller.turnpike".to_owned()]).expect("a name");
        parameters.subject_alt_names.push(SanType::URI(uri.try_into().expect("an IA5 string")));
        let certificate = parameters.signed_by(&key, &self.issuer).expect("a certificate");
        Identity::from_pem(certificate.pem(), key.serialize_pem())
    }

    /// A client with a certificate of this role and name, e.g. `relay/eu-1`.
    pub(crate) async fn client(&self, replica: &Replica, identity: &str) -> FleetClient<Channel> {
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&self.ca))
            .identity(self.issue(&format!("turnpike://{identity}")))
            .domain_name("controller.turnpike");
        let endpoint = Endpoint::from_shared(format!("https://{}", replica.address)).expect("a URI");
        let channel = endpoint.tls_config(tls).expect("certificates").connect().await.expect("a connection");
        FleetClient::new(channel)
    }
}

/// A controller replica. Dropped, it is gone as if killed.
pub(crate) struct Replica {
    pub(crate) address: SocketAddr,
    pub(crate) fleet: Arc<FleetView>,
    pub(crate) keys: Arc<Keys>,
    pub(crate) allocations: Allocations,
    pub(crate) service: FleetService,
    pub(crate) presence: Presence,
    _server: JoinSet<()>,
}

impl Replica {
    pub(crate) async fn start(store: Arc<dyn Store>, pki: &Pki, lease: Duration) -> Self {
        let options = ViewOptions { lease, thresholds: Thresholds::default() };
        let fleet = Arc::new(FleetView::start(store.clone(), options));
        let options = KeyOptions { realm: "turnpike".to_owned(), ..KeyOptions::default() };
        let keys = Arc::new(Keys::start(store.clone(), &options).await.expect("a store"));
        let options = FleetOptions { controller_id: "test".to_owned(), lease, terms: Arc::default() };
        let allocations = Allocations::start(store.clone(), fleet.clone(), keys.clone());
        let directory = allocations.directory();
        let service = FleetService::start(store.clone(), fleet.clone(), keys.clone(), directory, options);
        let number = REPLICAS.fetch_add(1, Ordering::Relaxed);
        let presence = Presence::start(store, fleet.clone(), &format!("test-{number}"), lease);

        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let address = listener.local_addr().expect("bound");
        let tls = ServerTlsConfig::new()
            .identity(pki.issue("turnpike://controller/test"))
            .client_ca_root(Certificate::from_pem(&pki.ca));
        let serving = Server::builder()
            .tls_config(tls)
            .expect("certificates")
            .add_service(FleetServer::new(service.clone()))
            .serve_with_incoming(TcpIncoming::from(listener));
        let mut server = JoinSet::new();
        server.spawn(async move { serving.await.expect("a server") });
        timeout(fleet.synced()).await;
        Self { address, fleet, keys, allocations, service, presence, _server: server }
    }

    /// Waits until the view says so.
    pub(crate) async fn sees(&self, what: &str, condition: impl Fn(&controller::fleet::Snapshot) -> bool) {
        eventually(what, || async { condition(&self.fleet.snapshot()) }).await;
    }
}

/// A relay's session, as the test speaks it.
pub(crate) struct Relay {
    pub(crate) welcome: v1::Welcome,
    pub(crate) record_keys: KeyRing,
    address: IpAddr,
    say: mpsc::Sender<RelayMessage>,
    hear: Streaming<ControllerMessage>,
    last_batch: u64,
}

pub(crate) fn hello(node_id: &str, last_octet: u8, boot_id: &str, claimed_epoch: u64) -> v1::Hello {
    let address = IpAddr::from([192, 0, 2, last_octet]);
    v1::Hello {
        node_id: node_id.to_owned(),
        version: "0.0.0".to_owned(),
        protocol: 1,
        region: "eu".to_owned(),
        zone: String::new(),
        relay_address: address.to_string(),
        relay_ips: vec![address.to_string()],
        listeners: vec![v1::Listener {
            transport: v1::Transport::Udp.into(),
            address: format!("{address}:3478"),
            ..v1::Listener::default()
        }],
        claimed_epoch,
        boot_id: boot_id.to_owned(),
        workers: 2,
        max_allocations: 0,
        relay_port_low: 49152,
        relay_port_high: 65535,
        ..v1::Hello::default()
    }
}

impl Relay {
    /// Says Hello; what is heard first is the answer.
    pub(crate) async fn greet(
        client: &mut FleetClient<Channel>,
        hello: v1::Hello,
    ) -> Result<(mpsc::Sender<RelayMessage>, Streaming<ControllerMessage>, Option<Heard>), Status> {
        let (say, said) = mpsc::channel(256);
        say.try_send(RelayMessage { body: Some(Said::Hello(hello)) }).expect("room");
        let mut hear = client.session(ReceiverStream::new(said)).await?.into_inner();
        let first = timeout(hear.message()).await?;
        Ok((say, hear, first.and_then(|message| message.body)))
    }

    /// A session that is welcome.
    pub(crate) async fn join(pki: &Pki, replica: &Replica, hello: v1::Hello) -> Self {
        let mut client = pki.client(replica, &format!("relay/{}", hello.node_id)).await;
        let address = hello.relay_address.parse().expect("an address");
        let (say, hear, first) = Self::greet(&mut client, hello).await.expect("a session");
        let Some(Heard::Welcome(welcome)) = first else {
            panic!("no welcome: {first:?}");
        };
        let keys = welcome.settings.as_ref().expect("settings").record_keys.iter();
        let key =
            |secret: &v1::Secret| Key { id: u8::try_from(secret.id).expect("small"), secret: secret.value.clone() };
        let record_keys = KeyRing(keys.map(key).collect());
        Self { welcome, record_keys, address, say, hear, last_batch: 0 }
    }

    pub(crate) async fn say(&self, body: Said) {
        self.say.send(RelayMessage { body: Some(body) }).await.expect("a session");
    }

    /// Says Goodbye, hangs up, and waits until the controller has done so too.
    pub(crate) async fn leave(mut self) {
        self.say(Said::Goodbye(v1::Goodbye::default())).await;
        drop(self.say);
        timeout(async { while let Ok(Some(_)) = self.hear.message().await {} }).await;
    }

    pub(crate) async fn load(&self, load: v1::Load) {
        self.say(Said::Load(load)).await;
    }

    /// Says what allocations have used, and waits until the store has it.
    pub(crate) async fn usage(&mut self, batch_id: u64, usage: Vec<v1::Usage>) {
        self.say(Said::Usage(v1::UsageBatch { batch_id, usage })).await;
        let acked = |heard| match heard {
            Heard::UsageAck(ack) if ack.batch_id == batch_id => Some(()),
            _ => None,
        };
        self.hear_until("the usage is stored", acked).await;
    }

    /// Sends a batch and returns its number.
    pub(crate) async fn batch(&mut self, changes: Vec<v1::RecordChange>) -> u64 {
        self.last_batch += 1;
        let batch_id = self.last_batch;
        self.say(Said::Records(v1::RecordBatch { batch_id, changes })).await;
        batch_id
    }

    /// A resync that names exactly these.
    pub(crate) async fn resync(&mut self, changes: Vec<v1::RecordChange>) -> u64 {
        self.say(Said::ResyncBegin(v1::ResyncBegin {})).await;
        for chunk in changes.chunks(128) {
            self.batch(chunk.to_vec()).await;
        }
        self.last_batch += 1;
        self.say(Said::ResyncEnd(v1::ResyncEnd { batch_id: self.last_batch })).await;
        self.last_batch
    }

    /// The next message of any kind; `None` at the end of the stream.
    pub(crate) async fn hear(&mut self) -> Result<Option<Heard>, Status> {
        Ok(timeout(self.hear.message()).await?.and_then(|message| message.body))
    }

    /// Skips what comes before the one that `wanted` takes.
    pub(crate) async fn hear_until<T>(&mut self, what: &str, wanted: impl Fn(Heard) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let heard = self.hear().await.unwrap_or_else(|status| panic!("{what}: {status}"));
            let heard = heard.unwrap_or_else(|| panic!("{what}: the session ended"));
            if let Some(wanted) = wanted(heard) {
                return wanted;
            }
        }
        panic!("{what}: not heard");
    }

    /// The next acknowledgement: everything up to this batch is stored. May be dropped and called again.
    pub(crate) async fn acknowledgement(&mut self) -> u64 {
        loop {
            match self.hear.message().await.expect("a session").and_then(|message| message.body) {
                Some(Heard::Ack(ack)) => return ack.batch_id,
                Some(_) => {}
                None => panic!("the session ended"),
            }
        }
    }

    pub(crate) async fn acked(&mut self, batch: u64) {
        let acked = |heard| match heard {
            Heard::Ack(ack) if ack.batch_id >= batch => Some(()),
            _ => None,
        };
        self.hear_until("an acknowledgement", acked).await;
    }

    /// How a session that is over ended.
    pub(crate) async fn end(&mut self) -> Result<(), Status> {
        while self.hear().await?.is_some() {}
        Ok(())
    }

    pub(crate) fn record(&self, number: u32, sequence: u64) -> Record {
        record(self.address, self.welcome.epoch, number, sequence)
    }

    /// A stored form of allocation `number`.
    pub(crate) fn put(&self, number: u32, sequence: u64) -> v1::RecordChange {
        let record = self.record(number, sequence);
        v1::RecordChange {
            allocation_id: record.id.0.to_vec(),
            epoch: record.epoch,
            sequence,
            record: record.seal(&self.record_keys),
            ended: 0,
            traceparent: String::new(),
        }
    }

    pub(crate) fn ended(&self, number: u32, sequence: u64) -> v1::RecordChange {
        v1::RecordChange {
            allocation_id: id(number).0.to_vec(),
            epoch: self.welcome.epoch,
            sequence,
            record: Vec::new(),
            ended: v1::EndReason::Deleted.into(),
            traceparent: String::new(),
        }
    }
}

pub(crate) fn id(number: u32) -> AllocationId {
    let mut id = [0; 16];
    id[12..].copy_from_slice(&number.to_be_bytes());
    AllocationId(id)
}

pub(crate) fn record(relay_address: IpAddr, epoch: u64, number: u32, sequence: u64) -> Record {
    let relayed = SocketAddr::new(relay_address, 49152);
    Record {
        epoch,
        sequence,
        username: format!("1700000000:user{}", number % 3).into_bytes(),
        ..sample::record(id(number), relayed, controller::fleet::unix_ms())
    }
}

/// The relay's allocations as stored, by ULID text.
pub(crate) async fn stored(store: &Arc<dyn Store>, relay_address: &str) -> Vec<(String, Vec<u8>)> {
    let prefix = format!("allocations/{relay_address}/");
    let mut found: Vec<(String, Vec<u8>)> = Vec::new();
    let mut after = None;
    loop {
        let page = store.range(&prefix, after.as_deref(), 1000).await.expect("a store");
        after = page.entries.last().map(|entry| entry.key.clone());
        found.extend(page.entries.into_iter().map(|entry| (entry.key[prefix.len()..].to_owned(), entry.value)));
        if !page.more {
            return found;
        }
    }
}

/// A node's stored record.
pub(crate) async fn node(store: &Arc<dyn Store>, node_id: &str) -> Option<NodeRecord> {
    let entry = store.get(&format!("nodes/{node_id}")).await.expect("a store")?;
    Some(serde_json::from_slice(&entry.value).expect("JSON"))
}

pub(crate) async fn timeout<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("in time")
}

/// Waits until `condition` holds.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, condition: impl Fn() -> F) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
