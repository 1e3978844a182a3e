//! A drain is the word of an operator in the store: every replica sees it at once, and relays are told, whichever
//! replica they are with and whatever restarts.

mod etcd;
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod replica;

use std::sync::Arc;
use std::time::{Duration, Instant};

use controller::fleet::{FleetChange, NodeState, drain};
use controller::store::Store;
use etcd::on_both_stores;
use replica::{Pki, Relay, Replica, hello, timeout};
use turnpike_proto::v1;
use turnpike_proto::v1::controller_message::Body as Heard;

/// Longer than a test: its relays are silent for most of it.
const LEASE: Duration = Duration::from_secs(15);
/// Within this every replica has heard.
const EVERYWHERE: Duration = Duration::from_secs(1);

on_both_stores!(
    a_drain_reaches_every_replica_and_the_relay_within_a_second,
    a_drain_outlives_the_relay_and_the_controllers,
    redirects_name_who_takes_clients_now,
);

mod on_any_store {
    use super::*;

    type Tested = Arc<dyn Store>;

    pub(super) async fn a_drain_reaches_every_replica_and_the_relay_within_a_second(store: Tested) {
        let pki = Pki::new();
        let one = Replica::start(store.clone(), &pki, LEASE).await;
        let other = Replica::start(store.clone(), &pki, LEASE).await;
        let mut relay = Relay::join(&pki, &other, hello("eu-1", 1, "boot", 1)).await;
        assert_eq!(drain_heard(&mut relay).await, v1::Drain::default(), "said also where nothing was ordered");
        for replica in [&one, &other] {
            replica.sees("the node", |seen| seen.nodes.contains_key("eu-1")).await;
        }
        let mut events = one.fleet.subscribe();

        let began = Instant::now();
        let ids = ["eu-1".to_owned()];
        let ordered = drain::order(&*store, &ids, Some(Duration::from_secs(600)), "admin/ann").await.expect("a store");
        for replica in [&one, &other] {
            state(replica, "eu-1", NodeState::Draining).await;
        }
        let heard = drain_heard(&mut relay).await;
        assert!(began.elapsed() < EVERYWHERE, "{:?}", began.elapsed());
        assert_eq!(heard, v1::Drain { draining: true, deadline: ordered[0].0.deadline });
        let FleetChange::Changed(detail) = timeout(events.recv()).await.expect("an event").change else {
            panic!("no change");
        };
        assert!(detail.starts_with("ready -> draining, told to drain within"), "{detail}");
        assert!(detail.ends_with("by admin/ann"), "{detail}");

        // What the relay itself reports does not undo it.
        relay.load(v1::Load { allocations: 3, ..v1::Load::default() }).await;
        one.sees("the report", |seen| seen.nodes.get("eu-1").is_some_and(|node| node.load.allocations == 3)).await;
        state(&one, "eu-1", NodeState::Draining).await;

        let began = Instant::now();
        assert_eq!(drain::lift(&*store, &ids).await.expect("a store"), [true]);
        for replica in [&one, &other] {
            state(replica, "eu-1", NodeState::Ready).await;
        }
        assert_eq!(drain_heard(&mut relay).await, v1::Drain::default());
        assert!(began.elapsed() < EVERYWHERE, "{:?}", began.elapsed());
    }

    pub(super) async fn a_drain_outlives_the_relay_and_the_controllers(store: Tested) {
        let pki = Pki::new();
        // Ordered while neither a relay nor a controller is there.
        drain::order(&*store, &["eu-1".to_owned()], None, "admin/ann").await.expect("a store");
        for boot in ["first", "second"] {
            let replica = Replica::start(store.clone(), &pki, LEASE).await;
            let mut relay = Relay::join(&pki, &replica, hello("eu-1", 1, boot, 1)).await;
            let first = drain_heard(&mut relay).await;
            assert_eq!(first, v1::Drain { draining: true, deadline: 0 }, "the first word of {boot}");
            state(&replica, "eu-1", NodeState::Draining).await;
        }
    }

    pub(super) async fn redirects_name_who_takes_clients_now(store: Tested) {
        let pki = Pki::new();
        let one = Replica::start(store.clone(), &pki, LEASE).await;
        let other = Replica::start(store.clone(), &pki, LEASE).await;
        let mut first = Relay::join(&pki, &one, hello("eu-1", 1, "a", 1)).await;
        redirects_heard(&mut first, &[]).await;
        let mut second = Relay::join(&pki, &other, hello("eu-2", 2, "b", 1)).await;
        let third = Relay::join(&pki, &one, hello("eu-3", 3, "c", 1)).await;
        redirects_heard(&mut first, &["192.0.2.2:3478", "192.0.2.3:3478"]).await;
        redirects_heard(&mut second, &["192.0.2.1:3478", "192.0.2.3:3478"]).await;

        drain::order(&*store, &["eu-1".to_owned()], None, "admin/ann").await.expect("a store");
        let began = Instant::now();
        redirects_heard(&mut second, &["192.0.2.3:3478"]).await;
        assert!(began.elapsed() < EVERYWHERE, "{:?}", began.elapsed());
        // Suspect, and gone later.
        drop(third);
        redirects_heard(&mut second, &[]).await;
        redirects_heard(&mut first, &["192.0.2.2:3478"]).await;
        second.load(v1::Load { busiest_worker_permille: 1000, ..v1::Load::default() }).await;
        redirects_heard(&mut first, &[]).await;
    }
}

async fn drain_heard(relay: &mut Relay) -> v1::Drain {
    let drain = |heard| match heard {
        Heard::Drain(drain) => Some(drain),
        _ => None,
    };
    relay.hear_until("a drain", drain).await
}

/// Waits until the relay is told exactly these, in any order.
async fn redirects_heard(relay: &mut Relay, expected: &[&str]) {
    let told = |heard| match heard {
        Heard::Redirects(redirects) => {
            let mut targets: Vec<_> = redirects.targets.into_iter().map(|target| target.address).collect();
            targets.sort_unstable();
            (targets == expected).then_some(())
        }
        _ => None,
    };
    relay.hear_until(&format!("redirects to {expected:?}"), told).await;
}

async fn state(replica: &Replica, node: &str, state: NodeState) {
    let thresholds = *replica.fleet.thresholds();
    let is = |seen: &controller::fleet::Snapshot| seen.nodes.get(node).is_some_and(|it| it.state(&thresholds) == state);
    replica.sees(&format!("{node} {state}"), is).await;
}
