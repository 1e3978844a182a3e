//! The command line of the real binary: one clear line, and the right exit code.

#![allow(clippy::print_stderr, reason = "what the relay logs belongs to the test's output")]
#![allow(dead_code, reason = "tests share a module of which each uses a part")]

mod relay;

use std::process::Command;
use std::time::Duration;

use relay::{Relay, TurnClient, command, configuration, own_ip, run};
use turn_core::client::Event;

#[test]
fn a_good_configuration_is_one_line() {
    let directory = tempfile::tempdir().expect("tempdir");
    let file = directory.path().join("relay.toml");
    let ip = own_ip();
    std::fs::write(&file, configuration(directory.path(), ip, "")).expect("written");
    let (code, out, err) = run(command().arg("--check-config").arg("--config").arg(&file));
    assert_eq!((code, out.as_str(), err.as_str()), (0, format!("ok: relay eu-1 at {ip}\n").as_str(), ""));
    assert!(!directory.path().join("state").exists(), "checking touches nothing");

    // Flags win over variables, variables over the file.
    let (code, out, _) = run(command()
        .arg("--check-config")
        .arg("--config")
        .arg(&file)
        .arg("--node-id=flag")
        .env("TURNPIKE_NODE_ID", "variable")
        .env("TURNPIKE_PUBLIC_IP", "198.51.100.7"));
    assert_eq!((code, out.as_str()), (0, "ok: relay flag at 198.51.100.7\n"));
}

#[test]
fn a_wrong_configuration_is_one_line_and_78() {
    let directory = tempfile::tempdir().expect("tempdir");
    let file = directory.path().join("relay.toml");
    let at = format!("(in {})", file.display());
    let cases: &[(&str, &[&str], String)] = &[
        ("relm = \"x\"", &[], "relm: unknown key; known are node_id, region,".into()),
        (
            "max_connections = \"many\"",
            &[],
            "max_connections: invalid type: string \"many\", expected u32; line 8 ".to_owned() + &at,
        ),
        ("relay_ports = [3000, 4000]", &[], "relay_ports: 3000-4000 holds the listen port 3478 on the same IP".into()),
        ("", &["--relay-ports=9-1"], "relay_ports: 9-1 is no range".into()),
        ("", &["--workers=many"], "workers: \"many\" is not a number from 0 to 64".into()),
        ("", &["--allow-loopback-peers=false"], "public_ip: the relay address 127.".into()),
        ("", &["--node-id="], "node_id: missing".into()),
        ("controllers = [\"https://127.0.0.1:1\"]", &[], "tls.ca: missing".into()),
        (
            "controllers = [\"https://127.0.0.1:1\"]\ntls = { ca = \"ca.pem\", certificate = \"c\", key = \"k\" }",
            &[],
            format!("tls.ca: cannot read {}: No such file", directory.path().join("ca.pem").display()),
        ),
    ];
    for (more, flags, expected) in cases {
        std::fs::write(&file, configuration(directory.path(), own_ip(), more)).expect("written");
        // Whether it is only checked or to be run makes no difference.
        for check in [true, false] {
            let mut command = command();
            command.arg("--config").arg(&file).args(*flags);
            if check {
                command.arg("--check-config");
            }
            let (code, out, err) = run(&mut command);
            assert_eq!((code, out.as_str()), (78, ""), "{more} {flags:?}: {err}");
            assert!(err.starts_with(&format!("relay-node: {expected}")), "{more} {flags:?}: {err}");
            assert_eq!(err.trim_end().lines().count(), 1, "{err}");
        }
    }
    let (code, _, err) = run(command().arg("--config").arg("/nonexistent/relay.toml"));
    assert_eq!(code, 78);
    assert!(err.starts_with("relay-node: config: cannot read /nonexistent/relay.toml: "), "{err}");
}

/// The binary, of a user who may do nothing beyond others.
fn without_capabilities() -> Command {
    let binary = command();
    let mut bare = Command::new("setpriv");
    // A root that has lost all of them keeps none through exec.
    bare.args(["--bounding-set=-all", "--inh-caps=-all"]).arg(binary.get_program());
    for (name, value) in binary.get_envs() {
        match value {
            Some(value) => bare.env(name, value),
            None => bare.env_remove(name),
        };
    }
    bare
}

#[test]
fn one_socket_for_all_relayed_addresses_takes_capabilities() {
    let directory = tempfile::tempdir().expect("tempdir");
    let file = directory.path().join("relay.toml");
    std::fs::write(&file, configuration(directory.path(), own_ip(), "relayed = \"wildcard\"")).expect("written");
    let (code, out, err) = run(without_capabilities().arg("--check-config").arg("--config").arg(&file));
    assert_eq!((code, out.as_str()), (78, ""), "{err}");
    let expected = "relay-node: relayed: cannot open a raw socket (it takes CAP_BPF, CAP_NET_ADMIN and CAP_NET_RAW,";
    assert!(err.starts_with(expected), "{err}");
    assert_eq!(err.trim_end().lines().count(), 1, "{err}");

    let (code, _, err) = run(command().arg("--check-config").arg("--config").arg(&file));
    assert_eq!(code, 0, "{err}");

    let ip = own_ip();
    std::fs::write(&file, configuration(directory.path(), ip, "relayed = \"auto\"")).expect("written");
    let mut bare = without_capabilities();
    let mut relay = Relay::run(bare.arg("--drain-deadline=0").arg("--config").arg(&file), ip);
    let line = relay.log("each relayed address has a socket of its own");
    assert!(line.contains("INFO") && line.contains("CAP_NET_RAW"), "{line}");
    relay.log("ready");
    assert_eq!(relay.terminate().code(), Some(0));
    let mut relay = Relay::run(command().arg("--drain-deadline=0").arg("--config").arg(&file), ip);
    relay.log("relayed addresses share one socket per worker");
    assert_eq!(relay.terminate().code(), Some(0));
}

#[test]
fn wrong_usage_is_one_line_and_2() {
    let (code, out, err) = run(command().arg("--loud"));
    assert_eq!((code, out.as_str()), (2, ""));
    assert_eq!(err, "relay-node: unexpected argument '--loud' found; relay-node --help lists what there is\n");
}

#[test]
fn help_is_grouped_and_has_examples() {
    let (code, out, _) = run(command().arg("--help"));
    assert_eq!(code, 0);
    for part in ["Identity:", "Addresses:", "Cluster:", "Examples:", "TURNPIKE_PUBLIC_IP", "78  wrong configuration"] {
        assert!(out.contains(part), "{part} is not in\n{out}");
    }
}

#[test]
fn a_second_process_on_the_same_state_is_refused_in_one_line() {
    let directory = tempfile::tempdir().expect("tempdir");
    let mut first = Relay::start(directory.path(), own_ip(), "rest_secrets = [\"s\"]");
    first.log("ready");
    let mut second = Relay::start(directory.path(), own_ip(), "");
    let line = second.log("ERROR");
    assert!(line.contains("is in use by another relay-node; stop it"), "{line}");
    assert_eq!(second.wait().code(), Some(1));
    assert_eq!(first.terminate().code(), Some(0));
    // The lock ended with its holder.
    let mut third = Relay::start(directory.path(), own_ip(), "");
    third.log("ready");
    assert_eq!(third.terminate().code(), Some(0));
}

#[test]
fn a_state_directory_of_another_relay_is_refused() {
    let directory = tempfile::tempdir().expect("tempdir");
    let mut first = Relay::start(directory.path(), own_ip(), "");
    first.log("ready");
    first.terminate();
    let file = directory.path().join("relay.toml");
    let (code, _, err) = run(command().arg("--config").arg(file).arg("--node-id=eu-2"));
    assert_eq!(code, 1);
    assert!(err.contains("belongs to relay \"eu-1\", this is \"eu-2\"; use another directory or delete it"), "{err}");
    assert_eq!(err.trim_end().lines().count(), 1, "{err}");
}

#[test]
fn a_taken_http_port_is_one_line() {
    let directory = tempfile::tempdir().expect("tempdir");
    let ip = own_ip();
    let _taken = std::net::TcpListener::bind((ip, 9478)).expect("free");
    let mut relay = Relay::start(directory.path(), ip, "");
    let line = relay.log("ERROR");
    assert!(line.contains(&format!("http: cannot listen on {ip}:9478")), "{line}");
    assert_eq!(relay.wait().code(), Some(1));
}

#[test]
fn readiness_says_what_is_missing_and_liveness_does_not_care() {
    let directory = tempfile::tempdir().expect("tempdir");
    let relay = Relay::start(directory.path(), own_ip(), "");
    relay.log("ready");
    assert_eq!(relay.wait_for("/livez", 200), "alive\n");
    let why = relay.wait_for("/readyz", 503);
    assert!(why.starts_with("not ready: no credentials"), "{why}");
    drop(relay);
    let relay = Relay::start(directory.path(), own_ip(), "static_users = [{ username = \"a\", password = \"b\" }]");
    assert_eq!(relay.wait_for("/readyz", 200), "ready\n");
    relay.metric("turn_control_connected 0");
    relay.metric("turn_build_info{version=\"0.1.0\"} 1");
}

/// SIGTERM at one moment of a start after the other: the end is orderly, and a start after all of them finds what there
/// was.
#[test]
fn told_to_stop_while_it_starts_it_ends_in_order_and_keeps_what_it_had() {
    let directory = tempfile::tempdir().expect("tempdir");
    let (ip, more) = (own_ip(), "static_users = [{ username = \"alice\", password = \"secret\" }]");
    let mut relay = Relay::start(directory.path(), ip, more);
    relay.wait_for("/readyz", 200);
    let mut client = TurnClient::new(relay.address(), "alice", "secret");
    client.allocate();
    relay.kill();

    let state = directory.path().join("state");
    for moment in (0..80).step_by(2).map(Duration::from_millis) {
        let mut relay = Relay::start(directory.path(), ip, more);
        relay.catches_signals();
        std::thread::sleep(moment);
        assert_eq!(relay.terminate().code(), Some(0), "{moment:?} after it began");
        let names = std::fs::read_dir(&state).expect("a directory").map(|entry| entry.expect("readable").path());
        let halves: Vec<_> = names.filter(|name| name.extension().is_some_and(|end| end == "new")).collect();
        assert!(halves.is_empty(), "{moment:?} after it began: {halves:?}");
    }
    let relay = Relay::start(directory.path(), ip, more);
    let line = relay.log("ready");
    assert!(line.contains("restored=1") && line.contains("refused=0"), "{line}");
    assert!(matches!(client.perform(|client, now| client.refresh(now, 600)), Event::Refreshed(600)));
}

/// An API server that takes the connection and says nothing is waited for; a relay that is told to stop is not.
#[test]
fn told_to_stop_while_it_waits_for_its_configuration_it_ends_at_once() {
    let directory = tempfile::tempdir().expect("tempdir");
    let api = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    for file in ["token", "ca.crt"] {
        std::fs::write(directory.path().join(file), "").expect("written");
    }
    let more = format!(
        "[kubernetes]\nnode = \"node-1\"\napi = \"https://{}\"\ncredentials = {:?}",
        api.local_addr().expect("bound"),
        directory.path()
    );
    let mut relay = Relay::start(directory.path(), own_ip(), &more);
    let _asked = api.accept().expect("it asks");
    assert_eq!(relay.terminate().code(), Some(0));
    relay.log("told to stop before it knew its configuration");
    assert!(!directory.path().join("state").exists(), "nothing was begun");
}
