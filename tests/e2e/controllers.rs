//! Two controllers over one etcd: each one hangs in turn, and nobody who has both addresses notices.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use harness::cluster::{Cluster, RelayOptions, Store};
use harness::etcd::Etcd;
use harness::place::Place;
use harness::turn::TurnClient;
use harness::{Host, eventually, run_within};
use serde_json::Value;
use turn_core::Transport;

/// Longer than a relay's lease and the grace that a lost controller gives.
const HANGS: Duration = Duration::from_secs(12);

#[test]
fn a_controller_that_hangs_is_left_for_the_other() -> Result<()> {
    run_within(Duration::from_secs(120), async |test| {
        let etcd = Etcd::start(Place::on_loopback(1), test.path()).await?;
        let mut cluster = Cluster::new(test.path())?;
        let mut controllers = Vec::new();
        for number in [2, 3] {
            controllers.push(cluster.controller(&Place::on_loopback(number), Store::Etcd(&etcd), "").await?);
        }
        let relay = cluster.relay("eu-1", &Place::on_loopback(11), &RelayOptions::in_region("eu")).await?;
        for controller in &controllers {
            eventually("every replica knows the relay", Duration::from_secs(5), async || {
                let nodes: Value = controller.http_json("/v1/nodes").await?;
                if nodes.to_string().contains("\"eu-1\"") { Ok(()) } else { Err(anyhow!("{nodes}")) }
            })
            .await?;
        }
        for (hangs, other) in [(0, 1), (1, 0)] {
            let login = controllers[other].login("replicas").await?;
            controllers[hangs].freeze(true)?;
            let since = Instant::now();
            let mut stored = None;
            while since.elapsed() < HANGS {
                let from = Place::on_loopback(100).address;
                let mut client =
                    TurnClient::open(&Host::Machine, from, relay.address(), Transport::Udp, &login).await?;
                client.allocate().await?;
                let nodes: Value = controllers[other].http_json("/v1/nodes").await?;
                ensure!(nodes.to_string().contains("\"eu-1\""), "called dead after {:?}: {nodes}", since.elapsed());
                tokio::time::sleep(Duration::from_millis(300)).await;
                if stored.is_none() && !etcd.allocations().await?.is_empty() {
                    stored = Some(since.elapsed());
                }
                client.refresh(0).await?;
            }
            let stored = stored.ok_or_else(|| anyhow!("nothing was stored while {hangs} hung"))?;
            test.figure(&format!("controller {} hangs, stored again after", hangs + 1), format!("{stored:?}"));
            // The first in the list hangs: the next is asked.
            let asked = Instant::now();
            let status = cluster.turnctl(&Host::Machine, &["status"]).await?;
            ensure!(status.status.success(), "turnctl status: {status:?}");
            ensure!(asked.elapsed() < Duration::from_secs(10), "turnctl took {:?}", asked.elapsed());
            controllers[hangs].freeze(false)?;
            eventually("the one that hung is well again", Duration::from_secs(10), async || {
                controllers[hangs].login("again").await.map(drop)
            })
            .await?;
        }
        Ok(())
    })
}
