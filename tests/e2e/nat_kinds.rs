//! `turnctl nat` behind NATs of every kind: what it says is what they are.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use harness::cluster::{Cluster, RelayOptions, Store};
use harness::lab::NatLab;
use harness::{Scenario, run_within};
use patchbay::{NatConfig, NatFiltering as F, NatMapping as M};
use serde_json::Value;

/// Second port of the relay's second address.
const ALTERNATE_PORT: u16 = 3479;

fn nat(mapping: M, filtering: F) -> Result<NatConfig> {
    Ok(NatConfig::builder().mapping(mapping).filtering(filtering).build()?)
}

/// The four classic kinds by their mapping and filtering, no hairpin, UDP blocked, and only port 443. (The lab's hairpin does not
/// change the source, so that a kernel drops its own packets coming back: that there is one cannot be shown here.)
#[test]
fn turnctl_nat_names_every_kind() -> Result<()> {
    run_within(std::time::Duration::from_secs(180), async |test: &Scenario| {
        let lab = NatLab::start().await?;
        let mut cluster = Cluster::new(test.path())?;
        let _controller = cluster.controller(&lab.server("controller").await?, Store::Embedded, "").await?;
        let place = lab.server("eu-1").await?;
        let second = lab.free_address()?;
        let mut command = Command::new("ip");
        command.args(["address", "add", &format!("{second}/24"), "dev", "eth0"]);
        let added = place.host.output(command).await?;
        ensure!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));
        let options = RelayOptions {
            more: format!("nat_discovery = {{ alternate_ip = \"{second}\", alternate_port = {ALTERNATE_PORT} }}"),
            listen: vec![("tcp", 443)],
            ..RelayOptions::in_region("eu")
        };
        let _relay = cluster.relay("eu-1", &place, &options).await?;
        let alice = lab.alice();
        let ip = place.address;
        let uris = [format!("stun:{ip}"), format!("turn:{ip}?transport=tcp"), format!("turn:{ip}:443?transport=tcp")];
        let ask = async || {
            let arguments: Vec<&str> =
                ["nat", "-o", "json"].into_iter().chain(uris.iter().map(String::as_str)).collect();
            let output = cluster.turnctl(&alice.host(), &arguments).await?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            serde_json::from_slice::<Value>(&output.stdout).with_context(|| format!("turnctl nat: {said}"))
        };

        let independent = M::EndpointIndependent;
        let cases = [
            (nat(independent, F::EndpointIndependent)?, "full-cone", "endpoint-independent", "endpoint-independent"),
            (nat(independent, F::AddressDependent)?, "address-restricted", "endpoint-independent", "address-dependent"),
            (
                nat(independent, F::AddressAndPortDependent)?,
                "port-restricted",
                "endpoint-independent",
                "address-and-port-dependent",
            ),
            (
                nat(M::EndpointDependent, F::AddressAndPortDependent)?,
                "symmetric",
                "address-and-port-dependent",
                "address-and-port-dependent",
            ),
        ];
        for (nat, kind, mapping, filtering) in cases {
            alice.behind(nat).await?;
            let said = ask().await?;
            ensure!(said["kind"] == kind, "{kind}: {said}");
            ensure!(said["udp"]["mapping"] == mapping && said["udp"]["filtering"] == filtering, "{kind}: {said}");
            let hairpin = &said["udp"]["hairpin"];
            ensure!(
                *hairpin == (if mapping == "endpoint-independent" { Value::Bool(false) } else { Value::Null }),
                "{kind}: {said}"
            );
            ensure!(said["streams"].as_array().is_some_and(|all| all.iter().all(|it| it["works"] == true)), "{said}");
        }
        alice.block_udp(true).await?;
        let said = ask().await?;
        ensure!(said["kind"] == "udp-blocked" && said["udp"].is_null(), "{said}");
        ensure!(said["advice"][0].as_str().is_some_and(|it| it.contains("TCP or TLS")), "{said}");
        alice.only(&[("tcp", place.at(443))]).await?;
        let said = ask().await?;
        ensure!(said["advice"][1].as_str().is_some_and(|it| it.starts_with("Only port 443")), "{said}");

        // A machine with a public address, and the cluster's own relays.
        let public = lab.server("public").await?;
        let output = cluster.turnctl_json(&public.host, &["nat"]).await?;
        ensure!(output["kind"] == "open" && output["regions"][0]["region"] == "eu", "{output}");
        Ok(())
    })
}
