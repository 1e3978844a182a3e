//! `/v1/events`, followed as an application's client would: which relays there are, and which of them are to be left.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::process::Host;

/// A stream is silent for 15 s at most.
const SILENCE: Duration = Duration::from_secs(20);
/// Before the next controller is tried.
const PAUSE: Duration = Duration::from_millis(500);

/// What a client knows of a relay.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
pub struct RelayState {
    /// Its node id.
    pub node: String,
    /// `udp://192.0.2.1:3478` and so on.
    pub listeners: Vec<String>,
    /// `ready`, `draining`, `suspect` or `lost`.
    pub condition: String,
    /// It takes no new clients.
    pub draining: bool,
}

impl RelayState {
    /// Where it listens for `scheme`.
    #[must_use]
    pub fn listener(&self, scheme: &str) -> Option<SocketAddr> {
        self.listeners.iter().find_map(|l| l.strip_prefix(scheme)?.strip_prefix("://")?.parse().ok())
    }

    /// Whether clients may come.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.condition == "ready" && !self.draining
    }
}

/// All relays by their node ids, as they were told of last.
pub type Relays = BTreeMap<String, RelayState>;

/// Follows one controller after the other until dropped.
pub struct Follower {
    relays: watch::Receiver<Relays>,
    task: JoinHandle<()>,
}

impl Follower {
    /// Begins with the first of `controllers` (their HTTP addresses).
    #[must_use]
    pub fn start(host: &Host, controllers: Vec<SocketAddr>) -> Self {
        let (sender, relays) = watch::channel(Relays::new());
        let host = host.clone();
        let task = tokio::spawn(async move {
            for controller in controllers.iter().cycle() {
                // Whatever ends the stream: the next controller tells the state first, and nothing is missed.
                let _ = follow(&host, *controller, sender.clone()).await;
                sleep(PAUSE).await;
            }
        });
        Self { relays, task }
    }

    /// What is known, now and as it changes.
    #[must_use]
    pub fn relays(&self) -> watch::Receiver<Relays> {
        self.relays.clone()
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Deserialize)]
struct States {
    relays: Vec<RelayState>,
}

#[derive(Deserialize)]
struct Change {
    relay: RelayState,
}

async fn follow(host: &Host, controller: SocketAddr, sender: watch::Sender<Relays>) -> Result<()> {
    host.run(async move {
        let mut answer = reqwest::get(format!("http://{controller}/v1/events")).await?.error_for_status()?;
        let mut text = String::new();
        loop {
            let piece = timeout(SILENCE, answer.chunk()).await?.context("/v1/events is broken")?;
            let Some(piece) = piece else { bail!("/v1/events has ended") };
            text += std::str::from_utf8(&piece)?;
            // WHATWG HTML §9.2.6: a blank line ends an event.
            while let Some((event, rest)) = text.split_once("\n\n") {
                take(event, &sender)?;
                text = rest.to_owned();
            }
        }
    })
    .await
}

fn take(event: &str, sender: &watch::Sender<Relays>) -> Result<()> {
    let field =
        |name: &str| event.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim_start));
    match (field("event"), field("data")) {
        (Some("relays"), Some(data)) => {
            let states: States = serde_json::from_str(data)?;
            sender.send_replace(states.relays.into_iter().map(|relay| (relay.node.clone(), relay)).collect());
        }
        (Some("relay"), Some(data)) => {
            let Change { relay } = serde_json::from_str(data)?;
            sender.send_modify(|relays| drop(relays.insert(relay.node.clone(), relay)));
        }
        // Comments keep the stream alive.
        _ => {}
    }
    Ok(())
}
