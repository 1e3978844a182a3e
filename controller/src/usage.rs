//! What allocations have used: counted by relays, kept here (promise P11).
//!
//! | keys | what |
//! |---|---|
//! | `counters/<relay address>/<ULID>/<origin>` | the last checkpoint of one count of an allocation that lives |
//! | `ledger/<ULID>` | what an allocation that has ended has used |
//!
//! A relay says totals, each under the *origin* of its count: one for as long as its state directory and its machine
//! live. An allocation that moved to another machine has several, whose sum it used. So nothing counts twice, whatever is
//! said twice. A count that nobody closed was lost with its machine after its last checkpoint: the entry is *unclean*.
//!
//! | file | what it does |
//! |---|---|
//! | `book` | what relays say becomes writes |
//! | `list` | pages for operators |
//! | `sweep` | closes what lost machines left, forgets what is old |

mod book;
mod list;
mod sweep;

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use turn_core::{AllocationId, text};
use turnpike_proto::v1;

pub(crate) use book::{Counted, book, read};
pub use list::{UsageFilter, UsagePage, list};
pub use sweep::Retention;
pub(crate) use sweep::{Swept, entry_of_lost, sweep_counters, sweep_ledger};

/// Before every checkpoint's key.
pub(crate) const COUNTERS: &str = "counters/";
/// Before every closed entry's key.
pub(crate) const LEDGER: &str = "ledger/";

/// Packets and bytes of application data in each direction.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Totals {
    /// From the client to peers.
    pub packets_to_peer: u64,
    /// From the client to peers.
    pub bytes_to_peer: u64,
    /// From peers to the client.
    pub packets_to_client: u64,
    /// From peers to the client.
    pub bytes_to_client: u64,
}

impl Totals {
    fn combine(self, other: Self, with: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            packets_to_peer: with(self.packets_to_peer, other.packets_to_peer),
            bytes_to_peer: with(self.bytes_to_peer, other.bytes_to_peer),
            packets_to_client: with(self.packets_to_client, other.packets_to_client),
            bytes_to_client: with(self.bytes_to_client, other.bytes_to_client),
        }
    }
}

/// One count of an allocation.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Segment {
    /// Its name; a number as text, because JSON has none of 64 bits everywhere.
    pub origin: String,
    /// Who counted.
    pub node_id: String,
    /// What was counted.
    #[serde(flatten)]
    pub totals: Totals,
    /// The allocation is older than the count.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub continued: bool,
    /// Some of it may be lost.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unclean: bool,
    /// Nothing more was counted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub closed: bool,
    /// Unix ms, when it was said last.
    pub at: u64,
}

/// `counters/<relay address>/<ULID>/<origin>`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Checkpoint {
    /// USERNAME, escaped.
    pub user: String,
    /// What was counted.
    #[serde(flatten)]
    pub segment: Segment,
}

/// Why an allocation ended.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Reason {
    /// Refresh with lifetime 0.
    Deleted,
    /// Its lifetime ran out.
    Expired,
    /// Its connection closed.
    Closed,
    /// An operator revoked it.
    Revoked,
    /// Nobody knows: its process, or its machine, was lost. Or a later version knows.
    #[default]
    #[serde(other)]
    Unknown,
}

impl From<v1::EndReason> for Reason {
    fn from(reason: v1::EndReason) -> Self {
        match reason {
            v1::EndReason::Deleted => Self::Deleted,
            v1::EndReason::Expired => Self::Expired,
            v1::EndReason::Closed => Self::Closed,
            v1::EndReason::Revoked => Self::Revoked,
            v1::EndReason::Unspecified => Self::Unknown,
        }
    }
}

impl From<Reason> for v1::EndReason {
    fn from(reason: Reason) -> Self {
        match reason {
            Reason::Deleted => Self::Deleted,
            Reason::Expired => Self::Expired,
            Reason::Closed => Self::Closed,
            Reason::Revoked => Self::Revoked,
            Reason::Unknown => Self::Unspecified,
        }
    }
}

/// `ledger/<ULID>`: what an allocation has used. It began at the time in its name.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Entry {
    /// USERNAME, escaped.
    pub user: String,
    /// Of the relay that it was on.
    pub relay_address: IpAddr,
    /// Unix ms.
    pub ended_at: u64,
    /// Why.
    #[serde(default)]
    pub reason: Reason,
    /// Some of its use may be missing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unclean: bool,
    /// Its counts.
    pub segments: Vec<Segment>,
}

/// What an allocation has used, for people.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Usage {
    /// The allocation.
    pub id: AllocationId,
    /// USERNAME.
    pub user: Vec<u8>,
    /// Who counted last.
    pub node_id: String,
    /// Where.
    pub relay_address: IpAddr,
    /// Unix ms and why; nothing while it lives.
    pub ended: Option<(u64, Reason)>,
    /// The sum of its counts.
    pub totals: Totals,
    /// Some of it may be missing.
    pub unclean: bool,
    /// Unix ms of the last checkpoint.
    pub counted_at: u64,
}

impl Usage {
    fn new(
        id: AllocationId,
        relay_address: IpAddr,
        user: &str,
        ended: Option<(u64, Reason)>,
        segments: &[Segment],
    ) -> Self {
        let last = segments.iter().max_by_key(|segment| segment.at);
        Self {
            id,
            // What we wrote ourselves can be read.
            user: text::unescape(user).unwrap_or_default(),
            node_id: last.map(|segment| segment.node_id.clone()).unwrap_or_default(),
            relay_address,
            ended,
            totals: sum(segments),
            unclean: false,
            counted_at: last.map_or(0, |segment| segment.at),
        }
    }
}

/// Unix ms at which an allocation began: its name says it.
pub(crate) fn began(id: AllocationId) -> u64 {
    id.0[..6].iter().fold(0, |time, byte| time << 8 | u64::from(*byte))
}

/// Key prefix of the checkpoints of an allocation.
pub(crate) fn counters_of(relay_address: IpAddr, id: AllocationId) -> String {
    format!("{COUNTERS}{relay_address}/{}/", id.to_text())
}

/// Key of a closed entry.
pub(crate) fn ledger_key(id: AllocationId) -> String {
    format!("{LEDGER}{}", id.to_text())
}

fn parse_counters_key(key: &str) -> Option<(IpAddr, AllocationId, &str)> {
    let mut parts = key.strip_prefix(COUNTERS)?.split('/');
    let (address, id, origin) = (parts.next()?, parts.next()?, parts.next()?);
    Some((address.parse().ok()?, AllocationId::from_text(id)?, origin))
}

fn parse_ledger_key(key: &str) -> Option<AllocationId> {
    AllocationId::from_text(key.strip_prefix(LEDGER)?)
}

fn sum(segments: &[Segment]) -> Totals {
    segments.iter().fold(Totals::default(), |sum, segment| sum.combine(segment.totals, u64::saturating_add))
}

/// Takes a count in: of one that is known the higher totals, and what was said last.
fn merge(segments: &mut Vec<Segment>, new: Segment) {
    match segments.iter_mut().find(|known| known.origin == new.origin) {
        Some(known) => {
            let totals = known.totals.combine(new.totals, u64::max);
            let unclean = known.unclean || new.unclean;
            let newer = if new.at >= known.at { new } else { known.clone() };
            *known = Segment { totals, unclean, ..newer };
        }
        None => segments.push(new),
    }
}

/// Whether some of an allocation's use may be missing: a count that nobody closed or that lost something, or use before
/// the first count of which there is none.
fn is_unclean(segments: &[Segment]) -> bool {
    segments.is_empty()
        || segments.iter().any(|segment| segment.unclean || !segment.closed)
        || segments.iter().all(|segment| segment.continued)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn segment(origin: &str, bytes: u64, at: u64) -> Segment {
        Segment {
            origin: origin.to_owned(),
            node_id: "eu-1".to_owned(),
            totals: Totals { packets_to_peer: bytes / 10, bytes_to_peer: bytes, ..Totals::default() },
            continued: false,
            unclean: false,
            closed: true,
            at,
        }
    }

    #[test]
    fn saying_it_twice_or_late_changes_nothing() {
        let mut segments = Vec::new();
        for new in [segment("a", 100, 1), segment("b", 50, 2), segment("a", 100, 3), segment("b", 20, 1)] {
            merge(&mut segments, new);
        }
        assert_eq!((segments.len(), sum(&segments).bytes_to_peer), (2, 150));
        assert!(!is_unclean(&segments));
    }

    #[test]
    fn what_may_be_missing_is_unclean() {
        let open = Segment { closed: false, ..segment("a", 1, 1) };
        let lossy = Segment { unclean: true, ..segment("a", 1, 1) };
        let continued = Segment { continued: true, ..segment("b", 1, 1) };
        let cases = [
            ("nobody counted", vec![], true),
            ("closed", vec![segment("a", 1, 1)], false),
            ("handed on", vec![segment("a", 1, 1), continued.clone()], false),
            ("lost with its machine", vec![open, continued.clone()], true),
            ("what was before is not there", vec![continued], true),
            ("the machine went down", vec![lossy], true),
        ];
        for (what, segments, expected) in cases {
            assert_eq!(is_unclean(&segments), expected, "{what}");
        }
    }

    #[test]
    fn names_say_when_they_began() {
        assert_eq!(began(AllocationId::new(1_700_000_000_123, [7; 10])), 1_700_000_000_123);
    }
}
