//! PROXY protocol headers, versions 1 and 2: who the client is, said by a load balancer in front of this relay
//! (<https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>). Whoever calls this trusts the source.

use std::net::SocketAddr;

use proxy_header::{Error, ParseConfig, ProxyHeader};

/// First bytes of a header, version 1 and version 2. No STUN message, ChannelData or TLS record begins so.
const FIRST: [u8; 2] = [b'P', b'\r'];
/// Longest header: version 2 with a good many TLVs. Version 1 has 107 bytes at most.
const LONGEST: usize = 4096;

/// What stands at the start of some bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Proxied {
    /// No header.
    No,
    /// The beginning of a header.
    Partial,
    /// A header of `length` bytes.
    Header {
        length: usize,
        /// The client, and the address it came to; none for a connection of the proxy's own (LOCAL, UNKNOWN).
        ends: Option<(SocketAddr, SocketAddr)>,
    },
    /// Begins as a header and is none.
    Malformed,
}

/// Looks for a header at the start of `bytes`. TLVs are skipped.
pub(super) fn header(bytes: &[u8]) -> Proxied {
    if !bytes.first().is_some_and(|first| FIRST.contains(first)) {
        return Proxied::No;
    }
    match ProxyHeader::parse(bytes, ParseConfig { include_tlvs: false, ..ParseConfig::default() }) {
        Ok((_, length)) if length > LONGEST => Proxied::Malformed,
        Ok((header, length)) => {
            let ends = header.proxied_address().map(|ends| (ends.source, ends.destination));
            Proxied::Header { length, ends }
        }
        Err(Error::BufferTooShort) if bytes.len() < LONGEST => Proxied::Partial,
        Err(_) => Proxied::Malformed,
    }
}

/// Looks for a header of version 2 at the start of a datagram; version 1 is for streams only.
pub(super) fn datagram(bytes: &[u8]) -> Proxied {
    if bytes.first() == Some(&FIRST[1]) { header(bytes) } else { Proxied::No }
}

/// The header that tells a server behind this relay who its client is (version 2).
pub(super) fn encode(client: SocketAddr, server: SocketAddr) -> Vec<u8> {
    let header = ProxyHeader::with_address(proxy_header::ProxiedAddress::stream(client, server));
    let mut bytes = [0; 64];
    match header.encode_to_slice_v2(&mut bytes) {
        Ok(length) => bytes[..length].to_vec(),
        // Of two families: one of them is unknown to the server, so say that nothing is known (LOCAL).
        Err(_) => b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0".to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().expect("literal")
    }

    #[test]
    fn headers_of_both_versions_are_read() {
        let (v4, v6) =
            ((at("198.51.100.1:5000"), at("192.0.2.1:443")), (at("[2001:db8::1]:5000"), at("[2001:db8::2]:443")));
        let v2 = |client, server| encode(client, server);
        let mut with_tlv = v2(v4.0, v4.1);
        with_tlv[15] += 5;
        with_tlv.extend([0x04, 0, 2, 9, 9]);
        let mut local = v2(v4.0, v4.1);
        local[12] = 0x20;
        let cases: [(&str, &[u8], Option<_>); 8] = [
            ("v1", b"PROXY TCP4 198.51.100.1 192.0.2.1 5000 443\r\n", Some(v4)),
            ("v1, IPv6", b"PROXY TCP6 2001:db8::1 2001:db8::2 5000 443\r\n", Some(v6)),
            ("v1, unknown", b"PROXY UNKNOWN\r\n", None),
            ("v1, unknown with more", b"PROXY UNKNOWN ffff:f...f 1 2\r\n", None),
            ("v2", &v2(v4.0, v4.1), Some(v4)),
            ("v2, IPv6", &v2(v6.0, v6.1), Some(v6)),
            ("v2 with a TLV", &with_tlv, Some(v4)),
            ("v2, LOCAL", &local, None),
        ];
        for (what, bytes, ends) in cases {
            let whole = Proxied::Header { length: bytes.len(), ends };
            assert_eq!(header(bytes), whole, "{what}");
            assert_eq!(header(&[bytes, b"\x00\x01 and what follows"].concat()), whole, "{what}, more behind it");
            for cut in 1..bytes.len() {
                assert_eq!(header(&bytes[..cut]), Proxied::Partial, "{what} cut at {cut}");
            }
        }
    }

    #[test]
    fn what_is_no_header_is_told_apart() {
        let cases: [(&str, &[u8], Proxied); 9] = [
            ("nothing", b"", Proxied::No),
            ("STUN", b"\x00\x01\x00\x00\x21\x12\xa4\x42", Proxied::No),
            ("TLS", b"\x16\x03\x01", Proxied::No),
            ("POST", b"POST / HTTP/1.1\r\n", Proxied::Malformed),
            ("v1, wrong family", b"PROXY TCP5 198.51.100.1 192.0.2.1 5000 443\r\n", Proxied::Malformed),
            ("v1, port", b"PROXY TCP4 198.51.100.1 192.0.2.1 70000 443\r\n", Proxied::Malformed),
            ("v1 without an end", &[&b"PROXY UNKNOWN "[..], &[b'x'; 200]].concat(), Proxied::Malformed),
            ("v2, version 3", b"\r\n\r\n\0\r\nQUIT\n\x31\x11\0\0", Proxied::Malformed),
            ("v2, too long", &[&b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff"[..], &[0; 5000]].concat(), Proxied::Malformed),
        ];
        for (what, bytes, expected) in cases {
            assert_eq!(header(bytes), expected, "{what}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), start in 0..4usize) {
            let begin: &[u8] = [&b""[..], b"PROXY ", b"PROXY TCP4 1.1.1.1 ", b"\r\n\r\n\0\r\nQUIT\n"][start];
            bytes.splice(0..0, begin.iter().copied());
            if let Proxied::Header { length, .. } = header(&bytes) {
                prop_assert!(length <= bytes.len());
            }
        }
    }
}
