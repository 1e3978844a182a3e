//! What a choice is asked for and what it is made by.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use turn_core::Transport;

use super::estimate::{Basis, Estimate};
use super::place::Place;
use crate::fleet::Thresholds;

/// Relays in an answer where the client names no number: one to use, one to fall back to.
pub const DEFAULT_LIMIT: usize = 2;
/// Most relays in an answer: a browser warns at five servers and gathers on every one of them.
pub const MAX_LIMIT: usize = 8;
/// Milliseconds between two regions of which nothing is known.
pub const UNKNOWN_DISTANCE_MS: u32 = 1000;
/// Longest name of a session, in bytes.
pub const MAX_SESSION: usize = 256;

/// What a client asks for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Query {
    /// Wanted region.
    pub region: Option<String>,
    /// Wanted transports; empty is UDP, TCP and TLS. DTLS has to be asked for: browsers do not speak it.
    pub transports: BTreeSet<Transport>,
    /// Most relays to answer with; [`choose`](super::choose) takes it as 1 to [`MAX_LIMIT`].
    pub limit: usize,
    /// Where the client is, if that is known.
    pub client: Option<IpAddr>,
    /// The call it is for, opaque, at most [`MAX_SESSION`] bytes.
    pub session: Option<Vec<u8>>,
    /// Region that the client uses now.
    pub home: Option<String>,
}

impl Default for Query {
    fn default() -> Self {
        let transports = BTreeSet::new();
        Self { region: None, transports, limit: DEFAULT_LIMIT, client: None, session: None, home: None }
    }
}

impl Query {
    pub(super) fn wants(&self, transport: Transport) -> bool {
        if self.transports.is_empty() { transport != Transport::Dtls } else { self.transports.contains(&transport) }
    }
}

/// What a choice is made by: configuration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Terms {
    /// Region used when a client asks for none or for one nobody knows, and nothing is known of its address.
    pub home: String,
    /// How far regions are apart.
    pub distances: Distances,
    /// Where regions are.
    pub places: HashMap<String, Place>,
    /// When a node is left out.
    pub thresholds: Thresholds,
}

impl Terms {
    /// The round trip between two regions: by the table, else by the globe.
    pub fn between(&self, from: &str, to: &str) -> Estimate {
        let known = |rtt_ms, basis| Estimate { rtt_ms, basis };
        match self.distances.known(from, to) {
            Some(rtt_ms) => known(rtt_ms, Basis::Regions),
            None => match (self.places.get(from), self.places.get(to)) {
                (Some(from), Some(to)) => known(from.rtt_ms_to(*to), Basis::Geo),
                _ => known(UNKNOWN_DISTANCE_MS, Basis::Unknown),
            },
        }
    }

    /// Whether a region is written down anywhere.
    pub(super) fn names(&self, region: &str) -> bool {
        self.distances.knows(region) || self.places.contains_key(region)
    }
}

/// Milliseconds of round trip between regions, the same both ways.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Distances(HashMap<String, HashMap<String, u32>>);

impl Distances {
    /// Sets a distance in both directions.
    pub fn set(&mut self, from: &str, to: &str, ms: u32) {
        for (a, b) in [(from, to), (to, from)] {
            self.0.entry(a.to_owned()).or_default().insert(b.to_owned(), ms);
        }
    }

    /// 0 within a region; `None` where the table says nothing.
    pub fn known(&self, from: &str, to: &str) -> Option<u32> {
        if from == to { Some(0) } else { self.0.get(from)?.get(to).copied() }
    }

    /// Whether the table names the region at all.
    pub fn knows(&self, region: &str) -> bool {
        self.0.contains_key(region)
    }
}
