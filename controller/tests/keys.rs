//! Rotations over real mTLS and both stores: relays hear of a key before it is used, whoever began and whoever died.

#![allow(dead_code, reason = "tests share modules of which each uses a part")]

mod etcd;
mod replica;

use std::sync::Arc;
use std::time::{Duration, Instant};

use controller::keys::{KeyState, Ring, Steward};
use controller::store::Store;
use etcd::on_both_stores;
use replica::{Pki, Relay, Replica, eventually, hello, stored, timeout};
use turn_core::record::seal_key;
use turnpike_proto::v1;
use turnpike_proto::v1::controller_message::Body as Heard;

const LEASE: Duration = Duration::from_secs(3);
/// All members within this.
const PROMISED: Duration = Duration::from_secs(5);

on_both_stores!(
    two_replicas_rotate_once_and_wait_for_every_relay,
    a_rotation_is_finished_by_whoever_is_left,
    a_relay_that_says_nothing_holds_nothing_up,
    a_record_key_leaves_when_everything_is_sealed_anew,
);

fn steward(store: &Arc<dyn Store>, replica: &Replica, name: &str) -> Steward {
    Steward::start(store.clone(), replica.fleet.clone(), replica.keys.clone(), name.to_owned())
}

/// Ids of nonce keys in the next settings a relay hears in which `wanted` holds of them.
async fn heard(relay: &mut Relay, what: &str, wanted: impl Fn(&[u32]) -> bool) -> (u64, Vec<u32>) {
    relay
        .hear_until(what, |heard| match heard {
            Heard::Settings(settings) => {
                let ids: Vec<_> = settings.nonce_keys.iter().map(|key| key.id).collect();
                wanted(&ids).then_some((settings.revision, ids))
            }
            _ => None,
        })
        .await
}

async fn says(relay: &Relay, revision: u64) {
    relay.load(v1::Load { settings_revision: revision, ..v1::Load::default() }).await;
}

mod on_any_store {
    use super::*;

    type Tested = Arc<dyn Store>;

    pub(super) async fn two_replicas_rotate_once_and_wait_for_every_relay(store: Tested) {
        let pki = Pki::new();
        let one = Replica::start(store.clone(), &pki, LEASE).await;
        let two = Replica::start(store.clone(), &pki, LEASE).await;
        let stewards = [steward(&store, &one, "one"), steward(&store, &two, "two")];
        let mut first = Relay::join(&pki, &one, hello("eu-1", 1, "boot", 1)).await;
        let mut second = Relay::join(&pki, &two, hello("eu-2", 2, "boot", 1)).await;
        for relay in [&first, &second] {
            says(relay, relay.welcome.settings.as_ref().expect("settings").revision).await;
        }
        one.sees("both relays", |seen| seen.nodes.values().filter(|it| it.load.settings_revision > 0).count() == 2)
            .await;

        let begun = Instant::now();
        let (a, b) = tokio::join!(one.keys.rotate(&Ring::ALL, None), two.keys.rotate(&Ring::ALL, None));
        let ((_, a), (_, b)) = (a.expect("rotated"), b.expect("rotated"));
        let next = |keys: &[controller::keys::KeyInfo]| {
            keys.iter().filter(|key| key.state == KeyState::Next).map(|key| (key.ring, key.id)).collect::<Vec<_>>()
        };
        assert_eq!(next(&a), [(Ring::Rest, 1), (Ring::Nonce, 1), (Ring::Record, 1)]);
        assert_eq!(next(&a), next(&b), "one rotation");
        stewards.iter().for_each(Steward::wake);

        let (revision, ids) = heard(&mut first, "the next key", |ids| ids.len() == 2).await;
        assert_eq!(ids, [0, 1], "known, and not used");
        says(&first, revision).await;
        heard(&mut second, "the next key", |ids| ids.len() == 2).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(one.keys.current().nonce_keys.newest().map(|key| key.id), Some(0), "a relay has not heard of it");
        says(&second, revision).await;
        for relay in [&mut first, &mut second] {
            let (_, ids) = heard(relay, "the newest key", |ids| ids[0] == 1).await;
            assert_eq!(ids, [1, 0]);
        }
        assert!(begun.elapsed() < PROMISED, "{:?}", begun.elapsed());
        for replica in [&one, &two] {
            let mut settings = replica.keys.subscribe();
            let current = timeout(settings.wait_for(|now| now.nonce_keys.0.len() == 2 && now.nonce_keys.0[0].id == 1));
            let current = current.await.expect("keys").clone();
            assert_eq!((current.rest_secrets.0.len(), current.record_keys.0.len()), (2, 2));
        }
    }

    pub(super) async fn a_rotation_is_finished_by_whoever_is_left(store: Tested) {
        let pki = Pki::new();
        let dies = Replica::start(store.clone(), &pki, LEASE).await;
        dies.keys.rotate(&[Ring::Nonce], None).await.expect("begun");
        drop(dies);
        let left = Replica::start(store.clone(), &pki, LEASE).await;
        assert_eq!(left.keys.current().nonce_keys.newest().map(|key| key.id), Some(0));
        let _steward = steward(&store, &left, "left");
        let mut settings = left.keys.subscribe();
        timeout(settings.wait_for(|now| now.nonce_keys.newest().is_some_and(|key| key.id == 1))).await.expect("keys");
    }

    pub(super) async fn a_relay_that_says_nothing_holds_nothing_up(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store.clone(), &pki, LEASE).await;
        let steward = steward(&store, &replica, "one");
        let mut relay = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 1)).await;
        says(&relay, 0).await;
        replica.sees("the relay", |seen| seen.nodes.contains_key("eu-1")).await;
        let begun = Instant::now();
        replica.keys.rotate(&[Ring::Nonce], None).await.expect("begun");
        steward.wake();
        heard(&mut relay, "the newest key", |ids| ids[0] == 1).await;
        assert!(begun.elapsed() >= Duration::from_secs(3), "it was given time: {:?}", begun.elapsed());
        assert!(begun.elapsed() < PROMISED, "{:?}", begun.elapsed());
    }

    pub(super) async fn a_record_key_leaves_when_everything_is_sealed_anew(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store.clone(), &pki, Duration::from_secs(30)).await;
        let steward = steward(&store, &replica, "one");
        let mut relay = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 1)).await;
        let batch = relay.batch(vec![relay.put(1, 1), relay.put(2, 1)]).await;
        relay.acked(batch).await;
        says(&relay, u64::MAX).await;
        replica
            .sees("its report", |seen| seen.nodes.get("eu-1").is_some_and(|node| node.load.settings_revision > 0))
            .await;
        replica.keys.rotate(&[Ring::Record], None).await.expect("begun");
        steward.wake();
        let mut settings = replica.keys.subscribe();
        let current = timeout(settings.wait_for(|now| now.record_keys.newest().is_some_and(|key| key.id == 1)));
        let ring = current.await.expect("keys").record_keys.clone();
        assert_eq!(ring.0.len(), 2);

        // One record is sealed anew, the other waits for longer than any key of records has to stay.
        let old = std::mem::replace(&mut relay.record_keys, ring);
        let batch = relay.batch(vec![relay.put(1, 2)]).await;
        relay.acked(batch).await;
        tokio::time::sleep(Duration::from_secs(12)).await;
        says(&relay, u64::MAX).await;
        assert_eq!(replica.keys.current().record_keys.0.len(), 2, "a record would be lost");
        assert!(replica.allocations.get(replica::id(2)).await.expect("a store").is_some(), "sealed with {old:?}");

        let batch = relay.batch(vec![relay.put(2, 2)]).await;
        relay.acked(batch).await;
        eventually("the old key leaves", || async { replica.keys.current().record_keys.0.len() == 1 }).await;
        let seals: Vec<_> = stored(&store, "192.0.2.1").await.iter().map(|(_, bytes)| seal_key(bytes)).collect();
        assert_eq!(seals, [Some(1), Some(1)]);
        assert!(replica.allocations.get(replica::id(2)).await.expect("a store").is_some());
    }
}
