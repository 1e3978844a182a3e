//! Janus with its echo test, as a gateway behind a NAT that asks a TURN REST service for relays.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};

use crate::place::Place;
use crate::process::Process;
use crate::wait::eventually;

/// Port of its HTTP interface.
const HTTP: u16 = 8088;
/// Longest it may take to start.
const READY: Duration = Duration::from_secs(20);
/// Longest an answer to an offer may take: it gathers all its candidates before.
const ANSWER: Duration = Duration::from_secs(20);

/// A running Janus.
pub struct Janus {
    place: Place,
    process: Process,
}

impl Janus {
    /// Starts it at `place`; its relays come from the service at `rest`, which wants `key`.
    ///
    /// # Errors
    /// It is not installed or does not answer.
    pub async fn start(place: &Place, directory: &Path, rest: &str, key: &str) -> Result<Self> {
        let configuration = directory.join("janus");
        fs::create_dir_all(&configuration)?;
        let modules = modules()?;
        let general = format!(
            "general: {{ configs_folder = {configuration:?} plugins_folder = {:?} transports_folder = {:?} events_folder = \"/nonexistent\" loggers_folder = \"/nonexistent\" debug_level = 4 }}\n",
            modules.join("plugins"),
            modules.join("transports"),
        );
        // With force_relay it offers relayed candidates and no others.
        let nat = format!(
            "nat: {{ turn_rest_api = {rest:?} turn_rest_api_key = {key:?} allow_force_relay = true ice_enforce_list = \"{}\" }}\n",
            place.address
        );
        fs::write(configuration.join("janus.jcfg"), general + &nat)?;
        let http = format!(
            "general: {{ http = true port = {HTTP} ip = \"{}\" }}\nadmin: {{ admin_http = false }}\n",
            place.address
        );
        fs::write(configuration.join("janus.transport.http.jcfg"), http)?;
        let mut command = Command::new("janus");
        command.arg("--configs-folder").arg(&configuration).arg("--config").arg(configuration.join("janus.jcfg"));
        let process = Process::start(&place.host, directory, "janus", command)?;
        let mut janus = Self { place: place.clone(), process };
        eventually("Janus answers", READY, async || {
            janus.process.must_run()?;
            janus.get("/janus/info").await
        })
        .await?;
        Ok(janus)
    }

    /// A session with the echo test: takes an offer with all its candidates, answers with its own.
    ///
    /// # Errors
    /// Janus refuses, or does not answer in time.
    pub async fn echo(&self, offer: &str) -> Result<String> {
        let id = |answer: &Value| answer["data"]["id"].as_u64().with_context(|| format!("no id in {answer}"));
        let session = id(&self.post("/janus", json!({"janus": "create"})).await?)?;
        let path = format!("/janus/{session}");
        // opaque_id becomes the user of the TURN REST credential.
        let attach = json!({"janus": "attach", "plugin": "janus.plugin.echotest", "opaque_id": "janus"});
        let handle = id(&self.post(&path, attach).await?)?;
        let jsep = json!({"type": "offer", "sdp": offer, "trickle": false, "force_relay": true});
        let message = json!({"janus": "message", "body": {"audio": true, "video": true}, "jsep": jsep});
        self.post(&format!("{path}/{handle}"), message).await?;
        let deadline = Instant::now() + ANSWER;
        while Instant::now() < deadline {
            let event = self.get(&format!("{path}?maxev=1")).await?;
            if let Some(sdp) = event["jsep"]["sdp"].as_str() {
                return Ok(sdp.to_owned());
            }
            ensure!(event["janus"] != "error", "Janus: {event}");
        }
        bail!("Janus did not answer the offer within {ANSWER:?}")
    }

    async fn get(&self, path: &str) -> Result<Value> {
        self.ask(path, None).await
    }

    async fn post(&self, path: &str, mut message: Value) -> Result<Value> {
        message["transaction"] = json!("test");
        let answer = self.ask(path, Some(message)).await?;
        ensure!(["success", "ack"].contains(&answer["janus"].as_str().unwrap_or_default()), "Janus: {answer}");
        Ok(answer)
    }

    async fn ask(&self, path: &str, message: Option<Value>) -> Result<Value> {
        let url = format!("http://{}{path}", self.place.at(HTTP));
        self.place
            .host
            .run(async move {
                let client = reqwest::Client::builder().timeout(Duration::from_secs(35)).build()?;
                let request = match message {
                    Some(message) => client.post(&url).json(&message),
                    None => client.get(&url),
                };
                Ok(request.send().await?.json().await?)
            })
            .await
            .map_err(|error| anyhow!("{error:#}"))
    }
}

/// Where Debian keeps its modules: below the directory of the processor's libraries.
fn modules() -> Result<PathBuf> {
    let libraries = fs::read_dir("/usr/lib")?.flatten().map(|entry| entry.path().join("janus"));
    libraries
        .into_iter()
        .find(|path| path.join("plugins").is_dir())
        .context("Janus is not installed: tests/run installs it")
}
