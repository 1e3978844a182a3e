//! Regions at a glance, and which relays of them a client should measure.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use turn_core::Transport;

use super::estimate::{Estimator, Evidence};
use super::{Terms, below};
use crate::fleet::{NodeState, NodeView, Snapshot, Thresholds};

/// Regions that a client is asked to measure, the nearest of them by estimate and others by lot: an estimate may be wrong.
const NEAREST: usize = 5;
const BY_LOT: usize = 3;

/// A region at a glance.
#[derive(Clone, Debug, Eq, PartialEq, serde::Serialize)]
pub struct RegionView {
    /// Its name.
    pub name: String,
    /// Nodes that have joined.
    pub nodes: u32,
    /// Those of them that are ready.
    pub healthy: u32,
    /// Allocations on all of them.
    pub allocations: u64,
}

/// Every region that has a node, by name.
pub fn regions(snapshot: &Snapshot, thresholds: &Thresholds) -> Vec<RegionView> {
    let mut regions = BTreeMap::<&str, RegionView>::new();
    for node in snapshot.nodes.values() {
        let name = node.record.region.as_str();
        let region = regions.entry(name).or_insert_with(|| RegionView {
            name: name.to_owned(),
            nodes: 0,
            healthy: 0,
            allocations: 0,
        });
        region.nodes += 1;
        region.healthy += u32::from(node.state(thresholds) == NodeState::Ready);
        region.allocations += node.load.allocations;
    }
    regions.into_values().collect()
}

/// A STUN server that a client should measure its round trip to.
#[derive(Clone, Debug, Eq, PartialEq, serde::Serialize)]
pub struct Target {
    /// Its region.
    pub region: String,
    /// Its name.
    pub node_id: String,
    /// Where it answers Binding over UDP.
    pub address: SocketAddr,
}

/// One ready relay of each of the few nearest regions and of a few others, for a client of this family.
pub fn targets(snapshot: &Snapshot, terms: &Terms, evidence: &Evidence, ipv6: bool, seed: u64) -> Vec<Target> {
    let estimator = Estimator::of_network(terms, evidence).unwrap_or_else(|| Estimator::of_region(terms, &terms.home));
    let mut random = seed;
    let mut by_region = BTreeMap::<&str, Vec<(&NodeView, SocketAddr)>>::new();
    for node in snapshot.nodes.values().filter(|node| node.state(&terms.thresholds) == NodeState::Ready) {
        if let Some(address) = stun(node, ipv6) {
            by_region.entry(&node.record.region).or_default().push((node, address));
        }
    }
    let mut regions: Vec<_> = by_region.into_iter().collect();
    regions.sort_by_cached_key(|(region, _)| estimator.to(region).rtt_ms);
    let mut chosen: Vec<_> = regions.drain(..regions.len().min(NEAREST)).collect();
    for _ in 0..BY_LOT.min(regions.len()) {
        chosen.push(regions.swap_remove(below(regions.len(), &mut random)));
    }
    let target = |(region, nodes): (&str, Vec<(&NodeView, SocketAddr)>)| {
        let (node, address) = nodes[below(nodes.len(), &mut random)];
        Target { region: region.to_owned(), node_id: node.record.node_id.clone(), address }
    };
    chosen.into_iter().map(target).collect()
}

fn stun(node: &NodeView, ipv6: bool) -> Option<SocketAddr> {
    let udp = node.record.listeners.iter().filter(|listener| listener.transport == Transport::Udp);
    let addresses = udp.map(|listener| listener.address).filter(|address| !address.ip().is_unspecified());
    // Port 443 may be the only one that passes, 3478 is the one that is meant for it.
    addresses.filter(|address| address.is_ipv6() == ipv6).min_by_key(|address| (address.port() == 443, *address))
}
