use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use super::super::lab::{Lab, addr, udp};
use super::*;
use crate::{Alternate, Transport};

fn from(bits: u32) -> FiveTuple {
    let client = SocketAddr::from((Ipv4Addr::from_bits(bits), 9));
    FiveTuple { transport: Transport::Udp, client, server: SocketAddr::from(([198, 51, 100, 7], 3478)) }
}

fn id(number: u32) -> TransactionId {
    let mut id = [0; 12];
    id[8..].copy_from_slice(&number.to_be_bytes());
    TransactionId(id)
}

fn draining() -> Lab {
    let mut lab = Lab::new();
    lab.configure(|settings| {
        settings.draining = true;
        let address = addr("198.51.100.8:3478");
        settings.alternates = vec![Alternate { transport: Transport::Udp, address, relays_ipv6: false }];
    });
    lab
}

#[test]
fn a_flood_pushes_nobody_out_and_is_served_in_the_end() {
    // P9: 10^5 sources leave the table as large as it was; whoever was sent away before is still known.
    let now = Instant::now();
    let mut sources = Sources::new([0x0123_4567_89AB_CDEF, 0xFEDC_BA98_7654_3210]);
    let victim = from(0x0A00_0001);
    sources.note(now, &victim, id(1), false);
    let mut remembered = 0_u32;
    for number in 0..100_000 {
        let stranger = from(0x4000_0000 + number);
        if sources.has_room(now, &stranger) {
            sources.note(now, &stranger, id(7), false);
            remembered += 1;
        }
    }
    let all = u32::try_from(BUCKETS * WAYS).expect("small");
    assert!((all - all / 10..=all).contains(&remembered), "{remembered} of {all}");
    assert_eq!(sources.course(now, &victim, id(1)), Course::SendAgain);
    assert_eq!(sources.course(now, &victim, id(2)), Course::Serve);
    // And later there is room again.
    let later = now + Vouchers::LIFETIME;
    assert_eq!(sources.course(later, &victim, id(2)), Course::Send);
    assert!((0..100_000).all(|number| sources.has_room(later, &from(0x4000_0000 + number))));
}

#[test]
fn who_cannot_be_remembered_is_served() {
    let mut lab = draining();
    lab.configure(|settings| settings.limits.strangers_per_prefix = 0);
    let codes: Vec<u16> = (0..40_000_u32)
        .map(|number| {
            lab.client(SocketAddr::from((Ipv4Addr::from_bits(0x4000_0000 + number), 9)));
            lab.unsigned(Method::Allocate, udp).code()
        })
        .collect();
    assert_eq!((codes[0], codes[39_999]), (300, 401));
    let sent = codes.iter().filter(|code| **code == 300).count();
    assert_eq!(lab.server.redirected(), Redirected { draining: sent as u64, overloaded: 0 });
    assert!(sent <= BUCKETS * WAYS);
}

#[test]
fn servers_of_a_node_share_their_vouchers() {
    // Another port is often another worker's.
    let (mut one, mut other) = (draining(), draining());
    let vouchers = Arc::new(Vouchers::new([1, 2]));
    one.server.share_vouchers(Arc::clone(&vouchers));
    other.server.share_vouchers(vouchers);
    other.now = one.now;
    assert_eq!(one.unsigned(Method::Allocate, udp).code(), 300);
    other.now.mono += Duration::from_secs(1);
    other.client(addr("203.0.113.9:7"));
    assert_eq!(other.unsigned(Method::Allocate, udp).code(), 401);
    other.client(addr("203.0.113.9:8"));
    assert_eq!(other.unsigned(Method::Allocate, udp).code(), 300);
}

#[test]
fn a_drain_is_the_reason_that_counts() {
    let mut lab = draining();
    lab.configure(|settings| settings.overloaded = true);
    assert_eq!(lab.unsigned(Method::Allocate, udp).code(), 300);
    assert_eq!(lab.server.redirected(), Redirected { draining: 1, overloaded: 0 });
}
