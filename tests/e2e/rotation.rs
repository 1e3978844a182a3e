//! Certificates are replaced under calls: nobody is dropped, newcomers see the new one.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use futures_util::{StreamExt, TryStreamExt};
use harness::certificate::Authority;
use harness::cluster::{Cluster, RelayOptions};
use harness::coturn::rest_credentials;
use harness::place::Place;
use harness::secure::{Trust, shown};
use harness::traffic::{Pair, Traffic};
use harness::turn::{Login, TurnClient};
use harness::{Host, eventually, run_within};
use turn_core::Transport;

/// Secret of the relay, which stands alone.
const SECRET: &str = "secret-of-a-lone-relay";
/// Port of TLS and DTLS.
const SECURE: u16 = 5349;
/// Calls over each of them.
const CALLS: u32 = 100;
/// Between two messages of a call.
const PACE: Duration = Duration::from_millis(100);
/// How soon new connections must see a new certificate.
const SEEN: Duration = Duration::from_secs(2);

async fn calls(server: SocketAddr, transport: Transport, login: &Login, trust: &Trust) -> Result<Vec<Traffic>> {
    let from = Place::on_loopback(100).address;
    let client = async || {
        let mut client = TurnClient::open_secure(&Host::Machine, from, server, transport, login, trust).await?;
        client.allocate().await?;
        anyhow::Ok(client)
    };
    let client = &client;
    futures_util::stream::iter(0..CALLS)
        .map(|_| async move {
            let pair = Pair::join(client().await?, client().await?).await?;
            anyhow::Ok(Traffic::start_each(pair, PACE))
        })
        .buffer_unordered(8)
        .try_collect()
        .await
        .with_context(|| format!("calls over {transport:?}"))
}

/// Waits until new connections, by TLS and by DTLS, are shown this certificate.
async fn newcomers_see(what: &str, der: &[u8], server: SocketAddr, trust: &Trust) -> Result<Duration> {
    let from = Place::on_loopback(101).address;
    let (_, took) = eventually(what, SEEN, async || {
        let tls = shown(&trust.tls(from, server).await?)?;
        let dtls = trust.dtls(from, server).await?.shown()?;
        match (tls == der, dtls == der) {
            (true, true) => Ok(()),
            (tls, dtls) => Err(anyhow!("by TLS {tls}, by DTLS {dtls}")),
        }
    })
    .await?;
    Ok(took)
}

#[test]
fn certificates_rotate_under_two_hundred_calls() -> Result<()> {
    run_within(Duration::from_secs(120), async |test| {
        let place = Place::on_loopback(11);
        let authority = Authority::new(test.path())?;
        let issue = || authority.issue("relay", &[], &[place.address]);
        let pair = issue()?;
        let options = RelayOptions {
            workers: 2,
            listen: vec![("tls", SECURE), ("dtls", SECURE)],
            more: format!("rest_secrets = [{SECRET:?}]\ncertificates = [{}]", pair.entry()),
            ..RelayOptions::in_region("eu")
        };
        let cluster = Cluster::new(test.path())?;
        let relay = cluster.relay("eu-1", &place, &options).await?;
        let (server, login) = (place.at(SECURE), rest_credentials(SECRET.as_bytes(), "rotation")?);
        let trust = Trust::new(&authority, &place.address.to_string())?;
        let mut running = calls(server, Transport::Tls, &login, &trust).await?;
        running.extend(calls(server, Transport::Dtls, &login, &trust).await?);

        newcomers_see("the first certificate", &pair.der()?, server, &trust).await?;
        for number in 2..=3 {
            let pair = issue()?;
            let what = format!("certificate {number}");
            let took = newcomers_see(&what, &pair.der()?, server, &trust).await?;
            test.figure(&format!("{what} seen by newcomers after"), format!("{took:?}"));
        }

        // A robot that failed half-way: the old pair stays, and the log says why, once.
        let third = pair.der()?;
        fs::write(&pair.certificate, "-----BEGIN CERTIFICATE-----\nnot one\n")?;
        let named = pair.certificate.display().to_string();
        let (complaints, _) = eventually("the log names the broken file", Duration::from_secs(5), async || {
            let log = relay.log()?;
            let lines = log.lines().filter(|line| line.contains("ERROR") && line.contains(&named)).count();
            if lines > 0 { Ok(lines) } else { Err(anyhow!("not a word")) }
        })
        .await?;
        ensure!(complaints == 1, "{complaints} lines about one broken file");
        newcomers_see("the pair before the broken one", &third, server, &trust).await?;
        newcomers_see("the one after it", &issue()?.der()?, server, &trust).await?;

        let (mut sent, mut dropped) = (0, 0);
        for call in running {
            // A client whose connection was closed ends with an error.
            let (_, count) = call.stop().await.context("a call was dropped")?;
            sent += count.sent;
            dropped += count.sent - count.received;
        }
        test.figure("messages of 200 calls under four rotations", format!("{sent} sent, {dropped} lost"));
        ensure!(dropped == 0, "{dropped} of {sent} messages were lost");
        Ok(())
    })
}
