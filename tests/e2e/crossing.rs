//! Browsers whose relays differ: a call by the backbone, around it, and with packets that arrive at the wrong relay.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use harness::cluster::{Cluster, Controller, Relay, RelayOptions, Store, TURN};
use harness::distance::{Distance, apart};
use harness::lab::NatLab;
use harness::partition::Cut;
use harness::peer::{Peer, connect};
use harness::turn::TurnClient;
use harness::{Scenario, eventually, run_within};
use turn_core::Transport;

/// Longest a call may take to connect before it counts as failed.
const CONNECT: Duration = Duration::from_secs(15);
/// Longest that a link may take to come up, or to come back.
const LINKED: Duration = Duration::from_secs(15);
/// Round trip between the two regions.
const REGIONS_APART: Duration = Duration::from_millis(80);

struct Stage {
    lab: NatLab,
    cluster: Cluster,
    controller: Controller,
    relays: [Relay; 2],
    _distances: [Distance; 2],
}

async fn stage(test: &Scenario) -> Result<Stage> {
    let lab = NatLab::start().await?;
    let mut cluster = Cluster::new(test.path())?;
    let controller = cluster.controller(&lab.server("controller").await?, Store::Embedded, "").await?;
    let more = "backbone = {}".to_owned();
    let options = |region: &str| RelayOptions { workers: 2, more: more.clone(), ..RelayOptions::in_region(region) };
    let (in_eu, in_us) = (lab.server("eu-1").await?, lab.server("us-1").await?);
    let distances = apart([&in_eu, &in_us], REGIONS_APART).await?;
    let eu = cluster.relay("eu-1", &in_eu, &options("eu")).await?;
    let us = cluster.relay("us-1", &in_us, &options("us")).await?;
    let stage = Stage { lab, cluster, controller, relays: [eu, us], _distances: distances };
    stage.reached("direct").await?;
    Ok(stage)
}

impl Stage {
    /// Waits until each relay says that it reaches the other this way.
    async fn reached(&self, path: &str) -> Result<()> {
        let host = &self.controller.place.host;
        eventually(&format!("both ends are {path}"), LINKED, async || {
            let answer = self.cluster.turnctl_json(host, &["backbone"]).await?;
            let relays = answer["relays"].as_array().context("relays")?.iter();
            let links: Vec<_> = relays.flat_map(|relay| relay["links"].as_array()).flatten().collect();
            let all = links.len() == 2 && links.iter().all(|link| link["path"] == path);
            if all { Ok(()) } else { Err(anyhow!("{answer}")) }
        })
        .await?;
        Ok(())
    }

    fn ip(&self, relay: usize) -> IpAddr {
        self.relays[relay].address().ip()
    }
}

/// Two browsers behind symmetric NATs, each at the relay of its own region, 80 ms from the other, and nothing passes from
/// relayed port to relayed port: they see and hear each other by the backbone. The link is cut and the ports are open: the call goes on
/// within a second. The link is back, and so is the call.
#[test]
fn browsers_at_different_relays_meet_by_the_backbone() -> Result<()> {
    run_within(Duration::from_secs(180), async |test| {
        let stage = stage(test).await?;
        let mut alice = Peer::start(&stage.lab.alice().host(), test.path(), "alice").await?;
        let mut bob = Peer::start(&stage.lab.bob().host(), test.path(), "bob").await?;
        let servers = async |region| {
            stage.cluster.ice_servers(&stage.controller, &format!("region={region}&limit=1&transport=udp")).await
        };
        let blocked = Cut::ports(&stage.relays[0].place, &[stage.ip(1)], 49_152..=65_535).await?;
        let took = connect((&mut alice, &servers("eu").await?), (&mut bob, &servers("us").await?), CONNECT).await?;
        test.figure("browsers at different relays: connect time", format!("{took:?}"));
        for (peer, relay) in [(&alice, 0), (&bob, 1)] {
            let report = peer.decodes(10, Duration::from_secs(20)).await?;
            let relayed = report.relayed.clone().context("relayed")?;
            ensure!(relayed.starts_with(&stage.ip(relay).to_string()), "not at its own relay: {report:?}");
            ensure!(report.remote.as_deref() == Some("relay"), "not to a relay: {report:?}");
            ensure!(report.round_trip_ms >= 80.0, "the regions are near: {report:?}");
        }
        ensure!(blocked.dropped().await? == 0, "something went from relayed port to relayed port");
        blocked.heal().await?;

        for peer in [&alice, &bob] {
            peer.watch_silence().await?;
        }
        let cut = Cut::ports(&stage.relays[0].place, &[stage.ip(1)], 3480..=3480).await?;
        stage.reached("plain_udp").await?;
        for peer in [&alice, &bob] {
            peer.decodes(10, Duration::from_secs(20)).await?;
        }
        cut.heal().await?;
        stage.reached("direct").await?;
        for peer in [&alice, &bob] {
            let report = peer.decodes(10, Duration::from_secs(20)).await?;
            let silence = peer.longest_silence().await?;
            test.figure("longest silence, link cut and back", format!("{silence:?}"));
            ensure!(silence < Duration::from_millis(1200), "silent for {silence:?}");
            ensure!(report.states.iter().all(|s| s.state != "disconnected" && s.state != "failed"), "{report:?}");
        }
        Ok(())
    })
}

/// A client's packets arrive at another relay all of a sudden: its allocation goes on, both ways, with requests and data,
/// and when they arrive where they did before, too.
#[test]
fn a_client_that_arrives_elsewhere_is_served() -> Result<()> {
    run_within(Duration::from_secs(60), async |test| {
        let stage = stage(test).await?;
        let host = stage.lab.alice().host();
        let own = stage.lab.alice().place()?.address;
        let login = stage.controller.login("alice").await?;
        let mut alice = TurnClient::open(&host, own, stage.relays[0].address(), Transport::Udp, &login).await?;
        let peer = stage.lab.server("peer").await?;
        let echo = harness::caller::echo(&peer).await?;
        alice.allocate().await?;
        alice.bind_channel(0x4000, echo).await?;
        answered(&mut alice, echo, Duration::from_secs(2)).await?;

        let client = eventually("its allocation is stored", Duration::from_secs(5), async || {
            let list = stage.cluster.allocations(&stage.controller.place.host).await?;
            let client = list.first().and_then(|it| it["client"].as_str()).context("no allocation")?;
            Ok::<_, anyhow::Error>(client.parse::<SocketAddr>()?)
        });
        let (client, _) = client.await?;
        stage.lab.divert(client.ip(), [stage.ip(0), stage.ip(1)], TURN).await?;
        let gap = answered(&mut alice, echo, Duration::from_secs(5)).await?;
        test.figure("a client that arrives at another relay is answered within", format!("{gap:?}"));
        ensure!(gap < Duration::from_secs(2), "only after {gap:?}");
        alice.refresh(600).await?;
        alice.permit(echo.ip()).await?;
        answered(&mut alice, echo, Duration::from_secs(1)).await?;
        let list = stage.cluster.allocations(&stage.controller.place.host).await?;
        ensure!(list.len() == 1 && list[0]["node_id"] == "eu-1", "{list:?}");
        Ok(())
    })
}

/// Sends until something comes back; how long that took.
async fn answered(client: &mut TurnClient, echo: SocketAddr, within: Duration) -> Result<Duration> {
    let began = Instant::now();
    for number in 0_u64.. {
        client.send(echo, &number.to_be_bytes()).await?;
        // By way of the other region it takes a while.
        if let Ok((_, data)) = client.receive(2 * REGIONS_APART).await
            && data == number.to_be_bytes()
        {
            return Ok(began.elapsed());
        }
        ensure!(began.elapsed() < within, "no answer within {within:?}");
    }
    unreachable!("numbers do not end")
}

/// In the middle of a call between browsers one end's packets arrive at the other relay: the call goes on, over the same
/// candidates, without a new connection.
#[test]
fn a_browser_whose_packets_arrive_elsewhere_stays_in_its_call() -> Result<()> {
    run_within(Duration::from_secs(120), async |test| {
        let stage = stage(test).await?;
        let mut alice = Peer::start(&stage.lab.alice().host(), test.path(), "alice").await?;
        let mut bob = Peer::start(&stage.lab.bob().host(), test.path(), "bob").await?;
        let servers = async |region| {
            stage.cluster.ice_servers(&stage.controller, &format!("region={region}&limit=1&transport=udp")).await
        };
        connect((&mut alice, &servers("eu").await?), (&mut bob, &servers("us").await?), CONNECT).await?;
        for peer in [&alice, &bob] {
            peer.decodes(10, Duration::from_secs(20)).await?;
            peer.watch_silence().await?;
        }
        let before = alice.report().await?;
        let (client, _) = eventually("its allocation is stored", Duration::from_secs(5), async || {
            let list = stage.cluster.allocations(&stage.controller.place.host).await?;
            let own = list.iter().find(|it| it["node_id"] == "eu-1").context("no allocation at eu-1")?;
            Ok::<_, anyhow::Error>(own["client"].as_str().context("client")?.parse::<SocketAddr>()?)
        })
        .await?;
        stage.lab.divert(client.ip(), [stage.ip(0), stage.ip(1)], TURN).await?;
        for peer in [&alice, &bob] {
            peer.decodes(60, Duration::from_secs(20)).await?;
            let silence = peer.longest_silence().await?;
            test.figure("longest silence, packets arrive elsewhere", format!("{silence:?}"));
            ensure!(silence < Duration::from_secs(4), "silent for {silence:?}");
        }
        let after = alice.report().await?;
        ensure!(after.pair == before.pair && after.relayed == before.relayed, "another pair: {before:?}, {after:?}");
        ensure!(after.states.iter().all(|s| s.state != "failed"), "{:?}", after.states);
        Ok(())
    })
}
