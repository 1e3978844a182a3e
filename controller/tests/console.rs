//! The console's own ways in: who may look, who may act, what is found, what is explained; and the audit log, whichever way an
//! action came.

mod site;

use std::time::Duration;

use anyhow::{Context as _, Result};
use controller::audit::{Action, Outcome, Via};
use reqwest::{Client, Response, StatusCode};
use serde_json::{Value, json};
use turnpike_proto::v1;
use turnpike_proto::v1::admin_client::AdminClient;

use self::site::{Site, channel, id, node, store};

const OPERATOR: &str = "operator-0123456789";
const VIEWER: &str = "viewer-0123456789";
const KEYS: &str = "--console-keys=[{name=\"olga\",role=\"operator\",key=\"operator-0123456789\"},\
                    {name=\"vera\",role=\"viewer\",key=\"viewer-0123456789\"}]";

#[tokio::test]
async fn a_key_says_who_one_is_and_a_wrong_one_is_told() -> Result<()> {
    let open = Site::start(&[KEYS], &[]).await?;
    let cases = [
        (None, StatusCode::OK, json!({"name": "console", "role": "viewer", "may_act": false, "can_sign_in": true})),
        (
            Some(VIEWER),
            StatusCode::OK,
            json!({"name": "vera", "role": "viewer", "may_act": false, "can_sign_in": true}),
        ),
        (
            Some(OPERATOR),
            StatusCode::OK,
            json!({"name": "olga", "role": "operator", "may_act": true, "can_sign_in": true}),
        ),
        (Some("guessed-0123456789"), StatusCode::UNAUTHORIZED, json!({"error": "nobody has this console key"})),
    ];
    for (key, status, expected) in cases {
        let answer = get(&open, "/v1/console/session", key).await?;
        assert_eq!(answer.status(), status, "{key:?}");
        assert_eq!(answer.json::<Value>().await?, expected, "{key:?}");
    }
    // In an address a console key is none: addresses are logged and remembered.
    let answer: Value = get(&open, &format!("/v1/console/session?key={OPERATOR}"), None).await?.json().await?;
    assert_eq!(answer["may_act"], false);
    // Where discovery asks for a key, the console takes that, to look, or one of its own.
    let closed = Site::start(&[KEYS, "--api-keys=sesame"], &[]).await?;
    let none = Site::start(&[], &[]).await?;
    for (site, key, status) in [
        (&closed, None, StatusCode::UNAUTHORIZED),
        (&closed, Some("sesame"), StatusCode::OK),
        (&closed, Some(VIEWER), StatusCode::OK),
        (&none, None, StatusCode::OK),
    ] {
        for path in ["/v1/console/session", "/v1/console/allocations", "/v1/console/explain", "/v1/console/events"] {
            assert_eq!(get(site, path, key).await?.status(), status, "{path} {key:?}");
        }
    }
    let answer: Value = get(&none, "/v1/console/session", None).await?.json().await?;
    assert_eq!(answer["can_sign_in"], false);
    // Programs' keys open nothing here that acts.
    let refused = post(&closed, "drain", Some("sesame"), &json!({"node": "eu-1"})).await?;
    assert_eq!(refused.status(), StatusCode::FORBIDDEN);
    Ok(())
}

#[tokio::test]
async fn an_operator_drains_and_a_viewer_does_not() -> Result<()> {
    let site = Site::start(&[KEYS], &[node("eu-1", "eu", 1), node("eu-2", "eu", 2)]).await?;
    let drain = json!({"node": "eu-1", "deadline_seconds": 600});
    for (key, status) in [(None, StatusCode::FORBIDDEN), (Some(VIEWER), StatusCode::FORBIDDEN)] {
        let refused = post(&site, "drain", key, &drain).await?;
        assert_eq!(refused.status(), status, "{key:?}");
        let error: Value = refused.json().await?;
        assert_eq!(error["error"], "this needs the role operator; yours is viewer");
    }
    assert!(site.replica().fleet.snapshot().drains.is_empty());

    assert_eq!(post(&site, "drain", Some(OPERATOR), &drain).await?.status(), StatusCode::OK);
    let nodes: Value = get(&site, "/v1/ice-servers?limit=8", None).await?.json().await?;
    assert_eq!(nodes["nodes"], json!(["eu-2"]), "not a moment later");
    let last = post(&site, "drain", Some(OPERATOR), &json!({"node": "eu-2"})).await?;
    assert_eq!(last.status(), StatusCode::CONFLICT);
    let error: Value = last.json().await?;
    assert!(error["error"].as_str().is_some_and(|it| it.contains("no ready relay left")), "{error}");
    let forced = post(&site, "drain", Some(OPERATOR), &json!({"node": "eu-2", "force": true})).await?;
    assert_eq!(forced.status(), StatusCode::OK);
    for node in ["eu-1", "eu-2"] {
        assert_eq!(post(&site, "uncordon", Some(OPERATOR), &json!({"node": node})).await?.status(), StatusCode::OK);
    }
    assert!(site.replica().fleet.snapshot().drains.is_empty());

    for (what, body) in [
        ("nobody", json!({"node": "eu-9"})),
        ("an unknown field", json!({"node": "eu-1", "deadline": 3})),
        ("no name", json!({"node": "eu/1"})),
        ("too long", json!({"node": "eu-1", "deadline_seconds": 4_000_000})),
    ] {
        let refused = post(&site, "drain", Some(OPERATOR), &body).await?;
        assert!(refused.status().is_client_error(), "{what}: {}", refused.status());
    }
    // What another page's form can send is not taken.
    let form = Client::new()
        .post(site.url("/v1/console/uncordon"))
        .bearer_auth(OPERATOR)
        .header("content-type", "text/plain")
        .body("{\"node\":\"eu-1\"}");
    assert_eq!(form.send().await?.status(), StatusCode::BAD_REQUEST);
    let preflight = Client::new()
        .request(reqwest::Method::OPTIONS, site.url("/v1/console/drain"))
        .header("origin", "https://elsewhere.example")
        .header("access-control-request-method", "POST")
        .send()
        .await?;
    assert!(!preflight.headers().contains_key("access-control-allow-origin"), "no page of others may act");
    Ok(())
}

#[tokio::test]
async fn allocations_are_found_by_what_people_know_of_them() -> Result<()> {
    let site = Site::start(&[KEYS], &[node("eu-1", "eu", 1), node("us-1", "us", 2)]).await?;
    for (relay, n, user) in [(1, 1, "1900000000:Alice"), (2, 2, "1900000000:bob"), (2, 3, "1900000000:carol")] {
        store(&site, relay, n, user.as_bytes()).await?;
    }
    let one = id(2).to_text();
    for (wanted, users) in [
        ("", &["Alice", "bob", "carol"][..]),
        ("alice", &["Alice"]),
        ("US-1", &["bob", "carol"]),
        ("us-1", &["bob", "carol"]),
        ("198.51.100.2:50003", &["carol"]),
        ("203.0.113.7:5000", &["Alice", "bob", "carol"]),
        (&one, &["bob"]),
        ("nobody", &[]),
    ] {
        let path = format!("/v1/console/allocations?search={}", wanted.replace(':', "%3A"));
        let answer: Value = get(&site, &path, None).await?.json().await?;
        let found = answer["allocations"].as_array().context("a list")?;
        let found: Vec<_> = found.iter().filter_map(|it| it["user"].as_str()?.split_once(':')).map(|it| it.1).collect();
        assert_eq!(found, users, "{wanted}: {answer}");
        assert_eq!(answer["more"], false);
    }
    // Ended by an operator: the relay is told by the key that every replica watches.
    assert_eq!(post(&site, "end", None, &json!({"allocation": one})).await?.status(), StatusCode::FORBIDDEN);
    assert_eq!(post(&site, "end", Some(OPERATOR), &json!({"allocation": one})).await?.status(), StatusCode::OK);
    assert!(site.store.get(&format!("revoke/198.51.100.2/{one}")).await?.is_some());
    let missing = json!({"allocation": id(9).to_text()});
    assert_eq!(post(&site, "end", Some(OPERATOR), &missing).await?.status(), StatusCode::NOT_FOUND);
    Ok(())
}

#[tokio::test]
async fn answers_of_steering_are_explained() -> Result<()> {
    let site = Site::start(&[KEYS], &[node("eu-1", "eu", 1), node("us-1", "us", 2)]).await?;
    let path = "/v1/console/explain?client=203.0.113.7&region=us&session=call-1&limit=1";
    let answer: Value = get(&site, path, None).await?.json().await?;
    assert_eq!((&answer["client"], &answer["relays"]), (&json!("203.0.113.7"), &json!(["us-1"])), "{answer}");
    assert_eq!(answer["considered"][0]["outcome"], "chosen, place 1");
    assert_eq!(answer["considered"][1]["node"], "eu-1");
    assert_eq!(answer["considered"][1]["outcome"], "90 ms behind the best score", "{answer}");
    let evidence = answer["evidence"].to_string();
    assert!(evidence.contains("region us, as asked"), "{evidence}");
    let own: Value = get(&site, "/v1/console/explain", None).await?.json().await?;
    assert_eq!(own["client"], "127.0.0.1", "who asks");
    assert_eq!(get(&site, "/v1/console/explain?client=me", None).await?.status(), StatusCode::BAD_REQUEST);
    Ok(())
}

/// Every call of the API that changes something: who, what, when, how it ended; the same in `ListAudit` and the picture.
#[tokio::test]
async fn whatever_changes_the_cluster_is_written_down() -> Result<()> {
    let site = Site::start(&[KEYS], &[node("eu-1", "eu", 1), node("eu-2", "eu", 2)]).await?;
    store(&site, 1, 1, b"1900000000:alice").await?;
    let allocation = id(1).to_text();
    let mut admin = AdminClient::new(channel(&site, "admin").await?);
    let ids = |id: &str| vec![id.to_owned()];
    let drain = |id: &str| v1::DrainNodesRequest { node_ids: ids(id), deadline_seconds: 60, force: false };
    admin.drain_nodes(drain("eu-1")).await?;
    admin.drain_nodes(drain("eu-2")).await.expect_err("the last one");
    admin.uncordon_nodes(v1::UncordonNodesRequest { node_ids: ids("eu-1") }).await?;
    admin.revoke_allocation(v1::RevokeAllocationRequest { id: allocation.clone() }).await?;
    admin.rotate_keys(v1::RotateKeysRequest { rings: vec![2], secret: Vec::new() }).await?;
    admin.retire_key(v1::RetireKeyRequest { ring: 2, id: 77 }).await.expect_err("there is no such key");
    admin.revoke_relay(v1::RevokeRelayRequest { node_id: "eu-2".to_owned(), serial: vec![10, 1] }).await?;
    admin.reinstate_relay(v1::ReinstateRelayRequest { node_id: "eu-2".to_owned() }).await?;
    AdminClient::new(channel(&site, "viewer").await?).drain_nodes(drain("eu-1")).await.expect_err("a viewer");
    post(&site, "drain", Some(OPERATOR), &json!({"node": "eu-1", "force": true})).await?.error_for_status()?;
    post(&site, "uncordon", None, &json!({"node": "eu-1"})).await?;

    let written = site.replica().audit.newest(100).await;
    let rows: Vec<_> = written.iter().rev().map(row).collect();
    let key = allocation.as_str();
    let expected = [
        ("admin/me", Via::Grpc, "drain", "eu-1", Outcome::Done, "within 60 s"),
        ("admin/me", Via::Grpc, "drain", "eu-2", Outcome::Failed, "no ready relay left"),
        ("admin/me", Via::Grpc, "uncordon", "eu-1", Outcome::Done, ""),
        ("admin/me", Via::Grpc, "revoke_allocation", key, Outcome::Done, ""),
        ("admin/me", Via::Grpc, "rotate_keys", "nonce", Outcome::Done, ""),
        ("admin/me", Via::Grpc, "retire_key", "nonce 77", Outcome::Failed, "no key 77"),
        ("admin/me", Via::Grpc, "revoke_relay", "eu-2", Outcome::Done, "certificate 0a:01"),
        ("admin/me", Via::Grpc, "reinstate_relay", "eu-2", Outcome::Done, ""),
        ("viewer/me", Via::Grpc, "drain", "eu-1", Outcome::Denied, "role operator"),
        ("operator/olga", Via::Console, "drain", "eu-1", Outcome::Done, "by force"),
        ("viewer/console", Via::Console, "uncordon", "eu-1", Outcome::Denied, "role operator"),
    ];
    assert_eq!(rows.len(), expected.len(), "{rows:#?}");
    for (row, (caller, via, action, on, outcome, detail)) in rows.iter().zip(expected) {
        assert_eq!((row.0, row.1, row.2, row.3, row.4), (caller, via, action, on, outcome), "{row:?}");
        assert!(row.5.contains(detail), "{row:?} lacks {detail:?}");
    }
    let listed = admin.list_audit(v1::ListAuditRequest { limit: 2 }).await?.into_inner().actions;
    assert_eq!(listed.len(), 2);
    assert_eq!((listed[1].caller.as_str(), listed[1].outcome()), ("operator/olga", v1::AuditOutcome::Done));
    assert_eq!(listed[1].controller, "c1");
    // As the console gets it.
    let mut pictures = get(&site, "/v1/console/events", None).await?;
    let mut text = String::new();
    while !text.contains("\n\n") {
        let more =
            tokio::time::timeout(Duration::from_secs(5), pictures.chunk()).await??.context("the stream ended")?;
        text.push_str(std::str::from_utf8(&more)?);
    }
    let picture: Value = serde_json::from_str(text.trim().strip_prefix("data: ").context("data")?)?;
    assert_eq!(picture["actions"].as_array().map(Vec::len), Some(11), "{picture}");
    assert_eq!(picture["actions"][1]["caller"], "operator/olga");
    assert_eq!(picture["actions"][1]["outcome"], "done");
    Ok(())
}

/// Nothing from elsewhere, nothing inline.
#[tokio::test]
async fn the_page_may_load_only_its_own_files() -> Result<()> {
    let site = Site::start(&[], &[]).await?;
    let page = get(&site, "/console", None).await?;
    let policy = page.headers()["content-security-policy"].to_str()?.to_owned();
    assert!(policy.starts_with("default-src 'none'; script-src 'self'; style-src 'self'"), "{policy}");
    assert!(
        !policy.contains("unsafe") && !policy.contains('*') && policy.contains("frame-ancestors 'none'"),
        "{policy}"
    );
    let page = page.text().await?;
    for inline in ["style=", "onclick=", "<style", "http://", "https://"] {
        assert!(!page.contains(inline), "{inline}");
    }
    Ok(())
}

fn row(action: &Action) -> (&str, Via, &str, &str, Outcome, &str) {
    (&action.caller, action.via, &action.action, &action.on, action.outcome, &action.detail)
}

async fn get(site: &Site, path: &str, key: Option<&str>) -> Result<Response> {
    let request = Client::new().get(site.url(path));
    Ok(key.into_iter().fold(request, reqwest::RequestBuilder::bearer_auth).send().await?)
}

async fn post(site: &Site, action: &str, key: Option<&str>, body: &Value) -> Result<Response> {
    let request = Client::new().post(site.url(&format!("/v1/console/{action}"))).json(body);
    Ok(key.into_iter().fold(request, reqwest::RequestBuilder::bearer_auth).send().await?)
}
