//! Without controller and store: calls go on, new ones begin, relays start; afterwards the store is true again (P1).

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use harness::cluster::{Cluster, Relay, RelayOptions, Store};
use harness::etcd::Etcd;
use harness::place::Place;
use harness::traffic::{Pair, Traffic};
use harness::turn::{Login, TurnClient};
use harness::{Host, eventually, run_within};
use turn_core::Transport;

/// How soon after their return the store must be true.
const TRUE_AGAIN: Duration = Duration::from_secs(5);

/// Length of the outage; `.ci/long` makes it the ten minutes of the promise.
fn outage() -> Result<Duration> {
    Ok(Duration::from_secs(harness::number("TURNPIKE_OUTAGE_SECONDS", 12)?))
}

async fn allocated(relay: &Relay, login: &Login) -> Result<TurnClient> {
    let from = Place::on_loopback(100).address;
    let mut client = TurnClient::open(&Host::Machine, from, relay.address(), Transport::Udp, login).await?;
    client.allocate().await?;
    Ok(client)
}

/// Controller and etcd are killed; calls go on without a lost message, credentials in hand still open new allocations,
/// a relay killed meanwhile starts again; when both are back the store is true within five seconds.
#[test]
fn calls_outlive_controller_and_store() -> Result<()> {
    let outage = outage()?;
    run_within(outage + Duration::from_secs(120), async |test| {
        let mut etcd = Etcd::start(Place::on_loopback(1), test.path()).await?;
        let mut cluster = Cluster::new(test.path())?;
        let mut controller = cluster.controller(&Place::on_loopback(2), Store::Etcd(&etcd), "").await?;
        let options = RelayOptions::in_region("eu");
        let relay = cluster.relay("eu-1", &Place::on_loopback(11), &options).await?;
        let mut restarted = cluster.relay("eu-2", &Place::on_loopback(12), &options).await?;
        let login = controller.login("outage").await?;

        let call = Pair::join(allocated(&relay, &login).await?, allocated(&relay, &login).await?).await?;
        let mut ends = allocated(&relay, &login).await?;
        let mut survivor = allocated(&restarted, &login).await?;
        eventually("the store knows all four", Duration::from_secs(5), async || {
            let found = etcd.allocations().await?.len();
            if found == 4 { Ok(()) } else { Err(anyhow!("{found}")) }
        })
        .await?;
        let call = Traffic::start(call);

        controller.kill()?;
        etcd.kill()?;
        let down = Instant::now();
        let mut born = allocated(&relay, &login).await?;
        ends.refresh(0).await?;
        restarted.kill()?;
        restarted.start().await?;
        survivor.refresh(600).await?;
        let mut on_restarted = allocated(&restarted, &login).await?;
        // The rest of the outage, with signs of life on the way.
        while down.elapsed() < outage {
            let second = Duration::from_secs(1);
            tokio::try_join!(survivor.tend(second), born.tend(second), on_restarted.tend(second))?;
            allocated(&relay, &login).await?.refresh(0).await?;
        }

        etcd.restart().await?;
        let back = Instant::now();
        controller.start().await?;
        let mut expected = BTreeSet::new();
        let (pair, count) = call.stop().await?;
        for client in [&pair.first, &pair.second, &survivor, &born, &on_restarted] {
            expected.insert(client.relayed()?.to_string());
        }
        eventually("the store is true", TRUE_AGAIN * 3, async || {
            let found = cluster.relayed_addresses(&Host::Machine).await?;
            let stored = etcd.allocations().await?.len();
            if found == expected && stored == expected.len() {
                Ok(())
            } else {
                Err(anyhow!("{found:?}, {stored} stored"))
            }
        })
        .await?;
        let took = back.elapsed();
        test.figure("the store was true after the return of etcd by", format!("{took:?}"));
        ensure!(took < TRUE_AGAIN, "the store was true only after {took:?}");

        test.figure(
            "messages of the call",
            format!("{} sent, {} received, longest gap {:?}", count.sent, count.received, count.longest_gap),
        );
        ensure!(count.sent == count.received, "the call lost messages: {count:?}");
        for client in [&mut born, &mut on_restarted, &mut survivor] {
            client.refresh(0).await?;
        }
        Ok(())
    })
}

/// Killed in the middle of a call and started again on its state directory, a relay goes on with it (P2); the same with
/// a state directory that was deleted, from the store alone.
#[test]
fn calls_outlive_their_relay() -> Result<()> {
    run_within(Duration::from_secs(120), async |test| {
        let etcd = Etcd::start(Place::on_loopback(1), test.path()).await?;
        let mut cluster = Cluster::new(test.path())?;
        let controller = cluster.controller(&Place::on_loopback(2), Store::Etcd(&etcd), "").await?;
        let mut relay = cluster.relay("eu-1", &Place::on_loopback(11), &RelayOptions::in_region("eu")).await?;
        let login = controller.login("restart").await?;
        let mut pair = Pair::join(allocated(&relay, &login).await?, allocated(&relay, &login).await?).await?;
        pair.exchange(10).await?;
        for state in ["kept", "deleted"] {
            // The store alone restores all but the last 250 ms.
            tokio::time::sleep(Duration::from_millis(500)).await;
            let traffic = Traffic::start(pair);
            tokio::time::sleep(Duration::from_millis(500)).await;
            relay.kill()?;
            if state == "deleted" {
                std::fs::remove_dir_all(cluster.state_of("eu-1"))?;
            }
            let start = Instant::now();
            relay.start().await?;
            let ready = start.elapsed();
            let before = traffic.received();
            eventually("messages arrive again", Duration::from_secs(20), async || {
                let now = traffic.received();
                if now > before + 10 { Ok(()) } else { Err(anyhow!("{before} before, {now} now")) }
            })
            .await?;
            let stopped;
            (stopped, pair) = {
                let (pair, count) = traffic.stop().await?;
                (count, pair)
            };
            test.figure(
                &format!("relay restarted, state {state}"),
                format!("ready after {ready:?}, longest gap {:?}", stopped.longest_gap),
            );
            ensure!(stopped.longest_gap < Duration::from_secs(2), "state {state}: {stopped:?}");
            pair.exchange(10).await?;
        }
        Ok(())
    })
}
