//! One relay's end of its backbone link to another, as `load/<id>` has it.

use serde::{Deserialize, Serialize};

/// See [`turnpike_proto::v1::LinkReport`].
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct LinkRecord {
    /// The other relay.
    pub to: String,
    /// Whether there is a connection.
    pub state: LinkState,
    /// How packets leave.
    pub path: LinkPath,
    /// The member in between, if there is one.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub via: String,
    /// Why they leave that way, for people.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub why: String,
    /// Round trip, microseconds; 0 is not measured yet.
    pub rtt_us: u32,
    /// Lost on the way there, 0..=1000.
    pub loss_permille: u32,
    /// Congestion window, bytes.
    pub cwnd: u64,
    /// Bytes that wait to be sent.
    pub queued: u64,
    /// Packets and bytes sent since the process began.
    pub sent: (u64, u64),
    /// Packets and bytes received since the process began.
    pub received: (u64, u64),
    /// Packets dropped on this side since the process began.
    pub dropped: u64,
}

/// See [`turnpike_proto::v1::LinkState`].
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkState {
    /// There is no connection.
    #[default]
    Down,
    /// There is one.
    Up,
    /// It is silent while it carries packets.
    Suspect,
    /// Of a newer version.
    #[serde(other)]
    Unknown,
}

/// See [`turnpike_proto::v1::LinkPath`].
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkPath {
    /// They are dropped.
    #[default]
    None,
    /// By the link itself.
    Direct,
    /// By a third member.
    Via,
    /// From relayed port to relayed port.
    PlainUdp,
    /// Of a newer version.
    #[serde(other)]
    Unknown,
}
