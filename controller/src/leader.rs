//! Who does what needs one writer: a key on a lease. Losing it is noticed late at worst, so the work itself must be
//! guarded against a second writer, too.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use crate::store::{Guard, LeaseId, Op, Store, StoreError};

/// How long a leader stays one without renewing, and how often it renews and others try.
#[derive(Clone, Copy)]
struct Terms {
    lease: Duration,
    turn: Duration,
}

const TERMS: Terms = Terms { lease: Duration::from_secs(15), turn: Duration::from_secs(5) };

/// Runs `work` for as long as this replica is the leader of `name`, again each time it becomes it. Never ends; a
/// `work` that ends is begun again after a pause.
pub async fn lead<F: Future<Output = ()>>(store: Arc<dyn Store>, name: &str, candidate: &str, work: impl Fn() -> F) {
    stand(store, name, candidate, TERMS, work).await;
}

async fn stand<F: Future<Output = ()>>(
    store: Arc<dyn Store>,
    name: &str,
    candidate: &str,
    terms: Terms,
    work: impl Fn() -> F,
) {
    let key = format!("leader/{name}");
    loop {
        match elect(&*store, &key, candidate, terms.lease).await {
            Ok(Some(lease)) => {
                tracing::debug!(name, "this replica leads");
                tokio::select! {
                    () = hold(&*store, lease, terms.turn) => tracing::debug!(name, "this replica no longer leads"),
                    () = repeat(&work, terms.turn) => {}
                }
            }
            Ok(None) => {}
            Err(error) => tracing::debug!(name, %error, "no election"),
        }
        sleep(terms.turn).await;
    }
}

/// Tries to become leader.
async fn elect(store: &dyn Store, key: &str, candidate: &str, ttl: Duration) -> Result<Option<LeaseId>, StoreError> {
    if store.get(key).await?.is_some() {
        return Ok(None);
    }
    let lease = store.grant(ttl).await?;
    let put = Op::Put { key: key.to_owned(), value: candidate.as_bytes().to_vec(), lease: Some(lease) };
    let elected = store.transact(vec![Guard::Absent(key.to_owned())], vec![put]).await;
    if !matches!(elected, Ok(true)) {
        // Also ends a key that was written by an attempt of unknown outcome.
        store.revoke(lease).await?;
    }
    Ok(elected?.then_some(lease))
}

/// Renews until the lease has ended.
async fn hold(store: &dyn Store, lease: LeaseId, turn: Duration) {
    loop {
        sleep(turn).await;
        match store.keep_alive(lease).await {
            Ok(()) => {}
            Err(StoreError::Unavailable(error)) => tracing::debug!(error, "the leader's lease was not renewed"),
            Err(_) => return,
        }
    }
}

async fn repeat<F: Future<Output = ()>>(work: &impl Fn() -> F, pause: Duration) {
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
                stand(store, "test", &n.to_string(), terms, || async {
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
