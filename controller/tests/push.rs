//! What watchers are told, over real HTTP and real gRPC, by two replicas over one store.

mod site;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use controller::push::{Body, Filter};
use controller::store::Op;
use futures_util::StreamExt as _;
use reqwest::{Client, Response, StatusCode};
use serde_json::Value;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};
use tonic::{Code, Streaming};
use turnpike_proto::v1;
use turnpike_proto::v1::steering_client::SteeringClient;
use turnpike_proto::v1::watch_response::Body as Said;

use self::site::{Node, Site, node};

/// Longest wait for what must happen.
const PATIENCE: Duration = Duration::from_secs(20);

/// A page and a server hear the same from two replicas: the state, then each change of it.
#[tokio::test]
async fn both_replicas_tell_the_same() -> Result<()> {
    let (one, two) = replicas(&[node("eu-1", "eu", 1), node("us-1", "us", 2)]).await?;
    let mut page = Events::open(&one, "", None).await?;
    let mut server = watch(&two, v1::WatchRequest::default()).await?;

    let (name, states) = page.next().await?;
    assert_eq!(name, "relays");
    assert_eq!(conditions(&states), [("eu-1", "ready"), ("us-1", "ready")].map(owned).into());
    assert_eq!(states["relays"][0]["relay_ips"], serde_json::json!(["198.51.100.1"]));
    assert_eq!(states["relays"][0]["listeners"][1], "tcp://198.51.100.1:3478");
    let heard = hear(&mut server).await?;
    let states_id = heard.id;
    let Some(Said::States(states)) = heard.body else { anyhow::bail!("no state first") };
    assert_eq!(states.relays.iter().map(|relay| relay.node_id.as_str()).collect::<Vec<_>>(), ["eu-1", "us-1"]);

    let eu = || node("eu-1", "eu", 1);
    assert_ne!(states_id, page.id, "ids are unique across replicas");
    let again = |node: &mut Node| node.record.boot_id = "again".to_owned();
    one.put(&eu().with(|node| node.load.draining = true)).await?;
    told(&mut page, &mut server, "draining", v1::RelayEventKind::Draining, "draining").await?;
    one.put(&eu()).await?;
    told(&mut page, &mut server, "ready", v1::RelayEventKind::Ready, "ready").await?;
    one.put(&eu().with(|node| node.load.suspect = true)).await?;
    told(&mut page, &mut server, "suspect", v1::RelayEventKind::Suspect, "suspect").await?;
    one.put(&eu().with(again)).await?;
    told(&mut page, &mut server, "restored", v1::RelayEventKind::Restored, "ready").await?;
    remove(&one, "eu-1").await?;
    told(&mut page, &mut server, "lost", v1::RelayEventKind::Lost, "lost").await?;
    let standby = node("eu-9", "eu", 1);
    one.put(&standby).await?;
    let event = told(&mut page, &mut server, "moved", v1::RelayEventKind::Moved, "ready").await?;
    assert_eq!((event["former_node"].as_str(), event["relay"]["node"].as_str()), (Some("eu-1"), Some("eu-9")));
    Ok(())
}

/// Whoever comes back, to the same replica or to another, hears first how things are.
#[tokio::test]
async fn who_was_away_has_missed_nothing() -> Result<()> {
    let (one, two) = replicas(&[node("eu-1", "eu", 1), node("eu-2", "eu", 2)]).await?;
    let mut page = Events::open(&one, "", None).await?;
    page.next().await?;
    let last = page.id.clone();
    drop(page);
    one.put(&node("eu-1", "eu", 1).with(|node| node.load.draining = true)).await?;
    // A sign of life, or its end could be an outage's.
    one.put(&node("eu-2", "eu", 2)).await?;
    remove(&one, "eu-2").await?;
    for site in [&one, &two] {
        // Each replica sees the store in its own time.
        eventually("both changes", async || {
            let (name, states) = Events::open(site, "", Some(&last)).await?.next().await?;
            assert_eq!(name, "relays");
            ensure!(conditions(&states) == [("eu-1", "draining"), ("eu-2", "lost")].map(owned).into(), "{states}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

#[tokio::test]
async fn watchers_hear_of_what_they_asked_for() -> Result<()> {
    let site = Site::start(&[], &[node("eu-1", "eu", 1), node("us-1", "us", 2), node("ap-1", "ap", 3)]).await?;
    for (query, nodes) in [
        ("?region=eu", vec!["eu-1"]),
        ("?region=us,eu", vec!["eu-1", "us-1"]),
        ("?node=us-1", vec!["us-1"]),
        ("?region=eu&node=us-1", vec![]),
    ] {
        let (_, states) = Events::open(&site, query, None).await?.next().await?;
        assert_eq!(conditions(&states).into_keys().collect::<Vec<_>>(), nodes, "{query}");
    }
    let mut page = Events::open(&site, "?region=us", None).await?;
    let mut server = watch(&site, v1::WatchRequest { node_ids: vec!["us-1".into()], ..Default::default() }).await?;
    page.next().await?;
    hear(&mut server).await?;
    site.put(&node("eu-1", "eu", 1).with(|node| node.load.draining = true)).await?;
    site.put(&node("us-1", "us", 2).with(|node| node.load.draining = true)).await?;
    let event = told(&mut page, &mut server, "draining", v1::RelayEventKind::Draining, "draining").await?;
    assert_eq!(event["relay"]["node"], "us-1", "and nothing of eu-1 before it");

    let many = vec!["x".to_owned(); 65];
    let refused = Client::new().get(site.url(&format!("/v1/events?node={}", many.join(",")))).send().await?;
    assert_eq!(refused.status(), StatusCode::BAD_REQUEST);
    let refused = watch(&site, v1::WatchRequest { regions: many, ..Default::default() }).await;
    assert_eq!(code(refused), Some(Code::InvalidArgument));
    Ok(())
}

/// A subscriber that does not keep up is told the state anew instead of what it missed, and its queue is bounded.
#[tokio::test]
async fn who_is_slow_gets_the_state_again() -> Result<()> {
    let site = Site::start(&[], &[node("eu-1", "eu", 1)]).await?;
    let slow = site.replica().push.subscribe(Filter::default())?;
    let mut slow = std::pin::pin!(slow);
    let mut quick = Events::open(&site, "", None).await?;
    quick.next().await?;
    for round in 0..300 {
        let draining = round % 2 == 0;
        site.put(&node("eu-1", "eu", 1).with(|node| node.load.draining = draining)).await?;
        let (_, event) = quick.next().await?;
        assert_eq!(event["kind"], if draining { "draining" } else { "ready" });
    }
    let mut bodies = Vec::new();
    for _ in 0..2 {
        bodies.push(tokio::time::timeout(PATIENCE, slow.next()).await?.context("the stream ended")?.body);
    }
    let Some(Body::States { relays, .. }) = bodies.pop() else { anyhow::bail!("not the state: {bodies:?}") };
    assert!(!relays[0].draining, "the newest state");
    assert!(matches!(bodies[0], Body::States { .. }), "and the first one, from before it was slow");
    site.put(&node("eu-1", "eu", 1).with(|node| node.load.draining = true)).await?;
    let next = tokio::time::timeout(PATIENCE, slow.next()).await?.context("the stream ended")?.body;
    assert!(matches!(next, Body::Event(_)), "then it goes on: {next:?}");
    Ok(())
}

#[tokio::test]
async fn watchers_are_bounded_and_one_that_leaves_makes_room() -> Result<()> {
    let site = Site::start(&[], &[]).await?;
    let push = &site.replica().push;
    let mut open = Vec::new();
    while let Ok(subscription) = push.subscribe(Filter::default()) {
        open.push(subscription);
    }
    assert_eq!(open.len(), 4096);
    let refused = Client::new().get(site.url("/v1/events")).send().await?;
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(refused.headers()["retry-after"], "30");
    let error: Value = refused.json().await?;
    assert!(error["error"].as_str().context("a sentence")?.contains("as many watchers as it takes"), "{error}");
    assert_eq!(code(watch(&site, v1::WatchRequest::default()).await), Some(Code::ResourceExhausted));
    open.pop();
    assert_eq!(Events::open(&site, "", None).await?.next().await?.0, "relays");
    Ok(())
}

/// A controller that ends lets its watchers go, so that they turn to another.
#[tokio::test]
async fn streams_end_with_the_controller() -> Result<()> {
    let site = Site::start(&[], &[node("eu-1", "eu", 1)]).await?;
    let mut page = Events::open(&site, "", None).await?;
    let mut server = watch(&site, v1::WatchRequest::default()).await?;
    page.next().await?;
    hear(&mut server).await?;
    site.replica().push.close();
    assert!(tokio::time::timeout(PATIENCE, page.next()).await?.is_err_and(|error| error.to_string() == "ended"));
    assert!(tokio::time::timeout(PATIENCE, server.message()).await??.is_none());
    Ok(())
}

/// Pages of other origins may load the module, without a key.
#[tokio::test]
async fn the_module_is_there() -> Result<()> {
    let site = Site::start(&["--api-keys=sesame"], &[]).await?;
    let answer = Client::new().get(site.url("/turnpike.js")).header("origin", "https://app.example").send().await?;
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(answer.headers()["content-type"], "text/javascript; charset=utf-8");
    assert_eq!(answer.headers()["access-control-allow-origin"], "*");
    assert!(answer.text().await?.contains("export class Turnpike"));
    Ok(())
}

/// Two controllers over one store, which both have read.
async fn replicas(nodes: &[Node]) -> Result<(Site, Site)> {
    let one = Site::start(&[], nodes).await?;
    let mut two = Site::not_ready(&[]).await?;
    two.store = one.store.clone();
    two.make_ready().await?;
    Ok((one, two))
}

async fn remove(site: &Site, id: &str) -> Result<()> {
    let ops = ["nodes", "load"].map(|prefix| Op::Delete(format!("{prefix}/{id}"))).into();
    assert!(site.store.transact(Vec::new(), ops).await?, "a transaction without guards");
    Ok(())
}

/// The next event of both is this one; answers with the page's.
async fn told(
    page: &mut Events,
    server: &mut Streaming<v1::WatchResponse>,
    kind: &str,
    number: v1::RelayEventKind,
    condition: &str,
) -> Result<Value> {
    let (name, event) = page.next().await?;
    assert_eq!((name.as_str(), event["kind"].as_str()), ("relay", Some(kind)), "{event}");
    assert_eq!(event["relay"]["condition"], condition, "{event}");
    let heard = hear(server).await?;
    let Some(Said::Event(said)) = &heard.body else { anyhow::bail!("{kind}: {heard:?}") };
    assert_eq!(said.kind(), number);
    let relay = said.relay.as_ref().context("a relay")?;
    assert_eq!(Some(relay.node_id.as_str()), event["relay"]["node"].as_str());
    assert_eq!(serde_json::json!(relay.relay_ips), event["relay"]["relay_ips"]);
    assert!(!heard.id.is_empty(), "{kind} has an id");
    Ok(event)
}

fn owned((node, condition): (&str, &str)) -> (String, String) {
    (node.to_owned(), condition.to_owned())
}

fn conditions(states: &Value) -> BTreeMap<String, String> {
    let relays = states["relays"].as_array().into_iter().flatten();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    relays.map(|relay| (text(&relay["node"]), text(&relay["condition"]))).collect()
}

/// A page's stream.
struct Events {
    answer: Response,
    text: String,
    /// Of the last event.
    id: String,
}

impl Events {
    async fn open(site: &Site, query: &str, last: Option<&str>) -> Result<Self> {
        let mut request =
            Client::new().get(site.url(&format!("/v1/events{query}"))).header("accept", "text/event-stream");
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        let answer = request.send().await?.error_for_status()?;
        assert_eq!(answer.headers()["content-type"], "text/event-stream");
        Ok(Self { answer, text: String::new(), id: String::new() })
    }

    /// Name and data of the next event. Each has an id.
    async fn next(&mut self) -> Result<(String, Value)> {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")));
                let found = field("event").map(str::to_owned).zip(field("data").map(serde_json::from_str));
                let id = field("id").unwrap_or_default().to_owned();
                self.text = rest.to_owned();
                if let Some((name, data)) = found {
                    assert!(!id.is_empty() && id != self.id, "an id of its own");
                    self.id = id;
                    return Ok((name, data?));
                }
                continue;
            }
            let more = tokio::time::timeout(PATIENCE, self.answer.chunk()).await??;
            self.text.push_str(std::str::from_utf8(&more.context("ended")?)?);
        }
    }
}

async fn watch(site: &Site, request: v1::WatchRequest) -> Result<Streaming<v1::WatchResponse>> {
    let (certificate, key) = site.pki.issue("viewer", "watcher")?;
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(site.pki.ca()?))
        .identity(Identity::from_pem(certificate, key))
        .domain_name("controller.turnpike");
    let channel = Channel::from_shared(format!("https://{}", site.grpc))?.tls_config(tls)?.connect().await?;
    Ok(SteeringClient::new(channel).watch(request).await?.into_inner())
}

async fn hear(server: &mut Streaming<v1::WatchResponse>) -> Result<v1::WatchResponse> {
    tokio::time::timeout(PATIENCE, server.message()).await??.context("the stream ended")
}

fn code<T>(answer: Result<T>) -> Option<Code> {
    answer.err()?.downcast::<tonic::Status>().ok().map(|status| status.code())
}

async fn eventually(what: &str, look: impl AsyncFn() -> Result<()>) -> Result<()> {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        match look().await {
            Ok(()) => return Ok(()),
            Err(error) if std::time::Instant::now() > deadline => return Err(error.context(what.to_owned())),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}
