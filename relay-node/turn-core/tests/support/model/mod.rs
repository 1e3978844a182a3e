//! A TURN server as RFC 8489 and RFC 8656 tell it, for comparison: plain lists, searched from end to end, written from
//! the text of the RFCs (and the rules of design.md where they leave a choice), not from the server beside it.
//!
//! It takes the same bytes as the server and says what must come of them. What only the host decides (which port is
//! bound) it takes from the calls the server made of the host, after checking that they are the right ones.

mod auth;
mod methods;
mod mobility;
mod redirect;
mod tcp;

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};

use turn_core::{ConnectError, FiveTuple, Path, PeerConnectionId, Policy};

pub use auth::{RestSecret, StaticUser};
pub use mobility::Mobility;
pub use redirect::Alternate;
use redirect::{Redirected, Voucher};
pub use tcp::Connection;

use super::rig::Binding;
use super::stun::{self, BINDING, Class, FINGERPRINT, Read, UNKNOWN_ATTRIBUTES, XOR_MAPPED_ADDRESS};

/// Seconds, in the milliseconds of the model's clock.
const S: u64 = 1000;
/// RFC 8656 §9.
const PERMISSION_LIFETIME: u64 = 300 * S;
/// RFC 8656 §12.
const CHANNEL_LIFETIME: u64 = 600 * S;
/// RFC 8656 §6.
const DEFAULT_LIFETIME: u32 = 600;

/// What must come of a packet.
#[derive(Clone, Debug, PartialEq)]
pub enum Expect {
    Silence,
    Answer(Answer),
    /// To a peer elsewhere; whether DF is to be set.
    Peer {
        via: SocketAddr,
        to: SocketAddr,
        data: Vec<u8>,
        dont_fragment: bool,
    },
    /// To an allocation of this relay.
    Here {
        via: SocketAddr,
        to: SocketAddr,
        data: Vec<u8>,
    },
    /// ChannelData to a client; padded on a stream.
    Channel {
        to: FiveTuple,
        path: Path,
        number: u16,
        data: Vec<u8>,
    },
    /// A Data indication to a client.
    Data {
        to: FiveTuple,
        path: Path,
        peer: SocketAddr,
        data: Vec<u8>,
    },
    /// A ConnectionAttempt indication.
    Attempt {
        to: FiveTuple,
        path: Path,
        peer: SocketAddr,
        id: PeerConnectionId,
    },
    /// A Data indication with ICMP: type, code, data.
    Icmp {
        to: FiveTuple,
        path: Path,
        peer: SocketAddr,
        icmp: (u8, u8, u32),
    },
}

/// A relayed transport address with its time-to-expiry.
#[derive(Clone, Debug)]
pub struct Relayed {
    pub address: SocketAddr,
    pub expires: u64,
    /// The end that was last recorded: later, if a restart found a shorter longest lifetime.
    pub granted: u64,
}

/// An answer, down to each attribute; order and SOFTWARE are the server's.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// 0 is success.
    pub code: u16,
    /// With the value, where it is determined.
    pub attributes: Vec<(u16, Option<Vec<u8>>)>,
    pub signature: Signature,
    pub fingerprint: bool,
}

/// What an answer is signed with.
#[derive(Clone, Debug, PartialEq)]
pub enum Signature {
    None,
    Sha1(Vec<u8>),
    Sha256(Vec<u8>),
}

/// RFC 8656 §6.
#[derive(Clone, Debug)]
pub struct Allocation {
    pub five_tuple: FiveTuple,
    pub path: Path,
    /// One, or one of each family; IPv4 first.
    pub relayed: Vec<Relayed>,
    pub username: Vec<u8>,
    /// Of the Allocate.
    pub transaction: Option<[u8; 12]>,
    pub token: Option<[u8; 8]>,
    /// What the second family was refused with.
    pub family_error: Option<(u8, u16)>,
    /// (IP, end), in no order.
    pub permissions: Vec<(IpAddr, u64)>,

    /// (number, peer, end), in no order.
    pub channels: Vec<(u16, SocketAddr, u64)>,

    /// Connections to peers, of a TCP allocation.
    pub connections: Option<Vec<Connection>>,
    pub mobility: Option<Mobility>,
}

/// A nonce that the server gave out.
#[derive(Clone, Debug)]
struct Issued {
    nonce: Vec<u8>,
    client: SocketAddr,
    /// Unix seconds.
    at: u64,
    /// Id of the key it was made with.
    key: u8,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Model {
    /// Milliseconds since the history began; and Unix milliseconds then.
    pub now: u64,
    pub epoch: u64,
    pub realm: Vec<u8>,
    pub static_users: Vec<StaticUser>,
    pub rest_secrets: Vec<RestSecret>,
    /// Ids of the nonce keys that are live, the newest first.
    pub nonce_keys: Vec<u8>,
    /// New clients are sent to one of these, best first.
    pub redirecting: bool,
    pub alternates: Vec<Alternate>,
    pub policy: Policy,
    pub max_lifetime: u32,
    pub nonce_lifetime: u64,
    pub max_permissions: usize,

    pub max_channels: usize,
    pub max_connections: usize,
    /// Whether TCP allocations are offered.
    pub tcp: bool,
    /// Whether mobility is offered.
    pub mobile: bool,
    /// The relay's own IPs: only relayed addresses are reachable there.
    pub own: Vec<IpAddr>,
    /// PASSWORD-ALGORITHMS as it is offered; none where SHA-256 is not.
    pub offer: Option<Vec<u8>>,
    pub allocations: Vec<Allocation>,

    issued: Vec<Issued>,
    redirected: Vec<Redirected>,
    vouchers: Vec<Voucher>,
    /// Tickets that were given out, and the ids of their keys.
    tickets: Vec<(Vec<u8>, u8)>,
    /// What the server asked of its host for the packet in hand.
    bindings: VecDeque<Binding>,
    /// What it asked to be connected, and what came of it.
    dials: VecDeque<(SocketAddr, Result<PeerConnectionId, ConnectError>)>,
}

impl Model {
    /// A server that knows nobody.
    pub fn new(epoch: u64, realm: &[u8], own: Vec<IpAddr>) -> Self {
        Self {
            now: 0,
            epoch,
            realm: realm.to_vec(),
            static_users: Vec::new(),
            rest_secrets: Vec::new(),
            nonce_keys: vec![1],
            redirecting: false,
            alternates: Vec::new(),
            policy: Policy::default(),
            max_lifetime: 3600,
            nonce_lifetime: 3600,
            max_permissions: 256,

            max_channels: 256,
            max_connections: 64,

            tcp: true,
            mobile: true,
            tickets: Vec::new(),

            own,
            offer: None,
            allocations: Vec::new(),
            issued: Vec::new(),
            redirected: Vec::new(),
            vouchers: Vec::new(),

            bindings: VecDeque::new(),
            dials: VecDeque::new(),
        }
    }

    /// Time goes on; what has reached its end is gone (RFC 8656 §6, §9, §12).
    pub fn pass(&mut self, milliseconds: u64) {
        self.now += milliseconds;
        let now = self.now;
        for allocation in &mut self.allocations {
            allocation.keep_relayed(|relayed| relayed.expires > now);
            allocation.permissions.retain(|(_, end)| *end > now);
            allocation.channels.retain(|(_, _, end)| *end > now);
        }
        self.allocations.retain(|allocation| !allocation.relayed.is_empty());
    }

    /// A stream closed: its allocation ends with it.
    pub fn closed(&mut self, path: Path) {
        self.allocations.retain(|allocation| allocation.path != path);
    }

    /// The process was killed and another one has read its journal: streams are gone, datagram clients go on.
    pub fn restarted(&mut self) {
        let latest = self.now + u64::from(self.max_lifetime) * S;
        self.redirected.clear();
        self.vouchers.clear();

        // Those of RFC 6062 too: they come by streams only.
        self.allocations.retain(|allocation| !allocation.five_tuple.transport.is_stream());
        for allocation in &mut self.allocations {
            // The clock may have been set back: no allocation lives longer than it could have been made to.
            for relayed in &mut allocation.relayed {
                relayed.expires = relayed.granted.min(latest);
            }
        }
    }

    /// What the policy now forbids ends at once (abuse.md A).
    pub fn set_policy(&mut self, policy: Policy) {
        for allocation in &mut self.allocations {
            allocation.permissions.retain(|(ip, _)| policy.check_ip(*ip).is_ok());
            allocation.channels.retain(|(_, peer, _)| peer.port() != 0 && policy.check_ip(peer.ip()).is_ok());
        }

        self.policy = policy;
        self.forbid_connections();
    }

    /// The server gave out a nonce.
    pub fn issue(&mut self, nonce: &[u8], client: SocketAddr) {
        let at = self.unix_seconds();
        let key = self.nonce_keys[0];
        self.issued.push(Issued { nonce: nonce.to_vec(), client, at, key });
    }

    fn unix_seconds(&self) -> u64 {
        (self.epoch + self.now) / S
    }

    /// What comes of a packet of a client. `bindings` is what the server asked of its host meanwhile.
    pub fn client_sends(
        &mut self,
        from: FiveTuple,
        path: Path,
        packet: &[u8],
        bindings: Vec<Binding>,
        dials: Vec<(SocketAddr, Result<PeerConnectionId, ConnectError>)>,
    ) -> Expect {
        self.bindings = bindings.into();
        self.dials = dials.into();
        let expected = self.client_packet(from, path, packet);
        assert!(self.dials.is_empty(), "a peer was called for nothing: {:?}", self.dials);

        assert!(self.bindings.is_empty(), "a port was bound for nothing: {:?}", self.bindings);
        expected
    }

    fn client_packet(&mut self, from: FiveTuple, path: Path, packet: &[u8]) -> Expect {
        // RFC 8656 §12, Table 3.
        match packet.first() {
            Some(0..=3) => {}
            Some(64..=79) => return self.channel_data(&from, packet),
            _ => return Expect::Silence,
        }
        let Some(message) = read(packet) else { return Expect::Silence };
        match message.class {
            Class::Request => self.request(from, path, &message),
            Class::Indication if message.method == stun::SEND => self.send(&from, &message),
            // RFC 8489 §6.3.2: a Binding indication needs no answer; others mean nothing to a server.
            Class::Indication | Class::Success | Class::Error => Expect::Silence,
        }
    }

    fn request(&mut self, from: FiveTuple, path: Path, message: &Read) -> Expect {
        match message.method {
            BINDING => return self.binding(from, message),

            stun::ALLOCATE | stun::REFRESH | stun::CREATE_PERMISSION | stun::CHANNEL_BIND => {}
            method if self.is_tcp_method(method) => {}

            // RFC 8489 §6.3: a method that is not supported: silently discarded.
            _ => return Expect::Silence,
        }
        // Promise P5: who can judge nobody is silent.
        if self.realm.is_empty()
            || self.nonce_keys.is_empty()
            || (self.static_users.is_empty() && self.rest_secrets.is_empty())
        {
            return Expect::Silence;
        }
        // The same 5-tuple on another connection: the old one must have closed.
        if from.transport.is_stream() {
            self.allocations.retain(|allocation| allocation.five_tuple != from || allocation.path == path);
        }
        if let Some(answer) = self.try_alternate(&from, message) {
            return Expect::Answer(answer);
        }
        let who = match self.authenticate(&from, message) {
            Ok(who) => who,
            Err(answer) => return Expect::Answer(answer),
        };
        // RFC 8489 §6.3: unknown attributes once the authentication checks are done.
        let unknown = self.unknown(message);
        if !unknown.is_empty() {
            let mut answer = error(420, who.signature, message);
            answer.attributes.push((UNKNOWN_ATTRIBUTES, Some(unknown)));
            return Expect::Answer(answer);
        }

        if message.method == stun::CONNECT {
            return self.connect_request(from, path, message, &who.name, who.signature);
        }
        let done = match message.method {
            stun::CONNECTION_BIND => self.connection_bind(from, path, message, &who.name),
            stun::ALLOCATE => self.allocate(from, path, message, &who.name),
            stun::REFRESH => self.refresh(from, path, message, &who.name),
            stun::CREATE_PERMISSION => self.create_permission(from, path, message, &who.name),
            _ => self.channel_bind(from, path, message, &who.name),
        };
        Expect::Answer(match done {
            Ok(attributes) => {
                Answer { code: 0, attributes, signature: who.signature, fingerprint: message.has(FINGERPRINT) }
            }
            Err(code) => error(code, who.signature, message),
        })
    }

    /// RFC 8489 §6.3.1.1, §12.
    fn binding(&self, from: FiveTuple, message: &Read) -> Expect {
        let unknown = self.unknown(message);
        if !unknown.is_empty() {
            let mut answer = error(420, Signature::None, message);
            answer.attributes.push((UNKNOWN_ATTRIBUTES, Some(unknown)));
            return Expect::Answer(answer);
        }
        Expect::Answer(Answer {
            code: 0,
            attributes: vec![(XOR_MAPPED_ADDRESS, Some(mapped(from, message)))],
            signature: Signature::None,
            fingerprint: message.has(FINGERPRINT),
        })
    }

    /// The comprehension-required attributes that this server does not understand, each once, sixteen at most.
    fn unknown(&self, message: &Read) -> Vec<u8> {
        let mut unknown: Vec<u16> = Vec::new();
        for (kind, _) in &message.attributes {
            if *kind < 0x8000 && !self.understands(*kind) && !unknown.contains(kind) {
                unknown.push(*kind);
            }
        }
        unknown.truncate(16);
        unknown.iter().flat_map(|kind| kind.to_be_bytes()).collect()
    }

    fn understands(&self, kind: u16) -> bool {
        match kind {
            // RFC 8489 and RFC 8656.
            0x0001 | 0x0006 | 0x0008 | 0x0009 | 0x000A | 0x000C | 0x000D => true,
            0x0012..=0x001A | 0x001C | 0x0020 | 0x0022 => true,
            // RFC 6062.
            0x002A => self.tcp,
            // RFC 8489 §14.12 and §14.4.
            stun::PASSWORD_ALGORITHM | stun::USERHASH => self.offer.is_some(),
            _ => false,
        }
    }

    fn by_five_tuple(&mut self, from: &FiveTuple) -> Option<&mut Allocation> {
        self.allocations.iter_mut().find(|allocation| allocation.is_of(from))
    }

    /// Whether something is at an address: elsewhere that is not this server's to know.
    fn somebody_at(&self, peer: SocketAddr) -> bool {
        !self.own.contains(&peer.ip()) || self.is_relayed(peer)
    }

    fn is_relayed(&self, peer: SocketAddr) -> bool {
        self.allocations.iter().any(|allocation| allocation.is_at(peer))
    }
}

impl Allocation {
    /// Keeps some of its relayed addresses; what belongs to the family of the others goes with them (RFC 8656 §8.1).
    fn keep_relayed(&mut self, keep: impl Fn(&Relayed) -> bool) {
        self.relayed.retain(keep);
        let families: Vec<bool> = self.relayed.iter().map(|relayed| relayed.address.is_ipv4()).collect();
        self.permissions.retain(|(ip, _)| families.contains(&ip.is_ipv4()));

        self.channels.retain(|(_, peer, _)| families.contains(&peer.is_ipv4()));
        self.connections.iter_mut().for_each(|all| {
            all.retain(|connection| families.contains(&connection.peer.is_ipv4()));
        });
    }

    /// The relayed address that reaches peers of this family.
    fn towards(&self, ip: IpAddr) -> Option<SocketAddr> {
        self.relayed.iter().map(|relayed| relayed.address).find(|address| address.is_ipv4() == ip.is_ipv4())
    }

    /// Whether it is reached at this address.
    pub fn is_at(&self, address: SocketAddr) -> bool {
        self.relayed.iter().any(|relayed| relayed.address == address)
    }

    /// When the first of its relayed addresses ends, or one of its connections has waited too long.
    pub fn next_end(&self) -> Option<u64> {
        let connections = self.connections.iter().flatten().filter_map(Connection::until);
        self.relayed.iter().map(|relayed| relayed.expires).chain(connections).min()
    }
}

/// XOR-MAPPED-ADDRESS of who asked.
fn mapped(from: FiveTuple, message: &Read) -> Vec<u8> {
    stun::xor_address(from.client, message.transaction)
}

fn error(code: u16, signature: Signature, message: &Read) -> Answer {
    Answer { code, attributes: Vec::new(), signature, fingerprint: message.has(FINGERPRINT) }
}

/// Reads a message as RFC 8489 §5, §6.3 and §14 say; `None` is to be discarded. What follows an integrity attribute
/// does not count (§9), but for the other integrity attribute behind MESSAGE-INTEGRITY, and FINGERPRINT.
fn read(packet: &[u8]) -> Option<Read> {
    if packet.len() < 20 || packet[0] & 0xC0 != 0 || packet[4..8] != stun::COOKIE {
        return None;
    }
    let length = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
    if length % 4 != 0 || length + 20 != packet.len() {
        return None;
    }
    let kind = u16::from_be_bytes([packet[0], packet[1]]);
    let class = match (kind >> 8 & 1, kind >> 4 & 1) {
        (0, 0) => Class::Request,
        (0, _) => Class::Indication,
        (_, 0) => Class::Success,
        _ => Class::Error,
    };
    let method = (kind & 0xF) | (kind >> 1 & 0x70) | (kind >> 2 & 0xF80);
    let transaction = packet[8..20].try_into().ok()?;
    let mut attributes: Vec<(u16, Vec<u8>)> = Vec::new();
    let (mut sha1, mut sha256) = (false, false);
    let mut at = 20;
    while at < packet.len() {
        let kind = u16::from_be_bytes([packet[at], *packet.get(at + 1)?]);
        let length = usize::from(u16::from_be_bytes([*packet.get(at + 2)?, *packet.get(at + 3)?]));
        let value = packet.get(at + 4..at + 4 + length)?;
        let end = at + 4 + length.next_multiple_of(4);
        if end > packet.len() {
            return None;
        }
        if kind == FINGERPRINT {
            // §14.7: the last one, over everything before it.
            let crc = crc32fast::hash(&packet[..at]) ^ 0x5354_554E;
            if end != packet.len() || value != crc.to_be_bytes() {
                return None;
            }
        }
        let counts = match kind {
            FINGERPRINT => true,
            stun::MESSAGE_INTEGRITY_SHA256 => !sha256,
            _ => !sha1 && !sha256,
        };
        if counts {
            attributes.push((kind, value.to_vec()));
        }
        sha1 |= kind == stun::MESSAGE_INTEGRITY && counts;
        sha256 |= kind == stun::MESSAGE_INTEGRITY_SHA256;
        at = end;
    }
    Some(Read { class, method, transaction, attributes, bytes: packet.to_vec() })
}
