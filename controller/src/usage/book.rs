//! What a relay says of usage, as writes: checkpoints are put as they come, ends close the entry.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tokio::time::sleep;
use tonic::Status;
use turn_core::{AllocationId, text};
use turnpike_proto::v1;

use super::{Checkpoint, Entry, Reason, Segment, Totals, counters_of, is_unclean, ledger_key, merge};
use crate::fleet::{Claim, Lost};
use crate::store::{MAX_OPS, MAX_PAGE, Op, Store, StoreError};

/// Reads of ended allocations at a time.
const READS: usize = 16;
/// Between attempts to read a store that is away.
const PAUSE: Duration = Duration::from_millis(200);
/// RFC 8489 §14.3.
const LONGEST_NAME: usize = 508;

/// One statement of a relay.
#[derive(Clone, Debug)]
pub(crate) struct Counted {
    /// The allocation.
    pub(crate) id: AllocationId,
    user: String,
    segment: Segment,
    ended: Option<(u64, Reason)>,
}

/// Checks a batch of `node_id`; `now` is Unix ms.
///
/// # Errors
/// `INVALID_ARGUMENT` for one that no relay sends.
pub(crate) fn read(batch: v1::UsageBatch, node_id: &str, now: u64) -> Result<Vec<Counted>, Status> {
    if batch.usage.len() > MAX_OPS {
        return Err(Status::invalid_argument(format!("a batch of more than {MAX_OPS} usages")));
    }
    let counted = batch.usage.into_iter().map(|usage| read_one(usage, node_id, now)).collect::<Result<Vec<_>, _>>()?;
    let mut ids = HashSet::with_capacity(counted.len());
    if counted.iter().all(|counted| ids.insert(counted.id)) {
        Ok(counted)
    } else {
        Err(Status::invalid_argument("a batch that names an allocation twice"))
    }
}

fn read_one(usage: v1::Usage, node_id: &str, now: u64) -> Result<Counted, Status> {
    let reason = usage.reason();
    let id = usage.allocation_id.try_into();
    let id = AllocationId(id.map_err(|_| Status::invalid_argument("an allocation id that has not 16 bytes"))?);
    if usage.username.len() > LONGEST_NAME {
        return Err(Status::invalid_argument(format!("a user name of more than {LONGEST_NAME} bytes")));
    }
    let segment = Segment {
        origin: format!("{:016x}", usage.origin),
        node_id: node_id.to_owned(),
        totals: Totals {
            packets_to_peer: usage.packets_to_peer,
            bytes_to_peer: usage.bytes_to_peer,
            packets_to_client: usage.packets_to_client,
            bytes_to_client: usage.bytes_to_client,
        },
        continued: usage.continued,
        unclean: usage.unclean,
        closed: usage.closed || usage.ended_at != 0,
        at: now,
    };
    let ended = (usage.ended_at != 0).then(|| (usage.ended_at, reason.into()));
    Ok(Counted { id, user: text::escape(&usage.username), segment, ended })
}

/// Writes a batch under the claim's fence. Returns when the store has it, however long it is away meanwhile.
///
/// # Errors
/// The claim is lost.
pub(crate) async fn book(claim: &Claim, store: &dyn Store, batch: Vec<Counted>) -> Result<(), Lost> {
    let address = claim.relay_address();
    let writes = stream::iter(batch).map(|counted| writes(store, address, counted)).buffered(READS);
    let writes: Vec<Vec<Op>> = writes.try_collect().await?;
    // An entry is closed whole: what is of one allocation is in one transaction.
    let mut part: Vec<Op> = Vec::new();
    for ops in writes {
        if part.len() + ops.len() > MAX_OPS {
            claim.write(std::mem::take(&mut part)).await?;
        }
        part.extend(ops);
    }
    if part.is_empty() { Ok(()) } else { claim.write(part).await }
}

async fn writes(store: &dyn Store, address: IpAddr, counted: Counted) -> Result<Vec<Op>, Lost> {
    let Counted { id, user, segment, ended } = counted;
    let Some((ended_at, reason)) = ended else {
        let key = format!("{}{}", counters_of(address, id), segment.origin);
        return Ok(vec![put(key, &Checkpoint { user, segment })]);
    };
    // An entry that is there was closed before: the relay has not heard so, or a sweep took it for lost.
    let (ledger, counters) = (ledger_key(id), counters_of(address, id));
    let before = persist(|| store.get(&ledger)).await?;
    let before = before.and_then(|entry| serde_json::from_slice::<Entry>(&entry.value).ok());
    let page = persist(|| store.range(&counters, None, MAX_PAGE)).await?;
    let checkpoints: Vec<_> =
        page.entries.iter().filter_map(|entry| serde_json::from_slice(&entry.value).ok()).collect();
    let entry = close(id, address, before, checkpoints, (user, segment, ended_at, reason));
    let mut ops = vec![put(ledger, &entry)];
    // More than these an allocation that moves each second does not leave; a sweep takes the rest.
    ops.extend(page.entries.into_iter().take(MAX_OPS - 1).map(|entry| Op::Delete(entry.key)));
    Ok(ops)
}

/// The entry of an allocation whose relay says that it has ended (pure).
fn close(
    id: AllocationId,
    relay_address: IpAddr,
    before: Option<Entry>,
    checkpoints: Vec<Checkpoint>,
    (user, segment, ended_at, reason): (String, Segment, u64, Reason),
) -> Entry {
    let (mut segments, mut known_user) = before.map(|entry| (entry.segments, entry.user)).unwrap_or_default();
    for checkpoint in checkpoints {
        known_user = if known_user.is_empty() { checkpoint.user } else { known_user };
        merge(&mut segments, checkpoint.segment);
    }
    merge(&mut segments, segment);
    let unclean = is_unclean(&segments);
    if unclean {
        tracing::info!(
            allocation = id.to_text(),
            "the usage of an allocation may lack what a lost machine counted last"
        );
    }
    let user = if user.is_empty() { known_user } else { user };
    Entry { user, relay_address, ended_at, reason, unclean, segments }
}

/// Asks a store that is away again.
async fn persist<T, F: Future<Output = Result<T, StoreError>>>(ask: impl Fn() -> F) -> Result<T, Lost> {
    loop {
        match ask().await {
            Ok(answer) => return Ok(answer),
            Err(StoreError::Refused(text)) => return Err(Lost::Refused(text)),
            Err(_) => sleep(PAUSE).await,
        }
    }
}

/// Our documents have no part that JSON cannot write.
pub(super) fn put(key: String, value: &impl serde::Serialize) -> Op {
    Op::Put { key, value: serde_json::to_vec(value).unwrap_or_default(), lease: None }
}

#[cfg(test)]
mod tests {
    use super::super::tests::segment;
    use super::*;

    const ADDRESS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    fn checkpoint(segment: Segment) -> Checkpoint {
        Checkpoint { user: "alice".to_owned(), segment }
    }

    #[test]
    fn an_end_sums_up_what_every_machine_counted() {
        let id = AllocationId::new(1, [1; 10]);
        let end = |bytes| ("alice".to_owned(), segment("b", bytes, 9), 5, Reason::Deleted);
        let entry = close(id, ADDRESS, None, vec![checkpoint(segment("a", 100, 1))], end(50));
        assert_eq!((super::super::sum(&entry.segments).bytes_to_peer, entry.unclean), (150, false));
        // The acknowledgement was lost; the checkpoints are gone.
        let again = close(id, ADDRESS, Some(entry.clone()), Vec::new(), end(50));
        assert_eq!(again, entry);
    }

    #[test]
    fn a_relay_that_comes_back_corrects_what_a_sweep_took_for_lost() {
        let id = AllocationId::new(1, [1; 10]);
        let lost = Segment { closed: false, ..segment("a", 70, 1) };
        let swept = Entry {
            user: "alice".to_owned(),
            relay_address: ADDRESS,
            ended_at: 3,
            reason: Reason::Unknown,
            unclean: true,
            segments: vec![lost],
        };
        let entry = close(id, ADDRESS, Some(swept), vec![], (String::new(), segment("a", 100, 9), 5, Reason::Expired));
        assert_eq!((super::super::sum(&entry.segments).bytes_to_peer, entry.unclean), (100, false));
        assert_eq!((entry.user.as_str(), entry.reason), ("alice", Reason::Expired));
    }

    #[test]
    fn what_no_relay_says_is_refused() {
        let usage = |id: usize, name: usize| v1::Usage {
            allocation_id: vec![1; id],
            username: vec![b'x'; name],
            ..v1::Usage::default()
        };
        let batch = |usage: Vec<v1::Usage>| read(v1::UsageBatch { batch_id: 1, usage }, "eu-1", 1);
        assert!(batch(vec![usage(16, 508)]).is_ok());
        for (what, usages) in [
            ("too many", vec![usage(16, 1); 129]),
            ("a short id", vec![usage(15, 1)]),
            ("one twice", vec![usage(16, 1); 2]),
            ("a long name", vec![usage(16, 509)]),
        ] {
            assert!(batch(usages).is_err(), "{what}");
        }
    }
}
