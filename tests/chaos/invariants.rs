//! The promises, each a function from what was seen to what is wrong with it (pure).

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use turn_core::Transport;
use turn_core::wire::Method;

use crate::evidence::{Call, Evidence, Flow, Probe, Timeline, Truth, Window};
use crate::history;
use crate::plan::{CONTROLLERS, Fault, HOME, RELAYS, STANDBY, node};

/// P2: media flow again within this time of a relay's start; of its SIGCONT and of the end of a partition too.
const GAP: Duration = Duration::from_secs(2);
/// P3: the lease of a relay whose machine is gone lives no longer, and with [`GAP`] another machine has the calls.
const TERM: Duration = Duration::from_secs(5);
/// A relay that is told to end has done so by then: its time for clients is 2 s.
const ENDS: Duration = Duration::from_secs(4);
/// How much sooner than [`TERM`] it may end: the last report was a second old, and etcd's clock is another one.
const EARLY: Duration = Duration::from_secs(2);
/// How long a relay whose address is given to another one may take to see it where no controller answers it: 2 s of
/// asking, then three probes.
const ASKS: Duration = Duration::from_millis(2800);
/// A pause in the arrivals that a busy machine makes and nobody would call a gap.
const STALL: Duration = Duration::from_millis(1500);
/// What was sent so shortly before a fault was still under way.
const UNDER_WAY: Duration = Duration::from_millis(400);
/// A change of an allocation that was answered this long before its relay lost its state directory is in the store.
/// The promise is 250 ms; a shared machine stretches it.
const STORED: Duration = Duration::from_millis(1500);
/// How long controllers and store must have been well for that, and how long they are not after a fault of theirs: the
/// longest pause between two tries of a relay, an election, a lease.
const WELL: Duration = Duration::from_secs(6);
/// A newcomer at a relay that is there is served within this time.
const SERVED: Duration = Duration::from_secs(3);
/// A dead relay leaves discovery with its lease and a second; with the slack of a shared machine.
const LEASE: Duration = Duration::from_secs(5 + 1 + 2);
/// Longest an operator's word may take to every controller.
const AT_ONCE: Duration = Duration::from_secs(2);
/// A controller that has lost sight of the store calls nobody dead before one lease and 5 s after its return.
const GRACE: Duration = Duration::from_secs(5 + 5 + 2);

/// Everything that is wrong.
pub(crate) fn check(evidence: &Evidence, true_again: Duration) -> Vec<String> {
    let mut wrong = Vec::new();
    for relay in &evidence.died {
        wrong.push(format!("a relay ended by itself: {relay}"));
    }
    for call in &evidence.calls {
        let lost = fate(call, &evidence.timeline);
        wrong.extend(calls(call, evidence, lost.as_deref()).into_iter().map(|what| {
            let (number, relay) = (call.number, call.relay);
            format!(
                "call {number} ({:?}, relay {relay}, {}, born {:.2} s): {what}",
                call.transport,
                call.relayed,
                call.born.as_secs_f64()
            )
        }));
    }
    wrong.extend(shared_addresses(evidence));
    wrong.extend(evidence.probes.iter().filter_map(|probe| newcomer(probe, &evidence.timeline)));
    wrong.extend(discovery(evidence));
    wrong.extend(one_has_it(evidence));
    wrong.extend(history::check(&evidence.history));
    wrong.extend(settled(evidence, true_again));
    wrong
}

/// When a relay could not be heard, widened by nothing: from and until. Those that follow each other closely are one.
fn silences(timeline: &Timeline, relay: usize) -> Vec<(Duration, Duration)> {
    let mut silences: Vec<_> = timeline
        .windows()
        .filter_map(|window| match window.fault {
            // P3: whatever becomes of the machine that had the address.
            Fault::MachineGone | Fault::EndRelay(HOME) if relay == HOME => {
                Some((window.from, window.until.min(window.from + TERM)))
            }
            // It serves until another one says that the address is its own.
            Fault::CutRelay(HOME) if relay == HOME => {
                let from = window.from + TERM.saturating_sub(EARLY);
                Some((from, window.from + TERM + Duration::from_secs(1)))
            }
            Fault::KillRelay(n)
            | Fault::EndRelay(n)
            | Fault::FreezeRelay(n)
            | Fault::WipeRelay(n)
            | Fault::CutClients(n)
                if n == relay =>
            {
                Some((window.from, window.until))
            }
            Fault::FullDiskKill(n) if n == relay => window.restarted.map(|at| (at, at)),
            _ => None,
        })
        .collect();
    silences.sort();
    let mut merged: Vec<(Duration, Duration)> = Vec::new();
    for (from, until) in silences {
        match merged.last_mut() {
            Some(last) if from <= last.1 + GAP => last.1 = last.1.max(until),
            _ => merged.push((from, until)),
        }
    }
    merged
}

/// Whether a time in which a relay is not to be heard covers this one.
fn excused(silences: &[(Duration, Duration)], from: Duration, until: Duration) -> bool {
    silences.iter().any(|(start, end)| from + UNDER_WAY >= *start && until <= *end + GAP)
}

/// Whether nothing was between a relay and the store in this time, for so long before it.
fn stores(timeline: &Timeline, relay: usize, from: Duration, until: Duration, before: Duration) -> bool {
    let from = from.saturating_sub(before);
    let apart = |window: &Window| window.fault.parts_from_store(relay) && window.from <= until && window.until >= from;
    !timeline.windows().any(apart)
}

/// Why no promise covers a call of these faults, if none does.
fn fate(call: &Call, timeline: &Timeline) -> Option<String> {
    for window in timeline.windows() {
        // When it was over with what the relay had, and until when the store heard of it.
        let (died, told) = match window.fault {
            Fault::KillRelay(n) | Fault::WipeRelay(n) if n == call.relay => (window.from, window.from),
            // Those who come back after a 300 are served until it ends.
            Fault::EndRelay(n) if n == call.relay => (window.until.min(window.from + ENDS), window.from),
            Fault::MachineGone if call.relay == HOME => (window.from, window.from),
            // Served until another machine has the address.
            Fault::CutRelay(HOME) if call.relay == HOME => (window.from + TERM + GAP, window.from),
            Fault::FullDiskKill(n) if n == call.relay => {
                let died = window.restarted.unwrap_or(window.from);
                (died, died)
            }
            _ => continue,
        };
        if died < call.born || call.ended.is_some_and(|ended| ended < died) {
            continue;
        }
        // P4: they have to begin anew.
        if call.transport != Transport::Udp {
            return Some(format!("{} took its connection", window.fault));
        }
        let state_lost = !matches!(window.fault, Fault::KillRelay(_) | Fault::EndRelay(_));
        if state_lost && (told < call.born + STORED || call.bound.is_none_or(|bound| told < bound + STORED)) {
            return Some(format!("{} took what the store did not have yet", window.fault));
        }
        // Nothing else is wrong while an address moves.
        if state_lost && !window.fault.moves() && !stores(timeline, call.relay, died, window.until, WELL) {
            return Some(format!("{} took what no controller was there to keep", window.fault));
        }
    }
    None
}

fn calls(call: &Call, evidence: &Evidence, lost: Option<&str>) -> Vec<String> {
    let mut wrong = Vec::new();
    if call.foreign > 0 {
        wrong.push(format!("{} messages of another call", call.foreign));
    }
    if call.damaged > 0 {
        wrong.push(format!("{} damaged messages", call.damaged));
    }
    // P5, and the issue: none of these is ever sent for an allocation that lives or will live again.
    let lives = |at: Duration| {
        let later = |flow: &Flow| flow.arrived.iter().flatten().any(|arrived| *arrived > at);
        lost.is_none() || later(&call.up) || later(&call.down)
    };
    for (at, method, code) in &call.refusals {
        if *method != Method::Allocate && [400, 401, 437, 438].contains(code) && lives(*at) {
            wrong.push(format!("{code} to {method:?} at {:.2} s", at.as_secs_f64()));
        }
    }
    if lost.is_some() {
        return wrong;
    }
    if let Some((at, what)) = &call.broke {
        wrong.push(format!("lost at {:.2} s: {what}", at.as_secs_f64()));
    }
    let Some(bound) = call.bound else { return wrong };
    let silences = silences(&evidence.timeline, call.relay);
    for (way, flow) in [("to the peer", &call.up), ("to the client", &call.down)] {
        wrong.extend(media(way, flow, bound, call.over(evidence.end), &silences));
    }
    wrong
}

/// No message is lost, no pause is long, but for the faults of its relay.
fn media(way: &str, flow: &Flow, bound: Duration, over: Duration, silences: &[(Duration, Duration)]) -> Vec<String> {
    let mut wrong = Vec::new();
    let under_way = over.saturating_sub(Duration::from_secs(1));
    let messages = flow.sent.iter().zip(&flow.arrived);
    let lost = messages
        .filter(|(sent, arrived)| arrived.is_none() && **sent < under_way && !excused(silences, **sent, **sent));
    let lost: Vec<f64> = lost.map(|(sent, _)| sent.as_secs_f64()).collect();
    if let (Some(first), Some(last)) = (lost.first(), lost.last()) {
        wrong.push(format!(
            "{} messages {way} lost outside its relay's faults, sent {first:.2} to {last:.2} s",
            lost.len()
        ));
    }
    for (from, until) in flow.gaps(bound, over) {
        if until - from > STALL && !excused(silences, from, until) {
            let (from, until) = (from.as_secs_f64(), until.as_secs_f64());
            wrong.push(format!("nothing {way} from {from:.2} to {until:.2} s"));
        }
    }
    wrong
}

/// No relayed address is two allocations' at a time.
fn shared_addresses(evidence: &Evidence) -> Vec<String> {
    let mut by_address: BTreeMap<SocketAddr, Vec<&Call>> = BTreeMap::new();
    for call in &evidence.calls {
        by_address.entry(call.relayed).or_default().push(call);
    }
    let mut wrong = Vec::new();
    for (address, calls) in by_address {
        for pair in calls.windows(2) {
            // A client that has lost its connection does not know when its allocation ended: it did before the next began.
            let first_over = pair[0].over(evidence.end);
            if pair[1].born < first_over {
                wrong.push(format!("{address} is call {}'s and call {}'s", pair[0].number, pair[1].number));
            }
        }
    }
    wrong
}

/// P1: who comes to a relay that is there is served.
fn newcomer(probe: &Probe, timeline: &Timeline) -> Option<String> {
    let late = probe.until - probe.from > SERVED;
    let away = |(from, until): &(Duration, Duration)| probe.from <= *until + GAP && probe.until + UNDER_WAY >= *from;
    // Without its state directory a relay has to be told the secrets again.
    let untold = timeline.windows().any(|window| {
        matches!(window.fault, Fault::WipeRelay(n) if n == probe.relay)
            && !stores(timeline, probe.relay, window.from, window.until, WELL)
    });
    let excused = untold || silences(timeline, probe.relay).iter().any(away);
    match &probe.outcome {
        Err(what) if !excused => Some(format!(
            "a newcomer ({:?}) at relay {} at {:.2} s was not served: {what}",
            probe.transport,
            probe.relay,
            probe.from.as_secs_f64()
        )),
        Ok(()) if late && !excused => Some(format!(
            "a newcomer ({:?}) at relay {} at {:.2} s waited {:.2} s",
            probe.transport,
            probe.relay,
            probe.from.as_secs_f64(),
            (probe.until - probe.from).as_secs_f64()
        )),
        _ => None,
    }
}

/// Discovery names nobody who has been dead for longer than a lease and a second, and nobody an operator drains.
fn discovery(evidence: &Evidence) -> Vec<String> {
    let timeline = &evidence.timeline;
    let mut wrong = Vec::new();
    for sighting in &evidence.sightings {
        let Ok(nodes) = &sighting.nodes else { continue };
        for window in timeline.windows() {
            let (Some(relay), Some(name)) = (window.fault.relay(), window.machine.map(node)) else { continue };
            if !nodes.contains(&name) || sighting.at >= window.until {
                continue;
            }
            let (controller, at) = (sighting.controller, sighting.at.as_secs_f64());
            match window.fault {
                Fault::DrainRelay(_) if window.from + AT_ONCE < sighting.at => {
                    wrong.push(format!("controller {controller} names {name}, which is drained, at {at:.2} s"));
                }
                Fault::KillRelay(_) | Fault::FreezeRelay(_) | Fault::MachineGone
                    if window.from + LEASE < sighting.at
                        && stores(timeline, relay, window.from, sighting.at, GRACE) =>
                {
                    wrong.push(format!("controller {controller} names {name}, which is dead, at {at:.2} s"));
                }
                _ => {}
            }
        }
    }
    wrong
}

/// The relay address that moves is on one machine at a time, but while a relay that no controller reaches has not seen yet
/// that another one was given it; and one answers for it in the end.
fn one_has_it(evidence: &Evidence) -> Vec<String> {
    let contested = |at: Duration| {
        let (early, late) = (TERM.saturating_sub(EARLY), TERM + ASKS + GAP);
        let cuts = evidence.timeline.windows().filter(|window| window.fault == Fault::CutRelay(HOME));
        cuts.map(|window| window.from).any(|from| at >= from + early && at <= from + late)
    };
    let twice = evidence.held.iter().filter(|held| held.by.len() > 1 && !contested(held.at));
    let mut wrong: Vec<String> = twice
        .map(|held| format!("two machines have relay {HOME}'s address at {:.2} s", held.at.as_secs_f64()))
        .collect();
    if evidence.answering != 1 {
        wrong.push(format!("{} machines answer for relay {HOME}'s address", evidence.answering));
    }
    wrong
}

/// What of store, relays, clients and discovery does not agree.
pub(crate) fn untrue(truth: &Truth, living: &[Call]) -> Vec<String> {
    let mut wrong: Vec<String> = truth.twice.iter().map(|address| format!("two relays have {address}")).collect();
    let clients: BTreeSet<SocketAddr> = living.iter().map(|call| call.relayed).collect();
    let mut differ = |what: &str, set: &BTreeSet<SocketAddr>, within: &BTreeSet<SocketAddr>| {
        wrong.extend(set.difference(within).map(|address| format!("{address} {what}")));
    };
    differ("is stored, but no relay has it", &truth.stored, &truth.bound);
    differ("is a relay's, but not stored", &truth.bound, &truth.stored);
    differ("is a client's, but not stored", &clients, &truth.stored);
    let everybody = [HOME, STANDBY].map(|home| {
        let fixed = (0..RELAYS).filter(|relay| *relay != HOME);
        fixed.chain([home]).map(node).collect::<BTreeSet<_>>()
    });
    for (controller, named) in truth.named.iter().enumerate() {
        match named {
            Ok(named) if everybody.contains(named) => {}
            other => wrong.push(format!("controller {controller} names {other:?}")),
        }
    }
    if truth.named.len() != CONTROLLERS {
        wrong.push(format!("{} controllers answer", truth.named.len()));
    }
    wrong
}

fn settled(evidence: &Evidence, within: Duration) -> Vec<String> {
    let healed = evidence.timeline.healed();
    match evidence.settled {
        Some(at) if at <= healed + within => Vec::new(),
        Some(at) => vec![format!("the store was true only {:.2} s after the last fault", (at - healed).as_secs_f64())],
        None => {
            let mut wrong = vec!["the store was never true again".to_owned()];
            wrong.extend(evidence.untrue.iter().cloned());
            wrong
        }
    }
}

#[cfg(test)]
#[path = "invariants_tests.rs"]
mod tests;
