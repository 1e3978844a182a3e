//! Transactions of a client: retransmission and giving up (RFC 8489 §6.2.1, §6.2.2).

use std::time::{Duration, Instant};

use rand_core::Rng;

use super::Request;
use crate::wire::TransactionId;

/// RTO (RFC 8489 §6.2.1).
const RTO: Duration = Duration::from_millis(500);
/// Rc: requests sent before giving up.
const SENDS: u32 = 7;
/// Rm: the last wait in units of RTO.
const LAST_WAIT: u32 = 16;
/// Ti: how long a request on a stream waits (RFC 8489 §6.2.2).
const STREAM_WAIT: Duration = Duration::from_millis(39_500);

#[derive(Debug)]
struct Pending {
    id: TransactionId,
    packet: Vec<u8>,
    request: Request,
    sends: u32,
    at: Instant,
    retries: u32,
}

/// What the passing of time asks for.
pub(super) enum Expiry {
    /// Send this again.
    Retransmit(Vec<u8>),
    /// Nobody will answer.
    GaveUp(Request),
}

/// Requests under way: a handful, so a list.
#[derive(Debug)]
pub(super) struct Transactions {
    pending: Vec<Pending>,
    stream: bool,
}

impl Transactions {
    pub(super) fn new(stream: bool) -> Self {
        Self { pending: Vec::new(), stream }
    }

    /// `retries`: how often the request was refused before and is now made again.
    pub(super) fn begin(&mut self, now: Instant, id: TransactionId, packet: Vec<u8>, request: Request, retries: u32) {
        let at = now + if self.stream { STREAM_WAIT } else { RTO };
        self.pending.push(Pending { id, packet, request, sends: 1, at, retries });
    }

    /// Takes the request that an answer is for, with the number of times it was refused before.
    pub(super) fn end(&mut self, id: TransactionId) -> Option<(Request, u32)> {
        let index = self.pending.iter().position(|pending| pending.id == id)?;
        let pending = self.pending.swap_remove(index);
        Some((pending.request, pending.retries))
    }

    pub(super) fn clear(&mut self) {
        self.pending.clear();
    }

    pub(super) fn next(&self) -> Option<Instant> {
        self.pending.iter().map(|pending| pending.at).min()
    }

    /// One request whose time has come, if any.
    pub(super) fn expire(&mut self, now: Instant) -> Option<Expiry> {
        let index = self.pending.iter().position(|pending| pending.at <= now)?;
        if self.stream || self.pending[index].sends == SENDS {
            return Some(Expiry::GaveUp(self.pending.swap_remove(index).request));
        }
        let pending = &mut self.pending[index];
        pending.sends += 1;
        let wait = if pending.sends == SENDS { LAST_WAIT } else { 1 << (pending.sends - 1) };
        pending.at = now + RTO * wait;
        Some(Expiry::Retransmit(pending.packet.clone()))
    }
}

pub(super) fn random_id(random: &mut impl Rng) -> TransactionId {
    let mut id = TransactionId::default();
    random.fill_bytes(&mut id.0);
    id
}
