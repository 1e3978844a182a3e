//! 300 Try Alternate to the first Allocate of a new client (RFC 8489 §10, RFC 8656 §7.2 item 11), while this server
//! drains or is overloaded.
//!
//! Only before the 401: clients that are sent elsewhere after it take realm and nonce along and give up at the next 401.
//! So the answer is never signed, and counts as one to a stranger.
//!
//! A client that does not follow is served when it asks again within [`Vouchers::LIFETIME`]: from the same source with
//! another transaction, or from another port of its IP. That ends every circle too, however servers point at each other.

use std::hash::{BuildHasher, Hash};
use std::net::SocketAddr;
use std::time::Instant;

use super::binding::mapped;
use super::reply::Request;
use super::table::SecretState;
use super::vouchers::Vouchers;
use super::{DropReason, Server, Verdict};
use crate::wire::attribute::{AdditionalAddressFamily, AlternateServer, RequestedAddressFamily, XorMappedAddress};
use crate::wire::{AttributeType, ErrorCode, Message, Method, TransactionId};
use crate::{Family, FiveTuple};

/// What an Allocate has of a client that has been told realm and nonce, or holds a reservation here.
const OF_KNOWN_CLIENTS: [AttributeType; 8] = [
    AttributeType::MESSAGE_INTEGRITY,
    AttributeType::MESSAGE_INTEGRITY_SHA256,
    AttributeType::USERNAME,
    AttributeType::USERHASH,
    AttributeType::REALM,
    AttributeType::NONCE,
    AttributeType::ACCESS_TOKEN,
    // RFC 8656 §7.2: of a port that this server holds.
    AttributeType::RESERVATION_TOKEN,
];

/// Clients sent elsewhere, by why.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Redirected {
    /// By a server that drains, overloaded or not.
    pub draining: u64,
    /// By one that is overloaded only.
    pub overloaded: u64,
}

/// What is to come of a first Allocate.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Course {
    /// Elsewhere with it; nothing is known of its source.
    Send,
    /// The same answer as before.
    SendAgain,
    /// Here.
    Serve,
}

impl Server {
    /// The 300, if this is the first Allocate of a client that another server can take.
    pub(super) fn redirect(&mut self, request: &Request<'_>) -> Option<Verdict> {
        let settings = &*self.settings;
        let redirecting = settings.draining || settings.overloaded;
        let message = &request.message;
        if !redirecting
            || message.method() != Method::Allocate
            || OF_KNOWN_CLIENTS.iter().any(|known| message.contains(*known))
            || self.table.by_five_tuple(&request.from).is_some()
        {
            return None;
        }
        let alternate = self.alternate(request)?;
        let (now, from, transaction) = (request.now.mono, &request.from, message.transaction_id());
        let course = match self.sources.course(now, from, transaction) {
            Course::Send if self.vouchers.take(now, from) => Course::Serve,
            course => course,
        };
        if course == Course::Serve {
            self.sources.note(now, from, transaction, true);
            return None;
        }
        // One that cannot be remembered could be sent round for ever.
        if course == Course::Send && !self.sources.has_room(now, from) {
            return None;
        }
        if !self.admit_stranger(request) {
            return Some(Verdict::Drop(DropReason::TooManyStrangers));
        }
        if course == Course::Send {
            self.sources.note(now, from, transaction, false);
            self.vouchers.give(now, from);
        }
        let count =
            if self.settings.draining { &mut self.redirected.draining } else { &mut self.redirected.overloaded };
        *count += 1;
        Some(self.error(request, ErrorCode::TRY_ALTERNATE, None, |writer| {
            writer.attribute(&AlternateServer(alternate));
        }))
    }

    /// The best server for this client: of its transport and family (RFC 8489 §14.15), never this one.
    fn alternate(&self, request: &Request<'_>) -> Option<SocketAddr> {
        let XorMappedAddress(client) = mapped(request.from.client);
        let family = Family::of(client.ip());
        let wants_ipv6 = wants_ipv6(&request.message);
        let fits = self.settings.alternates.iter().find(|alternate| {
            alternate.transport == request.from.transport
                && Family::of(alternate.address.ip()) == family
                && alternate.address != request.from.server
                && (alternate.relays_ipv6 || !wants_ipv6)
        });
        fits.map(|alternate| alternate.address)
    }
}

/// Whether a relayed address of IPv6 is asked for (RFC 8656 §7.1).
fn wants_ipv6(message: &Message<'_>) -> bool {
    let requested: Option<RequestedAddressFamily> = message.attribute().ok().flatten();
    let additional: Option<AdditionalAddressFamily> = message.attribute().ok().flatten();
    requested
        .map(|family| family.0)
        .into_iter()
        .chain(additional.map(|family| family.0))
        .any(|family| family == Family::V6 as u8)
}

/// Buckets: a power of two. All are 192 KiB.
const BUCKETS: usize = 2048;
/// Sources of a bucket.
const WAYS: usize = 4;

/// Who was sent elsewhere in the last [`Vouchers::LIFETIME`], in a table whose size is fixed at the start (promise P9):
/// no source pushes another out, and where there is no room nobody is sent away.
pub(super) struct Sources {
    buckets: Box<[[Source; WAYS]]>,
    hash: SecretState,
    start: Option<Instant>,
}

#[derive(Clone, Copy, Default)]
struct Source {
    /// Of hashes: of five-tuple and transaction id.
    tag: u32,
    transaction: u32,
    /// Milliseconds from 1 at `start`; 0 is nobody.
    at: u64,
    /// Served, not sent away.
    served: bool,
}

impl Sources {
    /// `secret` keys the hashes.
    pub(super) fn new(secret: [u64; 2]) -> Self {
        Self { buckets: vec![[Source::default(); WAYS]; BUCKETS].into(), hash: SecretState(secret), start: None }
    }

    fn course(&mut self, now: Instant, from: &FiveTuple, transaction: TransactionId) -> Course {
        let now = self.millis(now);
        let transaction = self.hash_of(&transaction.0) as u32;
        let (bucket, tag) = self.place(from);
        match self.buckets[bucket].iter().find(|source| source.tag == tag && source.is_live(now)) {
            None => Course::Send,
            Some(source) if !source.served && source.transaction == transaction => Course::SendAgain,
            Some(_) => Course::Serve,
        }
    }

    fn has_room(&mut self, now: Instant, from: &FiveTuple) -> bool {
        let now = self.millis(now);
        let (bucket, _) = self.place(from);
        self.buckets[bucket].iter().any(|source| !source.is_live(now))
    }

    /// Remembers what came of a source of which nothing was known, where there is room.
    fn note(&mut self, now: Instant, from: &FiveTuple, transaction: TransactionId, served: bool) {
        let now = self.millis(now);
        let transaction = self.hash_of(&transaction.0) as u32;
        let (bucket, tag) = self.place(from);
        let bucket = &mut self.buckets[bucket];
        if bucket.iter().all(|source| source.tag != tag || !source.is_live(now))
            && let Some(free) = bucket.iter_mut().find(|source| !source.is_live(now))
        {
            *free = Source { tag, transaction, at: now, served };
        }
    }

    fn place(&self, from: &FiveTuple) -> (usize, u32) {
        let hash = self.hash_of(from);
        (hash as usize % BUCKETS, (hash >> 32) as u32)
    }

    fn hash_of(&self, value: &impl Hash) -> u64 {
        self.hash.hash_one(value)
    }

    fn millis(&mut self, now: Instant) -> u64 {
        let start = *self.start.get_or_insert(now);
        now.saturating_duration_since(start).as_millis() as u64 + 1
    }
}

impl Source {
    fn is_live(&self, now: u64) -> bool {
        self.at != 0 && now.saturating_sub(self.at) < Vouchers::LIFETIME.as_millis() as u64
    }
}

#[cfg(test)]
#[path = "redirect_tests.rs"]
mod tests;
