//! The other relays of the cluster, as the controller lists them.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::Arc;

use rustc_hash::FxHashMap;
use sha2::{Digest, Sha256};
use turn_core::MemberId;

/// Members are numbered below this.
pub const MOST_MEMBERS: usize = 1024;

/// The other relays at one moment.
#[derive(Clone, Debug, Default)]
pub struct MemberList {
    /// All but this one.
    pub members: Vec<Member>,
    /// Serial numbers of certificates that are no longer good, whoever shows them: the bytes of the DER integer
    /// without leading zeros.
    pub revoked_serials: Vec<Vec<u8>>,
}

/// Another relay.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its number, from [`MemberNumbers`].
    pub id: MemberId,
    /// Its node id, as in its certificate.
    pub node_id: Arc<str>,
    /// Where its backbone listens, best first. Where there is none, only it can begin a link.
    pub addresses: Vec<SocketAddr>,
    /// Its relay IPs, advertised: the only ones it sends from.
    pub relay_ips: Vec<IpAddr>,
    /// Its relayed ports: the only ones it sends from.
    pub relay_ports: RangeInclusive<u16>,
}

impl Member {
    /// Whether an address is one of its relayed addresses, or could be.
    pub(super) fn owns(&self, address: SocketAddr) -> bool {
        self.relay_ports.contains(&address.port()) && self.relay_ips.contains(&address.ip())
    }
}

/// Numbers node ids: one node has one number for as long as the process lives.
#[derive(Debug, Default)]
pub struct MemberNumbers {
    number_by_node: FxHashMap<String, MemberId>,
}

impl MemberNumbers {
    /// The number of a node; none where [`MOST_MEMBERS`] others have been seen.
    pub fn number(&mut self, node_id: &str) -> Option<MemberId> {
        if let Some(number) = self.number_by_node.get(node_id) {
            return Some(*number);
        }
        if self.number_by_node.len() >= MOST_MEMBERS {
            return None;
        }
        let number = MemberId(u16::try_from(self.number_by_node.len()).ok()?);
        self.number_by_node.insert(node_id.to_owned(), number);
        Some(number)
    }
}

/// Names a node where a frame has to: the first 64 bits of its id's SHA-256. Numbers mean something on their own node
/// only.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) struct NodeTag(pub(super) u64);

impl NodeTag {
    pub(super) fn of(node_id: &str) -> Self {
        let digest = Sha256::digest(node_id.as_bytes());
        Self(digest.iter().take(8).fold(0, |tag, byte| tag << 8 | u64::from(*byte)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_keeps_its_number_and_the_last_number_is_the_last() {
        let mut numbers = MemberNumbers::default();
        assert_eq!(numbers.number("a"), Some(MemberId(0)));
        assert_eq!(numbers.number("b"), Some(MemberId(1)));
        assert_eq!(numbers.number("a"), Some(MemberId(0)));
        for node in 2..MOST_MEMBERS {
            assert!(numbers.number(&node.to_string()).is_some());
        }
        assert_eq!(numbers.number("one too many"), None);
        assert_eq!(numbers.number("b"), Some(MemberId(1)));
    }

    #[test]
    fn a_member_owns_its_addresses_at_relayed_ports_only() {
        let member = Member {
            id: MemberId(0),
            node_id: "a".into(),
            addresses: Vec::new(),
            relay_ips: vec![[192, 0, 2, 1].into()],
            relay_ports: 49152..=50000,
        };
        let owns = |ip: [u8; 4], port: u16| member.owns((ip, port).into());
        assert!(owns([192, 0, 2, 1], 49152) && owns([192, 0, 2, 1], 50000));
        assert!(!owns([192, 0, 2, 1], 50001) && !owns([192, 0, 2, 1], 3478) && !owns([192, 0, 2, 2], 49152));
    }
}
