//! B: bytes that are no messages, or messages that mean nothing.

use std::time::Duration;

use turn_core::Transport;
use turn_core::wire::AttributeType as A;

use crate::conform::check::{Check, On, Step, expect, must};
use crate::conform::client::Client;
use crate::conform::craft::{
    ALLOCATE, BINDING, CHANNEL_BIND, CONNECT, CONNECTION_BIND, CREATE_PERMISSION, Craft, REFRESH, SEND, channel_data,
};
use crate::conform::lab::{Lab, Login};

const SECTION: &str = "abuse B, RFC 8489 §6.3";

pub(super) const CHECKS: &[Check] = &[
    must("grammar-cut", SECTION, "a request cut at every byte gets no answer", cut).on(On::Datagrams),
    must("grammar-flipped", SECTION, "a request with any byte changed leaves the server well", flipped),
    must("grammar-random", SECTION, "random bytes get no answer", random),
    must("grammar-other-protocols", SECTION, "RTP, ZRTP, QUIC, SIP and HTTP get no answer", other_protocols),
    must("grammar-empty", SECTION, "an empty datagram leaves the server well", empty).on(On::Only(Transport::Udp)),
    must("grammar-attribute-lengths", SECTION, "attributes of every wrong length are refused, never served", lengths),
    must("grammar-attributes-unsigned", SECTION, "the same without a signature", lengths_unsigned),
    must("grammar-many-attributes", SECTION, "a request of 3,000 attributes is answered or dropped", many),
    must("grammar-unknown-thousand", SECTION, "a thousand unknown attributes give a bounded answer", thousand_unknown),
    must("grammar-indications", SECTION, "indications of every method get no answer", indications),
    must("grammar-methods", SECTION, "requests of every unknown method get no answer", methods),
    must("grammar-long-username", "abuse B, RFC 8489 §14.3", "USERNAME of 509 bytes does not authenticate", |lab| {
        long(lab, |client| client.credentials.username = vec![b'u'; 509])
    }),
    must("grammar-long-realm", "abuse B, RFC 8489 §14.9", "REALM of 764 bytes does not authenticate", |lab| {
        long(lab, |client| client.credentials.realm = vec![b'r'; 764])
    }),
    must("grammar-long-nonce", "abuse B, RFC 8489 §14.10", "NONCE of 764 bytes does not authenticate", |lab| {
        long(lab, |client| client.credentials.nonce = vec![b'n'; 764])
    }),
    must("grammar-names", "abuse B", "names with NUL, %, /, newlines and broken UTF-8 are just unknown users", names),
    must("grammar-channel-data", "abuse B, RFC 8656 §12.6", "ChannelData of every wrong form is dropped", channels)
        .on(On::Datagrams),
    must("grammar-largest", "abuse B", "a STUN frame of 64 KiB leaves the stream well", largest).on(On::Streams),
    must("grammar-half", "abuse B", "half a message held for long keeps nobody waiting", half).on(On::Streams),
    must("grammar-bytewise", "abuse B", "a hundred connections that send byte by byte keep nobody waiting", bytewise)
        .on(On::Streams)
        .alone(),
    must("grammar-stream-garbage", "abuse B", "what is no frame gets no answer, behind a good request too", garbage)
        .on(On::Streams),
];

/// Pseudo-random bytes, the same in every run: what a run found can be found again.
pub(super) struct Noise(u64);

impl Noise {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub(super) fn next(&mut self) -> u64 {
        // xorshift64*, Vigna.
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next().to_be_bytes()[0]).collect()
    }
}

fn cut(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let request = client.credentials.sign(lab.allocate());
    for len in 0..request.bytes().len() {
        client.send(&request.bytes()[..len])?;
    }
    client.quiet()?;
    lab.alive()
}

fn flipped(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let request = client.credentials.sign(lab.allocate()).fingerprint().into_bytes();
    let mut noise = Noise::new(7);
    for at in 0..request.len() {
        let mut bytes = request.clone();
        bytes[at] ^= (noise.next() % 255 + 1) as u8;
        if lab.transport.is_stream() {
            // A stream does not survive a wrong length; each gets its own.
            if at % 8 == 0 {
                lab.wire()?.send(&bytes)?;
            }
        } else {
            client.send(&bytes)?;
        }
    }
    lab.settle();
    lab.alive()
}

fn random(lab: &Lab<'_>) -> Step {
    let mut noise = Noise::new(42);
    if lab.transport.is_stream() {
        for _ in 0..16 {
            let len = (noise.next() % 1400) as usize;
            let bytes = noise.bytes(len);
            // It may be closed on us in the middle.
            let _ = lab.wire()?.send(&bytes);
        }
        return lab.alive();
    }
    let mut client = lab.stranger()?;
    for _ in 0..200 {
        let len = (noise.next() % 1400) as usize;
        let bytes = noise.bytes(len);
        client.send(&bytes)?;
    }
    client.quiet()?;
    lab.alive()
}

/// First packets of protocols that are not ours.
pub(super) fn foreign() -> Vec<Vec<u8>> {
    let mut quic = vec![0xC3, 0, 0, 0, 1, 8, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0x44, 0x9E];
    quic.resize(1200, 0);
    vec![
        [&[0x80, 0x60, 0, 1][..], &[0; 8], b"sixteen byte SSRC and some media"].concat(),
        [&[0x10, 0, 0, 1][..], b"ZRTP", &[0; 40]].concat(),
        quic,
        b"OPTIONS sip:nobody@example.org SIP/2.0\r\n\r\n".to_vec(),
        b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n".to_vec(),
        vec![0x50; 64],
        vec![0xFF; 64],
    ]
}

fn other_protocols(lab: &Lab<'_>) -> Step {
    for bytes in foreign() {
        lab.stranger()?.unanswered(&bytes)?;
    }
    lab.alive()
}

fn empty(lab: &Lab<'_>) -> Step {
    lab.stranger()?.silence(&[])?;
    lab.alive()
}

/// Attributes whose value has a form, and lengths that break it.
const FORMED: [(A, &[usize]); 17] = [
    (A::CHANNEL_NUMBER, &[0, 1, 2, 3, 5, 8]),
    (A::LIFETIME, &[0, 1, 2, 3, 5, 8]),
    (A::XOR_PEER_ADDRESS, &[0, 1, 2, 3, 4, 5, 7, 9, 12, 19, 21, 64]),
    (A::REQUESTED_TRANSPORT, &[0, 1, 2, 3, 5]),
    (A::REQUESTED_ADDRESS_FAMILY, &[0, 1, 3, 5]),
    (A::ADDITIONAL_ADDRESS_FAMILY, &[0, 1, 3, 5]),
    (A::EVEN_PORT, &[0, 2, 4]),
    (A::DONT_FRAGMENT, &[1, 4]),
    (A::RESERVATION_TOKEN, &[0, 1, 7, 9]),
    (A::CONNECTION_ID, &[0, 1, 3, 5]),
    (A::USERHASH, &[0, 1, 31, 33]),
    (A::MESSAGE_INTEGRITY_SHA256, &[0, 4, 12, 36]),
    (A::PASSWORD_ALGORITHM, &[0, 1, 3]),
    (A::PASSWORD_ALGORITHMS, &[0, 1, 3, 5]),
    (A::ACCESS_TOKEN, &[0, 1, 2, 3, 13]),
    (A::MOBILITY_TICKET, &[1, 3, 200]),
    (A::ICMP, &[0, 1, 7, 9]),
];

const REQUESTS: [u16; 7] = [ALLOCATE, REFRESH, CREATE_PERMISSION, CHANNEL_BIND, CONNECT, CONNECTION_BIND, BINDING];

fn lengths(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    for (attribute, lengths) in FORMED {
        for len in lengths {
            for method in REQUESTS {
                let request = Craft::request(method).attr(attribute, &vec![0xA5; *len]);
                let request =
                    if method == ALLOCATE { request.attr(A::REQUESTED_TRANSPORT, &[17, 0, 0, 0]) } else { request };
                let bytes = client.credentials.sign(request).into_bytes();
                client.send(&bytes)?;
            }
            let bytes = Craft::indication(SEND).attr(attribute, &vec![0xA5; *len]).attr(A::DATA, b"x").into_bytes();
            client.send(&bytes)?;
        }
        // In step with the server: its receive buffer is not what is tried here.
        client.ask(&Craft::request(BINDING))?;
    }
    client.flush_inbox();
    // None of it may have ended the allocation.
    client.expect(0, Craft::request(REFRESH))?;
    lab.alive()
}

fn lengths_unsigned(lab: &Lab<'_>) -> Step {
    let attributes = FORMED.into_iter().chain([
        (A::USERNAME, &[0, 1, 600][..]),
        (A::REALM, &[0, 1, 900]),
        (A::NONCE, &[0, 1, 900]),
        (A::MESSAGE_INTEGRITY, &[0, 1, 19, 20, 21]),
        (A::ERROR_CODE, &[0, 1, 3]),
        (A::UNKNOWN_ATTRIBUTES, &[0, 1, 3]),
    ]);
    for (attribute, lengths) in attributes {
        let mut client = lab.stranger()?;
        for len in lengths {
            for method in REQUESTS {
                // A server may well be done with such a connection.
                let _ = client.send(Craft::request(method).attr(attribute, &vec![0; *len]).bytes());
            }
        }
        if !lab.transport.is_stream() {
            client.ask(&Craft::request(BINDING))?;
        }
    }
    lab.alive()
}

fn many(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let mut request = lab.allocate();
    // What one record of DTLS holds.
    for _ in 0..3000 {
        request = request.attr(A(0xFF00), &[]);
    }
    let bytes = client.credentials.sign(request).into_bytes();
    // A server may close a stream on which a stranger sends that much.
    if let Err(error) = client.wire.send(&bytes)
        && !lab.transport.is_stream()
    {
        return Err(error.into());
    }
    lab.settle();
    lab.alive()
}

fn thousand_unknown(lab: &Lab<'_>) -> Step {
    let mut client = lab.stranger()?;
    let mut request = Craft::request(BINDING);
    for kind in 0..300 {
        request = request.attr(A(0x7000 + kind), &[]);
    }
    client.send(request.bytes())?;
    let deadline = std::time::Instant::now() + lab.target.settle * 2;
    if let Some(reply) = client.answer_to(&request.id(), deadline)? {
        let (asked, answered) = (request.bytes().len(), reply.bytes().len());
        expect(answered <= asked, || format!("{answered} bytes for a request of {asked}"))?;
    }
    lab.alive()
}

fn indications(lab: &Lab<'_>) -> Step {
    let mut client = lab.stranger()?;
    for method in 0..0x20 {
        client.send(Craft::indication(method).bytes())?;
    }
    client.quiet()?;
    lab.alive()
}

fn methods(lab: &Lab<'_>) -> Step {
    let mut client = lab.stranger()?;
    for method in (0x00D..0x040).chain([0x000, 0x002, 0x005, 0x0FF, 0x800, 0xFFF]) {
        client.send(Craft::request(method).bytes())?;
    }
    client.quiet()?;
    lab.alive()
}

fn long(lab: &Lab<'_>, change: fn(&mut Client)) -> Step {
    let mut client = lab.client()?;
    change(&mut client);
    let request = client.credentials.sign(lab.allocate());
    client.send(request.bytes())?;
    let deadline = std::time::Instant::now() + lab.target.settle * 2;
    if let Some(reply) = client.answer_to(&request.id(), deadline)? {
        expect(matches!(reply.code(), 400 | 401 | 438), || format!("{reply}"))?;
    }
    lab.alive()
}

/// User names that somebody may take for something else than bytes.
const NAMES: [&[u8]; 10] = [
    b"",
    b"\0",
    b"alice\0",
    b"%s%n%x",
    b"../../etc/passwd",
    b"a\nb\r\nc",
    b"\xFF\xFE\xC0\xAF",
    b"' OR 1=1 --",
    b"{\"a\":\"b\"}",
    b"4294967296999:x",
];

fn names(lab: &Lab<'_>) -> Step {
    for name in NAMES {
        let mut client = lab.client_of(Login { username: name.to_vec(), password: b"x".to_vec() })?;
        let reply = client.signed(lab.allocate())?;
        expect(matches!(reply.code(), 400 | 401), || format!("{reply} for {name:02x?}"))?;
    }
    lab.alive()
}

fn channels(lab: &Lab<'_>) -> Step {
    let (mut client, peer) = (lab.allocation()?, lab.peer()?);
    client.bind(0x4000, &peer)?;
    let whole = channel_data(0x4000, b"0123456789", false);
    for len in 1..whole.len() {
        client.send(&whole[..len])?;
    }
    client.send(&[0x40, 0, 0xFF, 0xFF])?;
    client.send(&[&[0x40, 0, 0xFF, 0xFF][..], &[9; 1000]].concat())?;
    client.quiet()?;
    peer.must_get_nothing(lab.target.settle)?;
    lab.alive()
}

fn largest(lab: &Lab<'_>) -> Step {
    let mut client = lab.stranger()?;
    let request = Craft::request(BINDING).attr(A::SOFTWARE, &vec![b'x'; 65_000]);
    // Read or refused, but not half.
    let _ = client.wire.send(request.bytes());
    lab.settle();
    let mut other = lab.stranger()?;
    let _ = other.wire.send(&channel_data(0x4000, &vec![0; 65_532], true));
    lab.settle();
    lab.alive()
}

fn half(lab: &Lab<'_>) -> Step {
    let request = Craft::request(ALLOCATE).attr(A::REQUESTED_TRANSPORT, &[17, 0, 0, 0]);
    let mut held = Vec::new();
    for len in [1, 4, 8, 19, 20, 27] {
        let mut wire = lab.wire()?;
        wire.send(&request.bytes()[..len])?;
        held.push(wire);
    }
    let mut claims = lab.wire()?;
    claims.send(&[0x40, 0, 0xFF, 0xFF, 1])?;
    held.push(claims);
    lab.alive()
}

fn bytewise(lab: &Lab<'_>) -> Step {
    let request = Craft::request(BINDING).attr(A::SOFTWARE, &[b's'; 64]);
    let mut slow = (0..100).map(|_| lab.wire()).collect::<Step<Vec<_>>>()?;
    for byte in &request.bytes()[..40] {
        for wire in &mut slow {
            wire.send(&[*byte])?;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let start = std::time::Instant::now();
    lab.alive()?;
    expect(start.elapsed() < Duration::from_secs(1), || format!("a newcomer waited {:?}", start.elapsed()))
}

fn garbage(lab: &Lab<'_>) -> Step {
    for bytes in foreign() {
        // Behind a good request.
        let mut client = lab.stranger()?;
        client.ask(&Craft::request(BINDING))?;
        client.unanswered(&bytes)?;
    }
    lab.alive()
}
