//! A client that says exactly what a check tells it to.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use md5::{Digest, Md5};
use sha2::Sha256;
use turn_core::wire::AttributeType as A;

use super::check::{Step, Stop, fail, not_applicable};
use super::craft::{
    ALLOCATE, BINDING, CHANNEL_BIND, CREATE_PERMISSION, Craft, DATA, INDICATION, REFRESH, SEND, UDP, channel_data,
};
use super::lab::{Login, Peer, Target};
use super::reply::Reply;
use super::wire::{Got, Wire};

/// Why a client cannot start on its port.
pub(crate) const TAKEN: &str = "the client's port has an allocation already";

/// What signs a request.
#[derive(Clone, Debug)]
pub(crate) struct Credentials {
    pub(crate) username: Vec<u8>,
    pub(crate) password: Vec<u8>,
    pub(crate) realm: Vec<u8>,
    pub(crate) nonce: Vec<u8>,
}

impl Credentials {
    /// The key of RFC 8489 §9.2.2, by MD5.
    pub(crate) fn key(&self) -> Vec<u8> {
        Md5::digest(self.text()).to_vec()
    }

    /// The key by SHA-256 (RFC 8489 §18.5.1.2).
    pub(crate) fn key_sha256(&self) -> Vec<u8> {
        Sha256::digest(self.text()).to_vec()
    }

    /// USERHASH (RFC 8489 §14.4).
    pub(crate) fn userhash(&self) -> Vec<u8> {
        Sha256::digest([&self.username, &b":"[..], &self.realm].concat()).to_vec()
    }

    fn text(&self) -> Vec<u8> {
        [&self.username[..], b":", &self.realm, b":", &self.password].concat()
    }

    /// Appends USERNAME, REALM and NONCE.
    pub(crate) fn names(&self, message: Craft) -> Craft {
        message.attr(A::USERNAME, &self.username).attr(A::REALM, &self.realm).attr(A::NONCE, &self.nonce)
    }

    /// Appends names and MESSAGE-INTEGRITY.
    pub(crate) fn sign(&self, message: Craft) -> Craft {
        self.names(message).integrity(&self.key())
    }
}

/// What the server did with something it should not answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Silence {
    /// It said nothing and goes on serving this socket.
    Ignored,
    /// It closed the connection.
    Closed,
}

/// A client and its socket.
pub(crate) struct Client {
    pub(crate) wire: Wire,
    pub(crate) credentials: Credentials,
    /// PASSWORD-ALGORITHMS of the challenge.
    pub(crate) algorithms: Option<Vec<u8>>,
    relayed: Option<SocketAddr>,
    /// What came while an answer was waited for.
    inbox: VecDeque<Vec<u8>>,
    realm: Option<String>,
    patience: Duration,
    settle: Duration,
}

impl Client {
    pub(crate) fn new(wire: Wire, user: Login, target: &Target) -> Self {
        let Login { username, password } = user;
        Self {
            wire,
            credentials: Credentials { username, password, realm: Vec::new(), nonce: Vec::new() },
            algorithms: None,
            relayed: None,
            inbox: VecDeque::new(),
            realm: target.realm.clone(),
            patience: target.patience,
            settle: target.settle,
        }
    }

    /// Learns realm and nonce from the answer to an unsigned Allocate.
    pub(crate) fn greet(&mut self) -> Step {
        self.greet_with(&Craft::request(ALLOCATE).attr(A::REQUESTED_TRANSPORT, &UDP))
    }

    /// Learns realm and nonce from the answer to this unsigned request.
    pub(crate) fn greet_with(&mut self, request: &Craft) -> Step {
        let reply = self.ask(request)?;
        match reply.code() {
            401 => self.learn(&reply),
            // An allocation of somebody who had this port before: no fault of the server's, and none of the check's.
            437 if !self.is_stream() => Err(Stop::NotApplicable(TAKEN.into())),
            _ => fail(format!("an unsigned request was answered with {reply} instead of 401")),
        }
    }

    fn learn(&mut self, reply: &Reply) -> Step {
        let (Some(realm), Some(nonce)) = (reply.get(A::REALM), reply.get(A::NONCE)) else {
            return fail(format!("{reply} has no REALM and NONCE"));
        };
        if self.realm.as_ref().is_some_and(|wanted| wanted.as_bytes() != realm) {
            return fail(format!("the realm is {:?}", String::from_utf8_lossy(realm)));
        }
        (self.credentials.realm, self.credentials.nonce) = (realm.to_vec(), nonce.to_vec());
        self.algorithms = reply.get(A::PASSWORD_ALGORITHMS).map(<[u8]>::to_vec);
        Ok(())
    }

    /// Sends bytes and expects nothing.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> Step {
        Ok(self.wire.send(bytes)?)
    }

    /// Sends a request as it is and waits for its answer, again and again over UDP.
    pub(crate) fn ask(&mut self, request: &Craft) -> Step<Reply> {
        self.ask_bytes(request.bytes())
    }

    pub(crate) fn ask_bytes(&mut self, request: &[u8]) -> Step<Reply> {
        let id = request.get(8..20).unwrap_or_default().to_vec();
        let start = Instant::now();
        let deadline = start + self.patience;
        let mut wait = Duration::from_millis(500);
        loop {
            self.wire.send(request)?;
            let again = if self.is_stream() { deadline } else { (Instant::now() + wait).min(deadline) };
            if let Some(reply) = self.answer_to(&id, again)? {
                return Ok(reply);
            }
            if Instant::now() >= deadline {
                return fail(format!("no answer within {} ms", start.elapsed().as_millis()));
            }
            wait *= 2;
        }
    }

    /// Keeps count of the allocation, so that it is deleted in the end however the check made it.
    fn note(&mut self, reply: &Reply) {
        match (reply.code(), reply.method(), reply.word(A::LIFETIME)) {
            (0, ALLOCATE, _) => self.relayed = reply.xor_address(A::XOR_RELAYED_ADDRESS).or(self.relayed),
            (0, REFRESH, Some(0)) => self.relayed = None,
            _ => {}
        }
    }

    /// The answer to a transaction, if it comes in time; all else goes to the inbox.
    pub(crate) fn answer_to(&mut self, id: &[u8], deadline: Instant) -> Step<Option<Reply>> {
        loop {
            match self.wire.receive(deadline) {
                Got::Packet(packet) if packet.get(8..20) == Some(id) && packet[0] < 64 => match Reply::parse(packet) {
                    Some(reply) => {
                        self.note(&reply);
                        return Ok(Some(reply));
                    }
                    None => return fail("the answer breaks the grammar of RFC 8489 §5"),
                },
                Got::Packet(packet) => self.inbox.push_back(packet),
                Got::Nothing => return Ok(None),
                Got::Closed => return fail("the server closed the connection"),
            }
        }
    }

    /// Signs a request and waits for its answer; a stale nonce is replaced once.
    pub(crate) fn signed(&mut self, request: Craft) -> Step<Reply> {
        let reply = self.ask(&self.credentials.sign(request.clone()))?;
        if reply.code() != 438 {
            return Ok(reply);
        }
        self.learn(&reply)?;
        // Under the same id: addresses in the request are XORed with it, and no server remembers a 438.
        self.ask(&self.credentials.sign(request))
    }

    /// As [`Client::signed`]; fails on any answer but a success or this code.
    pub(crate) fn expect(&mut self, code: u16, request: Craft) -> Step<Reply> {
        let reply = self.signed(request)?;
        expect_code(&reply, code)?;
        Ok(reply)
    }

    /// Sends an Allocate request, which must succeed.
    pub(crate) fn allocate(&mut self, request: Craft) -> Step<Reply> {
        let reply = self.expect(0, request)?;
        match reply.xor_address(A::XOR_RELAYED_ADDRESS) {
            Some(relayed) => self.relayed = Some(relayed),
            None => return fail("Allocate succeeded without XOR-RELAYED-ADDRESS"),
        }
        Ok(reply)
    }

    /// The relayed address.
    pub(crate) fn relayed(&self) -> Step<SocketAddr> {
        self.relayed.map_or_else(|| fail("there is no allocation"), Ok)
    }

    /// Notes an allocation that was made otherwise.
    pub(crate) fn adopt(&mut self, relayed: SocketAddr) {
        self.relayed = Some(relayed);
    }

    /// Notes that there is no allocation any more.
    pub(crate) fn forget(&mut self) {
        self.relayed = None;
    }

    /// Deletes the allocation.
    pub(crate) fn delete(&mut self) -> Step<Reply> {
        let reply = self.expect(0, Craft::request(REFRESH).word(A::LIFETIME, 0))?;
        self.forget();
        Ok(reply)
    }

    /// Permits a peer of ours. A server that forbids it cannot be checked this way.
    pub(crate) fn permit(&mut self, peer: &Peer) -> Step {
        let reply = self.signed(Craft::request(CREATE_PERMISSION).peer(peer.address))?;
        allowed(&reply, peer.address)
    }

    /// Binds a channel to a peer of ours.
    pub(crate) fn bind(&mut self, number: u16, peer: &Peer) -> Step {
        let reply = self.signed(Craft::request(CHANNEL_BIND).channel(number).peer(peer.address))?;
        allowed(&reply, peer.address)
    }

    /// A Send indication.
    pub(crate) fn send_to(&mut self, peer: SocketAddr, data: &[u8]) -> Step {
        self.send(Craft::indication(SEND).peer(peer).attr(A::DATA, data).bytes())
    }

    /// ChannelData, padded where the transport wants it.
    pub(crate) fn send_on(&mut self, number: u16, data: &[u8]) -> Step {
        let message = channel_data(number, data, self.is_stream());
        self.send(&message)
    }

    /// The next packet that is no answer.
    pub(crate) fn next(&mut self) -> Step<Vec<u8>> {
        match self.next_within(self.patience)? {
            Some(packet) => Ok(packet),
            None => fail("nothing arrived at the client"),
        }
    }

    pub(crate) fn next_within(&mut self, patience: Duration) -> Step<Option<Vec<u8>>> {
        if let Some(packet) = self.inbox.pop_front() {
            return Ok(Some(packet));
        }
        match self.wire.receive(Instant::now() + patience) {
            Got::Packet(packet) => Ok(Some(packet)),
            Got::Nothing => Ok(None),
            Got::Closed => fail("the server closed the connection"),
        }
    }

    /// The next packet, which must be a Data indication; its peer and data.
    pub(crate) fn data(&mut self) -> Step<(SocketAddr, Vec<u8>, Reply)> {
        let packet = self.next()?;
        let Some(reply) = Reply::parse(packet) else { return fail("what arrived is no STUN message") };
        if (reply.class(), reply.method()) != (INDICATION, DATA) {
            return fail(format!("{reply} arrived instead of a Data indication"));
        }
        match (reply.xor_address(A::XOR_PEER_ADDRESS), reply.get(A::DATA)) {
            (Some(peer), Some(data)) => Ok((peer, data.to_vec(), reply.clone())),
            _ => fail("the Data indication lacks XOR-PEER-ADDRESS or DATA"),
        }
    }

    /// Fails unless the next packet is a Data indication of exactly this.
    pub(crate) fn must_get(&mut self, from: SocketAddr, data: &[u8]) -> Step {
        let (peer, got, _) = self.data()?;
        if peer != from || got != data {
            return fail(format!("{} bytes from {peer} arrived instead of {} from {from}", got.len(), data.len()));
        }
        Ok(())
    }

    /// Fails unless the next packet is ChannelData of exactly this.
    pub(crate) fn must_get_on(&mut self, number: u16, data: &[u8]) -> Step {
        let packet = self.next()?;
        let wanted = channel_data(number, data, false);
        if !packet.starts_with(&wanted) {
            return fail(format!(
                "{} arrived instead of {} bytes on channel {number:#06x}",
                shown(&packet),
                data.len()
            ));
        }
        if packet.len() > wanted.len().next_multiple_of(4) {
            return fail(format!("ChannelData with {} bytes behind its data", packet.len() - wanted.len()));
        }
        Ok(())
    }

    /// Sends bytes that deserve no answer, then a Binding request, and fails if anything but its answer came.
    pub(crate) fn silence(&mut self, bytes: &[u8]) -> Step<Silence> {
        if let Err(error) = self.wire.send(bytes) {
            return if self.is_stream() { Ok(Silence::Closed) } else { Err(error.into()) };
        }
        self.quiet()
    }

    /// Sends bytes that deserve no answer and fails if anything comes. A server may close the connection or wait for more
    /// of it.
    pub(crate) fn unanswered(&mut self, bytes: &[u8]) -> Step {
        if self.wire.send(bytes).is_err() {
            return Ok(());
        }
        match self.wire.receive(Instant::now() + self.settle) {
            Got::Packet(packet) => fail(format!("{} came where silence was due", shown(&packet))),
            Got::Nothing | Got::Closed => Ok(()),
        }
    }

    /// Fails if anything comes before the server has answered a Binding request, and a moment after.
    pub(crate) fn quiet(&mut self) -> Step<Silence> {
        let barrier = Craft::request(BINDING);
        match self.ask(&barrier) {
            Ok(_) => {}
            Err(Stop::Fail(_)) if self.is_stream() && self.inbox.is_empty() && self.closed() => {
                return Ok(Silence::Closed);
            }
            Err(stop) => return Err(stop),
        }
        let deadline = Instant::now() + self.settle;
        while let Got::Packet(packet) = self.wire.receive(deadline) {
            // The answer to a Binding request that was sent twice.
            if packet.get(8..20) != Some(&barrier.id()[..]) {
                self.inbox.push_back(packet);
            }
        }
        match self.inbox.pop_front() {
            None => Ok(Silence::Ignored),
            Some(packet) => fail(format!("{} came where silence was due", shown(&packet))),
        }
    }

    /// Forgets what came and was no answer.
    pub(crate) fn flush_inbox(&mut self) {
        self.inbox.clear();
    }

    /// Whether the server has closed the connection.
    pub(crate) fn closed(&mut self) -> bool {
        matches!(self.wire.receive(Instant::now() + self.settle), Got::Closed)
    }

    pub(crate) fn is_stream(&self) -> bool {
        self.wire.is_stream()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // Leave nothing behind on a server that has other users; nobody waits for the answer.
        if self.relayed.is_some() {
            let request = self.credentials.sign(Craft::request(REFRESH).word(A::LIFETIME, 0));
            let _ = self.wire.send(request.bytes());
        }
    }
}

/// Fails unless the answer is a success (0) or this error.
pub(crate) fn expect_code(reply: &Reply, code: u16) -> Step {
    match (reply.code(), code) {
        (got, wanted) if got == wanted => Ok(()),
        (0, wanted) => fail(format!("success instead of {wanted}")),
        (got, 0) => fail(format!("{got} instead of success")),
        (got, wanted) => fail(format!("{got} instead of {wanted}")),
    }
}

fn allowed(reply: &Reply, peer: SocketAddr) -> Step {
    match reply.code() {
        403 => not_applicable(format!("the server forbids {} as a peer: --peer-ip names another", peer.ip())),
        _ => expect_code(reply, 0),
    }
}

/// A packet for people.
pub(crate) fn shown(packet: &[u8]) -> String {
    match packet.first() {
        Some(64..=79) => format!("ChannelData of {} bytes", packet.len()),
        _ => match Reply::parse(packet.to_vec()) {
            Some(reply) => reply.to_string(),
            None => format!("{} bytes that are not STUN", packet.len()),
        },
    }
}
