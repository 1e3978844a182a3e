//! What every relay of the cluster shares: the key rings and the settings around them, kept under `keys/settings` so
//! that all replicas say the same, under one growing revision.
//!
//! `document` is what is stored, `rotation` how it changes (pure), `steward` who sees to it, `lifetimes` how long
//! credentials live.

mod document;
mod lifetimes;
mod rotation;
mod steward;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use turn_core::{Key, KeyRing, StaticUser};
use turnpike_proto::v1;

use self::document::Document;
pub use self::document::Origin;
use self::lifetimes::Lifetimes;
pub use self::steward::Steward;
use crate::fleet::unix_ms;
use crate::store::{Guard, Op, Store, StoreError, WatchEvent};

/// Where they are.
const KEY: &str = "keys/settings";
/// Attempts to write them against other replicas that start at the same time.
const ATTEMPTS: usize = 20;

/// What this replica's configuration says of the cluster's settings.
#[derive(Clone, Debug, Default)]
pub struct KeyOptions {
    /// REALM.
    pub realm: String,
    /// TURN REST secrets, newest first. Empty: one is made at the first start and kept in the store.
    pub rest_secrets: Vec<Vec<u8>>,
    /// Users with fixed passwords.
    pub static_users: Vec<StaticUser>,
    /// Peer networks denied beyond the built-in list, CIDR.
    pub denied_peers: Vec<String>,
    /// Allocations one user may hold on one relay; 0 is no limit.
    pub user_quota: u32,
    /// Life of a credential where none is asked for.
    pub credential_ttl: Duration,
}

/// A ring of keys.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Ring {
    /// TURN REST secrets.
    Rest,
    /// Keys of nonces.
    Nonce,
    /// Keys of the seals on stored records.
    Record,
}

impl Ring {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Rest, Self::Nonce, Self::Record];
}

impl fmt::Display for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rest => "rest",
            Self::Nonce => "nonce",
            Self::Record => "record",
        })
    }
}

/// What a key is there for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum KeyState {
    /// Being made known to every relay; nobody uses it yet.
    Next,
    /// New things are made with it.
    Newest,
    /// Still accepted, until somebody takes it away.
    Accepted,
    /// Still accepted, until nothing made with it can matter.
    Retiring,
}

/// A key without its secret.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct KeyInfo {
    /// Where it belongs.
    pub ring: Ring,
    /// Names it on the wire.
    pub id: u8,
    /// What it is there for.
    pub state: KeyState,
    /// Where it comes from.
    pub origin: Origin,
    /// When it was made, Unix ms; 0 if nobody noted it.
    pub created_at: u64,
    /// When it came to its state, Unix ms; 0 if nobody noted it.
    pub since: u64,
    /// When a retiring one leaves, Unix ms, where that is known beforehand.
    pub leaves_at: Option<u64>,
}

/// Why a key is not rotated or retired. One line, with what to do.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RotateError {
    /// The ring is the configuration's.
    #[error(
        "the TURN REST secrets are in the controllers' configuration: add the new one at the end of rest_secrets on \
         every controller and restart them, move it to the front, and take the old one out when its credentials have \
         expired"
    )]
    Configured,
    /// Only TURN REST secrets are shared with others, who may have one to give.
    #[error("keys of the {0} ring are made by the controllers, not given; leave the secret out")]
    NotGiven(Ring),
    /// Too short to be a secret, or too long.
    #[error("a secret has {least} to {most} bytes", least = rotation::SECRET.start(), most = rotation::SECRET.end())]
    Length,
    /// It was in use before.
    #[error("this secret is key {0} of the ring, which was in use before; give a new one")]
    Known(u8),
    /// One at a time.
    #[error("key {0} is being made known already; try again in a few seconds")]
    UnderWay(u8),
    /// No room.
    #[error(
        "the {0} ring holds {most} keys, the most there may be; wait until one leaves (turnctl keys list), or retire \
         one",
        most = rotation::MOST
    )]
    Full(Ring),
    /// The one that is used.
    #[error("it is the newest key of the {0} ring; rotate the ring first")]
    Newest(Ring),
    /// Not in the ring.
    #[error("the {0} ring has no key {1}")]
    Unknown(Ring, u8),
    /// No key can be made.
    #[error("{0}")]
    Random(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The settings in force.
#[derive(Clone, Debug, PartialEq)]
pub struct ClusterSettings {
    /// As relays are told.
    pub message: v1::Settings,
    /// TURN REST secrets: credentials are minted with the newest.
    pub rest_secrets: KeyRing,
    /// Keys of nonces.
    pub nonce_keys: KeyRing,
    /// Keys of the seals on records.
    pub record_keys: KeyRing,
    /// As they are stored.
    document: Document,
}

impl ClusterSettings {
    fn new(document: Document) -> Self {
        let message = document.message();
        Self {
            rest_secrets: ring(&message.rest_secrets),
            nonce_keys: ring(&message.nonce_keys),
            record_keys: ring(&message.record_keys),
            message,
            document,
        }
    }
}

/// The cluster's settings, kept current by a task that ends with this handle.
pub struct Keys {
    store: Arc<dyn Store>,
    current: watch::Receiver<Arc<ClusterSettings>>,
    lifetimes: Lifetimes,
    _task: JoinSet<()>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys").field("revision", &self.current.borrow().message.revision).finish_non_exhaustive()
    }
}

impl Keys {
    /// Reads the settings, makes what is missing, and puts in what this replica's configuration says. Replicas that
    /// are configured differently overrule each other in the order of their starts.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] if the store does not answer; [`StoreError::Refused`] if what it has cannot be read.
    pub async fn start(store: Arc<dyn Store>, options: &KeyOptions) -> Result<Self, StoreError> {
        let document = settle(&*store, options).await?;
        let (sender, current) = watch::channel(Arc::new(ClusterSettings::new(document.clone())));
        let lifetimes = Lifetimes::default();
        let mut task = JoinSet::new();
        task.spawn(follow(store.clone(), document, sender));
        task.spawn(lifetimes::keep(store.clone(), lifetimes.clone(), current.clone(), options.credential_ttl));
        Ok(Self { store, current, lifetimes, _task: task })
    }

    /// The settings now.
    pub fn current(&self) -> Arc<ClusterSettings> {
        self.current.borrow().clone()
    }

    /// The settings as they change.
    pub fn subscribe(&self) -> watch::Receiver<Arc<ClusterSettings>> {
        self.current.clone()
    }

    /// Notes that credentials of this life are given out, so that the secret they are made with stays for as long.
    pub fn gives_out(&self, secret: u8, life: Duration) {
        self.lifetimes.note(secret, life);
    }

    /// Begins to replace the newest keys of these rings, by `secret` where one is given; what is under way already is
    /// left as it is. Returns what there is then, and its revision. [`Steward`] sees to the rest.
    ///
    /// # Errors
    /// See [`RotateError`]; then nothing has changed.
    pub async fn rotate(&self, rings: &[Ring], secret: Option<&[u8]>) -> Result<(u64, Vec<KeyInfo>), RotateError> {
        let begin = |stored: &Document| {
            let mut document = stored.clone();
            for ring in rings {
                if let Some(begun) = document.begin(*ring, secret, unix_ms())? {
                    document = begun;
                }
            }
            Ok((document != *stored).then_some(document))
        };
        let (document, _) = change(&*self.store, begin).await?;
        Ok((document.revision, self.infos(&document).await?))
    }

    /// Takes a key away now.
    ///
    /// # Errors
    /// See [`RotateError`].
    pub async fn retire(&self, ring: Ring, id: u8) -> Result<(), RotateError> {
        change(&*self.store, |stored: &Document| stored.retire(ring, id, unix_ms()).map(Some)).await.map(drop)
    }

    /// Every key, as the store has them, and their revision.
    ///
    /// # Errors
    /// [`RotateError::Store`].
    pub async fn list(&self) -> Result<(u64, Vec<KeyInfo>), RotateError> {
        let (document, _) = read(&*self.store).await?;
        Ok((document.revision, self.infos(&document).await?))
    }

    /// Whether TURN REST secrets come from the controllers' configuration.
    pub fn rest_is_configured(&self) -> bool {
        self.current.borrow().document.is_configured(Ring::Rest)
    }

    async fn infos(&self, document: &Document) -> Result<Vec<KeyInfo>, StoreError> {
        Ok(document.keys(&lifetimes::stored(&*self.store).await?))
    }
}

/// Reads what is stored, and its revision in the store.
async fn read(store: &dyn Store) -> Result<(Document, i64), StoreError> {
    let entry = store.get(KEY).await?;
    // Whoever runs has them in memory and puts them back.
    let entry = entry.ok_or_else(|| StoreError::Unavailable(format!("{KEY} is missing; it is being put back")))?;
    let document = Document::from_json(&entry.value);
    let document = document.map_err(|error| StoreError::Refused(format!("{KEY} cannot be read: {error}")))?;
    Ok((document, entry.revision))
}

/// Changes what is stored as `how` says of it, against whoever else changes it; `None` is no change. Returns what is
/// stored then, and whether it was changed.
async fn change(
    store: &dyn Store,
    how: impl Fn(&Document) -> Result<Option<Document>, RotateError>,
) -> Result<(Document, bool), RotateError> {
    for _ in 0..ATTEMPTS {
        let (stored, revision) = read(store).await?;
        let Some(wanted) = how(&stored)? else {
            return Ok((stored, false));
        };
        let guard = Guard::Revision(KEY.to_owned(), revision);
        // A write of unknown outcome is an error, and not repeated: a second key would be one too many.
        if store.transact(vec![guard], vec![put(&wanted)]).await? {
            return Ok((wanted, true));
        }
    }
    Err(StoreError::Unavailable("other replicas keep changing the cluster's settings".to_owned()).into())
}

/// Writes the stored settings merged with ours, until what is stored is that.
async fn settle(store: &dyn Store, options: &KeyOptions) -> Result<Document, StoreError> {
    let mut last = StoreError::Unavailable("other replicas keep changing the cluster's settings".to_owned());
    for _ in 0..ATTEMPTS {
        let entry = store.get(KEY).await?;
        let stored = entry.as_ref().map(|entry| Document::from_json(&entry.value)).transpose();
        let stored = stored.map_err(|error| StoreError::Refused(format!("{KEY} cannot be read: {error}")))?;
        let merged = Document::merge(stored.as_ref(), options).map_err(StoreError::Refused)?;
        if stored.as_ref() == Some(&merged) {
            return Ok(merged);
        }
        let guard = match entry {
            Some(entry) => Guard::Revision(KEY.to_owned(), entry.revision),
            None => Guard::Absent(KEY.to_owned()),
        };
        match store.transact(vec![guard], vec![put(&merged)]).await {
            Ok(true) if stored.is_none() => tracing::info!("the cluster's keys were made"),
            Ok(true) => tracing::info!(revision = merged.revision, "the cluster's settings follow this configuration"),
            Ok(false) => {}
            // It may have been written: reading again tells.
            Err(error @ StoreError::Unavailable(_)) => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

fn put(document: &Document) -> Op {
    Op::Put { key: KEY.to_owned(), value: document.to_json(), lease: None }
}

/// Takes over newer settings; puts the last known ones back where a store has lost them, because relays and
/// credentials live by them.
async fn follow(store: Arc<dyn Store>, mut known: Document, sender: watch::Sender<Arc<ClusterSettings>>) {
    loop {
        if let Ok(mut watch) = store.watch(KEY).await {
            let mut present = false;
            while let Some(event) = watch.recv().await {
                match event {
                    WatchEvent::Put(entry) if entry.key == KEY => {
                        present = true;
                        match Document::from_json(&entry.value) {
                            Ok(document) if document.revision > known.revision => {
                                known = document;
                                tracing::info!(revision = known.revision, "new settings of the cluster");
                                sender.send_replace(Arc::new(ClusterSettings::new(known.clone())));
                            }
                            Ok(_) => {}
                            Err(error) => tracing::error!(error, "{KEY} cannot be read; the last settings go on"),
                        }
                    }
                    WatchEvent::Delete { key, .. } if key == KEY => {
                        present = false;
                        restore(&*store, &known).await;
                    }
                    WatchEvent::Reset => present = false,
                    WatchEvent::Synced if !present => restore(&*store, &known).await,
                    _ => {}
                }
            }
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn restore(store: &dyn Store, known: &Document) {
    let guard = Guard::Absent(KEY.to_owned());
    match store.transact(vec![guard], vec![put(known)]).await {
        Ok(true) => tracing::warn!("the store had lost the cluster's keys; they were put back"),
        Ok(false) => {}
        Err(error) => tracing::error!(%error, "the store has lost the cluster's keys and does not take them back"),
    }
}

fn ring(secrets: &[v1::Secret]) -> KeyRing {
    let key = |secret: &v1::Secret| {
        let id = u8::try_from(secret.id).ok()?;
        let secret = secret.value.clone();
        Some(Key { id, secret })
    };
    KeyRing(secrets.iter().filter_map(key).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::EmbeddedStore;

    #[tokio::test]
    async fn replicas_agree_and_keep_what_was_made() {
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::in_memory());
        let options = KeyOptions { realm: "turnpike".to_owned(), ..KeyOptions::default() };
        let (one, two) = tokio::join!(Keys::start(store.clone(), &options), Keys::start(store.clone(), &options));
        let (one, two) = (one.expect("keys"), two.expect("keys"));
        assert_eq!(one.current(), two.current());
        let made = one.current();
        for ring in [&made.rest_secrets, &made.nonce_keys, &made.record_keys] {
            assert!(ring.newest().is_some_and(|key| key.secret.len() == 32));
        }
        let again = Keys::start(store, &options).await.expect("keys");
        assert_eq!(again.current(), made);
    }

    #[tokio::test]
    async fn configured_secrets_come_first_and_leave_with_the_configuration() {
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::in_memory());
        let mut options = KeyOptions::default();
        let first = Keys::start(store.clone(), &options).await.expect("keys");
        let made = first.current();
        let generated = made.rest_secrets.newest().expect("made").secret.clone();

        options.rest_secrets = vec![b"new".to_vec(), b"old".to_vec()];
        let second = Keys::start(store.clone(), &options).await.expect("keys");
        let secrets = |keys: &Keys| {
            let current = keys.current();
            current.rest_secrets.0.iter().map(|key| key.secret.clone()).collect::<Vec<_>>()
        };
        assert_eq!(secrets(&second), [b"new".to_vec(), b"old".to_vec(), generated.clone()]);
        assert!(second.current().message.revision > made.message.revision);
        assert_eq!(second.current().nonce_keys, made.nonce_keys);

        // The replica that was there before follows.
        let mut changes = first.subscribe();
        let revision = second.current().message.revision;
        let followed = changes.wait_for(|settings| settings.message.revision == revision);
        followed.await.expect("a living watch");

        options.rest_secrets = vec![b"new".to_vec()];
        let third = Keys::start(store, &options).await.expect("keys");
        assert_eq!(secrets(&third), [b"new".to_vec(), generated]);
    }

    #[tokio::test]
    async fn a_store_that_lost_the_keys_gets_them_back() {
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::in_memory());
        let keys = Keys::start(store.clone(), &KeyOptions::default()).await.expect("keys");
        let before = store.get(KEY).await.expect("a store").expect("made").value;
        let mut watch = store.watch(KEY).await.expect("a watch");
        store.transact(Vec::new(), vec![Op::Delete(KEY.to_owned())]).await.expect("a store");
        let mut deleted = false;
        loop {
            match watch.recv().await.expect("a watch") {
                WatchEvent::Delete { .. } => deleted = true,
                WatchEvent::Put(entry) if deleted => break assert_eq!(entry.value, before),
                _ => {}
            }
        }
        drop(keys);
    }

    #[tokio::test]
    async fn unreadable_keys_are_not_overwritten() {
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::in_memory());
        let garbage = Op::Put { key: KEY.to_owned(), value: b"{".to_vec(), lease: None };
        store.transact(Vec::new(), vec![garbage]).await.expect("a store");
        let refused = Keys::start(store, &KeyOptions::default()).await.expect_err("garbage");
        assert!(matches!(&refused, StoreError::Refused(text) if text.contains(KEY)), "{refused}");
    }
}
