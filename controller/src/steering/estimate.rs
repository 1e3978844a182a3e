//! How far a client is from each region, as a pure function of what is known of it: measured, else taken from networks next
//! to it, else by the globe, else by the distances between regions.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::terms::UNKNOWN_DISTANCE_MS;
use super::{Place, Terms};

/// Where an estimate comes from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Basis {
    /// Clients of the same network have measured it.
    Measured {
        /// Age of the newest measurement.
        age: Duration,
    },
    /// Clients of networks next to it in address space have.
    Neighbours {
        /// Age of the newest measurement.
        age: Duration,
    },
    /// The distance on the globe.
    Geo,
    /// The configured distances between regions.
    Regions,
    /// Nothing is known.
    Unknown,
}

impl Basis {
    /// Age of the newest measurement, where it rests on any.
    pub fn age(self) -> Option<Duration> {
        match self {
            Self::Measured { age } | Self::Neighbours { age } => Some(age),
            Self::Geo | Self::Regions | Self::Unknown => None,
        }
    }
}

impl fmt::Display for Basis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Measured { .. } => "measured",
            Self::Neighbours { .. } => "neighbours",
            Self::Geo => "geo",
            Self::Regions => "regions",
            Self::Unknown => "unknown",
        })
    }
}

/// A round trip as it is taken to be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Estimate {
    /// Milliseconds.
    pub rtt_ms: u32,
    /// Where that comes from.
    pub basis: Basis,
}

/// A round trip to a region that clients have measured.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Measured {
    /// To this region.
    pub region: Arc<str>,
    /// Milliseconds, the newer ones of several weigh more.
    pub rtt_ms: u32,
    /// Age of the newest.
    pub age: Duration,
}

/// What networks next to one in address space have measured.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Borrowed {
    /// Their round trips.
    pub rtts: Vec<Measured>,
    /// How many networks it is of.
    pub networks: usize,
}

/// What is known of who asks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evidence {
    /// What clients of its network have measured.
    pub measured: Vec<Measured>,
    /// What its neighbours have, if itself has not.
    pub borrowed: Borrowed,
    /// Where its network is.
    pub location: Option<Place>,
    /// Where a database says that it is, and measurements that it is not.
    pub disproved: Option<Place>,
    /// What networks around its location measure above what the globe says, in milliseconds by region.
    pub detours: Vec<(Arc<str>, f32)>,
    /// Where the other end of its call is.
    pub partner: Option<Partner>,
    /// Orders relays that are equally good in the same way for both ends of a call, on every replica.
    pub affinity: Option<u64>,
}

/// The relay of a call's other end.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Partner {
    /// Its name.
    pub node_id: String,
    /// Its region.
    pub region: String,
}

/// Estimates for one client.
pub(super) struct Estimator<'a> {
    terms: &'a Terms,
    from: From<'a>,
}

enum From<'a> {
    /// This region, by the distances between regions.
    Region(&'a str),
    /// The client's own network.
    Network(Network<'a>),
}

struct Network<'a> {
    evidence: &'a Evidence,
    /// Measured by itself, else by its neighbours.
    measured: &'a [Measured],
    /// The region of these that is nearest, where it is, and the round trip.
    nearest: Option<(Place, u32)>,
    /// What is measured above what the globe says at least: the last mile, which estimates by the globe lack.
    access_ms: f32,
    /// The same on average.
    offset_ms: f32,
}

impl<'a> Estimator<'a> {
    /// From a region.
    pub(super) fn of_region(terms: &'a Terms, region: &'a str) -> Self {
        Self { terms, from: From::Region(region) }
    }

    /// From a client's network; `None` if nothing of use is known of it.
    pub(super) fn of_network(terms: &'a Terms, evidence: &'a Evidence) -> Option<Self> {
        let location = evidence.location.filter(|_| !terms.places.is_empty());
        let own = &evidence.measured;
        let measured = if own.is_empty() { &evidence.borrowed.rtts } else { own };
        if measured.is_empty() && location.is_none() {
            return None;
        }
        let place_of = |measured: &Measured| terms.places.get(&*measured.region).copied();
        let above = |measured: &Measured| {
            let geo = location?.rtt_ms_to(place_of(measured)?);
            Some(measured.rtt_ms.saturating_sub(geo))
        };
        let access_ms = if measured.is_empty() {
            // As much as is usual there.
            let sum: f32 = evidence.detours.iter().map(|(_, ms)| ms).sum();
            sum / evidence.detours.len().max(1) as f32
        } else {
            // The least: the others may be far because the network is not where it is said to be.
            measured.iter().filter_map(above).min().unwrap_or(0) as f32
        };
        let (mut sum, mut number) = (0.0, 0.0);
        for it in measured {
            if let (Some(location), Some(place)) = (location, place_of(it)) {
                sum += it.rtt_ms as f32 - location.rtt_ms_to(place) as f32;
                number += 1.0;
            }
        }
        let offset_ms = if number > 0.0 { sum / number } else { 0.0 };
        let nearest = measured.iter().min_by_key(|measured| measured.rtt_ms);
        let nearest = nearest.and_then(|it| Some((place_of(it)?, it.rtt_ms)));
        Some(Self { terms, from: From::Network(Network { evidence, measured, nearest, access_ms, offset_ms }) })
    }

    /// The region that distances are taken from; `None` if it is the client's network.
    pub(super) fn region(&self) -> Option<&'a str> {
        match self.from {
            From::Region(region) => Some(region),
            From::Network(_) => None,
        }
    }

    /// The round trip to a region.
    pub(super) fn to(&self, region: &str) -> Estimate {
        match &self.from {
            From::Region(from) => self.terms.between(from, region),
            From::Network(network) => network.to(self.terms, region),
        }
    }
}

impl Network<'_> {
    fn to(&self, terms: &Terms, region: &str) -> Estimate {
        let Self { evidence, measured, .. } = self;
        if let Some(Measured { rtt_ms, age, .. }) = measured.iter().find(|measured| *measured.region == *region) {
            let age = *age;
            if !evidence.measured.is_empty() {
                return Estimate { rtt_ms: *rtt_ms, basis: Basis::Measured { age } };
            }
            // Of a network that is not quite where its neighbours are the globe knows the difference.
            let by_geo = evidence
                .location
                .zip(terms.places.get(region))
                .map(|(location, place)| add(location.rtt_ms_to(*place), self.offset_ms));
            let rtt_ms = by_geo.map_or(*rtt_ms, |by_geo| (rtt_ms + by_geo) / 2);
            return Estimate { rtt_ms, basis: Basis::Neighbours { age } };
        }
        let place = terms.places.get(region);
        if let (Some(location), Some(place)) = (evidence.location, place) {
            let detour = evidence.detours.iter().find(|(known, _)| **known == *region);
            let above = detour.map_or(self.access_ms, |(_, ms)| *ms);
            return Estimate {
                rtt_ms: self.possible(add(location.rtt_ms_to(*place), above), *place),
                basis: Basis::Geo,
            };
        }
        // By way of the region that makes it least.
        let by_measured = measured.iter().map(|measured| (&*measured.region, measured.rtt_ms));
        let by_geo = evidence.location.into_iter().flat_map(|location| {
            terms.places.iter().map(move |(name, place)| (name.as_str(), location.rtt_ms_to(*place)))
        });
        let by_way = by_measured.chain(by_geo).filter_map(|(over, rtt_ms)| {
            let rest = terms.between(over, region);
            (rest.basis != Basis::Unknown).then(|| rtt_ms.saturating_add(rest.rtt_ms))
        });
        match by_way.min() {
            Some(rtt_ms) => Estimate { rtt_ms, basis: Basis::Regions },
            None => Estimate { rtt_ms: UNKNOWN_DISTANCE_MS, basis: Basis::Unknown },
        }
    }

    /// At least what light takes on from where the client is near: a database that is somewhat wrong does not bring a region
    /// next to it.
    fn possible(&self, rtt_ms: u32, place: Place) -> u32 {
        let least = self.nearest.map(|(near, rtt_ms)| near.least_ms_to(place).saturating_sub(rtt_ms));
        rtt_ms.max(least.unwrap_or(0))
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a round trip is below 10,000")]
fn add(rtt_ms: u32, above: f32) -> u32 {
    (rtt_ms as f32 + above).round().max(0.0) as u32
}

#[cfg(test)]
mod tests {
    use super::super::tests::terms;
    use super::*;

    #[test]
    fn measured_comes_before_the_globe_and_that_before_regions() {
        let mut terms = terms();
        let place = |latitude, longitude| Place::new(latitude, longitude).expect("on the globe");
        terms.places.insert("eu".to_owned(), place(50.0, 8.0));
        terms.places.insert("us".to_owned(), place(39.0, -77.0));
        let age = Duration::from_secs(7);
        let measured = |region: &str, rtt_ms| Measured { region: region.into(), rtt_ms, age };
        let paris = Some(place(48.9, 2.4));
        // The terms say eu-us 90, eu-ap 250, us-ap 160, sa-us 120; the globe says Paris-eu 6, Paris-us 93.
        let cases = [
            ("measured", vec![measured("eu", 21)], None, [(21, "measured"), (111, "regions"), (271, "regions")]),
            ("globe", vec![], paris, [(6, "geo"), (93, "geo"), (253, "regions")]),
            (
                "both: the last mile is 15 ms",
                vec![measured("eu", 21)],
                paris,
                [(21, "measured"), (108, "geo"), (253, "regions")],
            ),
            (
                "over the best",
                vec![measured("us", 10), measured("eu", 150)],
                None,
                [(150, "measured"), (10, "measured"), (170, "regions")],
            ),
        ];
        for (what, measured, location, expected) in cases {
            let evidence = Evidence { measured, location, ..Evidence::default() };
            let estimator = Estimator::of_network(&terms, &evidence).expect(what);
            for (region, (rtt_ms, basis)) in ["eu", "us", "ap"].into_iter().zip(expected) {
                let estimate = estimator.to(region);
                assert_eq!(estimate.basis.to_string(), basis, "{what}, {region}");
                assert!(estimate.rtt_ms.abs_diff(rtt_ms) <= 1, "{what}, {region}: {}", estimate.rtt_ms);
            }
            assert_eq!(estimator.to("mars"), Estimate { rtt_ms: UNKNOWN_DISTANCE_MS, basis: Basis::Unknown }, "{what}");
        }
        terms.places.clear();
        let evidence = Evidence { location: paris, ..Evidence::default() };
        assert!(Estimator::of_network(&terms, &evidence).is_none(), "no region is on the globe");
        assert!(Estimator::of_network(&terms, &Evidence::default()).is_none());
    }
}
