//! Rates: how many bytes a second an allocation, a user or a node relays, and how many packets.
//!
//! A rate is kept as the instant up to which its traffic is paid for. A packet moves it by the time the packet takes at
//! that rate, and passes if it is not more than a burst ahead of now. Nothing has to be filled up by a timer.
//!
//! A stream loses nothing: it asks for room before it reads, waits where there is none, and is charged for what it read.
//! Who reads at the same time may see the same room; what is too much then is paid for by waiting longer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::Limits;

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

/// Reads a second of a stream that is always at its limit: enough to go on smoothly.
const READS: u64 = 64;
/// Bounds of what such a read may bring, in bytes: a burst can be exceeded by that.
const LEAST_READ: u64 = 1 << 10;
const MOST_READ: u64 = 64 << 10;

/// Nanoseconds that a packet takes at a rate in bytes a second, which is not 0.
fn cost(bytes: usize, rate: u64) -> u64 {
    (bytes.saturating_add(HEADERS) as u64).saturating_mul(1_000_000_000) / rate
}

/// Nanoseconds that any packet takes at a rate in packets a second, which is not 0.
fn packet_cost(rate: u32) -> u64 {
    1_000_000_000 / u64::from(rate)
}

fn burst(cost: u64) -> u64 {
    BURST.max(cost.saturating_mul(BURST_PACKETS))
}

/// Moves the instant up to which is paid for, unless that is too far ahead.
fn pay(paid: &mut Option<Instant>, now: Instant, cost: u64) -> bool {
    let start = paid.map_or(now, |paid| paid.max(now));
    let admitted = start - now <= Duration::from_nanos(burst(cost));
    if admitted {
        *paid = Some(start + Duration::from_nanos(cost));
    }
    admitted
}

/// As [`pay`], in nanoseconds and among several threads.
fn pay_shared(paid: &AtomicU64, now: u64, cost: u64) -> bool {
    // Relaxed: the number stands for itself.
    let admit = |paid: u64| {
        let start = paid.max(now);
        (start - now <= burst(cost)).then(|| start.saturating_add(cost))
    };
    paid.fetch_update(Ordering::Relaxed, Ordering::Relaxed, admit).is_ok()
}

/// The traffic of one allocation, for the one thread that owns it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct OwnMeter {
    /// By direction.
    bytes: [Option<Instant>; 2],
    /// As `bytes`.
    packets: [Option<Instant>; 2],
}

impl OwnMeter {
    /// Whether a packet with so many bytes of payload passes at `rate` bytes a second; 0 lets all pass.
    pub(crate) fn admit(&mut self, direction: Direction, now: Instant, bytes: usize, rate: u64) -> bool {
        rate == 0 || pay(&mut self.bytes[direction as usize], now, cost(bytes, rate))
    }

    /// Whether a packet passes at `rate` packets a second; 0 lets all pass.
    pub(crate) fn admit_packet(&mut self, direction: Direction, now: Instant, rate: u32) -> bool {
        rate == 0 || pay(&mut self.packets[direction as usize], now, packet_cost(rate))
    }
}

/// The traffic of a user or of a node, whose allocations have several threads. No lock.
#[derive(Debug)]
pub struct Meter {
    base: Instant,
    /// Nanoseconds from `base`, by direction.
    paid: [AtomicU64; 2],
    /// As `paid`, of packets.
    packets_paid: [AtomicU64; 2],
}

impl Meter {
    /// Nothing has passed.
    pub fn new() -> Self {
        Self { base: Instant::now(), paid: Default::default(), packets_paid: Default::default() }
    }

    /// Whether a packet with so many bytes of payload passes at `rate` bytes a second; 0 lets all pass.
    pub fn admit(&self, direction: Direction, now: Instant, bytes: usize, rate: u64) -> bool {
        rate == 0 || pay_shared(&self.paid[direction as usize], self.nanos(now), cost(bytes, rate))
    }

    /// Whether a packet passes at `rate` packets a second; 0 lets all pass.
    pub fn admit_packet(&self, direction: Direction, now: Instant, rate: u32) -> bool {
        rate == 0 || pay_shared(&self.packets_paid[direction as usize], self.nanos(now), packet_cost(rate))
    }

    /// How many bytes a stream may read now at `rate` bytes a second, at least 1.
    ///
    /// # Errors
    /// None; when to ask again.
    fn room(&self, direction: Direction, now: Instant, rate: u64) -> Result<usize, Instant> {
        let ahead = self.paid[direction as usize].load(Ordering::Relaxed).saturating_sub(self.nanos(now));
        let Some(rest) = BURST.checked_sub(ahead) else {
            return Err(now + Duration::from_nanos(ahead - BURST));
        };
        let rest = u128::from(rest) * u128::from(rate) / u128::from(BURST);
        // On top, so that who asks a little late loses nothing.
        let least = u128::from((rate / READS).clamp(LEAST_READ, MOST_READ));
        Ok(usize::try_from(rest + least).unwrap_or(usize::MAX))
    }

    /// Counts what a stream has read, headers as of one packet, whatever that makes of the rate.
    fn charge(&self, direction: Direction, now: Instant, bytes: usize, rate: u64) {
        let now = self.nanos(now);
        let add = |paid: u64| Some(paid.max(now).saturating_add(cost(bytes, rate)));
        // It always adds.
        let _ = self.paid[direction as usize].fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }

    /// Whether all that has passed is paid for: a new meter would say the same.
    pub fn is_settled(&self, now: Instant) -> bool {
        let now = self.nanos(now);
        self.paid.iter().chain(&self.packets_paid).all(|paid| paid.load(Ordering::Relaxed) <= now)
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
    /// Of the allocation itself, where it relays TCP (RFC 6062): its data connections may have several threads.
    pub allocation: Option<Arc<Meter>>,
    /// Of its user on this node.
    pub user: Option<Arc<Meter>>,
    /// Of the node.
    pub node: Option<Arc<Meter>>,
}

impl Meters {
    /// How many bytes a data connection may read now, at least 1.
    ///
    /// # Errors
    /// None; when to ask again.
    pub fn room(&self, direction: Direction, now: Instant, limits: &Limits) -> Result<usize, Instant> {
        let mut meters = self.limited(limits);
        meters.try_fold(usize::MAX, |room, (meter, rate)| Ok(room.min(meter.room(direction, now, rate)?)))
    }

    /// Counts what a data connection has read.
    pub fn charge(&self, direction: Direction, now: Instant, bytes: usize, limits: &Limits) {
        self.limited(limits).for_each(|(meter, rate)| meter.charge(direction, now, bytes, rate));
    }

    /// Those with a limit, and it.
    fn limited(&self, limits: &Limits) -> impl Iterator<Item = (&Meter, u64)> {
        let all = [
            (&self.allocation, limits.bytes_per_allocation),
            (&self.user, limits.bytes_per_user),
            (&self.node, limits.bytes_per_node),
        ];
        all.into_iter().filter(|(_, rate)| *rate != 0).filter_map(|(meter, rate)| Some((meter.as_deref()?, rate)))
    }
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
    fn packets_have_a_rate_of_their_own() {
        let shared = Meter::new();
        let mut own = OwnMeter::default();
        // 1000 a second offered, 100 allowed, 10 s: one second's burst and ten seconds' rate.
        let of_own = passed(10_000, |now| own.admit_packet(Direction::ToPeer, now, 100));
        let of_shared = passed(10_000, |now| shared.admit_packet(Direction::ToPeer, now, 100));
        for passed in [of_own, of_shared] {
            assert!((1090..=1105).contains(&passed), "{passed}");
        }
        let now = Instant::now();
        assert!(own.admit_packet(Direction::ToClient, now, 1) && shared.admit_packet(Direction::ToClient, now, 1));
        assert!(own.admit(Direction::ToPeer, now, 972, 1000), "bytes are counted apart");
        assert!(!shared.is_settled(now) && shared.is_settled(now + Duration::from_secs(12)));
        assert!((0..10_000).all(|_| shared.admit_packet(Direction::ToPeer, now, 0)), "no limit is none");
    }

    #[test]
    fn empty_packets_are_traffic() {
        let shared = Meter::new();
        let now = Instant::now();
        assert!((0..10_000).any(|_| !shared.admit(Direction::ToPeer, now, 0, 28_000)));
    }

    #[test]
    fn streams_wait_and_keep_the_rate() {
        for rate in [2_000, 100_000, 50_000_000] {
            let meters = Meters { allocation: Some(Arc::default()), node: Some(Arc::default()), user: None };
            let limits = Limits { bytes_per_allocation: rate, bytes_per_node: rate * 3, ..Limits::default() };
            let start = Instant::now();
            let (mut now, mut read, mut asked) = (start, 0, 0);
            while now < start + Duration::from_secs(10) {
                asked += 1;
                match meters.room(Direction::ToPeer, now, &limits) {
                    Ok(room) => {
                        let bytes = room.min(65_536);
                        meters.charge(Direction::ToPeer, now, bytes, &limits);
                        read += bytes as u64;
                    }
                    Err(again) => {
                        assert!(again > now, "it is no use to ask before");
                        now = again;
                    }
                }
            }
            // Ten seconds' rate and one second's burst, headers, and a read that was not paid for yet.
            assert!((rate * 10..=rate * 11 + rate / 64 + 1024).contains(&read), "{rate}: {read}");
            assert!(asked < 20_000, "{rate}: {asked}");
            assert!(meters.room(Direction::ToClient, now, &limits).is_ok(), "the other direction");
            assert_eq!(meters.room(Direction::ToPeer, now, &Limits::default()), Ok(usize::MAX), "no limit");
        }
    }

    #[test]
    fn datagrams_and_streams_share() {
        let now = Instant::now();
        let user = Arc::new(Meter::new());
        let meters = Meters { user: Some(Arc::clone(&user)), ..Meters::default() };
        let limits = Limits { bytes_per_user: 10_000, ..Limits::default() };
        meters.charge(Direction::ToPeer, now, 20_000, &limits);
        assert!(!user.admit(Direction::ToPeer, now, 972, 10_000));
        while user.admit(Direction::ToClient, now, 972, 10_000) {}
        assert!(meters.room(Direction::ToClient, now, &limits).is_err());
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
