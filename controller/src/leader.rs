//! Who does what needs one writer: a key on a lease. A leader that cannot renew stops when its lease may have ended; one
//! that was frozen in the middle of a write may not notice in time, so every write of the work carries
//! [`Leadership::guard`], which fails once anybody else leads.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};

use crate::store::{Guard, LeaseId, Op, Store, StoreError};

/// How long a leader stays one without renewing, and how often it renews and others try.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Whole seconds, at least 2.
    pub lease: Duration,
    /// Less than half of the lease.
    pub turn: Duration,
}

impl Default for Terms {
    fn default() -> Self {
        Self { lease: Duration::from_secs(15), turn: Duration::from_secs(5) }
    }
}

/// One term of one leader.
#[derive(Clone, Debug)]
pub struct Leadership {
    key: String,
    /// The candidate and a random number: nobody else's, nor of another term.
    value: Vec<u8>,
}

impl Leadership {
    /// Holds for as long as this term does.
    pub fn guard(&self) -> Guard {
        Guard::Value(self.key.clone(), self.value.clone())
    }
}

/// Runs `work` for as long as this replica is the leader of `name`, again each time it becomes it. Never ends; a
/// `work` that ends is begun again after a pause.
pub async fn lead<F: Future<Output = ()>>(
    store: Arc<dyn Store>,
    name: &str,
    candidate: &str,
    terms: Terms,
    work: impl Fn(Leadership) -> F,
) {
    let key = format!("leader/{name}");
    loop {
        match elect(&*store, &key, candidate, terms.lease).await {
            Ok(Some((lease, leadership, since))) => {
                tracing::info!(work = name, "this replica leads");
                tokio::select! {
                    () = hold(&*store, lease, since, terms) => {}
                    () = repeat(|| work(leadership.clone()), terms.turn) => {}
                }
                tracing::info!(work = name, "this replica no longer leads");
            }
            Ok(None) => {}
            Err(error) => tracing::debug!(name, %error, "no election"),
        }
        sleep(terms.turn).await;
    }
}

/// Tries to become leader.
async fn elect(
    store: &dyn Store,
    key: &str,
    candidate: &str,
    ttl: Duration,
) -> Result<Option<(LeaseId, Leadership, Instant)>, StoreError> {
    if store.get(key).await?.is_some() {
        return Ok(None);
    }
    let since = Instant::now();
    let lease = store.grant(ttl).await?;
    let term = getrandom::u64().map_err(|error| StoreError::Refused(format!("no random numbers: {error}")))?;
    let leadership = Leadership { key: key.to_owned(), value: format!("{candidate} {term:016x}").into_bytes() };
    let put = Op::Put { key: key.to_owned(), value: leadership.value.clone(), lease: Some(lease) };
    let elected = store.transact(vec![Guard::Absent(key.to_owned())], vec![put]).await;
    if !matches!(elected, Ok(true)) {
        // Also ends a key that was written by an attempt of unknown outcome.
        store.revoke(lease).await?;
    }
    Ok(elected?.then_some((lease, leadership, since)))
}

/// Renews until the lease has ended, or may have.
async fn hold(store: &dyn Store, lease: LeaseId, since: Instant, terms: Terms) {
    let mut ends = since + terms.lease;
    loop {
        sleep(terms.turn).await;
        let asked = Instant::now();
        tokio::select! {
            renewed = store.keep_alive(lease) => match renewed {
                Ok(()) => ends = asked + terms.lease,
                Err(StoreError::LeaseEnded | StoreError::Refused(_)) => return,
                Err(error) => tracing::debug!(%error, "the leader's lease was not renewed"),
            },
            () = sleep_until(ends) => return,
        }
        if Instant::now() >= ends {
            return;
        }
    }
}

async fn repeat<F: Future<Output = ()>>(work: impl Fn() -> F, pause: Duration) {
    loop {
        work().await;
        sleep(pause).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::task::JoinSet;

    use super::*;
    use crate::store::EmbeddedStore;

    #[tokio::test]
    async fn one_leads_and_another_follows_when_it_is_gone() {
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::in_memory());
        let working = Arc::new([const { AtomicUsize::new(0) }; 2]);
        let mut candidates = [JoinSet::new(), JoinSet::new()];
        for (n, candidate) in candidates.iter_mut().enumerate() {
            let (store, working) = (store.clone(), working.clone());
            candidate.spawn(async move {
                let terms = Terms { lease: Duration::from_secs(60), turn: Duration::from_millis(50) };
                lead(store, "test", &n.to_string(), terms, |_| async {
                    working[n].fetch_add(1, Ordering::Relaxed);
                    std::future::pending::<()>().await;
                })
                .await;
            });
        }
        let led = || [0, 1].map(|n| working[n].load(Ordering::Relaxed));
        while led() == [0, 0] {
            sleep(Duration::from_millis(10)).await;
        }
        sleep(Duration::from_millis(200)).await;
        let [one, two] = led();
        assert_eq!(one + two, 1, "only one leads");
        candidates[usize::from(two == 1)] = JoinSet::new();
        let key = store.get("leader/test").await.expect("a store").expect("a leader");
        store.revoke(key.lease.expect("leased")).await.expect("a store");
        while led() != [1, 1] {
            sleep(Duration::from_millis(10)).await;
        }
    }
}
