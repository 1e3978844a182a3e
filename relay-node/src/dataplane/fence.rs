//! Whether this relay may answer at all. Raised while its address is not its own for sure; what arrives meanwhile is
//! dropped unread, and counted.
//!
//! The kernel helps: it delivers nothing to an address that the machine does not have, and sends nothing of IPv4 from
//! it. The fence is for what the kernel does not stop: listeners on every address, IPv6, and packets that waited in
//! socket buffers while the process stood still.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use crate::sys::process::boot_time;

/// Why the fence is up; each reason is raised and lowered for itself.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FenceReason {
    /// The machine does not have the address, or somebody else does too.
    Address = 1,
    /// A worker stood still so long that another relay may have taken the address over.
    Lapse = 2,
    /// The address is being handed over.
    HandOver = 4,
}

/// A worker that has not turned its loop for this long has been stopped: it turns at least each second. The shortest
/// lease is 5 s by default, and the last report before a stop is at most 1 s older.
const LAPSE: Duration = Duration::from_secs(3);

/// The fence of a data plane.
#[derive(Debug, Default)]
pub struct Fence(AtomicU8);

impl Fence {
    /// Raises it for this reason.
    pub fn raise(&self, reason: FenceReason) {
        self.0.fetch_or(reason as u8, Ordering::AcqRel);
    }

    /// Nothing of this reason is left.
    pub fn lower(&self, reason: FenceReason) {
        self.0.fetch_and(!(reason as u8), Ordering::AcqRel);
    }

    /// Whether it is up for any reason.
    pub fn is_up(&self) -> bool {
        self.0.load(Ordering::Acquire) != 0
    }

    /// Whether it is up for this reason.
    pub fn is_up_for(&self, reason: FenceReason) -> bool {
        self.0.load(Ordering::Acquire) & reason as u8 != 0
    }
}

/// Sees that a worker stood still: SIGSTOP, a debugger, a suspended machine.
#[derive(Debug)]
pub(super) struct Pause {
    /// Time since boot of the last turn; it counts suspension too.
    turned: Duration,
    watched: bool,
}

impl Pause {
    /// Only a relay whose address may be elsewhere by now has to know.
    pub(super) fn new(watched: bool) -> Self {
        Self { turned: boot_time(), watched }
    }

    /// A turn begins: whether the one before is too long ago.
    pub(super) fn turn(&mut self) -> bool {
        if !self.watched {
            return false;
        }
        let before = std::mem::replace(&mut self.turned, boot_time());
        self.turned.saturating_sub(before) > LAPSE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_stands_for_itself() {
        let fence = Fence::default();
        assert!(!fence.is_up());
        fence.raise(FenceReason::Address);
        fence.raise(FenceReason::Lapse);
        fence.lower(FenceReason::Address);
        assert!(fence.is_up() && fence.is_up_for(FenceReason::Lapse) && !fence.is_up_for(FenceReason::Address));
        fence.lower(FenceReason::Lapse);
        fence.lower(FenceReason::HandOver);
        assert!(!fence.is_up());
    }

    #[test]
    fn a_worker_that_stood_still_knows_it() {
        let mut pause = Pause::new(true);
        assert!(!pause.turn());
        pause.turned = pause.turned.saturating_sub(LAPSE + Duration::from_millis(1));
        assert!(pause.turn());
        assert!(!pause.turn(), "once");
        let mut unwatched = Pause { turned: Duration::ZERO, watched: false };
        assert!(!unwatched.turn());
    }
}
