//! Ways to choose a relay: ours, which is the code that controllers run, those it is compared with, and the one that knows
//! everything.

use std::time::Duration;

use controller::fleet::Snapshot;
use controller::steering::estimate::Evidence;
use controller::steering::{Measurements, OwnPicks, Query, choose, targets};

use crate::world::{Random, World};

/// What a selector sees of the moment.
pub(crate) struct Moment<'a> {
    pub(crate) world: &'a World,
    /// The fleet as controllers see it: reports are up to a second old.
    pub(crate) seen: &'a Snapshot,
    /// Index of each relay of `seen`, in its order.
    pub(crate) order: &'a [usize],
    /// What relays hold in truth.
    pub(crate) held: &'a [u64],
    pub(crate) is_alive: &'a [bool],
    pub(crate) now: Duration,
}

/// A way to choose.
pub(crate) trait Selector {
    fn name(&self) -> &'static str;

    /// The relay for a client of a network; `None` if there is none.
    fn choose(&mut self, moment: &Moment<'_>, network: usize, random: &mut Random) -> Option<usize>;

    /// A client measures and reports before it asks, if this one is interested.
    fn measured(&mut self, _: &Moment<'_>, _: usize, _: &mut Random) {}

    /// Networks that each controller writes to the store in this second, for the others to know.
    fn shared(&mut self, _: Duration) -> Vec<u64> {
        Vec::new()
    }

    /// A relay sends clients elsewhere when it is nearly full.
    fn redirects(&self) -> bool {
        false
    }
}

/// The steering of the controllers: several replicas, each with picks of its own. What one has been told of measurements the
/// others know.
pub(crate) struct Ours {
    picks: Vec<OwnPicks>,
    measurements: Measurements,
    /// Whether clients go on to report.
    learns: bool,
}

impl Ours {
    pub(crate) fn new(world: &World, replicas: usize, learns: bool, random: &mut Random) -> Self {
        let mut measurements = Measurements::new(65_536);
        for (i, network) in world.networks.iter().enumerate().filter(|(_, network)| network.is_measured) {
            // The regions that are nearest in truth, which is what measuring is for.
            let mut regions: Vec<usize> = (0..world.size.regions).collect();
            regions.sort_by(|a, b| world.rtt(i, *a).total_cmp(&world.rtt(i, *b)));
            let rtts =
                regions.iter().take(6).map(|region| (world.region_names[*region], noisy(world, i, *region, random)));
            measurements.report(&world.terms, network.address, Some(network.geo), rtts, Duration::ZERO);
        }
        // What was measured before was shared before.
        measurements.take_unshared(usize::MAX, Duration::ZERO);
        Self { picks: vec![OwnPicks::default(); replicas], measurements, learns }
    }

    fn evidence(&mut self, moment: &Moment<'_>, network: usize) -> Evidence {
        let about = &moment.world.networks[network];
        self.measurements.evidence(&moment.world.terms, about.address, Some(about.geo), moment.now)
    }
}

/// A measurement, the best of several: up to 10 % and 2 ms more than the truth, or 3 % less.
fn noisy(world: &World, network: usize, region: usize, random: &mut Random) -> f32 {
    world.rtt(network, region) * (0.97 + 0.13 * random.unit()) as f32 + 2.0 * (random.unit() * random.unit()) as f32
}

impl Selector for Ours {
    fn name(&self) -> &'static str {
        if self.learns { "Turnpike, clients measure" } else { "Turnpike" }
    }

    fn choose(&mut self, moment: &Moment<'_>, network: usize, random: &mut Random) -> Option<usize> {
        let evidence = self.evidence(moment, network);
        let replica = random.below(self.picks.len());
        let query = Query { limit: 1, client: Some(moment.world.networks[network].address), ..Query::default() };
        let picks = &mut self.picks[replica];
        let choice = choose(moment.seen, &moment.world.terms, &query, &evidence, picks, random.next());
        number_of(&choice.relays.first()?.node_id)
    }

    fn measured(&mut self, moment: &Moment<'_>, network: usize, random: &mut Random) {
        if !self.learns {
            return;
        }
        let evidence = self.evidence(moment, network);
        let targets = targets(moment.seen, &moment.world.terms, &evidence, false, random.next());
        let rtts: Vec<(String, f32)> = targets
            .into_iter()
            .filter_map(|target| {
                let region = moment.world.region_names.iter().position(|name| *name == target.region)?;
                Some((target.region, noisy(moment.world, network, region, random)))
            })
            .collect();
        let about = &moment.world.networks[network];
        let rtts = rtts.iter().map(|(region, ms)| (region.as_str(), *ms));
        self.measurements.report(&moment.world.terms, about.address, Some(about.geo), rtts, moment.now);
    }

    fn shared(&mut self, now: Duration) -> Vec<u64> {
        self.picks.iter().map(|_| self.measurements.take_unshared(64, now).len() as u64).collect()
    }

    fn redirects(&self) -> bool {
        true
    }
}

/// The number at the end of a relay's id.
pub(crate) fn number_of(node_id: &str) -> Option<usize> {
    node_id.rsplit_once('-')?.1.parse().ok()
}

/// Any relay, each as likely.
pub(crate) struct AnyRelay;

impl Selector for AnyRelay {
    fn name(&self) -> &'static str {
        "random"
    }

    fn choose(&mut self, moment: &Moment<'_>, _: usize, random: &mut Random) -> Option<usize> {
        (!moment.order.is_empty()).then(|| moment.order[random.below(moment.order.len())])
    }
}

/// The nearest region by the geo database, whatever its load; any relay of it.
pub(crate) struct NearestOnly;

impl Selector for NearestOnly {
    fn name(&self) -> &'static str {
        "nearest only"
    }

    fn choose(&mut self, moment: &Moment<'_>, network: usize, random: &mut Random) -> Option<usize> {
        let region = nearest_by_geo(moment, network, |_| true)?;
        let of_it: Vec<usize> = of_region(moment, region).collect();
        Some(of_it[random.below(of_it.len())])
    }
}

/// As LiveKit's region-aware selector with `sysload_limit: 0.9` does it: relays that last said they are below the limit, of
/// these the region that is nearest by geo, of this any.
pub(crate) struct LikeLiveKit;

impl Selector for LikeLiveKit {
    fn name(&self) -> &'static str {
        "LiveKit-like"
    }

    fn choose(&mut self, moment: &Moment<'_>, network: usize, random: &mut Random) -> Option<usize> {
        let has_room = |relay: usize| said(moment, relay) < 0.9;
        let region = nearest_by_geo(moment, network, has_room).or_else(|| nearest_by_geo(moment, network, |_| true))?;
        let mut of_it: Vec<usize> = of_region(moment, region).filter(|relay| has_room(*relay)).collect();
        if of_it.is_empty() {
            of_it = of_region(moment, region).collect();
        }
        Some(of_it[random.below(of_it.len())])
    }
}

fn said(moment: &Moment<'_>, relay: usize) -> f64 {
    let node = &moment.seen.nodes[&moment.world.id(relay)];
    node.load.allocations as f64 / node.record.max_allocations as f64
}

fn of_region<'a>(moment: &'a Moment<'_>, region: usize) -> impl Iterator<Item = usize> + 'a {
    moment.order.iter().copied().filter(move |relay| moment.world.region_of[*relay] == region)
}

fn nearest_by_geo(moment: &Moment<'_>, network: usize, is_fit: impl Fn(usize) -> bool) -> Option<usize> {
    let geo = moment.world.networks[network].geo;
    let mut regions: Vec<usize> = (0..moment.world.size.regions).collect();
    let km = |region: &usize| geo.km_to(moment.world.terms.places[moment.world.region_names[*region]]);
    regions.sort_by(|a, b| km(a).total_cmp(&km(b)));
    regions.into_iter().find(|region| of_region(moment, *region).any(&is_fit))
}

/// Knows every load at this very moment: the nearest region with room, and its emptiest relay.
pub(crate) struct Optimum {
    /// Knows every round trip; else those of measured networks, and of the others what can be made of these and of the geo
    /// database by who knows how the world was made.
    pub(crate) knows_all: bool,
}

impl Selector for Optimum {
    fn name(&self) -> &'static str {
        if self.knows_all { "optimum (knows all)" } else { "optimum (knows 40 %)" }
    }

    fn choose(&mut self, moment: &Moment<'_>, network: usize, _: &mut Random) -> Option<usize> {
        let world = moment.world;
        let free =
            (0..world.relays()).filter(|relay| moment.is_alive[*relay] && moment.held[*relay] < world.capacity[*relay]);
        free.min_by(|a, b| {
            let rtt = |relay: usize| match (self.knows_all, world.region_of[relay]) {
                (true, region) => world.rtt(network, region),
                (false, region) => world.expected(network, region),
            };
            let load = |relay: usize| moment.held[relay] as f64 / world.capacity[relay] as f64;
            rtt(*a).total_cmp(&rtt(*b)).then(load(*a).total_cmp(&load(*b)))
        })
    }
}
