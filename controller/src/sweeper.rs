//! Removes records that have expired, and sees to the ledger of their usage: those of relays that died for good would stay for ever. A living relay removes
//! its own; until it has had every chance to, its records are left alone.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};
use turn_core::KeyRing;

use crate::allocations::{PREFIX, open, parse_key};
use crate::fleet::{FleetView, Snapshot, unix_ms};
use crate::keys::Keys;
use crate::leader::{self, Leadership, Terms};
use crate::sharing;
use crate::store::{Entry, Guard, MAX_OPS, MAX_PAGE, Op, Store, StoreError};
use crate::usage::{self, Retention, Swept};

/// Between two sweeps.
const EVERY: Duration = Duration::from_secs(30);
/// Grace after the expiry of a record whose relay is gone, and of one whose relay lives: clocks differ.
const GRACE: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(15 * 60));
/// A record that cannot be read and does not change for this long has expired: lifetimes are at most an hour, and a
/// record is written at least once in half of one.
const UNREADABLE: Duration = Duration::from_secs(2 * 3600);
/// Sweeps between two of counters, and between two of the ledger.
const COUNTERS_TURN: u64 = 4;
const LEDGER_TURN: u64 = 20;
/// Unreadable records remembered at a time.
const REMEMBERED: usize = 100_000;

/// Sweeps on one replica at a time, until dropped.
#[derive(Debug)]
pub struct Sweeper {
    _task: JoinSet<()>,
}

impl Sweeper {
    /// Stands for election as `controller_id`.
    pub fn start(
        store: Arc<dyn Store>,
        fleet: Arc<FleetView>,
        keys: Arc<Keys>,
        controller_id: String,
        retention: Retention,
    ) -> Self {
        let mut task = JoinSet::new();
        task.spawn(async move {
            let work = |leadership| sweep_for_ever(store.clone(), fleet.clone(), keys.clone(), leadership, retention);
            leader::lead(store.clone(), "sweeper", &controller_id, Terms::default(), work).await;
        });
        Self { _task: task }
    }
}

async fn sweep_for_ever(
    store: Arc<dyn Store>,
    fleet: Arc<FleetView>,
    keys: Arc<Keys>,
    leadership: Leadership,
    retention: Retention,
) {
    let mut unreadable = HashMap::new();
    let mut turn = 0_u64;
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        // After an outage records look older than they are: their relays come first, to say which live.
        fleet.settled().await;
        let record_keys = keys.current().record_keys.clone();
        match sweep(&*store, &leadership, &fleet.snapshot(), &record_keys, &mut unreadable, unix_ms()).await {
            Ok(0) => {}
            Ok(removed) => tracing::info!(removed, "expired records of gone relays were removed"),
            Err(error) => tracing::warn!(%error, "the sweep stopped; the next one goes on"),
        }
        // Both look at everything there is.
        if turn.is_multiple_of(COUNTERS_TURN) {
            match usage::sweep_counters(&*store, &leadership, &fleet.snapshot(), unix_ms()).await {
                Ok(Swept { entries: 0 }) => {}
                Ok(Swept { entries }) => tracing::info!(entries, "the usage of allocations of lost relays was closed"),
                Err(error) => tracing::warn!(%error, "the sweep of counters stopped; the next one goes on"),
            }
        }
        if turn.is_multiple_of(LEDGER_TURN) {
            match usage::sweep_ledger(&*store, &leadership, retention, unix_ms()).await {
                Ok(Swept { entries }) => tracing::debug!(entries, "old entries of the ledger were forgotten"),
                Err(error) => tracing::warn!(%error, "the sweep of the ledger stopped; the next one goes on"),
            }
            match sharing::sweep(&*store, &leadership, unix_ms()).await {
                Ok(networks) => tracing::debug!(networks, "old measurements were forgotten"),
                Err(error) => tracing::warn!(%error, "the sweep of measurements stopped; the next one goes on"),
            }
        }
        turn += 1;
    }
}

/// When an unreadable record was first seen, by key and revision.
type Unreadable = HashMap<(String, i64), Instant>;

/// Removes what is overdue at `now` (Unix ms); each removal is guarded by the revision that was read, so that a record
/// refreshed meanwhile stays. Returns how many went.
async fn sweep(
    store: &dyn Store,
    leadership: &Leadership,
    fleet: &Snapshot,
    keys: &KeyRing,
    unreadable: &mut Unreadable,
    now: u64,
) -> Result<usize, StoreError> {
    let mut removed = 0;
    let mut after: Option<String> = None;
    let mut seen = Unreadable::new();
    loop {
        let page = store.range(PREFIX, after.as_deref(), MAX_PAGE).await?;
        after = page.entries.last().map(|entry| entry.key.clone());
        let mut overdue = Vec::new();
        for entry in page.entries {
            if is_overdue(&entry, fleet, keys, unreadable, &mut seen, now) {
                // Of what nobody ever counted there would be no trace.
                let entry_of_usage = match open(&entry, keys) {
                    Some(record) => usage::entry_of_lost(store, &record).await?,
                    None => None,
                };
                overdue.push(Overdue { key: entry.key, revision: entry.revision, usage: entry_of_usage });
            }
        }
        // Two operations each, and a guard.
        for chunk in overdue.chunks(MAX_OPS / 2 - 1) {
            removed += remove(store, leadership, chunk).await?;
        }
        if !page.more || after.is_none() {
            *unreadable = seen;
            return Ok(removed);
        }
    }
}

/// A record that is to go.
struct Overdue {
    key: String,
    revision: i64,
    /// The entry of the ledger that is written with it.
    usage: Option<Op>,
}

fn is_overdue(
    entry: &Entry,
    fleet: &Snapshot,
    keys: &KeyRing,
    unreadable: &Unreadable,
    seen: &mut Unreadable,
    now: u64,
) -> bool {
    let lives = parse_key(&entry.key, PREFIX).is_some_and(|(address, _)| fleet.node_of(address).is_some());
    if let Some(record) = open(entry, keys) {
        let grace = if lives { GRACE.1 } else { GRACE.0 };
        let grace = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        return record.expires_at.saturating_add(grace) < now;
    }
    let known = (entry.key.clone(), entry.revision);
    let since = unreadable.get(&known).copied().unwrap_or_else(Instant::now);
    if seen.len() < REMEMBERED {
        seen.insert(known, since);
    }
    since.elapsed() > UNREADABLE
}

/// Removes records together, or, if one of them changed meanwhile, one by one.
async fn remove(store: &dyn Store, leadership: &Leadership, records: &[Overdue]) -> Result<usize, StoreError> {
    let transaction = |records: &[Overdue]| {
        let guards = records.iter().map(|record| Guard::Revision(record.key.clone(), record.revision));
        let guards = std::iter::once(leadership.guard()).chain(guards);
        let ops = records
            .iter()
            .flat_map(|record| std::iter::once(Op::Delete(record.key.clone())).chain(record.usage.clone()));
        (guards.collect::<Vec<_>>(), ops.collect::<Vec<_>>())
    };
    let (guards, ops) = transaction(records);
    if store.transact(guards, ops).await? {
        return Ok(records.len());
    }
    let mut removed = 0;
    for record in records.chunks(1) {
        let (guards, ops) = transaction(record);
        removed += usize::from(store.transact(guards, ops).await?);
    }
    Ok(removed)
}
