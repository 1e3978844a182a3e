//! What is learnt before a relay starts: region, zone and public address, and where the controllers are.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::time::sleep;

use super::api::{Api, ApiError};
use super::node::{EndpointSlices, Node, Service};
use crate::config::KubernetesSettings;

const REGION: &str = "topology.kubernetes.io/region";
const ZONE: &str = "topology.kubernetes.io/zone";
/// Annotations that win over the addresses in a Node's status.
const PUBLIC_IP: &str = "turnpike/public-ip";
const PUBLIC_IP6: &str = "turnpike/public-ip6";
/// Name of the file in the state directory that the facts are kept in.
const FILE: &str = "kubernetes";
/// How long a load balancer that is being made is waited for at first, and an API server that does not answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is known of the place a relay runs at; what is not known is absent.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Facts {
    /// From the Node's topology label.
    pub region: Option<String>,
    /// From the Node's topology label.
    pub zone: Option<String>,
    /// From the Node's annotation or status, or the load balancer.
    pub public_ip: Option<Ipv4Addr>,
    /// The same, IPv6.
    pub public_ip6: Option<Ipv6Addr>,
    /// `https://IP:PORT` of the controllers that are ready.
    pub controllers: Vec<String>,
}

impl Facts {
    fn take_address(&mut self, text: &str) {
        match text.parse() {
            Ok(IpAddr::V4(ip)) => drop(self.public_ip.get_or_insert(ip)),
            Ok(IpAddr::V6(ip)) => drop(self.public_ip6.get_or_insert(ip)),
            Err(_) => {}
        }
    }

    /// Of a Node; `internal` takes its internal address for want of an external one.
    fn of_node(node: &Node, internal: bool) -> Self {
        let label = |name: &str| node.metadata.labels.get(name).filter(|value| !value.is_empty()).cloned();
        let mut facts = Self { region: label(REGION), zone: label(ZONE), ..Self::default() };
        for text in [PUBLIC_IP, PUBLIC_IP6].iter().filter_map(|name| node.metadata.annotations.get(*name)) {
            facts.take_address(text);
        }
        let kinds: &[&str] = if internal { &["ExternalIP", "InternalIP"] } else { &["ExternalIP"] };
        for kind in kinds {
            for address in node.status.addresses.iter().filter(|address| address.kind == *kind) {
                facts.take_address(&address.address);
            }
        }
        facts
    }
}

/// Asks the API server; what it said last, kept in `state_dir`, where it does not answer. The first start waits for it.
///
/// # Errors
/// The last answer, where nothing was kept.
pub async fn find(settings: &KubernetesSettings, state_dir: &Path) -> Result<Facts, ApiError> {
    let kept = std::fs::read(state_dir.join(FILE)).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let began = Instant::now();
    loop {
        let (error, facts) = match ask(settings).await {
            Ok(facts) if settings.service.is_none() || facts.public_ip.is_some() || facts.public_ip6.is_some() => {
                return Ok(facts);
            }
            Ok(facts) => (None, facts),
            Err(error) => (Some(error), Facts::default()),
        };
        if let Some(kept) = kept {
            return Ok(kept);
        }
        if began.elapsed() >= PATIENCE {
            return error.map_or(Ok(facts), Err);
        }
        sleep(Duration::from_secs(1)).await;
    }
}

/// Keeps the facts for a start without the API server. The state directory is locked by this process.
///
/// # Errors
/// The file system's.
pub fn keep(state_dir: &Path, facts: &Facts) -> std::io::Result<()> {
    let new = state_dir.join("kubernetes.new");
    std::fs::write(&new, serde_json::to_vec(facts)?)?;
    std::fs::rename(new, state_dir.join(FILE))
}

async fn ask(settings: &KubernetesSettings) -> Result<Facts, ApiError> {
    let api = Api::new(settings);
    let mut facts = Facts::default();
    if let Some(name) = &settings.node {
        let node: Node = api.get(&format!("/api/v1/nodes/{name}")).await?;
        facts = Facts::of_node(&node, settings.internal && settings.service.is_none());
    }
    if let Some(name) = &settings.service {
        // The node's own addresses are not the load balancer's.
        (facts.public_ip, facts.public_ip6) = (None, None);
        let service: Service = api.get(&format!("/api/v1/namespaces/{}/services/{name}", api.namespace()?)).await?;
        for ingress in &service.status.load_balancer.ingress {
            facts.take_address(&ingress.ip);
        }
    }
    facts.controllers = controllers(&api, settings).await?;
    Ok(facts)
}

/// The controllers that are ready now; none where they are not looked for.
pub(super) async fn controllers(api: &Api, settings: &KubernetesSettings) -> Result<Vec<String>, ApiError> {
    let Some((namespace, service)) = &settings.controllers else { return Ok(Vec::new()) };
    let path = format!(
        "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices?labelSelector=kubernetes.io%2Fservice-name%3D{service}"
    );
    Ok(api.get::<EndpointSlices>(&path).await?.controllers())
}
