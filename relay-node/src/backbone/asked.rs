//! Which clients' packets this relay has passed on to whom: only those clients are answered on behalf of others. A
//! table of a fixed size; what is forgotten in it costs an answer, which the client asks for again.

use std::hash::BuildHasher;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rustc_hash::FxBuildHasher;
use turn_core::MemberId;

/// Places; in two of them a client may be.
const PLACES: usize = 8192;
/// A client that is silent for longer gets no more. Calls send all the time, allocations are refreshed within minutes.
const LASTS: Duration = Duration::from_secs(300);

pub(super) struct AskedReplies {
    seed: u64,
    places: Box<[Option<(u64, Instant)>]>,
}

impl AskedReplies {
    pub(super) fn new(seed: u64) -> Self {
        Self { seed, places: vec![None; PLACES].into() }
    }

    /// A packet of this client goes to this member.
    pub(super) fn ask(&mut self, member: MemberId, client: SocketAddr, server: SocketAddr, now: Instant) {
        let key = self.key(member, client, server);
        let two = Self::two_places(key);
        let its = two.into_iter().find(|place| self.places[*place].is_some_and(|(other, _)| other == key));
        // The older of the two makes room.
        let older = two.into_iter().min_by_key(|place| self.places[*place].map(|(_, at)| at));
        if let Some(place) = its.or(older) {
            self.places[place] = Some((key, now));
        }
    }

    /// Whether one went there not long ago.
    pub(super) fn is_asked(&self, member: MemberId, client: SocketAddr, server: SocketAddr, now: Instant) -> bool {
        let key = self.key(member, client, server);
        Self::two_places(key).into_iter().any(|place| {
            self.places[place].is_some_and(|(other, at)| other == key && now.saturating_duration_since(at) <= LASTS)
        })
    }

    fn key(&self, member: MemberId, client: SocketAddr, server: SocketAddr) -> u64 {
        FxBuildHasher.hash_one((self.seed, member, client, server))
    }

    fn two_places(key: u64) -> [usize; 2] {
        [key as usize % PLACES, (key >> 32) as usize % PLACES]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_was_asked_may_answer_and_not_for_ever() {
        let (mut asked, now) = (AskedReplies::new(7), Instant::now());
        let address = |last: u8, port| SocketAddr::from(([192, 0, 2, last], port));
        let (client, server) = (address(1, 5000), address(9, 3478));
        asked.ask(MemberId(1), client, server, now);
        assert!(asked.is_asked(MemberId(1), client, server, now + LASTS));
        assert!(!asked.is_asked(MemberId(2), client, server, now), "another member");
        assert!(!asked.is_asked(MemberId(1), address(1, 5001), server, now), "another client");
        assert!(!asked.is_asked(MemberId(1), client, address(9, 3479), now), "from another address");
        assert!(!asked.is_asked(MemberId(1), client, server, now + LASTS + Duration::from_millis(1)));
        // Many others: of the size it was made with, and most are there.
        for port in 0..4_000 {
            asked.ask(MemberId(1), address(2, port), server, now);
        }
        let there = (0..4_000).filter(|port| asked.is_asked(MemberId(1), address(2, *port), server, now)).count();
        assert!(there > 3_400, "{there}");
        assert_eq!(asked.places.len(), PLACES);
    }
}
