//! A relay that drains sends new clients away (RFC 8489 §10), and browsers follow.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use harness::cluster::{Cluster, Relay, RelayOptions, Store};
use harness::lab::NatLab;
use harness::peer::{Peer, connect};
use harness::{eventually, run_within};
use serde_json::{Value, json};

/// Longest a call may take to connect before it counts as failed.
const CONNECT: Duration = Duration::from_secs(15);

/// Where both ends' relayed addresses are, with frames decoded both ways.
async fn is_at(peers: [&Peer; 2], relay: &Relay, transport: &str) -> Result<()> {
    let ip = relay.address().ip().to_string();
    for peer in peers {
        let report = peer.decodes(10, Duration::from_secs(20)).await?;
        ensure!(report.relay_protocol.as_deref() == Some(transport), "not {transport} to the relay: {report:?}");
        ensure!(report.relayed.as_ref().is_some_and(|relayed| relayed.starts_with(&ip)), "not at {ip}: {report:?}");
    }
    Ok(())
}

/// Browsers that know nothing but a draining relay connect through another member, over UDP and over TCP; the call that
/// was there before goes on where it was; once the relay is taken back, it serves again.
#[test]
fn browsers_follow_a_draining_relay_to_another() -> Result<()> {
    run_within(Duration::from_secs(180), async |test| {
        let lab = NatLab::start().await?;
        let mut cluster = Cluster::new(test.path())?;
        let place = lab.server("controller").await?;
        let controller = cluster.controller(&place, Store::Embedded, "").await?;
        let options = RelayOptions { workers: 2, ..RelayOptions::in_region("eu") };
        let drains = cluster.relay("eu-1", &lab.server("eu-1").await?, &options).await?;
        let other = cluster.relay("eu-2", &lab.server("eu-2").await?, &options).await?;
        let login = controller.login("drain").await?;
        let servers = |transport: &str| -> Value {
            let url = format!("turn:{}?transport={transport}", drains.address());
            json!([{"urls": [url], "username": login.username, "credential": login.password}])
        };

        let mut alice = Peer::start(&lab.alice().host(), test.path(), "alice").await?;
        let mut bob = Peer::start(&lab.bob().host(), test.path(), "bob").await?;
        connect((&mut alice, &servers("udp")), (&mut bob, &servers("udp")), CONNECT).await?;
        is_at([&alice, &bob], &drains, "udp").await?;
        let before = alice.report().await?;

        let told = Instant::now();
        let output = cluster.turnctl(&place.host, &["drain", "eu-1"]).await?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        eventually("it drains", Duration::from_secs(10), async || match drains.metric("turn_draining", "").await {
            Ok(1.0) => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await?;
        // It says so before it does it.
        tokio::time::sleep(Duration::from_secs(3).saturating_sub(told.elapsed())).await;
        is_at([&alice, &bob], &drains, "udp").await?;
        let during = alice.report().await?;
        ensure!(during.pair == before.pair && during.states.len() == before.states.len(), "{before:?}, {during:?}");

        for transport in ["udp", "tcp"] {
            for client in [lab.alice(), lab.bob()] {
                client.block_udp(transport == "tcp").await?;
            }
            let servers = servers(transport);
            let took = connect((&mut alice, &servers), (&mut bob, &servers), CONNECT).await?;
            test.figure(
                &format!("browsers sent on by a draining relay, {transport}: connect time"),
                format!("{took:?}"),
            );
            is_at([&alice, &bob], &other, transport).await?;
        }
        eventually("both ends' redirects are counted", Duration::from_secs(5), async || {
            match drains.metric("turn_redirects_total", "reason=\"draining\"").await {
                Ok(sent) if sent >= 4.0 => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await?;

        let output = cluster.turnctl(&place.host, &["uncordon", "eu-1"]).await?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        eventually("it takes new clients", Duration::from_secs(10), async || {
            match drains.metric("turn_draining", "").await {
                Ok(0.0) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await?;
        connect((&mut alice, &servers("tcp")), (&mut bob, &servers("tcp")), CONNECT).await?;
        is_at([&alice, &bob], &drains, "tcp").await
    })
}
