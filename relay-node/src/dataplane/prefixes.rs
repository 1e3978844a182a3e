//! How many connections each source prefix has on this node, in a table whose size never changes.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Counters of a row.
const WIDTH: usize = 1 << 14;
/// Rows, each with a hash of its own. A prefix has as many connections as its lowest counter says, so that it takes
/// collisions in every row before one prefix pays for another.
const ROWS: usize = 2;

/// The counters of a node: 128 KiB, made at start.
pub(super) struct Prefixes {
    most: u32,
    hash: RandomState,
    rows: Box<[AtomicU32]>,
}

/// A place that a connection takes; dropped, it is free again.
pub(super) struct Place {
    prefixes: Arc<Prefixes>,
    counters: [usize; ROWS],
}

impl Prefixes {
    /// At most `most` connections of a prefix, 0 for no limit.
    pub(super) fn new(most: u32) -> Arc<Self> {
        let rows = (0..ROWS * WIDTH).map(|_| AtomicU32::new(0)).collect();
        Arc::new(Self { most, hash: RandomState::new(), rows })
    }

    /// A place for one more connection from `source`; none if its prefix has as many as it may.
    pub(super) fn take(self: &Arc<Self>, source: IpAddr) -> Option<Place> {
        let prefix = prefix(source);
        let counters = std::array::from_fn(|row| row * WIDTH + self.hash.hash_one((row, prefix)) as usize % WIDTH);
        // Taken first and given back if it was one too many: workers take at the same time.
        let place = Place { prefixes: Arc::clone(self), counters };
        let before = counters.map(|counter| self.rows[counter].fetch_add(1, Ordering::Relaxed));
        let open = before.into_iter().min().unwrap_or(0);
        (self.most == 0 || open < self.most).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for counter in self.counters {
            self.prefixes.rows[counter].fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// What is one source: an IPv4 address, or the /56 that a household gets of IPv6.
fn prefix(source: IpAddr) -> u128 {
    match source.to_canonical() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().to_bits(),
        IpAddr::V6(ip) => ip.to_bits() >> 72 << 72,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("literal")
    }

    #[test]
    fn a_prefix_gets_what_it_may_and_others_are_not_hurt() {
        let prefixes = Prefixes::new(3);
        let mut held: Vec<Place> = (0..3).filter_map(|_| prefixes.take(ip("192.0.2.1"))).collect();
        assert_eq!(held.len(), 3);
        assert!(prefixes.take(ip("192.0.2.1")).is_none());
        assert!(prefixes.take(ip("::ffff:192.0.2.1")).is_none(), "the same client by another spelling");
        assert!(prefixes.take(ip("192.0.2.2")).is_some());
        held.pop();
        assert!(prefixes.take(ip("192.0.2.1")).is_some(), "a refusal leaves nothing behind");

        let v6: Vec<Place> = (0..3).filter_map(|host| prefixes.take(ip(&format!("2001:db8:0:ff0{host}::1")))).collect();
        assert_eq!(v6.len(), 3);
        assert!(prefixes.take(ip("2001:db8:0:ffff::")).is_none(), "of the same /56");
        assert!(prefixes.take(ip("2001:db8:0:100::")).is_some());
        drop((v6, held));
        assert!(prefixes.rows.iter().all(|counter| counter.load(Ordering::Relaxed) == 0));
    }

    #[test]
    fn none_is_no_limit() {
        let prefixes = Prefixes::new(0);
        let held: Vec<_> = (0..1000).map_while(|_| prefixes.take(ip("192.0.2.1"))).collect();
        assert_eq!(held.len(), 1000);
    }
}
