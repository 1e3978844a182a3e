//! Clients get the relay that is nearest by what was measured, and the controller says why.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::chromium::Browser;
use harness::cluster::{Cluster, HTTP, RelayOptions, Store, TURN};
use harness::delay::Delay;
use harness::lab::NatLab;
use harness::place::Place;
use harness::{Host, run};
use serde_json::Value;

/// Regions, and how far they are, in milliseconds. The controller's own, which clients get of whom nothing is known, is not
/// the nearest.
const REGIONS: [(&str, u64); 3] = [("ap", 5), ("eu", 40), ("us", 120)];
const DISCOVERIES: usize = 1000;

#[test]
fn the_nearest_relay_by_measured_round_trip_in_99_of_100_discoveries() -> Result<()> {
    run(async |test| {
        let mut cluster = Cluster::new(test.path())?;
        let controller = cluster.controller(&Place::on_loopback(2), Store::Embedded, "rate = { address = 0 }").await?;
        let mut relays = Vec::new();
        let mut ways = Vec::new();
        for (number, (region, ms)) in (11_u8..).zip(REGIONS) {
            let (place, outside) = (Place::on_loopback(number), Place::on_loopback(number + 100));
            let options = RelayOptions { public: Some(outside.address), ..RelayOptions::in_region(region) };
            relays.push(cluster.relay(&format!("{region}-1"), &place, &options).await?);
            ways.push(Delay::start(outside.at(TURN), place.at(TURN), Duration::from_millis(ms)).await?);
        }
        super::steering::until_handed_out(&controller, &["ap-1", "eu-1", "us-1"], Duration::from_secs(10)).await?;
        let nearest = async |client: &str| {
            let answer: Value = controller.http_json(&format!("/v1/ice-servers?limit=1&client={client}")).await?;
            Ok::<_, anyhow::Error>(answer["nodes"][0].as_str().context("a node")?.to_owned())
        };
        ensure!(nearest("203.0.113.1").await? == "eu-1", "the controller's own region, as long as nothing is known");

        let measured =
            cluster.turnctl_json(&Host::Machine, &["netcheck", "--report", "--client", "203.0.113.7"]).await?;
        ensure!(measured["reported"] == 3, "{measured}");
        for (i, (region, ms)) in REGIONS.into_iter().enumerate() {
            let found = &measured["regions"][i];
            let rtt = found["rtt_ms"].as_f64().with_context(|| format!("{measured}"))?;
            ensure!(found["region"] == region && rtt >= ms as f64, "{measured}");
        }
        let mut answers = BTreeMap::<String, usize>::new();
        for i in 0..DISCOVERIES {
            *answers.entry(nearest(&format!("203.0.113.{}", i % 256)).await?).or_default() += 1;
        }
        test.figure("discoveries of measured clients that gave the nearest relay", format!("{answers:?}"));
        ensure!(answers.get("ap-1").copied().unwrap_or(0) >= DISCOVERIES * 99 / 100, "{answers:?}");
        ensure!(nearest("203.0.114.7").await? == "eu-1", "of another network nothing is known");

        // Why, and why not any more.
        let explain = async || cluster.turnctl_json(&Host::Machine, &["explain", "--client", "203.0.113.9"]).await;
        let explained = explain().await?;
        ensure!(explained["considered"][0]["node_id"] == "ap-1", "{explained}");
        ensure!(explained["considered"][0]["basis"] == "measured", "{explained}");
        let drained = cluster.turnctl(&Host::Machine, &["drain", "ap-1", "--force"]).await?;
        ensure!(drained.status.success(), "{}", String::from_utf8_lossy(&drained.stderr));
        ensure!(nearest("203.0.113.9").await? == "eu-1", "a draining relay is still handed out");
        let explained = explain().await?;
        let considered = explained["considered"].as_array().context("a list")?;
        let ap = considered.iter().find(|it| it["node_id"] == "ap-1").context("ap-1")?;
        ensure!(ap["outcome"] == "left out: draining", "{explained}");
        Ok(())
    })
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
