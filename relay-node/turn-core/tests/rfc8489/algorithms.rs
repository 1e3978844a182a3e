//! §9.2.4, §14.4, §14.6 and §18.5: password algorithms, anonymous names, and protection against bidding down.

use crate::support::rig::{Rig, Signer};
use crate::support::stun::{
    ALLOCATE, Builder, Class, Item, MESSAGE_INTEGRITY, MESSAGE_INTEGRITY_SHA256, NONCE, PASSWORD_ALGORITHM,
    PASSWORD_ALGORITHMS, REALM, REFRESH, Read, USERHASH, USERNAME, lifetime, md5_key, raw, sha256_key, transport,
    userhash,
};

const MD5: [u8; 4] = [0, 1, 0, 0];
const SHA256: [u8; 4] = [0, 2, 0, 0];

/// The offer of a challenge.
fn offer(rig: &mut Rig) -> Vec<u8> {
    rig.ask_unsigned(ALLOCATE, &[]).answer().find(PASSWORD_ALGORITHMS).expect("an offer").to_vec()
}

fn request(rig: &mut Rig, items: &[Item]) -> (Builder, Signer) {
    let signer = rig.signer();
    let id = rig.transaction();
    (Builder::new(Class::Request, ALLOCATE, id).item(&transport(17)).items(&signer.items()).items(items), signer)
}

/// An Allocate as a client of RFC 8489 sends it.
fn modern(rig: &mut Rig, chosen: [u8; 4]) -> (Read, Vec<u8>) {
    let listed = offer(rig);
    let (builder, signer) = request(rig, &[raw(PASSWORD_ALGORITHM, &chosen), raw(PASSWORD_ALGORITHMS, &listed)]);
    let hash = if chosen == SHA256 { sha256_key } else { md5_key };
    let key = hash(&signer.username, &signer.realm, &signer.password);
    (rig.hand_in(&builder.integrity_sha256(&key).bytes()).answer(), key)
}

#[test]
fn an_offer_sets_the_bit_in_the_nonce() {
    // RFC 8489 §9.2.4: with PASSWORD-ALGORITHMS the "Password algorithms" bit MUST be 1; without, it is 0.
    for (sha256, bit) in [(true, 0x80), (false, 0)] {
        let mut rig = Rig::with(|settings| settings.features.sha256 = sha256);
        let challenge = rig.ask_unsigned(ALLOCATE, &[]).answer();
        let nonce = challenge.find(NONCE).expect("a nonce");
        let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let first = alphabet.iter().position(|digit| *digit == nonce[9]).expect("base64") as u8;
        assert_eq!((first << 2) & 0x80, bit);
        assert_eq!(challenge.has(PASSWORD_ALGORITHMS), sha256);
    }
}

#[test]
fn sha_256_is_offered_first() {
    // RFC 8489 §9.2.4: algorithms are listed in preferential order; §18.5.1.1: MD5 is for compatibility only.
    assert_eq!(offer(&mut Rig::new()), [SHA256, MD5].concat());
}

#[test]
fn every_challenge_has_the_offer() {
    // RFC 8489 §9.2.4: 401 for an invalid name and 438 MUST include PASSWORD-ALGORITHMS (as does 401 of the first check).
    let mut rig = Rig::new();
    let listed = offer(&mut rig);
    rig.user(b"nobody", b"x");
    assert_eq!(rig.allocate(&[]).answer().find(PASSWORD_ALGORITHMS), Some(&listed[..]));
    rig.user(b"user", b"wrong");
    assert_eq!(rig.allocate(&[]).answer().find(PASSWORD_ALGORITHMS), Some(&listed[..]));
    rig.user(b"user", b"password");
    rig.pass(4000);
    let stale = rig.allocate(&[]).answer();
    assert_eq!((stale.code(), stale.find(PASSWORD_ALGORITHMS)), (438, Some(&listed[..])));
}

#[test]
fn sha_256_authenticates_and_answers() {
    // RFC 8489 §9.2.4: a request with a chosen algorithm is answered with MESSAGE-INTEGRITY-SHA256; only one of the two
    // integrities is there. REALM, NONCE, USERNAME and USERHASH SHOULD NOT be.
    for chosen in [SHA256, MD5] {
        let mut rig = Rig::new();
        let (answer, key) = modern(&mut rig, chosen);
        assert_eq!(answer.code(), 0);
        assert!(answer.signed_sha256_with(&key) && !answer.has(MESSAGE_INTEGRITY));
        assert!([REALM, NONCE, USERNAME, USERHASH].iter().all(|kind| !answer.has(*kind)));
        assert_eq!(answer.find(MESSAGE_INTEGRITY_SHA256).map(<[u8]>::len), Some(32));
    }
}

#[test]
fn a_request_without_algorithms_is_md5() {
    // RFC 8489 §9.2.4: neither of the two present: processed as though PASSWORD-ALGORITHM were MD5, and answered with
    // MESSAGE-INTEGRITY.
    let mut rig = Rig::new();
    let answer = rig.allocate(&[]).answer();
    assert_eq!(answer.code(), 0);
    let key = rig.key();
    assert!(answer.signed_with(&key) && !answer.has(MESSAGE_INTEGRITY_SHA256));
}

#[test]
fn a_changed_offer_is_400() {
    // RFC 8489 §9.2.4, third check: unless both attributes are there, the list is the one that was sent, and the choice
    // is in it: MUST be 400. So nobody can take SHA-256 out of the offer.
    let listed = offer(&mut Rig::new());
    let cases: Vec<Vec<Item>> = vec![
        vec![raw(PASSWORD_ALGORITHM, &SHA256)],
        vec![raw(PASSWORD_ALGORITHMS, &listed)],
        vec![raw(PASSWORD_ALGORITHM, &MD5), raw(PASSWORD_ALGORITHMS, &MD5)],
        vec![raw(PASSWORD_ALGORITHM, &MD5), raw(PASSWORD_ALGORITHMS, &[MD5, SHA256].concat())],
        vec![raw(PASSWORD_ALGORITHM, &[0, 3, 0, 0]), raw(PASSWORD_ALGORITHMS, &listed)],
        vec![raw(PASSWORD_ALGORITHM, &[0, 2]), raw(PASSWORD_ALGORITHMS, &listed)],
        vec![raw(PASSWORD_ALGORITHM, &[]), raw(PASSWORD_ALGORITHMS, &[])],
    ];
    for items in cases {
        let mut rig = Rig::new();
        let (builder, signer) = request(&mut rig, &items);
        let key = sha256_key(&signer.username, &signer.realm, &signer.password);
        let answer = rig.hand_in(&builder.integrity_sha256(&key).bytes()).answer();
        assert_eq!(answer.code(), 400, "{items:?}");
        assert!(!answer.has(MESSAGE_INTEGRITY_SHA256) && !answer.has(NONCE));
        assert_eq!(rig.server.allocations(), 0);
    }
}

#[test]
fn a_bit_taken_out_of_the_nonce_makes_it_stale() {
    // RFC 8489 §9.2.1: the security features are protected by the nonce: one with a bit changed is not ours.
    let mut rig = Rig::new();
    let mut signer = rig.signer();
    assert_eq!(signer.nonce[9], b'g');
    signer.nonce[9] = b'A';
    let packet = rig.signed_by(&signer, ALLOCATE, &[transport(17)]);
    assert_eq!(rig.hand_in(&packet).code(), 438);
}

#[test]
fn the_sha_256_integrity_is_the_one_that_counts() {
    // RFC 8489 §9.2.4: if MESSAGE-INTEGRITY-SHA256 is there, it is verified; MESSAGE-INTEGRITY beside it is not.
    let listed = offer(&mut Rig::new());
    let items = [raw(PASSWORD_ALGORITHM, &SHA256), raw(PASSWORD_ALGORITHMS, &listed)];
    let mut rig = Rig::new();
    let (builder, signer) = request(&mut rig, &items);
    let key = sha256_key(&signer.username, &signer.realm, &signer.password);
    let wrong = builder.clone().integrity(&key).integrity_sha256(b"wrong").bytes();
    assert_eq!(rig.hand_in(&wrong).code(), 401);
    let right = builder.integrity(b"wrong").integrity_sha256(&key).bytes();
    assert_eq!(rig.hand_in(&right).code(), 0);
}

#[test]
fn what_follows_the_sha_256_integrity_is_ignored() {
    // RFC 8489 §9: but for FINGERPRINT; MESSAGE-INTEGRITY behind it too.
    let listed = offer(&mut Rig::new());
    let items = [raw(PASSWORD_ALGORITHM, &SHA256), raw(PASSWORD_ALGORITHMS, &listed)];
    let mut rig = Rig::new();
    let (builder, signer) = request(&mut rig, &items);
    let key = sha256_key(&signer.username, &signer.realm, &signer.password);
    let builder = builder.integrity_sha256(&key).item(&lifetime(3600)).item(&raw(0x7FFF, &[])).integrity(b"wrong");
    let answer = rig.hand_in(&builder.bytes()).answer();
    assert_eq!((answer.code(), answer.lifetime()), (0, Some(600)));
}

#[test]
fn a_truncated_sha_256_integrity_is_401() {
    // RFC 8489 §14.6: the full 32 bytes unless the usage allows truncation, which RFC 8656 does not.
    let listed = offer(&mut Rig::new());
    let items = [raw(PASSWORD_ALGORITHM, &SHA256), raw(PASSWORD_ALGORITHMS, &listed)];
    let mut rig = Rig::new();
    let (builder, signer) = request(&mut rig, &items);
    let key = sha256_key(&signer.username, &signer.realm, &signer.password);
    for length in [0, 4, 15, 16, 20, 28] {
        // HMAC over a message whose length field ends behind the truncated attribute.
        let mut signed = builder.clone().bytes();
        let end = signed.len() - 20 + 4 + usize::next_multiple_of(length, 4);
        signed[2..4].copy_from_slice(&(end as u16).to_be_bytes());
        let mac = crate::support::stun::hmac_sha256(&key, &signed);
        let packet = builder.clone().attribute(MESSAGE_INTEGRITY_SHA256, &mac[..length]).bytes();
        assert_eq!(rig.hand_in(&packet).code(), 401, "{length}");
    }
    assert_eq!(rig.server.allocations(), 0);
}

#[test]
fn a_name_may_be_sent_as_its_hash() {
    // RFC 8489 §14.4 and §9.2.4: USERHASH is SHA-256 of name ":" realm, and stands for the name.
    let mut rig = Rig::new();
    let signer = rig.signer();
    let build = |hash: &[u8]| {
        let builder = Builder::new(Class::Request, ALLOCATE, [3; 12]).item(&transport(17)).attribute(USERHASH, hash);
        let builder = builder.attribute(REALM, &signer.realm).attribute(NONCE, &signer.nonce);
        builder.integrity(&signer.key()).bytes()
    };
    assert_eq!(rig.hand_in(&build(&userhash(b"nobody", &signer.realm))).code(), 401);
    let answer = rig.hand_in(&build(&userhash(b"user", &signer.realm))).answer();
    assert_eq!(answer.code(), 0);
    assert!(!answer.has(USERHASH) && !answer.has(USERNAME));
    // It is the same user as by name.
    assert_eq!(rig.refresh(&[]).code(), 0);
}

#[test]
fn the_anonymity_bit_is_set_where_every_name_can_be_found() {
    // RFC 8489 §9.2.4: a server that supports anonymous names sets bit 1; a client that sees it MUST use USERHASH, so it
    // must not be seen where names of TURN REST could not be found by it.
    let nonce = |rig: &mut Rig| rig.ask_unsigned(REFRESH, &[]).answer().find(NONCE).expect("a nonce").to_vec();
    let mut rig = Rig::with(|settings| settings.rest_secrets.0.clear());
    assert_eq!(nonce(&mut rig)[9], b'w');
    assert_eq!(nonce(&mut Rig::new())[9], b'g');
}

#[test]
fn switched_off_they_are_unknown() {
    // RFC 8489 §6.3.1: PASSWORD-ALGORITHM and USERHASH are comprehension-required: 420 where they are not known.
    for kind in [PASSWORD_ALGORITHM, USERHASH] {
        let mut rig = Rig::with(|settings| settings.features.sha256 = false);
        let answer = rig.allocate(&[raw(kind, &[0; 32])]).answer();
        assert_eq!((answer.code(), answer.unknown_attributes()), (420, vec![kind]));
    }
}
