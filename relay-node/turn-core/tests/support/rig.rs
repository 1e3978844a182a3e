//! One server, its host and one client at a time, for tests that say one rule each.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use turn_core::wire::attribute::ReservationToken;
use turn_core::{
    BindError, BindRequest, Bound, ClaimError, ConnectError, ConnectionId, DropReason, Family, FiveTuple, Host, Input,
    IpMeta, Out, Output, Path, PeerAddr, PeerConnectionId, PeerEvent, PeerTransport, PortRequest, RelayedAddr, Route,
    Server, Settings, Transport, Verdict, WorkerId,
};

use super::stun::{self, ALLOCATE, Builder, CHANNEL_BIND, CREATE_PERMISSION, Class, Item, NONCE, REFRESH, Read};
use super::{Clock, Held, PATH, addr};

/// A call of [`Host::bind`] and what it gave.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Binding {
    pub family: Family,
    pub transport: PeerTransport,
    pub quota_key: Vec<u8>,
    pub port: PortRequest,
    pub result: Result<Bound, BindError>,
}

/// Ports as numbers: even ones, pairs and reservations as RFC 8656 §7.2 has them, quotas by name. Remembers what it
/// was asked for.
#[derive(Clone, Debug, Default)]
pub struct Desk {
    next: u16,
    tokens: u64,
    /// Relayed addresses held, and for whom.
    pub held: HashMap<SocketAddr, Vec<u8>>,
    /// Ports kept under a token, and the name they are counted for.
    pub reserved: HashMap<[u8; 8], (SocketAddr, Vec<u8>)>,
    /// Most allocations a name may have; none is no limit.
    pub quota: Option<usize>,
    /// No port is left.
    pub exhausted: bool,
    /// This relay has no address of the family.
    pub without: Option<Family>,

    /// What was asked for, oldest first, until it is taken.
    pub bindings: Vec<Binding>,
    /// Connections between TCP allocations and peers: the relayed address, the peer, and where they are.
    pub connections: BTreeMap<PeerConnectionId, (RelayedAddr, PeerAddr, Held)>,
    /// Connections begun so far.
    pub begun: u32,

    /// What the next connections to peers come to.
    pub connect: Option<ConnectError>,
    /// Which were asked for, until it is taken.
    pub dials: Vec<(SocketAddr, Result<PeerConnectionId, ConnectError>)>,
}

impl Desk {
    /// With at most so many allocations for each name.
    pub fn with_quota(quota: usize) -> Self {
        Self { quota: Some(quota), ..Self::default() }
    }

    /// The relay's address of a family.
    pub fn ip(family: Family) -> std::net::IpAddr {
        match family {
            Family::V4 => addr(super::SERVER).ip(),
            Family::V6 => addr("[2001:db9::1]:0").ip(),
        }
    }

    /// A new connection of a relayed address.
    pub fn begin(&mut self, relayed: RelayedAddr, peer: PeerAddr) -> PeerConnectionId {
        self.begun += 1;
        let id = PeerConnectionId(self.begun);
        self.connections.insert(id, (relayed, peer, Held::Opening));
        id
    }

    /// What the server said about connections to peers.
    pub fn obey(&mut self, output: &Output) {
        match output {
            Output::Pend { connection, username, .. } => {
                let (_, _, held) = self.connections.get_mut(connection).expect("what is pending is there");
                assert_eq!(*held, Held::Opening);
                *held = Held::Pending(username.to_vec());
            }
            Output::ClosePeer(connection) => {
                self.connections.remove(connection);
            }
            Output::Join { peer, .. } => {
                assert!(matches!(self.connections.get(peer), Some((_, _, Held::Bound))), "what is joined was claimed");
            }
            _ => {}
        }
    }

    fn find(&mut self, request: &BindRequest<'_>) -> Result<Bound, BindError> {
        if self.without == Some(request.family) && !matches!(request.port, PortRequest::Reserved(_)) {
            return Err(BindError::FamilyUnsupported);
        }
        let taken = |key: &[u8]| self.held.values().filter(|held| **held == key).count();
        if self.quota.is_some_and(|quota| taken(request.quota_key) >= quota) {
            return Err(BindError::QuotaReached);
        }
        if self.exhausted && !matches!(request.port, PortRequest::Reserved(_)) {
            return Err(BindError::NoPort);
        }
        let ip = Self::ip(request.family);
        let mut reservation = None;
        let address = match request.port {
            PortRequest::Any => {
                self.next += 1;
                SocketAddr::new(ip, 49_152 + self.next)
            }
            PortRequest::Even | PortRequest::EvenAndNext => {
                self.next = (self.next + 1).next_multiple_of(2);
                let even = SocketAddr::new(ip, 49_152 + self.next);
                if request.port == PortRequest::EvenAndNext {
                    self.next += 1;
                    self.tokens += 1;
                    let token = self.tokens.to_be_bytes();
                    let next = SocketAddr::new(ip, 49_152 + self.next);
                    self.reserved.insert(token, (next, request.quota_key.to_vec()));
                    reservation = Some(ReservationToken(token));
                }
                even
            }
            PortRequest::Reserved(ReservationToken(token)) => {
                self.reserved.remove(&token).map(|(address, _)| address).ok_or(BindError::NoPort)?
            }
        };
        self.held.insert(address, request.quota_key.to_vec());
        Ok(Bound { relayed: RelayedAddr { bound: address, advertised: address }, reservation })
    }
}

impl Host for Desk {
    fn bind(&mut self, request: BindRequest<'_>) -> Result<Bound, BindError> {
        let result = self.find(&request);

        let BindRequest { family, transport, quota_key, port } = request;
        self.bindings.push(Binding { family, transport, quota_key: quota_key.to_vec(), port, result });
        result
    }

    fn connect(&mut self, relayed: RelayedAddr, to: PeerAddr) -> Result<PeerConnectionId, ConnectError> {
        let result = match self.connect {
            Some(error) => Err(error),
            // Its own addresses are no peers for TCP.
            None if [Family::V4, Family::V6].map(Self::ip).contains(&to.ip()) => Err(ConnectError::Forbidden),
            None => Ok(self.begin(relayed, to)),
        };
        self.dials.push((to.socket_addr(), result));
        result
    }

    fn claim(&mut self, connection: PeerConnectionId, username: &[u8]) -> Result<(), ClaimError> {
        let Some((_, _, held @ Held::Pending(_))) = self.connections.get_mut(&connection) else {
            return Err(ClaimError::Unknown);
        };
        if *held != Held::Pending(username.to_vec()) {
            return Err(ClaimError::OtherUser);
        }
        *held = Held::Bound;
        Ok(())
    }

    fn route(&self, to: PeerAddr) -> Route {
        if self.held.contains_key(&to.socket_addr()) {
            Route::Worker(WorkerId(0))
        } else if [Family::V4, Family::V6].map(Self::ip).contains(&to.ip()) {
            Route::Nobody
        } else {
            Route::Internet
        }
    }
}

/// What came of a packet.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// An answer to where the request came from.
    Answer(Read),
    /// To a peer on the internet.
    Peer { via: SocketAddr, to: SocketAddr, data: Vec<u8>, ip: IpMeta },
    /// To an allocation of this node.
    Worker { via: SocketAddr, to: SocketAddr, data: Vec<u8>, ip: IpMeta },
    /// To a client: all the bytes.
    Client { to: FiveTuple, path: Path, bytes: Vec<u8>, ip: IpMeta },
    /// Nothing.
    Silence(Option<DropReason>),
}

impl Outcome {
    #[track_caller]
    pub fn answer(self) -> Read {
        match self {
            Self::Answer(read) => read,
            other => panic!("no answer: {other:?}"),
        }
    }

    #[track_caller]
    pub fn code(self) -> u16 {
        self.answer().code()
    }

    pub fn is_silence(&self) -> bool {
        matches!(self, Self::Silence(_))
    }

    /// What a peer gets: from, to, data.
    #[track_caller]
    pub fn peer_gets(self) -> (SocketAddr, SocketAddr, Vec<u8>) {
        match self {
            Self::Peer { via, to, data, .. } => (via, to, data),
            other => panic!("nothing to a peer: {other:?}"),
        }
    }

    /// What the client gets.
    #[track_caller]
    pub fn client_gets(self) -> Vec<u8> {
        match self {
            Self::Client { bytes, .. } => bytes,
            other => panic!("nothing to the client: {other:?}"),
        }
    }

    #[track_caller]
    pub fn ip(&self) -> IpMeta {
        match self {
            Self::Peer { ip, .. } | Self::Worker { ip, .. } | Self::Client { ip, .. } => *ip,
            other => panic!("nothing was relayed: {other:?}"),
        }
    }
}

/// Gathers a verdict as a worker does.
pub fn gather(server: &Server, verdict: &Verdict, packet: &[u8]) -> Outcome {
    let Verdict::Send { out, head, payload, padding, ip, .. } = verdict else {
        return match verdict {
            Verdict::Reply { .. } => Outcome::Answer(Read::new(server.reply())),
            Verdict::Drop(reason) => Outcome::Silence(Some(*reason)),
            _ => Outcome::Silence(None),
        };
    };
    let mut bytes = head.as_slice().to_vec();
    bytes.extend(&packet[payload.clone()]);
    bytes.extend(vec![0; usize::from(*padding)]);
    match *out {
        Out::Client { to, path } => Outcome::Client { to, path, bytes, ip: *ip },
        Out::Peer { via, to } => Outcome::Peer { via: via.advertised, to: to.socket_addr(), data: bytes, ip: *ip },
        Out::Worker { via, to, .. } => {
            Outcome::Worker { via: via.advertised, to: to.socket_addr(), data: bytes, ip: *ip }
        }
        Out::Member { .. } => panic!("this host knows no members"),
    }
}

/// Who signs, and how the request says so.
#[derive(Clone, Debug)]
pub struct Signer {
    pub username: Vec<u8>,
    pub realm: Vec<u8>,
    pub password: Vec<u8>,
    pub nonce: Vec<u8>,
}

impl Signer {
    pub fn key(&self) -> Vec<u8> {
        stun::md5_key(&self.username, &self.realm, &self.password)
    }

    pub fn items(&self) -> Vec<Item> {
        vec![
            stun::raw(stun::USERNAME, &self.username),
            stun::raw(stun::REALM, &self.realm),
            stun::raw(NONCE, &self.nonce),
        ]
    }
}

/// See the module.
pub struct Rig {
    pub clock: Clock,
    pub server: Server,
    pub desk: Desk,
    pub settings: Settings,
    pub from: FiveTuple,
    pub path: Path,
    pub ip: IpMeta,
    pub username: Vec<u8>,
    pub password: Vec<u8>,

    /// Client data connections and what they were joined with (RFC 6062 §5.4).
    pub joined: Vec<(ConnectionId, PeerConnectionId)>,
    nonces: HashMap<SocketAddr, Vec<u8>>,
    transactions: u64,
}

impl Rig {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    /// With settings changed before the server begins.
    pub fn with(change: impl FnOnce(&mut Settings)) -> Self {
        let mut settings = super::settings();
        change(&mut settings);
        Self {
            clock: Clock::new(),
            server: Server::new(WorkerId(0), Desk::ip(Family::V4), 1, Arc::new(settings.clone()), [7; 32]),
            desk: Desk::default(),
            settings,
            from: super::five_tuple(addr(super::CLIENT)),
            path: PATH,
            ip: IpMeta::default(),
            username: b"user".to_vec(),
            password: b"password".to_vec(),

            joined: Vec::new(),
            nonces: HashMap::new(),
            transactions: 0,
        }
    }

    /// With an IPv4 allocation.
    #[track_caller]
    pub fn allocated() -> Self {
        let mut rig = Self::new();
        assert_eq!(rig.allocate(&[]).code(), 0);
        rig
    }

    /// Its client on a stream.
    pub fn on_stream(mut self) -> Self {
        self.from.transport = Transport::Tcp;
        self.path = Path::Connection(ConnectionId(1));
        self
    }

    // Time, settings, identity.

    /// Lets time pass; the timer is handed in when its instant comes, as a worker does.
    pub fn pass(&mut self, seconds: u64) {
        self.pass_without_timer(seconds);
        if self.server.poll_timeout().is_some_and(|at| at <= self.clock.mono()) {
            self.input(Input::Timeout, &[]);
        }
    }

    /// Lets time pass before any timer has fired.
    pub fn pass_without_timer(&mut self, seconds: u64) {
        self.clock.elapsed += Duration::from_secs(seconds);
    }

    pub fn configure(&mut self, change: impl FnOnce(&mut Settings)) {
        change(&mut self.settings);
        let settings = Arc::new(self.settings.clone());
        self.input(Input::Configure(settings), &[]);
    }

    /// Another client address.
    pub fn client(&mut self, address: &str) {
        self.from.client = addr(address);
    }

    /// Another user.
    pub fn user(&mut self, username: &[u8], password: &[u8]) {
        self.username = username.to_vec();
        self.password = password.to_vec();
    }

    /// What this client signs with now; asks for a nonce first if it has none.
    pub fn signer(&mut self) -> Signer {
        if !self.nonces.contains_key(&self.from.client) {
            let challenge = self.ask_unsigned(REFRESH, &[]).answer();
            assert_eq!(challenge.code(), 401);
            self.nonces.insert(self.from.client, challenge.find(NONCE).expect("a nonce").to_vec());
        }
        Signer {
            username: self.username.clone(),
            realm: self.settings.realm.as_bytes().to_vec(),
            password: self.password.clone(),
            nonce: self.nonces[&self.from.client].clone(),
        }
    }

    pub fn key(&mut self) -> Vec<u8> {
        self.signer().key()
    }

    /// The next request asks for a new nonce.
    pub fn forget_nonce(&mut self) {
        self.nonces.clear();
    }

    // Packets.

    pub fn transaction(&mut self) -> [u8; 12] {
        self.transactions += 1;
        let mut id = [0xA5; 12];
        id[4..].copy_from_slice(&self.transactions.to_be_bytes());
        id
    }

    /// A request that is not signed.
    pub fn unsigned(&mut self, method: u16, items: &[Item]) -> Vec<u8> {
        Builder::new(Class::Request, method, self.transaction()).items(items).bytes()
    }

    /// A signed request.
    pub fn signed(&mut self, method: u16, items: &[Item]) -> Vec<u8> {
        let signer = self.signer();
        self.signed_by(&signer, method, items)
    }

    pub fn signed_by(&mut self, signer: &Signer, method: u16, items: &[Item]) -> Vec<u8> {
        let builder = Builder::new(Class::Request, method, self.transaction());
        builder.items(items).items(&signer.items()).integrity(&signer.key()).bytes()
    }

    pub fn indication(&mut self, method: u16, items: &[Item]) -> Vec<u8> {
        Builder::new(Class::Indication, method, self.transaction()).items(items).bytes()
    }

    /// Hands in what the client sends. An answer must go where the packet came from.
    pub fn hand_in(&mut self, packet: &[u8]) -> Outcome {
        let (from, path, ip) = (self.from, self.path, self.ip);
        let verdict = self.input(Input::FromClient { from, path, packet, ip }, packet);
        if let Verdict::Reply { out } = verdict {
            // RFC 8656 §7.2: the response is sent back on the 5-tuple.
            assert_eq!(out, Out::Client { to: from, path });
        }
        gather(&self.server, &verdict, packet)
    }

    pub fn ask(&mut self, method: u16, items: &[Item]) -> Outcome {
        let packet = self.signed(method, items);
        self.hand_in(&packet)
    }

    pub fn ask_unsigned(&mut self, method: u16, items: &[Item]) -> Outcome {
        let packet = self.unsigned(method, items);
        self.hand_in(&packet)
    }

    pub fn tell(&mut self, method: u16, items: &[Item]) -> Outcome {
        let packet = self.indication(method, items);
        self.hand_in(&packet)
    }

    /// Allocate for UDP with these attributes more.
    pub fn allocate(&mut self, more: &[Item]) -> Outcome {
        let items = [&[stun::transport(17)], more].concat();
        self.ask(ALLOCATE, &items)
    }

    pub fn refresh(&mut self, items: &[Item]) -> Outcome {
        self.ask(REFRESH, items)
    }

    pub fn permit(&mut self, peer: &str) -> u16 {
        self.ask(CREATE_PERMISSION, &[stun::peer(addr(peer))]).code()
    }

    pub fn bind(&mut self, number: u16, peer: &str) -> u16 {
        self.ask(CHANNEL_BIND, &[stun::channel(number), stun::peer(addr(peer))]).code()
    }

    pub fn send(&mut self, peer: &str, data: &[u8]) -> Outcome {
        self.tell(stun::SEND, &[stun::peer(addr(peer)), stun::data(data)])
    }

    pub fn channel_data(&mut self, number: u16, data: &[u8]) -> Outcome {
        self.hand_in(&stun::channel_data(number, data))
    }

    /// The relayed address of the only allocation there is.
    pub fn relayed(&self) -> RelayedAddr {
        let record = self.server.records(self.clock.now()).next().expect("an allocation");
        record.relayed[0]
    }

    /// A datagram from a peer to the only allocation there is.
    pub fn peer_sends(&mut self, peer: &str, data: &[u8]) -> Outcome {
        let relayed = self.relayed();
        self.peer_sends_to(relayed, peer, data)
    }

    pub fn peer_sends_to(&mut self, relayed: RelayedAddr, peer: &str, packet: &[u8]) -> Outcome {
        let (from, ip) = (PeerAddr::new(addr(peer)), self.ip);
        let verdict = self.input(Input::FromPeer { relayed, from, packet, ip }, packet);
        gather(&self.server, &verdict, packet)
    }

    /// Something happens to a connection of a peer. What the client gets is an answer, or an indication.
    pub fn peer_connection(&mut self, connection: PeerConnectionId, event: PeerEvent) -> Outcome {
        let (relayed, _, _) = self.desk.connections[&connection].clone();
        if matches!(event, PeerEvent::Failed | PeerEvent::Closed) {
            self.desk.connections.remove(&connection);
        }
        let verdict = self.input(Input::PeerConnection { relayed, connection, event }, &[]);
        gather(&self.server, &verdict, &[])
    }

    /// A peer connects to the only allocation there is.
    pub fn peer_arrives(&mut self, peer: &str) -> (PeerConnectionId, Outcome) {
        let peer = PeerAddr::new(addr(peer));
        let connection = self.desk.begin(self.relayed(), peer);
        (connection, self.peer_connection(connection, PeerEvent::Arrived(peer)))
    }

    /// An ICMP error for what the only allocation there is has sent.
    pub fn icmp(&mut self, peer: &str, kind: u8, code: u8, mtu: u32) -> Outcome {
        let (relayed, peer) = (self.relayed(), PeerAddr::new(addr(peer)));
        let verdict = self.input(Input::Icmp { relayed, peer, kind, code, mtu }, &[]);
        gather(&self.server, &verdict, &[])
    }

    /// The timer's instant, if it has come: what falls due may be answered.
    pub fn timer(&mut self) -> Outcome {
        let verdict = self.input(Input::Timeout, &[]);
        gather(&self.server, &verdict, &[])
    }

    pub fn closed(&mut self, connection: u64) {
        self.input(Input::Closed(ConnectionId(connection)), &[]);
    }

    fn input(&mut self, input: Input<'_>, packet: &[u8]) -> Verdict {
        let verdict = self.server.handle_input(self.clock.now(), input, &mut self.desk);
        if let Verdict::Send { payload, .. } = &verdict {
            assert!(payload.end <= packet.len());
        }

        while let Some(output) = self.server.poll_output() {
            if let Output::Release { relayed, .. } = output {
                assert!(self.desk.held.remove(&relayed.advertised).is_some(), "a port is released once");
            }
            self.desk.obey(&output);
            if let Output::Join { connection, peer } = output {
                self.joined.push((connection, peer));
            }
        }
        verdict
    }
}
