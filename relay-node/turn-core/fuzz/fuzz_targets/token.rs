//! Any bytes as an access token (RFC 7635 §6.2): only what was sealed for this server opens; and any bytes sealed under
//! the right key are read or refused.
#![no_main]

use std::sync::LazyLock;

use aes_gcm::aead::{Aead, Payload};
use aes_gcm::{Aes256Gcm, KeyInit};
use libfuzzer_sys::fuzz_target;
use turn_core::third_party::{ThirdParty, TokenCipher, TokenKey};

const KEY: [u8; 32] = [7; 32];
const NOW: u64 = 1_800_000_000_000;

static THIRD_PARTY: LazyLock<ThirdParty> = LazyLock::new(|| ThirdParty {
    server_name: "turn.example.org".into(),
    keys: vec![TokenKey { kid: b"kid".to_vec(), cipher: TokenCipher::A256Gcm(KEY) }],
});

fuzz_target!(|bytes: &[u8]| {
    assert!(THIRD_PARTY.open(b"kid", bytes, NOW).is_none());
    // Any bytes, sealed by somebody who has the key.
    let payload = Payload { msg: bytes, aad: b"turn.example.org" };
    let sealed = Aes256Gcm::new(&KEY.into()).encrypt(b"h4j3k2l2n4b5".into(), payload).expect("short");
    let token = [&[0, 12][..], b"h4j3k2l2n4b5", &sealed].concat();
    assert!(THIRD_PARTY.open(b"other", &token, NOW).is_none());
    if let Some(session) = THIRD_PARTY.open(b"kid", &token, NOW) {
        assert!(session.expires_at > NOW);
        let lifetime = u32::from_be_bytes(bytes[bytes.len() - 4..].try_into().expect("4 bytes"));
        assert!(session.expires_at - NOW <= u64::from(lifetime) * 1000, "RFC 7635 §9");
        let mut changed = token.clone();
        let at = changed.len() / 2;
        changed[at] ^= 1;
        assert!(THIRD_PARTY.open(b"kid", &changed, NOW).is_none());
    }
});
