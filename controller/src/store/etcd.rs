//! The etcd store (etcd 3.4 or newer, v3 API).

mod combine;
mod members;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Certificate, ConnectOptions, GetOptions, Identity, KeyValue, TlsOptions};

use self::combine::Combiner;
use self::members::{ATTEMPT, Members};
use super::{
    Entry, Guard, LeaseId, MAX_PAGE, Op, Page, Store, StoreError, StoreStatus, Watch, check_lease, check_transaction,
};

/// Pings on an idle connection; etcd ends connections that ping more often than each 5 s.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(6), Duration::from_secs(3));
/// Answers may hold a page of the longest values.
const MAX_ANSWER: usize = (MAX_PAGE + 100) * super::MAX_VALUE;

/// How to reach etcd.
#[derive(Clone, Default)]
pub struct EtcdOptions {
    /// `http://host:port` or `https://host:port`, one or more members.
    pub endpoints: Vec<String>,
    /// Before every key; ends in a slash by custom.
    pub prefix: String,
    /// For `https` endpoints; without it the system's roots are not consulted and `https` fails.
    pub tls: Option<EtcdTls>,
    /// User and password, where etcd asks for them.
    pub user: Option<(String, String)>,
}

impl std::fmt::Debug for EtcdOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdOptions")
            .field("endpoints", &self.endpoints)
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

/// Certificates for etcd, PEM.
#[derive(Clone, Default)]
pub struct EtcdTls {
    /// Who signed the members' certificates.
    pub ca: Vec<u8>,
    /// Ours and its key, where etcd asks for client certificates.
    pub certificate: Option<(Vec<u8>, Vec<u8>)>,
}

/// A store in etcd.
pub struct EtcdStore {
    members: Arc<Members>,
    combiner: Combiner,
    root: String,
}

impl EtcdStore {
    /// Connects and asks for the version; one that is older than 3.5 works but is warned of.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] if no member answers within a few seconds, [`StoreError::Refused`] for options that
    /// cannot work (addresses, certificates, user).
    pub async fn connect(options: EtcdOptions) -> Result<Self, StoreError> {
        let mut connect = ConnectOptions::new()
            .with_require_leader(true)
            .with_connect_timeout(ATTEMPT.0)
            .with_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1)
            .with_keep_alive_while_idle(true)
            .with_auto_token_refresh(true);
        if let Some(tls) = &options.tls {
            let mut config = TlsOptions::new().ca_certificate(Certificate::from_pem(&tls.ca));
            if let Some((certificate, key)) = &tls.certificate {
                config = config.identity(Identity::from_pem(certificate, key));
            }
            connect = connect.with_tls(config);
        }
        if let Some((user, password)) = &options.user {
            connect = connect.with_user(user, password);
        }
        let at = options.endpoints.join(", ");
        let members = Arc::new(Members::new(options.endpoints, &connect));
        let combiner = Combiner::new(members.clone(), options.prefix.clone());
        let store = Self { members, combiner, root: options.prefix };
        let version = match store.status().await {
            Ok(status) => status.version,
            // It can be read, and whoever is there goes on.
            Err(StoreError::Full(text)) => {
                tracing::warn!("{text}");
                return Ok(store);
            }
            Err(StoreError::Unavailable(text)) => return Err(StoreError::Unavailable(format!("etcd at {at}: {text}"))),
            Err(StoreError::Denied(text)) => return Err(StoreError::Denied(format!("etcd at {at}: {text}"))),
            Err(error) => return Err(StoreError::Refused(format!("etcd at {at}: {error}"))),
        };
        if is_before_3_5(&version) {
            tracing::warn!(
                version,
                "etcd is older than 3.5: it works, but stores less a second; use 3.5 in production"
            );
        } else {
            tracing::info!(version, "etcd answers");
        }
        Ok(store)
    }

    fn key(&self, key: &str) -> Vec<u8> {
        [self.root.as_bytes(), key.as_bytes()].concat()
    }
}

#[tonic::async_trait]
impl Store for EtcdStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let answer = self.members.repeat(|client| {
            let (mut kv, key) = (client.kv_client(), self.key(key));
            async move { kv.get(key, None).await }
        });
        let mut answer = answer.await?;
        Ok(answer.take_kvs().into_iter().next().and_then(|kv| entry(&self.root, kv)))
    }

    async fn range(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Page, StoreError> {
        let after = after.map(|after| self.key(after));
        page(&self.members, &self.root, &self.key(prefix), after, limit, 0).await
    }

    async fn transact(&self, guards: Vec<Guard>, ops: Vec<Op>) -> Result<bool, StoreError> {
        check_transaction(&guards, &ops)?;
        self.combiner.transact(guards, ops).await
    }

    async fn watch(&self, prefix: &str) -> Result<Watch, StoreError> {
        Ok(watch::start(self.members.clone(), self.root.clone(), self.key(prefix)))
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        check_lease(ttl)?;
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
        let answer = self.members.repeat(|client| {
            let mut lease = client.lease_client();
            async move { lease.grant(seconds, None).await }
        });
        Ok(LeaseId(answer.await?.id()))
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        let renewed = self.members.repeat(|client| {
            let mut leases = client.lease_client();
            async move { leases.keep_alive(lease.0).await.map(drop) }
        });
        renewed.await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        let revoked = self.members.repeat(|client| {
            let mut leases = client.lease_client();
            async move { leases.revoke(lease.0).await.map(drop) }
        });
        match revoked.await {
            // Ended already, or by an attempt whose answer was lost: as asked.
            Err(StoreError::LeaseEnded) => Ok(()),
            other => other,
        }
    }

    async fn status(&self) -> Result<StoreStatus, StoreError> {
        let status = self.members.repeat(|client| {
            let mut maintenance = client.maintenance_client();
            async move { maintenance.status().await }
        });
        let status = status.await?;
        match status.errors() {
            [] => Ok(StoreStatus { kind: "etcd", version: status.version().to_owned() }),
            errors => Err(members::complaint(&errors.join(", "))),
        }
    }
}

/// A page of `prefix` (whole keys, with the root) as of `revision`; 0 is now.
async fn page(
    members: &Members,
    root: &str,
    prefix: &[u8],
    after: Option<Vec<u8>>,
    limit: usize,
    revision: i64,
) -> Result<Page, StoreError> {
    let limit = i64::try_from(limit.clamp(1, MAX_PAGE)).unwrap_or(1);
    let mut from = prefix.to_vec();
    if let Some(mut after) = after.filter(|after| after.as_slice() >= prefix) {
        after.push(0);
        from = after;
    }
    let options = GetOptions::new().with_range(prefix_end(prefix)).with_limit(limit).with_revision(revision);
    let answer = members.repeat(|client| {
        let mut kv = client.kv_client().max_decoding_message_size(MAX_ANSWER);
        let (from, options) = (from.clone(), options.clone());
        async move { kv.get(from, Some(options)).await }
    });
    let mut answer = answer.await?;
    Ok(Page {
        revision: answer.header().map_or(0, etcd_client::ResponseHeader::revision),
        more: answer.more(),
        entries: answer.take_kvs().into_iter().filter_map(|kv| entry(root, kv)).collect(),
    })
}

/// The first key behind every key that begins with `prefix`; `\0` is etcd's name for "no end".
fn prefix_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

/// An entry without the root; `None` for a key that is no text, which nobody of ours has written.
fn entry(root: &str, kv: KeyValue) -> Option<Entry> {
    let revision = kv.mod_revision();
    let lease = (kv.lease() != 0).then(|| LeaseId(kv.lease()));
    let (key, value) = kv.into_key_value();
    let key = String::from_utf8(key).ok()?;
    let key = key.strip_prefix(root)?.to_owned();
    Some(Entry { key, value, revision, lease })
}

fn is_before_3_5(version: &str) -> bool {
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    let major = numbers.next().unwrap_or(0);
    let minor = numbers.next().unwrap_or(0);
    (major, minor) < (3, 5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_end_behind_their_last_key() {
        let cases: &[(&[u8], &[u8])] = &[(b"a/", b"a0"), (b"a\xff", b"b"), (b"\xff\xff", b"\0"), (b"", b"\0")];
        for (prefix, end) in cases {
            assert_eq!(prefix_end(prefix), *end, "{prefix:?}");
        }
    }

    #[test]
    fn versions() {
        for (version, old) in [("3.4.23", true), ("3.5.0", false), ("3.10.1", false), ("4.0.0", false), ("?", true)] {
            assert_eq!(is_before_3_5(version), old, "{version}");
        }
    }
}
