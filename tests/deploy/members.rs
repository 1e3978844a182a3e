//! Members of a cluster as the manifests configure them, on loopback.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use harness::cluster::{binary, repository};
use serde_json::Value;

/// No condition here takes longer, unless it is never met.
const PATIENCE: Duration = Duration::from_secs(30);

/// The objects of a rendered overlay.
pub(crate) fn objects(overlay: &str) -> Result<Vec<Value>> {
    let file = repository().join(format!("tests/deploy/rendered/{overlay}.yaml"));
    let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    serde_yaml_ng::Deserializer::from_str(&text)
        .map(|document| Ok(serde::Deserialize::deserialize(document)?))
        .collect()
}

/// A container of the manifests with the files its configuration needs, below a directory of its own.
pub(crate) struct Member {
    binary: &'static str,
    directory: PathBuf,
    config: PathBuf,
    variables: BTreeMap<String, String>,
}

impl Member {
    /// The controller or relay of an overlay, on the node or in the pod `name`. `/etc/turnpike` and `/var/lib/turnpike` are
    /// below `directory`; `change` makes of the file what this machine can have, for example other ports.
    pub(crate) fn of(
        objects: &[Value],
        binary: &'static str,
        name: &str,
        directory: &Path,
        change: impl FnOnce(String) -> String,
    ) -> Result<Self> {
        let kind = |object: &&Value, kind: &str| object["kind"] == kind;
        let (workload, file) = match binary {
            "controller" => ("turnpike-controller", "controller.toml"),
            _ => ("turnpike-relay", "relay.toml"),
        };
        let runs = objects.iter().find(|object| {
            object["metadata"]["name"] == workload && (kind(object, "StatefulSet") || kind(object, "DaemonSet"))
        });
        let container = &runs.context(workload)?["spec"]["template"]["spec"]["containers"][0];
        let written = objects.iter().filter(|object| kind(object, "ConfigMap"));
        let written = written.filter_map(|map| map["data"][file].as_str()).next().context(file)?;
        let moved = |text: &str| {
            let etc = directory.join("etc").display().to_string();
            text.replace("/etc/turnpike", &etc)
                .replace("/var/lib/turnpike", &directory.join("state").display().to_string())
        };
        std::fs::create_dir_all(directory.join("etc"))?;
        let config = directory.join("etc").join(file);
        std::fs::write(&config, change(moved(written)))?;
        ensure!(
            container["args"] == serde_json::json!([format!("--config=/etc/turnpike/{file}")]),
            "{}",
            container["args"]
        );
        let mut variables: BTreeMap<String, String> = BTreeMap::new();
        for variable in container["env"].as_array().context("env")? {
            let key = variable["name"].as_str().context("a name")?.to_owned();
            let value = match (&variable["value"], &variable["valueFrom"]) {
                (Value::String(value), _) => {
                    let mut value = moved(value);
                    for (known, text) in &variables {
                        value = value.replace(&format!("$({known})"), text.as_str());
                    }
                    value
                }
                (_, from) if !from["configMapKeyRef"].is_null() => {
                    let from = &from["configMapKeyRef"];
                    let mut maps = objects.iter().filter(|object| kind(object, "ConfigMap"));
                    let map = maps.find(|map| map["metadata"]["name"] == from["name"]).context("a ConfigMap")?;
                    map["data"][from["key"].as_str().context("a key")?].as_str().context("a value")?.to_owned()
                }
                (_, from) if from["fieldRef"]["fieldPath"] == "status.hostIP" => "127.0.0.1".to_owned(),
                (_, from) if !from["fieldRef"].is_null() => name.to_owned(),
                // A Secret that may be absent is.
                _ => continue,
            };
            variables.insert(key, value);
        }
        Ok(Self { binary, directory: directory.to_owned(), config, variables })
    }

    /// Its variables.
    pub(crate) fn variables(&self) -> impl Iterator<Item = &str> {
        self.variables.keys().map(String::as_str)
    }

    /// Makes its certificate, by this authority.
    pub(crate) fn certify(&self, authority: &Path, name: &str) -> Result<()> {
        let pki = self.directory.join("etc/pki");
        std::fs::create_dir_all(&pki)?;
        let role = if self.binary == "controller" { "--controller" } else { "--relay" };
        turnctl(&["ca", "issue", &text(authority), role, name, "--out", &text(&pki)])?;
        std::fs::copy(authority.join("ca.pem"), pki.join("ca.pem"))?;
        Ok(())
    }

    /// The command that starts it.
    pub(crate) fn command(&self) -> Result<Command> {
        let mut command = Command::new(binary(self.binary)?);
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TURNPIKE_")) {
            command.env_remove(name);
        }
        command.envs(&self.variables).arg(format!("--config={}", self.config.display())).stdin(Stdio::null());
        Ok(command)
    }

    /// Starts it; killed when dropped.
    pub(crate) fn start(&self) -> Result<Running> {
        Ok(Running(self.command()?.spawn()?))
    }

    /// `--check-config`.
    pub(crate) fn check(&self) -> Result<()> {
        let output = self.command()?.arg("--check-config").output()?;
        ensure!(output.status.success(), "{}: {}", self.binary, String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

/// A process of the test.
pub(crate) struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs `turnctl`, which has to end well.
pub(crate) fn turnctl(arguments: &[&str]) -> Result<String> {
    let output = Command::new(binary("turnctl")?).args(arguments).env("NO_COLOR", "1").output()?;
    ensure!(output.status.success(), "turnctl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// An address that nobody listens on.
pub(crate) fn free(ip: Ipv4Addr) -> Result<SocketAddr> {
    Ok(TcpListener::bind((ip, 0))?.local_addr()?)
}

/// A loopback IP of this test's own.
pub(crate) fn own_ip() -> Result<Ipv4Addr> {
    let mut random = [0; 3];
    getrandom::fill(&mut random)?;
    Ok(Ipv4Addr::new(127, 200 + random[0] % 50, random[1], random[2] | 1))
}

/// Waits until a GET is answered with 200, and returns the body.
pub(crate) fn answer(address: SocketAddr, path: &str) -> Result<String> {
    let began = Instant::now();
    loop {
        if let Some((200, body)) = get(address, path) {
            return Ok(body);
        }
        ensure!(began.elapsed() < PATIENCE, "http://{address}{path} is not answered with 200");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn get(address: SocketAddr, path: &str) -> Option<(u16, String)> {
    use std::io::{Read as _, Write as _};
    let mut stream = TcpStream::connect(address).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.split(' ').nth(1)?.parse().ok()?, body.into()))
}

pub(crate) fn text(path: &Path) -> String {
    path.display().to_string()
}
