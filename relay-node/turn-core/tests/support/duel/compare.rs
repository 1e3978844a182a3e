//! What must hold after each step, and after each packet.

use std::collections::BTreeSet;
use std::time::Duration;

use turn_core::{PeerTransport, Record};

use super::super::EPOCH;
use super::super::model::{self, Answer, Expect, Signature};
use super::super::rig::Outcome;
use super::super::stun::{self, Class, Read, SOFTWARE};
use super::Duel;

impl Duel {
    pub(super) fn check(&self) {
        assert_eq!(self.server.allocations(), self.model.allocations.len());
        let relayed: Vec<_> = self.model.allocations.iter().flat_map(|allocation| &allocation.relayed).collect();
        assert_eq!(self.desk.held.len(), relayed.len(), "who has a relayed address holds its port, nobody else does");
        assert!(relayed.iter().all(|relayed| self.desk.held.contains_key(&relayed.address)));
        let next = self.model.allocations.iter().filter_map(model::Allocation::next_end).min();
        let next = next.map(|at| self.clock.mono() + Duration::from_millis(at - self.model.now));
        assert_eq!(self.server.poll_timeout(), next);

        // The tickets that are good for something, and no others.
        let expected: BTreeSet<_> = self.model.allocations.iter().flat_map(model::Allocation::tickets).collect();
        assert_eq!(self.held_tickets, expected);
        // The connections there are, and no others.
        let mut expected: Vec<_> = self
            .model
            .allocations
            .iter()
            .flat_map(|allocation| allocation.connections.iter().flatten())
            .map(|connection| connection.id)
            .collect();
        expected.sort();
        assert!(self.desk.connections.keys().eq(&expected), "{:?} {expected:?}", self.desk.connections);
        // Journal before reply: what is recorded is what there is.
        assert_eq!(self.journal.len(), self.model.allocations.len());
        for record in self.journal.values() {
            self.check_record(record);
        }
    }

    pub(super) fn check_record(&self, record: &Record) {
        let first = record.relayed[0].advertised;
        let allocation = self.model.allocations.iter().find(|allocation| allocation.is_at(first));
        let allocation = allocation.expect("recorded and live");
        let (now, wall) = (self.model.now, self.clock.now().wall);
        assert_eq!(record.five_tuple, allocation.five_tuple);

        assert_eq!(record.username, allocation.username);
        assert_eq!(record.transaction_id.map(|id| id.0), allocation.transaction);
        assert_eq!(record.reservation.map(|(token, _)| token.0), allocation.token);
        assert_eq!(record.address_error.map(|error| (error.family, error.error.code())), allocation.family_error);
        let mobility = record.mobility.as_ref();
        assert_eq!(
            mobility.map(|mobility| mobility.ticket.text().to_vec()),
            allocation.mobility.as_ref().map(|mobility| mobility.ticket.clone())
        );
        let moving = allocation.mobility.as_ref().and_then(|mobility| mobility.moving.as_ref());
        assert_eq!(
            mobility.and_then(|mobility| mobility.moving.as_ref()).map(|moving| (moving.to, moving.by.text().to_vec())),
            moving.map(|moving| (moving.to, moving.by.clone()))
        );
        assert_eq!(record.peer_transport == PeerTransport::Tcp, allocation.connections.is_some());
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
    pub(super) fn check_records(&self) {
        let records: Vec<Record> = self.server.records(self.clock.now()).collect();
        assert_eq!(records.len(), self.model.allocations.len());
        for record in &records {
            self.check_record(record);
        }
    }
}

/// Panics where the server did not do what the model says.
pub(super) fn compare(outcome: &Outcome, expected: &Expect, udp: bool, packet: &[u8]) {
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

pub(super) fn compare_answer(answer: &Read, expected: &Answer, udp: bool, packet: &[u8]) {
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
