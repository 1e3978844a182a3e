//! What a choice is asked for and what it is made by.

use std::collections::{BTreeSet, HashMap};

use turn_core::Transport;

use crate::fleet::Thresholds;

/// Relays in an answer where the client names no number: one to use, one to fall back to.
pub const DEFAULT_LIMIT: usize = 2;
/// Most relays in an answer: a browser warns at five servers and gathers on every one of them.
pub const MAX_LIMIT: usize = 8;
/// Milliseconds between two regions of which nothing is known.
pub const UNKNOWN_DISTANCE_MS: u32 = 1000;

/// What a client asks for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Query {
    /// Wanted region.
    pub region: Option<String>,
    /// Wanted transports; empty is UDP, TCP and TLS. DTLS has to be asked for: browsers do not speak it.
    pub transports: BTreeSet<Transport>,
    /// Most relays to answer with; [`choose`](super::choose) takes it as 1 to [`MAX_LIMIT`].
    pub limit: usize,
}

impl Default for Query {
    fn default() -> Self {
        Self { region: None, transports: BTreeSet::new(), limit: DEFAULT_LIMIT }
    }
}

impl Query {
    pub(super) fn wants(&self, transport: Transport) -> bool {
        if self.transports.is_empty() { transport != Transport::Dtls } else { self.transports.contains(&transport) }
    }
}

/// What a choice is made by: configuration.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Terms {
    /// Region used when a client asks for none or for one nobody knows.
    pub home: String,
    /// How far regions are apart.
    pub distances: Distances,
    /// When a node is left out.
    pub thresholds: Thresholds,
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

    /// 0 within a region, [`UNKNOWN_DISTANCE_MS`] where the table says nothing.
    pub fn between(&self, from: &str, to: &str) -> u32 {
        if from == to {
            return 0;
        }
        let known = self.0.get(from).and_then(|row| row.get(to));
        known.copied().unwrap_or(UNKNOWN_DISTANCE_MS)
    }

    /// Whether the table names the region at all.
    pub fn knows(&self, region: &str) -> bool {
        self.0.contains_key(region)
    }
}
