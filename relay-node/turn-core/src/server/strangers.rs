//! How many answers a source prefix gets before anybody in it has authenticated (abuse.md D), in a table whose size is
//! fixed at the start (promise P9).
//!
//! Each prefix has one cell in each of [`ROWS`] rows, found by a hash under a secret. A cell is a token bucket kept as
//! one number, the time at which it will be full again. An answer takes a token from all cells of its prefix and is
//! given while *any* of them has one: a prefix is silenced by others only if they fill every one of its cells, and
//! which prefixes share its cells nobody outside knows. Answers that were refused take nothing.

use std::hash::{BuildHasher, Hash, Hasher};
use std::net::IpAddr;
use std::time::Instant;

use super::table::SecretState;
use crate::{FiveTuple, Transport};

/// Cells a prefix has.
const ROWS: usize = 4;
/// Cells in a row: a power of two. All rows are 256 KiB.
const CELLS: usize = 8192;
/// How long a bucket takes to fill, in nanoseconds: a second's worth of answers may come at once.
const BURST: u64 = 1_000_000_000;

/// See the module.
pub(super) struct Strangers {
    /// Nanoseconds since `start` at which each bucket is full again.
    cells: Box<[u64]>,
    hash: SecretState,
    start: Option<Instant>,
}

impl Strangers {
    /// `secret` keys the hash of prefixes.
    pub(super) fn new(secret: [u64; 2]) -> Self {
        Self { cells: vec![0; ROWS * CELLS].into(), hash: SecretState(secret), start: None }
    }

    /// Whether the prefix of this client may get another answer now, at most `rate` a second (0: no limit); counts it.
    pub(super) fn admit(&mut self, now: Instant, from: &FiveTuple, rate: u32) -> bool {
        if rate == 0 {
            return true;
        }
        let start = *self.start.get_or_insert(now);
        let now = nanos(start, now);
        let interval = BURST / u64::from(rate);
        let cells = self.cells_of(from);
        // A bucket with a token is full again in less than the whole time less a token's.
        let admitted = cells.iter().any(|cell| self.cells[*cell] <= now + BURST - interval);
        if admitted {
            for cell in cells {
                let full_at = &mut self.cells[cell];
                *full_at = ((*full_at).max(now) + interval).min(now + BURST);
            }
        }
        admitted
    }

    /// Whether [`Strangers::admit`] would say no.
    pub(super) fn is_exhausted(&self, now: Instant, from: &FiveTuple, rate: u32) -> bool {
        let (Some(start), true) = (self.start, rate != 0) else {
            return false;
        };
        let now = nanos(start, now);
        let interval = BURST / u64::from(rate);
        self.cells_of(from).iter().all(|cell| self.cells[*cell] > now + BURST - interval)
    }

    fn cells_of(&self, from: &FiveTuple) -> [usize; ROWS] {
        let mut hasher = self.hash.build_hasher();
        // A flood of datagrams, whose sources may be forged, takes nothing from those who have shown where they are.
        (from.transport == Transport::Udp).hash(&mut hasher);
        hasher.write_u64(prefix(from.client.ip()));
        let hash = hasher.finish();
        std::array::from_fn(|row| {
            let bits = (hash >> (row * CELLS.ilog2() as usize)) as usize;
            row * CELLS + bits % CELLS
        })
    }
}

fn nanos(start: Instant, now: Instant) -> u64 {
    u64::try_from(now.saturating_duration_since(start).as_nanos()).unwrap_or(u64::MAX / 2)
}

/// An IPv4 /24 or an IPv6 /56, no two of them alike.
fn prefix(ip: IpAddr) -> u64 {
    match ip.to_canonical() {
        IpAddr::V4(ip) => u64::from(ip.to_bits() >> 8),
        IpAddr::V6(ip) => (ip.to_bits() >> 72) as u64 | 1 << 63,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};
    use std::time::Duration;

    use super::*;

    fn from(client: &str) -> FiveTuple {
        let client: SocketAddr = client.parse().expect("literal");
        FiveTuple { transport: Transport::Udp, client, server: SocketAddr::from(([198, 51, 100, 7], 3478)) }
    }

    fn from_v4(bits: u32) -> FiveTuple {
        FiveTuple { client: (Ipv4Addr::from_bits(bits), 9).into(), ..from("192.0.2.1:9") }
    }

    /// How many of `requests` at one instant are answered.
    fn answered(strangers: &mut Strangers, now: Instant, from: &FiveTuple, requests: u32, rate: u32) -> u32 {
        (0..requests).map(|_| u32::from(strangers.admit(now, from, rate))).sum()
    }

    #[test]
    fn a_second_has_its_answers_and_no_more() {
        let mut now = Instant::now();
        let mut strangers = Strangers::new([1, 2]);
        let from = from("203.0.113.9:1");
        assert_eq!(answered(&mut strangers, now, &from, 10_000, 300), 300);
        assert!(strangers.is_exhausted(now, &from, 300));
        now += Duration::from_millis(100);
        assert!(!strangers.is_exhausted(now, &from, 300));
        assert_eq!(answered(&mut strangers, now, &from, 10_000, 300), 30);
        // A flood for ten seconds gets ten seconds' worth.
        let mut total = 0;
        for _ in 0..10_000 {
            now += Duration::from_millis(1);
            total += answered(&mut strangers, now, &from, 5, 300);
        }
        assert!((2999..=3001).contains(&total), "{total}");
        assert_eq!(answered(&mut strangers, now, &from, 10_000, 0), 10_000, "0 is no limit");
    }

    #[test]
    fn who_shares_a_prefix() {
        let cases: &[(&str, &str, &str, bool)] = &[
            ("an IPv4 /24", "203.0.113.1:1", "203.0.113.254:9", true),
            ("the next /24", "203.0.113.1:1", "203.0.114.1:1", false),
            ("mapped IPv4", "203.0.113.1:1", "[::ffff:203.0.113.77]:1", true),
            ("an IPv6 /56", "[2001:db8:1:2300::1]:1", "[2001:db8:1:23ff::9]:1", true),
            ("the next /56", "[2001:db8:1:2300::1]:1", "[2001:db8:1:2400::1]:1", false),
            ("IPv6 that looks like it", "0.0.1.1:1", "[0:0:0:100::]:1", false),
        ];
        for (what, flooder, other, shared) in cases {
            let now = Instant::now();
            let mut strangers = Strangers::new([1, 2]);
            assert_eq!(answered(&mut strangers, now, &from(flooder), 1000, 200), 200);
            assert_eq!(strangers.is_exhausted(now, &from(other), 200), *shared, "{what}");
        }
        // Whoever has shown where it is does not pay for forged datagrams.
        let now = Instant::now();
        let mut strangers = Strangers::new([1, 2]);
        answered(&mut strangers, now, &from("203.0.113.1:1"), 1000, 200);
        let tcp = FiveTuple { transport: Transport::Tcp, ..from("203.0.113.1:1") };
        assert!(!strangers.is_exhausted(now, &tcp, 200));
    }

    #[test]
    fn other_prefixes_cannot_be_locked_out_cheaply() {
        // 1,000 prefixes flooded far beyond their rate leave practically everybody else alone: with one row every
        // ninth prefix would be silent.
        let now = Instant::now();
        let mut strangers = Strangers::new([0x0123_4567_89AB_CDEF, 0xFEDC_BA98_7654_3210]);
        for flooder in 0..1000 {
            answered(&mut strangers, now, &from_v4(flooder << 8), 400, 200);
        }
        let silent = (0..100_000_u32)
            .filter(|victim| strangers.is_exhausted(now, &from_v4(0x4000_0000 + (victim << 8)), 200))
            .count();
        // (1 - exp(-1000 / 8192)) ^ 4 is 1.7 in 10,000.
        assert!(silent <= 50, "{silent} of 100,000");
    }

    #[test]
    fn a_flood_of_all_prefixes_at_a_low_rate_silences_nobody() {
        // 10^5 sources, one request a second each.
        let start = Instant::now();
        let mut strangers = Strangers::new([3, 4]);
        for number in 0..300_000_u32 {
            let now = start + Duration::from_micros(10 * u64::from(number));
            assert!(strangers.admit(now, &from_v4((number % 100_000) << 8), 200), "request {number}");
        }
    }
}
