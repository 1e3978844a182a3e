//! What happened to relays, told from one look at the fleet to the next (pure).
//!
//! A relay is its relay address here: it is what allocations hang on and what clients know of it. Nodes come and go
//! under it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::fleet::{NodeListener, NodeView, Snapshot};

/// Lost relays are remembered for this long, in milliseconds, so that whoever asks meanwhile hears of them.
const LOST_KEPT_MS: u64 = 15 * 60 * 1000;
/// Lost relays remembered, at most.
const LOST_KEPT: usize = 256;

/// A relay address and who serves it, or served it last.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Relay {
    /// Who.
    pub node_id: String,
    /// Where.
    pub region: String,
    /// Identity of its allocations.
    pub relay_address: IpAddr,
    /// Where relayed transport addresses are.
    pub relay_ips: Vec<IpAddr>,
    /// Where clients reach it.
    pub listeners: Vec<NodeListener>,
    /// Host name of its TLS and DTLS listeners; empty is by IP.
    pub public_host: String,
    /// Worst first: lost, suspect, draining, ready.
    pub condition: Condition,
    /// It takes no new clients; also while it is suspect.
    pub draining: bool,
    /// By when it is to be empty or ends itself, Unix ms; 0 is not known.
    pub drain_deadline: u64,
    /// Since when the condition holds, Unix ms.
    pub since: u64,
    boot_id: String,
}

/// How a relay is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Condition {
    /// It serves.
    Ready,
    /// It serves the clients it has.
    Draining,
    /// It has lost touch with the controllers.
    Suspect,
    /// Nobody has its address.
    Lost,
}

impl Condition {
    /// Its name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Suspect => "suspect",
            Self::Lost => "lost",
        }
    }
}

/// What happened to a relay.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum RelayEventKind {
    /// It is new, or takes new clients again.
    Ready,
    /// It takes no new clients, or is to be empty at another time than before.
    Draining,
    /// Its stream broke.
    Suspect,
    /// Its lease ended, or it left, without a successor.
    Lost,
    /// It is back under the same address: the same process, or another one of the node.
    Restored,
    /// Another node serves its address.
    Moved {
        /// Who did before.
        former: String,
    },
}

impl RelayEventKind {
    /// Its name in JSON and metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Suspect => "suspect",
            Self::Lost => "lost",
            Self::Restored => "restored",
            Self::Moved { .. } => "moved",
        }
    }
}

/// Something happened to a relay.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RelayEvent {
    /// What.
    pub kind: RelayEventKind,
    /// The relay after it.
    pub relay: Relay,
}

/// The relays as last seen.
#[derive(Clone, Debug, Default)]
pub(super) struct Relays {
    by_address: BTreeMap<IpAddr, Relay>,
}

impl Relays {
    /// Every relay, the lost ones included.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Relay> {
        self.by_address.values()
    }

    /// Looks at the fleet anew, at `at` (Unix ms). While the view does not follow the store (`synced`) nothing is lost:
    /// what is missing may only be out of sight.
    pub(super) fn observe(&mut self, snapshot: &Snapshot, synced: bool, at: u64) -> Vec<RelayEvent> {
        let mut serving: BTreeMap<IpAddr, &NodeView> = BTreeMap::new();
        for node in snapshot.nodes.values() {
            let address = node.record.relay_address;
            if serving.get(&address).is_none_or(|other| node.epoch > other.epoch) {
                serving.insert(address, node);
            }
        }
        let known: BTreeSet<IpAddr> = self.by_address.keys().chain(serving.keys()).copied().collect();
        let mut events = Vec::new();
        for address in known {
            let before = self.by_address.get(&address);
            let Some(node) = serving.get(&address) else {
                if let Some(before) = before.filter(|before| synced && before.condition != Condition::Lost) {
                    let lost = Relay { condition: Condition::Lost, since: at, ..before.clone() };
                    events.push(RelayEvent { kind: RelayEventKind::Lost, relay: lost.clone() });
                    self.by_address.insert(address, lost);
                }
                continue;
            };
            let mut after = Relay::new(node, at);
            if let Some(before) = before.filter(|before| before.condition == after.condition) {
                after.since = before.since;
            }
            let kinds = before.map_or_else(|| vec![after.news()], |before| changes(before, &after));
            events.extend(kinds.into_iter().map(|kind| RelayEvent { kind, relay: after.clone() }));
            self.by_address.insert(address, after);
        }
        self.forget(at);
        events
    }

    fn forget(&mut self, at: u64) {
        self.by_address
            .retain(|_, relay| relay.condition != Condition::Lost || at.saturating_sub(relay.since) < LOST_KEPT_MS);
        let mut lost: Vec<(u64, IpAddr)> = self
            .iter()
            .filter(|relay| relay.condition == Condition::Lost)
            .map(|relay| (relay.since, relay.relay_address))
            .collect();
        lost.sort_unstable();
        for (_, address) in lost.iter().rev().skip(LOST_KEPT) {
            self.by_address.remove(address);
        }
    }
}

impl Relay {
    fn new(node: &NodeView, at: u64) -> Self {
        let draining = node.drains();
        let condition = match (node.load.suspect, draining) {
            (true, _) => Condition::Suspect,
            (false, true) => Condition::Draining,
            (false, false) => Condition::Ready,
        };
        let record = &node.record;
        Self {
            node_id: record.node_id.clone(),
            region: record.region.clone(),
            relay_address: record.relay_address,
            relay_ips: record.relay_ips.clone(),
            listeners: record.listeners.clone(),
            public_host: record.public_host.clone(),
            condition,
            draining,
            drain_deadline: drain_deadline(node),
            since: at,
            boot_id: record.boot_id.clone(),
        }
    }

    /// What to say of a relay that nobody has heard of.
    fn news(&self) -> RelayEventKind {
        match self.condition {
            Condition::Suspect => RelayEventKind::Suspect,
            _ if self.draining => RelayEventKind::Draining,
            _ => RelayEventKind::Ready,
        }
    }
}

/// By when a node is to be empty or ends itself, whichever comes first, Unix ms; 0 is not known.
fn drain_deadline(node: &NodeView) -> u64 {
    let asked = node.drain.as_ref().map_or(0, |drain| drain.deadline);
    [asked, node.load.ends_at].into_iter().filter(|at| *at > 0).min().unwrap_or(0)
}

/// What happened between two looks at the same relay address.
fn changes(before: &Relay, after: &Relay) -> Vec<RelayEventKind> {
    let mut kinds = Vec::new();
    let was_away = matches!(before.condition, Condition::Lost | Condition::Suspect);
    if after.node_id != before.node_id {
        kinds.push(RelayEventKind::Moved { former: before.node_id.clone() });
    } else if after.boot_id != before.boot_id || (was_away && after.condition != Condition::Suspect) {
        kinds.push(RelayEventKind::Restored);
    }
    if after.condition == Condition::Suspect && before.condition != Condition::Suspect {
        kinds.push(RelayEventKind::Suspect);
    }
    if after.draining && (!before.draining || after.drain_deadline != before.drain_deadline) {
        kinds.push(RelayEventKind::Draining);
    } else if before.draining && !after.draining && kinds.is_empty() {
        kinds.push(RelayEventKind::Ready);
    }
    kinds
}

#[cfg(test)]
pub(super) mod tests {
    use RelayEventKind::{Draining, Lost, Moved, Ready, Restored, Suspect};

    use super::*;
    use crate::fleet::sample::node_record;
    use crate::fleet::{DrainRecord, LoadRecord};

    /// A node as a look at the fleet shows it.
    pub(in super::super) fn node(id: &str, last: u8) -> NodeView {
        NodeView {
            record: node_record(id, "eu", IpAddr::from([192, 0, 2, last])),
            epoch: 1,
            load: LoadRecord::default(),
            drain: None,
        }
    }

    fn with(mut node: NodeView, change: impl FnOnce(&mut NodeView)) -> NodeView {
        change(&mut node);
        node
    }

    pub(in super::super) fn fleet(nodes: &[NodeView]) -> Snapshot {
        let nodes = nodes.iter().map(|node| (node.record.node_id.clone(), node.clone())).collect();
        Snapshot { nodes, ..Snapshot::default() }
    }

    fn kinds(events: Vec<RelayEvent>) -> Vec<RelayEventKind> {
        events.into_iter().map(|event| event.kind).collect()
    }

    /// From one look to the next: what is told, and how the relay is then.
    #[test]
    fn every_change_is_told_once() {
        let ready = || node("eu-1", 1);
        let draining = || with(ready(), |node| node.load.draining = true);
        let suspect = || with(ready(), |node| node.load.suspect = true);
        let suspect_draining = || with(draining(), |node| node.load.suspect = true);
        let cordoned =
            |deadline| with(ready(), |node| node.drain = Some(DrainRecord { deadline, ..DrainRecord::default() }));
        let restarted = || with(ready(), |node| (node.record.boot_id, node.epoch) = ("again".to_owned(), 2));
        let restarted_draining = || with(restarted(), |node| node.load.draining = true);
        let standby = || with(node("eu-9", 1), |node| node.epoch = 2);
        let moved = || Moved { former: "eu-1".to_owned() };
        type Row = (&'static str, Option<NodeView>, Option<NodeView>, Vec<RelayEventKind>);
        let rows: Vec<Row> = vec![
            ("it joins", None, Some(ready()), vec![Ready]),
            ("it joins draining", None, Some(draining()), vec![Draining]),
            ("it joins suspect", None, Some(suspect()), vec![Suspect]),
            ("nothing", Some(ready()), Some(ready()), vec![]),
            ("it drains", Some(ready()), Some(draining()), vec![Draining]),
            ("it is cordoned", Some(ready()), Some(cordoned(0)), vec![Draining]),
            ("it is to be empty sooner", Some(cordoned(90)), Some(cordoned(50)), vec![Draining]),
            ("it says what it was told", Some(cordoned(0)), Some(draining()), vec![]),
            ("it takes clients again", Some(draining()), Some(ready()), vec![Ready]),
            ("its stream broke", Some(ready()), Some(suspect()), vec![Suspect]),
            ("its stream broke while it drained", Some(draining()), Some(suspect_draining()), vec![Suspect]),
            ("it was told to drain while suspect", Some(suspect()), Some(suspect_draining()), vec![Draining]),
            ("its stream is back", Some(suspect()), Some(ready()), vec![Restored]),
            ("its stream is back and it drains", Some(suspect()), Some(draining()), vec![Restored, Draining]),
            ("it drained all the time", Some(suspect_draining()), Some(draining()), vec![Restored]),
            ("it was killed and started", Some(ready()), Some(restarted()), vec![Restored]),
            ("it was killed, seen so, and started", Some(suspect()), Some(restarted()), vec![Restored]),
            ("it restarted cordoned", Some(draining()), Some(restarted_draining()), vec![Restored]),
            ("it restarted after its drain", Some(draining()), Some(restarted()), vec![Restored]),
            ("it is gone", Some(ready()), None, vec![Lost]),
            ("it is gone after a while of silence", Some(suspect()), None, vec![Lost]),
            ("a standby took over", Some(ready()), Some(standby()), vec![moved()]),
            ("a standby took over from a suspect", Some(suspect()), Some(standby()), vec![moved()]),
        ];
        for (what, before, after, told) in rows {
            let mut relays = Relays::default();
            relays.observe(&fleet(before.as_slice()), true, 1);
            assert_eq!(kinds(relays.observe(&fleet(after.as_slice()), true, 2)), told, "{what}");
            assert_eq!(kinds(relays.observe(&fleet(after.as_slice()), true, 3)), [], "{what}, once");
        }
    }

    #[test]
    fn the_sooner_of_two_ends_is_the_deadline() {
        for (asked, ends_at, deadline) in [(0, 0, 0), (5, 0, 5), (0, 7, 7), (5, 7, 5), (9, 7, 7)] {
            let node = with(node("eu-1", 1), |node| {
                node.drain = Some(DrainRecord { deadline: asked, ..DrainRecord::default() });
                node.load.ends_at = ends_at;
            });
            assert_eq!(Relay::new(&node, 1).drain_deadline, deadline);
        }
    }

    #[test]
    fn nothing_is_lost_while_the_store_is_out_of_sight() {
        let mut relays = Relays::default();
        relays.observe(&fleet(&[node("eu-1", 1)]), true, 1);
        assert_eq!(kinds(relays.observe(&fleet(&[]), false, 2)), []);
        assert_eq!(relays.iter().count(), 1);
        assert_eq!(kinds(relays.observe(&fleet(&[node("eu-1", 1)]), true, 3)), [], "it was there all along");
        assert_eq!(kinds(relays.observe(&fleet(&[]), true, 4)), [Lost]);
    }

    #[test]
    fn the_lost_come_back_as_restored_or_moved() {
        for (successor, kind) in [(node("eu-1", 1), Restored), (node("eu-2", 1), Moved { former: "eu-1".to_owned() })] {
            let mut relays = Relays::default();
            relays.observe(&fleet(&[node("eu-1", 1)]), true, 1);
            relays.observe(&fleet(&[]), true, 2);
            assert_eq!(relays.iter().map(|relay| relay.condition).collect::<Vec<_>>(), [Condition::Lost]);
            assert_eq!(kinds(relays.observe(&fleet(&[successor]), true, 3)), [kind]);
            assert_eq!(relays.iter().map(|relay| relay.condition).collect::<Vec<_>>(), [Condition::Ready]);
        }
    }

    #[test]
    fn of_two_nodes_with_one_address_the_owner_counts() {
        let mut relays = Relays::default();
        let standby = with(node("eu-0", 1), |node| node.epoch = 2);
        let events = relays.observe(&fleet(&[node("eu-1", 1), standby]), true, 1);
        assert_eq!(events.len(), 1);
        assert_eq!(events[0].relay.node_id, "eu-0");
    }

    #[test]
    fn the_lost_are_forgotten_in_time_and_number() {
        let mut relays = Relays::default();
        relays.observe(&fleet(&[node("eu-1", 1)]), true, 1);
        relays.observe(&fleet(&[]), true, 10);
        relays.observe(&fleet(&[]), true, 10 + LOST_KEPT_MS - 1);
        assert_eq!(relays.iter().count(), 1);
        relays.observe(&fleet(&[]), true, 10 + LOST_KEPT_MS);
        assert_eq!(relays.iter().count(), 0);

        let many = (0..u16::try_from(LOST_KEPT).expect("small") + 9).map(|number| {
            let [high, low] = number.to_be_bytes();
            with(node(&format!("n{number}"), 0), |node| node.record.relay_address = IpAddr::from([10, 0, high, low]))
        });
        relays.observe(&fleet(&many.collect::<Vec<_>>()), true, 20);
        relays.observe(&fleet(&[]), true, 21);
        assert_eq!(relays.iter().count(), LOST_KEPT);
    }

    #[test]
    fn since_is_when_the_condition_began() {
        let mut relays = Relays::default();
        for at in [5, 6] {
            relays.observe(&fleet(&[node("eu-1", 1)]), true, at);
            assert_eq!(relays.iter().map(|relay| relay.since).collect::<Vec<_>>(), [5]);
        }
        relays.observe(&fleet(&[with(node("eu-1", 1), |node| node.load.draining = true)]), true, 7);
        assert_eq!(relays.iter().map(|relay| relay.since).collect::<Vec<_>>(), [7]);
    }
}
