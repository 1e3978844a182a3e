//! The harness itself, with coturn in the place of the cluster: what it shows of ours, it can show.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::certificate::Authority;
use harness::chromium::Surroundings;
use harness::coturn::Coturn;
use harness::lab::NatLab;
use harness::peer::{Peer, connect};
use harness::place::Place;
use harness::secure::Trust;
use harness::traffic::Pair;
use harness::turn::TurnClient;
use harness::uclient::{Load, Tally};
use harness::{Host, run, run_within};
use turn_core::Transport;

/// Two browsers behind symmetric NATs meet through coturn: over UDP, over TCP when UDP is blocked, and over TLS when
/// nothing but TCP to port 443 passes.
#[test]
fn browsers_meet_through_coturn() -> Result<()> {
    run_within(Duration::from_secs(180), async |test| {
        let lab = NatLab::start().await?;
        let server = lab.server("coturn").await?;
        let authority = Authority::new(test.path())?;
        let certificate = authority.issue("coturn", &[], &[server.address])?;
        let coturn = Coturn::start_secure(&server, test.path(), &certificate).await?;
        let home = test.directory("home")?;
        authority.trust_in(&home).await?;
        let around = Surroundings { home: Some(home), ..Surroundings::default() };
        let mut alice = Peer::start_with(&lab.alice().host(), test.path(), "alice", &around).await?;
        let mut bob = Peer::start_with(&lab.bob().host(), test.path(), "bob", &around).await?;
        for transport in ["udp", "tcp", "tls"] {
            for client in [lab.alice(), lab.bob()] {
                match transport {
                    "tls" => client.only(&[("tcp", coturn.secure_address())]).await?,
                    other => client.block_udp(other == "tcp").await?,
                }
            }
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

/// Our client carries what it sends over every transport, coturn's load generator over UDP and TCP.
#[test]
fn clients_carry_packets_through_coturn() -> Result<()> {
    run(async |test| {
        let place = Place::on_loopback(21);
        let authority = Authority::new(test.path())?;
        let certificate = authority.issue("coturn", &[], &[place.address])?;
        let coturn = Coturn::start_secure(&place, test.path(), &certificate).await?;
        let trust = Trust::new(&authority, &place.address.to_string())?;
        let login = coturn.login()?;
        for transport in [Transport::Udp, Transport::Tcp] {
            let from = Place::on_loopback(100).address;
            let open = || TurnClient::open(&Host::Machine, from, coturn.address(), transport, &login);
            joined(open().await?, open().await?).await?.exchange(50).await?;
            let load = Load {
                server: coturn.address(),
                username: login.username.clone(),
                password: login.password.clone(),
                sessions: 6,
                messages: 10,
                size: 100,
                flags: if transport.is_stream() { &["-t"] } else { &[] },
            };
            let tally = load.run(&Host::Machine, Duration::from_secs(30)).await?;
            ensure!(tally == Tally { sent: 60, received: 60 }, "{transport:?}: {tally:?}");
        }
        for transport in [Transport::Tls, Transport::Dtls] {
            let from = Place::on_loopback(100).address;
            let server = coturn.secure_address();
            let open = || TurnClient::open_secure(&Host::Machine, from, server, transport, &login, &trust);
            let mut pair = joined(open().await?, open().await?).await?;
            pair.exchange(50).await.with_context(|| format!("{transport:?}"))?;
        }
        Ok(())
    })
}

async fn joined(mut first: TurnClient, mut second: TurnClient) -> Result<Pair> {
    first.allocate().await?;
    second.allocate().await?;
    Pair::join(first, second).await
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
