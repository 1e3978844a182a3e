//! How far a drain has come, for people (pure).

use crate::fleet::{ByTransport, NodeView};

use super::view::transport_name;

/// Why a draining node does, what is left, and until when, at `now` (Unix ms).
pub(super) fn describe(node: &NodeView, now: u64) -> String {
    let load = &node.load;
    let mut parts = Vec::new();
    match &node.drain {
        Some(drain) => {
            let since = span(now.saturating_sub(drain.since));
            let by = if drain.by.is_empty() { String::new() } else { format!(" by {}", drain.by) };
            parts.push(format!("told to drain{by} {since} ago"));
        }
        None if load.ends_at > 0 => parts.push("told to stop".to_owned()),
        None => parts.push("takes no new clients".to_owned()),
    }
    parts.push(left(load.allocations, &load.by_transport));
    if load.ends_at > 0 {
        parts.push(format!("ends in {}", span(load.ends_at.saturating_sub(now))));
    }
    match node.drain.as_ref().map_or(0, |drain| drain.deadline) {
        0 => {}
        deadline if deadline > now => parts.push(format!("{} to go", span(deadline - now))),
        deadline if load.allocations > 0 => {
            parts.push(format!("{} past its deadline", span(now - deadline)));
        }
        _ => {}
    }
    parts.join(", ")
}

/// `3 allocations left (2 udp, 1 tls)`.
fn left(allocations: u64, by_transport: &ByTransport) -> String {
    let noun = if allocations == 1 { "allocation" } else { "allocations" };
    let counted: Vec<_> = by_transport.each().into_iter().filter(|(_, count)| *count > 0).collect();
    if allocations == 0 {
        return "no allocation left".to_owned();
    }
    // A relay of an older version does not say.
    if counted.iter().map(|(_, count)| count).sum::<u64>() != allocations {
        return format!("{allocations} {noun} left");
    }
    let by: Vec<_> =
        counted.into_iter().map(|(transport, count)| format!("{count} {}", transport_name(transport))).collect();
    format!("{allocations} {noun} left ({})", by.join(", "))
}

fn span(ms: u64) -> String {
    match ms / 1000 {
        seconds @ 0..60 => format!("{seconds} s"),
        seconds @ 60..3600 => format!("{} min", seconds / 60),
        seconds if seconds % 3600 < 60 => format!("{} h", seconds / 3600),
        seconds => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{DrainRecord, LoadRecord};
    use crate::steering::node_for_tests;

    const NOW: u64 = 10_000_000;

    #[test]
    fn a_drain_says_who_what_is_left_and_until_when() {
        let load = |allocations, udp, tls| LoadRecord {
            allocations,
            by_transport: ByTransport { udp, tls, ..ByTransport::default() },
            ..LoadRecord::default()
        };
        let drain = |deadline| Some(DrainRecord { since: NOW - 190_000, deadline, by: "admin/ann".to_owned() });
        let stopping = LoadRecord { ends_at: NOW + 30_000, ..load(1, 1, 0) };
        let cases = [
            (load(0, 0, 0), drain(0), "told to drain by admin/ann 3 min ago, no allocation left", false),
            (
                load(3, 2, 1),
                drain(NOW + 5_460_000),
                "told to drain by admin/ann 3 min ago, 3 allocations left (2 udp, 1 tls), 1 h 31 min to go",
                false,
            ),
            (
                load(1, 0, 0),
                drain(NOW - 5_000),
                "told to drain by admin/ann 3 min ago, 1 allocation left, 5 s past its deadline",
                true,
            ),
            (load(0, 0, 0), drain(NOW - 5_000), "told to drain by admin/ann 3 min ago, no allocation left", false),
            (stopping, None, "told to stop, 1 allocation left (1 udp), ends in 30 s", false),
            (load(2, 1, 0), None, "takes no new clients, 2 allocations left", false),
        ];
        for (load, drain, expected, overdue) in cases {
            let node = NodeView { load, drain, ..node_for_tests("eu-1", "eu") };
            assert_eq!(describe(&node, NOW), expected);
            assert_eq!(node.is_overdue(NOW), overdue, "{expected}");
        }
    }
}
