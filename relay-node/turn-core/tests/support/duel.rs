//! Bytes as a history, done to the server and to the model beside it: every verdict, answer, port and record of the one
//! must be what the other says. `fuzz/fuzz_targets/server.rs` runs it with coverage, `tests/histories.rs` without.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use turn_core::policy::Network;
use turn_core::{
    AllocationId, Change, ConnectionId, Family, FiveTuple, Input, IpMeta, Key, KeyRing, Out, Output, Path, PeerAddr,
    Policy, Record, RelayedAddr, Server, Settings, StaticUser, Transport, Verdict, WorkerId,
};

use super::model::{self, Answer, Expect, Model, Signature};
use super::rig::{Desk, Outcome, gather};
use super::stun::{self, Builder, Class, Item, NONCE, Read, SOFTWARE};
use super::{Clock, EPOCH, PATH, addr, five_tuple};

const IP: IpMeta = IpMeta { dscp_ecn: 0, ttl: 0, dont_fragment: false };
const CLIENTS: [&str; 4] = ["203.0.113.1:5000", "203.0.113.1:5001", "[2001:db8:1::9]:5000", "203.0.113.9:5000"];
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
    // Silence for strangers who ask too often is a rule of its own, tested on its own.
    settings.limits.strangers_per_prefix = 0;
    settings.features.tcp_allocations = false;
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

        (model.max_permissions, model.max_channels) = (4, 3);
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
        };
        // The last one comes by TCP.
        duel.clients[3].five_tuple.transport = Transport::Tcp;
        duel.clients[3].path = Path::Connection(ConnectionId(1));
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
            13 => match choice.below(5) {
                0 => self.desk.exhausted = !self.desk.exhausted,
                1 => self.desk.without = [None, Some(Family::V6), Some(Family::V4)][choice.below(3)],
                2 => self.desk.quota = [Some(1), Some(3), None][choice.below(3)],
                // Reservations run out.
                3 => self.desk.reserved.clear(),
                _ => self.desk.exhausted = false,
            },
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
                    self.connections += 1;
                    self.clients[client].path = Path::Connection(ConnectionId(self.connections));
                }
            }
        }
    }

    // What clients send.

    fn request(&mut self, client: usize, choice: &mut Choice<'_>) -> Vec<u8> {
        let method = choice.byte();
        let mut items = Vec::new();
        let method = match method % 16 {
            0 => stun::BINDING,
            1..=4 => {
                if method & 0x80 == 0 {
                    items.push(stun::transport(17));
                }
                stun::ALLOCATE
            }
            5..=7 => stun::REFRESH,
            8..=10 => {
                items.push(stun::peer(self.peer(choice)));
                stun::CREATE_PERMISSION
            }
            11..=14 => {
                items.push(stun::channel(0x4000 + choice.below(5) as u16));
                items.push(stun::peer(self.peer(choice)));
                stun::CHANNEL_BIND
            }
            _ => u16::from(method >> 4),
        };
        for _ in 0..choice.below(8).saturating_sub(4) {
            items.push(self.item(choice));
        }
        let who = choice.byte();
        if who == 0 && self.clients[client].nonces.is_empty() {
            return self.build(client, Class::Request, method, &items, 0).bytes();
        }
        self.sign(client, method, &items, who, choice)
    }

    fn build(&mut self, client: usize, class: Class, method: u16, items: &[Item], again: u64) -> Builder {
        let client_number = client as u64;
        let client = &mut self.clients[client];
        client.transactions += 1;
        let mut id = [0; 12];
        id[..4].copy_from_slice(&(client_number as u32).to_be_bytes());
        id[4..].copy_from_slice(&client.transactions.saturating_sub(again).to_be_bytes());
        Builder::new(class, method, id).items(items)
    }

    fn sign(&mut self, client: usize, method: u16, items: &[Item], who: u8, choice: &mut Choice<'_>) -> Vec<u8> {
        if self.clients[client].nonces.is_empty() {
            let packet = self.build(client, Class::Request, stun::REFRESH, &[], 0).bytes();
            self.hand_in(client, &packet);
        }
        let rest = |seconds: u64| format!("{}:bob", EPOCH / 1000 + seconds).into_bytes();
        let (name, password): (Vec<u8>, Vec<u8>) = match who % 16 {
            0..=7 => (b"user".to_vec(), b"password".to_vec()),
            8 | 9 => (b"eve".to_vec(), b"eve".to_vec()),
            10 | 11 => {
                let name = rest(if who % 16 == 10 { 900 } else { 7200 });
                let password = base64_hmac(b"secret", &name);
                (name, password)
            }
            12 => (b"user".to_vec(), b"guessed".to_vec()),
            13 => (b"nobody".to_vec(), b"password".to_vec()),
            14 => (rest(7200), base64_hmac(b"stolen", &rest(7200))),
            _ => (choice.take(12), b"password".to_vec()),
        };
        let nonces = &self.clients[client].nonces;
        let mut nonce = nonces.last().cloned().unwrap_or_default();
        let mut realm = self.settings.realm.as_bytes().to_vec();
        let mut left_out = 0;
        let mut again = 0;
        // Mostly right.
        match choice.byte() {
            200..=207 => nonce = nonces.get(choice.below(nonces.len().max(1))).cloned().unwrap_or_default(),
            208..=211 => nonce = self.clients[(client + 1) % CLIENTS.len()].nonces.last().cloned().unwrap_or_default(),
            212..=215 => nonce = choice.take(50),
            216..=217 => realm = b"elsewhere".to_vec(),
            218 => left_out = stun::USERNAME,
            219 => left_out = stun::REALM,
            220 => left_out = NONCE,
            221..=230 => again = 1,
            _ => {}
        }
        let mut builder = self.build(client, Class::Request, method, items, again);

        let by_hash = choice.byte() % 8 == 7;
        if by_hash {
            builder = builder.attribute(stun::USERHASH, &stun::userhash(&name, &realm));
        }
        for (kind, value) in [(stun::USERNAME, &name), (stun::REALM, &realm), (NONCE, &nonce)] {
            if kind != left_out && !(by_hash && kind == stun::USERNAME) {
                builder = builder.attribute(kind, value);
            }
        }

        let integrity = choice.byte();
        builder = match integrity {
            240..=242 => builder,
            // Algorithms that were offered, or others.
            160..=199 => {
                let chosen = [[0, 2, 0, 0], [0, 2, 0, 0], [0, 1, 0, 0], [0, 3, 0, 0]][usize::from(integrity) % 4];
                let listed: &[u8] = if integrity < 190 { &OFFER } else { &[0, 1, 0, 0] };
                builder = builder.attribute(stun::PASSWORD_ALGORITHM, &chosen);
                builder = if integrity < 196 { builder.attribute(stun::PASSWORD_ALGORITHMS, listed) } else { builder };
                let key = match chosen {
                    [0, 2, 0, 0] => stun::sha256_key(&name, &realm, &password),
                    _ => stun::md5_key(&name, &realm, &password),
                };
                match choice.byte() % 16 {
                    0..=11 => builder.integrity_sha256(&key),
                    12 | 13 => builder.integrity(&key),
                    14 => builder.integrity(b"wrong").integrity_sha256(&key),
                    _ => builder.integrity(&key).attribute(stun::MESSAGE_INTEGRITY_SHA256, &[0; 16]),
                }
            }
            _ => builder.integrity(&stun::md5_key(&name, &realm, &password)),
        };
        builder = match integrity {
            // Nobody signed these.
            243..=246 => builder.item(&self.item(choice)).item(&self.item(choice)),
            _ => builder,
        };
        if integrity % 8 == 7 { builder.fingerprint().bytes() } else { builder.bytes() }
    }

    /// An attribute that may or may not belong there.
    fn item(&mut self, choice: &mut Choice<'_>) -> Item {
        let argument = choice.byte();
        match choice.byte() % 20 {
            0..=3 => stun::lifetime([0, 1, 599, 601, 3600, u32::MAX][usize::from(argument) % 6]),
            4 | 5 => stun::family(argument % 4),
            6 | 7 => stun::additional([2, 2, 2, 1, 3][usize::from(argument) % 5]),
            8 | 9 => stun::even_port(argument.is_multiple_of(2)),
            10 | 11 => {
                let known = self.tokens.last().copied();
                stun::token(known.filter(|_| !argument.is_multiple_of(4)).unwrap_or([argument; 8]))
            }
            12 | 13 => stun::peer(self.peer(choice)),
            14 => stun::transport(argument),
            15 => stun::data(&choice.take(8)),
            16 => stun::channel(u16::from(argument) << 8),
            // Malformed, or unknown.
            17 => stun::raw(
                [
                    stun::LIFETIME,
                    stun::REQUESTED_ADDRESS_FAMILY,
                    stun::EVEN_PORT,
                    stun::RESERVATION_TOKEN,
                    stun::XOR_PEER_ADDRESS,
                    stun::CHANNEL_NUMBER,
                    stun::REQUESTED_TRANSPORT,
                    stun::ADDITIONAL_ADDRESS_FAMILY,
                ][usize::from(argument) % 8],
                &choice.take(9),
            ),
            18 => stun::raw(u16::from(argument) << 8 | 0x7F, &choice.take(5)),
            _ => stun::raw(u16::from(argument), &choice.take(9)),
        }
    }

    fn peer(&mut self, choice: &mut Choice<'_>) -> SocketAddr {
        let argument = choice.byte();
        let port = 7000 + u16::from(argument >> 4 & 1);
        let text = match argument % 16 {
            0..=3 => "192.0.2.1",
            4 | 5 => "192.0.2.2",
            6 => "192.0.2.3",
            7 => return SocketAddr::new(addr("192.0.2.128:0").ip(), u16::from(argument >> 4)),
            8 | 9 => "2001:db8::1",
            10 => "2001:db8::2",
            11 => "10.0.0.1",
            12 => "::ffff:192.0.2.1",
            13 => "198.51.100.1",
            _ => return self.relayed(argument >> 4).advertised,
        };
        SocketAddr::new(text.parse().expect("a literal"), port)
    }

    fn indication(&mut self, client: usize, choice: &mut Choice<'_>) -> Vec<u8> {
        let kind = choice.byte();
        let mut items = vec![stun::peer(self.peer(choice)), stun::data(&choice.take(12))];
        if kind >= 0xC0 {
            items.truncate(choice.below(2));
        }
        if kind & 0x20 != 0 {
            items.push(self.item(choice));
        }
        let method = if kind & 0x1F == 0x1F { u16::from(choice.byte()) } else { stun::SEND };
        self.build(client, Class::Indication, method, &items, 0).bytes()
    }

    /// A packet of before, with a byte changed or none, from whoever.
    fn again(&mut self, client: usize, choice: &mut Choice<'_>) {
        if self.sent.is_empty() {
            return;
        }
        let mut packet = self.sent[choice.below(self.sent.len())].clone();
        let (at, change) = (choice.byte(), choice.byte());
        if at >= 0x80
            && let Some(byte) = packet.get_mut(usize::from(at - 0x80) * 2)
        {
            *byte ^= change;
        }
        self.hand_in(client, &packet);
    }

    fn hand_in(&mut self, client: usize, packet: &[u8]) {
        let (from, path) = (self.clients[client].five_tuple, self.clients[client].path);
        let verdict = self.input(Input::FromClient { from, path, packet, ip: IP }, packet);
        let outcome = gather(&self.server, &verdict, packet);
        let bindings = std::mem::take(&mut self.desk.bindings);
        if let Outcome::Answer(answer) = &outcome
            && answer.code() != 0
            && let Some(nonce) = answer.find(NONCE)
        {
            self.model.issue(nonce, from.client);
            let nonces = &mut self.clients[client].nonces;
            if nonces.last().is_none_or(|last| last != nonce) {
                nonces.push(nonce.to_vec());
            }
        }
        for binding in &bindings {
            if let Ok(bound) = binding.result
                && let Some(token) = bound.reservation
            {
                self.tokens.push(token.0);
            }
        }
        let expected = self.model.client_sends(from, path, packet, bindings);
        compare(&outcome, &expected, from.transport == Transport::Udp, packet);
        if self.sent.len() == 8 {
            self.sent.remove(0);
        }
        self.sent.push(packet.to_vec());
    }

    // What peers, time, the process and the operator do.

    fn peer_packet(&mut self, choice: &mut Choice<'_>) {
        let relayed = self.relayed(choice.byte());
        let from = PeerAddr::new(self.peer(choice));
        let data = choice.take(16);
        let verdict = self.input(Input::FromPeer { relayed, from, packet: &data, ip: IP }, &data);
        let outcome = gather(&self.server, &verdict, &data);
        compare(&outcome, &self.model.peer_sends(relayed.advertised, from.socket_addr(), &data), true, &data);
    }

    fn icmp(&mut self, choice: &mut Choice<'_>) {
        // An allocation is told of so many errors a second and no more: a rule of its own.
        self.pass(1000);
        let (relayed, peer) = (self.relayed(choice.byte()), PeerAddr::new(self.peer(choice)));
        let (kind, code, mtu) = (choice.byte() % 13, choice.byte() % 5, 1280);
        let verdict = self.input(Input::Icmp { relayed, peer, kind, code, mtu }, &[]);
        let outcome = gather(&self.server, &verdict, &[]);
        let expected = self.model.icmp(relayed.advertised, peer.socket_addr(), kind, code, mtu);
        if let (Expect::Icmp { to, path, .. }, Verdict::Reply { out }) = (&expected, &verdict) {
            assert_eq!(*out, Out::Client { to: *to, path: *path });
        }
        compare(&outcome, &expected, true, &[]);
    }

    fn relayed(&self, argument: u8) -> RelayedAddr {
        let held: Vec<_> = self.model.allocations.iter().flat_map(|allocation| &allocation.relayed).collect();
        let nobody = addr("198.51.100.1:9");
        let address = held.get(usize::from(argument) % (held.len() + 1)).map_or(nobody, |found| found.address);
        RelayedAddr { bound: address, advertised: address }
    }

    fn pass(&mut self, milliseconds: u64) {
        self.clock.elapsed += Duration::from_millis(milliseconds);
        self.model.pass(milliseconds);
        if self.server.poll_timeout().is_some_and(|at| at <= self.clock.mono()) {
            self.input(Input::Timeout, &[]);
        }
    }

    fn process(&mut self, choice: &mut Choice<'_>) {
        match choice.below(5) {
            // Killed, and started from its journal under the next epoch.
            0 | 1 => {
                self.epoch += 1;
                let settings = Arc::new(self.settings.clone());
                let mut seed = [0; 32];
                seed[..8].copy_from_slice(&self.epoch.to_be_bytes());
                self.server = Server::new(WorkerId(0), Desk::ip(Family::V4), self.epoch, settings, seed);
                for record in self.journal.values() {
                    for relayed in self.model.allocations.iter_mut().flat_map(|allocation| &mut allocation.relayed) {
                        let at = record.relayed.iter().position(|recorded| recorded.advertised == relayed.address);
                        if let Some(at) = at {
                            let end = record.family_expires_at.get(at).copied().unwrap_or(record.expires_at);
                            relayed.granted = end - EPOCH;
                        }
                    }
                }
                self.model.restarted();
                let mut records: Vec<Record> = self.journal.values().cloned().collect();
                records.sort_by_key(|record| record.id);
                for record in records {
                    self.input(Input::Restore { record: Box::new(record), path: PATH }, &[]);
                }
                // An older one after the newer changes nothing.
                if let Some(stale) = self.stale.clone().filter(|stale| self.journal.contains_key(&stale.id)) {
                    self.input(Input::Restore { record: Box::new(stale), path: PATH }, &[]);
                }
                for client in &mut self.clients {
                    if client.five_tuple.transport.is_stream() {
                        self.connections += 1;
                        client.path = Path::Connection(ConnectionId(self.connections));
                    }
                }
            }
            2 => {
                let at = choice.below(4);
                let mut ids: Vec<AllocationId> = self.journal.keys().copied().collect();
                ids.sort();
                if let Some(id) = ids.get(at) {
                    let relayed = self.journal[id].relayed[0].advertised;
                    self.input(Input::Revoke(*id), &[]);
                    self.model.allocations.retain(|allocation| !allocation.is_at(relayed));
                }
            }
            3 => {
                self.epoch += 1;
                self.input(Input::Own { epoch: self.epoch }, &[]);
            }
            _ => self.stale = self.journal.values().min_by_key(|record| record.id).cloned(),
        }
    }

    fn configure(&mut self, choice: &mut Choice<'_>) {
        match choice.below(8) {
            7 => self.settings.features.sha256 = !self.settings.features.sha256,
            0 => self.settings.draining = !self.settings.draining,
            1 => {
                let network = Network { address: addr("192.0.2.2:0").ip(), prefix: 32 };
                let denied = if self.settings.policy.denied.is_empty() { vec![network] } else { Vec::new() };
                self.settings.policy = Policy { denied, ..Policy::default() };
            }
            2 => {
                let id = 2 + choice.byte() % 254;
                if self.settings.nonce_keys.find(id).is_none() {
                    self.settings.nonce_keys.0.insert(0, Key { id, secret: vec![id; 16] });
                    self.settings.nonce_keys.0.truncate(2);
                }
            }
            3 => {
                let key = Key { id: 1, secret: b"secret".to_vec() };
                let ring = KeyRing(vec![key]);
                self.settings.rest_secrets =
                    if self.settings.rest_secrets.0.is_empty() { ring } else { KeyRing::default() };
            }
            4 => self.settings.realm = if self.settings.realm.is_empty() { "turnpike".into() } else { String::new() },
            5 => self.settings.limits.max_lifetime = [3600, 300, 7200][choice.below(3)],
            _ => self.settings.realm = "turnpike".into(),
        }
        let settings = Arc::new(self.settings.clone());
        self.input(Input::Configure(settings), &[]);
        let model = &mut self.model;

        model.draining = self.settings.draining;
        model.offer = self.settings.features.sha256.then(|| OFFER.to_vec());

        model.realm = self.settings.realm.as_bytes().to_vec();
        model.max_lifetime = self.settings.limits.max_lifetime;
        model.nonce_keys = self.settings.nonce_keys.0.iter().map(|key| key.id).collect();
        model.rest_secrets =
            self.settings.rest_secrets.0.iter().map(|key| model::RestSecret(key.secret.clone())).collect();
        model.set_policy(self.settings.policy.clone());
    }

    fn input(&mut self, input: Input<'_>, packet: &[u8]) -> Verdict {
        let verdict = self.server.handle_input(self.clock.now(), input, &mut self.desk);
        if let Verdict::Send { payload, padding, .. } = &verdict {
            assert!(packet.get(payload.clone()).is_some() && *padding < 4, "{verdict:?} of {} bytes", packet.len());
        }
        while let Some(output) = self.server.poll_output() {
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
                Output::Close(_) | Output::Pend { .. } | Output::Join { .. } | Output::ClosePeer(_) => {}
                // The model has no mobility.
                Output::Ticket { .. } | Output::Serve { .. } => {}
            }
        }
        verdict
    }

    // What must hold after each step.

    fn check(&self) {
        assert_eq!(self.server.allocations(), self.model.allocations.len());
        let relayed: Vec<_> = self.model.allocations.iter().flat_map(|allocation| &allocation.relayed).collect();
        assert_eq!(self.desk.held.len(), relayed.len(), "who has a relayed address holds its port, nobody else does");
        assert!(relayed.iter().all(|relayed| self.desk.held.contains_key(&relayed.address)));
        let next = self.model.allocations.iter().filter_map(model::Allocation::next_end).min();
        let next = next.map(|at| self.clock.mono() + Duration::from_millis(at - self.model.now));
        assert_eq!(self.server.poll_timeout(), next);
        // Journal before reply: what is recorded is what there is.
        assert_eq!(self.journal.len(), self.model.allocations.len());
        for record in self.journal.values() {
            self.check_record(record);
        }
    }

    fn check_record(&self, record: &Record) {
        let first = record.relayed[0].advertised;
        let allocation = self.model.allocations.iter().find(|allocation| allocation.is_at(first));
        let allocation = allocation.expect("recorded and live");
        let (now, wall) = (self.model.now, self.clock.now().wall);
        assert_eq!(record.five_tuple, allocation.five_tuple);
        assert_eq!(record.username, allocation.username);
        let recorded: Vec<_> = record.relayed.iter().map(|relayed| relayed.advertised).collect();
        let expected: Vec<_> = allocation.relayed.iter().map(|relayed| relayed.address).collect();
        assert_eq!(recorded, expected);
        for (index, relayed) in allocation.relayed.iter().enumerate() {
            let end = record.family_expires_at.get(index).copied().unwrap_or(record.expires_at) - EPOCH;
            assert!((relayed.expires..=relayed.granted).contains(&end), "{end} of {allocation:?}");
        }
        let mut permissions: Vec<_> = record.permissions.iter().filter(|(_, end)| *end > wall).copied().collect();
        let mut expected: Vec<_> = allocation.permissions.iter().map(|(ip, end)| (*ip, EPOCH + end)).collect();
        permissions.sort();
        expected.sort();
        assert_eq!(permissions, expected, "at {now}");
        let mut channels: Vec<_> = record
            .channels
            .iter()
            .filter(|(_, _, end)| *end > wall)
            .map(|(number, peer, end)| (*number, peer.socket_addr(), *end))
            .collect();
        let mut expected: Vec<_> =
            allocation.channels.iter().map(|(number, peer, end)| (*number, *peer, EPOCH + end)).collect();
        channels.sort();
        expected.sort();
        assert_eq!(channels, expected, "at {now}");
    }

    /// A resync says the same as the journal.
    fn check_records(&self) {
        let records: Vec<Record> = self.server.records(self.clock.now()).collect();
        assert_eq!(records.len(), self.model.allocations.len());
        for record in &records {
            self.check_record(record);
        }
    }
}

/// A TURN REST password.
fn base64_hmac(secret: &[u8], name: &[u8]) -> Vec<u8> {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(stun::hmac_sha1(secret, name)).into_bytes()
}

/// Panics where the server did not do what the model says.
fn compare(outcome: &Outcome, expected: &Expect, udp: bool, packet: &[u8]) {
    match (outcome, expected) {
        (Outcome::Silence(_), Expect::Silence) => {}
        (Outcome::Answer(answer), Expect::Answer(expected)) => compare_answer(answer, expected, udp, packet),
        (Outcome::Peer { via, to, data, ip }, Expect::Peer { via: from, to: peer, data: payload, dont_fragment }) => {
            assert_eq!((via, to, data, ip.dont_fragment), (from, peer, payload, *dont_fragment));
        }
        (Outcome::Worker { via, to, data, .. }, Expect::Here { via: from, to: peer, data: payload }) => {
            assert_eq!((via, to, data), (from, peer, payload));
        }
        (Outcome::Answer(read), Expect::Icmp { peer, icmp: (kind, code, data), .. }) => {
            assert_eq!((read.class, read.method), (Class::Indication, stun::DATA_METHOD));
            assert_eq!(read.xor_address(stun::XOR_PEER_ADDRESS), Some(*peer));
            let value = [&[0, 0, *kind, *code], &data.to_be_bytes()[..]].concat();
            assert_eq!(read.find(stun::ICMP), Some(&value[..]));
            assert_eq!(read.attributes.len(), 2);
        }
        (Outcome::Client { to, path, bytes, .. }, Expect::Channel { to: client, path: way, number, data }) => {
            assert_eq!((to, path), (client, way));
            let mut message = stun::channel_data(*number, data);
            if client.transport.is_stream() {
                message.resize(message.len().next_multiple_of(4), 0);
            }
            assert_eq!(*bytes, message);
        }
        (Outcome::Client { to, path, bytes, .. }, Expect::Data { to: client, path: way, peer, data }) => {
            assert_eq!((to, path), (client, way));
            let read = Read::new(bytes);
            assert_eq!((read.class, read.method), (Class::Indication, stun::DATA_METHOD));
            assert_eq!(read.xor_address(stun::XOR_PEER_ADDRESS), Some(*peer));
            assert_eq!(read.find(stun::DATA), Some(&data[..]));
            assert_eq!(read.attributes.len(), 2);
        }
        _ => panic!("the server: {outcome:?}\nthe model: {expected:?}\nfor {packet:02x?}"),
    }
}

fn compare_answer(answer: &Read, expected: &Answer, udp: bool, packet: &[u8]) {
    assert_eq!(answer.code(), expected.code, "{answer:?}\nfor {packet:02x?}\n{expected:?}");
    assert_eq!(answer.transaction, packet[8..20]);
    let fixed =
        [stun::ERROR_CODE, SOFTWARE, stun::MESSAGE_INTEGRITY, stun::MESSAGE_INTEGRITY_SHA256, stun::FINGERPRINT];
    let mut wanted = expected.attributes.clone();
    for (kind, value) in answer.attributes.iter().filter(|(kind, _)| !fixed.contains(kind)) {
        let at =
            wanted.iter().position(|(want, exact)| want == kind && exact.as_ref().is_none_or(|exact| exact == value));
        let at = at.unwrap_or_else(|| panic!("{kind:#06x} {value:02x?} is not in {expected:?}"));
        wanted.remove(at);
    }
    assert!(wanted.is_empty(), "not there: {wanted:?} in {answer:?}");
    let (sha1, sha256) = (answer.has(stun::MESSAGE_INTEGRITY), answer.has(stun::MESSAGE_INTEGRITY_SHA256));
    match &expected.signature {
        Signature::None => {
            assert!(!sha1 && !sha256);
            // abuse.md D: to a stranger at most three times what it sent, IP and UDP headers counted.
            let (reply, request) = (answer.bytes.len() + 28, packet.len() + 28);
            assert!(!udp || reply <= 3 * request, "{reply} bytes for {request}");
        }
        Signature::Sha1(key) => assert!(!sha256 && answer.signed_with(key)),
        Signature::Sha256(key) => assert!(!sha1 && answer.signed_sha256_with(key)),
    }
    assert_eq!(answer.has(stun::FINGERPRINT), expected.fingerprint);
}
