//! The harness itself, with coturn in the place of the cluster: what it shows of ours, it can show.

use std::time::Duration;

use anyhow::{Result, ensure};
use harness::coturn::Coturn;
use harness::lab::NatLab;
use harness::peer::{Peer, connect};
use harness::place::Place;
use harness::traffic::Pair;
use harness::turn::TurnClient;
use harness::uclient::{Load, Tally};
use harness::{Host, run, run_within};
use turn_core::Transport;

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
            test.figure(&format!("coturn, {transport}: connect time"), format!("{took:?}"));
            for peer in [&alice, &bob] {
                let report = peer.decodes(10, Duration::from_secs(20)).await?;
                ensure!(report.relay_protocol.as_deref() == Some(transport), "{report:?}");
                ensure!(report.local.as_deref() == Some("relay"), "{report:?}");
            }
        }
        Ok(())
    })
}

/// Our client and coturn's load generator carry what they send, over UDP and TCP.
#[test]
fn clients_carry_packets_through_coturn() -> Result<()> {
    run(async |test| {
        let coturn = Coturn::start(&Place::on_loopback(21), test.path()).await?;
        let login = coturn.login()?;
        for transport in [Transport::Udp, Transport::Tcp] {
            let from = Place::on_loopback(100).address;
            let open = || TurnClient::open(&Host::Machine, from, coturn.address(), transport, &login);
            let (mut first, mut second) = (open().await?, open().await?);
            first.allocate().await?;
            second.allocate().await?;
            Pair::join(first, second).await?.exchange(50).await?;
            let load = Load {
                server: coturn.address(),
                username: login.username.clone(),
                password: login.password.clone(),
                sessions: 6,
                messages: 10,
                size: 100,
                tcp: transport.is_stream(),
            };
            let tally = load.run(&Host::Machine, Duration::from_secs(30)).await?;
            ensure!(tally == Tally { sent: 60, received: 60 }, "{transport:?}: {tally:?}");
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
        ensure!(seen[0].port() != seen[1].port(), "one mapping for two servers: {seen:?}");
        lab.alice().block_udp(true).await?;
        ensure!(lab.mappings_of_alice().await.is_err(), "UDP passes although it is blocked");
        Ok(())
    })
}
