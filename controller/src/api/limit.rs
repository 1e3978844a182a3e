//! How often discovery is answered: per address and per API key, in tables of a fixed size made at start (P9).

use std::hash::{BuildHasher as _, RandomState};
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU32;
use std::time::Duration;

use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};

/// Cells of each of the two tables. An address has one in each and is answered while either has a token: a flooding one
/// silences another only where both meet, one in 16 million.
const CELLS: usize = 4096;

/// Answers a second; 0 is no limit. Bursts of twice as many are let through.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rates {
    /// For one address: an IPv4 address, an IPv6 /64.
    pub address: u32,
    /// For one API key.
    pub key: u32,
}

impl Default for Rates {
    fn default() -> Self {
        Self { address: 100, key: 1000 }
    }
}

/// Who may be answered now.
#[derive(Debug)]
pub struct Limiter {
    addresses: Option<Cells>,
    keys: Vec<DefaultDirectRateLimiter>,
    reports: Cells,
}

/// Too often; the time after which it is worth asking again.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TooOften(pub Duration);

impl Limiter {
    /// For so many API keys.
    pub fn new(rates: Rates, keys: usize) -> Self {
        let quota = |rate| {
            Some(Quota::per_second(NonZeroU32::new(rate)?).allow_burst(NonZeroU32::new(rate.saturating_mul(2))?))
        };
        let per_key = quota(rates.key);
        // A client measures now and then; a page that is reloaded does so again.
        let reports = Quota::per_minute(const { NonZeroU32::new(30).expect("not 0") });
        Self {
            addresses: quota(rates.address).map(Cells::new),
            keys: per_key.map(|quota| (0..keys).map(|_| RateLimiter::direct(quota)).collect()).unwrap_or_default(),
            reports: Cells::new(reports),
        }
    }

    /// Takes a token of an API key, by its place in the configuration, if the request came with one, else of an address.
    ///
    /// # Errors
    /// [`TooOften`].
    pub fn answer(&self, client: Option<IpAddr>, key: Option<usize>) -> Result<(), TooOften> {
        // An application asks for all of its users from one address.
        if let Some(limiter) = key.and_then(|key| self.keys.get(key)) {
            return take(limiter);
        }
        match (&self.addresses, client) {
            (Some(cells), Some(client)) => cells.take(client),
            _ => Ok(()),
        }
    }

    /// Takes a token for a report of what was measured.
    ///
    /// # Errors
    /// [`TooOften`].
    pub fn report(&self, client: IpAddr) -> Result<(), TooOften> {
        self.reports.take(client)
    }
}

#[derive(Debug)]
struct Cells {
    tables: [(RandomState, Vec<DefaultDirectRateLimiter>); 2],
}

impl Cells {
    fn new(quota: Quota) -> Self {
        let table = || (RandomState::new(), (0..CELLS).map(|_| RateLimiter::direct(quota)).collect());
        Self { tables: [table(), table()] }
    }

    fn take(&self, client: IpAddr) -> Result<(), TooOften> {
        let source = match client.to_canonical() {
            IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & (u128::MAX << 64))),
            v4 => v4,
        };
        let [a, b] = self.tables.each_ref().map(|(keys, cells)| {
            let place = usize::try_from(keys.hash_one(source) % CELLS as u64).unwrap_or(0);
            take(&cells[place])
        });
        a.or(b)
    }
}

fn take(limiter: &DefaultDirectRateLimiter) -> Result<(), TooOften> {
    limiter.check().map_err(|not_until| TooOften(not_until.wait_time_from(DefaultClock::default().now())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_keys_are_counted_apart() {
        let ip = |last| Some(IpAddr::from([192, 0, 2, last]));
        let limiter = Limiter::new(Rates { address: 5, key: 2 }, 2);
        let answered = |client, key| (0..100).filter(|_| limiter.answer(client, key).is_ok()).count();
        // A token or two may come back meanwhile.
        assert!((10..=12).contains(&answered(ip(1), None)), "twice the rate at once");
        assert!((10..=12).contains(&answered(ip(2), None)), "another address");
        assert!((4..=5).contains(&answered(None, Some(0))), "a key");
        assert!(limiter.answer(ip(3), Some(0)).is_err(), "the key has none left");
        assert!(limiter.answer(ip(3), Some(1)).is_ok(), "another key");
        let Err(TooOften(wait)) = limiter.answer(ip(1), None) else { panic!("answered") };
        assert!(wait <= Duration::from_millis(200), "{wait:?}");
        let v6 = |host: u128| Some(IpAddr::from((0x2001_0db8_u128 << 96 | host).to_be_bytes()));
        assert!((10..=12).contains(&(0..100).filter(|i| limiter.answer(v6(*i), None).is_ok()).count()), "one /64");

        let free = Limiter::new(Rates { address: 0, key: 0 }, 1);
        assert!((0..10_000).all(|_| free.answer(ip(1), Some(0)).is_ok()));
        assert_eq!((0..100).filter(|_| free.report(IpAddr::from([192, 0, 2, 1])).is_ok()).count(), 30);
    }
}
