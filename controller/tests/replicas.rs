//! Two replicas over one etcd: what needs one writer has one, also when the one that had it hangs.

mod etcd;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use controller::leader::{Leadership, Terms, lead};
use controller::store::Op;
use etcd::{Etcd, Mode, Proxy, connect};
use tokio::task::JoinSet;

const TERMS: Terms = Terms { lease: Duration::from_secs(3), turn: Duration::from_secs(1) };
const PATIENCE: Duration = Duration::from_secs(20);

/// What a candidate does while it leads.
#[derive(Default)]
struct Work {
    begun: AtomicUsize,
    under_way: AtomicUsize,
    leadership: Mutex<Option<Leadership>>,
}

/// Leaves its mark while it leads, however that ends.
struct UnderWay<'a>(&'a Work);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Work {
    async fn run(&self, leadership: Leadership) {
        *self.leadership.lock().expect("no panic") = Some(leadership);
        self.under_way.fetch_add(1, Ordering::SeqCst);
        let _mark = UnderWay(self);
        self.begun.fetch_add(1, Ordering::SeqCst);
        std::future::pending::<()>().await;
    }

    fn leads(&self) -> bool {
        self.under_way.load(Ordering::SeqCst) > 0
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_cut_off_stops_and_what_it_still_writes_lands_nowhere() {
    let etcd = Etcd::start().await;
    let ways = [Proxy::start(etcd.address()).await, Proxy::start(etcd.address()).await];
    let works = [Arc::new(Work::default()), Arc::new(Work::default())];
    let mut candidates = JoinSet::new();
    for (n, (way, work)) in ways.iter().zip(&works).enumerate() {
        let (store, work) = (connect(&way.endpoint()).await, work.clone());
        candidates.spawn(async move {
            lead(store, "test", &format!("replica-{n}"), TERMS, |leadership| work.run(leadership)).await;
        });
    }
    eventually("one leads", || works.iter().any(|work| work.leads())).await;
    let leader = usize::from(works[1].leads());
    let (old, new) = (&works[leader], &works[1 - leader]);
    assert!(!new.leads());

    ways[leader].set(Mode::Hold);
    let cut = Instant::now();
    eventually("another one leads", || new.leads()).await;
    assert!(!old.leads(), "the old one stops before its lease can have ended");
    assert!(cut.elapsed() < (TERMS.lease + TERMS.turn) * 3, "{:?}", cut.elapsed());

    // What the old one had in hand is fenced; the new one's is not.
    let direct = connect(&etcd.endpoint()).await;
    for (work, lands) in [(old, false), (new, true)] {
        let guard = work.leadership.lock().expect("no panic").as_ref().expect("it led").guard();
        let put = Op::Put { key: "done".to_owned(), value: b"1".to_vec(), lease: None };
        assert_eq!(direct.transact(vec![guard], vec![put]).await.expect("etcd"), lands);
    }

    ways[leader].set(Mode::Pass);
    tokio::time::sleep(TERMS.turn * 3).await;
    assert!(new.leads() && !old.leads(), "one that comes back waits");
    assert_eq!(new.begun.load(Ordering::SeqCst), 1);
}

async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
