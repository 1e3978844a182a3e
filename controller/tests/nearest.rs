//! The nearest relay over real HTTP and gRPC: by what clients measured, by a geo database, by session; and limits.

mod mmdb;
mod site;

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use turnpike_proto::v1::steering_client::SteeringClient;
use turnpike_proto::v1::{self, EstimateBasis};

use self::site::{Site, node};

/// Proxies on loopback are believed, so that a test can be anybody.
const PROXY: &str = "--trusted-proxies=127.0.0.0/8";

async fn get(site: &Site, path: &str, client: &str) -> Result<Value> {
    let answer = Client::new().get(site.url(path)).header("x-forwarded-for", client).send().await?;
    ensure!(answer.status() == StatusCode::OK, "{path}: {}", answer.status());
    Ok(answer.json().await?)
}

async fn nearest(site: &Site, client: &str) -> Result<String> {
    let answer = get(site, "/v1/ice-servers?limit=1", client).await?;
    Ok(answer["nodes"][0].as_str().context("a node")?.to_owned())
}

async fn steering(site: &Site, role: &str) -> Result<SteeringClient<Channel>> {
    let (certificate, key) = site.pki.issue(role, "me")?;
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(site.pki.ca()?))
        .identity(Identity::from_pem(certificate, key))
        .domain_name("controller.turnpike");
    let endpoint = Endpoint::from_shared(format!("https://{}", site.grpc))?.tls_config(tls)?;
    Ok(SteeringClient::new(endpoint.connect().await?))
}

#[tokio::test]
async fn what_a_client_measures_counts_for_its_network_and_those_next_to_it() -> Result<()> {
    let site = Site::start(&[PROXY], &[node("eu-1", "eu", 1), node("us-1", "us", 2), node("ap-1", "ap", 3)]).await?;
    let targets = get(&site, "/v1/netcheck", "203.0.113.7").await?;
    assert_eq!(targets["client"], "203.0.113.7");
    let first = &targets["targets"][0];
    assert_eq!(*first, json!({ "region": "eu", "node": "eu-1", "stun": "stun:198.51.100.1:3478" }));
    assert_eq!(targets["targets"].as_array().map(Vec::len), Some(3));

    let report = async |client: &str, body: Value| {
        let request = Client::new().post(site.url("/v1/netcheck")).header("x-forwarded-for", client).json(&body);
        Ok::<_, anyhow::Error>(request.send().await?)
    };
    let taken = report("203.0.113.7", json!({ "rtt_ms": { "ap": 12.5, "eu": 250, "mars": 1 } })).await?;
    assert_eq!(taken.json::<Value>().await?, json!({ "taken": 2 }));
    assert_eq!(nearest(&site, "203.0.113.99").await?, "ap-1");
    assert_eq!(nearest(&site, "203.0.114.99").await?, "ap-1", "of the next network nothing else is known");
    assert_eq!(nearest(&site, "198.51.100.99").await?, "eu-1");
    let request = v1::ExplainRequest { client: "203.0.114.99".into(), ..Default::default() };
    let explained = steering(&site, "viewer").await?.explain(request).await?.into_inner();
    let said = "nobody has measured from 203.0.114.0/24; round trips are those of 1 measured networks next to it";
    assert_eq!(explained.evidence[0], said);
    assert_eq!((explained.considered[0].rtt_ms, explained.considered[0].basis()), (13, EstimateBasis::Neighbours));
    // What is no report, and too many of them.
    for body in [json!([]), json!({ "rtt_ms": { "eu": "x" } }), json!({ "rtt_ms": {}, "client": "192.0.2.1" })] {
        assert_eq!(report("198.51.100.77", body.clone()).await?.status(), StatusCode::BAD_REQUEST, "{body}");
    }
    let mut refused = None;
    for _ in 0..40 {
        let answer = report("198.51.100.78", json!({ "rtt_ms": { "eu": 5 } })).await?;
        if answer.status() == StatusCode::TOO_MANY_REQUESTS {
            refused = Some(answer);
            break;
        }
    }
    let refused = refused.context("40 reports at once were taken")?;
    assert!(refused.headers().contains_key("retry-after"));
    assert_eq!(nearest(&site, "not an address").await?, "eu-1", "a proxy's rubbish is nobody's address");
    Ok(())
}

#[tokio::test]
async fn a_geo_database_places_clients_and_is_read_again_when_it_changes() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("city.mmdb");
    fs::write(&file, mmdb::database(&[("203.0.113.0", 24, 1.3, 103.8), ("198.51.0.0", 16, 48.9, 2.4)]))?;
    let regions = "--regions=[{name=\"eu\",latitude=50.1,longitude=8.7},{name=\"us\",latitude=39.0,longitude=-77.5},\
                   {name=\"ap\",latitude=1.3,longitude=103.9}]";
    let geo = format!("--geo={}", file.display());
    let nodes = [node("eu-1", "eu", 1), node("us-1", "us", 2), node("ap-1", "ap", 3)];
    let site = Site::start(&[PROXY, regions, &geo], &nodes).await?;
    for (client, expected) in [("203.0.113.7", "ap-1"), ("198.51.100.7", "eu-1"), ("192.0.2.1", "eu-1")] {
        assert_eq!(nearest(&site, client).await?, expected, "{client}");
    }
    let mut steering = steering(&site, "viewer").await?;
    let request = v1::ExplainRequest { client: "203.0.113.7".into(), ..Default::default() };
    let explained = steering.explain(request.clone()).await?.into_inner();
    assert!(
        explained.evidence.contains(&"the geo database places 203.0.113.7 at 1.3, 103.8".to_owned()),
        "{explained:?}"
    );
    let first = &explained.considered[0];
    assert_eq!((first.node_id.as_str(), first.basis(), first.place), ("ap-1", EstimateBasis::Geo, 1));
    assert_eq!(explained.considered.len(), 3);
    assert!(
        explained.considered[1].outcome.ends_with("ms behind the best score") || explained.considered[1].place == 2
    );

    // The network has moved to America; a broken file in between changes nothing.
    for (content, expected) in [
        (b"no database".to_vec(), "ap-1"),
        (mmdb::database(&[("203.0.113.0", 24, 40.7, -74.0), ("10.0.0.0", 8, 0.0, 0.0)]), "us-1"),
    ] {
        fs::write(&file, content)?;
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        if expected == "us-1" {
            while nearest(&site, "203.0.113.7").await? != expected {
                ensure!(tokio::time::Instant::now() < deadline, "the file was not read again");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        assert_eq!(nearest(&site, "203.0.113.7").await?, expected);
    }
    // A file that is none is an error at the start, in one line.
    fs::write(&file, b"no database")?;
    let error = Site::start(&[regions, &geo], &[]).await.err().context("started")?.to_string();
    assert!(error.contains("geo: ") && error.contains("is no MaxMind database"), "{error}");
    Ok(())
}

#[tokio::test]
async fn the_ends_of_a_session_meet_and_the_explanation_says_so_over_every_way_in() -> Result<()> {
    let nodes = [node("eu-1", "eu", 1), node("eu-2", "eu", 2), node("us-1", "us", 3), node("us-2", "us", 4)];
    let site = Site::start(&[PROXY], &nodes).await?;
    let replica = site.replica();
    replica.discovery.report("203.0.113.1".parse()?, &[("eu".into(), 15.0), ("us".into(), 108.0)]);
    replica.discovery.report("198.51.100.1".parse()?, &[("us".into(), 15.0), ("eu".into(), 108.0)]);
    let mut operator = steering(&site, "operator").await?;
    for call in 0..10 {
        let path = format!("/v1/ice-servers?limit=1&session=call-{call}");
        let a = get(&site, &path, "203.0.113.1").await?["nodes"][0].clone();
        let request = v1::DiscoverRequest {
            client: "198.51.100.1".into(),
            session: format!("call-{call}").into_bytes(),
            limit: 1,
            ..Default::default()
        };
        // 108 straight to the first one's relay, 15 + 90 and a hop by a relay of its own.
        let b = operator.discover(request).await?.into_inner();
        assert_eq!(b.relays[0].node_id, a, "call {call}");
        assert_eq!(b.relays[0].basis(), EstimateBasis::Measured);
    }
    let long = v1::DiscoverRequest { session: vec![b'x'; 257], ..Default::default() };
    assert_eq!(operator.discover(long).await.err().map(|it| it.code()), Some(tonic::Code::InvalidArgument));
    let bad = v1::ExplainRequest { client: "nobody".into(), ..Default::default() };
    assert_eq!(operator.explain(bad).await.err().map(|it| it.code()), Some(tonic::Code::InvalidArgument));
    // The caller's own address, where none is named.
    let targets = operator.netcheck_targets(v1::NetcheckTargetsRequest::default()).await?.into_inner();
    assert_eq!(targets.client, "127.0.0.1");
    assert_eq!(targets.targets.len(), 2, "one of each region");
    let regions = vec![v1::MeasuredRegion { region: "us".into(), rtt_us: 7000 }];
    let report = v1::ReportNetcheckRequest { client: "192.0.2.1".into(), regions };
    assert_eq!(operator.report_netcheck(report.clone()).await?.into_inner().taken, 1);
    assert!(nearest(&site, "192.0.2.200").await?.starts_with("us-"));
    let mut viewer = steering(&site, "viewer").await?;
    assert_eq!(viewer.report_netcheck(report).await.err().map(|it| it.code()), Some(tonic::Code::PermissionDenied));
    Ok(())
}

#[tokio::test]
async fn discovery_is_bounded_for_each_address_and_each_key() -> Result<()> {
    let flags = [PROXY, "--api-keys=one,two", "--rate-address=2", "--rate-key=5"];
    let site = Site::start(&flags, &[node("eu-1", "eu", 1)]).await?;
    let answered = async |key: &str, client: &dyn Fn(u32) -> String| {
        let mut count = 0;
        for i in 0..80 {
            let request = Client::new().get(site.url("/v1/ice-servers")).header("x-api-key", key);
            let answer = request.header("x-forwarded-for", client(i)).send().await?;
            match answer.status() {
                StatusCode::OK => count += 1,
                StatusCode::TOO_MANY_REQUESTS => {
                    ensure!(answer.headers().contains_key("retry-after"), "no Retry-After");
                    return Ok(count);
                }
                StatusCode::UNAUTHORIZED => {}
                other => anyhow::bail!("{other}"),
            }
        }
        Ok::<u32, anyhow::Error>(80)
    };
    let one = answered("one", &|_| "203.0.113.1".into()).await?;
    assert!((4..80).contains(&one), "one address: {one}");
    let many = answered("two", &|i| format!("203.0.{i}.1")).await?;
    assert!((10..80).contains(&many), "one key: {many}");
    // Keys are not guessed at any rate.
    assert_eq!(answered("three", &|_| "203.0.113.2".into()).await?, 0);
    Ok(())
}
