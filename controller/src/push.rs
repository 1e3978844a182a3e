//! What clients of relays are told while they use them: the state of every relay, then each change of it. gRPC
//! (`Steering.Watch`) and server-sent events (`/v1/events`) say the same.
//!
//! Every replica derives it from the fleet it watches, so it does not matter which one a client hears. A subscription
//! begins with the state, whoever subscribes and how often, so a client that was away has missed nothing; one that
//! does not keep up gets the state anew instead of what it missed.

mod relays;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::{Stream, stream};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use self::relays::Relays;
pub use self::relays::{Condition, Relay, RelayEvent, RelayEventKind};
use crate::fleet::{FleetView, unix_ms};
use crate::metrics;

/// Updates that a subscriber may fall behind by.
const QUEUE: usize = 256;
/// The fleet is looked at this often even when nothing is heard of it.
const LOOK: Duration = Duration::from_secs(1);

/// What a push is made with.
#[derive(Clone, Copy, Debug)]
pub struct PushOptions {
    /// Most subscriptions at once.
    pub subscribers: usize,
    /// Time after the first full reading of the store in which a living relay may still be out of sight: a lease, and
    /// what it takes to join again.
    pub settling: Duration,
}

impl PushOptions {
    /// Those of a cluster whose nodes have leases of this life.
    pub fn with_lease(lease: Duration) -> Self {
        Self { subscribers: 4096, settling: lease + Duration::from_secs(5) }
    }
}

/// Tells subscribers of relays. Ends with this value.
#[derive(Debug)]
pub struct Push {
    shared: Arc<Shared>,
    _task: JoinSet<()>,
}

#[derive(Debug)]
struct Shared {
    /// Locked while something is told, so that nobody subscribes between a state and the event after it.
    told: Mutex<Told>,
    updates: broadcast::Sender<Arc<Update>>,
    places: Arc<Semaphore>,
    /// Random: ids of two processes differ.
    instance: String,
    sequence: AtomicU64,
    closing: CancellationToken,
}

#[derive(Debug, Default)]
struct Told {
    relays: Relays,
    complete: bool,
}

/// One thing a subscriber is told.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Update {
    /// Names it; unique across replicas.
    pub id: String,
    /// When this replica saw it, Unix ms.
    pub at: u64,
    /// What.
    pub body: Body,
}

/// What an [`Update`] says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Body {
    /// Replaces what the subscriber knew.
    States {
        /// In order of their addresses.
        relays: Vec<Relay>,
        /// No relay that lives is missing.
        complete: bool,
    },
    /// Something happened.
    Event(RelayEvent),
}

/// Which relays a subscriber wants to hear of; an empty list is all.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Filter {
    /// By region.
    pub regions: Vec<String>,
    /// By node id.
    pub node_ids: Vec<String>,
}

impl Filter {
    fn passes(&self, region: &str, node_id: &str) -> bool {
        let among = |names: &[String], name: &str| names.is_empty() || names.iter().any(|known| known == name);
        among(&self.regions, region) && among(&self.node_ids, node_id)
    }

    /// What of an update passes; a node's watcher also hears who took its address over.
    fn apply(&self, update: &Update) -> Option<Update> {
        let body = match &update.body {
            Body::States { relays, complete } => {
                let wanted = relays.iter().filter(|relay| self.passes(&relay.region, &relay.node_id));
                let relays = wanted.cloned().collect();
                Body::States { relays, complete: *complete }
            }
            Body::Event(event) => {
                let RelayEvent { kind, relay } = event;
                let of_former = match kind {
                    RelayEventKind::Moved { former } => self.passes(&relay.region, former),
                    _ => false,
                };
                if !of_former && !self.passes(&relay.region, &relay.node_id) {
                    return None;
                }
                Body::Event(event.clone())
            }
        };
        Some(Update { body, ..update.clone() })
    }
}

/// There are as many subscriptions as there may be.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("this controller has as many watchers as it takes; try another one, or again later")]
pub struct Full;

impl Push {
    /// Begins to watch `fleet`.
    pub fn start(fleet: Arc<FleetView>, options: PushOptions) -> Self {
        let shared = Arc::new(Shared {
            told: Mutex::default(),
            updates: broadcast::Sender::new(QUEUE),
            places: Arc::new(Semaphore::new(options.subscribers)),
            instance: format!("{:08x}", getrandom::u32().unwrap_or_default()),
            sequence: AtomicU64::new(0),
            closing: CancellationToken::new(),
        });
        // Before the first subscriber, who would else be shown an empty cluster.
        shared.look(&fleet, false);
        let mut task = JoinSet::new();
        task.spawn(follow(fleet, options.settling, shared.clone()));
        Self { shared, _task: task }
    }

    /// A stream of updates that begins with the state and ends when this replica closes.
    ///
    /// # Errors
    /// [`Full`].
    pub fn subscribe(&self, filter: Filter) -> Result<impl Stream<Item = Update> + Send + use<>, Full> {
        let place = self.shared.places.clone().try_acquire_owned().map_err(|_| Full)?;
        let open = metrics::InFlight::watcher();
        let subscription = Subscription::begin(self.shared.clone(), filter, (place, open));
        Ok(stream::unfold(subscription, async |mut subscription| {
            let update = subscription.next().await?;
            Some((update, subscription))
        }))
    }

    /// Ends every subscription.
    pub fn close(&self) {
        self.shared.closing.cancel();
    }
}

async fn follow(fleet: Arc<FleetView>, settling: Duration, shared: Arc<Shared>) {
    let mut news = fleet.subscribe();
    let mut tick = tokio::time::interval(LOOK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut synced_at = None;
    loop {
        if fleet.is_synced() {
            synced_at.get_or_insert_with(Instant::now);
        }
        shared.look(&fleet, synced_at.is_some_and(|at: Instant| at.elapsed() >= settling));
        tokio::select! {
            _ = tick.tick() => {}
            // What is heard, or was missed, is only a reason to look.
            heard = news.recv() => if heard == Err(RecvError::Closed) { return },
        }
    }
}

impl Shared {
    /// Tells what has changed since the last look.
    fn look(&self, fleet: &FleetView, complete: bool) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let at = unix_ms();
        let events = told.relays.observe(&fleet.snapshot(), fleet.is_synced(), at);
        for event in events {
            metrics::relay_event(event.kind.name());
            tracing::debug!(node = event.relay.node_id, kind = event.kind.name(), "told to watchers");
            self.tell(Body::Event(event), at);
        }
        if complete && !told.complete {
            told.complete = true;
            self.tell(self.states(&told), at);
        }
    }

    fn tell(&self, body: Body, at: u64) {
        // Nobody listening is fine.
        let _ = self.updates.send(Arc::new(self.update(body, at)));
    }

    fn update(&self, body: Body, at: u64) -> Update {
        let number = self.sequence.fetch_add(1, Ordering::Relaxed);
        Update { id: format!("{}-{number}", self.instance), at, body }
    }

    fn states(&self, told: &Told) -> Body {
        Body::States { relays: told.relays.iter().cloned().collect(), complete: told.complete }
    }

    /// The state, and everything after it.
    fn enter(&self) -> (Update, broadcast::Receiver<Arc<Update>>) {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        (self.update(self.states(&told), unix_ms()), self.updates.subscribe())
    }
}

struct Subscription {
    shared: Arc<Shared>,
    filter: Filter,
    first: Option<Update>,
    updates: broadcast::Receiver<Arc<Update>>,
    _place: (OwnedSemaphorePermit, metrics::InFlight),
}

impl Subscription {
    fn begin(shared: Arc<Shared>, filter: Filter, place: (OwnedSemaphorePermit, metrics::InFlight)) -> Self {
        let (first, updates) = shared.enter();
        Self { shared, filter, first: Some(first), updates, _place: place }
    }

    async fn next(&mut self) -> Option<Update> {
        loop {
            if let Some(first) = self.first.take() {
                return self.filter.apply(&first);
            }
            let heard = tokio::select! {
                heard = self.updates.recv() => heard,
                () = self.shared.closing.cancelled() => return None,
            };
            match heard {
                Ok(update) => {
                    if let Some(update) = self.filter.apply(&update) {
                        return Some(update);
                    }
                }
                Err(RecvError::Lagged(_)) => {
                    metrics::watcher_fell_behind();
                    let (first, updates) = self.shared.enter();
                    (self.first, self.updates) = (Some(first), updates);
                }
                Err(RecvError::Closed) => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::relays::tests::{fleet, node};
    use super::*;

    /// `eu-1` of region `eu`.
    fn relay() -> Relay {
        let mut relays = Relays::default();
        relays.observe(&fleet(&[node("eu-1", 1)]), true, 1);
        relays.iter().next().cloned().expect("a relay")
    }

    fn filter(regions: &[&str], nodes: &[&str]) -> Filter {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Filter { regions: names(regions), node_ids: names(nodes) }
    }

    #[test]
    fn filters_pass_what_was_asked_for() {
        let cases = [
            ("all", filter(&[], &[]), true),
            ("its region", filter(&["us", "eu"], &[]), true),
            ("another region", filter(&["us"], &[]), false),
            ("its node", filter(&[], &["eu-1"]), true),
            ("another node", filter(&[], &["eu-2"]), false),
            ("its node in another region", filter(&["us"], &["eu-1"]), false),
        ];
        for (what, filter, passes) in cases {
            assert_eq!(filter.passes("eu", "eu-1"), passes, "{what}");
        }
    }

    #[test]
    fn who_watches_a_node_hears_who_took_over() {
        let moved = RelayEventKind::Moved { former: "eu-0".into() };
        let event = RelayEvent { kind: moved, relay: relay() };
        let update = Update { id: "1".into(), at: 1, body: Body::Event(event) };
        for (nodes, heard) in [("eu-0", true), ("eu-1", true), ("eu-2", false)] {
            assert_eq!(filter(&[], &[nodes]).apply(&update).is_some(), heard, "{nodes}");
        }
    }
}
