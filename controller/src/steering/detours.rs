//! What round trips are above what the globe says, by cell of the globe and region: [`Detours`]. Cables and last miles of a
//! land are much the same for its networks, so that one that nobody has measured borrows them from its neighbours on the globe.

use std::collections::HashMap;
use std::time::Duration;

use super::Place;
use super::measured::{LIFE, RegionId};

/// Regions remembered for a cell.
const REGIONS: usize = 32;
/// Older reports together weigh at most as much as so many new ones.
const MOST_WEIGHT: f32 = 32.0;
/// One report counts for at most so much more or less than what is known, in milliseconds: of some networks the database
/// does not know the place.
const MOST_CHANGE_MS: f32 = 20.0;

/// By cells of 5 degrees, of which there are 2,592. Times are since any fixed moment.
#[derive(Debug, Default)]
pub(super) struct Detours(HashMap<(u8, u8), Vec<Detour>>);

/// Of a cell to a region.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Detour {
    pub(super) region: RegionId,
    /// Milliseconds above what the globe says; below 0 where cables are straighter than most.
    pub(super) ms: f32,
    weight: f32,
    at: Duration,
}

impl Detours {
    /// Takes what a network at `place` has measured above what the globe says.
    pub(super) fn learn(&mut self, place: Place, region: RegionId, ms: f32, now: Duration) {
        let cell = self.0.entry(place.cell()).or_default();
        if let Some(known) = cell.iter_mut().find(|known| known.region == region) {
            let change = (ms - known.ms).clamp(-MOST_CHANGE_MS, MOST_CHANGE_MS);
            known.ms += change / (known.weight + 1.0);
            known.weight = (known.weight + 1.0).min(MOST_WEIGHT);
            known.at = now;
            return;
        }
        if cell.len() == REGIONS {
            let oldest = (0..REGIONS).min_by_key(|i| cell[*i].at).unwrap_or(0);
            cell.swap_remove(oldest);
        }
        cell.push(Detour { region, ms, weight: 1.0, at: now });
    }

    /// What is known of the cell of a place.
    pub(super) fn around(&self, place: Place, now: Duration) -> impl Iterator<Item = Detour> {
        let cell = self.0.get(&place.cell()).map(Vec::as_slice).unwrap_or_default();
        cell.iter().copied().filter(move |known| now.saturating_sub(known.at) <= LIFE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_of_a_land_agree_and_one_that_is_elsewhere_changes_little() {
        let at = |latitude, longitude| Place::new(latitude, longitude).expect("on the globe");
        let (here, near, far) = (at(48.9, 2.4), at(46.0, 4.9), at(52.5, 13.4));
        let mut detours = Detours::default();
        let known = |detours: &Detours, place, now| detours.around(place, now).map(|it| it.ms).collect::<Vec<_>>();
        for _ in 0..20 {
            detours.learn(here, 3, 11.0, Duration::ZERO);
        }
        detours.learn(here, 3, 250.0, Duration::ZERO);
        assert!(known(&detours, near, Duration::ZERO).iter().all(|ms| (11.0..13.0).contains(ms)));
        assert!(known(&detours, far, Duration::ZERO).is_empty());
        assert!(known(&detours, near, LIFE * 2).is_empty());
        for region in 0..1000 {
            detours.learn(here, region, 1.0, Duration::from_secs(u64::from(region)));
        }
        assert_eq!(known(&detours, here, Duration::ZERO).len(), REGIONS);
    }
}
