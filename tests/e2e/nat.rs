//! Browsers behind symmetric NATs, relayed candidates only, servers from the cluster's own discovery.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use harness::cluster::{Cluster, Controller, Relay, RelayOptions, Store};
use harness::coturn::Coturn;
use harness::lab::NatLab;
use harness::peer::{Peer, Report, connect};
use harness::{Scenario, eventually, run_within};
use serde_json::Value;

/// Longest a call may take to connect before it counts as failed.
const CONNECT: Duration = Duration::from_secs(15);

/// A cluster on the lab's internet, a browser behind each NAT.
struct Stage {
    lab: NatLab,
    cluster: Cluster,
    controller: Controller,
    relay: Relay,
    alice: Peer,
    bob: Peer,
}

async fn stage(test: &Scenario) -> Result<Stage> {
    let lab = NatLab::start().await?;
    let mut cluster = Cluster::new(test.path())?;
    let controller = cluster.controller(&lab.server("controller").await?, Store::Embedded, "").await?;
    let options = RelayOptions { workers: 2, ..RelayOptions::in_region("eu") };
    let relay = cluster.relay("eu-1", &lab.server("eu-1").await?, &options).await?;
    let alice = Peer::start(&lab.alice().host(), test.path(), "alice").await?;
    let bob = Peer::start(&lab.bob().host(), test.path(), "bob").await?;
    Ok(Stage { lab, cluster, controller, relay, alice, bob })
}

impl Stage {
    async fn block_udp(&self, blocked: bool) -> Result<()> {
        self.lab.alice().block_udp(blocked).await?;
        self.lab.bob().block_udp(blocked).await
    }

    async fn servers(&self, transport: &str) -> Result<Value> {
        self.cluster.ice_servers(&self.controller, &format!("region=eu&transport={transport}")).await
    }

    async fn call(&mut self, servers: &Value) -> Result<Duration> {
        connect((&mut self.alice, servers), (&mut self.bob, servers), CONNECT).await
    }

    /// Both ends decode what the other sends, over their relays.
    async fn both_decode(&self, transport: &str) -> Result<()> {
        for peer in [&self.alice, &self.bob] {
            let report = peer.decodes(10, Duration::from_secs(20)).await?;
            ensure!(report.relay_protocol.as_deref() == Some(transport), "not {transport} to the relay: {report:?}");
            ensure!(report.local.as_deref() == Some("relay"), "not relayed: {report:?}");
            let ip = self.relay.address().ip().to_string();
            ensure!(report.relayed.as_ref().is_some_and(|r| r.starts_with(&ip)), "not over {ip}: {report:?}");
        }
        Ok(())
    }
}

/// Frames are decoded both ways over TURN UDP, and over TURN TCP with UDP blocked; with the relay stopped there is no
/// call.
#[test]
fn browsers_behind_symmetric_nats_meet() -> Result<()> {
    run_within(Duration::from_secs(180), async |test| {
        let mut stage = stage(test).await?;
        for transport in ["udp", "tcp"] {
            stage.block_udp(transport == "tcp").await?;
            let servers = stage.servers(transport).await?;
            let took = stage.call(&servers).await?;
            test.figure(&format!("browsers, {transport}: connect time"), format!("{took:?}"));
            stage.both_decode(transport).await?;
        }
        // The negative control: what carried these calls was the relay.
        stage.block_udp(false).await?;
        let servers = stage.servers("udp,tcp").await?;
        let ended = stage.relay.stop().await?;
        ensure!(ended.success(), "the relay ended with {ended}");
        ensure!(stage.call(&servers).await.is_err(), "a call without a relay");
        let report = stage.alice.report().await?;
        ensure!(report.relayed.is_none() && report.frames_decoded == 0, "{report:?}");
        Ok(())
    })
}

/// Rounds of the comparison; `.ci/long` makes more.
fn rounds() -> Result<usize> {
    harness::number("TURNPIKE_CALL_ROUNDS", 10)
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// Connect time in interleaved calls: our median is within 100 ms of coturn's, over UDP, and TCP with UDP blocked.
#[test]
fn calls_connect_as_fast_as_with_coturn() -> Result<()> {
    run_within(Duration::from_secs(600), async |test| {
        let mut stage = stage(test).await?;
        let coturn = Coturn::start(&stage.lab.server("coturn").await?, test.path()).await?;
        for transport in ["udp", "tcp"] {
            stage.block_udp(transport == "tcp").await?;
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            for _ in 0..rounds()? {
                let servers = stage.servers(transport).await?;
                ours.push(stage.call(&servers).await?);
                theirs.push(stage.call(&coturn.ice_servers(transport)?).await?);
            }
            let (ours, theirs) = (median(&mut ours), median(&mut theirs));
            test.figure(&format!("median connect time, {transport}"), format!("ours {ours:?}, coturn {theirs:?}"));
            ensure!(ours < theirs + Duration::from_millis(100), "{transport}: ours {ours:?}, coturn {theirs:?}");
        }
        Ok(())
    })
}

/// The relay is killed in the middle of a call and started again on its state directory: the call goes on over the same
/// candidate pair, no state changes, and less than two seconds after the start media flows again. Then the controller
/// dies too, and nobody notices.
#[test]
fn a_call_outlives_its_relay_and_the_controller() -> Result<()> {
    run_within(Duration::from_secs(180), async |test| {
        let mut stage = stage(test).await?;
        let servers = stage.servers("udp").await?;
        stage.call(&servers).await?;
        stage.both_decode("udp").await?;
        let before = [stage.alice.report().await?, stage.bob.report().await?];
        for peer in [&stage.alice, &stage.bob] {
            peer.watch_silence().await?;
        }

        stage.relay.kill()?;
        // Nothing arrives any more: what arrives from here on came through the new process.
        let silent = [quiet(&stage.alice).await?, quiet(&stage.bob).await?];
        let start = Instant::now();
        stage.relay.launch()?;
        let gaps = tokio::try_join!(resumed(&stage.alice, &silent[0], start), resumed(&stage.bob, &silent[1], start))?;
        let gap = gaps.0.max(gaps.1);
        test.figure("media flowed again after the start of the relay by", format!("{gap:?}"));
        test.figure(
            "silence in all",
            format!("{:?}, {:?}", stage.alice.longest_silence().await?, stage.bob.longest_silence().await?),
        );
        ensure!(gap < Duration::from_secs(2), "media flowed again only {gap:?} after the start");
        stage.both_decode("udp").await?;
        stage.controller.kill()?;
        stage.both_decode("udp").await?;

        for (peer, before) in [&stage.alice, &stage.bob].into_iter().zip(before) {
            let after = peer.report().await?;
            ensure!(
                after.pair == before.pair && after.relayed == before.relayed,
                "another pair: {before:?}, {after:?}"
            );
            ensure!(after.states.len() == before.states.len(), "the connection state changed: {:?}", after.states);
        }
        Ok(())
    })
}

/// Waits until no packet has come for a while.
async fn quiet(peer: &Peer) -> Result<Report> {
    let (report, _) = eventually("silence", Duration::from_secs(5), async || {
        let first = peer.report().await?;
        tokio::time::sleep(Duration::from_millis(200)).await;
        let second = peer.report().await?;
        if first.packets_received == second.packets_received { Ok(second) } else { Err(anyhow!("still receiving")) }
    })
    .await?;
    Ok(report)
}

/// Waits until packets come again; answers how long after `start`.
async fn resumed(peer: &Peer, silent: &Report, start: Instant) -> Result<Duration> {
    eventually("media flows again", Duration::from_secs(20), async || {
        let now = peer.report().await?.packets_received;
        if now > silent.packets_received { Ok(()) } else { Err(anyhow!("still {now} packets")) }
    })
    .await?;
    Ok(start.elapsed())
}
