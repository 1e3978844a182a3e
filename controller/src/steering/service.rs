//! [`Steering`]: [`choose`] with its memory, as a running controller answers from.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::estimate::{Evidence, Partner};
use super::measured::{Measurements, Prefix, Shared};
use super::sessions::{Sessions, affinity};
use super::{Choice, Considered, OwnPicks, Query, Target, Terms, choose, explain, targets};
use crate::fleet::Snapshot;
use crate::geo::Geo;

/// Networks whose measurements are remembered: about 20 MB when full.
const NETWORKS: usize = 65_536;

/// What a running controller answers discovery with: the terms, what clients have measured, where networks are, what was
/// answered lately.
#[derive(Debug)]
pub struct Steering {
    terms: Arc<Terms>,
    geo: Option<Arc<Geo>>,
    memory: Mutex<Memory>,
    seed: AtomicU64,
    started: Instant,
    /// Since the Unix epoch.
    started_at: Duration,
}

#[derive(Debug)]
struct Memory {
    picks: OwnPicks,
    sessions: Sessions,
    measurements: Measurements,
}

/// A choice with its reasons.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// What would be answered.
    pub choice: Choice,
    /// What is known of the client, one sentence each.
    pub evidence: Vec<String>,
    /// Every node, best score first.
    pub considered: Vec<Considered>,
}

impl Steering {
    /// Steering by `terms`, with networks placed by `geo`; `seed` should differ from replica to replica.
    pub fn new(terms: Arc<Terms>, geo: Option<Arc<Geo>>, seed: u64) -> Self {
        let memory = Memory {
            picks: OwnPicks::default(),
            sessions: Sessions::default(),
            measurements: Measurements::new(NETWORKS),
        };
        Self {
            terms,
            geo,
            memory: Mutex::new(memory),
            seed: AtomicU64::new(seed),
            started: Instant::now(),
            started_at: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
        }
    }

    /// The distances, thresholds and home region in use.
    pub fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Chooses relays and remembers having done so.
    pub fn choose(&self, snapshot: &Snapshot, query: &Query) -> Choice {
        let (seed, now) = (self.seed(), self.now());
        let location = self.locate(query);
        let mut memory = self.memory();
        let evidence = memory.evidence(&self.terms, query, location, now);
        let choice = choose(snapshot, &self.terms, query, &evidence, &mut memory.picks, seed);
        if let (Some(session), Some(relay)) = (&query.session, choice.relays.first()) {
            let partner = Partner { node_id: relay.node_id.clone(), region: relay.region.clone() };
            memory.sessions.note(session, query.client, partner, now);
        }
        choice
    }

    /// What [`Steering::choose`] would answer, with reasons. Nothing is remembered.
    pub fn explain(&self, snapshot: &Snapshot, query: &Query) -> Explanation {
        let (seed, now) = (self.seed(), self.now());
        let location = self.locate(query);
        let mut memory = self.memory();
        let evidence = memory.evidence(&self.terms, query, location, now);
        let (choice, considered) = explain(snapshot, &self.terms, query, &evidence, &memory.picks, seed);
        drop(memory);
        Explanation { evidence: self.sentences(query, &evidence, &choice), choice, considered }
    }

    /// Takes round trips that `client` has measured, in milliseconds by region. Regions that have no relay are passed over.
    /// Returns how many were taken.
    pub fn report(&self, snapshot: &Snapshot, client: IpAddr, rtts: &[(String, f32)]) -> usize {
        let is_there = |region: &str| snapshot.nodes.values().any(|node| node.record.region == region);
        let known = rtts.iter().filter(|(region, _)| is_there(region)).map(|(region, ms)| (region.as_str(), *ms));
        let known: Vec<_> = known.collect();
        let place = self.place(client);
        self.memory().measurements.report(&self.terms, client, place, known, self.now())
    }

    /// Relays that `client` should measure its round trip to.
    pub fn targets(&self, snapshot: &Snapshot, client: IpAddr) -> Vec<Target> {
        let query = Query { client: Some(client), ..Query::default() };
        let (seed, location) = (self.seed(), self.locate(&query));
        let evidence = self.memory().evidence(&self.terms, &query, location, self.now());
        targets(snapshot, &self.terms, &evidence, client.to_canonical().is_ipv6(), seed)
    }

    /// Up to `most` networks with what other replicas are to be told of them.
    pub fn take_unshared(&self, most: usize) -> Vec<(Prefix, BTreeMap<String, Shared>)> {
        self.memory().measurements.take_unshared(most, self.now())
    }

    /// Takes what another replica has been told of a network.
    pub fn take_shared(&self, prefix: Prefix, shared: &BTreeMap<String, Shared>) {
        let place = self.place(prefix.address());
        self.memory().measurements.take_shared(&self.terms, prefix, place, shared, self.now());
    }

    fn now(&self) -> Duration {
        self.started_at + self.started.elapsed()
    }

    fn place(&self, client: IpAddr) -> Option<super::Place> {
        self.geo.as_ref()?.locate(client)
    }

    fn memory(&self) -> std::sync::MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn seed(&self) -> u64 {
        self.seed.fetch_add(0xD134_2543_DE82_EF95, Ordering::Relaxed)
    }

    fn locate(&self, query: &Query) -> Option<super::Place> {
        self.place(query.client?)
    }

    fn sentences(&self, query: &Query, evidence: &Evidence, choice: &Choice) -> Vec<String> {
        let mut sentences = Vec::new();
        match query.client {
            None => sentences.push("the client's address is not known".to_owned()),
            Some(client) => {
                let prefix = Prefix::of(client);
                let measured = evidence.measured.iter().map(|measured| measured.age).min();
                sentences.push(match measured {
                    None if evidence.borrowed.networks > 0 => format!(
                        "nobody has measured from {prefix}; round trips are those of {} measured networks next to it",
                        evidence.borrowed.networks
                    ),
                    None => format!("nobody has measured from {prefix}"),
                    Some(age) => format!(
                        "clients of {prefix} have measured {} regions, the newest {} s ago",
                        evidence.measured.len(),
                        age.as_secs()
                    ),
                });
                sentences.push(match (&self.geo, evidence.location, evidence.disproved) {
                    (None, ..) => "there is no geo database".to_owned(),
                    (_, Some(place), _) => format!("the geo database places {client} at {place}"),
                    (_, None, Some(place)) => {
                        format!("the geo database places {client} at {place}, which round trips say it is not")
                    }
                    (_, None, None) => format!("the geo database does not know {client}"),
                });
            }
        }
        if let Some(origin) = &choice.origin {
            let asked = query.region.as_deref();
            sentences.push(match asked {
                Some(asked) if asked == origin => format!("distances are taken from region {origin}, as asked"),
                Some(asked) => format!("no region {asked} is known; distances are taken from region {origin}"),
                None => format!("distances are taken from region {origin}, this controller's own"),
            });
        }
        if let Some(home) = &query.home {
            sentences.push(format!("the client uses region {home} now"));
        }
        match (&query.session, &evidence.partner) {
            (Some(_), Some(Partner { node_id, region })) => {
                sentences.push(format!("the other end of the session is on {node_id} in {region}"));
            }
            (Some(_), None) => sentences.push("this replica knows no other end of the session".to_owned()),
            (None, _) => {}
        }
        sentences
    }
}

impl Memory {
    fn evidence(&mut self, terms: &Terms, query: &Query, location: Option<super::Place>, now: Duration) -> Evidence {
        let session = query.session.as_deref();
        let known = query.client.map(|client| self.measurements.evidence(terms, client, location, now));
        Evidence {
            partner: session.and_then(|session| self.sessions.partner(session, query.client, now)),
            affinity: session.map(affinity),
            ..known.unwrap_or_default()
        }
    }
}
