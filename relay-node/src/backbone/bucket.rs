//! A link's rate (pure): a token bucket of bits per second.

use std::time::{Duration, Instant};

/// The part of the capacity that frames may use: acknowledgements, probes and handshakes need some, and a queue that has
/// formed in the network runs empty.
const SHARE: f64 = 0.97;
/// What may leave at once beyond the rate: timers are of a millisecond, and a busy thread is late for them. It does not
/// fill the network's queue: what is on its way is bounded by the window.
const BURST: Duration = Duration::from_millis(25);
/// And at least two packets.
const LEAST_BURST: f64 = 3000.0;
/// What a datagram costs beside its bytes, where QUIC packs none together: headers of IP, UDP and QUIC.
const HEADERS: usize = 60;

/// What a link may send.
#[derive(Debug)]
pub(super) struct Bucket {
    bytes_per_second: f64,
    burst: f64,
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    /// Full.
    pub(super) fn new(bits_per_second: u64, now: Instant) -> Self {
        let bytes_per_second = (bits_per_second as f64 / 8.0 * SHARE).max(1000.0);
        let burst = (bytes_per_second * BURST.as_secs_f64()).max(LEAST_BURST);
        Self { bytes_per_second, burst, tokens: burst, filled: now }
    }

    /// How long the next packet has to wait; none if it need not.
    pub(super) fn wait(&mut self, now: Instant) -> Option<Duration> {
        let elapsed = now.saturating_duration_since(self.filled);
        self.filled = now;
        self.tokens = (self.tokens + elapsed.as_secs_f64() * self.bytes_per_second).min(self.burst);
        (self.tokens < 0.0).then(|| Duration::from_secs_f64(-self.tokens / self.bytes_per_second))
    }

    /// A datagram of so many bytes was sent. What it costs beyond what is there is owed.
    pub(super) fn take(&mut self, datagram: usize) {
        self.tokens -= (datagram + HEADERS) as f64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_and_nothing_is_saved_up() {
        let mut now = Instant::now();
        let mut bucket = Bucket::new(20_000_000, now);
        let mut sent = |now: &mut Instant, until: Instant| {
            let mut bytes = 0;
            while *now < until {
                match bucket.wait(*now) {
                    Some(wait) => *now += wait.max(Duration::from_micros(1)),
                    None => {
                        bucket.take(1200);
                        bytes += 1200 + HEADERS;
                    }
                }
            }
            bytes
        };
        let until = now + Duration::from_secs(1);
        let bytes = sent(&mut now, until);
        assert!((2_400_000..=2_500_000).contains(&bytes), "{bytes}");
        now += Duration::from_secs(60);
        let until = now + Duration::from_millis(10);
        let bytes = sent(&mut now, until);
        assert!(bytes <= 90_000, "{bytes}: a burst of 25 ms and 10 ms of the rate");
    }
}
