//! A small internet in network namespaces: servers on public addresses, two clients behind symmetric NATs.
//!
//! patchbay holds its namespaces by file descriptor, so nothing is left behind whichever way a test ends.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, bail, ensure};
use patchbay::{Device, Lab, Nat, NatConfig, Router, RouterPreset};

use crate::cable::Cable;
use crate::place::Place;
use crate::process::Host;

/// The lab.
pub struct NatLab {
    lab: Lab,
    data_center: Router,
    alice: Client,
    bob: Client,
}

/// Servers on public addresses, each in a network namespace of its own, on one Ethernet; nobody behind a NAT.
pub struct DataCenter {
    lab: Lab,
    router: Router,
}

impl DataCenter {
    /// Nobody in it yet.
    ///
    /// # Errors
    /// Not root, or the kernel refuses.
    pub async fn start() -> Result<Self> {
        let lab = internet().await?;
        let router = lab.add_router("dc").preset(RouterPreset::PublicV4).build().await?;
        Ok(Self { lab, router })
    }

    /// Adds a machine with a public address of its own.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn server(&self, name: &str) -> Result<Place> {
        server(&self.lab, &self.router, name).await
    }

    /// The cable of a server.
    ///
    /// # Errors
    /// It has none.
    pub async fn cable(&self, server: &Place) -> Result<Cable> {
        Cable::of(&self.router, server).await
    }

    /// An address on the servers' Ethernet that none of them has.
    ///
    /// # Errors
    /// The Ethernet has no network.
    pub fn free_address(&self) -> Result<IpAddr> {
        free_address(&self.router)
    }
}

async fn internet() -> Result<Lab> {
    if !nix::unistd::geteuid().is_root() {
        bail!("network namespaces need root: run the tests as root");
    }
    Lab::builder().allow_real_root().build().await.context("make network namespaces")
}

fn free_address(router: &Router) -> Result<IpAddr> {
    let network = router.downstream_cidr().context("no network")?;
    Ok(Ipv4Addr::from(u32::from(network.broadcast()) - 20).into())
}

async fn server(lab: &Lab, router: &Router, name: &str) -> Result<Place> {
    let device = lab.add_device(name).uplink(router.id()).build().await?;
    let address = device.ip().with_context(|| format!("{name} has no address"))?;
    Ok(Place { host: Host::Device(device), address: address.into() })
}

/// A client and the NAT before it.
pub struct Client {
    device: Device,
    router: Router,
}

impl Client {
    /// Where its programs run.
    #[must_use]
    pub fn host(&self) -> Host {
        Host::Device(self.device.clone())
    }

    /// Where a server behind its NAT stands.
    ///
    /// # Errors
    /// It has no address.
    pub fn place(&self) -> Result<Place> {
        Ok(Place { host: self.host(), address: self.device.ip().context("no address")?.into() })
    }

    /// Puts another NAT before it; flows that exist are forgotten.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn behind(&self, nat: impl Into<Option<NatConfig>>) -> Result<()> {
        self.router.set_nat(nat).await
    }

    /// Lets UDP through its NAT or not, flows that exist included; TCP always passes.
    ///
    /// # Errors
    /// nftables refuses.
    pub async fn block_udp(&self, blocked: bool) -> Result<()> {
        self.firewall(if blocked { Some("meta l4proto udp drop") } else { None }).await
    }

    /// Lets nothing through its NAT but `tcp` or `udp` to these addresses and ports, flows that exist included.
    ///
    /// # Errors
    /// nftables refuses.
    pub async fn only(&self, ways: &[(&str, SocketAddr)]) -> Result<()> {
        let mut rules = String::new();
        for (protocol, server) in ways {
            let family = if server.is_ipv4() { "ip" } else { "ip6" };
            for end in ["daddr", "saddr"] {
                let port = if end == "daddr" { "dport" } else { "sport" };
                let (address, number) = (server.ip(), server.port());
                write!(rules, "{family} {end} {address} {protocol} {port} {number} accept; add rule inet lab block ")?;
            }
        }
        self.firewall(Some(&(rules + "drop"))).await
    }

    /// Replaces the rules for what passes the NAT.
    async fn firewall(&self, rules: Option<&str>) -> Result<()> {
        // `add` before `delete`: deleting what is not there is an error.
        let mut text = "add table inet lab; delete table inet lab".to_owned();
        if let Some(rules) = rules {
            text += "; add table inet lab; add chain inet lab block { type filter hook forward priority 5; }; add rule inet lab block ";
            text += rules;
        }
        let mut command = tokio::process::Command::new("nft");
        command.arg(&text);
        let status = self.router.spawn_command(command)?.wait().await?;
        ensure!(status.success(), "nft {text}: {status}");
        Ok(())
    }
}

impl NatLab {
    /// Two clients, each behind a NAT that gives every destination another random port.
    ///
    /// # Errors
    /// Not root, or the kernel refuses.
    pub async fn start() -> Result<Self> {
        let lab = internet().await?;
        let data_center = lab.add_router("dc").preset(RouterPreset::PublicV4).build().await?;
        let alice = Self::client(&lab, "alice").await?;
        let bob = Self::client(&lab, "bob").await?;
        Ok(Self { lab, data_center, alice, bob })
    }

    async fn client(lab: &Lab, name: &str) -> Result<Client> {
        let router = lab.add_router(&format!("nat-{name}")).nat(Nat::Strict).build().await?;
        let device = lab.add_device(name).uplink(router.id()).build().await?;
        Ok(Client { device, router })
    }

    /// Adds a server with a public address of its own.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn server(&self, name: &str) -> Result<Place> {
        server(&self.lab, &self.data_center, name).await
    }

    /// The cable of a server.
    ///
    /// # Errors
    /// It has none.
    pub async fn cable(&self, server: &Place) -> Result<Cable> {
        Cable::of(&self.data_center, server).await
    }

    /// An address on the servers' Ethernet that none of them has.
    ///
    /// # Errors
    /// The Ethernet has no network.
    pub fn free_address(&self) -> Result<IpAddr> {
        free_address(&self.data_center)
    }

    /// What `client` sends to a UDP port of the first server arrives at the second from now on, and what that one answers
    /// comes from the first: as when an anycast route flips, or a load balancer chooses anew.
    ///
    /// # Errors
    /// nftables refuses.
    pub async fn divert(&self, client: IpAddr, [first, second]: [IpAddr; 2], port: u16) -> Result<()> {
        // Stateless, so that flows that exist are diverted too.
        let rules = format!(
            "add table ip divert; \
             add chain ip divert there {{ type filter hook prerouting priority -400; }}; \
             add rule ip divert there ip saddr {client} ip daddr {first} udp dport {port} ip daddr set {second} notrack; \
             add rule ip divert there ip saddr {second} ip daddr {client} udp sport {port} ip saddr set {first} notrack"
        );
        let mut command = tokio::process::Command::new("nft");
        command.arg(&rules);
        let status = self.data_center.spawn_command(command)?.wait().await?;
        ensure!(status.success(), "nft {rules}: {status}");
        Ok(())
    }

    /// How two servers see one and the same UDP socket of the first client.
    ///
    /// # Errors
    /// They do not see it.
    pub async fn mappings_of_alice(&self) -> Result<[SocketAddr; 2]> {
        let mut servers = Vec::new();
        for name in ["reflector-1", "reflector-2"] {
            let device = match self.lab.device_by_name(name) {
                Some(device) => device,
                None => self.lab.add_device(name).uplink(self.data_center.id()).build().await?,
            };
            let address = SocketAddr::from((device.ip().context("no address")?, 7000));
            servers.push((address, device.spawn_reflector(address).await?));
        }
        let alice = self.alice.device.clone();
        let (first, second) = (servers[0].0, servers[1].0);
        Ok([alice.probe_udp_mapping(first)?, alice.probe_udp_mapping(second)?])
    }

    /// The first client.
    #[must_use]
    pub fn alice(&self) -> &Client {
        &self.alice
    }

    /// The second client.
    #[must_use]
    pub fn bob(&self) -> &Client {
        &self.bob
    }
}
