//! Journal and store together: what lives after a start, and what the first session after it adds.
//!
//! At its start a relay reads its journal and asks for a controller, for a short while: with a whole journal only to learn
//! whether anybody else has owned the address meanwhile, else for the records too. Without an answer the journal alone
//! serves (promise P1), and what is missing is merged when the first session comes.
//!
//! Who is right is a question of ownership. The epoch that this relay claimed was granted: nobody else was here, both
//! are read, the newest (epoch, sequence) of each allocation counts, and what the journal knows as ended stays ended. A
//! higher one was granted: somebody else owned the address, or this state directory is an old one, so the store alone
//! says what lives.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};
use turn_core::record::RecordError;
use turn_core::{AllocationId, Change, Record};
use turnpike_proto::v1;

use super::backoff::Backoff;
use super::connection::{Connection, Lost};
use super::session::{Control, Ended};
use crate::dataplane::Dataplane;
use crate::journal::Loaded;
use crate::metrics::{self, Refusal, Source};

/// How long a relay with a whole journal looks for a controller before it serves.
const BRIEFLY: Duration = Duration::from_millis(300);
/// How long one looks whose journal lacks something, or is gone.
const PATIENCE: Duration = Duration::from_secs(2);
/// The longest that reading the stored records may take before anything is served: with some of them in the journal, and
/// where only the store knows.
const READ: (Duration, Duration) = (Duration::from_secs(3), Duration::from_secs(30));
/// Between two reports of life while records are read.
const ALIVE: Duration = Duration::from_secs(1);

/// Who owned the relay address since this state directory last did.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ownership {
    /// Nobody else.
    Continued,
    /// Perhaps somebody else.
    Interrupted,
}

/// What a data plane is to begin with.
#[derive(Debug, Default)]
pub struct Merged {
    /// Allocations that go on.
    pub records: Vec<Record>,
    /// Tombstones that the store may not know.
    pub ended: Vec<Change>,
    /// Records left out, by reason.
    pub refused: Vec<(Refusal, u64)>,
}

impl Merged {
    /// How many records were left out.
    pub fn refused(&self) -> u64 {
        self.refused.iter().map(|(_, count)| count).sum()
    }
}

/// Lays journal and store together (pure). Without `stored` the journal alone counts.
pub fn merge(journal: Loaded, stored: Option<Vec<Record>>, ownership: Ownership) -> Merged {
    let Loaded { records, ended, .. } = journal;
    let has_ended: HashSet<AllocationId> = ended.iter().map(|change| version(change).0).collect();
    let mut live: HashMap<AllocationId, Record> = records.into_iter().map(|record| (record.id, record)).collect();
    let (mut unnamed, mut over) = (0, 0);
    if let Some(stored) = stored {
        if ownership == Ownership::Interrupted {
            let named: HashSet<AllocationId> = stored.iter().map(|record| record.id).collect();
            let before = live.len();
            live.retain(|id, _| named.contains(id));
            unnamed = (before - live.len()) as u64;
        }
        for record in stored {
            // Who had the address meanwhile knows better than this relay what has ended.
            if ownership == Ownership::Continued && has_ended.contains(&record.id) {
                over += 1;
                continue;
            }
            match live.get_mut(&record.id) {
                Some(known) if record.supersedes(known.epoch, known.sequence) => *known = record,
                Some(_) => {}
                None => drop(live.insert(record.id, record)),
            }
        }
    }
    Merged {
        records: live.into_values().collect(),
        ended: if ownership == Ownership::Continued { ended } else { Vec::new() },
        refused: vec![(Refusal::Unnamed, unnamed), (Refusal::Ended, over)],
    }
}

fn version(change: &Change) -> (AllocationId, (u64, u64)) {
    match change {
        Change::Put(record) => (record.id, (record.epoch, record.sequence)),
        Change::End { id, epoch, sequence, .. } => (*id, (*epoch, *sequence)),
    }
}

/// What is known of this process's records until the store has been asked.
#[derive(Debug, Default)]
pub(super) struct Unmerged {
    /// What the journal gave: the newest (epoch, sequence) of each.
    journal: HashMap<AllocationId, (u64, u64)>,
    /// A higher epoch than the claimed one was granted.
    interrupted: bool,
    /// The journal has every allocation that was answered.
    whole: bool,
}

impl Unmerged {
    fn ownership(&self) -> Ownership {
        if self.interrupted { Ownership::Interrupted } else { Ownership::Continued }
    }

    /// Another epoch than the claimed one was granted.
    pub(super) fn interrupt(&mut self) {
        self.interrupted = true;
    }

    /// Whether clients may be told that there is no such allocation.
    pub(super) fn may_lack_records(&self) -> bool {
        !self.whole || self.interrupted
    }
}

impl Control {
    /// What to begin with, of what the journal holds and, as far as it answers in time, the store. What could not be
    /// asked in time is merged by the first session.
    ///
    /// # Errors
    /// [`Ended::Superseded`].
    pub async fn restore(&mut self, mut journal: Loaded) -> Result<Merged, Ended> {
        self.refuse(&mut journal);
        if self.controllers.is_none() {
            return Ok(merge(journal, None, Ownership::Continued));
        }
        let whole = journal.whole && !self.state.wants_restore();
        if !whole {
            self.state.want_restore();
        }
        self.unmerged = Some(Unmerged { whole, ..Unmerged::default() });
        let stored = self.ask(whole, journal.records.is_empty()).await?;
        let (asked, ownership) = (stored.is_some(), self.unmerged.as_ref().map(Unmerged::ownership));
        let ownership = ownership.unwrap_or(Ownership::Continued);
        if let Some(stored) = &stored {
            metrics::restored(Source::Store, newer(stored, &journal).count());
        }
        let given = journal.records.iter().map(|record| (record.id, (record.epoch, record.sequence))).collect();
        let merged = match ownership {
            // The store alone says what lives, and it has not said.
            Ownership::Interrupted if !asked => merge(journal, Some(Vec::new()), ownership),
            _ => merge(journal, stored, ownership),
        };
        count(Source::Journal, &merged.refused);
        if asked {
            self.merged();
        } else if let Some(unmerged) = &mut self.unmerged {
            unmerged.journal = given;
        }
        Ok(merged)
    }

    /// Leaves out what is not of this relay address.
    fn refuse(&self, journal: &mut Loaded) {
        let before = journal.records.len();
        journal.records.retain(|record| record.relay_address.to_string() == self.hello.relay_address);
        let foreign = (before - journal.records.len()) as u64;
        let (damaged, version) = (journal.refused.damaged, journal.refused.version);
        let refused = [(Refusal::Damaged, damaged), (Refusal::Version, version), (Refusal::Foreign, foreign)];
        count(Source::Journal, &refused);
        if damaged + version + foreign > 0 {
            tracing::warn!(damaged, version, foreign, "records in the journal are left out");
        }
        metrics::restored(Source::Journal, journal.records.len());
    }

    /// Looks for a controller; the stored records where they are needed before anything is served, and were to be had.
    async fn ask(&mut self, whole: bool, empty: bool) -> Result<Option<Vec<Record>>, Ended> {
        let within = if whole { BRIEFLY } else { PATIENCE };
        let endpoints = self.controllers.as_ref().map_or(1, |controllers| controllers.endpoints.now().len());
        // A silent one must not use up the time of the others.
        let share = within / u32::try_from(endpoints).unwrap_or(u32::MAX);
        let deadline = Instant::now() + within;
        let left = || deadline.saturating_duration_since(Instant::now());
        let mut backoff = Backoff::default();
        while !left().is_zero() {
            match timeout(left().min(share), self.connect()).await {
                Ok(Ok(connection)) => {
                    let interrupted = self.unmerged.as_ref().is_some_and(|unmerged| unmerged.interrupted);
                    if whole && !interrupted {
                        self.joined = Some(connection);
                        return Ok(None);
                    }
                    let limit = if empty || interrupted { READ.1 } else { READ.0 };
                    match timeout(limit, self.read(&connection, None)).await {
                        Ok(Ok(stored)) => {
                            self.joined = Some(connection);
                            return Ok(Some(stored));
                        }
                        Ok(Err(lost)) => self.complain(&lost),
                        Err(_) => self.complain(&Lost::Silent(limit)),
                    }
                }
                Ok(Err(Lost::Superseded { owner, epoch })) => return Err(Ended::Superseded { owner, epoch }),
                Ok(Err(lost)) => self.complain(&lost),
                Err(_) => self.complain(&Lost::Silent(share)),
            }
            sleep(backoff.next().min(left())).await;
        }
        tracing::warn!(whole, "serving from the journal alone: no controller has answered yet");
        Ok(None)
    }

    /// The stored records of this relay's address, of each the newest; what is damaged is left out and counted.
    async fn read(&self, connection: &Connection, dataplane: Option<&Dataplane>) -> Result<Vec<Record>, Lost> {
        let request =
            v1::RestoreRequest { node_id: self.hello.node_id.clone(), relay_address: self.hello.relay_address.clone() };
        let reading = connection.restore(request);
        tokio::pin!(reading);
        let mut alive = tokio::time::interval(ALIVE);
        let sealed = loop {
            tokio::select! {
                sealed = &mut reading => break sealed?,
                // Each report renews the lease.
                _ = alive.tick() => connection.say_if_room(self.life_sign(dataplane))?,
            }
        };
        let keys = self.cluster.record_keys();
        let mut newest: HashMap<AllocationId, Record> = HashMap::with_capacity(sealed.len());
        let (mut damaged, mut version, mut unsealed, mut foreign, mut replayed) = (0, 0, 0, 0, 0);
        for bytes in &sealed {
            let record = match Record::open(bytes, &keys) {
                Ok(record) if record.relay_address.to_string() == self.hello.relay_address => record,
                Ok(_) => {
                    foreign += 1;
                    continue;
                }
                Err(RecordError::Seal) => {
                    unsealed += 1;
                    continue;
                }
                Err(RecordError::Version(_)) => {
                    version += 1;
                    continue;
                }
                Err(_) => {
                    damaged += 1;
                    continue;
                }
            };
            // Each has one key of its own: a second one was put under another's.
            match newest.get_mut(&record.id) {
                None => drop(newest.insert(record.id, record)),
                Some(known) => {
                    replayed += 1;
                    if record.supersedes(known.epoch, known.sequence) {
                        *known = record;
                    }
                }
            }
        }
        let refused = [
            (Refusal::Damaged, damaged),
            (Refusal::Version, version),
            (Refusal::Seal, unsealed),
            (Refusal::Foreign, foreign),
            (Refusal::Replayed, replayed),
        ];
        count(Source::Store, &refused);
        if newest.len() < sealed.len() {
            tracing::warn!(damaged, version, unsealed, foreign, replayed, "records in the store are left out");
        }
        Ok(newest.into_values().collect())
    }

    /// The first session after the start: reads what the store has beyond the journal, and gives it to `dataplane`. What
    /// clients made or changed meanwhile stays as it is.
    pub(super) async fn merge_late(&mut self, connection: &Connection, dataplane: &Dataplane) -> Result<(), Lost> {
        if self.unmerged.is_none() {
            return Ok(());
        }
        let stored = timeout(READ.1, self.read(connection, Some(dataplane))).await;
        let mut stored = stored.map_err(|_| Lost::Silent(READ.1))??;
        let Some(unmerged) = self.unmerged.take() else {
            return Ok(());
        };
        if unmerged.ownership() == Ownership::Interrupted {
            let named: HashSet<AllocationId> = stored.iter().map(|record| record.id).collect();
            // What its client has used since is alive, whoever else may have had it.
            let unused = |record: &Record| {
                unmerged.journal.get(&record.id).is_some_and(|(_, sequence)| *sequence == record.sequence)
            };
            let live = dataplane.records().await;
            let unnamed: Vec<_> = live.iter().filter(|record| unused(record) && !named.contains(&record.id)).collect();
            unnamed.iter().for_each(|record| dataplane.revoke(record.id));
            count(Source::Journal, &[(Refusal::Unnamed, unnamed.len() as u64)]);
        }
        stored.retain(|record| {
            unmerged.journal.get(&record.id).is_none_or(|(epoch, sequence)| record.supersedes(*epoch, *sequence))
        });
        metrics::restored(Source::Store, stored.len());
        if !stored.is_empty() {
            tracing::info!(restored = stored.len(), "allocations of the store that were not in the journal");
            dataplane.restore(stored);
        }
        self.merged();
        Ok(())
    }

    /// The store has been asked.
    fn merged(&mut self) {
        self.unmerged = None;
        self.state.restored();
        self.configure();
    }
}

/// Those of `stored` that the journal does not know, or not as new.
fn newer<'a>(stored: &'a [Record], journal: &Loaded) -> impl Iterator<Item = &'a Record> {
    let known: HashMap<AllocationId, (u64, u64)> =
        journal.records.iter().map(|record| (record.id, (record.epoch, record.sequence))).collect();
    stored.iter().filter(move |record| {
        known.get(&record.id).is_none_or(|(epoch, sequence)| record.supersedes(*epoch, *sequence))
    })
}

fn count(source: Source, refused: &[(Refusal, u64)]) {
    for (reason, count) in refused {
        metrics::refused(source, *reason, *count);
    }
}

#[cfg(test)]
mod tests {
    use turn_core::EndReason;

    use super::*;
    use crate::sample;

    fn record(id: u8, epoch: u64, sequence: u64) -> Record {
        let relayed = ([127, 0, 0, 1], 50_000 + u16::from(id)).into();
        Record { epoch, sequence, ..sample::record(AllocationId([id; 16]), relayed, 1) }
    }

    fn end(id: u8) -> Change {
        Change::End { id: AllocationId([id; 16]), epoch: 2, sequence: 9, reason: EndReason::Deleted }
    }

    #[test]
    fn who_owned_the_address_decides_who_is_right() {
        let journal = || Loaded {
            records: vec![record(1, 2, 5), record(2, 2, 5), record(3, 2, 5)],
            ended: vec![end(4)],
            ..Loaded::default()
        };
        // Newer than the journal, older than it, ended there, and only stored.
        let stored = || vec![record(1, 3, 1), record(2, 2, 4), record(4, 2, 8), record(5, 2, 1)];
        type Case = (&'static str, Option<Vec<Record>>, Ownership, &'static [(u8, u64, u64)], [u64; 2], usize);
        let cases: [Case; 3] = [
            ("no store", None, Ownership::Continued, &[(1, 2, 5), (2, 2, 5), (3, 2, 5)], [0, 0], 1),
            (
                "nobody else",
                Some(stored()),
                Ownership::Continued,
                &[(1, 3, 1), (2, 2, 5), (3, 2, 5), (5, 2, 1)],
                [0, 1],
                1,
            ),
            (
                "somebody else",
                Some(stored()),
                Ownership::Interrupted,
                &[(1, 3, 1), (2, 2, 5), (4, 2, 8), (5, 2, 1)],
                [1, 0],
                0,
            ),
        ];
        for (what, stored, ownership, expected, [unnamed, over], ended) in cases {
            let merged = merge(journal(), stored, ownership);
            let mut live: Vec<_> = merged.records.iter().map(|r| (r.id.0[0], r.epoch, r.sequence)).collect();
            live.sort_unstable();
            assert_eq!(live, expected, "{what}");
            assert_eq!(merged.refused, [(Refusal::Unnamed, unnamed), (Refusal::Ended, over)], "{what}");
            assert_eq!((merged.ended.len(), merged.refused()), (ended, unnamed + over), "{what}");
        }
    }
}
