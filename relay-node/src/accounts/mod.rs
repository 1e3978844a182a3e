//! What the kernel accepted for sending, by allocation and direction (promise P11).
//!
//! Each allocation has a row of counters in a mapped file of the state directory. Workers add to it once the kernel has
//! taken a packet: no system call, no lock, and what was added outlives the process however that ends. The owner's
//! additions and those of other workers (pairs, clients that have moved, TCP allocations) have counters of their own, so
//! that the owner need not pay for atomic additions.
//!
//! | file | what it is |
//! |---|---|
//! | `row` | what the words of a row mean (pure) |
//! | `usage/rows` (state directory) | the rows; the first is the header |
//! | `usage/users` (state directory) | USERNAME of each row that it is too long for, 512 bytes each |
//!
//! A row whose allocation has ended stays until a controller has acknowledged its totals. A damaged row is a free one. No
//! sum covers the counters: each is a word that is written whole, and any of them may lack the last batch.

mod row;

use std::collections::VecDeque;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustc_hash::{FxHashMap, FxHashSet};
use turn_core::index::{Index, plain_hash};
use turn_core::meter::Direction;
use turn_core::{AccountId, AllocationId, EndReason};

pub use self::row::{Ended, Totals};
use self::row::{Flags, Header};
use crate::sys::rows::{ROW, Rows, memory_file};

/// Rows that get their place on the disk at a time.
const STEP: u32 = 1024;
/// Bytes of a name's place: its length, the longest USERNAME (RFC 8489 §14.3), and two of the row's origin, so that no
/// name is taken for that of the next allocation.
const NAME: usize = 512;
const LONGEST_NAME: usize = 508;

/// The accounts of a relay.
#[derive(Debug)]
pub struct Accounts {
    rows: Rows,
    names: File,
    /// Somebody is to be told of what has ended.
    reported: bool,
    /// Allocations that were not counted because there was no room, and ended ones that made room unreported.
    lost: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Rows of allocations that live, by their ids, which stand there.
    by_id: Index,
    /// Those of them that no allocation of this process has asked for yet.
    unclaimed: FxHashSet<AllocationId>,
    /// Rows of allocations that have ended, the oldest end first.
    ended: VecDeque<u32>,
    /// Names that the disk did not take, by row: they are known until the process ends.
    unwritten: FxHashMap<u32, Box<[u8]>>,
    free: Vec<u32>,
    /// Rows that were ever used.
    used: u32,
    most: u32,
    /// Names the next row.
    origin: u64,
}

/// What an allocation has used, as its row says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Usage {
    /// The row.
    pub index: u32,
    /// Names this count of the allocation: there is another one if it has lived on another machine, or without its row.
    pub origin: u64,
    /// The allocation.
    pub id: AllocationId,
    /// What was counted here.
    pub totals: Totals,
    /// The allocation is older than its row.
    pub continued: bool,
    /// The machine stopped under it: some of the count may be lost.
    pub unclean: bool,
    /// Its end, if it has ended.
    pub ended: Option<Ended>,
}

impl Accounts {
    /// Takes over what is in `directory`, or begins anew there, for up to `most` allocations at a time and as many ended
    /// ones. Where the disk takes nothing they are in memory, which is said. Without anybody to be `reported` to, what has
    /// ended is forgotten.
    ///
    /// # Errors
    /// The system has neither disk nor memory for them, or no randomness.
    pub fn open(directory: &Path, most: u32, reported: bool) -> io::Result<Self> {
        let most = most.saturating_mul(2).saturating_add(STEP);
        let opened = open_files(directory).and_then(|files| Self::take_over(files, most, reported));
        opened.or_else(|error| {
            tracing::error!(
                "cannot count in {}: {error}; usage is counted in memory until the next start, check state_dir",
                directory.display()
            );
            Self::take_over((memory_file()?, memory_file()?), most, reported)
        })
    }

    fn take_over((file, names): (File, File), most: u32, reported: bool) -> io::Result<Self> {
        let found = u32::try_from(file.metadata()?.len() / ROW as u64).unwrap_or(u32::MAX);
        // What a larger configuration has left is still to be reported.
        let most = most.max(found);
        let rows = Rows::map(file, most)?;
        rows.reserve(found.max(STEP))?;
        let state = State {
            by_id: Index::default(),
            unclaimed: FxHashSet::default(),
            ended: VecDeque::new(),
            unwritten: FxHashMap::default(),
            free: Vec::new(),
            used: 1,
            most,
            origin: getrandom::u64().map_err(io::Error::other)?,
        };
        let accounts = Self { rows, names, reported, lost: AtomicU64::new(0), state: Mutex::new(state) };
        accounts.read_all(found);
        Ok(accounts)
    }

    /// Sorts what an earlier process has left.
    fn read_all(&self, found: u32) {
        let mut state = self.lock();
        let boot = boot_id();
        let Some(header) = self.rows.get(0) else { return };
        let (known, survived) = match row::header(header) {
            Some(Header { boot: before, complete }) => (found, before == boot || complete),
            // Nothing, or a version that is not known: begin anew.
            None => (0, true),
        };
        row::begin(header, Header { boot, complete: false });
        for index in 1..known {
            let Some(row) = self.rows.get(index) else { break };
            match row::read(row) {
                // The machine went down: how much of the count reached the disk is not known. A controller knows the
                // last checkpoint, and the allocation goes on in another row.
                Some((_, _, _, None)) if !survived => row::free(row),
                Some((id, _, _, None)) => {
                    if self.living(&state, id).is_none() {
                        state.by_id.insert(plain_hash(&id), index);
                        state.unclaimed.insert(id);
                        continue;
                    }
                    row::free(row);
                }
                Some((.., Some(_))) => {
                    if !survived {
                        row::mark_unclean(row);
                    }
                    state.ended.push_back(index);
                    continue;
                }
                None => row::free(row),
            }
            state.free.push(index);
        }
        state.used = known.max(1);
        let at = |index: &u32| self.rows.get(*index).and_then(row::read).and_then(|(.., ended)| Some(ended?.at));
        state.ended.make_contiguous().sort_by_key(at);
    }

    /// The account of an allocation from now on; [`AccountId::NONE`] if there is no room. One that was `restored` goes on
    /// counting in its row, if that is there.
    pub fn take(&self, id: AllocationId, user: &[u8], restored: bool) -> AccountId {
        let mut state = self.lock();
        state.unclaimed.remove(&id);
        if let Some(index) = self.living(&state, id) {
            return self.rows.get(index).map_or(AccountId::NONE, |row| account(index, row::origin(row)));
        }
        let Some(index) = self.free_row(&mut state) else {
            self.lose();
            return AccountId::NONE;
        };
        let origin = state.next_origin();
        let Some(row) = self.rows.get(index) else { return AccountId::NONE };
        state.unwritten.remove(&index);
        if user.len() > row::SHORT_NAME && self.write_name(index, origin, user).is_err() {
            state.unwritten.insert(index, user.into());
        }
        row::open(row, id, origin, if restored { Flags::CONTINUED } else { Flags::NONE }, user);
        state.by_id.insert(plain_hash(&id), index);
        account(index, origin)
    }

    /// The row of an allocation that lives.
    fn living(&self, state: &State, id: AllocationId) -> Option<u32> {
        state.by_id.find(plain_hash(&id), |index| self.rows.get(index).is_some_and(|row| row::is_of(row, id)))
    }

    /// An allocation has ended at that time (Unix ms), and everything it sent has been counted that its worker sent.
    pub fn end(&self, id: AllocationId, reason: EndReason, at: u64) {
        self.finish(&mut self.lock(), id, Ended { reason: Some(reason), at });
    }

    fn finish(&self, state: &mut State, id: AllocationId, ended: Ended) {
        state.unclaimed.remove(&id);
        let Some(index) = self.living(state, id) else { return };
        state.by_id.remove(plain_hash(&id), index);
        let Some(row) = self.rows.get(index) else { return };
        if self.reported {
            row::end(row, ended);
            state.ended.push_back(index);
        } else {
            row::free(row);
            state.free.push(index);
        }
    }

    /// Everything that lives has been restored: what an earlier process counted and nobody goes on with has ended.
    pub fn end_unclaimed(&self, now: u64) {
        let mut state = self.lock();
        for id in std::mem::take(&mut state.unclaimed) {
            self.finish(&mut state, id, Ended { reason: None, at: now });
        }
    }

    /// Adds what the kernel took. Only the worker that has the allocation may add to an account that has not
    /// [crossed](AccountId::crossed).
    pub fn add(&self, account: AccountId, direction: Direction, packets: u64, bytes: u64) {
        // Of an account that has ended since, nothing is found.
        let Some(row) = self.rows.get(account.index()).filter(|row| row::origin(row) as u32 == account.tag()) else {
            return;
        };
        row::add(row, direction, account.has_crossed(), packets, bytes);
    }

    /// What those that live have used: of every `parts` rows the one at `part`.
    pub fn live(&self, part: u32, parts: u32) -> impl Iterator<Item = Usage> {
        let used = self.lock().used;
        let indexes = (1..used).filter(move |index| index % parts.max(1) == part);
        indexes.filter_map(move |index| self.usage(index)).filter(|usage| usage.ended.is_none())
    }

    /// What those have used that ended by this time (Unix ms), the oldest ends first, at most so many.
    pub fn ended(&self, by: u64, most: usize) -> Vec<Usage> {
        let oldest: Vec<u32> = self.lock().ended.iter().take(most).copied().collect();
        let all = oldest.into_iter().filter_map(|index| self.usage(index));
        // Those behind one that has not ended so long are younger, give or take a turn.
        all.take_while(|usage| usage.ended.is_some_and(|ended| ended.at <= by)).collect()
    }

    /// USERNAME of a row's allocation; empty if it cannot be read.
    pub fn user(&self, usage: &Usage) -> Vec<u8> {
        if let Some(row) = self.rows.get(usage.index)
            && row::origin(row) == usage.origin
            && let Some(name) = row::name(row)
        {
            // Another allocation may have got the row meanwhile.
            return if row::origin(row) == usage.origin { name } else { Vec::new() };
        }
        if let Some(name) = self.lock().unwritten.get(&usage.index) {
            return name.to_vec();
        }
        let mut place = [0; NAME];
        if self.names.read_exact_at(&mut place, u64::from(usage.index) * NAME as u64).is_err() {
            return Vec::new();
        }
        let [name @ .., o0, o1] = &place[2..] else { return Vec::new() };
        if u16::from_le_bytes([*o0, *o1]) != usage.origin as u16 {
            return Vec::new();
        }
        let length = usize::from(u16::from_le_bytes([place[0], place[1]]));
        name.get(..length).unwrap_or_default().to_vec()
    }

    /// A controller has the totals of an allocation that has ended.
    pub fn forget(&self, index: u32, origin: u64) {
        let mut state = self.lock();
        let Some(row) = self.rows.get(index).filter(|row| row::origin(row) == origin) else { return };
        // It is among the first.
        if let Some(place) = state.ended.iter().position(|ended| *ended == index) {
            state.ended.remove(place);
            row::free(row);
            state.free.push(index);
        }
    }

    /// Allocations whose usage was not counted, or was given up before anybody was told, for want of room.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Nothing is counted any more: what is there is brought to the disk, and known to be complete after a start of the
    /// machine.
    pub fn close(&self) {
        if let Some(header) = self.rows.get(0)
            && self.rows.sync().is_ok()
        {
            row::begin(header, Header { boot: boot_id(), complete: true });
            // If this does not get there, the count counts as incomplete.
            let _ = self.rows.sync();
        }
    }

    fn usage(&self, index: u32) -> Option<Usage> {
        let row = self.rows.get(index)?;
        let (id, origin, flags, ended) = row::read(row)?;
        let totals = row::totals(row);
        // Another allocation may have got the row meanwhile.
        (row::origin(row) == origin).then(|| Usage {
            index,
            origin,
            id,
            totals,
            continued: flags.has(Flags::CONTINUED),
            unclean: flags.has(Flags::UNCLEAN),
            ended,
        })
    }

    /// A row for another allocation: a free one, a new one, or in need the one that has waited longest for a controller.
    fn free_row(&self, state: &mut State) -> Option<u32> {
        if let Some(index) = state.free.pop() {
            return Some(index);
        }
        let next = state.used;
        let has_room =
            next < self.rows.usable() || self.rows.reserve(state.most.min(next.saturating_add(STEP))).is_ok();
        if has_room && next < self.rows.usable() {
            state.used += 1;
            return Some(next);
        }
        let oldest = state.ended.pop_front()?;
        self.lose();
        row::free(self.rows.get(oldest)?);
        Some(oldest)
    }

    fn write_name(&self, index: u32, origin: u64, user: &[u8]) -> io::Result<()> {
        let user = &user[..user.len().min(LONGEST_NAME)];
        let mut place = [0; NAME];
        place[..2].copy_from_slice(&(user.len() as u16).to_le_bytes());
        place[2..2 + user.len()].copy_from_slice(user);
        place[NAME - 2..].copy_from_slice(&(origin as u16).to_le_bytes());
        // Whole, so that there is a place for each that can be read.
        self.names.write_all_at(&place, u64::from(index) * NAME as u64)
    }

    fn lose(&self) {
        if self.lost.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::error!(
                "no room to count the usage of every allocation: no controller has taken the usage of ended ones for \
                 long, or state_dir is full"
            );
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// A number that no other row has or had (splitmix64).
    fn next_origin(&mut self) -> u64 {
        loop {
            self.origin = self.origin.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut mixed = self.origin;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            mixed ^= mixed >> 31;
            // A free row has no origin, and an account is known by the lower half.
            if mixed as u32 != 0 {
                return mixed;
            }
        }
    }
}

fn account(index: u32, origin: u64) -> AccountId {
    AccountId::new(index, origin as u32)
}

fn open_files(directory: &Path) -> io::Result<(File, File)> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).mode(0o600);
    Ok((options.open(directory.join("rows"))?, options.open(directory.join("users"))?))
}

/// Random per start of the machine; zero where the kernel does not say, which looks as if it had never been stopped.
fn boot_id() -> u128 {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    u128::from_str_radix(&text.trim().replace('-', ""), 16).unwrap_or(0)
}

#[cfg(test)]
mod tests;
