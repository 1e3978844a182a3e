//! Bytes as a history: what a fuzzer or a property test makes up, done to a server, with what must hold after each step.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use turn_core::client::{Client, Event, Extensions};
use turn_core::wire::ChannelNumber;
use turn_core::{
    Alternate, ConnectionId, Family, FiveTuple, Input, IpMeta, Output, Path, PeerAddr, PeerConnectionId, PeerEvent,
    Policy, Record, RelayedAddr, Server, Settings, Ticket, Transport, Verdict,
};

use super::{Clock, Held, PATH, Ports, addr, five_tuple};

const CLIENTS: usize = 5;
/// The client that speaks on a stream and has TCP allocations.
const STREAM: usize = 4;
const IP: IpMeta = IpMeta { dscp_ecn: 0, ttl: 0, dont_fragment: false };

/// The history so far.
struct Driver {
    clock: Clock,
    server: Server,
    ports: Ports,
    clients: Vec<Client>,
    last: Vec<u8>,
    /// The port of each client now: mobile ones move.
    places: Vec<u16>,
    /// What each client can move with.
    last_ticket: Vec<Vec<u8>>,
    /// What the server says it has.
    tickets: HashSet<Ticket>,
    /// As whoever filters what peers send knows it.
    permitted: HashMap<(RelayedAddr, IpAddr), Instant>,
    records: Vec<Record>,
    draining: bool,
    /// Data connections so far.
    data_connections: u16,
}

/// Runs `bytes` as a history. Panics where something does not hold.
pub fn drive(bytes: &[u8]) {
    let client = |number| match usize::from(number) {
        STREAM => super::stream_client(number),
        _ => super::client((number == 3).then_some(Family::V6), (number == 2).then_some(60), number),
    };
    let mut driver = Driver {
        clock: Clock::new(),
        server: super::server(),
        ports: Ports::default(),
        clients: (0..CLIENTS as u8).map(client).collect(),
        last: Vec::new(),
        places: (0..CLIENTS as u16).collect(),
        last_ticket: vec![Vec::new(); CLIENTS],
        tickets: HashSet::new(),
        permitted: HashMap::new(),
        records: Vec::new(),
        draining: false,
        data_connections: 0,
    };
    let mut rest = bytes;
    while let Some((&[step, argument], behind)) = rest.split_first_chunk::<2>() {
        let len = usize::from(argument).min(behind.len());
        let used = driver.step(step, argument, &behind[..len]);
        driver.check();
        rest = &behind[used.min(len)..];
    }
}

fn client_address(index: usize) -> std::net::SocketAddr {
    std::net::SocketAddr::new(addr("203.0.113.1:0").ip(), 5000 + index as u16)
}

impl Driver {
    /// One step; says how many bytes of `payload` it used up.
    fn step(&mut self, step: u8, argument: u8, payload: &[u8]) -> usize {
        let index = usize::from(step >> 5) % CLIENTS;
        let mono = self.clock.mono();
        let peer = self.peer(argument);
        let channel = ChannelNumber::new(0x4000 + u16::from(argument % 8)).expect("in range");
        match step & 0x1F {
            0 => {
                self.hand_in(index + CLIENTS, payload);
                return payload.len();
            }
            1 => self.clients[index].allocate(mono),
            2 => self.clients[index].permit(mono, &[peer.ip(), addr("192.0.2.9:0").ip()]),
            3 => self.clients[index].bind_channel(mono, channel, peer),
            4 => self.clients[index].refresh(mono, u32::from(argument) * 7),
            5 => self.clients[index].send(peer, payload),
            6 => {
                let relayed = self.relayed(argument);
                let input = Input::FromPeer { relayed, from: PeerAddr::new(peer), packet: payload, ip: IP };
                self.serve(input, payload);
                return payload.len();
            }
            7 => self.pass(Duration::from_millis(u64::from(argument) * 4000)),
            8 => {
                // The last signed packet again, with one byte changed or none.
                let mut packet = self.last.clone();
                if let (Some(at), Some(byte)) = (payload.first(), packet.get_mut(usize::from(argument))) {
                    *byte ^= at;
                }
                self.hand_in(index, &packet);
                return 1;
            }
            9 => self.records = self.server.records(self.clock.now()).collect(),
            10 => {
                for record in std::mem::take(&mut self.records) {
                    for relayed in &record.relayed {
                        self.ports.held.entry(relayed.advertised).or_default();
                    }
                    self.serve(Input::Restore { record: Box::new(record), path: PATH }, &[]);
                }
                // A refused record leaves its port to the caller.
                let live: Vec<_> = self.server.records(self.clock.now()).flat_map(|record| record.relayed).collect();
                self.ports.held.retain(|address, _| live.iter().any(|relayed| relayed.advertised == *address));
            }
            11 => {
                self.draining = !self.draining;
                let policy = Policy { members: vec![addr(super::SERVER).ip()], ..Policy::default() };
                let alternate =
                    |transport| Alternate { transport, address: addr("198.51.100.8:3478"), relays_ipv6: false };
                let alternates = vec![alternate(Transport::Udp), alternate(Transport::Tcp)];
                let settings = Settings { draining: self.draining, alternates, policy, ..super::settings() };
                self.serve(Input::Configure(Arc::new(settings)), &[]);
            }
            12 => {
                let id = self.server.records(self.clock.now()).nth(usize::from(argument)).map(|record| record.id);
                if let Some(id) = id {
                    self.serve(Input::Revoke(id), &[]);
                }
            }
            13 => {
                self.serve(Input::Own { epoch: u64::from(argument) }, &[]);
            }
            14 => self.ports.exhausted = argument.is_multiple_of(2),
            15 => self.clients[STREAM].allocate_tcp(mono),
            16 => self.clients[STREAM].connect(mono, peer),
            17 => self.claim(argument),
            18 => {
                let relayed = self.relayed(argument);
                let connection = self.ports.open(relayed);
                self.peer_event(relayed, connection, PeerEvent::Arrived(PeerAddr::new(peer)));
            }
            19 => self.move_on(argument),
            21 => {
                let extensions = Extensions { dual: argument & 1 != 0, mobility: argument & 2 != 0 };
                self.clients[index].extend(extensions);
            }
            22 if index != STREAM => {
                // To another port, or to the same, with the ticket it has or had.
                self.places[index] = (index + CLIENTS * 8 * usize::from(argument % 3)) as u16;
                let ticket = self.last_ticket[index].clone();
                self.clients[index].resume(mono, &ticket);
            }
            20 => {
                self.serve(Input::Closed(ConnectionId(STREAM as u64)), &[]);
                self.clients[STREAM].abandon();
            }
            _ => {
                let relayed = self.relayed(argument);
                self.serve(Input::Icmp { relayed, peer: PeerAddr::new(peer), kind: 3, code: argument, mtu: 1400 }, &[]);
            }
        }
        self.pump();
        0
    }

    /// A ConnectionBind on a connection of its own, for a connection that is there or not.
    fn claim(&mut self, argument: u8) {
        self.data_connections += 1;
        let number = self.data_connections;
        let from = FiveTuple { transport: Transport::Tcp, ..five_tuple(client_address(100 + usize::from(number))) };
        let path = Path::Connection(ConnectionId(100 + u64::from(number)));
        let mut client = super::stream_client(number as u8);
        let connection = self.connection(argument).map_or(PeerConnectionId(argument.into()), |(id, _)| id);
        client.connection_bind(self.clock.mono(), connection);
        while let Some(packet) = client.poll_transmit() {
            let input = Input::FromClient { from, path, packet: &packet, ip: IP };
            let Verdict::Reply { .. } = self.serve(input, &packet) else {
                return;
            };
            client.handle_packet(self.clock.mono(), self.server.reply());
        }
        if client.poll_event() == Some(Event::ConnectionBound(connection)) {
            let (relayed, held) = self.ports.peer_connections[&connection].clone();
            assert_eq!(held, Held::Bound);
            self.peer_event(relayed, connection, PeerEvent::Bound);
        }
    }

    /// What the network does to a connection.
    fn move_on(&mut self, argument: u8) {
        let Some((connection, (relayed, held))) = self.connection(argument >> 1) else {
            return;
        };
        let event = match (held, argument % 2) {
            (Held::Opening, 0) => PeerEvent::Connected,
            (Held::Opening, _) => PeerEvent::Failed,
            (Held::Pending(_) | Held::Bound, _) => PeerEvent::Closed,
        };
        if event != PeerEvent::Connected {
            self.ports.peer_connections.remove(&connection);
        }
        self.peer_event(relayed, connection, event);
    }

    fn peer_event(&mut self, relayed: RelayedAddr, connection: PeerConnectionId, event: PeerEvent) {
        let verdict = self.serve(Input::PeerConnection { relayed, connection, event }, &[]);
        self.tell_stream(&verdict);
    }

    /// An answer to a request of before, or a ConnectionAttempt, is the stream client's.
    fn tell_stream(&mut self, verdict: &Verdict) {
        if matches!(verdict, Verdict::Reply { .. }) {
            let reply = self.server.reply().to_vec();
            self.clients[STREAM].handle_packet(self.clock.mono(), &reply);
        }
    }

    fn connection(&self, argument: u8) -> Option<(PeerConnectionId, (RelayedAddr, Held))> {
        let there = &self.ports.peer_connections;
        let (id, held) = there.iter().nth(usize::from(argument) % there.len().max(1))?;
        Some((*id, held.clone()))
    }

    fn relayed(&self, argument: u8) -> RelayedAddr {
        let mut held: Vec<_> = self.ports.held.keys().copied().collect();
        held.sort();
        let address = held.get(usize::from(argument) % held.len().max(1)).copied().unwrap_or(addr("198.51.100.1:9"));
        RelayedAddr { bound: address, advertised: address }
    }

    /// A peer on the internet, one that is forbidden, or one of the server's own relayed addresses.
    fn peer(&self, argument: u8) -> std::net::SocketAddr {
        match argument % 4 {
            0 => self.relayed(argument >> 2).advertised,
            1 => addr("10.0.0.1:9"),
            2 => addr("[2001:db9::77]:7000"),
            _ => std::net::SocketAddr::new(addr("203.0.113.77:0").ip(), u16::from(argument)),
        }
    }

    fn pass(&mut self, time: Duration) {
        self.clock.elapsed += time;
        while self.server.poll_timeout().is_some_and(|at| at <= self.clock.mono()) {
            let verdict = self.serve(Input::Timeout, &[]);
            self.tell_stream(&verdict);
        }
        for index in 0..CLIENTS {
            let mono = self.clock.mono();
            self.clients[index].handle_timeout(mono);
        }
    }

    /// Carries what clients want to send, and the answers back, without loss.
    fn pump(&mut self) {
        for index in 0..CLIENTS {
            while let Some(packet) = self.clients[index].poll_transmit() {
                if self.hand_in(index, &packet) {
                    let mono = self.clock.mono();
                    let reply = self.server.reply().to_vec();
                    self.clients[index].handle_packet(mono, &reply);
                }
                while let Some(event) = self.clients[index].poll_event() {
                    if let Event::Ticket(ticket) = &event {
                        self.last_ticket[index].clone_from(ticket);
                    }
                    assert!(!matches!(event, Event::Failed(_, turn_core::client::Failure::Invalid)), "{event:?}");
                }
                self.last = packet;
            }
        }
    }

    /// Hands in a packet of a client; true if it was answered.
    fn hand_in(&mut self, index: usize, packet: &[u8]) -> bool {
        let place = self.places.get(index).map_or(index, |place| usize::from(*place));
        let mut from = five_tuple(client_address(place));
        let mut path = PATH;
        if index == STREAM {
            from.transport = Transport::Tcp;
            path = Path::Connection(ConnectionId(STREAM as u64));
        }
        let verdict = self.serve(Input::FromClient { from, path, packet, ip: IP }, packet);
        let answered = matches!(verdict, Verdict::Reply { .. });
        if answered && index >= CLIENTS {
            // abuse.md D: to a stranger at most three times what it sent, IP and UDP headers counted.
            let reply = self.server.reply().len();
            assert!(reply + 28 <= 3 * (packet.len() + 28), "{reply} bytes for {}", packet.len());
        }
        answered
    }

    fn serve(&mut self, input: Input<'_>, packet: &[u8]) -> Verdict {
        let verdict = self.server.handle_input(self.clock.now(), input, &mut self.ports);
        if let Verdict::Send { payload, padding, .. } = &verdict {
            assert!(packet.get(payload.clone()).is_some() && *padding < 4, "{verdict:?} of {} bytes", packet.len());
        }
        while let Some(output) = self.server.poll_output() {
            match output {
                Output::Release { relayed, .. } => {
                    assert!(self.ports.held.remove(&relayed.advertised).is_some(), "a port is released once");
                    assert!(!self.permitted.keys().any(|(of, _)| *of == relayed), "nobody may send to nobody");
                }
                Output::Pend { connection, username, .. } => {
                    let (_, held) = self.ports.peer_connections.get_mut(&connection).expect("of the host's");
                    assert_eq!(*held, Held::Opening);
                    *held = Held::Pending(username.into());
                }
                Output::Join { peer, .. } => {
                    assert!(matches!(self.ports.peer_connections.get(&peer), Some((_, Held::Bound))), "claimed first");
                }
                Output::ClosePeer(connection) => drop(self.ports.peer_connections.remove(&connection)),
                Output::Ticket { ticket, held } => {
                    let known = if held { self.tickets.insert(ticket) } else { self.tickets.remove(&ticket) };
                    assert!(known, "a ticket is held once and let go once");
                }
                Output::Permit { relayed, peer, until } => drop(self.permitted.insert((relayed, peer), until)),
                Output::Forbid { relayed, peer } => {
                    assert!(self.permitted.remove(&(relayed, peer)).is_some(), "a permission is taken back once");
                }
                Output::Record(_) | Output::Close(_) | Output::Serve { .. } => {}
            }
        }
        verdict
    }

    fn check(&self) {
        for (relayed, _) in self.ports.peer_connections.values() {
            assert!(self.ports.held.contains_key(&relayed.advertised), "a connection ends with its allocation");
        }
        for record in self.server.records(self.clock.now()) {
            for (peer, _) in &record.permissions {
                let relayed = record.relayed.iter().find(|relayed| relayed.family() == Family::of(*peer));
                let until = relayed.and_then(|relayed| self.permitted.get(&(*relayed, *peer)));
                assert!(until.is_some_and(|until| *until > self.clock.mono()), "who may send is let through");
            }
        }
        let mobile = self.server.records(self.clock.now()).filter_map(|record| record.mobility);
        let tickets: usize = mobile.map(|mobility| 1 + usize::from(mobility.moving.is_some())).sum();
        assert!(tickets <= self.tickets.len(), "a ticket that nobody was told of");
        let held: usize = self.server.records(self.clock.now()).map(|record| record.relayed.len()).sum();
        let live = self.server.records(self.clock.now()).count();
        // What has ended since the last timeout is held, but in no record.
        assert!(held <= self.ports.held.len(), "an allocation without its port");
        assert!(live < self.server.allocations() || held == self.ports.held.len(), "a port of nobody");
        assert!(self.server.allocations() == 0 || self.server.poll_timeout().is_some(), "who lives has a deadline");
    }
}
