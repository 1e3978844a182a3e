//! §3 to §6: behaviour common to all messages.

use turn_core::{ConnectionId, Path, Transport};

use crate::support::addr;
use crate::support::rig::{Outcome, Rig};
use crate::support::stun::{
    ALLOCATE, CHANNEL_BIND, CREATE_PERMISSION, LIFETIME, NONCE, REALM, REFRESH, SEND, SOFTWARE, XOR_RELAYED_ADDRESS,
    channel, data, lifetime, peer, transport,
};

/// Every request but Allocate, well-formed.
fn other_requests() -> [(u16, Vec<crate::support::stun::Item>); 3] {
    let peer = peer(addr("192.0.2.1:9"));
    [
        (REFRESH, vec![lifetime(600)]),
        (CREATE_PERMISSION, vec![peer.clone()]),
        (CHANNEL_BIND, vec![channel(0x4000), peer]),
    ]
}

#[test]
fn long_term_credentials_are_implemented() {
    // RFC 8656 §5: the long-term credential mechanism MUST be there: challenge, then success.
    let mut rig = Rig::new();
    let challenge = rig.ask_unsigned(ALLOCATE, &[transport(17)]).answer();
    assert_eq!(challenge.code(), 401);
    assert!(challenge.has(REALM) && challenge.has(NONCE));
    assert_eq!(rig.allocate(&[]).code(), 0);
}

#[test]
fn each_new_client_address_gets_a_nonce_of_its_own() {
    // RFC 8656 §5: a new random nonce SHOULD be generated when an allocation is first attempted.
    let mut rig = Rig::new();
    let mut nonces = Vec::new();
    for port in 5000..5064 {
        rig.client(&format!("203.0.113.1:{port}"));
        let challenge = rig.ask_unsigned(ALLOCATE, &[transport(17)]).answer();
        nonces.push(challenge.find(NONCE).expect("a nonce").to_vec());
    }
    nonces.sort();
    nonces.dedup();
    assert_eq!(nonces.len(), 64);
}

#[test]
fn a_nonce_expires_within_an_hour() {
    // RFC 8656 §5: the nonce SHOULD expire at least once every hour while the allocation lives.
    let mut rig = Rig::new();
    assert_eq!(rig.allocate(&[lifetime(3600)]).code(), 0);
    rig.pass(1800);
    assert_eq!(rig.refresh(&[lifetime(3600)]).code(), 0);
    rig.pass(1801);
    assert_eq!(rig.refresh(&[lifetime(3600)]).code(), 438);
    rig.forget_nonce();
    assert_eq!(rig.refresh(&[lifetime(3600)]).code(), 0);
}

#[test]
fn another_user_name_on_an_allocation_is_441() {
    // RFC 8656 §5: an authenticated non-Allocate request of another user name MUST be rejected with 441.
    for (method, items) in other_requests() {
        let mut rig = Rig::with(|settings| {
            settings.static_users.push(turn_core::StaticUser { username: b"eve".to_vec(), password: b"eve".to_vec() });
        });
        assert_eq!(rig.allocate(&[]).code(), 0);
        rig.user(b"eve", b"eve");
        let answer = rig.ask(method, &items).answer();
        assert_eq!(answer.code(), 441, "method {method:#x}");
        let key = rig.key();
        assert!(answer.signed_with(&key), "the user is known");
        // Nothing came of it.
        assert!(rig.peer_sends("192.0.2.1:9", b"x").is_silence());
        rig.user(b"user", b"password");
        assert_eq!(rig.refresh(&[]).code(), 0);
    }
}

#[test]
fn an_unauthenticated_request_on_an_allocation_changes_nothing() {
    // RFC 8656 §5: requests after the Allocate use its user name, so that nobody else can take the allocation over.
    for (method, items) in other_requests() {
        let mut rig = Rig::allocated();
        assert_eq!(rig.ask_unsigned(method, &items).code(), 401);
        rig.user(b"user", b"guessed");
        assert_eq!(rig.ask(method, &items).code(), 401);
        assert!(rig.peer_sends("192.0.2.1:9", b"x").is_silence());
        assert_eq!(rig.server.allocations(), 1);
    }
}

#[test]
fn a_request_without_an_allocation_is_437() {
    // RFC 8656 §5: a request whose 5-tuple identifies no allocation MUST be rejected with 437.
    for (method, items) in other_requests() {
        assert_eq!(Rig::new().ask(method, &items).code(), 437, "method {method:#x}");
    }
}

#[test]
fn every_part_of_the_5_tuple_counts() {
    // RFC 8656 §5 and §6: client IP and port, server IP and port, and the protocol between them.
    type Change = fn(&mut Rig);
    let changes: &[(&str, Change)] = &[
        ("client port", |rig| rig.from.client = addr("203.0.113.1:5001")),
        ("client IP", |rig| rig.from.client = addr("203.0.113.2:5000")),
        ("server port", |rig| rig.from.server = addr("198.51.100.1:3479")),
        ("server IP", |rig| rig.from.server = addr("198.51.100.2:3478")),
        ("transport", |rig| rig.from.transport = Transport::Dtls),
        ("stream", |rig| {
            rig.from.transport = Transport::Tcp;
            rig.path = Path::Connection(ConnectionId(7));
        }),
    ];
    for (what, change) in changes {
        let mut rig = Rig::allocated();
        assert_eq!(rig.bind(0x4000, "192.0.2.1:9"), 0);
        change(&mut rig);
        for (method, items) in other_requests() {
            assert_eq!(rig.ask(method, &items).code(), 437, "{what}");
        }
        assert!(rig.channel_data(0x4000, b"x").is_silence(), "{what}");
        assert!(rig.send("192.0.2.1:9", b"x").is_silence(), "{what}");
    }
}

#[test]
fn an_indication_or_channel_data_without_an_allocation_is_ignored() {
    // RFC 8656 §5: it MUST be silently ignored.
    let mut rig = Rig::new();
    assert!(rig.tell(SEND, &[peer(addr("192.0.2.1:9")), data(b"x")]).is_silence());
    assert!(rig.channel_data(0x4000, b"x").is_silence());
}

#[test]
fn software_is_in_authenticated_allocate_and_refresh_answers() {
    // RFC 8656 §5: SOFTWARE SHOULD be in all Allocate and Refresh answers. A stranger's 401 goes without: abuse.md D.
    let mut rig = Rig::new();
    assert!(rig.allocate(&[]).answer().has(SOFTWARE));
    assert!(rig.allocate(&[]).answer().has(SOFTWARE), "437");
    assert!(rig.refresh(&[]).answer().has(SOFTWARE));
    assert!(rig.refresh(&[lifetime(0)]).answer().has(SOFTWARE));
    assert!(rig.refresh(&[]).answer().has(SOFTWARE), "437");
}

#[test]
fn a_fingerprint_is_answered_by_one() {
    // RFC 8656 §5 with RFC 8489 §14.7: either side may include FINGERPRINT; who sends it may need it back.
    let mut rig = Rig::new();
    let signer = rig.signer();
    let id = rig.transaction();
    let builder = crate::support::stun::Builder::new(crate::support::stun::Class::Request, ALLOCATE, id);
    let packet = builder.item(&transport(17)).items(&signer.items()).integrity(&signer.key()).fingerprint().bytes();
    let answer = rig.hand_in(&packet).answer();
    assert_eq!(answer.code(), 0);
    let (last, value) = answer.attributes.last().expect("attributes");
    assert_eq!(*last, crate::support::stun::FINGERPRINT);
    let before = &answer.bytes[..answer.bytes.len() - 8];
    assert_eq!(value, &(crc32fast::hash(before) ^ 0x5354_554E).to_be_bytes());
}

#[test]
fn tcp_tls_and_dtls_are_served_as_udp_is() {
    // RFC 8656 §5: UDP MUST be supported between client and server, TCP, TLS and DTLS SHOULD be.
    for transport in [Transport::Udp, Transport::Tcp, Transport::Tls, Transport::Dtls] {
        let mut rig = Rig::new();
        rig.from.transport = transport;
        if transport.is_stream() {
            rig.path = Path::Connection(ConnectionId(3));
        }
        assert_eq!(rig.allocate(&[]).code(), 0, "{transport:?}");
        assert_eq!(rig.permit("192.0.2.1:0"), 0, "{transport:?}");
        assert_eq!(rig.send("192.0.2.1:9", b"x").peer_gets().2, b"x", "{transport:?}");
    }
}

#[test]
fn a_retransmitted_request_is_idempotent() {
    // RFC 8656 §5: two requests of one 5-tuple and transaction id count as one.
    let mut rig = Rig::new();
    let allocate = rig.signed(ALLOCATE, &[transport(17)]);
    let first = rig.hand_in(&allocate).answer();
    assert_eq!(first.code(), 0);
    for (method, items) in other_requests() {
        let packet = rig.signed(method, &items);
        let first = rig.hand_in(&packet).answer();
        assert_eq!(rig.hand_in(&packet).answer(), first);
        assert_eq!(first.code(), 0);
    }
    assert_eq!(rig.hand_in(&allocate).answer(), first);
    assert_eq!((rig.server.allocations(), rig.desk.held.len()), (1, 1));
}

#[test]
fn the_number_of_allocations_of_a_user_is_limited() {
    // RFC 8656 §5: the server is RECOMMENDED to limit a user name's allocations; one more is 486.
    let mut rig = Rig::new();
    rig.desk.quota = Some(2);
    for (port, expected) in [(5000, 0), (5001, 0), (5002, 486)] {
        rig.client(&format!("203.0.113.1:{port}"));
        assert_eq!(rig.allocate(&[]).code(), expected);
    }
    // One less makes room.
    rig.client("203.0.113.1:5000");
    assert_eq!(rig.refresh(&[lifetime(0)]).code(), 0);
    rig.client("203.0.113.1:5002");
    assert_eq!(rig.allocate(&[]).code(), 0);
}

#[test]
fn relayed_addresses_are_unique() {
    // RFC 8656 §6: the relayed transport address MUST be unique across all allocations.
    let mut rig = Rig::new();
    let mut relayed = Vec::new();
    for port in 5000..5050 {
        rig.client(&format!("203.0.113.1:{port}"));
        relayed.push(rig.allocate(&[]).answer().xor_address(XOR_RELAYED_ADDRESS).expect("there"));
    }
    relayed.sort();
    relayed.dedup();
    assert_eq!(relayed.len(), 50);
}

#[test]
fn a_host_that_gives_an_address_twice_makes_no_second_allocation() {
    // RFC 8656 §6: unique, whatever the host does.
    let mut rig = Rig::new();
    assert_eq!(rig.allocate(&[]).code(), 0);
    let desk = rig.desk.clone();
    rig.desk = crate::support::rig::Desk::default();
    rig.client("203.0.113.1:5001");
    assert_eq!(rig.allocate(&[]).code(), 508);
    assert_eq!(rig.server.allocations(), 1);
    rig.desk = desk;
}

#[test]
fn the_default_lifetime_is_600_seconds() {
    // RFC 8656 §6: each Allocate or Refresh sets the time-to-expiry to 600 s unless asked otherwise.
    let mut rig = Rig::new();
    assert_eq!(rig.allocate(&[]).answer().lifetime(), Some(600));
    rig.pass(599);
    assert_eq!(rig.refresh(&[]).answer().lifetime(), Some(600));
    rig.pass_without_timer(600);
    assert_eq!(rig.refresh(&[]).code(), 437);
}

#[test]
fn only_refresh_refreshes_an_allocation() {
    // RFC 8656 §6: sending data to a peer does not; nor do CreatePermission and ChannelBind.
    let mut rig = Rig::allocated();
    for _ in 0..5 {
        rig.pass(100);
        assert_eq!(rig.permit("192.0.2.1:0"), 0);
        assert_eq!(rig.bind(0x4000, "192.0.2.1:9"), 0);
        assert!(matches!(rig.send("192.0.2.1:9", b"x"), Outcome::Peer { .. }));
        assert!(matches!(rig.channel_data(0x4000, b"x"), Outcome::Peer { .. }));
        assert!(matches!(rig.peer_sends("192.0.2.1:9", b"x"), Outcome::Client { .. }));
    }
    rig.pass_without_timer(100);
    assert!(rig.send("192.0.2.1:9", b"x").is_silence());
    assert_eq!(rig.refresh(&[]).code(), 437);
}

#[test]
fn an_allocation_that_expires_is_freed() {
    // RFC 8656 §6: its state can be freed when it expires, and its port goes back.
    let mut rig = Rig::allocated();
    rig.pass(600);
    assert_eq!((rig.server.allocations(), rig.desk.held.len()), (0, 0));
    assert_eq!(rig.server.poll_timeout(), None);
}

#[test]
fn a_new_allocation_has_no_permission_and_no_channel() {
    // RFC 8656 §7.2: the lists of permissions and channels are initially empty.
    let mut rig = Rig::allocated();
    assert_eq!(rig.bind(0x4000, "192.0.2.1:9"), 0);
    assert_eq!(rig.refresh(&[crate::support::stun::raw(LIFETIME, &[0; 4])]).code(), 0);
    assert_eq!(rig.allocate(&[]).code(), 0);
    assert!(rig.peer_sends("192.0.2.1:9", b"x").is_silence());
    assert!(rig.channel_data(0x4000, b"x").is_silence());
    assert!(rig.send("192.0.2.1:9", b"x").is_silence());
}
