//! Relays that wait for an address another one owns: who gets it, when, and who never does. Against both stores.

#![allow(dead_code, reason = "tests share modules of which each uses a part")]

mod etcd;
mod replica;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use controller::fleet::NodeState;
use controller::fleet::drain;
use controller::store::{Op, Store};
use etcd::on_both_stores;
use replica::{Pki, Relay, Replica, eventually, hello, stored, timeout};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tonic::Streaming;
use turnpike_proto::v1::controller_message::Body as Heard;
use turnpike_proto::v1::relay_message::Body as Said;
use turnpike_proto::v1::{self, ControllerMessage, RelayMessage};

const LEASE: Duration = Duration::from_secs(2);
const ADDRESS: &str = "192.0.2.1";

on_both_stores!(
    of_two_that_wait_one_is_welcome_when_the_lease_has_ended,
    a_release_makes_the_preferred_one_the_owner_at_once,
    a_standby_that_hands_over_does_not_take_the_address_back_at_once,
    who_waits_goes_on_waiting_at_another_replica,
    an_idle_standby_is_told_to_step_back,
    after_an_outage_of_all_controllers_the_owner_is_given_time,
    who_waits_is_shown_and_takes_no_clients,
);

mod on_any_store {
    use super::*;

    type Tested = Arc<dyn Store>;

    pub(super) async fn of_two_that_wait_one_is_welcome_when_the_lease_has_ended(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store.clone(), &pki, LEASE).await;
        let mut owner = Relay::join(&pki, &replica, preferred("eu-1")).await;
        let change = vec![owner.put(1, 1)];
        let batch = owner.batch(change).await;
        owner.acked(batch).await;
        owner.load(v1::Load::default()).await;
        replica
            .sees("the owner's report", |seen| seen.nodes.get("eu-1").is_some_and(|node| node.load.reported_at > 0))
            .await;
        let mut waiters = Vec::new();
        for node in ["eu-8", "eu-9"] {
            let mut waiter = Waiter::greet(&pki, &replica, standby(node)).await;
            assert_eq!(waiter.told().await, Told::Waits("eu-1".to_owned(), 1));
            waiters.push(waiter);
        }

        let renewed = Instant::now();
        owner.load(v1::Load::default()).await;
        drop(owner);
        let (mut one, mut two) = (waiters.remove(0), waiters.remove(0));
        let (first, second) = timeout(async { tokio::join!(one.told(), two.told()) }).await;
        assert!(renewed.elapsed() > LEASE - Duration::from_millis(500), "{:?}", renewed.elapsed());
        assert!(renewed.elapsed() < LEASE + Duration::from_secs(2), "{:?}", renewed.elapsed());
        match (&first, &second) {
            (Told::Owns(2), Told::Waits(owner, 2)) => assert_eq!(owner, "eu-8"),
            (Told::Waits(owner, 2), Told::Owns(2)) => assert_eq!(owner, "eu-9"),
            other => panic!("one owns and one waits: {other:?}"),
        }
        assert_eq!(stored(&store, ADDRESS).await.len(), 1, "the successor adopts the allocations");
        // The old owner comes back and waits as the others do.
        let mut old = Waiter::greet(&pki, &replica, preferred("eu-1")).await;
        assert!(matches!(old.told().await, Told::Waits(_, 2)));
    }

    pub(super) async fn a_release_makes_the_preferred_one_the_owner_at_once(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store, &pki, LEASE).await;
        let owner = Relay::join(&pki, &replica, preferred("eu-0")).await;
        owner.load(v1::Load::default()).await;
        replica
            .sees("the owner's report", |seen| seen.nodes.get("eu-0").is_some_and(|node| node.load.reported_at > 0))
            .await;
        let mut waiting = Vec::new();
        for hello in [standby("eu-8"), preferred("eu-1"), standby("eu-9")] {
            let mut waiter = Waiter::greet(&pki, &replica, hello).await;
            assert_eq!(waiter.told().await, Told::Waits("eu-0".to_owned(), 1));
            waiting.push(waiter);
        }
        replica.sees("all of them", |seen| seen.waiting.len() == 3).await;
        let left = Instant::now();
        owner.say(Said::Goodbye(v1::Goodbye::default())).await;
        assert_eq!(waiting[1].told().await, Told::Owns(2));
        assert!(left.elapsed() < Duration::from_secs(1), "{:?}", left.elapsed());
        for standby in [0, 2] {
            assert_eq!(waiting[standby].told().await, Told::Waits("eu-1".to_owned(), 2));
        }
        replica.sees("one less", |seen| seen.waiting.len() == 2).await;
    }

    /// It asks anew before the preferred relay has even heard that the address is free; one that never hears holds up
    /// nobody for long.
    pub(super) async fn a_standby_that_hands_over_does_not_take_the_address_back_at_once(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store.clone(), &pki, LEASE).await;
        // Nothing is known yet of who had the address: a standby would wait.
        let owner = Relay::join(&pki, &replica, preferred("eu-9")).await;
        owner.load(v1::Load::default()).await;
        replica
            .sees("the owner's report", |seen| seen.nodes.get("eu-9").is_some_and(|node| node.load.reported_at > 0))
            .await;
        let mut preferred = Waiter::greet(&pki, &replica, preferred("eu-1")).await;
        assert_eq!(preferred.told().await, Told::Waits("eu-9".to_owned(), 1));
        replica.sees("who waits", |seen| seen.waiting.len() == 1).await;
        // From here on it stands in the store and hears nothing.
        let post = store.get("waiting/eu-1").await.expect("a store").expect("it waits").value;
        drop(preferred);
        replica.sees("that it is gone", |seen| seen.waiting.is_empty()).await;
        let put = Op::Put { key: "waiting/eu-1".to_owned(), value: post, lease: None };
        assert!(store.transact(Vec::new(), vec![put]).await.expect("a store"));

        owner.say(Said::Goodbye(v1::Goodbye::default())).await;
        replica.sees("no owner", |seen| seen.nodes.is_empty()).await;
        let mut again = Waiter::greet(&pki, &replica, standby("eu-9")).await;
        assert!(matches!(again.told().await, Told::Waits(..)), "the preferred relay goes first");
        assert!(matches!(again.told().await, Told::Owns(_)), "it has not come");
    }

    pub(super) async fn who_waits_goes_on_waiting_at_another_replica(store: Tested) {
        let pki = Pki::new();
        let one = Replica::start(store.clone(), &pki, LEASE).await;
        let two = Replica::start(store, &pki, LEASE).await;
        let owner = Relay::join(&pki, &two, preferred("eu-1")).await;
        let mut waiter = Waiter::greet(&pki, &one, standby("eu-9")).await;
        assert_eq!(waiter.told().await, Told::Waits("eu-1".to_owned(), 1));
        one.service.close();
        waiter.ends().await;
        let mut waiter = Waiter::greet(&pki, &two, standby("eu-9")).await;
        assert_eq!(waiter.told().await, Told::Waits("eu-1".to_owned(), 1));
        owner.load(v1::Load::default()).await;
        two.sees("the owner's report", |seen| seen.nodes.get("eu-1").is_some_and(|node| node.load.reported_at > 0))
            .await;
        owner.say(Said::Goodbye(v1::Goodbye::default())).await;
        assert_eq!(waiter.told().await, Told::Owns(2));
    }

    pub(super) async fn an_idle_standby_is_told_to_step_back(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store.clone(), &pki, LEASE).await;
        // The preferred one had it once, so that the standby has to be sure of nothing.
        let first = Relay::join(&pki, &replica, preferred("eu-1")).await;
        first.load(v1::Load::default()).await;
        replica
            .sees("the owner's report", |seen| seen.nodes.get("eu-1").is_some_and(|node| node.load.reported_at > 0))
            .await;
        first.say(Said::Goodbye(v1::Goodbye::default())).await;
        let mut owner = Waiter::greet(&pki, &replica, standby("eu-9")).await;
        while owner.told().await != Told::Owns(2) {}
        let mut back = Waiter::greet(&pki, &replica, preferred("eu-1")).await;
        assert_eq!(back.told().await, Told::Waits("eu-9".to_owned(), 2));
        assert_eq!(owner.told().await, Told::StepsBack("eu-1".to_owned(), false));

        // A call, and it is not; until the deadline of an operator.
        owner.holds(1);
        replica.sees("the call", |seen| seen.nodes.get("eu-9").is_some_and(|node| node.load.allocations == 1)).await;
        while owner.told_within(Duration::from_millis(1500)).await.is_some() {}
        drain::order(&*store, &["eu-9".to_owned()], Some(Duration::from_millis(100)), "operator/ann")
            .await
            .expect("written");
        assert_eq!(owner.told().await, Told::StepsBack("eu-1".to_owned(), true));
        owner.say(Said::Goodbye(v1::Goodbye::default())).await;
        assert_eq!(back.told().await, Told::Owns(3));
    }

    pub(super) async fn after_an_outage_of_all_controllers_the_owner_is_given_time(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store.clone(), &pki, LEASE).await;
        drop(Relay::join(&pki, &replica, preferred("eu-1")).await);
        drop(replica);
        eventually("the lease has ended", || async { store.get("owners/192.0.2.1").await.expect("a store").is_none() })
            .await;

        // It serves all the while; the standby is quicker to come back.
        let replica = Replica::start(store.clone(), &pki, LEASE).await;
        let mut waiter = Waiter::greet(&pki, &replica, standby("eu-9")).await;
        assert_eq!(waiter.told().await, Told::Waits(String::new(), 1));
        assert_eq!(waiter.told_within(Duration::from_secs(1)).await, None);
        let owner = Relay::join(&pki, &replica, preferred("eu-1")).await;
        assert_eq!(owner.welcome.epoch, 1, "nobody has had it meanwhile");
        assert_eq!(waiter.told().await, Told::Waits("eu-1".to_owned(), 1));

        // The same again, and this time the owner never comes.
        drop((owner, waiter, replica));
        eventually("the lease has ended", || async { store.get("owners/192.0.2.1").await.expect("a store").is_none() })
            .await;
        let replica = Replica::start(store, &pki, LEASE).await;
        let began = Instant::now();
        let mut waiter = Waiter::greet(&pki, &replica, standby("eu-9")).await;
        assert_eq!(waiter.told().await, Told::Waits(String::new(), 1));
        assert_eq!(waiter.told().await, Told::Owns(2));
        assert!(began.elapsed() > LEASE + Duration::from_secs(4), "{:?}", began.elapsed());
    }

    pub(super) async fn who_waits_is_shown_and_takes_no_clients(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store, &pki, LEASE).await;
        let _owner = Relay::join(&pki, &replica, preferred("eu-1")).await;
        let waiter = Waiter::greet(&pki, &replica, standby("eu-9")).await;
        replica.sees("both", |seen| seen.everyone().len() == 2).await;
        let snapshot = replica.fleet.snapshot();
        assert_eq!(snapshot.nodes.keys().collect::<Vec<_>>(), ["eu-1"], "steering looks at these alone");
        let shown = snapshot.everyone();
        assert_eq!(shown[1].record.node_id, "eu-9");
        assert_eq!(shown[1].state(replica.fleet.thresholds()), NodeState::Standby);
        assert_eq!(replica.fleet.members().borrow().members.len(), 1);
        assert_eq!(snapshot.node_of(address()).map(|node| node.record.node_id.as_str()), Some("eu-1"));
        drop(waiter);
        replica.sees("one again", |seen| seen.everyone().len() == 1).await;
    }
}

/// What a relay that waits is told.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Told {
    /// It waits for this owner, of this epoch.
    Waits(String, u64),
    /// It owns the address under this epoch.
    Owns(u64),
    /// It is to give the address to this one, at once or when idle.
    StepsBack(String, bool),
}

/// A relay that says it would wait, in a session.
struct Waiter {
    say: mpsc::Sender<RelayMessage>,
    hear: Streaming<ControllerMessage>,
    first: Option<Heard>,
    allocations: Arc<AtomicU64>,
    _reports: JoinSet<()>,
}

impl Waiter {
    async fn greet(pki: &Pki, replica: &Replica, hello: v1::Hello) -> Self {
        let mut client = pki.client(replica, &format!("relay/{}", hello.node_id)).await;
        let (say, hear, first) = Relay::greet(&mut client, hello).await.expect("a session");
        let allocations = Arc::new(AtomicU64::new(0));
        let mut reports = JoinSet::new();
        let (held, reporting) = (allocations.clone(), say.clone());
        reports.spawn(async move {
            loop {
                let load = v1::Load { allocations: held.load(Ordering::Relaxed), ..v1::Load::default() };
                if reporting.send(RelayMessage { body: Some(Said::Load(load)) }).await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
        });
        Self { say, hear, first, allocations, _reports: reports }
    }

    /// The next word about the address.
    async fn told(&mut self) -> Told {
        timeout(self.next()).await
    }

    async fn told_within(&mut self, time: Duration) -> Option<Told> {
        tokio::time::timeout(time, self.next()).await.ok()
    }

    async fn next(&mut self) -> Told {
        loop {
            let heard = match self.first.take() {
                Some(heard) => heard,
                None => {
                    let message = self.hear.message().await.expect("no error").expect("the session goes on");
                    message.body.expect("a body")
                }
            };
            match heard {
                Heard::Waiting(waiting) => return Told::Waits(waiting.owner, waiting.epoch),
                Heard::Welcome(welcome) => return Told::Owns(welcome.epoch),
                Heard::StepBack(step) => return Told::StepsBack(step.to, step.now),
                Heard::Superseded(by) => panic!("superseded by {by:?}"),
                _ => {}
            }
        }
    }

    async fn ends(&mut self) {
        let ended = async { while let Ok(Some(_)) = self.hear.message().await {} };
        timeout(ended).await;
    }

    async fn say(&self, body: Said) {
        self.say.send(RelayMessage { body: Some(body) }).await.expect("a session");
    }

    fn holds(&self, allocations: u64) {
        self.allocations.store(allocations, Ordering::Relaxed);
    }
}

fn preferred(node_id: &str) -> v1::Hello {
    v1::Hello { waits: true, ..hello(node_id, 1, &format!("boot-of-{node_id}"), 1) }
}

fn standby(node_id: &str) -> v1::Hello {
    v1::Hello { standby: true, ..preferred(node_id) }
}

fn address() -> IpAddr {
    ADDRESS.parse().expect("literal")
}
