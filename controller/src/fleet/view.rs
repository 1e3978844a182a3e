//! The watched view of the fleet: a task follows the store, everybody else reads the last [`Snapshot`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::JoinSet;
use turnpike_proto::v1;

use super::bookkeeping::{Bookkeeping, FleetEvent, Prefix, differences};
use super::{Drains, NodeView, RevokedRecord, Snapshot, Thresholds};
use crate::store::{Store, WatchEvent};

/// Events a slow subscriber may fall behind by.
const EVENTS: usize = 1024;
/// Watch events applied before a new snapshot is published, at most.
const BURST: usize = 1024;

/// What a view is made with.
#[derive(Clone, Copy, Debug)]
pub struct ViewOptions {
    /// Life of a node's lease, at least 2 s.
    pub lease: Duration,
    /// Above these a node counts as overloaded.
    pub thresholds: Thresholds,
}

impl Default for ViewOptions {
    fn default() -> Self {
        Self { lease: Duration::from_secs(5), thresholds: Thresholds::default() }
    }
}

/// The fleet as the store shows it, kept current by a task that ends with this handle. While the store is away the
/// last snapshot goes on being served.
#[derive(Debug)]
pub struct FleetView {
    shared: Arc<Shared>,
    thresholds: Thresholds,
    _task: JoinSet<()>,
}

#[derive(Debug)]
struct Shared {
    snapshot: ArcSwap<Snapshot>,
    events: broadcast::Sender<FleetEvent>,
    members: watch::Sender<Arc<v1::Members>>,
    drains: watch::Sender<Option<Arc<Drains>>>,
    synced: watch::Sender<bool>,
    /// The store is known not to take changes.
    doubted: watch::Sender<bool>,
    settled: watch::Sender<bool>,
    ever_synced: AtomicBool,
    /// Unix ms; 0 before the first.
    synced_at: AtomicU64,
}

impl FleetView {
    /// Starts to follow `store`. Returns at once, with an empty and unsynced view.
    pub fn start(store: Arc<dyn Store>, options: ViewOptions) -> Self {
        let shared = Arc::new(Shared {
            snapshot: ArcSwap::default(),
            events: broadcast::Sender::new(EVENTS),
            members: watch::Sender::default(),
            drains: watch::Sender::default(),
            synced: watch::Sender::new(false),
            doubted: watch::Sender::new(false),
            settled: watch::Sender::new(false),
            ever_synced: AtomicBool::new(false),
            synced_at: AtomicU64::new(0),
        });
        let mut task = JoinSet::new();
        task.spawn(follow(store, options, shared.clone()));
        Self { shared, thresholds: options.thresholds, _task: task }
    }

    /// The fleet now, as last heard from the store.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.snapshot.load_full()
    }

    /// The thresholds its events and states go by.
    pub fn thresholds(&self) -> &Thresholds {
        &self.thresholds
    }

    /// Nodes as they come, go and change, from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<FleetEvent> {
        self.shared.events.subscribe()
    }

    /// Every relay of the cluster as the `Members` that relays are told; changes only when the list does.
    pub fn members(&self) -> watch::Receiver<Arc<v1::Members>> {
        self.shared.members.subscribe()
    }

    /// Who is told to drain; `None` before the first full reading. Changes only when that does.
    pub fn drains(&self) -> watch::Receiver<Option<Arc<Drains>>> {
        self.shared.drains.subscribe()
    }

    /// Whether the view follows the store right now; false before the first full reading and in an outage.
    pub fn is_synced(&self) -> bool {
        *self.shared.synced.borrow()
    }

    /// When the view was last known to be current, in Unix ms; `None` before the first full reading.
    pub fn synced_at(&self) -> Option<u64> {
        if self.is_synced() {
            return Some(unix_ms());
        }
        let at = self.shared.synced_at.load(Ordering::Relaxed);
        self.shared.ever_synced.load(Ordering::Relaxed).then_some(at)
    }

    /// Waits until the view follows the store.
    pub async fn synced(&self) {
        // The sender lives in `self`, so waiting can only end by the condition.
        let _ = self.shared.synced.subscribe().wait_for(|synced| *synced).await;
    }
}

impl FleetView {
    /// Says whether the store takes changes. While it does not, and a grace of lease + 5 s beyond, a node that vanishes
    /// is suspect and not dead.
    pub fn doubt(&self, doubted: bool) {
        self.shared.doubted.send_if_modified(|before| std::mem::replace(before, doubted) != doubted);
    }

    /// Waits until what is not in the view is gone for sure: the store has been well, and no controller been lost, for
    /// lease + 5 s.
    pub async fn settled(&self) {
        // The sender lives in `self`, so waiting can only end by the condition.
        let _ = self.shared.settled.subscribe().wait_for(|settled| *settled).await;
    }
}

/// Unix time in milliseconds.
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

async fn follow(store: Arc<dyn Store>, options: ViewOptions, shared: Arc<Shared>) {
    let (sender, mut events) = mpsc::channel(BURST);
    let mut watches = JoinSet::new();
    for prefix in Prefix::ALL {
        watches.spawn(forward(store.clone(), prefix, sender.clone()));
    }
    drop(sender);
    let mut book = Bookkeeping::new(options.lease);
    let mut doubted = shared.doubted.subscribe();
    loop {
        let now = Instant::now();
        book.doubt(*doubted.borrow_and_update(), now);
        let next = book.expire(now);
        publish(&book, &options.thresholds, &shared);
        let settled = !book.is_in_grace(now);
        shared.settled.send_if_modified(|before| std::mem::replace(before, settled) != settled);
        let deadline = next.unwrap_or_else(|| now + Duration::from_secs(3600));
        let mut batch = Vec::new();
        tokio::select! {
            received = events.recv_many(&mut batch, BURST) => if received == 0 { return },
            () = tokio::time::sleep_until(deadline.into()) => {}
            _ = doubted.changed() => {}
        }
        let now = Instant::now();
        for (prefix, event) in batch {
            book.apply(prefix, event, now);
        }
    }
}

/// Passes one prefix's watch on; asks again for as long as the store refuses to begin one.
async fn forward(store: Arc<dyn Store>, prefix: Prefix, sender: mpsc::Sender<(Prefix, WatchEvent)>) {
    loop {
        match store.watch(prefix.text()).await {
            Ok(mut watch) => {
                while let Some(event) = watch.recv().await {
                    if sender.send((prefix, event)).await.is_err() {
                        return;
                    }
                }
                // A watch that ends has not told all: doubt what it told.
                if sender.send((prefix, WatchEvent::Reset)).await.is_err() {
                    return;
                }
            }
            Err(error) => tracing::warn!(prefix = prefix.text(), %error, "the fleet cannot be watched yet"),
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

fn publish(book: &Bookkeeping, thresholds: &Thresholds, shared: &Shared) {
    let synced = book.is_synced();
    let was_synced = *shared.synced.borrow();
    if synced || was_synced {
        shared.synced_at.store(unix_ms(), Ordering::Relaxed);
    }
    if synced {
        shared.ever_synced.store(true, Ordering::Relaxed);
    }
    let before = shared.snapshot.load_full();
    let after = book.snapshot();
    // Half a telling is no news: until the first one is complete there is nothing to publish.
    if after != *before && shared.ever_synced.load(Ordering::Relaxed) {
        let events = differences(&before, &after, thresholds, unix_ms());
        shared.snapshot.store(Arc::new(after));
        publish_members(shared);
        for event in events {
            // Nobody listening is fine.
            let _ = shared.events.send(event);
        }
    }
    if shared.ever_synced.load(Ordering::Relaxed) {
        publish_drains(shared);
    }
    if synced != was_synced {
        shared.synced.send_replace(synced);
    }
}

fn publish_drains(shared: &Shared) {
    let snapshot = shared.snapshot.load();
    shared.drains.send_if_modified(|current| {
        let changed = current.as_deref() != Some(&snapshot.drains);
        if changed {
            *current = Some(Arc::new(snapshot.drains.clone()));
        }
        changed
    });
}

fn publish_members(shared: &Shared) {
    let snapshot = shared.snapshot.load();
    let refused = |id: &String| snapshot.revoked.get(id).is_some_and(|revoked| revoked.covers(None));
    let owns = |node: &NodeView| {
        let owner = snapshot.node_of(node.record.relay_address);
        owner.is_none_or(|owner| owner.record.node_id == node.record.node_id)
    };
    // An address that has moved is its new owner's, though the lease of the old one still runs.
    let members: Vec<v1::Member> = snapshot
        .nodes
        .iter()
        .filter(|(id, node)| !refused(id) && owns(node))
        .map(|(_, node)| v1::Member {
            node_id: node.record.node_id.clone(),
            relay_address: node.record.relay_address.to_string(),
            relay_ips: node.record.relay_ips.iter().map(ToString::to_string).collect(),
            region: node.record.region.clone(),
            relay_port_low: u32::from(node.record.relay_ports.0),
            relay_port_high: u32::from(node.record.relay_ports.1),
            backbone_addresses: node.record.backbone.iter().map(ToString::to_string).collect(),
            cluster_only: node.record.cluster_only,
        })
        .collect();
    let refusals = |(id, record): (&String, &RevokedRecord)| {
        let of_it = |serial: &[u8]| v1::RevokedCertificate { node_id: id.clone(), serial: serial.to_vec() };
        let all = record.covers(None).then(|| of_it(&[]));
        record.numbers().map(|serial| of_it(serial.bytes())).chain(all).collect::<Vec<_>>()
    };
    let revoked: Vec<v1::RevokedCertificate> = snapshot.revoked.iter().flat_map(refusals).collect();
    shared.members.send_if_modified(|current| {
        let changed = current.members != members || current.revoked != revoked;
        if changed {
            // By the clock, so that it grows across replicas and across stores made anew.
            let revision = unix_ms().max(current.revision + 1);
            *current = Arc::new(v1::Members { revision, members, revoked });
        }
        changed
    });
}
