//! What is where in a running cluster, for programs and for the text that people get.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;
use turnctl::pki::CA_CERTIFICATE;

use crate::files;
use crate::plan::Plan;
use crate::state_directory::{StateDirectory, write_whole};

/// Everything others need to use the cluster: `--json`, `--ready-file` and `cluster.json` in the directory.
#[derive(Clone, Debug, Serialize)]
pub struct Description {
    /// Process to end (SIGTERM) to end the cluster.
    pub pid: u32,
    /// Certificates, state and logs.
    pub dir: PathBuf,
    /// URL of the call page.
    pub call_page: String,
    /// URL of the console.
    pub console: String,
    /// Key with which one may drain relays there, for this run.
    pub console_key: String,
    /// Base URL of discovery.
    pub discovery: String,
    /// URL of the controller for gRPC.
    pub grpc: String,
    /// Context file for `turnctl`.
    pub turnctl_config: PathBuf,
    /// The `turnctl` built with this binary.
    pub turnctl: PathBuf,
    /// The authority's certificate.
    pub ca: PathBuf,
    /// Realm of the credentials.
    pub realm: String,
    /// A TURN user name that works for `ttl` seconds.
    pub username: String,
    /// Its password.
    pub password: String,
    /// Seconds.
    pub ttl: u64,
    /// The controller's process.
    pub controller: Process,
    /// The relays.
    pub relays: Vec<Relay>,
}

/// A supervised process.
#[derive(Clone, Debug, Serialize)]
pub struct Process {
    /// Its name.
    pub id: String,
    /// 0 until it was started.
    pub pid: u32,
    /// Times it was started.
    pub starts: u32,
    /// Its output.
    pub log: PathBuf,
}

/// A relay and where it is.
#[derive(Clone, Debug, Serialize)]
pub struct Relay {
    /// Its process.
    #[serde(flatten)]
    pub process: Process,
    /// Its region.
    pub region: String,
    /// Where clients reach it, UDP and TCP.
    pub address: String,
    /// Base URL of health and metrics.
    pub http: String,
    /// Its state directory.
    pub state_dir: PathBuf,
    /// Its configuration.
    pub config: PathBuf,
}

impl Description {
    /// What is known before anything runs.
    pub fn new(plan: &Plan, directory: &StateDirectory, turnctl: &Path) -> Self {
        let process = |id: &str| Process {
            id: id.to_owned(),
            pid: 0,
            starts: 0,
            log: directory.logs().join(format!("{id}.log")),
        };
        let relays = plan.relays.iter().map(|relay| Relay {
            process: process(relay.id),
            region: relay.region.to_owned(),
            address: relay.advertised().to_string(),
            http: format!("http://{}", relay.http),
            state_dir: directory.relay(relay.id, relay.public_ip),
            config: files::relay_file(directory, relay.id),
        });
        Self {
            pid: std::process::id(),
            dir: directory.path().to_owned(),
            call_page: plan.page_url(),
            console: plan.console_url(),
            console_key: String::new(),
            discovery: format!("http://{}", plan.http),
            grpc: format!("https://{}", plan.grpc),
            turnctl_config: files::turnctl_file(directory),
            turnctl: turnctl.to_owned(),
            ca: directory.pki().join(CA_CERTIFICATE),
            realm: files::REALM.to_owned(),
            username: String::new(),
            password: String::new(),
            ttl: 0,
            controller: process("controller"),
            relays: relays.collect(),
        }
    }

    /// All processes, the controller first.
    pub fn processes(&self) -> impl Iterator<Item = &Process> {
        [&self.controller].into_iter().chain(self.relays.iter().map(|relay| &relay.process))
    }

    /// Notes that a process was started.
    pub fn started(&mut self, name: &str, pid: u32) {
        let relays = self.relays.iter_mut().map(|relay| &mut relay.process);
        for process in relays.chain([&mut self.controller]).filter(|process| process.id == name) {
            process.pid = pid;
            process.starts += 1;
        }
    }

    /// Writes it to `cluster.json` in the directory and to `also`, each whole.
    ///
    /// # Errors
    /// One line naming the file.
    pub fn publish(&self, also: Option<&Path>) -> Result<()> {
        let json = format!("{}\n", serde_json::to_string(self)?);
        write_whole(&self.dir.join("cluster.json"), &json)?;
        also.map_or(Ok(()), |file| write_whole(file, &json))
    }
}
