//! A server with a process around it that is only values: ports are numbers, the network is a queue.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

pub mod driver;
pub mod duel;
pub mod model;
pub mod rig;
pub mod stun;

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use turn_core::client::{Client, ClientConfig, Event};
use turn_core::wire::ChannelNumber;
use turn_core::{
    BindError, BindRequest, Bound, ClaimError, ConnectError, Family, FiveTuple, Host, Input, IpMeta, Key, KeyRing,
    Limits, ListenerId, Meters, Now, Path, PeerAddr, PeerConnectionId, RelayedAddr, Route, Server, Settings,
    StaticUser, Transport, Verdict, WorkerId,
};

/// Where clients reach the relay, and its relay IP.
pub const SERVER: &str = "198.51.100.1:3478";
/// Unix ms at which every test begins.
pub const EPOCH: u64 = 1_800_000_000_000;

pub fn addr(text: &str) -> SocketAddr {
    text.parse().expect("a literal address")
}

/// Ports by counting, all owned by worker 0.
#[derive(Debug, Default)]
pub struct Ports {
    next: u16,
    /// Relayed addresses held, and under which quota key.
    pub held: HashMap<SocketAddr, Vec<u8>>,
    /// What every user shares.
    pub meters: Meters,
    /// Refuse everything from now on.
    pub exhausted: bool,
    /// Connections between TCP allocations and peers: of which relayed address, and where they are.
    pub peer_connections: BTreeMap<PeerConnectionId, (RelayedAddr, Held)>,
    connections: u32,
}

/// Where a peer data connection is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Held {
    /// On its way.
    Opening,
    /// It waits for a ConnectionBind of this user.
    Pending(Vec<u8>),
    /// Claimed.
    Bound,
}

impl Ports {
    /// A name for a connection of this relayed address.
    pub fn open(&mut self, relayed: RelayedAddr) -> PeerConnectionId {
        self.connections += 1;
        let id = PeerConnectionId(self.connections);
        self.peer_connections.insert(id, (relayed, Held::Opening));
        id
    }

    fn ip(family: Family) -> IpAddr {
        match family {
            Family::V4 => addr(SERVER).ip(),
            Family::V6 => addr("[2001:db9::1]:0").ip(),
        }
    }
}

impl Host for Ports {
    fn bind(&mut self, request: BindRequest<'_>) -> Result<Bound, BindError> {
        if self.exhausted {
            return Err(BindError::NoPort);
        }
        self.next += 1;
        let address = SocketAddr::new(Self::ip(request.family), 49_152 + self.next);
        self.held.insert(address, request.quota_key.to_vec());
        Ok(Bound { relayed: RelayedAddr { bound: address, advertised: address }, reservation: None })
    }

    fn connect(&mut self, relayed: RelayedAddr, to: PeerAddr) -> Result<PeerConnectionId, ConnectError> {
        match (self.exhausted, self.route(to)) {
            (true, _) => Err(ConnectError::NoRoom),
            (false, Route::Internet) => Ok(self.open(relayed)),
            (false, _) => Err(ConnectError::Forbidden),
        }
    }

    fn claim(&mut self, connection: PeerConnectionId, username: &[u8]) -> Result<(), ClaimError> {
        let Some((_, held @ Held::Pending(_))) = self.peer_connections.get_mut(&connection) else {
            return Err(ClaimError::Unknown);
        };
        if *held != Held::Pending(username.to_vec()) {
            return Err(ClaimError::OtherUser);
        }
        *held = Held::Bound;
        Ok(())
    }

    fn meters(&mut self, _: &[u8]) -> Meters {
        self.meters.clone()
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

/// One user, "user" / "password", and one REST secret, "secret".
pub fn settings() -> Settings {
    let key = |id, secret: &[u8]| KeyRing(vec![Key { id, secret: secret.to_vec() }]);
    Settings {
        realm: "turnpike".into(),
        rest_secrets: key(1, b"secret"),
        nonce_keys: key(1, b"nonce key"),
        static_users: vec![StaticUser { username: b"user".to_vec(), password: b"password".to_vec() }],
        ..Settings::default()
    }
}

pub fn server() -> Server {
    Server::new(WorkerId(0), addr(SERVER).ip(), 1, Arc::new(settings()), [7; 32])
}

pub fn five_tuple(client: SocketAddr) -> FiveTuple {
    FiveTuple { transport: Transport::Udp, client, server: addr(SERVER) }
}

pub const PATH: Path = Path::Listener(ListenerId(0));

/// A clock that only the test moves.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
    pub elapsed: Duration,
}

impl Clock {
    pub fn new() -> Self {
        Self { start: Instant::now(), elapsed: Duration::ZERO }
    }

    pub fn mono(&self) -> Instant {
        self.start + self.elapsed
    }

    pub fn now(&self) -> Now {
        Now { mono: self.mono(), wall: EPOCH + self.elapsed.as_millis() as u64 }
    }

    /// Moves to an instant that is not in the past.
    pub fn advance_to(&mut self, at: Instant) {
        self.elapsed = self.elapsed.max(at.saturating_duration_since(self.start));
    }
}

pub const CLIENT: &str = "203.0.113.1:5000";
pub const CHANNEL_PEER: &str = "203.0.113.77:7000";
pub const OTHER_PEER: &str = "203.0.113.78:7000";

/// A client that authenticates as [`settings`] knows it.
pub fn client(family: Option<Family>, lifetime: Option<u32>, seed: u8) -> Client {
    Client::new(ClientConfig {
        transport: Transport::Udp,
        username: b"user".to_vec(),
        password: b"password".to_vec(),
        family,
        lifetime,
        seed: [seed; 32],
    })
}

/// The same user on a stream.
pub fn stream_client(seed: u8) -> Client {
    Client::new(ClientConfig {
        transport: Transport::Tcp,
        username: b"user".to_vec(),
        password: b"password".to_vec(),
        family: None,
        lifetime: None,
        seed: [seed; 32],
    })
}

pub fn send_indication(to: SocketAddr, data: &[u8]) -> Vec<u8> {
    let mut client = client(None, None, 2);
    client.send(to, data);
    client.poll_transmit().expect("a Send indication")
}

/// A server that holds one allocation, of [`CLIENT`]: channel 0x4000 to [`CHANNEL_PEER`], a permission for
/// [`OTHER_PEER`].
pub struct Station {
    pub clock: Clock,
    pub server: Server,
    pub ports: Ports,
    pub relayed: RelayedAddr,
}

impl Station {
    pub fn new() -> Self {
        Self::with(settings())
    }

    /// With every limit of bandwidth, none of which is reached.
    pub fn limited() -> Self {
        let rate = 1 << 40;
        let limits =
            Limits { bytes_per_allocation: rate, bytes_per_user: rate, bytes_per_node: rate, ..Limits::default() };
        Self::with(Settings { limits, ..settings() })
    }

    fn with(settings: Settings) -> Self {
        let clock = Clock::new();
        let mut server = Server::new(WorkerId(0), addr(SERVER).ip(), 1, Arc::new(settings), [7; 32]);
        let meters = Meters { user: Some(Arc::default()), node: Some(Arc::default()), ..Meters::default() };
        let mut ports = Ports { meters, ..Ports::default() };
        let mut client = client(None, None, 1);
        client.allocate(clock.mono());
        let mut allocated = None;
        let from = five_tuple(addr(CLIENT));
        while let Some(packet) = client.poll_transmit() {
            let input = Input::FromClient { from, path: PATH, packet: &packet, ip: IpMeta::default() };
            let verdict = server.handle_input(clock.now(), input, &mut ports);
            assert!(matches!(verdict, Verdict::Reply { .. }), "{verdict:?}");
            client.handle_packet(clock.mono(), server.reply());
            while server.poll_output().is_some() {}
            while let Some(event) = client.poll_event() {
                match event {
                    Event::Allocated { relayed, .. } => {
                        allocated = Some(relayed);
                        let channel = ChannelNumber::new(0x4000).expect("in range");
                        client.bind_channel(clock.mono(), channel, addr(CHANNEL_PEER));
                        client.permit(clock.mono(), &[addr(OTHER_PEER).ip()]);
                    }
                    Event::Failed(..) => panic!("{event:?}"),
                    _ => {}
                }
            }
        }
        let relayed = allocated.expect("allocated");
        Self { clock, server, ports, relayed: RelayedAddr { bound: relayed, advertised: relayed } }
    }
}
