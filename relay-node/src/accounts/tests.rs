use std::collections::HashMap;

use super::*;

const NOW: u64 = 1_700_000_000_000;

fn id(number: u64) -> AllocationId {
    AllocationId::new(number, [number as u8; 10])
}

fn open(directory: &Path) -> Accounts {
    Accounts::open(directory, 100, true).expect("opened")
}

/// Bytes to peers, by allocation, of what lives.
fn live(accounts: &Accounts) -> HashMap<AllocationId, u64> {
    accounts.live(0, 1).map(|usage| (usage.id, usage.totals.bytes_to_peer)).collect()
}

#[test]
fn each_direction_is_counted_and_so_is_what_other_threads_add() {
    let directory = tempfile::tempdir().expect("a directory");
    let accounts = open(directory.path());
    let account = accounts.take(id(1), b"alice", false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| (0..10_000).for_each(|_| accounts.add(account.crossed(), Direction::ToClient, 1, 7)));
        }
        (0..10_000).for_each(|_| accounts.add(account, Direction::ToClient, 1, 5));
        accounts.add(account, Direction::ToPeer, 2, 100);
    });
    let usage = accounts.live(0, 1).next().expect("one");
    let expected = Totals {
        packets_to_peer: 2,
        bytes_to_peer: 100,
        packets_to_client: 40_000,
        bytes_to_client: 10_000 * (3 * 7 + 5),
    };
    assert_eq!((usage.totals, usage.continued, usage.unclean), (expected, false, false));
    assert_eq!(accounts.user(&usage), b"alice");
}

#[test]
fn what_was_counted_goes_on_after_a_kill() {
    let directory = tempfile::tempdir().expect("a directory");
    let first = open(directory.path());
    let (alice, bob, eve) = (first.take(id(1), b"alice", false), first.take(id(2), b"bob", false), id(3));
    first.take(eve, b"eve", false);
    first.add(alice, Direction::ToPeer, 1, 100);
    first.add(bob, Direction::ToPeer, 1, 50);
    first.end(id(2), EndReason::Deleted, NOW);
    // The process is killed: nothing is closed.
    std::mem::forget(first);

    let second = open(directory.path());
    let alice = second.take(id(1), b"alice", true);
    second.add(alice, Direction::ToPeer, 1, 11);
    assert_eq!(live(&second), HashMap::from([(id(1), 111), (eve, 0)]));
    let ended = second.ended(NOW, 9);
    assert_eq!((ended.len(), ended[0].totals.bytes_to_peer, ended[0].unclean), (1, 50, false));
    assert_eq!(ended[0].ended, Some(Ended { reason: Some(EndReason::Deleted), at: NOW }));
    assert_eq!(second.user(&ended[0]), b"bob");
    assert!(second.ended(NOW - 1, 9).is_empty(), "it has not settled");

    // Nobody went on with eve's.
    second.end_unclaimed(NOW + 1);
    let ended = second.ended(NOW + 1, 9);
    assert_eq!(ended.iter().map(|usage| usage.id).collect::<Vec<_>>(), [id(2), eve]);
    assert_eq!(ended[1].ended, Some(Ended { reason: None, at: NOW + 1 }));
    ended.iter().for_each(|usage| second.forget(usage.index, usage.origin));
    assert!(second.ended(u64::MAX, 9).is_empty());
    assert_eq!(live(&second), HashMap::from([(id(1), 111)]));
}

#[test]
fn a_restored_allocation_without_its_row_is_a_continuation() {
    let directory = tempfile::tempdir().expect("a directory");
    let accounts = open(directory.path());
    accounts.take(id(1), b"alice", true);
    assert!(accounts.live(0, 1).all(|usage| usage.continued));
}

#[test]
fn a_machine_that_went_down_leaves_nothing_that_could_count_too_much() {
    for stopped in [false, true] {
        let directory = tempfile::tempdir().expect("a directory");
        let first = open(directory.path());
        let alice = first.take(id(1), b"alice", false);
        first.add(alice, Direction::ToPeer, 1, 100);
        first.take(id(2), b"bob", false);
        first.end(id(2), EndReason::Expired, NOW);
        let origin = first.live(0, 1).next().expect("alice's").origin;
        if stopped {
            first.close();
        }
        // Another start of the machine.
        let header = first.rows.get(0).expect("a header");
        let complete = row::header(header).expect("read").complete;
        assert_eq!(complete, stopped);
        row::begin(header, Header { boot: 1, complete });
        drop(first);

        let second = open(directory.path());
        second.take(id(1), b"alice", true);
        let usage = second.live(0, 1).next().expect("alice's");
        assert_eq!((usage.origin == origin, usage.totals.bytes_to_peer), (stopped, if stopped { 100 } else { 0 }));
        assert_eq!(usage.continued, !stopped);
        assert_eq!(second.ended(NOW, 9)[0].unclean, !stopped, "some of it may not have reached the disk");
    }
}

#[test]
fn who_ended_is_not_charged_whatever_comes_late() {
    let directory = tempfile::tempdir().expect("a directory");
    let accounts = Accounts::open(directory.path(), 100, false).expect("opened");
    let account = accounts.take(id(1), b"alice", false);
    accounts.end(id(1), EndReason::Deleted, NOW);
    let other = accounts.take(id(2), b"bob", false);
    assert_eq!(account.index(), other.index(), "the row is used again");
    accounts.add(account, Direction::ToPeer, 1, 100);
    accounts.add(AccountId::NONE, Direction::ToPeer, 1, 100);
    assert_eq!(live(&accounts), HashMap::from([(id(2), 0)]));
    assert!(accounts.ended(u64::MAX, 9).is_empty(), "nobody is to be told");
}

#[test]
fn there_is_room_for_as_many_as_there_may_be_and_then_the_oldest_end_goes() {
    let directory = tempfile::tempdir().expect("a directory");
    let accounts = open(directory.path());
    let most = u64::from(2 * 100 + STEP - 1);
    for number in 0..most {
        assert_ne!(accounts.take(id(number), b"x", false), AccountId::NONE);
        if number < 2 {
            accounts.end(id(number), EndReason::Closed, NOW + number);
        }
    }
    assert_ne!(accounts.take(id(most), b"x", false), AccountId::NONE);
    assert_eq!(accounts.ended(u64::MAX, 9).iter().map(|usage| usage.id).collect::<Vec<_>>(), [id(1)]);
    assert_ne!(accounts.take(id(most + 1), b"x", false), AccountId::NONE);
    assert_eq!((accounts.take(id(most + 2), b"x", false), accounts.lost()), (AccountId::NONE, 3));
}

#[test]
fn damaged_files_are_begun_anew_and_so_are_those_of_another_version() {
    for (what, offset) in [("header", 0), ("a row", ROW as u64 + 8)] {
        let directory = tempfile::tempdir().expect("a directory");
        let accounts = open(directory.path());
        let account = accounts.take(id(1), b"alice", false);
        accounts.add(account, Direction::ToPeer, 1, 100);
        drop(accounts);
        let file = OpenOptions::new().write(true).open(directory.path().join("rows")).expect("there");
        file.write_all_at(&[0xA5; 8], offset).expect("written");
        let accounts = open(directory.path());
        assert!(live(&accounts).is_empty(), "{what}");
        assert_ne!(accounts.take(id(1), b"alice", false), AccountId::NONE);
    }
}

#[test]
fn without_a_disk_it_counts_in_memory() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("file");
    std::fs::write(&file, b"").expect("written");
    // A file where the directory should be.
    let accounts = open(&file);
    let account = accounts.take(id(1), &[b'x'; 600], false);
    accounts.add(account, Direction::ToPeer, 1, 100);
    let usage = accounts.live(0, 1).next().expect("one");
    assert_eq!((usage.totals.bytes_to_peer, accounts.user(&usage).len()), (100, LONGEST_NAME));
}

#[test]
fn no_name_is_taken_for_that_of_the_next_allocation() {
    let directory = tempfile::tempdir().expect("a directory");
    // In the row, and where it is too long for that beside it.
    for length in [5, row::SHORT_NAME, row::SHORT_NAME + 1, LONGEST_NAME, 0] {
        let name = vec![b'a'; length];
        let accounts = open(directory.path());
        accounts.take(id(1), &name, false);
        let usage = accounts.live(0, 1).next().expect("one");
        assert_eq!(accounts.user(&usage), name);
        let other = Usage { origin: usage.origin ^ 1, ..usage.clone() };
        assert_eq!(accounts.user(&other), b"", "of another row at this place");
        drop(accounts);
        let accounts = open(directory.path());
        assert_eq!(accounts.user(&usage), name, "after a kill");
        assert_eq!(accounts.take(id(1), b"", true).index(), usage.index);
        accounts.end(id(1), EndReason::Deleted, 1);
        accounts.forget(usage.index, usage.origin);
    }
}
