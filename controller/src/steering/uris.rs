//! The URIs by which a client reaches a node.

use turn_core::Transport;

use super::Query;
use crate::fleet::{NodeListener, NodeRecord, NodeView};

/// Whether the node has a listener for the transports asked for.
pub(super) fn fits(node: &NodeView, query: &Query) -> bool {
    node.record.listeners.iter().any(|listener| is_usable(listener, query))
}

/// The URIs of a node for a query. IPv4 comes first because Janus stops at an IPv6 literal; within a family
/// UDP, TCP, TLS, DTLS. What is encrypted goes to the node's host name if it has one: certificates seldom hold IPs.
pub(super) fn uris(node: &NodeView, query: &Query) -> Vec<String> {
    let NodeRecord { listeners, public_host, .. } = &node.record;
    let mut listeners: Vec<_> = listeners.iter().filter(|listener| is_usable(listener, query)).collect();
    listeners.sort_by_key(|listener| (listener.address.is_ipv6(), listener.transport, listener.address));
    let mut uris = Vec::with_capacity(listeners.len());
    for listener in listeners {
        // RFC 7065 §3.1: turns with transport=udp is DTLS (RFC 7350 §4.6).
        let (scheme, transport) = match listener.transport {
            Transport::Udp => ("turn", "udp"),
            Transport::Tcp => ("turn", "tcp"),
            Transport::Tls => ("turns", "tcp"),
            Transport::Dtls => ("turns", "udp"),
        };
        let uri = if scheme == "turns" && !public_host.is_empty() {
            format!("{scheme}:{public_host}:{}?transport={transport}", listener.address.port())
        } else {
            // SocketAddr writes IPv6 in brackets.
            format!("{scheme}:{}?transport={transport}", listener.address)
        };
        // One name stands for both families.
        if !uris.contains(&uri) {
            uris.push(uri);
        }
    }
    uris
}

fn is_usable(listener: &NodeListener, query: &Query) -> bool {
    // A wildcard is where a relay listens, never where a client reaches it.
    query.wants(listener.transport) && !listener.address.ip().is_unspecified()
}
