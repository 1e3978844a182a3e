//! What is broken when: a list that a seed makes, the same one each time (pure).

use std::fmt;
use std::time::Duration;

/// Relay addresses of the cluster under test, each with a relay.
pub(crate) const RELAYS: usize = 3;
/// The relay address that moves.
pub(crate) const HOME: usize = 2;
/// The machine of its standby; the others have the number of their address.
pub(crate) const STANDBY: usize = RELAYS;
/// Machines with a relay.
pub(crate) const MACHINES: usize = RELAYS + 1;
/// Its controllers.
pub(crate) const CONTROLLERS: usize = 2;
/// Members of its etcd.
pub(crate) const MEMBERS: usize = 3;

/// Traffic runs so long before the first fault.
const LEAD: Duration = Duration::from_secs(2);
/// Between the beginnings of two faults, milliseconds.
const PAUSE: (u64, u64) = (600, 2600);
/// Draws for one place in the plan; if all collide with what is going on there already, it stays empty.
const DRAWS: usize = 12;
/// Before a relay loses what it has written the store must have had the time to hear of it, and afterwards the relay
/// the time to ask: nothing else is wrong for so long. An operator's word needs a controller and the store, too.
const CALM: (Duration, Duration) = (Duration::from_secs(8), Duration::from_secs(4));
/// A relay whose address can move is away for no longer than this, milliseconds, but by faults that are meant to move it:
/// its lease lives, and so does its hold on the address.
const BRIEF: u64 = 2000;

/// Node id of the relay on a machine.
pub(crate) fn node(machine: usize) -> String {
    if machine == STANDBY { "standby".to_owned() } else { format!("relay-{machine}") }
}

/// What is broken; relays, controllers and members by their numbers from 0. A relay is whoever has the relay address of
/// this number when the fault begins.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Fault {
    /// kill -9, and started again at the end.
    KillRelay(usize),
    /// SIGTERM, and started again at the end.
    EndRelay(usize),
    /// `turnctl drain`, and `turnctl uncordon` at the end.
    DrainRelay(usize),
    /// SIGSTOP to SIGCONT.
    FreezeRelay(usize),
    /// kill -9, its state directory emptied, and started again at the end.
    WipeRelay(usize),
    /// The disk of its state directory is full.
    FullDisk(usize),
    /// The same, and in the middle of it kill -9, started again at once.
    FullDiskKill(usize),
    /// No packet between it and any controller.
    CutRelay(usize),
    /// No packet between it and clients and peers.
    CutClients(usize),
    /// The machine that has [`HOME`] is off the network, its cable unplugged.
    MachineGone,
    /// Its wall clock is wrong by so many seconds.
    RelayClock(usize, i64),
    /// kill -9, and started again at the end.
    KillController(usize),
    /// SIGSTOP to SIGCONT.
    FreezeController(usize),
    /// No packet between it and etcd.
    CutController(usize),
    /// Its wall clock is wrong by so many seconds.
    ControllerClock(usize, i64),
    /// kill -9, and started again at the end.
    KillMember(usize),
    /// The same, to the one that leads.
    KillLeader,
    /// SIGSTOP to SIGCONT.
    FreezeMember(usize),
    /// No packet between it and its fellows; clients reach it.
    CutMember(usize),
    /// All members stand still for so many milliseconds at a time, and run for a moment in between.
    SlowStore(u64),
    /// All members killed.
    StoreGone,
    /// All controllers killed.
    ControllersGone,
    /// History is compacted.
    Compact,
}

/// A part of the cluster that has one fault at a time.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Part {
    /// A relay.
    Relay(usize),
    /// A controller.
    Controller(usize),
    /// etcd.
    Store,
}

impl Fault {
    /// The relay address whose relay it breaks.
    pub(crate) fn relay(self) -> Option<usize> {
        match self {
            Self::KillRelay(n)
            | Self::EndRelay(n)
            | Self::DrainRelay(n)
            | Self::FreezeRelay(n)
            | Self::WipeRelay(n)
            | Self::FullDisk(n)
            | Self::FullDiskKill(n)
            | Self::CutRelay(n)
            | Self::CutClients(n)
            | Self::RelayClock(n, _) => Some(n),
            Self::MachineGone => Some(HOME),
            _ => None,
        }
    }

    /// Whether [`HOME`] is another machine's afterwards.
    pub(crate) fn moves(self) -> bool {
        matches!(self, Self::EndRelay(HOME) | Self::CutRelay(HOME) | Self::MachineGone)
    }

    /// What it breaks.
    pub(crate) fn parts(self) -> Vec<Part> {
        let control = (0..CONTROLLERS).map(Part::Controller);
        match self {
            // It is controllers and store that let the standby have the address.
            Self::EndRelay(HOME) | Self::CutRelay(HOME) | Self::MachineGone => {
                control.chain([Part::Store, Part::Relay(HOME)]).collect()
            }
            Self::KillRelay(n)
            | Self::EndRelay(n)
            | Self::FreezeRelay(n)
            | Self::FullDisk(n)
            | Self::CutRelay(n)
            | Self::CutClients(n)
            | Self::RelayClock(n, _) => vec![Part::Relay(n)],
            Self::WipeRelay(n) | Self::FullDiskKill(n) | Self::DrainRelay(n) => {
                control.chain([Part::Store, Part::Relay(n)]).collect()
            }
            Self::KillController(n)
            | Self::FreezeController(n)
            | Self::CutController(n)
            | Self::ControllerClock(n, _) => vec![Part::Controller(n)],
            Self::ControllersGone => control.collect(),
            Self::KillMember(_)
            | Self::KillLeader
            | Self::FreezeMember(_)
            | Self::CutMember(_)
            | Self::SlowStore(_)
            | Self::StoreGone
            | Self::Compact => vec![Part::Store],
        }
    }

    /// Whether it is between a relay and the store: what the relay then writes may be late there.
    pub(crate) fn parts_from_store(self, relay: usize) -> bool {
        match self {
            Self::CutRelay(n) => n == relay,
            Self::ControllerClock(..) | Self::Compact => false,
            other => other.parts().iter().all(|part| !matches!(part, Part::Relay(_))),
        }
    }

    /// Time around it in which its parts have no other fault.
    fn calm(self) -> (Duration, Duration) {
        match self {
            Self::WipeRelay(_) | Self::FullDiskKill(_) | Self::DrainRelay(_) => CALM,
            moving if moving.moves() => CALM,
            _ => (Duration::ZERO, Duration::from_millis(300)),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KillRelay(n) => write!(f, "relay {n}: kill -9"),
            Self::EndRelay(n) => write!(f, "relay {n}: SIGTERM"),
            Self::DrainRelay(n) => write!(f, "relay {n}: drained by an operator"),
            Self::FreezeRelay(n) => write!(f, "relay {n}: SIGSTOP"),
            Self::WipeRelay(n) => write!(f, "relay {n}: kill -9, state directory deleted"),
            Self::FullDisk(n) => write!(f, "relay {n}: disk full"),
            Self::FullDiskKill(n) => write!(f, "relay {n}: disk full, and kill -9 in the middle of it"),
            Self::CutRelay(n) => write!(f, "relay {n}: cut off from the controllers"),
            Self::CutClients(n) => write!(f, "relay {n}: cut off from clients and peers"),
            Self::MachineGone => write!(f, "relay {HOME}: its machine is off the network"),
            Self::RelayClock(n, by) => write!(f, "relay {n}: clock {by:+} s"),
            Self::KillController(n) => write!(f, "controller {n}: kill -9"),
            Self::FreezeController(n) => write!(f, "controller {n}: SIGSTOP"),
            Self::CutController(n) => write!(f, "controller {n}: cut off from etcd"),
            Self::ControllerClock(n, by) => write!(f, "controller {n}: clock {by:+} s"),
            Self::KillMember(n) => write!(f, "etcd {n}: kill -9"),
            Self::KillLeader => f.write_str("etcd: kill -9 to the leader"),
            Self::FreezeMember(n) => write!(f, "etcd {n}: SIGSTOP"),
            Self::CutMember(n) => write!(f, "etcd {n}: cut off from its fellows"),
            Self::SlowStore(stops) => write!(f, "etcd: slow, stops of {stops} ms"),
            Self::StoreGone => f.write_str("etcd: kill -9 to all members"),
            Self::ControllersGone => f.write_str("controllers: kill -9 to all"),
            Self::Compact => f.write_str("etcd: compacted"),
        }
    }
}

/// A fault with its time.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Step {
    /// When it begins, after the beginning of the plan.
    pub(crate) at: Duration,
    /// How long it stays.
    pub(crate) lasts: Duration,
    /// What.
    pub(crate) fault: Fault,
}

impl Step {
    /// When it is over.
    pub(crate) fn end(&self) -> Duration {
        self.at + self.lasts
    }

    /// What needs calm before it comes when it has it; the rest when it was drawn, or not at all.
    fn moved(mut self, steps: &[Self]) -> Self {
        let calm = self.fault.calm().0;
        if calm > Duration::ZERO {
            let colliding = steps.iter().filter(|other| self.collides(other));
            self.at = colliding.map(|other| other.end() + calm).max().unwrap_or(self.at).max(calm);
        }
        self
    }

    fn collides(&self, other: &Self) -> bool {
        let parts = other.fault.parts();
        let calm = |step: &Self| {
            let (before, after) = step.fault.calm();
            (step.at.saturating_sub(before), step.end() + after)
        };
        let (mine, others) = (calm(self), calm(other));
        self.fault.parts().iter().any(|part| parts.contains(part)) && mine.0 < others.1 && others.0 < mine.1
    }
}

/// The plan of a seed: everything is over and healed at `length`.
pub(crate) fn plan(seed: u64, length: Duration) -> Vec<Step> {
    let mut dice = Dice(seed);
    let mut steps: Vec<Step> = Vec::new();
    let mut at = LEAD;
    while at < length {
        let drawn = (0..DRAWS).map(|_| dice.step(at).moved(&steps)).find(|step| {
            step.end() <= length && step.at >= step.fault.calm().0 && !steps.iter().any(|other| step.collides(other))
        });
        steps.extend(drawn);
        at += Duration::from_millis(dice.between(PAUSE.0, PAUSE.1));
    }
    steps
}

/// SplitMix64.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    /// Any number.
    pub(crate) fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number of `low..=high`.
    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.roll() % (high - low + 1)
    }

    /// One of `0..count`.
    #[allow(clippy::cast_possible_truncation, reason = "counts are small")]
    fn of(&mut self, count: usize) -> usize {
        self.between(0, count as u64 - 1) as usize
    }

    /// So many seconds forward or back, below half of an allocation's lifetime.
    fn wrong_by(&mut self) -> i64 {
        let seconds = i64::try_from(self.between(20, 150)).unwrap_or(60);
        if self.roll().is_multiple_of(2) { seconds } else { -seconds }
    }

    fn step(&mut self, at: Duration) -> Step {
        let relay = self.of(RELAYS);
        // One whose address stays, and how long one may be away whose address does not.
        let fixed = relay % HOME;
        let brief = |longest: u64| if relay == HOME { longest.min(BRIEF) } else { longest };
        let controller = self.of(CONTROLLERS);
        let member = self.of(MEMBERS);
        // Milliseconds. A lease is five seconds: some are shorter, some longer.
        let (fault, (shortest, longest)) = match self.between(0, 99) {
            0..8 => (Fault::KillRelay(relay), (100, brief(4000))),
            8..12 => (Fault::MachineGone, (7000, 10_000)),
            12..16 => (Fault::EndRelay(relay), (4000, 6000)),
            16..19 => (Fault::DrainRelay(relay), (3000, 6000)),
            19..22 => (Fault::KillRelay(fixed), (6000, 9000)),
            22..30 => (Fault::FreezeRelay(relay), (500, brief(8000))),
            30..37 => (Fault::WipeRelay(relay), (100, 2000)),
            37..43 => (Fault::FullDisk(relay), (2000, 6000)),
            43..49 => (Fault::FullDiskKill(relay), (3000, 6000)),
            49..55 => (Fault::CutRelay(relay), (if relay == HOME { 7000 } else { 2000 }, 10_000)),
            55..60 => (Fault::CutClients(relay), (300, 3000)),
            60..65 => (Fault::RelayClock(relay, self.wrong_by()), (4000, 10_000)),
            65..70 => (Fault::KillController(controller), (500, 6000)),
            70..75 => (Fault::FreezeController(controller), (1000, 14_000)),
            75..79 => (Fault::CutController(controller), (2000, 8000)),
            79..81 => (Fault::ControllerClock(controller, self.wrong_by()), (4000, 10_000)),
            81..83 => (Fault::ControllersGone, (2000, 8000)),
            83..86 => (Fault::KillMember(member), (1000, 6000)),
            86..90 => (Fault::KillLeader, (1000, 6000)),
            90..92 => (Fault::FreezeMember(member), (1000, 6000)),
            92..94 => (Fault::CutMember(member), (1000, 6000)),
            94..96 => (Fault::SlowStore(self.between(300, 2500)), (4000, 12_000)),
            96..98 => (Fault::StoreGone, (2000, 8000)),
            _ => (Fault::Compact, (0, 0)),
        };
        Step { at, lasts: Duration::from_millis(self.between(shortest, longest)), fault }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const LENGTH: Duration = Duration::from_secs(60);

    #[test]
    fn a_seed_makes_the_same_plan_each_time_and_another_seed_another() {
        assert_eq!(plan(7, LENGTH), plan(7, LENGTH));
        assert_ne!(plan(7, LENGTH), plan(8, LENGTH));
    }

    #[test]
    fn plans_end_in_time_and_break_nothing_twice() {
        let mut kinds = BTreeSet::new();
        for seed in 0..200 {
            let steps = plan(seed, LENGTH);
            assert!(steps.len() >= 10, "seed {seed}: {} steps", steps.len());
            for (index, step) in steps.iter().enumerate() {
                assert!(step.end() <= LENGTH, "seed {seed}: {step:?}");
                assert!(!steps[..index].iter().any(|other| step.collides(other)), "seed {seed}: {step:?}");
                kinds.insert(format!("{:?}", std::mem::discriminant(&step.fault)));
            }
        }
        assert_eq!(kinds.len(), 23, "{kinds:?}");
    }

    #[test]
    fn a_relay_loses_its_state_only_while_all_else_is_well() {
        let wipe = Step { at: Duration::from_secs(20), lasts: Duration::from_secs(1), fault: Fault::WipeRelay(0) };
        let cases = [
            (Fault::StoreGone, 10, 3, true),
            (Fault::StoreGone, 3, 3, false),
            (Fault::KillController(1), 24, 3, true),
            (Fault::KillController(1), 26, 3, false),
            (Fault::KillRelay(1), 20, 3, false),
            (Fault::CutRelay(1), 20, 3, false),
            (Fault::CutRelay(HOME), 10, 8, true),
            (Fault::MachineGone, 10, 8, true),
        ];
        for (fault, at, lasts, expected) in cases {
            let other = Step { at: Duration::from_secs(at), lasts: Duration::from_secs(lasts), fault };
            assert_eq!(wipe.collides(&other), expected, "{other:?}");
            assert_eq!(other.collides(&wipe), expected, "{other:?}");
        }
    }
}
