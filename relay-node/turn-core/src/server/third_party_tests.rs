//! Third-party authorization (RFC 7635): whom a token lets in, for how long, and what becomes of its key.

use super::super::lab::{Credentials, Lab, NOW, addr, udp};
use crate::third_party::{self, ThirdParty, TokenCipher, TokenKey};
use crate::wire::attribute::{AccessToken, Lifetime, ThirdPartyAuthorization};
use crate::wire::{AttributeType, Integrity, Method};
use crate::{Change, EndReason, Output, Record};

const SERVER_NAME: &str = "turn.example.org";
const MAC_KEY: [u8; 20] = [0xA5; 20];

fn key() -> TokenKey {
    TokenKey { kid: b"kid".to_vec(), cipher: TokenCipher::A256Gcm([9; 32]) }
}

/// A lab that takes tokens.
fn lab() -> Lab {
    let mut lab = Lab::new();
    let third_party = ThirdParty { server_name: SERVER_NAME.into(), keys: vec![key()] };
    lab.configure(|settings| settings.third_party = Some(third_party));
    lab
}

/// A token made at this Unix millisecond, for this many seconds.
fn token(mac_key: &[u8], millis: u64, lifetime: u32) -> Vec<u8> {
    token_of(&key(), mac_key, millis, lifetime)
}

fn token_of(key: &TokenKey, mac_key: &[u8], millis: u64, lifetime: u32) -> Vec<u8> {
    let timestamp = ((millis / 1000) << 16) | ((millis % 1000) * 64);
    third_party::seal(key, SERVER_NAME, mac_key, timestamp, lifetime)
}

fn credentials(lab: &Lab) -> Credentials {
    Credentials { username: b"kid".to_vec(), session_key: Some(MAC_KEY.to_vec()), ..lab.credentials() }
}

fn allocate(lab: &mut Lab, with: &Credentials, token: &[u8]) -> u16 {
    let reply = lab.signed(with, Method::Allocate, |writer| {
        udp(writer);
        writer.attribute(&AccessToken(token));
    });
    reply.code()
}

fn refresh(lab: &mut Lab, with: &Credentials, token: Option<&[u8]>, lifetime: u32) -> Result<u32, u16> {
    let reply = lab.signed(with, Method::Refresh, |writer| {
        writer.attribute(&Lifetime(lifetime));
        if let Some(token) = token {
            writer.attribute(&AccessToken(token));
        }
    });
    match (reply.code(), reply.message().attribute()) {
        (0, Ok(Some(Lifetime(granted)))) => Ok(granted),
        (code, _) => Err(code),
    }
}

fn record(lab: &mut Lab) -> Record {
    match lab.changes().pop() {
        Some(Change::Put(record)) => *record,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_challenge_names_the_server() {
    // RFC 7635 §4, §6.1.
    let reply = lab().unsigned(Method::Allocate, udp);
    assert_eq!(reply.code(), 401);
    assert_eq!(reply.message().attribute(), Ok(Some(ThirdPartyAuthorization(SERVER_NAME.as_bytes()))));
    assert!(!Lab::new().unsigned(Method::Allocate, udp).message().contains(AttributeType::THIRD_PARTY_AUTHORIZATION));
}

#[test]
fn whom_a_token_lets_in() {
    // RFC 7635 §7.
    type Change = fn(&mut Credentials, &mut Vec<u8>);
    let cases: &[(&str, Change, u16)] = &[
        ("right", |_, _| {}, 0),
        ("MESSAGE-INTEGRITY-SHA256", |with, _| with.integrity = Integrity::Sha256, 0),
        ("the session key as coturn uses it", |with, _| with.session_key = Some(MAC_KEY[..16].to_vec()), 0),
        ("less of the session key", |with, _| with.session_key = Some(MAC_KEY[..15].to_vec()), 401),
        ("another session key", |with, _| with.session_key = Some(vec![1; 20]), 401),
        ("a password", |with, _| with.session_key = None, 401),
        ("unknown kid", |with, _| with.username = b"dik".to_vec(), 401),
        ("a token that was changed", |_, token| token[30] ^= 1, 401),
        ("garbage", |_, token| *token = b"garbage".to_vec(), 401),
        ("empty", |_, token| token.clear(), 401),
        ("expired", |_, token| *token = self::token(&MAC_KEY, NOW - 3_606_000, 3600), 401),
        ("not yet", |_, token| *token = self::token(&MAC_KEY, NOW + 3_606_000, 3600), 401),
        ("nonce of another", |with, _| with.nonce = b"garbage".to_vec(), 438),
        ("another realm", |with, _| with.realm = b"elsewhere".to_vec(), 401),
    ];
    for (what, change, expected) in cases {
        let mut lab = lab();
        let mut with = credentials(&lab);
        let mut token = token(&MAC_KEY, NOW, 3600);
        change(&mut with, &mut token);
        let reply = lab.signed(&with, Method::Allocate, |writer| {
            udp(writer);
            writer.attribute(&AccessToken(&token));
        });
        assert_eq!(reply.code(), *expected, "{what}");
        // RFC 7635 §7: every answer after that is signed with the session key.
        let signed = with.integrity_key().verifies(&reply.message());
        assert_eq!(signed, matches!(expected, 0 | 438), "{what}");
        assert_eq!(lab.server.allocations(), usize::from(*expected == 0), "{what}");
    }
}

#[test]
fn other_requests_go_by_the_key_of_the_token() {
    // RFC 7635 §9: ACCESS-TOKEN is for Allocate and Refresh only.
    let mut lab = lab();
    let with = credentials(&lab);
    assert_eq!(allocate(&mut lab, &with, &token(&MAC_KEY, NOW, 3600)), 0);
    let permit = |lab: &mut Lab, with: &Credentials, token: Option<&[u8]>| {
        let reply = lab.signed(with, Method::CreatePermission, |writer| {
            writer.attribute(&crate::wire::attribute::XorPeerAddress(addr("192.0.2.1:9")));
            if let Some(token) = token {
                writer.attribute(&AccessToken(token));
            }
        });
        assert_eq!(with.integrity_key().verifies(&reply.message()), reply.code() != 401);
        reply.code()
    };
    assert_eq!(permit(&mut lab, &with, None), 0);
    assert_eq!(permit(&mut lab, &with, Some(b"whatever")), 0);
    let mut wrong = with.clone();
    wrong.session_key = Some(vec![1; 20]);
    assert_eq!(permit(&mut lab, &wrong, None), 401);
    // A token is no way to put another key into place but by Allocate and Refresh.
    assert_eq!(permit(&mut lab, &wrong, Some(&token(&[1; 20], NOW, 3600))), 401);
    assert_eq!(refresh(&mut lab, &with, None, 900), Ok(900));
    // Somebody else's credentials are somebody else's.
    assert_eq!(lab.refresh(600), 441);
}

#[test]
fn an_allocation_lives_no_longer_than_its_token() {
    // RFC 7635 §9.
    let mut lab = lab();
    let with = credentials(&lab);
    assert_eq!(allocate(&mut lab, &with, &token(&MAC_KEY, NOW, 700)), 0);
    assert_eq!(refresh(&mut lab, &with, None, 3600), Ok(700));
    lab.pass(300);
    // lifetime + Delta - abs(RDnew - TS)
    assert_eq!(refresh(&mut lab, &with, None, 3600), Ok(400));
    assert_eq!(refresh(&mut lab, &with, Some(&token(&MAC_KEY, NOW, 700)), 3600), Ok(405));
    // A new token goes on, with its own key.
    let mut renewed = with.clone();
    renewed.session_key = Some(vec![0x5A; 32]);
    let now = lab.now.wall;
    assert_eq!(refresh(&mut lab, &renewed, Some(&token(&[0x5A; 32], now, 1000)), 3600), Ok(1000));
    assert_eq!(refresh(&mut lab, &renewed, None, 3600), Ok(1000));
    assert_eq!(refresh(&mut lab, &with, None, 3600), Err(401));
    lab.outputs();
    lab.pass(1001);
    lab.timeout();
    assert!(matches!(lab.changes()[..], [Change::End { reason: EndReason::Expired, .. }]));
    assert_eq!(refresh(&mut lab, &renewed, None, 3600), Err(401));
}

#[test]
fn an_allocation_goes_on_under_another_kid() {
    // RFC 7635 §9: the new token refreshes what the old one made. Its authorization server has a new key.
    let mut lab = lab();
    let old = credentials(&lab);
    assert_eq!(allocate(&mut lab, &old, &token(&MAC_KEY, NOW, 3600)), 0);
    let next = TokenKey { kid: b"next".to_vec(), cipher: TokenCipher::A128Gcm([3; 16]) };
    let keys = vec![next.clone()];
    lab.configure(|settings| settings.third_party = Some(ThirdParty { server_name: SERVER_NAME.into(), keys }));
    // The old key is gone: no new tokens of it, but what it made goes on until it is refreshed.
    assert_eq!(refresh(&mut lab, &old, Some(&token(&MAC_KEY, NOW, 3600)), 900), Err(401));
    assert_eq!(refresh(&mut lab, &old, None, 900), Ok(900));
    let mut new = Credentials { username: b"next".to_vec(), session_key: Some(vec![4; 20]), ..old.clone() };
    assert_eq!(refresh(&mut lab, &new, Some(&token_of(&next, &[4; 20], NOW, 1800)), 3600), Ok(1800));
    assert_eq!(refresh(&mut lab, &new, None, 900), Ok(900));
    assert_eq!(refresh(&mut lab, &old, None, 900), Err(401));
    new.username = b"nobody".to_vec();
    assert_eq!(refresh(&mut lab, &new, None, 900), Err(401));
    // It is counted for whom it was counted for.
    lab.outputs();
    new.username = b"next".to_vec();
    assert_eq!(refresh(&mut lab, &new, None, 0), Ok(0));
    let released = lab.outputs().into_iter().find_map(|output| match output {
        Output::Release { quota_key, .. } => Some(quota_key),
        _ => None,
    });
    assert_eq!(released.as_deref(), Some(&lab.host.quota_keys[0][..]));
}

#[test]
fn each_token_has_a_quota_of_its_own() {
    // One kid serves many clients.
    let mut lab = lab();
    let mut first = credentials(&lab);
    assert_eq!(allocate(&mut lab, &first, &token(&MAC_KEY, NOW, 3600)), 0);
    assert_eq!(allocate_elsewhere(&mut lab, &mut first, &MAC_KEY), 0);
    let mut second = credentials(&lab);
    assert_eq!(allocate_elsewhere(&mut lab, &mut second, &[1; 20]), 0);
    let keys = &lab.host.quota_keys;
    assert_eq!(keys[0], keys[1]);
    assert_ne!(keys[0], keys[2]);
    assert!(keys.iter().all(|key| key.starts_with(b"kid#")));
}

fn allocate_elsewhere(lab: &mut Lab, with: &mut Credentials, mac_key: &[u8]) -> u16 {
    let port = lab.from.client.port() + 1;
    lab.client(addr(&format!("203.0.113.9:{port}")));
    with.nonce = lab.nonce_for(&format!("203.0.113.9:{port}"));
    with.session_key = Some(mac_key.to_vec());
    allocate(lab, with, &token(mac_key, NOW, 3600))
}

#[test]
fn the_key_outlives_the_process() {
    let mut before = lab();
    let with = credentials(&before);
    assert_eq!(allocate(&mut before, &with, &token(&MAC_KEY, NOW, 3600)), 0);
    let record = record(&mut before);
    let ring = crate::KeyRing::default();
    let read = Record::open(&record.seal(&ring), &ring).expect("our own record");
    assert_eq!(read, record);

    let mut lab = lab();
    lab.restore(read);
    lab.outputs();
    assert_eq!(refresh(&mut lab, &with, None, 900), Ok(900));
    // A retransmission of what ends it finds nobody, and is nobody.
    assert_eq!(refresh(&mut lab, &with, None, 0), Ok(0));
    assert!(lab.outputs().iter().any(|output| matches!(output, Output::Release { .. })));
    assert_eq!(refresh(&mut lab, &with, Some(&token(&MAC_KEY, NOW, 3600)), 0), Err(437));
}

#[test]
fn without_authorization_servers_a_token_is_unknown() {
    // RFC 7635 §7: 420, once it is clear who asks.
    let mut lab = Lab::new();
    let reply = lab.request(Method::Allocate, |writer| {
        udp(writer);
        writer.attribute(&AccessToken(&token(&MAC_KEY, NOW, 3600)));
    });
    assert_eq!(reply.code(), 420);
    let with = credentials(&lab);
    assert_eq!(allocate(&mut lab, &with, &token(&MAC_KEY, NOW, 3600)), 401);
}

#[test]
fn an_authorization_server_is_enough() {
    let mut lab = lab();
    lab.configure(|settings| {
        settings.rest_secrets.0.clear();
        settings.static_users.clear();
    });
    let with = credentials(&lab);
    assert_eq!(allocate(&mut lab, &with, &token(&MAC_KEY, NOW, 3600)), 0);
}
