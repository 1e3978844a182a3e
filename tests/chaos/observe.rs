//! Whoever looks on while things break: newcomers at every relay, discovery's answers, etcd's history.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use etcd_client::{Client, EventType, GetOptions, WatchOptions};
use harness::cluster::{HTTP, http_get};
use harness::etcd::PREFIX;
use harness::place::Place;
use harness::turn::{Login, TurnClient};
use harness::{Host, eventually};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use turn_core::Transport;

use crate::evidence::{Held, Probe, Sighting, Watch, Written};
use crate::site::holders;
use crate::traffic::{lock, served};

/// Between two newcomers at a relay.
const NEWCOMERS: Duration = Duration::from_millis(600);
/// Longest a newcomer waits.
const PATIENCE: Duration = Duration::from_secs(4);
/// Between two questions to a controller.
const QUESTIONS: Duration = Duration::from_millis(700);
/// Between two looks at who has the relay address that moves.
const LOOKS: Duration = Duration::from_millis(200);
/// A watch that says nothing for so long is begun anew at the next member: this one may be cut off.
const SILENCE: Duration = Duration::from_secs(3);

/// Lookers-on; they end with [`Observers::stop`].
pub(crate) struct Observers {
    stop: Arc<AtomicBool>,
    probes: Arc<Mutex<Vec<Probe>>>,
    sightings: Arc<Mutex<Vec<Sighting>>>,
    held: Arc<Mutex<Vec<Held>>>,
    tasks: JoinSet<()>,
}

impl Observers {
    pub(crate) fn start(
        watch: Watch,
        login: &Login,
        clients: &Place,
        relays: &[SocketAddr],
        controllers: &[Place],
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (probes, sightings) = (Arc::default(), Arc::default());
        let mut tasks = JoinSet::new();
        for (relay, address) in relays.iter().copied().enumerate() {
            let (stop, probes, login, clients) =
                (Arc::clone(&stop), Arc::clone(&probes), login.clone(), clients.clone());
            tasks.spawn(async move {
                let mut transports = [Transport::Udp, Transport::Tcp].into_iter().cycle();
                while !stop.load(Ordering::Relaxed) {
                    let transport = transports.next().unwrap_or(Transport::Udp);
                    let from = watch.now();
                    let come = timeout(PATIENCE, newcomer(&clients, address, transport, &login)).await;
                    let outcome =
                        come.map_err(|_| "no answer".to_owned()).and_then(|o| o.map_err(|e| format!("{e:#}")));
                    let probe = Probe {
                        relay,
                        transport,
                        from,
                        until: watch.now(),
                        outcome: outcome.as_ref().map(drop).map_err(Clone::clone),
                    };
                    lock::<Vec<Probe>>(&probes).push(probe);
                    // It leaves; nobody waits for the answer long.
                    if let Ok(mut client) = outcome {
                        drop(timeout(PATIENCE, client.refresh(0)).await);
                    }
                    sleep(NEWCOMERS).await;
                }
            });
        }
        for (controller, place) in controllers.iter().cloned().enumerate() {
            let (stop, sightings) = (Arc::clone(&stop), Arc::clone(&sightings));
            tasks.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let at = watch.now();
                    let nodes = named(&place).await.map_err(|error| format!("{error:#}"));
                    lock::<Vec<Sighting>>(&sightings).push(Sighting { controller, at, nodes });
                    sleep(QUESTIONS).await;
                }
            });
        }
        Self { stop, probes, sightings, held: Arc::default(), tasks }
    }

    /// Looks from now on at which of these machines have an address.
    pub(crate) fn watch_address(&mut self, watch: Watch, address: IpAddr, places: Vec<(usize, Place)>) {
        let (stop, held) = (Arc::clone(&self.stop), Arc::clone(&self.held));
        self.tasks.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let at = watch.now();
                let by = holders(&places, address).await;
                lock::<Vec<Held>>(&held).push(Held { at, by });
                sleep(LOOKS).await;
            }
        });
    }

    pub(crate) async fn stop(mut self) -> (Vec<Probe>, Vec<Sighting>, Vec<Held>) {
        self.stop.store(true, Ordering::Relaxed);
        while self.tasks.join_next().await.is_some() {}
        let (probes, sightings) =
            (std::mem::take(&mut *lock(&self.probes)), std::mem::take(&mut *lock(&self.sightings)));
        (probes, sightings, std::mem::take(&mut *lock(&self.held)))
    }
}

async fn newcomer(clients: &Place, relay: SocketAddr, transport: Transport, login: &Login) -> Result<TurnClient> {
    let mut client = TurnClient::open(&clients.host, clients.address, relay, transport, login).await?;
    served(&mut client).await?;
    Ok(client)
}

/// The nodes that a controller hands out.
///
/// # Errors
/// It does not answer.
pub(crate) async fn named(controller: &Place) -> Result<BTreeSet<String>> {
    let text = http_get(controller, HTTP, "/v1/ice-servers?region=eu&limit=8").await?;
    let answer: serde_json::Value = serde_json::from_str(&text)?;
    let nodes = answer["nodes"].as_array().ok_or_else(|| anyhow!("no nodes in {answer}"))?;
    let name = |node: &serde_json::Value| {
        node.as_str().or(node["node_id"].as_str()).or(node["id"].as_str()).map(str::to_owned)
    };
    Ok(nodes.iter().filter_map(name).collect())
}

/// Everything that is written to etcd, in its order.
pub(crate) struct History {
    written: Arc<Mutex<Vec<Written>>>,
    /// Everything up to this revision is known.
    known: Arc<AtomicI64>,
    observer: Place,
    endpoints: Vec<String>,
    task: tokio::task::JoinHandle<()>,
}

impl History {
    pub(crate) fn record(observer: &Place, endpoints: Vec<String>) -> Self {
        let (written, known) = (Arc::<Mutex<Vec<Written>>>::default(), Arc::new(AtomicI64::new(0)));
        let task = tokio::spawn({
            let (written, known, host, endpoints) =
                (written.clone(), known.clone(), observer.host.clone(), endpoints.clone());
            async move {
                for endpoint in endpoints.iter().cycle() {
                    // Whatever ends it: the next member goes on where it ended.
                    let _ = follow(&host, endpoint.clone(), written.clone(), known.clone()).await;
                    sleep(Duration::from_millis(50)).await;
                }
            }
        });
        Self { written, known, observer: observer.clone(), endpoints, task }
    }

    /// Up to which revision everything is known.
    pub(crate) fn known(&self) -> impl Fn() -> i64 + Send + 'static {
        let known = Arc::clone(&self.known);
        move || known.load(Ordering::Relaxed)
    }

    /// All of it, up to now.
    ///
    /// # Errors
    /// etcd does not answer.
    pub(crate) async fn finish(self) -> Result<Vec<Written>> {
        let last = revision(&self.observer.host, self.endpoints.clone()).await?;
        eventually("etcd's history is read to its end", Duration::from_secs(20), async || {
            let known = self.known.load(Ordering::Relaxed);
            ensure!(known >= last, "{known} of {last}");
            Ok::<_, anyhow::Error>(())
        })
        .await?;
        self.task.abort();
        Ok(std::mem::take(&mut *lock(&self.written)))
    }
}

/// The newest revision that touched the cluster's keys.
async fn revision(host: &Host, endpoints: Vec<String>) -> Result<i64> {
    let asked = async move {
        let mut client = Client::connect(endpoints, None).await?;
        let answer = client.get(PREFIX, Some(GetOptions::new().with_prefix())).await?;
        Ok(answer.kvs().iter().map(etcd_client::KeyValue::mod_revision).max().unwrap_or(0))
    };
    host.run(async { timeout(Duration::from_secs(10), asked).await? }).await
}

async fn follow(host: &Host, endpoint: String, written: Arc<Mutex<Vec<Written>>>, known: Arc<AtomicI64>) -> Result<()> {
    let following = async move {
        let mut client = timeout(SILENCE, Client::connect([endpoint], None)).await??;
        let from = known.load(Ordering::Relaxed) + 1;
        let options = WatchOptions::new().with_prefix().with_start_revision(from);
        let mut stream = timeout(SILENCE, client.watch(PREFIX, Some(options))).await??;
        while let Some(message) = timeout(SILENCE, stream.message()).await?? {
            ensure!(!message.canceled(), "{}", message.cancel_reason());
            for event in message.events() {
                let Some(kv) = event.kv() else { continue };
                let key = String::from_utf8_lossy(kv.key()).into_owned();
                let value = (event.event_type() == EventType::Put).then(|| kv.value().to_vec());
                lock(&written).push(Written { revision: kv.mod_revision(), key, value });
                known.fetch_max(kv.mod_revision(), Ordering::Relaxed);
            }
        }
        Ok(())
    };
    host.run(following).await
}
