//! Traces: an Allocate is followed from the relay to the store, discovery from its client on; nothing waits for a collector.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use harness::cluster::{Cluster, GRPC, HTTP, Relay, RelayOptions, Store};
use harness::otlp::{Collector, Span};
use harness::place::Place;
use harness::turn::TurnClient;
use harness::{Host, eventually, run};
use tonic::Request;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};
use turn_core::Transport;
use turnpike_proto::v1::DiscoverRequest;
use turnpike_proto::v1::steering_client::SteeringClient;

/// Longest wait for spans: they leave each five seconds.
const PATIENCE: Duration = Duration::from_secs(20);
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";
/// Packets that go through an allocation: none of them makes a span.
const PACKETS: usize = 200;

/// With the collector away allocations are made as ever and one line is said; once it is there, each new allocation is one trace
/// over two processes, each discovery goes on the trace of its client, and packets make no spans.
#[test]
fn an_allocate_is_followed_to_the_store_and_nobody_waits_for_the_collector() -> Result<()> {
    run(async |test| {
        let collector_at = Place::on_loopback(4).at(4317);
        let traced = format!("otlp_endpoint = \"http://{collector_at}\"");
        let mut cluster = Cluster::new(test.path())?;
        let place = Place::on_loopback(2);
        let controller = cluster.controller(&place, Store::Embedded, &traced).await?;
        let options = RelayOptions { more: traced.clone(), ..RelayOptions::in_region("eu") };
        let relay = cluster.relay("eu-1", &Place::on_loopback(11), &options).await?;
        let login = controller.login("traced").await?;
        let from = Place::on_loopback(100).address;
        let allocate = async || {
            let mut client = TurnClient::open(&Host::Machine, from, relay.address(), Transport::Udp, &login).await?;
            client.allocate().await?;
            anyhow::Ok(client)
        };

        // Nobody listens at the collector's address.
        let _first = allocate().await?;
        eventually("the relay says that the collector is away", PATIENCE, async || complaints(&relay, 1)).await?;
        let _second = allocate().await?;
        let collector = Collector::start(collector_at).await?;
        eventually("the relay says that the collector is back", PATIENCE, async || {
            // Something has to be handed over to find out.
            let _another = allocate().await?;
            let log = relay.log()?;
            if log.contains("traces reach the collector again") { Ok(()) } else { Err(anyhow!("not yet")) }
        })
        .await?;
        complaints(&relay, 1)?;

        let before = ids(&collector.spans(), "Allocate");
        let mut client = allocate().await?;
        let peer = Place::on_loopback(101).at(9999);
        client.permit(peer.ip()).await?;
        for _ in 0..PACKETS {
            client.send(peer, b"not a span").await?;
        }
        let (spans, _) = eventually("the Allocate is one trace down to the store", PATIENCE, async || {
            let spans = collector.spans();
            let new = spans.iter().find(|span| span.name == "Allocate" && !before.contains(&span.id));
            let root = new.context("no new Allocate")?;
            followed(&spans, root)?;
            anyhow::Ok(spans)
        })
        .await?;
        let of_relay: BTreeSet<&str> =
            spans.iter().filter(|span| span.service == "turnpike-relay").map(|span| span.name.as_str()).collect();
        ensure!(of_relay.iter().all(|name| ["Allocate", "report", "restore"].contains(name)), "{of_relay:?}");

        let url = format!("http://{}/v1/ice-servers", place.at(HTTP));
        let header = format!("00-{TRACE}-{CALLER}-01");
        let client = reqwest::Client::new();
        client.get(&url).header("traceparent", &header).send().await?.error_for_status()?;
        let mut request = Request::new(DiscoverRequest::default());
        request.metadata_mut().insert("traceparent", header.parse()?);
        SteeringClient::new(channel(test.path(), &place).await?).discover(request).await?;
        eventually("both discoveries go on the caller's trace", PATIENCE, async || {
            let spans = collector.spans();
            for name in ["GET /v1/ice-servers", "/turnpike.v1.Steering/Discover"] {
                let ours = |span: &&Span| span.name == name && span.trace == TRACE && span.parent == CALLER;
                let discovery = spans.iter().find(ours).with_context(|| format!("no {name}"))?;
                for part in ["choose", "mint"] {
                    let is_part = |span: &&Span| span.name == part && span.parent == discovery.id;
                    ensure!(spans.iter().any(|span| is_part(&span)), "no {part} in {name}");
                }
            }
            anyhow::Ok(())
        })
        .await?;
        Ok(())
    })
}

/// Allocate > report (relay) > record > transact (controller), each within the one above.
fn followed(spans: &[Span], root: &Span) -> Result<()> {
    ensure!(root.parent.is_empty() && root.instance == "eu-1", "{root:?}");
    let mut above = root;
    for (name, service) in
        [("report", "turnpike-relay"), ("record", "turnpike-controller"), ("transact", "turnpike-controller")]
    {
        let below = spans.iter().find(|span| span.name == name && span.parent == above.id);
        let below = below.with_context(|| format!("no {name} below {above:?}"))?;
        ensure!(below.trace == root.trace && below.service == service, "{below:?}");
        // One machine, one clock.
        ensure!(
            below.start >= above.start && below.end <= above.end && below.start <= below.end,
            "{below:?} in {above:?}"
        );
        above = below;
    }
    Ok(())
}

fn ids(spans: &[Span], name: &str) -> BTreeSet<String> {
    spans.iter().filter(|span| span.name == name).map(|span| span.id.clone()).collect()
}

/// The relay has said so many times that the collector is away.
fn complaints(relay: &Relay, times: usize) -> Result<()> {
    let log = relay.log()?;
    let said = log.matches("traces do not reach the collector").count();
    ensure!(said == times, "said {said} times: {log}");
    Ok(())
}

async fn channel(directory: &std::path::Path, controller: &Place) -> Result<Channel> {
    let read = |name: &str| fs::read_to_string(directory.join(name)).with_context(|| name.to_owned());
    let stem = turnctl::pki::Identity::Admin("test".into()).file_stem();
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(read(turnctl::pki::CA_CERTIFICATE)?))
        .identity(Identity::from_pem(read(&format!("{stem}.pem"))?, read(&format!("{stem}.key"))?))
        .domain_name("controller.turnpike");
    let endpoint = Channel::from_shared(format!("https://{}", controller.at(GRPC)))?;
    Ok(endpoint.tls_config(tls)?.connect().await?)
}
