//! What clients measure at one replica counts at the others, and after a restart; over both stores.

mod etcd;
#[path = "../src/fleet/sample.rs"]
mod sample;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use controller::fleet::{LoadRecord, NodeListener, NodeRecord, NodeView, Snapshot};
use controller::sharing::Sharing;
use controller::steering::{Query, Steering, Terms};
use controller::store::{EmbeddedStore, MAX_PAGE, Store};
use etcd::{Etcd, connect};

const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread")]
async fn replicas_share_over_the_embedded_store() {
    contract(Arc::new(EmbeddedStore::in_memory())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_share_over_etcd() {
    let etcd = Etcd::start().await;
    contract(connect(&etcd.endpoint()).await).await;
}

async fn contract(store: Arc<dyn Store>) {
    let fleet = fleet(&["eu", "us"]);
    let (first, second) = (replica(&store), replica(&store));
    let client = |i: u32| IpAddr::from([203, 0, u8::try_from(i).expect("a byte"), 7]);
    let nearest = |steering: &Steering, client| {
        let query = Query { client: Some(client), limit: 1, ..Query::default() };
        steering.choose(&fleet, &query).relays[0].region.clone()
    };
    let report = |steering: &Steering, client, us: f32| {
        assert_eq!(steering.report(&fleet, client, &[("eu".to_owned(), 100.0), ("us".to_owned(), us)]), 2);
    };
    for i in 0..200 {
        report(&first.0, client(i), 20.0);
    }
    let keys = async || store.range("measured/", None, MAX_PAGE).await.expect("a store").entries.len();
    // A second has passed at most since the first write: they are not all written at once.
    eventually("the first are written", async || keys().await > 0).await;
    assert!(keys().await < 200, "writes are not bounded");
    eventually("all are written", async || keys().await == 200).await;
    eventually("the other replica knows", async || (0..200).all(|i| knows(&second.0, &fleet, client(i)))).await;
    assert_eq!(nearest(&second.0, client(5)), "us");

    // The newer one counts on both, whoever was told.
    for _ in 0..50 {
        report(&second.0, client(5), 190.0);
    }
    assert_eq!(nearest(&second.0, client(5)), "eu");
    eventually("it counts where the first was told", async || nearest(&first.0, client(5)) == "eu").await;
    // Networks that were shared just now wait for a minute, however often clients report.
    let revision = async |key| store.get(key).await.expect("a store").expect("it is there").revision;
    let (just_now, long_ago) = ("measured/203.0.5.0", "measured/203.0.199.0");
    let before = (revision(just_now).await, revision(long_ago).await);
    for i in 0..200 {
        report(&second.0, client(i), 190.0);
    }
    eventually("others are written", async || revision(long_ago).await > before.1).await;
    assert_eq!(revision(just_now).await, before.0);

    drop((first, second));
    let restarted = replica(&store);
    eventually("it is read at a start", async || knows(&restarted.0, &fleet, client(7))).await;
}

/// A replica's steering, and what shares it until it is dropped.
fn replica(store: &Arc<dyn Store>) -> (Arc<Steering>, Sharing) {
    let terms = Terms { home: "eu".to_owned(), ..Terms::default() };
    let steering = Arc::new(Steering::new(Arc::new(terms), None, 1));
    (steering.clone(), Sharing::start(store.clone(), steering))
}

/// Whether it has measurements of this very network.
fn knows(steering: &Steering, fleet: &Snapshot, client: IpAddr) -> bool {
    let query = Query { client: Some(client), ..Query::default() };
    steering.explain(fleet, &query).evidence[0].contains("have measured 2 regions")
}

fn fleet(regions: &[&str]) -> Snapshot {
    let node = |region: &&str| {
        let record = sample::node_record(&format!("{region}-1"), region, IpAddr::from([198, 51, 100, 1]));
        let view = NodeView { record, epoch: 1, load: LoadRecord::default(), drain: None };
        (view.record.node_id.clone(), view)
    };
    Snapshot { nodes: regions.iter().map(node).collect(), controllers: 2, ..Snapshot::default() }
}

async fn eventually(what: &str, condition: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
