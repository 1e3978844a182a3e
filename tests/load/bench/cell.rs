//! One measurement of one server.

use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use turnctl::bench::{Counts, Load, Measured, Plan};

use crate::cycles::{CyclePlan, cycle};
use crate::scene::{Scene, What};
use crate::servers::Server;
use crate::site::Site;
use crate::{machine, say};

/// Time before the measured time.
const WARM: Duration = Duration::from_millis(200);

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Cell {
    pub(crate) scene: &'static str,
    pub(crate) server: &'static str,
    pub(crate) round: u32,
    /// CPU time of the server, or of both, for a delivered packet, microseconds.
    pub(crate) cpu_us: f64,
    /// Busy time of the whole machine for a delivered packet, microseconds, without the load's waiting.
    pub(crate) system_us: f64,
    /// Delivered packets a second, thousands.
    pub(crate) rate_k: f64,
    /// Of the measured time, how much the server used its core, percent.
    pub(crate) server_percent: f64,
    /// Of the measured time, how much the load had to do, percent.
    pub(crate) load_percent: f64,
    /// Packets kept under way; 0 at a fixed rate.
    pub(crate) window: usize,
    /// From sender to last receiver, microseconds.
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) loss_percent: f64,
    pub(crate) counts: Counts,
}

impl Cell {
    /// For whoever waits.
    pub(crate) fn line(&self) -> String {
        format!(
            "round {} {:15} {:11} {:6.2} us {:6.1} k/s  server {:3.0} %  load {:3.0} %  window {:3}  loss {:.3} %",
            self.round + 1,
            self.scene,
            self.server,
            self.cpu_us,
            self.rate_k,
            self.server_percent,
            self.load_percent,
            self.window,
            self.loss_percent
        )
    }
}

pub(crate) fn measure(site: &Site, server: &Server, scene: &Scene, round: u32, length: Duration) -> Result<Cell> {
    match scene.what {
        What::Packets => packets(site, server, scene, round, length),
        What::Allocations => allocations(site, server, scene, round, length),
    }
}

/// Cycles of Allocate and Refresh, as packets are counted.
fn allocations(site: &Site, server: &Server, scene: &Scene, round: u32, length: Duration) -> Result<Cell> {
    let plan = CyclePlan { server: server.address, account: server.account.clone(), concurrent: scene.flows };
    let pids = pids(server);
    let (cycled, samples) = site.run(move || cycle(plan, WARM, length, || sample(&pids)))?;
    if cycled.failed > 0 {
        say(&format!("{}: {} cycles failed, the last with {:?}", server.name, cycled.failed, cycled.failure));
    }
    let counts = Counts {
        sent: cycled.cycles + cycled.failed,
        delivered: cycled.cycles,
        lost: cycled.failed,
        ..Counts::default()
    };
    let measured = Measured {
        counts,
        delivered: cycled.cycles,
        elapsed: cycled.elapsed,
        idle: cycled.idle,
        window: 0,
        latency: cycled.latency,
    };
    cell(server, scene, round, &measured, samples)
}

fn packets(site: &Site, server: &Server, scene: &Scene, round: u32, length: Duration) -> Result<Cell> {
    let plan = Plan {
        server: server.address,
        transport: scene.transport,
        account: server.account.clone(),
        far: server.far.as_ref().map(|far| (far.address, far.account.clone())),
        from: site.clients.address,
        peers: site.peers.address,
        mode: scene.mode,
        flows: scene.flows,
        size: scene.size,
        burst: scene.burst,
        pace: scene.pace,
        spin: true,
    };
    let pids = pids(server);
    let (measured, samples) = site.run(move || {
        let mut load = Load::open(plan)?;
        let outcome = load.run(WARM, length, || sample(&pids))?;
        load.close()?;
        Ok(outcome)
    })?;
    cell(server, scene, round, &measured, samples)
}

fn pids(server: &Server) -> Vec<u32> {
    [server.pid].into_iter().chain(server.far.as_ref().map(|far| far.pid)).collect()
}

/// CPU time of the server, or of both, and busy time of the machine.
type Sample = Result<(Duration, Duration)>;

fn sample(pids: &[u32]) -> Sample {
    let times = pids.iter().map(|pid| machine::process_time(*pid)).collect::<Result<Vec<_>>>()?;
    Ok((times.into_iter().sum(), machine::busy_time()?))
}

fn cell(server: &Server, scene: &Scene, round: u32, measured: &Measured, [first, last]: [Sample; 2]) -> Result<Cell> {
    let ((cpu_before, busy_before), (cpu_after, busy_after)) = (first?, last?);
    let (cpu, busy) = (cpu_after - cpu_before, busy_after.saturating_sub(busy_before));
    let (seconds, delivered) = (measured.elapsed.as_secs_f64(), measured.delivered.max(1) as f64);
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    let quantile = |permille| measured.latency.quantile(permille).map_or(f64::NAN, micros);
    Ok(Cell {
        scene: scene.name,
        server: server.name,
        round,
        cpu_us: micros(cpu) / delivered,
        system_us: micros(busy.saturating_sub(measured.idle)) / delivered,
        rate_k: delivered / seconds / 1e3,
        server_percent: cpu.as_secs_f64() / seconds * 100.0,
        load_percent: (1.0 - measured.idle.as_secs_f64() / seconds) * 100.0,
        window: measured.window,
        p50_us: quantile(500),
        p99_us: quantile(990),
        loss_percent: measured.counts.loss_percent(),
        counts: measured.counts,
    })
}
