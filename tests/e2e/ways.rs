//! Ways between relays that are long, lossy or narrow: the better one is taken and left, and a narrow one is filled and
//! not flooded.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use harness::cluster::{Cluster, Controller, Relay, RelayOptions, Store};
use harness::distance::{Conditions, Distance};
use harness::lab::DataCenter;
use harness::turn::TurnClient;
use harness::{Host, Scenario, eventually, run_within};
use serde_json::Value;
use turn_core::Transport;
use turnctl::bench::{Account, Load, Mode, Pace, Plan};

const MS: Duration = Duration::from_millis(1);
/// Longest that links may take to come up.
const LINKED: Duration = Duration::from_secs(15);
/// Promised, from the moment that another way is the better one: 15 s. The relay shows it up to a second later.
const TAKEN: Duration = Duration::from_secs(15 + 1);
/// A better way has to stay one for ten seconds; loss is that of the last ten, and halves before it counts for little.
const LEFT: Duration = Duration::from_secs(25);

/// Three relays: `eu-1`, `us-1` and `ap-1`; a client of each of the first two.
struct Stage {
    _center: DataCenter,
    cluster: Cluster,
    controller: Controller,
    relays: Vec<Relay>,
    distances: Vec<Distance>,
    clients: [TurnClient; 2],
    /// Messages sent, and when.
    sent: u64,
    began: Instant,
}

/// What a call has seen for a while.
#[derive(Default)]
struct Seen {
    /// From client to client.
    latencies: Vec<Duration>,
    /// How the first relay reached the second, whenever that changed.
    ways: Vec<String>,
}

impl Seen {
    fn median(&mut self) -> Option<Duration> {
        self.latencies.sort_unstable();
        self.latencies.get(self.latencies.len() / 2).copied()
    }
}

impl Stage {
    /// Direct ways of this length, one way; the other ways are half as long as a detour of 60 ms.
    async fn start(test: &Scenario, direct: Duration) -> Result<Self> {
        let center = DataCenter::start().await?;
        let mut cluster = Cluster::new(test.path())?;
        let controller = cluster.controller(&center.server("controller").await?, Store::Embedded, "").await?;
        let mut places = Vec::new();
        for region in ["eu", "us", "ap"] {
            places.push(center.server(&format!("{region}-1")).await?);
        }
        let mut distances = Vec::new();
        for (from, place) in places.iter().enumerate() {
            let way = |(to, other): (usize, &harness::place::Place)| {
                let delay = if from < 2 && to < 2 { direct } else { 15 * MS };
                (other.address, Conditions::late(delay))
            };
            let others = places.iter().enumerate().filter(|(to, _)| *to != from);
            distances.push(Distance::from(place, &others.map(way).collect::<Vec<_>>()).await?);
        }
        let mut relays = Vec::new();
        for (region, place) in ["eu", "us", "ap"].into_iter().zip(&places) {
            let options = RelayOptions { more: "backbone = {}".into(), ..RelayOptions::in_region(region) };
            relays.push(cluster.relay(&format!("{region}-1"), place, &options).await?);
        }
        let mut clients = Vec::new();
        for (name, relay) in ["alice", "bob"].into_iter().zip(&relays) {
            let (place, login) = (center.server(name).await?, controller.login(name).await?);
            let opened = TurnClient::open(&place.host, place.address, relay.address(), Transport::Udp, &login);
            let mut client = opened.await?;
            client.allocate().await?;
            clients.push(client);
        }
        let clients = <[TurnClient; 2]>::try_from(clients).ok().context("two clients")?;
        let mut stage =
            Self { _center: center, cluster, controller, relays, distances, clients, sent: 0, began: Instant::now() };
        let (links, _) = eventually("all are joined", LINKED, async || {
            let links = stage.links().await?;
            ensure!(links.len() == 6 && links.iter().all(|link| link["path"] == "direct"), "{links:?}");
            Ok(links)
        })
        .await?;
        ensure!(links.iter().all(|link| link["rtt_us"].as_u64().is_some_and(|rtt| rtt >= 20_000)), "{links:?}");
        let [alice, bob] = &mut stage.clients;
        let (of_alice, of_bob) = (alice.relayed()?, bob.relayed()?);
        alice.bind_channel(0x4000, of_bob).await?;
        bob.bind_channel(0x4000, of_alice).await?;
        Ok(stage)
    }

    async fn links(&self) -> Result<Vec<Value>> {
        let answer = self.cluster.turnctl_json(&self.controller.place.host, &["backbone"]).await?;
        let relays = answer["relays"].as_array().context("relays")?;
        Ok(relays.iter().filter_map(|relay| relay["links"].as_array()).flatten().cloned().collect())
    }

    /// Packets between the first two relays go under these conditions from now on, both ways.
    fn set_direct(&self, conditions: Conditions) {
        for (from, to) in [(0, 1), (1, 0)] {
            self.distances[from].set(self.relays[to].address().ip(), conditions);
        }
    }

    /// A call of 50 packets a second each way, until what was seen is what is waited for, or for so long.
    async fn call(&mut self, time: Duration, mut is_over: impl FnMut(&str) -> bool) -> Result<(Seen, Duration)> {
        let (mut seen, began) = (Seen::default(), Instant::now());
        let mut asked = None;
        while began.elapsed() < time {
            self.exchange(&mut seen).await?;
            if asked.is_some_and(|asked: Instant| asked.elapsed() < 500 * MS) {
                continue;
            }
            asked = Some(Instant::now());
            // What the relay says itself: no controller is between.
            let over = self.relays[0].metric("turn_backbone_detour", "member=\"us-1\"").await?;
            let way = if over == 0.0 { "direct" } else { "detour" };
            if seen.ways.last().is_none_or(|last| last != way) {
                seen.ways.push(way.to_owned());
            }
            if is_over(way) {
                break;
            }
        }
        Ok((seen, began.elapsed()))
    }

    /// A packet each way, and 20 ms for what comes.
    async fn exchange(&mut self, seen: &mut Seen) -> Result<()> {
        let [alice, bob] = &mut self.clients;
        let others: [SocketAddr; 2] = [bob.relayed()?, alice.relayed()?];
        self.sent += 1;
        let mut message = [0; 160];
        message[..8].copy_from_slice(&u64::try_from(self.began.elapsed().as_micros())?.to_be_bytes());
        alice.send(others[0], &message).await?;
        bob.send(others[1], &message).await?;
        for client in [alice, bob] {
            let until = Instant::now() + 10 * MS;
            while let Some(left) = until.checked_duration_since(Instant::now()) {
                let Ok((_, data)) = client.receive(left).await else { break };
                let at = data.first_chunk().map(|at| Duration::from_micros(u64::from_be_bytes(*at)));
                seen.latencies.extend(at.and_then(|at| self.began.elapsed().checked_sub(at)));
            }
        }
        Ok(())
    }

    /// Waits until packets take this way, and then for what was under way.
    async fn until(&mut self, way: &str, within: Duration) -> Result<Duration> {
        let (seen, took) = self.call(within, |now| now == way).await?;
        ensure!(
            seen.ways.last().is_some_and(|last| last == way),
            "not {way} within {within:?}: {:?}",
            self.links().await
        );
        self.call(500 * MS, |_| false).await?;
        Ok(took)
    }
}

/// Seconds of noise.
fn noisy() -> Result<Duration> {
    Ok(Duration::from_secs(harness::number("TURNPIKE_NOISE_SECONDS", 15)?))
}

/// The direct way becomes long, then good, then loses: a call goes by the third relay while that is better, and only then;
/// noise does not make it go to and fro.
#[test]
fn a_call_takes_the_better_way_and_leaves_it() -> Result<()> {
    run_within(Duration::from_secs(150) + 2 * noisy()?, async |test| {
        let good = Conditions::late(20 * MS);
        let mut stage = Stage::start(test, good.delay).await?;
        stage.call(Duration::from_secs(1), |_| false).await?;

        stage.set_direct(Conditions::late(100 * MS));
        let took = stage.until("detour", TAKEN).await?;
        test.figure("a detour of 60 ms around a direct way of 200 ms: taken after", format!("{took:?}"));
        let (mut seen, _) = stage.call(Duration::from_secs(1), |_| false).await?;
        let median = seen.median().context("nothing arrives")?;
        test.figure("and a packet takes", format!("{median:?}"));
        ensure!((30 * MS..70 * MS).contains(&median), "{median:?} by a way of 30 ms");

        stage.set_direct(Conditions { jitter: 40 * MS, ..Conditions::late(80 * MS) });
        let (seen, _) = stage.call(noisy()?, |_| false).await?;
        ensure!(seen.ways == ["detour"], "noise on the direct way: {:?}", seen.ways);

        stage.set_direct(good);
        let took = stage.until("direct", LEFT).await?;
        test.figure("left when it is no longer better, after", format!("{took:?}"));

        stage.set_direct(Conditions { loss_permille: 200, ..good });
        let took = stage.until("detour", TAKEN).await?;
        test.figure("a detour of 60 ms around a direct way with 20 % loss: taken after", format!("{took:?}"));
        Ok(())
    })
}

/// A line of 20 Mbit/s between two relays, and 32 Mbit/s offered each way: the line is full, and what arrives is in time.
#[test]
fn a_narrow_line_is_filled_and_what_arrives_is_in_time() -> Result<()> {
    const LINE: u64 = 20_000_000;
    const OFFERED: u64 = 32_000_000;
    /// It fits a datagram of the least MTU, which QUIC takes congestion for at times.
    const PACKET: usize = 1100;
    /// IP, UDP, QUIC and the frame around a packet.
    const AROUND: usize = 28 + 40 + 15;
    run_within(Duration::from_secs(90), async |test| {
        let center = DataCenter::start().await?;
        let mut cluster = Cluster::new(test.path())?;
        let controller = cluster.controller(&center.server("controller").await?, Store::Embedded, "").await?;
        let (in_eu, in_us) = (center.server("eu-1").await?, center.server("us-1").await?);
        let line = Conditions { rate: LINE, queue: 50 * MS, ..Conditions::late(10 * MS) };
        let _eu_to_us = Distance::from(&in_eu, &[(in_us.address, line)]).await?;
        let _us_to_eu = Distance::from(&in_us, &[(in_eu.address, line)]).await?;
        let private = format!(
            "backbone = {{ private_networks = [\"{}/32\", \"{}/32\"], capacity_mbit = 20 }}",
            in_eu.address, in_us.address
        );
        let options = |region: &str| RelayOptions {
            more: format!("{private}\n[limits]\nstrangers_per_prefix = 0"),
            ..RelayOptions::in_region(region)
        };
        let eu = cluster.relay("eu-1", &in_eu, &options("eu")).await?;
        let us = cluster.relay("us-1", &in_us, &options("us")).await?;
        for relay in [&eu, &us] {
            eventually("it is joined", LINKED, async || {
                let links = relay.metric("turn_backbone_link", "").await?;
                ensure!(links == 1.0, "{links} links");
                Ok(())
            })
            .await?;
        }
        let (load, login) = (center.server("load").await?, controller.login("load").await?);
        let account = Account { username: login.username.into(), password: login.password.into() };
        let plan = Plan {
            server: eu.address(),
            transport: Transport::Udp,
            account: account.clone(),
            far: Some((us.address(), account)),
            from: load.address,
            peers: load.address,
            mode: Mode::Pair,
            flows: 32,
            size: PACKET,
            burst: 1,
            pace: Pace::Rate(u32::try_from(2 * OFFERED / 8 / PACKET as u64)?),
            spin: false,
        };
        let Host::Device(device) = &load.host else { anyhow::bail!("no machine of its own") };
        let mut tries = Vec::new();
        // A busy machine is late with packets: what can be done once can be done.
        for _ in 0..3 {
            let plan = plan.clone();
            let carried = device.spawn_thread(move || {
                let mut load = Load::open(plan)?;
                let (measured, _) = load.run(Duration::from_secs(2), Duration::from_secs(4), || ())?;
                load.close()?;
                Ok(measured)
            })?;
            let joined = tokio::task::spawn_blocking(|| carried.join()).await?;
            let measured = joined.map_err(|_| anyhow!("the load has panicked"))??;
            let bits = measured.delivered as f64 * (PACKET * 8) as f64 / measured.elapsed.as_secs_f64() / 2.0;
            let p90 = measured.latency.quantile(900).context("nothing arrives")?;
            let share = bits * (PACKET + AROUND) as f64 / PACKET as f64 / LINE as f64 * 100.0;
            tries.push(format!("{share:.0} % of what it carries, p90 {p90:?}"));
            if share >= 95.0 && p90 <= 80 * MS {
                test.figure("32 Mbit/s each way by a line of 20: delivered", tries.join("; "));
                return Ok(());
            }
        }
        anyhow::bail!("{}", tries.join("; "));
    })
}
