//! An index that keeps no names: those are where it points to already. 8 bytes an entry, so that what an idle allocation
//! costs is itself, and a lookup that hits touches the index once and then what it is for.

use std::hash::{BuildHasher, Hash};

use hashbrown::HashTable;
use rustc_hash::FxBuildHasher;

/// Places in a list by a hash of their names. What has two names of a kind has two entries.
#[derive(Debug, Default)]
pub struct Index(HashTable<(u32, u32)>);

/// The hash of a name that its owner has chosen: nobody else can look for two with the same one.
pub fn plain_hash(name: &impl Hash) -> u64 {
    FxBuildHasher.hash_one(name)
}

impl Index {
    /// The place whose name this is; `is` tells it from others with the same hash.
    pub fn find(&self, hash: u64, is: impl Fn(u32) -> bool) -> Option<u32> {
        let short = shorten(hash);
        let found = self.0.find(spread(short), |(known, place)| *known == short && is(*place));
        found.map(|(_, place)| *place)
    }

    /// Adds a name that no place has.
    pub fn insert(&mut self, hash: u64, place: u32) {
        let short = shorten(hash);
        self.0.insert_unique(spread(short), (short, place), |(known, _)| spread(*known));
    }

    /// Takes a name from a place; nothing if it has none of this hash.
    pub fn remove(&mut self, hash: u64, place: u32) {
        let short = shorten(hash);
        if let Ok(entry) = self.0.find_entry(spread(short), |known| *known == (short, place)) {
            entry.remove();
        }
    }

    /// How many names there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Gives memory back that so many names do not need.
    pub fn shrink_to(&mut self, names: usize) {
        self.0.shrink_to(names, |(known, _)| spread(*known));
    }
}

/// What is kept of a hash, to tell most others apart without a look at what they are for, and to grow without any.
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
        for place in 0..100 {
            index.insert(u64::from(place % 7), place);
        }
        for place in 0..100 {
            assert_eq!(index.find(u64::from(place % 7), |found| found == place), Some(place));
            assert_eq!(index.find(u64::from(place % 7 + 1), |found| found == place), None);
        }
        index.remove(3, 3);
        index.remove(3, 4);
        assert_eq!(index.find(3, |found| found == 3), None);
        assert_eq!(index.find(3, |found| found == 10), Some(10));
        assert_eq!(index.len(), 99);
        index.shrink_to(0);
        assert_eq!(index.find(3, |found| found == 10), Some(10), "what is there stays");
    }
}
