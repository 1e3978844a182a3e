//! How far a client is from each region, as a pure function of what is known of it: measured, else by the globe, else by
//! the distances between regions.

use std::fmt;
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
    /// The distance on the globe.
    Geo,
    /// The configured distances between regions.
    Regions,
    /// Nothing is known.
    Unknown,
}

impl fmt::Display for Basis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Measured { .. } => "measured",
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

/// A round trip to a region that clients of one network have measured.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Measured {
    /// To this region.
    pub region: String,
    /// Milliseconds, the newer ones of several weigh more.
    pub rtt_ms: u32,
    /// Age of the newest.
    pub age: Duration,
}

/// What is known of who asks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evidence {
    /// What clients of its network have measured.
    pub measured: Vec<Measured>,
    /// Where its network is.
    pub location: Option<Place>,
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
    /// The client's own network. `access_ms` is what its measurements are above what the globe says: its last mile, which
    /// estimates by the globe lack.
    Network { evidence: &'a Evidence, access_ms: u32 },
}

impl<'a> Estimator<'a> {
    /// From a region.
    pub(super) fn of_region(terms: &'a Terms, region: &'a str) -> Self {
        Self { terms, from: From::Region(region) }
    }

    /// From a client's network; `None` if nothing of use is known of it.
    pub(super) fn of_network(terms: &'a Terms, evidence: &'a Evidence) -> Option<Self> {
        let location = evidence.location.filter(|_| !terms.places.is_empty());
        if evidence.measured.is_empty() && location.is_none() {
            return None;
        }
        let above = |measured: &Measured| {
            let geo = location?.rtt_ms_to(*terms.places.get(&measured.region)?);
            Some(measured.rtt_ms.saturating_sub(geo))
        };
        // The least: the others may be far because the network is not where it is said to be.
        let access_ms = evidence.measured.iter().filter_map(above).min().unwrap_or(0);
        Some(Self { terms, from: From::Network { evidence, access_ms } })
    }

    /// The region that distances are taken from; `None` if it is the client's network.
    pub(super) fn region(&self) -> Option<&'a str> {
        match self.from {
            From::Region(region) => Some(region),
            From::Network { .. } => None,
        }
    }

    /// The round trip to a region.
    pub(super) fn to(&self, region: &str) -> Estimate {
        match self.from {
            From::Region(from) => self.terms.between(from, region),
            From::Network { evidence, access_ms } => self.by_evidence(evidence, access_ms, region),
        }
    }

    fn by_evidence(&self, evidence: &Evidence, access_ms: u32, region: &str) -> Estimate {
        if let Some(measured) = evidence.measured.iter().find(|measured| measured.region == region) {
            return Estimate { rtt_ms: measured.rtt_ms, basis: Basis::Measured { age: measured.age } };
        }
        let place = self.terms.places.get(region);
        if let (Some(location), Some(place)) = (evidence.location, place) {
            let rtt_ms = location.rtt_ms_to(*place).saturating_add(access_ms);
            return Estimate { rtt_ms, basis: Basis::Geo };
        }
        // By way of the region that makes it least.
        let by_measured = evidence.measured.iter().map(|measured| (measured.region.as_str(), measured.rtt_ms));
        let by_geo = evidence.location.into_iter().flat_map(|location| {
            self.terms.places.iter().map(move |(name, place)| (name.as_str(), location.rtt_ms_to(*place)))
        });
        let by_way = by_measured.chain(by_geo).filter_map(|(over, rtt_ms)| {
            let rest = self.terms.between(over, region);
            (rest.basis != Basis::Unknown).then(|| rtt_ms.saturating_add(rest.rtt_ms))
        });
        match by_way.min() {
            Some(rtt_ms) => Estimate { rtt_ms, basis: Basis::Regions },
            None => Estimate { rtt_ms: UNKNOWN_DISTANCE_MS, basis: Basis::Unknown },
        }
    }
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
        let measured = |region: &str, rtt_ms| Measured { region: region.to_owned(), rtt_ms, age };
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
