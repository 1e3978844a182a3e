//! Closes what lost machines left, and forgets what is old. Both are the leader's.

use std::net::IpAddr;
use std::time::Duration;

use turn_core::{AllocationId, Record, text};

use super::book::put;
use super::{
    COUNTERS, Checkpoint, Entry, LEDGER, Reason, Segment, began, counters_of, is_unclean, ledger_key, merge,
    parse_counters_key, parse_ledger_key,
};
use crate::allocations::key_of;
use crate::fleet::Snapshot;
use crate::leader::Leadership;
use crate::store::{Entry as Stored, Guard, MAX_OPS, MAX_PAGE, Op, Store, StoreError};

/// Counts of an allocation without a record are closed when this has passed since the last of them, where its relay is
/// gone, and where it lives: it says itself what they came to.
const GRACE: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(15 * 60));

/// How long and how much the ledger remembers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Retention {
    /// Entries go so long after the end of their allocation.
    pub age: Duration,
    /// Beyond so many the oldest go.
    pub entries: usize,
}

impl Default for Retention {
    fn default() -> Self {
        Self { age: Duration::from_secs(7 * 86_400), entries: 200_000 }
    }
}

/// What a sweep did.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Swept {
    /// Entries closed, or forgotten.
    pub(crate) entries: usize,
}

/// Closes the entries of allocations that are not stored any more and whose relay says nothing; `now` is Unix ms.
pub(crate) async fn sweep_counters(
    store: &dyn Store,
    leadership: &Leadership,
    fleet: &Snapshot,
    now: u64,
) -> Result<Swept, StoreError> {
    let mut swept = Swept::default();
    let mut after: Option<String> = None;
    let mut counts: Vec<(Stored, Checkpoint)> = Vec::new();
    let mut of: Option<(IpAddr, AllocationId)> = None;
    loop {
        let page = store.range(COUNTERS, after.as_deref(), MAX_PAGE).await?;
        after = page.entries.last().map(|entry| entry.key.clone());
        for entry in page.entries {
            let named = parse_counters_key(&entry.key).map(|(address, id, _)| (address, id));
            if named != of {
                let whole = std::mem::take(&mut counts);
                swept.entries += usize::from(close_lost(store, leadership, fleet, of, whole, now).await?);
                of = named;
            }
            if let Ok(checkpoint) = serde_json::from_slice(&entry.value) {
                counts.push((entry, checkpoint));
            }
        }
        if !page.more || after.is_none() {
            swept.entries += usize::from(close_lost(store, leadership, fleet, of, counts, now).await?);
            return Ok(swept);
        }
    }
}

/// Closes one entry, if it is due and nothing changes meanwhile.
async fn close_lost(
    store: &dyn Store,
    leadership: &Leadership,
    fleet: &Snapshot,
    of: Option<(IpAddr, AllocationId)>,
    counts: Vec<(Stored, Checkpoint)>,
    now: u64,
) -> Result<bool, StoreError> {
    let (Some((address, id)), Some(last)) = (of, counts.iter().map(|(_, count)| count.segment.at).max()) else {
        return Ok(false);
    };
    let grace = if fleet.node_of(address).is_some() { GRACE.1 } else { GRACE.0 };
    let is_due = last.saturating_add(u64::try_from(grace.as_millis()).unwrap_or(u64::MAX)) < now;
    if !is_due || store.get(&key_of(address, id)).await?.is_some() {
        return Ok(false);
    }
    let before = store.get(&ledger_key(id)).await?;
    let known = before.as_ref().and_then(|entry| serde_json::from_slice::<Entry>(&entry.value).ok());
    let mut guards = vec![leadership.guard(), Guard::Absent(key_of(address, id))];
    guards.push(match &before {
        Some(entry) => Guard::Revision(entry.key.clone(), entry.revision),
        None => Guard::Absent(ledger_key(id)),
    });
    let mut ops = Vec::new();
    let mut segments: Vec<Segment> = Vec::new();
    let mut user = String::new();
    for (stored, count) in counts.into_iter().take(MAX_OPS / 2) {
        guards.push(Guard::Revision(stored.key.clone(), stored.revision));
        ops.push(Op::Delete(stored.key));
        user = count.user;
        merge(&mut segments, count.segment);
    }
    let entry = match known {
        Some(mut known) => {
            segments.into_iter().for_each(|segment| merge(&mut known.segments, segment));
            Entry { unclean: is_unclean(&known.segments), ..known }
        }
        None => {
            let unclean = is_unclean(&segments);
            Entry { user, relay_address: address, ended_at: last, reason: Reason::Unknown, unclean, segments }
        }
    };
    ops.push(put(ledger_key(id), &entry));
    store.transact(guards, ops).await
}

/// The entry of an allocation of a gone relay whose record is about to be removed, if nobody has ever counted for it.
pub(crate) async fn entry_of_lost(store: &dyn Store, record: &Record) -> Result<Option<Op>, StoreError> {
    let id = record.id;
    let counters = counters_of(record.relay_address, id);
    if !store.range(&counters, None, 1).await?.entries.is_empty() || store.get(&ledger_key(id)).await?.is_some() {
        return Ok(None);
    }
    let entry = Entry {
        user: text::escape(&record.username),
        relay_address: record.relay_address,
        ended_at: record.expires_at,
        reason: Reason::Unknown,
        unclean: true,
        segments: Vec::new(),
    };
    Ok(Some(put(ledger_key(id), &entry)))
}

/// Forgets entries that are too old, or too many; `now` is Unix ms.
pub(crate) async fn sweep_ledger(
    store: &dyn Store,
    leadership: &Leadership,
    retention: Retention,
    now: u64,
) -> Result<Swept, StoreError> {
    let oldest = now.saturating_sub(u64::try_from(retention.age.as_millis()).unwrap_or(u64::MAX));
    let mut swept = Swept::default();
    let mut after: Option<String> = None;
    // In the order of their names, which is that of their beginnings.
    let mut kept: std::collections::VecDeque<String> = std::collections::VecDeque::new();
    loop {
        let page = store.range(LEDGER, after.as_deref(), MAX_PAGE).await?;
        after = page.entries.last().map(|entry| entry.key.clone());
        let mut old = Vec::new();
        for entry in page.entries {
            // Who began later cannot have ended before.
            let may_be_old = parse_ledger_key(&entry.key).is_none_or(|id| began(id) < oldest);
            let ended_at =
                |entry: &Stored| serde_json::from_slice::<Entry>(&entry.value).map_or(0, |entry| entry.ended_at);
            if may_be_old && ended_at(&entry) < oldest {
                old.push(entry.key);
            } else {
                kept.push_back(entry.key);
                old.extend(if kept.len() > retention.entries { kept.pop_front() } else { None });
            }
        }
        swept.entries += old.len();
        for keys in old.chunks(MAX_OPS) {
            let ops = keys.iter().map(|key| Op::Delete(key.clone())).collect();
            if !store.transact(vec![leadership.guard()], ops).await? {
                // Somebody else leads.
                return Ok(swept);
            }
        }
        if !page.more || after.is_none() {
            return Ok(swept);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::tests::segment;
    use super::super::{UsageFilter, list};
    use super::*;
    use crate::leader::{Terms, lead};
    use crate::store::EmbeddedStore;

    const ADDRESS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
    const NOW: u64 = 1_800_000_000_000;
    const MINUTE: u64 = 60_000;

    fn id(at: u64) -> AllocationId {
        AllocationId::new(at, [1; 10])
    }

    async fn put_all(store: &dyn Store, ops: Vec<Op>) {
        assert!(store.transact(Vec::new(), ops).await.expect("a store"));
    }

    fn count(id: AllocationId, segment: Segment) -> Op {
        let key = format!("{}{}", counters_of(ADDRESS, id), segment.origin);
        put(key, &Checkpoint { user: "alice".to_owned(), segment })
    }

    /// Does something as the leader.
    async fn led<T: Send + 'static, F: Future<Output = T> + Send>(
        store: Arc<EmbeddedStore>,
        work: impl Fn(Leadership) -> F,
    ) -> T {
        let (done, mut result) = tokio::sync::mpsc::channel(1);
        let work = |leadership| {
            let (work, done) = (work(leadership), done.clone());
            async move { drop(done.send(work.await).await) }
        };
        tokio::select! {
            () = lead(store, "test", "me", Terms::default(), work) => unreachable!("it never ends"),
            result = result.recv() => result.expect("sent"),
        }
    }

    #[tokio::test]
    async fn what_lost_machines_counted_is_closed_and_nothing_else() {
        let store = Arc::new(EmbeddedStore::in_memory());
        let open = |origin, at| Segment { closed: false, ..segment(origin, 100, at) };
        let before = NOW - 2 * MINUTE;
        put_all(
            &*store,
            vec![
                // Lost in two counts; handed on and never taken up; stored still; heard of just now.
                count(id(1), open("a", before)),
                count(id(1), open("b", before)),
                count(id(2), segment("a", 100, before)),
                count(id(3), open("a", before)),
                Op::Put { key: key_of(ADDRESS, id(3)), value: b"a record".to_vec(), lease: None },
                count(id(4), open("a", NOW - MINUTE / 2)),
            ],
        )
        .await;
        for expected in [2, 0] {
            let swept = led(store.clone(), |leadership| {
                let store = store.clone();
                async move { sweep_counters(&*store, &leadership, &Snapshot::default(), NOW).await }
            })
            .await;
            assert_eq!(swept.expect("swept").entries, expected);
            store
                .revoke(store.get("leader/test").await.expect("a store").expect("led").lease.expect("leased"))
                .await
                .expect("ended");
        }
        let page = list(&*store, &UsageFilter::default(), 0, "").await.expect("a store").expect("a page");
        let shown: Vec<_> = page
            .usage
            .iter()
            .map(|usage| (usage.id, usage.totals.bytes_to_peer, usage.ended.map(|(at, _)| at), usage.unclean))
            .collect();
        let expected = [
            (id(1), 200, Some(before), true),
            (id(2), 100, Some(before), false),
            (id(3), 100, None, false),
            (id(4), 100, None, false),
        ];
        assert_eq!(shown, expected);
    }

    #[tokio::test]
    async fn the_ledger_forgets_by_age_and_by_number() {
        let store = Arc::new(EmbeddedStore::in_memory());
        let hour = 60 * MINUTE;
        let entry = |id, ended_at| {
            let entry = Entry {
                user: "alice".to_owned(),
                relay_address: ADDRESS,
                ended_at,
                reason: Reason::Deleted,
                unclean: false,
                segments: vec![segment("a", 1, ended_at)],
            };
            put(ledger_key(id), &entry)
        };
        // Began early and ended late; began and ended early; three of the last hour.
        let mut ops = vec![entry(id(NOW - 9 * hour), NOW - MINUTE), entry(id(NOW - 8 * hour), NOW - 7 * hour)];
        ops.extend((1..=3).map(|minute| entry(id(NOW - minute * MINUTE), NOW)));
        put_all(&*store, ops).await;
        for (entries, left) in [(10, 4), (2, 2)] {
            let retention = Retention { age: Duration::from_secs(2 * 3600), entries };
            let swept = led(store.clone(), |leadership| {
                let store = store.clone();
                async move { sweep_ledger(&*store, &leadership, retention, NOW).await }
            })
            .await;
            swept.expect("swept");
            store
                .revoke(store.get("leader/test").await.expect("a store").expect("led").lease.expect("leased"))
                .await
                .expect("ended");
            let page = list(&*store, &UsageFilter::default(), 0, "").await.expect("a store").expect("a page");
            assert_eq!(page.usage.len(), left);
        }
    }
}
