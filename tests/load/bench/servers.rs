//! The servers that are compared, each on [`SERVER_CORE`] and as a user would run it.

use std::any::Any;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use harness::cluster::{Cluster, RelayOptions, Store, TURN};
use harness::coturn::{Coturn, Flavour, binding};
use harness::eventually;
use harness::place::Place;
use harness::process::{Around, Process};
use turnctl::bench::{Account, Mode};

use crate::floor::Tamper;
use crate::machine::SERVER_CORE;
use crate::scene::{Scene, What};

/// Threads of coturn.
const COTURN_THREADS: u16 = 4;

/// What can be compared, in the order of the table.
pub(crate) const KNOWN: &[&str] = &[
    "relay",
    "relay-two",
    "relay-wildcard",
    "coturn",
    "coturn-new",
    "coturn-mux",
    "turn-rs",
    "floor",
    "floor-wildcard",
    "backbone",
    "plain-udp",
    "coturn-two",
];

/// Last octets of the addresses of second servers.
const FAR: [u8; 3] = [101, 102, 103];

/// Those of these names; all without any.
pub(crate) fn chosen(names: &[String]) -> Result<Vec<&'static str>> {
    if let Some(unknown) = names.iter().find(|name| !KNOWN.contains(&name.as_str())) {
        bail!("{unknown} is none of {}", KNOWN.join(", "));
    }
    let wanted = |known: &&str| names.is_empty() || names.iter().any(|name| name == known);
    Ok(KNOWN.iter().copied().filter(wanted).collect())
}

/// A running server.
pub(crate) struct Server {
    pub(crate) name: &'static str,
    pub(crate) address: SocketAddr,
    pub(crate) account: Account,
    pub(crate) pid: u32,
    /// The other one of two.
    pub(crate) far: Option<Far>,
    /// Its processes: they run until this is dropped.
    _runs: Box<dyn Any>,
}

/// A second server.
pub(crate) struct Far {
    pub(crate) address: SocketAddr,
    pub(crate) account: Account,
    pub(crate) pid: u32,
}

/// Whether a server can do that at all.
pub(crate) fn can(name: &str, scene: &Scene) -> bool {
    match name {
        "backbone" | "plain-udp" | "coturn-two" => scene.across,
        _ if scene.across => false,
        // Two workers on one core: for what passes from one to the other.
        "relay-two" => scene.mode == Mode::Pair,
        // It relays to its own clients only.
        "turn-rs" => scene.mode == Mode::Pair || scene.what == What::Allocations,
        // All relayed addresses are one: a pair cannot be told from another.
        "coturn-mux" => scene.mode != Mode::Pair,
        // It looks up and forwards.
        "floor" | "floor-wildcard" => !scene.transport.is_stream() && scene.what == What::Packets,
        _ => true,
    }
}

/// Whether what its idle allocations cost is known nowhere else.
pub(crate) fn has_memory(name: &str) -> bool {
    !matches!(name, "floor" | "floor-wildcard" | "relay-two" | "backbone" | "plain-udp" | "coturn-two")
}

/// Starts a server; nothing where this machine does not have it.
pub(crate) async fn start(
    name: &'static str,
    place: &Place,
    directory: &Path,
    tamper: Option<Tamper>,
) -> Result<Option<Server>> {
    let directory = &directory.join(name);
    std::fs::create_dir_all(directory)?;
    let named = |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let server = match name {
        "relay" => relay(name, place, directory, 1, "").await?,
        "relay-two" => relay(name, place, directory, 2, "").await?,
        "relay-wildcard" => relay(name, place, directory, 1, "relayed = \"wildcard\"").await?,
        "coturn" => coturn(name, place, directory, PathBuf::from("turnserver"), &[]).await?,
        "coturn-new" | "coturn-mux" => {
            let Some(program) = named("TURNPIKE_COTURN") else { return Ok(None) };
            let more: &[&str] = if name == "coturn-mux" { &["--multiplex-peer", "--udp-gso"] } else { &[] };
            if !more.iter().all(|flag| knows(&program, flag)) {
                return Ok(None);
            }
            coturn(name, place, directory, program, more).await?
        }
        "turn-rs" => {
            let Some(program) = named("TURNPIKE_TURN_RS") else { return Ok(None) };
            turn_rs(name, place, directory, program).await?
        }
        "backbone" => relays(name, [place, &Place::on_loopback(FAR[0])], directory, "backbone = {}").await?,
        "plain-udp" => relays(name, [place, &Place::on_loopback(FAR[1])], directory, "").await?,
        "coturn-two" => coturns(name, [place, &Place::on_loopback(FAR[2])], directory).await?,
        "floor" => floor(name, place, directory, tamper, false).await?,
        "floor-wildcard" => floor(name, place, directory, tamper, true).await?,
        unknown => bail!("{unknown} is none of {}", KNOWN.join(", ")),
    };
    Ok(Some(server))
}

fn pinned() -> Vec<OsString> {
    ["taskset", "--cpu-list", &SERVER_CORE.to_string()].map(OsString::from).to_vec()
}

fn account(username: &str, password: &str) -> Account {
    Account { username: username.into(), password: password.into() }
}

/// A relay as it is shipped: a controller with the embedded store, journal, reports and accounting.
async fn relay(name: &'static str, place: &Place, directory: &Path, workers: u16, more: &str) -> Result<Server> {
    let mut cluster = Cluster::new(directory)?;
    let controller = cluster.controller(place, Store::Embedded, "").await?;
    let relay = cluster.relay("eu-1", place, &options("eu", workers, more)).await?;
    let login = controller.login("bench").await?;
    let account = account(&login.username, &login.password);
    let (address, pid) = (relay.address(), relay.pid()?);
    Ok(Server { name, address, account, pid, far: None, _runs: Box::new((relay, controller)) })
}

fn options(region: &str, workers: u16, more: &str) -> RelayOptions {
    RelayOptions {
        around: Around { prefix: pinned(), variables: Vec::new() },
        workers,
        // All clients come from one prefix.
        more: format!("{more}\n[limits]\nstrangers_per_prefix = 0"),
        ..RelayOptions::in_region(region)
    }
}

/// Two relays of one cluster, in two regions; joined, where they have a backbone.
async fn relays(name: &'static str, [near, far]: [&Place; 2], directory: &Path, more: &str) -> Result<Server> {
    let mut cluster = Cluster::new(directory)?;
    let controller = cluster.controller(near, Store::Embedded, "").await?;
    let first = cluster.relay("eu-1", near, &options("eu", 1, more)).await?;
    let second = cluster.relay("us-1", far, &options("us", 1, more)).await?;
    if !more.is_empty() {
        eventually("the two are joined", Duration::from_secs(20), async || {
            for relay in [&first, &second] {
                let up = relay.metric("turn_backbone_link", "").await?;
                anyhow::ensure!(up == 1.0, "{up} links");
            }
            Ok(())
        })
        .await?;
    }
    let login = controller.login("bench").await?;
    let account = account(&login.username, &login.password);
    let far = Far { address: second.address(), account: account.clone(), pid: second.pid()? };
    let (address, pid) = (first.address(), first.pid()?);
    Ok(Server { name, address, account, pid, far: Some(far), _runs: Box::new((first, second, controller)) })
}

async fn coturn(
    name: &'static str,
    place: &Place,
    directory: &Path,
    program: PathBuf,
    more: &[&str],
) -> Result<Server> {
    let around = Around { prefix: pinned(), variables: Vec::new() };
    let more = more.iter().map(ToString::to_string).collect();
    let flavour = Flavour { program, threads: COTURN_THREADS, around, more };
    let coturn = Coturn::start_as(place, directory, &flavour).await?;
    let login = coturn.login()?;
    let (address, pid) = (coturn.address(), coturn.pid());
    let account = account(&login.username, &login.password);
    Ok(Server { name, address, account, pid, far: None, _runs: Box::new(coturn) })
}

async fn coturns(name: &'static str, [near, far]: [&Place; 2], directory: &Path) -> Result<Server> {
    let (in_near, in_far) = (directory.join("near"), directory.join("far"));
    for directory in [&in_near, &in_far] {
        std::fs::create_dir_all(directory)?;
    }
    let program = || PathBuf::from("turnserver");
    let first = coturn(name, near, &in_near, program(), &[]).await?;
    let second = coturn(name, far, &in_far, program(), &[]).await?;
    let Server { address, account, pid, .. } = first;
    let far = Far { address: second.address, account: second.account, pid: second.pid };
    Ok(Server { name, address, account, pid, far: Some(far), _runs: Box::new((first._runs, second._runs)) })
}

/// Whether the help of a program names a flag.
fn knows(program: &Path, flag: &str) -> bool {
    let told = Command::new(program).arg("--help").output();
    told.is_ok_and(|told| [told.stdout, told.stderr].iter().any(|text| String::from_utf8_lossy(text).contains(flag)))
}

async fn turn_rs(name: &'static str, place: &Place, directory: &Path, program: PathBuf) -> Result<Server> {
    let address = place.at(TURN);
    let config = directory.join("turn-rs.toml");
    let text = format!(
        "[server]\nrealm = \"bench\"\nmax-threads = 1\n\n[[server.interfaces]]\ntransport = \"udp\"\n\
         listen = \"{address}\"\nexternal = \"{address}\"\n\n[auth.static-credentials]\nbench = \"bench\"\n\n[log]\nlevel = \"warn\"\n"
    );
    std::fs::write(&config, text)?;
    let mut command = Around { prefix: pinned(), variables: Vec::new() }.command(program);
    command.arg("--config").arg(config);
    ready(name, place, account("bench", "bench"), directory, command).await
}

async fn floor(
    name: &'static str,
    place: &Place,
    directory: &Path,
    tamper: Option<Tamper>,
    wildcard: bool,
) -> Result<Server> {
    let address = place.at(TURN);
    let own = std::env::current_exe().context("the path of this program")?;
    let mut command = Around { prefix: pinned(), variables: Vec::new() }.command(own);
    command.arg("floor").arg("--listen").arg(address.to_string());
    if wildcard {
        command.arg("--wildcard");
    }
    if let Some(tamper) = tamper.and_then(|tamper| tamper.to_possible_value()) {
        command.arg("--tamper").arg(tamper.get_name());
    }
    ready(name, place, account("bench", "bench"), directory, command).await
}

/// Starts it and waits until it answers.
async fn ready(
    name: &'static str,
    place: &Place,
    account: Account,
    directory: &Path,
    command: Command,
) -> Result<Server> {
    let (mut process, address) = (Process::start(&place.host, directory, name, command)?, place.at(TURN));
    eventually("it answers a Binding request", Duration::from_secs(10), async || {
        process.must_run()?;
        place.host.run(binding(address)).await
    })
    .await?;
    Ok(Server { name, address, account, pid: process.id(), far: None, _runs: Box::new(process) })
}
