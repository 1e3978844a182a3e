//! Which relays a client is sent to: [`choose`], a pure function over the fleet as last seen and what is known of the
//! client.
//!
//! A node's score is the client's round trip to its region in milliseconds ([`estimate`]: measured by clients of the same
//! network or of those next to it, else by the globe, else by the distances between regions) plus a penalty for its load, plus, for the second end
//! of a call, the way to the relay of the first. Among the nodes that are about as good as the best, two are drawn at random
//! and the less loaded one wins, so that several controllers with the same picture do not all send everybody to the same
//! node. What this controller answered itself since a node's last report counts against that node at once, so that a
//! burst spreads before the next report says so.

mod alternates;
mod detours;
mod draw;
pub mod estimate;
mod load;
mod measured;
mod neighbours;
mod place;
mod regions;
mod service;
mod sessions;
mod terms;
mod uris;

#[cfg(test)]
mod tests;

use std::fmt;

#[cfg(test)]
pub(crate) use self::tests::node as node_for_tests;

pub use self::alternates::{Alternate, alternates};
use self::draw::{Candidates, below};
use self::estimate::{Estimate, Estimator, Evidence};
pub use self::load::OwnPicks;
pub use self::measured::{MAX_RTT_MS, Measurements, Prefix, Shared};
pub use self::place::Place;
pub use self::regions::{RegionView, Target, regions, targets};
pub use self::service::{Explanation, Steering};
pub use self::terms::{DEFAULT_LIMIT, Distances, MAX_LIMIT, MAX_SESSION, Query, Terms, UNKNOWN_DISTANCE_MS};
use crate::fleet::{NodeState, Snapshot};

/// Scores of one region this close, in milliseconds, are equally good: less than a client notices.
pub const NEAR_MS: u64 = 10;

/// The answer to a [`Query`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Choice {
    /// Region that distances were taken from: the one asked for, or the home region when none or an unknown one was; `None`
    /// if they were taken from the client's own network.
    pub origin: Option<String>,
    /// Relays to answer with, best first. Empty when no node may be answered with.
    pub relays: Vec<Relay>,
    /// Why there are none, as a sentence for people; `None` when there are.
    pub refusal: Option<String>,
}

/// A relay in an answer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Relay {
    /// Its name.
    pub node_id: String,
    /// Its region.
    pub region: String,
    /// `turn:` and `turns:` URIs (RFC 7065) in the order to try.
    pub uris: Vec<String>,
    /// The round trip to expect.
    pub rtt: Estimate,
}

/// A node as it looked when the choice was made, and what became of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Considered {
    /// Its name.
    pub node_id: String,
    /// Its region.
    pub region: String,
    /// The round trip to expect.
    pub rtt: Estimate,
    /// Load in thousandths of what it can carry; may pass 1000.
    pub load_permille: u64,
    /// What the load adds to the score, in milliseconds.
    pub penalty_ms: u64,
    /// The way to the relay of the call's other end, in milliseconds; 0 without one.
    pub session_ms: u32,
    /// The sum of the three; the lowest is best.
    pub score_ms: u64,
    /// Allocations it last reported.
    pub allocations: u64,
    /// Answers of this controller that its last report cannot have seen.
    pub own_picks: u64,
    /// Whether it may be answered with, its own picks counted.
    pub state: NodeState,
    /// Why it is or is not in the answer.
    pub outcome: Outcome,
}

/// Why a node is or is not in an answer. Its text goes into explanations.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// In the answer, at this place from 1.
    Chosen {
        /// Place in the answer.
        place: usize,
    },
    /// Its state forbids it.
    Unfit(NodeState),
    /// None of its listeners speaks a transport that was asked for.
    NoTransport,
    /// Its score is worse than the best one by more than what counts as equal.
    Farther {
        /// Milliseconds above the best score.
        by_ms: u64,
    },
    /// The client has a home region, and here is not enough to gain.
    NotHome,
    /// As good as the chosen ones, but not drawn, or more loaded than the other one drawn.
    NotDrawn,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chosen { place } => write!(f, "chosen, place {place}"),
            Self::Unfit(state) => write!(f, "left out: {state}"),
            Self::NoTransport => f.write_str("left out: no listener for the transports asked for"),
            Self::Farther { by_ms } => write!(f, "{by_ms} ms behind the best score"),
            Self::NotHome => f.write_str("not the client's region, which is left for more than 10 ms and a third"),
            Self::NotDrawn => f.write_str("as near as the chosen, but not drawn or more loaded"),
        }
    }
}

impl Choice {
    /// Region served: that of the best relay, which may be another than the one asked for.
    pub fn region(&self) -> &str {
        self.relays.first().map_or(self.origin.as_deref().unwrap_or_default(), |relay| &relay.region)
    }
}

/// Chooses relays for `query`. The same arguments give the same answer; `seed` decides the draws. The picks made are
/// added to `picks`.
///
/// A node that drains or is suspect is never chosen. Overloaded ones are chosen, least loaded first, only while no
/// node is ready.
pub fn choose(
    snapshot: &Snapshot,
    terms: &Terms,
    query: &Query,
    evidence: &Evidence,
    picks: &mut OwnPicks,
    seed: u64,
) -> Choice {
    let (choice, _) = decide(snapshot, terms, query, evidence, picks, seed);
    for relay in &choice.relays {
        picks.count(&snapshot.nodes[&relay.node_id], snapshot);
    }
    choice
}

/// What [`choose`] would answer, and how every node stood, best score first. Nothing is counted.
pub fn explain(
    snapshot: &Snapshot,
    terms: &Terms,
    query: &Query,
    evidence: &Evidence,
    picks: &OwnPicks,
    seed: u64,
) -> (Choice, Vec<Considered>) {
    let (choice, candidates) = decide(snapshot, terms, query, evidence, picks, seed);
    (choice, candidates.considered())
}

fn decide<'a>(
    snapshot: &'a Snapshot,
    terms: &'a Terms,
    query: &'a Query,
    evidence: &'a Evidence,
    picks: &OwnPicks,
    seed: u64,
) -> (Choice, Candidates<'a>) {
    let estimator = estimator(snapshot, terms, query, evidence);
    let mut candidates = Candidates::new(snapshot, terms, query, evidence, &estimator, picks);
    let mut random = seed;
    let mut relays = Vec::new();
    for place in 1..=query.limit.clamp(1, MAX_LIMIT) {
        let Some(taken) = candidates.take(place, &mut random) else { break };
        relays.push(Relay {
            node_id: taken.node.record.node_id.clone(),
            region: taken.node.record.region.clone(),
            uris: uris::uris(taken.node, query),
            rtt: taken.rtt,
        });
    }
    let refusal = relays.is_empty().then(|| refusal(snapshot, &candidates));
    (Choice { origin: estimator.region().map(str::to_owned), relays, refusal }, candidates)
}

/// A region that was asked for is what the client, or its operator, knows better. An unknown name would be equally far from
/// every node.
fn estimator<'a>(snapshot: &Snapshot, terms: &'a Terms, query: &'a Query, evidence: &'a Evidence) -> Estimator<'a> {
    let is_known =
        |asked: &&str| terms.names(asked) || snapshot.nodes.values().any(|node| node.record.region == *asked);
    match query.region.as_deref().filter(is_known) {
        Some(asked) => Estimator::of_region(terms, asked),
        None => Estimator::of_network(terms, evidence).unwrap_or_else(|| Estimator::of_region(terms, &terms.home)),
    }
}

fn refusal(snapshot: &Snapshot, candidates: &Candidates<'_>) -> String {
    if snapshot.nodes.is_empty() {
        return "no relay has joined the cluster".to_owned();
    }
    let reasons: Vec<String> = [
        (Outcome::Unfit(NodeState::Draining), "draining"),
        (Outcome::Unfit(NodeState::Suspect), "suspect (no connection to a controller)"),
        (Outcome::NoTransport, "without a listener for the transports asked for"),
    ]
    .into_iter()
    .map(|(outcome, why)| (candidates.count(outcome), why))
    .filter(|(nodes, _)| *nodes > 0)
    .map(|(nodes, why)| format!("{nodes} {why}"))
    .collect();
    format!("no relay can be offered: of {} known, {}", snapshot.nodes.len(), reasons.join(", "))
}
