use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::sample;

/// 600 s, the default lifetime, in ms.
const LIFETIME: u64 = 600_000;

fn record(n: u8, sequence: u64, expires_at: u64) -> Record {
    let record = sample::record(AllocationId([n; 16]), ([192, 0, 2, n], 50_000).into(), 0);
    Record { sequence, expires_at, ..record }
}

fn put(record: Record) -> Change {
    Change::Put(Box::new(record))
}

fn end(n: u8, sequence: u64) -> Change {
    Change::End { id: AllocationId([n; 16]), epoch: 1, sequence, reason: EndReason::Deleted }
}

/// A reporter whose first resync, of these records, is over and acknowledged.
fn settled(records: Vec<Record>, now: u64) -> Reporter {
    let mut reporter = Reporter::default();
    reporter.connected();
    let generation = reporter.wants_snapshot().expect("a session begins with a resync");
    assert!(reporter.snapshot(generation, records));
    let bodies = drain(&mut reporter, now, true);
    assert!(matches!(bodies.first(), Some(Body::ResyncBegin(_))));
    assert!(matches!(bodies.last(), Some(Body::ResyncEnd(_))));
    reporter
}

/// Everything that leaves, acknowledged at once.
fn drain(reporter: &mut Reporter, now: u64, flush: bool) -> Vec<Body> {
    let mut bodies = Vec::new();
    while let Some(body) = reporter.next(now, &KeyRing::default(), flush) {
        match &body {
            Body::Records(batch) => reporter.acknowledged(batch.batch_id),
            Body::ResyncEnd(end) => reporter.acknowledged(end.batch_id),
            _ => {}
        }
        bodies.push(body);
    }
    bodies
}

fn changes(bodies: &[Body]) -> Vec<&v1::RecordChange> {
    let batches = bodies.iter().filter_map(|body| match body {
        Body::Records(batch) => Some(&batch.changes),
        _ => None,
    });
    batches.flatten().collect()
}

#[test]
fn changes_of_one_allocation_become_one() {
    let mut reporter = settled(Vec::new(), 0);
    reporter.note(put(record(1, 1, LIFETIME)), 0);
    let mut permitted = record(1, 2, LIFETIME);
    permitted.permissions.push(([9, 9, 9, 9].into(), 300_000));
    reporter.note(put(permitted), 0);
    reporter.note(put(record(2, 1, LIFETIME)), 0);
    reporter.note(end(2, 2), 0);
    assert!(reporter.next(0, &KeyRing::default(), false).is_none(), "a part of a batch waits for the flush");
    let bodies = drain(&mut reporter, 0, true);
    let told: Vec<_> = changes(&bodies).iter().map(|c| (c.allocation_id[0], c.sequence, c.ended)).collect();
    assert_eq!(told, [(1, 2, 0), (2, 2, v1::EndReason::Deleted as i32)]);
}

#[test]
fn full_batches_do_not_wait_and_few_are_in_flight() {
    let mut reporter = settled(Vec::new(), 0);
    let all = u16::try_from(BATCH * (IN_FLIGHT + 2)).expect("small");
    for n in 0..all {
        let mut one = record(1, 1, LIFETIME);
        one.id.0[..2].copy_from_slice(&n.to_be_bytes());
        reporter.note(put(one), 0);
    }
    let sent: Vec<_> = std::iter::from_fn(|| reporter.next(0, &KeyRing::default(), false)).collect();
    assert_eq!(sent.len(), IN_FLIGHT);
    assert_eq!(reporter.backlog(), (2 * BATCH, IN_FLIGHT));
    let Body::Records(second) = &sent[1] else { panic!("a batch") };
    assert_eq!(second.changes.len(), BATCH);
    reporter.acknowledged(second.batch_id);
    assert_eq!(reporter.backlog(), (2 * BATCH, IN_FLIGHT - 2));
    assert_eq!(drain(&mut reporter, 0, false).len(), 2);
}

#[test]
fn mere_refreshes_are_told_once_per_half_lifetime() {
    let mut reporter = settled(vec![record(1, 1, LIFETIME)], 0);
    // The client refreshes each 100 s; the store hears of it at 300 s, half of what it knew.
    let mut told = Vec::new();
    for second in 1..=1200_u64 {
        let now = second * 1000;
        if second.is_multiple_of(100) {
            reporter.note(put(record(1, 1 + second / 100, now + LIFETIME)), now);
        }
        if !drain(&mut reporter, now, true).is_empty() {
            told.push(second);
        }
    }
    assert_eq!(told, [300, 600, 900, 1200]);
}

#[test]
fn the_shortest_deadline_that_moved_decides() {
    let with_permission = |sequence, until| {
        let mut record = record(1, sequence, LIFETIME);
        record.permissions.push(([9, 9, 9, 9].into(), until));
        record
    };
    let mut reporter = settled(vec![with_permission(1, 300_000)], 0);
    reporter.note(put(with_permission(2, 310_000)), 10_000);
    assert!(drain(&mut reporter, 149_999, true).is_empty());
    assert_eq!(changes(&drain(&mut reporter, 150_000, true)).len(), 1);
}

#[test]
fn what_is_more_than_time_is_told_at_once() {
    type Alter = fn(&mut Record);
    let cases: &[(&str, Alter)] = &[
        ("a permission", |r| r.permissions.push(([9, 9, 9, 9].into(), 1))),
        ("a channel", |r| r.channels.push((0x4000, turn_core::PeerAddr::new(([9, 9, 9, 9], 9).into()), 1))),
        ("a shorter lifetime", |r| r.expires_at = LIFETIME / 2),
        ("another epoch", |r| r.epoch = 2),
    ];
    for (what, alter) in cases {
        let mut reporter = settled(vec![record(1, 1, LIFETIME)], 0);
        // Something is deferred already, and must not hold the news back.
        reporter.note(put(record(1, 2, LIFETIME + 1000)), 1000);
        assert!(drain(&mut reporter, 1000, true).is_empty(), "{what}");
        let mut news = record(1, 3, LIFETIME + 1000);
        alter(&mut news);
        reporter.note(put(news), 1000);
        assert_eq!(changes(&drain(&mut reporter, 1000, true)).len(), 1, "{what}");
        assert!(drain(&mut reporter, LIFETIME, true).is_empty(), "{what}: there is nothing more to say");
    }
}

#[test]
fn an_end_that_overtakes_the_snapshot_stays_an_end() {
    let mut reporter = Reporter::default();
    reporter.connected();
    let generation = reporter.wants_snapshot().expect("wanted");
    assert_eq!(reporter.wants_snapshot(), None, "asked for once");
    reporter.note(end(1, 5), 0);
    assert!(reporter.next(0, &KeyRing::default(), true).is_none(), "nothing leaves before the snapshot");
    assert!(reporter.snapshot(generation, vec![record(1, 4, LIFETIME), record(2, 1, LIFETIME)]));
    let bodies = drain(&mut reporter, 0, true);
    let told: Vec<_> = changes(&bodies).iter().map(|c| (c.allocation_id[0], c.record.is_empty())).collect();
    assert_eq!(told, [(1, true), (2, Record::seal(&record(2, 1, LIFETIME), &KeyRing::default()).is_empty())]);
}

#[test]
fn what_the_snapshot_has_newer_is_not_told_again() {
    let mut reporter = settled(vec![record(1, 4, LIFETIME)], 0);
    // It was on its way when the records were gathered.
    let mut older = record(1, 3, LIFETIME);
    older.permissions.push(([9, 9, 9, 9].into(), 1));
    reporter.note(put(older), 0);
    assert!(drain(&mut reporter, LIFETIME, true).is_empty());
}

#[test]
fn a_resync_forgets_what_ended_unheard() {
    let mut reporter = settled(vec![record(1, 1, LIFETIME), record(2, 1, LIFETIME)], 0);
    reporter.want_resync();
    let generation = reporter.wants_snapshot().expect("wanted");
    reporter.snapshot(generation, vec![record(2, 1, LIFETIME)]);
    assert_eq!(changes(&drain(&mut reporter, 0, true)).len(), 1);
    assert_eq!(reporter.session.expect("open").told.len(), 1);
}

#[test]
fn overflow_becomes_a_resync() {
    let mut reporter = settled(Vec::new(), 0);
    for n in 0..=u32::try_from(ROOM).expect("small") {
        let mut one = record(1, 1, LIFETIME);
        one.id.0[..4].copy_from_slice(&n.to_be_bytes());
        reporter.note(put(one), 0);
    }
    assert_eq!(reporter.backlog().0, 0);
    let generation = reporter.wants_snapshot().expect("what did not fit is restated");
    reporter.want_resync();
    let second = reporter.wants_snapshot().expect("and again");
    assert!(!reporter.snapshot(generation, Vec::new()), "a snapshot from before the second overflow is of no use");
    assert!(reporter.snapshot(second, Vec::new()));
}

#[test]
fn without_a_session_nothing_is_kept() {
    let mut reporter = settled(vec![record(1, 1, LIFETIME)], 0);
    reporter.note(end(1, 2), 0);
    reporter.disconnected();
    reporter.note(put(record(2, 1, LIFETIME)), 0);
    assert_eq!(reporter.backlog(), (0, 0));
    assert_eq!(reporter.next(0, &KeyRing::default(), true), None);
    assert_eq!(reporter.wants_snapshot(), None);
}

#[derive(Clone, Debug)]
enum Step {
    Create(u8),
    Refresh(u8),
    Permit(u8),
    End(u8),
    /// Milliseconds pass; what is due leaves; the oldest message that is under way is stored and acknowledged, or not.
    Tick {
        ms: u64,
        is_acknowledged: bool,
    },
    /// A full queue between workers and reporter.
    Lose,
    Reconnect,
    Gather,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..6u8).prop_map(Step::Create),
        6 => (0..6u8).prop_map(Step::Refresh),
        3 => (0..6u8).prop_map(Step::Permit),
        3 => (0..6u8).prop_map(Step::End),
        10 => (1..60_000u64, any::<bool>()).prop_map(|(ms, is_acknowledged)| Step::Tick { ms, is_acknowledged }),
        1 => Just(Step::Lose),
        1 => Just(Step::Reconnect),
        4 => Just(Step::Gather),
    ]
}

/// What a controller keeps: the version told last of each allocation, and which ones a resync has named.
#[derive(Default)]
struct Store {
    live: BTreeMap<u8, u64>,
    named: Option<Vec<u8>>,
}

impl Store {
    fn apply(&mut self, body: &Body) {
        match body {
            Body::ResyncBegin(_) => self.named = Some(Vec::new()),
            Body::ResyncEnd(_) => {
                if let Some(named) = self.named.take() {
                    self.live.retain(|n, _| named.contains(n));
                }
            }
            Body::Records(batch) => {
                for change in &batch.changes {
                    let n = change.allocation_id[0];
                    if let Some(named) = &mut self.named {
                        named.push(n);
                    }
                    if change.ended == v1::EndReason::Unspecified as i32 {
                        let before = self.live.insert(n, change.sequence);
                        assert!(before.is_none_or(|before| before <= change.sequence), "an older record came later");
                    } else {
                        self.live.remove(&n);
                    }
                }
            }
            _ => {}
        }
    }
}

proptest! {
    /// Whatever happens: once things are quiet the store holds what lives, no record of a live allocation runs out in
    /// it, and an allocation id never comes back after its end.
    #[test]
    fn the_store_ends_with_the_truth(steps in proptest::collection::vec(step(), 1..120)) {
        let mut now = 1_000_000;
        let mut sequence = 0;
        let mut truth: BTreeMap<u8, Record> = BTreeMap::new();
        let mut store = Store::default();
        let mut reporter = Reporter::default();
        let mut gathered: Option<(u64, Vec<Record>)> = None;
        reporter.connected();
        let mut under_way: VecDeque<Body> = VecDeque::new();
        for step in steps {
            sequence += 1;
            match step {
                Step::Create(n) if !truth.contains_key(&n) => {
                    let new = record(n, sequence, now + LIFETIME);
                    truth.insert(n, new.clone());
                    reporter.note(put(new), now);
                }
                Step::Refresh(n) => if let Some(known) = truth.get_mut(&n) {
                    known.sequence = sequence;
                    known.expires_at = now + LIFETIME;
                    reporter.note(put(known.clone()), now);
                },
                Step::Permit(n) => if let Some(known) = truth.get_mut(&n) {
                    known.sequence = sequence;
                    known.permissions.push(([9, 9, 9, 9].into(), now + LIFETIME / 2));
                    reporter.note(put(known.clone()), now);
                },
                Step::End(n) => if truth.remove(&n).is_some() {
                    reporter.note(end(n, sequence), now);
                },
                Step::Tick { ms, is_acknowledged } => {
                    now += ms;
                    while let Some(body) = reporter.next(now, &KeyRing::default(), true) {
                        under_way.push_back(body);
                    }
                    if is_acknowledged && let Some(body) = under_way.pop_front() {
                        store.apply(&body);
                        match body {
                            Body::Records(batch) => reporter.acknowledged(batch.batch_id),
                            Body::ResyncEnd(end) => reporter.acknowledged(end.batch_id),
                            _ => {}
                        }
                    }
                }
                Step::Lose => {
                    // A change that the reporter never hears of.
                    if let Some((n, _)) = truth.pop_first() {
                        prop_assert!(n < 6);
                    }
                    reporter.want_resync();
                }
                Step::Reconnect => {
                    reporter.disconnected();
                    under_way.clear();
                    store.named = None;
                    reporter.connected();
                }
                Step::Gather => match gathered.take() {
                    Some((generation, records)) => { reporter.snapshot(generation, records); }
                    None => if let Some(generation) = reporter.wants_snapshot() {
                        gathered = Some((generation, truth.values().cloned().collect()));
                    },
                },
                Step::Create(_) => {}
            }
        }
        // Quiet: the snapshot under way comes in, everything is acknowledged.
        if let Some((generation, records)) = gathered {
            reporter.snapshot(generation, records);
        }
        if let Some(generation) = reporter.wants_snapshot() {
            reporter.snapshot(generation, truth.values().cloned().collect());
        }
        for body in under_way {
            store.apply(&body);
        }
        reporter.acknowledged(u64::MAX);
        for body in drain(&mut reporter, now, true) {
            store.apply(&body);
        }
        prop_assert_eq!(store.live.keys().collect::<Vec<_>>(), truth.keys().collect::<Vec<_>>());
        // What was deferred leaves in time: by half a lifetime everything is told as it is.
        for body in drain(&mut reporter, now + LIFETIME / 2, true) {
            store.apply(&body);
        }
        let told: Vec<_> = store.live.iter().map(|(n, sequence)| (*n, *sequence)).collect();
        let true_now: Vec<_> = truth.values().map(|r| (r.id.0[0], r.sequence)).collect();
        prop_assert_eq!(told, true_now);
        prop_assert_eq!(reporter.backlog(), (0, 0));
    }
}
