//! The harness itself, with coturn in the place of the cluster: what it shows of ours, it can show.

use std::time::Duration;

use anyhow::{Result, ensure};
use harness::coturn::Coturn;
use harness::lab::NatLab;
use harness::peer::{Peer, connect};
use harness::{run, run_within};

/// Two browsers behind symmetric NATs meet through coturn, over UDP, and over TCP when UDP is blocked.
#[test]
fn browsers_meet_through_coturn() -> Result<()> {
    run_within(Duration::from_secs(180), async |test| {
        let lab = NatLab::start().await?;
        let server = lab.server("coturn").await?;
        let coturn = Coturn::start(&server, test.path()).await?;
        let mut alice = Peer::start(&lab.alice().host(), test.path(), "alice").await?;
        let mut bob = Peer::start(&lab.bob().host(), test.path(), "bob").await?;
        for transport in ["udp", "tcp"] {
            lab.alice().block_udp(transport == "tcp").await?;
            lab.bob().block_udp(transport == "tcp").await?;
            let servers = coturn.ice_servers(transport)?;
            let took = connect((&mut alice, &servers), (&mut bob, &servers), Duration::from_secs(30)).await?;
            eprintln!("coturn {transport}: connected in {took:?}");
            for peer in [&alice, &bob] {
                let report = peer.decodes(10, Duration::from_secs(20)).await?;
                ensure!(report.relay_protocol.as_deref() == Some(transport), "{report:?}");
                ensure!(report.local.as_deref() == Some("relay"), "{report:?}");
            }
        }
        Ok(())
    })
}

/// The NATs of the lab are symmetric: one socket is seen under another port at each server.
#[test]
fn nats_are_symmetric() -> Result<()> {
    run(async |_| {
        let lab = NatLab::start().await?;
        let seen = lab.mappings_of_alice().await?;
        ensure!(seen[0].ip() == seen[1].ip(), "{seen:?}");
        ensure!(
            seen[0].port() != seen[1].port(),
            "one mapping for two servers: {seen:?}"
        );
        lab.alice().block_udp(true).await?;
        ensure!(
            lab.mappings_of_alice().await.is_err(),
            "UDP passes although it is blocked"
        );
        Ok(())
    })
}
