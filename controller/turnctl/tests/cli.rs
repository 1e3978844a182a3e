//! The command line as scripts and people meet it: exit codes, streams, one-line errors.

mod fake;

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use fake::{Fake, Files, World, parts, turnctl};
use turnctl::pki::create_ca;
use turnpike_proto::v1::{Allocation, Event, EventKind, Node, NodeState};

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
    let closed = closed_port()?;
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
fn closed_port() -> Result<String> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    Ok(format!("https://{}", listener.local_addr()?))
}

/// A relay in that state.
fn node(id: &str, region: &str, state: NodeState) -> Node {
    Node { node_id: id.into(), region: region.into(), state: state as i32, ..Node::default() }
}
