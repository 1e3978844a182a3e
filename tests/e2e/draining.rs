//! What an operator says of a relay holds everywhere at once, and whatever restarts.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use harness::cluster::{Cluster, RelayOptions, Store};
use harness::etcd::Etcd;
use harness::place::Place;
use harness::turn::TurnClient;
use harness::{Host, eventually, run};
use serde_json::Value;
use turn_core::Transport;

use crate::steering::{handed_out, until_handed_out};

/// Within this every replica leaves a drained relay out.
const EVERYWHERE: Duration = Duration::from_secs(1);
/// Longest wait for what must happen.
const PATIENCE: Duration = Duration::from_secs(20);

/// A drained relay is handed out to nobody, by any controller, from the moment the command ends; it keeps what it holds;
/// controllers and the relay may be killed without it being forgotten; uncordoned, it is back at once.
#[test]
fn a_drained_relay_is_handed_out_to_nobody_until_it_is_uncordoned() -> Result<()> {
    run(async |test| {
        let etcd = Etcd::start(Place::on_loopback(1), test.path()).await?;
        let mut cluster = Cluster::new(test.path())?;
        let mut asked = cluster.controller(&Place::on_loopback(2), Store::Etcd(&etcd), "").await?;
        let mut other = cluster.controller(&Place::on_loopback(3), Store::Etcd(&etcd), "").await?;
        let options = RelayOptions::in_region("eu");
        let mut relay = cluster.relay("eu-1", &Place::on_loopback(11), &options).await?;
        let _stays = cluster.relay("eu-2", &Place::on_loopback(12), &options).await?;
        for controller in [&asked, &other] {
            until_handed_out(controller, &["eu-1", "eu-2"], PATIENCE).await?;
        }
        let login = asked.login("drained").await?;
        let from = Place::on_loopback(100).address;
        let mut client = TurnClient::open(&Host::Machine, from, relay.address(), Transport::Udp, &login).await?;
        client.allocate().await?;

        turnctl(&cluster, &["drain", "eu-1", "--deadline", "10m"]).await?;
        let start = Instant::now();
        let nodes = handed_out(&asked, "eu").await?;
        ensure!(nodes.iter().eq(["eu-2"]), "after the answer of the controller asked it hands out {nodes:?}");
        until_handed_out(&other, &["eu-2"], PATIENCE).await?;
        test.figure("a drain was seen by the other controller after", format!("{:?}", start.elapsed()));
        ensure!(start.elapsed() < EVERYWHERE, "it took {:?}", start.elapsed());
        client.refresh(600).await.context("what is there goes on")?;
        let node = node(&cluster, "eu-1").await?;
        ensure!(node["state"] == "draining" && node["drain"]["by"] == "admin/test", "{node}");
        ensure!(node["drain"]["deadline"].is_string(), "{node}");
        let refused = cluster.turnctl(&Host::Machine, &["drain", "eu-2"]).await?;
        let error = String::from_utf8_lossy(&refused.stderr);
        ensure!(refused.status.code() == Some(1) && error.contains("--force"), "the last one: {error}");

        for controller in [&mut asked, &mut other] {
            controller.kill()?;
            controller.start().await?;
        }
        until_handed_out(&other, &["eu-2"], PATIENCE).await?;
        relay.kill()?;
        // It is not ready while it is to drain.
        relay.launch()?;
        eventually("the relay is back and drains", PATIENCE, async || {
            let node = self::node(&cluster, "eu-1").await?;
            if node["state"] == "draining" && node["epoch"] == 2 { Ok(()) } else { Err(anyhow!("{node}")) }
        })
        .await?;
        for controller in [&asked, &other] {
            let nodes = handed_out(controller, "eu").await?;
            ensure!(nodes.iter().eq(["eu-2"]), "after everything was killed: {nodes:?}");
        }

        let empties = async {
            eventually("the allocation is seen to be left", PATIENCE, async || {
                let node = self::node(&cluster, "eu-1").await?;
                if node["load"]["allocations"] == 1 { Ok(()) } else { Err(anyhow!("{node}")) }
            })
            .await?;
            client.refresh(0).await
        };
        let (waited, emptied) = tokio::join!(turnctl(&cluster, &["drain", "eu-1", "--wait"]), empties);
        emptied?;
        let waited = waited?;
        ensure!(waited.ends_with("relay eu-1 drained\n"), "{waited}");

        turnctl(&cluster, &["uncordon", "eu-1"]).await?;
        let start = Instant::now();
        for controller in [&asked, &other] {
            until_handed_out(controller, &["eu-1", "eu-2"], PATIENCE).await?;
        }
        ensure!(start.elapsed() < EVERYWHERE, "it took {:?}", start.elapsed());
        Ok(())
    })
}

/// Output of a `turnctl` that ends well.
async fn turnctl(cluster: &Cluster, arguments: &[&str]) -> Result<String> {
    let output = cluster.turnctl(&Host::Machine, arguments).await?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "turnctl {}: {}: {error}", arguments.join(" "), output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A relay as `turnctl nodes` shows it.
async fn node(cluster: &Cluster, id: &str) -> Result<Value> {
    let answer = cluster.turnctl_json(&Host::Machine, &["nodes"]).await?;
    let nodes = answer["nodes"].as_array().context("nodes")?;
    nodes.iter().find(|node| node["node_id"] == id).cloned().with_context(|| format!("no {id} in {answer}"))
}
