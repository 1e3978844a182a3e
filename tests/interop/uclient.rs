//! `turnutils_uclient`, coturn's own client.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use harness::certificate::Authority;
use harness::cluster::{Cluster, RelayOptions, Store, binary, repository};
use harness::lab::DataCenter;
use harness::place::Place;
use harness::uclient::{Load, Tally};
use harness::{Host, Process, eventually, run, run_within};

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
                flags: if tcp { &["-t"] } else { &[] },
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

/// Port of TLS and DTLS.
const SECURE: u16 = 5349;

/// Ways to the relay and wishes, all at once: every message sent is received. What is left is not looked at: the client
/// ends without deleting some of its allocations over UDP. TLS is not among the ways: over TLS it loses messages against
/// coturn as well, now and then (see `agents.rs` for TLS). Nor are dual allocations (`-Z`): it asks for them by a draft's
/// attribute 0x8032, not by RFC 8656's 0x8000.
#[test]
fn every_way_and_wish_loses_nothing() -> Result<()> {
    const WAYS: [(&str, &[&str]); 8] = [
        ("DTLS", &["-S"]),
        ("TCP allocations over TLS", &["-T", "-S"]),
        ("IPv6", &["-x"]),
        ("IPv6, TCP", &["-x", "-t"]),
        ("IPv4 asked for", &["-X"]),
        ("mobility (RFC 8016)", &["-M"]),
        ("DONT-FRAGMENT", &["-g"]),
        ("requests repeated", &["-G"]),
    ];
    run_within(Duration::from_secs(120), async |test| {
        let place = Place::on_loopback(11);
        let authority = Authority::new(test.path())?;
        let certificate = authority.issue("relay", &[], &[place.address])?;
        let mut cluster = Cluster::new(test.path())?;
        let controller = cluster.controller(&Place::on_loopback(2), Store::Embedded, "").await?;
        let options = RelayOptions {
            workers: 2,
            listen: vec![("tls", SECURE), ("dtls", SECURE)],
            more: format!("relay_ip6 = \"::1\"\npublic_ip6 = \"::1\"\ncertificates = [{}]", certificate.entry()),
            ..RelayOptions::in_region("eu")
        };
        let relay = cluster.relay("eu-1", &place, &options).await?;
        let login = controller.login("uclient").await?;
        let runs = WAYS.map(|(what, flags)| {
            let secure = flags.contains(&"-S");
            let load = Load {
                server: if secure { place.at(SECURE) } else { relay.address() },
                username: login.username.clone(),
                password: login.password.clone(),
                sessions: 10,
                messages: 30,
                size: 172,
                flags,
            };
            async move {
                let tally = load.run(&Host::Machine, Duration::from_secs(70)).await.with_context(|| what.to_owned())?;
                test.figure(
                    &format!("turnutils_uclient, {what}"),
                    format!("{} sent, {} received", tally.sent, tally.received),
                );
                ensure!(tally == Tally { sent: 300, received: 300 }, "{what}: {tally:?}");
                Ok(())
            }
        });
        try_join_all(runs).await?;
        Ok(())
    })
}

/// The README's relay without a controller and coturn's client beside it, as they stand there, but for the directory.
#[test]
fn the_readme_s_relay_alone_serves_coturn_s_client() -> Result<()> {
    run(async |test| {
        let page = fs::read_to_string(repository().join("README.md"))?;
        let (_, block) = page.split_once("```sh\nrelay-node ").context("the block")?;
        let (block, _) = block.split_once("```").context("its end")?;
        let (relay, client) = block.split_once("\nturnutils_uclient ").context("two commands")?;
        let state = test.file("lab").display().to_string();
        ensure!(relay.contains("/tmp/lab"), "{relay}");
        let lab = DataCenter::start().await?;
        let host = lab.server("machine").await?.host;
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(format!("exec {} {}", binary("relay-node")?.display(), relay.replace("/tmp/lab", &state)));
        let mut relay = Process::start(&host, test.path(), "relay", shell)?;
        eventually("the relay is ready", Duration::from_secs(20), async || {
            relay.must_run()?;
            ensure!(relay.output().contains(" ready "), "not yet");
            Ok(())
        })
        .await?;
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(format!("turnutils_uclient {client}"));
        let output = host.output(shell).await?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success() && said.contains("Total lost packets 0 "), "{}: {said}", output.status);
        Ok(())
    })
}
