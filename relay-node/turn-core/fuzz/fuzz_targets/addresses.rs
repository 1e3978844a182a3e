//! Every way to write an address: what carries a forbidden IPv4 address is forbidden in each of its IPv6 forms, and the
//! canonical form is not more than what was written.
#![no_main]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use libfuzzer_sys::fuzz_target;
use turn_core::policy::Network;
use turn_core::{PeerAddr, Policy};

/// abuse.md A, by hand.
fn is_public(ip: Ipv4Addr) -> bool {
    let [a, b, _, _] = ip.octets();
    !(matches!(a, 0 | 10 | 127 | 224..=255)
        || (a == 100 && (64..=127).contains(&b))
        || (a == 169 && b == 254)
        || (a == 172 && (16..=31).contains(&b))
        || (a == 192 && b == 168))
}

fuzz_target!(|bytes: &[u8]| {
    let Some((octets, rest)) = bytes.split_first_chunk::<16>() else { return };
    let Some((&[p0, p1, prefix], _)) = rest.split_first_chunk::<3>() else { return };
    let port = u16::from_be_bytes([p0, p1]);
    let policy = Policy::default();

    let v4 = Ipv4Addr::new(octets[12], octets[13], octets[14], octets[15]);
    assert_eq!(policy.check_ip(v4.into()).is_ok(), is_public(v4));
    let [a, b, c, d] = v4.octets().map(u16::from);
    let (high, low) = (a << 8 | b, c << 8 | d);
    let carriers = [
        Ipv6Addr::new(0, 0, 0, 0, 0, 0xFFFF, high, low),
        Ipv6Addr::new(0, 0, 0, 0, 0, 0, high, low),
        Ipv6Addr::new(0x64, 0xFF9B, 0, 0, 0, 0, high, low),
        Ipv6Addr::new(0x2002, high, low, 0, 0, 0, 0, 1),
        Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, !high, !low),
    ];
    for carrier in carriers {
        assert!(policy.check_ip(carrier.into()).is_err());
    }

    let v6 = Ipv6Addr::from(*octets);
    for ip in [IpAddr::V4(v4), IpAddr::V6(v6)] {
        let peer = PeerAddr::new(SocketAddr::new(ip, port));
        assert_eq!(PeerAddr::new(peer.socket_addr()), peer);
        assert_eq!(peer.port(), port);
        if policy.check_ip(ip).is_ok() {
            assert_eq!(policy.check(peer).is_ok(), port != 0);
            assert_eq!(peer.ip(), ip);
        }
        // More denied never means more allowed, whatever the prefix.
        let denied = vec![Network { address: ip, prefix }];
        let stricter = Policy { denied, ..Policy::default() };
        assert!(stricter.check_ip(ip).is_err());
        assert!(stricter.check_ip(v4.into()).is_err() || policy.check_ip(v4.into()).is_ok());
    }
});
