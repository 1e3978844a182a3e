//! A TURN client as a value, for probes and tests: the contract of [`crate::Server`], from the other side.
//!
//! After every call, drain [`Client::poll_transmit`] and [`Client::poll_event`], then arm [`Client::poll_timeout`].
//! It retransmits (RFC 8489 §6.2.1), authenticates (RFC 8489 §9.2), follows one 438 per request, and keeps its
//! allocation, permissions and channels alive until it is told to stop.
//!
//! A TCP allocation (RFC 6062) takes a client for its control connection, and one more for each data connection, which
//! makes a ConnectionBind there and has done its work with [`Event::ConnectionBound`]: what comes behind is the peer's.

mod challenge;
mod extensions;
mod transaction;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::time::{Duration, Instant};

use rand_chacha::ChaCha12Rng;
use rand_core::SeedableRng;

use crate::wire::attribute::{
    self, AttributeType, Lifetime, MobilityTicket, RequestedAddressFamily, RequestedTransport, XorMappedAddress,
    XorPeerAddress, XorRelayedAddress,
};
use crate::wire::{ChannelData, ChannelNumber, Class, ErrorCode, Kind, Message, MessageWriter, Method, kind};
use crate::{Family, PeerConnectionId, PeerTransport, Transport};
use challenge::Challenge;
pub use challenge::Security;
pub use extensions::Extensions;
use transaction::{Expiry, Transactions};

/// Permissions and channels are renewed this often: as browsers do, well inside 300 s (RFC 8656 §9).
const RENEWAL: Duration = Duration::from_secs(240);
/// Room for any request: user name and realm of the longest length among it.
const REQUEST_BUFFER: usize = 2048;

/// What a client is made with.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// How it reaches the server. On a stream nothing is retransmitted and ChannelData is padded.
    pub transport: Transport,
    /// USERNAME.
    pub username: Vec<u8>,
    /// Password.
    pub password: Vec<u8>,
    /// REQUESTED-ADDRESS-FAMILY; none leaves it to the server (IPv4, RFC 8656 §7.2).
    pub family: Option<Family>,
    /// LIFETIME to ask for, in seconds; none leaves it to the server.
    pub lifetime: Option<u32>,
    /// Feeds transaction ids.
    pub seed: [u8; 32],
}

/// What came of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Event {
    /// The server sees the client at this address.
    Reflexive(SocketAddr),
    /// The allocation is there.
    Allocated {
        /// The relayed transport address.
        relayed: SocketAddr,
        /// The client's address as the server sees it.
        mapped: SocketAddr,
        /// Seconds.
        lifetime: u32,
    },
    /// After [`Event::Allocated`]: the second relayed address of a dual allocation.
    AlsoRelayed(SocketAddr),
    /// After [`Event::Allocated`] or [`Event::Refreshed`]: what the allocation can be moved with (RFC 8016).
    Ticket(Vec<u8>),
    /// The network reported an error for what was sent to a peer (RFC 8656 §11.6).
    Icmp(SocketAddr, attribute::Icmp),
    /// The allocation lives for so many seconds from now; 0 is the end of it.
    Refreshed(u32),
    /// Peers at these IPs may send.
    Permitted(Vec<IpAddr>),
    /// The channel is bound.
    ChannelBound(ChannelNumber, SocketAddr),
    /// The server has a connection to this peer, to be claimed on another connection (RFC 6062 §4.3).
    Connected(SocketAddr, PeerConnectionId),
    /// A peer has connected to the relayed address; to be claimed as after [`Event::Connected`] (RFC 6062 §4.4).
    ConnectionAttempt(SocketAddr, PeerConnectionId),
    /// What comes on this connection from here on is the peer's (RFC 6062 §4.5).
    ConnectionBound(PeerConnectionId),
    /// A request failed for good.
    Failed(Method, Failure),
    /// Application data from a peer: a range of the packet handed in.
    Data(SocketAddr, Range<usize>),
}

/// Why a request failed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Failure {
    /// Nobody answered (RFC 8489 §6.2.1).
    #[error("no answer")]
    TimedOut,
    /// The server refused.
    #[error("{} {}", .0.code(), .0.reason())]
    Refused(ErrorCode),
    /// The answer makes no sense, or its integrity does not verify.
    #[error("the answer is not valid")]
    Invalid,
}

/// A request with what is needed to write it again.
#[derive(Clone, Debug)]
pub(crate) enum Request {
    Binding,
    Allocate(PeerTransport),
    Refresh(u32),
    /// With this ticket.
    Resume(Vec<u8>),
    CreatePermission(Vec<IpAddr>),
    ChannelBind(ChannelNumber, SocketAddr),
    Connect(SocketAddr),
    ConnectionBind(PeerConnectionId),
}

impl Request {
    fn method(&self) -> Method {
        match self {
            Self::Binding => Method::Binding,
            Self::Allocate(_) => Method::Allocate,
            Self::Refresh(_) | Self::Resume(_) => Method::Refresh,
            Self::CreatePermission(_) => Method::CreatePermission,
            Self::ChannelBind(..) => Method::ChannelBind,
            Self::Connect(_) => Method::Connect,
            Self::ConnectionBind(_) => Method::ConnectionBind,
        }
    }
}

/// One client with at most one allocation.
#[derive(Debug)]
pub struct Client {
    config: ClientConfig,
    security: Security,
    extensions: Extensions,
    random: ChaCha12Rng,
    challenge: Option<Challenge>,
    transactions: Transactions,
    transmit: VecDeque<Vec<u8>>,
    events: VecDeque<Event>,
    permissions: BTreeSet<IpAddr>,
    channels: BTreeMap<ChannelNumber, SocketAddr>,
    refresh_at: Option<Instant>,
    renew_at: Option<Instant>,
}

impl Client {
    /// A client that has asked for nothing yet.
    pub fn new(config: ClientConfig) -> Self {
        Self {
            random: ChaCha12Rng::from_seed(config.seed),
            transactions: Transactions::new(config.transport.is_stream()),
            config,
            security: Security::default(),
            extensions: Extensions::default(),
            challenge: None,
            transmit: VecDeque::new(),
            events: VecDeque::new(),
            permissions: BTreeSet::new(),
            channels: BTreeMap::new(),
            refresh_at: None,
            renew_at: None,
        }
    }

    /// The same client with other mechanisms than [`Security::default`].
    pub fn with_security(mut self, security: Security) -> Self {
        self.security = security;
        self
    }

    /// Asks how the server sees the client (RFC 8489 §3).
    pub fn binding(&mut self, now: Instant) {
        self.request(now, Request::Binding);
    }

    /// Asks for an allocation (RFC 8656 §7).
    pub fn allocate(&mut self, now: Instant) {
        self.request(now, Request::Allocate(PeerTransport::Udp));
    }

    /// Asks for a TCP allocation, on a stream (RFC 6062 §4.1).
    pub fn allocate_tcp(&mut self, now: Instant) {
        self.request(now, Request::Allocate(PeerTransport::Tcp));
    }

    /// Asks for a connection from the TCP allocation to a peer (RFC 6062 §4.3).
    pub fn connect(&mut self, now: Instant, peer: SocketAddr) {
        self.request(now, Request::Connect(peer));
    }

    /// Claims a peer data connection for the connection this client speaks on, which has no allocation (RFC 6062 §4.3).
    pub fn connection_bind(&mut self, now: Instant, connection: PeerConnectionId) {
        self.request(now, Request::ConnectionBind(connection));
    }

    /// Asks for another lifetime in seconds; 0 ends the allocation (RFC 8656 §8).
    pub fn refresh(&mut self, now: Instant, lifetime: u32) {
        self.request(now, Request::Refresh(lifetime));
    }

    /// Permits peers at these IPs (RFC 8656 §9).
    pub fn permit(&mut self, now: Instant, peers: &[IpAddr]) {
        self.request(now, Request::CreatePermission(peers.to_vec()));
    }

    /// Binds a channel to a peer (RFC 8656 §12).
    pub fn bind_channel(&mut self, now: Instant, channel: ChannelNumber, peer: SocketAddr) {
        self.request(now, Request::ChannelBind(channel, peer));
    }

    /// Sends application data, by the peer's channel if there is one. Data over 65,000 bytes is not sent.
    pub fn send(&mut self, to: SocketAddr, data: &[u8]) {
        let channel = self.channels.iter().find(|(_, peer)| **peer == to).map(|(channel, _)| *channel);
        let packet = match channel {
            Some(channel) => self.channel_data(channel, data),
            None => self.send_indication(to, data),
        };
        self.transmit.extend(packet);
    }

    /// Stops keeping the allocation alive, without a word to the server.
    pub fn abandon(&mut self) {
        self.refresh_at = None;
        self.renew_at = None;
        self.transactions.clear();
    }

    /// Takes a datagram, or a whole stream frame.
    pub fn handle_packet(&mut self, now: Instant, packet: &[u8]) {
        match kind(packet) {
            Kind::ChannelData => {
                let Ok(message) = ChannelData::parse(packet) else {
                    return;
                };
                if let Some(peer) = self.channels.get(&message.channel()) {
                    self.events.push_back(Event::Data(*peer, message.range()));
                }
            }
            Kind::Stun => {
                let Ok(message) = Message::parse(packet) else { return };
                match (message.class(), message.method()) {
                    (Class::Indication, Method::Data) => self.on_data(&message),
                    (Class::Indication, Method::ConnectionAttempt) => self.on_connection_attempt(&message),
                    (Class::Success | Class::Error, _) => self.on_response(now, &message),
                    _ => {}
                }
            }
            Kind::Dtls | Kind::Other => {}
        }
    }

    /// The instant of [`Client::poll_timeout`] has come.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some(expiry) = self.transactions.expire(now) {
            match expiry {
                Expiry::Retransmit(packet) => self.transmit.push_back(packet),
                Expiry::GaveUp(request) => self.fail(&request, Failure::TimedOut),
            }
        }
        if self.refresh_at.is_some_and(|at| at <= now) {
            self.refresh_at = None;
            self.refresh(now, self.config.lifetime.unwrap_or(600));
        }
        if self.renew_at.is_some_and(|at| at <= now) {
            self.renew_at = Some(now + RENEWAL);
            let permissions: Vec<_> = self.permissions.iter().copied().collect();
            if !permissions.is_empty() {
                self.permit(now, &permissions);
            }
            for (channel, peer) in self.channels.clone() {
                self.bind_channel(now, channel, peer);
            }
        }
    }

    /// The next packet to send.
    pub fn poll_transmit(&mut self) -> Option<Vec<u8>> {
        self.transmit.pop_front()
    }

    /// What happened, oldest first.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When to call [`Client::handle_timeout`].
    pub fn poll_timeout(&self) -> Option<Instant> {
        [self.transactions.next(), self.refresh_at, self.renew_at].into_iter().flatten().min()
    }

    fn request(&mut self, now: Instant, request: Request) {
        self.attempt(now, request, 0);
    }

    fn attempt(&mut self, now: Instant, request: Request, retries: u32) {
        let (id, packet) = self.write(&request);
        self.transactions.begin(now, id, packet.clone(), request, retries);
        self.transmit.push_back(packet);
    }

    fn write(&mut self, request: &Request) -> (crate::wire::TransactionId, Vec<u8>) {
        let id = transaction::random_id(&mut self.random);
        let mut buffer = vec![0; REQUEST_BUFFER];
        let mut writer = MessageWriter::new(&mut buffer, Class::Request, request.method(), id);
        match request {
            Request::Binding => {}
            Request::Allocate(transport) => {
                writer.attribute(&RequestedTransport(*transport as u8));
                if let Some(lifetime) = self.config.lifetime {
                    writer.attribute(&Lifetime(lifetime));
                }
                if let Some(family) = self.config.family.filter(|_| !self.extensions.dual) {
                    writer.attribute(&RequestedAddressFamily(family as u8));
                }
                self.write_extensions(&mut writer);
            }
            Request::Resume(ticket) => {
                writer.attribute(&MobilityTicket(ticket));
                if let Some(lifetime) = self.config.lifetime {
                    writer.attribute(&Lifetime(lifetime));
                }
            }
            Request::Refresh(lifetime) => {
                writer.attribute(&Lifetime(*lifetime));
            }
            Request::CreatePermission(peers) => {
                for peer in peers {
                    writer.attribute(&XorPeerAddress(SocketAddr::new(*peer, 0)));
                }
            }
            Request::ChannelBind(channel, peer) => {
                writer.attribute(&attribute::ChannelNumber(channel.get())).attribute(&XorPeerAddress(*peer));
            }
            Request::Connect(peer) => {
                writer.attribute(&XorPeerAddress(*peer));
            }
            Request::ConnectionBind(PeerConnectionId(id)) => {
                writer.attribute(&attribute::ConnectionId(*id));
            }
        }
        if let Some(challenge) = self.challenge.as_ref().filter(|_| !matches!(request, Request::Binding)) {
            challenge.sign(&self.config, &self.security, request, &mut writer);
        }
        // A request that does not fit is sent as the empty packet: it times out like any unanswered one.
        let len = writer.finish().unwrap_or(0);
        buffer.truncate(len);
        (id, buffer)
    }

    fn channel_data(&self, channel: ChannelNumber, data: &[u8]) -> Option<Vec<u8>> {
        let mut packet = ChannelData::header(channel, u16::try_from(data.len()).ok()?).to_vec();
        packet.extend_from_slice(data);
        if self.config.transport.is_stream() {
            // RFC 8656 §12.5.
            packet.resize(packet.len().next_multiple_of(4), 0);
        }
        Some(packet)
    }

    fn send_indication(&mut self, to: SocketAddr, data: &[u8]) -> Option<Vec<u8>> {
        let id = transaction::random_id(&mut self.random);
        let mut packet = vec![0; data.len() + 64];
        let mut writer = MessageWriter::new(&mut packet, Class::Indication, Method::Send, id);
        writer.attribute(&XorPeerAddress(to)).attribute(&attribute::Data(data));
        let len = writer.finish().ok()?;
        packet.truncate(len);
        Some(packet)
    }

    fn on_data(&mut self, message: &Message<'_>) {
        let peer = message.attribute::<XorPeerAddress>().ok().flatten();
        if let (Some(XorPeerAddress(peer)), Some(range)) = (peer, message.range(AttributeType::DATA)) {
            self.events.push_back(Event::Data(peer, range));
        } else {
            self.on_icmp(message);
        }
    }

    fn on_connection_attempt(&mut self, message: &Message<'_>) {
        let peer = message.attribute::<XorPeerAddress>().ok().flatten();
        let id = message.attribute::<attribute::ConnectionId>().ok().flatten();
        if let (Some(XorPeerAddress(peer)), Some(attribute::ConnectionId(id))) = (peer, id) {
            self.events.push_back(Event::ConnectionAttempt(peer, PeerConnectionId(id)));
        }
    }

    fn on_response(&mut self, now: Instant, message: &Message<'_>) {
        let Some((request, retries)) = self.transactions.end(message.transaction_id()) else {
            return;
        };
        let error = message.attribute::<ErrorCode>().ok().flatten();
        match (message.class(), error) {
            (Class::Error, Some(ErrorCode::UNAUTHENTICATED)) if retries == 0 && self.challenge.is_none() => {
                self.retry(now, request, retries, message);
            }
            // One 401 and one 438 at most.
            (Class::Error, Some(ErrorCode::STALE_NONCE)) if retries < 2 => self.retry(now, request, retries, message),
            (Class::Error, Some(error)) => self.fail(&request, Failure::Refused(error)),
            (Class::Success, _) if self.verifies(&request, message) => self.on_success(now, request, message),
            _ => self.fail(&request, Failure::Invalid),
        }
    }

    fn verifies(&self, request: &Request, message: &Message<'_>) -> bool {
        match &self.challenge {
            Some(challenge) if !matches!(request, Request::Binding) => challenge.verifies(message),
            _ => true,
        }
    }

    /// RFC 8489 §9.2.5: once more, with the REALM and NONCE of the refusal.
    fn retry(&mut self, now: Instant, request: Request, retries: u32, message: &Message<'_>) {
        let Some(challenge) = Challenge::read(&self.config, &self.security, message) else {
            return self.fail(&request, Failure::Invalid);
        };
        self.challenge = Some(challenge);
        self.attempt(now, request, retries + 1);
    }

    fn on_success(&mut self, now: Instant, request: Request, message: &Message<'_>) {
        let mapped = message.attribute::<XorMappedAddress>().ok().flatten();
        let relayed = message.attribute::<XorRelayedAddress>().ok().flatten();
        let lifetime = message.attribute::<Lifetime>().ok().flatten();
        let event = match (&request, mapped, relayed, lifetime) {
            (Request::Binding, Some(XorMappedAddress(mapped)), ..) => Event::Reflexive(mapped),
            (
                Request::Allocate(_),
                Some(XorMappedAddress(mapped)),
                Some(XorRelayedAddress(relayed)),
                Some(Lifetime(lifetime)),
            ) => {
                self.keep_alive(now, lifetime);
                Event::Allocated { relayed, mapped, lifetime }
            }
            (Request::Refresh(_) | Request::Resume(_), .., Some(Lifetime(lifetime))) => {
                self.keep_alive(now, lifetime);
                Event::Refreshed(lifetime)
            }
            (Request::CreatePermission(peers), ..) => {
                self.permissions.extend(peers);
                Event::Permitted(peers.clone())
            }
            (Request::ChannelBind(channel, peer), ..) => {
                self.channels.insert(*channel, *peer);
                Event::ChannelBound(*channel, *peer)
            }
            (Request::Connect(peer), ..) => match message.attribute() {
                Ok(Some(attribute::ConnectionId(id))) => Event::Connected(*peer, PeerConnectionId(id)),
                _ => return self.fail(&request, Failure::Invalid),
            },
            (Request::ConnectionBind(id), ..) => Event::ConnectionBound(*id),
            _ => return self.fail(&request, Failure::Invalid),
        };
        self.events.push_back(event);
        self.read_extensions(&request, message);
    }

    /// Refresh a minute before the end, or at half of a short life, as browsers do.
    fn keep_alive(&mut self, now: Instant, lifetime: u32) {
        if lifetime == 0 {
            return self.abandon();
        }
        let ahead = if lifetime > 120 { lifetime - 60 } else { lifetime / 2 };
        self.refresh_at = Some(now + Duration::from_secs(ahead.into()));
        self.renew_at.get_or_insert(now + RENEWAL);
    }

    fn fail(&mut self, request: &Request, failure: Failure) {
        self.events.push_back(Event::Failed(request.method(), failure));
    }
}
