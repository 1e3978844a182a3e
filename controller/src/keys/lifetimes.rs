//! How long credentials live that were made with each TURN REST secret: `keys/lifetimes`, so that a secret leaves when
//! the last credential made with it has expired, whichever replica made it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio::time::sleep;

use super::{ClusterSettings, Ring};
use crate::store::{Guard, Op, Store, StoreError};

/// Where they are.
const KEY: &str = "keys/lifetimes";
/// Between attempts to write to a store that is away.
const PAUSE: Duration = Duration::from_secs(1);

/// As stored.
#[derive(Debug, Default, Deserialize, Serialize)]
struct Stored {
    /// Seconds, by id of the TURN REST secret.
    #[serde(default)]
    rest: BTreeMap<u8, u64>,
}

/// The longest life of a credential made by this replica, by id of its secret. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Lifetimes {
    longest: Arc<Mutex<BTreeMap<u8, Duration>>>,
    grown: Arc<Notify>,
}

impl Lifetimes {
    pub(super) fn note(&self, secret: u8, life: Duration) {
        let mut longest = self.lock();
        let known = longest.entry(secret).or_default();
        if life > *known {
            *known = life;
            self.grown.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u8, Duration>> {
        self.longest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What all replicas have noted.
pub(super) async fn stored(store: &dyn Store) -> Result<BTreeMap<u8, Duration>, StoreError> {
    let (stored, _) = read(store).await?;
    Ok(stored.rest.into_iter().map(|(id, seconds)| (id, Duration::from_secs(seconds))).collect())
}

/// Writes what this replica notes, at once: what was not written when it dies would not be waited for. The usual life
/// of credentials is written before any is made.
pub(super) async fn keep(
    store: Arc<dyn Store>,
    lifetimes: Lifetimes,
    mut settings: watch::Receiver<Arc<ClusterSettings>>,
    usual: Duration,
) {
    loop {
        let newest = settings.borrow_and_update().rest_secrets.newest().map(|key| key.id);
        newest.into_iter().for_each(|id| lifetimes.note(id, usual));
        if let Err(error) = raise(&*store, &lifetimes, &settings).await {
            tracing::debug!(%error, "lifetimes of credentials are not written yet");
            sleep(PAUSE).await;
            continue;
        }
        tokio::select! {
            () = lifetimes.grown.notified() => {}
            changed = settings.changed() => if changed.is_err() { return },
        }
    }
}

/// Raises what is stored to what this replica has noted. Ids that have left the ring are forgotten, here and there:
/// they come back as other secrets.
async fn raise(
    store: &dyn Store,
    lifetimes: &Lifetimes,
    settings: &watch::Receiver<Arc<ClusterSettings>>,
) -> Result<(), StoreError> {
    loop {
        let (mut stored, guard) = read(store).await?;
        let ring: Vec<u8> = settings.borrow().document.ring(Ring::Rest).iter().map(|key| key.id).collect();
        let before = stored.rest.clone();
        stored.rest.retain(|id, _| ring.contains(id));
        {
            let mut noted = lifetimes.lock();
            noted.retain(|id, _| ring.contains(id));
            for (id, life) in noted.iter() {
                let seconds = life.as_secs() + u64::from(life.subsec_nanos() > 0);
                let known = stored.rest.entry(*id).or_default();
                *known = seconds.max(*known);
            }
        }
        if stored.rest == before {
            return Ok(());
        }
        let put = Op::Put { key: KEY.to_owned(), value: serde_json::to_vec(&stored).unwrap_or_default(), lease: None };
        if store.transact(vec![guard], vec![put]).await? {
            return Ok(());
        }
    }
}

/// What is stored, and the guard for changing it. What cannot be read counts as nothing noted.
async fn read(store: &dyn Store) -> Result<(Stored, Guard), StoreError> {
    Ok(match store.get(KEY).await? {
        Some(entry) => {
            let stored = serde_json::from_slice(&entry.value).unwrap_or_else(|error| {
                tracing::warn!(%error, "{KEY} cannot be read; it is written anew");
                Stored::default()
            });
            (stored, Guard::Revision(KEY.to_owned(), entry.revision))
        }
        None => (Stored::default(), Guard::Absent(KEY.to_owned())),
    })
}
