//! deploy/disaster-recovery.md, as it says: etcd is lost with its data, under running calls.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use controller::fleet::Granted;
use harness::cluster::{Cluster, Controller, Relay, RelayOptions, Store};
use harness::etcd::{Etcd, PREFIX};
use harness::place::Place;
use harness::traffic::{Pair, Traffic};
use harness::turn::{Login, TurnClient};
use harness::{Host, Scenario, eventually, run_within};
use turn_core::Transport;

const PATIENCE: Duration = Duration::from_secs(30);
/// The longest silence a call may have: nothing but a relay's restart is one.
const SILENCE: Duration = Duration::from_secs(2);

struct Stage {
    etcd: Etcd,
    cluster: Cluster,
    controller: Controller,
    relays: Vec<Relay>,
}

async fn stage(test: &Scenario) -> Result<Stage> {
    let etcd = Etcd::start(Place::on_loopback(1), test.path()).await?;
    let mut cluster = Cluster::new(test.path())?;
    let controller = cluster.controller(&Place::on_loopback(2), Store::Etcd(&etcd), "").await?;
    let mut relays = Vec::new();
    for (id, number) in [("eu-1", 11), ("eu-2", 12)] {
        relays.push(cluster.relay(id, &Place::on_loopback(number), &RelayOptions::in_region("eu")).await?);
    }
    Ok(Stage { etcd, cluster, controller, relays })
}

async fn open(relay: &Relay, login: &Login) -> Result<TurnClient> {
    let from = Place::on_loopback(100).address;
    let mut client = TurnClient::open(&Host::Machine, from, relay.address(), Transport::Udp, login).await?;
    client.allocate().await?;
    Ok(client)
}

impl Stage {
    /// A call on each relay.
    async fn calls(&self, login: &Login) -> Result<Vec<Traffic>> {
        let mut calls = Vec::new();
        for relay in &self.relays {
            calls.push(Traffic::start(Pair::join(open(relay, login).await?, open(relay, login).await?).await?));
        }
        Ok(calls)
    }

    /// Ids of what is stored, once there are so many; in step with the relays.
    async fn stored(&self, count: usize) -> Result<BTreeSet<String>> {
        let (stored, _) = eventually("everything is stored, and nothing else", PATIENCE, async || {
            let stored: BTreeSet<String> = self.etcd.allocations().await?.into_iter().collect();
            ensure!(stored.len() == count, "{} of {count}", stored.len());
            Ok(stored)
        })
        .await?;
        Ok(stored)
    }

    /// Both relays have joined, and the cluster is well.
    async fn is_well(&self) -> Result<()> {
        let output = self.turnctl(&["status", "--wait", "--timeout", "30s"]).await?;
        let (_, took) = eventually("both relays are ready", PATIENCE, async || {
            let nodes = self.cluster.turnctl_json(&Host::Machine, &["nodes"]).await?;
            let nodes = nodes["nodes"].as_array().context("nodes")?;
            ensure!(nodes.len() == 2 && nodes.iter().all(|node| node["state"] == "ready"), "{nodes:?}");
            Ok(())
        })
        .await?;
        ensure!(took < PATIENCE, "{output}");
        Ok(())
    }

    async fn turnctl(&self, arguments: &[&str]) -> Result<String> {
        let output = self.cluster.turnctl(&Host::Machine, arguments).await?;
        ensure!(output.status.success(), "turnctl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    /// The highest epoch that was ever granted to a relay, as the store says.
    async fn epoch(&self, relay: &Relay) -> Result<u64> {
        let entries = self.etcd.get(&format!("{PREFIX}epochs/{}", relay.address().ip())).await?;
        let (_, value) = entries.first().context("an epoch")?;
        Ok(Granted::from_text(value).epoch)
    }
}

/// Stops the calls: none was refused or silent for longer, and each is refreshed as a client does.
async fn go_on(test: &Scenario, calls: Vec<Traffic>) -> Result<Vec<Pair>> {
    let mut pairs = Vec::new();
    for call in calls {
        let (mut pair, count) = call.stop().await.context("a call was dropped")?;
        test.figure("longest silence of a call while the store was lost", format!("{:?}", count.longest_gap));
        ensure!(count.longest_gap < SILENCE, "{count:?}");
        pair.first.refresh(600).await.context("the caller refreshes")?;
        pair.second.refresh(600).await.context("the callee refreshes")?;
        pairs.push(pair);
    }
    Ok(pairs)
}

/// "etcd is lost, no snapshot": an empty etcd and the controllers are started. One relay is restarted while there is
/// neither, so that what it puts back is out of its journal.
#[test]
fn an_empty_etcd_gets_everything_back_from_the_relays() -> Result<()> {
    run_within(Duration::from_secs(120), async |test| {
        let mut stage = stage(test).await?;
        let before = stage.controller.login("before").await?;
        let calls = stage.calls(&before).await?;
        let mut idle = open(&stage.relays[0], &before).await?;
        let stored = stage.stored(5).await?;
        let epochs = [stage.epoch(&stage.relays[0]).await?, stage.epoch(&stage.relays[1]).await?];

        stage.etcd.lose()?;
        open(&stage.relays[0], &before).await?.refresh(0).await.context("a new call while there is no store")?;
        stage.controller.stop().await?;
        stage.relays[1].kill()?;
        stage.relays[1].start().await?;
        stage.etcd.restart().await?;
        ensure!(stage.etcd.allocations().await?.is_empty(), "nothing is there to begin with");
        stage.controller.start().await?;
        stage.is_well().await?;
        ensure!(stage.stored(5).await? == stored, "the same allocations");
        for (relay, before) in stage.relays.iter().zip(epochs) {
            let now = stage.epoch(relay).await?;
            ensure!(now >= before, "{} went from epoch {before} to {now}", relay.id);
        }

        let pairs = go_on(test, calls).await?;
        idle.refresh(600).await?;
        // The second relay was started in between: what it knew of secrets, its state directory says.
        for relay in &stage.relays {
            for login in [&before, &stage.controller.login("after").await?] {
                open(relay, login).await?.refresh(0).await?;
            }
        }
        // What is stored anew is whole: a relay that has lost its own copy comes back from it.
        stage.stored(5).await?;
        stage.relays[0].kill()?;
        fs::remove_dir_all(stage.cluster.state_of("eu-1"))?;
        stage.relays[0].start().await?;
        for mut pair in pairs {
            pair.exchange(5).await?;
        }
        Ok(())
    })
}

/// "etcd is lost, a snapshot exists": what ended after the snapshot stays ended, what began after it is there, and keys
/// that are not in it are made good for by one rotation.
#[test]
fn a_snapshot_brings_back_nothing_that_has_ended() -> Result<()> {
    run_within(Duration::from_secs(150), async |test| {
        let mut stage = stage(test).await?;
        let before = stage.controller.login("before").await?;
        let calls = stage.calls(&before).await?;
        let mut ends = open(&stage.relays[0], &before).await?;
        let snapshot = test.file("etcd.snapshot");
        let of_snapshot = stage.stored(5).await?;
        stage.etcd.save(&snapshot).await?;

        ends.refresh(0).await?;
        stage.turnctl(&["keys", "rotate", "--wait"]).await?;
        let between = stage.controller.login("between").await?;
        let mut begun = open(&stage.relays[0], &between).await?;
        eventually("what was made after the snapshot is stored", PATIENCE, async || {
            let now: BTreeSet<String> = stage.etcd.allocations().await?.into_iter().collect();
            ensure!(now != of_snapshot && now.len() == 5, "{now:?}");
            Ok(())
        })
        .await?;
        let expected = stage.stored(5).await?;

        stage.etcd.lose()?;
        stage.controller.stop().await?;
        stage.etcd.restore(&snapshot).await?;
        stage.etcd.restart().await?;
        let restored: BTreeSet<String> = stage.etcd.allocations().await?.into_iter().collect();
        ensure!(restored == of_snapshot, "the snapshot is what is stored now");
        stage.controller.start().await?;
        stage.is_well().await?;
        eventually("what the relays hold is stored, and nothing else", PATIENCE, async || {
            let now: BTreeSet<String> = stage.etcd.allocations().await?.into_iter().collect();
            ensure!(now == expected, "{now:?}, not {expected:?}");
            Ok(())
        })
        .await?;
        stage.turnctl(&["keys", "rotate", "--wait"]).await?;

        let pairs = go_on(test, calls).await?;
        begun.refresh(600).await.context("what was made between the snapshot and the loss")?;
        for login in [before, between, stage.controller.login("after").await?] {
            open(&stage.relays[0], &login).await.context(login.username)?.refresh(0).await?;
        }
        // A relay without a copy of its own has the store's, which holds nothing stale.
        stage.relays[0].kill()?;
        fs::remove_dir_all(stage.cluster.state_of("eu-1"))?;
        stage.relays[0].start().await?;
        ensure!(ends.refresh(600).await.is_err(), "it has ended");
        for mut pair in pairs {
            pair.exchange(5).await?;
        }
        Ok(())
    })
}
