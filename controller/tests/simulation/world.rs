//! The world of the simulation: regions, relays, clients' networks, and the truth about them.

#[path = "../../src/fleet/sample.rs"]
mod sample;

use std::net::{IpAddr, Ipv4Addr};

use controller::fleet::{LoadRecord, NodeListener, NodeRecord, NodeView, Snapshot};
use controller::steering::{Place, Terms};

use crate::networks::{self, Network, Runs, Spot};

/// Where regions are, and how many of the world's clients are near (thousandths, roughly by population on line).
const REGIONS: [(&str, f64, f64, u32); 30] = [
    ("us-east", 39.0, -77.5, 62),
    ("us-central", 41.3, -95.9, 28),
    ("us-west", 37.4, -122.1, 44),
    ("us-south", 32.8, -96.8, 36),
    ("ca-central", 45.5, -73.6, 16),
    ("mx-central", 20.6, -100.4, 34),
    ("br-south", -23.5, -46.6, 52),
    ("ar-east", -34.6, -58.4, 14),
    ("cl-central", -33.4, -70.7, 9),
    ("co-north", 4.7, -74.1, 18),
    ("gb-south", 51.5, -0.1, 32),
    ("ie-east", 53.3, -6.3, 6),
    ("fr-north", 48.9, 2.4, 32),
    ("de-west", 50.1, 8.7, 42),
    ("nl-west", 52.4, 4.9, 14),
    ("es-central", 40.4, -3.7, 22),
    ("it-north", 45.5, 9.2, 26),
    ("se-north", 59.3, 18.1, 12),
    ("pl-central", 52.2, 21.0, 22),
    ("tr-west", 41.0, 29.0, 32),
    ("ae-north", 25.2, 55.3, 26),
    ("za-north", -26.2, 28.0, 24),
    ("ng-south", 6.5, 3.4, 40),
    ("in-west", 19.1, 72.9, 96),
    ("in-south", 13.1, 80.3, 60),
    ("sg-central", 1.3, 103.8, 62),
    ("id-west", -6.2, 106.8, 52),
    ("jp-east", 35.7, 139.7, 42),
    ("kr-central", 37.6, 127.0, 22),
    ("au-east", -33.9, 151.2, 23),
];

/// How large the world is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    pub(crate) regions: usize,
    pub(crate) relays: usize,
    pub(crate) clients: usize,
}

/// Everything that does not change while clients come and go.
pub(crate) struct World {
    pub(crate) size: Size,
    pub(crate) terms: Terms,
    pub(crate) region_names: Vec<&'static str>,
    /// Region of each relay, in the order of their ids.
    pub(crate) region_of: Vec<usize>,
    /// Allocations that each relay carries.
    pub(crate) capacity: Vec<u64>,
    pub(crate) networks: Vec<Network>,
    /// True round trips in milliseconds, network by network.
    rtts: Vec<f32>,
    /// What to expect of them, at best, by who knows only what is measured and what the database says.
    expected: Vec<f32>,
}

/// How much the relays carry for each client that is there at the peak.
const HEADROOM: f64 = 1.55;

impl World {
    /// The same seed makes the same world; `peak` is how many clients are there at once at most.
    pub(crate) fn new(size: Size, runs: Runs, peak: f64, random: &mut Random) -> Self {
        let regions = &REGIONS[..size.regions];
        let places: Vec<Place> =
            regions.iter().map(|(_, latitude, longitude, _)| Spot(*latitude, *longitude).place()).collect();
        let weights: Vec<u32> = regions.iter().map(|(_, _, _, weight)| *weight).collect();
        let total: u32 = weights.iter().sum();

        let mut terms = Terms { home: regions[0].0.to_owned(), ..Terms::default() };
        terms.places = regions.iter().zip(&places).map(|((name, ..), place)| ((*name).to_owned(), *place)).collect();

        let mut region_of = Vec::new();
        let mut capacity = Vec::new();
        for (region, weight) in weights.iter().enumerate() {
            let share = f64::from(*weight) / f64::from(total);
            let relays = ((size.relays as f64 * share).round() as usize).max(2);
            // Machines of three sizes.
            let sizes: Vec<f64> = (0..relays).map(|_| [1.0, 2.0, 4.0][random.below(3)]).collect();
            let sum: f64 = sizes.iter().sum();
            for machine in sizes {
                region_of.push(region);
                capacity.push((peak * HEADROOM * share * machine / sum).ceil() as u64);
            }
        }

        let spots = regions.iter().map(|(_, latitude, longitude, weight)| (Spot(*latitude, *longitude), *weight));
        let networks = networks::make(size, runs, &spots.collect::<Vec<_>>(), random);
        Self {
            size,
            terms,
            region_names: regions.iter().map(|(name, ..)| *name).collect(),
            region_of,
            capacity,
            networks: networks.all,
            rtts: networks.rtts,
            expected: networks.expected,
        }
    }

    /// The true round trip, in milliseconds.
    pub(crate) fn rtt(&self, network: usize, region: usize) -> f32 {
        self.rtts[network * self.size.regions + region]
    }

    /// The round trip to expect at best, in milliseconds, last miles aside.
    pub(crate) fn expected(&self, network: usize, region: usize) -> f32 {
        self.expected[network * self.size.regions + region]
    }

    pub(crate) fn relays(&self) -> usize {
        self.region_of.len()
    }

    pub(crate) fn id(&self, relay: usize) -> String {
        // In the order of their numbers.
        format!("{}-{relay:03}", self.region_names[self.region_of[relay]])
    }

    /// The fleet, idle, as a controller sees it.
    pub(crate) fn snapshot(&self, controllers: u32) -> Snapshot {
        let nodes = (0..self.relays()).map(|relay| {
            let node = self.node(relay);
            (node.record.node_id.clone(), node)
        });
        Snapshot { nodes: nodes.collect(), controllers, ..Snapshot::default() }
    }

    fn node(&self, relay: usize) -> NodeView {
        let ip = IpAddr::from(Ipv4Addr::from_bits(0xC612_0000 + relay as u32));
        let region = self.region_names[self.region_of[relay]];
        let record = sample::node_record(&self.id(relay), region, ip);
        NodeView {
            record: NodeRecord { workers: 2, max_allocations: self.capacity[relay], ..record },
            epoch: 1,
            load: LoadRecord::default(),
            drain: None,
        }
    }
}

/// splitmix64.
#[derive(Clone, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// 0 to 1.
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}
