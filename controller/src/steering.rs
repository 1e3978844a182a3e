//! Which relays a client is sent to: [`choose`], a pure function over the fleet as last seen.
//!
//! A node's score is its distance in milliseconds plus a penalty for its load. Among the nodes within
//! [`NEAR_MS`] of the best score two are drawn at random and the less loaded one wins, so that several controllers
//! with the same picture do not all send everybody to the same node. What this controller answered itself since a
//! node's last report counts against that node at once, so that a burst spreads before the next report says so.

mod load;
mod terms;

#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use turn_core::Transport;

pub use self::load::OwnPicks;
pub use self::terms::{DEFAULT_LIMIT, Distances, MAX_LIMIT, Query, Terms, UNKNOWN_DISTANCE_MS};
use crate::fleet::{NodeRecord, NodeState, NodeView, Snapshot, Thresholds};

/// Scores this close, in milliseconds, are equally near: less than a client notices.
pub const NEAR_MS: u64 = 10;

/// The answer to a [`Query`] with its reasons.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Choice {
    /// Region that distances were taken from: the one asked for, or the home region when none or an unknown one was.
    pub origin: String,
    /// Relays to answer with, best first. Empty when no node may be answered with.
    pub relays: Vec<Relay>,
    /// Every node of the snapshot, in order of node id.
    pub considered: Vec<Considered>,
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
    /// Milliseconds of round trip from the origin, by the table.
    pub distance_ms: u32,
}

/// A node as it looked when the choice was made, and what became of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Considered {
    /// Its name.
    pub node_id: String,
    /// Its region.
    pub region: String,
    /// Milliseconds of round trip from the origin, by the table.
    pub distance_ms: u32,
    /// Load in thousandths: processor plus allocations over what it can carry; may pass 1000.
    pub load_permille: u64,
    /// Distance plus the penalty for its load, in milliseconds; the lowest is best.
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
    /// Its score is worse than the best one by more than [`NEAR_MS`].
    Farther {
        /// Milliseconds above the best score.
        by_ms: u64,
    },
    /// As near as the chosen ones, but not drawn, or more loaded than the other one drawn.
    NotDrawn,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chosen { place } => write!(f, "chosen, place {place}"),
            Self::Unfit(state) => write!(f, "left out: {state}"),
            Self::NoTransport => f.write_str("left out: no listener for the transports asked for"),
            Self::Farther { by_ms } => write!(f, "{by_ms} ms behind the best score"),
            Self::NotDrawn => f.write_str("as near as the chosen, but not drawn or more loaded"),
        }
    }
}

impl Choice {
    /// Region served: that of the best relay, which may be another than the one asked for.
    pub fn region(&self) -> &str {
        self.relays.first().map_or(&self.origin, |relay| &relay.region)
    }

    /// Why the answer is empty, as a sentence for people; `None` when it is not.
    pub fn refusal(&self) -> Option<String> {
        if !self.relays.is_empty() {
            return None;
        }
        if self.considered.is_empty() {
            return Some("no relay has joined the cluster".to_owned());
        }
        let count = |outcome| self.considered.iter().filter(|node| node.outcome == outcome).count();
        let reasons: Vec<String> = [
            (count(Outcome::Unfit(NodeState::Draining)), "draining"),
            (count(Outcome::Unfit(NodeState::Suspect)), "suspect (no connection to a controller)"),
            (count(Outcome::NoTransport), "without a listener for the transports asked for"),
        ]
        .into_iter()
        .filter(|(nodes, _)| *nodes > 0)
        .map(|(nodes, why)| format!("{nodes} {why}"))
        .collect();
        let known = self.considered.len();
        Some(format!("no relay can be offered: of {known} known, {}", reasons.join(", ")))
    }
}

/// Chooses relays for `query`. The same arguments give the same answer; `seed` decides the draws. The picks made are
/// added to `picks`.
///
/// A node that drains or is suspect is never chosen. Overloaded ones are chosen, least loaded first, only while no
/// node is ready.
pub fn choose(snapshot: &Snapshot, terms: &Terms, query: &Query, picks: &mut OwnPicks, seed: u64) -> Choice {
    let origin = origin(snapshot, terms, query);
    let mut candidates: Vec<Candidate<'_>> =
        snapshot.nodes.values().map(|node| Candidate::new(node, origin, terms, query, picks)).collect();

    let mut random = seed;
    for place in 1..=query.limit.clamp(1, MAX_LIMIT) {
        let Some(index) = draw(&candidates, &mut random) else {
            break;
        };
        candidates[index].outcome = Some(Outcome::Chosen { place });
    }

    // A ready node's score is told against the best of the ready ones, a leftover overloaded one's against nothing.
    let best = candidates.iter().filter(|c| c.state == NodeState::Ready && c.fits()).map(|c| c.score_ms).min();
    let mut chosen: Vec<(usize, Relay)> = Vec::new();
    let mut considered = Vec::with_capacity(candidates.len());
    for candidate in candidates {
        let outcome = candidate.outcome(best);
        if let Outcome::Chosen { place } = outcome {
            picks.count(candidate.node, snapshot);
            chosen.push((place, candidate.relay()));
        }
        considered.push(candidate.considered(outcome));
    }
    chosen.sort_by_key(|(place, _)| *place);
    Choice { origin: origin.to_owned(), relays: chosen.into_iter().map(|(_, relay)| relay).collect(), considered }
}

/// An unknown name would be equally far from every node: the home region tells more.
fn origin<'a>(snapshot: &Snapshot, terms: &'a Terms, query: &'a Query) -> &'a str {
    match query.region.as_deref() {
        Some(asked)
            if terms.distances.knows(asked) || snapshot.nodes.values().any(|node| node.record.region == asked) =>
        {
            asked
        }
        _ => &terms.home,
    }
}

struct Candidate<'a> {
    node: &'a NodeView,
    uris: Vec<String>,
    distance_ms: u32,
    load: u64,
    score_ms: u64,
    own_picks: u64,
    state: NodeState,
    outcome: Option<Outcome>,
}

impl<'a> Candidate<'a> {
    fn new(node: &'a NodeView, origin: &str, terms: &Terms, query: &Query, picks: &OwnPicks) -> Self {
        let own_picks = picks.since_report(node);
        let distance_ms = terms.distances.between(origin, &node.record.region);
        let load = load::of(node, own_picks);
        Self {
            node,
            uris: uris(node, query),
            distance_ms,
            load,
            score_ms: u64::from(distance_ms) + load::penalty_ms(load),
            own_picks,
            state: load::state(node, &terms.thresholds, own_picks),
            outcome: None,
        }
    }

    fn fits(&self) -> bool {
        !self.uris.is_empty()
    }

    fn open(&self, state: NodeState) -> bool {
        self.state == state && self.fits() && self.outcome.is_none()
    }

    fn outcome(&self, best: Option<u64>) -> Outcome {
        if let Some(outcome) = self.outcome {
            return outcome;
        }
        if matches!(self.state, NodeState::Draining | NodeState::Suspect) {
            return Outcome::Unfit(self.state);
        }
        if !self.fits() {
            return Outcome::NoTransport;
        }
        match (self.state, best) {
            (NodeState::Overloaded, Some(_)) => Outcome::Unfit(NodeState::Overloaded),
            (_, Some(best)) if self.score_ms > best + NEAR_MS => Outcome::Farther { by_ms: self.score_ms - best },
            _ => Outcome::NotDrawn,
        }
    }

    fn relay(&self) -> Relay {
        Relay {
            node_id: self.node.record.node_id.clone(),
            region: self.node.record.region.clone(),
            uris: self.uris.clone(),
            distance_ms: self.distance_ms,
        }
    }

    fn considered(&self, outcome: Outcome) -> Considered {
        Considered {
            node_id: self.node.record.node_id.clone(),
            region: self.node.record.region.clone(),
            distance_ms: self.distance_ms,
            load_permille: self.load / (load::FULL / 1000),
            score_ms: self.score_ms,
            allocations: self.node.load.allocations,
            own_picks: self.own_picks,
            state: self.state,
            outcome,
        }
    }
}

/// Index of the next relay to answer with.
fn draw(candidates: &[Candidate<'_>], random: &mut u64) -> Option<usize> {
    let ready: Vec<usize> = (0..candidates.len()).filter(|i| candidates[*i].open(NodeState::Ready)).collect();
    let Some(best) = ready.iter().map(|i| candidates[*i].score_ms).min() else {
        let a_ready_one_was_chosen = candidates.iter().any(|c| c.state == NodeState::Ready && c.outcome.is_some());
        return (0..candidates.len())
            .filter(|i| !a_ready_one_was_chosen && candidates[*i].open(NodeState::Overloaded))
            .min_by_key(|i| (candidates[*i].load, candidates[*i].distance_ms));
    };
    let near: Vec<usize> = ready.into_iter().filter(|i| candidates[*i].score_ms <= best + NEAR_MS).collect();
    let first = below(near.len(), random);
    if near.len() == 1 {
        return Some(near[first]);
    }
    // Any other than the first, each as likely.
    let second = (first + 1 + below(near.len() - 1, random)) % near.len();
    let (first, second) = (near[first], near[second]);
    Some(if candidates[second].load < candidates[first].load { second } else { first })
}

/// A number below `bound` (which is small and not 0), by splitmix64.
fn below(bound: usize, state: &mut u64) -> usize {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    usize::try_from(z % bound as u64).unwrap_or(0)
}

/// The URIs of a node for a query. IPv4 comes first because Janus stops at an IPv6 literal; within a family
/// UDP, TCP, TLS, DTLS. What is encrypted goes to the node's host name if it has one: certificates seldom hold IPs.
fn uris(node: &NodeView, query: &Query) -> Vec<String> {
    let NodeRecord { listeners, public_host, .. } = &node.record;
    let mut listeners: Vec<_> = listeners
        .iter()
        // A wildcard is where a relay listens, never where a client reaches it.
        .filter(|listener| query.wants(listener.transport) && !listener.address.ip().is_unspecified())
        .collect();
    listeners.sort_by_key(|listener| (listener.address.is_ipv6(), listener.transport, listener.address));
    let mut uris = Vec::with_capacity(listeners.len());
    for listener in listeners {
        // RFC 7065 §3.1: turns with transport=udp is DTLS (RFC 7350 §4.6).
        let (scheme, transport) = match listener.transport {
            Transport::Udp => ("turn", "udp"),
            Transport::Tcp => ("turn", "tcp"),
            Transport::Tls => ("turns", "tcp"),
            Transport::Dtls => ("turns", "udp"),
        };
        let uri = if scheme == "turns" && !public_host.is_empty() {
            format!("{scheme}:{public_host}:{}?transport={transport}", listener.address.port())
        } else {
            // SocketAddr writes IPv6 in brackets.
            format!("{scheme}:{}?transport={transport}", listener.address)
        };
        // One name stands for both families.
        if !uris.contains(&uri) {
            uris.push(uri);
        }
    }
    uris
}

/// [`choose`] with its memory: what a running controller answers discovery with.
#[derive(Debug)]
pub struct Steering {
    terms: Terms,
    picks: Mutex<OwnPicks>,
    seed: AtomicU64,
}

impl Steering {
    /// Steering by `terms`; `seed` should differ from replica to replica.
    pub fn new(terms: Terms, seed: u64) -> Self {
        Self { terms, picks: Mutex::default(), seed: AtomicU64::new(seed) }
    }

    /// The distances, thresholds and home region in use.
    pub fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Chooses relays and remembers having done so.
    pub fn choose(&self, snapshot: &Snapshot, query: &Query) -> Choice {
        let seed = self.seed.fetch_add(0xD134_2543_DE82_EF95, Ordering::Relaxed);
        let mut picks = self.picks.lock().unwrap_or_else(PoisonError::into_inner);
        choose(snapshot, &self.terms, query, &mut picks, seed)
    }
}

/// A region at a glance.
#[derive(Clone, Debug, Eq, PartialEq, serde::Serialize)]
pub struct RegionView {
    /// Its name.
    pub name: String,
    /// Nodes that have joined.
    pub nodes: u32,
    /// Those of them that are ready.
    pub healthy: u32,
    /// Allocations on all of them.
    pub allocations: u64,
}

/// Every region that has a node, by name.
pub fn regions(snapshot: &Snapshot, thresholds: &Thresholds) -> Vec<RegionView> {
    let mut regions = std::collections::BTreeMap::<&str, RegionView>::new();
    for node in snapshot.nodes.values() {
        let name = node.record.region.as_str();
        let region = regions.entry(name).or_insert_with(|| RegionView {
            name: name.to_owned(),
            nodes: 0,
            healthy: 0,
            allocations: 0,
        });
        region.nodes += 1;
        region.healthy += u32::from(node.state(thresholds) == NodeState::Ready);
        region.allocations += node.load.allocations;
    }
    regions.into_values().collect()
}
