//! What peers, time, the process and the operator do.

use std::sync::Arc;
use std::time::Duration;

use turn_core::policy::Network;
use turn_core::{
    AllocationId, Alternate, Family, FiveTuple, Input, Key, KeyRing, Out, Path, PeerAddr, PeerConnectionId, PeerEvent,
    Policy, Record, RelayedAddr, Server, Transport, Verdict, WorkerId,
};

use super::super::model::{self, Answer, Expect};
use super::super::rig::{Desk, Outcome, gather};
use super::super::stun::{self, Class, Read};
use super::super::{EPOCH, Held, PATH, SERVER, addr};
use super::compare::{compare, compare_answer};
use super::{CLIENTS, Choice, Duel, IP, OFFER};

/// Of each kind of client some, and this server itself.
fn alternates() -> Vec<Alternate> {
    let of = |transport, address: &str, relays_ipv6| Alternate { transport, address: addr(address), relays_ipv6 };
    vec![
        of(Transport::Udp, SERVER, true),
        of(Transport::Udp, "198.51.100.8:3478", false),
        of(Transport::Udp, "198.51.100.9:3478", true),
        of(Transport::Tcp, "198.51.100.8:443", false),
        of(Transport::Udp, "[2001:db8::8]:3478", false),
    ]
}

impl Duel {
    pub(super) fn peer_packet(&mut self, choice: &mut Choice<'_>) {
        let relayed = self.relayed(choice.byte());
        let from = PeerAddr::new(self.peer(choice));
        let data = choice.take(16);
        let verdict = self.input(Input::FromPeer { relayed, from, packet: &data, ip: IP }, &data);
        let outcome = gather(&self.server, &verdict, &data);
        compare(&outcome, &self.model.peer_sends(relayed.advertised, from.socket_addr(), &data), true, &data);
    }

    pub(super) fn icmp(&mut self, choice: &mut Choice<'_>) {
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

    pub(super) fn relayed(&self, argument: u8) -> RelayedAddr {
        let held: Vec<_> = self.model.allocations.iter().flat_map(|allocation| &allocation.relayed).collect();
        let nobody = addr("198.51.100.1:9");
        let address = held.get(usize::from(argument) % (held.len() + 1)).map_or(nobody, |found| found.address);
        RelayedAddr { bound: address, advertised: address }
    }

    pub(super) fn pass(&mut self, milliseconds: u64) {
        self.clock.elapsed += Duration::from_millis(milliseconds);
        self.model.pass(milliseconds);
        let mut expected = self.model.due_connections();
        while self.server.poll_timeout().is_some_and(|at| at <= self.clock.mono()) {
            let verdict = self.input(Input::Timeout, &[]);
            if let Verdict::Reply { out } = verdict {
                let answer = Read::new(self.server.reply());
                let at = expected.iter().position(|(_, _, id, _)| *id == answer.transaction);
                let (to, path, _, answered) = expected.remove(at.expect("a Connect that waited too long"));
                assert_eq!(out, Out::Client { to, path });
                compare_answer(&answer, &answered, false, &answer.bytes);
            }
        }
        assert!(expected.is_empty(), "not answered: {expected:?}");
    }

    /// Something happens between a TCP allocation and a peer.
    pub(super) fn peer_connection(&mut self, choice: &mut Choice<'_>) {
        let event = choice.byte();
        let held: Vec<PeerConnectionId> = self.desk.connections.keys().copied().collect();
        let known = held.get(choice.below(held.len().max(1))).copied();
        match (event % 4, known) {
            (0, _) | (_, None) => {
                let (relayed, peer) = (self.relayed(choice.byte()), PeerAddr::new(self.peer(choice)));
                let id = self.desk.begin(relayed, peer);
                let outcome = self.connection_event(id, PeerEvent::Arrived(peer));
                let expected = self.model.peer_arrives(relayed.advertised, peer.socket_addr(), id);
                match (&outcome, &expected) {
                    (Outcome::Silence(_), Expect::Silence) => {}
                    (Outcome::Answer(read), Expect::Attempt { peer, id, .. }) => {
                        assert_eq!((read.class, read.method), (Class::Indication, stun::CONNECTION_ATTEMPT));
                        assert_eq!(read.xor_address(stun::XOR_PEER_ADDRESS), Some(*peer));
                        assert_eq!(read.find(stun::CONNECTION_ID), Some(&id.0.to_be_bytes()[..]));
                    }
                    _ => panic!("the server: {outcome:?}\nthe model: {expected:?}"),
                }
            }
            (1 | 2, Some(id)) if self.desk.connections[&id].2 == Held::Opening => {
                let outcome = self.connection_event(id, PeerEvent::Connected);
                let expected = self.model.connected(id);
                self.compare_later(&outcome, expected);
            }
            (_, Some(id)) => {
                let opening = self.desk.connections[&id].2 == Held::Opening;
                let outcome = self.connection_event(id, if opening { PeerEvent::Failed } else { PeerEvent::Closed });
                let expected = self.model.connection_closed(id);
                self.compare_later(&outcome, expected);
            }
        }
    }

    /// Compares the answer to a Connect of before.
    pub(super) fn compare_later(&self, outcome: &Outcome, expected: Option<(FiveTuple, Path, [u8; 12], Answer)>) {
        match (outcome, expected) {
            (Outcome::Silence(_), None) => {}
            (Outcome::Answer(read), Some((_, _, transaction, answer))) => {
                assert_eq!((read.method, read.transaction), (stun::CONNECT, transaction));
                compare_answer(read, &answer, false, &read.bytes);
            }
            (outcome, expected) => panic!("the server: {outcome:?}\nthe model: {expected:?}"),
        }
    }

    pub(super) fn connection_event(&mut self, connection: PeerConnectionId, event: PeerEvent) -> Outcome {
        let Some((relayed, _, _)) = self.desk.connections.get(&connection).cloned() else {
            return Outcome::Silence(None);
        };
        if matches!(event, PeerEvent::Failed | PeerEvent::Closed) {
            self.desk.connections.remove(&connection);
        }
        let verdict = self.input(Input::PeerConnection { relayed, connection, event }, &[]);
        gather(&self.server, &verdict, &[])
    }

    pub(super) fn process(&mut self, choice: &mut Choice<'_>) {
        match choice.below(5) {
            // Killed, and started from its journal under the next epoch.
            0 | 1 => {
                self.epoch += 1;
                let settings = Arc::new(self.settings.clone());
                let mut seed = [0; 32];
                seed[..8].copy_from_slice(&self.epoch.to_be_bytes());
                self.held_tickets.clear();
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

                self.desk.connections.clear();
                for client in 0..CLIENTS.len() {
                    if self.clients[client].five_tuple.transport.is_stream() {
                        self.reconnect(client);
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

    /// Draining with and without a place to go, overloaded, neither: one after the other.
    fn redirect_otherwise(&mut self) {
        let settings = &mut self.settings;
        (settings.draining, settings.overloaded) = match (settings.draining, settings.alternates.is_empty()) {
            (false, true) => (true, false),
            (true, true) => (false, true),
            (true, false) => (true, false),
            (false, false) => (false, false),
        };
        settings.alternates = match (settings.draining || settings.overloaded, settings.alternates.is_empty()) {
            (true, true) => alternates(),
            _ => Vec::new(),
        };
    }

    pub(super) fn configure(&mut self, choice: &mut Choice<'_>) {
        match choice.below(10) {
            9 => self.settings.features.mobility = !self.settings.features.mobility,
            8 => self.settings.features.tcp_allocations = !self.settings.features.tcp_allocations,
            7 => self.settings.features.sha256 = !self.settings.features.sha256,
            0 => self.redirect_otherwise(),
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

        model.redirecting = self.settings.draining || self.settings.overloaded;
        let alternate = |alternate: &Alternate| model::Alternate {
            transport: alternate.transport,
            address: alternate.address,
            relays_ipv6: alternate.relays_ipv6,
        };
        model.alternates = self.settings.alternates.iter().map(alternate).collect();
        model.offer = self.settings.features.sha256.then(|| OFFER.to_vec());

        model.realm = self.settings.realm.as_bytes().to_vec();
        model.max_lifetime = self.settings.limits.max_lifetime;
        model.nonce_keys = self.settings.nonce_keys.0.iter().map(|key| key.id).collect();
        model.rest_secrets =
            self.settings.rest_secrets.0.iter().map(|key| model::RestSecret(key.secret.clone())).collect();

        model.set_policy(self.settings.policy.clone());

        model.tcp = self.settings.features.tcp_allocations;
        model.mobile = self.settings.features.mobility;
        // Connects to what is forbidden now are answered.
        self.pass(0);
    }
}
