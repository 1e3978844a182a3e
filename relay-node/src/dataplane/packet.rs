//! The packets of one turn: slots that are filled from sockets, streams and rings, and all free again once the turn's
//! sends have left.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::os::fd::BorrowedFd;

use crate::sys::message::ReceiveSlots;

/// Packets of a turn. Beyond it the turn ends: journal, flush, next turn.
const SLOTS: usize = 128;

/// A packet, or a range of one: where it lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct PacketRef {
    slot: usize,
    start: usize,
    end: usize,
}

impl PacketRef {
    /// No bytes.
    pub(super) const EMPTY: Self = Self { slot: 0, start: 0, end: 0 };

    /// A range of this packet, counted from its start.
    pub(super) fn range(self, range: Range<usize>) -> Self {
        Self { slot: self.slot, start: self.start + range.start, end: self.start + range.end }
    }

    /// Bytes of it.
    pub(super) fn len(self) -> usize {
        self.end - self.start
    }
}

/// A datagram as received.
#[derive(Clone, Copy, Debug)]
pub(super) struct Received {
    pub(super) packet: PacketRef,
    pub(super) source: SocketAddr,
    /// Known where the socket is bound to no address.
    pub(super) local: Option<IpAddr>,
    pub(super) tos: u8,
}

/// The slots of a worker.
pub(super) struct Packets {
    slots: ReceiveSlots,
    used: usize,
}

impl Packets {
    pub(super) fn new() -> Self {
        Self { slots: ReceiveSlots::new(SLOTS), used: 0 }
    }

    /// Slots left in this turn.
    pub(super) fn room(&self) -> usize {
        self.slots.count() - self.used
    }

    /// Receives at most `most` datagrams. They are the slots returned.
    pub(super) fn receive(&mut self, socket: BorrowedFd<'_>, most: usize) -> io::Result<Range<usize>> {
        let first = self.used;
        self.used += self.slots.receive(socket, first, most.min(self.room()))?;
        Ok(first..self.used)
    }

    /// The datagram received into a slot; none if its source is not an IP address.
    pub(super) fn received(&self, slot: usize) -> Option<Received> {
        let (local, tos) = self.slots.local_and_tos(slot);
        Some(Received {
            packet: PacketRef { slot, start: 0, end: self.slots.length(slot) },
            source: self.slots.source(slot)?,
            local,
            tos,
        })
    }

    /// Lets `fill` write into the next slot; it says how many bytes it wrote, and what else it knows. The slot stays
    /// free if it wrote nothing.
    pub(super) fn fill<T>(&mut self, fill: impl FnOnce(&mut [u8]) -> Option<(T, usize)>) -> Option<(T, PacketRef)> {
        let slot = self.used;
        let (known, end) = fill(self.slots.slot(slot))?;
        self.used += 1;
        Some((known, PacketRef { slot, start: 0, end }))
    }

    /// Lets `fill` write over a packet and what lies behind it, from `start` bytes after its beginning on; it says how
    /// many bytes it wrote. Not where there is no room for the longest record (2^14 bytes, RFC 6347 §4.1).
    pub(super) fn rewrite(
        &mut self,
        packet: PacketRef,
        start: usize,
        fill: impl FnOnce(&mut [u8]) -> Option<usize>,
    ) -> Option<PacketRef> {
        let start = packet.start + start;
        let room = self.slots.slot(packet.slot).get_mut(start..).filter(|room| room.len() >= 1 << 14)?;
        let length = fill(room)?;
        Some(PacketRef { slot: packet.slot, start, end: start + length })
    }

    /// The bytes.
    pub(super) fn bytes(&self, packet: PacketRef) -> &[u8] {
        &self.slots.bytes(packet.slot, packet.end)[packet.start..]
    }

    /// Ends the turn: every slot is free.
    pub(super) fn clear(&mut self) {
        self.used = 0;
    }
}
