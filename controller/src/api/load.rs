//! A node's report, as messages and records carry it.

use turn_core::Transport;
use turnpike_proto::v1;

use crate::fleet::{ByTransport, LinkPath, LinkRecord, LinkState, LoadRecord};
use crate::identity::is_name;

/// Most links of a relay that are kept.
const LINKS: usize = 256;
/// Longest reason that is kept, characters.
const WHY: usize = 120;

/// Allocations by transport, as a relay reports them. What a newer relay may count beside is left out.
pub(super) fn by_transport(reported: &[v1::TransportAllocations]) -> ByTransport {
    let mut counts = ByTransport::default();
    for count in reported {
        let transport = match count.transport() {
            v1::Transport::Udp => Transport::Udp,
            v1::Transport::Tcp => Transport::Tcp,
            v1::Transport::Tls => Transport::Tls,
            v1::Transport::Dtls => Transport::Dtls,
            v1::Transport::Unspecified => continue,
        };
        counts.add(transport, count.allocations);
    }
    counts
}

/// The report as operators are told it.
pub(super) fn message(load: &LoadRecord) -> v1::Load {
    let count = |(transport, allocations): (Transport, u64)| v1::TransportAllocations {
        transport: self::transport(transport).into(),
        allocations,
    };
    v1::Load {
        allocations: load.allocations,
        packets: load.packets,
        bytes: load.bytes,
        busiest_worker_permille: load.busiest_worker_permille,
        dropped: load.dropped,
        draining: load.draining,
        bytes_per_second: load.bytes_per_second,
        by_transport: load.by_transport.each().into_iter().filter(|(_, count)| *count > 0).map(count).collect(),
        settings_revision: load.settings_revision,
        ends_at: load.ends_at,
        journal_failed: load.journal_failed,
        overloaded: load.overloaded,
        links: load.links.iter().map(link_message).collect(),
    }
}

/// The links of a relay, as it reports them. What is no name of a relay is left out.
pub(super) fn links(reported: &[v1::LinkReport]) -> Vec<LinkRecord> {
    let link = |link: &v1::LinkReport| LinkRecord {
        to: link.node_id.clone(),
        state: match link.state() {
            v1::LinkState::Up => LinkState::Up,
            v1::LinkState::Suspect => LinkState::Suspect,
            v1::LinkState::Down => LinkState::Down,
            v1::LinkState::Unspecified => LinkState::Unknown,
        },
        path: match link.path() {
            v1::LinkPath::Direct => LinkPath::Direct,
            v1::LinkPath::Via => LinkPath::Via,
            v1::LinkPath::PlainUdp => LinkPath::PlainUdp,
            v1::LinkPath::None => LinkPath::None,
            v1::LinkPath::Unspecified => LinkPath::Unknown,
        },
        via: Some(&link.via).filter(|via| is_name(via)).cloned().unwrap_or_default(),
        why: link.why.chars().filter(|c| !c.is_control()).take(WHY).collect(),
        rtt_us: link.rtt_us,
        loss_permille: link.loss_permille.min(1000),
        cwnd: link.cwnd,
        queued: link.queued_bytes,
        sent: (link.sent_packets, link.sent_bytes),
        received: (link.received_packets, link.received_bytes),
        dropped: link.dropped,
    };
    reported.iter().filter(|link| is_name(&link.node_id)).take(LINKS).map(link).collect()
}

fn link_message(link: &LinkRecord) -> v1::LinkReport {
    let state = match link.state {
        LinkState::Up => v1::LinkState::Up,
        LinkState::Suspect => v1::LinkState::Suspect,
        LinkState::Down => v1::LinkState::Down,
        LinkState::Unknown => v1::LinkState::Unspecified,
    };
    let path = match link.path {
        LinkPath::Direct => v1::LinkPath::Direct,
        LinkPath::Via => v1::LinkPath::Via,
        LinkPath::PlainUdp => v1::LinkPath::PlainUdp,
        LinkPath::None => v1::LinkPath::None,
        LinkPath::Unknown => v1::LinkPath::Unspecified,
    };
    v1::LinkReport {
        node_id: link.to.clone(),
        state: state.into(),
        path: path.into(),
        via: link.via.clone(),
        why: link.why.clone(),
        rtt_us: link.rtt_us,
        loss_permille: link.loss_permille,
        cwnd: link.cwnd,
        queued_bytes: link.queued,
        sent_packets: link.sent.0,
        sent_bytes: link.sent.1,
        received_packets: link.received.0,
        received_bytes: link.received.1,
        dropped: link.dropped,
    }
}

/// A transport as messages name it.
pub(super) fn transport(transport: Transport) -> v1::Transport {
    match transport {
        Transport::Udp => v1::Transport::Udp,
        Transport::Tcp => v1::Transport::Tcp,
        Transport::Tls => v1::Transport::Tls,
        Transport::Dtls => v1::Transport::Dtls,
    }
}
