//! How packets for each member travel now: written by the backbone's thread, read by workers for each packet.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use turn_core::MemberId;

use super::members::MOST_MEMBERS;

/// How packets for a member travel.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(u8)]
pub enum Usability {
    /// They do not: a counted drop.
    #[default]
    Nothing = 0,
    /// By plain UDP, from the relayed address's own socket.
    PlainUdp = 1,
    /// By the backbone.
    Link = 2,
}

impl Usability {
    /// The word for it; a bounded metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::PlainUdp => "plain_udp",
            Self::Link => "link",
        }
    }
}

/// The usability of every member.
#[derive(Clone, Debug)]
pub struct Usabilities(Arc<[AtomicU8]>);

impl Usabilities {
    pub(super) fn new() -> Self {
        Self((0..MOST_MEMBERS).map(|_| AtomicU8::new(Usability::Nothing as u8)).collect())
    }

    /// Of one member; of one that is not known, [`Usability::Nothing`]. One load, no order.
    pub fn of(&self, member: MemberId) -> Usability {
        match self.0.get(usize::from(member.0)).map(|cell| cell.load(Ordering::Relaxed)) {
            Some(2) => Usability::Link,
            Some(1) => Usability::PlainUdp,
            _ => Usability::Nothing,
        }
    }

    pub(super) fn set(&self, member: MemberId, usability: Usability) {
        if let Some(cell) = self.0.get(usize::from(member.0)) {
            cell.store(usability as u8, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_is_read_and_nobody_else_is_reachable() {
        let usabilities = Usabilities::new();
        let reader = usabilities.clone();
        for usability in [Usability::Link, Usability::PlainUdp, Usability::Nothing] {
            usabilities.set(MemberId(7), usability);
            assert_eq!(reader.of(MemberId(7)), usability);
        }
        usabilities.set(MemberId(u16::MAX), Usability::Link);
        assert_eq!(reader.of(MemberId(u16::MAX)), Usability::Nothing);
    }
}
