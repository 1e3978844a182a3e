//! A data plane's configuration for tests to begin with; each changes what it is about. Tests outside of the crate take
//! this file by its path.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use turn_core::Transport;

use super::{DataplaneConfig, DtlsLimits, Listen, RelayIp, RelayedMode, StreamConfig};

/// UDP and TCP on any port of one IP, which relayed addresses have too; its state in `journal`.
pub(crate) fn config(ip: &str, workers: u16, journal: &Path) -> DataplaneConfig {
    let ip: IpAddr = ip.parse().expect("literal");
    let listen = |transport| Listen { transport, bind: SocketAddr::new(ip, 0) };
    DataplaneConfig {
        workers,
        listen: vec![listen(Transport::Udp), listen(Transport::Tcp)],
        nat_discovery: None,
        relay_ips: vec![RelayIp { bound: ip, advertised: ip }],
        relayed: RelayedMode::Sockets,
        relay_ports: 20_000..=29_999,
        relay_address: ip,
        epoch: 1,
        journal: journal.into(),
        usage: journal.join("usage"),
        has_store: false,
        max_allocations: 0,
        user_quota: 0,
        stream_send_cap: 262_144,
        max_connections: 100,
        streams: StreamConfig::default(),
        dtls_limits: DtlsLimits::default(),
        moves: false,
        public_ports: true,
    }
}
