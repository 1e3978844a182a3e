//! TCP allocations (RFC 6062) as coturn's client uses them: sessions whose relayed addresses connect to each other.

use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use harness::cluster::{Cluster, RelayOptions, Store};
use harness::place::Place;
use harness::uclient::{Load, Tally};
use harness::{Host, eventually, run_within};

/// Every message sent over a data connection is received, whichever workers have its two ends, and nothing is left
/// behind. (`-P`, the passive mode, sends half of its messages to nobody, against coturn as well.)
#[test]
fn data_connections_lose_nothing() -> Result<()> {
    run_within(Duration::from_secs(120), async |test| {
        let mut cluster = Cluster::new(test.path())?;
        let controller = cluster.controller(&Place::on_loopback(2), Store::Embedded, "").await?;
        let options = RelayOptions { workers: 3, ..RelayOptions::in_region("eu") };
        let relay = cluster.relay("eu-1", &Place::on_loopback(11), &options).await?;
        let login = controller.login("uclient").await?;
        for size in [100, 8000] {
            let load = Load {
                server: relay.address(),
                username: login.username.clone(),
                password: login.password.clone(),
                sessions: 20,
                messages: 100,
                size,
                flags: &["-T"],
            };
            let tally = load.run(&Host::Machine, Duration::from_secs(50)).await?;
            test.figure(
                &format!("turnutils_uclient -T, {size} bytes"),
                format!("{} sent, {} received", tally.sent, tally.received),
            );
            ensure!(tally == Tally { sent: 2000, received: 2000 }, "{size} bytes: {tally:?}");
        }
        eventually("no allocation and no connection is left", Duration::from_secs(15), async || {
            let (allocations, connections) =
                (relay.metric("turn_allocations", "").await?, relay.metric("turn_connections", "").await?);
            if allocations + connections == 0.0 { Ok(()) } else { Err(anyhow!("{allocations}, {connections}")) }
        })
        .await?;
        Ok(())
    })
}
