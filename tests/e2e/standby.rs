//! A relay address that moves: two machines on one Ethernet, the clients behind its router (P3).

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::cable::Cable;
use harness::caller::echo;
use harness::cluster::{Cluster, Controller, Relay, RelayOptions, Store};
use harness::lab::NatLab;
use harness::peer::{Peer, connect};
use harness::traffic::{Pair, Traffic};
use harness::turn::TurnClient;
use harness::{Scenario, eventually, run_within};
use turn_core::Transport;

use crate::usage::{Talk, check, closed};

const PATIENCE: Duration = Duration::from_secs(30);
/// Lease and what P3 allows beyond it.
const TAKEOVER: Duration = Duration::from_secs(7);

/// The preferred relay, its standby, and the address both are configured with.
struct Stage {
    lab: NatLab,
    cluster: Cluster,
    controller: Controller,
    preferred: Relay,
    standby: Relay,
    /// Of the preferred one.
    cable: Cable,
}

async fn stage(test: &Scenario, more: &str) -> Result<Stage> {
    let lab = NatLab::start().await?;
    let mut cluster = Cluster::new(test.path())?;
    let controller = cluster.controller(&lab.server("controller").await?, Store::Embedded, more).await?;
    let address = Some(lab.free_address()?);
    let options = |more: &str| RelayOptions {
        address,
        more: format!("[address]\nmanage = true\ninterface = \"eth0\"\n{more}"),
        ..RelayOptions::in_region("eu")
    };
    let place = lab.server("eu-1").await?;
    let cable = lab.cable(&place).await?;
    let preferred = cluster.relay("eu-1", &place, &options("")).await?;
    let standby = cluster.launch_relay("eu-9", &lab.server("eu-9").await?, &options("standby = true"))?;
    let stage = Stage { lab, cluster, controller, preferred, standby, cable };
    stage.waits("eu-9").await?;
    Ok(stage)
}

impl Stage {
    /// State of a node, as turnctl shows it.
    async fn state(&self, node: &str) -> Result<String> {
        let answer = self.cluster.turnctl_json(&self.controller.place.host, &["nodes"]).await?;
        let nodes = answer["nodes"].as_array().with_context(|| format!("no nodes in {answer}"))?;
        let node = nodes.iter().find(|shown| shown["node_id"] == node);
        Ok(node.map_or("none", |shown| shown["state"].as_str().unwrap_or_default()).to_owned())
    }

    async fn is(&self, node: &str, wanted: &str) -> Result<()> {
        eventually(&format!("{node} is {wanted}"), PATIENCE, async || {
            let state = self.state(node).await?;
            ensure!(state == wanted, "{node} is {state}");
            Ok(())
        })
        .await?;
        Ok(())
    }

    async fn waits(&self, node: &str) -> Result<()> {
        self.is(node, "standby").await
    }

    /// Two clients with messages on their way.
    async fn traffic(&self) -> Result<Traffic> {
        let mut clients = Vec::new();
        for (client, user) in [(self.lab.alice(), "carol"), (self.lab.bob(), "dave")] {
            let place = client.place()?;
            let login = self.controller.login(user).await?;
            let server = self.preferred.address();
            let mut client = TurnClient::open(&place.host, place.address, server, Transport::Udp, &login).await?;
            client.allocate().await?;
            clients.push(client);
        }
        let (second, first) = (clients.pop().context("two")?, clients.pop().context("two")?);
        Ok(Traffic::start(Pair::join(first, second).await?))
    }

    /// One machine, and no other, answers for the address.
    async fn one_answers(&self) -> Result<String> {
        let mut answering = self.cable.answering(self.preferred.address().ip()).await?;
        ensure!(answering.len() == 1, "{answering:?} answer for the relay address");
        answering.pop_first().context("one")
    }
}

/// Stops the messages: none was refused anything, and the longest silence is within what is promised.
async fn within(traffic: Traffic, limit: Duration) -> Result<(Duration, Pair)> {
    let (mut pair, count) = traffic.stop().await?;
    let refusals = [pair.first.take_refusals(), pair.second.take_refusals()].concat();
    let wrong: Vec<_> = refusals.iter().filter(|refusal| [400, 401, 437, 438].contains(&refusal.code)).collect();
    // Each client's first request is refused once, for want of a nonce.
    ensure!(wrong.len() <= 2, "wrong answers: {wrong:?}");
    ensure!(count.longest_gap < limit, "a silence of {:?}: {count:?}", count.longest_gap);
    Ok((count.longest_gap, pair))
}

/// The preferred relay's cable is cut in the middle of calls: the standby has address and allocations within the lease
/// and 2 s, and the calls go on over the same candidates. The cable mended, the old relay waits, and has its address
/// back when the standby has no more calls.
#[test]
fn a_standby_takes_calls_over_and_gives_the_address_back() -> Result<()> {
    run_within(Duration::from_secs(180), async |test| {
        let mut stage = stage(test, "").await?;
        let mut alice = Peer::start(&stage.lab.alice().host(), test.path(), "alice").await?;
        let mut bob = Peer::start(&stage.lab.bob().host(), test.path(), "bob").await?;
        let servers = stage.cluster.ice_servers(&stage.controller, "region=eu&transport=udp").await?;
        connect((&mut alice, &servers), (&mut bob, &servers), Duration::from_secs(15)).await?;
        let before = alice.decodes(10, PATIENCE).await?;
        alice.watch_silence().await?;
        let traffic = stage.traffic().await?;
        let owner = stage.one_answers().await?;

        let cut = Instant::now();
        stage.cable.cut(true).await?;
        stage.is("eu-9", "ready").await?;
        test.figure("a standby serves after the cut by", format!("{:?}", cut.elapsed()));
        alice.decodes(before.frames_decoded + 30, PATIENCE).await?;
        let taken = stage.one_answers().await?;
        ensure!(taken != owner, "{owner} answers although its cable is cut");

        stage.cable.cut(false).await?;
        stage.waits("eu-1").await?;
        ensure!(stage.one_answers().await? == taken, "the old machine answers again");
        let (gap, pair) = within(traffic, TAKEOVER).await?;
        test.figure("longest silence of a client", format!("{gap:?}"));
        let after = alice.decodes(before.frames_decoded + 60, PATIENCE).await?;
        let silence = alice.longest_silence().await?;
        test.figure("longest silence of a browser", format!("{silence:?}"));
        ensure!(silence < TAKEOVER, "the browser heard nothing for {silence:?}");
        ensure!(after.pair == before.pair && after.relayed == before.relayed, "{before:?} became {after:?}");
        // Five silent seconds may cost a browser two checks in a row: `disconnected`, from which it comes back by itself.
        ensure!(!after.states.iter().any(|state| state.state == "failed"), "states: {:?}", after.states);

        // Nobody calls any more.
        drop((alice, bob));
        for mut client in [pair.first, pair.second] {
            client.refresh(0).await?;
        }
        for allocation in stage.cluster.allocations(&stage.controller.place.host).await? {
            let id = allocation["id"].as_str().context("an id")?;
            stage.cluster.turnctl(&stage.controller.place.host, &["allocations", "revoke", id]).await?;
        }
        stage.is("eu-1", "ready").await?;
        stage.waits("eu-9").await?;
        ensure!(stage.one_answers().await? == owner, "the standby has stepped back");
        stage.preferred.stop().await?;
        Ok(())
    })
}

/// A process that dies leaves its address to the standby when its lease has ended, not before: started again in time it
/// keeps it. One that stands still and wakes up serves no more.
#[test]
fn a_dead_process_and_a_frozen_one_are_succeeded() -> Result<()> {
    run_within(Duration::from_secs(120), async |test| {
        let mut stage = stage(test, "lease = 3").await?;
        let owner = stage.one_answers().await?;
        let traffic = stage.traffic().await?;
        stage.preferred.kill()?;
        stage.preferred.start().await?;
        let (gap, pair) = within(traffic, Duration::from_secs(3)).await?;
        test.figure("silence while the owner was started again", format!("{gap:?}"));
        ensure!(stage.one_answers().await? == owner, "the owner was quick enough");
        stage.waits("eu-9").await?;

        let traffic = Traffic::start(pair);
        let frozen = Instant::now();
        stage.preferred.freeze(true)?;
        stage.is("eu-9", "ready").await?;
        ensure!(frozen.elapsed() > Duration::from_secs(2), "before its lease ended");
        stage.preferred.freeze(false)?;
        stage.waits("eu-1").await?;
        ensure!(stage.one_answers().await? != owner, "the old owner answers");
        within(traffic, TAKEOVER).await?;

        // The other way round: silence somewhere in the network, and a dead process.
        stage.standby.kill()?;
        stage.is("eu-1", "ready").await?;
        // The address of the dead process goes by itself, at about the time of its lease.
        eventually("the preferred one alone has the address", Duration::from_secs(5), async || {
            ensure!(stage.one_answers().await? == owner, "the preferred one is the owner again");
            Ok(())
        })
        .await?;
        Ok(())
    })
}

/// Packets are counted once, by whoever carried them (P11). An orderly end hands its counts over whole. A machine that is
/// gone takes along what it had not told yet; the entry says so, and what it tells when it is back is not added.
#[test]
fn usage_is_handed_over_neither_lost_nor_counted_twice() -> Result<()> {
    run_within(Duration::from_secs(150), async |test| {
        let mut stage = stage(test, "").await?;
        let peer = echo(&stage.lab.server("peer").await?).await?;
        let (from, relay) = (stage.lab.alice().place()?, stage.preferred.address());
        let host = stage.controller.place.host.clone();
        let begin = async |stage: &Stage, user: &str| {
            Talk::begin(&from, &stage.controller.login(user).await?, relay, Transport::Udp, peer).await
        };
        let mut alice = begin(&stage, "alice").await?;
        ensure!(stage.preferred.stop().await?.success(), "an orderly end");
        stage.is("eu-9", "ready").await?;
        // A request is asked again until the address is there; a packet of data is not.
        alice.client.refresh(600).await?;
        alice.talk().await?;
        stage.preferred.launch()?;
        stage.waits("eu-1").await?;
        ensure!(stage.standby.stop().await?.success(), "an orderly end");
        stage.is("eu-1", "ready").await?;
        alice.client.refresh(600).await?;
        alice.talk().await?;
        stage.standby.launch()?;
        stage.waits("eu-9").await?;
        alice.client.refresh(0).await?;
        check(&closed(&stage.cluster, &host, "alice").await?, &alice, "deleted", false)?;

        let mut eve = begin(&stage, "eve").await?;
        let before = eve.packets;
        // What a machine takes with it before the store has it is lost (P2).
        eventually("her allocation is stored", Duration::from_secs(5), async || {
            ensure!(stage.cluster.allocations(&host).await?.len() == 1, "not yet");
            Ok(())
        })
        .await?;
        stage.cable.cut(true).await?;
        stage.is("eu-9", "ready").await?;
        eve.client.refresh(600).await?;
        eve.talk().await?;
        stage.cable.cut(false).await?;
        stage.waits("eu-1").await?;
        eve.client.refresh(0).await?;
        let of_eve = closed(&stage.cluster, &host, "eve").await?;
        ensure!(of_eve["unclean"] == true, "{of_eve}");
        for counted in ["packets_to_peer", "packets_to_client"] {
            let counted = of_eve[counted].as_u64().context("a number")?;
            ensure!((eve.packets - before..=eve.packets).contains(&counted), "{of_eve}");
        }
        Ok(())
    })
}
