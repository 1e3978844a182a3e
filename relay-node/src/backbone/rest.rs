//! When the backbone's thread rests: where packets come one by one and many a second, waking it for each costs more than
//! they do. A busy thread lets them gather for a moment before it waits for the next, as network cards hold interrupts
//! back; QUIC then packs several into one packet, and acknowledges more at once. One that is not busy never rests.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How long packets gather; the kernel adds some 55 us.
const REST: Duration = Duration::from_micros(100);
/// As many packets at once are gathered enough.
const GATHERED: u32 = 16;
/// Packets a second from which on resting pays.
const BUSY: f64 = 8_000.0;
/// Packets beyond that rate until it is believed, and those that are remembered.
const BELIEVED: f64 = 16.0;
const REMEMBERED: f64 = 32.0;

/// Counts packets, and rests.
#[derive(Debug)]
pub(super) struct Rest {
    /// Packets since the last time that nothing was to be done.
    moved: AtomicU32,
    load: Mutex<Load>,
}

/// How many packets there have been lately beyond [`BUSY`] (pure).
#[derive(Debug)]
struct Load {
    beyond: f64,
    at: Instant,
}

impl Load {
    /// So many packets more. Whether the thread is busy.
    fn is_busy(&mut self, moved: u32, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.at);
        self.at = now;
        let left = (self.beyond - elapsed.as_secs_f64() * BUSY).max(0.0);
        self.beyond = (left + f64::from(moved)).min(REMEMBERED);
        self.beyond >= BELIEVED
    }
}

impl Rest {
    pub(super) fn new() -> Self {
        Self { moved: AtomicU32::new(0), load: Mutex::new(Load { beyond: 0.0, at: Instant::now() }) }
    }

    /// So many packets were moved. On the backbone's thread.
    pub(super) fn moved(&self, packets: u32) {
        self.moved.store(self.moved.load(Ordering::Relaxed).wrapping_add(packets), Ordering::Relaxed);
    }

    /// The thread has nothing to do and is about to wait.
    pub(super) fn before_waiting(&self) {
        let moved = self.moved.swap(0, Ordering::Relaxed);
        if moved == 0 {
            return;
        }
        let is_busy = self.load.lock().unwrap_or_else(PoisonError::into_inner).is_busy(moved, Instant::now());
        if is_busy && moved < GATHERED {
            std::thread::sleep(REST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_of_packets_is_busy_and_a_call_or_a_burst_now_and_then_is_not() {
        // Packets, and microseconds between them.
        for (packets, every, expected) in [(1, 50, true), (5, 250, true), (1, 1000, false), (10, 20_000, false)] {
            let (start, mut load) = (Instant::now(), Load { beyond: 0.0, at: Instant::now() });
            let busy = |number: u64| load.is_busy(packets, start + Duration::from_micros(number * every));
            let last = (1..=1000).map(busy).last();
            assert_eq!(last, Some(expected), "{packets} each {every} us");
        }
    }

    #[test]
    fn what_was_busy_is_soon_at_rest_no_longer() {
        let now = Instant::now();
        let mut load = Load { beyond: 0.0, at: now };
        assert!(load.is_busy(100_000, now));
        assert!(!load.is_busy(1, now + Duration::from_millis(4)));
    }
}
