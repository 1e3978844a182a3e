//! Which record changes the controller is told, and when (pure: no network, no clock).
//!
//! Changes are coalesced per allocation and leave in batches. Nothing is dropped silently: what does not fit sets the
//! full-resync mark, and a resync restates every live record. A session begins with one, so nothing has to be
//! remembered while no controller can be reached, and what was sent but not acknowledged in a broken session is
//! restated too. Inside a session the stream is reliable and ordered.

mod told;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use tracing::{Span, debug_span};
use turn_core::{AllocationId, Change, EndReason, KeyRing, Record};
use turnpike_proto::trace::{self, TARGET};
use turnpike_proto::v1::{self, relay_message::Body};

use self::told::{Told, ToldTable};

/// Most changes in a batch: what a store's transaction takes.
pub const BATCH: usize = 128;
/// A batch ends early here; etcd refuses transactions of 1.5 MiB.
const BATCH_BYTES: usize = 512 * 1024;
/// Batches that may wait for their acknowledgement.
const IN_FLIGHT: usize = 8;
/// Allocations that may have something to say, beyond those of a resync.
const ROOM: usize = 65_536;

/// Coalesces changes into batches. Between [`Reporter::disconnected`] and [`Reporter::connected`] it holds nothing.
#[derive(Default)]
pub struct Reporter {
    session: Option<Session>,
    generation: u64,
}

struct Session {
    pending: HashMap<AllocationId, Pending>,
    /// Those of `pending` that may leave now, in the order they came.
    ready: VecDeque<AllocationId>,
    /// Those of `pending` that only moved deadlines: (when they must leave, which).
    deferred: BTreeSet<(u64, AllocationId)>,
    told: ToldTable,
    in_flight: VecDeque<InFlight>,
    last_batch: u64,
    room: usize,
    resync: Resync,
}

/// A batch that is not acknowledged.
struct InFlight {
    batch: u64,
    /// Of the oldest change in it.
    since: u64,
    /// Of the allocations that are new in it: on their way, and in all. They end when the store has them.
    _traces: Vec<(Span, Span)>,
}

struct Pending {
    change: Change,
    /// Of a new allocation, from here to the store; none where nothing is traced.
    trace: Span,
    /// When the first of the changes that came together in it was noted.
    since: u64,
    /// Set while it waits in `deferred`.
    due: Option<u64>,
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Resync {
    /// The controller knows what lives.
    Done,
    /// Due; nothing leaves before it.
    Wanted,
    /// The records are being gathered (of this generation); nothing leaves meanwhile, so that a change that overtakes
    /// the snapshot meets it here.
    Gathering(u64),
    /// ResyncBegin is next, then this many of `ready`, then ResyncEnd.
    Begin(usize),
    /// This many of `ready` are left, then ResyncEnd.
    Running(usize),
}

impl Reporter {
    /// A session has begun: everything is to be restated.
    pub fn connected(&mut self) {
        self.session = Some(Session {
            pending: HashMap::new(),
            ready: VecDeque::new(),
            deferred: BTreeSet::new(),
            told: ToldTable::default(),
            in_flight: VecDeque::new(),
            last_batch: 0,
            room: ROOM,
            resync: Resync::Wanted,
        });
    }

    /// The session is over.
    pub fn disconnected(&mut self) {
        self.session = None;
    }

    /// Changes were lost, or everything must be sealed anew: a full resync is due.
    pub fn want_resync(&mut self) {
        if let Some(session) = &mut self.session {
            session.want_resync();
        }
    }

    /// Something changed. `now` is Unix ms, as everywhere here.
    pub fn note(&mut self, change: Change, now: u64) {
        if let Some(session) = &mut self.session {
            session.note(change, now);
        }
    }

    /// Whether every live record is to be gathered and handed to [`Reporter::snapshot`] with this number.
    pub fn wants_snapshot(&mut self) -> Option<u64> {
        let session = self.session.as_mut()?;
        if session.resync != Resync::Wanted {
            return None;
        }
        self.generation += 1;
        session.resync = Resync::Gathering(self.generation);
        Some(self.generation)
    }

    /// Every live record. One that was gathered for an older request is not used. Returns whether a resync begins.
    pub fn snapshot(&mut self, generation: u64, records: Vec<Record>) -> bool {
        match &mut self.session {
            Some(session) if session.resync == Resync::Gathering(generation) => {
                session.begin_resync(records);
                true
            }
            _ => false,
        }
    }

    /// The next message that may leave. Batches that are not full wait for `flush`, which says that a flush interval
    /// has passed. Call it until it returns nothing.
    pub fn next(&mut self, now: u64, keys: &KeyRing, flush: bool) -> Option<Body> {
        self.session.as_mut()?.next(now, keys, flush)
    }

    /// The store holds everything up to and including this batch.
    pub fn acknowledged(&mut self, batch: u64) {
        if let Some(session) = &mut self.session {
            while session.in_flight.front().is_some_and(|first| first.batch <= batch) {
                session.in_flight.pop_front();
            }
        }
    }

    /// How long ago the oldest change was noted that the store may not have; what was noted before that is stored.
    /// Nothing while a resync is to come or under way.
    pub fn settled(&self, now: u64) -> Option<Duration> {
        let session = self.session.as_ref().filter(|session| session.resync == Resync::Done)?;
        let waiting = session.ready.iter().filter_map(|id| session.pending.get(id)).map(|pending| pending.since).next();
        let under_way = session.in_flight.front().map(|first| first.since);
        let oldest = waiting.into_iter().chain(under_way).min().unwrap_or(now);
        Some(Duration::from_millis(now.saturating_sub(oldest)))
    }

    /// Allocations with something to say, and batches that are not acknowledged.
    pub fn backlog(&self) -> (usize, usize) {
        self.session.as_ref().map_or((0, 0), |s| (s.pending.len(), s.in_flight.len()))
    }
}

impl Session {
    fn want_resync(&mut self) {
        self.pending.clear();
        self.ready.clear();
        self.deferred.clear();
        self.resync = Resync::Wanted;
    }

    fn note(&mut self, change: Change, now: u64) {
        // What has no resync yet is in its snapshot, unless it happens while that is gathered.
        if self.resync == Resync::Wanted {
            return;
        }
        let id = change_id(&change);
        let known = match self.pending.get(&id) {
            Some(pending) => Some(change_version(&pending.change)),
            None => self.told.get(id).map(Told::version),
        };
        if known.is_some_and(|known| change_version(&change) <= known) {
            return;
        }
        let due = match (&change, self.told.get(id)) {
            (Change::Put(new), Some(told)) => told.due(new).filter(|due| *due > now),
            _ => None,
        };
        if let Some(pending) = self.pending.get_mut(&id) {
            pending.change = change;
            // What is ready stays ready; what waits may come to wait for another time, or for nothing.
            if let Some(was) = pending.due {
                pending.due = due;
                self.deferred.remove(&(was, id));
                self.enqueue(id, due);
            }
        } else if self.pending.len() >= self.room {
            self.want_resync();
        } else {
            let trace = if known.is_none() { begin_trace(&change) } else { Span::none() };
            self.pending.insert(id, Pending { change, trace, since: now, due });
            self.enqueue(id, due);
        }
    }

    fn enqueue(&mut self, id: AllocationId, due: Option<u64>) {
        match due {
            Some(due) => {
                self.deferred.insert((due, id));
            }
            None => self.ready.push_back(id),
        }
    }

    fn begin_resync(&mut self, records: Vec<Record>) {
        self.told = ToldTable::default();
        self.deferred.clear();
        self.room = ROOM + records.len();
        for record in records {
            let is_news = match self.pending.get(&record.id) {
                Some(pending) => change_version(&pending.change) < (record.epoch, record.sequence),
                None => true,
            };
            if is_news {
                let id = record.id;
                let change = Change::Put(Box::new(record));
                self.pending.insert(id, Pending { change, trace: Span::none(), since: 0, due: None });
            }
        }
        for pending in self.pending.values_mut() {
            pending.due = None;
        }
        let mut ids: Vec<_> = self.pending.keys().copied().collect();
        ids.sort_unstable();
        self.ready = ids.into();
        self.resync = Resync::Begin(self.ready.len());
    }

    fn next(&mut self, now: u64, keys: &KeyRing, flush: bool) -> Option<Body> {
        if let Resync::Begin(left) = self.resync {
            self.resync = Resync::Running(left);
            return Some(Body::ResyncBegin(v1::ResyncBegin {}));
        }
        if matches!(self.resync, Resync::Wanted | Resync::Gathering(_)) || self.in_flight.len() >= IN_FLIGHT {
            return None;
        }
        if self.resync == Resync::Running(0) {
            self.resync = Resync::Done;
            let batch_id = self.next_batch(0, Vec::new());
            return Some(Body::ResyncEnd(v1::ResyncEnd { batch_id }));
        }
        while let Some((due, id)) = self.deferred.first().copied().filter(|(due, _)| *due <= now) {
            self.deferred.remove(&(due, id));
            if let Some(pending) = self.pending.get_mut(&id) {
                pending.due = None;
            }
            self.ready.push_back(id);
        }
        let is_whole = self.ready.len() >= BATCH || self.resync != Resync::Done;
        if self.ready.is_empty() || !(is_whole || flush) {
            return None;
        }
        let mut changes = Vec::with_capacity(self.ready.len().min(BATCH));
        let (mut bytes, mut oldest, mut traces) = (0, now, Vec::new());
        while changes.len() < BATCH && bytes < BATCH_BYTES {
            let Some(id) = self.ready.pop_front() else { break };
            if let Resync::Running(left) = &mut self.resync {
                *left = left.saturating_sub(1);
            }
            let Some(pending) = self.pending.remove(&id) else {
                continue;
            };
            oldest = oldest.min(pending.since);
            let mut change = self.tell(pending.change, now, keys);
            if !pending.trace.is_disabled() {
                let way = debug_span!(target: TARGET, parent: &pending.trace, "report", otel.kind = "producer");
                change.traceparent = trace::traceparent(&way);
                traces.push((way, pending.trace));
            }
            bytes += change.record.len();
            changes.push(change);
        }
        let batch_id = self.next_batch(oldest, traces);
        Some(Body::Records(v1::RecordBatch { batch_id, changes }))
    }

    fn next_batch(&mut self, since: u64, traces: Vec<(Span, Span)>) -> u64 {
        self.last_batch += 1;
        self.in_flight.push_back(InFlight { batch: self.last_batch, since, _traces: traces });
        self.last_batch
    }

    fn tell(&mut self, change: Change, now: u64, keys: &KeyRing) -> v1::RecordChange {
        let (epoch, sequence) = change_version(&change);
        let allocation_id = change_id(&change).0.to_vec();
        let (record, ended) = match change {
            Change::Put(record) => {
                let sealed = record.seal(keys);
                self.told.put(&record, now);
                (sealed, v1::EndReason::Unspecified)
            }
            Change::End { id, reason, .. } => {
                self.told.remove(id);
                (Vec::new(), end_reason(reason))
            }
        };
        v1::RecordChange { allocation_id, epoch, sequence, record, ended: ended.into(), traceparent: String::new() }
    }
}

/// The trace of an allocation that is told of for the first time.
fn begin_trace(change: &Change) -> Span {
    match change {
        Change::Put(record) => {
            debug_span!(target: TARGET, parent: None, "Allocate", otel.kind = "server", allocation = record.id.to_text())
        }
        Change::End { .. } => Span::none(),
    }
}

fn change_id(change: &Change) -> AllocationId {
    match change {
        Change::Put(record) => record.id,
        Change::End { id, .. } => *id,
    }
}

fn change_version(change: &Change) -> (u64, u64) {
    match change {
        Change::Put(record) => (record.epoch, record.sequence),
        Change::End { epoch, sequence, .. } => (*epoch, *sequence),
    }
}

pub(super) fn end_reason(reason: EndReason) -> v1::EndReason {
    match reason {
        EndReason::Deleted => v1::EndReason::Deleted,
        EndReason::Expired => v1::EndReason::Expired,
        EndReason::Closed => v1::EndReason::Closed,
        EndReason::Revoked => v1::EndReason::Revoked,
    }
}

#[cfg(test)]
mod tests;
