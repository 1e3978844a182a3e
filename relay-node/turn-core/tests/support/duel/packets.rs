//! What clients send.

use std::net::SocketAddr;

use turn_core::{Input, PeerEvent, Transport};

use super::super::rig::{Outcome, gather};
use super::super::stun::{self, Builder, Class, Item, NONCE};
use super::super::{EPOCH, addr};
use super::compare::compare;
use super::{CLIENTS, Choice, Duel, IP, OFFER};

impl Duel {
    pub(super) fn request(&mut self, client: usize, choice: &mut Choice<'_>) -> Vec<u8> {
        let method = choice.byte();
        let mut items = Vec::new();
        let method = match method % 16 {
            0 => [stun::BINDING, stun::CONNECT, stun::CONNECTION_BIND, stun::CONNECT][usize::from(method >> 6)],
            1..=4 => {
                if method & 0x80 == 0 {
                    let tcp = self.clients[client].five_tuple.transport.is_stream() && method & 0x40 != 0;
                    items.push(stun::transport(if tcp { 6 } else { 17 }));
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
        match method {
            stun::CONNECT if items.is_empty() => items.push(stun::peer(self.peer(choice))),
            stun::CONNECTION_BIND => {
                let id = self.desk.begun.saturating_sub(u32::from(choice.byte() % 4));
                items.push(stun::raw(stun::CONNECTION_ID, &id.to_be_bytes()));
            }
            _ => {}
        }

        let datagrams = !self.clients[client].five_tuple.transport.is_stream();
        if datagrams && [stun::ALLOCATE, stun::REFRESH].contains(&method) && choice.byte().is_multiple_of(4) {
            items.push(self.ticket(method, choice));
        }
        for _ in 0..choice.below(8).saturating_sub(4) {
            items.push(self.item(choice));
        }
        let who = choice.byte();
        if who == 0 && self.clients[client].nonces.is_empty() {
            return self.build(client, Class::Request, method, &items, 0).bytes();
        }
        self.sign(client, method, &items, who, choice)
    }

    pub(super) fn build(&mut self, client: usize, class: Class, method: u16, items: &[Item], again: u64) -> Builder {
        let client_number = client as u64;
        let client = &mut self.clients[client];
        client.transactions += 1;
        let mut id = [0; 12];
        id[..4].copy_from_slice(&(client_number as u32).to_be_bytes());
        id[4..].copy_from_slice(&client.transactions.saturating_sub(again).to_be_bytes());
        Builder::new(class, method, id).items(items)
    }

    pub(super) fn sign(
        &mut self,
        client: usize,
        method: u16,
        items: &[Item],
        who: u8,
        choice: &mut Choice<'_>,
    ) -> Vec<u8> {
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

            14 if who >= 0x80 => {
                use base64::Engine;
                let mac = stun::hmac_sha256(b"secret", &rest(7200));
                (rest(7200), base64::engine::general_purpose::STANDARD.encode(mac).into_bytes())
            }
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

    /// A MOBILITY-TICKET: mostly one that fits.
    fn ticket(&mut self, method: u16, choice: &mut Choice<'_>) -> Item {
        let argument = choice.byte();
        let known = self.tickets.len().checked_sub(1 + usize::from(argument % 4)).map(|at| self.tickets[at].clone());
        let value = match (method, argument >> 4, known) {
            (stun::ALLOCATE, 0..=13, _) | (_, 15, _) => Vec::new(),
            (_, 14, Some(mut known)) => {
                known[usize::from(argument % 32)] ^= 1;
                known
            }
            (_, _, Some(known)) => known,
            (_, _, None) => vec![argument; 32],
        };
        stun::raw(stun::MOBILITY_TICKET, &value)
    }

    /// An attribute that may or may not belong there.
    pub(super) fn item(&mut self, choice: &mut Choice<'_>) -> Item {
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
            18 if argument >= 0x80 => {
                let switched = [stun::PASSWORD_ALGORITHM, stun::USERHASH, stun::CONNECTION_ID, stun::ACCESS_TOKEN];
                stun::raw(switched[usize::from(argument) % 4], &choice.take(5))
            }
            18 => stun::raw(u16::from(argument) << 8 | 0x7F, &choice.take(5)),
            _ => stun::raw(u16::from(argument), &choice.take(9)),
        }
    }

    pub(super) fn peer(&mut self, choice: &mut Choice<'_>) -> SocketAddr {
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

    pub(super) fn indication(&mut self, client: usize, choice: &mut Choice<'_>) -> Vec<u8> {
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

    /// Steps that seldom follow each other by chance, all of them right; what happens around them is chance again.
    pub(super) fn scene(&mut self, client: usize, choice: &mut Choice<'_>) {
        let peer = stun::peer(addr("192.0.2.1:7000"));
        match choice.below(4) {
            // A client allocates both families, and talks.
            0 => {
                self.ask(client, stun::ALLOCATE, &[stun::transport(17), stun::additional(2)]);
                let v6 = stun::peer(addr("[2001:db8::1]:7000"));
                self.ask(client, stun::CREATE_PERMISSION, &[peer, v6.clone()]);
                self.ask(client, stun::CHANNEL_BIND, &[stun::channel(0x4001), v6]);
            }
            // A client becomes mobile, and comes from another place.
            1 => {
                let (from, to) = (client % 3, (client + 1 + choice.below(2)) % 3);
                self.ask(from, stun::ALLOCATE, &[stun::transport(17), stun::raw(stun::MOBILITY_TICKET, &[])]);
                self.ask(from, stun::CHANNEL_BIND, &[stun::channel(0x4000), peer]);
                let ticket = self.tickets.last().cloned().unwrap_or_default();
                self.ask(to, stun::REFRESH, &[stun::raw(stun::MOBILITY_TICKET, &ticket)]);
            }
            // A client of TCP connects to a peer, and binds the connection.
            2 => {
                self.ask(3, stun::ALLOCATE, &[stun::transport(6)]);
                self.ask(3, stun::CREATE_PERMISSION, std::slice::from_ref(&peer));
                self.ask(3, stun::CONNECT, &[peer]);
                self.peer_connection(&mut Choice(&[1, 255, choice.byte()]));
                let id = self.desk.begun;
                self.ask(4, stun::CONNECTION_BIND, &[stun::raw(stun::CONNECTION_ID, &id.to_be_bytes())]);
            }
            // A pair of ports, the second for another client.
            _ => {
                self.ask(client, stun::ALLOCATE, &[stun::transport(17), stun::even_port(true)]);
                let token = self.tokens.last().copied().unwrap_or_default();
                self.ask((client + 1) % 3, stun::ALLOCATE, &[stun::transport(17), stun::token(token)]);
            }
        }
    }

    /// A request of the first user, in order.
    fn ask(&mut self, client: usize, method: u16, items: &[Item]) {
        let packet = self.sign(client, method, items, 0, &mut Choice(&[]));
        self.hand_in(client, &packet);
    }

    /// A packet of before, with a byte changed or none, from whoever.
    pub(super) fn again(&mut self, client: usize, choice: &mut Choice<'_>) {
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

    pub(super) fn hand_in(&mut self, client: usize, packet: &[u8]) {
        let (from, path) = (self.clients[client].five_tuple, self.clients[client].path);
        let verdict = self.input(Input::FromClient { from, path, packet, ip: IP }, packet);
        let outcome = gather(&self.server, &verdict, packet);

        let (bindings, dials) = (std::mem::take(&mut self.desk.bindings), std::mem::take(&mut self.desk.dials));

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

        let expected = self.model.client_sends(from, path, packet, bindings, dials);
        if let Outcome::Answer(answer) = &outcome
            && let Some(ticket) = answer.find(stun::MOBILITY_TICKET)
        {
            self.model.learn_ticket(ticket);
            self.tickets.push(ticket.to_vec());
        }
        compare(&outcome, &expected, from.transport == Transport::Udp, packet);

        // A ConnectionBind that succeeded ends TURN on its connection; the other server hears of it.
        for peer in std::mem::take(&mut self.joined) {
            self.reconnect(client);
            self.connection_event(peer, PeerEvent::Bound);
            self.model.bound(peer);
        }
        if self.sent.len() == 8 {
            self.sent.remove(0);
        }
        self.sent.push(packet.to_vec());
    }
}

/// A TURN REST password.
fn base64_hmac(secret: &[u8], name: &[u8]) -> Vec<u8> {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(stun::hmac_sha1(secret, name)).into_bytes()
}
