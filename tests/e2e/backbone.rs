//! Calls whose two ends are at different relays: by the backbone, and around it.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use harness::cluster::{Cluster, Controller, Relay, RelayOptions, Store};
use harness::lab::DataCenter;
use harness::partition::Cut;
use harness::place::Place;
use harness::turn::TurnClient;
use harness::{Scenario, eventually, run};
use turn_core::Transport;

/// Relayed ports of every relay here.
const RELAYED: RangeInclusive<u16> = 49_152..=65_535;
/// Port of the backbone.
const BACKBONE: u16 = 3480;
/// Longest that a link may take to come up, or to come back.
const LINKED: Duration = Duration::from_secs(15);
/// Longest that a packet may take on a network without loss.
const ARRIVES: Duration = Duration::from_secs(2);

/// Two relays in two regions, and a client of each.
struct Stage {
    _center: DataCenter,
    cluster: Cluster,
    controller: Controller,
    relays: [Relay; 2],
    clients: [TurnClient; 2],
}

async fn stage(test: &Scenario, more: &str) -> Result<Stage> {
    let center = DataCenter::start().await?;
    let mut cluster = Cluster::new(test.path())?;
    let controller = cluster.controller(&center.server("controller").await?, Store::Embedded, "").await?;
    let options = |region: &str| RelayOptions { workers: 2, more: more.to_owned(), ..RelayOptions::in_region(region) };
    let eu = cluster.relay("eu-1", &center.server("eu-1").await?, &options("eu")).await?;
    let us = cluster.relay("us-1", &center.server("us-1").await?, &options("us")).await?;
    let alice = client(&controller, &center.server("alice").await?, &eu).await?;
    let bob = client(&controller, &center.server("bob").await?, &us).await?;
    Ok(Stage { _center: center, cluster, controller, relays: [eu, us], clients: [alice, bob] })
}

async fn client(controller: &Controller, place: &Place, relay: &Relay) -> Result<TurnClient> {
    let login = controller.login("caller").await?;
    let mut client = TurnClient::open(&place.host, place.address, relay.address(), Transport::Udp, &login).await?;
    client.allocate().await?;
    Ok(client)
}

impl Stage {
    /// Waits until each relay says that it reaches the other this way.
    async fn reached(&self, path: &str) -> Result<Duration> {
        let host = &self.controller.place.host;
        let (_, took) = eventually(&format!("both ends are {path}"), LINKED, async || {
            let answer = self.cluster.turnctl_json(host, &["backbone"]).await?;
            let links = answer["relays"].as_array().context("relays")?.iter();
            let paths: Vec<_> =
                links.flat_map(|relay| relay["links"].as_array()).flatten().map(|l| &l["path"]).collect();
            if paths.len() == 2 && paths.iter().all(|p| *p == path) { Ok(()) } else { Err(anyhow!("{answer}")) }
        })
        .await?;
        Ok(took)
    }

    fn ip(&self, relay: usize) -> IpAddr {
        self.relays[relay].address().ip()
    }

    /// Nothing passes from relayed port to relayed port.
    async fn block_relayed(&self) -> Result<Cut> {
        Cut::ports(&self.relays[0].place, &[self.ip(1)], RELAYED).await
    }

    /// Nothing passes between the ends of the backbone.
    async fn cut_link(&self) -> Result<Cut> {
        Cut::ports(&self.relays[0].place, &[self.ip(1)], BACKBONE..=BACKBONE).await
    }

    /// Each permits the other.
    async fn acquaint(&mut self) -> Result<()> {
        let [alice, bob] = &mut self.clients;
        let (of_alice, of_bob) = (alice.relayed()?, bob.relayed()?);
        alice.bind_channel(0x4000, of_bob).await?;
        bob.permit(of_alice.ip()).await
    }

    /// One message there and one back arrive as they were.
    async fn exchange(&mut self, message: &[u8]) -> Result<()> {
        let [alice, bob] = &mut self.clients;
        let (of_alice, of_bob) = (alice.relayed()?, bob.relayed()?);
        carry(alice, of_bob, bob, of_alice, message).await?;
        carry(bob, of_alice, alice, of_bob, message).await
    }

    /// Sends again and again until one arrives there, and how long that took.
    async fn until_arrives(&mut self, within: Duration) -> Result<Duration> {
        let [alice, bob] = &mut self.clients;
        until_arrives(alice, bob, within).await
    }

    /// As [`Stage::until_arrives`], the other way.
    async fn until_comes_back(&mut self, within: Duration) -> Result<Duration> {
        let [alice, bob] = &mut self.clients;
        until_arrives(bob, alice, within).await
    }

    /// Packets that this relay has relayed to others by the backbone, as it reports.
    async fn by_link(&self, relay: usize) -> Result<u64> {
        let host = &self.controller.place.host;
        let answer = self.cluster.turnctl_json(host, &["backbone"]).await?;
        answer["relays"][relay]["links"][0]["sent_packets"].as_u64().with_context(|| format!("{answer}"))
    }
}

async fn until_arrives(from: &mut TurnClient, receiver: &mut TurnClient, within: Duration) -> Result<Duration> {
    let to = receiver.relayed()?;
    let began = Instant::now();
    for number in 0_u64.. {
        let message = [&b"again"[..], &number.to_be_bytes()].concat();
        from.send(to, &message).await?;
        // What was under way before does not count.
        while let Ok((_, data)) = receiver.receive(Duration::from_millis(20)).await {
            if data == message {
                return Ok(began.elapsed());
            }
        }
        ensure!(began.elapsed() < within, "nothing arrives within {within:?}");
    }
    unreachable!("numbers do not end")
}

async fn carry(
    from: &mut TurnClient,
    to: SocketAddr,
    receiver: &mut TurnClient,
    source: SocketAddr,
    message: &[u8],
) -> Result<()> {
    from.send(to, message).await?;
    let (seen, data) = receiver.receive(ARRIVES).await.with_context(|| format!("{} bytes", message.len()))?;
    ensure!(seen == source, "it comes from {seen}, not {source}");
    ensure!(data == message, "{} bytes became {}", message.len(), data.len());
    Ok(())
}

/// Relayed address to relayed address, both ways and of every length, while the network between the relays carries
/// nothing from relayed port to relayed port: nothing tries it either. Who has no permission hears nothing.
#[test]
fn a_call_between_relays_goes_by_the_backbone() -> Result<()> {
    run(async |test| {
        let mut stage = stage(test, "backbone = {}").await?;
        let blocked = stage.block_relayed().await?;
        stage.reached("direct").await?;
        // The receiver's permissions are asked as for any packet.
        let [alice, bob] = &mut stage.clients;
        let of_bob = bob.relayed()?;
        alice.bind_channel(0x4000, of_bob).await?;
        alice.send(of_bob, b"unwanted").await?;
        eventually("who has no permission is not heard", ARRIVES, async || {
            match stage.relays[1].metric("turn_dropped_packets_total", "reason=\"no_permission\"").await {
                Ok(1.0) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await?;

        stage.acquaint().await?;
        for length in [0, 1, 200, 1000, 1172, 1200, 1400, 1472] {
            let message: Vec<u8> = (0..length).map(|at: u32| at as u8).collect();
            stage.exchange(&message).await?;
        }
        ensure!(blocked.dropped().await? == 0, "something went from relayed port to relayed port");
        eventually("both relays report what the link carried", Duration::from_secs(5), async || {
            for relay in [0, 1] {
                let sent = stage.by_link(relay).await?;
                ensure!(sent >= 8, "{sent} packets by the link");
            }
            Ok(())
        })
        .await?;
        Ok(())
    })
}

/// The link falls silent in the middle of a call: within a second the call goes on from relayed port to relayed port.
/// When the link is back, so is the call.
#[test]
fn a_call_leaves_a_silent_link_within_a_second_and_comes_back() -> Result<()> {
    run(async |test| {
        let mut stage = stage(test, "backbone = {}").await?;
        stage.reached("direct").await?;
        stage.acquaint().await?;
        for _ in 0..20 {
            stage.exchange(b"by the link").await?;
        }
        let cut = stage.cut_link().await?;
        let gap = stage.until_arrives(Duration::from_secs(5)).await?;
        test.figure("a call left a silent link within", format!("{gap:?}"));
        ensure!(gap < Duration::from_secs(1), "nothing arrived for {gap:?}");
        // The other end finds out by its own packets.
        let gap = stage.until_comes_back(Duration::from_secs(5)).await?;
        ensure!(gap < Duration::from_secs(1), "nothing came back for {gap:?}");
        stage.reached("plain_udp").await?;
        stage.exchange(b"by plain UDP").await?;
        ensure!(cut.dropped().await? > 0, "nothing was cut");

        cut.heal().await?;
        let back = stage.reached("direct").await?;
        test.figure("the link was taken again within", format!("{back:?}"));
        let before = stage.by_link(0).await?;
        let blocked = stage.block_relayed().await?;
        stage.exchange(b"by the link again").await?;
        ensure!(blocked.dropped().await? == 0, "something went from relayed port to relayed port");
        eventually("the link carries it", Duration::from_secs(5), async || {
            let sent = stage.by_link(0).await?;
            if sent > before { Ok(()) } else { Err(anyhow!("still {sent} packets")) }
        })
        .await?;
        Ok(())
    })
}

/// A relay without public ports: the backbone is the only way out, nobody outside of the cluster is a peer, and what the
/// backbone does not carry is dropped and counted.
#[test]
fn a_relay_without_public_ports_has_the_backbone_alone() -> Result<()> {
    run(async |test| {
        let mut stage = stage(test, "peers = \"cluster-only\"\nbackbone = {}").await?;
        stage.reached("direct").await?;
        stage.acquaint().await?;
        stage.exchange(b"by the link").await?;
        let outside: SocketAddr = "203.0.113.9:9".parse()?;
        for client in &mut stage.clients {
            let refused = client.permit(outside.ip()).await;
            ensure!(refused.is_err(), "a peer outside of the cluster is permitted");
        }
        for relay in &stage.relays {
            let bound = udp_ports(&relay.place).await?;
            ensure!(bound.iter().all(|port| !RELAYED.contains(port)), "{} has public ports: {bound:?}", relay.id);
        }

        let cut = stage.cut_link().await?;
        stage.reached("none").await?;
        ensure!(stage.until_arrives(Duration::from_millis(300)).await.is_err(), "there is another way");
        eventually("drops are counted", Duration::from_secs(5), async || {
            match stage.relays[0].metric("turn_dropped_packets_total", "reason=\"no_backbone\"").await {
                Ok(lost) if lost > 0.0 => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await?;
        cut.heal().await?;
        stage.reached("direct").await?;
        stage.exchange(b"by the link again").await?;
        Ok(())
    })
}

/// Ports that UDP sockets of a machine are bound to.
async fn udp_ports(place: &Place) -> Result<Vec<u16>> {
    // The namespace is the thread's, not the process's.
    let table = place.host.run(async { Ok(std::fs::read_to_string("/proc/thread-self/net/udp")?) }).await?;
    let port = |line: &str| u16::from_str_radix(line.split_whitespace().nth(1)?.rsplit_once(':')?.1, 16).ok();
    Ok(table.lines().skip(1).filter_map(port).collect())
}

/// A relay whose certificate is revoked is out within five seconds, and stays out; with a new one it is back.
#[test]
fn a_revoked_relay_is_out_within_five_seconds() -> Result<()> {
    run(async |test| {
        let mut stage = stage(test, "peers = \"cluster-only\"\nbackbone = {}").await?;
        let host = stage.controller.place.host.clone();
        stage.reached("direct").await?;
        stage.acquaint().await?;
        stage.exchange(b"trusted").await?;

        let certificate = test.file("relay-us-1.pem");
        let old = std::fs::read(&certificate)?;
        std::fs::write(test.file("old.pem"), old)?;
        let old = test.file("old.pem").display().to_string();
        let output = stage.cluster.turnctl(&host, &["revoke-relay", "us-1", "--certificate", &old]).await?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let told = Instant::now();
        eventually("its link is closed", Duration::from_secs(10), async || {
            match stage.until_arrives(Duration::from_millis(100)).await {
                Ok(_) => Err("it is heard"),
                Err(_) => Ok(()),
            }
        })
        .await?;
        let out = told.elapsed();
        test.figure("a revoked relay was out within", format!("{out:?}"));
        ensure!(out < Duration::from_secs(5), "out only after {out:?}");
        eventually("controllers do not know it", Duration::from_secs(10), async || {
            let answer = stage.cluster.turnctl_json(&host, &["nodes"]).await?;
            let nodes = answer["nodes"].as_array().context("nodes")?.clone();
            let states: Vec<_> = nodes.iter().filter(|node| node["node_id"] == "us-1").map(|n| &n["state"]).collect();
            if states.iter().all(|state| *state == "suspect") { Ok(()) } else { Err(anyhow!("{answer}")) }
        })
        .await?;
        // It goes on trying, and is refused.
        eventually("it is told why", Duration::from_secs(10), async || {
            if stage.relays[1].log()?.contains("was revoked") { Ok(()) } else { Err(anyhow!("not yet")) }
        })
        .await?;
        ensure!(stage.until_arrives(Duration::from_millis(500)).await.is_err(), "it is heard again");

        stage.cluster.renew(&stage.relays[1])?;
        stage.reached("direct").await?;
        stage.until_arrives(Duration::from_secs(10)).await?;
        Ok(())
    })
}
