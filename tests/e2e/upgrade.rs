//! A rolling upgrade from binaries of the version before, and back (P12), under calls.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::cluster::{Cluster, Relay, RelayOptions, Store};
use harness::etcd::Etcd;
use harness::place::Place;
use harness::traffic::{Pair, Traffic};
use harness::turn::{Login, TurnClient};
use harness::{Host, run_within};
use turn_core::Transport;

/// Lets a program's link in `TURNPIKE_BINARIES` point to this directory from its next start on.
fn link(program: &str, directory: &Path) -> Result<()> {
    let links: PathBuf = std::env::var_os("TURNPIKE_BINARIES").context("TURNPIKE_BINARIES")?.into();
    let link = links.join(program);
    if link.is_symlink() {
        std::fs::remove_file(&link)?;
    }
    Ok(std::os::unix::fs::symlink(directory.join(program), link)?)
}

async fn client(relay: &Relay, login: &Login) -> Result<TurnClient> {
    let from = Place::on_loopback(100).address;
    let mut client = TurnClient::open(&Host::Machine, from, relay.address(), Transport::Udp, login).await?;
    client.allocate().await?;
    Ok(client)
}

/// With `TURNPIKE_BEFORE` and `TURNPIKE_AFTER`, directories of binaries of two versions, and `TURNPIKE_BINARIES`, an empty
/// directory for links to them: controller, then relays are replaced by newer ones in the middle of calls, and one relay
/// by the older one again.
#[test]
#[ignore = "needs binaries of the version before"]
fn versions_mix_under_calls() -> Result<()> {
    let directory = |name: &str| std::env::var_os(name).map(PathBuf::from).context(format!("{name} is not set"));
    let (before, after) = (directory("TURNPIKE_BEFORE")?, directory("TURNPIKE_AFTER")?);
    run_within(Duration::from_secs(180), async |test| {
        for program in ["controller", "relay-node"] {
            link(program, &before)?;
        }
        link("turnctl", &after)?;
        let etcd = Etcd::start(Place::on_loopback(1), test.path()).await?;
        let mut cluster = Cluster::new(test.path())?;
        let mut controller = cluster.controller(&Place::on_loopback(2), Store::Etcd(&etcd), "").await?;
        let options = RelayOptions::in_region("eu");
        let mut relays = Vec::new();
        for (id, number) in [("eu-1", 11), ("eu-2", 12)] {
            relays.push(cluster.relay(id, &Place::on_loopback(number), &options).await?);
        }
        let login = controller.login("before").await?;
        let mut calls = Vec::new();
        for relay in [&relays[0], &relays[0], &relays[0], &relays[1], &relays[1]] {
            let pair = Pair::join(client(relay, &login).await?, client(relay, &login).await?).await?;
            calls.push(Traffic::start(pair));
        }

        link("controller", &after)?;
        controller.kill()?;
        controller.start().await?;
        for relay in &relays {
            client(relay, &login).await?.refresh(0).await.context("relays of before, a controller of after")?;
        }
        link("relay-node", &after)?;
        for relay in &mut relays {
            relay.kill()?;
            relay.start().await?;
            client(relay, &controller.login("after").await?).await?.refresh(0).await?;
        }
        let output = cluster.turnctl(&Host::Machine, &["keys", "rotate", "--wait"]).await?;
        ensure!(output.status.success(), "turnctl: {}", String::from_utf8_lossy(&output.stderr));
        client(&relays[0], &login).await?.refresh(0).await.context("a credential of before the rotation")?;

        link("relay-node", &before)?;
        relays[0].kill()?;
        relays[0].start().await?;
        client(&relays[0], &controller.login("back").await?).await?.refresh(0).await?;

        for (number, call) in calls.into_iter().enumerate() {
            let (mut pair, count) = call.stop().await.context("a call was dropped")?;
            let lost = count.sent - count.received;
            test.figure(
                &format!("call {number}"),
                format!("{lost} of {} lost, longest gap {:?}", count.sent, count.longest_gap),
            );
            ensure!(count.longest_gap < Duration::from_secs(6), "silent for {:?}", count.longest_gap);
            pair.exchange(5).await?;
            pair.first.refresh(600).await?;
            pair.second.refresh(600).await?;
        }
        Ok(())
    })
}
