//! Mobility (RFC 8016) between datagram five-tuples.

use turn_core::{FiveTuple, Path};

use super::super::stun::{self, MOBILITY_TICKET, Read};
use super::{Allocation, Model};

/// Of an allocation whose client asked for it.
#[derive(Clone, Debug)]
pub struct Mobility {
    /// What moves it next; empty until the answer has told it.
    pub ticket: Vec<u8>,
    pub moving: Option<Move>,
}

impl Mobility {
    /// For an answer: it may be new there.
    pub(super) fn known_ticket(&self) -> Option<Vec<u8>> {
        Some(self.ticket.clone()).filter(|ticket| !ticket.is_empty())
    }
}

/// Both five-tuples have the allocation.
#[derive(Clone, Debug)]
pub struct Move {
    pub to: FiveTuple,
    path: Path,
    /// The ticket that began it.
    pub by: Vec<u8>,
    transaction: [u8; 12],
}

/// What a Refresh with a ticket is about.
pub(super) enum Resumed {
    /// The allocation at this place of the list.
    At(usize),
    /// It was answered before.
    Again(usize),
}

impl Allocation {
    /// Whether requests and data of a five-tuple are about it.
    pub(super) fn is_of(&self, from: &FiveTuple) -> bool {
        let moving = self.mobility.iter().filter_map(|mobility| mobility.moving.as_ref());
        self.five_tuple == *from || moving.into_iter().any(|moving| moving.to == *from)
    }

    fn has_ticket(&self, text: &[u8]) -> bool {
        self.mobility.as_ref().is_some_and(|mobility| {
            mobility.ticket == text || mobility.moving.as_ref().is_some_and(|moving| moving.by == text)
        })
    }

    /// Its tickets that are good for something.
    pub fn tickets(&self) -> Vec<Vec<u8>> {
        let moving = self.mobility.iter().filter_map(|mobility| mobility.moving.as_ref());
        let by = moving.map(|moving| moving.by.clone());
        self.mobility.iter().map(|mobility| mobility.ticket.clone()).chain(by).collect()
    }

    /// RFC 8016 §3.2.2: data from the new five-tuple makes it the only one.
    pub(super) fn heard_from(&mut self, from: &FiveTuple) {
        if let Some(mobility) = &mut self.mobility
            && let Some(moving) = mobility.moving.take_if(|moving| moving.to == *from)
        {
            (self.five_tuple, self.path) = (moving.to, moving.path);
        }
    }
}

impl Model {
    /// RFC 8016 §3.1.2: whether an Allocate asks for a ticket.
    pub(super) fn wants_ticket(&self, message: &Read, tcp: bool) -> Result<bool, u16> {
        match message.find(MOBILITY_TICKET) {
            None => Ok(false),
            Some(b"") if self.mobile && !tcp => Ok(true),
            // Data connections of RFC 6062 do not move: local policy.
            Some(b"") => Err(405),
            Some(_) => Err(400),
        }
    }

    /// The allocation that a request is about, to know whose it is: the ticket's, if it can be one.
    pub(super) fn meant(&self, from: &FiveTuple, message: &Read) -> Option<&Allocation> {
        let ticket = message.find(MOBILITY_TICKET).filter(|_| message.method == stun::REFRESH && self.mobile);
        match ticket.filter(|text| is_ticket(text)) {
            Some(text) => self.allocations.iter().find(|allocation| allocation.has_ticket(text)),
            None => self.allocations.iter().find(|allocation| allocation.is_of(from)),
        }
    }

    /// RFC 8016 §3.2.2.
    pub(super) fn resume(&self, from: &FiveTuple, message: &Read, name: &[u8], text: &[u8]) -> Result<Resumed, u16> {
        if !self.mobile {
            return Err(405);
        }
        let Some(at) = self.allocations.iter().position(|allocation| allocation.has_ticket(text)) else {
            // One of an allocation that is gone, or of nobody.
            let ours = self.tickets.iter().any(|(known, key)| known == text && self.nonce_keys.contains(key));
            return Err(if ours { 437 } else { 400 });
        };
        let allocation = &self.allocations[at];
        let moving = allocation.mobility.as_ref().and_then(|mobility| mobility.moving.as_ref());
        if let Some(moving) = moving.filter(|moving| moving.by == text) {
            let again = moving.to == *from && moving.transaction == message.transaction && allocation.username == name;
            return if again { Ok(Resumed::Again(at)) } else { Err(400) };
        }
        if allocation.is_of(from) {
            return Err(400);
        }
        if allocation.username != name {
            return Err(441);
        }
        if self.allocations.iter().any(|other| other.is_of(from)) {
            return Err(437);
        }
        Ok(Resumed::At(at))
    }

    /// The allocation is at both five-tuples from now on.
    pub(super) fn begin_move(&mut self, at: usize, to: FiveTuple, path: Path, message: &Read) {
        if let Some(mobility) = &mut self.allocations[at].mobility {
            let by = std::mem::take(&mut mobility.ticket);
            mobility.moving = Some(Move { to, path, by, transaction: message.transaction });
        }
    }

    /// The answer told a new ticket.
    pub fn learn_ticket(&mut self, text: &[u8]) {
        let key = self.nonce_keys[0];
        let mut mobility = self.allocations.iter_mut().filter_map(|allocation| allocation.mobility.as_mut());
        if let Some(mobility) = mobility.find(|mobility| mobility.ticket.is_empty()) {
            assert!(!self.tickets.iter().any(|(known, _)| known == text), "a ticket is new");
            mobility.ticket = text.to_vec();
            self.tickets.push((text.to_vec(), key));
        }
    }
}

/// Whether it could be one of this server's: 32 characters of base64url.
fn is_ticket(text: &[u8]) -> bool {
    text.len() == 32 && text.iter().all(|byte| byte.is_ascii_alphanumeric() || [b'-', b'_'].contains(byte))
}
