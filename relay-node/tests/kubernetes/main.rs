//! A relay in a pod: the real binary against an API server over HTTPS and a scripted controller.

#![allow(clippy::print_stderr, reason = "what the relay logs belongs to the test's output")]
#![allow(dead_code, reason = "tests share a module of which each uses a part")]

mod api;
#[path = "../controller/mod.rs"]
mod controller;
#[path = "../relay/mod.rs"]
mod relay;

use std::path::Path;

use api::Api;
use controller::{Controller, Session, settings};
use relay::{Relay, command, configuration, eventually, own_ip};

/// A relay whose region, public address and controllers are not configured.
fn start(directory: &Path, api: &Api, variables: &[(&str, &str)]) -> Relay {
    let ip = own_ip();
    let more = format!(
        "tls = {{ ca = \"ca.pem\", certificate = \"node.pem\", key = \"node.key\" }}\n[kubernetes]\nnode = \"node-1\"\n\
         controllers = \"turnpike-control/turnpike-controller\"\napi = {:?}\ncredentials = {:?}",
        api.url, api.credentials
    );
    let file = directory.join("relay.toml");
    std::fs::write(&file, configuration(directory, ip, &more)).expect("written");
    let mut command = command();
    command.arg("--config").arg(file).env("TURNPIKE_REGION", "").env("TURNPIKE_DRAIN_DEADLINE", "0");
    Relay::run(command.envs(variables.iter().copied()), ip)
}

fn joined(controller: &Controller) -> Session {
    let mut session = controller.session();
    session.welcome(1, settings(1));
    session.resync();
    session
}

/// Waits for the report that says whether it drains.
fn drains(session: &mut Session, draining: bool) {
    eventually(&format!("draining is {draining}"), || (session.load().draining == draining).then_some(()));
}

#[test]
fn it_is_where_its_node_is_and_finds_the_controllers() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let api = Api::start(directory.path(), &controller.url);
    let mut relay = start(directory.path(), &api, &[]);
    let session = joined(&controller);
    let hello = &session.hello;
    assert_eq!((hello.region.as_str(), hello.zone.as_str()), ("eu-west", "eu-west-a"));
    assert_eq!(
        (hello.relay_address.as_str(), hello.relay_ips.as_slice()),
        ("198.51.100.7", &["198.51.100.7".into()][..])
    );

    // Started again without an API server it is the same relay. What is configured wins.
    relay.kill();
    api.away(true);
    let _relay = start(directory.path(), &api, &[("TURNPIKE_ZONE", "mine")]);
    let session = joined(&controller);
    let hello = &session.hello;
    assert_eq!((hello.region.as_str(), hello.zone.as_str()), ("eu-west", "mine"));
    assert_eq!(hello.relay_address, "198.51.100.7");
}

#[test]
fn a_load_balancers_address_is_the_public_one() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let api = Api::start(directory.path(), &controller.url);
    let _relay = start(directory.path(), &api, &[("TURNPIKE_KUBERNETES_SERVICE", "turnpike-relay-0")]);
    let session = joined(&controller);
    assert_eq!((session.hello.region.as_str(), session.hello.relay_address.as_str()), ("eu-west", "203.0.113.9"));
}

#[test]
fn a_cordon_of_the_node_drains_the_relay_whatever_becomes_of_the_watch() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let api = Api::start(directory.path(), &controller.url);
    let relay = start(directory.path(), &api, &[]);
    let mut session = joined(&controller);
    relay.wait_for("/readyz", 200);
    assert!(!session.load().draining);

    api.cordon(true);
    drains(&mut session, true);
    relay.metric("turn_cordoned 1");
    relay.wait_for("/readyz", 503);
    relay.wait_for("/livez", 200);

    // The version is gone: the node is read anew, then watched on.
    let (reads, watches) = api.asked();
    api.compact();
    eventually("it reads and watches again", || (api.asked() >= (reads + 1, watches + 1)).then_some(()));
    api.cordon(false);
    drains(&mut session, false);
    relay.metric("turn_cordoned 0");

    // While the server is away what it said last holds; what changed meanwhile is seen after.
    api.cordon(true);
    drains(&mut session, true);
    api.away(true);
    relay.log("a cordon of node node-1 is not noticed");
    assert!(session.load().draining);
    api.cordon(false);
    api.away(false);
    drains(&mut session, false);
}

#[test]
fn controllers_that_are_elsewhere_are_found() {
    let directory = tempfile::tempdir().expect("tempdir");
    let other = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let api = Api::start(directory.path(), &controller.url);
    let _relay = start(directory.path(), &api, &[]);
    let session = joined(&controller);
    // Another one, of another authority: the relay reads its certificates anew with each try.
    let successor = Controller::start(other.path(), Vec::new());
    for name in ["ca.pem", "node.pem", "node.key"] {
        std::fs::copy(other.path().join(name), directory.path().join(name)).expect("copied");
    }
    api.controller_moves(&successor.url);
    drop(session);
    drop(controller);
    assert_eq!(successor.session().hello.node_id, "eu-1");
}
