//! What is followed while a relay runs: the cordon of its node, and where the controllers are.

use std::time::Duration;

use serde::Deserialize;
use tokio::time::sleep;

use super::api::{Api, ApiError};
use super::facts::controllers;
use super::node::Node;
use crate::config::{Endpoints, KubernetesSettings};
use crate::control::{Drain, StandingWatch};

/// The API server ends a watch after this long; then it is begun anew.
const WATCH_SECONDS: u32 = 300;
/// Waits between tries while the API server does not answer.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// How often controllers are looked up while there is a session with one, and while there is none.
const SETTLED: Duration = Duration::from_secs(60);
const SEARCHING: Duration = Duration::from_secs(3);

/// An event of a watch.
#[derive(Debug, Deserialize)]
struct Event {
    #[serde(rename = "type")]
    kind: String,
    object: serde_json::Value,
}

/// Drains this relay while its node is cordoned: `kubectl drain` leaves the pods of a DaemonSet alone. Goes on for ever;
/// while the API server is away what it said last holds.
pub async fn follow_node(settings: KubernetesSettings, drain: &Drain) {
    let Some(name) = &settings.node else { return std::future::pending().await };
    let (api, mut wait, mut said) = (Api::new(&settings), FIRST_WAIT, false);
    loop {
        match follow(&api, name, drain).await {
            Ok(()) => (wait, said) = (FIRST_WAIT, false),
            Err(error) => {
                if !said {
                    tracing::warn!("a cordon of node {name} is not noticed: {error}");
                    said = true;
                }
                wait = (wait * 2).min(LONGEST_WAIT);
            }
        }
        // A cluster of relays does not come back in step.
        let random = getrandom::u32().unwrap_or(u32::MAX);
        sleep(wait.mul_f64(0.5 + 0.5 * f64::from(random) / f64::from(u32::MAX))).await;
    }
}

/// Reads the node, then its changes until the watch ends.
async fn follow(api: &Api, name: &str, drain: &Drain) -> Result<(), ApiError> {
    let node: Node = api.get(&format!("/api/v1/nodes/{name}")).await?;
    drain.cordoned(node.spec.unschedulable);
    let version = node.metadata.resource_version;
    let path = format!(
        "/api/v1/nodes?watch=1&allowWatchBookmarks=true&fieldSelector=metadata.name%3D{name}\
         &resourceVersion={version}&timeoutSeconds={WATCH_SECONDS}"
    );
    let mut events = api.watch(&path).await?;
    while let Some(Event { kind, object }) = events.next().await? {
        // A deleted node tells nothing; ERROR says that the version is too old (410): the node is read anew.
        match kind.as_str() {
            "ADDED" | "MODIFIED" => {
                if let Ok(node) = serde_json::from_value::<Node>(object) {
                    drain.cordoned(node.spec.unschedulable);
                }
            }
            "ERROR" => return Ok(()),
            _ => {}
        }
    }
    Ok(())
}

/// Keeps the addresses of the controllers true, for ever; more often while there is no session with one.
pub async fn follow_controllers(settings: KubernetesSettings, endpoints: Endpoints, standing: StandingWatch) {
    let api = Api::new(&settings);
    loop {
        let mut waited = Duration::ZERO;
        while waited < if standing.now().connected { SETTLED } else { SEARCHING } {
            sleep(SEARCHING).await;
            waited += SEARCHING;
        }
        match controllers(&api, &settings).await {
            Ok(found) if !found.is_empty() => endpoints.replace(found),
            Ok(_) => {}
            Err(error) => tracing::debug!("controllers are not looked up: {error}"),
        }
    }
}
