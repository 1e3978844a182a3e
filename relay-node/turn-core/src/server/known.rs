//! Keys of time-limited names that have proved themselves lately, so that the requests which follow one another at the
//! beginning of a call do not each derive them anew. A fixed number, the least used go first (the clock algorithm).
//!
//! Only a request that was authenticated whole, nonce included, puts a name in here: strangers can neither fill this nor
//! push anybody out. A key is as good as it was when it was derived, so the whole is forgotten when secrets or realm
//! change; that a name has expired is its user's to check.

use std::hash::BuildHasher;

use super::table::{SecretState, Slot};
use crate::index::Index;
use crate::wire::{Integrity, PreparedKey};
use crate::{IntegrityKey, PasswordAlgorithm};

/// Names kept: those of about as many clients as make an allocation within seconds.
const ENTRIES: usize = 1024;
/// Longer names are not kept, so that all of them take less than half a megabyte.
const MAX_NAME: usize = 128;

/// See the module.
pub(super) struct KnownKeys {
    hash: SecretState,
    index: Index,
    entries: Vec<Entry>,
    /// Whose turn it is to go, unless it was used since it was last looked at.
    hand: usize,
    /// In the order of [`Integrity`].
    nobody: [KnownKey; 2],
}

struct Entry {
    name: Box<[u8]>,
    algorithm: PasswordAlgorithm,
    known: KnownKey,
    used: bool,
}

/// A key that has verified a message of this name.
#[derive(Clone)]
pub(super) struct KnownKey {
    pub(super) key: IntegrityKey,
    pub(super) prepared: PreparedKey,
}

impl KnownKey {
    pub(super) fn new(key: IntegrityKey) -> Self {
        Self { key, prepared: key.prepared() }
    }
}

impl KnownKeys {
    /// `secret` keys the hash of names.
    pub(super) fn new(secret: [u64; 2]) -> Self {
        let nobody = [Integrity::Sha1, Integrity::Sha256].map(|integrity| {
            // Its bytes are told to nobody, and are of this process alone.
            let [low, high] = secret.map(|part| part.rotate_left(32).to_be_bytes());
            KnownKey::new(IntegrityKey::new(&[low, high].concat(), integrity).expect("16 bytes"))
        });
        Self { hash: SecretState(secret), index: Index::default(), entries: Vec::new(), hand: 0, nobody }
    }

    /// A key that nobody has, to spend as much time on as on one that somebody has.
    pub(super) fn nobody(&self, integrity: Integrity) -> KnownKey {
        self.nobody[integrity as usize].clone()
    }

    /// The key of a name.
    pub(super) fn find(
        &mut self,
        name: &[u8],
        algorithm: PasswordAlgorithm,
        integrity: Integrity,
    ) -> Option<&KnownKey> {
        let slot = self.slot(name, algorithm, integrity)?;
        let entry = &mut self.entries[slot.index()];
        entry.used = true;
        Some(&entry.known)
    }

    /// Keeps the key of a name that has just been authenticated by it.
    pub(super) fn keep(&mut self, name: &[u8], algorithm: PasswordAlgorithm, key: IntegrityKey) {
        let known = KnownKey::new(key);
        if let Some(slot) = self.slot(name, algorithm, key.integrity()) {
            // Of another secret than before.
            self.entries[slot.index()].known = known;
            return;
        }
        if name.len() > MAX_NAME {
            return;
        }
        let entry = Entry { name: name.into(), algorithm, known, used: false };
        let hash = self.hash_of(&entry.name);
        if self.entries.len() < ENTRIES {
            self.index.insert(hash, self.entries.len() as u32);
            self.entries.push(entry);
            return;
        }
        // Whoever is looked at loses its mark, so this ends.
        while std::mem::take(&mut self.entries[self.hand].used) {
            self.hand = (self.hand + 1) % ENTRIES;
        }
        let slot = Slot(self.hand as u32);
        self.hand = (self.hand + 1) % ENTRIES;
        let gone = std::mem::replace(&mut self.entries[slot.index()], entry);
        self.index.remove(self.hash_of(&gone.name), slot.0);
        self.index.insert(hash, slot.0);
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Secrets or realm are other ones now.
    pub(super) fn forget(&mut self) {
        self.index = Index::default();
        self.entries = Vec::new();
        self.hand = 0;
    }

    fn slot(&self, name: &[u8], algorithm: PasswordAlgorithm, integrity: Integrity) -> Option<Slot> {
        let slot = self.index.find(self.hash_of(name), |slot| {
            let entry = &self.entries[slot as usize];
            *entry.name == *name && entry.algorithm == algorithm && entry.known.key.integrity() == integrity
        });
        slot.map(Slot)
    }

    fn hash_of(&self, name: &[u8]) -> u64 {
        self.hash.hash_one(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> IntegrityKey {
        IntegrityKey::new(&[byte; 16], Integrity::Sha1).expect("short")
    }

    fn found(known: &mut KnownKeys, name: &str) -> Option<IntegrityKey> {
        known.find(name.as_bytes(), PasswordAlgorithm::Md5, Integrity::Sha1).map(|known| known.key)
    }

    fn keep(known: &mut KnownKeys, name: &str, byte: u8) {
        known.keep(name.as_bytes(), PasswordAlgorithm::Md5, key(byte));
    }

    #[test]
    fn there_are_never_more_and_who_is_in_use_stays() {
        let mut known = KnownKeys::new([1, 2]);
        keep(&mut known, "busy", 7);
        for number in 0..10 * ENTRIES {
            keep(&mut known, &format!("9:{number}"), 1);
            assert_eq!(found(&mut known, "busy"), Some(key(7)), "after {number} others");
        }
        assert_eq!((known.entries.len(), known.index.len()), (ENTRIES, ENTRIES));
        assert_eq!(found(&mut known, "9:0"), None);
        assert!(found(&mut known, &format!("9:{}", 10 * ENTRIES - 1)).is_some());
        let bytes: usize = known.entries.iter().map(|entry| size_of::<Entry>() + entry.name.len()).sum();
        assert!(bytes + ENTRIES * MAX_NAME < 512 << 10, "{bytes}");
    }

    #[test]
    fn long_names_are_not_kept() {
        let mut known = KnownKeys::new([1, 2]);
        for (length, kept) in [(MAX_NAME, true), (MAX_NAME + 1, false)] {
            let name = "n".repeat(length);
            keep(&mut known, &name, 1);
            assert_eq!(found(&mut known, &name).is_some(), kept, "{length} bytes");
        }
    }

    #[test]
    fn a_key_is_of_a_name_an_algorithm_and_an_attribute() {
        let mut known = KnownKeys::new([1, 2]);
        keep(&mut known, "9:bob", 1);
        assert_eq!(found(&mut known, "9:bo"), None);
        assert!(known.find(b"9:bob", PasswordAlgorithm::Sha256, Integrity::Sha1).is_none());
        assert!(known.find(b"9:bob", PasswordAlgorithm::Md5, Integrity::Sha256).is_none());
        keep(&mut known, "9:bob", 2);
        assert_eq!(found(&mut known, "9:bob"), Some(key(2)), "the last one");
        assert_eq!(known.entries.len(), 1);
        known.forget();
        assert_eq!(found(&mut known, "9:bob"), None);
    }
}
