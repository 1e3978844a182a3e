//! Bytes as a history, done to the server and to the model beside it: every verdict, answer, port and record of the one
//! must be what the other says. `fuzz/fuzz_targets/server.rs` runs it with coverage, `tests/histories.rs` without.

mod compare;
mod packets;
mod world;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use turn_core::{
    AllocationId, Change, ConnectError, ConnectionId, Family, FiveTuple, Input, IpMeta, Output, Path, PeerConnectionId,
    Record, Server, Settings, StaticUser, Transport, Verdict, WorkerId,
};

use super::model::{self, Model};
use super::rig::Desk;
use super::stun::{self};
use super::{Clock, EPOCH, PATH, addr, five_tuple};

const IP: IpMeta = IpMeta { dscp_ecn: 0, ttl: 0, dont_fragment: false };
/// The last two come by TCP.
const CLIENTS: [&str; 5] =
    ["203.0.113.1:5000", "203.0.113.1:5001", "[2001:db8:1::9]:5000", "203.0.113.9:5000", "203.0.113.9:6000"];
/// PASSWORD-ALGORITHMS as this server offers it: SHA-256 before MD5.
const OFFER: [u8; 8] = [0, 2, 0, 0, 0, 1, 0, 0];
/// Longest history that is looked at, in steps: what comes later is the same again.
const STEPS: usize = 256;

/// The bytes that choose; zeros when they are used up.
struct Choice<'a>(&'a [u8]);

impl Choice<'_> {
    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((byte, rest)) => {
                self.0 = rest;
                *byte
            }
            None => 0,
        }
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::from(self.byte()) % bound
    }

    fn take(&mut self, most: usize) -> Vec<u8> {
        let length = self.below(most + 1).min(self.0.len());
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        taken.to_vec()
    }
}

struct Client {
    five_tuple: FiveTuple,
    path: Path,
    /// Nonces it was given, oldest first.
    nonces: Vec<Vec<u8>>,
    transactions: u64,
}

struct Duel {
    clock: Clock,
    server: Server,
    settings: Settings,
    desk: Desk,
    model: Model,
    clients: Vec<Client>,
    connections: u64,
    /// What was sent last, to be sent again.
    sent: Vec<Vec<u8>>,
    /// What a journal would hold.
    journal: HashMap<AllocationId, Record>,
    /// A record of earlier, to be restored too late.
    stale: Option<Record>,
    epoch: u64,

    tokens: Vec<[u8; 8]>,
    /// Tickets of mobility that were told, oldest first.
    tickets: Vec<Vec<u8>>,

    /// What the process knows of tickets.
    held_tickets: BTreeSet<Vec<u8>>,
    /// Claimed by ConnectionBinds of the packet in hand.
    joined: Vec<PeerConnectionId>,
}

/// Runs `bytes` as a history. Panics where the two differ.
pub fn duel(bytes: &[u8]) {
    let mut choice = Choice(bytes);
    let mut duel = Duel::new();
    let mut steps = 0;
    while !choice.0.is_empty() && steps < STEPS {
        duel.step(&mut choice);
        duel.check();
        steps += 1;
    }
    duel.check_records();
}

fn settings() -> Settings {
    let mut settings = super::settings();
    settings.static_users.push(StaticUser { username: b"eve".to_vec(), password: b"eve".to_vec() });
    settings.limits.permissions_per_allocation = 4;

    settings.limits.channels_per_allocation = 3;
    settings.limits.peer_connections_per_allocation = 3;
    // Silence for strangers who ask too often is a rule of its own, tested on its own.
    settings.limits.strangers_per_prefix = 0;

    settings
}

impl Duel {
    fn new() -> Self {
        let settings = settings();
        let own = [Family::V4, Family::V6].map(Desk::ip).to_vec();
        let mut model = Model::new(EPOCH, settings.realm.as_bytes(), own);
        model.static_users = [(&b"user"[..], &b"password"[..]), (b"eve", b"eve")]
            .map(|(name, password)| model::StaticUser { name: name.to_vec(), password: password.to_vec() })
            .to_vec();
        model.rest_secrets = vec![model::RestSecret(b"secret".to_vec())];

        (model.max_permissions, model.max_channels, model.max_connections) = (4, 3, 3);
        model.offer = Some(OFFER.to_vec());

        let client = |address: &str| Client {
            five_tuple: five_tuple(addr(address)),
            path: PATH,
            nonces: Vec::new(),
            transactions: 0,
        };
        let mut duel = Self {
            clock: Clock::new(),
            server: Server::new(WorkerId(0), Desk::ip(Family::V4), 1, Arc::new(settings.clone()), [1; 32]),
            settings,
            desk: Desk::with_quota(3),
            model,
            clients: CLIENTS.map(client).into(),
            connections: 1,
            sent: Vec::new(),
            journal: HashMap::new(),
            stale: None,
            epoch: 1,

            tokens: Vec::new(),
            tickets: Vec::new(),

            held_tickets: BTreeSet::new(),
            joined: Vec::new(),
        };

        for client in 3..CLIENTS.len() {
            duel.clients[client].five_tuple.transport = Transport::Tcp;
            duel.reconnect(client);
        }
        duel
    }

    fn step(&mut self, choice: &mut Choice<'_>) {
        let step = choice.byte();
        let client = usize::from(step >> 4) % CLIENTS.len();
        match step & 0x0F {
            0..=4 => {
                let packet = self.request(client, choice);
                self.hand_in(client, &packet);
            }
            5 => self.again(client, choice),
            6 => {
                let packet = self.indication(client, choice);
                self.hand_in(client, &packet);
            }
            7 => {
                let number = 0x4000 + choice.below(5) as u16;
                let mut packet = stun::channel_data(number, &choice.take(16));
                match choice.below(8) {
                    0 => drop(packet.pop()),
                    1 => packet.push(0),
                    _ => {}
                }
                self.hand_in(client, &packet);
            }
            8 => self.peer_packet(choice),
            9 => {
                if choice.below(4) == 0 {
                    self.icmp(choice);
                } else {
                    self.peer_packet(choice);
                }
            }
            10 => {
                let unit = [1, 100, 1000, 30_000][choice.below(4)];
                self.pass(u64::from(choice.byte()) * unit);
            }
            11 => self.process(choice),
            12 => self.configure(choice),
            13 => match choice.below(6) {
                5 => {
                    let errors = [ConnectError::Failed, ConnectError::NoRoom, ConnectError::Forbidden];
                    self.desk.connect = errors.get(choice.below(8)).copied();
                }
                0 => self.desk.exhausted = !self.desk.exhausted,
                1 => self.desk.without = [None, Some(Family::V6), Some(Family::V4)][choice.below(3)],
                2 => self.desk.quota = [Some(1), Some(3), None][choice.below(3)],
                // Reservations run out.
                3 => self.desk.reserved.clear(),
                _ => self.desk.exhausted = false,
            },

            14 if choice.below(2) == 0 => self.scene(client, choice),
            14 => {
                let packet = choice.take(64);
                self.hand_in(client, &packet);
            }
            _ => {
                // The stream closes, and the client comes again from the same port.
                if self.clients[client].five_tuple.transport.is_stream() {
                    let path = self.clients[client].path;
                    let Path::Connection(connection) = path else { unreachable!("a stream") };
                    if choice.below(2) == 0 {
                        self.input(Input::Closed(connection), &[]);
                        self.model.closed(path);
                    }

                    self.reconnect(client);
                } else {
                    self.peer_connection(choice);
                }
            }
        }
    }

    /// The client of a stream comes again, from the same port.
    fn reconnect(&mut self, client: usize) {
        self.connections += 1;
        self.clients[client].path = Path::Connection(ConnectionId(self.connections));
    }

    fn input(&mut self, input: Input<'_>, packet: &[u8]) -> Verdict {
        let verdict = self.server.handle_input(self.clock.now(), input, &mut self.desk);
        if let Verdict::Send { payload, padding, .. } = &verdict {
            assert!(packet.get(payload.clone()).is_some() && *padding < 4, "{verdict:?} of {} bytes", packet.len());
        }

        while let Some(output) = self.server.poll_output() {
            self.desk.obey(&output);
            match output {
                Output::Release { relayed, .. } => {
                    assert!(self.desk.held.remove(&relayed.advertised).is_some(), "a port is released once");
                }
                Output::Record(Change::Put(record)) => {
                    let before = self.journal.insert(record.id, (*record).clone());
                    let newer = before.is_none_or(|before| record.supersedes(before.epoch, before.sequence));
                    assert!(newer, "a record supersedes the one before");
                }
                Output::Record(Change::End { id, epoch, sequence, .. }) => {
                    let before = self.journal.remove(&id).expect("what ends has begun");
                    assert!((epoch, sequence) > (before.epoch, before.sequence), "an end supersedes what it ends");
                }

                Output::Join { peer, .. } => self.joined.push(peer),

                Output::Permit { .. } | Output::Forbid { .. } => {}

                Output::Close(_) | Output::Pend { .. } | Output::ClosePeer(_) => {}

                Output::Ticket { ticket, held } => {
                    let text = ticket.text().to_vec();
                    let known = if held { self.held_tickets.insert(text) } else { self.held_tickets.remove(&text) };
                    assert!(known, "a ticket is held once and let go once");
                }
                Output::Serve { .. } => {}
            }
        }
        verdict
    }
}
