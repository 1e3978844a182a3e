//! The catalogue of metrics: written from what the binaries describe, used by dashboards and alerts, true for what they serve.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::sync::Mutex;

use anyhow::{Context as _, Result, ensure};
use harness::cluster::{binary, repository};
use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use tempfile::tempdir;

use crate::members::{answer, free, own_ip, text, turnctl};

/// Takes down what is described.
#[derive(Default)]
struct Descriptions(Mutex<BTreeMap<String, (&'static str, String)>>);

impl Descriptions {
    fn add(&self, kind: &'static str, name: &KeyName, description: &SharedString) {
        let mut all = self.0.lock().expect("whole");
        let before = all.insert(name.as_str().to_owned(), (kind, description.to_string()));
        assert!(before.is_none(), "{} is described twice", name.as_str());
    }

    fn of(describe: fn()) -> BTreeMap<String, (&'static str, String)> {
        let descriptions = Self::default();
        metrics::with_local_recorder(&descriptions, describe);
        descriptions.0.into_inner().expect("whole")
    }
}

impl Recorder for Descriptions {
    fn describe_counter(&self, name: KeyName, _: Option<Unit>, description: SharedString) {
        self.add("counter", &name, &description);
    }

    fn describe_gauge(&self, name: KeyName, _: Option<Unit>, description: SharedString) {
        self.add("gauge", &name, &description);
    }

    fn describe_histogram(&self, name: KeyName, _: Option<Unit>, description: SharedString) {
        self.add("histogram", &name, &description);
    }

    fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
        Counter::noop()
    }

    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

fn all() -> BTreeMap<String, (&'static str, String)> {
    let mut all = Descriptions::of(relay_node::metrics::describe);
    all.extend(Descriptions::of(controller::metrics::describe));
    all
}

#[test]
fn the_catalogue_is_what_the_binaries_describe() -> Result<()> {
    let mut page = String::from(
        "# Metrics\n\nWritten by `TURNPIKE_BLESS=1 cargo nextest run -p turnpike-tests -E 'test(catalogue)'` from what the binaries \
         describe. A histogram has `_bucket`, `_sum` and `_count`.\n",
    );
    for (title, describe) in
        [("Relays", relay_node::metrics::describe as fn()), ("Controllers", controller::metrics::describe as fn())]
    {
        write!(page, "\n## {title}\n\n| metric | kind | meaning |\n|---|---|---|\n")?;
        for (name, (kind, description)) in Descriptions::of(describe) {
            writeln!(page, "| `{name}` | {kind} | {description} |")?;
        }
    }
    let file = repository().join("deploy/observability/metrics.md");
    if std::env::var_os("TURNPIKE_BLESS").is_some() {
        std::fs::write(&file, &page)?;
    }
    let written = std::fs::read_to_string(&file)?;
    for (ours, theirs) in page.lines().zip(written.lines()) {
        ensure!(
            ours == theirs,
            "metrics.md says\n{theirs}\nwhere it should be\n{ours}\nits first lines say how it is written"
        );
    }
    ensure!(
        page == written,
        "metrics.md is longer or shorter than it should be; its first lines say how it is written"
    );
    Ok(())
}

#[test]
fn dashboards_and_alerts_use_what_is_there() -> Result<()> {
    let known = all();
    let observability = repository().join("deploy/observability");
    let mut files = vec![observability.join("alerts.yaml"), observability.join("runbooks.md")];
    for file in std::fs::read_dir(observability.join("dashboards"))? {
        files.push(file?.path());
    }
    ensure!(files.len() >= 5, "{files:?}");
    let mut used = 0;
    for file in files {
        let content = std::fs::read_to_string(&file)?;
        for word in content.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')) {
            if !word.starts_with("turn_") && !word.starts_with("turnpike_controller_") {
                continue;
            }
            let histogram = ["_bucket", "_sum", "_count"].iter().find_map(|end| word.strip_suffix(end));
            let name = histogram.filter(|name| known.get(*name).is_some_and(|(kind, _)| *kind == "histogram"));
            let name = name.unwrap_or(word);
            ensure!(known.contains_key(name), "{}: no binary describes {word}", file.display());
            used += 1;
        }
    }
    ensure!(used > 50, "{used} metrics were found in them");
    Ok(())
}

#[test]
fn what_is_served_is_in_the_catalogue() -> Result<()> {
    let directory = tempdir()?;
    let (at, ip) = (|name: &str| text(&directory.path().join(name)), own_ip()?);
    turnctl(&["ca", "init", &at("pki")])?;
    turnctl(&["ca", "issue", &at("pki"), "--controller", "c"])?;
    let (grpc, http) = (free(Ipv4Addr::LOCALHOST)?, free(Ipv4Addr::LOCALHOST)?);
    let mut relay = Command::new(binary("relay-node")?)
        .args(["--node-id=lab", "--region=lab", "--allow-loopback-peers", "--static-users=alice:secret"])
        .args([
            format!("--state-dir={}", at("relay")),
            format!("--listen=udp://{ip}:3478"),
            format!("--http={ip}:9478"),
        ])
        .stdin(Stdio::null())
        .spawn()?;
    let mut controller = Command::new(binary("controller")?)
        .args(["--id=c", "--region=lab", "--store-kind=embedded"])
        .args([format!("--store-path={}", at("store")), format!("--grpc={grpc}"), format!("--http={http}")])
        .args([format!("--tls-ca={}", at("pki/ca.pem")), format!("--tls-certificate={}", at("pki/controller-c.pem"))])
        .arg(format!("--tls-key={}", at("pki/controller-c.key")))
        .stdin(Stdio::null())
        .spawn()?;
    let served = (|| {
        answer((ip, 9478).into(), "/readyz")?;
        answer(http, "/readyz")?;
        Ok::<_, anyhow::Error>([answer((ip, 9478).into(), "/metrics")?, answer(http, "/metrics")?])
    })();
    for process in [&mut relay, &mut controller] {
        process.kill()?;
        process.wait()?;
    }
    let known = all();
    for (page, sign) in served?.iter().zip(["turn_build_info", "turnpike_controller_build_info"]) {
        ensure!(page.contains(sign), "{page}");
        for line in page.lines() {
            let Some(rest) = line.strip_prefix("# TYPE ") else { continue };
            let (name, kind) = rest.split_once(' ').context("name and type")?;
            let (expected, _) = known.get(name).with_context(|| format!("{name} is served and not described"))?;
            ensure!(kind == *expected, "{name} is a {kind}, described as a {expected}");
        }
    }
    Ok(())
}
