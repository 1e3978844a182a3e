//! Mobility (RFC 8016): an allocation goes on from another five-tuple, for whoever brings its ticket.
//!
//! A Refresh with a ticket from a new five-tuple begins a *move*: both five-tuples have the allocation, and what peers
//! send still goes to the old one. The first Send indication or ChannelData from the new one, or the end of the old
//! one's connection, ends the move: the new five-tuple is then the only one. So does, beyond RFC 8016 §3.2.2, a
//! CreatePermission or ChannelBind from the new one: it shows the same, is authenticated, and all that
//! `turnutils_uclient` sends before its peer speaks. An allocation has at most one move at a
//! time; another one, with the ticket of the answer, takes the place of the one before.

use std::time::Duration;

use rand_core::Rng;

use super::auth::User;
use super::reply::Request;
use super::table::{Allocation, Slot};
use super::{Host, Now, Output, Server};
use crate::record::{MobilityRecord, MoveRecord};
use crate::ticket::Ticket;
use crate::wire::attribute::MobilityTicket;
use crate::wire::{AttributeType, ErrorCode, Method, TransactionId};
use crate::{EndReason, FiveTuple, Path, PeerTransport, WorkerId};

/// How long an allocation whose connection has closed waits for its client to come back with the ticket: a client that
/// changes networks over TCP loses the old connection first.
const COMEBACK: Duration = Duration::from_secs(30);

/// Of an allocation whose client asked for mobility.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mobility {
    /// What moves it next.
    pub(super) ticket: Ticket,
    pub(super) moving: Option<Move>,
}

/// A move that has not ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Move {
    /// Where to.
    pub(super) to: FiveTuple,
    pub(super) path: Path,
    /// The ticket that began it: good for a retransmission of the request only (RFC 8016 §3.2.2).
    pub(super) by: Ticket,
    pub(super) transaction_id: TransactionId,
}

/// What a Refresh with a ticket is.
pub(super) enum Resumption {
    /// It is about this allocation, which moves if it lives on.
    Of(Slot),
    /// It was answered before: once more, the same.
    Again(Slot),
}

impl Server {
    /// The MOBILITY-TICKET of an Allocate: whether its client is mobile (RFC 8016 §3.1.2).
    pub(super) fn asks_for_ticket(&self, request: &Request<'_>, peers: PeerTransport) -> Result<bool, ErrorCode> {
        match request.message.attribute() {
            Ok(None) => Ok(false),
            // The data connections of RFC 6062 are of the old network too.
            Ok(Some(MobilityTicket(b""))) if self.settings.features.mobility && peers == PeerTransport::Udp => Ok(true),
            Ok(Some(MobilityTicket(b""))) => Err(ErrorCode::MOBILITY_FORBIDDEN),
            Ok(Some(_)) | Err(_) => Err(ErrorCode::BAD_REQUEST),
        }
    }

    /// Gives an allocation its first ticket.
    pub(super) fn make_mobile(&mut self, slot: Slot) {
        if let Some(ticket) = self.mint_ticket() {
            self.table.make_mobile(slot, Mobility { ticket, moving: None });
            self.outputs.push_back(Output::Ticket { ticket, held: true });
        }
    }

    /// The worker whose server has the allocation of this request's ticket, if it is another one.
    pub(super) fn elsewhere(&self, request: &Request<'_>, host: &impl Host) -> Option<WorkerId> {
        let ticket = self.ticket_of(request)?;
        if self.table.by_ticket(&ticket).is_some() {
            return None;
        }
        host.ticket_owner(&ticket).filter(|worker| *worker != self.worker)
    }

    /// The allocation that a request is about, if anybody's: by its ticket, if it has one, else by its five-tuple.
    pub(super) fn meant(&self, request: &Request<'_>) -> Option<Slot> {
        match self.ticket_of(request) {
            Some(ticket) => self.table.by_ticket(&ticket),
            None => self.table.by_five_tuple(&request.from),
        }
    }

    /// The well-formed ticket of a Refresh.
    fn ticket_of(&self, request: &Request<'_>) -> Option<Ticket> {
        let message = &request.message;
        if message.method() != Method::Refresh || !message.contains(AttributeType::MOBILITY_TICKET) {
            return None;
        }
        let MobilityTicket(text) = message.attribute().ok().flatten()?;
        Ticket::read(text).filter(|_| self.settings.features.mobility)
    }

    /// RFC 8016 §3.2.2, in its order.
    pub(super) fn resumption(
        &self,
        request: &Request<'_>,
        user: &User<'_>,
        text: &[u8],
    ) -> Result<Resumption, ErrorCode> {
        if !self.settings.features.mobility {
            return Err(ErrorCode::MOBILITY_FORBIDDEN);
        }
        let ticket = Ticket::read(text).ok_or(ErrorCode::BAD_REQUEST)?;
        let Some(slot) = self.table.by_ticket(&ticket) else {
            // It was of an allocation that has ended, or of one that has moved on since; or it never was.
            let ours = ticket.is_authentic(&self.settings.nonce_keys);
            return Err(if ours { ErrorCode::ALLOCATION_MISMATCH } else { ErrorCode::BAD_REQUEST });
        };
        let allocation = self.table.get(slot);
        let moving = allocation.mobility().and_then(|mobility| mobility.moving);
        let foreign = *allocation.username != *user.name;
        if let Some(moving) = moving.filter(|moving| moving.by == ticket) {
            let again = moving.to == request.from && moving.transaction_id == request.message.transaction_id();
            return if again && !foreign { Ok(Resumption::Again(slot)) } else { Err(ErrorCode::BAD_REQUEST) };
        }
        if allocation.five_tuple() == request.from || moving.is_some_and(|moving| moving.to == request.from) {
            return Err(ErrorCode::BAD_REQUEST);
        }
        if foreign {
            return Err(ErrorCode::WRONG_CREDENTIALS);
        }
        if self.table.by_five_tuple(&request.from).is_some() {
            // The new five-tuple has an allocation of its own.
            return Err(ErrorCode::ALLOCATION_MISMATCH);
        }
        Ok(Resumption::Of(slot))
    }

    /// Begins a move to where the request came from; the ticket of the answer.
    pub(super) fn begin_move(&mut self, slot: Slot, request: &Request<'_>) -> Option<Ticket> {
        let ticket = self.mint_ticket()?;
        self.cancel_move(slot);
        let moving = Move {
            to: request.from,
            path: request.path,
            by: self.table.get(slot).mobility()?.ticket,
            transaction_id: request.message.transaction_id(),
        };
        self.table.begin_move(slot, moving, ticket);
        self.outputs.push_back(Output::Ticket { ticket, held: true });
        self.outputs.push_back(Output::Serve { five_tuple: request.from, path: request.path, served: true });
        Some(ticket)
    }

    /// The client makes use of this five-tuple: if it is the new one, that is the end of a move (RFC 8016 §3.2.2).
    #[inline]
    pub(super) fn heard_from(&mut self, now: Now, slot: Slot, from: &FiveTuple) {
        let moving = self.table.get(slot).mobility().and_then(|mobility| mobility.moving);
        if moving.is_some_and(|moving| moving.to == *from) {
            self.end_move(now, slot);
        }
    }

    /// The new five-tuple becomes the only one.
    pub(super) fn end_move(&mut self, now: Now, slot: Slot) {
        let Some((five_tuple, path, by)) = self.table.end_move(slot) else {
            return;
        };
        self.outputs.push_back(Output::Ticket { ticket: by, held: false });
        self.outputs.push_back(Output::Serve { five_tuple, path, served: false });
        self.record(slot, now);
    }

    /// The old five-tuple stays the only one; the ticket of the answer is good for another move. The change is not
    /// recorded yet.
    pub(super) fn cancel_move(&mut self, slot: Slot) {
        if let Some(Move { to, path, by, .. }) = self.table.cancel_move(slot) {
            self.outputs.push_back(Output::Ticket { ticket: by, held: false });
            self.outputs.push_back(Output::Serve { five_tuple: to, path, served: false });
        }
    }

    /// A stream of an allocation has closed, or another one has taken its five-tuple.
    pub(super) fn stream_closed(&mut self, now: Now, slot: Slot, path: Path) {
        let allocation = self.table.get(slot);
        match allocation.mobility().map(|mobility| mobility.moving) {
            None => self.end(slot, EndReason::Closed),
            Some(Some(moving)) if moving.path == path => {
                self.cancel_move(slot);
                self.record(slot, now);
            }
            // RFC 8016 §3.2.2: "a message from the client to close the old connection" ends a move too.
            Some(Some(_)) => self.end_move(now, slot),
            Some(None) => {
                self.table.disconnect(slot, now.mono + COMEBACK);
                self.record(slot, now);
            }
        }
    }

    /// What the outside knows of a mobile allocation, which has ended, ends.
    pub(super) fn forget_mobility(&mut self, allocation: &Allocation) {
        let Some(mobility) = allocation.mobility() else {
            return;
        };
        self.outputs.push_back(Output::Ticket { ticket: mobility.ticket, held: false });
        self.outputs.push_back(Output::Serve {
            five_tuple: allocation.five_tuple(),
            path: allocation.path(),
            served: false,
        });
        if let Some(moving) = mobility.moving {
            self.outputs.push_back(Output::Ticket { ticket: moving.by, held: false });
            self.outputs.push_back(Output::Serve { five_tuple: moving.to, path: moving.path, served: false });
        }
    }

    /// Mobility of a record that was brought back.
    pub(super) fn restore_mobility(&mut self, slot: Slot, record: &MobilityRecord) {
        let allocation = self.table.get(slot);
        let (from, path) = (allocation.five_tuple(), allocation.path());
        self.table.make_mobile(slot, Mobility { ticket: record.ticket, moving: None });
        self.outputs.push_back(Output::Ticket { ticket: record.ticket, held: true });
        // A move to another listener is forgotten: the client begins it again, with the ticket of the answer.
        let Some(moving) = record.moving.filter(|moving| {
            (moving.to.transport, moving.to.server) == (from.transport, from.server)
                && self.table.by_five_tuple(&moving.to).is_none()
        }) else {
            return;
        };
        let MoveRecord { to, by, transaction_id } = moving;
        self.table.make_mobile(slot, Mobility { ticket: by, moving: None });
        self.table.begin_move(
            slot,
            Move { to, path, by, transaction_id: TransactionId(transaction_id) },
            record.ticket,
        );
        self.outputs.push_back(Output::Ticket { ticket: by, held: true });
        self.outputs.push_back(Output::Serve { five_tuple: to, path, served: true });
    }

    fn mint_ticket(&mut self) -> Option<Ticket> {
        let mut random = [0; 16];
        self.rng.fill_bytes(&mut random);
        Ticket::mint(&self.settings.nonce_keys, random)
    }
}

/// For a record.
pub(super) fn mobility_record(allocation: &Allocation) -> Option<MobilityRecord> {
    allocation.mobility().map(|mobility| MobilityRecord {
        ticket: mobility.ticket,
        moving: mobility.moving.map(|moving| MoveRecord {
            to: moving.to,
            by: moving.by,
            transaction_id: moving.transaction_id.0,
        }),
    })
}

#[cfg(test)]
#[path = "mobility_tests.rs"]
mod tests;
