//! Congestion control of private links. Nobody else's traffic is on them, so nothing has to be given way to: as much is on
//! its way as fills the path and a little of its queue, and no more, whatever is offered. Loss alone says little here.
//!
//! Each round trip the window is set to what would make the queue `QUEUE` long: what is on its way, times the round trip
//! that is wanted, over the one that was seen. Where the capacity is known, the window follows from it. Links over the
//! internet have Cubic, which gives way to others as they do.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory};
use quinn_proto::RttEstimator;

/// What may stand in the queue of the narrowest place: enough to keep it busy.
const QUEUE: Duration = Duration::from_millis(10);
/// The same where the capacity is known: the link's bucket keeps to it, and the window only bounds what a mistake costs.
const QUEUE_KNOWN: Duration = Duration::from_millis(40);
/// At the beginning: a key frame of a video goes out in one piece.
pub(super) const INITIAL_WINDOW: u64 = 96 << 10;
/// Even the slowest path.
const LEAST_WINDOW: u64 = 12 << 10;
const MOST_WINDOW: u64 = 64 << 20;
/// A round with more loss than this, in thousandths, does not widen the window.
const HARMLESS_LOSS: u64 = 20;
/// One with more makes it narrower.
const HARMFUL_LOSS: u64 = 100;
/// The shortest round trip is that of the last one or two of these: routes change.
const MEMORY: Duration = Duration::from_secs(10);

/// Makes the controllers of private links.
#[derive(Clone, Copy, Debug)]
pub(super) struct PrivateLink {
    /// Bytes per second, where it is known.
    pub(super) capacity: Option<u64>,
}

impl ControllerFactory for PrivateLink {
    fn build(self: Arc<Self>, now: Instant, mtu: u16) -> Box<dyn Controller> {
        Box::new(Private::new(self.capacity, now, mtu))
    }
}

/// The controller of one connection.
#[derive(Clone, Debug)]
pub(super) struct Private {
    capacity: Option<u64>,
    mtu: u64,
    window: u64,
    shortest: Shortest,
    /// The queue is let run empty until then, so that the shortest round trip is seen.
    drains_until: Option<Instant>,
    last_sent: u64,
    /// Acknowledged in the batch under way.
    batch: u64,
    round: Round,
}

/// What a round trip brought.
#[derive(Clone, Copy, Debug, Default)]
struct Round {
    /// It ends when a packet behind this one is acknowledged.
    ends_with: u64,
    acknowledged: u64,
    lost: u64,
    rtt: Option<Duration>,
    /// Most that was on its way.
    peak: u64,
    is_limited: bool,
}

impl Private {
    fn new(capacity: Option<u64>, now: Instant, mtu: u16) -> Self {
        Self {
            capacity,
            mtu: mtu.into(),
            window: INITIAL_WINDOW,
            shortest: Shortest { now: None, before: None, since: now },
            drains_until: None,
            last_sent: 0,
            batch: 0,
            round: Round::default(),
        }
    }

    fn end_round(&mut self, now: Instant) {
        let round = std::mem::replace(&mut self.round, Round { ends_with: self.last_sent, ..Round::default() });
        let (Some(rtt), Some(shortest)) = (round.rtt, self.shortest.get()) else { return };
        if self.drains_until.is_some() {
            return;
        }
        let wanted = shortest + QUEUE;
        if let Some(capacity) = self.capacity {
            self.set_window(capacity as f64 * (shortest + QUEUE_KNOWN).as_secs_f64());
        } else if round.is_limited && round.peak * 4 >= self.window * 3 {
            let loss = round.lost * 1000 / (round.acknowledged + round.lost).max(1);
            let most = if loss <= HARMLESS_LOSS {
                2.0
            } else if loss <= HARMFUL_LOSS {
                1.0
            } else {
                0.9
            };
            let factor = wanted.as_secs_f64() / rtt.as_secs_f64().max(1e-6);
            self.set_window(self.window as f64 * factor.clamp(0.5, most));
        }
        if self.shortest.is_old(now) {
            self.shortest.age(now);
            self.drains_until = Some(now + shortest * 2 + QUEUE);
        }
    }

    fn set_window(&mut self, bytes: f64) {
        self.window = (bytes as u64).clamp(LEAST_WINDOW.max(4 * self.mtu), MOST_WINDOW);
    }
}

impl Controller for Private {
    fn on_sent(&mut self, _now: Instant, _bytes: u64, last_packet_number: u64) {
        self.last_sent = last_packet_number;
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, _rtt: &RttEstimator) {
        self.batch += bytes;
        let rtt = now.saturating_duration_since(sent);
        self.shortest.see(rtt);
        self.round.acknowledged += bytes;
        self.round.rtt = Some(self.round.rtt.map_or(rtt, |least| least.min(rtt)));
        self.round.is_limited |= !app_limited;
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, _app_limited: bool, largest: Option<u64>) {
        self.round.peak = self.round.peak.max(in_flight + std::mem::take(&mut self.batch));
        if self.drains_until.is_some_and(|until| now >= until) {
            self.drains_until = None;
        }
        if largest.is_some_and(|largest| largest > self.round.ends_with) {
            self.end_round(now);
        }
    }

    fn on_congestion_event(&mut self, _now: Instant, _sent: Instant, is_persistent: bool, lost_bytes: u64) {
        self.round.lost += lost_bytes;
        if is_persistent {
            // Nothing has come through for several round trips.
            self.set_window(0.0);
        }
    }

    fn on_mtu_update(&mut self, mtu: u16) {
        self.mtu = mtu.into();
    }

    fn window(&self) -> u64 {
        match (self.drains_until, self.shortest.get()) {
            (Some(_), Some(shortest)) => {
                let part = shortest.as_secs_f64() / (shortest + QUEUE).as_secs_f64();
                ((self.window as f64 * part * 0.75) as u64).max(4 * self.mtu)
            }
            _ => self.window,
        }
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        INITIAL_WINDOW
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// The shortest round trip of the last while.
#[derive(Clone, Copy, Debug)]
struct Shortest {
    now: Option<Duration>,
    before: Option<Duration>,
    since: Instant,
}

impl Shortest {
    fn see(&mut self, rtt: Duration) {
        self.now = Some(self.now.map_or(rtt, |least| least.min(rtt)));
    }

    fn get(&self) -> Option<Duration> {
        match (self.now, self.before) {
            (Some(now), Some(before)) => Some(now.min(before)),
            (now, before) => now.or(before),
        }
    }

    fn is_old(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) >= MEMORY
    }

    fn age(&mut self, now: Instant) {
        self.before = self.now.take();
        self.since = now;
    }
}
