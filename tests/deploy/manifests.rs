//! The binaries with the very configuration of the manifests.

use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use harness::cluster::binary;
use serde_json::Value;
use tempfile::tempdir;

use crate::api::Api;
use crate::members::{Member, answer, free, objects, own_ip, text, turnctl};

#[test]
fn the_dev_overlay_is_a_cluster() -> Result<()> {
    let directory = tempdir()?;
    let (at, authority) = (|name: &str| directory.path().join(name), directory.path().join("pki"));
    turnctl(&["ca", "init", &text(&authority)])?;
    turnctl(&["ca", "issue", &text(&authority), "--admin", "me"])?;
    let objects = objects("dev")?;
    let (grpc, http) = (free(Ipv4Addr::LOCALHOST)?, free(Ipv4Addr::LOCALHOST)?);
    let ip = own_ip()?;

    let controller = Member::of(&objects, "controller", "turnpike-controller-0", &at("controller"), |file| {
        file.replace("[::]:9443", &grpc.to_string()).replace("[::]:8080", &http.to_string())
    })?;
    controller.certify(&authority, "turnpike-controller-0")?;
    std::fs::create_dir(at("controller").join("state"))?;
    let _controller = controller.start()?;
    answer(http, "/readyz")?;

    let api = Api::start(directory.path(), &format!("https://{grpc}"));
    let relay = Member::of(&objects, "relay-node", "node-1", &at("relay"), |file| {
        // At this test's address, beside which there are others; and the API server is not a pod's.
        let file = file.replace("0.0.0.0", &ip.to_string());
        let file = format!("http = \"{ip}:9478\"\n{file}");
        format!("{file}\napi = {:?}\ncredentials = {:?}\n", api.url, api.credentials)
    })?;
    relay.certify(&authority, "node-1")?;
    let _relay = relay.start()?;
    answer((ip, 9478).into(), "/readyz")?;

    let me = |file: &str| text(&authority.join(file));
    let nodes: Value = serde_json::from_str(&turnctl(&[
        "--controller",
        &format!("https://{grpc}"),
        "--ca",
        &me("ca.pem"),
        "--cert",
        &me("admin-me.pem"),
        "--key",
        &me("admin-me.key"),
        "nodes",
        "-o",
        "json",
    ])?)?;
    let found = nodes.to_string();
    for expected in ["\"node-1\"", "\"dev\"", "\"eu-west-a\"", "198.51.100.7"] {
        ensure!(found.contains(expected), "{expected} is not in {found}");
    }
    Ok(())
}

#[test]
fn every_overlay_s_configuration_is_good() -> Result<()> {
    let directory = tempdir()?;
    let authority = directory.path().join("pki");
    turnctl(&["ca", "init", &text(&authority)])?;
    let api = Api::start(directory.path(), "https://127.0.0.1:9443");
    for overlay in ["dev", "single-region", "multi-region", "multi-region-relays", "components", "stateful-set"] {
        let objects = objects(overlay)?;
        let at = |name: &str| directory.path().join(format!("{overlay}-{name}"));
        if overlay != "multi-region-relays" {
            let controller =
                Member::of(&objects, "controller", "turnpike-controller-0", &at("controller"), |file| file)?;
            controller.certify(&authority, "turnpike-controller-0")?;
            // As README.md fills the Secret turnpike-etcd-client.
            let etcd = at("controller").join("etc/etcd");
            turnctl(&["ca", "issue", &text(&authority), "--controller", "client", "--out", &text(&etcd)])?;
            std::fs::copy(authority.join("ca.pem"), etcd.join("ca.pem"))?;
            for end in ["pem", "key"] {
                std::fs::rename(etcd.join(format!("controller-client.{end}")), etcd.join(format!("client.{end}")))?;
            }
            controller.check().context(overlay)?;
        }
        let name = if overlay == "stateful-set" { "turnpike-relay-0" } else { "node-1" };
        let relay = Member::of(&objects, "relay-node", name, &at("relay"), |file| {
            let kubernetes = if file.contains("[kubernetes]") { "" } else { "[kubernetes]" };
            format!("{file}\n{kubernetes}\napi = {:?}\ncredentials = {:?}\n", api.url, api.credentials)
        })?;
        relay.certify(&authority, name)?;
        if relay.variables().any(|name| name == "TURNPIKE_CERTIFICATES") {
            // Any pair will do.
            let turns = at("relay").join("etc/turns");
            std::fs::create_dir_all(&turns)?;
            for (end, file) in [("pem", "tls.crt"), ("key", "tls.key")] {
                std::fs::copy(at("relay").join(format!("etc/pki/relay-{name}.{end}")), turns.join(file))?;
            }
        }
        // The StatefulSet's node is read under the name of the only one there is.
        let mut command = relay.command()?;
        command.env("TURNPIKE_KUBERNETES_NODE", "node-1").arg("--check-config");
        let output = command.output()?;
        ensure!(output.status.success(), "{overlay}: {}", String::from_utf8_lossy(&output.stderr));
        let found = String::from_utf8(output.stdout)?;
        let expected = if overlay == "stateful-set" { "203.0.113.9" } else { "198.51.100.7" };
        ensure!(found.contains(expected), "{overlay}: {found}");
        // The relay does not know which variables are meant for it: each has to be a flag of it.
        let help = String::from_utf8(Command::new(binary("relay-node")?).arg("--help").output()?.stdout)?;
        for variable in relay.variables().filter_map(|name| name.strip_prefix("TURNPIKE_")) {
            let flag = format!("--{}", variable.to_lowercase().replace('_', "-"));
            ensure!(help.contains(&format!("{flag} ")), "{overlay}: TURNPIKE_{variable} is no variable of relay-node");
        }
    }
    Ok(())
}
