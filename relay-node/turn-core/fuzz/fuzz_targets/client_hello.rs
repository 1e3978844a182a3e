//! Any datagram: a ClientHello is found or not, and what was read lies inside.
#![no_main]

use libfuzzer_sys::fuzz_target;
use turn_core::wire::client_hello::ClientHello;

fuzz_target!(|datagram: &[u8]| {
    if let Some(hello) = ClientHello::read(datagram) {
        // An answer of 13 + 12 + 3 bytes and a cookie of 16 must never be longer than what it answers.
        assert!(datagram.len() >= 13 + 12 + hello.parameters.len() + 1 + hello.cookie.len());
        assert!(datagram.len() > 44 && (35..=67).contains(&hello.parameters.len()));
    }
});
