//! A controller that says what a test tells it to say.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};
use turn_core::{Key, KeyRing};
use turnpike_proto::v1::controller_message::Body as Say;
use turnpike_proto::v1::fleet_server::{Fleet, FleetServer};
use turnpike_proto::v1::relay_message::Body as Hear;
use turnpike_proto::v1::{self, ControllerMessage, RecordChange, RelayMessage};

use crate::relay::PATIENCE;

/// A controller behind mTLS; gone when dropped.
pub(crate) struct Controller {
    /// `https://127.0.0.1:port`.
    pub(crate) url: String,
    runtime: tokio::runtime::Runtime,
    sessions: Mutex<mpsc::Receiver<Session>>,
    restores: Arc<AtomicUsize>,
}

/// A relay's session, from Hello on.
pub(crate) struct Session {
    /// Its first message.
    pub(crate) hello: v1::Hello,
    handle: tokio::runtime::Handle,
    hear: Streaming<RelayMessage>,
    say: mpsc::Sender<Result<ControllerMessage, Status>>,
}

impl Controller {
    /// Makes a CA, writes the relay's files (`ca.pem`, `node.pem`, `node.key`) to `directory`, and listens. `stored` is
    /// what a relay gets back that asks for its records.
    pub(crate) fn start(directory: &Path, stored: Vec<Vec<u8>>) -> Self {
        let pki = Pki::make();
        let (certificate, key) = pki.issue("turnpike://relay/eu-1", &[]);
        std::fs::write(directory.join("ca.pem"), &pki.ca).expect("written");
        std::fs::write(directory.join("node.pem"), certificate).expect("written");
        std::fs::write(directory.join("node.key"), key).expect("written");
        let (certificate, key) = pki.issue("turnpike://controller/test", &["controller.turnpike", "localhost"]);
        let tls = ServerTlsConfig::new()
            .identity(Identity::from_pem(certificate, key))
            .client_ca_root(Certificate::from_pem(&pki.ca));

        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let (arrived, sessions) = mpsc::channel(8);
        let restores = Arc::new(AtomicUsize::new(0));
        let service = Scripted { arrived, stored, restores: Arc::clone(&restores), handle: runtime.handle().clone() };
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
        let url = format!("https://{}", listener.local_addr().expect("bound"));
        let mut server = Server::builder().tls_config(tls).expect("good files");
        let served = server.add_service(FleetServer::new(service));
        runtime.spawn(served.serve_with_incoming(TcpListenerStream::new(listener)));
        Self { url, runtime, sessions: Mutex::new(sessions), restores }
    }

    /// The next session a relay begins.
    pub(crate) fn session(&self) -> Session {
        let mut sessions = self.sessions.lock().expect("one test thread");
        let next = async { tokio::time::timeout(PATIENCE, sessions.recv()).await };
        self.runtime.block_on(next).expect("a relay comes").expect("it serves")
    }

    /// How often records were asked for.
    pub(crate) fn restores(&self) -> usize {
        self.restores.load(Ordering::Relaxed)
    }
}

impl Session {
    /// Says something.
    pub(crate) fn say(&self, body: Say) {
        let message = ControllerMessage { body: Some(body) };
        let sent = self.handle.block_on(self.say.send(Ok(message)));
        assert!(sent.is_ok(), "the relay has left");
    }

    /// Welcomes the relay under this epoch.
    pub(crate) fn welcome(&self, epoch: u64, settings: v1::Settings) {
        self.say(Say::Welcome(v1::Welcome {
            controller_id: "test".into(),
            epoch,
            lease_ms: 5000,
            settings: Some(settings),
            members: Some(v1::Members::default()),
            protocol: 2,
            takes_usage: false,
        }));
    }

    /// The next message but for load reports, which come whatever else happens.
    pub(crate) fn hear(&mut self) -> Hear {
        let message = async {
            loop {
                let message = self.hear.message().await.expect("no error").expect("the relay has not left");
                match message.body.expect("a body") {
                    Hear::Load(_) => {}
                    body => return body,
                }
            }
        };
        let message = async { tokio::time::timeout(PATIENCE, message).await };
        self.handle.block_on(message).expect("the relay says something")
    }

    /// Waits for a load report; what else comes is passed over, records acknowledged.
    pub(crate) fn load(&mut self) -> v1::Load {
        let load = async {
            loop {
                let message = self.hear.message().await.expect("no error").expect("the relay has not left");
                match message.body {
                    Some(Hear::Load(load)) => return load,
                    Some(Hear::Records(v1::RecordBatch { batch_id, .. })) => {
                        let body = Some(Say::Ack(v1::BatchAck { batch_id }));
                        let sent = self.say.send(Ok(ControllerMessage { body })).await;
                        assert!(sent.is_ok(), "the relay has left");
                    }
                    _ => {}
                }
            }
        };
        let load = async { tokio::time::timeout(PATIENCE, load).await };
        self.handle.block_on(load).expect("the relay reports")
    }

    /// Waits for a whole resync, acknowledges it, and returns what lives.
    pub(crate) fn resync(&mut self) -> Vec<RecordChange> {
        let mut live = Vec::new();
        let mut begun = false;
        loop {
            match self.hear() {
                Hear::ResyncBegin(_) => {
                    begun = true;
                    live.clear();
                }
                Hear::Records(batch) => {
                    assert!(batch.changes.len() <= 128);
                    live.extend(batch.changes);
                }
                Hear::ResyncEnd(end) if begun => {
                    self.acknowledge(end.batch_id);
                    live.retain(|change: &RecordChange| !change.record.is_empty());
                    return live;
                }
                other => panic!("unexpected: {other:?}"),
            }
        }
    }

    /// Waits for a batch of one change and acknowledges it.
    pub(crate) fn change(&mut self) -> RecordChange {
        match self.hear() {
            Hear::Records(mut batch) => {
                assert_eq!(batch.changes.len(), 1, "{batch:?}");
                self.acknowledge(batch.batch_id);
                batch.changes.remove(0)
            }
            other => panic!("unexpected: {other:?}"),
        }
    }

    fn acknowledge(&self, batch_id: u64) {
        self.say(Say::Ack(v1::BatchAck { batch_id }));
    }
}

/// Nonce keys and record keys of [`settings`].
pub(crate) fn rings() -> (KeyRing, KeyRing) {
    let ring = |id, secret: &str| KeyRing(vec![Key { id, secret: secret.into() }]);
    (ring(1, "the nonce key of the test"), ring(2, "the record key of the test"))
}

/// What the cluster shares; alice's password is "secret".
pub(crate) fn settings(revision: u64) -> v1::Settings {
    let (nonce, record) = rings();
    let secrets = |ring: KeyRing| {
        let secret = |key: Key| v1::Secret { id: key.id.into(), value: key.secret };
        ring.0.into_iter().map(secret).collect()
    };
    v1::Settings {
        revision,
        realm: "test".into(),
        nonce_keys: secrets(nonce),
        record_keys: secrets(record),
        static_users: vec![v1::StaticUser { username: b"alice".to_vec(), password: b"secret".to_vec() }],
        ..Default::default()
    }
}

/// Forwards bytes to a controller until it is frozen; then it takes them and says nothing.
pub(crate) struct Tunnel {
    /// `https://127.0.0.1:port`.
    pub(crate) url: String,
    frozen: Arc<AtomicBool>,
}

impl Tunnel {
    /// A tunnel to the controller at this URL.
    pub(crate) fn to(url: &str) -> Self {
        let target = url.trim_start_matches("https://").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("https://{}", listener.local_addr().expect("bound"));
        let frozen = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&frozen);
        std::thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let far = TcpStream::connect(&target).expect("the controller listens");
                let (near_out, far_out) = (near.try_clone().expect("a handle"), far.try_clone().expect("a handle"));
                for (from, to) in [(near, far), (far_out, near_out)] {
                    let flag = Arc::clone(&flag);
                    std::thread::spawn(move || forward(from, to, &flag));
                }
            }
        });
        Self { url, frozen }
    }

    /// From now on nothing passes.
    pub(crate) fn freeze(&self) {
        self.frozen.store(true, Ordering::Relaxed);
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream, frozen: &AtomicBool) {
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if !frozen.load(Ordering::Relaxed) && to.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

struct Scripted {
    arrived: mpsc::Sender<Session>,
    stored: Vec<Vec<u8>>,
    restores: Arc<AtomicUsize>,
    handle: tokio::runtime::Handle,
}

#[tonic::async_trait]
impl Fleet for Scripted {
    type SessionStream = ReceiverStream<Result<ControllerMessage, Status>>;
    type RestoreStream = ReceiverStream<Result<v1::RestoreBatch, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<RelayMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut hear = request.into_inner();
        let Some(Hear::Hello(hello)) = hear.message().await?.and_then(|message| message.body) else {
            return Err(Status::invalid_argument("the first message is not Hello"));
        };
        let (say, said) = mpsc::channel(8);
        let session = Session { hello, handle: self.handle.clone(), hear, say };
        if self.arrived.send(session).await.is_err() {
            return Err(Status::unavailable("the test is over"));
        }
        Ok(Response::new(ReceiverStream::new(said)))
    }

    async fn restore(&self, _: Request<v1::RestoreRequest>) -> Result<Response<Self::RestoreStream>, Status> {
        self.restores.fetch_add(1, Ordering::Relaxed);
        let (say, said) = mpsc::channel(8);
        let batch = v1::RestoreBatch { records: self.stored.clone() };
        // The channel is new and has room.
        let _ = say.send(Ok(batch)).await;
        Ok(Response::new(ReceiverStream::new(said)))
    }

    async fn locate(&self, _: Request<v1::LocateRequest>) -> Result<Response<v1::LocateResponse>, Status> {
        Ok(Response::new(v1::LocateResponse::default()))
    }
}

struct Pki {
    ca: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Pki {
    fn make() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "test CA");
        let ca = params.self_signed(&key).expect("signed").pem();
        Self { ca, issuer: Issuer::new(params, key) }
    }

    fn issue(&self, identity: &str, names: &[&str]) -> (String, String) {
        let key = KeyPair::generate().expect("a key");
        let mut params =
            CertificateParams::new(names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>()).expect("names");
        params.subject_alt_names.push(SanType::URI(identity.try_into().expect("ASCII")));
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        (certificate.pem(), key.serialize_pem())
    }
}
