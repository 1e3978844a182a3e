//! The local cluster, as the README starts it, and its pages in a browser.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use harness::certificate::trust;
use harness::chromium::{Browser, Page, Surroundings, View};
use harness::cluster::{repository, target_directory};
use harness::picture::Picture;
use harness::{Host, Process, Scenario, eventually, run_within};
use nix::sys::signal::kill;
use nix::unistd::Pid;
use serde_json::Value;

/// How the pages are looked at.
const VIEWS: [View; 4] = [
    View { width: 1280, height: 800, dark: false },
    View { width: 1280, height: 800, dark: true },
    View { width: 390, height: 844, dark: false },
    View { width: 390, height: 844, dark: true },
];

/// A running local cluster.
struct Local {
    process: Process,
    arguments: Vec<String>,
    /// What it wrote when it was ready.
    description: Value,
}

/// `deploy/local/up`, with directory and ports of the test's own, as from a shell.
fn up(arguments: &[String]) -> Command {
    let mut command = Command::new(repository().join("deploy/local/up"));
    command.args(arguments).current_dir(repository()).env("NO_COLOR", "1");
    // What Cargo tells a test about itself makes build scripts run again, and so everything be built anew.
    for (name, _) in std::env::vars_os() {
        let shell_s_own = ["CARGO_TARGET_DIR", "CARGO_HOME"].iter().any(|own| name == *own);
        if name.to_string_lossy().starts_with("CARGO_") && !shell_s_own {
            command.env_remove(name);
        }
    }
    command
}

async fn local(test: &Scenario) -> Result<Local> {
    // Clear of a cluster that somebody runs on the usual ports, of another test, and of the ephemeral ports.
    let offset = 1000 + std::process::id() % 200 * 100;
    let ready = test.file("ready.json");
    let mut arguments = vec!["--port-offset".to_owned(), offset.to_string(), "--dir".to_owned()];
    arguments.push(test.file("cluster").display().to_string());
    let mut command = up(&arguments);
    command.arg("--ready-file").arg(&ready);
    let mut process = Process::start(&Host::Machine, test.path(), "local", command)?;
    let (description, took) = eventually("the local cluster is ready", Duration::from_secs(120), async || {
        process.must_run()?;
        Ok::<Value, anyhow::Error>(serde_json::from_slice(&fs::read(&ready)?)?)
    })
    .await?;
    test.figure("local cluster ready after (built before)", format!("{took:?}"));
    Ok(Local { process, arguments, description })
}

impl Local {
    fn text(&self, key: &str) -> Result<&str> {
        self.description[key].as_str().with_context(|| format!("no {key} in {}", self.description))
    }

    /// Process ids of everything it started.
    fn pids(&self) -> Result<Vec<i32>> {
        let relays = self.description["relays"].as_array().context("no relays")?;
        let members = relays.iter().chain([&self.description["controller"]]);
        members.map(|m| Ok(i32::try_from(m["pid"].as_i64().context("no pid")?)?)).collect()
    }
}

/// A browser that trusts the cluster's authority holds a call by `turns:`.
async fn over_tls(test: &Scenario, local: &Local) -> Result<()> {
    let home = test.directory("home")?;
    trust(Path::new(local.text("ca")?), &home).await?;
    let around = Surroundings { home: Some(home), ..Surroundings::default() };
    let browser = Browser::launch_with(&Host::Machine, test.path(), "trusting", &around).await?;
    let pages = call(&browser, local.text("call_page")?, "secure&transport=tls").await?;
    for page in &pages {
        more_frames(page).await?;
        let pair: Value = page.evaluate("turnpike.pair").await?;
        ensure!(pair["local"]["relayProtocol"] == "tls", "not by TLS: {pair}");
    }
    look_at("call-tls", &pages[0]).await
}

/// Both ends of a call in a room of the call page, connected.
async fn call(browser: &Browser, page: &str, room: &str) -> Result<[Page; 2]> {
    let address = format!("{page}?room={room}&auto=1");
    let pages = [browser.open(&address).await?, browser.open(&address).await?];
    for page in &pages {
        page.wait_for("turnpike.state === 'connected'", Duration::from_secs(30)).await?;
    }
    Ok(pages)
}

async fn more_frames(page: &Page) -> Result<()> {
    let before: u64 = page.evaluate("turnpike.framesDecoded").await?;
    page.wait_for(&format!("turnpike.framesDecoded >= {before} + 20"), Duration::from_secs(20)).await
}

/// Two pages of the call page see each other through the cluster, relayed candidates only; a relay killed in between
/// comes back and nobody redials; the lines that the cluster prints work when pasted; SIGTERM ends it all.
#[test]
fn the_readme_s_first_command_ends_in_a_call() -> Result<()> {
    run_within(Duration::from_secs(300), async |test| {
        let mut local = local(test).await?;
        let browser = Browser::launch(&Host::Machine, test.path(), "browser").await?;
        let pages = call(&browser, local.text("call_page")?, "test").await?;
        for page in &pages {
            more_frames(page).await?;
            let pair: Value = page.evaluate("turnpike.pair").await?;
            ensure!(pair["local"]["type"] == "relay" && pair["remote"]["type"] == "relay", "not relayed: {pair}");
            let connected: u64 = page.evaluate("turnpike.connectMs").await?;
            test.figure("call page connected after", format!("{connected} ms"));
        }
        look_at("call", &pages[0]).await?;
        over_tls(test, &local).await?;
        let lobby = browser.open(local.text("call_page")?).await?;
        look_at("lobby", &lobby).await?;
        let console = browser.open(local.text("console")?).await?;
        console.wait_for("document.querySelectorAll('#allocations tr').length >= 2", Duration::from_secs(10)).await?;
        look_at("console", &console).await?;

        // P2 is for clients over UDP: on a busy machine a way over TCP may be the first that is found, and it ends with the relay.
        for page in &pages {
            page.wait_for("turnpike.pair?.local.relayProtocol === 'udp'", Duration::from_secs(20)).await?;
        }
        let status = page_states(&pages).await?;
        let killed: u64 = pages[0].evaluate("Date.now()").await?;
        for pid in carriers(&local, &pages[0]).await? {
            kill(Pid::from_raw(pid), nix::sys::signal::SIGKILL)?;
        }
        for page in &pages {
            more_frames(page).await?;
        }
        let after = page_states(&pages).await?;
        if after != status {
            bail!("a state changed: {status:?}, then {after:?}; after the kill: {}", since(&pages, killed).await?);
        }

        pasted(&local).await?;
        let second = Host::Machine.output(up(&local.arguments)).await?;
        let said = String::from_utf8_lossy(&second.stderr);
        ensure!(!second.status.success(), "a second cluster started on the same ports");
        ensure!(said.trim_end().lines().count() == 1, "more than a line: {said}");

        let pids = local.pids()?;
        let ended = local.process.terminate(Duration::from_secs(20)).await?;
        ensure!(ended.success(), "the local cluster ended with {ended}");
        for pid in pids {
            ensure!(!Path::new(&format!("/proc/{pid}")).exists(), "process {pid} is still there");
        }
        Ok(())
    })
}

/// Pids of the relays that carry the call of a page.
async fn carriers(local: &Local, page: &Page) -> Result<Vec<i32>> {
    let addresses: Vec<String> = page.evaluate("[turnpike.pair.local.address, turnpike.pair.remote.address]").await?;
    let relays = local.description["relays"].as_array().context("no relays")?;
    let carrying = relays.iter().filter(|r| {
        let address = r["address"].as_str().unwrap_or_default();
        addresses.iter().any(|a| address.starts_with(&format!("{a}:")))
    });
    let pids: Vec<i32> = carrying.filter_map(|r| i32::try_from(r["pid"].as_i64()?).ok()).collect();
    ensure!(!pids.is_empty(), "no relay of this cluster has {addresses:?}");
    Ok(pids)
}

async fn page_states(pages: &[Page; 2]) -> Result<Vec<String>> {
    let mut states = Vec::new();
    for page in pages {
        states.push(page.evaluate("JSON.stringify(turnpike.history.map(h => h.state)) + turnpike.pair.id").await?);
    }
    Ok(states)
}

/// What the pages went through since this time (Unix ms), with milliseconds, and what their module said meanwhile.
async fn since(pages: &[Page; 2], time: u64) -> Result<String> {
    let mut said = String::new();
    for page in pages {
        let script = format!(
            "JSON.stringify([...turnpike.history, ...turnpike.notices].filter(n => n.at > {time}).sort((a, b) => a.at - b.at)\
             .map(({{ at, ...n }}) => ({{ ms: at - {time}, ...n }})))"
        );
        said += &page.evaluate::<String>(&script).await?;
    }
    Ok(said)
}

/// Runs every command line it printed, as it stands, but for those that go on for ever or kill.
async fn pasted(local: &Local) -> Result<()> {
    let text = local.process.output();
    let commands: Vec<&str> = text
        .lines()
        .map(|line| line.split(" #").next().unwrap_or_default().trim())
        .filter(|line| line.contains("turnctl --config") || line.starts_with("turnutils_uclient"))
        .filter(|line| !line.contains("--watch"))
        .collect();
    ensure!(
        commands.iter().any(|c| c.contains("turnctl")) && commands.iter().any(|c| c.contains("uclient")),
        "printed: {text}"
    );
    for line in commands {
        let mut command = Command::new("sh");
        command.arg("-c").arg(line).current_dir(repository());
        let output = Host::Machine.output(command).await?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "`{line}`: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        if line.starts_with("turnutils_uclient") {
            let lost = said
                .lines()
                .rev()
                .find(|l| l.contains("Total lost packets"))
                .ok_or_else(|| anyhow!("no totals: {said}"))?;
            ensure!(lost.contains("Total lost packets 0 "), "`{line}`: {lost}");
        }
    }
    Ok(())
}

/// Screenshots of a page, wide and narrow, light and dark, for people to look at; checked for what can be checked.
async fn look_at(name: &str, page: &Page) -> Result<()> {
    let directory = target_directory().join("screenshots");
    fs::create_dir_all(&directory)?;
    let mut seen = Vec::new();
    for view in VIEWS {
        let png = page.screenshot(view).await?;
        let scheme = if view.dark { "dark" } else { "light" };
        fs::write(directory.join(format!("{name}-{}-{scheme}.png", view.width)), &png)?;
        let picture = Picture::of(&png)?;
        ensure!((picture.width, picture.height) == (view.width, view.height), "{name}, {view:?}: {picture:?}");
        ensure!(picture.colours > 50, "{name}, {view:?} is empty: {picture:?}");
        let overflow: i64 = page.evaluate("document.documentElement.scrollWidth - innerWidth").await?;
        ensure!(overflow <= 0, "{name}, {view:?} is {overflow} px too wide");
        seen.push(picture.luminance);
    }
    for pair in seen.chunks(2) {
        ensure!(pair[0] > pair[1] + 30.0, "{name}: light {:.0} is not lighter than dark {:.0}", pair[0], pair[1]);
    }
    Ok(())
}
