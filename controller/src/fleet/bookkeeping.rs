//! What the watched keys `nodes/`, `owners/` and `load/` say, kept as one [`Snapshot`] (pure).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::{LoadRecord, NodeRecord, NodeView, OwnerRecord, Snapshot, Thresholds};
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
}

impl Prefix {
    pub(super) const ALL: [Self; 3] = [Self::Nodes, Self::Owners, Self::Load];

    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Nodes => "nodes/",
            Self::Owners => "owners/",
            Self::Load => "load/",
        }
    }
}

/// The keeper's state. A node whose key vanishes is dropped at once if it has shown life since the store last came
/// back (then its lease had every chance to be renewed), else only after a grace of lease + 5 s: nobody is declared
/// dead because the *store* was away.
#[derive(Debug)]
pub(super) struct Bookkeeping {
    grace: Duration,
    nodes: BTreeMap<String, Held>,
    owners: HashMap<IpAddr, OwnerRecord>,
    loads: HashMap<String, LoadRecord>,
    /// Keys told since a watch's reset; a prefix in here is being told anew.
    telling: HashMap<Prefix, HashSet<String>>,
    grace_until: Option<Instant>,
}

#[derive(Debug)]
struct Held {
    record: NodeRecord,
    /// Last epoch seen, kept while its owner key is away.
    epoch: u64,
    load: LoadRecord,
    /// Wrote something since the last full telling.
    alive: bool,
    /// Its key is gone; dropped at this time.
    vanishes: Option<Instant>,
}

impl Bookkeeping {
    pub(super) fn new(lease: Duration) -> Self {
        let unsynced = Prefix::ALL.map(|prefix| (prefix, HashSet::new()));
        Self {
            grace: lease + GRACE_MARGIN,
            nodes: BTreeMap::new(),
            owners: HashMap::new(),
            loads: HashMap::new(),
            telling: HashMap::from(unsynced),
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

    /// Drops what has vanished long enough. Returns the next time at which there is something to drop.
    pub(super) fn expire(&mut self, now: Instant) -> Option<Instant> {
        self.nodes.retain(|_, held| held.vanishes.is_none_or(|at| at > now));
        self.nodes.values().filter_map(|held| held.vanishes).min()
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let view = |held: &Held| NodeView {
            record: held.record.clone(),
            epoch: held.epoch,
            load: LoadRecord { suspect: held.load.suspect || held.vanishes.is_some(), ..held.load.clone() },
        };
        Snapshot { nodes: self.nodes.iter().map(|(id, held)| (id.clone(), view(held))).collect() }
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
                    vanishes: None,
                    record,
                };
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
        }
        Ok(())
    }

    fn delete(&mut self, prefix: Prefix, name: &str, now: Instant) {
        match prefix {
            Prefix::Nodes => {
                let grace = self.grace_until.filter(|until| *until > now);
                match (self.nodes.get_mut(name), grace) {
                    (Some(held), Some(until)) if !held.alive => held.vanishes = Some(until),
                    _ => drop(self.nodes.remove(name)),
                }
            }
            Prefix::Owners => {
                if let Ok(address) = name.parse::<IpAddr>() {
                    self.owners.remove(&address);
                }
            }
            Prefix::Load => drop(self.loads.remove(name)),
        }
    }

    fn synced(&mut self, prefix: Prefix, told: &HashSet<String>, now: Instant) {
        match prefix {
            Prefix::Nodes => {
                let until = now + self.grace;
                self.grace_until = Some(until);
                for (name, held) in &mut self.nodes {
                    held.alive = false;
                    if !told.contains(name) && held.vanishes.is_none() {
                        held.vanishes = Some(until);
                    }
                }
            }
            Prefix::Owners => self.owners.retain(|address, _| told.contains(&address.to_string())),
            Prefix::Load => self.loads.retain(|name, _| told.contains(name)),
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
        let detail = if node.record.boot_id != old.record.boot_id {
            format!("restarted, {state}")
        } else if state != old_state {
            format!("{old_state} -> {state}")
        } else if old.epoch != 0 && node.epoch != old.epoch {
            format!("epoch {} -> {}", old.epoch, node.epoch)
        } else {
            continue;
        };
        events.push(event(node, FleetChange::Changed(detail)));
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;
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
        NodeRecord {
            node_id: id.to_owned(),
            region: "eu".to_owned(),
            zone: String::new(),
            version: "0".to_owned(),
            relay_address: IpAddr::from([192, 0, 2, last]),
            relay_ips: Vec::new(),
            listeners: Vec::new(),
            public_host: String::new(),
            relay_ports: (49152, 65535),
            workers: 1,
            max_allocations: 0,
            boot_id: "boot".to_owned(),
            registered_at: 0,
            lease: 1,
        }
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
