//! What this machine has: programs, free ports, addresses.

use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::plan::{Network, Port};

/// The programs beside this one.
pub struct Programs {
    /// `controller`.
    pub controller: PathBuf,
    /// `relay-node`.
    pub relay_node: PathBuf,
    /// `turnctl`.
    pub turnctl: PathBuf,
}

impl Programs {
    /// Finds them.
    ///
    /// # Errors
    /// One line naming those that are missing and how to get them.
    pub fn find() -> Result<Self> {
        let own = std::env::current_exe().context("cannot tell where this program is")?;
        let directory = own.parent().unwrap_or(Path::new("/"));
        let missing: Vec<_> = ["controller", "relay-node", "turnctl"]
            .into_iter()
            .filter(|name| !directory.join(name).is_file())
            .collect();
        if !missing.is_empty() {
            bail!(
                "{} not found in {}: run deploy/local/up, which builds it, or cargo build --release -p {}",
                missing.join(", "),
                directory.display(),
                missing.join(" -p ")
            );
        }
        let path = |name| directory.join(name);
        Ok(Self { controller: path("controller"), relay_node: path("relay-node"), turnctl: path("turnctl") })
    }
}

/// Binds a port for a moment.
///
/// # Errors
/// One line: whose port is taken, how to see by whom, and how to go on.
pub fn check_free(port: &Port) -> Result<()> {
    let bound =
        if port.udp { UdpSocket::bind(port.address).map(drop) } else { TcpListener::bind(port.address).map(drop) };
    let Err(error) = bound else { return Ok(()) };
    let (kind, flag) = if port.udp { ("UDP", "-lpnu") } else { ("TCP", "-lpnt") };
    let (address, number) = (port.address, port.address.port());
    match error.kind() {
        std::io::ErrorKind::AddrInUse => bail!(
            "{kind} port {number} for {} is taken ({address}): see by whom with  ss {flag} 'sport = :{number}'  or move all ports with --port-offset 1000",
            port.owner
        ),
        _ => bail!("cannot bind {kind} {address} for {}: {error}", port.owner),
    }
}

/// This machine's addresses; none when they cannot be listed, then the page's certificate does not name them.
pub fn own_addresses() -> Vec<IpAddr> {
    let addresses = if_addrs::get_if_addrs().unwrap_or_default();
    addresses.into_iter().map(|interface| interface.ip()).filter(|ip| !is_link_local(*ip)).collect()
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// This machine's network.
pub struct Machine;

impl Network for Machine {
    fn is_local(&self, ip: Ipv4Addr) -> bool {
        UdpSocket::bind((ip, 0)).is_ok()
    }

    fn source_towards(&self, ip: Ipv4Addr) -> Option<Ipv4Addr> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
        // Connecting a UDP socket sends nothing; it asks the routing table.
        socket.connect((ip, 9)).ok()?;
        match socket.local_addr().ok()?.ip() {
            IpAddr::V4(ip) => Some(ip),
            IpAddr::V6(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_is_named_with_its_owner_and_the_way_out() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("listener");
        let port = Port { address: taken.local_addr().expect("address"), udp: false, owner: "call page".into() };
        let message = check_free(&port).expect_err("taken").to_string();
        let number = port.address.port();
        assert!(message.starts_with(&format!("TCP port {number} for call page is taken")), "{message}");
        assert!(message.contains(&format!("ss -lpnt 'sport = :{number}'")) && !message.contains('\n'), "{message}");
        drop(taken);
        check_free(&port).expect("free again");
    }
}
