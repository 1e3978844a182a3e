//! One more try for clients that do not follow a redirect and come back from another port, or over another connection:
//! each 300 leaves a voucher at the client's IP, and as many as have one are served where they ask.
//!
//! Shared by the servers of a node, because another port is often another worker's. A fixed number of cells, made at the
//! start (promise P9): an IP whose cell is another's gets no voucher.

use std::hash::{BuildHasher, Hash, Hasher};
use std::net::IpAddr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::table::SecretState;
use crate::FiveTuple;

/// Cells: a power of two. All are 64 KiB.
const CELLS: usize = 8192;
/// A client that gives up at a 300 is back later than this. Within it come the other sockets of one that follows it, and
/// those are to follow it too.
const EARLIEST: Duration = Duration::from_millis(500);
/// Bits of a cell that hold the time; those above count, and those above them tell the IPs of a cell apart.
const TIME_BITS: u32 = 40;
const COUNT_BITS: u32 = 4;
/// Most vouchers of an IP.
const MOST: u64 = (1 << COUNT_BITS) - 1;

/// The vouchers of an IP; nobody's, if there is none.
#[derive(Clone, Copy)]
struct Cell {
    tag: u64,
    count: u64,
    /// When the first was given, in milliseconds from 1 at the start.
    since: u64,
}

impl Cell {
    fn read(cell: &AtomicU64) -> (u64, Self) {
        let bits = cell.load(Ordering::Relaxed);
        let count = bits >> TIME_BITS & MOST;
        (bits, Self { tag: bits >> (TIME_BITS + COUNT_BITS), count, since: bits & ((1 << TIME_BITS) - 1) })
    }

    /// Writes it, if nobody has written meanwhile.
    fn write(self, cell: &AtomicU64, before: u64) -> bool {
        let bits = self.tag << (TIME_BITS + COUNT_BITS) | self.count << TIME_BITS | self.since;
        let bits = if self.count == 0 { 0 } else { bits };
        cell.compare_exchange(before, bits, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    fn age(self, now: u64) -> Duration {
        Duration::from_millis(now.saturating_sub(self.since))
    }

    fn is_live(self, now: u64) -> bool {
        self.count > 0 && self.age(now) < Vouchers::LIFETIME
    }
}

/// See the module.
pub struct Vouchers {
    /// See [`Cell`].
    cells: Box<[AtomicU64]>,
    hash: SecretState,
    start: OnceLock<Instant>,
}

impl Vouchers {
    /// How long a voucher is good for.
    pub const LIFETIME: Duration = Duration::from_secs(10);

    /// None yet. `secret` keys the hash of IPs.
    pub fn new(secret: [u64; 2]) -> Self {
        let cells = (0..CELLS).map(|_| AtomicU64::new(0)).collect();
        Self { cells, hash: SecretState(secret), start: OnceLock::new() }
    }

    /// Leaves a voucher.
    pub(super) fn give(&self, now: Instant, from: &FiveTuple) {
        let (cell, tag, now) = self.place(now, from);
        let (before, held) = Cell::read(cell);
        let next = match held {
            held if !held.is_live(now) => Cell { tag, count: 1, since: now },
            held if held.tag == tag => Cell { count: (held.count + 1).min(MOST), ..held },
            // Another IP's.
            _ => return,
        };
        // Where another server writes at this moment, one of the two is lost: its client asks once more.
        next.write(cell, before);
    }

    /// Takes a voucher of this client's IP, if there is one.
    pub(super) fn take(&self, now: Instant, from: &FiveTuple) -> bool {
        let (cell, tag, now) = self.place(now, from);
        let (before, held) = Cell::read(cell);
        held.is_live(now)
            && held.tag == tag
            && held.age(now) >= EARLIEST
            && Cell { count: held.count - 1, ..held }.write(cell, before)
    }

    fn place(&self, now: Instant, from: &FiveTuple) -> (&AtomicU64, u64, u64) {
        let start = *self.start.get_or_init(|| now);
        let millis = now.saturating_duration_since(start).as_millis() as u64 + 1;
        let mut hasher = self.hash.build_hasher();
        from.transport.hash(&mut hasher);
        match from.client.ip().to_canonical() {
            IpAddr::V4(ip) => hasher.write_u32(ip.to_bits()),
            // One host has a /64 of its own.
            IpAddr::V6(ip) => hasher.write_u64((ip.to_bits() >> 64) as u64),
        }
        let hash = hasher.finish();
        (&self.cells[hash as usize % CELLS], hash >> (TIME_BITS + COUNT_BITS), millis & ((1 << TIME_BITS) - 1))
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::Transport;

    const SECRET: [u64; 2] = [0x0123_4567_89AB_CDEF, 0xFEDC_BA98_7654_3210];

    fn from(client: &str) -> FiveTuple {
        let client: SocketAddr = client.parse().expect("literal");
        FiveTuple { transport: Transport::Udp, client, server: SocketAddr::from(([198, 51, 100, 7], 3478)) }
    }

    #[test]
    fn a_voucher_is_good_once_not_at_once_and_not_for_long() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let cases = [(0, false), (499, false), (500, true), (9999, true), (10_000, false)];
        for (millis, expected) in cases {
            let vouchers = Vouchers::new(SECRET);
            assert!(!vouchers.take(start, &from("203.0.113.1:1")));
            vouchers.give(start, &from("203.0.113.1:1"));
            assert_eq!(vouchers.take(at(millis), &from("203.0.113.1:2")), expected, "after {millis} ms");
            assert!(!vouchers.take(at(millis), &from("203.0.113.1:2")));
        }
    }

    #[test]
    fn a_voucher_is_of_one_ip_and_transport() {
        let start = Instant::now();
        let later = start + Duration::from_secs(1);
        let vouchers = Vouchers::new(SECRET);
        vouchers.give(start, &from("203.0.113.1:1"));
        vouchers.give(start, &from("[2001:db8::1]:1"));
        assert!(!vouchers.take(later, &from("203.0.113.2:1")));
        assert!(!vouchers.take(later, &FiveTuple { transport: Transport::Tcp, ..from("203.0.113.1:1") }));
        assert!(!vouchers.take(later, &from("[2001:db8:0:1::1]:1")));
        assert!(vouchers.take(later, &from("[2001:db8::2]:9")), "one host has the /64");
        assert!(vouchers.take(later, &from("[::ffff:203.0.113.1]:9")), "the same, taken in by an IPv6 socket");
    }

    #[test]
    fn as_many_are_served_as_were_sent_away() {
        let start = Instant::now();
        let later = start + Duration::from_secs(1);
        for given in [1, 2, 8, 100] {
            let vouchers = Vouchers::new(SECRET);
            (0..given).for_each(|_| vouchers.give(start, &from("203.0.113.1:1")));
            let served = (0..200).filter(|_| vouchers.take(later, &from("203.0.113.1:2"))).count();
            assert_eq!(served, given.min(15), "of {given}");
        }
    }

    #[test]
    fn later_redirects_do_not_put_a_voucher_off() {
        let start = Instant::now();
        let vouchers = Vouchers::new(SECRET);
        for tenth in 0..10 {
            vouchers.give(start + Duration::from_millis(100 * tenth), &from("203.0.113.1:1"));
        }
        assert!(vouchers.take(start + Duration::from_millis(901), &from("203.0.113.1:2")));
    }
}
