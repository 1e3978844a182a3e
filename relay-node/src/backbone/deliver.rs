//! What the backbone hands over, and to whom.

use std::net::SocketAddr;

use turn_core::{IpMeta, MemberId};

/// A packet that came from another member.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Inbound {
    /// From a relayed address of `from`, which is shown to be its own, to an address of this relay.
    Data {
        /// Who has sent it.
        from: MemberId,
        /// One of its relayed addresses.
        source: SocketAddr,
        /// At one of this relay's IPs; nobody may be at the port.
        destination: SocketAddr,
        /// IP header fields.
        ip: IpMeta,
    },
    /// A client's packet that arrived at `from`.
    Ingress {
        /// Where it arrived.
        from: MemberId,
        /// Where it came from.
        client: SocketAddr,
        /// Where the client sent it to.
        server: SocketAddr,
        /// IP header fields.
        ip: IpMeta,
    },
    /// An answer to what this relay has sent to `from` as an Ingress: to leave from `server` to `client`.
    IngressReply {
        /// Who has the client's allocation.
        from: MemberId,
        /// Where to.
        client: SocketAddr,
        /// Where from.
        server: SocketAddr,
        /// IP header fields.
        ip: IpMeta,
    },
}

/// Takes what arrives; called on the backbone's thread, which must not be held up.
pub trait Deliver: Send + 'static {
    /// One packet, whose bytes are gone afterwards. `false` where nobody is there or there is no room; it is counted.
    fn deliver(&mut self, what: Inbound, packet: &[u8]) -> bool;

    /// No more for the moment: whoever got something may be woken.
    fn flush(&mut self);
}
