//! Any bytes as a DTLS ClientHello: what is read lies in the datagram, in order, and does not depend on what follows.
#![no_main]

use libfuzzer_sys::fuzz_target;
use turn_core::wire::client_hello::ClientHello;

fuzz_target!(|bytes: &[u8]| {
    let Some(hello) = ClientHello::read(bytes) else { return };
    let at = |part: &[u8]| part.as_ptr() as usize - bytes.as_ptr() as usize;
    let end = at(hello.parameters) + hello.parameters.len();
    assert!(at(hello.parameters) == 25 && end < bytes.len());
    assert!((35..=67).contains(&hello.parameters.len()));
    assert_eq!(usize::from(bytes[end]), hello.cookie.len());
    assert!(hello.cookie.is_empty() || at(hello.cookie) == end + 1);
    assert!(hello.record_sequence < 1 << 48);
    // Only the first record counts.
    let record = 13 + usize::from(u16::from_be_bytes([bytes[11], bytes[12]]));
    assert_eq!(ClientHello::read(&bytes[..record]), Some(hello));
});
