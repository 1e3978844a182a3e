//! Any bytes as a NONCE: fresh is only what was minted for this client, in time, under a live key.
#![no_main]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use turn_core::nonce::{Freshness, Nonce, SecurityFeatures, verify};
use turn_core::{Key, KeyRing};

const NOW: u64 = 1_800_000_000;
const CLIENT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1)), 5000);

static KEYS: LazyLock<KeyRing> = LazyLock::new(|| KeyRing(vec![Key { id: 1, secret: b"nonce key".to_vec() }]));
static MINTED: LazyLock<Nonce> = LazyLock::new(|| {
    let features = SecurityFeatures { password_algorithms: true, username_anonymity: false };
    Nonce::mint(&KEYS, CLIENT, NOW, features).expect("a key")
});

fuzz_target!(|bytes: &[u8]| {
    let _ = SecurityFeatures::of(bytes);
    let ours = [MINTED.as_bytes().to_vec(), MINTED.shortened().as_bytes().to_vec()];
    let fresh = verify(&KEYS, bytes, CLIENT, NOW, 3600) == Freshness::Fresh;
    assert_eq!(fresh, ours.iter().any(|nonce| nonce == bytes));
    // A nonce with some of its bytes changed.
    let mut changed = ours[bytes.len() % 2].clone();
    for (at, byte) in bytes.iter().enumerate().take(changed.len()) {
        changed[at] ^= byte;
    }
    let same = ours.contains(&changed);
    assert_eq!(verify(&KEYS, &changed, CLIENT, NOW, 3600) == Freshness::Fresh, same);
    // The right one, at another time, from elsewhere.
    if let Some((&[t0, t1, t2, p0, p1], _)) = bytes.split_first_chunk::<5>() {
        let age = u64::from(u32::from_be_bytes([0, t0, t1, t2]));
        let client = SocketAddr::new(CLIENT.ip(), u16::from_be_bytes([p0, p1]));
        let fresh = verify(&KEYS, &ours[0], client, NOW + age, 3600) == Freshness::Fresh;
        assert_eq!(fresh, age <= 3600 && client == CLIENT);
    }
});
