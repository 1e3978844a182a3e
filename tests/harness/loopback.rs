//! Loopback addresses that no other test uses at the same time, so that every server can have its usual port.

use std::net::{IpAddr, Ipv4Addr};

/// A /24 of 127/8 for this test process.
#[derive(Clone, Copy, Debug)]
pub struct Loopback {
    network: [u8; 2],
}

impl Loopback {
    /// The network of this process. nextest runs each test in a process of its own.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "both remainders are below 256")]
    pub fn of_this_process() -> Self {
        let id = std::process::id();
        // 127.0.0.0/16 is left to what else runs on the machine.
        Self {
            network: [1 + (id / 256 % 254) as u8, (id % 256) as u8],
        }
    }

    /// Address number `host` of it.
    #[must_use]
    pub fn address(self, host: u8) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(127, self.network[0], self.network[1], host))
    }
}
