//! Congestion control of private links. Nobody else's traffic is on them, so nothing has to be given way to: as much is on
//! its way as fills the path and a little of its queue, and no more, whatever is offered. Loss alone says little here.
//!
//! Each round trip the window is set to what makes the queue `QUEUE` long at the rate that has come through lately. Not to
//! what the round trip alone says: what waits the other way makes it longer too, and one direction would starve the other.
//! Now and then a round asks for more, which is kept if it comes through. Where the capacity is known, the window follows
//! from it. Links over the internet have Cubic, which gives way to others as they do.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory};
use quinn_proto::RttEstimator;

/// What may stand in the queue of the narrowest place: enough to keep it busy.
const QUEUE: Duration = Duration::from_millis(12);
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
/// Rounds after which one asks for more.
const ROUNDS: u32 = 8;
/// So many times as much.
const MORE: f64 = 1.25;
/// And while each round brings that much more than any before.
const WHILE_IT_GROWS: f64 = 2.0;
/// Less than this part of what came through before, while packets are late: what waits the other way makes them so, and as
/// much more may be on its way, up to this long.
const STARVED: f64 = 0.95;
const MOST_LIFT: Duration = Duration::from_millis(35);
/// What is left of that after each round that is not so.
const LIFT_LEFT: f64 = 0.99;
/// Less than this part, while packets are late, is no other direction's doing.
const NARROWER: f64 = 0.4;
/// The rate of a shorter round says little.
const LEAST_ROUND: Duration = Duration::from_millis(25);
/// Acknowledgements that come closer together are of one batch: a round ends behind one, or its rate would be too high.
const BATCH: Duration = Duration::from_millis(1);
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
    rates: Rates,
    /// What is added to the round trip that is wanted.
    lift: Duration,
    /// The queue is let run empty until then, so that the shortest round trip is seen.
    drains_until: Option<Instant>,
    last_sent: u64,
    /// Acknowledged in the batch under way.
    batch: u64,
    round: Round,
    /// The first round begins with the first packet, and so does one behind a pause.
    is_idle: bool,
    /// The round is over since then, but for what comes at once with it.
    is_over: Option<Instant>,
}

/// What a round trip brought.
#[derive(Clone, Copy, Debug)]
struct Round {
    began: Instant,
    /// It ends when a packet behind this one is acknowledged.
    ends_with: u64,
    acknowledged: u64,
    lost: u64,
    rtt: Option<Duration>,
    /// Most that was on its way.
    peak: u64,
    is_limited: bool,
}

impl Round {
    fn new(began: Instant, ends_with: u64) -> Self {
        Self { began, ends_with, acknowledged: 0, lost: 0, rtt: None, peak: 0, is_limited: false }
    }

    /// Thousandths.
    fn loss(&self) -> u64 {
        self.lost * 1000 / (self.acknowledged + self.lost).max(1)
    }
}

impl Private {
    fn new(capacity: Option<u64>, now: Instant, mtu: u16) -> Self {
        Self {
            capacity,
            mtu: mtu.into(),
            window: INITIAL_WINDOW,
            shortest: Shortest { now: None, before: None, since: now },
            rates: Rates::new(now),
            lift: Duration::ZERO,
            drains_until: None,
            last_sent: 0,
            batch: 0,
            round: Round::new(now, 0),
            is_idle: true,
            is_over: None,
        }
    }

    fn end_round(&mut self, now: Instant) {
        let round = std::mem::replace(&mut self.round, Round::new(now, self.last_sent));
        let (Some(rtt), Some(shortest)) = (round.rtt, self.shortest.get()) else { return };
        if self.drains_until.is_some() {
            return;
        }
        if let Some(capacity) = self.capacity {
            self.set_window(capacity as f64 * (shortest + QUEUE_KNOWN).as_secs_f64());
        } else if round.loss() > HARMFUL_LOSS || (round.is_limited && round.peak * 4 >= self.window * 3) {
            self.follow(round, rtt, shortest, now);
        }
        if self.shortest.is_old(now) {
            self.shortest.age(now);
            self.drains_until = Some(now + shortest * 2 + QUEUE);
        }
    }

    /// Sets the window by a round that used it.
    fn follow(&mut self, round: Round, rtt: Duration, shortest: Duration, now: Instant) {
        let loss = round.loss();
        // Little loss is the path's own, and what is lost has used the path too.
        let through = round.acknowledged + if loss <= HARMFUL_LOSS { round.lost } else { 0 };
        let elapsed = now.saturating_duration_since(round.began).max(LEAST_ROUND);
        let wanted = shortest + QUEUE;
        let rate = through as f64 / elapsed.as_secs_f64();
        // More than the other direction may have done to it.
        let is_slow = rtt > wanted && rate < self.rates.best() * NARROWER;
        let is_long = rtt > wanted + MOST_LIFT;
        let is_late = is_slow || is_long || loss > HARMFUL_LOSS;
        let gain = self.rates.take(rate, is_late, now);
        self.lift = if rate < self.rates.best() * STARVED {
            self.lift.max(rtt.saturating_sub(wanted)).min(MOST_LIFT)
        } else {
            self.lift.mul_f64(LIFT_LEFT)
        };
        let gain = if is_long { 1.0 } else { gain };
        let window = self.window as f64;
        let target = self.rates.best() * (wanted + self.lift).as_secs_f64() * gain;
        // As long as there is no queue, the window is not too wide: a burst behind a pause does not show the rate. Where there
        // is a long one, it is not too narrow.
        let least = if rtt > wanted { window * 0.5 } else { window };
        let most = if is_long { window } else { window * 2.0 };
        self.set_window(if loss <= HARMLESS_LOSS {
            target.clamp(least, most)
        } else if loss <= HARMFUL_LOSS {
            target.clamp(least, window)
        } else {
            window * 0.9
        });
    }

    fn acknowledged(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool) {
        if self.is_over.is_some_and(|at| now.saturating_duration_since(at) >= BATCH)
            && let Some(at) = self.is_over.take()
        {
            self.end_round(at);
        }
        self.batch += bytes;
        let rtt = now.saturating_duration_since(sent);
        self.shortest.see(rtt);
        self.round.acknowledged += bytes;
        self.round.rtt = Some(self.round.rtt.map_or(rtt, |least| least.min(rtt)));
        self.round.is_limited |= !app_limited;
    }

    fn set_window(&mut self, bytes: f64) {
        self.window = (bytes as u64).clamp(LEAST_WINDOW.max(4 * self.mtu), MOST_WINDOW);
    }
}

impl Controller for Private {
    fn on_sent(&mut self, now: Instant, _bytes: u64, last_packet_number: u64) {
        if std::mem::take(&mut self.is_idle) {
            (self.round, self.is_over) = (Round::new(now, last_packet_number), None);
        }
        self.last_sent = last_packet_number;
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, _rtt: &RttEstimator) {
        self.acknowledged(now, sent, bytes, app_limited);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, _app_limited: bool, largest: Option<u64>) {
        self.round.peak = self.round.peak.max(in_flight + std::mem::take(&mut self.batch));
        if self.drains_until.is_some_and(|until| now >= until) {
            self.drains_until = None;
        }
        let is_long = now.saturating_duration_since(self.round.began) >= LEAST_ROUND;
        if self.is_over.is_some() || (is_long && largest.is_some_and(|largest| largest > self.round.ends_with)) {
            self.is_over = Some(now);
        }
        self.is_idle = in_flight == 0;
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

/// What has come through in a round, bytes per second.
#[derive(Clone, Debug)]
struct Rates {
    /// The best of the last one or two [`MEMORY`]: one direction that makes the other's round trips longer does not make
    /// its share smaller.
    best: f64,
    best_before: f64,
    since: Instant,
    last: f64,
    rounds: u32,
    /// Rounds in a row that were late, and the best of them.
    late: u32,
    best_late: f64,
    /// A round has asked for more, and what it brought is not known yet.
    asks: bool,
}

impl Rates {
    fn new(now: Instant) -> Self {
        let (best, best_before, best_late, last) = (0.0, 0.0, 0.0, 0.0);
        Self { best, best_before, since: now, last, rounds: 0, late: 0, best_late, asks: false }
    }

    /// One more round. Says how many times its share the next one may have.
    fn take(&mut self, rate: f64, is_late: bool, now: Instant) -> f64 {
        // Twice in a row: acknowledgements that were held up come all at once.
        let twice = rate.min(std::mem::replace(&mut self.last, rate));
        let has_grown = twice >= self.best() * (1.0 + (MORE - 1.0) / 2.0);
        if now.saturating_duration_since(self.since) >= MEMORY {
            (self.best_before, self.best, self.since) = (self.best, 0.0, now);
        }
        self.best = self.best.max(twice);
        (self.late, self.best_late) = if is_late { (self.late + 1, self.best_late.max(twice)) } else { (0, 0.0) };
        if self.late >= ROUNDS {
            // The path has become narrower.
            (self.best, self.best_before, self.late) = (self.best_late, 0.0, 0);
            self.best_late = 0.0;
        }
        self.rounds += 1;
        let asked = std::mem::take(&mut self.asks);
        if has_grown {
            self.asks = true;
            WHILE_IT_GROWS
        } else if !asked && self.rounds.is_multiple_of(ROUNDS) {
            self.asks = true;
            MORE
        } else {
            1.0
        }
    }

    fn best(&self) -> f64 {
        self.best.max(self.best_before)
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

#[cfg(test)]
mod tests {
    use super::*;

    const PACKET: u64 = 1400;
    const DELAY: Duration = Duration::from_millis(10);
    const STEP: Duration = Duration::from_micros(200);
    /// What waits longer is lost.
    const BUFFER: Duration = Duration::from_millis(50);

    /// One direction of a path; always more is offered than goes through.
    struct Way {
        controller: Private,
        begins: Instant,
        free: Instant,
        sent: std::collections::VecDeque<(u64, Instant)>,
        acknowledgements: std::collections::VecDeque<(Instant, u64)>,
        number: u64,
        /// Packets since the last acknowledgement, and when that was.
        open: u64,
        answered: Instant,
        delivered: u64,
    }

    /// Both directions: the acknowledgements of one wait in the queue of the other.
    struct Path {
        now: Instant,
        bytes_per_second: u64,
        ways: [Way; 2],
    }

    impl Path {
        fn new(bytes_per_second: u64, begin: [Duration; 2]) -> Self {
            let now = Instant::now();
            let way = |begins: Duration| Way {
                controller: Private::new(None, now, 1452),
                begins: now + begins,
                free: now,
                sent: Default::default(),
                acknowledgements: Default::default(),
                number: 0,
                open: 0,
                answered: now,
                delivered: 0,
            };
            Self { now, bytes_per_second, ways: begin.map(way) }
        }

        /// Thousandths of what goes through that each direction delivers, and how long packets wait at the end.
        fn run(&mut self, time: Duration) -> [(u64, Duration); 2] {
            let until = self.now + time;
            for way in &mut self.ways {
                way.delivered = 0;
            }
            while self.now < until {
                self.now += STEP;
                for index in 0..2 {
                    let back = self.ways[1 - index].free.saturating_duration_since(self.now);
                    self.ways[index].step(self.now, self.bytes_per_second, back);
                }
            }
            let all = (self.bytes_per_second as f64 * time.as_secs_f64()) as u64;
            let now = self.now;
            [0, 1].map(|index| {
                let way: &Way = &self.ways[index];
                (way.delivered * 1000 / all, way.free.saturating_duration_since(now))
            })
        }
    }

    impl Way {
        fn step(&mut self, now: Instant, bytes_per_second: u64, back: Duration) {
            while let Some((_, upto)) = self.acknowledgements.pop_front_if(|(at, _)| *at <= now) {
                while let Some((_, sent)) = self.sent.pop_front_if(|(number, _)| *number <= upto) {
                    self.controller.acknowledged(now, sent, PACKET, false);
                    self.delivered += PACKET;
                }
                self.controller.on_end_acks(now, self.in_flight(), false, Some(upto));
            }
            while now >= self.begins && self.in_flight() + PACKET <= self.controller.window() {
                self.number += 1;
                self.controller.on_sent(now, PACKET, self.number);
                if self.free.saturating_duration_since(now) > BUFFER {
                    self.controller.on_congestion_event(now, now, false, PACKET);
                    return;
                }
                self.sent.push_back((self.number, now));
                self.free = self.free.max(now) + Duration::from_nanos(PACKET * 1_000_000_000 / bytes_per_second);
                self.open += 1;
                if self.open == 8 {
                    self.acknowledge(now, back);
                }
            }
            if self.open > 0 && now.duration_since(self.answered) >= Duration::from_millis(25) {
                self.acknowledge(now, back);
            }
        }

        fn acknowledge(&mut self, now: Instant, back: Duration) {
            (self.open, self.answered) = (0, now);
            self.acknowledgements.push_back((self.free + DELAY * 2 + back, self.number));
        }

        fn in_flight(&self) -> u64 {
            self.sent.len() as u64 * PACKET
        }
    }

    #[test]
    fn a_path_is_filled_and_its_queue_is_short() {
        for bytes_per_second in [1_000_000, 2_500_000, 25_000_000] {
            let mut path = Path::new(bytes_per_second, [Duration::ZERO, Duration::from_secs(3600)]);
            path.run(Duration::from_secs(1));
            let [(permille, queue), _] = path.run(Duration::from_secs(25));
            assert!(permille >= 970, "{bytes_per_second}: {permille}");
            assert!(queue <= Duration::from_millis(40), "{bytes_per_second}: {queue:?}");
        }
    }

    #[test]
    fn neither_direction_starves_the_other() {
        for later in [0, 1, 5, 20, 50, 500] {
            let mut path = Path::new(2_500_000, [Duration::ZERO, Duration::from_millis(later)]);
            path.run(Duration::from_secs(2));
            for (permille, _) in path.run(Duration::from_secs(25)) {
                assert!(permille >= 930, "{later}: {permille}");
            }
        }
    }

    #[test]
    fn a_path_that_becomes_narrower_is_not_flooded_for_long() {
        let mut path = Path::new(2_500_000, [Duration::ZERO, Duration::from_secs(3600)]);
        path.run(Duration::from_secs(5));
        path.bytes_per_second /= 3;
        path.run(Duration::from_secs(3));
        let [(permille, queue), _] = path.run(Duration::from_secs(3));
        assert!(permille >= 950 && queue <= Duration::from_millis(40), "{permille}, {queue:?}");
    }
}
