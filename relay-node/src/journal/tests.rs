//! The format and its damage, succession, compaction, bounds, and disks that take nothing.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use turn_core::{AllocationId, Change, EndReason, KeyRing, Record, WorkerId};

use super::*;
use crate::sample;

fn record(id: u8, epoch: u64, sequence: u64) -> Record {
    Record { epoch, sequence, ..sample::record(AllocationId([id; 16]), ([127, 0, 0, 1], 50_000).into(), 1) }
}

fn put(id: u8, epoch: u64, sequence: u64) -> Change {
    Change::Put(Box::new(record(id, epoch, sequence)))
}

fn end(id: u8, epoch: u64, sequence: u64) -> Change {
    Change::End { id: AllocationId([id; 16]), epoch, sequence, reason: EndReason::Deleted }
}

/// (id, sequence) of every record, by id.
fn loaded(directory: &Path) -> (Vec<(u8, u64)>, Refused) {
    let loaded = load(directory, &KeyRing::default()).expect("readable");
    let mut records: Vec<_> = loaded.records.iter().map(|record| (record.id.0[0], record.sequence)).collect();
    records.sort_unstable();
    (records, loaded.refused)
}

fn ended(directory: &Path) -> Vec<u8> {
    let loaded = load(directory, &KeyRing::default()).expect("readable");
    let id = |change: &Change| match change {
        Change::End { id, .. } => id.0[0],
        Change::Put(_) => panic!("a record among the ends"),
    };
    let mut ended: Vec<u8> = loaded.ended.iter().map(id).collect();
    ended.sort_unstable();
    ended
}

fn is_whole(directory: &Path) -> bool {
    load(directory, &KeyRing::default()).expect("readable").whole
}

fn write(journal: &mut Journal, changes: &[Change]) {
    let now = Instant::now();
    changes.iter().for_each(|change| journal.append(change, now));
    journal.commit(now);
}

fn begin(directory: &Path, workers: u16) -> Arc<Succession> {
    Succession::begin(directory, workers, Arc::new(Ends::new(true))).expect("readable")
}

fn open(succession: &Arc<Succession>, worker: u16, records: &[Record]) -> Journal {
    succession.open(WorkerId(worker), records.iter().cloned(), Instant::now())
}

const DAMAGED: Refused = Refused { damaged: 1, version: 0 };
const INTACT: Refused = Refused { damaged: 0, version: 0 };

#[test]
fn the_newest_of_all_files_wins_and_tombstones_end() -> io::Result<()> {
    let directory = tempfile::tempdir()?;
    let directory = directory.path().join("journal");
    let nothing = load(&directory, &KeyRing::default())?;
    assert!(nothing.files == 0 && !nothing.whole, "there is no directory");
    let succession = begin(&directory, 2);
    let mut first = open(&succession, 0, &[]);
    assert!(!is_whole(&directory), "one of two");
    let mut second = open(&succession, 1, &[]);
    assert!(is_whole(&directory));
    write(&mut first, &[put(1, 1, 1), put(2, 1, 1), put(1, 1, 2), put(3, 1, 1), end(3, 1, 2), end(4, 2, 1)]);
    // Another worker's file, older and newer than the first: by (epoch, sequence), never by place.
    write(
        &mut second,
        &[put(1, 1, 1), put(2, 2, 7), put(2, 1, 9), put(3, 1, 1), put(4, 1, 9), end(5, 1, 1), put(5, 2, 1)],
    );
    assert_eq!(loaded(&directory), (vec![(1, 2), (2, 7), (5, 1)], INTACT));
    assert_eq!(ended(&directory), [3, 4]);
    assert_eq!(load(&directory, &KeyRing::default())?.files, 2);
    Ok(())
}

#[test]
fn a_torn_tail_is_normal_and_damage_costs_one_entry() -> io::Result<()> {
    let directory = tempfile::tempdir()?;
    let mut journal = open(&begin(directory.path(), 1), 0, &[]);
    write(&mut journal, &[put(1, 1, 1)]);
    let first = fs::read(journal.path())?.len();
    write(&mut journal, &[put(2, 1, 1)]);
    let second = fs::read(journal.path())?.len();
    write(&mut journal, &[put(3, 1, 1)]);
    let whole = fs::read(journal.path())?;
    for cut in 0..whole.len() {
        fs::write(journal.path(), &whole[..cut])?;
        let expected: &[(u8, u64)] = match cut {
            _ if cut < first => &[],
            _ if cut < second => &[(1, 1)],
            _ => &[(1, 1), (2, 1)],
        };
        assert_eq!(loaded(directory.path()), (expected.to_vec(), INTACT), "cut at {cut}");
        assert!(is_whole(directory.path()), "what is torn was never answered");
    }
    let mut damaged = whole.clone();
    damaged[first + ENTRY_HEADER + 3] ^= 1;
    fs::write(journal.path(), &damaged)?;
    assert_eq!(loaded(directory.path()), (vec![(1, 1), (3, 1)], DAMAGED));
    assert!(!is_whole(directory.path()));
    fs::write(journal.path(), b"another file altogether")?;
    assert_eq!(loaded(directory.path()), (vec![], DAMAGED));

    // Of a version to come: the file, and one entry of it.
    let version = Refused { damaged: 0, version: 1 };
    let mut newer = whole.clone();
    newer[HEADER.len() - 1] = 2;
    fs::write(journal.path(), &newer)?;
    assert_eq!(loaded(directory.path()), (vec![], version));
    let mut newer = whole[..second].to_vec();
    newer[first + ENTRY_HEADER] = 2;
    let crc = crc32fast::hash(&newer[first + ENTRY_HEADER..]);
    newer[first + 4..first + 8].copy_from_slice(&crc.to_le_bytes());
    fs::write(journal.path(), &newer)?;
    assert_eq!(loaded(directory.path()), (vec![(1, 1)], version));
    Ok(())
}

#[test]
fn a_new_start_folds_the_old_files_without_a_gap() -> io::Result<()> {
    let directory = tempfile::tempdir()?;
    let directory = directory.path();
    let mut old = open(&begin(directory, 1), 0, &[]);
    write(&mut old, &[put(1, 1, 1), put(2, 1, 1)]);

    let succession = begin(directory, 2);
    assert_eq!(loaded(directory).0, [(1, 1), (2, 1)], "before");
    fs::write(directory.join("0000000001-07.new"), b"of a process that died")?;
    let mut zero = open(&succession, 0, &[record(2, 1, 1)]);
    assert!(old.path().exists() && is_whole(directory));
    let mut one = open(&succession, 1, &[record(1, 1, 1)]);
    assert!(!old.path().exists(), "all stand");
    write(&mut zero, &[put(2, 2, 2)]);
    write(&mut one, &[end(1, 2, 2)]);
    assert_eq!(loaded(directory).0, [(2, 2)]);
    assert_eq!(fs::read_dir(directory)?.count(), 3, "only the new files and the mark");
    Ok(())
}

#[test]
fn compaction_keeps_the_live_records_and_the_ends_the_store_may_not_know() -> io::Result<()> {
    let directory = tempfile::tempdir()?;
    let ends = Arc::new(Ends::new(true));
    let succession = Succession::begin(directory.path(), 1, Arc::clone(&ends))?;
    let mut journal = open(&succession, 0, &[]);
    write(&mut journal, &[put(9, 1, 1), end(9, 1, 2)]);
    let mut sequence = 0;
    while !journal.wants_compaction(Instant::now()) {
        sequence += 1;
        write(&mut journal, &[put(1, 1, sequence)]);
    }
    assert!(journal.length() > 1 << 20);
    journal.compact([record(1, 1, sequence)].into_iter(), Instant::now());
    assert!(!journal.wants_compaction(Instant::now()) && journal.length() < 1000);
    write(&mut journal, &[put(2, 1, 1)]);
    assert_eq!(loaded(directory.path()).0, [(1, sequence), (2, 1)]);
    assert_eq!(ended(directory.path()), [9]);
    ends.settle(Instant::now() + Duration::from_secs(1));
    journal.compact([record(1, 1, sequence)].into_iter(), Instant::now());
    assert!(ended(directory.path()).is_empty());
    Ok(())
}

#[test]
fn a_full_disk_costs_the_journal_and_is_made_good_by_itself() -> io::Result<()> {
    let directory = tempfile::tempdir()?;
    let mut journal = open(&begin(directory.path(), 1), 0, &[]);
    write(&mut journal, &[put(1, 1, 1)]);
    journal.swap_file(OpenOptions::new().write(true).open("/dev/full")?);
    write(&mut journal, &[put(2, 1, 1)]);
    assert!(journal.is_failed() && journal.errors() == 1);
    assert!(!is_whole(directory.path()), "the next start is told");
    write(&mut journal, &[put(3, 1, 1)]);
    assert_eq!(journal.errors(), 1, "nothing is tried before its time");
    assert_eq!(loaded(directory.path()).0, [(1, 1)], "what was whole stays");
    let now = Instant::now();
    assert!(!journal.wants_compaction(now) && journal.wants_compaction(now + Duration::from_secs(2)));
    journal.compact([record(1, 1, 1), record(2, 1, 1), record(3, 1, 1)].into_iter(), now);
    assert_eq!(loaded(directory.path()).0, [(1, 1), (2, 1), (3, 1)]);
    assert!(!journal.is_failed() && is_whole(directory.path()) && !journal.wants_compaction(now));
    Ok(())
}

#[test]
fn a_start_without_room_leaves_the_old_files_until_there_is_some() -> io::Result<()> {
    let directory = tempfile::tempdir()?;
    let directory = directory.path();
    let mut old = open(&begin(directory, 1), 0, &[]);
    write(&mut old, &[put(1, 1, 1)]);
    // Nobody can write a file where a directory is.
    let obstacle = directory.join("0000000002-00.new");
    fs::create_dir(&obstacle)?;
    let mut journal = open(&begin(directory, 1), 0, &[record(1, 1, 1)]);
    assert!(journal.is_failed() && old.path().exists() && !is_whole(directory));
    write(&mut journal, &[put(2, 1, 1)]);
    assert_eq!(loaded(directory).0, [(1, 1)]);
    fs::remove_dir(&obstacle)?;
    journal.compact([record(1, 1, 1), record(2, 1, 1)].into_iter(), Instant::now());
    assert_eq!(loaded(directory).0, [(1, 1), (2, 1)]);
    assert!(!journal.is_failed() && !old.path().exists() && is_whole(directory));
    Ok(())
}

#[test]
fn the_journal_has_a_bound() -> io::Result<()> {
    let directory = tempfile::tempdir()?;
    let succession = Succession::bounded(directory.path(), 2, Arc::new(Ends::new(false)), 2 * 1500)?;
    let mut journal = open(&succession, 0, &[]);
    open(&succession, 1, &[]);
    let mut sequence = 0;
    while !journal.wants_compaction(Instant::now()) {
        sequence += 1;
        write(&mut journal, &[put(1, 1, sequence)]);
    }
    assert!(journal.length() < 1500, "compacted before the bound is reached");
    journal.compact([record(1, 1, sequence)].into_iter(), Instant::now());
    let many: Vec<Change> = (2..20).map(|id| put(id, 1, 1)).collect();
    write(&mut journal, &many);
    assert!(journal.is_failed() && fs::metadata(journal.path())?.len() <= 1500);
    journal.compact((1..20).map(|id| record(id, 1, 1)), Instant::now());
    assert!(journal.is_failed(), "what lives is too much");
    journal.compact((1..3).map(|id| record(id, 1, 1)), Instant::now());
    assert!(!journal.is_failed() && is_whole(directory.path()));
    Ok(())
}
