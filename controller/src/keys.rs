//! What every relay of the cluster shares: the key rings and the settings around them, kept under `keys/settings` so
//! that all replicas say the same, under one growing revision.

mod document;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use turn_core::{Key, KeyRing, StaticUser};
use turnpike_proto::v1;

use self::document::Document;
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
}

impl ClusterSettings {
    fn new(message: v1::Settings) -> Self {
        Self {
            rest_secrets: ring(&message.rest_secrets),
            nonce_keys: ring(&message.nonce_keys),
            record_keys: ring(&message.record_keys),
            message,
        }
    }
}

/// The cluster's settings, kept current by a task that ends with this handle.
#[derive(Debug)]
pub struct Keys {
    current: watch::Receiver<Arc<ClusterSettings>>,
    _task: JoinSet<()>,
}

impl Keys {
    /// Reads the settings, makes what is missing, and puts in what this replica's configuration says. Replicas that
    /// are configured differently overrule each other in the order of their starts.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] if the store does not answer; [`StoreError::Refused`] if what it has cannot be read.
    pub async fn start(store: Arc<dyn Store>, options: &KeyOptions) -> Result<Self, StoreError> {
        let document = settle(&*store, options).await?;
        let (sender, current) = watch::channel(Arc::new(ClusterSettings::new(document.message())));
        let mut task = JoinSet::new();
        task.spawn(follow(store, document, sender));
        Ok(Self { current, _task: task })
    }

    /// The settings now.
    pub fn current(&self) -> Arc<ClusterSettings> {
        self.current.borrow().clone()
    }

    /// The settings as they change.
    pub fn subscribe(&self) -> watch::Receiver<Arc<ClusterSettings>> {
        self.current.clone()
    }
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
                                sender.send_replace(Arc::new(ClusterSettings::new(known.message())));
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
