//! §9.2.4 and §18.5: password algorithms, and protection against bidding down.

use crate::support::rig::Rig;
use crate::support::stun::{ALLOCATE, PASSWORD_ALGORITHM, PASSWORD_ALGORITHMS, raw, transport};

#[test]
fn a_nonce_that_claims_algorithms_needs_them_to_match() {
    // RFC 8489 §9.2.4, third check: with the bit in the nonce, PASSWORD-ALGORITHM and PASSWORD-ALGORITHMS MUST both be
    // there and match what was sent with this nonce; else 400.
    let mut rig = Rig::new();
    let mut signer = rig.signer();
    signer.nonce = b"obMatJos2gAAAwhatever".to_vec();
    for items in [
        vec![raw(PASSWORD_ALGORITHM, &[0, 2, 0, 0])],
        vec![raw(PASSWORD_ALGORITHMS, &[0, 2, 0, 0])],
        vec![raw(PASSWORD_ALGORITHM, &[0, 9, 0, 0]), raw(PASSWORD_ALGORITHMS, &[0, 9, 0, 0])],
    ] {
        let items = [&[transport(17)], &items[..]].concat();
        let packet = rig.signed_by(&signer, ALLOCATE, &items);
        assert_eq!(rig.hand_in(&packet).code(), 400);
    }
}

#[test]
fn a_request_without_algorithms_is_md5() {
    // RFC 8489 §9.2.4: neither of the two present: processed as though PASSWORD-ALGORITHM were MD5.
    let mut rig = Rig::new();
    let answer = rig.allocate(&[]).answer();
    assert_eq!(answer.code(), 0);
    let key = rig.key();
    assert!(answer.signed_with(&key));
}
