//! The users with fixed passwords, with what is hashed from their names and passwords worked out in advance.

use subtle::ConstantTimeEq;

use crate::key::userhash;
use crate::{IntegrityKey, PasswordAlgorithm, Settings};

/// See the module. Lookups look at every user, so that how long they take does not tell which names exist.
#[derive(Default)]
pub(super) struct Directory {
    users: Vec<KnownUser>,
}

/// A user with a fixed password.
pub(super) struct KnownUser {
    pub(super) name: Box<[u8]>,
    userhash: [u8; 32],
    md5: IntegrityKey,
    sha256: IntegrityKey,
}

impl KnownUser {
    pub(super) fn key(&self, algorithm: PasswordAlgorithm) -> IntegrityKey {
        match algorithm {
            PasswordAlgorithm::Md5 => self.md5,
            PasswordAlgorithm::Sha256 => self.sha256,
        }
    }
}

impl Directory {
    pub(super) fn new(settings: &Settings) -> Self {
        let realm = settings.realm.as_bytes();
        let users = settings.static_users.iter().map(|user| {
            let key = |algorithm| IntegrityKey::long_term(algorithm, &user.username, realm, &user.password);
            KnownUser {
                name: user.username.as_slice().into(),
                userhash: userhash(&user.username, realm),
                md5: key(PasswordAlgorithm::Md5),
                sha256: key(PasswordAlgorithm::Sha256),
            }
        });
        Self { users: users.collect() }
    }

    /// Every user of this name: one, unless the configuration names it twice.
    pub(super) fn by_name(&self, name: &[u8]) -> impl Iterator<Item = &KnownUser> {
        self.users.iter().filter(move |user| user.name.ct_eq(name).into())
    }

    /// The name behind a USERHASH (RFC 8489 §14.4).
    pub(super) fn name_of(&self, userhash: &[u8; 32]) -> Option<&[u8]> {
        let mut found = None;
        for user in &self.users {
            if user.userhash.ct_eq(userhash).into() {
                found = Some(&*user.name);
            }
        }
        found
    }
}
