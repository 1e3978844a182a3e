//! What was seen in a run: plain data, all times since its beginning.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use turn_core::Transport;
use turn_core::wire::Method;

use crate::plan::{Fault, node};

/// The one clock of a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Watch(Instant);

impl Watch {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn now(self) -> Duration {
        self.0.elapsed()
    }

    pub(crate) fn at(self, instant: Instant) -> Duration {
        instant.saturating_duration_since(self.0)
    }
}

/// A fault as it really was.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub(crate) fault: Fault,
    /// Whose relay is broken.
    pub(crate) machine: Option<usize>,
    pub(crate) from: Duration,
    /// A process that was killed in the middle of it had been started again.
    pub(crate) restarted: Option<Duration>,
    /// Mended; a killed process had been started, which is not yet its readiness.
    pub(crate) until: Duration,
}

/// All faults.
#[derive(Clone, Debug, Default)]
pub(crate) struct Timeline {
    windows: Vec<(usize, Window)>,
}

impl Timeline {
    pub(crate) fn begin(&mut self, number: usize, fault: Fault, now: Duration) {
        let machine = fault.relay();
        self.windows.push((number, Window { fault, machine, from: now, restarted: None, until: Duration::MAX }));
    }

    /// The relay address was another machine's than the one of its number.
    pub(crate) fn hits(&mut self, number: usize, machine: usize) {
        self.window(number, |window| window.machine = Some(machine));
    }

    pub(crate) fn restarted(&mut self, number: usize, now: Duration) {
        self.window(number, |window| window.restarted = Some(now));
    }

    pub(crate) fn end(&mut self, number: usize, now: Duration) {
        self.window(number, |window| window.until = now);
    }

    fn window(&mut self, number: usize, change: impl FnOnce(&mut Window)) {
        if let Some((_, window)) = self.windows.iter_mut().find(|(known, _)| *known == number) {
            change(window);
        }
    }

    pub(crate) fn windows(&self) -> impl Iterator<Item = &Window> {
        self.windows.iter().map(|(_, window)| window)
    }

    /// When the last fault was mended.
    pub(crate) fn healed(&self) -> Duration {
        self.windows().map(|window| window.until).max().unwrap_or_default()
    }

    /// One line per fault.
    pub(crate) fn lines(&self) -> String {
        let mut lines = String::new();
        for window in self.windows() {
            let (from, until) = (window.from.as_secs_f64(), window.until.as_secs_f64());
            let _ = write!(lines, "  {from:7.2} .. {until:7.2} s  {}", window.fault);
            if let Some(at) = window.restarted {
                let _ = write!(lines, " (restarted at {:.2} s)", at.as_secs_f64());
            }
            if let Some(machine) = window.machine.filter(|machine| window.fault.relay() != Some(*machine)) {
                let _ = write!(lines, " (on {})", node(machine));
            }
            lines.push('\n');
        }
        lines
    }
}

/// One direction of a call: a message's number is its place.
#[derive(Clone, Debug, Default)]
pub(crate) struct Flow {
    pub(crate) sent: Vec<Duration>,
    pub(crate) arrived: Vec<Option<Duration>>,
}

impl Flow {
    /// The next message leaves; answers its number.
    pub(crate) fn send(&mut self, now: Duration) -> u32 {
        self.sent.push(now);
        self.arrived.push(None);
        u32::try_from(self.sent.len() - 1).unwrap_or(u32::MAX)
    }

    /// A message has come; false if there is none of this number.
    pub(crate) fn arrive(&mut self, number: u32, now: Duration) -> bool {
        match self.arrived.get_mut(number as usize) {
            Some(arrived) => {
                arrived.get_or_insert(now);
                true
            }
            None => false,
        }
    }

    /// Times without an arrival, from one to the next.
    pub(crate) fn gaps(&self, from: Duration, until: Duration) -> Vec<(Duration, Duration)> {
        let mut times: Vec<Duration> = self.arrived.iter().flatten().copied().collect();
        times.sort();
        times.retain(|time| *time > from && *time < until);
        times.insert(0, from);
        times.push(until);
        times.windows(2).map(|pair| (pair[0], pair[1])).collect()
    }
}

/// A call: a client with an allocation, and its peer.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) number: u32,
    pub(crate) relay: usize,
    pub(crate) transport: Transport,
    pub(crate) relayed: SocketAddr,
    /// Its Allocate was answered.
    pub(crate) born: Duration,
    /// Its channel was.
    pub(crate) bound: Option<Duration>,
    /// It was ended on purpose, by its client or by the end of the run.
    pub(crate) ended: Option<Duration>,
    /// The client was told, or saw, that it is gone.
    pub(crate) broke: Option<(Duration, String)>,
    /// Error responses.
    pub(crate) refusals: Vec<(Duration, Method, u16)>,
    /// From the client to its peer.
    pub(crate) up: Flow,
    /// From the peer to the client.
    pub(crate) down: Flow,
    /// Messages of another call.
    pub(crate) foreign: u32,
    /// Messages whose checksum is wrong.
    pub(crate) damaged: u32,
}

impl Call {
    /// Its end, or that of the run.
    pub(crate) fn over(&self, run: Duration) -> Duration {
        self.ended.or(self.broke.as_ref().map(|(at, _)| *at)).unwrap_or(run)
    }

    pub(crate) fn lives(&self) -> bool {
        self.ended.is_none() && self.broke.is_none()
    }
}

/// A client that comes, asks for an allocation and leaves.
#[derive(Clone, Debug)]
pub(crate) struct Probe {
    pub(crate) relay: usize,
    pub(crate) transport: Transport,
    pub(crate) from: Duration,
    pub(crate) until: Duration,
    pub(crate) outcome: Result<(), String>,
}

/// What a controller's discovery said.
#[derive(Clone, Debug)]
pub(crate) struct Sighting {
    pub(crate) controller: usize,
    pub(crate) at: Duration,
    /// Nodes named.
    pub(crate) nodes: Result<BTreeSet<String>, String>,
}

/// Which machines have the relay address that moves.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    pub(crate) at: Duration,
    /// By their numbers.
    pub(crate) by: BTreeSet<usize>,
}

/// A change in etcd, as its history tells it.
#[derive(Clone, Debug)]
pub(crate) struct Written {
    pub(crate) revision: i64,
    pub(crate) key: String,
    /// None for a deletion.
    pub(crate) value: Option<Vec<u8>>,
}

/// After the last fault: what must agree.
#[derive(Clone, Debug, Default)]
pub(crate) struct Truth {
    /// Relayed addresses in the store.
    pub(crate) stored: BTreeSet<SocketAddr>,
    /// Relayed addresses the relays have sockets for, each with the relays that do.
    pub(crate) bound: BTreeSet<SocketAddr>,
    /// Relayed addresses that two relays have.
    pub(crate) twice: BTreeSet<SocketAddr>,
    /// Nodes that each controller names, a failure as text.
    pub(crate) named: Vec<Result<BTreeSet<String>, String>>,
}

/// Everything.
#[derive(Clone, Debug, Default)]
pub(crate) struct Evidence {
    pub(crate) timeline: Timeline,
    pub(crate) calls: Vec<Call>,
    pub(crate) probes: Vec<Probe>,
    pub(crate) sightings: Vec<Sighting>,
    pub(crate) held: Vec<Held>,
    /// How many on its network answer for the relay address that moves, in the end.
    pub(crate) answering: usize,
    pub(crate) history: Vec<Written>,
    /// What was not true at the last look, and when all was, if it ever was.
    pub(crate) untrue: Vec<String>,
    pub(crate) settled: Option<Duration>,
    /// Relays that ended by themselves, and what they said.
    pub(crate) died: Vec<String>,
    /// The end of the run.
    pub(crate) end: Duration,
}
