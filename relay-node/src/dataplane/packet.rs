//! The packets of one turn: slots that are filled from sockets, streams and rings, and all free again once the turn's
//! sends have left. What the kernel has coalesced shares a slot, so that nothing is written in place.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::os::fd::BorrowedFd;

use crate::sys::message::{Ancillary, ReceiveSlots};

/// Packets of a turn. Beyond it the turn ends: journal, flush, next turn.
const SLOTS: usize = 128;
/// The longest plaintext of a record (RFC 6347 §4.1).
const RECORD: usize = 1 << 14;

/// A packet, or a range of one: where it lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct PacketRef {
    slot: u32,
    start: u32,
    end: u32,
    /// Another packet lies behind it.
    followed: bool,
}

impl PacketRef {
    /// No bytes.
    pub(super) const EMPTY: Self = Self { slot: 0, start: 0, end: 0, followed: false };

    /// The first `length` bytes of a slot.
    fn whole(slot: usize, length: usize) -> Self {
        // A slot has some 64 KiB, and a worker far fewer slots.
        Self { slot: slot as u32, start: 0, end: length as u32, followed: false }
    }

    /// A range of this packet, counted from its start.
    pub(super) fn range(self, range: Range<usize>) -> Self {
        Self { start: self.start + range.start as u32, end: self.start + range.end as u32, ..self }
    }

    /// Bytes of it.
    pub(super) fn len(self) -> usize {
        (self.end - self.start) as usize
    }
}

/// A datagram as received, or several of one flow that have all of this in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct Received {
    packet: PacketRef,
    segment: Option<usize>,
    pub(super) source: SocketAddr,
    /// Known where the socket is bound to no address.
    pub(super) local: Option<IpAddr>,
    pub(super) tos: u8,
}

impl Received {
    /// How many datagrams it is.
    pub(super) fn count(self) -> usize {
        // One without bytes is one too.
        self.segment.map_or(1, |size| self.packet.len().div_ceil(size)).max(1)
    }

    /// The datagrams, in order.
    pub(super) fn segments(self) -> impl Iterator<Item = PacketRef> {
        let whole = self.packet.len();
        let size = self.segment.unwrap_or(whole);
        (0..self.count()).map(move |index| {
            let end = whole.min((index + 1) * size);
            PacketRef { followed: end < whole, ..self.packet.range(index * size..end) }
        })
    }
}

/// How many slots a socket is offered at once: about as many as it filled the last time. One that stays empty costs a look
/// at an empty queue, which on a thin flow would be one for each packet; one that is missing costs a turn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Appetite {
    slots: u16,
    least: u16,
    /// Times in a row that all were filled.
    full: u16,
}

impl Appetite {
    /// Receives in a row that fill all slots, times slots: then there may be more.
    const EVIDENCE: u16 = 8;

    /// Never fewer than `least`.
    pub(super) fn new(least: u16) -> Self {
        Self { slots: least, least, full: 0 }
    }

    /// Slots to offer.
    pub(super) fn slots(&self) -> usize {
        self.slots.into()
    }

    /// So many of the slots offered were filled, with so many datagrams of at most `budget` in a turn.
    pub(super) fn learn(&mut self, offered: usize, filled: usize, datagrams: usize, budget: usize) {
        // All are far below the range.
        let [offered, filled, budget] = [offered, filled, budget].map(|count| count as u16);
        if datagrams > budget.into() {
            self.slots = (usize::from(filled) * usize::from(budget) / datagrams) as u16;
            self.full = 0;
        } else if filled < offered {
            self.slots = filled + filled / 2;
            self.full = 0;
        } else {
            self.full += 1;
            if self.full * self.slots >= Self::EVIDENCE {
                self.slots = (self.slots * 2).min(budget);
                self.full = 0;
            }
        }
        self.slots = self.slots.max(self.least).max(1);
    }
}

/// The slots of a worker.
pub(super) struct Packets {
    slots: ReceiveSlots,
    used: usize,
    /// Room for one record.
    aside: Box<[u8]>,
}

impl Packets {
    pub(super) fn new() -> Self {
        Self { slots: ReceiveSlots::new(SLOTS), used: 0, aside: vec![0; RECORD].into() }
    }

    /// Slots left in this turn.
    pub(super) fn room(&self) -> usize {
        self.slots.count() - self.used
    }

    /// Receives into at most `most` slots, which are returned.
    pub(super) fn receive(&mut self, socket: BorrowedFd<'_>, most: usize) -> io::Result<Range<usize>> {
        let first = self.used;
        self.used += self.slots.receive(socket, first, most.min(self.room()))?;
        Ok(first..self.used)
    }

    /// What was received into a slot; none if its source is not an IP address.
    pub(super) fn received(&self, slot: usize) -> Option<Received> {
        let Ancillary { local, tos, segment } = self.slots.ancillary(slot);
        let packet = PacketRef::whole(slot, self.slots.length(slot));
        Some(Received { packet, segment, source: self.slots.source(slot)?, local, tos })
    }

    /// Address and port that the datagram received into a slot was sent to, known where that was asked for.
    pub(super) fn destination(&self, slot: usize) -> Option<SocketAddr> {
        self.slots.destination(slot)
    }

    /// Lets `fill` write into the next slot; it says how many bytes it wrote, and what else it knows. The slot stays
    /// free if it wrote nothing.
    pub(super) fn fill<T>(&mut self, fill: impl FnOnce(&mut [u8]) -> Option<(T, usize)>) -> Option<(T, PacketRef)> {
        let slot = self.used;
        let (known, length) = fill(self.slots.slot(slot))?;
        self.used += 1;
        Some((known, PacketRef::whole(slot, length)))
    }

    /// Lets `fill` write over a packet and what lies behind it, from `start` bytes after its beginning on; it says how
    /// many bytes it wrote. Not where there is no room for the longest record (2^14 bytes, RFC 6347 §4.1). Where another
    /// packet lies behind this one, `fill` writes elsewhere, and what then does not fit into this one is lost.
    pub(super) fn rewrite(
        &mut self,
        packet: PacketRef,
        start: usize,
        fill: impl FnOnce(&mut [u8]) -> Option<usize>,
    ) -> Option<PacketRef> {
        let start = packet.start as usize + start;
        let slot = self.slots.slot(packet.slot as usize);
        let length = if packet.followed {
            let length = fill(&mut self.aside)?;
            slot.get_mut(start..packet.end as usize)?.get_mut(..length)?.copy_from_slice(&self.aside[..length]);
            length
        } else {
            fill(slot.get_mut(start..).filter(|room| room.len() >= RECORD)?)?
        };
        Some(PacketRef { start: start as u32, end: (start + length) as u32, ..packet })
    }

    /// The bytes.
    pub(super) fn bytes(&self, packet: PacketRef) -> &[u8] {
        &self.slots.bytes(packet.slot as usize, packet.end as usize)[packet.start as usize..]
    }

    /// Ends the turn: every slot is free.
    pub(super) fn clear(&mut self) {
        self.used = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Slot 0 holds these bytes, coalesced of segments of a length.
    fn coalesced(packets: &mut Packets, bytes: &[u8], segment: Option<usize>) -> Received {
        let filled = packets.fill(|slot| {
            slot[..bytes.len()].copy_from_slice(bytes);
            Some(((), bytes.len()))
        });
        let (_, packet) = filled.expect("room");
        Received { packet, segment, source: ([127, 0, 0, 1], 1).into(), local: None, tos: 0 }
    }

    #[test]
    fn what_was_coalesced_is_told_apart() {
        type Case = (&'static str, &'static [u8], Option<usize>, &'static [&'static [u8]]);
        let cases: [Case; 6] = [
            ("alone", b"abcdef", None, &[b"abcdef"]),
            ("empty", b"", None, &[b""]),
            ("even", b"abcdef", Some(3), &[b"abc", b"def"]),
            ("a short last one", b"abcdefgh", Some(3), &[b"abc", b"def", b"gh"]),
            ("one of its own length", b"abc", Some(3), &[b"abc"]),
            ("shorter than its segments", b"ab", Some(3), &[b"ab"]),
        ];
        for (what, bytes, segment, expected) in cases {
            let mut packets = Packets::new();
            let received = coalesced(&mut packets, bytes, segment);
            let found: Vec<&[u8]> = received.segments().map(|packet| packets.bytes(packet)).collect();
            assert_eq!(found, expected, "{what}");
        }
    }

    #[test]
    fn a_socket_is_offered_what_it_can_fill() {
        /// Slots offered, once a socket has held `waiting` slots of so many datagrams for long.
        fn offered(waiting: usize, datagrams: usize) -> usize {
            let mut appetite = Appetite::new(1);
            for _ in 0..100 {
                let offered = appetite.slots();
                let filled = offered.min(waiting);
                appetite.learn(offered, filled, filled * datagrams, 64);
            }
            appetite.slots()
        }
        assert_eq!(offered(1000, 1), 64, "a queue is emptied by the budget");
        assert!((3..=4).contains(&offered(1000, 16)), "coalesced ones count");
        assert_eq!(offered(1000, 100), 1, "one at least");
        // One packet at a time is looked for once in eight times.
        let (mut appetite, mut looks) = (Appetite::new(1), 0);
        for _ in 0..900 {
            looks += usize::from(appetite.slots() > 1);
            appetite.learn(appetite.slots(), 1, 1, 64);
        }
        assert_eq!(looks, 100);
    }

    #[test]
    fn a_record_is_opened_without_a_trace_on_its_neighbour() {
        let mut packets = Packets::new();
        let received = coalesced(&mut packets, b"RECORD-1RECORD-2", Some(8));
        let [first, last] = received.segments().collect::<Vec<_>>()[..] else { panic!("two segments") };
        let write = |text: &'static [u8]| {
            move |room: &mut [u8]| {
                assert!(room.len() >= RECORD, "there is room for any record");
                // Open records write more than they say.
                room[..RECORD].fill(b'x');
                room[..text.len()].copy_from_slice(text);
                Some(text.len())
            }
        };
        let plain = packets.rewrite(first, 0, write(b"one")).expect("it fits");
        assert_eq!(packets.bytes(plain), b"one");
        let more = packets.rewrite(first, 3, write(b"more")).expect("it fits");
        assert_eq!((packets.bytes(plain), packets.bytes(more)), (&b"one"[..], &b"more"[..]));
        assert!(packets.rewrite(first, 3, write(b"too long")).is_none(), "it would reach the neighbour");
        assert_eq!(packets.bytes(last), b"RECORD-2");
        let plain = packets.rewrite(last, 0, write(b"longer than it was")).expect("nothing lies behind");
        assert_eq!(packets.bytes(plain), b"longer than it was");
    }
}
