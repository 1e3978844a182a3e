//! What a session has to write, in the order its relay said it (pure, but for the writing itself).

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesOrdered;
use tokio::time::sleep;
use tonic::Status;
use tracing::{Span, debug_span};
use turn_core::AllocationId;
use turnpike_proto::trace::{self, TARGET};
use turnpike_proto::v1;

use crate::allocations::{PREFIX, key_of, parse_key, prefix_of};
use crate::fleet::{Claim, Lost, unix_ms};
use crate::store::{MAX_OPS, MAX_PAGE, MAX_TRANSACTION, MAX_VALUE, Op, Store, StoreError};
use crate::usage::{self, Counted};

/// Work that waits while the store is away; then the relay is no longer read.
const QUEUE: usize = 64;
/// Batches written at a time, of different allocations.
const PARALLEL: usize = 8;
/// Allocations named in a resync, at most: more than a node has ports.
const NAMED: usize = 1_000_000;
/// Between attempts to read a store that is away.
const PAUSE: Duration = Duration::from_millis(200);

type Id = [u8; 16];

/// One thing to do.
enum Work {
    Batch { batch_id: u64, ops: HashMap<Id, Op>, traces: Vec<Span> },
    Usage { batch_id: u64, counted: Vec<Counted> },
    ResyncBegin,
    ResyncEnd { batch_id: u64 },
    Goodbye,
}

/// What has been done.
pub(super) enum Done {
    /// The store has it.
    Stored { batch_id: u64 },
    /// The store has this usage.
    Counted { batch_id: u64 },
    /// The relay has left.
    Left,
}

/// What is being done, and of which allocations.
type Writing = BoxFuture<'static, Result<(Done, Vec<Id>), Lost>>;

/// A session's work.
pub(super) struct Pipeline {
    claim: Arc<Claim>,
    store: Arc<dyn Store>,
    queue: VecDeque<Work>,
    writing: FuturesOrdered<Writing>,
    /// Allocations that are being written.
    busy: HashSet<Id>,
    /// What is being done tolerates nothing beside it.
    exclusive: bool,
    /// Named since the resync began.
    named: Option<HashSet<Id>>,
}

impl Pipeline {
    pub(super) fn new(claim: Arc<Claim>, store: Arc<dyn Store>) -> Self {
        Self {
            claim,
            store,
            queue: VecDeque::new(),
            writing: FuturesOrdered::new(),
            busy: HashSet::new(),
            exclusive: false,
            named: None,
        }
    }

    /// Whether more may be queued.
    pub(super) fn has_room(&self) -> bool {
        self.queue.len() < QUEUE
    }

    /// Queues a batch.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for one that no relay sends.
    pub(super) fn batch(&mut self, batch: v1::RecordBatch) -> Result<(), Status> {
        let traces = batch.changes.iter().filter_map(trace_of).collect();
        let ops = self.ops(batch.changes)?;
        self.queue.push_back(Work::Batch { batch_id: batch.batch_id, ops, traces });
        self.begin()
    }

    /// Queues what allocations have used.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for a batch that no relay sends.
    pub(super) fn usage(&mut self, batch: v1::UsageBatch, node_id: &str) -> Result<(), Status> {
        let batch_id = batch.batch_id;
        let counted = usage::read(batch, node_id, unix_ms())?;
        self.queue.push_back(Work::Usage { batch_id, counted });
        self.begin()
    }

    /// Queues the begin of a resync.
    pub(super) fn resync_begin(&mut self) -> Result<(), Status> {
        self.queue.push_back(Work::ResyncBegin);
        self.begin()
    }

    /// Queues the end of a resync: what was not named goes.
    pub(super) fn resync_end(&mut self, batch_id: u64) -> Result<(), Status> {
        self.queue.push_back(Work::ResyncEnd { batch_id });
        self.begin()
    }

    /// Queues the relay's leave.
    pub(super) fn goodbye(&mut self) -> Result<(), Status> {
        self.queue.push_back(Work::Goodbye);
        self.begin()
    }

    /// The next thing done, in order. Waits for ever while nothing is being done.
    ///
    /// # Errors
    /// The claim is lost.
    pub(super) async fn next(&mut self) -> Result<Done, Lost> {
        let Some(done) = self.writing.next().await else {
            return std::future::pending().await;
        };
        let (done, ids) = done?;
        for id in ids {
            self.busy.remove(&id);
        }
        if self.writing.is_empty() {
            self.exclusive = false;
        }
        // What was refused was refused when it was queued.
        let _ = self.begin();
        Ok(done)
    }

    /// Begins what can be done now.
    fn begin(&mut self) -> Result<(), Status> {
        while let Some(work) = self.queue.front() {
            let alone = self.writing.is_empty();
            let has_room = !self.exclusive && self.writing.len() < PARALLEL;
            let may = match work {
                Work::Batch { ops, .. } => has_room && ops.keys().all(|id| !self.busy.contains(id)),
                // What is said of an allocation is written in the order it was said.
                Work::Usage { counted, .. } => {
                    has_room && counted.iter().all(|counted| !self.busy.contains(&counted.id.0))
                }
                Work::ResyncBegin => true,
                Work::ResyncEnd { .. } | Work::Goodbye => alone,
            };
            let Some(work) = self.queue.pop_front_if(|_| may) else {
                return Ok(());
            };
            match work {
                Work::Batch { batch_id, ops, traces } => self.write(batch_id, ops, traces)?,
                Work::Usage { batch_id, counted } => self.count(batch_id, counted),
                Work::ResyncBegin => self.named = Some(HashSet::new()),
                Work::ResyncEnd { batch_id } => {
                    self.exclusive = true;
                    let named = self.named.take().ok_or_else(|| Status::invalid_argument("ResyncEnd without begin"))?;
                    let (claim, store) = (self.claim.clone(), self.store.clone());
                    self.writing.push_back(Box::pin(async move {
                        remove_unnamed(&claim, &*store, &named).await?;
                        Ok((Done::Stored { batch_id }, Vec::new()))
                    }));
                }
                Work::Goodbye => {
                    self.exclusive = true;
                    let claim = self.claim.clone();
                    self.writing.push_back(Box::pin(async move {
                        claim.release().await;
                        Ok((Done::Left, Vec::new()))
                    }));
                }
            }
        }
        Ok(())
    }

    fn count(&mut self, batch_id: u64, counted: Vec<Counted>) {
        let ids: Vec<Id> = counted.iter().map(|counted| counted.id.0).collect();
        self.busy.extend(&ids);
        let (claim, store) = (self.claim.clone(), self.store.clone());
        self.writing.push_back(Box::pin(async move {
            usage::book(&claim, &*store, counted).await?;
            Ok((Done::Counted { batch_id }, ids))
        }));
    }

    fn write(&mut self, batch_id: u64, ops: HashMap<Id, Op>, traces: Vec<Span>) -> Result<(), Status> {
        let ids: Vec<Id> = ops.keys().copied().collect();
        self.busy.extend(&ids);
        if let Some(named) = &mut self.named {
            named.extend(&ids);
            if named.len() > NAMED {
                return Err(Status::invalid_argument(format!("a resync of more than {NAMED} allocations")));
            }
        }
        let claim = self.claim.clone();
        let parts = split(ops.into_values());
        let transact = |record: &Span| debug_span!(target: TARGET, parent: record, "transact", otel.kind = "client");
        let transactions: Vec<Span> = traces.iter().map(transact).collect();
        self.writing.push_back(Box::pin(async move {
            for part in parts {
                claim.write(part).await?;
            }
            drop((transactions, traces));
            Ok((Done::Stored { batch_id }, ids))
        }));
        Ok(())
    }

    /// The newest change of each allocation, as an operation.
    fn ops(&self, changes: Vec<v1::RecordChange>) -> Result<HashMap<Id, Op>, Status> {
        if changes.len() > MAX_OPS {
            return Err(Status::invalid_argument(format!("a batch of more than {MAX_OPS} changes")));
        }
        let mut newest: HashMap<Id, (u64, u64, Op)> = HashMap::with_capacity(changes.len());
        for change in changes {
            let id: Result<Id, _> = change.allocation_id.try_into();
            let id = id.map_err(|_| Status::invalid_argument("an allocation id that has not 16 bytes"))?;
            if change.epoch > self.claim.epoch() {
                return Err(Status::invalid_argument("a record of an epoch that was not granted"));
            }
            if change.record.len() > MAX_VALUE {
                return Err(Status::invalid_argument(format!("a record of more than {MAX_VALUE} bytes")));
            }
            let key = key_of(self.claim.relay_address(), AllocationId(id));
            let op = if change.record.is_empty() {
                Op::Delete(key)
            } else {
                Op::Put { key, value: change.record, lease: None }
            };
            let is_newer = newest
                .get(&id)
                .is_none_or(|(epoch, sequence, _)| (change.epoch, change.sequence) >= (*epoch, *sequence));
            if is_newer {
                newest.insert(id, (change.epoch, change.sequence, op));
            }
        }
        Ok(newest.into_iter().map(|(id, (_, _, op))| (id, op)).collect())
    }
}

/// The trace of an allocation that its relay has begun, from its arrival here until the store has it.
fn trace_of(change: &v1::RecordChange) -> Option<Span> {
    if change.traceparent.is_empty() {
        return None;
    }
    let span = debug_span!(target: TARGET, parent: None, "record", otel.kind = "consumer");
    trace::adopt(&span, &change.traceparent);
    Some(span)
}

/// Operations in transactions that every store takes.
fn split(ops: impl IntoIterator<Item = Op>) -> Vec<Vec<Op>> {
    let mut parts: Vec<Vec<Op>> = Vec::new();
    let mut room = 0;
    for op in ops {
        let bytes = match &op {
            Op::Put { key, value, .. } => key.len() + value.len(),
            Op::Delete(key) => key.len(),
        };
        match parts.last_mut() {
            Some(part) if part.len() < MAX_OPS && bytes <= room => {
                room -= bytes;
                part.push(op);
            }
            _ => {
                room = MAX_TRANSACTION - bytes;
                parts.push(vec![op]);
            }
        }
    }
    parts
}

/// Deletes what is stored of the relay address and was not named. Nothing else writes there meanwhile: the claim is
/// held, and its other work waits.
async fn remove_unnamed(claim: &Claim, store: &dyn Store, named: &HashSet<Id>) -> Result<(), Lost> {
    let prefix = prefix_of(claim.relay_address());
    let mut after: Option<String> = None;
    loop {
        let page = match store.range(&prefix, after.as_deref(), MAX_PAGE).await {
            Ok(page) => page,
            Err(StoreError::Refused(text)) => return Err(Lost::Refused(text)),
            Err(_) => {
                sleep(PAUSE).await;
                continue;
            }
        };
        after = page.entries.last().map(|entry| entry.key.clone());
        let is_named = |key: &str| parse_key(key, PREFIX).is_some_and(|(_, id)| named.contains(&id.0));
        let unnamed = page.entries.into_iter().filter(|entry| !is_named(&entry.key));
        for part in split(unnamed.map(|entry| Op::Delete(entry.key))) {
            claim.write(part).await?;
        }
        if !page.more {
            return Ok(());
        }
    }
}
