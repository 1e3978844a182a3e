//! Which relays the ends of calls were sent to: [`Sessions`], bounded, forgotten after an hour.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, DefaultHasher, Hash as _, Hasher as _, RandomState};
use std::net::IpAddr;
use std::time::Duration;

use super::estimate::Partner;

/// Sessions remembered, at most.
const MOST: usize = 65_536;
/// A session that nobody has asked for this long is over.
const LIFE: Duration = Duration::from_secs(3600);
/// Ends of a session remembered: two, and an old address of each.
const ENDS: usize = 4;

/// What this replica answered to either end of each session. Names are kept as keyed hashes. Times are since any fixed
/// moment.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    keys: RandomState,
    ends: HashMap<u64, Vec<End>>,
    /// When each was last asked for; what was asked for again is in it twice.
    order: VecDeque<(Duration, u64)>,
}

#[derive(Debug)]
struct End {
    client: Option<IpAddr>,
    at: Duration,
    partner: Partner,
}

impl Sessions {
    /// The relay of the newest end of `session` that is not `client` itself. Without an address every end is another.
    pub(super) fn partner(&self, session: &[u8], client: Option<IpAddr>, now: Duration) -> Option<Partner> {
        let ends = self.ends.get(&self.keys.hash_one(session))?;
        let others = ends.iter().filter(|end| client.is_none() || end.client != client);
        let newest = others.filter(|end| now.saturating_sub(end.at) <= LIFE).max_by_key(|end| end.at)?;
        Some(newest.partner.clone())
    }

    /// Remembers where an end was sent.
    pub(super) fn note(&mut self, session: &[u8], client: Option<IpAddr>, partner: Partner, now: Duration) {
        let name = self.keys.hash_one(session);
        let ends = self.ends.entry(name).or_default();
        ends.retain(|end| end.client != client || client.is_none());
        if ends.len() == ENDS {
            ends.remove(0);
        }
        ends.push(End { client, at: now, partner });
        self.order.push_back((now, name));
        while self.order.len() > MOST || self.order.front().is_some_and(|(at, _)| now.saturating_sub(*at) > LIFE) {
            let Some((at, name)) = self.order.pop_front() else { break };
            // Asked for again since: it has a later place in the order.
            if self.ends.get(&name).is_some_and(|ends| ends.iter().all(|end| end.at <= at)) {
                self.ends.remove(&name);
            }
        }
    }
}

/// What orders relays for a session, the same on every replica.
pub(super) fn affinity(session: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    session.hash(&mut hasher);
    hasher.finish()
}

/// The rank of a node for an affinity; the highest comes first.
pub(super) fn rank(affinity: u64, node_id: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    (affinity, node_id).hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn partner(node: &str) -> Partner {
        Partner { node_id: node.to_owned(), region: "eu".to_owned() }
    }

    #[test]
    fn the_other_end_is_remembered_for_an_hour() {
        let (a, b) = (Some(IpAddr::from([192, 0, 2, 1])), Some(IpAddr::from([192, 0, 2, 2])));
        let at = Duration::from_secs;
        let mut sessions = Sessions::default();
        sessions.note(b"call", a, partner("eu-1"), at(10));
        assert_eq!(sessions.partner(b"call", b, at(20)), Some(partner("eu-1")));
        assert_eq!(sessions.partner(b"call", None, at(20)), Some(partner("eu-1")));
        assert_eq!(sessions.partner(b"call", a, at(20)), None, "itself");
        assert_eq!(sessions.partner(b"another", b, at(20)), None);
        sessions.note(b"call", b, partner("eu-2"), at(30));
        assert_eq!(sessions.partner(b"call", a, at(40)), Some(partner("eu-2")));
        assert_eq!(sessions.partner(b"call", a, at(3640)), None);
    }

    #[test]
    fn memory_is_bounded() {
        let mut sessions = Sessions::default();
        for i in 0..MOST as u64 + 1000 {
            let client = Some(IpAddr::from([10, 0, 0, 1]));
            sessions.note(&i.to_be_bytes(), client, partner("eu-1"), Duration::from_millis(i));
            sessions.note(b"again and again", client, partner("eu-1"), Duration::from_millis(i));
        }
        assert!(sessions.ends.len() <= MOST && sessions.order.len() <= MOST, "{}", sessions.ends.len());
        assert!(sessions.partner(b"again and again", None, Duration::from_secs(66)).is_some());
    }
}
