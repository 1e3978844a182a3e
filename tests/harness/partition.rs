//! Partitions: drop rules of nftables in the network namespace of one of the two that no longer hear each other.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Result, bail, ensure};

use crate::place::Place;
use crate::process::Host;

/// Which packets are dropped, as seen from the place that has the rules.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Way {
    /// Both directions.
    Both,
    /// What comes in: it is heard and hears nothing.
    In,
    /// What goes out: it hears and is not heard.
    Out,
}

/// A cut that stands until it is healed, or its namespace ends. Connections that exist are cut too, and go on when it
/// heals if they have not timed out.
#[derive(Debug)]
#[must_use = "a cut is healed by its method"]
pub struct Cut {
    host: Host,
    table: String,
}

/// Names of the tables.
static NUMBER: AtomicU32 = AtomicU32::new(0);

impl Cut {
    /// Cuts `place` off from `others`.
    ///
    /// # Errors
    /// It is not in a namespace of its own, or nftables refuses.
    pub async fn between(place: &Place, others: &[IpAddr], way: Way) -> Result<Self> {
        Self::of(place, others, way, None).await
    }

    /// Cuts only UDP between ports of `place` and ports of `others`, all of this range.
    ///
    /// # Errors
    /// As [`Cut::between`].
    pub async fn ports(place: &Place, others: &[IpAddr], ports: RangeInclusive<u16>) -> Result<Self> {
        Self::of(place, others, Way::Both, Some(ports)).await
    }

    async fn of(place: &Place, others: &[IpAddr], way: Way, ports: Option<RangeInclusive<u16>>) -> Result<Self> {
        if matches!(place.host, Host::Machine) {
            bail!("cutting this machine's own network would cut off more than the test");
        }
        let table = format!("cut-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let mut rules = format!("add table inet {table}\n");
        let others: BTreeSet<&IpAddr> = others.iter().collect();
        let ports = ports.map_or(String::new(), |ports| {
            let (low, high) = ports.into_inner();
            format!("udp sport {low}-{high} udp dport {low}-{high} ")
        });
        for (hook, end, cut) in [("input", "saddr", way != Way::Out), ("output", "daddr", way != Way::In)] {
            if !cut {
                continue;
            }
            writeln!(rules, "add chain inet {table} {hook} {{ type filter hook {hook} priority -10; }}")?;
            for other in &others {
                let family = if other.is_ipv4() { "ip" } else { "ip6" };
                writeln!(rules, "add rule inet {table} {hook} {family} {end} {other} {ports}counter drop")?;
            }
        }
        nft(&place.host, &rules).await?;
        Ok(Self { host: place.host.clone(), table })
    }

    /// Packets dropped so far.
    ///
    /// # Errors
    /// nftables refuses.
    pub async fn dropped(&self) -> Result<u64> {
        let listed = nft(&self.host, &format!("list table inet {}", self.table)).await?;
        let words: Vec<&str> = listed.split_whitespace().collect();
        let counts = words.windows(2).filter(|pair| pair[0] == "packets");
        Ok(counts.map(|pair| pair[1].parse::<u64>()).sum::<Result<_, _>>()?)
    }

    /// Takes the rules away.
    ///
    /// # Errors
    /// nftables refuses.
    pub async fn heal(self) -> Result<()> {
        nft(&self.host, &format!("delete table inet {}", self.table)).await.map(drop)
    }
}

async fn nft(host: &Host, rules: &str) -> Result<String> {
    let mut command = Command::new("nft");
    command.arg(rules);
    let output = host.output(command).await?;
    ensure!(output.status.success(), "nft {rules}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
