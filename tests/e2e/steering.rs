//! Who is handed out to clients, and who no longer.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use harness::cluster::{Cluster, Controller, RelayOptions, Store};
use harness::etcd::Etcd;
use harness::place::Place;
use harness::{Host, eventually, run};

/// Life of a node's lease.
const LEASE: Duration = Duration::from_secs(5);
/// A bound that a shared machine may stretch.
const SLACK: Duration = Duration::from_secs(2);

/// Nodes that discovery hands out for the region.
pub(crate) async fn handed_out(controller: &Controller, region: &str) -> Result<BTreeSet<String>> {
    let answer: serde_json::Value = controller.http_json(&format!("/v1/ice-servers?region={region}&limit=8")).await?;
    let nodes = answer["nodes"].as_array().ok_or_else(|| anyhow!("no nodes in {answer}"))?;
    Ok(nodes
        .iter()
        .filter_map(|n| n.as_str().or(n["id"].as_str()).or(n["node_id"].as_str()).map(str::to_owned))
        .collect())
}

pub(crate) async fn until_handed_out(controller: &Controller, expected: &[&str], limit: Duration) -> Result<Duration> {
    let expected: BTreeSet<String> = expected.iter().map(|&id| id.to_owned()).collect();
    let (_, took) = eventually(&format!("discovery hands out {expected:?}"), limit, async || {
        let nodes = handed_out(controller, "eu").await.map_err(|e| format!("{e:#}"))?;
        if nodes == expected { Ok(()) } else { Err(format!("{nodes:?}")) }
    })
    .await?;
    Ok(took)
}

/// A relay that is killed for good, and one that hangs, leave discovery within the lease and a second; the one that
/// goes on again comes back by itself.
#[test]
fn a_dead_relay_leaves_discovery_within_its_lease_and_a_second() -> Result<()> {
    run(async |test| {
        let etcd = Etcd::start(Place::on_loopback(1), test.path()).await?;
        let mut cluster = Cluster::new(test.path())?;
        let controller = cluster.controller(&Place::on_loopback(2), Store::Etcd(&etcd), "").await?;
        let options = RelayOptions::in_region("eu");
        let _stays = cluster.relay("eu-1", &Place::on_loopback(11), &options).await?;
        let mut killed = cluster.relay("eu-2", &Place::on_loopback(12), &options).await?;
        let hangs = cluster.relay("eu-3", &Place::on_loopback(13), &options).await?;
        until_handed_out(&controller, &["eu-1", "eu-2", "eu-3"], Duration::from_secs(10)).await?;

        killed.kill()?;
        let took = until_handed_out(&controller, &["eu-1", "eu-3"], LEASE * 3).await?;
        test.figure("a killed relay left discovery after", format!("{took:?}"));
        ensure!(took < LEASE + Duration::from_secs(1) + SLACK, "it took {took:?}");

        // No end of its connections tells of this one.
        hangs.freeze(true)?;
        let start = Instant::now();
        until_handed_out(&controller, &["eu-1"], LEASE * 3).await?;
        let took = start.elapsed();
        test.figure("a hanging relay left discovery after", format!("{took:?}"));
        ensure!(took < LEASE + Duration::from_secs(1) + SLACK, "it took {took:?}");

        hangs.freeze(false)?;
        let took = until_handed_out(&controller, &["eu-1", "eu-3"], LEASE * 3).await?;
        test.figure("a relay that goes on is back in discovery after", format!("{took:?}"));
        Ok(())
    })
}

/// The nearest region that is there is served, by the table of distances.
#[test]
fn the_nearest_region_is_served() -> Result<()> {
    run(async |test| {
        let mut cluster = Cluster::new(test.path())?;
        let distances =
            "distances = [{ from = \"eu\", to = \"us\", ms = 90 }, { from = \"us\", to = \"ap\", ms = 60 }]";
        let controller = cluster.controller(&Place::on_loopback(2), Store::Embedded, distances).await?;
        let _eu = cluster.relay("eu-1", &Place::on_loopback(11), &RelayOptions::in_region("eu")).await?;
        let _us = cluster.relay("us-1", &Place::on_loopback(12), &RelayOptions::in_region("us")).await?;
        until_handed_out(&controller, &["eu-1", "us-1"], Duration::from_secs(10)).await?;
        for (asked, nearest) in [("eu", "eu-1"), ("us", "us-1"), ("ap", "us-1")] {
            let answer = cluster.turnctl_json(&Host::Machine, &["discover", "--region", asked]).await?;
            let first = &answer["relays"][0];
            ensure!(first["node_id"] == nearest, "{asked}: {answer}");
        }
        Ok(())
    })
}
