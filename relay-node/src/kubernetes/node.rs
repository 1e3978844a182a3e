//! The objects that are read, as far as they matter here; whatever else they hold is skipped.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Deserialize;

/// A Node.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Node {
    pub(super) metadata: Metadata,
    pub(super) spec: NodeSpec,
    pub(super) status: NodeStatus,
}

/// What every object carries.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Metadata {
    pub(super) labels: BTreeMap<String, String>,
    pub(super) annotations: BTreeMap<String, String>,
    pub(super) resource_version: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct NodeSpec {
    /// Cordoned.
    pub(super) unschedulable: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct NodeStatus {
    pub(super) addresses: Vec<NodeAddress>,
}

#[derive(Debug, Deserialize)]
pub(super) struct NodeAddress {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) address: String,
}

/// A Service, of which the load balancer's addresses matter.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Service {
    pub(super) status: ServiceStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct ServiceStatus {
    pub(super) load_balancer: LoadBalancer,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct LoadBalancer {
    pub(super) ingress: Vec<LoadBalancerIngress>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct LoadBalancerIngress {
    pub(super) ip: String,
}

/// A list of EndpointSlices.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct EndpointSlices {
    pub(super) items: Vec<EndpointSlice>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct EndpointSlice {
    // Both may be null.
    pub(super) endpoints: Option<Vec<Endpoint>>,
    pub(super) ports: Option<Vec<EndpointPort>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Endpoint {
    pub(super) addresses: Vec<String>,
    pub(super) conditions: Conditions,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Conditions {
    pub(super) ready: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct EndpointPort {
    pub(super) name: Option<String>,
    pub(super) port: Option<u16>,
}

impl EndpointSlices {
    /// URLs of those that are ready, at the port called `grpc`, sorted.
    pub(super) fn controllers(&self) -> Vec<String> {
        let mut all = Vec::new();
        for slice in &self.items {
            let mut ports = slice.ports.iter().flatten();
            let Some(port) = ports.find(|port| port.name.as_deref() == Some("grpc")).and_then(|port| port.port) else {
                continue;
            };
            // Not saying whether it is ready means that it is.
            let ready = slice.endpoints.iter().flatten().filter(|endpoint| endpoint.conditions.ready != Some(false));
            for address in ready.flat_map(|endpoint| &endpoint.addresses) {
                match address.parse() {
                    Ok(IpAddr::V4(ip)) => all.push(format!("https://{ip}:{port}")),
                    Ok(IpAddr::V6(ip)) => all.push(format!("https://[{ip}]:{port}")),
                    Err(_) => {}
                }
            }
        }
        all.sort_unstable();
        all.dedup();
        all
    }
}
