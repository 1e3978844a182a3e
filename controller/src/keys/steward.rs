//! Who sees to rotations: one replica at a time under an election, and whichever has just been asked for one. Every
//! step is a guarded write of what `rotation` says, so that two that step at once take one step.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use turn_core::record::seal_key;
use turn_core::{KeyRing, Record, credential};

use super::document::Document;
use super::rotation::{Records, Seen};
use super::{Keys, Ring, RotateError, change, lifetimes};
use crate::allocations::PREFIX;
use crate::fleet::{FleetView, unix_ms};
use crate::leader::{self, Terms};
use crate::store::{MAX_PAGE, Store, StoreError};

/// Somebody waits for a rotation whose leader has died.
const TERMS: Terms = Terms { lease: Duration::from_secs(6), turn: Duration::from_secs(2) };
/// Between two looks while a key is being made known.
const SOON: Duration = Duration::from_millis(50);
/// Between two looks at keys that wait to leave: they do for hours, those of records for seconds.
const LATER: Duration = Duration::from_secs(5);
/// Between two readings of every stored record, first and longest.
const SCANS: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));

/// Sees to rotations until dropped.
pub struct Steward {
    wake: Arc<Notify>,
    _tasks: JoinSet<()>,
}

impl Steward {
    /// Begins, and stands for election as `controller_id`.
    pub fn start(store: Arc<dyn Store>, fleet: Arc<FleetView>, keys: Arc<Keys>, controller_id: String) -> Self {
        let wake = Arc::new(Notify::new());
        let mut tasks = JoinSet::new();
        let (own_store, own_fleet, own_keys) = (store.clone(), fleet.clone(), keys);
        tasks.spawn(async move {
            // A step is fenced by the revision it was decided on.
            let work = |_| watch_over(own_store.clone(), own_fleet.clone(), own_keys.clone());
            leader::lead(own_store.clone(), "keys", &controller_id, TERMS, work).await;
        });
        let woken = wake.clone();
        tasks.spawn(async move {
            loop {
                woken.notified().await;
                see_through(&store, &fleet).await;
            }
        });
        Self { wake, _tasks: tasks }
    }

    /// A rotation was begun here: this replica sees it through, whoever leads. A leader that has just died would be
    /// missed for as long as its lease lasts.
    pub fn wake(&self) {
        self.wake.notify_one();
    }
}

/// Steps until no key is being made known.
async fn see_through(store: &Arc<dyn Store>, fleet: &FleetView) {
    loop {
        match step(&**store, fleet, &Looked::default()).await {
            Ok(document) if !document.is_rotating() => return,
            Ok(_) => sleep(SOON).await,
            Err(error) => {
                tracing::debug!(%error, "a rotation waits for the store");
                sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// The leader's work: every step, and what waits for hours.
async fn watch_over(store: Arc<dyn Store>, fleet: Arc<FleetView>, keys: Arc<Keys>) {
    let mut settings = keys.subscribe();
    let mut scans = Scans::default();
    loop {
        let document = settings.borrow_and_update().document.clone();
        let pause = match look(&*store, &document, &mut scans).await {
            Ok(looked) => match step(&*store, &fleet, &looked).await {
                Ok(document) if document.is_rotating() => SOON,
                Ok(_) => LATER,
                Err(error) => {
                    tracing::debug!(%error, "the keys are looked at again later");
                    Duration::from_secs(1)
                }
            },
            Err(error) => {
                tracing::debug!(%error, "the keys are looked at again later");
                Duration::from_secs(1)
            }
        };
        // The keys changing is a reason to look at once; an end of the sender is the end of this process.
        let _ = timeout(pause, settings.changed()).await;
    }
}

/// What has to be looked up before a key may leave.
#[derive(Default)]
struct Looked {
    longest_credential: Option<BTreeMap<u8, Duration>>,
    records: Option<Records>,
}

/// When every stored record was read last, and how long to wait before the next time.
struct Scans {
    last: Option<Instant>,
    pause: Duration,
}

impl Default for Scans {
    fn default() -> Self {
        Self { last: None, pause: SCANS.0 }
    }
}

async fn look(store: &dyn Store, document: &Document, scans: &mut Scans) -> Result<Looked, StoreError> {
    let mut looked = Looked::default();
    if document.retires_secrets() {
        looked.longest_credential = Some(lifetimes::stored(store).await?);
    }
    if !document.waits_for_records(looked.longest_credential.as_ref(), unix_ms()) {
        *scans = Scans::default();
    } else if scans.last.is_none_or(|last| last.elapsed() >= scans.pause) {
        looked.records = Some(records(store).await?);
        if scans.last.is_some() {
            scans.pause = (scans.pause * 2).min(SCANS.1);
        }
        scans.last = Some(Instant::now());
    }
    Ok(looked)
}

/// What the stored records still need. Their seals are not checked: a forged record keeps a key until it is swept.
async fn records(store: &dyn Store) -> Result<Records, StoreError> {
    let mut records = Records::default();
    let mut after: Option<String> = None;
    loop {
        let page = store.range(PREFIX, after.as_deref(), MAX_PAGE).await?;
        for entry in &page.entries {
            records.seals.extend(seal_key(&entry.value));
            let record = Record::open(&entry.value, &KeyRing::default()).ok();
            let expires_at = record.and_then(|record| credential::expires_at(&record.username));
            let expires_at = expires_at.map(|seconds| seconds.saturating_mul(1000));
            records.earliest_credential = records.earliest_credential.into_iter().chain(expires_at).min();
        }
        after = page.entries.into_iter().next_back().map(|entry| entry.key);
        if !page.more || after.is_none() {
            return Ok(records);
        }
    }
}

/// One guarded step, if any may be taken; answers with what is stored then.
async fn step(store: &dyn Store, fleet: &FleetView, looked: &Looked) -> Result<Document, RotateError> {
    let snapshot = fleet.snapshot();
    let seen = Seen {
        relays: snapshot.nodes.values().map(|node| node.load.settings_revision).collect(),
        relays_are_known: fleet.is_synced(),
        longest_credential: looked.longest_credential.clone(),
        records: looked.records.clone(),
    };
    let (document, changed) = change(store, |stored| Ok(stored.advance(&seen, unix_ms()))).await?;
    if changed {
        let newest = |ring| document.ring(ring).first().map_or(0, |key| key.id);
        let live = |ring| document.ring(ring).len();
        tracing::info!(
            revision = document.revision,
            rest = newest(Ring::Rest),
            nonce = newest(Ring::Nonce),
            record = newest(Ring::Record),
            accepted = live(Ring::Rest) + live(Ring::Nonce) + live(Ring::Record),
            "the cluster's keys have changed"
        );
    }
    Ok(document)
}
