//! What links tell of themselves: for metrics, for the controller, for people.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use turn_core::MemberId;

use super::usability::Usability;

/// Why a packet or frame of a link came to nothing. A bounded metric label.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(usize)]
pub enum LinkDrop {
    /// It waited among the packets of the longest flow when the queue was full.
    QueueFull,
    /// It waited too long.
    TooOld,
    /// Longer than a link carries.
    TooLong,
    /// No connection to the member.
    NotUsable,
    /// Its source is not an address of the member that sent it.
    NotItsSource,
    /// Its destination is not an address of this relay.
    NotOurDestination,
    /// It breaks the rules of its kind.
    Malformed,
    /// Of a kind or version that is not known here.
    UnknownFrame,
    /// A piece whose others did not come.
    Unjoined,
    /// An answer to a client of this relay that nobody has asked for.
    UnaskedReply,
    /// Nobody there, or no room on the way to the worker.
    NotDelivered,
    /// To be passed on in a way that is not allowed: over a second hop, or to somebody without a link.
    NotPassedOn,
}

impl LinkDrop {
    const ALL: [Self; 12] = [
        Self::QueueFull,
        Self::TooOld,
        Self::TooLong,
        Self::NotUsable,
        Self::NotItsSource,
        Self::NotOurDestination,
        Self::Malformed,
        Self::UnknownFrame,
        Self::Unjoined,
        Self::UnaskedReply,
        Self::NotDelivered,
        Self::NotPassedOn,
    ];

    /// The word for it.
    pub fn label(self) -> &'static str {
        match self {
            Self::QueueFull => "queue_full",
            Self::TooOld => "too_old",
            Self::TooLong => "too_long",
            Self::NotUsable => "not_usable",
            Self::NotItsSource => "not_its_source",
            Self::NotOurDestination => "not_our_destination",
            Self::Malformed => "malformed",
            Self::UnknownFrame => "unknown_frame",
            Self::Unjoined => "unjoined",
            Self::UnaskedReply => "unasked_reply",
            Self::NotDelivered => "not_delivered",
            Self::NotPassedOn => "not_passed_on",
        }
    }
}

/// Counts by [`LinkDrop`].
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct LinkDrops([u64; LinkDrop::ALL.len()]);

impl LinkDrops {
    pub(super) fn add(&mut self, reason: LinkDrop, count: u64) {
        self.0[reason as usize] += count;
    }

    /// How many for this reason.
    pub fn of(&self, reason: LinkDrop) -> u64 {
        self.0[reason as usize]
    }

    /// All of them, those that are 0 too.
    pub fn iter(&self) -> impl Iterator<Item = (LinkDrop, u64)> {
        LinkDrop::ALL.into_iter().map(|reason| (reason, self.of(reason)))
    }
}

/// What a link has carried since the process began.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct LinkCounts {
    /// Packets handed to QUIC.
    pub sent_packets: u64,
    /// Their payload.
    pub sent_bytes: u64,
    /// Packets handed to workers.
    pub received_packets: u64,
    /// Their payload.
    pub received_bytes: u64,
    /// Packets of connections that go over a third member, sent to where this link ends.
    pub passed_on_packets: u64,
    /// Connections made, in either direction.
    pub connects: u64,
    /// What came to nothing.
    pub drops: LinkDrops,
}

/// Which way packets take to a member.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum LinkPath {
    /// The link between the two.
    #[default]
    Direct,
    /// By a third member.
    Via {
        /// Its node id.
        node_id: Arc<str>,
    },
}

/// One link as it is.
#[derive(Clone, Debug)]
pub struct LinkReport {
    /// The far end.
    pub member: MemberId,
    /// Its node id.
    pub node_id: Arc<str>,
    /// How packets travel to it.
    pub usability: Usability,
    /// Why not by a link, in few words; empty where they do.
    pub why: &'static str,
    /// Address of the far end, while there is a direct connection.
    pub remote: Option<SocketAddr>,
    /// Nobody else's traffic is on it.
    pub private: bool,
    /// Round trip of the direct connection, smoothed.
    pub rtt: Option<Duration>,
    /// Packets lost of the last ten seconds, in thousandths, 0..=1000.
    pub loss_permille: u16,
    /// The way that packets take.
    pub path: LinkPath,
    /// Why that way, in few words.
    pub path_why: &'static str,
    /// Bytes that may be on their way.
    pub congestion_window: u64,
    /// Longest UDP payload of the path.
    pub mtu: u16,
    /// Bytes that wait for their turn here.
    pub queued_bytes: u64,
    /// What it has carried.
    pub counts: LinkCounts,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_place_and_word() {
        let mut drops = LinkDrops::default();
        for (count, reason) in (1..).zip(LinkDrop::ALL) {
            drops.add(reason, count);
        }
        let seen: Vec<_> = drops.iter().map(|(_, count)| count).collect();
        assert_eq!(seen, (1..=LinkDrop::ALL.len() as u64).collect::<Vec<_>>());
        let words: std::collections::BTreeSet<_> = LinkDrop::ALL.into_iter().map(LinkDrop::label).collect();
        assert_eq!(words.len(), LinkDrop::ALL.len());
    }
}
