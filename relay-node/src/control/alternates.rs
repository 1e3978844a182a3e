//! Where new clients may be sent (pure): what the controller proposes, checked against the member list (promise P8).

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use turn_core::{Alternate, Transport};
use turnpike_proto::v1;

/// Most targets that are looked at.
const MOST: usize = 64;
/// Ports below 1024 that Chromium sends TURN to; it gives a relay up that names another one.
const LOW_PORTS: [u16; 3] = [53, 80, 443];

/// The targets that are listeners of other members, in their order. `own` are this relay's IPs.
pub(super) fn alternates(
    targets: &[v1::RedirectTarget],
    members: &BTreeMap<String, Vec<IpAddr>>,
    own: &[IpAddr],
) -> Vec<Alternate> {
    let mut all: Vec<Alternate> = Vec::new();
    for target in targets.iter().take(MOST) {
        match alternate(target, members, own) {
            Some(alternate) if !all.contains(&alternate) => all.push(alternate),
            Some(_) => {}
            None => tracing::debug!(node = target.node_id, "a redirect target is not a listener of another member"),
        }
    }
    all
}

fn alternate(
    target: &v1::RedirectTarget,
    members: &BTreeMap<String, Vec<IpAddr>>,
    own: &[IpAddr],
) -> Option<Alternate> {
    let transport = match target.transport() {
        v1::Transport::Udp => Transport::Udp,
        v1::Transport::Tcp => Transport::Tcp,
        v1::Transport::Tls => Transport::Tls,
        v1::Transport::Dtls => Transport::Dtls,
        v1::Transport::Unspecified => return None,
    };
    let address: SocketAddr = target.address.parse().ok()?;
    let ips = members.get(&target.node_id)?;
    let good_port = address.port() >= 1024 || LOW_PORTS.contains(&address.port());
    let is_member = ips.contains(&address.ip()) && !own.contains(&address.ip());
    let relays_ipv6 = ips.iter().any(IpAddr::is_ipv6);
    (is_member && good_port).then_some(Alternate { transport, address, relays_ipv6 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members() -> BTreeMap<String, Vec<IpAddr>> {
        let ips = |texts: &[&str]| texts.iter().map(|text| text.parse().expect("literal")).collect();
        BTreeMap::from([
            ("eu-1".to_owned(), ips(&["198.51.100.1"])),
            ("eu-2".to_owned(), ips(&["198.51.100.2", "2001:db8::2"])),
            ("eu-3".to_owned(), ips(&["198.51.100.3"])),
        ])
    }

    fn target(node: &str, transport: v1::Transport, address: &str) -> v1::RedirectTarget {
        v1::RedirectTarget { node_id: node.into(), transport: transport.into(), address: address.into() }
    }

    #[test]
    fn only_listeners_of_other_members_are_alternates() {
        // Promise P8: a controller that was lied to sends nobody to a stranger.
        let udp = |node, address| target(node, v1::Transport::Udp, address);
        let cases = [
            ("a member", udp("eu-2", "198.51.100.2:3478"), true),
            ("a member over IPv6", udp("eu-2", "[2001:db8::2]:3478"), true),
            ("HTTPS's port", udp("eu-3", "198.51.100.3:443"), true),
            ("this relay", udp("eu-1", "198.51.100.1:3478"), false),
            ("this relay under another's name", udp("eu-2", "198.51.100.1:3478"), false),
            ("a member's name, a stranger's address", udp("eu-2", "203.0.113.66:3478"), false),
            ("another member's address", udp("eu-2", "198.51.100.3:3478"), false),
            ("nobody", udp("eu-9", "203.0.113.66:3478"), false),
            ("loopback", udp("eu-2", "127.0.0.1:3478"), false),
            ("mapped", udp("eu-2", "[::ffff:198.51.100.2]:3478"), false),
            ("port 0", udp("eu-2", "198.51.100.2:0"), false),
            ("a port no browser sends to", udp("eu-2", "198.51.100.2:25"), false),
            ("no address", udp("eu-2", "relay.example.org:3478"), false),
            ("no transport", target("eu-2", v1::Transport::Unspecified, "198.51.100.2:3478"), false),
        ];
        let own = ["198.51.100.1".parse().expect("literal")];
        for (what, target, expected) in cases {
            assert_eq!(alternates(&[target], &members(), &own).len(), usize::from(expected), "{what}");
        }
    }

    #[test]
    fn the_order_is_kept_and_the_number_bounded() {
        let targets = [
            target("eu-3", v1::Transport::Tcp, "198.51.100.3:443"),
            target("eu-2", v1::Transport::Udp, "198.51.100.2:3478"),
            target("eu-2", v1::Transport::Udp, "198.51.100.2:3478"),
            target("eu-3", v1::Transport::Udp, "198.51.100.3:3478"),
        ];
        let found = alternates(&targets, &members(), &[]);
        let shown: Vec<_> = found.iter().map(|a| (a.transport, a.address.to_string(), a.relays_ipv6)).collect();
        assert_eq!(
            shown,
            [
                (Transport::Tcp, "198.51.100.3:443".to_owned(), false),
                (Transport::Udp, "198.51.100.2:3478".to_owned(), true),
                (Transport::Udp, "198.51.100.3:3478".to_owned(), false),
            ]
        );
        let many: Vec<_> =
            (0..1000).map(|n| target("eu-3", v1::Transport::Udp, &format!("198.51.100.3:{}", 2000 + n))).collect();
        assert_eq!(alternates(&many, &members(), &[]).len(), MOST);
    }
}
