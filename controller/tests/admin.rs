//! gRPC over real mTLS: who may do what, and what operators are told.

mod site;

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use controller::fleet::unix_ms;
use controller::store::Op;
use tokio_stream::StreamExt as _;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use turn_core::{PeerAddr, credential};
use turnpike_proto::v1;
use turnpike_proto::v1::admin_client::AdminClient;
use turnpike_proto::v1::fleet_client::FleetClient;
use turnpike_proto::v1::steering_client::SteeringClient;

use self::site::{Pki, Site, channel, id, node, record, save, store};

#[tokio::test]
async fn roles_are_kept() -> Result<()> {
    let site = Site::start(&[], &[node("eu-1", "eu", 1)]).await?;
    let roles = ["relay", "controller", "viewer", "operator", "admin"];
    let reads: &[&str] = &["viewer", "operator", "admin"];
    let acts: &[&str] = &["operator", "admin"];
    let changes: &[&str] = &["admin"];
    for role in roles {
        let channel = channel(&site, role).await?;
        let mut admin = AdminClient::new(channel.clone());
        let mut steering = SteeringClient::new(channel.clone());
        let id = || "01ARZ3NDEKTSV4RRFFQ69G5FAV".to_owned();
        /// Call, roles that may, the role a refusal names, what came back.
        type Answer<'a> = (&'a str, &'a [&'a str], &'a str, Result<(), Status>);
        let answers: [Answer<'_>; 17] = [
            ("Status", reads, "viewer", admin.status(v1::StatusRequest {}).await.map(drop)),
            ("ListNodes", reads, "viewer", admin.list_nodes(v1::ListNodesRequest::default()).await.map(drop)),
            (
                "ListAllocations",
                reads,
                "viewer",
                admin.list_allocations(v1::ListAllocationsRequest::default()).await.map(drop),
            ),
            (
                "GetAllocation",
                reads,
                "viewer",
                admin.get_allocation(v1::GetAllocationRequest { id: id() }).await.map(drop),
            ),
            ("ListAudit", reads, "viewer", admin.list_audit(v1::ListAuditRequest::default()).await.map(drop)),
            ("ListUsage", reads, "viewer", admin.list_usage(v1::ListUsageRequest::default()).await.map(drop)),
            ("Events", reads, "viewer", admin.events(v1::EventsRequest {}).await.map(drop)),
            ("Regions", reads, "viewer", steering.regions(v1::RegionsRequest {}).await.map(drop)),
            ("Watch", reads, "viewer", steering.watch(v1::WatchRequest::default()).await.map(drop)),
            (
                "RevokeAllocation",
                acts,
                "operator",
                admin.revoke_allocation(v1::RevokeAllocationRequest { id: id() }).await.map(drop),
            ),
            (
                "DrainNodes",
                acts,
                "operator",
                admin
                    .drain_nodes(v1::DrainNodesRequest { node_ids: vec!["nobody".to_owned()], ..Default::default() })
                    .await
                    .map(drop),
            ),
            (
                "UncordonNodes",
                acts,
                "operator",
                admin.uncordon_nodes(v1::UncordonNodesRequest { node_ids: vec!["nobody".to_owned()] }).await.map(drop),
            ),
            ("ListKeys", reads, "viewer", admin.list_keys(v1::ListKeysRequest {}).await.map(drop)),
            (
                "RotateKeys",
                changes,
                "admin",
                admin.rotate_keys(v1::RotateKeysRequest { rings: vec![2], ..Default::default() }).await.map(drop),
            ),
            ("RetireKey", changes, "admin", admin.retire_key(v1::RetireKeyRequest { ring: 2, id: 77 }).await.map(drop)),
            ("Discover", acts, "operator", steering.discover(v1::DiscoverRequest::default()).await.map(drop)),
            ("Credentials", acts, "operator", steering.credentials(v1::CredentialsRequest::default()).await.map(drop)),
        ];
        for (call, allowed, needed, answer) in answers {
            match answer {
                Ok(()) => assert!(allowed.contains(&role), "{role} may {call}"),
                Err(status) if status.code() == Code::PermissionDenied => {
                    assert!(!allowed.contains(&role), "{role} may not {call}: {status}");
                    assert!(status.message().contains(&format!("role {needed}")), "{call}: {status}");
                }
                // Allowed, and there is no such allocation or node.
                Err(status) => {
                    assert!(status.code() == Code::NotFound && allowed.contains(&role), "{role} {call}: {status}");
                }
            }
        }
        let restore = v1::RestoreRequest { node_id: "me".to_owned(), relay_address: "198.51.100.9".to_owned() };
        let restored = FleetClient::new(channel.clone()).restore(restore).await;
        let refused = restored.is_err_and(|status| status.code() == Code::PermissionDenied);
        assert_eq!(refused, role != "relay", "{role} Restore");
        let health = HealthClient::new(channel).check(HealthCheckRequest::default()).await?;
        assert_eq!(health.into_inner().status(), ServingStatus::Serving, "{role}");
    }
    Ok(())
}

#[tokio::test]
async fn strangers_get_no_connection() -> Result<()> {
    let site = Site::start(&[], &[]).await?;
    let foreign = Pki::new()?;
    let bare =
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(site.pki.ca()?)).domain_name("controller.turnpike");
    let (certificate, key) = foreign.issue("admin", "eve")?;
    for tls in [bare.clone(), bare.identity(Identity::from_pem(certificate, key))] {
        let asked = async {
            let channel = Channel::from_shared(format!("https://{}", site.grpc))?.tls_config(tls)?.connect().await?;
            AdminClient::new(channel).status(v1::StatusRequest {}).await?;
            anyhow::Ok(())
        };
        assert!(asked.await.is_err());
    }
    Ok(())
}

/// Half a handshake must not hold others up.
#[tokio::test]
async fn unfinished_handshakes_do_not_block() -> Result<()> {
    let site = Site::start(&[], &[]).await?;
    let mut silent = Vec::new();
    for _ in 0..50 {
        silent.push(tokio::net::TcpStream::connect(site.grpc).await?);
    }
    let status = async {
        AdminClient::new(channel(&site, "viewer").await?).status(v1::StatusRequest {}).await.context("status")
    };
    let status = tokio::time::timeout(Duration::from_secs(5), status).await??.into_inner();
    assert_eq!(status.controller_id, "c1");
    Ok(())
}

#[tokio::test]
async fn health_and_reflection_answer_before_the_store_does() -> Result<()> {
    let mut site = Site::not_ready(&[]).await?;
    let channel = channel(&site, "viewer").await?;
    let mut health = HealthClient::new(channel.clone());
    for service in ["", "turnpike.v1.Admin", "turnpike.v1.Steering", "turnpike.v1.Fleet"] {
        let request = HealthCheckRequest { service: service.to_owned() };
        assert_eq!(health.check(request).await?.into_inner().status(), ServingStatus::NotServing, "{service}");
    }
    let mut watch = health.watch(HealthCheckRequest::default()).await?.into_inner();
    assert_eq!(watch.next().await.context("a status")??.status(), ServingStatus::NotServing);
    let refused = AdminClient::new(channel.clone()).status(v1::StatusRequest {}).await;
    assert_eq!(refused.expect_err("no store yet").code(), Code::Unavailable);

    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let answers =
        ServerReflectionClient::new(channel.clone()).server_reflection_info(tokio_stream::once(request)).await?;
    let answer = answers.into_inner().next().await.context("an answer")??;
    let Some(MessageResponse::ListServicesResponse(services)) = answer.message_response else { bail!("{answer:?}") };
    let names: Vec<_> = services.service.iter().map(|service| service.name.as_str()).collect();
    for name in ["turnpike.v1.Admin", "turnpike.v1.Fleet", "turnpike.v1.Steering", "grpc.health.v1.Health"] {
        assert!(names.contains(&name), "{names:?}");
    }

    site.make_ready().await?;
    assert_eq!(watch.next().await.context("a status")??.status(), ServingStatus::Serving);
    assert_eq!(AdminClient::new(channel).status(v1::StatusRequest {}).await?.into_inner().store, "embedded");
    Ok(())
}

#[tokio::test]
async fn a_drained_relay_is_left_out_at_once_and_the_reason_told() -> Result<()> {
    let held = node("eu-1", "eu", 1).with(|node| {
        node.load.allocations = 3;
        node.load.by_transport.udp = 2;
        node.load.by_transport.tls = 1;
        node.load.journal_failed = true;
    });
    let site = Site::start(&[], &[held, node("eu-2", "eu", 2), node("us-1", "us", 3)]).await?;
    let channel = channel(&site, "operator").await?;
    let (mut admin, mut steering) = (AdminClient::new(channel.clone()), SteeringClient::new(channel));
    let mut events = admin.events(v1::EventsRequest {}).await?.into_inner();
    let drain = |ids: &[&str], deadline_seconds, force| v1::DrainNodesRequest {
        node_ids: ids.iter().map(|id| (*id).to_owned()).collect(),
        deadline_seconds,
        force,
    };

    for (ids, code, says) in [
        (&["eu-1", "eu-2"][..], Code::FailedPrecondition, "region eu would have no ready relay left"),
        (&["eu-1", "eu-2", "us-1"], Code::FailedPrecondition, "the cluster would have no ready relay left"),
        (&["eu-1", "eu-9"], Code::NotFound, "there is no relay eu-9"),
        (&[], Code::InvalidArgument, "1 to 64"),
        (&["eu/1"], Code::InvalidArgument, "a relay's id"),
    ] {
        let refused = admin.drain_nodes(drain(ids, 0, false)).await.expect_err("a refusal");
        assert_eq!(refused.code(), code, "{ids:?}: {refused}");
        assert!(refused.message().contains(says), "{ids:?}: {refused}");
    }
    assert!(site.replica().fleet.snapshot().drains.is_empty(), "all or none");

    let answer = admin.drain_nodes(drain(&["eu-1", "eu-1"], 600, false)).await?.into_inner();
    assert_eq!(answer.nodes.len(), 1);
    let told = answer.nodes[0].drain.clone().context("a drain")?;
    assert_eq!((told.by.as_str(), told.deadline - told.since), ("operator/me", 600_000));
    // Not a moment later.
    let relays = steering.discover(v1::DiscoverRequest { limit: 8, ..Default::default() }).await?.into_inner().relays;
    let ids: Vec<_> = relays.iter().map(|relay| relay.node_id.as_str()).collect();
    assert_eq!(ids, ["eu-2", "us-1"]);
    let event = events.next().await.context("an event")??;
    assert!(event.detail.starts_with("ready -> draining, told to drain within"), "{}", event.detail);
    assert!(event.detail.ends_with("by operator/me"), "{}", event.detail);

    let listed = admin.list_nodes(v1::ListNodesRequest { region: "eu".to_owned() }).await?.into_inner().nodes;
    assert_eq!((listed[0].state(), listed[0].drain.as_ref()), (v1::NodeState::Draining, Some(&told)));
    let load = listed[0].load.clone().context("a load")?;
    let counts: Vec<_> = load.by_transport.iter().map(|count| (count.transport(), count.allocations)).collect();
    assert_eq!(counts, [(v1::Transport::Udp, 2), (v1::Transport::Tls, 1)]);
    let warnings = admin.status(v1::StatusRequest {}).await?.into_inner().warnings;
    let [draining, journal] = &warnings[..] else { bail!("{warnings:?}") };
    assert!(draining.starts_with("relay eu-1 is draining: told to drain by operator/me 0 s ago"), "{draining}");
    assert!(draining.ends_with("3 allocations left (2 udp, 1 tls), 9 min to go"), "{draining}");
    assert!(journal.contains("cannot write its journal"), "{journal}");
    let shown: serde_json::Value = reqwest::get(site.url("/v1/nodes")).await?.json().await?;
    let shown = shown["nodes"].as_array().or(shown.as_array()).context("nodes")?[0].clone();
    assert_eq!((&shown["state"], &shown["drain"]["by"]), (&"draining".into(), &"operator/me".into()), "{shown}");
    assert_eq!(shown["by_transport"]["tls"], 1, "{shown}");

    // Insisted on; also of one that is not there.
    let answer = admin.drain_nodes(drain(&["eu-1", "eu-2", "eu-9"], 0, true)).await?.into_inner().nodes;
    let what: Vec<_> = answer.iter().map(|node| (node.unchanged, node.absent)).collect();
    assert_eq!(what, [(true, false), (false, false), (false, true)]);
    assert_eq!(answer[0].drain.as_ref().map(|it| (it.since, it.deadline)), Some((told.since, told.deadline)));
    let warnings = admin.status(v1::StatusRequest {}).await?.into_inner().warnings;
    assert!(
        warnings.iter().any(|line| line.starts_with("relay eu-9 is told to drain and is not there")),
        "{warnings:?}"
    );

    let uncordon =
        |ids: &[&str]| v1::UncordonNodesRequest { node_ids: ids.iter().map(|id| (*id).to_owned()).collect() };
    let refused = admin.uncordon_nodes(uncordon(&["eu-1", "eu-8"])).await.expect_err("a refusal");
    assert_eq!(refused.code(), Code::NotFound);
    let answer = admin.uncordon_nodes(uncordon(&["eu-1", "eu-2", "us-1", "eu-9"])).await?.into_inner().nodes;
    let what: Vec<_> = answer.iter().map(|node| (node.unchanged, node.absent)).collect();
    assert_eq!(what, [(false, false), (false, false), (true, false), (false, true)]);
    let relays = steering.discover(v1::DiscoverRequest { limit: 8, ..Default::default() }).await?.into_inner().relays;
    assert_eq!(relays.len(), 3);
    Ok(())
}

#[tokio::test]
async fn status_and_nodes_tell_what_is_wrong() -> Result<()> {
    let suspect = node("eu-1", "eu", 1).with(|node| {
        node.load.suspect = true;
        node.load.allocations = 4;
    });
    let site = Site::start(&[], &[suspect, node("us-1", "us", 2)]).await?;
    let mut admin = AdminClient::new(channel(&site, "viewer").await?);
    let status = admin.status(v1::StatusRequest {}).await?.into_inner();
    assert_eq!((status.nodes, status.healthy_nodes, status.regions, status.allocations), (2, 1, 2, 4));
    assert!(status.store_healthy);
    assert_eq!(
        status.warnings,
        ["region eu has no ready relay", "relay eu-1 is suspect: lost its connection to the controllers"]
    );
    let nodes = admin.list_nodes(v1::ListNodesRequest { region: "eu".to_owned() }).await?.into_inner().nodes;
    assert_eq!(nodes.len(), 1);
    assert_eq!(nodes[0].state(), v1::NodeState::Suspect);
    assert_eq!((nodes[0].epoch, nodes[0].relay_address.as_str()), (7, "198.51.100.1"));
    assert_eq!(nodes[0].listeners[1].address, "198.51.100.1:3478");

    let mut steering = SteeringClient::new(channel(&site, "viewer").await?);
    let regions = steering.regions(v1::RegionsRequest {}).await?.into_inner().regions;
    assert_eq!(regions.iter().map(|region| region.name.as_str()).collect::<Vec<_>>(), ["us"]);
    Ok(())
}

#[tokio::test]
async fn discovery_over_grpc() -> Result<()> {
    let site =
        Site::start(&["--rest-secrets=north", "--realm=r"], &[node("eu-1", "eu", 1), node("us-1", "us", 2)]).await?;
    let mut steering = SteeringClient::new(channel(&site, "operator").await?);
    let request = v1::DiscoverRequest {
        region: "us".to_owned(),
        transports: vec![v1::Transport::Tcp.into()],
        user: b"\xff\0".to_vec(),
        limit: 0,
        ttl_seconds: 90,
        ..Default::default()
    };
    let answer = steering.discover(request.clone()).await?.into_inner();
    assert_eq!(answer.region, "us");
    let relays: Vec<_> = answer.relays.iter().map(|relay| (relay.node_id.as_str(), relay.distance_ms)).collect();
    assert_eq!(relays, [("us-1", 0), ("eu-1", 90)]);
    assert_eq!(answer.relays[0].uris, ["turn:198.51.100.2:3478?transport=tcp"]);
    let made = answer.credential.context("a credential")?;
    assert_eq!((made.realm.as_str(), made.ttl_seconds), ("r", 90));
    assert!(made.expires_at.abs_diff(unix_ms() / 1000 + 90) <= 2);
    let key = turn_core::Key { id: 0, secret: b"north".to_vec() };
    let minted = credential::mint(&key, b"\xff\0", made.expires_at);
    assert_eq!((made.username, made.password), (minted.username, minted.password));

    let refused = [
        v1::DiscoverRequest { limit: 9, ..request.clone() },
        v1::DiscoverRequest { ttl_seconds: 40 * 86_400, ..request.clone() },
        v1::DiscoverRequest { user: vec![b'x'; 481], ..request.clone() },
        v1::DiscoverRequest { transports: vec![0], ..request.clone() },
        v1::DiscoverRequest { transports: vec![77], ..request.clone() },
    ];
    for request in refused {
        let status = steering.discover(request.clone()).await.expect_err("refused");
        assert_eq!(status.code(), Code::InvalidArgument, "{request:?}: {status}");
    }
    let tls = v1::DiscoverRequest { transports: vec![v1::Transport::Tls.into()], ..request };
    let status = steering.discover(tls).await.expect_err("nobody speaks TLS");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("2 without a listener"), "{status}");
    Ok(())
}

#[tokio::test]
async fn allocations_are_listed_found_and_revoked_and_events_told() -> Result<()> {
    let site = Site::start(&[], &[node("eu-1", "eu", 1), node("us-1", "us", 2)]).await?;
    let mut admin = AdminClient::new(channel(&site, "operator").await?);
    let mut events = admin.events(v1::EventsRequest {}).await?.into_inner();
    for n in 0..5 {
        store(&site, 1, n, b"1700000000:alice").await?;
        store(&site, 2, 100 + n, b"1700000000:bob\xff").await?;
    }
    let created = events.next().await.context("an event")??;
    assert_eq!(created.kind(), v1::EventKind::AllocationCreated);
    assert_eq!((created.node_id.as_str(), created.region.as_str()), ("eu-1", "eu"));
    assert_eq!(created.username, b"1700000000:alice");

    // Two at a time until the end, each once.
    let mut seen = Vec::new();
    let mut request = v1::ListAllocationsRequest { page_size: 2, ..Default::default() };
    loop {
        let page = admin.list_allocations(request.clone()).await?.into_inner();
        seen.extend(page.allocations.into_iter().map(|allocation| allocation.id));
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    assert_eq!(seen.len(), 10);
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 10);

    let filters = [
        v1::ListAllocationsRequest { node_id: "us-1".to_owned(), ..Default::default() },
        v1::ListAllocationsRequest { region: "us".to_owned(), ..Default::default() },
        v1::ListAllocationsRequest { user: b"bob\xff".to_vec(), ..Default::default() },
    ];
    for request in filters {
        let page = admin.list_allocations(request.clone()).await?.into_inner();
        let nodes: Vec<_> = page.allocations.iter().map(|allocation| allocation.node_id.as_str()).collect();
        assert_eq!(nodes, ["us-1"; 5], "{request:?}");
    }
    let token = v1::ListAllocationsRequest { page_token: "../keys".to_owned(), ..Default::default() };
    assert_eq!(admin.list_allocations(token).await.expect_err("no token of ours").code(), Code::InvalidArgument);

    let id = id(3).to_text();
    let one = admin.get_allocation(v1::GetAllocationRequest { id: id.to_lowercase() }).await?.into_inner();
    assert_eq!(one.id, id);
    assert_eq!((one.client.as_str(), one.transport()), ("203.0.113.7:5000", v1::Transport::Udp));
    assert_eq!(one.relayed, ["198.51.100.1:50003"]);
    assert_eq!(one.permissions[0].peer_ip, "192.0.2.9");
    assert_eq!((one.channels[0].number, one.channels[0].peer.as_str()), (0x4000, "192.0.2.9:9"));

    admin.revoke_allocation(v1::RevokeAllocationRequest { id: id.clone() }).await?;
    let asked = site.store.range("revoke/", None, 10).await?;
    assert_eq!(
        asked.entries.iter().map(|entry| entry.key.as_str()).collect::<Vec<_>>(),
        [format!("revoke/198.51.100.1/{id}")]
    );
    for (bad, code) in [("nonsense", Code::InvalidArgument), ("01ARZ3NDEKTSV4RRFFQ69G5FAV", Code::NotFound)] {
        let get = admin.get_allocation(v1::GetAllocationRequest { id: bad.to_owned() }).await;
        let revoke = admin.revoke_allocation(v1::RevokeAllocationRequest { id: bad.to_owned() }).await;
        assert_eq!((get.expect_err(bad).code(), revoke.expect_err(bad).code()), (code, code), "{bad}");
    }

    let key = format!("allocations/198.51.100.1/{id}");
    site.store.transact(Vec::new(), vec![Op::Delete(key)]).await?;
    site.put(&node("ap-1", "ap", 3)).await?;
    let mut ended = false;
    let mut joined = false;
    while !(ended && joined) {
        let event = tokio::time::timeout(Duration::from_secs(5), events.next()).await?.context("an event")??;
        ended |= event.kind() == v1::EventKind::AllocationEnded && event.allocation_id == id;
        joined |= event.kind() == v1::EventKind::NodeJoined && event.node_id == "ap-1";
    }

    // The end of the process ends the stream, not with an error.
    site.shutdown.cancel();
    while let Some(event) = tokio::time::timeout(Duration::from_secs(5), events.next()).await? {
        event?;
    }
    Ok(())
}

/// A page is as long as a message may be, whatever its size says.
#[tokio::test]
async fn pages_of_large_records_fit_into_a_message() -> Result<()> {
    let site = Site::start(&[], &[node("eu-1", "eu", 1)]).await?;
    for n in 0..=255 {
        let mut record = record(1, n, &[b'x'; 508])?;
        record.permissions = (0..=255).map(|peer| (std::net::IpAddr::from([192, 0, 2, peer]), u64::MAX)).collect();
        record.channels =
            (0..=255).map(|n| (0x4000 + n, PeerAddr::new(([192, 0, 2, 1], n).into()), u64::MAX)).collect();
        save(&site, &record).await?;
    }
    let mut admin = AdminClient::new(channel(&site, "viewer").await?);
    let mut request = v1::ListAllocationsRequest { page_size: 1000, ..Default::default() };
    let (mut seen, mut pages) = (Vec::new(), 0);
    loop {
        let page = admin.list_allocations(request.clone()).await?.into_inner();
        seen.extend(page.allocations.into_iter().map(|allocation| allocation.id));
        pages += 1;
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    assert!(pages > 1, "the records are too small to show anything");
    assert_eq!(seen, (0..=255).map(|n| id(n).to_text()).collect::<Vec<_>>());
    Ok(())
}

/// What the console shows of allocations: the newest, escaped.
#[tokio::test]
async fn the_newest_allocations_come_first() -> Result<()> {
    let site = Site::start(&[], &[node("eu-1", "eu", 1), node("us-1", "us", 2)]).await?;
    for n in 0..20 {
        store(&site, 1 + n % 2, n, b"1:\xff").await?;
    }
    let allocations = &site.replica().allocations;
    let waiting = async {
        while allocations.count() < 20 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), waiting).await?;
    let newest = allocations.newest(7).await?;
    let ids: Vec<_> = newest.iter().map(|found| found.record.id).collect();
    assert_eq!(ids, (13..20).rev().map(id).collect::<Vec<_>>());
    let shown = controller::api::view::AllocationJson::new(&newest[0], unix_ms());
    let shown = serde_json::to_value(shown)?;
    assert_eq!(shown["user"], "1:\\xff");
    assert_eq!((&shown["node"], &shown["relayed"]), (&"us-1".into(), &"198.51.100.2:50019".into()));
    assert_eq!((&shown["permissions"], &shown["channels"]), (&1.into(), &1.into()));
    assert!((599..=600).contains(&shown["expires_s"].as_u64().context("a number")?), "{shown}");
    Ok(())
}

#[tokio::test]
async fn keys_are_listed_without_secrets_and_rotated_where_they_are_the_stores() -> Result<()> {
    let site = Site::start(&["--rest-secrets=[\"configured-secret\"]"], &[]).await?;
    let mut admin = AdminClient::new(channel(&site, "admin").await?);
    let listed = admin.list_keys(v1::ListKeysRequest {}).await?.into_inner();
    let told = format!("{listed:?}");
    assert!(!told.contains("configured-secret"), "{told}");
    assert_eq!(listed.keys[0].origin(), v1::KeyOrigin::Configured);

    let refused = admin.rotate_keys(v1::RotateKeysRequest { rings: vec![1], ..Default::default() }).await;
    let refused = refused.expect_err("the configuration's");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("add the new one at the end of rest_secrets"), "{refused}");
    let given = v1::RotateKeysRequest { rings: vec![2], secret: b"a secret of sixteen".to_vec() };
    assert_eq!(admin.rotate_keys(given).await.expect_err("a nonce key").code(), Code::InvalidArgument);

    // No relay has to hear of it: the next look promotes it.
    let begun = admin.rotate_keys(v1::RotateKeysRequest::default()).await?.into_inner();
    assert_eq!(begun.configured, [i32::from(v1::KeyRing::Rest)]);
    let ids: Vec<_> = begun.keys.iter().map(|key| (key.ring(), key.id)).collect();
    assert_eq!(ids, [(v1::KeyRing::Nonce, 1), (v1::KeyRing::Record, 1)]);
    loop {
        let listed = admin.list_keys(v1::ListKeysRequest {}).await?.into_inner();
        let states = |ring| {
            let of_it = listed.keys.iter().filter(move |key| key.ring() == ring);
            of_it.map(|key| (key.id, key.state())).collect::<Vec<_>>()
        };
        if states(v1::KeyRing::Nonce).iter().any(|(_, state)| *state == v1::KeyState::Next) {
            continue;
        }
        assert_eq!(states(v1::KeyRing::Nonce), [(1, v1::KeyState::Newest), (0, v1::KeyState::Retiring)]);
        let nonce = listed.keys.iter().find(|key| key.ring() == v1::KeyRing::Nonce && key.id == 0);
        let nonce = nonce.context("the old key")?;
        assert!(nonce.leaves_at > nonce.since + 3_600_000, "{nonce:?}");
        break;
    }
    admin.retire_key(v1::RetireKeyRequest { ring: 2, id: 0 }).await?;
    let newest = admin.retire_key(v1::RetireKeyRequest { ring: 2, id: 1 }).await.expect_err("the newest");
    assert_eq!(newest.code(), Code::FailedPrecondition);
    Ok(())
}
