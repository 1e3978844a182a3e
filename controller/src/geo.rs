//! Where addresses are, by a MaxMind database that the operator brings (GeoLite2 City, DB-IP City and alike). The file is
//! read whole, and again when it has changed; one that cannot be read leaves the old one in force.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use maxminddb::{PathElement, Reader};

use crate::steering::Place;

/// Between two looks at the file.
const LOOK: Duration = Duration::from_secs(5);

/// The database as last read.
pub struct Geo {
    path: PathBuf,
    reader: ArcSwap<Reader<Vec<u8>>>,
    seen: Mutex<Option<Stamp>>,
}

/// By what a changed file is told.
type Stamp = (SystemTime, u64);

impl std::fmt::Debug for Geo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Geo").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Why a file is no database of places.
#[derive(Debug, thiserror::Error)]
pub enum GeoError {
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    File(#[from] std::io::Error),
    /// It is of another format.
    #[error("is no MaxMind database: {0}")]
    Format(#[from] maxminddb::MaxMindDbError),
}

impl Geo {
    /// Reads the file.
    ///
    /// # Errors
    /// See [`GeoError`].
    pub fn open(path: &Path) -> Result<Self, GeoError> {
        let (reader, stamp) = read(path)?;
        Ok(Self { path: path.to_owned(), reader: ArcSwap::from_pointee(reader), seen: Mutex::new(Some(stamp)) })
    }

    /// Where an address is; `None` for what the database does not place.
    pub fn locate(&self, ip: IpAddr) -> Option<Place> {
        let reader = self.reader.load();
        let found = reader.lookup(ip.to_canonical()).ok()?;
        let degrees = |name| found.decode_path::<f64>(&[PathElement::Key("location"), PathElement::Key(name)]).ok()?;
        Place::new(degrees("latitude")?, degrees("longitude")?)
    }

    /// Reads the file again if it is another than the one read last. Whether it was.
    ///
    /// # Errors
    /// See [`GeoError`]; the old one stays in force, and the file is not looked at again until it changes.
    pub fn refresh(&self) -> Result<bool, GeoError> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let now = stamp(&self.path)?;
        if seen.replace(now) == Some(now) {
            return Ok(false);
        }
        let (reader, stamp) = read(&self.path)?;
        *seen = Some(stamp);
        self.reader.store(Arc::new(reader));
        Ok(true)
    }

    /// Looks at the file each 5 s, for ever.
    pub async fn follow(self: Arc<Self>) {
        loop {
            tokio::time::sleep(LOOK).await;
            let geo = self.clone();
            match tokio::task::spawn_blocking(move || geo.refresh()).await {
                Ok(Ok(true)) => tracing::info!(path = %self.path.display(), "the geo database was read again"),
                Ok(Ok(false)) | Err(_) => {}
                // A file that is being replaced may be away for a moment.
                Ok(Err(GeoError::File(error))) => tracing::debug!(path = %self.path.display(), %error, "geo"),
                Ok(Err(error)) => {
                    tracing::warn!(path = %self.path.display(), "geo: the file {error}; the one before stays in force");
                }
            }
        }
    }
}

fn stamp(path: &Path) -> Result<Stamp, GeoError> {
    let about = std::fs::metadata(path)?;
    Ok((about.modified()?, about.len()))
}

fn read(path: &Path) -> Result<(Reader<Vec<u8>>, Stamp), GeoError> {
    // Before the reading: a change meanwhile shows at the next look.
    let stamp = stamp(path)?;
    Ok((Reader::from_source(std::fs::read(path)?)?, stamp))
}
