//! One port for everything: browsers that may send nothing but TCP to port 443 of one address hold a call by `turns:`, and
//! the same port shows them a web page.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::certificate::Authority;
use harness::chromium::Surroundings;
use harness::cluster::{Cluster, RelayOptions, Store};
use harness::lab::NatLab;
use harness::peer::{Peer, connect};
use harness::place::Place;
use harness::run_within;
use harness::web::serve;

/// Host name of the relay.
const TURN_NAME: &str = "eu-1.turn.test";
/// Host name of the web server behind it.
const WEB_NAME: &str = "www.turn.test";
/// Port of that, which no client may reach.
const WEB_PORT: u16 = 8443;

/// The rest of the internet is out of reach.
async fn confined(lab: &NatLab, relay: &Place) -> Result<()> {
    for client in [lab.alice(), lab.bob()] {
        client.only(&[("tcp", relay.at(443))]).await?;
        for port in [3478, WEB_PORT] {
            let address = relay.at(port);
            let attempt = async move {
                let attempt = tokio::net::TcpStream::connect(address);
                Ok(matches!(tokio::time::timeout(Duration::from_millis(500), attempt).await, Ok(Ok(_))))
            };
            ensure!(!client.host().run(attempt).await?, "TCP to {address} passes although it is blocked");
        }
    }
    ensure!(lab.mappings_of_alice().await.is_err(), "UDP passes although it is blocked");
    Ok(())
}

#[test]
fn browsers_confined_to_port_443_meet_and_read() -> Result<()> {
    run_within(Duration::from_secs(120), async |test| {
        let lab = NatLab::start().await?;
        let mut cluster = Cluster::new(test.path())?;
        let controller = cluster.controller(&lab.server("controller").await?, Store::Embedded, "").await?;
        let place = lab.server("eu-1").await?;
        let authority = Authority::new(test.path())?;
        let certificate = authority.issue("relay", &[TURN_NAME], &[place.address])?;
        let web = authority.issue("web", &[WEB_NAME], &[])?;
        serve(&place.host, place.at(WEB_PORT), &web, "<!doctype html><title>behind the relay</title>").await?;
        let more = format!(
            "certificates = [{}]\npublic_host = {TURN_NAME:?}\nweb_server = \"{}\"",
            certificate.entry(),
            place.at(WEB_PORT)
        );
        let options = RelayOptions {
            workers: 2,
            listen: vec![("tls", 443), ("dtls", 443)],
            more,
            ..RelayOptions::in_region("eu")
        };
        let _relay = cluster.relay("eu-1", &place, &options).await?;

        let home = test.directory("home")?;
        authority.trust_in(&home).await?;
        let hosts = [TURN_NAME, WEB_NAME].map(|name| (name.to_owned(), place.address)).to_vec();
        let around = Surroundings { home: Some(home), hosts };
        let mut alice = Peer::start_with(&lab.alice().host(), test.path(), "alice", &around).await?;
        let mut bob = Peer::start_with(&lab.bob().host(), test.path(), "bob", &around).await?;
        confined(&lab, &place).await?;

        // Told of TLS only, and told of every way there is, of which only that one is open.
        for query in ["region=eu&transport=tls", "region=eu"] {
            let servers = cluster.ice_servers(&controller, query).await?;
            let uri = format!("turns:{TURN_NAME}:443?transport=tcp");
            ensure!(servers.to_string().contains(&uri), "{query}: no {uri} in {servers}");
            let took = connect((&mut alice, &servers), (&mut bob, &servers), Duration::from_secs(15)).await?;
            test.figure(&format!("browsers with TCP 443 alone, {query}: connect time"), format!("{took:?}"));
            for peer in [&alice, &bob] {
                let report = peer.decodes(10, Duration::from_secs(20)).await?;
                ensure!(report.relay_protocol.as_deref() == Some("tls"), "not by TLS: {report:?}");
                ensure!(report.local.as_deref() == Some("relay"), "not relayed: {report:?}");
            }
        }

        // While the call goes on, the same browser reads a page from the same address and port.
        let page = alice.browser().open(&format!("https://{WEB_NAME}/")).await.context("the page behind the relay")?;
        let title: String = page.evaluate("document.title").await?;
        ensure!(title == "behind the relay", "another page: {title:?}");
        for peer in [&alice, &bob] {
            peer.decodes(10, Duration::from_secs(10)).await?;
        }
        Ok(())
    })
}
