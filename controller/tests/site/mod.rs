//! A controller in this process, over an embedded store in memory that tests fill as relays would.
#![allow(dead_code, reason = "each test binary uses a part of it")]

#[path = "../../../relay-node/turn-core/tests/support/sample.rs"]
mod records;
#[path = "../../src/fleet/sample.rs"]
mod sample;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use controller::api;
use controller::api::console::Feed;
use controller::api::grpc::Switch;
use controller::config::{self, Settings};
use controller::fleet::{LoadRecord, NodeListener, NodeRecord, OwnerRecord, unix_ms};
use controller::health::Health;
use controller::replica::Replica;
use controller::server::{self, Limits};
use controller::store::{EmbeddedStore, Op, Store};
use metrics_exporter_prometheus::PrometheusBuilder;
use serde::Serialize;
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};
use turn_core::{AllocationId, FiveTuple, PeerAddr, Record};

/// A controller with its listeners; ends when dropped.
pub(crate) struct Site {
    pub(crate) http: SocketAddr,
    pub(crate) grpc: SocketAddr,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) health: Health,
    pub(crate) pki: Pki,
    pub(crate) shutdown: CancellationToken,
    settings: Settings,
    switch: Switch,
    feed: Feed,
    tasks: JoinSet<()>,
}

impl Site {
    /// A controller that is ready, over a store with these nodes.
    pub(crate) async fn start(flags: &[&str], nodes: &[Node]) -> Result<Self> {
        let mut site = Self::not_ready(flags).await?;
        for node in nodes {
            site.put(node).await?;
        }
        site.make_ready().await?;
        Ok(site)
    }

    /// A controller whose store has never answered.
    pub(crate) async fn not_ready(flags: &[&str]) -> Result<Self> {
        let limits = Limits { drain: Duration::from_millis(200), ..Limits::default() };
        Self::with_limits(flags, limits).await
    }

    /// The same with other bounds of its listeners.
    pub(crate) async fn with_limits(flags: &[&str], limits: Limits) -> Result<Self> {
        let pki = Pki::new()?;
        let path = |name: &str| pki.directory.path().join(name).display().to_string();
        let required = [
            "controller".to_owned(),
            "--id=c1".to_owned(),
            "--region=eu".to_owned(),
            "--distances=[{from=\"eu\",to=\"us\",ms=90},{from=\"us\",to=\"ap\",ms=160}]".to_owned(),
            "--store-kind=embedded".to_owned(),
            "--store-path=unused".to_owned(),
            format!("--tls-ca={}", path("ca.pem")),
            format!("--tls-certificate={}", path("controller-c1.pem")),
            format!("--tls-key={}", path("controller-c1.key")),
        ];
        let arguments = required.into_iter().chain(flags.iter().map(|flag| (*flag).to_owned()));
        let settings = config::load(&config::command().try_get_matches_from(arguments)?)?;
        let tls = server::tls::load(&settings.tls, &settings.id)?;

        let shutdown = CancellationToken::new();
        let health = Health::default();
        let feed = Feed::new(shutdown.clone());
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let (http, grpc) = (server::bind("http", any).await?, server::bind("grpc", any).await?);
        let addresses = (http.local_addr()?, grpc.local_addr()?);
        let prometheus = PrometheusBuilder::new().build_recorder().handle();
        let router = api::http(health.clone(), &settings.cors_origins, feed.clone(), prometheus);
        let switch = Switch::new().await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(server::serve_http(http, router, limits, shutdown.clone()));
        tasks.spawn(server::serve_grpc(grpc, tls, switch.clone(), limits, shutdown.clone()));
        Ok(Self {
            http: addresses.0,
            grpc: addresses.1,
            store: Arc::new(EmbeddedStore::in_memory()),
            health,
            pki,
            shutdown,
            settings,
            switch,
            feed,
            tasks,
        })
    }

    /// The store answers now.
    pub(crate) async fn make_ready(&mut self) -> Result<()> {
        let replica = Arc::new(Replica::start(self.store.clone(), &self.settings).await?);
        self.switch.open(&replica, self.shutdown.clone()).await;
        self.health.ready(replica.clone());
        self.tasks.spawn(self.feed.clone().run(replica));
        Ok(())
    }

    /// Writes what a node's relay would.
    pub(crate) async fn put(&self, node: &Node) -> Result<()> {
        let id = &node.record.node_id;
        let owner = OwnerRecord { node_id: id.clone(), epoch: 7, session: String::new() };
        let ops = vec![
            put(format!("owners/{}", node.record.relay_address), &owner)?,
            put(format!("load/{id}"), &node.load)?,
            put(format!("nodes/{id}"), &node.record)?,
        ];
        assert!(self.store.transact(Vec::new(), ops).await?, "a transaction without guards");
        Ok(())
    }

    /// URL of a path of the HTTP listener.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.http)
    }

    /// The replica, once ready.
    pub(crate) fn replica(&self) -> &Arc<Replica> {
        self.health.replica().expect("a ready controller")
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

fn put(key: String, value: &impl Serialize) -> Result<Op> {
    Ok(Op::Put { key, value: serde_json::to_vec(value)?, lease: None })
}

/// What the store says of a relay.
#[derive(Clone)]
pub(crate) struct Node {
    pub(crate) record: NodeRecord,
    pub(crate) load: LoadRecord,
}

/// A ready node with UDP and TCP; `last` is the last byte of its address.
pub(crate) fn node(id: &str, region: &str, last: u8) -> Node {
    let ip = IpAddr::V4(Ipv4Addr::new(198, 51, 100, last));
    Node {
        record: NodeRecord { zone: "a".to_owned(), registered_at: unix_ms(), ..sample::node_record(id, region, ip) },
        load: LoadRecord { reported_at: unix_ms(), ..LoadRecord::default() },
    }
}

impl Node {
    /// Changed by `change`.
    pub(crate) fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }
}

/// A cluster's certificates, in a directory of their own.
pub(crate) struct Pki {
    pub(crate) directory: TempDir,
    ca: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Pki {
    /// A CA (`ca.pem`) and the certificate of controller `c1`.
    pub(crate) fn new() -> Result<Self> {
        let directory = TempDir::new()?;
        let mut parameters = rcgen::CertificateParams::default();
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate()?;
        let certificate = parameters.self_signed(&key)?;
        std::fs::write(directory.path().join("ca.pem"), certificate.pem())?;
        let pki = Self { directory, ca: rcgen::Issuer::new(parameters, key) };
        pki.issue("controller", "c1")?;
        Ok(pki)
    }

    /// Certificate and key of `turnpike://<role>/<name>`, PEM; also as `<role>-<name>.pem` and `.key`.
    pub(crate) fn issue(&self, role: &str, name: &str) -> Result<(String, String)> {
        let mut parameters = rcgen::CertificateParams::new(vec!["controller.turnpike".to_owned()])?;
        let uri = format!("turnpike://{role}/{name}");
        parameters.subject_alt_names.push(rcgen::SanType::URI(uri.as_str().try_into()?));
        parameters.extended_key_usages =
            vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth, rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        let key = rcgen::KeyPair::generate()?;
        let certificate = parameters.signed_by(&key, &self.ca)?;
        let file = |extension: &str| self.directory.path().join(format!("{role}-{name}.{extension}"));
        std::fs::write(file("pem"), certificate.pem())?;
        std::fs::write(file("key"), key.serialize_pem())?;
        Ok((certificate.pem(), key.serialize_pem()))
    }

    /// The CA's certificate, PEM.
    pub(crate) fn ca(&self) -> Result<String> {
        std::fs::read_to_string(self.directory.path().join("ca.pem")).context("ca.pem")
    }
}

/// The id that ends in this.
pub(crate) fn id(n: u8) -> AllocationId {
    let mut bytes = [0; 16];
    bytes[5] = n;
    AllocationId(bytes)
}

/// Stores a record as the relay at 198.51.100.`relay` would.
pub(crate) async fn store(site: &Site, relay: u8, n: u8, username: &[u8]) -> Result<()> {
    save(site, &record(relay, n, username)?).await
}

/// Stores it as its relay would.
pub(crate) async fn save(site: &Site, record: &Record) -> Result<()> {
    let sealed = record.seal(&site.replica().keys.current().record_keys);
    let key = format!("allocations/{}/{}", record.relay_address, record.id.to_text());
    assert!(site.store.transact(Vec::new(), vec![Op::Put { key, value: sealed, lease: None }]).await?);
    Ok(())
}

/// An allocation of `username` on the relay at 198.51.100.`relay`.
pub(crate) fn record(relay: u8, n: u8, username: &[u8]) -> Result<Record> {
    let relayed = SocketAddr::from(([198, 51, 100, relay], 50_000 + u16::from(n)));
    let now = unix_ms();
    let peer: SocketAddr = "192.0.2.9:9".parse()?;
    let record = records::record(id(n), relayed, now);
    let five_tuple = FiveTuple { client: "203.0.113.7:5000".parse()?, ..record.five_tuple };
    Ok(Record {
        epoch: 7,
        five_tuple,
        username: username.to_vec(),
        permissions: vec![(peer.ip(), now + 300_000)],
        channels: vec![(0x4000, PeerAddr::new(peer), now + 600_000)],
        ..record
    })
}

/// To the gRPC listener with a certificate of this role, made out to `me`.
pub(crate) async fn channel(site: &Site, role: &str) -> Result<Channel> {
    let (certificate, key) = site.pki.issue(role, "me")?;
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(site.pki.ca()?))
        .identity(Identity::from_pem(certificate, key))
        .domain_name("controller.turnpike");
    Ok(Channel::from_shared(format!("https://{}", site.grpc))?.tls_config(tls)?.connect().await?)
}
