//! Where a network is that nobody has measured, by those next to it in address space: [`infer`], pure.
//!
//! Access networks give out runs of addresses in one place, so that the nearest measured ones are mostly in the same place
//! and use the same ways; how often so, by the bits that two networks do not share, is learned from those that are measured
//! ([`Likeness`]). Two hypotheses stand against each other: the network is where the database says, or where a group of
//! neighbours is that agree with each other. All weights here are odds.

use std::time::Duration;

use smallvec::SmallVec;

use super::Place;
use super::measured::{REGIONS, RegionId, Sample};

/// Neighbours looked at: the nearest by the prefix they share.
pub(super) const NEIGHBOURS: usize = 8;
/// Round trips of two networks to a region, an offset for their last miles apart, are alike if they differ by at most so many
/// milliseconds...
const ALIKE_MS: f32 = 4.0;
/// ...and this share of the longer one: measurements are as good as that.
const ALIKE_SHARE: f32 = 0.1;
/// Odds that the database is right about a place, and where it is known to be wrong about others at the same place.
const DATABASE: f32 = 9.0;
const DATABASE_DISPROVED: f32 = 0.01;
/// Last miles in one place differ by at most so much.
const LAST_MILE_MS: f32 = 30.0;
/// How likely two networks are alike that have nothing to do with each other: many people live near each other.
const CHANCE: f32 = 0.2;
/// By how much a network within a group that is not of it makes the group less likely to reach to there.
const STRANGER: f32 = 0.03;
/// By how much a group that lies beside the network is less likely to reach to there: runs have ends.
const BESIDE: f32 = 0.03;
/// Nobody is more certain than that, nor less.
const CERTAIN: f32 = 0.98;
/// Bits that networks of a neighbourhood differ in at most.
const BITS: usize = 16;
/// Pairs that what is taken for likely at first counts as, and pairs after which older ones count half.
const PRIOR: f32 = 10.0;
const MOST_PAIRS: f32 = 4096.0;
/// Kilometres between places that are one entry of a database.
const SAME_KM: f64 = 100.0;
/// Kilometres between places that may use the same ways.
const NEAR_KM: f64 = 500.0;

/// A measured network near the one that is asked about.
#[derive(Debug)]
pub(super) struct Neighbour<'a> {
    /// Its prefix as a number: those of one family differ in the last bits.
    pub(super) number: u128,
    /// Where the database says that it is.
    pub(super) place: Option<Place>,
    /// Round trips in order of their regions.
    pub(super) samples: &'a [Sample],
}

/// What follows for the network that is asked about.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Inferred {
    /// Round trips taken from neighbours, with the time of the newest measurement.
    pub(super) rtts: Vec<(RegionId, f32, Duration)>,
    /// Of so many networks.
    pub(super) networks: usize,
    /// The place in the database is not where it is.
    pub(super) is_disproved: bool,
}

/// What to take from `neighbours` for the network `client`, which the database places at `location`. `place_of` tells
/// where a region is.
pub(super) fn infer(
    client: u128,
    location: Option<Place>,
    neighbours: &[Neighbour<'_>],
    likeness: &Likeness,
    place_of: &impl Fn(RegionId) -> Option<Place>,
) -> Inferred {
    let groups = neighbours.iter().map(|seed| Group::new(seed, neighbours));
    let Some(location) = location else {
        let best =
            groups.max_by(|a, b| a.odds(client, neighbours, likeness).total_cmp(&b.odds(client, neighbours, likeness)));
        return best.map_or_else(Inferred::default, |group| group.lend(false));
    };
    let elsewhere = neighbours.iter().filter(|it| contradicts(location, it.samples, place_of));
    let elsewhere: Vec<u128> = elsewhere.map(|it| it.number).collect();
    let is_elsewhere = |it: &Neighbour<'_>| elsewhere.contains(&it.number);
    // Whether the database has placed neighbours right there that are not.
    let here = || neighbours.iter().filter(|it| it.place.is_some_and(|place| place.km_to(location) <= SAME_KM));
    let is_wrong_here = here().next().is_some() && here().all(is_elsewhere);
    let database = if is_wrong_here { DATABASE_DISPROVED } else { DATABASE };
    let mut best: (f32, Option<(Group<'_, '_>, bool)>) = (database, None);
    for group in groups {
        let contradicts = group.members.iter().any(|it| is_elsewhere(it));
        let is_near = || {
            let mut places = group.members.iter().filter_map(|it| it.place);
            places.any(|place| place.km_to(location) <= NEAR_KM)
        };
        let odds = group.odds(client, neighbours, likeness);
        let total = if contradicts {
            odds
        } else if odds > 1.0 || is_near() {
            odds + database
        } else {
            continue;
        };
        if total > best.0 {
            best = (total, Some((group, contradicts)));
        }
    }
    best.1.map_or_else(Inferred::default, |(group, contradicts)| group.lend(contradicts))
}

/// Whether a network with these round trips cannot be at a place: light is not that fast.
pub(super) fn contradicts(place: Place, samples: &[Sample], place_of: &impl Fn(RegionId) -> Option<Place>) -> bool {
    samples
        .iter()
        .any(|sample| place_of(sample.region).is_some_and(|region| sample.rtt_ms < place.least_ms_to(region) as f32))
}

/// How often networks are alike whose prefixes differ in the last so many bits, of one family.
#[derive(Clone, Debug)]
pub(super) struct Likeness([Seen; BITS]);

#[derive(Clone, Copy, Debug)]
struct Seen {
    alike: f32,
    pairs: f32,
}

impl Likeness {
    /// Nothing was seen yet: runs are taken to be of `run_bits`.
    pub(super) fn new(run_bits: usize) -> Self {
        let prior = |apart: usize| if apart < run_bits { 0.8 } else { 0.4 };
        Self(std::array::from_fn(|apart| Seen { alike: prior(apart) * PRIOR, pairs: PRIOR }))
    }

    /// Takes what two measured networks show.
    pub(super) fn learn(&mut self, a: &Neighbour<'_>, b: &Neighbour<'_>) {
        let Some(seen) = self.0.get_mut((apart(a.number, b.number) as usize).saturating_sub(1)) else { return };
        if seen.pairs >= MOST_PAIRS {
            *seen = Seen { alike: seen.alike / 2.0, pairs: seen.pairs / 2.0 };
        }
        seen.alike += f32::from(u8::from(offset(a, b).is_some()));
        seen.pairs += 1.0;
    }

    /// Odds that two so many bits apart are in one place, and not alike by chance.
    fn odds(&self, apart: u32) -> f32 {
        let Some(seen) = self.0.get((apart as usize).saturating_sub(1)) else { return 0.0 };
        let same = ((seen.alike / seen.pairs - CHANCE) / (1.0 - CHANCE)).clamp(0.0, CERTAIN);
        same / (1.0 - same)
    }
}

/// Bits of the smallest block that holds two networks.
pub(super) fn apart(a: u128, b: u128) -> u32 {
    u128::BITS - (a ^ b).leading_zeros()
}

/// Neighbours that are in one place with the first of them.
struct Group<'a, 'b> {
    members: Vec<&'b Neighbour<'a>>,
}

impl<'a, 'b> Group<'a, 'b> {
    fn new(seed: &'b Neighbour<'a>, neighbours: &'b [Neighbour<'a>]) -> Self {
        let others = neighbours.iter().filter(|it| it.number != seed.number && offset(seed, it).is_some());
        Self { members: std::iter::once(seed).chain(others).collect() }
    }

    /// Odds that the network is of it. If some of the group are in either half of a block that holds the network, all of the
    /// block is of one run, or they are alike by chance: of the blocks that reach to its second member, its third and so on the
    /// most telling one counts. Else it lies beside the network.
    fn odds(&self, client: u128, neighbours: &[Neighbour<'_>], likeness: &Likeness) -> f32 {
        let mut far: Vec<(u32, u128)> = self.members.iter().map(|it| (apart(client, it.number), it.number)).collect();
        far.sort_unstable();
        let (nearest, first) = far[0];
        let strangers = |reach: u32, members: usize| {
            let inside = neighbours.iter().filter(|it| apart(client, it.number) <= reach).count();
            STRANGER.powi(i32::try_from(inside.saturating_sub(members)).unwrap_or(i32::MAX))
        };
        let members = far.iter().filter(|(reach, _)| *reach == nearest).count();
        let mut best = likeness.odds(nearest) * strangers(nearest, members) * BESIDE;
        let mut span = 0;
        for (i, (reach, number)) in far.iter().enumerate().skip(1) {
            span = span.max(apart(first, *number));
            // As many as are as far count at once.
            if span >= nearest && far.get(i + 1).is_none_or(|(next, _)| next > reach) {
                best = best.max(likeness.odds(*reach) / CHANCE * strangers(*reach, i + 1));
            }
        }
        best
    }

    /// The round trips of all of them, as of one network with the mean of their last miles.
    fn lend(&self, is_disproved: bool) -> Inferred {
        let offsets = self.members.iter().map(|it| offset(self.members[0], it).unwrap_or(0.0));
        let offsets: Vec<f32> = offsets.collect();
        let mean = offsets.iter().sum::<f32>() / offsets.len() as f32;
        // Region, sum, number, newest.
        let mut sums: Vec<(RegionId, f32, f32, Duration)> = Vec::new();
        for (member, offset) in self.members.iter().zip(&offsets) {
            for sample in member.samples {
                let rtt_ms = sample.rtt_ms - offset + mean;
                match sums.iter_mut().find(|(region, ..)| *region == sample.region) {
                    Some((_, sum, number, newest)) => {
                        *sum += rtt_ms;
                        *number += 1.0;
                        *newest = (*newest).max(sample.at);
                    }
                    None => sums.push((sample.region, rtt_ms, 1.0, sample.at)),
                }
            }
        }
        let rtts = sums.into_iter().map(|(region, sum, number, newest)| (region, (sum / number).max(0.0), newest));
        Inferred { rtts: rtts.collect(), networks: self.members.len(), is_disproved }
    }
}

/// By how much the round trips of `b` are longer than those of `a` if they are of one place: the median difference, which most
/// of those to regions that both have measured have, and at least half of what one has measured are.
fn offset(a: &Neighbour<'_>, b: &Neighbour<'_>) -> Option<f32> {
    let (mut i, mut j) = (0, 0);
    let mut common: SmallVec<[(f32, f32); REGIONS]> = SmallVec::new();
    while let (Some(x), Some(y)) = (a.samples.get(i), b.samples.get(j)) {
        if x.region == y.region {
            common.push((y.rtt_ms - x.rtt_ms, x.rtt_ms.max(y.rtt_ms)));
        }
        i += usize::from(x.region <= y.region);
        j += usize::from(y.region <= x.region);
    }
    let least = a.samples.len().min(b.samples.len()).div_ceil(2).max(1);
    if common.len() < least {
        return None;
    }
    common.sort_unstable_by(|x, y| x.0.total_cmp(&y.0));
    let median = common[common.len() / 2].0;
    // Of one common region nothing tells the last mile from the way.
    let offset = if common.len() > 1 { median } else { 0.0 };
    if offset.abs() > LAST_MILE_MS {
        return None;
    }
    let alike = |(difference, longer): &&(f32, f32)| (difference - offset).abs() <= ALIKE_MS + ALIKE_SHARE * longer;
    let alike = common.iter().filter(alike).count();
    (alike * 3 >= common.len() * 2).then_some(median)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRANKFURT: (f64, f64) = (50.1, 8.7);
    const TOKYO: (f64, f64) = (35.7, 139.7);
    const REGIONS: [(f64, f64); 5] = [FRANKFURT, (51.5, -0.1), (59.3, 18.1), TOKYO, (37.6, 127.0)];

    fn place((latitude, longitude): (f64, f64)) -> Place {
        Place::new(latitude, longitude).expect("on the globe")
    }

    fn place_of(region: RegionId) -> Option<Place> {
        REGIONS.get(usize::from(region)).map(|at| place(*at))
    }

    /// Round trips from a place to the regions that are not on the other side of the globe.
    fn measured(at: (f64, f64), access_ms: f32) -> Vec<Sample> {
        let to = |region: RegionId| (region, place(at).rtt_ms_to(place(REGIONS[usize::from(region)])));
        let near = (0..5).map(to).filter(|(_, rtt_ms)| *rtt_ms < 60);
        let sample = |(region, rtt_ms)| Sample {
            region,
            rtt_ms: rtt_ms as f32 + access_ms,
            weight: 1.0,
            at: Duration::from_secs(u64::from(region)),
        };
        near.map(sample).collect()
    }

    #[test]
    fn a_group_around_a_network_outweighs_the_database_and_one_beside_it_does_not() {
        // Number, where it is, where the database says it is; the client is number 3, in Frankfurt for the database.
        type Known<'a> = &'a [(u128, (f64, f64), Option<(f64, f64)>)];
        let (here, there) = (Some(FRANKFURT), Some(TOKYO));
        let cases: &[(&str, Known<'_>, usize, bool)] = &[
            ("nobody", &[], 0, false),
            ("around, elsewhere", &[(2, TOKYO, there), (8, TOKYO, there)], 2, true),
            ("around, here", &[(2, FRANKFURT, here), (8, FRANKFURT, here)], 2, false),
            ("beside, elsewhere", &[(2, TOKYO, there)], 0, false),
            ("beside, and the database was wrong about the place", &[(2, TOKYO, here)], 1, true),
            ("beside, and the database was right about it", &[(2, TOKYO, here), (9, FRANKFURT, here)], 1, false),
            ("beside, the same place", &[(2, FRANKFURT, here)], 1, false),
            (
                "beside, the same place as far as round trips tell, not for the database",
                &[(2, FRANKFURT, None)],
                0,
                false,
            ),
            ("a block next to it", &[(16, TOKYO, there), (17, TOKYO, there), (20, TOKYO, there)], 0, false),
            ("a stranger is nearer", &[(1, TOKYO, there), (2, FRANKFURT, here), (9, TOKYO, there)], 1, false),
            ("beyond a /16 there is nobody to ask", &[(2, TOKYO, None), (0xF0, FRANKFURT, here)], 1, false),
        ];
        for (what, known, networks, is_disproved) in cases {
            let samples: Vec<_> = known.iter().map(|(_, at, _)| measured(*at, 5.0)).collect();
            let neighbours = known.iter().zip(&samples).map(|((number, _, said), samples)| Neighbour {
                number: *number,
                place: said.map(place),
                samples,
            });
            let neighbours = neighbours.collect::<Vec<_>>();
            let inferred = infer(3, Some(place(FRANKFURT)), &neighbours, &Likeness::new(4), &place_of);
            assert_eq!((inferred.networks, inferred.is_disproved), (*networks, *is_disproved), "{what}");
        }
    }

    #[test]
    fn where_neighbours_are_not_alike_nothing_is_taken_from_them() {
        let (tokyo, frankfurt) = (measured(TOKYO, 5.0), measured(FRANKFURT, 5.0));
        let neighbour = |number, samples| Neighbour { number, place: Some(place(TOKYO)), samples };
        let around = [neighbour(2, &tokyo), neighbour(8, &tokyo)];
        let inferred = |likeness: &Likeness| infer(3, Some(place(FRANKFURT)), &around, likeness, &place_of).networks;
        let mut likeness = Likeness::new(4);
        assert_eq!(inferred(&likeness), 2);
        for i in 0..100 {
            likeness.learn(&neighbour(i * 16, &tokyo), &neighbour(i * 16 + 8, &frankfurt));
        }
        assert_eq!(inferred(&likeness), 0);
        for i in 0..10_000 {
            likeness.learn(&neighbour(i * 16, &tokyo), &neighbour(i * 16 + 8, &tokyo));
        }
        assert_eq!(inferred(&likeness), 2, "it was long ago");
        likeness.learn(&neighbour(0, &tokyo), &neighbour(1 << 40, &tokyo));
    }

    #[test]
    fn without_a_database_the_nearest_group_lends() {
        let (tokyo, frankfurt) = (measured(TOKYO, 5.0), measured(FRANKFURT, 5.0));
        let neighbour = |number, samples| Neighbour { number, place: None, samples };
        let neighbours = [neighbour(2, &tokyo), neighbour(0x80, &frankfurt)];
        let inferred = infer(3, None, &neighbours, &Likeness::new(4), &place_of);
        assert_eq!(inferred.rtts.iter().map(|(region, ..)| *region).collect::<Vec<_>>(), [3, 4]);
        assert_eq!(infer(3, None, &[], &Likeness::new(4), &place_of), Inferred::default());
    }

    #[test]
    fn what_is_lent_is_as_of_one_network() {
        // The one with the long last mile has measured a region that the other has not: it does not look farther for that.
        let (near, far) = (measured(FRANKFURT, 2.0), measured(FRANKFURT, 18.0));
        let near = &near[..2];
        let neighbour = |number, samples| Neighbour { number, place: Some(place(FRANKFURT)), samples };
        let inferred =
            infer(3, Some(place(FRANKFURT)), &[neighbour(2, near), neighbour(4, &far)], &Likeness::new(4), &place_of);
        let rtts: Vec<_> = inferred.rtts.iter().map(|(region, rtt_ms, _)| (*region, *rtt_ms)).collect();
        let expected = measured(FRANKFURT, 10.0);
        assert_eq!(rtts.len(), 3);
        for (region, rtt_ms) in rtts {
            let expected = expected.iter().find(|sample| sample.region == region).expect("measured");
            assert!((rtt_ms - expected.rtt_ms).abs() < 0.1, "{region}: {rtt_ms}, {}", expected.rtt_ms);
        }
        assert_eq!(inferred.rtts.iter().map(|(.., at)| at.as_secs()).max(), Some(2));
    }
}
