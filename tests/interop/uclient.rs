//! `turnutils_uclient`, coturn's own client.

use std::time::Duration;

use anyhow::{Result, ensure};
use harness::cluster::{Cluster, RelayOptions, Store};
use harness::place::Place;
use harness::uclient::{Load, Tally};
use harness::{Host, run_within};

/// 100 sessions of 200 messages each, over UDP and over TCP: every message sent is received.
#[test]
fn a_hundred_sessions_lose_nothing() -> Result<()> {
    run_within(Duration::from_secs(180), async |test| {
        let mut cluster = Cluster::new(test.path())?;
        let controller = cluster.controller(&Place::on_loopback(2), Store::Embedded, "").await?;
        let options = RelayOptions { workers: 2, ..RelayOptions::in_region("eu") };
        let relay = cluster.relay("eu-1", &Place::on_loopback(11), &options).await?;
        for tcp in [false, true] {
            let login = controller.login("uclient").await?;
            let load = Load {
                server: relay.address(),
                username: login.username,
                password: login.password,
                sessions: 100,
                messages: 200,
                size: 172,
                tcp,
            };
            let tally = load.run(&Host::Machine, Duration::from_secs(70)).await?;
            let transport = if tcp { "TCP" } else { "UDP" };
            test.figure(
                &format!("turnutils_uclient, {transport}"),
                format!("{} sent, {} received", tally.sent, tally.received),
            );
            ensure!(tally == Tally { sent: 20_000, received: 20_000 }, "{transport}: {tally:?}");
        }
        Ok(())
    })
}
