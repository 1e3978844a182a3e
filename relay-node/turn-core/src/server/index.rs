//! An index into the allocations that keeps no keys: those are in the allocations already. 8 bytes an entry, so that what
//! an idle allocation costs is itself, and a lookup that hits touches the index once and then the allocation it is for.

use hashbrown::HashTable;

use super::table::Slot;

/// Slots by a hash of one of their names. An allocation with two names of a kind has two entries.
#[derive(Default)]
pub(super) struct Index(HashTable<(u32, Slot)>);

impl Index {
    /// The slot whose name this is; `is` tells it from others with the same hash.
    pub(super) fn find(&self, hash: u64, is: impl Fn(Slot) -> bool) -> Option<Slot> {
        let short = shorten(hash);
        let found = self.0.find(spread(short), |(known, slot)| *known == short && is(*slot));
        found.map(|(_, slot)| *slot)
    }

    /// Adds a name that no slot has.
    pub(super) fn insert(&mut self, hash: u64, slot: Slot) {
        let short = shorten(hash);
        self.0.insert_unique(spread(short), (short, slot), |(known, _)| spread(*known));
    }

    /// Takes a name from a slot; nothing if it has none of this hash.
    pub(super) fn remove(&mut self, hash: u64, slot: Slot) {
        let short = shorten(hash);
        if let Ok(entry) = self.0.find_entry(spread(short), |known| *known == (short, slot)) {
            entry.remove();
        }
    }

    /// How many names there are.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

/// What is kept of a hash, to tell most others apart without a look at their allocations, and to grow without any.
fn shorten(hash: u64) -> u32 {
    (hash ^ hash >> 32) as u32
}

/// The table takes its places from the low bits and its tags from the high ones.
fn spread(short: u32) -> u64 {
    u64::from(short).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_same_hash_are_told_apart() {
        let mut index = Index::default();
        for slot in 0..100 {
            index.insert(u64::from(slot % 7), Slot(slot));
        }
        for slot in 0..100 {
            assert_eq!(index.find(u64::from(slot % 7), |found| found == Slot(slot)), Some(Slot(slot)));
            assert_eq!(index.find(u64::from(slot % 7 + 1), |found| found == Slot(slot)), None);
        }
        index.remove(3, Slot(3));
        index.remove(3, Slot(4));
        assert_eq!(index.find(3, |found| found == Slot(3)), None);
        assert_eq!(index.find(3, |found| found == Slot(10)), Some(Slot(10)));
        assert_eq!(index.len(), 99);
    }
}
