//! Who listens where (pure, but for the questions asked of this machine through [`Network`]).

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};

/// Port of TURN, registered.
const TURN: u16 = 3478;
/// Port of TURN over TLS, registered.
const TURN_TLS: u16 = 5349;
const PAGE: u16 = 8000;
const CONTROLLER_HTTP: u16 = 8080;
const CONTROLLER_GRPC: u16 = 9443;
const RELAY_HTTP: u16 = 9478;
/// UDP port by which relays reach one another.
const BACKBONE: u16 = 3480;

/// The relays in the order in which they are given up when there are fewer addresses: two regions come before two
/// relays in one.
const RELAYS: [(&str, &str); 3] = [("eu-1", "eu"), ("us-1", "us"), ("eu-2", "eu")];

/// Loopback addresses of the relays in [`RELAYS`]' order: 127.0.0.2 is eu-2's, as the numbers read.
const LOOPBACK: [Ipv4Addr; 3] = [Ipv4Addr::new(127, 0, 0, 1), Ipv4Addr::new(127, 0, 0, 3), Ipv4Addr::new(127, 0, 0, 2)];

/// The whole local cluster.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Plan {
    /// Ordered by id.
    pub relays: Vec<RelayPlan>,
    /// Where the controller serves gRPC.
    pub grpc: SocketAddr,
    /// Where the controller serves discovery and console.
    pub http: SocketAddr,
    /// Where the call page is served.
    pub page: SocketAddr,
    /// Whether the call page is served over TLS.
    pub https: bool,
    /// Addresses a browser may use for the call page; the first is printed.
    pub page_hosts: Vec<Ipv4Addr>,
}

/// One relay.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RelayPlan {
    /// Its node id.
    pub id: &'static str,
    /// Its region.
    pub region: &'static str,
    /// Where it hears clients, UDP and TCP.
    pub listen: SocketAddr,
    /// Where it hears clients over TLS.
    pub listen_tls: SocketAddr,
    /// Where it hears the other relays.
    pub backbone: SocketAddr,
    /// What relayed sockets bind.
    pub relay_ip: Ipv4Addr,
    /// What clients and peers are told.
    pub public_ip: Ipv4Addr,
    /// Health and metrics.
    pub http: SocketAddr,
}

impl RelayPlan {
    /// Where clients reach it.
    pub fn advertised(&self) -> SocketAddr {
        SocketAddr::new(self.public_ip.into(), self.listen.port())
    }

    /// Whether this relay must be allowed to send to loopback peers.
    pub fn is_lab(&self) -> bool {
        self.relay_ip.is_loopback()
    }
}

/// What has to be asked of the machine.
pub trait Network {
    /// Whether sockets here can be bound to `ip`.
    fn is_local(&self, ip: Ipv4Addr) -> bool;
    /// The local address from which `ip` is reached.
    fn source_towards(&self, ip: Ipv4Addr) -> Option<Ipv4Addr>;
}

/// Why there can be no such cluster.
#[derive(Debug, Eq, PartialEq)]
pub enum PlanError {
    /// More public addresses than relays.
    TooMany(usize),
    /// The same address twice.
    Twice(Ipv4Addr),
    /// Not an address other devices can use.
    Unusable(Ipv4Addr),
    /// A second address that is not this machine's: translation to one private address cannot tell relays apart.
    SecondTranslated(Ipv4Addr),
}

impl std::error::Error for PlanError {}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMany(given) => {
                write!(f, "--public-ip: {given} addresses given, there are {} relays", RELAYS.len())
            }
            Self::Twice(ip) => write!(f, "--public-ip: {ip} is given twice; each relay needs an address of its own"),
            Self::Unusable(ip) => {
                write!(f, "--public-ip: no other device can reach {ip}; give this machine's address on your network")
            }
            Self::SecondTranslated(ip) => write!(
                f,
                "--public-ip: {ip} is not an address of this machine; only one address may be translated from outside"
            ),
        }
    }
}

/// Lays the cluster out.
///
/// # Errors
/// [`PlanError`], for people.
pub fn plan(public: &[Ipv4Addr], https: bool, offset: u16, network: &impl Network) -> Result<Plan, PlanError> {
    let loopback = |port: u16| SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port + offset);
    check_public(public, network)?;
    let addresses = if public.is_empty() { &LOOPBACK[..] } else { public };
    let mut relays: Vec<_> = RELAYS
        .iter()
        .zip(addresses)
        .map(|(&(id, region), &public_ip)| {
            let bound = bound_for(public_ip, network);
            let listen = SocketAddr::new(bound.into(), TURN + offset);
            let listen_tls = SocketAddr::new(bound.into(), TURN_TLS + offset);
            let backbone = SocketAddr::new(bound.into(), BACKBONE + offset);
            RelayPlan { id, region, listen, listen_tls, backbone, relay_ip: bound, public_ip, http: loopback(0) }
        })
        .collect();
    relays.sort_by_key(|relay| relay.id);
    for (relay, port) in relays.iter_mut().zip(RELAY_HTTP..) {
        relay.http = loopback(port);
    }
    let page = match public.first() {
        None => loopback(PAGE),
        Some(_) => SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), PAGE + offset),
    };
    Ok(Plan {
        relays,
        grpc: loopback(CONTROLLER_GRPC),
        http: loopback(CONTROLLER_HTTP),
        page,
        https,
        page_hosts: public.iter().copied().chain([Ipv4Addr::LOCALHOST]).collect(),
    })
}

fn check_public(public: &[Ipv4Addr], network: &impl Network) -> Result<(), PlanError> {
    if public.len() > RELAYS.len() {
        return Err(PlanError::TooMany(public.len()));
    }
    for (index, &ip) in public.iter().enumerate() {
        if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() {
            return Err(PlanError::Unusable(ip));
        }
        if public[..index].contains(&ip) {
            return Err(PlanError::Twice(ip));
        }
        if public.len() > 1 && !network.is_local(ip) {
            return Err(PlanError::SecondTranslated(ip));
        }
    }
    Ok(())
}

/// An address that is not this machine's is taken for one that a router translates to this machine.
fn bound_for(ip: Ipv4Addr, network: &impl Network) -> Ipv4Addr {
    if ip.is_loopback() || network.is_local(ip) { ip } else { network.source_towards(ip).unwrap_or(ip) }
}

impl Plan {
    /// Every port the cluster binds here, with whose it is.
    pub fn ports(&self) -> Vec<Port> {
        let tcp = |address, owner: &str| Port { address, udp: false, owner: owner.to_owned() };
        let mut ports = vec![
            tcp(self.grpc, "controller (gRPC)"),
            tcp(self.http, "controller (discovery and console)"),
            tcp(self.page, "call page"),
        ];
        for relay in &self.relays {
            let owner = format!("relay {}", relay.id);
            ports.push(Port { address: relay.listen, udp: true, owner: owner.clone() });
            ports.push(tcp(relay.listen, &owner));
            ports.push(Port { address: relay.backbone, udp: true, owner: format!("{owner} (backbone)") });
            ports.push(tcp(relay.listen_tls, &format!("{owner} (TLS)")));
            ports.push(tcp(relay.http, &format!("{owner} (health)")));
        }
        ports
    }

    /// The address of the call page to open, with its trailing slash.
    pub fn page_url(&self) -> String {
        let scheme = if self.https { "https" } else { "http" };
        let host = self.page_hosts.first().copied().unwrap_or(Ipv4Addr::LOCALHOST);
        format!("{scheme}://{host}:{}/", self.page.port())
    }

    /// The address of the console to open.
    pub fn console_url(&self) -> String {
        format!("http://{}/console", self.http)
    }

    /// Number of regions with relays.
    pub fn regions(&self) -> usize {
        let mut names: Vec<_> = self.relays.iter().map(|relay| relay.region).collect();
        names.sort_unstable();
        names.dedup();
        names.len()
    }
}

/// A port the cluster needs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Port {
    /// Where.
    pub address: SocketAddr,
    /// UDP, else TCP.
    pub udp: bool,
    /// Whose, for people.
    pub owner: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 192.0.2.2 and 192.0.2.3 are this machine's; everything is reached from the first.
    struct Lan;

    impl Network for Lan {
        fn is_local(&self, ip: Ipv4Addr) -> bool {
            ["192.0.2.2", "192.0.2.3"].iter().any(|own| own.parse() == Ok(ip))
        }

        fn source_towards(&self, _: Ipv4Addr) -> Option<Ipv4Addr> {
            "192.0.2.2".parse().ok()
        }
    }

    fn ip(text: &str) -> Ipv4Addr {
        text.parse().expect("address")
    }

    fn listens(plan: &Plan) -> Vec<(&str, String)> {
        plan.relays.iter().map(|relay| (relay.id, relay.listen.to_string())).collect()
    }

    #[test]
    fn by_default_three_relays_on_loopback_addresses_of_their_own() {
        let plan = plan(&[], false, 0, &Lan).expect("plan");
        assert_eq!(
            listens(&plan),
            [
                ("eu-1", "127.0.0.1:3478".to_owned()),
                ("eu-2", "127.0.0.2:3478".to_owned()),
                ("us-1", "127.0.0.3:3478".to_owned())
            ]
        );
        let health: Vec<_> = plan.relays.iter().map(|relay| relay.http.port()).collect();
        assert_eq!(health, [9478, 9479, 9480]);
        assert!(plan.relays.iter().all(RelayPlan::is_lab));
        assert_eq!(plan.page_url(), "http://127.0.0.1:8000/");
        assert_eq!(plan.console_url(), "http://127.0.0.1:8080/console");
        assert_eq!(plan.regions(), 2);
    }

    #[test]
    fn an_offset_moves_every_port() {
        let (base, moved) = (plan(&[], false, 0, &Lan).expect("plan"), plan(&[], false, 1000, &Lan).expect("plan"));
        for (base, moved) in base.ports().iter().zip(moved.ports()) {
            assert_eq!(moved.address.port(), base.address.port() + 1000, "{}", moved.owner);
        }
    }

    #[test]
    fn a_public_address_carries_one_relay_and_the_page_is_open_to_all() {
        let plan = plan(&[ip("192.0.2.2")], true, 0, &Lan).expect("plan");
        assert_eq!(listens(&plan), [("eu-1", "192.0.2.2:3478".to_owned())]);
        assert!(!plan.relays[0].is_lab(), "the lab switch is for loopback only");
        assert_eq!(plan.page_url(), "https://192.0.2.2:8000/");
        assert_eq!(plan.page.to_string(), "0.0.0.0:8000");
        assert!(plan.http.ip().is_loopback() && plan.grpc.ip().is_loopback());
    }

    #[test]
    fn two_addresses_make_two_regions() {
        let plan = plan(&[ip("192.0.2.2"), ip("192.0.2.3")], false, 0, &Lan).expect("plan");
        assert_eq!(plan.relays.iter().map(|relay| relay.region).collect::<Vec<_>>(), ["eu", "us"]);
    }

    #[test]
    fn a_translated_address_is_advertised_but_not_bound() {
        let plan = plan(&[ip("198.51.100.7")], false, 0, &Lan).expect("plan");
        assert_eq!(plan.relays[0].advertised().to_string(), "198.51.100.7:3478");
        assert_eq!(plan.relays[0].listen.to_string(), "192.0.2.2:3478");
        assert_eq!(plan.relays[0].relay_ip, ip("192.0.2.2"));
    }

    #[test]
    fn addresses_that_cannot_work_are_refused() {
        let (a, b, far) = (ip("192.0.2.2"), ip("192.0.2.3"), ip("198.51.100.7"));
        let cases: &[(&[Ipv4Addr], PlanError)] = &[
            (&[a, a], PlanError::Twice(a)),
            (&[ip("127.0.0.1")], PlanError::Unusable(ip("127.0.0.1"))),
            (&[ip("0.0.0.0")], PlanError::Unusable(ip("0.0.0.0"))),
            (&[a, far], PlanError::SecondTranslated(far)),
            (&[a, b, far, ip("198.51.100.8")], PlanError::TooMany(4)),
        ];
        for (public, expected) in cases {
            assert_eq!(plan(public, false, 0, &Lan).as_ref(), Err(expected), "{public:?}");
        }
    }
}
