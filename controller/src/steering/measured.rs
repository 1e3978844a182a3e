//! What clients have measured, by network: [`Measurements`], bounded, with an age.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use super::estimate::Measured;

/// A measurement weighs half after this long.
const HALF_LIFE: Duration = Duration::from_secs(3600);
/// Nothing older is gone by.
const LIFE: Duration = Duration::from_secs(86_400);
/// Older measurements together weigh at most as much as so many new ones, so that a change of the network shows soon.
const MOST_WEIGHT: f32 = 4.0;
/// Regions remembered for a network: a client measures the nearest few.
const REGIONS: usize = 16;
/// Names of regions ever seen.
const NAMES: usize = 1024;
/// Longest round trip that is taken for one, in milliseconds.
pub const MAX_RTT_MS: f32 = 5000.0;

/// The network that a client's measurements count for: /24 of IPv4, /56 of IPv6.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Prefix(IpAddr);

impl Prefix {
    /// Of an address; the IPv4-mapped form is IPv4.
    pub fn of(ip: IpAddr) -> Self {
        Self(match ip.to_canonical() {
            IpAddr::V4(ip) => Ipv4Addr::from_bits(ip.to_bits() & !0xFF).into(),
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & (u128::MAX << 72)).into(),
        })
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.0, if self.0.is_ipv4() { 24 } else { 56 })
    }
}

/// Round trips of at most so many networks; where there is no room the one that was neither reported nor asked for the
/// longest makes some. Times are since any fixed moment.
#[derive(Debug)]
pub struct Measurements {
    most: usize,
    /// Place of each name of a region.
    names: Vec<String>,
    networks: HashMap<Prefix, Network>,
    /// Every network, once: the hand of the clock algorithm is at the front.
    order: VecDeque<Prefix>,
}

#[derive(Debug)]
struct Network {
    was_used: bool,
    samples: Vec<Sample>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    region: u16,
    rtt_ms: f32,
    weight: f32,
    at: Duration,
}

impl Measurements {
    /// Room for so many networks, at least one.
    pub fn new(most: usize) -> Self {
        Self { most: most.max(1), names: Vec::new(), networks: HashMap::new(), order: VecDeque::new() }
    }

    /// Networks that something is known of.
    pub fn len(&self) -> usize {
        self.networks.len()
    }

    /// Whether nothing is known of any.
    pub fn is_empty(&self) -> bool {
        self.networks.is_empty()
    }

    /// Takes what a client of `client`'s network has measured: regions and milliseconds. What is no round trip (not above
    /// 0, beyond [`MAX_RTT_MS`]) is passed over. Returns how many were taken.
    pub fn report<'a>(
        &mut self,
        client: IpAddr,
        rtts: impl IntoIterator<Item = (&'a str, f32)>,
        now: Duration,
    ) -> usize {
        let mut taken = Vec::new();
        for (region, rtt_ms) in rtts.into_iter().filter(|(_, rtt_ms)| *rtt_ms > 0.0 && *rtt_ms <= MAX_RTT_MS) {
            taken.extend(self.place_of(region).map(|region| (region, rtt_ms)));
        }
        if !taken.is_empty() {
            let network = self.network(Prefix::of(client));
            taken.iter().for_each(|(region, rtt_ms)| network.take(*region, *rtt_ms, now));
        }
        taken.len()
    }

    /// What is known of a client's network, newest weighing most.
    pub fn of(&mut self, client: IpAddr, now: Duration) -> Vec<Measured> {
        let Some(network) = self.networks.get_mut(&Prefix::of(client)) else { return Vec::new() };
        network.was_used = true;
        let fresh = network.samples.iter().filter(|sample| now.saturating_sub(sample.at) <= LIFE);
        fresh.filter_map(|sample| sample.measured(&self.names, now)).collect()
    }

    fn place_of(&mut self, region: &str) -> Option<u16> {
        let known = self.names.iter().position(|name| name == region);
        if known.is_none() && self.names.len() < NAMES {
            self.names.push(region.to_owned());
        }
        u16::try_from(known.unwrap_or(self.names.len() - 1))
            .ok()
            .filter(|place| self.names[usize::from(*place)] == region)
    }

    fn network(&mut self, prefix: Prefix) -> &mut Network {
        let is_known = self.networks.contains_key(&prefix);
        if !is_known {
            while self.networks.len() >= self.most {
                self.make_room();
            }
            self.order.push_back(prefix);
        }
        let network = self.networks.entry(prefix).or_insert_with(|| Network { was_used: false, samples: Vec::new() });
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

impl Network {
    fn take(&mut self, region: u16, rtt_ms: f32, now: Duration) {
        if let Some(sample) = self.samples.iter_mut().find(|sample| sample.region == region) {
            let age = now.saturating_sub(sample.at);
            let kept = if age > LIFE { 0.0 } else { sample.weight * half(age) };
            sample.rtt_ms = (sample.rtt_ms * kept + rtt_ms) / (kept + 1.0);
            sample.weight = (kept + 1.0).min(MOST_WEIGHT);
            sample.at = now;
            return;
        }
        if self.samples.len() == REGIONS {
            let oldest = (0..REGIONS).min_by_key(|i| self.samples[*i].at).unwrap_or(0);
            self.samples.swap_remove(oldest);
        }
        self.samples.push(Sample { region, rtt_ms, weight: 1.0, at: now });
    }
}

impl Sample {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 5000")]
    fn measured(&self, names: &[String], now: Duration) -> Option<Measured> {
        let region = names.get(usize::from(self.region))?.clone();
        Some(Measured { region, rtt_ms: self.rtt_ms.round() as u32, age: now.saturating_sub(self.at) })
    }
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
        measurements.of(ip(client), now).into_iter().map(|it| (it.region, it.rtt_ms)).collect()
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
            known.report(ip("203.0.113.1"), [("eu", 20.4), ("us", 0.0), ("us", f32::NAN), ("us", 9e9)], HOUR),
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
        known.report(client, [("eu", 100.0)], HOUR);
        known.report(client, [("eu", 40.0)], HOUR);
        assert_eq!(eu(&mut known, HOUR), Some(70), "equally new");
        known.report(client, [("eu", 40.0)], 5 * HOUR);
        assert_eq!(eu(&mut known, 5 * HOUR), Some(43), "two of weight 1/16 against one");
        assert_eq!(known.of(client, 6 * HOUR)[0].age, HOUR);
        assert_eq!(eu(&mut known, 30 * HOUR), None, "a day is over");
        // However many there were, a change of the network shows soon.
        for _ in 0..1000 {
            known.report(client, [("eu", 10.0)], 40 * HOUR);
        }
        for _ in 0..8 {
            known.report(client, [("eu", 90.0)], 40 * HOUR);
        }
        assert!(eu(&mut known, 40 * HOUR) > Some(70), "{:?}", eu(&mut known, 40 * HOUR));
    }

    #[test]
    fn memory_is_bounded_and_what_is_used_stays() {
        let mut known = Measurements::new(100);
        let address = |i: u32| IpAddr::from(Ipv4Addr::from_bits(0x0A00_0000 + (i << 8)));
        known.report(address(0), [("eu", 5.0)], HOUR);
        for i in 1..10_000 {
            known.report(address(i), [("eu", 5.0)], HOUR);
            assert_eq!(known.of(address(0), HOUR).len(), 1, "used each time");
            assert!(known.len() <= 100 && known.order.len() == known.networks.len());
        }
        let names: Vec<String> = (0..NAMES + 500).map(|i| format!("region-{i}")).collect();
        let taken = known.report(address(0), names.iter().map(|name| (name.as_str(), 5.0)), HOUR);
        assert_eq!(taken, NAMES - 1, "eu is one");
        assert_eq!(known.of(address(0), HOUR).len(), REGIONS);
    }
}
