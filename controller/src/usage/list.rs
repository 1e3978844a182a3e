//! Usage in pages: the ledger by the beginning of its allocations, then what lives by its checkpoints.

use turn_core::{AllocationId, credential};

use super::{
    COUNTERS, Checkpoint, Entry, LEDGER, Segment, Usage, ledger_key, merge, parse_counters_key, parse_ledger_key,
};
use crate::store::{MAX_PAGE, Store, StoreError};

/// Entries looked at for one page, so that a filter that matches little cannot hold a call up.
const SCAN: usize = 20_000;
/// Default and most usages in a page.
const PAGE: (usize, usize) = (100, 1000);

/// Whose usage; the default is all.
#[derive(Clone, Debug, Default)]
pub struct UsageFilter {
    /// Of this user: the whole USERNAME, or what quota counts of it.
    pub user: Option<Vec<u8>>,
    /// Of this allocation.
    pub id: Option<AllocationId>,
}

/// A page of usage.
#[derive(Clone, Debug, Default)]
pub struct UsagePage {
    /// The ended first.
    pub usage: Vec<Usage>,
    /// Goes on from here; `None` on the last page. A page may be short and still not be the last.
    pub next: Option<String>,
}

/// A page of at most `size` (0 is 100), from where the page before said.
///
/// # Errors
/// See [`StoreError`]; `None` is a token that is none of ours.
pub async fn list(
    store: &dyn Store,
    filter: &UsageFilter,
    size: usize,
    token: &str,
) -> Result<Option<UsagePage>, StoreError> {
    if !token.is_empty() && !token.starts_with(LEDGER) && !token.starts_with(COUNTERS) {
        return Ok(None);
    }
    let size = if size == 0 { PAGE.0 } else { size.min(PAGE.1) };
    let mut page = UsagePage::default();
    let mut after = Some(token.to_owned()).filter(|token| !token.is_empty());
    if let Some(id) = filter.id.filter(|_| after.is_none()) {
        // It is in the one place or in the other.
        if let Some(entry) = store.get(&ledger_key(id)).await? {
            page.usage.extend(closed(&entry.key, &entry.value));
            return Ok(Some(page));
        }
        after = Some(COUNTERS.to_owned());
    }
    let mut looked_at = 0;
    if after.as_ref().is_none_or(|after| after.starts_with(LEDGER)) {
        loop {
            let read = store.range(LEDGER, after.as_deref(), MAX_PAGE).await?;
            looked_at += read.entries.len();
            for entry in read.entries {
                if page.usage.len() >= size {
                    page.next = after;
                    return Ok(Some(page));
                }
                page.usage.extend(closed(&entry.key, &entry.value).filter(|usage| filter.matches(usage)));
                after = Some(entry.key);
            }
            if !read.more {
                break;
            }
            if looked_at >= SCAN {
                page.next = after;
                return Ok(Some(page));
            }
        }
        after = Some(COUNTERS.to_owned());
    }
    list_living(store, filter, size, after, looked_at, page).await.map(Some)
}

async fn list_living(
    store: &dyn Store,
    filter: &UsageFilter,
    size: usize,
    mut after: Option<String>,
    mut looked_at: usize,
    mut page: UsagePage,
) -> Result<UsagePage, StoreError> {
    // The counts of an allocation follow each other: it is whole when another one begins.
    let mut open: Option<Living> = None;
    loop {
        let read = store.range(COUNTERS, after.as_deref().filter(|after| *after != COUNTERS), MAX_PAGE).await?;
        looked_at += read.entries.len();
        for entry in read.entries {
            let parsed = parse_counters_key(&entry.key).map(|(address, id, _)| (address, id));
            let checkpoint = serde_json::from_slice::<Checkpoint>(&entry.value).ok();
            let (Some((address, id)), Some(checkpoint)) = (parsed, checkpoint) else { continue };
            let begins = open.as_ref().is_none_or(|open| (open.address, open.id) != (address, id));
            if begins {
                page.usage.extend(open.take().map(Living::usage).filter(|usage| filter.matches(usage)));
                if page.usage.len() >= size || looked_at >= SCAN {
                    page.next = after;
                    return Ok(page);
                }
                open = Some(Living { address, id, user: checkpoint.user, segments: Vec::new() });
            }
            if let Some(open) = &mut open {
                merge(&mut open.segments, checkpoint.segment);
            }
            after = Some(entry.key);
        }
        if !read.more {
            page.usage.extend(open.map(Living::usage).filter(|usage| filter.matches(usage)));
            return Ok(page);
        }
    }
}

/// An allocation that has not ended.
struct Living {
    address: std::net::IpAddr,
    id: AllocationId,
    user: String,
    segments: Vec<Segment>,
}

impl Living {
    fn usage(self) -> Usage {
        Usage::new(self.id, self.address, &self.user, None, &self.segments)
    }
}

fn closed(key: &str, value: &[u8]) -> Option<Usage> {
    let id = parse_ledger_key(key)?;
    let entry: Entry = serde_json::from_slice(value).ok()?;
    let ended = Some((entry.ended_at, entry.reason));
    let usage = Usage::new(id, entry.relay_address, &entry.user, ended, &entry.segments);
    Some(Usage { unclean: entry.unclean, ..usage })
}

impl UsageFilter {
    fn matches(&self, usage: &Usage) -> bool {
        let of_user = |user: &Vec<u8>| usage.user == *user || credential::quota_key(&usage.user) == user.as_slice();
        self.id.is_none_or(|id| id == usage.id) && self.user.as_ref().is_none_or(of_user)
    }
}
