//! TCP allocations (RFC 6062).

use std::net::SocketAddr;

use turn_core::{ClaimError, ConnectError, FiveTuple, Path, PeerConnectionId};

use super::super::stun::{self, CONNECTION_ID, FINGERPRINT, Read, XOR_PEER_ADDRESS};
use super::methods::{Done, stun_address};
use super::{Allocation, Answer, Expect, Model, S, Signature, error};

/// RFC 6062 §5.2: at least 30 seconds.
const CONNECT_TIMEOUT: u64 = 30 * S;
/// RFC 6062 §5.2 and §5.3.
const BIND_TIMEOUT: u64 = 30 * S;

/// A connection between a relayed address and a peer.
#[derive(Clone, Debug)]
pub struct Connection {
    pub id: PeerConnectionId,
    pub peer: SocketAddr,
    pub phase: Phase,
}

#[derive(Clone, Debug)]
pub enum Phase {
    /// A Connect waits for its answer.
    Connecting {
        until: u64,
        asked: Asked,
    },
    /// It waits for a ConnectionBind; one may have claimed it already.
    Pending {
        until: u64,
        claimed: bool,
    },
    Bound,
}

/// What an answer that comes later needs.
#[derive(Clone, Debug)]
pub struct Asked {
    pub transaction: [u8; 12],
    signature: Signature,
    fingerprint: bool,
}

impl Asked {
    pub(super) fn new(message: &Read, signature: Signature) -> Self {
        Self { transaction: message.transaction, signature, fingerprint: message.has(FINGERPRINT) }
    }

    fn answer(&self, code: u16, attributes: Vec<(u16, Option<Vec<u8>>)>) -> Answer {
        Answer { code, attributes, signature: self.signature.clone(), fingerprint: self.fingerprint }
    }
}

impl Connection {
    pub(super) fn until(&self) -> Option<u64> {
        match self.phase {
            Phase::Connecting { until, .. } | Phase::Pending { until, .. } => Some(until),
            Phase::Bound => None,
        }
    }
}

impl Model {
    /// RFC 6062 §5.2. `Ok(None)` is answered when the peer has.
    pub(super) fn connect(
        &mut self,
        from: FiveTuple,
        path: Path,
        message: &Read,
        name: &[u8],
        asked: Asked,
    ) -> Result<Option<()>, u16> {
        let (until, most) = (self.now + CONNECT_TIMEOUT, self.max_connections);
        let policy = self.policy.clone();
        let dialled = self.dials.pop_front();
        let allocation = self.held(&from, path, name)?;
        let Some(connections) = &mut allocation.connections else { return Err(437) };
        let peer = message.find(XOR_PEER_ADDRESS).ok_or(400_u16)?;
        let peer = stun_address(peer, message).ok_or(400_u16)?;
        if !allocation.relayed.iter().any(|relayed| relayed.address.is_ipv4() == peer.is_ipv4()) {
            return Err(443);
        }
        if connections.iter().any(|connection| connection.peer == peer) {
            return Err(446);
        }
        if policy.check_ip(peer.ip()).is_err() || peer.port() == 0 {
            return Err(403);
        }
        if connections.len() >= most {
            return Err(508);
        }
        let (to, result) = dialled.expect("a connection must be begun");
        assert_eq!(to, peer);
        let id = result.map_err(|error| match error {
            ConnectError::Forbidden => 403_u16,
            ConnectError::Failed => 447,
            ConnectError::NoRoom => 508,
        })?;
        connections.push(Connection { id, peer, phase: Phase::Connecting { until, asked } });
        Ok(None)
    }

    /// RFC 6062 §5.4.
    pub(super) fn connection_bind(&mut self, from: FiveTuple, path: Path, message: &Read, name: &[u8]) -> Done {
        if !matches!(path, Path::Connection(_)) || self.by_five_tuple(&from).is_some() {
            return Err(400);
        }
        let id = message.find(CONNECTION_ID).and_then(|id| id.try_into().ok()).ok_or(400_u16)?;
        match self.claim(PeerConnectionId(u32::from_be_bytes(id)), name) {
            Ok(()) => Ok(Vec::new()),
            Err(ClaimError::Unknown) => Err(400),
            Err(ClaimError::OtherUser) => Err(441),
        }
    }

    fn claim(&mut self, id: PeerConnectionId, name: &[u8]) -> Result<(), ClaimError> {
        let whose =
            |allocation: &&Allocation| allocation.connections.iter().flatten().any(|connection| connection.id == id);
        let owner = self.allocations.iter().find(whose).map(|allocation| allocation.username.clone());
        let (Some((_, connection)), Some(owner)) = (self.find_connection(id), owner) else {
            return Err(ClaimError::Unknown);
        };
        let Phase::Pending { claimed: claimed @ false, .. } = &mut connection.phase else {
            return Err(ClaimError::Unknown);
        };
        if owner != name {
            return Err(ClaimError::OtherUser);
        }
        *claimed = true;
        Ok(())
    }

    /// A peer connects (RFC 6062 §5.3): the indication, and where it goes.
    pub fn peer_arrives(&mut self, at: SocketAddr, peer: SocketAddr, id: PeerConnectionId) -> Expect {
        let (until, most) = (self.now + BIND_TIMEOUT, self.max_connections);
        let allocation = self.allocations.iter_mut().find(|allocation| allocation.is_at(at));
        let Some(allocation) = allocation else { return Expect::Silence };
        let permitted = allocation.permissions.iter().any(|(ip, _)| *ip == peer.ip());
        match &mut allocation.connections {
            Some(connections) if permitted && connections.len() < most => {
                connections.push(Connection { id, peer, phase: Phase::Pending { until, claimed: false } });
                Expect::Attempt { to: allocation.five_tuple, path: allocation.path, peer, id }
            }
            _ => Expect::Silence,
        }
    }

    /// The connection to a peer is there: the Connect succeeds (RFC 6062 §5.2).
    pub fn connected(&mut self, id: PeerConnectionId) -> Option<(FiveTuple, Path, [u8; 12], Answer)> {
        let until = self.now + BIND_TIMEOUT;
        let (allocation, connection) = self.find_connection(id)?;
        let Phase::Connecting { asked, .. } = connection.phase.clone() else { return None };
        connection.phase = Phase::Pending { until, claimed: false };
        let answer = asked.answer(0, vec![(CONNECTION_ID, Some(id.0.to_be_bytes().to_vec()))]);
        Some((allocation.0, allocation.1, asked.transaction, answer))
    }

    /// A ConnectionBind has claimed it.
    pub fn bound(&mut self, id: PeerConnectionId) {
        if let Some((_, connection)) = self.find_connection(id) {
            connection.phase = Phase::Bound;
        }
    }

    /// It failed or closed.
    pub fn connection_closed(&mut self, id: PeerConnectionId) -> Option<(FiveTuple, Path, [u8; 12], Answer)> {
        let ((to, path), connection) = self.find_connection(id)?;
        let phase = connection.phase.clone();
        for allocation in &mut self.allocations {
            allocation.connections.iter_mut().for_each(|all| all.retain(|connection| connection.id != id));
        }
        let Phase::Connecting { asked, .. } = phase else { return None };
        Some((to, path, asked.transaction, asked.answer(447, Vec::new())))
    }

    fn find_connection(&mut self, id: PeerConnectionId) -> Option<((FiveTuple, Path), &mut Connection)> {
        for allocation in &mut self.allocations {
            let whose = (allocation.five_tuple, allocation.path);
            if let Some(found) = allocation.connections.iter_mut().flatten().find(|connection| connection.id == id) {
                return Some((whose, found));
            }
        }
        None
    }

    /// Connections whose time has come, and the answers to the Connects among them.
    pub fn due_connections(&mut self) -> Vec<(FiveTuple, Path, [u8; 12], Answer)> {
        let now = self.now;
        let due: Vec<PeerConnectionId> = self
            .allocations
            .iter()
            .flat_map(|allocation| allocation.connections.iter().flatten())
            .filter(|connection| connection.until().is_some_and(|until| until <= now))
            .map(|connection| connection.id)
            .collect();
        due.into_iter().filter_map(|id| self.connection_closed(id)).collect()
    }

    /// What the policy forbids ends; a Connect among them is answered as one that took too long.
    pub(super) fn forbid_connections(&mut self) {
        let (now, policy) = (self.now, self.policy.clone());
        for allocation in &mut self.allocations {
            allocation.connections.iter_mut().for_each(|all| {
                all.retain_mut(|connection| {
                    if policy.check_ip(connection.peer.ip()).is_ok() {
                        return true;
                    }
                    match &mut connection.phase {
                        Phase::Connecting { until, .. } => {
                            *until = now;
                            true
                        }
                        _ => false,
                    }
                });
            });
        }
    }

    /// Whether a method is one of RFC 6062 that this server offers.
    pub(super) fn is_tcp_method(&self, method: u16) -> bool {
        self.tcp && [stun::CONNECT, stun::CONNECTION_BIND].contains(&method)
    }

    /// RFC 6062 §5.2: a Connect is answered later, or refused now.
    pub(super) fn connect_request(
        &mut self,
        from: FiveTuple,
        path: Path,
        message: &Read,
        name: &[u8],
        signature: Signature,
    ) -> Expect {
        let asked = Asked::new(message, signature.clone());
        match self.connect(from, path, message, name, asked) {
            Ok(_) => Expect::Silence,
            Err(code) => Expect::Answer(error(code, signature, message)),
        }
    }
}
