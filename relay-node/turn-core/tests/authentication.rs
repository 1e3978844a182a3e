//! The client and the server as values prove to each other who they are, by every mechanism, with somebody in between.

mod support;

use std::sync::Arc;
use std::time::Instant;

use support::{CLIENT, PATH, Ports, addr, five_tuple, settings};
use turn_core::client::{Client, ClientConfig, Event, Failure, Security};
use turn_core::third_party::{ThirdParty, TokenCipher, TokenKey};
use turn_core::wire::{AttributeType, Message, Method};
use turn_core::{Input, IpMeta, Now, Server, Settings, Transport, WorkerId, credential};

/// RFC 7635 appendix A: when its tokens were made.
const TOKEN_ISSUED: u64 = (92_470_300_704_768 >> 16) * 1000;

struct Wire {
    server: Server,
    ports: Ports,
    client: Client,
    now: Now,
    /// What the client sent.
    requests: Vec<Vec<u8>>,
    /// What the server answered, as it left.
    answers: Vec<Vec<u8>>,
    events: Vec<Event>,
}

impl Wire {
    fn new(settings: Settings, username: &[u8], password: &[u8], security: Security) -> Self {
        let client = Client::new(ClientConfig {
            transport: Transport::Udp,
            username: username.to_vec(),
            password: password.to_vec(),
            family: None,
            lifetime: None,
            seed: [3; 32],
        });
        Self {
            server: Server::new(WorkerId(0), addr(support::SERVER).ip(), 1, Arc::new(settings), [7; 32]),
            ports: Ports::default(),
            client: client.with_security(security),
            now: Now { mono: Instant::now(), wall: TOKEN_ISSUED },
            requests: Vec::new(),
            answers: Vec::new(),
            events: Vec::new(),
        }
    }

    /// Carries packets until nobody sends any, through the hands of whoever is in between.
    fn run(&mut self, mut tamper: impl FnMut(&mut Vec<u8>)) {
        while let Some(packet) = self.client.poll_transmit() {
            let (from, ip) = (five_tuple(addr(CLIENT)), IpMeta::default());
            let input = Input::FromClient { from, path: PATH, packet: &packet, ip };
            self.server.handle_input(self.now, input, &mut self.ports);
            let mut answer = self.server.reply().to_vec();
            self.answers.push(answer.clone());
            self.requests.push(packet);
            tamper(&mut answer);
            self.client.handle_packet(self.now.mono, &answer);
            self.events.extend(std::iter::from_fn(|| self.client.poll_event()));
        }
    }

    fn allocate(&mut self) {
        self.client.allocate(self.now.mono);
        self.run(|_| {});
    }

    /// Whether the last request and its answer have an attribute.
    fn last(&self, attribute: AttributeType) -> (bool, bool) {
        let contains = |packets: &[Vec<u8>]| {
            let packet = packets.last().expect("an exchange");
            Message::parse(packet).expect("well-formed").contains(attribute)
        };
        (contains(&self.requests), contains(&self.answers))
    }
}

fn static_only() -> Settings {
    let mut settings = settings();
    settings.rest_secrets.0.clear();
    settings
}

fn without_sha256() -> Settings {
    let mut settings = settings();
    settings.features.sha256 = false;
    settings
}

#[test]
fn every_mechanism_meets_every_server() {
    use AttributeType as A;
    type Case = (&'static str, Settings, Security, bool, bool);
    let cases: [Case; 8] = [
        // whether the exchange is by SHA-256, whether the name is hidden
        ("RFC 5389", settings(), Security::Rfc5389, false, false),
        ("RFC 8489", settings(), Security::Rfc8489, true, false),
        ("RFC 8489, anonymous unasked", settings(), Security::Userhash, true, true),
        ("RFC 8489, static users only", static_only(), Security::Rfc8489, true, true),
        ("RFC 5389, static users only", static_only(), Security::Rfc5389, false, false),
        ("RFC 8489, SHA-256 off", without_sha256(), Security::Rfc8489, false, false),
        ("RFC 5389, SHA-256 off", without_sha256(), Security::Rfc5389, false, false),
        ("RFC 8489 by default", settings(), Security::default(), true, false),
    ];
    for (what, settings, security, sha256, anonymous) in cases {
        let mut wire = Wire::new(settings, b"user", b"password", security);
        wire.allocate();
        assert!(matches!(wire.events[..], [Event::Allocated { .. }]), "{what}: {:?}", wire.events);
        assert_eq!(wire.last(A::MESSAGE_INTEGRITY_SHA256), (sha256, sha256), "{what}");
        assert_eq!(wire.last(A::MESSAGE_INTEGRITY), (!sha256, !sha256), "{what}");
        assert_eq!(wire.last(A::USERHASH), (anonymous, false), "{what}");
        assert_eq!(wire.last(A::USERNAME), (!anonymous, false), "{what}");
        // What comes later is signed the same way, also where it needs a new nonce.
        wire.now.wall += 3_601_000;
        wire.client.refresh(wire.now.mono, 600);
        wire.run(|_| {});
        assert_eq!(wire.events.last(), Some(&Event::Refreshed(600)), "{what}");
        assert_eq!(wire.last(A::MESSAGE_INTEGRITY_SHA256), (sha256, sha256), "{what}");
        assert_eq!(wire.requests.len(), 4, "{what}: 401 and 438, once each");
    }
}

#[test]
fn turn_rest_by_either_hash() {
    let secret = settings().rest_secrets.0[0].clone();
    let expires_at = TOKEN_ISSUED / 1000 + 60;
    for minted in [credential::mint(&secret, b"bob", expires_at), credential::mint_sha256(&secret, b"bob", expires_at)]
    {
        for security in [Security::Rfc5389, Security::Rfc8489] {
            let mut wire = Wire::new(settings(), &minted.username, minted.password.as_bytes(), security);
            wire.allocate();
            assert!(matches!(wire.events[..], [Event::Allocated { .. }]), "{:?}", wire.events);
        }
    }
}

/// The attributes of a message, and the message with others instead.
fn rewrite(message: &mut Vec<u8>, mut change: impl FnMut(u16, &mut Vec<u8>) -> bool) {
    let mut rewritten = message[..20].to_vec();
    let mut at = 20;
    while at < message.len() {
        let number = u16::from_be_bytes([message[at], message[at + 1]]);
        let len = usize::from(u16::from_be_bytes([message[at + 2], message[at + 3]]));
        let mut value = message[at + 4..at + 4 + len].to_vec();
        at += 4 + len.next_multiple_of(4);
        if change(number, &mut value) {
            rewritten.extend(number.to_be_bytes());
            rewritten.extend(u16::try_from(value.len()).expect("short").to_be_bytes());
            rewritten.extend(&value);
            rewritten.resize(rewritten.len().next_multiple_of(4), 0);
        }
    }
    let len = u16::try_from(rewritten.len() - 20).expect("short");
    rewritten[2..4].copy_from_slice(&len.to_be_bytes());
    *message = rewritten;
}

#[test]
fn bidding_down_is_noticed() {
    // RFC 8489 §9.2.1, §9.2.4, §9.2.5.
    const PASSWORD_ALGORITHMS: u16 = 0x8002;
    const NONCE: u16 = 0x0015;
    type Tamper = fn(u16, &mut Vec<u8>) -> bool;
    let cases: [(&str, Tamper, Failure, usize); 4] = [
        // (what is done to the answers, what the client ends with, how many requests it made)
        ("offer taken out", |number, _| number != PASSWORD_ALGORITHMS, Failure::Invalid, 1),
        (
            "SHA-256 taken out of the offer",
            |number, value| {
                if number == PASSWORD_ALGORITHMS {
                    value.drain(..4);
                }
                true
            },
            Failure::Refused(turn_core::wire::ErrorCode::BAD_REQUEST),
            2,
        ),
        (
            "offer and its bit taken out: no nonce of the server's",
            |number, value| {
                if number == NONCE {
                    value[9..13].copy_from_slice(b"AAAA");
                }
                number != PASSWORD_ALGORITHMS
            },
            Failure::Refused(turn_core::wire::ErrorCode::STALE_NONCE),
            3,
        ),
        (
            "nothing that is known here offered",
            |number, value| {
                if number == PASSWORD_ALGORITHMS {
                    value[1] = 9;
                    value[5] = 8;
                }
                true
            },
            Failure::Invalid,
            1,
        ),
    ];
    for (what, tamper, expected, requests) in cases {
        let mut wire = Wire::new(settings(), b"user", b"password", Security::Rfc8489);
        wire.client.allocate(wire.now.mono);
        wire.run(|answer| rewrite(answer, tamper));
        assert_eq!(wire.events, [Event::Failed(Method::Allocate, expected)], "{what}");
        assert_eq!(wire.requests.len(), requests, "{what}");
        assert_eq!(wire.server.allocations(), 0, "{what}");
    }
}

fn with_third_party() -> Settings {
    let key = TokenKey { kid: b"kid".to_vec(), cipher: TokenCipher::A256Gcm(*b"HGkj32KJGiuy098sdfaqbNjOiaz71923") };
    let third_party = ThirdParty { server_name: "blackdow.carleon.gov".into(), keys: vec![key] };
    Settings { third_party: Some(third_party), ..settings() }
}

/// The first token of RFC 7635 appendix A: an hour from [`TOKEN_ISSUED`].
fn token() -> Security {
    let token = b"\x00\x0c\x68\x34\x6a\x33\x6b\x32\x6c\x32\x6e\x34\x62\x35\x61\x7e\xf1\x34\xa3\xd5\xe4\x4e\x9a\x19\xcc\x7d\
        \xc1\x04\xb0\xc0\x3d\x03\xb2\xa5\x51\xd8\xfd\xf5\xcd\x3b\x6d\xca\x6f\x10\xcf\xb7\x7e\x5b\x2d\xde\xc8\x4d\x29\x3a\
        \x5c\x50\x49\x93\x59\xf0\xc2\xe2\x6f\x76";
    Security::Token { token: token.to_vec(), mac_key: b"ZksjpweoixXmvn67534m".to_vec() }
}

#[test]
fn an_access_token_opens_the_server() {
    let mut wire = Wire::new(with_third_party(), b"kid", b"", token());
    wire.allocate();
    assert!(matches!(wire.events[..], [Event::Allocated { lifetime: 600, .. }]), "{:?}", wire.events);
    assert_eq!(wire.last(AttributeType::ACCESS_TOKEN), (true, false));
    // RFC 7635 §9: other requests have no token, and are signed with its key.
    wire.client.permit(wire.now.mono, &[addr(support::OTHER_PEER).ip()]);
    wire.run(|_| {});
    assert!(matches!(wire.events.last(), Some(Event::Permitted(_))), "{:?}", wire.events);
    assert_eq!(wire.last(AttributeType::ACCESS_TOKEN), (false, false));
    wire.client.refresh(wire.now.mono, 0);
    wire.run(|_| {});
    assert_eq!(wire.events.last(), Some(&Event::Refreshed(0)));
    // First-party users go on as before.
    let mut wire = Wire::new(with_third_party(), b"user", b"password", Security::Rfc8489);
    wire.allocate();
    assert!(matches!(wire.events[..], [Event::Allocated { .. }]), "{:?}", wire.events);
}
