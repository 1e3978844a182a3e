//! Relays whose certificates are refused: the keys `revoked/<node id>`, which no lease ends.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::unix_ms;
use crate::store::{Guard, Op, Store, StoreError};

/// Before every such key.
pub(super) const PREFIX: &str = "revoked/";
/// Attempts to write against others that write at the same time.
const ATTEMPTS: usize = 5;
/// Certificates remembered of one relay; beyond that all of them are refused.
const MANY: usize = 32;

/// Longest serial number (RFC 5280 §4.1.2.2), bytes.
pub const LONGEST_SERIAL: usize = 20;

/// Serial number of a certificate of the cluster's authority, big-endian without leading zeros.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Serial(Vec<u8>);

impl Serial {
    /// Takes leading zeros off. Nothing if that leaves none, or too many bytes.
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let start = bytes.iter().position(|byte| *byte != 0)?;
        let bytes = &bytes[start..];
        (bytes.len() <= LONGEST_SERIAL).then(|| Self(bytes.to_vec()))
    }

    /// Of a certificate (DER) that the TLS layer has verified.
    pub fn of(certificate: &[u8]) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
        Self::new(certificate.raw_serial())
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    fn text(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn parse(text: &str) -> Option<Self> {
        if !text.is_ascii() || !text.len().is_multiple_of(2) {
            return None;
        }
        let byte = |digits: &[u8]| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok();
        Self::new(&text.as_bytes().chunks(2).map(byte).collect::<Option<Vec<u8>>>()?)
    }
}

/// `revoked/<node id>`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct RevokedRecord {
    /// Unix ms.
    pub since: u64,
    /// Who said so.
    pub by: String,
    /// Which certificates, in lower-case hexadecimal; none is every certificate of the relay, those to come too.
    pub serials: Vec<String>,
}

/// Whose certificates are refused, by node id.
pub type Revoked = BTreeMap<String, RevokedRecord>;

impl RevokedRecord {
    /// Whether it is about this certificate of its relay; one that is not known is meant by "all" alone.
    pub fn covers(&self, certificate: Option<&Serial>) -> bool {
        self.serials.is_empty() || certificate.is_some_and(|own| self.serials.contains(&own.text()))
    }

    /// The serial numbers; what is none is left out.
    pub fn numbers(&self) -> impl Iterator<Item = Serial> + '_ {
        self.serials.iter().filter_map(|text| Serial::parse(text))
    }
}

/// Refuses a certificate of a relay, or all of them. Whether that changes nothing.
///
/// # Errors
/// As the store says; then nothing was written for sure.
pub async fn revoke(
    store: &dyn Store,
    node_id: &str,
    certificate: Option<Serial>,
    by: &str,
) -> Result<bool, StoreError> {
    let key = format!("{PREFIX}{node_id}");
    for _ in 0..ATTEMPTS {
        let stored = store.get(&key).await?;
        let known = stored.as_ref().and_then(|entry| serde_json::from_slice::<RevokedRecord>(&entry.value).ok());
        if known.as_ref().is_some_and(|known| known.covers(certificate.as_ref())) {
            return Ok(true);
        }
        let mut serials = match &certificate {
            None => Vec::new(),
            Some(certificate) => {
                let known = known.iter().flat_map(|known| known.serials.iter().cloned());
                known.chain([certificate.text()]).collect()
            }
        };
        if serials.len() > MANY {
            serials.clear();
        }
        let record = RevokedRecord { since: unix_ms(), by: by.to_owned(), serials };
        let guard = match stored {
            Some(entry) => Guard::Revision(key.clone(), entry.revision),
            None => Guard::Absent(key.clone()),
        };
        // A record of numbers and text has nothing that JSON cannot write.
        let value = serde_json::to_vec(&record).unwrap_or_default();
        if store.transact(vec![guard], vec![Op::Put { key: key.clone(), value, lease: None }]).await? {
            return Ok(false);
        }
    }
    Err(StoreError::Unavailable("others revoke the same relay at the same time; try again".to_owned()))
}

/// Takes back everything about a relay. Whether there was nothing.
///
/// # Errors
/// As the store says.
pub async fn reinstate(store: &dyn Store, node_id: &str) -> Result<bool, StoreError> {
    let key = format!("{PREFIX}{node_id}");
    let known = store.get(&key).await?.is_some();
    if known {
        store.transact(Vec::new(), vec![Op::Delete(key)]).await?;
    }
    Ok(!known)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::EmbeddedStore;

    #[tokio::test]
    async fn certificates_are_refused_one_by_one_or_all_and_taken_back() {
        let store = EmbeddedStore::in_memory();
        let stored = async || {
            let entry = store.get("revoked/eu-1").await.expect("a store").expect("written");
            assert_eq!(entry.lease, None, "no lease ends it");
            serde_json::from_slice::<RevokedRecord>(&entry.value).expect("JSON")
        };
        let serial = |byte| Serial::new(&[0, byte, 0]);
        let revoked = async |serial, by| revoke(&store, "eu-1", serial, by).await.expect("a store");
        assert!(!revoked(serial(1), "admin/ann").await);
        assert!(revoked(serial(1), "admin/ann").await, "it was already");
        assert!(!revoked(serial(2), "admin/bob").await);
        let record = stored().await;
        let numbers: Vec<_> = record.numbers().map(|number| number.bytes().to_vec()).collect();
        assert_eq!((numbers, record.by.as_str()), (vec![vec![1, 0], vec![2, 0]], "admin/bob"));
        let covered = [serial(1), serial(2), serial(3), None].map(|own| record.covers(own.as_ref()));
        assert_eq!(covered, [true, true, false, false]);

        assert!(!revoked(None, "admin/ann").await);
        let record = stored().await;
        assert!(record.covers(None) && record.covers(serial(3).as_ref()), "all of them");
        assert!(revoked(serial(4), "admin/ann").await, "one of all");

        assert!(!reinstate(&store, "eu-1").await.expect("a store"));
        assert!(reinstate(&store, "eu-1").await.expect("a store"), "it was not refused");
    }

    #[test]
    fn what_is_no_serial_number_covers_nothing() {
        let none = ["xy", "00", "123", "", "é1", &"11".repeat(21)];
        let record = RevokedRecord { serials: none.map(str::to_owned).to_vec(), ..RevokedRecord::default() };
        assert_eq!(record.numbers().count(), 0);
        assert!(!record.covers(Serial::new(&[1]).as_ref()));
    }
}
