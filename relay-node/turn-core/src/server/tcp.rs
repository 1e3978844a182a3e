//! TCP allocations (RFC 6062): Connect, ConnectionBind, and connections of peers.
//!
//! The server that has the allocation knows its peer data connections by name, from the first packet to the last; the
//! sockets are the host's. A ConnectionBind may come to another server of the node, because it comes on a connection
//! of its own: the host brings the two together ([`Host::claim`], [`PeerEvent::Bound`]).

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand_core::Rng;

use super::auth::User;
use super::reply::{Asked, Request};
use super::table::Slot;
use super::{ClaimError, ConnectError, DropReason, Host, Now, Out, Output, PeerEvent, Route, Server, Verdict};
use crate::wire::attribute::{ConnectionId, XorPeerAddress};
use crate::wire::{AttributeType, Class, ErrorCode, MessageWriter, Method, TransactionId};
use crate::{Family, IntegrityKey, Path, PeerAddr, PeerConnectionId, PeerTransport, Policy, RelayedAddr};

/// RFC 6062 §5.2: how long a connection to a peer may take; at least 30 seconds.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// RFC 6062 §5.2, §5.3: how long a peer data connection waits for its ConnectionBind.
const BIND_TIMEOUT: Duration = Duration::from_secs(30);

/// The peer data connections of an allocation: few, so a list.
#[derive(Debug, Default)]
pub(super) struct PeerConnections(Vec<PeerConnection>);

#[derive(Debug)]
struct PeerConnection {
    id: PeerConnectionId,
    peer: PeerAddr,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// The Connect request is being processed.
    Connecting { until: Instant, asked: Asked, key: IntegrityKey },
    /// It waits for its ConnectionBind.
    Pending { until: Instant },
    /// A client data connection is bound to it.
    Bound,
}

impl PeerConnection {
    fn until(&self) -> Option<Instant> {
        match self.phase {
            Phase::Connecting { until, .. } | Phase::Pending { until } => Some(until),
            Phase::Bound => None,
        }
    }
}

impl PeerConnections {
    /// The names of all.
    pub(super) fn ids(&self) -> impl Iterator<Item = PeerConnectionId> + '_ {
        self.0.iter().map(|connection| connection.id)
    }

    /// When the first one has waited too long.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.0.iter().filter_map(PeerConnection::until).min()
    }

    fn has_peer(&self, peer: PeerAddr) -> bool {
        self.0.iter().any(|connection| connection.peer == peer)
    }

    fn find(&mut self, id: PeerConnectionId) -> Option<&mut PeerConnection> {
        self.0.iter_mut().find(|connection| connection.id == id)
    }

    fn remove(&mut self, id: PeerConnectionId) -> Option<PeerConnection> {
        let index = self.0.iter().position(|connection| connection.id == id)?;
        Some(self.0.swap_remove(index))
    }

    /// Takes out one that has waited too long.
    fn take_due(&mut self, now: Instant) -> Option<PeerConnection> {
        let index = self.0.iter().position(|connection| connection.until().is_some_and(|until| until <= now))?;
        Some(self.0.swap_remove(index))
    }

    /// Takes out those of a family, whose relayed address has gone (RFC 8656 §8.1).
    pub(super) fn forget(&mut self, family: Family) -> Vec<PeerConnectionId> {
        self.0.extract_if(.., |connection| Family::of(connection.peer.ip()) == family).map(|ended| ended.id).collect()
    }

    /// Takes out what a policy forbids, but for a Connect that still has to be answered: its time has come.
    fn enforce(&mut self, policy: &Policy, now: Instant) -> Vec<PeerConnectionId> {
        let mut ended = Vec::new();
        self.0.retain_mut(|connection| {
            if policy.check(connection.peer).is_ok() {
                return true;
            }
            if let Phase::Connecting { until, .. } = &mut connection.phase {
                *until = now;
                return true;
            }
            ended.push(connection.id);
            false
        });
        ended
    }
}

impl Server {
    /// What REQUESTED-TRANSPORT asks for, where it can be had (RFC 8656 §7.2, RFC 6062 §5.1).
    pub(super) fn peer_transport(&self, request: &Request<'_>, number: u8) -> Result<PeerTransport, ErrorCode> {
        let offered = |transport: &PeerTransport| match transport {
            PeerTransport::Udp => true,
            PeerTransport::Tcp => self.settings.features.tcp_allocations,
        };
        let transport = PeerTransport::of(number).filter(offered).ok_or(ErrorCode::UNSUPPORTED_TRANSPORT_PROTOCOL)?;
        let of_udp = [AttributeType::DONT_FRAGMENT, AttributeType::EVEN_PORT, AttributeType::RESERVATION_TOKEN];
        if transport == PeerTransport::Tcp
            && (!request.from.transport.is_stream() || of_udp.iter().any(|of_udp| request.message.contains(*of_udp)))
        {
            return Err(ErrorCode::BAD_REQUEST);
        }
        Ok(transport)
    }

    /// RFC 6062 §5.2, in its order but for what cannot be told before the address is read. It is answered when the
    /// peer has, by [`Server::on_peer_connection`].
    pub(super) fn connect(
        &mut self,
        request: &Request<'_>,
        user: &User<'_>,
        host: &mut impl Host,
    ) -> Result<Verdict, ErrorCode> {
        let slot = self.held(request, user)?;
        let allocation = self.table.get(slot);
        let connections = allocation.peer_connections().ok_or(ErrorCode::ALLOCATION_MISMATCH)?;
        let Ok(Some(XorPeerAddress(address))) = request.message.attribute() else {
            return Err(ErrorCode::BAD_REQUEST);
        };
        let peer = PeerAddr::new(address);
        // As written, not canonical: an IPv4-mapped address is of no IPv4 allocation's family and in no policy.
        let relay = allocation.relays().of(Family::of(address.ip()));
        let relayed = relay.ok_or(ErrorCode::PEER_ADDRESS_FAMILY_MISMATCH)?.address;
        if peer.socket_addr() == address && connections.has_peer(peer) {
            return Err(ErrorCode::CONNECTION_ALREADY_EXISTS);
        }
        let policy = &self.settings.policy;
        if policy.check_ip(address.ip()).is_err() || policy.check(peer).is_err() {
            return Err(ErrorCode::FORBIDDEN);
        }
        // A member's ports are no peers'; which of this node's own are, the host knows.
        match host.route(peer) {
            Route::Internet if policy.members.contains(&peer.ip()) => return Err(ErrorCode::FORBIDDEN),
            Route::Member(_) => return Err(ErrorCode::FORBIDDEN),
            Route::Internet | Route::Worker(_) | Route::Nobody => {}
        }
        if connections.0.len() >= self.settings.limits.peer_connections_per_allocation {
            return Err(ErrorCode::INSUFFICIENT_CAPACITY);
        }
        let id = host.connect(relayed, peer).map_err(|error| match error {
            ConnectError::Forbidden => ErrorCode::FORBIDDEN,
            ConnectError::Failed => ErrorCode::CONNECTION_TIMEOUT_OR_FAILURE,
            ConnectError::NoRoom => ErrorCode::INSUFFICIENT_CAPACITY,
        })?;
        let until = request.now.mono + CONNECT_TIMEOUT;
        let phase = Phase::Connecting { until, asked: request.asked(), key: user.key };
        self.table.change_peer_connections(slot, |connections| {
            connections.0.push(PeerConnection { id, peer, phase });
        });
        Ok(Verdict::Done)
    }

    /// RFC 6062 §5.4. The allocation may be another server's.
    pub(super) fn connection_bind(
        &mut self,
        request: &Request<'_>,
        user: &User<'_>,
        host: &mut impl Host,
    ) -> Result<Verdict, ErrorCode> {
        let Path::Connection(connection) = request.path else {
            return Err(ErrorCode::BAD_REQUEST);
        };
        // RFC 6062 §4.3: on a new connection. One that has an allocation is a control connection.
        if self.table.by_five_tuple(&request.from).is_some() {
            return Err(ErrorCode::BAD_REQUEST);
        }
        let Ok(Some(ConnectionId(id))) = request.message.attribute() else {
            return Err(ErrorCode::BAD_REQUEST);
        };

        let peer = PeerConnectionId(id);
        // Of an allocation that this very request has ended, because it came on a new connection from the same port: the
        // host has not heard yet.
        let ending = |output: &Output| matches!(output, Output::ClosePeer(ending) if *ending == peer);
        if self.outputs.iter().any(ending) {
            return Err(ErrorCode::BAD_REQUEST);
        }
        host.claim(peer, user.name).map_err(|error| match error {
            ClaimError::Unknown => ErrorCode::BAD_REQUEST,
            ClaimError::OtherUser => ErrorCode::WRONG_CREDENTIALS,
        })?;
        self.outputs.push_back(Output::Join { connection, peer });
        Ok(self.success(request, user, |_| {}))
    }

    /// See [`super::Input::PeerConnection`].
    pub(super) fn on_peer_connection(
        &mut self,
        now: Now,
        relayed: &RelayedAddr,
        id: PeerConnectionId,
        event: PeerEvent,
    ) -> Verdict {
        if let PeerEvent::Arrived(peer) = event {
            return self.peer_arrived(now, relayed, id, peer);
        }
        let slot = self.table.by_bound(&relayed.bound);
        let known = slot.filter(|slot| {
            self.table
                .get(*slot)
                .peer_connections()
                .is_some_and(|connections| connections.ids().any(|known| known == id))
        });
        let Some(slot) = known else {
            // It ended here while it was on its way there.
            if matches!(event, PeerEvent::Connected | PeerEvent::Bound) {
                self.outputs.push_back(Output::ClosePeer(id));
            }
            return Verdict::Done;
        };
        match event {
            PeerEvent::Connected => self.peer_connected(now, slot, id),
            PeerEvent::Bound => {
                self.table.change_peer_connections(slot, |connections| {
                    if let Some(connection) = connections.find(id) {
                        connection.phase = Phase::Bound;
                    }
                });
                Verdict::Done
            }
            PeerEvent::Arrived(_) | PeerEvent::Failed | PeerEvent::Closed => {
                let removed = self.table.change_peer_connections(slot, |connections| connections.remove(id)).flatten();
                removed.map_or(Verdict::Done, |connection| self.refuse_connect(connection))
            }
        }
    }

    /// RFC 6062 §5.3.
    fn peer_arrived(&mut self, now: Now, relayed: &RelayedAddr, id: PeerConnectionId, peer: PeerAddr) -> Verdict {
        let slot = self
            .table
            .by_bound(&relayed.bound)
            .filter(|slot| self.table.get(*slot).relays().live(relayed.family(), now.mono).is_some());
        let refused = match slot.map(|slot| (slot, self.table.get(slot))) {
            None => Err(DropReason::NoAllocation),
            Some((slot, allocation)) => match allocation.peer_connections() {
                None => Err(DropReason::NoAllocation),
                // RFC 8656 §9: only the IP is compared.
                Some(_) if !allocation.permissions.allow(peer.ip(), now.mono) => Err(DropReason::NoPermission),
                Some(connections) if connections.0.len() >= self.settings.limits.peer_connections_per_allocation => {
                    Err(DropReason::PeerConnections)
                }
                Some(_) => Ok(slot),
            },
        };
        let slot = match refused {
            Ok(slot) => slot,
            Err(reason) => {
                self.outputs.push_back(Output::ClosePeer(id));
                return Verdict::Drop(reason);
            }
        };
        let phase = Phase::Pending { until: now.mono + BIND_TIMEOUT };
        self.table.change_peer_connections(slot, |connections| {
            connections.0.push(PeerConnection { id, peer, phase });
        });
        self.pend(slot, id);

        let mut transaction_id = TransactionId::default();
        self.rng.fill_bytes(&mut transaction_id.0);
        let method = Method::ConnectionAttempt;
        let mut writer = MessageWriter::new(&mut self.reply[..], Class::Indication, method, transaction_id);
        writer.attribute(&ConnectionId(id.0)).attribute(&XorPeerAddress(peer.socket_addr()));
        // 20 + 8 + 24 bytes at most.
        self.reply_len = writer.finish().unwrap_or(0);
        let allocation = self.table.get(slot);
        Verdict::Reply { out: Out::Client { to: allocation.five_tuple(), path: allocation.path() } }
    }

    fn peer_connected(&mut self, now: Now, slot: Slot, id: PeerConnectionId) -> Verdict {
        let pending = Phase::Pending { until: now.mono + BIND_TIMEOUT };
        let before = self.table.change_peer_connections(slot, |connections| {
            let connection = connections.find(id)?;
            match connection.phase {
                Phase::Connecting { asked, key, .. } => {
                    connection.phase = pending;
                    Some((asked, key))
                }
                Phase::Pending { .. } | Phase::Bound => None,
            }
        });
        let Some((asked, key)) = before.flatten() else {
            return Verdict::Done;
        };
        self.pend(slot, id);
        self.answer(&asked, Class::Success, Some((&key).into()), |writer| {
            writer.attribute(&ConnectionId(id.0));
        })
    }

    fn pend(&mut self, slot: Slot, connection: PeerConnectionId) {
        let limited = self.settings.limits.bytes_per_allocation != 0;
        let allocation = self.table.get_mut(slot);
        if limited {
            allocation.metered.get_or_insert_default().shared.allocation.get_or_insert_default();
        }
        let (username, client, account) =
            (allocation.username.clone(), allocation.five_tuple().client, allocation.account);
        let meters = allocation.metered.as_ref().map(|metered| metered.shared.clone()).unwrap_or_default();
        self.outputs.push_back(Output::Pend { connection, username, client, meters, account });
    }

    /// 447, if a Connect still waits for its answer.
    fn refuse_connect(&mut self, connection: PeerConnection) -> Verdict {
        let Phase::Connecting { asked, key, .. } = connection.phase else {
            return Verdict::Done;
        };
        self.answer(&asked, Class::Error, Some((&key).into()), |writer| {
            writer.attribute(&ErrorCode::CONNECTION_TIMEOUT_OR_FAILURE);
        })
    }

    /// Ends peer connections that have waited too long, up to the first one whose Connect has to be answered.
    pub(super) fn expire_peer_connections(&mut self, now: Now) -> Verdict {
        while let Some(slot) = self.table.connection_due(now.mono) {
            let due = self.table.change_peer_connections(slot, |connections| connections.take_due(now.mono)).flatten();
            let Some(connection) = due else {
                continue;
            };
            self.outputs.push_back(Output::ClosePeer(connection.id));
            if matches!(connection.phase, Phase::Connecting { .. }) {
                return self.refuse_connect(connection);
            }
        }
        Verdict::Done
    }

    /// What a new policy forbids stops at once (abuse.md A).
    pub(super) fn enforce_on_peer_connections(&mut self, now: Now, slot: Slot) {
        let policy = &self.settings.policy;
        let ended = self.table.change_peer_connections(slot, |connections| connections.enforce(policy, now.mono));
        self.outputs.extend(ended.into_iter().flatten().map(Output::ClosePeer));
    }
}

/// Where the control connection of a ConnectionBind comes from, if that is where the request comes from too: a client
/// has one address and many ports.
pub(super) fn control_of(request: &Request<'_>, host: &impl Host) -> Option<SocketAddr> {
    let Ok(Some(ConnectionId(id))) = request.message.attribute() else {
        return None;
    };
    host.control_of(PeerConnectionId(id)).filter(|client| client.ip() == request.from.client.ip())
}

#[cfg(test)]
#[path = "tcp_tests.rs"]
mod tests;
