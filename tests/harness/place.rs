//! Where a server stands: a host, and an address that nobody else has, so that every server keeps its usual port.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::process::Host;

/// A host and an address of it.
#[derive(Clone, Debug)]
pub struct Place {
    /// Where its programs run.
    pub host: Host,
    /// Its address.
    pub address: IpAddr,
}

impl Place {
    /// Address number `number` of a loopback network that no other test uses: nextest runs each test in a process of
    /// its own, and the process id chooses the network.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "both remainders are below 256")]
    pub fn on_loopback(number: u8) -> Self {
        let id = std::process::id();
        // 127.0.0.0/16 is left to what else runs on the machine.
        let address = Ipv4Addr::new(127, 1 + (id / 256 % 254) as u8, (id % 256) as u8, number);
        Self { host: Host::Machine, address: address.into() }
    }

    /// A port of it.
    #[must_use]
    pub fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.address, port)
    }
}
