//! Networks of clients: where they are, where the geo database says that they are, and the truth about their round trips.
//!
//! What is assumed of the world beyond the shares that are asked for (40 % measured, 10 % misplaced):
//! - Blocks are as long as routes of the internet are: of a thousand, 605 are a /24, 105 a /23, 117 a /22 and so on to the
//!   /16; the 5 that are shorter are taken for as many /16 as they hold, 32 ([`LENGTHS`]). A block belongs to one access network in one land. Blocks that follow each other have nothing to do with
//!   each other.
//! - Inside its block an access network gives out aligned runs of up to 16 /24 in one place ([`RUN`]), another run in another
//!   place of the land. Of a thousand /24 three are somewhere else altogether ([`APART`]), and nothing but the database knows.
//! - Half of the database's errors are about a whole run (where the operator's office is), half about a /24 alone. What is
//!   misplaced is near any region of the world, which is worse than what such databases do.
//! - A way is longer than the straight one by -15 to 35 %, the same for all that take it: half of the ways of a run are those
//!   of everybody around, half the access network's own; of a /24's ways one in seven is its own.
//!
//! With [`Runs::None`] every /24 is anywhere, and no way is like another: nothing can be learned from neighbours.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::{IpAddr, Ipv4Addr};

use controller::steering::Place;

use crate::world::{Random, Size};

/// What networks have to do with those next to them in address space.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Runs {
    /// As above.
    Real,
    /// Nothing.
    None,
}

/// A network of clients, a /24.
#[derive(Clone, Debug)]
pub(crate) struct Network {
    pub(crate) address: IpAddr,
    /// Where the geo database says that it is.
    pub(crate) geo: Place,
    /// Whether clients have measured from it before.
    pub(crate) is_measured: bool,
}

pub(crate) struct Networks {
    pub(crate) all: Vec<Network>,
    /// True round trips in milliseconds, network by network.
    pub(crate) rtts: Vec<f32>,
    /// What to expect of them at best.
    pub(crate) expected: Vec<f32>,
}

/// Clients of a network, on average.
const CLIENTS_A_NETWORK: usize = 20;
const MEASURED: f64 = 0.4;
/// Of runs, and again of single networks.
const MISPLACED: f64 = 0.05;
const APART: f64 = 0.003;
/// Bits of a block below its length as a /24, and how many of a thousand routes are as long.
const LENGTHS: [(u32, usize); 9] = [(0, 605), (1, 105), (2, 117), (3, 55), (4, 48), (5, 28), (6, 15), (7, 9), (8, 47)];
/// Most /24 of a run.
const RUN: usize = 16;
/// Share of a run's ways that are those of everybody around.
const COMMON: f64 = 0.5;
/// Share of a network's ways that are its own.
const OWN: f64 = 0.15;
/// Degrees of the cells within which everybody takes the common ways.
const AROUND: f64 = 4.0;
/// What a way is longer than the straight one on average.
const DETOUR: f64 = 1.1;

/// Degrees of latitude and longitude, not on the globe yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spot(pub(crate) f64, pub(crate) f64);

impl Spot {
    pub(crate) fn place(self) -> Place {
        let longitude = (self.1 + 540.0).rem_euclid(360.0) - 180.0;
        Place::new(self.0.clamp(-80.0, 80.0), longitude).expect("on the globe")
    }

    fn near(self, degrees: f64, random: &mut Random) -> Self {
        // Most live in the middle.
        let spread = |random: &mut Random| (random.unit() + random.unit() + random.unit() - 1.5) * degrees;
        Self(self.0 + spread(random), self.1 + spread(random))
    }

    /// The factor of the common way from around here to a region.
    fn common_detour(self, region: usize) -> f64 {
        // Not the grid that steering has.
        let cell = |degrees: f64| ((degrees + 1.3) / AROUND).floor() as i64;
        let mut hasher = DefaultHasher::new();
        (cell(self.0), cell(self.1), region).hash(&mut hasher);
        detour(&mut Random(hasher.finish()))
    }
}

fn detour(random: &mut Random) -> f64 {
    0.85 + 0.5 * random.unit()
}

struct Maker<'a> {
    regions: &'a [(Spot, u32)],
    total: u32,
    random: &'a mut Random,
    made: Networks,
}

/// Regions come with how many live near them.
pub(crate) fn make(size: Size, runs: Runs, regions: &[(Spot, u32)], random: &mut Random) -> Networks {
    let number = (size.clients / CLIENTS_A_NETWORK).max(1);
    let total = regions.iter().map(|(_, weight)| weight).sum();
    let made = Networks { all: Vec::new(), rtts: Vec::new(), expected: Vec::new() };
    let mut maker = Maker { regions, total, random, made };
    let mut next = 0x0001_0000_u32;
    // In a small world one block is not to be a large part of it.
    let most = (number / 100).max(1).ilog2();
    while maker.made.all.len() < number {
        let bits = if runs == Runs::Real { maker.length().min(most) } else { 0 };
        next = next.next_multiple_of(1 << bits);
        let region = maker.region();
        let end = next + (1 << bits);
        while next < end && maker.made.all.len() < number {
            let length = (end - next).min(RUN as u32);
            maker.run(runs, region, next, length as usize);
            next += length;
        }
    }
    maker.hedge();
    maker.made
}

impl Maker<'_> {
    fn length(&mut self) -> u32 {
        let mut ticket = self.random.below(LENGTHS.iter().map(|(_, share)| share).sum());
        for (bits, share) in LENGTHS {
            if ticket < share {
                return bits;
            }
            ticket -= share;
        }
        0
    }

    /// One by how many live near it.
    fn region(&mut self) -> Spot {
        let mut ticket = self.random.below(self.total as usize) as u32;
        for (spot, weight) in self.regions {
            if ticket < *weight {
                return *spot;
            }
            ticket -= weight;
        }
        self.regions[0].0
    }

    fn somewhere(&mut self) -> Spot {
        self.region().near(9.0, self.random)
    }

    fn run(&mut self, runs: Runs, region: Spot, first: u32, length: usize) {
        let spot = region.near(9.0, self.random);
        let misplaced = (self.random.unit() < MISPLACED).then(|| self.somewhere());
        let ways = self.ways(spot);
        let is_measured: Vec<bool> = (0..length).map(|_| self.random.unit() < MEASURED).collect();
        for (i, number) in (first..).take(length).enumerate() {
            let is_apart = runs == Runs::Real && self.random.unit() < APART;
            let is_alone = self.random.unit() < MISPLACED / (1.0 - MISPLACED);
            let (truly, ways) = if is_apart {
                let spot = self.somewhere();
                (spot, &self.ways(spot))
            } else {
                (spot.near(0.5, self.random), &ways)
            };
            let said = match misplaced {
                Some(office) if !is_apart => office.near(0.5, self.random),
                _ if is_alone => self.somewhere(),
                _ => truly,
            };
            let last_mile = 4.0 + 16.0 * self.random.unit() * self.random.unit();
            let of_its_own = if runs == Runs::Real { OWN } else { 1.0 };
            for (region, (place, _)) in self.regions.iter().enumerate() {
                let way = if self.random.unit() < of_its_own { detour(self.random) } else { ways[region] };
                let straight = truly.place().km_to(place.place()) * 0.015;
                self.made.rtts.push((last_mile + straight * way) as f32);
            }
            let others = (0..length).filter(|other| *other != i).any(|other| is_measured[other]);
            self.expect(is_measured[i], others.then_some((spot, &ways[..])), said, is_apart || is_alone);
            let address = Ipv4Addr::from_bits((number << 8) + 7).into();
            self.made.all.push(Network { address, geo: said.place(), is_measured: is_measured[i] });
        }
    }

    /// Factors of the ways from a place to the regions.
    fn ways(&mut self, spot: Spot) -> Vec<f64> {
        let mut way = |region| {
            if self.random.unit() < COMMON { spot.common_detour(region) } else { detour(self.random) }
        };
        (0..self.regions.len()).map(&mut way).collect()
    }

    /// What is known of the network that was made last: its own round trips; else those of its run as far as its ways are the
    /// run's; else the common ways from where the database says it is. Below 0 stands what [`Maker::hedge`] has to see to.
    fn expect(&mut self, is_measured: bool, run: Option<(Spot, &[f64])>, said: Spot, is_said_elsewhere: bool) {
        let first = self.made.expected.len();
        if is_measured {
            let own = self.made.rtts[first..].to_vec();
            self.made.expected.extend(own);
            return;
        }
        // Given that the database places it apart from the others of its run: it errs, or it is right.
        let errs = MISPLACED * (1.0 - APART) / (MISPLACED * (1.0 - APART) + APART * (1.0 - MISPLACED));
        for (region, (place, _)) in self.regions.iter().enumerate() {
            let straight = |from: Spot| from.place().km_to(place.place()) * 0.015;
            let by_said = straight(said)
                * ((1.0 - OWN) * COMMON * said.common_detour(region) + (1.0 - (1.0 - OWN) * COMMON) * DETOUR);
            let expected = match run {
                Some((spot, ways)) => {
                    let by_run = straight(spot) * ((1.0 - OWN) * ways[region] + OWN * DETOUR);
                    if is_said_elsewhere { errs * by_run + (1.0 - errs) * by_said } else { by_run }
                }
                None => -by_said,
            };
            self.made.expected.push(expected as f32);
        }
    }

    /// Of networks of which there is only the database's word, one in ten is anywhere.
    fn hedge(&mut self) {
        let regions = self.regions.len();
        let networks = self.made.all.len() as f32;
        let mean = |region: usize| self.made.rtts.iter().skip(region).step_by(regions).sum::<f32>() / networks;
        let means: Vec<f32> = (0..regions).map(mean).collect();
        for (i, expected) in self.made.expected.iter_mut().enumerate().filter(|(_, expected)| **expected < 0.0) {
            *expected = -*expected * 0.9 + means[i % regions] * 0.1;
        }
    }
}
