//! The relayed addresses of an allocation: one, or one of each family (RFC 8656 §7.2, "dual allocation"), each with a
//! time-to-expiry of its own (RFC 8656 §8.1).

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

/// At most one relayed address per family; none only while an allocation is taken apart.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Relays([Option<Relay>; 2]);

impl Relays {
    /// The first of each family counts.
    pub(super) fn new(relays: impl IntoIterator<Item = Relay>) -> Self {
        let mut by_family = Self::default();
        for relay in relays {
            by_family.0[place(relay.address.family())].get_or_insert(relay);
        }
        by_family
    }

    /// The address of a family, ended or not.
    pub(super) fn of(&self, family: Family) -> Option<Relay> {
        self.0[place(family)]
    }

    /// The address of a family that has not ended.
    pub(super) fn live(&self, family: Family, now: Instant) -> Option<RelayedAddr> {
        self.of(family).filter(|relay| relay.deadline > now).map(|relay| relay.address)
    }

    /// IPv4 first.
    pub(super) fn iter(&self) -> impl Iterator<Item = Relay> + '_ {
        self.0.iter().flatten().copied()
    }

    /// When the first of them ends.
    pub(super) fn first_end(&self) -> Option<Instant> {
        self.iter().map(|relay| relay.deadline).min()
    }

    /// When the last of them ends.
    pub(super) fn last_end(&self) -> Option<Instant> {
        self.iter().map(|relay| relay.deadline).max()
    }

    /// Moves the end of one family, or of all.
    pub(super) fn set_deadline(&mut self, family: Option<Family>, deadline: Instant) {
        for relay in self.0.iter_mut().flatten() {
            if family.is_none_or(|family| relay.address.family() == family) {
                relay.deadline = deadline;
            }
        }
    }

    /// Brings the end of each nearer.
    pub(super) fn shorten(&mut self, deadline: Instant) {
        for relay in self.0.iter_mut().flatten() {
            relay.deadline = relay.deadline.min(deadline);
        }
    }

    /// Takes one out.
    pub(super) fn remove(&mut self, family: Family) -> Option<Relay> {
        self.0[place(family)].take()
    }
}

fn place(family: Family) -> usize {
    match family {
        Family::V4 => 0,
        Family::V6 => 1,
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
