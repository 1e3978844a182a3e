//! A run: the cluster, traffic, the plan, and what came of it.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use harness::etcd::PREFIX;
use harness::{Scenario, eventually, run_within};
use tokio::time::sleep;
use turn_core::{KeyRing, Record, Transport};

use crate::evidence::{Evidence, Truth, Watch};
use crate::faults::Wrecker;
use crate::invariants;
use crate::observe::{History, Observers, named};
use crate::plan::{Fault, HOME, RELAYS, Step, plan};
use crate::site::Site;
use crate::traffic::{Slot, Traffic};

/// After the last fault the store is true within this time (the Shows).
const TRUE_AGAIN: Duration = Duration::from_secs(5);
/// How long a run waits for it, to tell how late it was.
const PATIENCE: Duration = Duration::from_secs(30);
/// Afterwards traffic goes on for so long: whoever is silent then is lost.
const CALM: Duration = Duration::from_secs(4);
/// Start, calm and end of a run, on a busy machine.
const SLACK: Duration = Duration::from_secs(150);
/// Lowest port of relayed addresses (the relay's default).
const LOWEST: u16 = 49_152;

/// Seeds of one run, from the environment, or one whose short plan moves an address and then loses the store.
fn seeds() -> Result<Vec<u64>> {
    let text = std::env::var("TURNPIKE_CHAOS_SEED").unwrap_or_else(|_| "6".into());
    text.split(',').map(|seed| seed.trim().parse().with_context(|| format!("TURNPIKE_CHAOS_SEED: {seed:?}"))).collect()
}

/// Length of each.
fn length() -> Result<Duration> {
    let seconds = std::env::var("TURNPIKE_CHAOS_SECONDS").unwrap_or_else(|_| "30".into());
    Ok(Duration::from_secs(seconds.parse().context("TURNPIKE_CHAOS_SECONDS")?))
}

/// Whatever breaks, in whatever order: the promises hold.
#[test]
fn calls_outlive_chaos() -> Result<()> {
    let (seeds, length) = (seeds()?, length()?);
    for seed in seeds {
        let steps = plan(seed, length);
        run_within(length + SLACK, async |test| chaos(test, &format!("seed {seed}"), &steps).await)
            .with_context(|| format!("TURNPIKE_CHAOS_SEED={seed} TURNPIKE_CHAOS_SECONDS={}", length.as_secs()))?;
    }
    Ok(())
}

/// A controller that has lost the store, but not what relays told it, has writes and claims under way; the relays are
/// restarted, again and again, and go on at the other one; then the network brings what is old. None of it may land.
#[test]
fn a_former_session_writes_nothing() -> Result<()> {
    let step = |at, lasts, fault| Step { at: Duration::from_millis(at), lasts: Duration::from_millis(lasts), fault };
    // Relays begin with the first controller.
    let mut steps = vec![step(500, 9800, Fault::CutController(0))];
    for at in [3500, 8200, 9100] {
        steps.extend((0..RELAYS).map(|relay| step(at, 200, Fault::KillRelay(relay))));
    }
    run_within(SLACK, async |test| chaos(test, "late writes", &steps).await)
}

async fn chaos(test: &Scenario, what: &str, steps: &[Step]) -> Result<()> {
    let mut site = Site::start(test).await?;
    let watch = Watch::start();
    let addresses = site.addresses();
    let controllers: Vec<_> = site.controllers.iter().map(|(controller, _)| controller.place.clone()).collect();
    let history = History::record(&site.observer, site.etcd.endpoints());
    let slots = slots();
    let traffic = Traffic::start(watch, site.login.clone(), &site.clients, &site.peers, addresses.clone(), &slots);
    eventually("everybody talks", Duration::from_secs(20), async || {
        let (_, talking) = traffic.living();
        if talking >= slots.len() { Ok(()) } else { Err(anyhow!("{talking} of {}", slots.len())) }
    })
    .await?;
    let mut observers = Observers::start(watch, &site.login, &site.clients, &addresses, &controllers);
    observers.watch_address(watch, addresses[HOME].ip(), site.candidates());

    let mut evidence = Evidence {
        timeline: Wrecker::new(&mut site, watch, history.known()).play(steps).await?,
        ..Evidence::default()
    };
    settle(&mut site, watch, &traffic, &mut evidence).await?;
    sleep(CALM).await;
    evidence.end = watch.now();
    evidence.calls = traffic.stop().await;
    // Nobody is to be asked by ping while calls are counted.
    evidence.answering = site.machines[HOME].cable.answering(addresses[HOME].ip()).await?.len();
    (evidence.probes, evidence.sightings, evidence.held) = observers.stop().await;
    evidence.history = history.finish().await?;
    for machine in &mut site.machines {
        evidence.died.extend(machine.relay.must_run().err().map(|error| format!("{error:#}")));
    }
    report(test, what, &evidence)
}

/// UDP calls that last, UDP calls that come and go, and calls over TCP, at each relay.
fn slots() -> Vec<Slot> {
    let mut slots = Vec::new();
    for relay in 0..RELAYS {
        let slot = |transport, life: Option<u64>| Slot { relay, transport, life: life.map(Duration::from_secs) };
        slots.extend([
            slot(Transport::Udp, None),
            slot(Transport::Udp, None),
            slot(Transport::Udp, None),
            slot(Transport::Udp, Some(3)),
            slot(Transport::Udp, Some(7)),
            slot(Transport::Tcp, None),
        ]);
    }
    slots
}

/// Waits until store, relays and clients agree, and discovery names everybody.
async fn settle(site: &mut Site, watch: Watch, traffic: &Traffic, evidence: &mut Evidence) -> Result<()> {
    let healed = watch.now();
    while watch.now() < healed + PATIENCE {
        let truth = look(site).await?;
        evidence.untrue = invariants::untrue(&truth, &traffic.living().0);
        if evidence.untrue.is_empty() {
            evidence.settled = Some(watch.now());
            return Ok(());
        }
        sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

async fn look(site: &mut Site) -> Result<Truth> {
    let mut truth = Truth::default();
    for (_, value) in site.etcd.get(&format!("{PREFIX}allocations/")).await.unwrap_or_default() {
        // An empty ring checks no seal: that is the relay's business.
        if let Ok(record) = Record::open(&value, &KeyRing::default()) {
            truth.stored.extend(record.relayed.iter().map(|relayed| relayed.advertised));
        }
    }
    for machine in &mut site.machines {
        let Ok(pid) = machine.relay.pid() else { continue };
        for address in sockets(pid)? {
            if address.ip() == machine.relay.address().ip() && address.port() >= LOWEST && !truth.bound.insert(address)
            {
                truth.twice.insert(address);
            }
        }
    }
    for (controller, _) in &site.controllers {
        truth.named.push(named(&controller.place).await.map_err(|error| format!("{error:#}")));
    }
    Ok(truth)
}

/// Addresses of the UDP sockets in a process's network namespace.
fn sockets(pid: u32) -> Result<BTreeSet<SocketAddr>> {
    let Ok(text) = fs::read_to_string(format!("/proc/{pid}/net/udp")) else { return Ok(BTreeSet::new()) };
    let address = |line: &str| {
        let (ip, port) = line.split_ascii_whitespace().nth(1)?.split_once(':')?;
        let ip = Ipv4Addr::from(u32::from_str_radix(ip, 16).ok()?.to_le_bytes());
        Some(SocketAddr::new(IpAddr::V4(ip), u16::from_str_radix(port, 16).ok()?))
    };
    Ok(text.lines().skip(1).filter_map(address).collect())
}

#[allow(clippy::print_stderr, reason = "what a failing run is played again from")]
fn report(test: &Scenario, what: &str, evidence: &Evidence) -> Result<()> {
    let violations = invariants::check(evidence, TRUE_AGAIN);
    let messages = |flows: fn(&crate::evidence::Call) -> [&crate::evidence::Flow; 2]| {
        let flows = evidence.calls.iter().flat_map(flows);
        flows.fold((0, 0), |(sent, lost), flow| {
            (sent + flow.sent.len(), lost + flow.arrived.iter().filter(|a| a.is_none()).count())
        })
    };
    let (sent, lost) = messages(|call| [&call.up, &call.down]);
    let faults = evidence.timeline.windows().count();
    let newcomers = evidence.probes.iter().filter(|probe| probe.outcome.is_ok()).count();
    test.figure(
        &format!("chaos, {what}"),
        format!(
            "{faults} faults, {} calls, {sent} messages ({lost} lost in faults of their relays), {newcomers} of {} newcomers served, {} writes to etcd, true after {:?}",
            evidence.calls.len(),
            evidence.probes.len(),
            evidence.history.len(),
            evidence.settled.map(|at| at.saturating_sub(evidence.timeline.healed())),
        ),
    );
    if !violations.is_empty() {
        eprintln!("{what}, what was done:\n{}what is wrong:\n  {}", evidence.timeline.lines(), violations.join("\n  "));
    }
    ensure!(violations.is_empty(), "{} promises are broken, first: {}", violations.len(), violations[0]);
    Ok(())
}
