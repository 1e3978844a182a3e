//! What the configuration's defaults are found from.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::ops::RangeInclusive;

/// Facts of this machine, looked up once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Machine {
    /// Cores this process may run on.
    pub(super) cores: usize,
    /// Source address of the IPv4 default route.
    pub(super) route_v4: Option<Ipv4Addr>,
    /// Source address of the IPv6 default route.
    pub(super) route_v6: Option<Ipv6Addr>,
}

impl Machine {
    /// Asks the kernel. No packet is sent.
    pub(super) fn look() -> Self {
        // Documentation addresses (RFC 5737, RFC 3849): connecting a datagram socket only asks for the route.
        let v4 = source_towards((Ipv4Addr::UNSPECIFIED, 0).into(), (Ipv4Addr::new(192, 0, 2, 1), 9).into());
        let documentation = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
        let v6 = source_towards((Ipv6Addr::UNSPECIFIED, 0).into(), (documentation, 9).into());
        Self {
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            route_v4: match v4 {
                Some(IpAddr::V4(ip)) => Some(ip),
                _ => None,
            },
            route_v6: match v6 {
                Some(IpAddr::V6(ip)) => Some(ip),
                _ => None,
            },
        }
    }
}

fn source_towards(local: SocketAddr, remote: SocketAddr) -> Option<IpAddr> {
    let socket = UdpSocket::bind(local).ok()?;
    socket.connect(remote).ok()?;
    let ip = socket.local_addr().ok()?.ip();
    (!ip.is_unspecified()).then_some(ip)
}

/// Ports in `wanted` that the kernel may hand to any outgoing socket: inside `net.ipv4.ip_local_port_range` and not in
/// `ip_local_reserved_ports`. None when there is no such port, or no such kernel.
pub(super) fn ephemeral_overlap(wanted: &RangeInclusive<u16>) -> Option<RangeInclusive<u16>> {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).ok();
    overlap(wanted, &read("ip_local_port_range")?, &read("ip_local_reserved_ports").unwrap_or_default())
}

fn overlap(wanted: &RangeInclusive<u16>, ephemeral: &str, reserved: &str) -> Option<RangeInclusive<u16>> {
    let mut bounds = ephemeral.split_whitespace().map(str::parse::<u16>);
    let (low, high) = (bounds.next()?.ok()?, bounds.next()?.ok()?);
    let low = low.max(*wanted.start());
    let high = high.min(*wanted.end());
    let reserved: Vec<(u16, u16)> = reserved
        .trim()
        .split(',')
        .filter_map(|part| {
            let (from, to) = part.split_once('-').unwrap_or((part, part));
            Some((from.parse().ok()?, to.parse().ok()?))
        })
        .collect();
    let is_free = |port: &u16| !reserved.iter().any(|(from, to)| (from..=to).contains(&port));
    let first = (low..=high).find(is_free)?;
    let last = (low..=high).rev().find(is_free)?;
    Some(first..=last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_ports_are_not_in_the_way() {
        let cases = [
            ("Debian's default", "32768\t60999\n", "\n", Some(49152..=60999)),
            ("below", "1024 49151", "", None),
            ("all reserved", "32768 60999", "49152-65535\n", None),
            ("some reserved", "32768 60999", "49152-60000,60999", Some(60001..=60998)),
            ("not numbers", "x", "", None),
        ];
        for (what, ephemeral, reserved, expected) in cases {
            assert_eq!(overlap(&(49152..=65535), ephemeral, reserved), expected, "{what}");
        }
    }
}
