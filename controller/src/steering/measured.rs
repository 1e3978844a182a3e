//! What clients have measured, by network: [`Measurements`], bounded, with an age; and what follows from it for a client,
//! also for one whose network nobody has measured.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::detours::Detours;
use super::estimate::{Borrowed, Evidence, Measured};
use super::neighbours::{Likeness, NEIGHBOURS, Neighbour, apart, contradicts, infer};
use super::{Place, Terms};

/// A measurement weighs half after this long.
const HALF_LIFE: Duration = Duration::from_secs(3600);
/// Nothing older is gone by.
pub(super) const LIFE: Duration = Duration::from_secs(86_400);
/// Older measurements together weigh at most as much as so many new ones, so that a change of the network shows soon.
const MOST_WEIGHT: f32 = 4.0;
/// Regions remembered for a network: a client measures the nearest few.
pub(super) const REGIONS: usize = 16;
/// Names of regions ever seen.
const NAMES: usize = 1024;
/// Longest round trip that is taken for one, in milliseconds.
pub const MAX_RTT_MS: f32 = 5000.0;

/// A network is shared again after this long at the soonest.
const SHARE_EVERY: Duration = Duration::from_secs(60);

/// Place of a region among the names that were ever seen.
pub(super) type RegionId = u16;

/// The network that a client's measurements count for: /24 of IPv4, /56 of IPv6.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Prefix(IpAddr);

impl Prefix {
    /// Of an address; the IPv4-mapped form is IPv4.
    pub fn of(ip: IpAddr) -> Self {
        Self(match ip.to_canonical() {
            IpAddr::V4(ip) => Ipv4Addr::from_bits(ip.to_bits() & !0xFF).into(),
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & (u128::MAX << 72)).into(),
        })
    }

    /// Its first address.
    pub fn address(self) -> IpAddr {
        self.0
    }

    /// Networks of a family in order, from 0.
    fn number(self) -> u128 {
        match self.0 {
            IpAddr::V4(ip) => u128::from(ip.to_bits() >> 8),
            IpAddr::V6(ip) => ip.to_bits() >> 72,
        }
    }

    /// The first and the last network of the block in which neighbours are looked for: /16 of IPv4, /40 of IPv6.
    fn neighbourhood(self) -> (Self, Self) {
        match self.0 {
            IpAddr::V4(ip) => {
                let first = ip.to_bits() & !0xFFFF;
                (Self(Ipv4Addr::from_bits(first).into()), Self(Ipv4Addr::from_bits(first | 0xFF00).into()))
            }
            IpAddr::V6(ip) => {
                let first = ip.to_bits() & (u128::MAX << 88);
                (Self(Ipv6Addr::from_bits(first).into()), Self(Ipv6Addr::from_bits(first | 0xFFFF << 72).into()))
            }
        }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.0, if self.0.is_ipv4() { 24 } else { 56 })
    }
}

/// A round trip as replicas tell each other.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Shared {
    /// Milliseconds, the newer ones of several weigh more.
    pub ms: f32,
    /// So many measurements it stands for.
    pub weight: f32,
    /// Unix milliseconds of the newest.
    pub at: u64,
}

/// Round trips of at most so many networks; where there is no room the one that was neither reported nor asked for the
/// longest makes some. Times are since the Unix epoch.
#[derive(Debug)]
pub struct Measurements {
    most: usize,
    names: Vec<Arc<str>>,
    networks: BTreeMap<Prefix, Network>,
    /// Every network, once: the hand of the clock algorithm is at the front.
    order: VecDeque<Prefix>,
    detours: Detours,
    /// Of IPv4 and of IPv6 networks.
    likeness: [Likeness; 2],
    /// What was reported here and other replicas do not know yet, oldest first.
    unshared: VecDeque<Prefix>,
}

#[derive(Debug, Default)]
struct Network {
    was_used: bool,
    is_unshared: bool,
    shared_at: Option<Duration>,
    /// Where the database placed it when it last reported.
    place: Option<Place>,
    /// In order of their regions.
    samples: Vec<Sample>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sample {
    pub(super) region: RegionId,
    pub(super) rtt_ms: f32,
    pub(super) weight: f32,
    pub(super) at: Duration,
}

impl Measurements {
    /// Room for so many networks, at least one.
    pub fn new(most: usize) -> Self {
        Self {
            most: most.max(1),
            names: Vec::new(),
            networks: BTreeMap::new(),
            order: VecDeque::new(),
            detours: Detours::default(),
            // A /20, a /40.
            likeness: [Likeness::new(4), Likeness::new(16)],
            unshared: VecDeque::new(),
        }
    }

    /// Networks that something is known of.
    pub fn len(&self) -> usize {
        self.networks.len()
    }

    /// Whether nothing is known of any.
    pub fn is_empty(&self) -> bool {
        self.networks.is_empty()
    }

    /// Takes what a client of `client`'s network, which the database places at `place`, has measured: regions and
    /// milliseconds. What is no round trip (not above 0, beyond [`MAX_RTT_MS`]) is passed over. Returns how many were taken.
    pub fn report<'a>(
        &mut self,
        terms: &Terms,
        client: IpAddr,
        place: Option<Place>,
        rtts: impl IntoIterator<Item = (&'a str, f32)>,
        now: Duration,
    ) -> usize {
        let mut taken = Vec::new();
        for (region, rtt_ms) in rtts.into_iter().filter(|(_, rtt_ms)| *rtt_ms > 0.0 && *rtt_ms <= MAX_RTT_MS) {
            taken.extend(self.region(region).map(|region| Sample { region, rtt_ms, weight: 1.0, at: now }));
        }
        if !taken.is_empty() {
            let prefix = Prefix::of(client);
            let is_new = !self.networks.contains_key(&prefix);
            let network = self.network(prefix);
            network.place = place;
            taken.iter().for_each(|sample| network.take(*sample));
            let is_due = network.shared_at.is_none_or(|at| now.saturating_sub(at) >= SHARE_EVERY);
            if is_due && !std::mem::replace(&mut network.is_unshared, true) {
                // Of what has made room meanwhile some may be left in it.
                if self.unshared.len() >= self.most {
                    self.unshared.pop_front();
                }
                self.unshared.push_back(prefix);
            }
            // Of one order with those they are compared with.
            taken.sort_unstable_by_key(|sample| sample.region);
            self.learn(terms, prefix, &taken, now, is_new);
        }
        taken.len()
    }

    /// Up to `most` networks with what other replicas are to be told of them: what was reported here since they were told
    /// last, each at most once a minute.
    pub fn take_unshared(&mut self, most: usize, now: Duration) -> Vec<(Prefix, BTreeMap<String, Shared>)> {
        let mut taken = Vec::new();
        while taken.len() < most {
            let Some(prefix) = self.unshared.pop_front() else { break };
            let Some(network) = self.networks.get_mut(&prefix).filter(|network| network.is_unshared) else { continue };
            network.is_unshared = false;
            network.shared_at = Some(now);
            let shared = |it: &Sample| {
                let name = self.names.get(usize::from(it.region))?.to_string();
                Some((
                    name,
                    Shared {
                        ms: it.rtt_ms,
                        weight: it.weight,
                        at: u64::try_from(it.at.as_millis()).unwrap_or(u64::MAX),
                    },
                ))
            };
            taken.push((prefix, network.samples.iter().filter_map(shared).collect()));
        }
        taken
    }

    /// Takes what another replica, or this one before it was started again, has been told of a network: of each region the
    /// newer one stays. What cannot be true is passed over.
    pub fn take_shared(
        &mut self,
        terms: &Terms,
        prefix: Prefix,
        place: Option<Place>,
        shared: &BTreeMap<String, Shared>,
        now: Duration,
    ) {
        let mut fresh = Vec::new();
        for (name, it) in shared.iter().take(REGIONS) {
            // Clocks differ.
            let at = Duration::from_millis(it.at).min(now);
            let is_true = it.ms > 0.0 && it.ms <= MAX_RTT_MS && it.weight > 0.0 && now.saturating_sub(at) <= LIFE;
            if is_true && let Some(region) = self.region(name) {
                fresh.push(Sample { region, rtt_ms: it.ms, weight: it.weight.min(MOST_WEIGHT), at });
            }
        }
        if let Some(network) = self.networks.get(&prefix) {
            // Milliseconds are what is shared of times.
            let is_newer = |new: &Sample| {
                let known = network.samples.iter().find(|known| known.region == new.region);
                known.is_none_or(|known| known.at.as_millis() < new.at.as_millis())
            };
            fresh.retain(is_newer);
        }
        if fresh.is_empty() {
            return;
        }
        let is_new = !self.networks.contains_key(&prefix);
        let network = self.network(prefix);
        network.place = place;
        fresh.iter().for_each(|sample| network.replace(*sample));
        fresh.sort_unstable_by_key(|sample| sample.region);
        self.learn(terms, prefix, &fresh, now, is_new);
    }

    /// What is known of a client, which the database places at `location`: what its network has measured, newest weighing
    /// most, else what its neighbours have.
    pub fn evidence(&mut self, terms: &Terms, client: IpAddr, location: Option<Place>, now: Duration) -> Evidence {
        let prefix = Prefix::of(client);
        let (names, detours) = (&self.names, &self.detours);
        let place_of = |region: RegionId| terms.places.get(&**names.get(usize::from(region))?).copied();
        if let Some(network) = self.networks.get_mut(&prefix)
            && network.refresh(now)
        {
            network.was_used = true;
            let is_disproved = location.is_some_and(|place| contradicts(place, &network.samples, &place_of));
            let measured = network.samples.iter().filter_map(|it| measured(names, it.region, it.rtt_ms, it.at, now));
            let disproved = location.filter(|_| is_disproved);
            let location = location.filter(|_| !is_disproved);
            return Evidence { measured: measured.collect(), location, disproved, ..Evidence::default() };
        }
        let neighbours = nearest(&mut self.networks, prefix, now);
        let likeness = &self.likeness[usize::from(prefix.0.is_ipv6())];
        let inferred = infer(prefix.number(), location, &neighbours, likeness, &place_of);
        let rtts = inferred.rtts.iter().filter_map(|(region, rtt_ms, at)| measured(names, *region, *rtt_ms, *at, now));
        let borrowed = Borrowed { rtts: rtts.collect(), networks: inferred.networks };
        let disproved = location.filter(|_| inferred.is_disproved);
        let location = location.filter(|_| !inferred.is_disproved);
        let around = location.filter(|_| borrowed.rtts.is_empty()).into_iter();
        let around = around.flat_map(|place| detours.around(place, now));
        let detours = around.filter_map(|it| Some((names.get(usize::from(it.region))?.clone(), it.ms))).collect();
        Evidence { borrowed, location, disproved, detours, ..Evidence::default() }
    }

    /// From a network that is new it is learned how alike neighbours are, and from one whose place is known to be its own what
    /// the cell of the globe has for detours.
    fn learn(&mut self, terms: &Terms, prefix: Prefix, samples: &[Sample], now: Duration, is_new: bool) {
        let place = self.networks.get(&prefix).and_then(|network| network.place);
        if is_new {
            let new = Neighbour { number: prefix.number(), place, samples };
            let likeness = &mut self.likeness[usize::from(prefix.0.is_ipv6())];
            nearest(&mut self.networks, prefix, now).iter().for_each(|near| likeness.learn(&new, near));
        }
        let names = &self.names;
        let place_of = |region: RegionId| terms.places.get(&**names.get(usize::from(region))?).copied();
        let Some(place) = place.filter(|place| !contradicts(*place, samples, &place_of)) else { return };
        for sample in samples {
            if let Some(region) = place_of(sample.region) {
                let above = sample.rtt_ms - place.rtt_ms_to(region) as f32;
                self.detours.learn(place, sample.region, above, now);
            }
        }
    }

    fn region(&mut self, name: &str) -> Option<RegionId> {
        let known = self.names.iter().position(|known| **known == *name);
        if known.is_none() && self.names.len() == NAMES {
            return None;
        }
        let place = known.unwrap_or_else(|| {
            self.names.push(name.into());
            self.names.len() - 1
        });
        RegionId::try_from(place).ok()
    }

    fn network(&mut self, prefix: Prefix) -> &mut Network {
        let is_known = self.networks.contains_key(&prefix);
        if !is_known {
            while self.networks.len() >= self.most {
                self.make_room();
            }
            self.order.push_back(prefix);
        }
        let network = self.networks.entry(prefix).or_default();
        network.was_used = is_known;
        network
    }

    fn make_room(&mut self) {
        let Some(prefix) = self.order.pop_front() else { return };
        match self.networks.get_mut(&prefix) {
            Some(network) if network.was_used => {
                network.was_used = false;
                self.order.push_back(prefix);
            }
            _ => drop(self.networks.remove(&prefix)),
        }
    }
}

/// The measured networks that share the longest prefixes with one: they are among the next in order on either side.
fn nearest(networks: &mut BTreeMap<Prefix, Network>, prefix: Prefix, now: Duration) -> Vec<Neighbour<'_>> {
    let (first, last) = prefix.neighbourhood();
    let mut near: Vec<Prefix> = Vec::with_capacity(2 * NEIGHBOURS);
    near.extend(networks.range(first..prefix).rev().take(NEIGHBOURS).map(|(near, _)| *near));
    near.extend(
        networks.range(prefix..=last).filter(|(near, _)| **near != prefix).take(NEIGHBOURS).map(|(near, _)| *near),
    );
    for near in &near {
        if let Some(network) = networks.get_mut(near) {
            network.refresh(now);
        }
    }
    near.sort_by_key(|near| apart(near.number(), prefix.number()));
    let known = near.into_iter().filter_map(|near| Some(networks.get(&near)?.as_neighbour(near)));
    known.filter(|near| !near.samples.is_empty()).take(NEIGHBOURS).collect()
}

impl Network {
    fn take(&mut self, new: Sample) {
        match self.samples.binary_search_by_key(&new.region, |sample| sample.region) {
            Ok(known) => {
                let sample = &mut self.samples[known];
                let age = new.at.saturating_sub(sample.at);
                let kept = if age > LIFE { 0.0 } else { sample.weight * half(age) };
                sample.rtt_ms = (sample.rtt_ms * kept + new.rtt_ms) / (kept + 1.0);
                sample.weight = (kept + 1.0).min(MOST_WEIGHT);
                sample.at = new.at;
            }
            Err(place) => self.insert(place, new),
        }
    }

    fn replace(&mut self, new: Sample) {
        match self.samples.binary_search_by_key(&new.region, |sample| sample.region) {
            Ok(known) => self.samples[known] = new,
            Err(place) => self.insert(place, new),
        }
    }

    fn insert(&mut self, place: usize, new: Sample) {
        self.samples.insert(place, new);
        if self.samples.len() > REGIONS {
            let oldest = (0..self.samples.len()).filter(|i| *i != place).min_by_key(|i| self.samples[*i].at);
            self.samples.remove(oldest.unwrap_or(place));
        }
    }

    fn as_neighbour(&self, prefix: Prefix) -> Neighbour<'_> {
        Neighbour { number: prefix.number(), place: self.place, samples: &self.samples }
    }

    /// Forgets what is too old. Whether something is left.
    fn refresh(&mut self, now: Duration) -> bool {
        self.samples.retain(|sample| now.saturating_sub(sample.at) <= LIFE);
        !self.samples.is_empty()
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 5000")]
fn measured(names: &[Arc<str>], region: RegionId, rtt_ms: f32, at: Duration, now: Duration) -> Option<Measured> {
    let region = names.get(usize::from(region))?.clone();
    Some(Measured { region, rtt_ms: rtt_ms.round() as u32, age: now.saturating_sub(at) })
}

fn half(age: Duration) -> f32 {
    (-age.as_secs_f32() / HALF_LIFE.as_secs_f32()).exp2()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("literal")
    }

    fn rtts(measurements: &mut Measurements, client: &str, now: Duration) -> Vec<(String, u32)> {
        let evidence = measurements.evidence(&Terms::default(), ip(client), None, now);
        evidence.measured.iter().map(|it| (it.region.to_string(), it.rtt_ms)).collect()
    }

    fn report(measurements: &mut Measurements, client: IpAddr, rtts: &[(&str, f32)], now: Duration) -> usize {
        measurements.report(&Terms::default(), client, None, rtts.iter().copied(), now)
    }

    #[test]
    fn a_network_is_a_24_or_a_56() {
        let cases = [
            ("203.0.113.77", "203.0.113.0/24"),
            ("::ffff:203.0.113.9", "203.0.113.0/24"),
            ("2001:db8:1:22ff::1", "2001:db8:1:2200::/56"),
        ];
        for (address, expected) in cases {
            assert_eq!(Prefix::of(ip(address)).to_string(), expected);
        }
        let mut known = Measurements::new(8);
        assert_eq!(
            report(&mut known, ip("203.0.113.1"), &[("eu", 20.4), ("us", 0.0), ("us", f32::NAN), ("us", 9e9)], HOUR),
            1
        );
        assert_eq!(rtts(&mut known, "203.0.113.200", HOUR), [("eu".to_owned(), 20)]);
        assert_eq!(rtts(&mut known, "203.0.114.1", HOUR), []);
    }

    #[test]
    fn newer_ones_weigh_more_and_old_ones_are_forgotten() {
        let mut known = Measurements::new(8);
        let client = ip("203.0.113.1");
        let eu = |known: &mut Measurements, now| rtts(known, "203.0.113.1", now).first().map(|(_, ms)| *ms);
        report(&mut known, client, &[("eu", 100.0)], HOUR);
        report(&mut known, client, &[("eu", 40.0)], HOUR);
        assert_eq!(eu(&mut known, HOUR), Some(70), "equally new");
        report(&mut known, client, &[("eu", 40.0)], 5 * HOUR);
        assert_eq!(eu(&mut known, 5 * HOUR), Some(43), "two of weight 1/16 against one");
        let evidence = known.evidence(&Terms::default(), client, None, 6 * HOUR);
        assert_eq!(evidence.measured[0].age, HOUR);
        assert_eq!(eu(&mut known, 30 * HOUR), None, "a day is over");
        // However many there were, a change of the network shows soon.
        for _ in 0..1000 {
            report(&mut known, client, &[("eu", 10.0)], 40 * HOUR);
        }
        for _ in 0..8 {
            report(&mut known, client, &[("eu", 90.0)], 40 * HOUR);
        }
        assert!(eu(&mut known, 40 * HOUR) > Some(70), "{:?}", eu(&mut known, 40 * HOUR));
    }

    #[test]
    fn memory_is_bounded_and_what_is_used_stays() {
        let mut known = Measurements::new(100);
        let address = |i: u32| IpAddr::from(Ipv4Addr::from_bits(0x0A00_0000 + (i << 8)));
        report(&mut known, address(0), &[("eu", 5.0)], HOUR);
        for i in 1..10_000 {
            report(&mut known, address(i), &[("eu", 5.0)], HOUR);
            assert_eq!(rtts(&mut known, "10.0.0.1", HOUR).len(), 1, "used each time");
            assert!(known.len() <= 100 && known.order.len() == known.networks.len());
        }
        let names: Vec<String> = (0..NAMES + 500).map(|i| format!("region-{i}")).collect();
        let many: Vec<_> = names.iter().map(|name| (name.as_str(), 5.0)).collect();
        let taken = report(&mut known, address(0), &many, HOUR);
        assert_eq!(taken, NAMES - 1, "eu is one");
        assert_eq!(rtts(&mut known, "10.0.0.1", HOUR).len(), REGIONS);
    }
}
