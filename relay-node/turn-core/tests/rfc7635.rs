//! RFC 7635 (third-party authorization): what it demands of a server, one test a rule. Tokens are sealed here, by the
//! letter of §6.2, as an authorization server would.

mod support;

use aes_gcm::aead::{Aead, Payload};
use aes_gcm::{Aes256Gcm, KeyInit};
use support::addr;
use support::rig::{Rig, Signer};
use support::stun::{
    ACCESS_TOKEN, ALLOCATE, BINDING, Builder, CREATE_PERMISSION, Class, Item, NONCE, REALM, REFRESH, Read,
    THIRD_PARTY_AUTHORIZATION, USERNAME, lifetime, peer, raw, transport,
};
use turn_core::third_party::{ThirdParty, TokenCipher, TokenKey};

const KEY: [u8; 32] = [7; 32];
const KID: &[u8] = b"north";
/// 160 bits (§6.2).
const MAC_KEY: &[u8] = b"ZksjpweoixXmvn67534m";
const SERVER: &str = "turn.example.org";
/// Unix seconds at which the rig begins.
const NOW: u64 = support::EPOCH / 1000;

fn rig() -> Rig {
    Rig::with(|settings| {
        let keys = vec![TokenKey { kid: KID.to_vec(), cipher: TokenCipher::A256Gcm(KEY) }];
        settings.third_party = Some(ThirdParty { server_name: SERVER.into(), keys });
    })
}

/// RFC 7635 §6.2: nonce length, nonce, then sealed: key length, key, timestamp, lifetime.
fn token_of(key: [u8; 32], server: &str, issued_at: u64, seconds: u32) -> Vec<u8> {
    let mut block = (MAC_KEY.len() as u16).to_be_bytes().to_vec();
    block.extend(MAC_KEY);
    block.extend((issued_at << 16).to_be_bytes());
    block.extend(seconds.to_be_bytes());
    let payload = Payload { msg: &block, aad: server.as_bytes() };
    let sealed = Aes256Gcm::new(&key.into()).encrypt(b"h4j3k2l2n4b5".into(), payload).expect("short");
    [&[0, 12][..], b"h4j3k2l2n4b5", &sealed].concat()
}

fn token(seconds: u32) -> Item {
    raw(ACCESS_TOKEN, &token_of(KEY, SERVER, NOW, seconds))
}

/// A request signed with a session key, as §5 has clients do it.
fn ask_with(rig: &mut Rig, key: &[u8], method: u16, items: &[Item]) -> Read {
    let Signer { realm, nonce, .. } = rig.signer();
    let id = rig.transaction();
    let mut builder = Builder::new(Class::Request, method, id).items(items);
    for (kind, value) in [(USERNAME, KID), (REALM, &realm), (NONCE, &nonce)] {
        builder = builder.attribute(kind, value);
    }
    rig.hand_in(&builder.integrity(key).bytes()).answer()
}

fn ask(rig: &mut Rig, method: u16, items: &[Item]) -> Read {
    ask_with(rig, MAC_KEY, method, items)
}

fn allocate(rig: &mut Rig, items: &[Item]) -> Read {
    ask(rig, ALLOCATE, &[&[transport(17)], items].concat())
}

#[test]
fn a_challenge_names_the_server() {
    // RFC 7635 §6.1: THIRD-PARTY-AUTHORIZATION tells that it is supported, and holds the server's name.
    let mut rig = rig();
    let software = raw(0x8022, &[b'x'; 100]);
    let challenge = rig.ask_unsigned(ALLOCATE, &[transport(17), software]).answer();
    assert_eq!(challenge.code(), 401);
    assert_eq!(challenge.find(THIRD_PARTY_AUTHORIZATION), Some(SERVER.as_bytes()));
    assert!(!Rig::new().ask_unsigned(ALLOCATE, &[]).answer().has(THIRD_PARTY_AUTHORIZATION));
}

#[test]
fn a_token_lets_in() {
    // RFC 7635 §7: the token is opened with the key that USERNAME names, the integrity verified with its mac_key. §4.1.1:
    // A256GCM MUST be supported; §6.2: a key of 160 bits MUST be.
    let mut rig = rig();
    assert_eq!(allocate(&mut rig, &[token(3600)]).code(), 0);
    assert_eq!(rig.server.allocations(), 1);
}

#[test]
fn answers_are_signed_with_the_session_key() {
    // RFC 7635 §7: any response MUST have MESSAGE-INTEGRITY computed with mac_key.
    let mut rig = rig();
    for (method, items) in [
        (ALLOCATE, vec![transport(17), token(3600)]),
        (ALLOCATE, vec![transport(17), token(3600)]),
        (REFRESH, vec![token(3600)]),
        (CREATE_PERMISSION, vec![peer(addr("192.0.2.1:9"))]),
        (CREATE_PERMISSION, vec![]),
        (REFRESH, vec![token(3600), raw(0x7FFF, &[])]),
    ] {
        let answer = ask(&mut rig, method, &items);
        assert!(answer.signed_with(MAC_KEY), "{answer:?}");
    }
}

#[test]
fn a_token_that_is_not_authentic_is_401() {
    // RFC 7635 §7: one that does not decrypt, of another key, or for another server (§6.2: the name is the associated
    // data, so that a token is of no use elsewhere).
    let mut flipped = token_of(KEY, SERVER, NOW, 3600);
    flipped[20] ^= 1;
    let cases = [
        token_of([8; 32], SERVER, NOW, 3600),
        token_of(KEY, "other.example.org", NOW, 3600),
        flipped,
        Vec::new(),
        vec![0; 3],
        token_of(KEY, SERVER, NOW, 3600)[..40].to_vec(),
    ];
    for bytes in cases {
        assert_eq!(allocate(&mut rig(), &[raw(ACCESS_TOKEN, &bytes)]).code(), 401, "{bytes:?}");
    }
}

#[test]
fn a_wrong_session_key_is_401() {
    // RFC 7635 §7 with RFC 8489 §9.2.4: the integrity MUST be of mac_key.
    let mut rig = rig();
    let answer = ask_with(&mut rig, b"another key of 20 by", ALLOCATE, &[transport(17), token(3600)]);
    assert_eq!(answer.code(), 401);
    assert!(answer.has(REALM) && answer.has(NONCE));
}

#[test]
fn a_token_of_another_time_is_401() {
    // RFC 7635 §7: lifetime + Delta > |now - timestamp|, Delta RECOMMENDED to be 5 s; else 401.
    let cases = [(NOW - 104, 0), (NOW - 105, 401), (NOW + 104, 0), (NOW + 105, 401), (0, 401)];
    for (issued_at, expected) in cases {
        let item = raw(ACCESS_TOKEN, &token_of(KEY, SERVER, issued_at, 100));
        let code = allocate(&mut rig(), &[item]).code();
        assert_eq!(code, expected, "{}", issued_at as i64 - NOW as i64);
    }
}

#[test]
fn the_lifetime_is_within_the_tokens() {
    // RFC 7635 §9: the lifetime in Allocate and Refresh answers MUST NOT be longer than the token's.
    for (seconds, asked, most) in [(3600, 600, 3600), (300, 600, 300), (100, 3600, 100), (2000, 3600, 2000)] {
        let mut rig = rig();
        let granted = allocate(&mut rig, &[token(seconds), lifetime(asked)]).lifetime().expect("there");
        assert!(granted <= most && granted > 0, "{granted} of {seconds}");
        let granted = ask(&mut rig, REFRESH, &[token(seconds), lifetime(asked)]).lifetime().expect("there");
        assert!(granted <= most && granted > 0, "{granted} of {seconds}");
        rig.pass_without_timer(u64::from(seconds));
        assert!(rig.channel_data(0x4000, b"x").is_silence());
    }
}

#[test]
fn requests_in_between_need_no_token() {
    // RFC 7635 §9: ACCESS-TOKEN is in Allocate and Refresh only; other requests use the same session key.
    let mut rig = rig();
    assert_eq!(allocate(&mut rig, &[token(3600)]).code(), 0);
    assert_eq!(ask(&mut rig, CREATE_PERMISSION, &[peer(addr("192.0.2.1:9"))]).code(), 0);
    assert_eq!(
        ask_with(&mut rig, b"another key of 20 by", CREATE_PERMISSION, &[peer(addr("192.0.2.2:9"))]).code(),
        401
    );
}

#[test]
fn without_a_token_there_is_no_allocation() {
    // RFC 7635 §7: a kid alone is no user.
    assert_eq!(allocate(&mut rig(), &[]).code(), 401);
}

#[test]
fn one_token_makes_several_allocations() {
    // RFC 7635 §9: it can be reused for multiple Allocate requests to the same server.
    let mut rig = rig();
    for port in 5000..5003 {
        rig.client(&format!("203.0.113.1:{port}"));
        assert_eq!(allocate(&mut rig, &[token(3600)]).code(), 0);
    }
    assert_eq!(rig.server.allocations(), 3);
}

#[test]
fn a_new_token_refreshes_an_allocation() {
    // RFC 7635 §9: the client MUST use the new token to refresh existing allocations, so the server must take it.
    let mut rig = rig();
    assert_eq!(allocate(&mut rig, &[token(700)]).code(), 0);
    rig.pass(500);
    let newer = raw(ACCESS_TOKEN, &token_of(KEY, SERVER, NOW + 500, 700));
    assert_eq!(ask(&mut rig, REFRESH, &[newer]).lifetime(), Some(600));
}

#[test]
fn first_party_users_go_on() {
    // RFC 7635 §6.1: a client that does not know it defaults to first-party authentication.
    let mut rig = rig();
    assert_eq!(rig.allocate(&[]).code(), 0);
}

#[test]
fn switched_off_the_token_is_unknown() {
    // RFC 7635 §6.2 with RFC 8489 §6.3.1: ACCESS-TOKEN is comprehension-required: 420 where it is not offered.
    let mut rig = Rig::new();
    let answer = rig.allocate(&[token(3600)]).answer();
    assert_eq!((answer.code(), answer.unknown_attributes()), (420, vec![ACCESS_TOKEN]));
    let answer = rig.ask_unsigned(BINDING, &[token(3600)]).answer();
    assert_eq!((answer.code(), answer.unknown_attributes()), (420, vec![ACCESS_TOKEN]));
}
