//! Any bytes as a USERNAME: whose quota it is, and whether it has a TURN REST password.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use turn_core::credential::{quota_key, rest_passwords, rest_passwords_of_holder};
use turn_core::third_party::kid_of;
use turn_core::{Key, KeyRing, Settings};

const NOW: u64 = 1_800_000_000;

static SETTINGS: LazyLock<Settings> = LazyLock::new(|| Settings {
    realm: "turnpike".into(),
    rest_secrets: KeyRing(vec![Key { id: 1, secret: b"secret".to_vec() }]),
    ..Settings::default()
});

/// Digits, a colon, a user: the time, if it is a number of 64 bits, and the user.
fn parts(name: &[u8]) -> Option<(Option<u64>, &[u8])> {
    let colon = name.iter().position(|byte| *byte == b':').filter(|colon| *colon > 0)?;
    let digits = name[..colon].iter().all(u8::is_ascii_digit).then(|| &name[..colon])?;
    let time = std::str::from_utf8(digits).ok()?.parse().ok();
    Some((time, &name[colon + 1..]))
}

fuzz_target!(|name: &[u8]| {
    let parts = parts(name);
    assert_eq!(quota_key(name), parts.map_or(name, |(_, user)| user));
    let time = parts.and_then(|(time, _)| time);
    assert_eq!(rest_passwords(&SETTINGS, name, NOW).next().is_some(), time.is_some_and(|time| time > NOW));
    assert_eq!(rest_passwords_of_holder(&SETTINGS, name).next().is_some(), time.is_some());
    if let Some(kid) = kid_of(name) {
        assert!(name.starts_with(kid));
    }
});
