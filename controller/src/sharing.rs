//! What clients have measured, shared between replicas and kept over their restarts: `measured/<network>`, unleased.
//!
//! Each replica writes the networks that were reported to it, at most 64 a second in one transaction and each at most
//! once a minute, and takes those of the others by a watch into the table that it answers from. Of two that write one network
//! at the same moment one is lost until the next report, which costs less than a guard. The replica that sweeps removes what is
//! older than a day, and what is too much.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use crate::leader::Leadership;
use crate::metrics;
use crate::steering::{Prefix, Shared, Steering};
use crate::store::{Entry, Guard, MAX_OPS, MAX_PAGE, Op, Store, StoreError, WatchEvent};

/// Before every network's key.
const MEASURED: &str = "measured/";
/// Networks written in a second by each replica.
const BATCH: usize = 64;
/// Between two writes.
const EVERY: Duration = Duration::from_secs(1);
/// Networks kept in the store after a sweep.
const MOST: usize = 65_536;
/// Milliseconds after which a measurement is of no use.
const LIFE: u64 = 86_400_000;

/// `measured/<first address of the network>`.
#[derive(Debug, Deserialize, Serialize)]
struct Record {
    /// By region.
    rtts: BTreeMap<String, Shared>,
}

/// Shares until dropped.
#[derive(Debug)]
pub struct Sharing {
    _tasks: JoinSet<()>,
}

impl Sharing {
    /// Between `steering` and whoever uses the same store.
    pub fn start(store: Arc<dyn Store>, steering: Arc<Steering>) -> Self {
        let mut tasks = JoinSet::new();
        tasks.spawn(take(store.clone(), steering.clone()));
        tasks.spawn(tell(store, steering));
        Self { _tasks: tasks }
    }
}

async fn take(store: Arc<dyn Store>, steering: Arc<Steering>) {
    let mut watch = match store.watch(MEASURED).await {
        Ok(watch) => watch,
        Err(error) => return tracing::error!(%error, "measurements of other replicas cannot be watched"),
    };
    while let Some(event) = watch.recv().await {
        // What is gone from the store grows old here by itself.
        if let WatchEvent::Put(entry) = event
            && let Some((prefix, record)) = read(&entry)
        {
            metrics::shared("taken", 1);
            steering.take_shared(prefix, &record.rtts);
        }
    }
}

async fn tell(store: Arc<dyn Store>, steering: Arc<Steering>) {
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let networks = steering.take_unshared(BATCH);
        let put = |(prefix, rtts): (Prefix, _)| {
            let value = serde_json::to_vec(&Record { rtts }).ok()?;
            Some(Op::Put { key: format!("{MEASURED}{}", prefix.address()), value, lease: None })
        };
        let ops: Vec<Op> = networks.into_iter().filter_map(put).collect();
        if ops.is_empty() {
            continue;
        }
        let number = ops.len();
        match store.transact(Vec::new(), ops).await {
            Ok(_) => metrics::shared("told", number),
            Err(error) => {
                // Who measures will measure again; the store's own troubles are told elsewhere.
                metrics::shared("lost", number);
                tracing::debug!(%error, "measurements were not shared");
            }
        }
    }
}

fn read(entry: &Entry) -> Option<(Prefix, Record)> {
    let address: IpAddr = entry.key.strip_prefix(MEASURED)?.parse().ok()?;
    let prefix = Prefix::of(address);
    let record = serde_json::from_slice(&entry.value).ok()?;
    (prefix.address() == address).then_some((prefix, record))
}

/// Removes networks that were measured last before a day, cannot be read, or are the oldest of too many. `now` is Unix ms.
/// Returns how many went.
pub(crate) async fn sweep(store: &dyn Store, leadership: &Leadership, now: u64) -> Result<usize, StoreError> {
    // When it was measured last, by key and revision.
    let mut all: Vec<(u64, String, i64)> = Vec::new();
    let mut after: Option<String> = None;
    loop {
        let page = store.range(MEASURED, after.as_deref(), MAX_PAGE).await?;
        after = page.entries.last().map(|entry| entry.key.clone());
        all.extend(page.entries.into_iter().map(|entry| {
            let newest = read(&entry).and_then(|(_, record)| record.rtts.values().map(|it| it.at).max());
            (newest.unwrap_or(0), entry.key, entry.revision)
        }));
        if !page.more || after.is_none() {
            break;
        }
    }
    all.sort_unstable_by(|a, b| b.cmp(a));
    let fresh = all.iter().take_while(|(newest, ..)| newest.saturating_add(LIFE) >= now).count();
    let mut removed = 0;
    for chunk in all[fresh.min(MOST)..].chunks(MAX_OPS - 1) {
        let guards = chunk.iter().map(|(_, key, revision)| Guard::Revision(key.clone(), *revision));
        let guards = std::iter::once(leadership.guard()).chain(guards).collect();
        let ops = chunk.iter().map(|(_, key, _)| Op::Delete(key.clone())).collect();
        // One that was measured again meanwhile keeps its chunk until the next sweep.
        if store.transact(guards, ops).await? {
            removed += chunk.len();
        }
    }
    Ok(removed)
}
