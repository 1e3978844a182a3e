//! Discovery over real HTTP: TURN REST as Janus asks, iceServers as browsers do, keys, CORS, and what the console sees.

mod site;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result};
use reqwest::{Client, Method, Response, StatusCode};
use serde_json::{Value, json};
use turn_core::{Transport, credential};

use self::site::{Node, Site, node};

#[tokio::test]
async fn janus_gets_what_it_asks_for() -> Result<()> {
    let secret = "--rest-secrets=north";
    let site = Site::start(&[secret, "--credential-ttl=3600", "--api-keys=sesame"], &[node("eu-1", "eu", 1)]).await?;
    let query = "service=turn&api=sesame&key=sesame&username=janus%2D1";
    let get = Client::new().get(site.url(&format!("/v1/turn?{query}"))).send().await?;
    // Janus repeats the query as a form when it is set to POST.
    let post = Client::new()
        .post(site.url(&format!("/v1/turn?{query}")))
        .header("content-type", "application/x-www-form-urlencoded")
        .body(query)
        .send()
        .await?;
    for answer in [get, post] {
        assert_eq!(answer.status(), StatusCode::OK);
        assert_eq!(answer.headers()["cache-control"], "no-store");
        let answer: Value = answer.json().await?;
        let username = answer["username"].as_str().context("username is a string")?;
        let (expiry, user) = username.split_once(':').context("expiry:user")?;
        assert_eq!(user, "janus-1");
        assert_eq!(answer["ttl"], 3600, "an integer");
        assert_eq!(
            answer["uris"],
            json!(["turn:198.51.100.1:3478?transport=udp", "turn:198.51.100.1:3478?transport=tcp"])
        );
        // The relays check with the same secret.
        let key = turn_core::Key { id: 0, secret: b"north".to_vec() };
        let minted = credential::mint(&key, b"janus-1", expiry.parse()?);
        assert_eq!(answer["password"], minted.password);
    }
    Ok(())
}

#[tokio::test]
async fn a_form_alone_is_enough() -> Result<()> {
    let site = Site::start(&["--api-keys=sesame"], &[node("eu-1", "eu", 1)]).await?;
    let form = [("service", "turn"), ("username", "a+b c"), ("key", "sesame")];
    let answer = Client::new().post(site.url("/v1/turn")).form(&form).send().await?;
    let answer: Value = answer.error_for_status()?.json().await?;
    assert!(answer["username"].as_str().context("a string")?.ends_with(":a+b c"), "{answer}");
    Ok(())
}

#[tokio::test]
async fn browsers_get_ice_servers_nearest_first() -> Result<()> {
    let site = Site::start(&[], &[node("eu-1", "eu", 1), node("us-1", "us", 2), node("ap-1", "ap", 3)]).await?;
    let cases = [
        ("", "eu", json!(["eu-1", "us-1"])),
        ("?region=us&limit=3", "us", json!(["us-1", "eu-1", "ap-1"])),
        ("?region=ap&limit=1", "ap", json!(["ap-1"])),
        ("?region=moon&limit=1", "eu", json!(["eu-1"])),
    ];
    for (query, region, nodes) in cases {
        let answer = ok(&site, &format!("/v1/ice-servers{query}")).await?;
        assert_eq!(answer["region"], region, "{query}: {answer}");
        assert_eq!(answer["nodes"], nodes, "{query}: {answer}");
        assert_eq!(answer["ttl"], 86_400);
        let server = &answer["iceServers"][0];
        assert!(server["username"].is_string() && server["credential"].is_string(), "{answer}");
        assert_eq!(server["urls"].as_array().context("urls")?.len(), nodes.as_array().context("nodes")?.len() * 2);
    }
    let answer = ok(&site, "/v1/ice-servers?transport=tcp&user=alice&limit=1").await?;
    assert_eq!(answer["iceServers"][0]["urls"], json!(["turn:198.51.100.1:3478?transport=tcp"]));
    assert!(answer["iceServers"][0]["username"].as_str().context("a string")?.ends_with(":alice"));
    let answer = ok(&site, "/v1/ice-servers?ttl=90").await?;
    assert_eq!(answer["ttl"], 90);
    // Strangers get a name each, so that they do not share a quota.
    let names = [ok(&site, "/v1/ice-servers").await?, ok(&site, "/v1/ice-servers").await?];
    assert_ne!(names[0]["iceServers"][0]["username"], names[1]["iceServers"][0]["username"]);
    Ok(())
}

#[tokio::test]
async fn unfit_nodes_are_left_out_and_nobody_left_is_a_503_that_says_why() -> Result<()> {
    let draining = node("eu-1", "eu", 1).with(|node| node.load.draining = true);
    let suspect = node("eu-2", "eu", 2).with(|node| node.load.suspect = true);
    let hot = node("eu-3", "eu", 3).with(|node| node.load.busiest_worker_permille = 900);
    let good = node("us-1", "us", 4);
    /// What it is, the nodes, and who answers, or the sentence that nobody does.
    type Case<'a> = (&'a str, &'a [&'a Node], Result<&'a [&'a str], &'a str>);
    let cases: &[Case<'_>] = &[
        ("the far one that is fit", &[&draining, &suspect, &hot, &good], Ok(&["us-1"])),
        ("overloaded, for want of another", &[&draining, &suspect, &hot], Ok(&["eu-3"])),
        ("nobody fit", &[&draining, &suspect], Err("of 2 known, 1 draining, 1 suspect")),
        ("nobody", &[], Err("no relay has joined")),
    ];
    for (what, nodes, expected) in cases {
        let nodes: Vec<Node> = nodes.iter().map(|node| (*node).clone()).collect();
        let site = Site::start(&[], &nodes).await?;
        for path in ["/v1/ice-servers", "/v1/turn"] {
            let answer = get(&site, path).await?;
            let status = answer.status();
            let answer: Value = answer.json().await?;
            match expected {
                Ok(ids) if path == "/v1/ice-servers" => assert_eq!(answer["nodes"], json!(ids), "{what}"),
                Ok(ids) => {
                    assert_eq!(answer["uris"].as_array().context("uris")?.len(), ids.len() * 2, "{what}");
                }
                Err(why) => {
                    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{what}");
                    let error = answer["error"].as_str().context("a sentence")?;
                    assert!(error.contains(why), "{what}: {error}");
                }
            }
        }
    }
    Ok(())
}

/// A node that starts to drain, or leaves, is out of the next answers without any read of the store for them.
#[tokio::test]
async fn answers_follow_the_store() -> Result<()> {
    let site = Site::start(&[], &[node("eu-1", "eu", 1), node("us-1", "us", 2)]).await?;
    assert_eq!(ok(&site, "/v1/ice-servers?limit=1").await?["nodes"], json!(["eu-1"]));
    site.put(&node("eu-1", "eu", 1).with(|node| node.load.draining = true)).await?;
    until(&site, "/v1/ice-servers?limit=1", |answer| answer["nodes"] == json!(["us-1"])).await?;
    Ok(())
}

#[tokio::test]
async fn a_burst_spreads_over_equal_nodes() -> Result<()> {
    let nodes = [node("eu-1", "eu", 1), node("eu-2", "eu", 2), node("eu-3", "eu", 3)];
    let site = Site::start(&[], &nodes).await?;
    let mut counts = BTreeMap::<String, u32>::new();
    // As many as one address may ask at once.
    for _ in 0..180 {
        let answer = ok(&site, "/v1/ice-servers?limit=1").await?;
        *counts.entry(answer["nodes"][0].as_str().context("a node")?.to_owned()).or_default() += 1;
    }
    assert!(counts.len() == 3 && counts.values().all(|n| (51..=69).contains(n)), "{counts:?}");
    Ok(())
}

#[tokio::test]
async fn ipv6_is_in_brackets_and_behind_ipv4() -> Result<()> {
    let dual = node("eu-1", "eu", 1).with(|node| {
        let address = "[2001:db8::1]:3478".parse().expect("literal");
        node.record.listeners.insert(
            0,
            controller::fleet::NodeListener { transport: Transport::Udp, address, ip_in_certificate: false },
        );
    });
    let site = Site::start(&[], &[dual]).await?;
    let answer = ok(&site, "/v1/turn?service=turn&transport=udp").await?;
    assert_eq!(
        answer["uris"],
        json!(["turn:198.51.100.1:3478?transport=udp", "turn:[2001:db8::1]:3478?transport=udp"])
    );
    Ok(())
}

#[tokio::test]
async fn api_keys_are_asked_for_wherever_there_is_data() -> Result<()> {
    let site = Site::start(&["--api-keys=first,second"], &[node("eu-1", "eu", 1)]).await?;
    let paths = ["/v1/turn", "/v1/ice-servers", "/v1/regions", "/v1/nodes", "/v1/events", "/v1/console/events"];
    for path in paths {
        let bare = get(&site, path).await?;
        assert_eq!(bare.status(), StatusCode::UNAUTHORIZED, "{path}");
        assert!(bare.headers().contains_key("www-authenticate"), "{path}");
        let error: Value = bare.json().await?;
        assert!(error["error"].as_str().context("a sentence")?.contains("API key"), "{path}");

        for wrong in ["", "firs", "firstt", "third", "first,second"] {
            let answer = Client::new().get(site.url(path)).bearer_auth(wrong).send().await?;
            assert_eq!(answer.status(), StatusCode::UNAUTHORIZED, "{path} {wrong:?}");
        }
        let by = |name: &'static str, value: &'static str| Client::new().get(site.url(path)).header(name, value);
        let right = [
            by("authorization", "Bearer second"),
            by("authorization", "bearer first"),
            by("x-api-key", "first"),
            Client::new().get(site.url(&format!("{path}?key=second"))),
            Client::new().get(site.url(&format!("{path}?api=first&key=x"))),
        ];
        for request in right {
            assert_eq!(request.send().await?.status(), StatusCode::OK, "{path}");
        }
    }
    for open in ["/livez", "/readyz", "/metrics", "/console", "/console/console.js"] {
        assert_eq!(get(&site, open).await?.status(), StatusCode::OK, "{open}");
    }
    Ok(())
}

#[tokio::test]
async fn pages_of_allowed_origins_may_ask() -> Result<()> {
    let everybody = Site::start(&[], &[node("eu-1", "eu", 1)]).await?;
    let one = Site::start(&["--cors-origins=https://app.example"], &[node("eu-1", "eu", 1)]).await?;
    let preflight = |site: &Site, origin: &'static str| {
        Client::new()
            .request(Method::OPTIONS, site.url("/v1/ice-servers"))
            .header("origin", origin)
            .header("access-control-request-method", "GET")
            .header("access-control-request-headers", "authorization,x-api-key")
            .send()
    };
    let allowed = |answer: &Response| {
        let header = answer.headers().get("access-control-allow-origin");
        header.and_then(|value| value.to_str().ok()).map(str::to_owned)
    };
    let answer = preflight(&everybody, "https://any.example").await?;
    assert!(answer.status().is_success());
    assert_eq!(allowed(&answer).as_deref(), Some("*"));
    let headers = answer.headers()["access-control-allow-headers"].to_str()?.to_lowercase();
    assert!(headers.contains("authorization") && headers.contains("x-api-key"), "{headers}");

    assert_eq!(allowed(&preflight(&one, "https://app.example").await?).as_deref(), Some("https://app.example"));
    assert_eq!(allowed(&preflight(&one, "https://evil.example").await?), None);
    let plain = Client::new().get(one.url("/v1/ice-servers")).header("origin", "https://app.example").send().await?;
    assert_eq!(allowed(&plain).as_deref(), Some("https://app.example"));
    // A page must be able to read why it was refused.
    let refused = Client::new().get(everybody.url("/v1/ice-servers?limit=x")).header("origin", "https://a.b");
    assert_eq!(allowed(&refused.send().await?).as_deref(), Some("*"));
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_answered_says_so_in_json() -> Result<()> {
    let site = Site::start(&[], &[node("eu-1", "eu", 1)]).await?;
    let long = format!("/v1/turn?username={}", "x".repeat(481));
    let cases = [
        ("/v1/turn?service=stun", 400, "service must be turn"),
        ("/v1/turn?username=%ff", 400, "UTF-8"),
        (long.as_str(), 400, "480 bytes"),
        ("/v1/ice-servers?limit=0", 400, "limit"),
        ("/v1/ice-servers?limit=9", 400, "limit"),
        ("/v1/ice-servers?transport=quic", 400, "transport"),
        ("/v1/ice-servers?transport=tls", 503, "1 without a listener"),
        ("/v1/nothing", 404, "nothing at this path"),
        ("/console/../Cargo.toml", 404, "nothing at this path"),
        ("/console/%2e%2e/%2e%2e/Cargo.toml", 404, "nothing at this path"),
        ("/console/no.js", 404, "no such file"),
    ];
    for (path, status, why) in cases {
        let answer = get(&site, path).await?;
        assert_eq!(answer.status().as_u16(), status, "{path}");
        assert_eq!(answer.headers()["cache-control"], "no-store", "{path}");
        let answer: Value = answer.json().await?;
        let error = answer["error"].as_str().context("a sentence")?;
        assert!(error.contains(why), "{path}: {error}");
    }
    let form = [("username", "x".repeat(20_000))];
    let large = Client::new().post(site.url("/v1/turn")).form(&form).send().await?;
    assert_eq!(large.status(), StatusCode::PAYLOAD_TOO_LARGE);
    let method = Client::new().put(site.url("/v1/turn")).send().await?;
    assert_eq!(method.status(), StatusCode::METHOD_NOT_ALLOWED);
    Ok(())
}

#[tokio::test]
async fn before_the_store_answers_it_is_alive_and_not_ready() -> Result<()> {
    let mut site = Site::not_ready(&[]).await?;
    assert_eq!(get(&site, "/livez").await?.status(), StatusCode::OK);
    for path in ["/readyz", "/v1/ice-servers", "/v1/nodes", "/v1/events", "/v1/console/events"] {
        let answer = get(&site, path).await?;
        assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE, "{path}");
        let answer: Value = answer.json().await?;
        assert!(answer["error"].as_str().context("a sentence")?.starts_with("not ready"), "{path}: {answer}");
    }
    site.make_ready().await?;
    assert_eq!(ok(&site, "/readyz").await?["ready"], true);
    Ok(())
}

#[tokio::test]
async fn the_console_is_told_each_second() -> Result<()> {
    let hot = node("eu-1", "eu", 1).with(|node| {
        node.load.busiest_worker_permille = 910;
        node.load.allocations = 3;
        node.load.packets = 1000;
    });
    let site = Site::start(&[], std::slice::from_ref(&hot)).await?;
    let mut pictures = Pictures::open(&site).await?;
    let first = pictures.next().await?;
    assert_eq!(first["controller"]["id"], "c1");
    assert_eq!(first["controller"]["store"], "embedded");
    assert_eq!(first["regions"], json!([{ "name": "eu", "nodes": 1, "healthy": 0, "allocations": 3, "place": null }]));
    let shown = &first["nodes"][0];
    assert_eq!(shown["state"], "overloaded");
    assert_eq!(shown["reason"], "busiest worker at 91 %");
    assert_eq!(shown["listeners"], json!(["udp://198.51.100.1:3478", "tcp://198.51.100.1:3478"]));
    assert_eq!(shown["epoch"], 7);
    assert_eq!(ok(&site, "/v1/nodes").await?["nodes"][0]["id"], "eu-1");

    // A second later 500 packets more, and another node.
    let later = hot.with(|node| {
        node.load.packets += 500;
        node.load.reported_at += 1000;
    });
    site.put(&later).await?;
    site.put(&node("us-1", "us", 2)).await?;
    let second = pictures.find(|picture| picture["nodes"][0]["packets_per_second"] == 500).await?;
    assert_eq!(second["nodes"][1]["id"], "us-1");
    let event = &second["events"][0];
    assert_eq!((event["kind"].as_str(), event["node"].as_str()), (Some("node_joined"), Some("us-1")));
    Ok(())
}

/// Open consoles are bounded, and one that closes makes room.
#[tokio::test]
async fn too_many_consoles_are_refused() -> Result<()> {
    let site = Site::start(&[], &[]).await?;
    let mut open = Vec::new();
    let refused = loop {
        let answer = get(&site, "/v1/console/events").await?;
        if answer.status() != StatusCode::OK {
            break answer;
        }
        open.push(answer);
    };
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(open.len(), 64);
    drop(open.pop());
    let waiting = async {
        while get(&site, "/v1/console/events").await?.status() != StatusCode::OK {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(Duration::from_secs(5), waiting).await.context("no room was made")?
}

/// The console's event stream.
struct Pictures {
    answer: Response,
    text: String,
}

impl Pictures {
    async fn open(site: &Site) -> Result<Self> {
        let answer = get(site, "/v1/console/events").await?.error_for_status()?;
        assert_eq!(answer.headers()["content-type"], "text/event-stream");
        Ok(Self { answer, text: String::new() })
    }

    async fn next(&mut self) -> Result<Value> {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let picture = event.strip_prefix("data: ").map(serde_json::from_str).transpose()?;
                self.text = rest.to_owned();
                if let Some(picture) = picture {
                    return Ok(picture);
                }
                continue;
            }
            let more = tokio::time::timeout(Duration::from_secs(5), self.answer.chunk()).await??;
            self.text.push_str(std::str::from_utf8(&more.context("the stream ended")?)?);
        }
    }

    async fn find(&mut self, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        for _ in 0..10 {
            let picture = self.next().await?;
            if wanted(&picture) {
                return Ok(picture);
            }
        }
        anyhow::bail!("no such picture among ten")
    }
}

async fn get(site: &Site, path: &str) -> Result<Response> {
    Ok(Client::new().get(site.url(path)).send().await?)
}

async fn ok(site: &Site, path: &str) -> Result<Value> {
    Ok(get(site, path).await?.error_for_status()?.json().await?)
}

async fn until(site: &Site, path: &str, holds: impl Fn(&Value) -> bool) -> Result<()> {
    let waiting = async {
        loop {
            if holds(&ok(site, path).await?) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), waiting).await.context("never so")?
}
