//! Clients get the relay that is nearest by what was measured, none that is gone or full, and the controller says why. Every
//! machine is a network namespace of its own, and the regions are 5, 40 and 120 ms away.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::chromium::Browser;
use harness::cluster::{Cluster, Controller, HTTP, Relay, RelayOptions, Store, TURN};
use harness::delay::Delay;
use harness::lab::{DataCenter, NatLab};
use harness::place::Place;
use harness::turn::TurnClient;
use harness::{Scenario, eventually, run};
use serde_json::Value;
use turn_core::Transport;

/// Regions, and how far they are, in milliseconds. The controller's own, which clients get of whom nothing is known, is not
/// the nearest.
const REGIONS: [(&str, u64); 3] = [("ap", 5), ("eu", 40), ("us", 120)];
const DISCOVERIES: usize = 1000;
/// Of the nearest relay: from 9 of 10 on it is overloaded.
const CAPACITY: usize = 10;
const PATIENCE: Duration = Duration::from_secs(15);
/// Bounds that a shared machine may stretch.
const SLACK: Duration = Duration::from_secs(2);

struct Stage {
    lab: DataCenter,
    cluster: Cluster,
    controller: Controller,
    client: Place,
    relays: Vec<Relay>,
    /// Where clients reach them.
    outside: Vec<Place>,
    _ways: Vec<Delay>,
}

impl Stage {
    async fn start(test: &Scenario) -> Result<Self> {
        let lab = DataCenter::start().await?;
        let mut cluster = Cluster::new(test.path())?;
        let controller =
            cluster.controller(&lab.server("controller").await?, Store::Embedded, "rate = { address = 0 }").await?;
        let (mut relays, mut outside, mut ways) = (Vec::new(), Vec::new(), Vec::new());
        for (region, ms) in REGIONS {
            let place = lab.server(&format!("{region}-1")).await?;
            let way = lab.server(&format!("{region}-way")).await?;
            let options = RelayOptions { public: Some(way.address), ..RelayOptions::in_region(region) };
            relays.push(cluster.relay(&format!("{region}-1"), &place, &options).await?);
            let (from, to) = (way.at(TURN), place.at(TURN));
            ways.push(way.host.run(Delay::start(from, to, Duration::from_millis(ms))).await?);
            outside.push(way);
        }
        super::steering::until_handed_out(&controller, &["ap-1", "eu-1", "us-1"], PATIENCE).await?;
        let client = lab.server("client").await?;
        Ok(Self { lab, cluster, controller, client, relays, outside, _ways: ways })
    }

    /// The relay that a client is sent to.
    async fn nearest(&self, client: &str) -> Result<String> {
        let answer: Value = self.controller.http_json(&format!("/v1/ice-servers?limit=1&client={client}")).await?;
        Ok(answer["nodes"][0].as_str().context("a node")?.to_owned())
    }

    /// How a relay stands for a client, in words.
    async fn outcome(&self, client: &str, relay: &str) -> Result<String> {
        let explained = self.turnctl(&["explain", "--client", client]).await?;
        let considered = explained["considered"].as_array().context("a list")?;
        let found =
            considered.iter().find(|it| it["node_id"] == relay).with_context(|| format!("{relay}: {explained}"));
        Ok(found?["outcome"].as_str().context("text")?.to_owned())
    }

    async fn turnctl(&self, arguments: &[&str]) -> Result<Value> {
        self.cluster.turnctl_json(&self.client.host, arguments).await
    }

    /// Until a client is sent to that relay.
    async fn until_nearest(&self, client: &str, expected: &str) -> Result<Duration> {
        let begun = Instant::now();
        eventually(&format!("{client} is sent to {expected}"), PATIENCE, async || {
            let nearest = self.nearest(client).await.map_err(|error| format!("{error:#}"))?;
            if nearest == expected { Ok(()) } else { Err(nearest) }
        })
        .await?;
        Ok(begun.elapsed())
    }
}

#[test]
fn the_nearest_relay_by_measured_round_trip_in_99_of_100_discoveries_and_none_that_is_gone_or_full() -> Result<()> {
    run(async |test| {
        let mut stage = Stage::start(test).await?;
        ensure!(
            stage.nearest("203.0.113.1").await? == "eu-1",
            "the controller's own region, as long as nothing is known"
        );
        let measured = stage.turnctl(&["netcheck", "--report", "--client", "203.0.113.7"]).await?;
        ensure!(measured["reported"] == 3, "{measured}");
        for (i, (region, ms)) in REGIONS.into_iter().enumerate() {
            let found = &measured["regions"][i];
            let rtt = found["rtt_ms"].as_f64().with_context(|| format!("{measured}"))?;
            ensure!(found["region"] == region && rtt >= ms as f64, "{measured}");
        }
        let mut answers = BTreeMap::<String, usize>::new();
        for i in 0..DISCOVERIES {
            *answers.entry(stage.nearest(&format!("203.0.113.{}", i % 256)).await?).or_default() += 1;
        }
        test.figure("discoveries of measured clients that gave the nearest relay", format!("{answers:?}"));
        ensure!(answers.get("ap-1").copied().unwrap_or(0) >= DISCOVERIES * 99 / 100, "{answers:?}");
        ensure!(
            stage.nearest("203.0.114.7").await? == "ap-1",
            "of the next network its neighbour's round trips are known"
        );
        ensure!(stage.nearest("198.51.100.7").await? == "eu-1", "of another network nothing is known");
        let discovered = stage.turnctl(&["discover", "--client", "203.0.113.9"]).await?;
        ensure!(discovered["relays"][0]["node_id"] == "ap-1", "gRPC says otherwise than HTTP: {discovered}");
        let explained = stage.turnctl(&["explain", "--client", "203.0.113.9"]).await?;
        ensure!(explained["considered"][0]["node_id"] == "ap-1", "{explained}");
        ensure!(explained["considered"][0]["basis"] == "measured", "{explained}");

        let client = "203.0.113.9";
        full(&mut stage, client).await?;
        let drained = stage.cluster.turnctl(&stage.client.host, &["drain", "ap-1", "--force"]).await?;
        ensure!(drained.status.success(), "{}", String::from_utf8_lossy(&drained.stderr));
        ensure!(stage.nearest(client).await? == "eu-1", "a draining relay is still handed out");
        ensure!(stage.outcome(client, "ap-1").await? == "left out: draining", "another reason");
        let uncordoned = stage.cluster.turnctl(&stage.client.host, &["uncordon", "ap-1"]).await?;
        ensure!(uncordoned.status.success(), "{}", String::from_utf8_lossy(&uncordoned.stderr));
        stage.until_nearest(client, "ap-1").await?;

        // One whose stream breaks, and one whose machine says nothing any more.
        stage.relays[0].kill()?;
        let took = stage.until_nearest(client, "eu-1").await?;
        test.figure("a relay was handed out after its stream broke for", format!("{took:?}"));
        ensure!(took < Duration::from_secs(1) + SLACK, "it took {took:?}");
        stage.lab.cable(&stage.relays[1].place).await?.mute(true).await?;
        let took = stage.until_nearest(client, "us-1").await?;
        test.figure("a relay was handed out after its machine went silent for", format!("{took:?}"));
        ensure!(took < Duration::from_secs(6) + SLACK, "it took {took:?}");
        Ok(())
    })
}

/// The nearest relay is full: new clients get the next, and again the nearest when it has room.
async fn full(stage: &mut Stage, client: &str) -> Result<()> {
    let public = Some(stage.outside[0].address);
    let more = format!("max_allocations = {CAPACITY}");
    let options = RelayOptions { public, more, ..RelayOptions::in_region("ap") };
    stage.cluster.configure(&stage.relays[0], &options)?;
    stage.relays[0].kill()?;
    stage.relays[0].start().await?;
    stage.until_nearest(client, "ap-1").await?;
    let login = stage.controller.login("crowd").await?;
    let mut crowd = Vec::new();
    for _ in 0..CAPACITY * 9 / 10 {
        let (from, server) = (stage.client.address, stage.outside[0].at(TURN));
        let mut one = TurnClient::open(&stage.client.host, from, server, Transport::Udp, &login).await?;
        one.allocate().await?;
        crowd.push(one);
    }
    stage.until_nearest(client, "eu-1").await?;
    let outcome = stage.outcome(client, "ap-1").await?;
    ensure!(outcome == "left out: overloaded", "{outcome}");
    for mut one in crowd {
        one.refresh(0).await?;
    }
    stage.until_nearest(client, "ap-1").await?;
    Ok(())
}

/// What a browser measures is the network and not how long it gathers, behind a NAT and without one.
#[test]
fn a_browser_measures_the_network() -> Result<()> {
    run(async |test| {
        let lab = NatLab::start().await?;
        let mut cluster = Cluster::new(test.path())?;
        let controller = cluster.controller(&lab.server("controller").await?, Store::Embedded, "").await?;
        let relay = cluster.relay("eu-1", &lab.server("eu-1").await?, &RelayOptions::in_region("eu")).await?;
        let measure = format!(
            "import('/turnpike.js').then(async ({{ roundTrip }}) => {{ const all = []; \
             while (all.length < 5) all.push(await roundTrip('stun:{}')); return all; }})",
            relay.address()
        );
        for (name, host) in [("natted", lab.alice().host()), ("public", lab.server("public").await?.host)] {
            let browser = Browser::launch(&host, test.path(), name).await?;
            let page = browser.open(&format!("http://{}/console", controller.place.at(HTTP))).await?;
            let measured: Vec<Option<f64>> = page.evaluate(&measure).await?;
            test.figure(&format!("round trips in ms, {name}"), format!("{measured:?}"));
            // A machine that has other things to do is slow now and then.
            let shortest = measured.iter().flatten().copied().reduce(f64::min).context("nothing was measured")?;
            ensure!(shortest < 40.0, "{name}: {measured:?}");
        }
        Ok(())
    })
}
