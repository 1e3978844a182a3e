//! §9.2: the long-term credential mechanism.

use crate::support::rig::{Rig, Signer};
use crate::support::stun::{
    ALLOCATE, Builder, CHANNEL_BIND, CREATE_PERMISSION, Class, MESSAGE_INTEGRITY, MESSAGE_INTEGRITY_SHA256, NONCE,
    REALM, REFRESH, Read, USERHASH, USERNAME, md5_key, transport,
};

const METHODS: [u16; 4] = [ALLOCATE, REFRESH, CREATE_PERMISSION, CHANNEL_BIND];

/// A request signed by hand, without what is left out.
fn without(rig: &mut Rig, left_out: u16) -> Read {
    let signer = rig.signer();
    let id = rig.transaction();
    let mut builder = Builder::new(Class::Request, ALLOCATE, id).item(&transport(17));
    for (kind, value) in [(USERNAME, &signer.username), (REALM, &signer.realm), (NONCE, &signer.nonce)] {
        if kind != left_out {
            builder = builder.attribute(kind, value);
        }
    }
    rig.hand_in(&builder.integrity(&signer.key()).bytes()).answer()
}

fn allocate_as(rig: &mut Rig, signer: &Signer) -> Read {
    let packet = rig.signed_by(signer, ALLOCATE, &[transport(17)]);
    rig.hand_in(&packet).answer()
}

#[test]
fn a_nonce_begins_with_the_cookie_and_the_features() {
    // RFC 8489 §9.2: "obMatJos2" and four characters of base64 of 24 bits MUST stand before the nonce.
    let challenge = Rig::new().ask_unsigned(ALLOCATE, &[]).answer();
    let nonce = challenge.find(NONCE).expect("a nonce");
    assert!(nonce.starts_with(b"obMatJos2"));
    let features = &nonce[9..13];
    let base64 = |byte: &u8| byte.is_ascii_alphanumeric() || [b'+', b'/'].contains(byte);
    assert!(features.iter().all(base64));
    // §18.1: bits 2 to 23 are not assigned: of the first six bits only the top two may be set.
    assert!([b'A', b'g', b'w', b'Q'].contains(&features[0]), "{features:?}");
    assert_eq!(&features[1..], b"AAA");
}

#[test]
fn no_integrity_is_401_with_realm_and_nonce() {
    // RFC 8489 §9.2.4, first check: MUST be 401, MUST have REALM and NONCE.
    for method in METHODS {
        let mut rig = Rig::new();
        let answer = rig.ask_unsigned(method, &[transport(17)]).answer();
        assert_eq!(answer.code(), 401);
        assert_eq!(answer.find(REALM), Some(rig.settings.realm.as_bytes()));
        assert!(answer.find(NONCE).is_some_and(|nonce| !nonce.is_empty()));
        // SHOULD NOT have these.
        for absent in [USERNAME, USERHASH, MESSAGE_INTEGRITY, MESSAGE_INTEGRITY_SHA256] {
            assert!(!answer.has(absent), "{absent:#x}");
        }
    }
}

#[test]
fn a_username_without_integrity_is_401_too() {
    // RFC 8489 §9.2.4, first check: it is the integrity that is looked for.
    let mut rig = Rig::new();
    let signer = rig.signer();
    let items = [&[transport(17)], &signer.items()[..]].concat();
    assert_eq!(rig.ask_unsigned(ALLOCATE, &items).code(), 401);
}

#[test]
fn two_clients_never_get_the_same_nonce() {
    // RFC 8489 §9.2.4: the server MUST NOT choose the same NONCE for two requests unless IP address and port are the
    // same.
    let mut rig = Rig::new();
    let mut nonces = Vec::new();
    for ip in 1..20 {
        for port in 5000..5020 {
            rig.client(&format!("203.0.113.{ip}:{port}"));
            nonces.push(rig.ask_unsigned(ALLOCATE, &[]).answer().find(NONCE).expect("a nonce").to_vec());
        }
    }
    let all = nonces.len();
    nonces.sort();
    nonces.dedup();
    assert_eq!(nonces.len(), all);
}

#[test]
fn integrity_without_username_realm_or_nonce_is_400() {
    // RFC 8489 §9.2.4, second check: MUST be 400; it SHOULD NOT include USERNAME, USERHASH, NONCE or REALM.
    for left_out in [USERNAME, REALM, NONCE] {
        let answer = without(&mut Rig::new(), left_out);
        assert_eq!(answer.code(), 400);
        for absent in [USERNAME, USERHASH, NONCE, REALM, MESSAGE_INTEGRITY, MESSAGE_INTEGRITY_SHA256] {
            assert!(!answer.has(absent), "{absent:#x} without {left_out:#x}");
        }
    }
    assert_eq!(without(&mut Rig::new(), 0).code(), 0);
}

#[test]
fn an_invalid_user_is_401_with_realm_and_nonce() {
    // RFC 8489 §9.2.4: a USERNAME that is not valid MUST be 401, MUST have REALM and NONCE.
    for name in [&b"nobody"[..], b"", b"User", b"user\0", b"user ", b"\xFF\xFE"] {
        let mut rig = Rig::new();
        rig.user(name, b"password");
        let answer = rig.allocate(&[]).answer();
        assert_eq!(answer.code(), 401, "{name:?}");
        assert!(answer.has(REALM) && answer.has(NONCE));
        assert!(!answer.has(USERNAME) && !answer.has(USERHASH));
        assert_eq!(rig.server.allocations(), 0);
    }
}

#[test]
fn a_wrong_integrity_is_401_with_realm_and_nonce() {
    // RFC 8489 §9.2.4: MUST be rejected with 401, MUST have REALM and NONCE, SHOULD NOT have USERNAME or integrity.
    let mut rig = Rig::new();
    let good = rig.signed(ALLOCATE, &[transport(17)]);
    for byte in (20..28).chain(good.len() - 20..good.len()) {
        let mut packet = good.clone();
        packet[byte] ^= 1;
        if rig.hand_in(&packet).is_silence() {
            // The grammar broke.
            continue;
        }
        let answer = rig.hand_in(&packet).answer();
        assert_eq!(answer.code(), 401, "byte {byte}");
        assert!(answer.has(REALM) && answer.has(NONCE));
        for absent in [USERNAME, USERHASH, MESSAGE_INTEGRITY, MESSAGE_INTEGRITY_SHA256] {
            assert!(!answer.has(absent));
        }
    }
    assert_eq!(rig.server.allocations(), 0);
}

#[test]
fn an_unknown_user_and_a_wrong_password_cannot_be_told_apart() {
    // RFC 8489 §9.2.4 gives both the same answer; nothing else in it differs.
    let mut rig = Rig::new();
    let signer = rig.signer();
    let wrong = Signer { password: b"guess".to_vec(), ..signer.clone() };
    let unknown = Signer { username: b"resu".to_vec(), ..signer };
    let [first, second] = [wrong, unknown].map(|signer| {
        let builder = Builder::new(Class::Request, ALLOCATE, [5; 12]).item(&transport(17));
        let packet = builder.items(&signer.items()).integrity(&signer.key()).bytes();
        rig.hand_in(&packet).answer()
    });
    assert_eq!(first, second);
}

#[test]
fn a_stale_nonce_is_438_with_a_valid_one() {
    // RFC 8489 §9.2.4: MUST be 438, MUST have NONCE and REALM, SHOULD NOT have USERNAME; the NONCE MUST be valid.
    let mut rig = Rig::new();
    let mut signer = rig.signer();
    let mut stale = vec![b"garbage".to_vec(), Vec::new(), b"obMatJos2AAAA".to_vec(), vec![b'x'; 127]];
    let mut foreign = Rig::new();
    foreign.client("203.0.113.1:5001");
    stale.push(foreign.signer().nonce);
    for nonce in stale {
        let mut rig = Rig::new();
        rig.signer();
        signer.nonce = nonce;
        let answer = allocate_as(&mut rig, &signer);
        assert_eq!(answer.code(), 438);
        assert!(answer.has(REALM) && !answer.has(USERNAME) && !answer.has(USERHASH));
        signer.nonce = answer.find(NONCE).expect("a nonce").to_vec();
        assert_eq!(allocate_as(&mut rig, &signer).code(), 0);
    }
    rig.pass(3601);
    let mut signer = rig.signer();
    let answer = allocate_as(&mut rig, &signer);
    assert_eq!(answer.code(), 438);
    signer.nonce = answer.find(NONCE).expect("a nonce").to_vec();
    assert_eq!(allocate_as(&mut rig, &signer).code(), 0);
}

#[test]
fn the_nonce_is_checked_last() {
    // RFC 8489 §9.2.4: in the order given: a wrong password with a stale nonce is 401.
    let mut rig = Rig::new();
    let mut signer = rig.signer();
    signer.nonce = b"garbage".to_vec();
    signer.password = b"wrong".to_vec();
    assert_eq!(allocate_as(&mut rig, &signer).code(), 401);
}

#[test]
fn every_answer_to_who_is_known_is_signed() {
    // RFC 8489 §9.2.4: any response MUST have the integrity of the credentials that authenticated the request:
    // MESSAGE-INTEGRITY, for there was no algorithm chosen; REALM, NONCE, USERNAME, USERHASH SHOULD NOT be there.
    let mut rig = Rig::new();
    let key = rig.key();
    let answers = [
        rig.refresh(&[]).answer(),
        rig.ask(ALLOCATE, &[]).answer(),
        rig.ask(ALLOCATE, &[transport(1)]).answer(),
        rig.allocate(&[crate::support::stun::raw(0x7FFF, &[])]).answer(),
        rig.allocate(&[]).answer(),
        rig.allocate(&[]).answer(),
        rig.ask(CREATE_PERMISSION, &[]).answer(),
        rig.ask(CHANNEL_BIND, &[]).answer(),
        rig.refresh(&[crate::support::stun::lifetime(0)]).answer(),
    ];
    assert_eq!(answers.each_ref().map(Read::code), [437, 400, 442, 420, 0, 437, 400, 400, 0]);
    for answer in answers {
        assert!(answer.signed_with(&key), "{answer:?}");
        for absent in [REALM, NONCE, USERNAME, USERHASH, MESSAGE_INTEGRITY_SHA256] {
            assert!(!answer.has(absent), "{absent:#x}");
        }
    }
}

#[test]
fn the_key_is_the_md5_of_name_realm_and_password() {
    // RFC 8489 §9.2.2 and §18.5.1.1.
    let mut rig = Rig::new();
    let answer = rig.allocate(&[]).answer();
    assert!(answer.signed_with(&md5_key(b"user", b"turnpike", b"password")));
}

#[test]
fn a_nonce_has_fewer_than_128_characters() {
    // RFC 8489 §14.10: MUST be fewer than 128, of qdtext.
    let challenge = Rig::new().ask_unsigned(ALLOCATE, &[]).answer();
    let nonce = challenge.find(NONCE).expect("a nonce");
    assert!(nonce.len() < 128);
    assert!(nonce.iter().all(|byte| byte.is_ascii_graphic() && ![b'"', b'\\'].contains(byte)));
}

#[test]
fn the_realm_is_what_is_configured() {
    // RFC 8489 §14.9: fewer than 128 characters of UTF-8, without quotes.
    for realm in ["example.org", "turn.example.org", "bücher.example"] {
        let mut rig = Rig::with(|settings| settings.realm = realm.into());
        let challenge = rig.ask_unsigned(ALLOCATE, &[]).answer();
        assert_eq!(challenge.find(REALM), Some(realm.as_bytes()));
        assert_eq!(rig.allocate(&[]).code(), 0);
    }
}
