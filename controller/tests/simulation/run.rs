//! One run on virtual time: clients come, stay and go; relays report each second; at the peak a region fails.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use controller::steering::alternates;

use crate::selectors::{Moment, Selector, number_of};
use crate::world::{Random, World};

/// Length of a run, in virtual seconds.
pub(crate) const LENGTH: u64 = 2700;
/// Until then more and more clients come.
const RAMP: u64 = 1200;
/// When the region fails: nearly as many are there as there will be.
pub(crate) const FAILURE: u64 = 2100;
/// How long clients stay, on average, in virtual seconds.
pub(crate) const STAY: f64 = 600.0;
/// Virtual milliseconds of a step: relays send what changed so often.
const STEP: u64 = 100;
/// From the failure until controllers know of it, in milliseconds: streams break.
const NOTICED: u64 = 1000;
/// Clients notice within 1 to 5 s, and ask again.
const CLIENTS_NOTICE: (u64, u64) = (1000, 5000);
/// A relay sends new clients elsewhere above this share of what it carries.
const FULL: f64 = 0.95;
/// So many of the clients have the module that measures when its page is opened, once an hour; they report before they ask.
const MEASURE: f64 = 0.5;
/// Share of its capacity that a relay's processor is busy with at most.
const BUSY_PERMILLE: f64 = 800.0;

/// What came of a run.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) name: &'static str,
    pub(crate) placed: u64,
    /// Milliseconds.
    pub(crate) mean_rtt: f64,
    pub(crate) p95_rtt: f64,
    /// The same of clients that had to be placed again because their region had failed.
    pub(crate) mean_rtt_moved: f64,
    /// Highest load of any relay at any time, in shares of what it carries.
    pub(crate) highest: f64,
    /// Relays that were ever above what they carry.
    pub(crate) over: usize,
    /// Standard deviation of the relays' loads before the failure.
    pub(crate) deviation: f64,
    pub(crate) redirects: u64,
    /// Clients that were sent to a relay which had failed.
    pub(crate) to_the_dead: u64,
    /// Clients that had to move.
    pub(crate) moved: u64,
    /// Until all of them were placed again, in seconds.
    pub(crate) moved_within: f64,
    /// Decisions in a second of real time.
    pub(crate) decisions: f64,
    /// Store operations and transactions in the busiest virtual second, before controllers join some of the latter.
    pub(crate) store_operations: u64,
    pub(crate) store_transactions: u64,
    /// Mean load of all relays and highest load of one, minute by minute.
    pub(crate) minutes: Vec<(f64, f64)>,
}

/// A client that comes, or comes back.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Coming {
    at: u64,
    network: usize,
    /// When it leaves.
    until: u64,
    is_moved: bool,
}

/// Clients that come in a virtual second, of one each: a third of what comes at the end at first, growing to the ramp's end.
fn rate(second: u64) -> f64 {
    let all = RAMP as f64 + 1.5 * (LENGTH - RAMP) as f64;
    (0.5 + second.min(RAMP) as f64 / RAMP as f64) * LENGTH as f64 / all
}

/// Clients there at once at the peak, of `clients` in all.
pub(crate) fn peak(clients: usize) -> f64 {
    clients as f64 / LENGTH as f64 * rate(LENGTH) * STAY * 0.97
}

pub(crate) fn run(world: &World, selector: &mut dyn Selector, controllers: u32, seed: u64) -> Outcome {
    let mut random = Random(seed);
    let mut seen = world.snapshot(controllers);
    let mut order: Vec<usize> = seen.nodes.keys().filter_map(|id| number_of(id)).collect();
    let mut held = vec![0_u64; world.relays()];
    let mut is_alive = vec![true; world.relays()];
    let mut was_over = vec![false; world.relays()];
    let failed = (0..world.size.regions).max_by_key(|region| {
        (0..world.relays())
            .filter(|relay| world.region_of[*relay] == *region)
            .map(|relay| world.capacity[relay])
            .sum::<u64>()
    });
    let failed = failed.expect("regions");

    let mut coming: BinaryHeap<Reverse<Coming>> = arrivals(world, &mut random).into_iter().map(Reverse).collect();
    // When, relay, which of its allocations' clients.
    let mut leaving: BinaryHeap<Reverse<(u64, usize, usize)>> = BinaryHeap::new();
    let mut outcome = Outcome { name: selector.name(), ..Outcome::default() };
    let mut rtts: Vec<f32> = Vec::with_capacity(world.size.clients);
    let (mut moved_rtt, mut moved_last) = (0.0, 0);
    let mut choosing = Duration::ZERO;
    let (mut second_operations, mut second_transactions) = (0_u64, 0_u64);
    let mut changed = vec![0_u64; world.relays()];

    for step in 0..LENGTH * 1000 / STEP {
        let now = step * STEP;
        if now == FAILURE * 1000 {
            outcome.deviation = deviation(world, &held);
            for relay in (0..world.relays()).filter(|relay| world.region_of[*relay] == failed) {
                is_alive[relay] = false;
                held[relay] = 0;
            }
            let (lost, kept): (Vec<_>, Vec<_>) =
                leaving.into_iter().partition(|Reverse((_, relay, _))| !is_alive[*relay]);
            leaving = kept.into();
            outcome.moved = lost.len() as u64;
            for Reverse((until, _, network)) in lost {
                let at = now + CLIENTS_NOTICE.0 + random.next() % (CLIENTS_NOTICE.1 - CLIENTS_NOTICE.0);
                coming.push(Reverse(Coming { at, network, until: until.max(at + 1), is_moved: true }));
            }
        }
        if now == FAILURE * 1000 + NOTICED {
            seen.nodes.retain(|id, _| number_of(id).is_some_and(|relay| is_alive[relay]));
            order.retain(|relay| is_alive[*relay]);
        }
        while leaving.peek().is_some_and(|Reverse((until, ..))| *until <= now) {
            let Some(Reverse((_, relay, _))) = leaving.pop() else { break };
            held[relay] -= 1;
            changed[relay] += 1;
        }
        while coming.peek().is_some_and(|Reverse(client)| client.at <= now) {
            let Some(Reverse(client)) = coming.pop() else { break };
            let since_start = Duration::from_millis(now);
            let moment =
                Moment { world, seen: &seen, order: &order, held: &held, is_alive: &is_alive, now: since_start };
            if !client.is_moved && random.unit() < MEASURE {
                selector.measured(&moment, client.network, &mut random);
            }
            let begun = Instant::now();
            let chosen = selector.choose(&moment, client.network, &mut random);
            choosing += begun.elapsed();
            outcome.placed += 1;
            let Some(mut relay) = chosen else { continue };
            if !is_alive[relay] {
                // It hears nothing, and asks again.
                outcome.to_the_dead += 1;
                coming.push(Reverse(Coming { at: now + 2000, ..client }));
                continue;
            }
            if selector.redirects() && held[relay] as f64 >= world.capacity[relay] as f64 * FULL {
                let own = &seen.nodes[&world.id(relay)].record;
                let others = alternates(&seen, &world.terms, own);
                let other = others
                    .iter()
                    .filter_map(|other| number_of(&other.node_id))
                    .find(|other| is_alive[*other] && (held[*other] as f64) < world.capacity[*other] as f64 * FULL);
                outcome.redirects += u64::from(other.is_some());
                relay = other.unwrap_or(relay);
            }
            held[relay] += 1;
            changed[relay] += 1;
            was_over[relay] |= held[relay] > world.capacity[relay];
            outcome.highest = outcome.highest.max(held[relay] as f64 / world.capacity[relay] as f64);
            leaving.push(Reverse((client.until, relay, client.network)));
            let rtt = world.rtt(client.network, world.region_of[relay]);
            rtts.push(rtt);
            if client.is_moved {
                moved_rtt += f64::from(rtt);
                moved_last = now;
            }
        }
        // Relays report at ten different times of the second, and send their changes each step: one transaction of at most
        // 128 operations.
        for (relay, changed) in changed.iter_mut().enumerate() {
            second_operations += *changed;
            second_transactions += changed.div_ceil(128);
            *changed = 0;
            if relay as u64 % 10 == step % 10 && is_alive[relay] {
                second_operations += 1;
                second_transactions += 1;
                if let Some(node) = seen.nodes.get_mut(&world.id(relay)) {
                    node.load.allocations = held[relay];
                    node.load.busiest_worker_permille =
                        (held[relay] as f64 / world.capacity[relay] as f64 * BUSY_PERMILLE) as u32;
                    node.load.reported_at = now + 1;
                }
            }
        }
        if step % 10 == 9 {
            // Of each allocation a refresh is stored once in half its lifetime of 600 s.
            second_operations += held.iter().sum::<u64>() / 300 + u64::from(controllers);
            let shared = selector.shared(Duration::from_millis(now));
            second_operations += shared.iter().sum::<u64>();
            second_transactions += shared.iter().filter(|networks| **networks > 0).count() as u64;
            outcome.store_operations = outcome.store_operations.max(second_operations);
            outcome.store_transactions = outcome.store_transactions.max(second_transactions + u64::from(controllers));
            (second_operations, second_transactions) = (0, 0);
        }
        if now.is_multiple_of(60_000) {
            outcome.minutes.push(loads(world, &held, &is_alive));
        }
    }
    rtts.sort_by(f32::total_cmp);
    outcome.mean_rtt = rtts.iter().map(|rtt| f64::from(*rtt)).sum::<f64>() / rtts.len().max(1) as f64;
    outcome.p95_rtt = rtts.get(rtts.len() * 95 / 100).copied().unwrap_or_default().into();
    outcome.mean_rtt_moved = moved_rtt / outcome.moved.max(1) as f64;
    outcome.moved_within = moved_last.saturating_sub(FAILURE * 1000) as f64 / 1000.0;
    outcome.over = was_over.iter().filter(|over| **over).count();
    outcome.decisions = outcome.placed as f64 / choosing.as_secs_f64().max(1e-9);
    outcome
}

fn arrivals(world: &World, random: &mut Random) -> Vec<Coming> {
    let a_second = world.size.clients as f64 / LENGTH as f64;
    let mut owed = 0.0;
    let mut coming = Vec::with_capacity(world.size.clients);
    for second in 0..LENGTH {
        owed += a_second * rate(second);
        while owed >= 1.0 {
            owed -= 1.0;
            let at = second * 1000 + random.next() % 1000;
            let stay = -STAY * 1000.0 * (1.0 - random.unit()).ln();
            let network = random.below(world.networks.len());
            coming.push(Coming { at, network, until: at + stay as u64 + 1, is_moved: false });
        }
    }
    coming
}

fn loads(world: &World, held: &[u64], is_alive: &[bool]) -> (f64, f64) {
    let alive = || (0..world.relays()).filter(|relay| is_alive[*relay]);
    let capacity: u64 = alive().map(|relay| world.capacity[relay]).sum();
    let all: u64 = alive().map(|relay| held[relay]).sum();
    let highest = alive().map(|relay| held[relay] as f64 / world.capacity[relay] as f64).fold(0.0, f64::max);
    (all as f64 / capacity as f64, highest)
}

fn deviation(world: &World, held: &[u64]) -> f64 {
    let loads: Vec<f64> = held.iter().zip(&world.capacity).map(|(held, most)| *held as f64 / *most as f64).collect();
    let mean = loads.iter().sum::<f64>() / loads.len() as f64;
    (loads.iter().map(|load| (load - mean).powi(2)).sum::<f64>() / loads.len() as f64).sqrt()
}
