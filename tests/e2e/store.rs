//! What stands in etcd is what the relays hold.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use harness::cluster::{Cluster, Controller, Relay, RelayOptions, Store};
use harness::etcd::{Etcd, PREFIX};
use harness::place::Place;
use harness::turn::{Login, TurnClient};
use harness::{Host, Scenario, eventually, run};
use turn_core::Transport;

/// How long the store may lag behind a relay.
const LAG: Duration = Duration::from_millis(300);
/// Shared machines stall: a bound is asserted with this factor, and the figure shown is what was measured.
const SLACK: u32 = 3;

struct Fleet {
    etcd: Etcd,
    cluster: Cluster,
    _controller: Controller,
    relay: Relay,
    login: Login,
}

async fn fleet(test: &Scenario) -> Result<Fleet> {
    let etcd = Etcd::start(Place::on_loopback(1), test.path()).await?;
    let mut cluster = Cluster::new(test.path())?;
    let controller = cluster.controller(&Place::on_loopback(2), Store::Etcd(&etcd), "").await?;
    let relay = cluster.relay("eu-1", &Place::on_loopback(11), &RelayOptions::in_region("eu")).await?;
    let login = controller.login("store").await?;
    Ok(Fleet { etcd, cluster, _controller: controller, relay, login })
}

impl Fleet {
    async fn client(&self) -> Result<TurnClient> {
        let from = Place::on_loopback(100).address;
        TurnClient::open(&Host::Machine, from, self.relay.address(), Transport::Udp, &self.login).await
    }

    /// Waits until exactly `count` allocations are stored.
    async fn stored(&self, count: usize) -> Result<Duration> {
        let what = format!("{count} allocations in etcd");
        let (_, took) = eventually(&what, Duration::from_secs(10), async || {
            let found = self.etcd.allocations().await?.len();
            if found == count { Ok(()) } else { Err(anyhow!("{found}")) }
        })
        .await?;
        Ok(took)
    }
}

/// Within 300 ms of an Allocate its record is in etcd, within 300 ms of its end it is gone.
#[test]
fn an_allocation_is_stored_and_removed_within_300_ms() -> Result<()> {
    run(async |test| {
        let fleet = fleet(test).await?;
        let (mut made, mut ended) = (Vec::new(), Vec::new());
        for _ in 0..10 {
            let mut client = fleet.client().await?;
            let relayed = client.allocate().await?;
            made.push(fleet.stored(1).await?);

            let keys = fleet.etcd.etcdctl_keys(&format!("{PREFIX}allocations/")).await?;
            ensure!(keys.len() == 1 && keys[0].contains(&relayed.ip().to_string()), "etcdctl shows {keys:?}");

            client.refresh(0).await?;
            ended.push(fleet.stored(0).await?);
        }
        for (what, times) in [("stored after an Allocate", &mut made), ("removed after its end", &mut ended)] {
            times.sort();
            test.figure(what, format!("median {:?}, worst {:?}", times[times.len() / 2], times[times.len() - 1]));
            ensure!(times[times.len() - 1] < LAG * SLACK, "{what}: {times:?}");
        }
        Ok(())
    })
}

/// 1,000 allocations made in a second are all stored, `turnctl allocations` lists the same ones, and none stays.
#[test]
fn a_thousand_allocations_of_one_second_are_all_stored() -> Result<()> {
    run(async |test| {
        let fleet = fleet(test).await?;
        let mut clients = Vec::new();
        for _ in 0..1000 {
            clients.push(fleet.client().await?);
        }
        let start = Instant::now();
        let tasks: Vec<_> = clients
            .into_iter()
            .map(|mut client| tokio::spawn(async move { client.allocate().await.map(|relayed| (client, relayed)) }))
            .collect();
        let mut clients = Vec::new();
        let mut relayed = BTreeSet::new();
        for task in tasks {
            let (client, address) = task.await??;
            clients.push(client);
            relayed.insert(address.to_string());
        }
        let took = start.elapsed();
        test.figure("1,000 Allocates answered in", format!("{took:?}"));
        ensure!(relayed.len() == 1000, "only {} different relayed addresses", relayed.len());
        ensure!(took < Duration::from_secs(1) * SLACK, "1,000 Allocates took {took:?}");

        let lag = fleet.stored(1000).await?;
        test.figure("all 1,000 stored after", format!("{lag:?}"));
        ensure!(lag < LAG * SLACK, "the last was stored after {lag:?}");

        let listed = fleet.cluster.allocations(&Host::Machine).await?;
        let ids: BTreeSet<String> = listed.iter().filter_map(|a| a["id"].as_str().map(str::to_owned)).collect();
        let stored: BTreeSet<String> = fleet.etcd.allocations().await?.into_iter().collect();
        ensure!(ids == stored, "turnctl lists {} allocations, etcd holds {}", ids.len(), stored.len());
        let addresses: BTreeSet<String> = listed
            .iter()
            .flat_map(|a| a["relayed"].as_array().cloned().unwrap_or_default())
            .filter_map(|r| r.as_str().map(str::to_owned))
            .collect();
        ensure!(addresses == relayed, "turnctl shows other relayed addresses than the clients were given");

        let tasks: Vec<_> = clients.into_iter().map(|mut c| tokio::spawn(async move { c.refresh(0).await })).collect();
        for task in tasks {
            task.await??;
        }
        let lag = fleet.stored(0).await?;
        test.figure("all 1,000 removed after", format!("{lag:?}"));
        ensure!(lag < LAG * SLACK, "the last was removed after {lag:?}");
        Ok(())
    })
}

/// What an operator revokes ends on the relay and in the store.
#[test]
fn a_revoked_allocation_ends() -> Result<()> {
    run(async |test| {
        let fleet = fleet(test).await?;
        let (mut kept, mut revoked) = (fleet.client().await?, fleet.client().await?);
        kept.allocate().await?;
        fleet.stored(1).await?;
        let before: BTreeSet<String> = fleet.etcd.allocations().await?.into_iter().collect();
        revoked.allocate().await?;
        fleet.stored(2).await?;
        let now: BTreeSet<String> = fleet.etcd.allocations().await?.into_iter().collect();
        let id = now.difference(&before).next().cloned().ok_or_else(|| anyhow!("no new allocation"))?;

        let output = fleet.cluster.turnctl(&Host::Machine, &["allocations", "revoke", &id]).await?;
        ensure!(output.status.success(), "turnctl: {}", String::from_utf8_lossy(&output.stderr));
        fleet.stored(1).await?;
        ensure!(fleet.etcd.allocations().await? == before.into_iter().collect::<Vec<_>>(), "the wrong one was removed");
        // RFC 8656 §7.3: without an allocation a Refresh is a mismatch.
        let refused = revoked.refresh(600).await.err().map(|e| e.to_string()).unwrap_or_default();
        ensure!(refused.contains("437"), "a Refresh of a revoked allocation: {refused}");
        kept.refresh(600).await
    })
}
