//! The documentation's blocks of commands, run as they stand: bash reads them, section by section, each in a directory of
//! its own. Every program they call is stage/record, which writes down how it was called. It runs `turnctl`, against a
//! cluster, and what else can be done on one machine; the rest is checked here, call by call. Bash finds no other program:
//! a command that nothing here knows fails the test.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::CommandFactory as _;
use harness::cluster::{Cluster, Controller, HTTP, RelayOptions, Store, binary, repository, target_directory};
use harness::place::Place;
use harness::{Host, eventually, run_within};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::documents::pages;
use crate::members::objects;

/// What takes too long, or too much, to be run from here, and who runs it: the first words, the file, what stands in it.
const RUN_BY: &[(&str, &str, &str)] = &[
    ("deploy/local/up", "tests/e2e/local.rs", "fn the_readme_s_first_command_ends_in_a_call"),
    ("docker build", "tests/deploy/images", "buildah bud"),
    ("docker compose", "tests/deploy/images", "compose up --detach"),
    ("etcdctl snapshot restore", "tests/e2e/disaster.rs", "fn a_snapshot_brings_back_nothing_that_has_ended"),
    ("grpcurl", "controller/tests/push.rs", ".watch("),
    ("turnctl --controller", "tests/deploy/manifests.rs", "--controller"),
    ("turnctl abuse", "tests/abuse/main.rs", "fn abuse"),
    ("turnctl bench", "tests/load/main.rs", "mod counting"),
    ("turnctl conform", "tests/abuse/main.rs", "fn conformance"),
    ("turnutils_uclient", "tests/interop/uclient.rs", "fn the_readme_s_relay_alone_serves_coturn_s_client"),
    ("tests/bench", ".ci/long", "tests/bench"),
    ("tests/profile", ".ci/long", "tests/profile"),
    ("tests/run", ".ci/run", "tests/run"),
];
/// Programs that the documentation may call.
const PROGRAMS: &[&str] = &[
    "controller",
    "curl",
    "docker",
    "etcdctl",
    "grpcurl",
    "kubectl",
    "openssl",
    "relay-node",
    "turnctl",
    "turnutils_uclient",
    "deploy/local/up",
    "tests/bench",
    "tests/profile",
    "tests/run",
];
/// Words that stand for one of the reader's own.
const STANDS_FOR: &[(&str, &str)] = &[("ADDR", "127.0.0.1")];

#[test]
fn every_block_of_commands_runs() -> Result<()> {
    run_within(Duration::from_secs(240), async |test| {
        let mut cluster = Cluster::new(test.path())?;
        let controller = cluster.controller(&Place::on_loopback(2), Store::Embedded, "").await?;
        let mut relays = Vec::new();
        for (number, (id, region)) in (11..).zip([("eu-1", "eu"), ("eu-2", "eu"), ("us-1", "us")]) {
            let options = RelayOptions { more: "backbone = {}".to_owned(), ..RelayOptions::in_region(region) };
            relays.push(cluster.relay(id, &Place::on_loopback(number), &options).await?);
        }
        let mut checked = BTreeMap::<String, usize>::new();
        for page in pages()? {
            let name = page.strip_prefix(repository())?.display().to_string();
            for (number, section) in sections(&fs::read_to_string(&page)?).context(name.clone())?.iter().enumerate() {
                let stage = test.directory(&format!("stage/{}-{number}", name.replace('/', "-")))?;
                let at = format!("{name}:{}", section.line);
                for call in rehearse(&cluster, &stage, section).await.context(at.clone())? {
                    check(&controller, &call).await.with_context(|| format!("{at}: {}", call.join(" ")))?;
                    *checked.entry(call[0].clone()).or_default() += 1;
                }
                for file in section.files.iter().filter(|file| file.is_whole()) {
                    file.check(&stage).context(at.clone())?;
                    *checked.entry(file.name.clone()).or_default() += 1;
                }
            }
        }
        test.figure("commands of the documentation", format!("{checked:?}"));
        ensure!(checked["turnctl"] > 40 && checked["kubectl"] > 10, "too few were found: {checked:?}");
        ensure!(checked["controller.toml"] + checked["relay.toml"] > 1, "too few were found: {checked:?}");
        Ok(())
    })
}

/// The commands between two headings of the second level.
struct Section {
    /// Where the first block begins.
    line: usize,
    commands: String,
    files: Vec<File>,
}

/// A configuration, which a comment in its first line names.
struct File {
    name: String,
    text: String,
}

impl File {
    /// Whether it is more than what is to be added to one.
    fn is_whole(&self) -> bool {
        self.text.lines().any(|line| line.starts_with("id = ") || line.starts_with("node_id = "))
    }

    /// Whether the program takes it, beside what the section's commands have made.
    fn check(&self, stage: &Path) -> Result<()> {
        fs::write(stage.join(&self.name), &self.text)?;
        let program = if self.name == "controller.toml" { "controller" } else { "relay-node" };
        let mut command = Command::new(binary(program)?);
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TURNPIKE_")) {
            command.env_remove(name);
        }
        let output = command.args(["--check-config", "--config", &self.name]).current_dir(stage).output()?;
        ensure!(output.status.success(), "{}: {}", self.name, String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

fn sections(page: &str) -> Result<Vec<Section>> {
    let mut sections: Vec<Section> = Vec::new();
    let (mut fence, mut begins, mut is_named) = (None::<String>, true, false);
    for (number, line) in (1..).zip(page.lines()) {
        let text = line.trim_start();
        match (text.strip_prefix("```"), &fence) {
            (Some(language), None) => {
                ensure!(!language.is_empty(), "line {number}: a block that does not say what it is");
                if is_shell(language) && std::mem::take(&mut begins) {
                    sections.push(Section { line: number, commands: String::new(), files: Vec::new() });
                }
                fence = Some(language.to_owned());
                is_named = false;
            }
            (Some(_), Some(_)) => fence = None,
            (None, Some(language)) if is_shell(language) => {
                let section = sections.last_mut().context("a block")?;
                section.commands += text;
                section.commands += "\n";
            }
            (None, Some(language)) if language == "toml" => {
                let Some(section) = sections.last_mut() else { continue };
                if let Some(name) = text.strip_prefix("# ").filter(|name| name.ends_with(".toml")) {
                    section.files.push(File { name: name.to_owned(), text: String::new() });
                    is_named = true;
                } else if let Some(file) = section.files.last_mut().filter(|_| is_named) {
                    file.text += text;
                    file.text += "\n";
                }
            }
            (None, None) => begins |= line.starts_with("## "),
            (None, Some(_)) => {}
        }
    }
    Ok(sections)
}

fn is_shell(language: &str) -> bool {
    matches!(language, "sh" | "bash" | "console")
}

/// Runs a section; its calls, as bash made them.
async fn rehearse(cluster: &Cluster, stage: &Path, section: &Section) -> Result<Vec<Vec<String>>> {
    let record = repository().join("tests/deploy/stage/record");
    for program in PROGRAMS {
        let link = stage.join(if program.contains('/') { "" } else { "bin" }).join(program);
        fs::create_dir_all(link.parent().context("a directory")?)?;
        std::os::unix::fs::symlink(&record, link)?;
    }
    // Files that the reader is told to bring along.
    for file in ["new-secret", "theirs.json"] {
        fs::write(stage.join(file), "a secret of forty characters for an app.")?;
    }
    let mut commands = section.commands.clone();
    for (word, value) in STANDS_FOR {
        commands = commands.replace(word, value);
    }
    let calls = stage.join("calls");
    fs::write(&calls, "")?;
    let mut bash = Command::new("/bin/bash");
    bash.args(["--noprofile", "--norc", "-euo", "pipefail", "-c"]).arg(commands).current_dir(stage);
    bash.env("PATH", stage.join("bin"));
    bash.env("REHEARSAL_CALLS", &calls).env("REHEARSAL_REPOSITORY", repository()).env("REHEARSAL_KUBECTL", kubectl());
    bash.env("REHEARSAL_PROGRAMS", binary("turnctl")?.parent().context("a directory")?);
    // A machine of the reader's has an address of its own.
    bash.env("TURNPIKE_PUBLIC_IP", "198.51.100.7").envs(cluster.turnctl_variables());
    let output = Host::Machine.output(bash).await?;
    let said = [output.stdout, output.stderr].concat();
    ensure!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&said));
    let calls = fs::read_to_string(&calls)?;
    let words = |call: &str| call.split_terminator('\x1f').map(str::to_owned).collect();
    Ok(calls.split_terminator('\x1e').map(words).collect())
}

/// What the recorder could not check by itself.
async fn check(controller: &Controller, call: &[String]) -> Result<()> {
    let words: Vec<&str> = call.iter().map(String::as_str).collect();
    match words[..] {
        ["turnctl", ..] => drop(turnctl::command().try_get_matches_from(&words)?),
        ["controller", ..] => drop(controller::config::command().try_get_matches_from(&words)?),
        ["deploy/local/up", ..] => drop(turnpike_local::arguments::Arguments::command().try_get_matches_from(&words)?),
        ["kubectl", ref rest @ ..] => kubectl_knows(rest)?,
        ["etcdctl", ref rest @ ..] => knows(Command::new("etcdctl").args(rest))?,
        ["docker", "build", ref rest @ ..] => image(rest)?,
        ["docker", "compose", ref rest @ ..] => compose(rest)?,
        ["curl", "-N", url] => hear(controller, url).await?,
        ["grpcurl", .., method] => served(method)?,
        ["tests/run", "-E", filter] => chosen(filter)?,
        ["tests/bench", ref rest @ ..] => knows(Command::new(env!("CARGO_BIN_EXE_bench")).args(rest))?,
        // The recorder has run it, or somebody else does.
        ["relay-node" | "openssl" | "turnutils_uclient" | "tests/run" | "tests/profile", ..] => {}
        _ => bail!("no rule knows it"),
    }
    let line = words.join(" ");
    for (begins, file, holds) in RUN_BY.iter().filter(|(begins, ..)| line.starts_with(begins)) {
        let text = fs::read_to_string(repository().join(file)).with_context(|| (*file).to_owned())?;
        ensure!(text.contains(holds), "{begins}: {file} does not hold {holds:?} any more");
    }
    Ok(())
}

/// That of tests/deploy/check, or the machine's.
fn kubectl() -> PathBuf {
    let installed = target_directory().join("tools/deploy/bin/kubectl");
    if installed.is_file() { installed } else { "kubectl".into() }
}

/// Whether a program takes these arguments, which it reads up to `--help`.
fn knows(command: &mut Command) -> Result<()> {
    let output = command.arg("--help").env("ETCDCTL_API", "3").output().context("it is not installed")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Whether kubectl has such a subcommand with these flags.
pub(crate) fn kubectl_takes(words: &[&str]) -> Result<()> {
    // The text may speak of the flag alone.
    let directory = words.last().filter(|last| **last == "-k").map(|_| ".");
    knows(Command::new(kubectl()).args(words).args(directory))
}

/// The same, and whether the objects that are named are in an overlay.
fn kubectl_knows(words: &[&str]) -> Result<()> {
    let own = words.iter().take_while(|word| **word != "--").copied().collect::<Vec<_>>();
    kubectl_takes(&own)?;
    let mut names = own.clone();
    if let Some(at) = names.iter().position(|word| *word == "-n") {
        names.drain(at..at + 2.min(names.len() - at));
    }
    match names[..] {
        // The recorder has rendered and made them.
        ["apply", "-k", _] | ["create", "secret", "generic", ..] | ["get", ..] | ["label", "node", ..] => {}
        ["scale", "statefulset", name, replicas] => {
            ensure!(replicas.starts_with("--replicas="), "{replicas}");
            workload(&format!("statefulset/{name}"))?;
        }
        ["rollout", "status" | "restart" | "undo", object] => drop(workload(object)?),
        ["set", "env", object, variable] => {
            let workload = workload(object)?;
            let variables = workload["spec"]["template"]["spec"]["containers"][0]["env"].as_array().context("env")?;
            let (name, _) = variable.split_once('=').context("NAME=VALUE")?;
            ensure!(variables.iter().any(|variable| variable["name"] == name), "{object} has no {name}");
        }
        ["port-forward", pod, port] => {
            let container = pod_of(pod)?["spec"]["template"]["spec"]["containers"][0].clone();
            let ports = container["ports"].as_array().context("ports")?;
            let wanted: u64 = port.parse()?;
            ensure!(ports.iter().any(|open| open["containerPort"] == wanted), "{pod} has no port {port}");
        }
        ["exec", pod] => {
            let container = pod_of(pod)?["spec"]["template"]["spec"]["containers"][0].clone();
            let inside = &words[own.len() + 1..];
            for path in inside.iter().filter_map(|word| word.split_once("=/")) {
                let path = format!("/{}", path.1);
                let mounts = container["volumeMounts"].as_array().context("volumeMounts")?;
                let is_below = |mount: &Value| mount["mountPath"].as_str().is_some_and(|at| path.starts_with(at));
                ensure!(mounts.iter().any(is_below), "{pod} has no {path}");
            }
            let (program, arguments) = inside.split_first().context("a command")?;
            knows(Command::new(program).args(arguments))?;
        }
        _ => bail!("no rule knows it"),
    }
    Ok(())
}

/// The object `KIND/NAME` of an overlay.
fn workload(named: &str) -> Result<Value> {
    let (kind, name) = named.split_once('/').context("KIND/NAME")?;
    for overlay in ["dev", "single-region", "multi-region"] {
        let is_it = |object: &Value| {
            object["metadata"]["name"] == name
                && object["kind"].as_str().is_some_and(|is| is.eq_ignore_ascii_case(kind))
        };
        if let Some(found) = objects(overlay)?.into_iter().find(is_it) {
            return Ok(found);
        }
    }
    bail!("no overlay has {named}")
}

/// The StatefulSet of a pod `NAME-NUMBER`.
fn pod_of(pod: &str) -> Result<Value> {
    let (name, number) = pod.rsplit_once('-').context("NAME-NUMBER")?;
    let set = workload(&format!("statefulset/{name}"))?;
    let replicas = set["spec"]["replicas"].as_u64().unwrap_or(1);
    ensure!(number.parse::<u64>()? < replicas, "{name} has {replicas} pods");
    Ok(set)
}

/// `-f FILE --target STAGE -t NAME:TAG DIRECTORY`: the images of the compose file, by stages that exist.
fn image(words: &[&str]) -> Result<()> {
    let ["-f", file, "--target", stage, "-t", tag, "."] = words else { bail!("no rule knows it") };
    let written = fs::read_to_string(repository().join(file))?;
    ensure!(written.lines().any(|line| line.ends_with(&format!(" AS {stage}"))), "{file} has no stage {stage}");
    let compose = fs::read_to_string(repository().join("deploy/compose.yaml"))?;
    let (name, version) = tag.split_once(':').context("NAME:TAG")?;
    let image = format!("image: {name}:${{TURNPIKE_VERSION:-{version}}}");
    ensure!(compose.contains(&image), "the compose file does not use {tag}");
    Ok(())
}

/// `-f FILE [--profile NAME] up --detach`, or `run --rm SERVICE ARGUMENTS`.
fn compose(words: &[&str]) -> Result<()> {
    let ["-f", file, rest @ ..] = words else { bail!("no rule knows it") };
    let written: Value = serde_yaml_ng::from_str(&fs::read_to_string(repository().join(file))?)?;
    let (profile, rest) = match rest {
        ["--profile", profile, rest @ ..] => (Some(*profile), rest),
        rest => (None, rest),
    };
    match rest {
        ["up", "--detach"] => {}
        ["run", "--rm", service, arguments @ ..] => {
            let of = &written["services"][service];
            ensure!(
                of["entrypoint"].is_null() && of["image"].as_str().is_some_and(|image| image.contains(service)),
                "{of}"
            );
            ensure!(profile.is_none_or(|profile| of["profiles"][0] == profile), "{of}");
            turnctl::command().try_get_matches_from([&[*service], arguments].concat())?;
        }
        _ => bail!("no rule knows it"),
    }
    Ok(())
}

/// Asks the controller of the test for what a URL of 127.0.0.1:8080 names, and hears the first event.
async fn hear(controller: &Controller, url: &str) -> Result<()> {
    let path = url.strip_prefix("http://127.0.0.1:8080").context("a URL of the local cluster's controller")?;
    let address = controller.place.at(HTTP);
    eventually("the events begin", Duration::from_secs(5), async || {
        let mut stream = tokio::net::TcpStream::connect(address).await?;
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n").as_bytes()).await?;
        let mut heard = vec![0; 1 << 16];
        let mut length = 0;
        while !String::from_utf8_lossy(&heard[..length]).contains("\nevent: relays\n") {
            let more = tokio::time::timeout(Duration::from_secs(2), stream.read(&mut heard[length..])).await??;
            ensure!(more > 0, "{}", String::from_utf8_lossy(&heard[..length]));
            length += more;
        }
        Ok(())
    })
    .await?;
    Ok(())
}

/// `turnpike.v1.SERVICE/METHOD` is in the contracts.
fn served(method: &str) -> Result<()> {
    let (service, method) = method.rsplit_once('/').context("SERVICE/METHOD")?;
    let service = service.strip_prefix("turnpike.v1.").context("turnpike.v1")?;
    let file = repository().join(format!("proto/turnpike/v1/{}.proto", service.to_lowercase()));
    let contract = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    ensure!(
        contract.contains(&format!("service {service} ")) && contract.contains(&format!("rpc {method}(")),
        "{method}"
    );
    Ok(())
}

/// `test(NAME)` chooses a test that there is.
fn chosen(filter: &str) -> Result<()> {
    let name = filter.strip_prefix("test(").and_then(|rest| rest.strip_suffix(')')).context("test(NAME)")?;
    let mut grep = Command::new("grep");
    grep.args(["--recursive", "--quiet", "--include=*.rs", &format!("fn {name}\\b"), "tests"]);
    ensure!(grep.current_dir(repository()).status()?.success(), "there is no test {name}");
    Ok(())
}
