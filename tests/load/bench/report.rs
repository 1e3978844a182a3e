//! Medians, ratios and spread of a run: as a table, as JSON, as a picture.

use std::fmt::Write;
use std::process::Command;

use anyhow::Result;
use harness::cluster::repository;
use harness::plot::Bars;
use serde::Serialize;
use turnctl::bench::Counts;

use crate::cell::Cell;
use crate::memory::Memory;
use crate::scene::Scene;

/// Servers that others are compared with.
const BASES: [[&str; 2]; 2] = [["coturn", "coturn-two"], ["floor", "plain-udp"]];

/// A run.
#[derive(Serialize)]
pub(crate) struct Report {
    commit: String,
    date: String,
    machine: String,
    seconds: f64,
    rounds: u32,
    summary: Vec<Summary>,
    legend: Vec<String>,
    memory: Vec<Memory>,
    cells: Vec<Cell>,
}

/// What one server did in one scene.
#[derive(Serialize)]
struct Summary {
    scene: &'static str,
    server: &'static str,
    /// Medians.
    cpu_us: f64,
    system_us: f64,
    rate_k: f64,
    server_percent: f64,
    load_percent: f64,
    p50_us: f64,
    p99_us: f64,
    loss_percent: f64,
    /// From the least to the greatest CPU time, percent of the median.
    spread_percent: f64,
    /// Medians of the ratios of CPU time within a round, to each of the bases.
    to_coturn: Option<f64>,
    to_floor: Option<f64>,
    /// Sums.
    counts: Counts,
}

impl Report {
    pub(crate) fn new(scenes: &[Scene], cells: Vec<Cell>, memory: Vec<Memory>, seconds: f64) -> Self {
        let mut keys: Vec<(&str, &str)> = Vec::new();
        for cell in &cells {
            if !keys.contains(&(cell.scene, cell.server)) {
                keys.push((cell.scene, cell.server));
            }
        }
        // In the order of the first round, which starts with the first server.
        let summary = keys.into_iter().map(|(scene, server)| Summary::of(&cells, scene, server)).collect();
        Self {
            commit: told("git", &["rev-parse", "--short", "HEAD"]),
            date: told("date", &["--utc", "+%F"]),
            machine: format!("{}, Linux {}", processor(), told("uname", &["--kernel-release"])),
            seconds,
            rounds: cells.iter().map(|cell| cell.round + 1).max().unwrap_or(0),
            summary,
            legend: scenes.iter().map(Scene::legend).collect(),
            memory,
            cells,
        }
    }

    pub(crate) fn json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    pub(crate) fn table(&self) -> String {
        let mut text = format!(
            "# tests/bench at {}, {}: {}\n\
             # medians of {} interleaved rounds of {} s; cpu: of the server's process, us for a delivered packet; system: of\n\
             # the machine; k/s: delivered; server, load: use of their cores; ratios: of cpu, within a round; across: of both\n\
             # servers, to coturn-two and to plain-udp\n\
             {:15} {:14} {:>7} {:>7} {:>7} {:>8} {:>7} {:>5} {:>7} {:>8} {:>7} {:>8} {:>8}  faults\n",
            self.commit,
            self.date,
            self.machine,
            self.rounds,
            self.seconds,
            "scene",
            "server",
            "cpu us",
            "spread",
            "system",
            "k/s",
            "server",
            "load",
            "loss",
            "/coturn",
            "/floor",
            "p50 us",
            "p99 us"
        );
        let ratio = |ratio: Option<f64>| ratio.map_or("-".into(), |ratio| format!("{ratio:.2}"));
        let mut scene = "";
        for row in &self.summary {
            if row.scene != scene && !scene.is_empty() {
                text.push('\n');
            }
            scene = row.scene;
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "{:15} {:14} {:>7.2} {:>5.0} % {:>7.2} {:>8.1} {:>5.0} % {:>3.0} % {:>5.2} % {:>8} {:>7} {:>8.0} {:>8.0}  {}",
                row.scene,
                row.server,
                row.cpu_us,
                row.spread_percent,
                row.system_us,
                row.rate_k,
                row.server_percent,
                row.load_percent,
                row.loss_percent,
                ratio(row.to_coturn),
                ratio(row.to_floor),
                row.p50_us,
                row.p99_us,
                faults(&row.counts)
            );
        }
        text.push('\n');
        for legend in &self.legend {
            let _ = writeln!(text, "# {legend}");
        }
        if !self.memory.is_empty() {
            text.push_str("\n# bytes of an idle allocation: of the process, of the kernel; growth from the first to the third time\n");
        }
        for memory in &self.memory {
            let _ = writeln!(text, "memory   {}", memory.line());
        }
        text
    }

    /// CPU time of every server in every scene that is about it.
    pub(crate) fn picture(&self) -> String {
        let (mut names, mut scenes): (Vec<&str>, Vec<&str>) = (Vec::new(), Vec::new());
        for row in &self.summary {
            for (list, name) in [(&mut names, row.server), (&mut scenes, row.scene)] {
                if !list.contains(&name) {
                    list.push(name);
                }
            }
        }
        let cost = |scene: &str, server: &str| {
            let row = self.summary.iter().find(|row| row.scene == scene && row.server == server);
            row.map(|row| row.cpu_us)
        };
        scenes.retain(|scene| !matches!(*scene, "latency" | "across-latency" | "allocate"));
        let groups =
            scenes.iter().map(|scene| (scene.to_string(), names.iter().map(|server| cost(scene, server)).collect()));
        Bars {
            title: "CPU time of a server for a delivered packet".into(),
            up: "us".into(),
            groups: groups.collect(),
            names: names.iter().map(ToString::to_string).collect(),
        }
        .svg()
    }
}

impl Summary {
    fn of(cells: &[Cell], scene: &'static str, server: &'static str) -> Self {
        let own: Vec<&Cell> = cells.iter().filter(|cell| cell.scene == scene && cell.server == server).collect();
        let values = |of: fn(&Cell) -> f64| own.iter().map(|cell| of(cell)).collect::<Vec<f64>>();
        let middle = |of: fn(&Cell) -> f64| median(values(of)).unwrap_or(f64::NAN);
        let costs = values(|cell| cell.cpu_us);
        let (least, most) =
            costs.iter().fold((f64::MAX, 0.0_f64), |(least, most), cost| (least.min(*cost), most.max(*cost)));
        let cpu_us = middle(|cell| cell.cpu_us);
        let to = |base: [&str; 2]| {
            let beside = |cell: &&Cell| {
                let same =
                    |other: &&Cell| other.scene == scene && base.contains(&other.server) && other.round == cell.round;
                cells.iter().find(same).map(|other| cell.cpu_us / other.cpu_us)
            };
            median(own.iter().filter_map(beside).collect())
        };
        let mut counts = Counts::default();
        for cell in &own {
            counts.sent += cell.counts.sent;
            counts.delivered += cell.counts.delivered;
            counts.lost += cell.counts.lost;
            counts.duplicates += cell.counts.duplicates;
            counts.corrupt += cell.counts.corrupt;
            counts.misdelivered += cell.counts.misdelivered;
            counts.reordered += cell.counts.reordered;
        }
        Self {
            scene,
            server,
            cpu_us,
            system_us: middle(|cell| cell.system_us),
            rate_k: middle(|cell| cell.rate_k),
            server_percent: middle(|cell| cell.server_percent),
            load_percent: middle(|cell| cell.load_percent),
            p50_us: middle(|cell| cell.p50_us),
            p99_us: middle(|cell| cell.p99_us),
            loss_percent: middle(|cell| cell.loss_percent),
            spread_percent: (most - least) / cpu_us * 100.0,
            to_coturn: to(BASES[0]),
            to_floor: to(BASES[1]),
            counts,
        }
    }
}

fn faults(counts: &Counts) -> String {
    let named = [
        ("duplicated", counts.duplicates),
        ("corrupt", counts.corrupt),
        ("misdelivered", counts.misdelivered),
        ("reordered", counts.reordered),
    ];
    let seen: Vec<String> =
        named.into_iter().filter(|(_, count)| *count > 0).map(|(name, count)| format!("{count} {name}")).collect();
    if seen.is_empty() { "none".into() } else { seen.join(", ") }
}

/// The middle one; the mean of the two in the middle.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let count = values.len();
    if count == 0 {
        return None;
    }
    Some((values[(count - 1) / 2] + values[count / 2]) / 2.0)
}

/// What a program says in one line.
fn told(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(repository()).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}

fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let names: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("model name")).collect();
    let name = names.first().copied().unwrap_or("unknown").trim_start_matches([' ', '\t', ':']);
    format!("{} cores {name}", names.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_in_the_middle() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }
}
