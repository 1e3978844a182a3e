//! What the watched keys `nodes/`, `owners/`, `load/`, `drains/`, `waiting/` and `revoked/` say, kept as one [`Snapshot`] (pure).

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::{
    DrainRecord, Drains, LoadRecord, NodeRecord, NodeView, OwnerRecord, Revoked, RevokedRecord, Snapshot, Thresholds,
    drain, revoked, waiting,
};
use crate::store::WatchEvent;

/// Margin beyond the lease within which nothing that vanished in an outage is called dead.
const GRACE_MARGIN: Duration = Duration::from_secs(5);

/// A change of the fleet worth telling.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FleetEvent {
    /// Unix ms.
    pub at: u64,
    /// Who.
    pub node_id: String,
    /// Where.
    pub region: String,
    /// What.
    pub change: FleetChange,
}

/// What happened to a node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum FleetChange {
    /// It registered.
    Joined,
    /// It left, or its lease ran out.
    Left,
    /// Its state, process or owned epoch changed; the text is for people, e.g. `ready -> draining`.
    Changed(String),
}

/// Which of the watched prefixes an event is of.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(super) enum Prefix {
    Nodes,
    Owners,
    Load,
    Drains,
    Controllers,
    Waiting,
    Revoked,
}

impl Prefix {
    pub(super) const ALL: [Self; 7] =
        [Self::Nodes, Self::Owners, Self::Load, Self::Drains, Self::Controllers, Self::Waiting, Self::Revoked];

    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Nodes => "nodes/",
            Self::Owners => "owners/",
            Self::Load => "load/",
            Self::Drains => drain::PREFIX,
            Self::Controllers => crate::presence::PREFIX,
            Self::Waiting => waiting::PREFIX,
            Self::Revoked => revoked::PREFIX,
        }
    }
}

/// The keeper's state. A node whose key vanishes is dropped at once if it has shown life since the last trouble (then
/// its lease had every chance to be renewed), else only when a grace of lease + 5 s after the trouble is over: nobody is
/// declared dead because the *store* was away, or the controller that renewed its lease.
#[derive(Debug)]
pub(super) struct Bookkeeping {
    grace: Duration,
    nodes: BTreeMap<String, Held>,
    owners: HashMap<IpAddr, OwnerRecord>,
    loads: HashMap<String, LoadRecord>,
    drains: Drains,
    waiting: BTreeMap<String, NodeRecord>,
    revoked: Revoked,
    departed: BTreeSet<IpAddr>,
    controllers: HashSet<String>,
    settled: bool,
    /// Keys told since a watch's reset; a prefix in here is being told anew.
    telling: HashMap<Prefix, HashSet<String>>,
    /// The store does not take changes: no lease can be granted anew.
    doubted: bool,
    grace_until: Option<Instant>,
}

#[derive(Debug)]
struct Held {
    record: NodeRecord,
    /// Last epoch seen, kept while its owner key is away.
    epoch: u64,
    load: LoadRecord,
    /// Wrote something since the last trouble.
    alive: bool,
    /// Its key is gone; dropped when the grace is over.
    gone: bool,
}

impl Bookkeeping {
    pub(super) fn new(lease: Duration) -> Self {
        let unsynced = Prefix::ALL.map(|prefix| (prefix, HashSet::new()));
        Self {
            grace: lease + GRACE_MARGIN,
            nodes: BTreeMap::new(),
            owners: HashMap::new(),
            loads: HashMap::new(),
            drains: Drains::new(),
            waiting: BTreeMap::new(),
            revoked: Revoked::new(),
            departed: BTreeSet::new(),
            controllers: HashSet::new(),
            settled: false,
            telling: HashMap::from(unsynced),
            doubted: false,
            grace_until: None,
        }
    }

    /// Whether all prefixes have been told in full and no watch is in doubt.
    pub(super) fn is_synced(&self) -> bool {
        self.telling.is_empty()
    }

    pub(super) fn apply(&mut self, prefix: Prefix, event: WatchEvent, now: Instant) {
        match event {
            WatchEvent::Put(entry) => {
                let Some(name) = entry.key.strip_prefix(prefix.text()) else {
                    return;
                };
                if let Some(told) = self.telling.get_mut(&prefix) {
                    told.insert(name.to_owned());
                }
                if let Err(error) = self.put(prefix, name, &entry.value) {
                    tracing::warn!(key = entry.key, %error, "an unreadable key of the fleet is left out");
                    self.delete(prefix, name, now);
                }
            }
            WatchEvent::Delete { key, .. } => {
                if let Some(name) = key.strip_prefix(prefix.text()) {
                    self.delete(prefix, name, now);
                }
            }
            WatchEvent::Reset => {
                self.telling.insert(prefix, HashSet::new());
            }
            WatchEvent::Synced => {
                let told = self.telling.remove(&prefix).unwrap_or_default();
                self.synced(prefix, &told, now);
            }
        }
    }

    /// Whether the store takes changes, as this replica finds it.
    pub(super) fn doubt(&mut self, doubted: bool, now: Instant) {
        if doubted != self.doubted {
            self.doubted = doubted;
            self.begin_grace(now);
        }
    }

    /// Drops what has vanished long enough. Returns when the grace will be over, if that is known.
    pub(super) fn expire(&mut self, now: Instant) -> Option<Instant> {
        self.settled = !self.is_in_grace(now);
        if !self.settled {
            return self.grace_until.filter(|_| !self.doubted && self.is_synced());
        }
        self.nodes.retain(|_, held| !held.gone);
        None
    }

    /// Whether it may be somebody else's fault that a node is silent.
    pub(super) fn is_in_grace(&self, now: Instant) -> bool {
        self.doubted || !self.is_synced() || self.grace_until.is_some_and(|until| until > now)
    }

    /// From now on signs of life count anew.
    fn begin_grace(&mut self, now: Instant) {
        self.grace_until = Some(now + self.grace);
        self.departed.clear();
        for held in self.nodes.values_mut() {
            held.alive = false;
        }
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let view = |id: &String, held: &Held| NodeView {
            record: held.record.clone(),
            epoch: held.epoch,
            load: LoadRecord { suspect: held.load.suspect || held.gone, ..held.load.clone() },
            drain: self.drains.get(id).cloned(),
        };
        Snapshot {
            nodes: self.nodes.iter().map(|(id, held)| (id.clone(), view(id, held))).collect(),
            drains: self.drains.clone(),
            revoked: self.revoked.clone(),
            waiting: self.waiting.clone(),
            settled: self.settled,
            departed: self.departed.clone(),
            controllers: u32::try_from(self.controllers.len()).unwrap_or(u32::MAX),
        }
    }

    fn put(&mut self, prefix: Prefix, name: &str, value: &[u8]) -> Result<(), String> {
        let telling = self.telling.contains_key(&prefix);
        match prefix {
            Prefix::Nodes => {
                let record: NodeRecord = serde_json::from_slice(value).map_err(|error| error.to_string())?;
                if record.node_id != name {
                    return Err(format!("it is of node {:?}", record.node_id));
                }
                let owner = self.owners.get(&record.relay_address);
                let epoch = owner.filter(|owner| owner.node_id == name).map(|owner| owner.epoch);
                let before = self.nodes.get(name);
                let kept = before.filter(|held| held.record.boot_id == record.boot_id);
                let held = Held {
                    epoch: epoch.or(kept.map(|held| held.epoch)).unwrap_or(0),
                    load: self.loads.get(name).cloned().unwrap_or_default(),
                    alive: !telling || kept.is_some_and(|held| held.alive),
                    gone: false,
                    record,
                };
                self.departed.remove(&held.record.relay_address);
                self.nodes.insert(name.to_owned(), held);
            }
            Prefix::Owners => {
                let address: IpAddr = name.parse().map_err(|_| "the key names no address".to_owned())?;
                let owner: OwnerRecord = serde_json::from_slice(value).map_err(|error| error.to_string())?;
                if let Some(held) = self.nodes.get_mut(&owner.node_id)
                    && held.record.relay_address == address
                {
                    held.epoch = owner.epoch;
                }
                self.owners.insert(address, owner);
            }
            Prefix::Load => {
                let load: LoadRecord = serde_json::from_slice(value).map_err(|error| error.to_string())?;
                if let Some(held) = self.nodes.get_mut(name) {
                    held.load = load.clone();
                    held.alive |= !telling;
                }
                self.loads.insert(name.to_owned(), load);
            }
            Prefix::Drains => {
                let drain: DrainRecord = serde_json::from_slice(value).map_err(|error| error.to_string())?;
                self.drains.insert(name.to_owned(), drain);
            }
            Prefix::Controllers => drop(self.controllers.insert(name.to_owned())),
            Prefix::Waiting => {
                let record: NodeRecord = serde_json::from_slice(value).map_err(|error| error.to_string())?;
                self.waiting.insert(name.to_owned(), record);
            }
            Prefix::Revoked => {
                let record: RevokedRecord = serde_json::from_slice(value).map_err(|error| error.to_string())?;
                self.revoked.insert(name.to_owned(), record);
            }
        }
        Ok(())
    }

    fn delete(&mut self, prefix: Prefix, name: &str, now: Instant) {
        match prefix {
            Prefix::Nodes => {
                let in_grace = self.is_in_grace(now);
                match self.nodes.get_mut(name) {
                    Some(held) if in_grace && !held.alive => held.gone = true,
                    _ => {
                        let left = self.nodes.remove(name).filter(|held| held.alive);
                        self.departed.extend(left.map(|held| held.record.relay_address));
                    }
                }
            }
            Prefix::Owners => {
                if let Ok(address) = name.parse::<IpAddr>() {
                    self.owners.remove(&address);
                }
            }
            Prefix::Load => drop(self.loads.remove(name)),
            Prefix::Drains => drop(self.drains.remove(name)),
            Prefix::Waiting => drop(self.waiting.remove(name)),
            Prefix::Revoked => drop(self.revoked.remove(name)),
            // The relays that had their sessions with it are on their way to another one.
            Prefix::Controllers => {
                self.controllers.remove(name);
                self.begin_grace(now);
            }
        }
    }

    fn synced(&mut self, prefix: Prefix, told: &HashSet<String>, now: Instant) {
        match prefix {
            Prefix::Nodes => {
                self.begin_grace(now);
                for (name, held) in &mut self.nodes {
                    held.gone |= !told.contains(name);
                }
            }
            Prefix::Owners => self.owners.retain(|address, _| told.contains(&address.to_string())),
            Prefix::Load => self.loads.retain(|name, _| told.contains(name)),
            Prefix::Drains => self.drains.retain(|name, _| told.contains(name)),
            Prefix::Waiting => self.waiting.retain(|name, _| told.contains(name)),
            Prefix::Revoked => self.revoked.retain(|name, _| told.contains(name)),
            Prefix::Controllers => self.controllers.retain(|name| told.contains(name)),
        }
    }
}

/// What changed from one snapshot to the next, in node order.
pub(super) fn differences(before: &Snapshot, after: &Snapshot, thresholds: &Thresholds, at: u64) -> Vec<FleetEvent> {
    let event = |node: &NodeView, change| FleetEvent {
        at,
        node_id: node.record.node_id.clone(),
        region: node.record.region.clone(),
        change,
    };
    let mut events = Vec::new();
    for (id, node) in &before.nodes {
        if !after.nodes.contains_key(id) {
            events.push(event(node, FleetChange::Left));
        }
    }
    for (id, node) in &after.nodes {
        let Some(old) = before.nodes.get(id) else {
            events.push(event(node, FleetChange::Joined));
            continue;
        };
        let (state, old_state) = (node.state(thresholds), old.state(thresholds));
        let mut details = Vec::new();
        if node.record.boot_id != old.record.boot_id {
            details.push(format!("restarted, {state}"));
        } else if state != old_state {
            details.push(format!("{old_state} -> {state}"));
        } else if old.epoch != 0 && node.epoch != old.epoch {
            details.push(format!("epoch {} -> {}", old.epoch, node.epoch));
        }
        details.extend(drain_change(old.drain.as_ref(), node.drain.as_ref(), at));
        if !details.is_empty() {
            events.push(event(node, FleetChange::Changed(details.join(", "))));
        }
    }
    events
}

/// What an operator has said, for people.
fn drain_change(before: Option<&DrainRecord>, after: Option<&DrainRecord>, at: u64) -> Option<String> {
    match (before, after) {
        (before, Some(after)) if before != Some(after) => Some(match after.deadline.checked_sub(at) {
            Some(left) if after.deadline > 0 => format!("told to drain within {} s by {}", left / 1000, after.by),
            _ => format!("told to drain by {}", after.by),
        }),
        (Some(_), None) => Some("uncordoned".to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::NodeState;
    use crate::fleet::sample::node_record;
    use crate::store::Entry;

    const LEASE: Duration = Duration::from_secs(5);

    #[test]
    fn a_joined_node_is_seen_whole() {
        let mut book = synced_with(&["eu-1"], Instant::now());
        let now = Instant::now();
        let load = LoadRecord { allocations: 3, ..LoadRecord::default() };
        book.apply(Prefix::Load, put("load/eu-1", &load), now);
        let node = &book.snapshot().nodes["eu-1"];
        assert_eq!((node.epoch, node.load.allocations, node.load.suspect), (4, 3, false));
    }

    #[test]
    fn a_lease_that_ends_while_the_store_is_up_is_a_death() {
        let now = Instant::now();
        let mut book = synced_with(&["eu-1"], now);
        book.apply(Prefix::Load, put("load/eu-1", &LoadRecord::default()), now + LEASE);
        book.apply(Prefix::Nodes, gone("nodes/eu-1"), now + LEASE * 2 - Duration::from_secs(1));
        assert!(book.snapshot().nodes.is_empty());
    }

    #[test]
    fn nobody_is_dead_because_the_store_was_away() {
        let now = Instant::now();
        let mut book = synced_with(&["eu-1", "eu-2"], now);
        for node in ["load/eu-1", "load/eu-2"] {
            book.apply(Prefix::Load, put(node, &LoadRecord::default()), now);
        }
        // The store is away, then comes back without eu-1.
        for prefix in Prefix::ALL {
            book.apply(prefix, WatchEvent::Reset, now);
        }
        assert!(!book.is_synced());
        assert_eq!(book.snapshot().nodes.len(), 2, "the stale view goes on being served");
        tell(&mut book, &["eu-2"], now);
        assert!(book.is_synced());
        assert!(book.snapshot().nodes["eu-1"].load.suspect);
        assert!(!book.snapshot().nodes["eu-2"].load.suspect);

        // eu-2's lease ended in the outage: its key goes after the resync, without a sign of life in between.
        book.apply(Prefix::Nodes, gone("nodes/eu-2"), now + Duration::from_secs(1));
        assert!(book.snapshot().nodes["eu-2"].load.suspect);

        // eu-1 comes back in time, eu-2 never does.
        let back = now + LEASE;
        assert!(book.expire(back).is_some());
        assert_eq!(book.snapshot().nodes.len(), 2, "the grace is longer than the lease");
        book.apply(Prefix::Nodes, put("nodes/eu-1", &node("eu-1")), back);
        assert!(!book.snapshot().nodes["eu-1"].load.suspect);
        let end = now + LEASE + GRACE_MARGIN;
        assert_eq!(book.expire(end - Duration::from_millis(1)), Some(end));
        assert_eq!(book.snapshot().nodes.len(), 2);
        assert_eq!(book.expire(end), None);
        assert_eq!(book.snapshot().nodes.keys().collect::<Vec<_>>(), ["eu-1"]);
    }

    #[test]
    fn a_key_that_vanishes_long_after_the_outage_is_a_death() {
        let now = Instant::now();
        let mut book = synced_with(&["eu-1"], now);
        book.apply(Prefix::Nodes, gone("nodes/eu-1"), now + LEASE + GRACE_MARGIN);
        assert!(book.snapshot().nodes.is_empty());
    }

    #[test]
    fn an_unreadable_key_harms_nobody_else() {
        let now = Instant::now();
        let mut book = synced_with(&["eu-1"], now);
        let lies = put("nodes/eu-9", &node("eu-8"));
        book.apply(Prefix::Nodes, lies, now);
        book.apply(Prefix::Owners, put("owners/nowhere", &LoadRecord::default()), now);
        assert_eq!(book.snapshot().nodes.keys().collect::<Vec<_>>(), ["eu-1"]);
    }

    #[test]
    fn events_say_what_changed() {
        let now = Instant::now();
        let thresholds = Thresholds::default();
        let mut book = synced_with(&["eu-1"], now);
        let empty = Snapshot::default();
        let joined = book.snapshot();
        let changes = |before: &Snapshot, after: &Snapshot| {
            let events = differences(before, after, &thresholds, 7);
            events.into_iter().map(|event| event.change).collect::<Vec<_>>()
        };
        assert_eq!(changes(&empty, &joined), [FleetChange::Joined]);
        assert_eq!(changes(&joined, &joined), []);
        let load = LoadRecord { draining: true, ..LoadRecord::default() };
        book.apply(Prefix::Load, put("load/eu-1", &load), now);
        let draining = book.snapshot();
        assert_eq!(changes(&joined, &draining), [FleetChange::Changed("ready -> draining".to_owned())]);
        assert_eq!(changes(&draining, &empty), [FleetChange::Left]);
    }

    #[test]
    fn the_word_of_an_operator_holds_whatever_the_node_does() {
        let now = Instant::now();
        let thresholds = Thresholds::default();
        let mut book = synced_with(&["eu-1"], now);
        let ready = book.snapshot();
        let drain = DrainRecord { since: 5, deadline: 0, by: "operator/ann".to_owned() };
        for id in ["eu-1", "eu-9"] {
            book.apply(Prefix::Drains, put(&format!("drains/{id}"), &drain), now);
        }
        let draining = book.snapshot();
        assert_eq!(draining.nodes["eu-1"].state(&thresholds), NodeState::Draining);
        assert_eq!(draining.drains.keys().collect::<Vec<_>>(), ["eu-1", "eu-9"], "the absent one is kept");
        let told = |before: &Snapshot, after: &Snapshot| {
            let event = differences(before, after, &thresholds, 7_000).pop().expect("an event");
            let FleetChange::Changed(detail) = event.change else { panic!("{event:?}") };
            detail
        };
        assert_eq!(told(&ready, &draining), "ready -> draining, told to drain by operator/ann");

        // It leaves and another one joins under the name, saying that it does not drain.
        book.apply(Prefix::Nodes, gone("nodes/eu-1"), now + LEASE * 3);
        let record = NodeRecord { boot_id: "later".to_owned(), ..node("eu-1") };
        book.apply(Prefix::Nodes, put("nodes/eu-1", &record), now + LEASE * 4);
        book.apply(Prefix::Load, put("load/eu-1", &LoadRecord::default()), now + LEASE * 4);
        assert_eq!(book.snapshot().nodes["eu-1"].state(&thresholds), NodeState::Draining);

        // A store that was away and has it no longer, and one that has.
        book.apply(Prefix::Drains, WatchEvent::Reset, now);
        assert!(book.snapshot().nodes["eu-1"].drains(), "the stale view goes on being served");
        let sooner = DrainRecord { deadline: 67_000, ..drain };
        book.apply(Prefix::Drains, put("drains/eu-1", &sooner), now);
        book.apply(Prefix::Drains, WatchEvent::Synced, now);
        assert_eq!(book.snapshot().drains.keys().collect::<Vec<_>>(), ["eu-1"]);
        assert_eq!(told(&draining, &book.snapshot()), "restarted, draining, told to drain within 60 s by operator/ann");

        let before = book.snapshot();
        book.apply(Prefix::Drains, gone("drains/eu-1"), now);
        assert_eq!(told(&before, &book.snapshot()), "draining -> ready, uncordoned");
    }

    #[test]
    fn a_relay_that_is_told_to_stop_drains() {
        let now = Instant::now();
        let mut book = synced_with(&["eu-1"], now);
        let load = LoadRecord { ends_at: 1, ..LoadRecord::default() };
        book.apply(Prefix::Load, put("load/eu-1", &load), now);
        assert_eq!(book.snapshot().nodes["eu-1"].state(&Thresholds::default()), NodeState::Draining);
    }

    fn synced_with(nodes: &[&str], now: Instant) -> Bookkeeping {
        let mut book = Bookkeeping::new(LEASE);
        assert!(!book.is_synced());
        tell(&mut book, nodes, now);
        book
    }

    fn tell(book: &mut Bookkeeping, nodes: &[&str], now: Instant) {
        for id in nodes {
            let record = node(id);
            let owner = OwnerRecord { node_id: record.node_id.clone(), epoch: 4, session: String::new() };
            book.apply(Prefix::Nodes, put(&format!("nodes/{id}"), &record), now);
            book.apply(Prefix::Owners, put(&format!("owners/{}", record.relay_address), &owner), now);
        }
        for prefix in Prefix::ALL {
            book.apply(prefix, WatchEvent::Synced, now);
        }
    }

    fn node(id: &str) -> NodeRecord {
        let last: u8 = id.bytes().last().expect("a name");
        node_record(id, "eu", IpAddr::from([192, 0, 2, last]))
    }

    fn put(key: &str, value: &impl serde::Serialize) -> WatchEvent {
        WatchEvent::Put(Entry {
            key: key.to_owned(),
            value: serde_json::to_vec(value).expect("JSON"),
            revision: 1,
            lease: None,
        })
    }

    fn gone(key: &str) -> WatchEvent {
        WatchEvent::Delete { key: key.to_owned(), revision: 2 }
    }
}
