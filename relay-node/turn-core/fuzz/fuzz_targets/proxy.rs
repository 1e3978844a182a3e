//! Any bytes as a PROXY header: a header ends inside what was given, and more bytes behind it change nothing.
#![no_main]

#[allow(dead_code)]
#[path = "../../../src/dataplane/proxy.rs"]
mod proxy;

use libfuzzer_sys::fuzz_target;
use proxy::{Proxied, encode, header};

fuzz_target!(|bytes: &[u8]| {
    let found = header(bytes);
    match found {
        Proxied::Header { length, ends } => {
            assert!(length > 0 && length <= bytes.len());
            assert_eq!(header(&bytes[..length]), found);
            if let Some((client, server)) = ends
                && client.is_ipv4() == server.is_ipv4()
            {
                let written = encode(client, server);
                assert_eq!(header(&written), Proxied::Header { length: written.len(), ends });
            }
        }
        Proxied::No => assert!(!bytes.first().is_some_and(|first| [b'P', b'\r'].contains(first))),
        Proxied::Partial | Proxied::Malformed => {}
    }
});
