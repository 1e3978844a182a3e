//! What the RFCs require and what hostile input must get, over the wire against the release binary: UDP, TCP, TLS and
//! DTLS. Ours passes; coturn shows that the checks can fail.

mod report;
mod servers;

use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use harness::lab::NatLab;
use harness::place::Place;
use harness::{Host, run_within};

use report::{Report, compare};
use servers::Server;

/// What Debian's coturn is known to do, by the ids of the checks that see it.
const COTURN_CONFORM: [&str; 8] = [
    "after-integrity-lifetime",
    "after-integrity-peer",
    "after-integrity-unknown",
    "delete-at-once",
    "delete-data",
    "channel-0x5000",
    "nonce-cookie",
    "integrity-first",
];

/// And of abuse.
const COTURN_ABUSE: [&str; 5] =
    ["login-unsigned-later", "amplify-binding-padding", "peer-private-10", "peer-metadata", "peer-mixed"];

/// Every rule of RFC 8489, 8656, 6062, 5780, 8016 and 7635 that can be seen from outside holds, over every transport, and
/// the same checks find what coturn does otherwise.
#[test]
fn conformance() -> Result<()> {
    run_within(Duration::from_secs(300), async |test| {
        let both = "allow_loopback_peers = true\nrelay_ip6 = \"::1\"\npublic_ip6 = \"::1\"";
        let mut ours =
            Server::ours_with_fixed_users(&Place::on_loopback(31), test.path(), "ours-conform", both).await?;
        let report = Report::of("conform", &Host::Machine, &ours, test.path(), "ours", &[]).await?;
        ours.must_run()?;
        let second = Place::on_loopback(42);
        let address = format!("--listening-ip={}", second.address);
        let coturn = Server::coturn(
            &Place::on_loopback(41),
            test.path(),
            "coturn-conform",
            &["--allow-loopback-peers", &address],
        )
        .await?;
        let theirs = Report::of("conform", &Host::Machine, &coturn, test.path(), "coturn", &[]).await?;
        report.figures(test, "conform");
        theirs.figures(test, "conform");
        compare(test, &["ours", "coturn"], "conform.md").await?;
        theirs.must_find(&COTURN_CONFORM)?;
        report.must_be_clean()?;
        for id in ["userhash", "additional-dual", "connect", "mobility-move", "sha256", "dont-fragment", "icmp"] {
            report.must_pass(id)?;
        }
        Ok(())
    })
}

/// A relay that takes access tokens (RFC 7635) says so, and takes no false ones.
#[test]
fn access_tokens() -> Result<()> {
    run_within(Duration::from_secs(60), async |test| {
        // 32 bytes; nobody seals anything with them.
        let more = "allow_loopback_peers = true\n[third_party]\nserver_name = \"turn.test\"\n\
                    keys = [{ kid = \"test\", key = \"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\" }]";
        let mut ours = Server::ours(&Place::on_loopback(61), test.path(), "ours-tokens", more).await?;
        let only = ["--only", "token-,challenge-"];
        let report = Report::of("conform", &Host::Machine, &ours, test.path(), "ours", &only).await?;
        ours.must_run()?;
        report.must_pass("token-declined")?;
        report.must_pass("token-named")?;
        report.must_be_clean()
    })
}

/// Hostile input gets what abuse.md says, over every transport, on public addresses and without the lab switch.
#[test]
fn abuse() -> Result<()> {
    run_within(Duration::from_secs(300), async |test| {
        let lab = NatLab::start().await?;
        let tester = lab.server("tester").await?;
        let peers = tester.address.to_string();
        let with = ["--i-own-this-server", "--peer-ip", &peers];

        let place = lab.server("ours").await?;
        // Nothing needs to reach it: an allocation of each family is what IPv6 peers are asked for on.
        let mut add = Command::new("ip");
        add.args(["-6", "address", "add", "2a00:db8::1/128", "dev", "lo"]);
        place.host.output(add).await?;
        let both = "relay_ip6 = \"2a00:db8::1\"\npublic_ip6 = \"2a00:db8::1\"";
        let mut ours = Server::ours(&place, test.path(), "ours-abuse", both).await?;
        let report = Report::of("abuse", &tester.host, &ours, test.path(), "ours", &with).await?;
        ours.must_run()?;
        let place = lab.server("coturn").await?;
        let coturn = Server::coturn(&place, test.path(), "coturn-abuse", &["--listening-ip=127.0.0.1"]).await?;
        let theirs = Report::of("abuse", &tester.host, &coturn, test.path(), "coturn", &with).await?;
        report.figures(test, "abuse");
        theirs.figures(test, "abuse");
        compare(test, &["ours", "coturn"], "abuse.md").await?;
        theirs.must_find(&COTURN_ABUSE)?;
        report.must_be_clean()
    })
}

/// Each limit a client can run into is reached, refused with its code, and leaves when its cause leaves.
#[test]
fn limits() -> Result<()> {
    run_within(Duration::from_secs(180), async |test| {
        let more = "allow_loopback_peers = true\nrelay_ports = [50000, 50015]\nuser_quota = 4\n\
                    [limits]\npermissions_per_allocation = 20\nchannels_per_allocation = 30";
        let mut ours = Server::ours(&Place::on_loopback(51), test.path(), "ours-limits", more).await?;
        let with = [
            "--only",
            "resources-",
            "--user-quota",
            "4",
            "--relay-ports",
            "16",
            "--max-permissions",
            "20",
            "--max-channels",
            "30",
        ];
        let report = Report::of("abuse", &Host::Machine, &ours, test.path(), "ours", &with).await?;
        ours.must_run()?;
        report.figures(test, "limits");
        for id in ["quota", "quota-freed", "ports", "ports-freed", "even-port", "permissions", "channels"] {
            report.must_pass(&format!("resources-{id}"))?;
        }
        report.must_be_clean()
    })
}
