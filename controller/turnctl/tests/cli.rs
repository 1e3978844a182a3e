//! The command line as scripts and people meet it: exit codes, streams, one-line errors.

mod fake;

use std::io::{BufRead as _, BufReader, Read as _};
use std::net::{SocketAddr, UdpSocket};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fake::{Fake, Files, World, parts, turnctl};
use openssl::pkey::PKey;
use openssl::ssl::{SslAcceptor, SslMethod};
use openssl::x509::X509;
use turn_core::wire::attribute::XorMappedAddress;
use turn_core::wire::{Class, Message, MessageWriter};
use turnctl::pki::{CertificateAndKey, Identity, create_ca};
use turnpike_proto::v1::{
    Allocation, AllocationUsage, AuditAction, AuditOutcome, Event, EventKind, Key, KeyState, LinkPath, LinkReport,
    LinkState, ListLinksResponse, Load, NetcheckTarget, Node, NodeState, RelayLinks, Transport, TransportAllocations,
};

fn healthy() -> World {
    World { store_healthy: true, nodes: vec![node("eu-1", "eu", NodeState::Ready)], ..World::default() }
}

#[test]
fn a_healthy_cluster_is_0_and_an_unhealthy_one_3() -> Result<()> {
    let fake = Fake::start(healthy())?;
    let (code, stdout, stderr) = parts(&fake.turnctl(&["status"])?);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    assert!(stdout.starts_with("Cluster       healthy\n"), "{stdout}");
    assert!(!stdout.contains('\u{1b}'), "colour without a terminal: {stdout:?}");

    fake.world.lock().expect("lock").nodes.push(node("us-1", "us", NodeState::Suspect));
    let (code, stdout, stderr) = parts(&fake.turnctl(&["status", "-o", "json"])?);
    assert_eq!(code, Some(3), "{stderr}");
    let status: serde_json::Value = serde_json::from_str(&stdout)?;
    assert_eq!(status["healthy"], false);
    assert_eq!(status["problems"][0]["severity"], "error");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    Ok(())
}

#[test]
fn waiting_ends_when_the_cluster_is_well() -> Result<()> {
    let fake = Fake::start(World::default())?;
    let mut waiting = fake.command(&["status", "--wait"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut said = BufReader::new(waiting.stderr.take().context("stderr")?);
    let mut line = String::new();
    said.read_line(&mut line)?;
    assert!(line.starts_with("waiting: the cluster is unhealthy"), "{line}");
    *fake.world.lock().expect("lock") = healthy();
    let output = waiting.wait_with_output()?;
    assert_eq!(output.status.code(), Some(0));
    Ok(())
}

#[test]
fn usage_is_listed_and_summed_up_by_user() -> Result<()> {
    let usage = |username: &str, ended_at| AllocationUsage {
        id: "01HF8Z6Z3N3QW3V1R5Y0X2C4D6".into(),
        username: username.into(),
        bytes_to_peer: 1000,
        packets_to_peer: 10,
        ended_at,
        ..AllocationUsage::default()
    };
    let usage = vec![usage("1:alice", 5), usage("2:alice", 0), usage("bob", 5)];
    let fake = Fake::start(World { usage, ..healthy() })?;
    let (code, stdout, stderr) = parts(&fake.turnctl(&["usage", "--by-user", "-o", "json"])?);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    let shown: serde_json::Value = serde_json::from_str(&stdout)?;
    assert_eq!(shown["users"][0]["username"], "alice");
    assert_eq!((&shown["users"][0]["allocations"], &shown["users"][0]["live"]), (&2.into(), &1.into()));
    assert_eq!(shown["users"][0]["bytes_to_peer"], 2000);
    let (code, stdout, _) = parts(&fake.turnctl(&["usage", "--user", "bob"])?);
    assert_eq!((code, stdout.lines().count()), (Some(0), 2), "{stdout}");
    Ok(())
}

#[test]
fn what_does_not_exist_is_4() -> Result<()> {
    let fake = Fake::start(healthy())?;
    let (code, stdout, stderr) = parts(&fake.turnctl(&["allocations", "get", "01HF8Z6Z3N3QW3V1R5Y0X2C4D6"])?);
    assert_eq!((code, stdout.as_str()), (Some(4), ""));
    assert!(stderr.contains("no allocation 01HF8Z6Z3N3QW3V1R5Y0X2C4D6"), "{stderr}");
    let (code, _, stderr) = parts(&turnctl(fake.directory.path()).args(["context", "current"]).output()?);
    assert_eq!(code, Some(4), "{stderr}");
    Ok(())
}

#[test]
fn a_missing_role_is_1_and_named_with_who_we_are() -> Result<()> {
    let fake = Fake::start(healthy())?;
    let (code, _, stderr) = parts(&fake.turnctl(&["allocations", "revoke", "x"])?);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("role operator") && stderr.contains("turnpike://admin/me"), "{stderr}");
    Ok(())
}

#[test]
fn wrong_usage_is_2() -> Result<()> {
    let home = tempfile::tempdir()?;
    for arguments in
        [&["nodes", "--nonsense"][..], &["nodes"], &["nodes", "--context", "nowhere"], &["ca", "issue", "x"]]
    {
        let (code, stdout, stderr) = parts(&turnctl(home.path()).args(arguments).output()?);
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{arguments:?}: {stderr}");
    }
    let (_, _, stderr) = parts(&turnctl(home.path()).arg("nodes").output()?);
    assert!(stderr.contains("turnctl context"), "{stderr}");
    Ok(())
}

#[test]
fn nobody_there_is_5_with_the_reason() -> Result<()> {
    let fake = Fake::start(healthy())?;
    let closed = closed_port()?.replace("https://", "");
    // Nobody listens.
    let (code, _, stderr) = parts(&fake.turnctl(&["nodes", "--controller", &closed])?);
    assert_eq!(code, Some(5), "{stderr}");
    assert!(stderr.contains("connection refused") && stderr.lines().count() == 1, "{stderr}");

    // We do not trust it.
    let other = tempfile::tempdir()?;
    let ca = create_ca("other")?;
    ca.write(other.path(), false)?;
    fake::issue(&ca, other.path())?;
    let files = Files::of(other.path());
    let (code, _, stderr) = parts(&fake.command(&["nodes", "--ca"]).arg(&files.ca).output()?);
    assert_eq!(code, Some(5), "{stderr}");
    assert!(stderr.contains("not trusted") && stderr.lines().count() == 1, "{stderr}");

    // It does not trust us.
    let output = fake.command(&["nodes", "--cert"]).arg(&files.certificate).arg("--key").arg(&files.key).output()?;
    let (code, _, stderr) = parts(&output);
    assert_eq!(code, Some(5), "{stderr}");
    assert!(stderr.contains("refuses your certificate") && stderr.lines().count() == 1, "{stderr}");
    Ok(())
}

#[test]
fn a_controller_that_cannot_serve_is_3() -> Result<()> {
    let fake = Fake::start(healthy())?;
    let (code, _, stderr) = parts(&fake.turnctl(&["credentials"])?);
    assert_eq!(code, Some(3), "{stderr}");
    assert!(stderr.contains("the store does not answer") && stderr.contains("turnctl status"), "{stderr}");
    Ok(())
}

#[test]
fn several_controllers_are_tried_in_turn() -> Result<()> {
    let fake = Fake::start(healthy())?;
    let controllers = format!("{},https://{}", closed_port()?, fake.address);
    let (code, stdout, stderr) = parts(&fake.turnctl(&["nodes", "--controller", &controllers])?);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    assert!(stdout.contains("eu-1"), "{stdout}");
    Ok(())
}

#[test]
fn no_answer_in_time_is_124() -> Result<()> {
    let fake = Fake::start(World { stuck: true, ..healthy() })?;
    let (code, _, stderr) = parts(&fake.turnctl(&["status", "--timeout", "200ms"])?);
    assert_eq!(code, Some(124), "{stderr}");
    let (code, ..) = parts(&fake.turnctl(&["events", "--timeout", "200ms"])?);
    assert_eq!(code, Some(124));
    Ok(())
}

#[test]
fn a_relay_is_drained_watched_and_uncordoned() -> Result<()> {
    let held = |allocations| Load {
        allocations,
        by_transport: vec![TransportAllocations { transport: Transport::Tls as i32, allocations }],
        draining: true,
        ..Load::default()
    };
    let fake = Fake::start(healthy())?;
    fake.world.lock().expect("lock").nodes.push(node("eu-2", "eu", NodeState::Ready));
    fake.world.lock().expect("lock").nodes[0].load = Some(held(2));
    let (code, stdout, stderr) = parts(&fake.turnctl(&["drain", "eu-1", "--deadline", "30m"])?);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    assert!(stdout.starts_with("relay eu-1 draining, 2 allocations left: tls 2; "), "{stdout}");
    let (_, stdout, _) = parts(&fake.turnctl(&["nodes", "-o", "wide"])?);
    let line = stdout.lines().find(|line| line.contains("eu-1")).context("a line")?;
    assert!(line.contains("draining") && line.contains("tls 2") && line.contains("in 29m"), "{stdout}");

    // It gets empty while we look.
    let mut waiting = fake.command(&["drain", "eu-1", "--wait"]).stdout(Stdio::piped()).spawn()?;
    let mut stdout = BufReader::new(waiting.stdout.take().context("stdout")?);
    let mut line = String::new();
    stdout.read_line(&mut line)?;
    fake.world.lock().expect("lock").nodes[0].load = Some(held(0));
    stdout.read_line(&mut line)?;
    assert_eq!(line, "relay eu-1 draining, 2 allocations left: tls 2\nrelay eu-1 drained\n");
    assert_eq!(waiting.wait()?.code(), Some(0));

    // Or it does not.
    fake.world.lock().expect("lock").nodes[0].load = Some(held(1));
    let (code, stdout, stderr) =
        parts(&fake.turnctl(&["drain", "eu-1", "--wait", "--deadline", "1s", "-o", "json"])?);
    assert_eq!(code, Some(124), "{stderr}");
    assert!(stderr.contains("eu-1 has 1 allocation left: tls 1"), "{stderr}");
    let last: serde_json::Value = serde_json::from_str(stdout.lines().last().context("a line")?)?;
    assert_eq!((&last["state"], &last["by_transport"]["tls"]), (&"overdue".into(), &1.into()));

    let (code, stdout, _) = parts(&fake.turnctl(&["uncordon", "eu-1"])?);
    assert_eq!((code, stdout.as_str()), (Some(0), "relay eu-1 uncordoned\n"));
    let (code, stdout, _) = parts(&fake.turnctl(&["uncordon", "eu-1"])?);
    assert_eq!((code, stdout.as_str()), (Some(0), "relay eu-1 was not told to drain\n"));
    assert_eq!(parts(&fake.turnctl(&["uncordon", "eu-9"])?).0, Some(4));
    Ok(())
}

#[test]
fn the_last_relay_is_drained_only_by_force() -> Result<()> {
    let fake = Fake::start(healthy())?;
    fake.world.lock().expect("lock").nodes.push(node("eu-2", "eu", NodeState::Ready));
    let all: Vec<String> = fake.world.lock().expect("lock").nodes.iter().map(|node| node.node_id.clone()).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let (code, stdout, stderr) = parts(&fake.turnctl(&[&["drain"], &all[..]].concat())?);
    assert_eq!((code, stdout.as_str()), (Some(1), ""));
    assert!(stderr.contains("no ready relay left") && stderr.contains("--force"), "{stderr}");
    let (code, stdout, _) = parts(&fake.turnctl(&[&["drain", "--force"], &all[..], &["eu-9"]].concat())?);
    assert_eq!((code, stdout.lines().count()), (Some(0), all.len() + 1));
    assert!(stdout.contains("relay eu-9 draining when it joins"), "{stdout}");
    Ok(())
}

#[test]
fn all_pages_are_listed_and_opaque_names_filter() -> Result<()> {
    let allocation = |number: u8| Allocation {
        id: format!("id-{number}"),
        username: vec![b'u', if number.is_multiple_of(2) { 0xff } else { b'x' }],
        ..Allocation::default()
    };
    let fake = Fake::start(World { allocations: (0..5).map(allocation).collect(), ..healthy() })?;
    let ids = |arguments: &[&str]| -> Result<Vec<String>> {
        let (code, stdout, stderr) = parts(&fake.turnctl(arguments)?);
        ensure!(code == Some(0), "{stderr}");
        let list: serde_json::Value = serde_json::from_str(&stdout)?;
        let list = list["allocations"].as_array().context("a list")?;
        Ok(list.iter().filter_map(|it| it["id"].as_str()).map(str::to_owned).collect())
    };
    assert_eq!(ids(&["allocations", "list", "-o", "json"])?.len(), 5);
    assert_eq!(fake.world.lock().expect("lock").pages, 3);
    assert_eq!(ids(&["allocations", "-o", "json"])?.len(), 5, "list is the default");
    assert_eq!(ids(&["allocations", "list", "-o", "json", "--limit", "3"])?, ["id-0", "id-1", "id-2"]);
    assert_eq!(ids(&["allocations", "list", "-o", "json", "--user", "u\\xff"])?, ["id-0", "id-2", "id-4"]);
    let (code, stdout, stderr) = parts(&fake.turnctl(&["allocations", "list", "--user", "nobody"])?);
    assert_eq!((code, stdout.as_str(), stderr.as_str()), (Some(0), "", "no allocations\n"));
    Ok(())
}

#[test]
fn events_are_lines_of_json_and_a_closed_pipe_is_quiet() -> Result<()> {
    let event = |node: &str| Event {
        at: 1_700_000_000_000,
        kind: EventKind::NodeLeft as i32,
        node_id: node.into(),
        ..Event::default()
    };
    // More than a pipe holds: it is still writing when the reader leaves.
    let events = (0..20_000).map(|number| event(&format!("eu-{}", number % 2))).collect();
    let fake = Fake::start(World { events, ..healthy() })?;
    let mut following = fake
        .command(&["events", "-w", "-o", "json", "--node", "eu-1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdout = BufReader::new(following.stdout.take().context("stdout")?);
    let mut line = String::new();
    stdout.read_line(&mut line)?;
    let event: serde_json::Value = serde_json::from_str(&line)?;
    assert_eq!((event["kind"].as_str(), event["node_id"].as_str()), (Some("node_left"), Some("eu-1")));
    drop(stdout);
    assert_eq!(following.wait()?.code(), Some(0));
    let mut stderr = String::new();
    following.stderr.take().context("stderr")?.read_to_string(&mut stderr)?;
    assert!(stderr.starts_with("following ") && stderr.lines().count() == 1, "{stderr}");
    Ok(())
}

#[test]
fn contexts_are_set_used_and_forgotten() -> Result<()> {
    let fake = Fake::start(healthy())?;
    let home = tempfile::tempdir()?;
    let run = |arguments: &[&str]| -> Result<(Option<i32>, String, String)> {
        Ok(parts(&turnctl(home.path()).args(arguments).output()?))
    };
    let files = Files::of(fake.directory.path());
    let controller = format!("https://{}", fake.address);
    let path = |path: &std::path::Path| path.to_string_lossy().into_owned();
    let (ca, certificate, key) = (path(&files.ca), path(&files.certificate), path(&files.key));
    let set =
        ["context", "set", "one", "--controller", &controller, "--ca", &ca, "--cert", &certificate, "--key", &key];
    let (code, _, stderr) = run(&set)?;
    assert_eq!(code, Some(0), "{stderr}");
    assert!(home.path().join(".config/turnpike/config.toml").exists());
    assert_eq!(run(&["context", "current"])?.1, "one\n");
    assert!(run(&["nodes"])?.1.contains("eu-1"));

    assert_eq!(run(&["context", "set", "two", "--controller", "https://192.0.2.1:1"])?.0, Some(0));
    assert_eq!(run(&["context", "use", "two"])?.0, Some(0));
    assert_eq!(run(&["nodes", "--context", "one"])?.0, Some(0));
    let (code, stdout, _) = run(&["context", "list", "-o", "json"])?;
    assert_eq!(code, Some(0));
    let list: serde_json::Value = serde_json::from_str(&stdout)?;
    assert_eq!((&list["contexts"][0]["current"], &list["contexts"][1]["current"]), (&false.into(), &true.into()));

    assert_eq!(run(&["context", "delete", "two"])?.0, Some(0));
    let (code, _, stderr) = run(&["context", "use", "two"])?;
    assert_eq!(code, Some(2));
    assert!(stderr.contains("there are: one"), "{stderr}");
    assert_eq!(run(&["context", "current"])?.0, Some(4));
    Ok(())
}

#[test]
fn certificates_are_made_also_where_a_controller_is_configured() -> Result<()> {
    let home = tempfile::tempdir()?;
    let run = |arguments: &[&str]| -> Result<(Option<i32>, String, String)> {
        let mut command = turnctl(home.path());
        command.env("TURNCTL_CONTROLLER", "https://192.0.2.1:9443").args(arguments);
        Ok(parts(&command.output()?))
    };
    assert_eq!(run(&["ca", "init", "pki"])?.0, Some(0));
    let (code, _, stderr) = run(&["ca", "init", "pki"])?;
    assert_eq!(code, Some(1));
    assert!(stderr.contains("--force"), "{stderr}");
    for (option, name) in [("--relay", "eu-1"), ("--controller", "c1"), ("--admin", "a"), ("--viewer", "v")] {
        let (code, stdout, stderr) = run(&["ca", "issue", "pki", option, name, "-o", "json"])?;
        assert_eq!(code, Some(0), "{stderr}");
        let made: serde_json::Value = serde_json::from_str(&stdout)?;
        let role = option.trim_start_matches('-');
        assert_eq!(made["identity"], format!("turnpike://{role}/{name}"));
        assert!(home.path().join(format!("pki/{role}-{name}.key")).exists());
    }
    // One at a time.
    assert_eq!(run(&["ca", "issue", "pki", "--relay", "x", "--controller", "y"])?.0, Some(2));
    assert_eq!(run(&["ca", "issue", "pki", "--relay", "../x"])?.0, Some(2));
    Ok(())
}

#[test]
fn shells_get_their_completions() -> Result<()> {
    let home = tempfile::tempdir()?;
    for shell in ["bash", "zsh", "fish"] {
        let (code, stdout, _) = parts(&turnctl(home.path()).args(["completions", shell]).output()?);
        assert_eq!(code, Some(0));
        assert!(stdout.contains("allocations") && stdout.contains("turnctl"), "{shell}");
    }
    Ok(())
}

/// The address of a port that was free a moment ago.
/// Answers Binding requests with the address that they came from, as a NAT in between would have it if `port` is another.
fn stun_server(port: Option<u16>) -> Result<SocketAddr> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    let address = socket.local_addr()?;
    std::thread::spawn(move || {
        let mut bytes = [0; 1500];
        while let Ok((len, from)) = socket.recv_from(&mut bytes) {
            let Ok(request) = Message::parse(&bytes[..len]) else { continue };
            let mapped = SocketAddr::new(from.ip(), port.unwrap_or(from.port()));
            let mut answer = [0; 100];
            let mut writer =
                MessageWriter::new(&mut answer, Class::Success, request.method(), request.transaction_id());
            writer.attribute(&XorMappedAddress(mapped));
            let Ok(len) = writer.finish() else { continue };
            let _ = socket.send_to(&answer[..len], from);
        }
    });
    Ok(address)
}

#[test]
fn regions_are_measured_shown_nearest_first_and_reported() -> Result<()> {
    let target = |region: &str, address: String| NetcheckTarget {
        region: region.into(),
        node_id: format!("{region}-1"),
        address,
    };
    let targets =
        vec![target("ap", closed_port()?.replace("https://", "")), target("eu", stun_server(None)?.to_string())];
    let fake = Fake::start(World { targets, ..healthy() })?;
    let (code, stdout, stderr) =
        parts(&fake.turnctl(&["netcheck", "--report", "--client", "203.0.113.7", "-o", "json"])?);
    assert_eq!(code, Some(0), "{stderr}");
    let seen: serde_json::Value = serde_json::from_str(&stdout)?;
    assert_eq!((&seen["regions"][0]["region"], &seen["regions"][1]["rtt_ms"]), (&"eu".into(), &().into()), "{seen}");
    assert!(seen["regions"][0]["rtt_ms"].as_f64().is_some_and(|ms| ms < 1000.0), "{seen}");
    let reported = fake.world.lock().expect("lock").reported.clone();
    assert_eq!((reported.len(), reported[0].client.as_str()), (1, "203.0.113.7"));
    assert_eq!(reported[0].regions.len(), 1, "the silent one is not reported: {reported:?}");

    fake.world.lock().expect("lock").targets.remove(1);
    let (code, _, stderr) = parts(&fake.turnctl(&["netcheck"])?);
    assert_eq!(code, Some(5), "{stderr}");
    assert!(stderr.contains("no relay answered over UDP") && stderr.contains("turnctl nat"), "{stderr}");
    // An empty answer is explained too, and is not well.
    let (code, _, stderr) = parts(&fake.turnctl(&["explain", "--client", "203.0.113.7"])?);
    assert_eq!(code, Some(3), "{stderr}");
    assert!(stderr.contains("of 1 known, 1 draining"), "{stderr}");
    Ok(())
}

#[test]
fn nat_says_what_two_servers_tell_and_what_is_blocked() -> Result<()> {
    let home = tempfile::tempdir()?;
    let [open, other] = [stun_server(None)?, stun_server(Some(7))?];
    let run = |uris: &[String]| {
        let output = turnctl(home.path()).args(["nat", "-o", "json"]).args(uris).output()?;
        let (code, stdout, stderr) = parts(&output);
        Ok::<_, anyhow::Error>((code, serde_json::from_str::<serde_json::Value>(&stdout).unwrap_or_default(), stderr))
    };
    let (code, said, stderr) = run(&[format!("stun:{open}")])?;
    assert_eq!((code, &said["kind"]), (Some(0), &"open".into()), "{said} {stderr}");
    // Behind a NAT of which one server tells too little.
    let (_, said, _) = run(&[format!("stun:{other}")])?;
    assert_eq!((&said["kind"], &said["udp"]["mapping"]), (&"unknown".into(), &().into()), "{said}");
    let closed = closed_port()?.replace("https://", "");
    let (code, said, stderr) = run(&[format!("stun:{closed}"), format!("turn:{closed}?transport=tcp")])?;
    assert_eq!((code, &said["kind"]), (Some(3), &"udp-blocked".into()), "{said}");
    assert!(stderr.contains("nothing passes"), "{stderr}");
    assert_eq!(said["streams"][0]["works"], false, "{said}");
    let (code, _, _) = run(&["http://example.org".into()])?;
    assert_eq!(code, Some(2));
    Ok(())
}

#[test]
fn nat_says_who_issued_a_certificate_that_is_not_trusted() -> Result<()> {
    let home = tempfile::tempdir()?;
    let ca = create_ca("The office's proxy")?;
    let localhost = ["localhost".to_owned()];
    let shown = ca.issue(&Identity::Controller("c1".into()), &localhost, &[], Duration::from_secs(3600))?;
    let server = tls_server(&shown)?;
    let uri = format!("turns:localhost:{}", server.port());
    let (code, stdout, stderr) = parts(&turnctl(home.path()).args(["nat", &uri]).output()?);
    assert_eq!(code, Some(3), "{stdout}{stderr}");
    assert!(stdout.contains("certificate not trusted") && !stdout.contains("blocked  "), "{stdout}");
    assert!(stdout.contains("was issued by \"The office's proxy\" and is not trusted ("), "{stdout}");
    assert!(stderr.contains("--tls-ca"), "{stderr}");

    // The same server, once its authority is known: the connection stands, and nobody speaks STUN on it.
    let file = home.path().join("ca.pem");
    std::fs::write(&file, ca.certificate())?;
    let output = turnctl(home.path()).args(["nat", "-o", "json", &uri, "--tls-ca"]).arg(&file).output()?;
    let (_, stdout, _) = parts(&output);
    let said: serde_json::Value = serde_json::from_str(&stdout)?;
    assert_eq!(said["streams"][0]["untrusted"], serde_json::Value::Null, "{said}");
    assert!(said["streams"][0]["problem"].as_str().is_some_and(|problem| problem.starts_with("connected")), "{said}");
    Ok(())
}

/// A TLS server that closes whatever connects, once hands are shaken.
fn tls_server(shown: &CertificateAndKey) -> Result<SocketAddr> {
    let mut acceptor = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls())?;
    let (key, certificate) =
        (PKey::private_key_from_pem(shown.key.as_bytes())?, X509::from_pem(shown.certificate.as_bytes())?);
    acceptor.set_private_key(&key)?;
    acceptor.set_certificate(&certificate)?;
    let acceptor = acceptor.build();
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A client that refuses the certificate ends the handshake.
            drop(acceptor.accept(stream));
        }
    });
    Ok(address)
}

fn closed_port() -> Result<String> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    Ok(format!("https://{}", listener.local_addr()?))
}

/// A relay in that state.
fn node(id: &str, region: &str, state: NodeState) -> Node {
    Node { node_id: id.into(), region: region.into(), state: state as i32, ..Node::default() }
}

#[test]
fn top_without_a_terminal_is_one_plain_table() -> Result<()> {
    let mut busy = node("eu-1", "eu", NodeState::Ready);
    busy.load = Some(Load { allocations: 3, busiest_worker_permille: 125, bytes_per_second: 1000, ..Load::default() });
    let nodes = vec![node("us-1", "us", NodeState::Draining), busy];
    let fake = Fake::start(World { packets_per_second: 500, nodes, ..healthy() })?;
    let expected = "\
NODE   REGION   STATE      PACKETS/S   TRAFFIC      ALLOCATIONS   CPU     RTT   DROPS/S   DRAIN
eu-1   eu       ready      500         8.0 kbit/s   3             12.5%   -     0         -
us-1   us       draining   500         0 bit/s      0             0.0%    -     0         -
";
    for arguments in [&["top", "--once"][..], &["top"]] {
        let (code, stdout, stderr) = parts(&fake.turnctl(arguments)?);
        assert_eq!((code, stderr.as_str(), stdout.as_str()), (Some(0), "", expected), "{arguments:?}");
    }
    let (code, stdout, _) = parts(&fake.turnctl(&["top", "--once", "--sort", "node", "-o", "json"])?);
    let shown: serde_json::Value = serde_json::from_str(&stdout)?;
    assert_eq!((code, &shown["relays"][0]["packets_per_second"]), (Some(0), &500.into()), "{stdout}");
    assert_eq!(shown["relays"][0]["rtt_us"], serde_json::Value::Null);
    let (code, stdout, stderr) = parts(&fake.turnctl(&["top", "--once", "--region", "ap"])?);
    assert_eq!((code, stdout.as_str(), stderr.as_str()), (Some(0), "", "no nodes\n"));
    Ok(())
}

#[test]
fn who_did_what_is_a_line_each() -> Result<()> {
    let action = |caller: &str, outcome: AuditOutcome| AuditAction {
        at: 1_700_000_000_000,
        caller: caller.into(),
        via: "console".into(),
        controller: "c1".into(),
        action: "drain".into(),
        on: "eu-1".into(),
        outcome: outcome.into(),
        detail: "within 600 s".into(),
    };
    let actions = vec![action("operator/olga", AuditOutcome::Done), action("viewer/vera", AuditOutcome::Denied)];
    let fake = Fake::start(World { actions, ..healthy() })?;
    let (code, stdout, stderr) = parts(&fake.turnctl(&["audit"])?);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    let lines: Vec<_> = stdout.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(lines[1], "2023-11-14T22:13:20Z operator/olga drain eu-1 done within 600 s");
    assert!(lines[2].contains("viewer/vera drain eu-1 denied"), "{stdout}");
    let (_, stdout, _) = parts(&fake.turnctl(&["audit", "--limit", "1", "-o", "json"])?);
    let shown: serde_json::Value = serde_json::from_str(&stdout)?;
    assert_eq!(shown["actions"].as_array().map(Vec::len), Some(1), "{stdout}");
    Ok(())
}

#[test]
fn keys_are_rotated_and_waited_for() -> Result<()> {
    let newest = Key { ring: 2, state: KeyState::Newest.into(), created_at: 1, ..Key::default() };
    let fake = Fake::start(World { keys: vec![newest], ..healthy() })?;
    let (code, stdout, stderr) = parts(&fake.turnctl(&["keys", "rotate", "--wait"])?);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("the TURN REST secrets are in the controllers' configuration"), "{stderr}");
    assert!(stdout.contains("newest") && stdout.contains("in force on 1 of 1 relays"), "{stdout}");
    let (code, stdout, _) = parts(&fake.turnctl(&["keys", "-o", "json"])?);
    let list: serde_json::Value = serde_json::from_str(&stdout)?;
    assert_eq!((code, &list["keys"][0]["id"], &list["relays"][0]["current"]), (Some(0), &1.into(), &true.into()));

    let secret = fake.directory.path().join("secret");
    std::fs::write(&secret, "from an app's operator\r\n")?;
    let secret = secret.to_str().context("UTF-8")?;
    let (code, _, stderr) = parts(&fake.turnctl(&["keys", "rotate", "--ring", "rest", "--secret-file", secret])?);
    assert_eq!(code, Some(0), "{stderr}");
    let request = fake.world.lock().expect("lock").rotations.pop().context("asked")?;
    assert_eq!((request.rings, request.secret), (vec![1], b"from an app's operator".to_vec()));
    let (code, _, stderr) = parts(&fake.turnctl(&["keys", "rotate", "--secret-file", secret])?);
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("add --ring rest"), "{stderr}");

    let (code, stdout, _) = parts(&fake.turnctl(&["keys", "retire", "rest", "3"])?);
    assert_eq!((code, stdout.as_str()), (Some(0), "key 3 of the rest ring retired\n"));
    let (code, _, stderr) = parts(&fake.turnctl(&["keys", "retire", "rest", "4"])?);
    assert_eq!(code, Some(4), "{stderr}");
    Ok(())
}

#[test]
fn the_backbone_is_a_matrix_that_says_what_is_odd() -> Result<()> {
    let link = |to: &str, path: LinkPath, via: &str, why: &str| LinkReport {
        node_id: to.into(),
        state: LinkState::Up.into(),
        path: path.into(),
        via: via.into(),
        why: why.into(),
        rtt_us: 80_400,
        loss_permille: 12,
        ..LinkReport::default()
    };
    let relay = |node_id: &str, links: Vec<LinkReport>| RelayLinks {
        node_id: node_id.into(),
        backbone_addresses: vec!["192.0.2.1:3480".into()],
        links,
        ..RelayLinks::default()
    };
    let relays = vec![
        relay(
            "eu-1",
            vec![link("us-1", LinkPath::Direct, "", "direct is best"), link("sa-1", LinkPath::Via, "us-1", "faster")],
        ),
        relay(
            "sa-1",
            vec![link("eu-1", LinkPath::PlainUdp, "", "silent"), link("us-1", LinkPath::None, "", "refused")],
        ),
        RelayLinks { node_id: "us-1".into(), ..RelayLinks::default() },
    ];
    let links = ListLinksResponse { relays, ..ListLinksResponse::default() };
    let fake = Fake::start(World { links, ..World::default() })?;
    let (code, stdout, _) = parts(&fake.turnctl(&["backbone"])?);
    assert_eq!(code, Some(0));
    let lines: Vec<Vec<&str>> = stdout.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["FROM", "eu-1", "sa-1", "us-1"]);
    assert_eq!(lines[1].join(" "), "eu-1 \u{b7} via us-1 (80.4 ms 1.2%) 80.4 ms 1.2%");
    assert_eq!(lines[2].join(" "), "sa-1 plain udp \u{b7} nothing");
    for expected in ["eu-1 -> sa-1: via us-1, faster", "sa-1 -> us-1: nothing, refused", "us-1 has no backbone"] {
        assert!(stdout.contains(expected), "{expected}: {stdout}");
    }
    let (_, stdout, _) = parts(&fake.turnctl(&["backbone", "-o", "json"])?);
    let json: serde_json::Value = serde_json::from_str(&stdout)?;
    assert_eq!(json["relays"][0]["links"][1]["via"], "us-1");
    assert_eq!(json["relays"][1]["links"][0]["path"], "plain_udp");
    let (_, stdout, _) = parts(&fake.turnctl(&["backbone", "-o", "wide"])?);
    assert_eq!(stdout.lines().filter(|line| line.contains(" up ")).count(), 4, "{stdout}");
    Ok(())
}

#[test]
fn a_relay_is_revoked_and_reinstated() -> Result<()> {
    let fake = Fake::start(World::default())?;
    let run = |arguments: &[&str]| Ok::<_, anyhow::Error>(parts(&fake.turnctl(arguments)?));
    let (code, stdout, _) = run(&["revoke-relay", "eu-1", "--serial", "0A:bC"])?;
    assert_eq!((code, stdout.as_str()), (Some(0), "certificate 0abc of relay eu-1 is refused from now on\n"));
    let (_, stdout, _) = run(&["revoke-relay", "eu-1"])?;
    assert_eq!(stdout, "every certificate of relay eu-1 was refused already\n");
    assert_eq!(fake.world.lock().expect("nobody panics").links.revoked[0].serials, [vec![0x0A, 0xBC]]);
    let (_, stdout, _) = run(&["reinstate-relay", "eu-1"])?;
    assert_eq!(stdout, "every certificate of relay eu-1 is taken again\n");
    let (_, stdout, _) = run(&["reinstate-relay", "eu-1"])?;
    assert_eq!(stdout, "no certificate of relay eu-1 was refused\n");
    // Wrong files and numbers are mistakes, and nothing is revoked.
    let foreign = fake.directory.path().join("admin-me.pem");
    let foreign = foreign.to_string_lossy();
    for arguments in [["revoke-relay", "eu-1", "--serial", "xyz"], ["revoke-relay", "eu-1", "--certificate", &foreign]]
    {
        let (code, _, stderr) = run(&arguments)?;
        assert_eq!(code, Some(2), "{stderr}");
    }
    assert!(fake.world.lock().expect("nobody panics").links.revoked.is_empty());
    Ok(())
}
