//! Discovery as Janus asks for it (`turn_rest_api`), and the probe of our own CLI.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::certificate::Authority;
use harness::cluster::{Cluster, HTTP, RelayOptions, Store};
use harness::janus::Janus;
use harness::lab::NatLab;
use harness::peer::Peer;
use harness::place::Place;
use harness::turn::{Login, TurnClient};
use harness::{Host, run, run_within};
use serde_json::Value;
use turn_core::Transport;

/// The relay's TLS port, which is not the default that Janus takes for a missing one.
const TLS: u16 = 5349;

/// What Janus insists on: strings `username` and `password`, an integer `ttl`, `uris` that are not empty and of which
/// it can make out host, port and transport.
fn as_janus_reads_it(answer: &Value) -> Result<(Login, Vec<String>)> {
    let text =
        |key: &str| answer[key].as_str().map(str::to_owned).with_context(|| format!("{key} is no string in {answer}"));
    ensure!(answer["ttl"].is_u64(), "ttl is no integer in {answer}");
    let uris: Option<Vec<String>> = answer["uris"]
        .as_array()
        .with_context(|| format!("no uris in {answer}"))?
        .iter()
        .map(|u| u.as_str().map(str::to_owned))
        .collect();
    let uris: Vec<String> =
        uris.context("an URI is no string")?.into_iter().filter(|uri| !uri.starts_with("stun:")).collect();
    ensure!(!uris.is_empty(), "no turn: URI in {answer}");
    for uri in &uris {
        let rest = uri.strip_prefix("turn:").with_context(|| format!("{uri} is not a turn: URI"))?;
        let (address, transport) =
            rest.split_once("?transport=").with_context(|| format!("{uri} names no transport"))?;
        address.parse::<std::net::SocketAddr>().with_context(|| format!("{uri} names no address"))?;
        ensure!(["udp", "tcp"].contains(&transport), "{uri}: unknown transport");
    }
    Ok((Login { username: text("username")?, password: text("password")? }, uris))
}

#[test]
fn janus_gets_servers_and_credentials_that_work() -> Result<()> {
    run(async |test| {
        let mut cluster = Cluster::new(test.path())?;
        let controller =
            cluster.controller(&Place::on_loopback(2), Store::Embedded, "api_keys = [\"letmein-0123456789\"]").await?;
        let relay = cluster.relay("eu-1", &Place::on_loopback(11), &RelayOptions::in_region("eu")).await?;
        let base = format!("http://{}/v1/turn", controller.place.at(HTTP));
        let query = "service=turn&api=letmein-0123456789&key=letmein-0123456789&username=room1";
        let client = reqwest::Client::new();
        let form = ("content-type", "application/x-www-form-urlencoded");
        let by_get = client.get(format!("{base}?{query}")).send().await?;
        // Janus with turn_rest_api_method = POST repeats the query as a form.
        let by_post = client.post(format!("{base}?{query}")).header(form.0, form.1).body(query).send().await?;
        for answer in [by_get, by_post] {
            ensure!(answer.status().is_success(), "{}", answer.status());
            let (login, uris) = as_janus_reads_it(&answer.json().await?)?;
            ensure!(login.username.ends_with(":room1"), "made out to {}", login.username);
            ensure!(
                uris.iter().any(|uri| uri.contains(&relay.address().to_string())),
                "{uris:?} do not name the relay"
            );
            for transport in [Transport::Udp, Transport::Tcp] {
                let from = Place::on_loopback(100).address;
                TurnClient::open(&Host::Machine, from, relay.address(), transport, &login).await?.allocate().await?;
            }
        }
        let refused = client.get(format!("{base}?service=turn&username=room1")).send().await?;
        ensure!(refused.status() == 401 || refused.status() == 403, "without the key: {}", refused.status());
        Ok(())
    })
}

/// Janus behind a symmetric NAT, its relays from TURN REST, echoes a browser's call: over TURN UDP, over TCP, and over what
/// it calls TLS, which is plaintext STUN to the TLS port; each time nothing else gets through its NAT.
#[test]
fn janus_behind_a_nat_echoes_a_browser() -> Result<()> {
    run_within(Duration::from_secs(180), async |test| {
        const KEY: &str = "letmein-0123456789";
        let lab = NatLab::start().await?;
        let mut cluster = Cluster::new(test.path())?;
        let place = lab.server("controller").await?;
        let controller = cluster.controller(&place, Store::Embedded, &format!("api_keys = [{KEY:?}]")).await?;
        let place = lab.server("eu-1").await?;
        let authority = Authority::new(test.path())?;
        let certificate = authority.issue("relay", &[], &[place.address])?;
        let options = RelayOptions {
            listen: vec![("tls", TLS)],
            more: format!("certificates = [{}]", certificate.entry()),
            ..RelayOptions::in_region("eu")
        };
        let relay = cluster.relay("eu-1", &place, &options).await?;
        let rest = format!("http://{}/v1/turn", controller.place.at(HTTP));
        let gateway = lab.alice().place()?;
        let janus = Janus::start(&gateway, test.path(), &rest, KEY).await?;
        let mut browser = Peer::start(&lab.bob().host(), test.path(), "browser").await?;
        let servers = cluster.ice_servers(&controller, &format!("region=eu&transport=udp&api={KEY}")).await?;
        let discovery = ("tcp", controller.place.at(HTTP));
        for (what, way) in
            [("UDP", ("udp", relay.address())), ("TCP", ("tcp", relay.address())), ("its TLS", ("tcp", place.at(TLS)))]
        {
            lab.alice().only(&[discovery, way]).await?;
            let offer = browser.offer(&servers).await?;
            let answer = janus.echo(&offer).await.with_context(|| what.to_owned())?;
            let candidates: Vec<&str> = answer.lines().filter(|line| line.starts_with("a=candidate:")).collect();
            ensure!(!candidates.is_empty(), "{what}: Janus has no candidate: {answer}");
            for candidate in candidates {
                let relayed = candidate.contains("typ relay") && candidate.contains(&place.address.to_string());
                ensure!(relayed, "{what}: {candidate}");
            }
            browser.answered(&answer, Duration::from_secs(20)).await.with_context(|| what.to_owned())?;
            // What it decodes is its own picture, there and back.
            let report = browser.decodes(20, Duration::from_secs(20)).await?;
            let from_relay = report.remote_address.as_ref().is_some_and(|a| a.starts_with(&place.address.to_string()));
            ensure!(from_relay, "{what}: {report:?}");
            test.figure(&format!("Janus behind a symmetric NAT, {what}: frames echoed"), report.frames_decoded);
        }
        Ok(())
    })
}

/// `turnctl probe` carries packets through every relay and times each step.
#[test]
fn the_probe_carries_packets() -> Result<()> {
    run(async |test| {
        let mut cluster = Cluster::new(test.path())?;
        let _controller = cluster.controller(&Place::on_loopback(2), Store::Embedded, "").await?;
        let mut relay = cluster.relay("eu-1", &Place::on_loopback(11), &RelayOptions::in_region("eu")).await?;
        let output = cluster.turnctl(&Host::Machine, &["probe"]).await?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {said}", output.status);
        ensure!(said.contains(&relay.address().to_string()), "the probe does not name the relay: {said}");

        // The relay hangs: the controller still hands it out, and the probe has to say that it does not serve.
        relay.freeze(true)?;
        let output = cluster.turnctl(&Host::Machine, &["probe"]).await?;
        ensure!(!output.status.success(), "a probe through a relay that hangs succeeded");
        relay.freeze(false)?;
        relay.kill()
    })
}
