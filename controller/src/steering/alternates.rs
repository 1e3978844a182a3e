//! Where a relay sends the clients it does not take itself: [`alternates`], pure, by the scores that [`choose`] goes by.
//!
//! [`choose`]: super::choose

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;

use turn_core::Transport;

use super::{NEAR_MS, Terms, load};
use crate::fleet::{NodeListener, NodeRecord, NodeState, NodeView, Snapshot};

/// Most other relays for a transport and a family.
const NODES: usize = 4;
/// Most alternates in all.
const MANY: usize = 64;

/// Another relay's listener.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Alternate {
    /// Of this node.
    pub node_id: String,
    /// Of the listener.
    pub transport: Transport,
    /// Advertised.
    pub address: SocketAddr,
}

/// The best relays for new clients of `own`, best first: ready ones, never `own` nor one at its address; the nearest
/// `NODES` for each transport and family. All ports of such a relay are named, because a client that came by port 443
/// may get through by no other. TLS and DTLS only where the certificate holds the IP: it is all that a client has of a
/// server it is sent to.
///
/// Relays that are equally near come in an order of their own for each `own`, so that several that drain do not all
/// send everybody to one.
pub fn alternates(snapshot: &Snapshot, terms: &Terms, own: &NodeRecord) -> Vec<Alternate> {
    let mut others: Vec<(u64, &NodeView)> = snapshot
        .nodes
        .values()
        .filter(|node| node.record.node_id != own.node_id && node.record.relay_address != own.relay_address)
        .filter(|node| node.state(&terms.thresholds) == NodeState::Ready)
        .map(|node| {
            let distance_ms = terms.between(&own.region, &node.record.region).rtt_ms;
            (u64::from(distance_ms) + load::penalty_ms(load::of(node, 0)), node)
        })
        .collect();
    let best = others.iter().map(|(score, _)| *score).min().unwrap_or(0);
    others.sort_by_cached_key(|(score, node)| {
        let mut hasher = DefaultHasher::new();
        (&own.node_id, &node.record.node_id).hash(&mut hasher);
        (score.saturating_sub(best).div_ceil(NEAR_MS + 1), hasher.finish())
    });

    let mut chosen: HashMap<(Transport, bool), Vec<&str>> = HashMap::new();
    let mut alternates = Vec::new();
    for (_, node) in others {
        let node_id = node.record.node_id.as_str();
        for listener in node.record.listeners.iter().filter(|listener| takes_redirected(listener, own)) {
            let nodes = chosen.entry((listener.transport, listener.address.is_ipv6())).or_default();
            if !nodes.contains(&node_id) {
                if nodes.len() == NODES {
                    continue;
                }
                nodes.push(node_id);
            }
            let (transport, address) = (listener.transport, listener.address);
            alternates.push(Alternate { node_id: node_id.to_owned(), transport, address });
        }
        if alternates.len() >= MANY {
            break;
        }
    }
    alternates.truncate(MANY);
    alternates
}

fn takes_redirected(listener: &NodeListener, own: &NodeRecord) -> bool {
    let reaches = match listener.transport {
        Transport::Udp | Transport::Tcp => true,
        Transport::Tls | Transport::Dtls => listener.ip_in_certificate,
    };
    // A wildcard is where a relay listens, never where a client reaches it.
    reaches
        && !listener.address.ip().is_unspecified()
        && !own.listeners.iter().any(|own| own.address == listener.address)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{fleet, listener, node, terms};
    use super::*;
    use crate::fleet::DrainRecord;

    #[test]
    fn only_others_that_take_clients_now_nearest_first() {
        let other = |id: &str, region: &str, last: u8| at(node(id, region), last);
        let mut draining = other("eu-2", "eu", 2);
        draining.drain = Some(DrainRecord::default());
        let mut stopping = other("eu-3", "eu", 3);
        stopping.load.ends_at = 1;
        let mut suspect = other("eu-4", "eu", 4);
        suspect.load.suspect = true;
        let mut overloaded = other("eu-5", "eu", 5);
        overloaded.load.overloaded = true;
        let standby = other("eu-1-standby", "eu", 1);
        let own = other("eu-1", "eu", 1);
        let fleet = fleet([
            own.clone(),
            standby,
            draining,
            stopping,
            suspect,
            overloaded,
            other("ap-1", "ap", 8),
            other("us-1", "us", 7),
            other("eu-6", "eu", 6),
        ]);
        let found = alternates(&fleet, &terms(), &own.record);
        let udp: Vec<&str> =
            found.iter().filter(|it| it.transport == Transport::Udp).map(|it| it.node_id.as_str()).collect();
        assert_eq!(udp, ["eu-6", "us-1", "ap-1"]);
        assert_eq!(found[0].address.to_string(), "198.51.100.6:3478");
        assert_eq!(alternates(&Snapshot::default(), &terms(), &own.record), []);
    }

    #[test]
    fn encrypted_ones_need_the_ip_in_their_certificate_and_every_port_is_named() {
        let own = at(node("eu-1", "eu"), 1);
        let mut with = at(node("eu-2", "eu"), 2);
        with.record.listeners = [
            (Transport::Tls, "198.51.100.2:443"),
            (Transport::Tls, "198.51.100.2:5349"),
            (Transport::Dtls, "198.51.100.2:5349"),
            (Transport::Udp, "[2001:db8::2]:3478"),
            (Transport::Udp, "0.0.0.0:3478"),
            // As behind one NAT.
            (Transport::Tcp, "198.51.100.1:3478"),
        ]
        .map(|(transport, address)| listener(transport, address))
        .to_vec();
        with.record.listeners[0].ip_in_certificate = true;
        with.record.listeners[2].ip_in_certificate = true;
        let mut found = |change: fn(&mut NodeView)| {
            change(&mut with);
            let found = alternates(&fleet([own.clone(), with.clone()]), &terms(), &own.record);
            found.into_iter().map(|it| format!("{:?} {}", it.transport, it.address)).collect::<Vec<_>>()
        };
        let v6 = "Udp [2001:db8::2]:3478";
        assert_eq!(found(|_| {}), ["Tls 198.51.100.2:443", "Dtls 198.51.100.2:5349", v6]);
        let both = found(|node| node.record.listeners[1].ip_in_certificate = true);
        assert_eq!(both, ["Tls 198.51.100.2:443", "Tls 198.51.100.2:5349", "Dtls 198.51.100.2:5349", v6]);
    }

    #[test]
    fn the_list_is_bounded_and_relays_that_drain_together_spread_their_clients() {
        let nodes = (1..=40).map(|last| at(node(&format!("eu-{last}"), "eu"), last));
        let fleet =
            Snapshot { nodes: nodes.map(|node| (node.record.node_id.clone(), node)).collect(), ..Snapshot::default() };
        let mut firsts = std::collections::BTreeSet::new();
        for node in fleet.nodes.values() {
            let found = alternates(&fleet, &terms(), &node.record);
            assert_eq!(found.len(), 2 * NODES, "UDP and TCP of the four best");
            assert_eq!(found, alternates(&fleet, &terms(), &node.record), "the same each time");
            assert!(found.iter().all(|it| it.node_id != node.record.node_id));
            firsts.insert(found[0].node_id.clone());
        }
        assert!(firsts.len() > 15, "{firsts:?}");
        let mut large = node("eu-50", "eu");
        large.record.relay_address = "198.51.100.50".parse().expect("literal");
        large.record.listeners =
            (1..=100).map(|port| listener(Transport::Udp, &format!("198.51.100.50:{port}"))).collect();
        let own = at(node("us-1", "us"), 1);
        let two = super::super::tests::fleet([own.clone(), large]);
        assert_eq!(alternates(&two, &terms(), &own.record).len(), MANY);
    }

    /// The node at an address of its own.
    fn at(mut node: NodeView, last: u8) -> NodeView {
        node.record.relay_address = std::net::IpAddr::from([198, 51, 100, last]);
        for listener in &mut node.record.listeners {
            listener.address.set_ip(node.record.relay_address);
        }
        node
    }
}
