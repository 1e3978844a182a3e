//! Rates: how many bytes a second an allocation, a user or a node relays.
//!
//! A rate is kept as the instant up to which its traffic is paid for. A packet moves it by the time the packet takes at
//! that rate, and passes if it is not more than a burst ahead of now. Nothing has to be filled up by a timer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Which way application data goes. Each way has a rate of its own.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Direction {
    /// From the client to a peer.
    ToPeer,
    /// From a peer to the client.
    ToClient,
}

/// How far traffic may be ahead: a second of it.
const BURST: u64 = 1_000_000_000;
/// And at least so many packets like the one in hand, or a low rate would let long packets through one by one.
const BURST_PACKETS: u64 = 4;
/// IP and UDP headers, counted with each packet: a flood of empty packets is traffic too.
const HEADERS: usize = 28;

/// Nanoseconds that a packet takes at a rate in bytes a second, which is not 0.
fn cost(bytes: usize, rate: u64) -> u64 {
    (bytes.saturating_add(HEADERS) as u64).saturating_mul(1_000_000_000) / rate
}

fn burst(cost: u64) -> u64 {
    BURST.max(cost.saturating_mul(BURST_PACKETS))
}

/// The traffic of one allocation, for the one thread that owns it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct OwnMeter([Option<Instant>; 2]);

impl OwnMeter {
    /// Whether a packet with so many bytes of payload passes at `rate` bytes a second; 0 lets all pass.
    pub(crate) fn admit(&mut self, direction: Direction, now: Instant, bytes: usize, rate: u64) -> bool {
        if rate == 0 {
            return true;
        }
        let paid = &mut self.0[direction as usize];
        let cost = cost(bytes, rate);
        let start = paid.map_or(now, |paid| paid.max(now));
        let admitted = start - now <= Duration::from_nanos(burst(cost));
        if admitted {
            *paid = Some(start + Duration::from_nanos(cost));
        }
        admitted
    }
}

/// The traffic of a user or of a node, whose allocations have several threads. No lock.
#[derive(Debug)]
pub struct Meter {
    base: Instant,
    /// Nanoseconds from `base`, by direction.
    paid: [AtomicU64; 2],
}

impl Meter {
    /// Nothing has passed.
    pub fn new() -> Self {
        Self { base: Instant::now(), paid: [AtomicU64::new(0), AtomicU64::new(0)] }
    }

    /// Whether a packet with so many bytes of payload passes at `rate` bytes a second; 0 lets all pass.
    pub fn admit(&self, direction: Direction, now: Instant, bytes: usize, rate: u64) -> bool {
        if rate == 0 {
            return true;
        }
        let now = self.nanos(now);
        let cost = cost(bytes, rate);
        // Relaxed: the number stands for itself.
        let admit = |paid: u64| {
            let start = paid.max(now);
            (start - now <= burst(cost)).then(|| start.saturating_add(cost))
        };
        self.paid[direction as usize].fetch_update(Ordering::Relaxed, Ordering::Relaxed, admit).is_ok()
    }

    /// Whether all that has passed is paid for: a new meter would say the same.
    pub fn is_settled(&self, now: Instant) -> bool {
        let now = self.nanos(now);
        self.paid.iter().all(|paid| paid.load(Ordering::Relaxed) <= now)
    }

    fn nanos(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.base).as_nanos()).unwrap_or(u64::MAX)
    }
}

impl Default for Meter {
    fn default() -> Self {
        Self::new()
    }
}

/// What an allocation shares its bandwidth with; none where no limit is set.
#[derive(Clone, Debug, Default)]
pub struct Meters {
    /// Of its user on this node.
    pub user: Option<Arc<Meter>>,
    /// Of the node.
    pub node: Option<Arc<Meter>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Packets of 972 bytes (1000 with headers) that pass, offered every millisecond for `millis`.
    fn passed(millis: u64, mut admit: impl FnMut(Instant) -> bool) -> u64 {
        let start = Instant::now();
        (0..millis).map(|at| u64::from(admit(start + Duration::from_millis(at)))).sum()
    }

    #[test]
    fn the_rate_holds_after_a_burst_of_a_second() {
        // 1 MB/s offered, 100 kB/s allowed, 10 s: one second's burst and ten seconds' rate.
        let shared = Meter::new();
        let mut own = OwnMeter::default();
        let of_own = passed(10_000, |now| own.admit(Direction::ToPeer, now, 972, 100_000));
        let of_shared = passed(10_000, |now| shared.admit(Direction::ToPeer, now, 972, 100_000));
        for passed in [of_own, of_shared] {
            assert!((1090..=1105).contains(&passed), "{passed}");
        }
    }

    #[test]
    fn directions_are_apart_and_no_limit_is_none() {
        let shared = Meter::new();
        let now = Instant::now();
        let mut own = OwnMeter::default();
        while own.admit(Direction::ToPeer, now, 1000, 1000) {}
        while shared.admit(Direction::ToPeer, now, 1000, 1000) {}
        assert!(own.admit(Direction::ToClient, now, 1000, 1000));
        assert!(shared.admit(Direction::ToClient, now, 1000, 1000));
        assert!((0..10_000).all(|_| own.admit(Direction::ToPeer, now, 65_535, 0)));
        assert!((0..10_000).all(|_| shared.admit(Direction::ToPeer, now, 65_535, 0)));
    }

    #[test]
    fn a_few_packets_pass_at_any_rate() {
        let now = Instant::now();
        let mut own = OwnMeter::default();
        let passed = (0..100).filter(|_| own.admit(Direction::ToPeer, now, 65_507, 1)).count();
        assert_eq!(passed, 5);
        let shared = Meter::new();
        let passed = (0..100).filter(|_| shared.admit(Direction::ToPeer, now, 65_507, 1)).count();
        assert_eq!(passed, 5);
    }

    #[test]
    fn empty_packets_are_traffic() {
        let shared = Meter::new();
        let now = Instant::now();
        assert!((0..10_000).any(|_| !shared.admit(Direction::ToPeer, now, 0, 28_000)));
    }

    #[test]
    fn what_is_paid_for_is_forgotten() {
        let shared = Meter::new();
        let now = Instant::now();
        assert!(shared.is_settled(now));
        assert!(shared.admit(Direction::ToPeer, now, 972, 1000));
        assert!(!shared.is_settled(now));
        assert!(shared.is_settled(now + Duration::from_millis(1001)));
    }
}
