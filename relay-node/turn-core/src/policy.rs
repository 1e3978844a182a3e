//! The one address policy for all ways out (promise P8, abuse.md A).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::PeerAddr;

/// A network in CIDR form.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Network {
    /// Base address.
    pub address: IpAddr,
    /// Prefix length, 0..=32 or 0..=128.
    pub prefix: u8,
}

/// Which peers may be reached. The default denies everything that is not the public internet.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Policy {
    /// Denied beyond the built-in list: control addresses, pod and service networks.
    pub denied: Vec<Network>,
    /// Relay IPs of this cluster: reachable whatever range they are in, at relayed ports only (the host's route decides about ports).
    pub members: Vec<IpAddr>,
    /// The lab switch: opens loopback and nothing else.
    pub allow_loopback: bool,
    /// Nobody but [`Policy::members`] is a peer: this relay has no way out of the cluster.
    pub members_only: bool,
}

/// A peer is forbidden: 403 (RFC 8656 §9.2).
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the peer address is forbidden by the address policy")]
pub struct Forbidden;

/// Built-in list: IPv4 networks that are not the public internet (abuse.md A).
const DENIED_V4: [([u8; 4], u8); 9] = [
    ([0, 0, 0, 0], 8),
    ([10, 0, 0, 0], 8),
    ([100, 64, 0, 0], 10),
    ([127, 0, 0, 0], 8),
    // Link-local, and the metadata services of clouds.
    ([169, 254, 0, 0], 16),
    ([172, 16, 0, 0], 12),
    ([192, 168, 0, 0], 16),
    ([224, 0, 0, 0], 4),
    ([240, 0, 0, 0], 4),
];

const TEREDO: ([u16; 8], u8) = ([0x2001, 0, 0, 0, 0, 0, 0, 0], 32);
const SIX_TO_FOUR: ([u16; 8], u8) = ([0x2002, 0, 0, 0, 0, 0, 0, 0], 16);

/// Built-in list: IPv6 networks, among them every form that carries an IPv4 address, whichever it is.
const DENIED_V6: [([u16; 8], u8); 9] = [
    // `::`, `::1` and IPv4-compatible.
    ([0; 8], 96),
    // IPv4-mapped.
    ([0, 0, 0, 0, 0, 0xFFFF, 0, 0], 96),
    // NAT64.
    ([0x64, 0xFF9B, 0, 0, 0, 0, 0, 0], 96),
    TEREDO,
    SIX_TO_FOUR,
    ([0xFC00, 0, 0, 0, 0, 0, 0, 0], 7),
    ([0xFE80, 0, 0, 0, 0, 0, 0, 0], 10),
    // Site-local, deprecated.
    ([0xFEC0, 0, 0, 0, 0, 0, 0, 0], 10),
    ([0xFF00, 0, 0, 0, 0, 0, 0, 0], 8),
];

impl Network {
    /// Whether an address lies in it. Families never match each other.
    pub fn contains(&self, ip: IpAddr) -> bool {
        match (self.address, ip) {
            (IpAddr::V4(network), IpAddr::V4(ip)) => in_v4(network, self.prefix, ip),
            (IpAddr::V6(network), IpAddr::V6(ip)) => in_v6(network, self.prefix, ip),
            _ => false,
        }
    }
}

fn in_v4(network: Ipv4Addr, prefix: u8, ip: Ipv4Addr) -> bool {
    let differing = network.to_bits() ^ ip.to_bits();
    differing.leading_zeros() >= u32::from(prefix).min(32)
}

fn in_v6(network: Ipv6Addr, prefix: u8, ip: Ipv6Addr) -> bool {
    let differing = network.to_bits() ^ ip.to_bits();
    differing.leading_zeros() >= u32::from(prefix).min(128)
}

/// Whether an address is one of Teredo or 6to4: a client that has one gets no allocation (RFC 8656 §21.4), because its
/// packets could be made to go round through relays of the tunnel for ever.
pub fn is_tunneled(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(_) => false,
        IpAddr::V6(ip) => {
            [TEREDO, SIX_TO_FOUR].iter().any(|(network, prefix)| in_v6(Ipv6Addr::from(*network), *prefix, ip))
        }
    }
}

impl Policy {
    /// Whether a permission for this IP may exist. Takes the address as it was written: the IPv6 forms of IPv4
    /// addresses (mapped, compatible, NAT64, 6to4, Teredo) are forbidden whatever they carry.
    ///
    /// # Errors
    /// [`Forbidden`].
    pub fn check_ip(&self, ip: IpAddr) -> Result<(), Forbidden> {
        if self.members.contains(&ip) {
            return Ok(());
        }
        if self.members_only || self.denied.iter().any(|network| network.contains(ip)) {
            return Err(Forbidden);
        }
        let denied = match ip {
            // 127/8 and ::1, and no other form of them.
            ip if self.allow_loopback && ip.is_loopback() => false,
            IpAddr::V4(ip) => DENIED_V4.iter().any(|(network, prefix)| in_v4(Ipv4Addr::from(*network), *prefix, ip)),
            IpAddr::V6(ip) => DENIED_V6.iter().any(|(network, prefix)| in_v6(Ipv6Addr::from(*network), *prefix, ip)),
        };
        if denied { Err(Forbidden) } else { Ok(()) }
    }

    /// Whether a packet may be sent to this peer: as [`Policy::check_ip`], and port 0 is forbidden.
    ///
    /// # Errors
    /// [`Forbidden`].
    pub fn check(&self, peer: PeerAddr) -> Result<(), Forbidden> {
        if peer.port() == 0 {
            return Err(Forbidden);
        }
        self.check_ip(peer.ip())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("literal")
    }

    #[test]
    fn default_denies_what_is_not_the_public_internet() {
        // abuse.md A; first, last and neighbours of each network.
        let denied = [
            "0.0.0.0",
            "0.255.255.255",
            "10.0.0.0",
            "10.255.255.255",
            "100.64.0.0",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.255",
            "169.254.0.0",
            "169.254.169.254",
            "172.16.0.0",
            "172.31.255.255",
            "192.168.0.0",
            "192.168.255.255",
            "224.0.0.0",
            "239.255.255.255",
            "240.0.0.0",
            "255.255.255.255",
            "::",
            "::1",
            "fc00::",
            "fdff::1",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "feff::1",
            "ff00::",
            "ff02::1",
            // IPv4 in IPv6, with a private and with a public address.
            "::ffff:10.0.0.1",
            "::ffff:8.8.8.8",
            "::10.0.0.1",
            "::8.8.8.8",
            "64:ff9b::10.0.0.1",
            "64:ff9b::8.8.8.8",
            "2001::1",
            "2001:0:4136:e378:8000:63bf:3fff:fdd2",
            "2002::",
            "2002:a00:1::1",
            "2002:808:808::1",
        ];
        for text in denied {
            assert_eq!(Policy::default().check_ip(ip(text)), Err(Forbidden), "{text}");
        }
        let allowed = [
            "1.0.0.0",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "126.255.255.255",
            "128.0.0.0",
            "169.253.255.255",
            "169.255.0.0",
            "172.15.255.255",
            "172.32.0.0",
            "192.167.255.255",
            "192.169.0.0",
            "223.255.255.255",
            "2001:1::1",
            "2001:db8::1",
            "2003::1",
            "2a00::1",
            "fbff::1",
            "64:ff9b:0:1::1",
        ];
        for text in allowed {
            assert_eq!(Policy::default().check_ip(ip(text)), Ok(()), "{text}");
        }
    }

    #[test]
    fn the_lab_switch_opens_loopback_and_nothing_else() {
        let policy = Policy { allow_loopback: true, ..Policy::default() };
        for text in ["127.0.0.1", "127.255.255.255", "::1"] {
            assert_eq!(policy.check_ip(ip(text)), Ok(()), "{text}");
        }
        for text in ["::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::127.0.0.1", "10.0.0.1", "0.0.0.0", "::", "fe80::1"] {
            assert_eq!(policy.check_ip(ip(text)), Err(Forbidden), "{text}");
        }
    }

    #[test]
    fn members_are_reachable_in_any_range() {
        let policy = Policy {
            denied: vec![Network { address: ip("10.0.0.0"), prefix: 8 }],
            members: vec![ip("10.0.0.5")],
            ..Policy::default()
        };
        assert_eq!(policy.check_ip(ip("10.0.0.5")), Ok(()));
        assert_eq!(policy.check_ip(ip("10.0.0.6")), Err(Forbidden));
        assert_eq!(policy.check_ip(ip("::ffff:10.0.0.5")), Err(Forbidden));
    }

    #[test]
    fn the_operator_denies_more() {
        let network = |text: &str, prefix| Network { address: ip(text), prefix };
        let policy = Policy {
            denied: vec![network("198.51.100.0", 24), network("2001:db8::", 32), network("127.0.0.9", 32)],
            allow_loopback: true,
            ..Policy::default()
        };
        let cases: &[(&str, bool)] = &[
            ("198.51.100.255", false),
            ("198.51.101.0", true),
            ("2001:db8:ffff::1", false),
            ("2001:db9::1", true),
            ("127.0.0.9", false),
            ("127.0.0.8", true),
        ];
        for (text, allowed) in cases {
            assert_eq!(policy.check_ip(ip(text)).is_ok(), *allowed, "{text}");
        }
        assert!(network("1.2.3.4", 0).contains(ip("200.0.0.1")));
        assert!(!network("1.2.3.4", 0).contains(ip("2001:db8::1")));
        assert!(network("1.2.3.4", 255).contains(ip("1.2.3.4")));
    }

    #[test]
    fn port_0_is_nobody() {
        let peer = |text: &str| PeerAddr::new(text.parse().expect("literal"));
        assert_eq!(Policy::default().check(peer("192.0.2.1:0")), Err(Forbidden));
        assert_eq!(Policy::default().check(peer("192.0.2.1:1")), Ok(()));
    }

    #[test]
    fn without_a_way_out_members_alone_are_peers() {
        let policy = Policy {
            members: vec![ip("203.0.113.9"), ip("10.0.0.9")],
            allow_loopback: true,
            members_only: true,
            ..Policy::default()
        };
        for (text, allowed) in [("203.0.113.9", true), ("10.0.0.9", true), ("203.0.113.8", false), ("127.0.0.1", false)]
        {
            assert_eq!(policy.check_ip(ip(text)).is_ok(), allowed, "{text}");
        }
    }
}
