//! An allocation's record for tests to begin with; each changes what it is about. Tests of other crates take this file by
//! its path.

use std::net::SocketAddr;

use turn_core::{AllocationId, FiveTuple, PeerTransport, Record, RelayedAddr, Transport};

/// Alice's over UDP, relayed at this address by the relay of the same IP, from `since` (Unix ms) for ten minutes; bare of
/// everything that an allocation may lack.
pub(crate) fn record(id: AllocationId, relayed: SocketAddr, since: u64) -> Record {
    Record {
        relay_address: relayed.ip(),
        epoch: 1,
        sequence: 1,
        id,
        five_tuple: FiveTuple {
            transport: Transport::Udp,
            client: ([192, 0, 2, 1], 5000).into(),
            server: (relayed.ip(), 3478).into(),
        },
        relayed: vec![RelayedAddr { bound: relayed, advertised: relayed }],
        peer_transport: PeerTransport::Udp,
        session: None,
        username: b"alice".to_vec(),
        created_at: since,
        expires_at: since + 600_000,
        family_expires_at: Vec::new(),
        mobility: None,
        proxy: None,
        transaction_id: None,
        address_error: None,
        reservation: None,
        permissions: Vec::new(),
        channels: Vec::new(),
    }
}
