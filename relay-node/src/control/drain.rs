//! Sending new clients elsewhere, and ending: an operator's drain, a cordon of the node, SIGTERM, too much to do.
//!
//! Whatever the reason, what exists goes on, and new clients get 300 to another member, if the controller has named one
//! that can take them. Two things keep a redirect from doing harm: a relay says that it drains `NOTICE` before it
//! redirects, so that no other member sends clients to it meanwhile; and it serves again where it has heard of no
//! controller for `STALE`, because the members it knows may be gone.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::signal::unix::Signal;
use tokio::time::sleep;
use turnpike_proto::v1;

use super::load::LoadMeter;
use super::overload::{Detector, Sample};
use crate::config;
use crate::dataplane::{Dataplane, WorkerSnapshot};
use crate::health::Status;
use crate::metrics;

/// A relay tells its controller this long before it sends the first client away.
const NOTICE: Duration = Duration::from_secs(2);
/// Redirects are followed this long after the last session with a controller.
const STALE: Duration = Duration::from_secs(30);
/// A relay that has no calls ends this long after it began to drain: until then, clients may be told of it.
const SETTLE: Duration = Duration::from_secs(3);
/// How often progress is logged.
const PROGRESS: Duration = Duration::from_secs(30);
/// How often the loads are looked at.
const SECOND: Duration = Duration::from_secs(1);
/// How often a relay that ends looks whether it has.
const LOOK: Duration = Duration::from_millis(200);

/// What this relay has decided about new clients, and when it ends; shared by whoever learns of a reason.
pub struct Drain {
    state: Mutex<State>,
    status: Arc<Status>,
}

/// How it stands, without the data plane (pure).
struct State {
    /// How long SIGTERM leaves to the calls there are.
    patience: Duration,
    /// Whether anybody is to be told before this relay goes.
    has_controllers: bool,
    /// An operator wants it empty.
    told: Option<v1::Drain>,
    /// The node it runs on takes nothing new.
    cordoned: bool,
    ending: Option<Ending>,
    /// Since when it drains, for either reason.
    since: Option<Instant>,
    overload: Detector,
    overloaded_since: Option<Instant>,
    /// Since when there is no session with a controller.
    silent_since: Option<Instant>,
    allocations: ByTransport,
    logged: Option<Instant>,
    settings: Arc<turn_core::Settings>,
    applied: Flags,
    dataplane: Weak<Dataplane>,
}

/// It was told to stop.
#[derive(Clone, Copy)]
struct Ending {
    by: Instant,
    /// Unix milliseconds.
    at: u64,
}

/// What is laid over the settings of the workers.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Flags {
    draining: bool,
    overloaded: bool,
}

/// Allocations by the transport of their clients: UDP, TCP, TLS, DTLS.
type ByTransport = [u64; 4];

/// Why it is time to end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Over {
    Empty,
    Deadline,
}

impl Drain {
    /// Takes new clients.
    pub fn new(settings: &config::Settings, status: Arc<Status>) -> Self {
        let state = State {
            patience: settings.drain_deadline,
            has_controllers: settings.controllers.is_some(),
            told: None,
            cordoned: false,
            ending: None,
            since: None,
            overload: Detector::new(settings.overload),
            overloaded_since: None,
            silent_since: Some(Instant::now()),
            allocations: ByTransport::default(),
            logged: None,
            settings: Arc::default(),
            applied: Flags::default(),
            dataplane: Weak::new(),
        };
        Self { state: Mutex::new(state), status }
    }

    /// The data plane that is to know, and what it was started with.
    pub fn serves(&self, dataplane: &Arc<Dataplane>, settings: Arc<turn_core::Settings>) {
        let mut state = self.lock();
        (state.dataplane, state.settings) = (Arc::downgrade(dataplane), settings);
    }

    /// New settings of the workers, with the alternates there are; whether they are used is decided here.
    pub(super) fn configure(&self, settings: turn_core::Settings) {
        let mut state = self.lock();
        state.settings = Arc::new(settings);
        state.apply(Instant::now(), true);
    }

    /// What the controller says of an operator's wish.
    pub(super) fn told(&self, wish: v1::Drain) {
        let mut state = self.lock();
        let before = state.told.replace(wish).unwrap_or_default();
        if before != wish && (before.draining || wish.draining) {
            match wish {
                v1::Drain { draining: false, .. } => tracing::info!("an operator wants new clients served again"),
                v1::Drain { deadline: 0, .. } => tracing::info!("an operator drains this relay"),
                v1::Drain { deadline, .. } => {
                    let seconds = deadline.saturating_sub(unix_ms()) / 1000;
                    tracing::info!(seconds, "an operator drains this relay and wants it empty by then");
                }
            }
        }
        self.decide(&mut state);
    }

    /// Whether the Kubernetes node this relay runs on is cordoned.
    pub fn cordoned(&self, cordoned: bool) {
        let mut state = self.lock();
        if state.cordoned != cordoned {
            tracing::info!(
                "{}",
                if cordoned { "the node is cordoned: draining" } else { "the node is not cordoned any more" }
            );
            state.cordoned = cordoned;
        }
        metrics::cordoned(cordoned);
        self.decide(&mut state);
    }

    /// There is a session with a controller, or there is none any more.
    pub(super) fn connected(&self, connected: bool) {
        self.lock().silent_since = (!connected).then(Instant::now);
    }

    /// Adds what is decided here to a report.
    pub(super) fn report(&self, load: &mut v1::Load) {
        let state = self.lock();
        load.draining = state.since.is_some();
        load.overloaded = state.overloaded_since.is_some();
        load.ends_at = state.ends_at().unwrap_or(0);
    }

    /// Looks at the load each second, until the data plane is gone.
    pub async fn watch(self: Arc<Self>) {
        let mut meter = LoadMeter::default();
        while self.look(&mut meter) {
            sleep(SECOND).await;
        }
    }

    /// Takes a look; false once the data plane is gone.
    fn look(&self, meter: &mut LoadMeter) -> bool {
        let mut state = self.lock();
        let Some(dataplane) = state.dataplane.upgrade() else { return false };
        let (now, workers) = (Instant::now(), dataplane.snapshots());
        let load = meter.sample(&workers, now);
        state.sample(now, by_transport(&workers), load.busiest_worker_permille);
        self.decide(&mut state);
        true
    }

    /// Waits until it is time to end: SIGINT, a second SIGTERM, or, after the first, no calls or no time left.
    pub async fn until_end(&self, terminate: &mut Signal, interrupt: &mut Signal) {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => return,
        }
        if !self.begin_to_end() {
            return;
        }
        loop {
            tokio::select! {
                _ = terminate.recv() => return tracing::info!("told to stop again: ending at once"),
                _ = interrupt.recv() => return tracing::info!("interrupted: ending at once"),
                () = sleep(LOOK) => {}
            }
            match self.over() {
                Some(Over::Empty) => return tracing::info!("empty: ending"),
                Some(Over::Deadline) => return tracing::info!("the deadline has come: ending, calls are handed on"),
                None => {}
            }
        }
    }

    fn over(&self) -> Option<Over> {
        let state = self.lock();
        let held = state.dataplane.upgrade().map_or([0; 4], |dataplane| by_transport(&dataplane.snapshots()));
        state.over(Instant::now(), unix_ms(), held)
    }

    /// Whether there is any time.
    fn begin_to_end(&self) -> bool {
        let mut state = self.lock();
        if state.patience.is_zero() {
            return false;
        }
        let patience = state.patience;
        let at = unix_ms().saturating_add(u64::try_from(patience.as_millis()).unwrap_or(u64::MAX));
        state.ending = Some(Ending { by: Instant::now() + patience, at });
        tracing::info!(
            seconds = patience.as_secs(),
            "told to stop: ending when the last call has, or then at the latest; tell it again to end at once"
        );
        self.decide(&mut state);
        true
    }

    /// Brings everything that follows from the state up to date.
    fn decide(&self, state: &mut State) {
        let now = Instant::now();
        state.decide(now);
        state.apply(now, false);
        self.status.set_draining(state.since.is_some());
        metrics::drain(state.since.is_some(), state.overloaded_since.is_some(), state.ends_at());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// When it ends by itself, Unix milliseconds: an operator's earlier deadline holds too.
    fn ends_at(&self) -> Option<u64> {
        let ending = self.ending?;
        let wanted = self.told.filter(|told| told.draining && told.deadline != 0).map(|told| told.deadline);
        Some(wanted.map_or(ending.at, |wanted| ending.at.min(wanted)))
    }

    fn sample(&mut self, now: Instant, allocations: ByTransport, cpu_permille: u32) {
        self.allocations = allocations;
        let sample = Sample { allocations: allocations.iter().sum(), cpu_permille };
        match (self.overload.sample(now, sample), self.overloaded_since) {
            (true, None) => {
                tracing::warn!(
                    allocations = sample.allocations,
                    cpu_permille,
                    "overloaded: new clients are sent to other relays"
                );
                self.overloaded_since = Some(now);
            }
            (false, Some(_)) => {
                tracing::info!("not overloaded any more");
                self.overloaded_since = None;
            }
            _ => {}
        }
    }

    fn decide(&mut self, now: Instant) {
        let drains = self.ending.is_some() || self.cordoned || self.told.is_some_and(|told| told.draining);
        match (drains, self.since) {
            (true, None) => (self.since, self.logged) = (Some(now), Some(now)),
            (false, Some(_)) => (self.since, self.logged) = (None, None),
            _ => {}
        }
        if self.logged.is_some_and(|logged| now.saturating_duration_since(logged) >= PROGRESS) {
            let [udp, tcp, tls, dtls] = self.allocations;
            let total = udp + tcp + tls + dtls;
            tracing::info!(allocations = total, udp, tcp, tls, dtls, "draining");
            self.logged = Some(now);
        }
    }

    /// What the workers are to do now.
    fn flags(&self, now: Instant) -> Flags {
        let long = |since: Option<Instant>, time| since.is_some_and(|at| now.saturating_duration_since(at) >= time);
        if long(self.silent_since, STALE) {
            return Flags::default();
        }
        Flags { draining: long(self.since, NOTICE), overloaded: long(self.overloaded_since, NOTICE) }
    }

    fn apply(&mut self, now: Instant, changed: bool) {
        let flags = self.flags(now);
        if (changed || flags != self.applied)
            && let Some(dataplane) = self.dataplane.upgrade()
        {
            self.applied = flags;
            dataplane.configure(Arc::new(turn_core::Settings {
                draining: flags.draining,
                overloaded: flags.overloaded,
                ..(*self.settings).clone()
            }));
        }
    }

    /// Whether a relay that was told to stop has waited long enough.
    fn over(&self, now: Instant, unix_ms: u64, held: ByTransport) -> Option<Over> {
        let ending = self.ending?;
        if now >= ending.by || self.ends_at().is_some_and(|at| unix_ms >= at) {
            return Some(Over::Deadline);
        }
        let settled = !self.has_controllers || self.since.is_some_and(|at| now.saturating_duration_since(at) >= SETTLE);
        (settled && held == [0; 4]).then_some(Over::Empty)
    }
}

fn by_transport(workers: &[WorkerSnapshot]) -> ByTransport {
    let mut sum = ByTransport::default();
    for worker in workers {
        for (sum, count) in sum.iter_mut().zip(worker.by_transport) {
            *sum += count;
        }
    }
    sum
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        State {
            patience: Duration::from_secs(60),
            has_controllers: true,
            told: None,
            cordoned: false,
            ending: None,
            since: None,
            overload: Detector::new(config::Overload {
                allocations: Some(10),
                cpu_permille: None,
                time: Duration::from_secs(1),
            }),
            overloaded_since: None,
            silent_since: None,
            allocations: [0; 4],
            logged: None,
            settings: Arc::default(),
            applied: Flags::default(),
            dataplane: Weak::new(),
        }
    }

    impl State {
        fn told(&mut self, now: Instant, draining: bool, deadline: u64) {
            self.told = Some(v1::Drain { draining, deadline });
            self.decide(now);
        }

        fn terminated(&mut self, now: Instant) {
            self.ending = Some(Ending { by: now + self.patience, at: 60_000 });
            self.decide(now);
        }
    }

    const SECONDS: fn(u64) -> Duration = Duration::from_secs;

    #[test]
    fn it_is_said_before_it_is_done() {
        // Otherwise two relays that begin to drain at once could send a client to each other.
        let now = Instant::now();
        let mut state = state();
        assert_eq!(state.flags(now + SECONDS(9)), Flags::default());
        state.told(now, true, 0);
        assert!(state.since.is_some());
        assert_eq!(state.flags(now + NOTICE - Duration::from_millis(1)), Flags::default());
        assert_eq!(state.flags(now + NOTICE), Flags { draining: true, overloaded: false });
        state.told(now + SECONDS(5), false, 0);
        assert_eq!(state.flags(now + SECONDS(9)), Flags::default());
        state.sample(now + SECONDS(9), [10, 0, 0, 0], 0);
        assert_eq!(state.flags(now + SECONDS(9) + NOTICE), Flags { draining: false, overloaded: true });
    }

    #[test]
    fn a_cordon_drains_and_its_end_serves_again_unless_an_operator_drains_too() {
        let now = Instant::now();
        let mut state = state();
        state.cordoned = true;
        state.decide(now);
        assert!(state.flags(now + NOTICE).draining);
        assert_eq!((state.ends_at(), state.over(now + SECONDS(99), 99_000, [0; 4])), (None, None), "it goes on");
        state.told(now, true, 0);
        state.cordoned = false;
        state.decide(now + SECONDS(5));
        assert!(state.flags(now + SECONDS(9)).draining);
        state.told(now + SECONDS(9), false, 0);
        assert!(!state.flags(now + SECONDS(99)).draining);
    }

    #[test]
    fn without_a_controller_nobody_is_sent_away_for_long() {
        // P1: what the last session said of other members may be long over.
        let now = Instant::now();
        let mut state = state();
        state.terminated(now);
        state.silent_since = Some(now);
        assert!(state.flags(now + STALE - SECONDS(1)).draining);
        assert!(!state.flags(now + STALE).draining);
        state.silent_since = None;
        assert!(state.flags(now + STALE).draining);
    }

    #[test]
    fn it_ends_when_it_is_empty_or_the_time_is_over() {
        let now = Instant::now();
        let mut state = state();
        assert_eq!(state.over(now + SECONDS(99), 0, [0; 4]), None, "it was not told to");
        state.terminated(now);
        assert_eq!(state.over(now + SETTLE - SECONDS(1), 0, [0; 4]), None, "clients may be told of it still");
        assert_eq!(state.over(now + SETTLE, 0, [0; 4]), Some(Over::Empty));
        for held in [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]] {
            assert_eq!(state.over(now + SECONDS(59), 0, held), None);
            assert_eq!(state.over(now + SECONDS(60), 0, held), Some(Over::Deadline));
        }
        state.has_controllers = false;
        assert_eq!(state.over(now, 0, [0; 4]), Some(Over::Empty), "nobody tells clients of it");
    }

    #[test]
    fn a_relay_that_was_drained_before_need_not_settle() {
        let now = Instant::now();
        let mut state = state();
        state.told(now, true, 0);
        state.terminated(now + SECONDS(10));
        assert_eq!(state.over(now + SECONDS(10), 0, [0; 4]), Some(Over::Empty));
    }

    #[test]
    fn an_earlier_deadline_of_the_operator_holds() {
        let now = Instant::now();
        let mut state = state();
        state.told(now, true, 20_000);
        assert_eq!(state.ends_at(), None, "a drain alone ends nothing");
        assert_eq!(state.over(now + SECONDS(99), 30_000, [1; 4]), None);
        state.terminated(now);
        assert_eq!(state.ends_at(), Some(20_000));
        assert_eq!(state.over(now + SECONDS(9), 19_999, [1; 4]), None);
        assert_eq!(state.over(now + SECONDS(9), 20_000, [1; 4]), Some(Over::Deadline));
        state.told(now, true, 90_000);
        assert_eq!(state.ends_at(), Some(60_000));
        state.told(now, false, 20_000);
        assert_eq!(state.ends_at(), Some(60_000), "one that was taken back does not");
    }
}
