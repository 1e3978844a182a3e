//! The binary as an operator meets it: exit codes, one clear line for what is wrong, readiness, an orderly end.

mod site;

use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use self::site::Pki;

const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn a_good_configuration_is_said_to_be_good() -> Result<()> {
    let pki = Pki::new()?;
    let output = run(&pki, &["--check-config"])?;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(String::from_utf8(output.stdout)?, "the configuration is good\n");
    assert!(!pki.directory.path().join("store").exists(), "checking must not make the store");
    Ok(())
}

#[test]
fn what_is_wrong_with_the_configuration_is_one_line_and_78() -> Result<()> {
    let pki = Pki::new()?;
    pki.issue("relay", "eu-1")?;
    pki.issue("controller", "c2")?;
    let path = |name: &str| pki.directory.path().join(name).display().to_string();
    std::fs::write(path("empty.pem"), "")?;
    std::fs::write(path("unknown.toml"), "lease = 5\nleese = 5\n")?;
    let certificate = |name: &str| format!("--tls-certificate={}", path(name));
    let cases: &[(&str, &[String], &str)] = &[
        ("a value", &["--lease=1".to_owned()], "--lease: lease: must be 2 to 60 seconds"),
        ("an unknown key", &["--config".to_owned(), path("unknown.toml")], "leese: is not a key"),
        ("no such file", &["--config".to_owned(), path("none.toml")], "none.toml: config: cannot be read"),
        ("no such CA", &[format!("--tls-ca={}", path("none.pem"))], "tls.ca: "),
        ("no such certificate", &[certificate("none.pem")], "none.pem: No such file"),
        ("an empty certificate", &[certificate("empty.pem")], "holds no certificate"),
        ("a relay's certificate", &[certificate("relay-eu-1.pem")], "is made out to relay/eu-1, not to controller/c1"),
        ("another controller's", &[certificate("controller-c2.pem")], "made out to controller/c2"),
        ("no such key", &[format!("--tls-key={}", path("none.key"))], "tls.key: "),
        ("another's key", &[format!("--tls-key={}", path("relay-eu-1.key"))], "tls.key: "),
        (
            "etcd's CA",
            &[format!("--store={{kind=\"etcd\",endpoints=[\"https://a:1\"],ca={:?}}}", path("none.pem"))],
            "store.ca: ",
        ),
    ];
    for (what, flags, expected) in cases {
        for check in [true, false] {
            let mut flags: Vec<&str> = flags.iter().map(String::as_str).collect();
            flags.extend(check.then_some("--check-config"));
            let output = run(&pki, &flags)?;
            let line = String::from_utf8(output.stderr)?;
            assert_eq!(output.status.code(), Some(78), "{what}: {line}");
            assert_eq!(line.lines().count(), 1, "{what}: {line}");
            assert!(line.starts_with("controller: ") && line.contains(expected), "{what}: {line}");
        }
    }
    Ok(())
}

#[test]
fn the_environment_is_read_and_flags_win() -> Result<()> {
    let pki = Pki::new()?;
    let output = command(&pki, &["--check-config"]).env("TURNPIKE_CONTROLLER_LEASE", "1").output()?;
    let line = String::from_utf8(output.stderr)?;
    assert_eq!(output.status.code(), Some(78));
    assert!(line.contains("TURNPIKE_CONTROLLER_LEASE: lease: must be"), "{line}");
    let output = command(&pki, &["--check-config", "--lease=9"]).env("TURNPIKE_CONTROLLER_LEASE", "1").output()?;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    Ok(())
}

#[test]
fn a_port_in_use_is_named() -> Result<()> {
    let pki = Pki::new()?;
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?.to_string();
    for key in ["grpc", "http"] {
        let output = run(&pki, &[&format!("--{key}={address}"), "--log=off"])?;
        let line = String::from_utf8(output.stderr)?;
        assert_eq!(output.status.code(), Some(1), "{line}");
        assert!(line.contains(&format!("cannot listen on {address} ({key})")), "{line}");
        assert_eq!(line.lines().count(), 1, "{line}");
    }
    Ok(())
}

#[test]
fn an_embedded_store_that_cannot_be_opened_ends_the_start() -> Result<()> {
    let pki = Pki::new()?;
    let output = run(&pki, &["--store-path=/nonexistent/store", "--log=off"])?;
    let line = String::from_utf8(output.stderr)?;
    assert_eq!(output.status.code(), Some(1), "{line}");
    assert!(line.contains("/nonexistent/store"), "{line}");
    assert_eq!(line.lines().count(), 1, "{line}");
    Ok(())
}

#[tokio::test]
async fn it_gets_ready_and_stops_in_order_with_streams_open() -> Result<()> {
    let pki = Pki::new()?;
    let mut controller = Controller::start(&pki, &[])?;
    let mut log = controller.until("the controller is ready")?;
    assert!(log.iter().any(|line| line["fields"]["message"].as_str().is_some_and(|m| m.contains("api_keys is empty"))));
    let http = controller.http.clone();
    let ready = reqwest::get(format!("http://{http}/readyz")).await?;
    assert_eq!(ready.status(), 200);
    let metrics = reqwest::get(format!("http://{http}/metrics")).await?.text().await?;
    assert!(
        metrics.contains("turnpike_controller_http_requests_total{route=\"/readyz\",status=\"200\"} 1"),
        "{metrics}"
    );
    let mut stream = reqwest::get(format!("http://{http}/v1/console/events")).await?;
    stream.chunk().await?.context("a picture")?;

    let asked = Instant::now();
    controller.terminate()?;
    while stream.chunk().await?.is_some() {}
    assert_eq!(controller.child.wait()?.code(), Some(0));
    assert!(asked.elapsed() < Duration::from_secs(4), "an open console must not hold the end up");
    log = controller.until("the controller has stopped")?;
    assert!(!log.is_empty());

    // Its state is there for the next one.
    let mut again = Controller::start(&pki, &[])?;
    let log = again.until("the controller is ready")?;
    assert!(!log.iter().any(|line| line["fields"]["message"] == "the cluster's keys were made"), "{log:?}");
    Ok(())
}

#[tokio::test]
async fn a_store_that_is_away_is_waited_for() -> Result<()> {
    let pki = Pki::new()?;
    let nobody = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let store = format!("--store={{kind=\"etcd\",endpoints=[\"http://{nobody}\"]}}");
    let mut controller = Controller::start(&pki, &[&store, "--store-kind=etcd"])?;
    controller.until("cannot be used; trying on")?;
    let url = |path: &str| format!("http://{}{path}", controller.http);
    assert_eq!(reqwest::get(url("/livez")).await?.status(), 200);
    let ready = reqwest::get(url("/readyz")).await?;
    assert_eq!(ready.status(), 503);
    let why: Value = ready.json().await?;
    assert!(why["error"].as_str().context("a sentence")?.contains(&nobody.to_string()), "{why}");
    assert_eq!(reqwest::get(url("/v1/ice-servers")).await?.status(), 503);
    controller.terminate()?;
    assert_eq!(controller.child.wait()?.code(), Some(0));
    Ok(())
}

/// A controller process that logs JSON; killed when dropped.
struct Controller {
    child: Child,
    lines: mpsc::Receiver<Value>,
    http: String,
}

impl Controller {
    fn start(pki: &Pki, flags: &[&str]) -> Result<Self> {
        let mut command = command(pki, flags);
        command.args(["--log-format=json"]);
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        let stderr = BufReader::new(child.stderr.take().context("stderr")?);
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let line = serde_json::from_str(&line).unwrap_or(Value::String(line));
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut controller = Self { child, lines, http: String::new() };
        let log = controller.until("the controller starts")?;
        let http = log.last().and_then(|line| line["fields"]["http"].as_str());
        controller.http = http.context("the address of HTTP")?.to_owned();
        Ok(controller)
    }

    /// The log up to and with the line that says this.
    fn until(&mut self, wanted: &str) -> Result<Vec<Value>> {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.lines.recv_timeout(left) else {
                bail!("no line {wanted:?} in {seen:?}");
            };
            let found = line["fields"]["message"].as_str().is_some_and(|message| message.contains(wanted));
            seen.push(line);
            if found {
                return Ok(seen);
            }
        }
    }

    fn terminate(&self) -> Result<()> {
        let status = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status()?;
        if status.success() { Ok(()) } else { bail!("kill: {status}") }
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run(pki: &Pki, flags: &[&str]) -> Result<Output> {
    let mut child = command(pki, flags).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
            bail!("it did not end: {:?}", child.wait_with_output()?);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(child.wait_with_output()?)
}

fn command(pki: &Pki, flags: &[&str]) -> Command {
    let directory = pki.directory.path();
    let file = |name: &str| directory.join(name).display().to_string();
    let mut given: Vec<String> = [
        "id=c1".to_owned(),
        "region=eu".to_owned(),
        "grpc=127.0.0.1:0".to_owned(),
        "http=127.0.0.1:0".to_owned(),
        format!("tls-ca={}", file("ca.pem")),
        format!("tls-certificate={}", file("controller-c1.pem")),
        format!("tls-key={}", file("controller-c1.key")),
        "store-kind=embedded".to_owned(),
        format!("store-path={}", file("store")),
    ]
    .into();
    // What a test gives stands instead; a store given whole stands instead of its parts.
    let name = |flag: &str| flag.trim_start_matches('-').split('=').next().map(str::to_owned);
    let names: Vec<_> = flags.iter().filter_map(|flag| name(flag)).collect();
    let whole_store = names.iter().any(|name| name == "store");
    given.retain(|flag| {
        let name = name(flag).unwrap_or_default();
        let replaced = names.contains(&name) || (whole_store && name.starts_with("store-"));
        !replaced
    });
    let mut command = Command::new(Path::new(env!("CARGO_BIN_EXE_controller")));
    command.args(given.iter().map(|flag| format!("--{flag}"))).args(flags);
    command
}
