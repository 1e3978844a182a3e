//! From configuration to a [`Replica`]: opens the store, and waits for one that is away.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Replica;
use crate::config::{ConfigError, Settings, StoreSettings};
use crate::health::Health;
use crate::store::{EmbeddedStore, EtcdOptions, EtcdStore, EtcdTls, Store, StoreError};

/// Between two tries to reach the store.
const RETRY: Duration = Duration::from_secs(1);
/// Between two lines that say it is still away.
const SAY: Duration = Duration::from_secs(10);

/// How to open the configured store.
#[derive(Clone)]
pub enum Opener {
    /// The file of the embedded store.
    Embedded(PathBuf),
    /// How to reach etcd.
    Etcd(EtcdOptions),
}

impl Opener {
    /// Reads the files that the configuration names.
    ///
    /// # Errors
    /// The `store.*` key whose file cannot be read.
    pub fn new(settings: &StoreSettings) -> Result<Self, ConfigError> {
        match settings {
            StoreSettings::Embedded { path } => Ok(Self::Embedded(path.clone())),
            StoreSettings::Etcd { endpoints, prefix, ca, identity, user } => {
                let identity = identity.as_ref().map(|(certificate, key)| {
                    Ok::<_, ConfigError>((read("store.certificate", certificate)?, read("store.key", key)?))
                });
                let ca = ca.as_ref().map(|path| read("store.ca", path)).transpose()?;
                let certificate = identity.transpose()?;
                Ok(Self::Etcd(EtcdOptions {
                    endpoints: endpoints.clone(),
                    prefix: prefix.clone(),
                    tls: ca.map(|ca| EtcdTls { ca, certificate }),
                    user: user.clone(),
                }))
            }
        }
    }

    async fn open(&self) -> Result<Arc<dyn Store>, StoreError> {
        match self {
            Self::Embedded(path) => Ok(Arc::new(EmbeddedStore::open(path)?)),
            Self::Etcd(options) => Ok(Arc::new(EtcdStore::connect(options.clone()).await?)),
        }
    }

    /// What is opened, for people.
    fn what(&self) -> String {
        match self {
            Self::Embedded(path) => format!("the store in {}", path.display()),
            Self::Etcd(options) => format!("etcd at {}", options.endpoints.join(", ")),
        }
    }
}

fn read(key: &str, path: &Path) -> Result<Vec<u8>, ConfigError> {
    std::fs::read(path).map_err(|error| ConfigError::new(key, format!("{}: {error}", path.display())))
}

/// Opens the store and reads it once. Goes on trying for as long as etcd is away, and says so now and then; ends with
/// the future that is dropped.
///
/// # Errors
/// What is wrong with the embedded store's file: waiting would not mend it.
pub async fn join(opener: &Opener, settings: &Settings, health: &Health) -> Result<Arc<Replica>, StoreError> {
    let mut said: Option<Instant> = None;
    health.waits_for(format!("{} has not answered yet", opener.what()));
    loop {
        let error = match attempt(opener, settings).await {
            Ok(replica) => return Ok(Arc::new(replica)),
            Err(error) => error,
        };
        if matches!(opener, Opener::Embedded(_)) {
            return Err(error);
        }
        health.waits_for(format!("{}: {error}", opener.what()));
        if said.is_none_or(|at| at.elapsed() >= SAY) {
            tracing::warn!(%error, "{} cannot be used; trying on", opener.what());
            said = Some(Instant::now());
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn attempt(opener: &Opener, settings: &Settings) -> Result<Replica, StoreError> {
    let store = opener.open().await?;
    Replica::start(store, settings).await
}
