//! The relayed addresses of an allocation: one, or one of each family (RFC 8656 §7.2, "dual allocation"), each with a
//! time-to-expiry of its own (RFC 8656 §8.1).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Instant;

use super::{BindError, BindRequest, Bound, Host};
use crate::wire::ErrorCode;
use crate::wire::error_code::AddressErrorCode;
use crate::{Family, RelayedAddr};

/// A relayed address and when it ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Relay {
    pub(super) address: RelayedAddr,
    pub(super) deadline: Instant,
}

/// At most one relayed address per family; none only while an allocation is taken apart. Without what every address of
/// the family has in common: an allocation keeps this. That of IPv6, which fewer have, is larger and on the heap.
#[derive(Clone, Debug, Default)]
pub(super) struct Relays {
    v4: Option<Held<Ipv4Addr>>,
    v6: Option<Box<Held<Ipv6Addr>>>,
}

#[derive(Clone, Copy, Debug)]
struct Held<Ip> {
    bound: Ip,
    advertised: Ip,
    port: u16,
    deadline: Instant,
}

impl<Ip: Copy + Into<IpAddr>> Held<Ip> {
    #[inline]
    fn relay(&self) -> Relay {
        let address = |ip: Ip| SocketAddr::new(ip.into(), self.port);
        let address = RelayedAddr { bound: address(self.bound), advertised: address(self.advertised) };
        Relay { address, deadline: self.deadline }
    }
}

impl Relays {
    /// The first of each family counts.
    pub(super) fn new(relays: impl IntoIterator<Item = Relay>) -> Self {
        let mut by_family = Self::default();
        for Relay { address, deadline } in relays {
            let port = address.port();
            match (address.bound.ip(), address.advertised.ip()) {
                (IpAddr::V4(bound), IpAddr::V4(advertised)) => {
                    by_family.v4.get_or_insert(Held { bound, advertised, port, deadline });
                }
                (IpAddr::V6(bound), IpAddr::V6(advertised)) => {
                    by_family.v6.get_or_insert_with(|| Box::new(Held { bound, advertised, port, deadline }));
                }
                // Nobody translates between families: of no host.
                _ => {}
            }
        }
        by_family
    }

    /// The address of a family, ended or not.
    pub(super) fn of(&self, family: Family) -> Option<Relay> {
        match family {
            Family::V4 => self.v4.as_ref().map(Held::relay),
            Family::V6 => self.v6.as_deref().map(Held::relay),
        }
    }

    /// The address of a family that has not ended.
    #[inline]
    pub(super) fn live(&self, family: Family, now: Instant) -> Option<RelayedAddr> {
        if self.is_live(family, now) { self.of(family).map(|relay| relay.address) } else { None }
    }

    /// Whether there is an address of a family that has not ended.
    #[inline]
    pub(super) fn is_live(&self, family: Family, now: Instant) -> bool {
        let deadline = match family {
            Family::V4 => self.v4.as_ref().map(|held| held.deadline),
            Family::V6 => self.v6.as_ref().map(|held| held.deadline),
        };
        deadline.is_some_and(|deadline| deadline > now)
    }

    /// Whether one of them is bound there.
    #[inline]
    pub(super) fn has_bound(&self, bound: &SocketAddr) -> bool {
        match bound.ip() {
            IpAddr::V4(ip) => self.v4.as_ref().is_some_and(|held| held.port == bound.port() && held.bound == ip),
            IpAddr::V6(ip) => self.v6.as_ref().is_some_and(|held| held.port == bound.port() && held.bound == ip),
        }
    }

    /// IPv4 first.
    pub(super) fn iter(&self) -> impl Iterator<Item = Relay> + '_ {
        [Family::V4, Family::V6].into_iter().filter_map(|family| self.of(family))
    }

    fn ends(&self) -> impl Iterator<Item = Instant> {
        let ends = [self.v4.as_ref().map(|held| held.deadline), self.v6.as_ref().map(|held| held.deadline)];
        ends.into_iter().flatten()
    }

    /// When the first of them ends.
    pub(super) fn first_end(&self) -> Option<Instant> {
        self.ends().min()
    }

    /// When the last of them ends.
    pub(super) fn last_end(&self) -> Option<Instant> {
        self.ends().max()
    }

    fn change_ends(&mut self, family: Option<Family>, change: impl Fn(Instant) -> Instant) {
        let v4 = self.v4.as_mut().map(|held| (Family::V4, &mut held.deadline));
        let v6 = self.v6.as_mut().map(|held| (Family::V6, &mut held.deadline));
        for (of, deadline) in v4.into_iter().chain(v6) {
            if family.is_none_or(|family| family == of) {
                *deadline = change(*deadline);
            }
        }
    }

    /// Moves the end of one family, or of all.
    pub(super) fn set_deadline(&mut self, family: Option<Family>, deadline: Instant) {
        self.change_ends(family, |_| deadline);
    }

    /// Brings the end of each nearer.
    pub(super) fn shorten(&mut self, deadline: Instant) {
        self.change_ends(None, |end| end.min(deadline));
    }

    /// Takes one out.
    pub(super) fn remove(&mut self, family: Family) -> Option<Relay> {
        let relay = self.of(family);
        match family {
            Family::V4 => self.v4 = None,
            Family::V6 => self.v6 = None,
        }
        relay
    }
}

/// What was bound for an Allocate: one address, or two, or the one of two there was (RFC 8656 §7.2, item 9).
pub(super) struct BoundRelays {
    pub(super) first: Bound,
    pub(super) second: Option<Bound>,
    pub(super) refused: Option<AddressErrorCode>,
}

/// Binds the one address.
pub(super) fn bind_one(host: &mut impl Host, wanted: BindRequest<'_>) -> Result<BoundRelays, ErrorCode> {
    let first = host.bind(wanted).map_err(|error| error_code(error, false))?;
    Ok(BoundRelays { first, second: None, refused: None })
}

/// Binds both families, or the one there is. EVEN-PORT is for both.
pub(super) fn bind_both(host: &mut impl Host, wanted: BindRequest<'_>) -> Result<BoundRelays, ErrorCode> {
    let mut bind = |family| host.bind(BindRequest { family, ..wanted });
    let refused =
        |family: Family, error| Some(AddressErrorCode { family: family as u8, error: error_code(error, true) });
    match (bind(Family::V4), bind(Family::V6)) {
        (Ok(first), Ok(second)) => Ok(BoundRelays { first, second: Some(second), refused: None }),
        (Ok(first), Err(error)) => Ok(BoundRelays { first, second: None, refused: refused(Family::V6, error) }),
        (Err(error), Ok(first)) => Ok(BoundRelays { first, second: None, refused: refused(Family::V4, error) }),
        (Err(BindError::QuotaReached), _) | (_, Err(BindError::QuotaReached)) => {
            Err(ErrorCode::ALLOCATION_QUOTA_REACHED)
        }
        (Err(_), Err(_)) => Err(ErrorCode::INSUFFICIENT_CAPACITY),
    }
}

/// RFC 8656 §18.12 has 440 and 508 only for the half that is missing of two.
fn error_code(error: BindError, half: bool) -> ErrorCode {
    match error {
        BindError::FamilyUnsupported => ErrorCode::ADDRESS_FAMILY_NOT_SUPPORTED,
        BindError::QuotaReached if !half => ErrorCode::ALLOCATION_QUOTA_REACHED,
        BindError::QuotaReached | BindError::NoPort => ErrorCode::INSUFFICIENT_CAPACITY,
    }
}

#[cfg(test)]
#[path = "relays_tests.rs"]
mod tests;
