//! How loaded a node is, counting what this controller answered since it last said so.

use std::collections::HashMap;

use crate::fleet::{NodeState, NodeView, Snapshot, Thresholds};

/// Load of a node that carries as much as it can; load is counted in these millionths.
pub(super) const FULL: u64 = 1_000_000;
/// Penalty of a node at full load, in milliseconds. It grows with the sixteenth power of the load: at half load it is
/// nothing, because a client gains nothing from a far relay that is idle; a region is left when its nodes are about to
/// be full (3 ms at 80 %, 19 at 90 %).
const FULL_PENALTY_MS: u64 = 100;
/// Allocations one worker is taken to carry where a node names no limit: an audio and video call's ~100 packets a
/// second each way for every one of them is about what a core relays.
const NOMINAL_PER_WORKER: u64 = 1_000;

/// The state of a node with `picks` more allocations than it last reported.
pub(super) fn state(node: &NodeView, thresholds: &Thresholds, picks: u64) -> NodeState {
    let state = node.state(thresholds);
    let allocations = u128::from(node.load.allocations) + u128::from(picks);
    let most = u128::from(node.record.max_allocations);
    let filled = most > 0 && allocations * 100 >= most * u128::from(thresholds.allocations_percent);
    if state == NodeState::Ready && filled { NodeState::Overloaded } else { state }
}

/// The larger of the busiest worker's processor and the allocations over what the node can carry, plus what was picked
/// since: a fresh pick shows whichever of the two leads.
pub(super) fn of(node: &NodeView, picks: u64) -> u64 {
    let capacity = match node.record.max_allocations {
        0 => NOMINAL_PER_WORKER * u64::from(node.record.workers.max(1)),
        most => most,
    };
    let share = |of: u64| u64::try_from(u128::from(of) * u128::from(FULL) / u128::from(capacity)).unwrap_or(u64::MAX);
    let processor = u64::from(node.load.busiest_worker_permille) * (FULL / 1000);
    processor.max(share(node.load.allocations)).saturating_add(share(picks))
}

/// What a load adds to a node's distance, in milliseconds.
pub(super) fn penalty_ms(load: u64) -> u64 {
    // Past one and a half times full every node is as bad as the next, and the powers stay small.
    let load = load.min(FULL * 3 / 2);
    let square = |x: u64| x * x / FULL;
    square(square(square(square(load)))) * FULL_PENALTY_MS / FULL
}

/// What this controller answered with since each node's last report. Holds at most one number per known node.
#[derive(Clone, Debug, Default)]
pub struct OwnPicks(HashMap<String, SinceReport>);

#[derive(Clone, Copy, Debug)]
struct SinceReport {
    reported_at: u64,
    picks: u64,
}

impl OwnPicks {
    /// Answers that named `node` and that its last report cannot have seen.
    pub fn since_report(&self, node: &NodeView) -> u64 {
        match self.0.get(&node.record.node_id) {
            Some(since) if since.reported_at == node.load.reported_at => since.picks,
            _ => 0,
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn count(&mut self, node: &NodeView, snapshot: &Snapshot) {
        if self.0.len() > snapshot.nodes.len() {
            self.0.retain(|id, _| snapshot.nodes.contains_key(id));
        }
        let picks = self.since_report(node) + 1;
        let reported_at = node.load.reported_at;
        self.0.insert(node.record.node_id.clone(), SinceReport { reported_at, picks });
    }
}
