//! Where a server stands: a host, and an address that nobody else has, so that every server keeps its usual port.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::Result;

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

    /// Whether this machine has an IPv4 address just now, whichever of its interfaces carries it.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub async fn has(&self, address: IpAddr) -> Result<bool> {
        // The namespace is the thread's, not the process's.
        let table = async { Ok(fs::read_to_string("/proc/thread-self/net/fib_trie")?) };
        Ok(is_local(&self.host.run(table).await?, address))
    }

    /// A port of it.
    #[must_use]
    pub fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.address, port)
    }
}

/// Whether a routing trie has a local route to an address: a line that names it, and the next says that it is local.
fn is_local(trie: &str, address: IpAddr) -> bool {
    let name = format!("|-- {address}");
    let lines: Vec<&str> = trie.lines().map(str::trim).collect();
    lines.windows(2).any(|pair| pair[0] == name && pair[1] == "/32 host LOCAL")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_s_trie_names_local_addresses() {
        let trie = "Main:\n  +-- 0.0.0.0/0 2 0 2\n     |-- 198.18.0.0\n        /24 link UNICAST\nLocal:\n           |-- 198.18.0.2\n              \
                    /32 host LOCAL\n           |-- 198.18.0.255\n              /32 link BROADCAST\n";
        for (address, expected) in
            [("198.18.0.2", true), ("198.18.0.0", false), ("198.18.0.255", false), ("198.18.0.25", false)]
        {
            assert_eq!(is_local(trie, address.parse().expect("literal")), expected, "{address}");
        }
    }
}
