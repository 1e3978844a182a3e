//! How allocations come back, are recorded and end; and what a change of settings does to them.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::channel::{CHANNEL_LIFETIME, Channel};
use super::directory::Directory;
use super::mobility::mobility_record;
use super::permission::PERMISSION_LIFETIME;
use super::relays::{Relay, Relays};
use super::table::{Allocation, Beginning, Slot};
use super::tcp::PeerConnections;
use super::{Host, Now, Output, Server};
use crate::nonce::NonceKeys;
use crate::wire::ChannelNumber;
use crate::{
    AllocationId, Change, ConnectionId, EndReason, Family, Path, PeerTransport, Record, RelayedAddr, Settings,
    credential,
};

impl Server {
    /// Notes a change of an allocation for journal and store.
    pub(super) fn record(&mut self, slot: Slot, now: Now) {
        let allocation = self.table.get_mut(slot);
        allocation.epoch = self.epoch;
        allocation.sequence += 1;
        let record = self.record_of(self.table.get(slot), now);
        self.outputs.push_back(Output::Record(Change::Put(Box::new(record))));
    }

    /// What an allocation is now, under the present ownership.
    pub(super) fn record_of(&self, allocation: &Allocation, now: Now) -> Record {
        let permissions = allocation.permissions.iter().filter(|(_, end)| *end > now.mono);
        let channels = allocation.channels.iter().filter(|channel| channel.deadline > now.mono);
        let ends = || allocation.relays().iter().map(|relay| wall(relay.deadline, now));
        let expires_at = ends().max().unwrap_or(now.wall);
        let differ = ends().any(|end| end != expires_at);
        let family_expires_at = if differ { ends().collect() } else { Vec::new() };
        Record {
            relay_address: self.relay_address,
            epoch: self.epoch,
            sequence: allocation.sequence,
            id: allocation.id,
            five_tuple: allocation.five_tuple(),
            relayed: allocation.relays().iter().map(|relay| relay.address).collect(),
            peer_transport: allocation.peer_transport(),
            mobility: mobility_record(allocation),
            proxy: match allocation.path() {
                Path::Proxied(_, proxy) => Some(proxy),
                Path::Listener(_) | Path::Connection(_) | Path::Ingress(_) => None,
            },
            transaction_id: allocation.transaction_id,
            address_error: allocation.address_error(),
            reservation: allocation.reservation(),
            username: allocation.username.to_vec(),
            session: allocation.session(),
            created_at: allocation.created_at,
            expires_at,
            family_expires_at,
            permissions: permissions.map(|(ip, end)| (ip, wall(end, now))).collect(),
            channels: channels
                .map(|channel| (channel.number.get(), channel.peer, wall(channel.deadline, now)))
                .collect(),
        }
    }

    /// Ends the part of an allocation in one family: its permissions and channels go with it, those of the other stay
    /// (RFC 8656 §8.1). False, and no change, if it is all there is. The change is not recorded yet.
    pub(super) fn end_family(&mut self, slot: Slot, family: Family) -> bool {
        if self.table.get(slot).relays().iter().count() > 1 {
            self.forget_permissions(slot, family);
        }
        let Some(relay) = self.table.remove_relay(slot, family) else {
            return false;
        };
        let allocation = self.table.get_mut(slot);
        allocation.channels.forget(family);
        let quota_key = credential::quota_key(&allocation.username).into();
        let ended = self.table.change_peer_connections(slot, |connections| connections.forget(family));
        self.outputs.extend(ended.into_iter().flatten().map(Output::ClosePeer));
        self.outputs.push_back(Output::Release { relayed: relay.address, quota_key });
        true
    }

    /// Ends an allocation: the tombstone first, then its addresses go back.
    pub(super) fn end(&mut self, slot: Slot, reason: EndReason) {
        let allocation = self.table.remove(slot);
        self.forget_mobility(&allocation);
        self.take_back_permissions(&allocation);
        self.outputs.push_back(Output::Record(Change::End {
            id: allocation.id,
            epoch: self.epoch,
            sequence: allocation.sequence + 1,
            reason,
        }));
        // RFC 6062 §5.5: its data connections end with it.
        let connections = allocation.peer_connections().into_iter().flat_map(PeerConnections::ids);
        self.outputs.extend(connections.map(Output::ClosePeer));
        for relay in allocation.relays().iter() {
            self.release(relay.address, &allocation.username);
        }
    }

    fn release(&mut self, relayed: RelayedAddr, username: &[u8]) {
        self.outputs.push_back(Output::Release { relayed, quota_key: credential::quota_key(username).into() });
    }

    /// Ends every allocation whose time has come, or the family of it whose time has.
    pub(super) fn expire(&mut self, now: Now) {
        while let Some(slot) = self.table.due(now.mono) {
            let allocation = self.table.get(slot);
            let ended = allocation.relays().iter().find(|relay| relay.deadline <= now.mono);
            match ended.map(|relay| relay.address.family()) {
                Some(family) if allocation.is_live(now.mono) && self.end_family(slot, family) => self.record(slot, now),
                _ => self.end(slot, EndReason::Expired),
            }
        }
    }

    /// A stream that took over the five-tuple of an older one proves that the older one has closed.
    pub(super) fn supersede_connection(&mut self, now: Now, from: &crate::FiveTuple, path: Path) {
        if let Some(slot) = self.table.by_five_tuple(from)
            && let held @ Path::Connection(_) = self.table.get(slot).path_of(from)
            && held != path
        {
            self.stream_closed(now, slot, held);
        }
    }

    pub(super) fn closed(&mut self, now: Now, connection: ConnectionId) {
        if let Some(slot) = self.table.by_connection(connection) {
            self.stream_closed(now, slot, Path::Connection(connection));
        }
    }

    pub(super) fn revoke(&mut self, id: AllocationId) {
        if let Some(slot) = self.table.by_id(id) {
            if let Path::Connection(connection) = self.table.get(slot).path() {
                self.outputs.push_back(Output::Close(connection));
            }
            self.end(slot, EndReason::Revoked);
        }
    }

    /// Takes new settings; what a new policy forbids stops at once (abuse.md A).
    pub(super) fn configure(&mut self, now: Now, settings: Arc<Settings>) {
        let policy_changed = settings.policy != self.settings.policy;
        if settings.static_users != self.settings.static_users || settings.realm != self.settings.realm {
            self.directory = Directory::new(&settings);
        }
        if settings.rest_secrets != self.settings.rest_secrets
            || settings.realm != self.settings.realm
            || settings.features != self.settings.features
        {
            self.known.forget();
        }
        if settings.nonce_keys != self.settings.nonce_keys {
            self.nonce_keys = NonceKeys::new(&settings.nonce_keys);
        }
        self.settings = settings;
        if !policy_changed {
            return;
        }
        let slots: Vec<Slot> = self.table.slots().collect();
        for slot in slots {
            let channels = self.table.get_mut(slot).channels.enforce(&self.settings.policy);
            let permissions = self.enforce_on_permissions(slot);
            if channels || permissions {
                self.record(slot, now);
            }
            self.enforce_on_peer_connections(now, slot);
        }
    }

    /// Brings an allocation back; see [`super::Input::Restore`].
    pub(super) fn restore(&mut self, now: Now, record: Record, path: Path, host: &mut impl Host) {
        let (relays, surplus) = split(&record, now, self.settings.limits.max_lifetime);
        let held = self.table.by_id(record.id);
        if let Some(slot) = held {
            let allocation = self.table.get(slot);
            // RFC 6062: the connections of a TCP allocation are in this process, which nobody knows better.
            if allocation.peer_transport() == PeerTransport::Tcp
                || !record.supersedes(allocation.epoch, allocation.sequence)
            {
                return;
            }
            // The same allocation, as of later; an address that it gave up since goes back.
            let before = self.table.remove(slot);
            self.forget_mobility(&before);
            self.take_back_permissions(&before);
            for relay in before.relays().iter() {
                if !record.relayed.iter().any(|relayed| relayed.bound == relay.address.bound) {
                    self.release(relay.address, &before.username);
                }
            }
        }
        let reason = if record.expires_at <= now.wall {
            Some(EndReason::Expired)
        } else if record.five_tuple.transport.has_session() != matches!(path, Path::Connection(_))
            || record.peer_transport == PeerTransport::Tcp
        {
            Some(EndReason::Closed)
        } else {
            None
        };
        let reason = match reason {
            Some(reason) => reason,
            None if self.reinsert(now, &record, relays, path, host) => {
                self.release_all(&surplus, &record.username);
                return;
            }
            // The client or the address has found another allocation since.
            None => EndReason::Deleted,
        };
        self.outputs.push_back(Output::Record(Change::End {
            id: record.id,
            epoch: self.epoch.max(record.epoch),
            sequence: record.sequence + 1,
            reason,
        }));
        self.release_all(&record.relayed, &record.username);
    }

    /// Gives addresses back that no allocation holds.
    pub(super) fn release_all(&mut self, relayed: &[RelayedAddr], username: &[u8]) {
        for relayed in relayed {
            if self.table.by_bound(&relayed.bound).is_none() {
                self.release(*relayed, username);
            }
        }
    }

    fn reinsert(&mut self, now: Now, record: &Record, relays: Relays, path: Path, host: &mut impl Host) -> bool {
        let Some(slot) = self.table.insert(Beginning {
            id: record.id,
            five_tuple: record.five_tuple,
            path,
            relays,
            peer_transport: record.peer_transport,
            username: record.username.as_slice().into(),
            created_at: record.created_at,
        }) else {
            return false;
        };
        self.join_meters(slot, host);
        self.open_account(slot, true, host);
        if let Some(mobility) = &record.mobility {
            self.restore_mobility(slot, mobility);
        }
        let allocation = self.table.get_mut(slot);
        let families = [Family::V4, Family::V6].map(|family| allocation.relays().of(family).map(|_| family));
        let has = |ip: IpAddr| families.contains(&Some(Family::of(ip)));
        allocation.epoch = record.epoch;
        allocation.sequence = record.sequence;
        allocation.set_session(record.session);
        allocation.transaction_id = record.transaction_id;
        allocation.set_answer(record.address_error, record.reservation);
        for (ip, end) in &record.permissions {
            if *end > now.wall && has(*ip) && self.settings.policy.check_ip(*ip).is_ok() {
                self.permit(slot, *ip, mono(*end, now, PERMISSION_LIFETIME));
            }
        }
        let (allocation, policy) = (self.table.get_mut(slot), &self.settings.policy);
        for (number, peer, end) in &record.channels {
            if let Some(number) = ChannelNumber::new(*number)
                && *end > now.wall
                && has(peer.ip())
                && policy.check(*peer).is_ok()
            {
                let deadline = mono(*end, now, CHANNEL_LIFETIME);
                // Two of one number or peer: the first counts.
                allocation.channels.bind(Channel { number, peer: *peer, deadline });
            }
        }
        true
    }
}

/// The addresses of a record, with their ends on this process's clock, and those that no allocation can have: a second
/// one of a family, or one that has ended.
fn split(record: &Record, now: Now, max_lifetime: u32) -> (Relays, Vec<RelayedAddr>) {
    // No deadline is longer than a client could have got it: the wall clock may have been set back.
    let longest = Duration::from_secs(max_lifetime.into());
    let ends = record.family_expires_at.iter().copied().chain(std::iter::repeat(record.expires_at));
    let live = record.relayed.iter().zip(ends).filter(|(_, end)| *end > now.wall);
    let relays = Relays::new(live.map(|(address, end)| Relay { address: *address, deadline: mono(end, now, longest) }));
    let kept = |relayed: &RelayedAddr| relays.of(relayed.family()).is_some_and(|relay| relay.address == *relayed);
    let surplus = record.relayed.iter().copied().filter(|relayed| !kept(relayed)).collect();
    (relays, surplus)
}

/// A deadline in Unix milliseconds.
fn wall(deadline: Instant, now: Now) -> u64 {
    let left = deadline.saturating_duration_since(now.mono).as_millis();
    now.wall.saturating_add(u64::try_from(left).unwrap_or(u64::MAX))
}

/// A deadline of Unix milliseconds on this process's clock, at most `longest` from now.
fn mono(deadline: u64, now: Now, longest: Duration) -> Instant {
    now.mono + Duration::from_millis(deadline.saturating_sub(now.wall)).min(longest)
}

#[cfg(test)]
#[path = "lifecycle_tests.rs"]
mod tests;
