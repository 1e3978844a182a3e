//! Addresses, one type per meaning.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// How a client reaches the relay (RFC 8656 §3.1).
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[repr(u8)]
pub enum Transport {
    /// Plain UDP.
    Udp = 1,
    /// Plain TCP.
    Tcp = 2,
    /// TLS over TCP.
    Tls = 3,
    /// DTLS over UDP (RFC 7350).
    Dtls = 4,
}

impl Transport {
    /// Whether messages are framed on a byte stream (RFC 8656 §12.5) that ends the allocation when it closes.
    pub fn is_stream(self) -> bool {
        matches!(self, Self::Tcp | Self::Tls)
    }

    /// Whether client and relay share a state that ends with the process, and the allocation with it: a connection, or
    /// a DTLS session, whose client has to begin anew.
    pub fn has_session(self) -> bool {
        self != Self::Udp
    }
}

/// Protocol between the relay and the peers of an allocation, as REQUESTED-TRANSPORT numbers it (RFC 8656 §18.8).
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum PeerTransport {
    /// A UDP allocation.
    #[default]
    Udp = 17,
    /// A TCP allocation (RFC 6062): its relayed transport address accepts connections.
    Tcp = 6,
}

impl PeerTransport {
    /// The protocol of an IP protocol number.
    pub fn of(number: u8) -> Option<Self> {
        [Self::Udp, Self::Tcp].into_iter().find(|transport| *transport as u8 == number)
    }
}

/// Address family as REQUESTED-ADDRESS-FAMILY writes it (RFC 8656 §18.7).
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum Family {
    /// 0x01.
    V4 = 1,
    /// 0x02.
    V6 = 2,
}

impl Family {
    /// The family of an address.
    pub fn of(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

/// What identifies an allocation (RFC 8656 §2.2): client and server transport address and the protocol between them.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct FiveTuple {
    /// Protocol between client and relay.
    pub transport: Transport,
    /// Client's (server-reflexive) address.
    pub client: SocketAddr,
    /// Address the client sent to; answers leave from it.
    pub server: SocketAddr,
}

/// Which of a worker's client-facing sockets.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct ListenerId(pub u16);

/// A stream connection or a DTLS session, unique in the life of the process.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct ConnectionId(pub u64);

/// Names a peer data connection (RFC 6062 §6.2.1, CONNECTION-ID): unique on its node, and not to be guessed.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PeerConnectionId(pub u32);

/// Where the host counts what an allocation sends and is sent, as [`Host::account`](crate::Host::account) said: the core
/// only carries it along.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct AccountId(u64);

impl AccountId {
    /// Nowhere.
    pub const NONE: Self = Self(0);
    const CROSSED: u64 = 1 << 31;

    /// Place `index` (below 2^31) of the host's, as long as that is known by `tag`, which is not 0.
    pub fn new(index: u32, tag: u32) -> Self {
        Self(u64::from(tag) << 32 | (u64::from(index) & (Self::CROSSED - 1)))
    }

    /// The place.
    pub fn index(self) -> u32 {
        (self.0 & (Self::CROSSED - 1)) as u32
    }

    /// What the place must be known by.
    pub fn tag(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// The same in the hands of another thread than the allocation's own.
    #[must_use]
    pub fn crossed(self) -> Self {
        Self(self.0 | Self::CROSSED)
    }

    /// Whether it is.
    pub fn has_crossed(self) -> bool {
        self.0 & Self::CROSSED != 0
    }
}

/// A worker thread of this relay, counted from 0.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct WorkerId(pub u16);

/// Another relay of this cluster, as the backbone numbers it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct MemberId(pub u16);

/// The way an answer to a client leaves this relay.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Path {
    /// From this datagram socket, from the five-tuple's server address.
    Listener(ListenerId),
    /// From this datagram socket, as above, to the proxy that passes the client's datagrams on, which knows the way.
    Proxied(ListenerId, SocketAddr),
    /// On this connection, or by this session.
    Connection(ConnectionId),
    /// Through the member at which the client's packets arrive.
    Ingress(MemberId),
}

/// A peer's transport address, canonical: an IPv4-mapped IPv6 address is its IPv4 address.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PeerAddr(SocketAddr);

impl PeerAddr {
    /// Canonicalises `address`.
    pub fn new(address: SocketAddr) -> Self {
        Self(SocketAddr::new(address.ip().to_canonical(), address.port()))
    }

    /// The canonical address.
    pub fn socket_addr(self) -> SocketAddr {
        self.0
    }

    /// The canonical IP.
    pub fn ip(self) -> IpAddr {
        self.0.ip()
    }

    /// The port.
    pub fn port(self) -> u16 {
        self.0.port()
    }
}

/// A relayed transport address (RFC 8656 §2.2): what the relay binds and what it tells the client. They differ
/// behind a one-to-one NAT, in the IP only.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct RelayedAddr {
    /// Address of the socket.
    pub bound: SocketAddr,
    /// Address peers see, sent in XOR-RELAYED-ADDRESS.
    pub advertised: SocketAddr,
}

impl RelayedAddr {
    /// Family of the allocation (RFC 8656 §7.2: the family REQUESTED-ADDRESS-FAMILY asks for).
    pub fn family(&self) -> Family {
        Family::of(self.advertised.ip())
    }

    /// The port, the same on both sides.
    pub fn port(&self) -> u16 {
        self.advertised.port()
    }
}

/// The unspecified IPv4 transport address, for fixed tables.
pub const UNSPECIFIED: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_canonical() {
        let mapped: SocketAddr = "[::ffff:192.0.2.1]:9".parse().expect("literal");
        assert_eq!(PeerAddr::new(mapped).socket_addr(), "192.0.2.1:9".parse().expect("literal"));
    }
}
