//! The Fleet service over real mTLS: what relays say reaches the store, and nothing that is stale does. Most tests run
//! against the embedded store and a real etcd.

mod etcd;
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod replica;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use controller::allocations::{AllocationChange, Filter};
use controller::fleet::{FleetChange, NodeState, OwnerRecord};
use controller::store::{EtcdOptions, EtcdStore, LeaseId, Op, Store};
use controller::sweeper::Sweeper;
use controller::usage::{Retention, Usage, UsageFilter, list};
use etcd::{Etcd, Mode, Proxy, connect, on_both_stores};
use replica::{Pki, Relay, Replica, eventually, hello, id, node, record, stored, timeout};
use tonic::Code;
use turnpike_proto::v1;
use turnpike_proto::v1::controller_message::Body as Heard;
use turnpike_proto::v1::relay_message::Body as Said;

const LEASE: Duration = Duration::from_secs(3);
const EU_1: &str = "192.0.2.1";

on_both_stores!(
    a_relay_joins_and_one_that_dies_leaves_with_its_lease,
    a_relay_that_says_goodbye_leaves_at_once,
    a_relay_that_hangs_up_with_its_goodbye_has_left,
    a_thousand_creates_in_a_second_are_stored_300_ms_later,
    an_older_process_is_superseded_and_writes_nothing,
    an_older_session_of_the_same_process_writes_nothing,
    a_session_moves_to_another_replica_with_lease_and_epoch,
    a_resync_removes_what_it_does_not_name,
    a_lease_that_ended_is_granted_anew_under_the_same_epoch,
    a_standby_waits_for_the_owner_and_takes_over_after_it,
    records_are_restored_to_who_may_own_them,
    a_relay_speaks_only_for_itself,
    what_no_relay_sends_ends_the_session,
    a_revocation_reaches_the_relay_through_any_replica,
    members_are_told_of_each_other,
    allocations_are_listed_found_and_told,
    forged_records_are_left_out,
    expired_records_of_gone_relays_are_swept,
    a_closing_replica_sends_its_relays_away,
    usage_is_kept_summed_up_and_closed_once,
);

mod on_any_store {
    use super::*;

    type Tested = Arc<dyn Store>;

    pub(super) async fn usage_is_kept_summed_up_and_closed_once(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store.clone(), &pki, LEASE).await;
        let usage = |number: u32, origin: u64, bytes: u64| v1::Usage {
            allocation_id: id(number).0.to_vec(),
            origin,
            username: b"1800000000:alice".to_vec(),
            packets_to_peer: bytes / 10,
            bytes_to_peer: bytes,
            ..v1::Usage::default()
        };
        let ended = |usage: v1::Usage, at| v1::Usage { ended_at: at, reason: v1::EndReason::Deleted.into(), ..usage };
        let listed = || async {
            let page = list(&*store, &UsageFilter::default(), 0, "").await.expect("a store").expect("a page");
            let show = |usage: &Usage| (usage.id, usage.totals.bytes_to_peer, usage.ended.is_some(), usage.unclean);
            page.usage.iter().map(show).collect::<Vec<_>>()
        };
        let mut relay = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 1)).await;
        assert!(relay.welcome.takes_usage);
        relay.usage(1, vec![usage(1, 7, 100), usage(2, 8, 50), usage(3, 9, 10)]).await;
        assert_eq!(listed().await, [(id(1), 100, false, false), (id(2), 50, false, false), (id(3), 10, false, false)]);
        // The first is handed on in order, the second is not; both go on in another count.
        relay.usage(2, vec![v1::Usage { closed: true, ..usage(1, 7, 120) }]).await;
        relay.leave().await;
        let mut relay = Relay::join(&pki, &replica, hello("eu-1", 1, "boot2", 2)).await;
        let continued = |usage: v1::Usage| v1::Usage { continued: true, ..usage };
        let last = vec![
            ended(continued(usage(1, 17, 30)), 5000),
            ended(continued(usage(2, 18, 30)), 5000),
            ended(usage(3, 9, 15), 5000),
        ];
        let all = [(id(1), 150, true, false), (id(2), 80, true, true), (id(3), 15, true, false)];
        for batch in 1..=2 {
            // The second time as after a lost acknowledgement.
            relay.usage(batch, last.clone()).await;
            assert_eq!(listed().await, all);
        }
        let counters = store.range("counters/", None, 10).await.expect("a store");
        assert!(counters.entries.is_empty(), "{counters:?}");
        let of_bob = UsageFilter { user: Some(b"bob".to_vec()), ..UsageFilter::default() };
        assert!(list(&*store, &of_bob, 0, "").await.expect("a store").expect("a page").usage.is_empty());
        let mut token = String::new();
        let of_alice = UsageFilter { user: Some(b"alice".to_vec()), ..UsageFilter::default() };
        for (expected, ..) in all {
            let page = list(&*store, &of_alice, 1, &token).await.expect("a store").expect("a page");
            assert_eq!(page.usage.iter().map(|usage| usage.id).collect::<Vec<_>>(), [expected]);
            token = page.next.unwrap_or_default();
        }
        relay.say(Said::Usage(v1::UsageBatch { batch_id: 9, usage: vec![usage(4, 1, 1); 2] })).await;
        assert_eq!(relay.end().await.expect_err("no relay says it twice").code(), Code::InvalidArgument);
    }

    pub(super) async fn a_relay_joins_and_one_that_dies_leaves_with_its_lease(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store, &pki, LEASE).await;
        let mut events = replica.fleet.subscribe();
        let relay = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 1)).await;
        assert_eq!(relay.welcome.epoch, 1);
        assert_eq!(relay.welcome.lease_ms, 3000);
        relay.load(v1::Load { allocations: 7, ..v1::Load::default() }).await;
        replica
            .sees("the node with its load", |seen| {
                seen.nodes.get("eu-1").is_some_and(|node| node.epoch == 1 && node.load.allocations == 7)
            })
            .await;
        assert_eq!(timeout(events.recv()).await.expect("an event").change, FleetChange::Joined);

        let died = Instant::now();
        drop(relay);
        let thresholds = *replica.fleet.thresholds();
        replica
            .sees("a suspect", |seen| {
                seen.nodes.get("eu-1").is_none_or(|node| node.state(&thresholds) == NodeState::Suspect)
            })
            .await;
        assert!(died.elapsed() < Duration::from_secs(1), "{:?}", died.elapsed());
        replica.sees("no node", |seen| seen.nodes.is_empty()).await;
        assert!(died.elapsed() < LEASE + Duration::from_secs(1), "{:?}", died.elapsed());
        assert!(died.elapsed() > LEASE - Duration::from_secs(1), "{:?}", died.elapsed());
        let mut changes = Vec::new();
        while let Ok(event) = events.try_recv() {
            changes.push(event.change);
        }
        assert_eq!(changes, [FleetChange::Changed("ready -> suspect".to_owned()), FleetChange::Left]);
    }

    pub(super) async fn a_relay_that_says_goodbye_leaves_at_once(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store.clone(), &pki, LEASE).await;
        let mut relay = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 1)).await;
        relay.load(v1::Load::default()).await;
        replica.sees("the node", |seen| seen.nodes.contains_key("eu-1")).await;
        for n in 0..20 {
            let change = vec![relay.put(n, 1)];
            relay.batch(change).await;
        }
        let left = Instant::now();
        relay.say(Said::Goodbye(v1::Goodbye::default())).await;
        relay.end().await.expect("an orderly end");
        replica.sees("no node", |seen| seen.nodes.is_empty()).await;
        assert!(left.elapsed() < Duration::from_secs(1), "{:?}", left.elapsed());
        assert_eq!(stored(&store, EU_1).await.len(), 20, "what came before the goodbye is stored");
    }

    /// As relays do it: the stream ends right behind Goodbye, while records are still on their way to the store.
    pub(super) async fn a_relay_that_hangs_up_with_its_goodbye_has_left(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store.clone(), &pki, LEASE).await;
        for round in 1..=8_u32 {
            let mut relay = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", round.into())).await;
            relay.load(v1::Load::default()).await;
            let change = vec![relay.put(round, 1)];
            relay.batch(change).await;
            relay.leave().await;
            let owner = store.get("owners/192.0.2.1").await.expect("a store");
            assert_eq!(owner, None, "round {round}: given up before the session ends");
        }
        assert_eq!(stored(&store, EU_1).await.len(), 8);
    }

    pub(super) async fn a_thousand_creates_in_a_second_are_stored_300_ms_later(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store.clone(), &pki, LEASE).await;
        let mut relay = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 1)).await;
        for flush in 0..10 {
            let changes = (0..100).map(|n| relay.put(flush * 100 + n, 1)).collect();
            relay.batch(changes).await;
            relay.load(v1::Load::default()).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let last = Instant::now() - Duration::from_millis(100);
        eventually("all stored", || async { stored(&store, EU_1).await.len() == 1000 }).await;
        assert!(last.elapsed() < Duration::from_millis(300), "{:?}", last.elapsed());
        relay.acked(10).await;
        let page = replica.allocations.list(&Filter::default(), 1000, "").await.expect("a list");
        assert_eq!((page.allocations.len(), page.unreadable, page.next), (1000, 0, None));

        let changes = (0..100).map(|n| relay.ended(n, 2)).collect();
        let last = Instant::now();
        relay.batch(changes).await;
        eventually("the ended ones gone", || async { stored(&store, EU_1).await.len() == 900 }).await;
        assert!(last.elapsed() < Duration::from_millis(300), "{:?}", last.elapsed());
    }

    pub(super) async fn an_older_process_is_superseded_and_writes_nothing(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store.clone(), &pki, LEASE).await;
        let mut old = Relay::join(&pki, &replica, hello("eu-1", 1, "old", 1)).await;
        let written = vec![old.put(1, 1)];
        let batch = old.batch(written).await;
        old.acked(batch).await;
        let new = Relay::join(&pki, &replica, hello("eu-1", 1, "new", 1)).await;
        assert_eq!(new.welcome.epoch, 2, "epochs grow even if the relay forgot its own");

        let before = stored(&store, EU_1).await;
        let stale = vec![old.put(1, 9), old.put(2, 1)];
        old.batch(stale).await;
        let superseded = old.hear_until("superseded", |heard| match heard {
            Heard::Superseded(superseded) => Some(superseded),
            Heard::Ack(_) => panic!("a stale batch was acknowledged"),
            _ => None,
        });
        assert_eq!(superseded.await, v1::Superseded { epoch: 2, owner: "eu-1".to_owned() });
        assert_eq!(stored(&store, EU_1).await, before);
    }

    pub(super) async fn an_older_session_of_the_same_process_writes_nothing(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store.clone(), &pki, LEASE).await;
        let mut old = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 1)).await;
        let mut new = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 1)).await;
        assert_eq!(new.welcome.epoch, 1, "the same process keeps its epoch");
        let fresh = vec![new.put(1, 2)];
        let batch = new.batch(fresh).await;
        new.acked(batch).await;
        let before = stored(&store, EU_1).await;
        let stale = vec![old.put(1, 1)];
        old.batch(stale).await;
        assert_eq!(old.end().await.expect_err("replaced").code(), Code::Aborted);
        assert_eq!(stored(&store, EU_1).await, before);
        // The end of the old session does not make the node suspect.
        new.load(v1::Load { allocations: 1, ..v1::Load::default() }).await;
        replica
            .sees("the new session's load", |seen| {
                seen.nodes.get("eu-1").is_some_and(|node| node.load.allocations == 1 && !node.load.suspect)
            })
            .await;
    }

    pub(super) async fn a_session_moves_to_another_replica_with_lease_and_epoch(store: Tested) {
        let pki = Pki::new();
        let one = Replica::start(store.clone(), &pki, LEASE).await;
        let two = Replica::start(store.clone(), &pki, LEASE).await;
        assert_eq!(one.keys.current(), two.keys.current());
        let relay = Relay::join(&pki, &one, hello("eu-1", 1, "boot", 5)).await;
        relay.load(v1::Load { allocations: 3, ..v1::Load::default() }).await;
        two.sees("the load", |seen| seen.nodes.get("eu-1").is_some_and(|node| node.load.allocations == 3)).await;
        let before = node(&store, "eu-1").await.expect("registered");
        let mut events = two.fleet.subscribe();
        drop(one);
        drop(relay);
        let moved = Relay::join(&pki, &two, hello("eu-1", 1, "boot", 5)).await;
        assert_eq!(moved.welcome.epoch, 5);
        assert_eq!(node(&store, "eu-1").await.expect("registered"), before, "the same lease above all");
        // It lives past its lease by reports to the other replica.
        let begun = Instant::now();
        while begun.elapsed() < LEASE + Duration::from_secs(2) {
            moved.load(v1::Load { allocations: 3, ..v1::Load::default() }).await;
            tokio::time::sleep(Duration::from_millis(500)).await;
            assert!(node(&store, "eu-1").await.is_some());
        }
        while let Ok(event) = events.try_recv() {
            assert!(matches!(event.change, FleetChange::Changed(_)), "{event:?}");
        }
    }

    pub(super) async fn a_resync_removes_what_it_does_not_name(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store.clone(), &pki, LEASE).await;
        let mut neighbour = Relay::join(&pki, &replica, hello("eu-2", 2, "boot", 1)).await;
        let foreign = vec![neighbour.put(1, 1)];
        let batch = neighbour.batch(foreign).await;
        neighbour.acked(batch).await;
        let mut relay = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 1)).await;
        for chunk in 0..12 {
            let changes = (0..128).map(|n| relay.put(chunk * 128 + n, 1)).collect();
            relay.batch(changes).await;
        }
        let kept: Vec<u32> = (0..1536).filter(|n| n % 7 == 0).collect();
        let changes = kept.iter().map(|n| relay.put(*n, 2)).collect();
        let end = relay.resync(changes).await;
        // Sent after the resync: not its to remove.
        let later: Vec<u32> = (9000..9100).collect();
        let mut last = end;
        for n in &later {
            let change = vec![relay.put(*n, 1)];
            last = relay.batch(change).await;
        }
        relay.acked(last).await;
        let expected: BTreeSet<String> = kept.iter().chain(&later).map(|n| id(*n).to_text()).collect();
        let found: BTreeSet<String> = stored(&store, EU_1).await.into_iter().map(|(id, _)| id).collect();
        assert_eq!(found, expected);
        assert_eq!(stored(&store, "192.0.2.2").await.len(), 1);
    }

    pub(super) async fn a_lease_that_ended_is_granted_anew_under_the_same_epoch(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store.clone(), &pki, LEASE).await;
        let mut relay = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 4)).await;
        let before = node(&store, "eu-1").await.expect("registered");
        store.revoke(LeaseId(before.lease)).await.expect("a store");
        assert_eq!(node(&store, "eu-1").await, None);
        relay.load(v1::Load { allocations: 2, ..v1::Load::default() }).await;
        let change = vec![relay.put(1, 1)];
        let batch = relay.batch(change).await;
        relay.acked(batch).await;
        eventually("registered again", || async { node(&store, "eu-1").await.is_some() }).await;
        let after = node(&store, "eu-1").await.expect("registered");
        assert_ne!(after.lease, before.lease);
        let owner = store.get("owners/192.0.2.1").await.expect("a store").expect("owned");
        let owner: OwnerRecord = serde_json::from_slice(&owner.value).expect("JSON");
        assert_eq!((owner.node_id.as_str(), owner.epoch), ("eu-1", 4));
        replica
            .sees("the report that met the ended lease", |seen| {
                seen.nodes.get("eu-1").is_some_and(|node| node.load.allocations == 2)
            })
            .await;
    }

    pub(super) async fn a_standby_waits_for_the_owner_and_takes_over_after_it(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store.clone(), &pki, LEASE).await;
        let mut owner = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 6)).await;
        let change = vec![owner.put(1, 1)];
        let batch = owner.batch(change).await;
        owner.acked(batch).await;
        let standby = hello("eu-9", 1, "standby", 40);
        let mut client = pki.client(&replica, "relay/eu-9").await;
        let (_, _, first) = Relay::greet(&mut client, standby.clone()).await.expect("a session");
        assert_eq!(first, Some(Heard::Superseded(v1::Superseded { epoch: 6, owner: "eu-1".to_owned() })));

        drop(owner);
        eventually("the owner's lease ended", || async {
            store.get("owners/192.0.2.1").await.expect("a store").is_none()
        })
        .await;
        let taken = Relay::join(&pki, &replica, hello("eu-9", 1, "standby", 1)).await;
        assert_eq!(taken.welcome.epoch, 7);
        assert_eq!(stored(&store, EU_1).await.len(), 1, "the successor adopts the allocations");
        // The old owner comes back too late.
        let mut client = pki.client(&replica, "relay/eu-1").await;
        let (_, _, first) = Relay::greet(&mut client, hello("eu-1", 1, "boot", 6)).await.expect("a session");
        assert_eq!(first, Some(Heard::Superseded(v1::Superseded { epoch: 7, owner: "eu-9".to_owned() })));
    }

    pub(super) async fn records_are_restored_to_who_may_own_them(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store.clone(), &pki, LEASE).await;
        let mut relay = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 1)).await;
        for chunk in 0..5 {
            let changes = (0..100).map(|n| relay.put(chunk * 100 + n, 1)).collect();
            relay.batch(changes).await;
        }
        relay.acked(5).await;
        let request =
            |node_id: &str| v1::RestoreRequest { node_id: node_id.to_owned(), relay_address: EU_1.to_owned() };
        let mut client = pki.client(&replica, "relay/eu-1").await;
        let mut batches = client.restore(request("eu-1")).await.expect("a stream").into_inner();
        let mut restored = BTreeSet::new();
        while let Some(batch) = timeout(batches.message()).await.expect("a batch") {
            for sealed in batch.records {
                let record = turn_core::Record::open(&sealed, &relay.record_keys).expect("as it was sealed");
                restored.insert(record.id);
            }
        }
        assert_eq!(restored, (0..500).map(id).collect());

        let mut other = pki.client(&replica, "relay/eu-2").await;
        let refused = other.restore(request("eu-2")).await.expect_err("owned by eu-1");
        assert_eq!(refused.code(), Code::FailedPrecondition);
        let refused = other.restore(request("eu-1")).await.expect_err("not its name");
        assert_eq!(refused.code(), Code::PermissionDenied);
        let refused = pki.client(&replica, "admin/ann").await.restore(request("eu-1")).await.expect_err("no relay");
        assert_eq!(refused.code(), Code::PermissionDenied);
        assert!(refused.message().contains("relay"), "{refused}");
        relay.say(Said::Goodbye(v1::Goodbye::default())).await;
        relay.end().await.expect("an orderly end");
        let mut batches = other.restore(request("eu-2")).await.expect("nobody owns it now").into_inner();
        assert!(!timeout(batches.message()).await.expect("a batch").expect("records").records.is_empty());
    }

    pub(super) async fn a_relay_speaks_only_for_itself(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store.clone(), &pki, LEASE).await;
        for (identity, node_id) in [("relay/eu-2", "eu-1"), ("admin/root", "root"), ("controller/test", "test")] {
            let mut client = pki.client(&replica, identity).await;
            let refused = Relay::greet(&mut client, hello(node_id, 1, "boot", 1)).await.map(drop);
            let refused = refused.expect_err(identity);
            assert_eq!(refused.code(), Code::PermissionDenied, "{identity}: {refused}");
        }
        // Of another CA: no connection, or none that lasts.
        let foreign = Pki::new();
        let connected = tokio::spawn(async move {
            let mut client = foreign.client(&replica, "relay/eu-1").await;
            Relay::greet(&mut client, hello("eu-1", 1, "boot", 1)).await.expect("no session");
        });
        connected.await.expect_err("a certificate of another cluster");
        assert!(store.range("nodes/", None, 1).await.expect("a store").entries.is_empty());
        assert!(store.range("owners/", None, 1).await.expect("a store").entries.is_empty());
    }

    pub(super) async fn what_no_relay_sends_ends_the_session(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store.clone(), &pki, LEASE).await;
        let good = |relay: &Relay| relay.put(1, 1);
        type Bad = fn(v1::RecordChange) -> Vec<v1::RecordChange>;
        let cases: &[(&str, Bad)] = &[
            ("an id of 15 bytes", |change| vec![v1::RecordChange { allocation_id: vec![0; 15], ..change }]),
            ("an epoch not granted", |change| vec![v1::RecordChange { epoch: change.epoch + 1, ..change }]),
            ("a huge record", |change| vec![v1::RecordChange { record: vec![0; 64 * 1024 + 1], ..change }]),
            ("129 changes", |change| vec![change; 129]),
        ];
        for (what, bad) in cases {
            let mut relay = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 1)).await;
            let changes = bad(good(&relay));
            relay.batch(changes).await;
            let ended = relay.end().await.expect_err(what);
            assert_eq!(ended.code(), Code::InvalidArgument, "{what}: {ended}");
        }
        let mut relay = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 1)).await;
        relay.say(Said::ResyncEnd(v1::ResyncEnd { batch_id: 1 })).await;
        assert_eq!(relay.end().await.expect_err("no begin").code(), Code::InvalidArgument);
        let mut relay = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 1)).await;
        relay.say(Said::Hello(hello("eu-1", 1, "boot", 1))).await;
        assert_eq!(relay.end().await.expect_err("a second Hello").code(), Code::FailedPrecondition);
        assert!(stored(&store, EU_1).await.is_empty());
        // As large a batch as a relay may send is taken, in parts.
        let mut relay = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 1)).await;
        let large = |n| v1::RecordChange { record: vec![7; 30_000], ..relay.put(n, 1) };
        let changes = (0..128).map(large).collect();
        let batch = relay.batch(changes).await;
        relay.acked(batch).await;
        assert_eq!(stored(&store, EU_1).await.len(), 128);
    }

    pub(super) async fn a_revocation_reaches_the_relay_through_any_replica(store: Tested) {
        let pki = Pki::new();
        let one = Replica::start(store.clone(), &pki, LEASE).await;
        let two = Replica::start(store.clone(), &pki, LEASE).await;
        let mut relay = Relay::join(&pki, &one, hello("eu-1", 1, "boot", 1)).await;
        let changes = vec![relay.put(1, 1), relay.put(2, 1)];
        let batch = relay.batch(changes).await;
        relay.acked(batch).await;
        assert!(!two.allocations.revoke(id(77)).await.expect("a store"), "there is no such allocation");
        assert!(two.allocations.revoke(id(1)).await.expect("a store"));
        let revoked = |heard| match heard {
            Heard::Revoke(revoke) => Some(revoke.allocation_id),
            _ => None,
        };
        assert_eq!(relay.hear_until("a revocation", revoked).await, id(1).0);
        // A session that begins before the relay obeyed is told again.
        drop(relay);
        let mut again = Relay::join(&pki, &two, hello("eu-1", 1, "boot", 1)).await;
        assert_eq!(again.hear_until("a revocation", revoked).await, id(1).0);
    }

    pub(super) async fn members_are_told_of_each_other(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store, &pki, LEASE).await;
        let mut one = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 1)).await;
        let two = Relay::join(&pki, &replica, hello("eu-2", 2, "boot", 1)).await;
        let members = |names: &'static [&'static str]| {
            move |heard| match heard {
                Heard::Members(members) => {
                    let told: Vec<&str> = members.members.iter().map(|member| member.node_id.as_str()).collect();
                    (told == names).then_some(members)
                }
                _ => None,
            }
        };
        let both = one.hear_until("both members", members(&["eu-1", "eu-2"])).await;
        assert_eq!(both.members[1].relay_address, "192.0.2.2");
        two.say(Said::Goodbye(v1::Goodbye::default())).await;
        let left = one.hear_until("one member", members(&["eu-1"])).await;
        assert!(left.revision > both.revision);
    }

    pub(super) async fn allocations_are_listed_found_and_told(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store.clone(), &pki, LEASE).await;
        let mut one = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 1)).await;
        let elsewhere = v1::Hello { region: "us".to_owned(), ..hello("us-1", 2, "boot", 1) };
        let mut two = Relay::join(&pki, &replica, elsewhere).await;
        replica.sees("both nodes", |seen| seen.nodes.len() == 2).await;
        let mut events = replica.allocations.subscribe();
        let changes = (0..30).map(|n| one.put(n, 1)).collect();
        let batch = one.batch(changes).await;
        one.acked(batch).await;
        let changes = (100..120).map(|n| two.put(n, 1)).collect();
        let batch = two.batch(changes).await;
        two.acked(batch).await;

        let mut told = BTreeSet::new();
        while told.len() < 50 {
            let event = timeout(events.recv()).await.expect("an event");
            assert_eq!(event.change, AllocationChange::Created);
            assert!(event.username.starts_with(b"1700000000:user"));
            told.insert(event.id);
        }
        assert_eq!(replica.allocations.count(), 50);
        let of = |node: &str, region: &str, user: &str| {
            let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
            Filter { node_id: some(node), region: some(region), user: some(user).map(String::into_bytes), text: None }
        };
        let cases = [
            ("all", of("", "", ""), 50),
            ("of a node", of("eu-1", "", ""), 30),
            ("of an unknown node", of("eu-7", "", ""), 0),
            ("of a region", of("", "us", ""), 20),
            ("of a user", of("", "", "user1"), 17),
            ("of a whole USERNAME on a node", of("eu-1", "eu", "1700000000:user1"), 10),
        ];
        for (what, filter, expected) in cases {
            for page_size in [1, 7, 1000] {
                let (mut found, mut token) = (BTreeSet::new(), String::new());
                loop {
                    let page = replica.allocations.list(&filter, page_size, &token).await.expect("a list");
                    assert!(page.allocations.len() <= page_size, "{what}");
                    found.extend(page.allocations.iter().map(|found| found.record.id));
                    match page.next {
                        Some(next) => token = next,
                        None => break,
                    }
                }
                assert_eq!(found.len(), expected, "{what} by {page_size}");
            }
        }
        replica.allocations.list(&Filter::default(), 1, "../nodes/").await.expect_err("no token of ours");

        let found = replica.allocations.get(id(105)).await.expect("a store").expect("stored");
        assert_eq!((found.node_id.as_str(), found.region.as_str()), ("us-1", "us"));
        assert_eq!((found.record.id, found.record.sequence), (id(105), 1));
        assert!(replica.allocations.get(id(77)).await.expect("a store").is_none());

        let changes = vec![two.ended(105, 2)];
        two.batch(changes).await;
        let event = timeout(events.recv()).await.expect("an event");
        assert_eq!((event.change, event.id), (AllocationChange::Ended, id(105)));
        assert!(replica.allocations.get(id(105)).await.expect("a store").is_none());
    }

    pub(super) async fn forged_records_are_left_out(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store.clone(), &pki, LEASE).await;
        let mut relay = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 1)).await;
        let mut damaged = relay.put(2, 1);
        let middle = damaged.record.len() / 2;
        damaged.record[middle] ^= 1;
        let misplaced = v1::RecordChange { allocation_id: id(3).0.to_vec(), ..relay.put(4, 1) };
        let unsealed = relay.record(5, 1).seal(&turn_core::KeyRing::default());
        let unsealed = v1::RecordChange { record: unsealed, ..relay.put(5, 1) };
        let changes = vec![relay.put(1, 1), damaged, misplaced, unsealed];
        let batch = relay.batch(changes).await;
        relay.acked(batch).await;
        let page = replica.allocations.list(&Filter::default(), 0, "").await.expect("a list");
        assert_eq!(page.allocations.iter().map(|found| found.record.id).collect::<Vec<_>>(), [id(1)]);
        assert_eq!(page.unreadable, 3);
        assert!(replica.allocations.get(id(2)).await.expect("a store").is_none());
    }

    pub(super) async fn expired_records_of_gone_relays_are_swept(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store.clone(), &pki, LEASE).await;
        let relay = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 1)).await;
        replica.sees("the node", |seen| seen.nodes.contains_key("eu-1")).await;
        let now = controller::fleet::unix_ms();
        let minute = 60_000;
        let cases = [
            ("192.0.2.99", 1, now - 2 * minute, "gone"),
            ("192.0.2.99", 2, now - minute / 2, "stays"),
            ("192.0.2.99", 3, now + minute, "stays"),
            (EU_1, 4, now - 10 * minute, "stays"),
            (EU_1, 5, now - 20 * minute, "gone"),
        ];
        for (address, number, expires_at, _) in cases {
            let address = address.parse().expect("an address");
            let record = turn_core::Record { expires_at, ..record(address, 1, number, 1) };
            let key = format!("allocations/{address}/{}", record.id.to_text());
            let put = Op::Put { key, value: record.seal(&relay.record_keys), lease: None };
            assert!(store.transact(Vec::new(), vec![put]).await.expect("a store"));
        }
        let unreadable = Op::Put { key: format!("allocations/{EU_1}/x"), value: b"x".to_vec(), lease: None };
        assert!(store.transact(Vec::new(), vec![unreadable]).await.expect("a store"));
        let _sweepers = ["a", "b"].map(|controller| {
            Sweeper::start(
                store.clone(),
                replica.fleet.clone(),
                replica.keys.clone(),
                controller.to_owned(),
                Retention::default(),
            )
        });
        for (address, number, _, fate) in cases {
            // The sweep begins when the grace is over; the relay lives on until then.
            let gone = || async {
                relay.load(v1::Load::default()).await;
                !stored(&store, address).await.iter().any(|(key, _)| *key == id(number).to_text())
            };
            if fate == "gone" {
                eventually("swept", gone).await;
            }
        }
        for (address, number, _, fate) in cases {
            let there = stored(&store, address).await.iter().any(|(key, _)| *key == id(number).to_text());
            assert_eq!(there, fate == "stays", "{address} {number}");
        }
        assert_eq!(stored(&store, EU_1).await.len(), 2, "what cannot be read is not judged in haste");
    }

    pub(super) async fn a_closing_replica_sends_its_relays_away(store: Tested) {
        let pki = Pki::new();
        let replica = Replica::start(store.clone(), &pki, LEASE).await;
        let mut relay = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 1)).await;
        replica.service.close();
        assert_eq!(relay.end().await.expect_err("closing").code(), Code::Unavailable);
        let mut client = pki.client(&replica, "relay/eu-1").await;
        let refused = Relay::greet(&mut client, hello("eu-1", 1, "boot", 1)).await.map(drop);
        assert_eq!(refused.expect_err("closing").code(), Code::Unavailable);
        let owner = store.get("load/eu-1").await.expect("a store").expect("its lease runs");
        assert!(!String::from_utf8_lossy(&owner.value).contains("\"suspect\":true"));
    }
}

/// etcd is killed for longer than the lease, with changes under way, and comes back: the relay's session never broke,
/// nobody was declared dead, and the store is true within 5 s.
#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_the_store_is_missing_acknowledgements_and_nothing_else() {
    let mut etcd = Etcd::start().await;
    let store = connect(&etcd.endpoint()).await;
    let pki = Pki::new();
    let replica = Replica::start(store.clone(), &pki, LEASE).await;
    let mut relay = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 3)).await;
    relay.load(v1::Load::default()).await;
    let changes = (0..10).map(|n| relay.put(n, 1)).collect();
    let batch = relay.batch(changes).await;
    relay.acked(batch).await;
    replica.sees("the node", |seen| seen.nodes.contains_key("eu-1")).await;
    let mut events = replica.fleet.subscribe();

    etcd.kill();
    let down = Instant::now();
    let mut last = 0;
    let mut number = 10;
    while down.elapsed() < LEASE + Duration::from_secs(3) {
        relay.load(v1::Load::default()).await;
        let changes = vec![relay.put(number, 1), relay.put(number % 5, u64::from(number)), relay.ended(number - 5, 99)];
        last = relay.batch(changes).await;
        number += 1;
        assert_eq!(replica.fleet.snapshot().nodes.len(), 1, "the stale view goes on being served");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert!(!replica.fleet.is_synced());
    assert!(etcd.start_again().await);
    let back = Instant::now();
    relay.acked(last).await;
    assert!(back.elapsed() < Duration::from_secs(5), "{:?}", back.elapsed());
    let registered = node(&store, "eu-1").await;
    timeout(replica.fleet.synced()).await;
    assert!(back.elapsed() < Duration::from_secs(5), "{:?}", back.elapsed());
    assert!(registered.is_some());
    let mut expected: BTreeSet<u32> = (0..number).collect();
    for ended in 10..number {
        expected.remove(&(ended - 5));
    }
    let expected: BTreeSet<String> = expected.into_iter().map(|n| id(n).to_text()).collect();
    let found: BTreeSet<String> = stored(&store, EU_1).await.into_iter().map(|(id, _)| id).collect();
    assert_eq!(found, expected);

    // Longer than the grace: the node is still there, and was all the time.
    let watched = Instant::now();
    while watched.elapsed() < LEASE + Duration::from_secs(6) {
        relay.load(v1::Load::default()).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        let node = replica.fleet.snapshot().nodes.get("eu-1").cloned().expect("never gone");
        assert_eq!(node.epoch, 3);
    }
    while let Ok(event) = events.try_recv() {
        assert!(matches!(event.change, FleetChange::Changed(_)), "{event:?}");
    }
}

/// A replica hangs on to a batch while its connection to etcd is stuck; the relay goes to another replica and writes
/// newer state. When the first connection comes alive again, the old batch must not land.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_was_stuck_lands_nowhere() {
    let etcd = Etcd::start().await;
    let proxy = Proxy::start(etcd.address()).await;
    let direct = connect(&etcd.endpoint()).await;
    let pki = Pki::new();
    let lease = Duration::from_secs(30);
    let stuck = Replica::start(connect(&proxy.endpoint()).await, &pki, lease).await;
    let healthy = Replica::start(direct.clone(), &pki, lease).await;
    let mut old = Relay::join(&pki, &stuck, hello("eu-1", 1, "boot", 1)).await;
    let change = vec![old.put(1, 1)];
    let batch = old.batch(change).await;
    old.acked(batch).await;

    proxy.set(Mode::Hold);
    let stale = vec![old.put(1, 2), old.put(2, 1)];
    old.batch(stale).await;
    let mut new = Relay::join(&pki, &healthy, hello("eu-1", 1, "boot", 1)).await;
    let fresh = vec![new.put(1, 3)];
    let batch = new.batch(fresh).await;
    new.acked(batch).await;
    let truth = stored(&direct, EU_1).await;
    proxy.set(Mode::Pass);
    assert_eq!(old.end().await.expect_err("replaced").code(), Code::Aborted);
    assert_eq!(stored(&direct, EU_1).await, truth);
    assert_eq!(truth.len(), 1);
}

/// A write gets stuck on the way to one member of etcd, is repeated through another, and followed by a newer one. When
/// the stuck copy arrives at last, it must not land.
#[tokio::test(flavor = "multi_thread")]
async fn a_delayed_copy_of_a_write_lands_nowhere() {
    let etcd = Etcd::start().await;
    let (one, two) = (Proxy::start(etcd.address()).await, Proxy::start(etcd.address()).await);
    let direct = connect(&etcd.endpoint()).await;
    let pki = Pki::new();
    let options = EtcdOptions {
        endpoints: vec![one.endpoint(), two.endpoint()],
        prefix: "turnpike/".to_owned(),
        ..EtcdOptions::default()
    };
    let store: Arc<dyn Store> = Arc::new(EtcdStore::connect(options).await.expect("etcd answers"));
    let replica = Replica::start(store, &pki, Duration::from_secs(60)).await;
    let mut relay = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 1)).await;
    let change = vec![relay.put(1, 1)];
    let batch = relay.batch(change).await;
    relay.acked(batch).await;

    // The only way left swallows the write.
    two.set(Mode::Cut);
    one.set(Mode::Hold);
    let held = one.held();
    let change = vec![relay.put(1, 2)];
    let batch = relay.batch(change).await;
    let is_held = || async { one.held() > held };
    eventually("the write is on its way", is_held).await;
    two.set(Mode::Pass);
    relay.acked(batch).await;
    let change = vec![relay.put(1, 3)];
    let batch = relay.batch(change).await;
    relay.acked(batch).await;
    let truth = stored(&direct, EU_1).await;
    one.set(Mode::Pass);
    // Nothing is to happen, so there is nothing to wait for but time.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(stored(&direct, EU_1).await, truth);
}

/// How many records one replica stores in etcd: relays with eight full batches in flight each, as real ones.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement; run it alone, in release, with --no-capture"]
#[allow(clippy::print_stderr)]
async fn records_per_second() {
    for relays in [1, 4, 16] {
        let etcd = Etcd::start().await;
        let store = connect(&etcd.endpoint()).await;
        let pki = Pki::new();
        let replica = Replica::start(store, &pki, Duration::from_secs(10)).await;
        let mut joined = Vec::new();
        for n in 0..relays {
            joined.push(Relay::join(&pki, &replica, hello(&format!("eu-{n}"), n, "boot", 1)).await);
        }
        let mut measured = tokio::task::JoinSet::new();
        let begun = Instant::now();
        for mut relay in joined {
            measured.spawn(async move {
                let mut batches = 0;
                while begun.elapsed() < Duration::from_secs(10) {
                    if batches >= 8 {
                        relay.acked(batches - 7).await;
                    }
                    relay.load(v1::Load::default()).await;
                    let first = u32::try_from(batches * 128).expect("few");
                    let changes = (first..first + 128).map(|n| relay.put(n, 1)).collect();
                    batches = relay.batch(changes).await;
                }
                relay.acked(batches).await;
                batches * 128
            });
        }
        let records: u64 = measured.join_all().await.into_iter().sum();
        let rate = records / begun.elapsed().as_secs();
        eprintln!("{relays} relays: {records} records, {rate}/s");
    }
}
