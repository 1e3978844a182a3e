//! The candidates of one choice, and which of them is taken next.

use super::estimate::{Estimate, Estimator, Evidence};
use super::load::{self, FULL, OwnPicks};
use super::sessions::rank;
use super::{Considered, NEAR_MS, Outcome, Query, Terms, uris};
use crate::fleet::{NodeState, NodeView, Snapshot};

/// What a second relay between the two ends of a call costs beside the distance, in milliseconds.
const HOP_MS: u32 = 5;
/// A client's region is left for a gain of more than so many milliseconds...
const HOME_GAIN_MS: u64 = 10;
/// ...and more than one part in so many of its score there.
const HOME_GAIN_SHARE: u64 = 3;

/// A node and how it stands.
pub(super) struct Candidate<'a> {
    pub(super) node: &'a NodeView,
    pub(super) rtt: Estimate,
    load: u64,
    penalty_ms: u64,
    session_ms: u32,
    score_ms: u64,
    own_picks: u64,
    state: NodeState,
    fits: bool,
    outcome: Option<Outcome>,
}

/// Every node of a snapshot in order of its id, and how the next is taken.
pub(super) struct Candidates<'a> {
    all: Vec<Candidate<'a>>,
    evidence: &'a Evidence,
    home: Option<&'a str>,
    /// The home is kept though another region has the best score.
    keeps_home: bool,
}

impl<'a> Candidates<'a> {
    pub(super) fn new(
        snapshot: &'a Snapshot,
        terms: &Terms,
        query: &'a Query,
        evidence: &'a Evidence,
        estimator: &Estimator<'_>,
        picks: &OwnPicks,
    ) -> Self {
        // Of neighbours in the order of ids most are of one region.
        let mut of_region: Option<(&str, Estimate, u32)> = None;
        let all = snapshot.nodes.values().map(|node| {
            let region = node.record.region.as_str();
            let (rtt, session_ms) = match of_region {
                Some((known, rtt, session_ms)) if known == region => (rtt, session_ms),
                _ => {
                    let partner = evidence.partner.as_ref();
                    let apart = |region_of: &str| terms.between(region_of, region).rtt_ms.saturating_add(HOP_MS);
                    let fresh = (estimator.to(region), partner.map_or(0, |partner| apart(&partner.region)));
                    of_region = Some((region, fresh.0, fresh.1));
                    fresh
                }
            };
            let is_partner = evidence.partner.as_ref().is_some_and(|partner| partner.node_id == node.record.node_id);
            let session_ms = if is_partner { 0 } else { session_ms };
            let own_picks = picks.since_report(node);
            // The other replicas have answered about as often, and it cannot be seen yet either.
            let unseen = own_picks.saturating_mul(u64::from(snapshot.controllers.max(1)));
            let load = load::of(node, unseen);
            let penalty_ms = load::penalty_ms(load);
            Candidate {
                node,
                rtt,
                load,
                penalty_ms,
                session_ms,
                score_ms: u64::from(rtt.rtt_ms) + u64::from(session_ms) + penalty_ms,
                own_picks,
                state: load::state(node, &terms.thresholds, unseen),
                fits: uris::fits(node, query),
                outcome: None,
            }
        });
        Self { all: all.collect(), evidence, home: query.home.as_deref(), keeps_home: false }
    }

    /// Takes the next one and gives it this place.
    pub(super) fn take(&mut self, place: usize, random: &mut u64) -> Option<&Candidate<'a>> {
        let index = self.next(random)?;
        let candidate = self.all.get_mut(index)?;
        candidate.outcome = Some(Outcome::Chosen { place });
        Some(candidate)
    }

    fn next(&mut self, random: &mut u64) -> Option<usize> {
        let Some(best) = self.best() else {
            let a_ready_one_was_chosen = self.all.iter().any(|c| c.state == NodeState::Ready && c.outcome.is_some());
            return (0..self.all.len())
                .filter(|i| !a_ready_one_was_chosen && self.all[*i].is_open(NodeState::Overloaded))
                .min_by_key(|i| (self.all[*i].load, self.all[*i].rtt.rtt_ms));
        };
        let near: Vec<usize> = (0..self.all.len())
            .filter(|i| self.all[*i].is_open(NodeState::Ready) && self.all[*i].is_near(&self.all[best]))
            .filter(|i| !self.keeps_home || self.is_at_home(*i))
            .collect();
        if let Some(partner) = &self.evidence.partner
            && let Some(shared) = near.iter().find(|i| self.all[**i].node.record.node_id == partner.node_id)
        {
            return Some(*shared);
        }
        let load = |i: usize| self.all[i].load;
        if let Some(affinity) = self.evidence.affinity {
            let by_rank = |i: &&usize| rank(affinity, &self.all[**i].node.record.node_id);
            let first = *near.iter().max_by_key(by_rank)?;
            let second = near.iter().filter(|i| **i != first).max_by_key(by_rank);
            // The ends of many calls on one relay are not worth a full relay.
            let is_busy = |second: &&usize| load(first) > load(**second) + FULL / 10;
            return Some(second.filter(is_busy).copied().unwrap_or(first));
        }
        let first = below(near.len(), random);
        if near.len() == 1 {
            return Some(near[first]);
        }
        // Any other than the first, each as likely.
        let second = (first + 1 + below(near.len() - 1, random)) % near.len();
        let (first, second) = (near[first], near[second]);
        Some(if load(second) < load(first) { second } else { first })
    }

    /// The best that may be taken: of the client's home region, unless another gains enough.
    fn best(&mut self) -> Option<usize> {
        let open = || (0..self.all.len()).filter(|i| self.all[*i].is_open(NodeState::Ready));
        let score = |i: &usize| self.all[*i].score_ms;
        let best = open().min_by_key(score)?;
        let at_home = open().filter(|i| self.is_at_home(*i)).min_by_key(score);
        let kept = at_home.filter(|at_home| {
            let (here, gain) = (score(at_home), score(at_home) - score(&best));
            gain <= HOME_GAIN_MS || gain * HOME_GAIN_SHARE <= here
        });
        self.keeps_home = kept.is_some();
        Some(kept.unwrap_or(best))
    }

    fn is_at_home(&self, index: usize) -> bool {
        self.home.is_some_and(|home| self.all[index].node.record.region == home)
    }

    /// How many stand so.
    pub(super) fn count(&self, outcome: Outcome) -> usize {
        self.all.iter().filter(|candidate| candidate.outcome(None) == outcome).count()
    }

    /// All of them with reasons, best score first.
    pub(super) fn considered(&self) -> Vec<Considered> {
        // A ready node's score is told against the best of the ready ones, a leftover overloaded one's against nothing.
        let ready = self.all.iter().filter(|c| c.state == NodeState::Ready && c.fits);
        let best = ready.min_by_key(|candidate| candidate.score_ms);
        let outcome = |candidate: &Candidate<'_>| match candidate.outcome(best) {
            Outcome::NotDrawn | Outcome::Farther { .. }
                if self.keeps_home && self.home != Some(candidate.node.record.region.as_str()) =>
            {
                Outcome::NotHome
            }
            outcome => outcome,
        };
        let mut considered: Vec<Considered> = self.all.iter().map(|c| c.considered(outcome(c))).collect();
        considered.sort_by_key(|considered| considered.score_ms);
        considered
    }
}

impl Candidate<'_> {
    fn is_open(&self, state: NodeState) -> bool {
        self.state == state && self.fits && self.outcome.is_none()
    }

    /// Whether it is as good as the best one: in its region within [`NEAR_MS`], elsewhere within a sixteenth of its score,
    /// because that is told apart by distance and the other by load.
    fn is_near(&self, best: &Candidate<'_>) -> bool {
        let same = self.node.record.region == best.node.record.region;
        let band = if same { NEAR_MS } else { NEAR_MS.min(best.score_ms / 16) };
        self.score_ms <= best.score_ms + band
    }

    fn outcome(&self, best: Option<&Candidate<'_>>) -> Outcome {
        if let Some(outcome) = self.outcome {
            return outcome;
        }
        if matches!(self.state, NodeState::Draining | NodeState::Suspect | NodeState::Standby) {
            return Outcome::Unfit(self.state);
        }
        if !self.fits {
            return Outcome::NoTransport;
        }
        match (self.state, best) {
            (NodeState::Overloaded, Some(_)) => Outcome::Unfit(NodeState::Overloaded),
            (_, Some(best)) if !self.is_near(best) => {
                Outcome::Farther { by_ms: self.score_ms.saturating_sub(best.score_ms) }
            }
            _ => Outcome::NotDrawn,
        }
    }

    fn considered(&self, outcome: Outcome) -> Considered {
        Considered {
            node_id: self.node.record.node_id.clone(),
            region: self.node.record.region.clone(),
            rtt: self.rtt,
            load_permille: self.load / (FULL / 1000),
            penalty_ms: self.penalty_ms,
            session_ms: self.session_ms,
            score_ms: self.score_ms,
            allocations: self.node.load.allocations,
            own_picks: self.own_picks,
            state: self.state,
            outcome,
        }
    }
}

/// A number below `bound` (which is small and not 0), by splitmix64.
pub(super) fn below(bound: usize, state: &mut u64) -> usize {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    usize::try_from(z % bound as u64).unwrap_or(0)
}
