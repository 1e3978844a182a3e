//! Wrong configuration: one line that names the key, exit 78, nothing started.

use std::process::Command;

use anyhow::{Result, ensure};
use harness::cluster::binary;
use harness::{Host, run};

/// Exit code for a configuration error (sysexits.h EX_CONFIG).
const EX_CONFIG: i32 = 78;

const RELAY: &str = "node_id = \"eu-1\"\nregion = \"eu\"\nrelay_ip = \"127.0.0.1\"\npublic_ip = \"127.0.0.1\"\n\
                     allow_loopback_peers = true\nrest_secrets = [\"0123456789abcdef\"]\n";

#[test]
fn a_wrong_configuration_is_one_line_that_names_the_key() -> Result<()> {
    let cases: &[(&str, &str, String, &str)] = &[
        ("unknown key", "relay-node", format!("{RELAY}worker = 2\n"), "worker"),
        ("no node id", "relay-node", RELAY.replace("node_id = \"eu-1\"\n", ""), "node_id"),
        ("no region", "relay-node", RELAY.replace("region = \"eu\"\n", ""), "region"),
        ("ports from high to low", "relay-node", format!("{RELAY}relay_ports = [60000, 50000]\n"), "relay_ports"),
        (
            "a listen address that is none",
            "relay-node",
            format!("{RELAY}listen = [\"sctp://127.0.0.1:3478\"]\n"),
            "listen",
        ),
        ("the wrong type", "relay-node", format!("{RELAY}workers = \"many\"\n"), "workers"),
        (
            "controllers without certificates",
            "relay-node",
            format!("{RELAY}controllers = [\"https://127.0.0.1:9443\"]\n"),
            "tls",
        ),
        (
            "no address that clients can use",
            "relay-node",
            RELAY.replace("allow_loopback_peers = true\n", "").replace("public_ip = \"127.0.0.1\"\n", ""),
            "public_ip",
        ),
        ("unknown key", "controller", "id = \"c\"\nregions = 1\n".into(), "regions"),
        ("no certificate", "controller", "id = \"c\"\nregion = \"eu\"\n".into(), "tls"),
    ];
    run(async |test| {
        for (what, program, text, key) in cases {
            let file = test.file("wrong.toml");
            std::fs::write(&file, text)?;
            let mut command = Command::new(binary(program)?);
            command.arg("--config").arg(&file).arg("--check-config");
            let output = Host::Machine.output(command).await?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.code() == Some(EX_CONFIG), "{program}, {what}: {}, said {said}", output.status);
            ensure!(said.trim_end().lines().count() == 1, "{program}, {what}: more than a line: {said}");
            ensure!(said.contains(key), "{program}, {what}: the line does not name {key}: {said}");
        }
        Ok(())
    })
}

/// A taken port is one line that names it.
#[test]
fn a_taken_port_is_one_line() -> Result<()> {
    run(async |test| {
        let place = harness::place::Place::on_loopback(11);
        let taken = std::net::TcpListener::bind(place.at(3478))?;
        let file = test.file("relay.toml");
        let ip = place.address;
        let text = format!(
            "node_id = \"eu-1\"\nregion = \"eu\"\nstate_dir = {:?}\nlisten = [\"tcp://{ip}:3478\"]\nrelay_ip = \"{ip}\"\n\
             public_ip = \"{ip}\"\nallow_loopback_peers = true\nrest_secrets = [\"0123456789abcdef\"]\nhttp = \"\"\nlog = \"error\"\n",
            test.file("state")
        );
        std::fs::write(&file, text)?;
        let mut command = Command::new(binary("relay-node")?);
        command.arg("--config").arg(&file);
        let output = Host::Machine.output(command).await?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        ensure!(!output.status.success(), "a relay started on a taken port");
        ensure!(said.trim_end().lines().count() == 1, "more than a line: {said}");
        ensure!(said.contains(&taken.local_addr()?.to_string()), "the line does not name the address: {said}");
        Ok(())
    })
}
