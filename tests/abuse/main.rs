//! What the RFCs require and what hostile input must get, over the wire against the release binary: UDP, TCP, TLS and
//! DTLS. Ours passes; coturn shows that the checks can fail.

mod report;
mod servers;

use std::time::Duration;

use anyhow::{Result, ensure};
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
        let place = Place::on_loopback(31);
        let mut ours = Server::ours(&place, test.path(), "ours-conform", "allow_loopback_peers = true").await?;
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
        let mut ours = Server::ours(&place, test.path(), "ours-abuse", "").await?;
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
            let found = report.found(&format!("resources-{id}"));
            ensure!(!found.is_empty(), "resources-{id} did not run");
            for (transport, (outcome, seen)) in found {
                ensure!(outcome == "pass", "resources-{id} over {transport}: {outcome}: {seen}");
            }
        }
        report.must_be_clean()
    })
}
