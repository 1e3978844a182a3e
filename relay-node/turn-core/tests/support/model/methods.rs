//! The methods of RFC 8656, one after the other.

use std::net::{IpAddr, SocketAddr};

use turn_core::wire::attribute::ReservationToken;
use turn_core::{BindError, Family, FiveTuple, Path, PeerTransport, PortRequest};

use super::super::stun::{
    self, ADDITIONAL_ADDRESS_FAMILY, ADDRESS_ERROR_CODE, CHANNEL_NUMBER, DATA, EVEN_PORT, LIFETIME,
    REQUESTED_ADDRESS_FAMILY, REQUESTED_TRANSPORT, RESERVATION_TOKEN, Read, XOR_MAPPED_ADDRESS, XOR_PEER_ADDRESS,
    XOR_RELAYED_ADDRESS,
};
use super::mobility::{Mobility, Resumed};
use super::{Allocation, CHANNEL_LIFETIME, DEFAULT_LIFETIME, Expect, Model, PERMISSION_LIFETIME, Relayed, S, mapped};

/// The attributes of a success, or the code of an error.
pub(super) type Done = Result<Vec<(u16, Option<Vec<u8>>)>, u16>;

/// A 4-byte attribute: absent, or its bytes; malformed is 400.
pub(super) fn word(message: &Read, kind: u16) -> Result<Option<[u8; 4]>, u16> {
    match message.find(kind) {
        None => Ok(None),
        Some(value) => value.try_into().map(Some).map_err(|_| 400),
    }
}

fn number(family: Family) -> u8 {
    match family {
        Family::V4 => 1,
        Family::V6 => 2,
    }
}

/// RFC 8656 §7.2, items 7, 8 and 10.
fn code_of(error: BindError) -> u16 {
    match error {
        BindError::FamilyUnsupported => 440,
        BindError::QuotaReached => 486,
        BindError::NoPort => 508,
    }
}

impl Model {
    /// RFC 8656 §7.2.
    fn desired(&self, asked: Option<[u8; 4]>) -> u32 {
        let asked = asked.map_or(DEFAULT_LIFETIME, u32::from_be_bytes);
        let computed = asked.min(self.max_lifetime);
        // A maximum below the default is the operator's word.
        if computed > DEFAULT_LIFETIME { computed } else { DEFAULT_LIFETIME.min(self.max_lifetime) }
    }

    /// RFC 8656 §7.2, item by item.
    pub(super) fn allocate(&mut self, from: FiveTuple, path: Path, message: &Read, name: &[u8]) -> Done {
        // 2, and the note about retransmissions.
        let now = self.now;
        if let Some(allocation) = self.by_five_tuple(&from) {
            if allocation.transaction == Some(message.transaction) && allocation.username == name {
                return Ok(allocation.clone().described(from, message, now));
            }
            return Err(437);
        }
        // §21.4.
        if let IpAddr::V6(ip) = from.client.ip()
            && (ip.segments()[..2] == [0x2001, 0] || ip.segments()[0] == 0x2002)
        {
            return Err(403);
        }
        // 3.

        let protocol = match message.find(REQUESTED_TRANSPORT) {
            Some([17, _, _, _]) => PeerTransport::Udp,
            Some([6, _, _, _]) if self.tcp => PeerTransport::Tcp,
            Some([_, _, _, _]) => return Err(442),
            _ => return Err(400),
        };
        // RFC 6062 §5.1.
        let of_udp = [stun::DONT_FRAGMENT, EVEN_PORT, RESERVATION_TOKEN];
        if protocol == PeerTransport::Tcp
            && (!from.transport.is_stream() || of_udp.iter().any(|kind| message.has(*kind)))
        {
            return Err(400);
        }
        // 5, 6, 8, 9: what excludes each other, and what is malformed.
        let requested = word(message, REQUESTED_ADDRESS_FAMILY)?;
        let additional = word(message, ADDITIONAL_ADDRESS_FAMILY)?;
        let lifetime = word(message, LIFETIME)?;
        let token = match message.find(RESERVATION_TOKEN) {
            None => None,
            Some(value) => Some(<[u8; 8]>::try_from(value).map_err(|_| 400_u16)?),
        };
        let even = match message.find(EVEN_PORT) {
            None => None,
            Some([bits]) => Some(bits & 0x80 != 0),
            Some(_) => return Err(400),
        };
        if token.is_some() && (even.is_some() || requested.is_some() || additional.is_some()) {
            return Err(400);
        }
        if requested.is_some() && additional.is_some() || even == Some(true) && additional.is_some() {
            return Err(400);
        }
        if additional.is_some_and(|value| value[0] != 2) {
            return Err(400);
        }

        // RFC 8016 §3.1.2.
        let mobile = self.wants_ticket(message, protocol == PeerTransport::Tcp)?;
        // 7.
        let family = match requested {
            None | Some([1, ..]) => Family::V4,
            Some([2, ..]) => Family::V6,
            Some(_) => return Err(440),
        };
        let port = match (token, even) {
            (Some(token), _) => PortRequest::Reserved(ReservationToken(token)),
            (None, Some(true)) => PortRequest::EvenAndNext,
            (None, Some(false)) => PortRequest::Even,
            (None, None) => PortRequest::Any,
        };
        let mut bind = |family| {
            let binding = self.bindings.pop_front().expect("a port must be bound");
            assert_eq!((binding.family, binding.port, binding.transport), (family, port, protocol));
            assert_eq!(binding.quota_key, quota_name(name), "the quota is the user's");
            binding.result
        };
        // 7 to 10: one address, or one of each family as far as there are any.
        let mut family_error = None;
        let bound = if additional.is_none() {
            vec![bind(family).map_err(code_of)?]
        } else {
            let both = [bind(Family::V4), bind(Family::V6)];
            if both.iter().all(Result::is_err) {
                let quota = both.contains(&Err(BindError::QuotaReached));
                return Err(if quota { 486 } else { 508 });
            }
            for (family, result) in [Family::V4, Family::V6].into_iter().zip(both) {
                if let Err(error) = result {
                    let code = if error == BindError::FamilyUnsupported { 440 } else { 508 };
                    family_error = Some((number(family), code));
                }
            }
            both.into_iter().flatten().collect()
        };
        let end = self.now + u64::from(self.desired(lifetime)) * S;
        let relayed: Vec<Relayed> = bound
            .iter()
            .map(|bound| Relayed { address: bound.relayed.advertised, expires: end, granted: end })
            .collect();
        let allocation = Allocation {
            five_tuple: from,
            path,
            relayed,
            username: name.to_vec(),
            transaction: Some(message.transaction),
            token: bound[0].reservation.map(|token| token.0),
            family_error,
            permissions: Vec::new(),

            channels: Vec::new(),

            connections: (protocol == PeerTransport::Tcp).then(Vec::new),
            mobility: mobile.then(|| Mobility { ticket: Vec::new(), moving: None }),
        };
        for relayed in &allocation.relayed {
            assert!(!self.is_relayed(relayed.address), "relayed addresses are unique (RFC 8656 §6)");
        }
        let described = allocation.described(from, message, self.now);
        self.allocations.push(allocation);
        Ok(described)
    }

    /// The allocation a request is about: §5.
    pub(super) fn held(&mut self, from: &FiveTuple, path: Path, name: &[u8]) -> Result<&mut Allocation, u16> {
        let allocation = self.by_five_tuple(from).ok_or(437_u16)?;
        if allocation.username != name {
            return Err(441);
        }

        // Answers and data leave where the client was last heard.
        if allocation.five_tuple == *from {
            allocation.path = path;
        }
        Ok(allocation)
    }

    /// RFC 8656 §8.2.
    pub(super) fn refresh(&mut self, from: FiveTuple, path: Path, message: &Read, name: &[u8]) -> Done {
        let ticket = message.find(stun::MOBILITY_TICKET);
        let at = match ticket {
            None => {
                self.held(&from, path, name)?;
                self.allocations.iter().position(|allocation| allocation.is_of(&from)).ok_or(437_u16)?
            }
            Some(text) => match self.resume(&from, message, name, text)? {
                Resumed::At(at) => at,
                Resumed::Again(at) => return Ok(self.allocations[at].resumed(self.now)),
            },
        };
        let families: Vec<u8> =
            self.allocations[at].relayed.iter().map(|at| number(Family::of(at.address.ip()))).collect();
        let family = word(message, REQUESTED_ADDRESS_FAMILY)?.map(|family| family[0]);
        if family.is_some_and(|family| !families.contains(&family)) {
            return Err(443);
        }
        let asked = word(message, LIFETIME)?;
        let meant = |at: &Relayed| family.is_none_or(|family| number(Family::of(at.address.ip())) == family);
        if asked == Some([0; 4]) {
            self.allocations[at].keep_relayed(|at| !meant(at));
            self.allocations.retain(|allocation| !allocation.relayed.is_empty());
            return Ok(vec![(LIFETIME, Some(vec![0; 4]))]);
        }
        let granted = self.desired(asked);
        let end = self.now + u64::from(granted) * S;
        for at in self.allocations[at].relayed.iter_mut().filter(|at| meant(at)) {
            (at.expires, at.granted) = (end, end);
        }
        let mut attributes = vec![(LIFETIME, Some(granted.to_be_bytes().to_vec()))];
        if ticket.is_some() {
            self.begin_move(at, from, path, message);
            attributes.push((stun::MOBILITY_TICKET, None));
        }
        Ok(attributes)
    }

    /// RFC 8656 §10.2.
    pub(super) fn create_permission(&mut self, from: FiveTuple, path: Path, message: &Read, name: &[u8]) -> Done {
        let (end, most, policy) = (self.now + PERMISSION_LIFETIME, self.max_permissions, self.policy.clone());
        let allocation = self.held(&from, path, name)?;
        let mut ips: Vec<IpAddr> = Vec::new();
        for value in message.all(XOR_PEER_ADDRESS) {
            ips.push(stun_address(value, message).ok_or(400_u16)?.ip());
        }
        if ips.is_empty() {
            return Err(400);
        }
        if ips.iter().any(|ip| allocation.towards(*ip).is_none()) {
            return Err(443);
        }
        if ips.iter().any(|ip| policy.check_ip(*ip).is_err()) {
            return Err(403);
        }
        let mut permissions = allocation.permissions.clone();
        for ip in ips {
            permissions.retain(|(known, _)| *known != ip);
            permissions.push((ip, end));
        }
        if permissions.len() > most {
            return Err(508);
        }

        allocation.permissions = permissions;
        // Beyond RFC 8016 §3.2.2, for turnutils_uclient: a request to use the new five-tuple ends a move as data does.
        allocation.heard_from(&from);
        Ok(Vec::new())
    }

    /// RFC 8656 §12.2.
    pub(super) fn channel_bind(&mut self, from: FiveTuple, path: Path, message: &Read, name: &[u8]) -> Done {
        let (now, most, most_permissions) = (self.now, self.max_channels, self.max_permissions);
        self.held(&from, path, name)?;
        let (Some(number), Some(peer)) = (message.find(CHANNEL_NUMBER), message.find(XOR_PEER_ADDRESS)) else {
            return Err(400);
        };
        let &[high, low, _, _] = number else { return Err(400) };
        let number = u16::from_be_bytes([high, low]);
        let peer = stun_address(peer, message).ok_or(400_u16)?;
        if !(0x4000..=0x4FFF).contains(&number) {
            return Err(400);
        }
        let taken = self.policy.check_ip(peer.ip()).is_err() || peer.port() == 0 || !self.somebody_at(peer);

        let allocation = self.held(&from, path, name)?;
        // RFC 6062 §4.5: its data goes by data connections.
        if allocation.connections.is_some() {
            return Err(403);
        }
        // abuse.md A: an IPv4-mapped address is the same peer as its IPv4 address.
        let canonical = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        if allocation.channels.iter().any(|(known, at, _)| (*known == number) != (*at == canonical)) {
            return Err(400);
        }
        if allocation.towards(peer.ip()).is_none() {
            return Err(443);
        }
        if taken {
            return Err(403);
        }
        let mut channels = allocation.channels.clone();
        channels.retain(|(known, _, _)| *known != number);
        channels.push((number, peer, now + CHANNEL_LIFETIME));
        let mut permissions = allocation.permissions.clone();
        permissions.retain(|(ip, _)| *ip != peer.ip());
        permissions.push((peer.ip(), now + PERMISSION_LIFETIME));
        if channels.len() > most || permissions.len() > most_permissions {
            return Err(508);
        }

        allocation.channels = channels;
        allocation.permissions = permissions;
        allocation.heard_from(&from);
        Ok(Vec::new())
    }

    /// RFC 8656 §11.2.
    pub(super) fn send(&mut self, from: &FiveTuple, message: &Read) -> Expect {
        if !self.unknown(message).is_empty() {
            return Expect::Silence;
        }
        let (Some(peer), Some(data)) = (message.find(XOR_PEER_ADDRESS), message.find(DATA)) else {
            return Expect::Silence;
        };
        let (Some(peer), data) = (stun_address(peer, message), data.to_vec()) else { return Expect::Silence };
        let allowed = self.policy.check_ip(peer.ip()).is_ok() && peer.port() != 0;
        let Some(allocation) = self.by_five_tuple(from) else { return Expect::Silence };
        allocation.heard_from(from);
        // RFC 6062 §4.5: a TCP allocation has data connections.
        if allocation.connections.is_some() {
            return Expect::Silence;
        }
        if !allowed || !allocation.permissions.iter().any(|(ip, _)| *ip == peer.ip()) {
            return Expect::Silence;
        }
        let Some(via) = allocation.towards(peer.ip()) else { return Expect::Silence };
        // §13: not where IPv6 is on either side, unless the client's side is a stream (§15).
        let dont_fragment =
            message.has(stun::DONT_FRAGMENT) && (from.transport.is_stream() || from.client.is_ipv4() && peer.is_ipv4());
        self.to_peer(via, peer, data, dont_fragment)
    }

    /// RFC 8656 §12.6.
    pub(super) fn channel_data(&mut self, from: &FiveTuple, packet: &[u8]) -> Expect {
        if packet.len() < 4 {
            return Expect::Silence;
        }
        let number = u16::from_be_bytes([packet[0], packet[1]]);
        let length = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
        let Some(data) = packet[4..].get(..length) else { return Expect::Silence };
        let Some(allocation) = self.by_five_tuple(from) else { return Expect::Silence };
        allocation.heard_from(from);
        let Some((_, peer, _)) = allocation.channels.iter().find(|(known, _, _)| *known == number) else {
            return Expect::Silence;
        };
        let peer = *peer;
        let Some(via) = allocation.towards(peer.ip()) else { return Expect::Silence };
        // §14, alternate behaviour: the incoming DF is taken to be 0.
        self.to_peer(via, peer, data.to_vec(), false)
    }

    fn to_peer(&self, via: SocketAddr, to: SocketAddr, data: Vec<u8>, dont_fragment: bool) -> Expect {
        // What no UDP datagram carries (RFC 768).
        let most = if to.is_ipv4() { 65_507 } else { 65_527 };
        if data.len() > most || !self.somebody_at(to) {
            Expect::Silence
        } else if self.is_relayed(to) {
            Expect::Here { via, to, data }
        } else {
            Expect::Peer { via, to, data, dont_fragment }
        }
    }

    /// RFC 8656 §11.3 and §12.7.
    pub fn peer_sends(&self, at: SocketAddr, from: SocketAddr, data: &[u8]) -> Expect {
        let Some(allocation) = self.allocations.iter().find(|allocation| allocation.is_at(at)) else {
            return Expect::Silence;
        };

        if allocation.connections.is_some() || !allocation.permissions.iter().any(|(ip, _)| *ip == from.ip()) {
            return Expect::Silence;
        }
        let (to, path, data) = (allocation.five_tuple, allocation.path, data.to_vec());
        match allocation.channels.iter().find(|(_, peer, _)| *peer == from) {
            Some((number, _, _)) => Expect::Channel { to, path, number: *number, data },
            None => Expect::Data { to, path, peer: from, data },
        }
    }

    /// RFC 8656 §11.5.
    pub fn icmp(&self, at: SocketAddr, peer: SocketAddr, kind: u8, code: u8, mtu: u32) -> Expect {
        let (kinds, too_big): (&[u8], bool) = match at.is_ipv4() {
            true => (&[3, 11], kind == 3 && code == 4),
            false => (&[1, 2, 3], kind == 2),
        };
        let allocation = self.allocations.iter().find(|allocation| allocation.is_at(at));
        let Some(allocation) = allocation.filter(|_| kinds.contains(&kind) && at.is_ipv4() == peer.is_ipv4()) else {
            return Expect::Silence;
        };

        if allocation.connections.is_some() || !allocation.permissions.iter().any(|(ip, _)| *ip == peer.ip()) {
            return Expect::Silence;
        }
        // §18.13: the MTU where type and code have one, else zero.
        let icmp = (kind, code, if too_big { mtu } else { 0 });
        Expect::Icmp { to: allocation.five_tuple, path: allocation.path, peer, icmp }
    }
}

impl Allocation {
    /// The answer to a Refresh with a ticket that comes again (RFC 8016 §3.2.2).
    fn resumed(&self, now: u64) -> Vec<(u16, Option<Vec<u8>>)> {
        let end = self.relayed.iter().map(|relayed| relayed.expires).max().unwrap_or(now);
        let left = (end - now).div_ceil(S) as u32;
        let ticket = self.mobility.as_ref().and_then(Mobility::known_ticket);
        vec![(LIFETIME, Some(left.to_be_bytes().to_vec())), (stun::MOBILITY_TICKET, ticket)]
    }

    /// The success answer of an Allocate (RFC 8656 §7.2).
    fn described(&self, from: FiveTuple, message: &Read, now: u64) -> Vec<(u16, Option<Vec<u8>>)> {
        let end = self.relayed.iter().map(|relayed| relayed.expires).max().unwrap_or(now);
        let left = (end - now).div_ceil(S) as u32;
        let mut attributes: Vec<(u16, Option<Vec<u8>>)> = self
            .relayed
            .iter()
            .map(|at| (XOR_RELAYED_ADDRESS, Some(stun::xor_address(at.address, message.transaction))))
            .collect();
        attributes
            .extend([(XOR_MAPPED_ADDRESS, Some(mapped(from, message))), (LIFETIME, Some(left.to_be_bytes().to_vec()))]);
        if let Some(token) = self.token {
            attributes.push((RESERVATION_TOKEN, Some(token.to_vec())));
        }
        if let Some(mobility) = &self.mobility {
            attributes.push((stun::MOBILITY_TICKET, mobility.known_ticket()));
        }
        if let Some((family, code)) = self.family_error {
            let reason = if code == 440 { "Address Family not Supported" } else { "Insufficient Capacity" };
            let value = [&[family, 0, (code / 100) as u8, (code % 100) as u8], reason.as_bytes()].concat();
            attributes.push((ADDRESS_ERROR_CODE, Some(value)));
        }
        attributes
    }
}

/// An address that may be malformed.
pub(super) fn stun_address(value: &[u8], message: &Read) -> Option<SocketAddr> {
    if value.len() < 4 {
        return None;
    }
    stun::read_xor_address(value, message.transaction)
}

/// Whose quota an allocation counts for: the user behind the time of a TURN REST name.
fn quota_name(name: &[u8]) -> Vec<u8> {
    match name.iter().position(|byte| *byte == b':') {
        Some(colon) if colon > 0 && name[..colon].iter().all(u8::is_ascii_digit) => name[colon + 1..].to_vec(),
        _ => name.to_vec(),
    }
}
