//! What a check has at hand: the server, users, and addresses where peers of its own listen.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use turn_core::Transport;
use turn_core::wire::AttributeType as A;

use super::check::{Step, Stop, fail, not_applicable};
use super::client::{Client, TAKEN, expect_code};
use super::craft::{ALLOCATE, Craft, UDP, hmac_sha1};
use super::wire::{Handshake, Trust, Wire};

/// User name and password.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Login {
    pub(crate) username: Vec<u8>,
    pub(crate) password: Vec<u8>,
}

/// Where users come from.
#[derive(Clone, Debug)]
pub(crate) enum Users {
    /// One, or two for the checks about strangers.
    Fixed(Login, Option<Login>),
    /// As many as one likes, by a TURN REST secret.
    Rest(Vec<u8>),
}

/// Numbers of a server that its operator knows, for the checks that reach them. `None`: not checked.
#[derive(Clone, Debug, Default)]
pub(crate) struct Bounds {
    /// Allocations of one user.
    pub(crate) user_quota: Option<u32>,
    /// Ports for relayed addresses in all.
    pub(crate) relay_ports: Option<u32>,
    /// Permissions of one allocation.
    pub(crate) permissions: Option<u32>,
    /// Channels of one allocation.
    pub(crate) channels: Option<u32>,
}

/// The server under test and how to meet it.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// Name in its certificate.
    pub(crate) host: String,
    /// Where it serves each transport under test.
    pub(crate) servers: Vec<(Transport, SocketAddr)>,
    pub(crate) users: Users,
    /// Refuse another realm than this.
    pub(crate) realm: Option<String>,
    /// Clients bind this address.
    pub(crate) from: IpAddr,
    /// Peers listen here.
    pub(crate) peer_ip: IpAddr,
    /// A second address of this machine, for what depends on the peer's IP.
    pub(crate) other_peer_ip: Option<IpAddr>,
    pub(crate) trust: Trust,
    pub(crate) bounds: Bounds,
    /// The operator allows more load than a client's, also off loopback.
    pub(crate) owned: bool,
    /// How long an answer may take.
    pub(crate) patience: Duration,
    /// How long after the server's last sign what it still sends may take.
    pub(crate) settle: Duration,
}

/// One run of one check over one transport.
pub(crate) struct Lab<'a> {
    pub(crate) target: &'a Target,
    pub(crate) transport: Transport,
    /// Users of this run: none is shared with a check that runs beside it, where they are minted.
    number: u32,
}

static RUNS: AtomicU32 = AtomicU32::new(0);

impl<'a> Lab<'a> {
    pub(crate) fn new(target: &'a Target, transport: Transport) -> Self {
        Self { target, transport, number: RUNS.fetch_add(1, Ordering::Relaxed) }
    }

    /// Where the server serves this transport.
    pub(crate) fn server(&self) -> Step<SocketAddr> {
        self.server_of(self.transport)
    }

    /// Where the server serves a transport.
    pub(crate) fn server_of(&self, transport: Transport) -> Step<SocketAddr> {
        match self.target.servers.iter().find(|(offered, _)| *offered == transport) {
            Some((_, server)) => Ok(*server),
            None => not_applicable(format!("{transport:?} is not under test")),
        }
    }

    /// The user.
    pub(crate) fn user(&self) -> Login {
        match &self.target.users {
            Users::Fixed(login, _) => login.clone(),
            Users::Rest(secret) => rest_login(secret, &format!("check-{}", self.number), 86_400),
        }
    }

    /// Another user.
    pub(crate) fn other_user(&self) -> Step<Login> {
        match &self.target.users {
            Users::Fixed(_, Some(login)) => Ok(login.clone()),
            Users::Fixed(_, None) => not_applicable("needs a second user: --other-user and --other-password"),
            Users::Rest(secret) => Ok(rest_login(secret, &format!("other-{}", self.number), 86_400)),
        }
    }

    /// A raw socket to the server.
    pub(crate) fn wire(&self) -> Step<Wire> {
        self.wire_over(self.transport, Handshake::default())
    }

    pub(crate) fn wire_over(&self, transport: Transport, handshake: Handshake) -> Step<Wire> {
        let server = self.server_of(transport)?;
        let target = self.target;
        let mut tries = 0;
        loop {
            match Wire::open(transport, server, (target.from, 0).into(), &target.host, &target.trust, handshake) {
                Ok(wire) => return Ok(wire),
                // A server that does not take up a second session on a port has a check of its own for that; the others get
                // another port.
                Err(_) if transport == Transport::Dtls && handshake.version.is_none() && tries < 2 => tries += 1,
                Err(error) => return fail(format!("cannot connect: {error}")),
            }
        }
    }

    /// A client that the server has not met.
    pub(crate) fn stranger(&self) -> Step<Client> {
        Ok(Client::new(self.wire()?, self.user(), self.target))
    }

    /// A client that knows realm and nonce.
    pub(crate) fn client(&self) -> Step<Client> {
        self.client_of(self.user())
    }

    pub(crate) fn client_of(&self, user: Login) -> Step<Client> {
        let mut taken = 0;
        loop {
            let mut client = Client::new(self.wire()?, user.clone(), self.target);
            match client.greet() {
                Ok(()) => return Ok(client),
                Err(Stop::NotApplicable(why)) if why == TAKEN && taken < 3 => taken += 1,
                Err(stop) => return Err(stop),
            }
        }
    }

    /// A client with an allocation.
    pub(crate) fn allocation(&self) -> Step<Client> {
        let mut taken = 0;
        loop {
            let mut client = self.client()?;
            let reply = client.signed(self.allocate())?;
            // The port's last owner left its allocation behind.
            if reply.code() == 437 && taken < 3 {
                taken += 1;
                continue;
            }
            expect_code(&reply, 0)?;
            client.relayed()?;
            return Ok(client);
        }
    }

    /// An Allocate request for a relayed address that the peers here can be reached from.
    pub(crate) fn allocate(&self) -> Craft {
        let request = Craft::request(ALLOCATE).attr(A::REQUESTED_TRANSPORT, &UDP);
        if self.target.peer_ip.is_ipv4() { request } else { request.attr(A::REQUESTED_ADDRESS_FAMILY, &[2, 0, 0, 0]) }
    }

    /// A peer of our own.
    pub(crate) fn peer(&self) -> Step<Peer> {
        Ok(Peer::at(self.target.peer_ip)?)
    }

    /// A peer at another IP.
    pub(crate) fn other_peer(&self) -> Step<Peer> {
        match self.target.other_peer_ip {
            Some(ip) => Ok(Peer::at(ip)?),
            None => not_applicable("needs a second address of this machine: --other-peer-ip"),
        }
    }

    /// A peer that waits for TCP connections.
    pub(crate) fn tcp_peer(&self) -> Step<TcpListener> {
        Ok(TcpListener::bind((self.target.peer_ip, 0))?)
    }

    /// An address of the other family than the peers'.
    pub(crate) fn other_family(&self) -> SocketAddr {
        if self.target.peer_ip.is_ipv4() {
            (Ipv6Addr::new(0x2A00, 0x1450, 0, 0, 0, 0, 0, 9), 9).into()
        } else {
            (Ipv4Addr::new(8, 8, 8, 8), 9).into()
        }
    }

    /// Fails unless the server still answers a newcomer.
    pub(crate) fn alive(&self) -> Step {
        let last = match self.wire().map(|wire| Client::new(wire, self.user(), self.target)) {
            Ok(mut client) => match client.ask(&Craft::request(super::craft::BINDING)) {
                Ok(_) => return Ok(()),
                Err(stop) => stop,
            },
            Err(stop) => stop,
        };
        match last {
            Stop::Fail(seen) => fail(format!("afterwards the server does not answer: {seen}")),
            other => Err(other),
        }
    }

    /// Waits until what the server still sends is here.
    pub(crate) fn settle(&self) {
        std::thread::sleep(self.target.settle);
    }
}

/// A user of a TURN REST secret, good for `seconds` from now on.
pub(crate) fn rest_login(secret: &[u8], user: &str, seconds: i64) -> Login {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
    let username = format!("{}:{user}", i64::try_from(now).unwrap_or_default() + seconds).into_bytes();
    rest_login_named(secret, username)
}

/// A user of exactly this name.
pub(crate) fn rest_login_named(secret: &[u8], username: Vec<u8>) -> Login {
    let password = STANDARD.encode(hmac_sha1(secret, &username)).into_bytes();
    Login { username, password }
}

/// A UDP peer of our own.
pub(crate) struct Peer {
    socket: UdpSocket,
    pub(crate) address: SocketAddr,
}

impl Peer {
    fn at(ip: IpAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind((ip, 0))?;
        let address = socket.local_addr()?;
        Ok(Self { socket, address })
    }

    pub(crate) fn send(&self, to: SocketAddr, data: &[u8]) -> Step {
        self.socket.send_to(data, to)?;
        Ok(())
    }

    /// What arrives within `patience`, and from where.
    pub(crate) fn receive(&self, patience: Duration) -> Option<(Vec<u8>, SocketAddr)> {
        let deadline = Instant::now() + patience;
        let mut bytes = vec![0; 66_000];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.socket.set_read_timeout(Some(left.max(Duration::from_millis(1)))).is_err() {
                return None;
            }
            if let Ok((len, from)) = self.socket.recv_from(&mut bytes) {
                bytes.truncate(len);
                return Some((bytes, from));
            }
        }
    }

    /// Fails unless exactly this arrives from exactly there.
    pub(crate) fn must_get(&self, data: &[u8], from: SocketAddr, patience: Duration) -> Step {
        match self.receive(patience) {
            Some((got, source)) if got == data && source == from => Ok(()),
            Some((got, source)) if got == data => fail(format!("came from {source} instead of {from}")),
            Some((got, _)) => fail(format!("{} bytes came instead of the {} that were sent", got.len(), data.len())),
            None => fail(format!("{} bytes for the peer did not arrive", data.len())),
        }
    }

    /// Fails if anything arrives within `settle`.
    pub(crate) fn must_get_nothing(&self, settle: Duration) -> Step {
        match self.receive(settle) {
            None => Ok(()),
            Some((got, source)) => fail(format!("the peer got {} bytes from {source}", got.len())),
        }
    }
}
