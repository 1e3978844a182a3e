//! What the tests of this module drive: a server, a host that binds nothing, a client, clocks that stand still.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::credential::{self, LongTermKey};
use crate::wire::attribute::{
    self, AdditionalAddressFamily, ChannelNumber, Lifetime, Nonce, Realm, RequestedAddressFamily, RequestedTransport,
    ReservationToken, Userhash, Username, XorPeerAddress,
};
use crate::wire::error_code::ErrorCode;
use crate::wire::{Class, Integrity, Message, MessageWriter, Method, TransactionId};
use crate::{IntegrityKey, Key, KeyRing, ListenerId, PasswordAlgorithm, StaticUser, Transport, key, nonce};

/// Unix milliseconds at which every lab begins.
pub(super) const NOW: u64 = 1_700_000_000_000;
pub(super) const USER: &[u8] = b"alice";
pub(super) const SECRET: &[u8] = b"secret";
const TOKEN: ReservationToken = ReservationToken([7; 8]);

pub(super) fn addr(text: &str) -> SocketAddr {
    text.parse().expect("literal")
}

pub(super) fn ip(text: &str) -> IpAddr {
    text.parse().expect("literal")
}

/// REQUESTED-TRANSPORT for UDP.
pub(super) fn udp(writer: &mut MessageWriter<'_>) {
    writer.attribute(&RequestedTransport(17));
}

/// Counts instead of binding: ports from 50000 on 10.0.0.5, advertised as 198.51.100.7.
#[derive(Default)]
pub(super) struct FakeHost {
    pub(super) refuse: Option<BindError>,
    /// What every user shares.
    pub(super) meters: Meters,
    /// Only of this family.
    pub(super) refuse_family: Option<Family>,
    pub(super) ipv6: bool,
    pub(super) quota_keys: Vec<Vec<u8>>,
    /// Of what was bound, in order.
    pub(super) families: Vec<Family>,
    /// The port held under [`TOKEN`].
    reserved: Option<u16>,
    routes: HashMap<SocketAddr, Route>,
    /// What [`Host::connect`] was asked for; the connection's name is 1 more than the index.
    pub(super) connects: Vec<(RelayedAddr, PeerAddr)>,
    pub(super) refuse_connect: Option<ConnectError>,
    pub(super) pending: HashMap<PeerConnectionId, Vec<u8>>,
    /// Of every pending connection.
    pub(super) control: Option<SocketAddr>,
}

impl FakeHost {
    pub(super) fn set_route(&mut self, to: &str, route: Route) {
        self.routes.insert(addr(to), route);
    }

    pub(super) fn bound(&self) -> usize {
        self.quota_keys.len()
    }
}

impl Host for FakeHost {
    fn bind(&mut self, request: BindRequest<'_>) -> Result<Bound, BindError> {
        if let Some(error) = self.refuse
            && self.refuse_family.is_none_or(|family| family == request.family)
        {
            return Err(error);
        }
        let free = 50_000 + u16::try_from(self.bound()).expect("few");
        let mut reservation = None;
        let port = match request.port {
            PortRequest::Any => free,
            PortRequest::Even => free.next_multiple_of(2),
            PortRequest::EvenAndNext => {
                self.reserved = Some(free.next_multiple_of(2) + 1);
                reservation = Some(TOKEN);
                free.next_multiple_of(2)
            }
            PortRequest::Reserved(TOKEN) => self.reserved.take().ok_or(BindError::NoPort)?,
            PortRequest::Reserved(_) => return Err(BindError::NoPort),
        };
        let (bound, advertised) = match request.family {
            Family::V4 => (ip("10.0.0.5"), ip("198.51.100.7")),
            Family::V6 if self.ipv6 => (ip("fd00::5"), ip("2001:db8::7")),
            Family::V6 => return Err(BindError::FamilyUnsupported),
        };
        self.families.push(request.family);
        self.quota_keys.push(request.quota_key.to_vec());
        let relayed =
            RelayedAddr { bound: SocketAddr::new(bound, port), advertised: SocketAddr::new(advertised, port) };
        Ok(Bound { relayed, reservation })
    }

    fn connect(&mut self, relayed: RelayedAddr, to: PeerAddr) -> Result<PeerConnectionId, ConnectError> {
        if let Some(error) = self.refuse_connect {
            return Err(error);
        }
        self.connects.push((relayed, to));
        Ok(PeerConnectionId(u32::try_from(self.connects.len()).expect("few")))
    }

    fn control_of(&self, _: PeerConnectionId) -> Option<SocketAddr> {
        self.control
    }

    fn claim(&mut self, connection: PeerConnectionId, username: &[u8]) -> Result<(), ClaimError> {
        match self.pending.get(&connection) {
            None => Err(ClaimError::Unknown),
            Some(owner) if owner != username => Err(ClaimError::OtherUser),
            Some(_) => {
                self.pending.remove(&connection);
                Ok(())
            }
        }
    }

    fn meters(&mut self, _: &[u8]) -> Meters {
        self.meters.clone()
    }

    fn route(&self, to: PeerAddr) -> Route {
        self.routes.get(&to.socket_addr()).copied().unwrap_or(Route::Internet)
    }
}

/// What a client signs with.
#[derive(Clone)]
pub(super) struct Credentials {
    pub(super) username: Vec<u8>,
    pub(super) password: Vec<u8>,
    pub(super) realm: Vec<u8>,
    pub(super) nonce: Vec<u8>,
    /// PASSWORD-ALGORITHM, sent with PASSWORD-ALGORITHMS as the server offers it; `None` sends neither.
    pub(super) algorithm: Option<PasswordAlgorithm>,
    /// Which attribute requests are signed with.
    pub(super) integrity: Integrity,
    /// USERHASH stands for USERNAME.
    pub(super) anonymous: bool,
    /// The key of an access token instead of that of the password.
    pub(super) session_key: Option<Vec<u8>>,
}

impl Credentials {
    pub(super) fn key(&self) -> LongTermKey {
        let realm = String::from_utf8_lossy(&self.realm);
        credential::long_term_key(&self.username, &realm, &self.password)
    }

    /// What requests are signed with.
    pub(super) fn integrity_key(&self) -> IntegrityKey {
        let key = match &self.session_key {
            Some(key) => IntegrityKey::new(key, self.integrity).expect("short"),
            None => {
                let algorithm = self.algorithm.unwrap_or(PasswordAlgorithm::Md5);
                IntegrityKey::long_term(algorithm, &self.username, &self.realm, &self.password)
            }
        };
        key.with(self.integrity)
    }

    /// By PASSWORD-ALGORITHM SHA-256 and MESSAGE-INTEGRITY-SHA256.
    pub(super) fn sha256(mut self) -> Self {
        self.algorithm = Some(PasswordAlgorithm::Sha256);
        self.integrity = Integrity::Sha256;
        self
    }

    /// A TURN REST password for any name at all.
    pub(super) fn sign_as(&mut self, secret: &[u8], username: &[u8]) {
        use base64::Engine;
        use hmac::{KeyInit, Mac};
        let mut mac = hmac::Hmac::<sha1::Sha1>::new_from_slice(secret).expect("any length");
        mac.update(username);
        let password = base64::engine::general_purpose::STANDARD.encode(mac.finalize().into_bytes());
        self.username = username.to_vec();
        self.password = password.into_bytes();
    }
}

/// An answer.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) bytes: Vec<u8>,
}

impl Reply {
    pub(super) fn message(&self) -> Message<'_> {
        Message::parse(&self.bytes).expect("our own message")
    }

    /// Its error code; 0 for success.
    pub(super) fn code(&self) -> u16 {
        match self.message().class() {
            Class::Success => 0,
            Class::Error => {
                let code: Option<ErrorCode> = self.message().attribute().expect("well-formed");
                code.expect("an error has a code").code()
            }
            class => panic!("{class:?} is no answer"),
        }
    }
}

/// A packet that leaves.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) out: Out,
    pub(super) bytes: Vec<u8>,
    pub(super) ip: IpMeta,
}

/// What came of a packet.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) verdict: Verdict,
    packet: Vec<u8>,
}

impl Outcome {
    pub(super) fn dropped(&self) -> Option<DropReason> {
        match self.verdict {
            Verdict::Drop(reason) => Some(reason),
            _ => None,
        }
    }

    pub(super) fn is_done(&self) -> bool {
        matches!(self.verdict, Verdict::Done)
    }

    /// What the caller would gather.
    pub(super) fn sent(self) -> Option<Sent> {
        let Verdict::Send { out, head, payload, padding, ip, .. } = self.verdict else {
            return None;
        };
        let mut bytes = head.as_slice().to_vec();
        bytes.extend(&self.packet[payload]);
        bytes.extend(vec![0; padding.into()]);
        Some(Sent { out, bytes, ip })
    }
}

pub(super) struct Lab {
    pub(super) server: Server,
    pub(super) host: FakeHost,
    pub(super) now: Now,
    pub(super) from: FiveTuple,
    pub(super) path: Path,
    pub(super) ip: IpMeta,
    settings: Settings,
    transactions: std::cell::Cell<u64>,
}

impl Lab {
    pub(super) fn new() -> Self {
        let key = |id: u8, secret: &[u8]| Key { id, secret: secret.to_vec() };
        let settings = Settings {
            realm: "turnpike".to_owned(),
            rest_secrets: KeyRing(vec![key(2, SECRET), key(1, b"retired")]),
            nonce_keys: KeyRing(vec![key(1, &[1; 32])]),
            static_users: vec![StaticUser { username: USER.to_vec(), password: b"password".to_vec() }],
            ..Settings::default()
        };
        Self {
            server: Server::new(WorkerId(0), ip("198.51.100.7"), 1, Arc::new(settings.clone()), [5; 32]),
            host: FakeHost::default(),
            now: Now { mono: Instant::now(), wall: NOW },
            from: FiveTuple {
                transport: Transport::Udp,
                client: addr("203.0.113.9:51234"),
                server: addr("198.51.100.7:3478"),
            },
            path: Path::Listener(ListenerId(0)),
            ip: IpMeta::default(),
            settings,
            transactions: std::cell::Cell::new(0),
        }
    }

    /// With an IPv4 allocation whose record was taken away.
    pub(super) fn allocated() -> Self {
        let mut lab = Self::new();
        assert_eq!(lab.allocate(), 0);
        lab.outputs();
        lab
    }

    /// With an IPv6 allocation of an IPv4 client.
    pub(super) fn allocated_v6() -> Self {
        let mut lab = Self::new();
        lab.host.ipv6 = true;
        let reply = lab.request(Method::Allocate, |writer| {
            writer.attribute(&RequestedTransport(17)).attribute(&RequestedAddressFamily(2));
        });
        assert_eq!(reply.code(), 0);
        lab.outputs();
        lab
    }

    /// With a dual allocation; IPv4 at [`Lab::relayed`], IPv6 at [`Lab::relayed_v6`].
    pub(super) fn dual() -> Self {
        let mut lab = Self::new();
        lab.host.ipv6 = true;
        let reply = lab.request(Method::Allocate, |writer| {
            writer.attribute(&RequestedTransport(17)).attribute(&AdditionalAddressFamily(2));
        });
        assert_eq!(reply.code(), 0);
        lab.outputs();
        lab
    }

    // Clocks and settings.

    pub(super) fn pass(&mut self, seconds: u64) {
        self.now.mono += Duration::from_secs(seconds);
        self.now.wall += seconds * 1000;
    }

    pub(super) fn configure(&mut self, change: impl FnOnce(&mut Settings)) {
        change(&mut self.settings);
        self.input(Input::Configure(Arc::new(self.settings.clone())));
    }

    /// Another client.
    pub(super) fn client(&mut self, client: SocketAddr) {
        self.from.client = client;
    }

    // Credentials.

    /// The static user's, with a nonce of now.
    pub(super) fn credentials(&self) -> Credentials {
        Credentials {
            username: USER.to_vec(),
            password: b"password".to_vec(),
            realm: self.settings.realm.as_bytes().to_vec(),
            nonce: self.nonce_for(&self.from.client.to_string()),
            algorithm: None,
            integrity: Integrity::Sha1,
            anonymous: false,
            session_key: None,
        }
    }

    /// Bob's, from the newest secret.
    pub(super) fn rest(&self, expires_at: u64) -> Credentials {
        self.rest_of(SECRET, expires_at)
    }

    pub(super) fn rest_of(&self, secret: &[u8], expires_at: u64) -> Credentials {
        let key = Key { id: 0, secret: secret.to_vec() };
        let minted = credential::mint(&key, b"bob", expires_at);
        Credentials { username: minted.username, password: minted.password.into_bytes(), ..self.credentials() }
    }

    /// Bob's by HMAC-SHA256, from the newest secret.
    pub(super) fn rest_sha256(&self, expires_at: u64) -> Credentials {
        let key = Key { id: 0, secret: SECRET.to_vec() };
        let minted = credential::mint_sha256(&key, b"bob", expires_at);
        Credentials { username: minted.username, password: minted.password.into_bytes(), ..self.credentials() }
    }

    pub(super) fn nonce_for(&self, client: &str) -> Vec<u8> {
        let features =
            nonce::SecurityFeatures { password_algorithms: self.settings.features.sha256, username_anonymity: false };
        let minted = nonce::Nonce::mint(&self.settings.nonce_keys, addr(client), self.now.wall / 1000, features);
        minted.map_or_else(Vec::new, |nonce| nonce.as_bytes().to_vec())
    }

    // Requests.

    /// A request of a new transaction.
    pub(super) fn packet(
        &self,
        with: Option<&Credentials>,
        method: Method,
        write: impl FnOnce(&mut MessageWriter<'_>),
    ) -> Vec<u8> {
        self.transactions.set(self.transactions.get() + 1);
        let number = self.transactions.get().to_be_bytes();
        self.packet_of(&[&[0; 4], &number[..]].concat(), with, method, write)
    }

    /// A request of this transaction.
    pub(super) fn packet_of(
        &self,
        transaction: &[u8],
        with: Option<&Credentials>,
        method: Method,
        write: impl FnOnce(&mut MessageWriter<'_>),
    ) -> Vec<u8> {
        let transaction_id = TransactionId(transaction.try_into().expect("12 bytes"));
        let mut buffer = vec![0; 8192];
        let mut writer = MessageWriter::new(&mut buffer, Class::Request, method, transaction_id);
        write(&mut writer);
        if let Some(with) = with {
            if with.anonymous {
                writer.attribute(&Userhash(key::userhash(&with.username, &with.realm)));
            } else {
                writer.attribute(&Username(&with.username));
            }
            writer.attribute(&Realm(&with.realm)).attribute(&Nonce(&with.nonce));
            if let Some(algorithm) = with.algorithm {
                writer.attribute(&attribute::PasswordAlgorithm(&algorithm.to_value()));
                writer.attribute(&attribute::PasswordAlgorithms(&PasswordAlgorithm::OFFERED));
            }
            with.integrity_key().sign(&mut writer);
        }
        let len = writer.finish().expect("fits");
        buffer.truncate(len);
        buffer
    }

    pub(super) fn signed(
        &mut self,
        with: &Credentials,
        method: Method,
        write: impl FnOnce(&mut MessageWriter<'_>),
    ) -> Reply {
        let packet = self.packet(Some(with), method, write);
        self.exchange(&packet)
    }

    pub(super) fn unsigned(&mut self, method: Method, write: impl FnOnce(&mut MessageWriter<'_>)) -> Reply {
        let packet = self.packet(None, method, write);
        self.exchange(&packet)
    }

    /// Signed by the static user.
    pub(super) fn request(&mut self, method: Method, write: impl FnOnce(&mut MessageWriter<'_>)) -> Reply {
        let with = self.credentials();
        self.signed(&with, method, write)
    }

    /// Hands in a request that must be answered, to where it came from.
    pub(super) fn exchange(&mut self, packet: &[u8]) -> Reply {
        let outcome = self.client_packet(packet);
        let Verdict::Reply { out } = outcome.verdict else { panic!("no answer, but {:?}", outcome.verdict) };
        let (to, path) = (self.from, self.path);
        assert_eq!(out, Out::Client { to, path });
        let reply = Reply { bytes: self.server.reply().to_vec() };
        assert_eq!(reply.message().transaction_id().0, packet[8..20]);
        reply
    }

    pub(super) fn allocate(&mut self) -> u16 {
        self.request(Method::Allocate, udp).code()
    }

    pub(super) fn refresh(&mut self, lifetime: u32) -> u16 {
        self.request(Method::Refresh, |writer| {
            writer.attribute(&Lifetime(lifetime));
        })
        .code()
    }

    pub(super) fn permit(&mut self, peer: &str) {
        let peer = XorPeerAddress(SocketAddr::new(ip(peer), 0));
        let reply = self.request(Method::CreatePermission, |writer| {
            writer.attribute(&peer);
        });
        assert_eq!(reply.code(), 0);
    }

    pub(super) fn bind(&mut self, number: u16, peer: &str) -> u16 {
        self.request(Method::ChannelBind, |writer| {
            writer.attribute(&ChannelNumber(number)).attribute(&XorPeerAddress(addr(peer)));
        })
        .code()
    }

    // Packets.

    pub(super) fn client_packet(&mut self, packet: &[u8]) -> Outcome {
        let (from, path, ip) = (self.from, self.path, self.ip);
        let verdict = self.input(Input::FromClient { from, path, packet, ip });
        Outcome { verdict, packet: packet.to_vec() }
    }

    pub(super) fn channel_data(&mut self, number: u16, data: &[u8]) -> Outcome {
        let mut packet = number.to_be_bytes().to_vec();
        packet.extend(u16::try_from(data.len()).expect("short").to_be_bytes());
        packet.extend(data);
        self.client_packet(&packet)
    }

    pub(super) fn indication(&mut self, method: Method, write: impl FnOnce(&mut MessageWriter<'_>)) -> Outcome {
        let mut buffer = vec![0; 8192];
        let mut writer = MessageWriter::new(&mut buffer, Class::Indication, method, TransactionId([7; 12]));
        write(&mut writer);
        let len = writer.finish().expect("fits");
        self.client_packet(&buffer[..len])
    }

    /// A datagram at the first relayed address.
    pub(super) fn peer_packet(&mut self, peer: &str, packet: &[u8]) -> Outcome {
        self.at_relayed(self.relayed(), peer, packet)
    }

    pub(super) fn at_relayed(&mut self, relayed: RelayedAddr, peer: &str, packet: &[u8]) -> Outcome {
        let (from, ip) = (PeerAddr::new(addr(peer)), self.ip);
        let verdict = self.input(Input::FromPeer { relayed, from, packet, ip });
        Outcome { verdict, packet: packet.to_vec() }
    }

    // Other inputs, and what comes out.

    pub(super) fn input(&mut self, input: Input<'_>) -> Verdict {
        self.server.handle_input(self.now, input, &mut self.host)
    }

    pub(super) fn timeout(&mut self) {
        self.input(Input::Timeout);
    }

    pub(super) fn closed(&mut self, connection: ConnectionId) {
        self.input(Input::Closed(connection));
    }

    pub(super) fn restore(&mut self, record: Record) {
        let record = Box::new(record);
        let path = self.path;
        self.input(Input::Restore { record, path });
    }

    /// All but what whoever filters is told, which has a test of its own.
    pub(super) fn outputs(&mut self) -> Vec<Output> {
        let mut outputs = self.all_outputs();
        outputs.retain(|output| !matches!(output, Output::Permit { .. } | Output::Forbid { .. }));
        outputs
    }

    pub(super) fn all_outputs(&mut self) -> Vec<Output> {
        std::iter::from_fn(|| self.server.poll_output()).collect()
    }

    pub(super) fn changes(&mut self) -> Vec<Change> {
        let change = |output| match output {
            Output::Record(change) => Some(change),
            _ => None,
        };
        self.outputs().into_iter().filter_map(change).collect()
    }

    /// The first address the host bound.
    pub(super) fn relayed(&self) -> RelayedAddr {
        let ipv6 = self.host.families.first() == Some(&Family::V6);
        let (ip_bound, ip_advertised) =
            if ipv6 { (ip("fd00::5"), ip("2001:db8::7")) } else { (ip("10.0.0.5"), ip("198.51.100.7")) };
        RelayedAddr { bound: SocketAddr::new(ip_bound, 50_000), advertised: SocketAddr::new(ip_advertised, 50_000) }
    }

    /// The address of one of the allocations there are.
    pub(super) fn relayed_of(&self, index: usize) -> RelayedAddr {
        let record = self.server.records(self.now).nth(index).expect("there are that many");
        record.relayed[0]
    }

    /// The IPv6 address of [`Lab::dual`].
    pub(super) fn relayed_v6(&self) -> RelayedAddr {
        RelayedAddr { bound: addr("[fd00::5]:50001"), advertised: addr("[2001:db8::7]:50001") }
    }
}
