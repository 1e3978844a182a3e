//! A relay's record for tests to begin with; each changes what it is about. Tests outside of the crate take this file by
//! its path.

use std::net::{IpAddr, SocketAddr};

use turn_core::Transport;

use super::{NodeListener, NodeRecord};

/// A relay with UDP and TCP on port 3478 of its only IP.
pub(crate) fn node_record(node_id: &str, region: &str, ip: IpAddr) -> NodeRecord {
    let listener = |transport| NodeListener { transport, address: SocketAddr::new(ip, 3478), ip_in_certificate: false };
    NodeRecord {
        node_id: node_id.to_owned(),
        region: region.to_owned(),
        zone: String::new(),
        version: "0.1.0".to_owned(),
        relay_address: ip,
        relay_ips: vec![ip],
        listeners: vec![listener(Transport::Udp), listener(Transport::Tcp)],
        public_host: String::new(),
        relay_ports: (49152, 65535),
        workers: 1,
        max_allocations: 0,
        boot_id: "boot".to_owned(),
        registered_at: 0,
        lease: 1,
        standby: false,
        waiting: false,
        backbone: Vec::new(),
        cluster_only: false,
    }
}
