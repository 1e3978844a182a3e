//! How fast a relay is, beside others and beside the least that relaying costs: one run, interleaved rounds.
//!
//! The servers run on one core, the load on another. The main figure is the CPU time of the server's process for each
//! packet that arrived: user and system time of all its threads. The kernel's work of handing a packet on over loopback
//! is done, and counted, where the packet is sent: the server pays for what it sends, the load for what it sends. Beside
//! it stands what the whole machine was busy, less the time that the load waited by looking.
//!
//! | module | what it is |
//! |---|---|
//! | `scene` | what is measured: who sends what to whom |
//! | `site` | where: loopback, or network namespaces |
//! | `servers` | what is measured with: relays, coturn, turn-rs, the floor |
//! | `floor` | the least: look up and forward |
//! | `cell` | one measurement of one server |
//! | `cycles` | allocations made and ended |
//! | `memory` | what an idle allocation costs |
//! | `report` | medians, ratios, spread; table, JSON, picture |
//! | `machine` | clocks and meters |
//!
//! `tests/bench` builds all and runs it.

mod cell;
mod cycles;
mod floor;
mod machine;
mod memory;
mod report;
mod scene;
mod servers;
mod site;

use std::fs;
use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use harness::cluster::repository;
use relay_node::sys::process::raise_descriptor_limit;

use report::Report;
use scene::{Net, Scene};
use site::Site;
use turnctl::bench::Pace;

/// Measure relays beside each other
#[derive(Debug, Parser)]
#[command(name = "tests/bench", args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Subcommand)]
enum Command {
    Floor(floor::FloorArgs),
}

#[derive(Debug, clap::Args)]
struct Options {
    /// Only these: up, down, echo, pair, video, tcp-up, tcp-down, veth-video, latency, across, across-1200, across-20k,
    /// across-20k-1200, across-latency, allocate, memory
    #[arg(long, value_name = "SCENE", value_delimiter = ',')]
    only: Vec<String>,
    /// Only these: relay, relay-two (workers), relay-wildcard, coturn, coturn-new, coturn-mux, turn-rs, floor, floor-wildcard,
    /// and pairs of servers: backbone, plain-udp (two relays), coturn-two
    #[arg(long, value_name = "SERVER", value_delimiter = ',')]
    servers: Vec<String>,
    /// Times that everything is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Seconds of one measurement
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Flows of a scene, instead of its own number
    #[arg(long)]
    flows: Option<usize>,
    /// Allocations of the scene memory
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u16).range(1..=16_000))]
    allocations: u16,
    /// Packets kept under way, instead of the scene's own number; halved while more than 0.5 % are lost
    #[arg(long)]
    window: Option<usize>,
    /// Packets a second, instead of as many as arrive
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,
    /// What the floor does to one packet of a hundred: shows that it is noticed
    #[arg(long, value_enum)]
    tamper: Option<floor::Tamper>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Write tests/results/bench.{txt,json,svg}
    #[arg(long)]
    save: bool,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    match &cli.command {
        Some(Command::Floor(args)) => floor::run(args),
        None => measure(&cli.options),
    }
}

fn measure(options: &Options) -> Result<()> {
    ensure!(options.seconds > 0.0 && options.seconds <= 600.0, "--seconds: more than 0, at most 600");
    machine::leave_the_core()?;
    raise_descriptor_limit()?;
    let directory = tempfile::Builder::new().prefix("turnpike-bench-").tempdir()?;
    // Nothing of this runs while something is measured.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let scenes = scene::chosen(&options.only)?;
    let names = servers::chosen(&options.servers)?;
    let mut sites = Vec::new();
    for net in [Net::Loopback, Net::Veth] {
        let of_net: Vec<&Scene> = scenes.iter().filter(|scene| scene.net == net).collect();
        if !of_net.is_empty() {
            let plays = |name: &&&str| of_net.iter().any(|scene| servers::can(name, scene));
            let names: Vec<&str> = names.iter().filter(plays).copied().collect();
            let directory = directory.path().join(format!("{net:?}"));
            sites.push(runtime.block_on(Site::open(net, &names, &directory, options.tamper))?);
        }
    }
    let length = Duration::from_secs_f64(options.seconds);
    let mut cells = Vec::new();
    for round in 0..options.rounds {
        for scene in &scenes {
            let scene = adjusted(scene, options);
            let site = sites.iter().find(|site| site.has(&scene)).context("every scene has its site")?;
            for step in 0..site.servers.len() {
                // Nobody is always the one behind the same other.
                let server = &site.servers[(step + round as usize) % site.servers.len()];
                if !servers::can(server.name, &scene) {
                    continue;
                }
                let cell = cell::measure(site, server, &scene, round, length)
                    .with_context(|| format!("{} with {}", scene.name, server.name))?;
                say(&cell.line());
                cells.push(cell);
            }
        }
    }
    drop(sites);
    let mut memories = Vec::new();
    if options.only.is_empty() || options.only.iter().any(|name| name == scene::MEMORY) {
        for name in names.iter().filter(|name| servers::has_memory(name)) {
            let directory = directory.path().join("memory");
            let site = runtime.block_on(Site::open(Net::Loopback, &[*name], &directory, None))?;
            for server in &site.servers {
                let memory =
                    memory::measure(&site, server, options.allocations.into()).with_context(|| name.to_string())?;
                say(&memory.line());
                memories.push(memory);
            }
        }
    }
    let report = Report::new(&scenes, cells, memories, options.seconds);
    let text = if options.json { report.json()? } else { report.table() };
    std::io::stdout().lock().write_all(text.as_bytes())?;
    if options.save {
        let results = repository().join("tests/results");
        fs::create_dir_all(&results)?;
        fs::write(results.join("bench.txt"), report.table())?;
        fs::write(results.join("bench.json"), report.json()?)?;
        fs::write(results.join("bench.svg"), report.picture())?;
    }
    Ok(())
}

fn adjusted(scene: &Scene, options: &Options) -> Scene {
    let mut scene = scene.clone();
    if let Some(flows) = options.flows {
        scene.flows = flows;
    }
    if let Some(rate) = options.rate {
        scene.pace = Pace::Rate(rate);
    }
    if let (Some(window), Pace::Window(own)) = (options.window, &mut scene.pace) {
        *own = window;
    }
    scene
}

/// One line for whoever waits.
fn say(line: &str) {
    // Nobody reads it: as good.
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}
