//! What a turn sends: gathered while packets are handled, sent once the journal has been written.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use turn_core::{AccountId, Head};

use super::counters::Direction;
use super::packet::{PacketRef, Packets};
use crate::sys::message::{Message, SEGMENTED_BYTES, SEGMENTS};

/// By which of the worker's sockets, in the order in which they are flushed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Target {
    /// A relayed address.
    Relayed(usize),
    /// A datagram listener.
    Listener(usize),
    /// A stream connection.
    Connection(usize),
    /// A DTLS session, until it has made a record of it.
    Session(usize),
}

/// Where an item stands in the order of sending, from the highest bits on: its target; a few bits of its destination, so
/// that what can leave in one message comes together; its place in the queue.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Place(u64);

impl Place {
    /// A turn ends long before.
    const INDEX_BITS: u32 = 20;
    const DESTINATION_BITS: u32 = 14;
    /// Each key is an open descriptor's, or a session's.
    const KEY_BITS: u32 = 28;
    const TARGET_SHIFT: u32 = Self::INDEX_BITS + Self::DESTINATION_BITS;

    fn new(target: Target, to: SocketAddr, index: usize) -> Self {
        let (kind, key, destination) = match target {
            Target::Relayed(key) => (0, key, few_bits(to)),
            Target::Listener(key) => (1, key, few_bits(to)),
            // In the order of the queue, whatever that says of the destination.
            Target::Connection(key) => (2, key, 0),
            Target::Session(key) => (3, key, few_bits(to)),
        };
        let target = kind << Self::KEY_BITS | key as u64;
        Self(target << Self::TARGET_SHIFT | destination << Self::INDEX_BITS | index as u64)
    }

    fn index(self) -> usize {
        (self.0 & ((1 << Self::INDEX_BITS) - 1)) as usize
    }

    fn target(self) -> Target {
        let target = self.0 >> Self::TARGET_SHIFT;
        let key = (target & ((1 << Self::KEY_BITS) - 1)) as usize;
        match target >> Self::KEY_BITS {
            0 => Target::Relayed(key),
            1 => Target::Listener(key),
            2 => Target::Connection(key),
            _ => Target::Session(key),
        }
    }

    fn has_target_of(self, other: Self) -> bool {
        self.0 >> Self::TARGET_SHIFT == other.0 >> Self::TARGET_SHIFT
    }

    fn has_destination_of(self, other: Self) -> bool {
        self.0 >> Self::INDEX_BITS == other.0 >> Self::INDEX_BITS
    }
}

/// Tells most destinations apart: it only says what stands next to what.
pub(super) fn few_bits(to: SocketAddr) -> u64 {
    let ip = match to.ip() {
        IpAddr::V4(ip) => u64::from(ip.to_bits()),
        IpAddr::V6(ip) => (ip.to_bits() >> 64) as u64 ^ ip.to_bits() as u64,
    };
    (ip ^ u64::from(to.port()) << 32).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - Place::DESTINATION_BITS)
}

/// Where the bytes behind the head are.
#[derive(Clone, Copy, Debug)]
pub(super) enum Body {
    /// In a received packet.
    Packet(PacketRef),
    /// In this turn's replies.
    Reply { start: usize, end: usize },
}

/// One datagram or frame to send.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outgoing {
    /// Destination; of no meaning on a connection.
    pub(super) to: SocketAddr,
    /// Source, where the socket is bound to none.
    pub(super) from: Option<IpAddr>,
    pub(super) tos: u8,
    /// DF, on a relayed address.
    pub(super) dont_fragment: bool,
    pub(super) head: Head,
    pub(super) body: Body,
    pub(super) padding: u8,
    /// Of application data; an answer has none.
    pub(super) direction: Option<Direction>,
    /// Whose traffic it is.
    pub(super) account: AccountId,
}

impl Outgoing {
    /// Whether one message can be both.
    fn goes_with(&self, other: &Self) -> bool {
        self.to == other.to
            && self.tos == other.tos
            && self.from == other.from
            // What is too long for its way has to be told of one by one.
            && !self.dont_fragment
            && !other.dont_fragment
    }
}

/// The queue of a turn. Its memory stays, so that a turn in steady state takes none.
#[derive(Default)]
pub(super) struct OutgoingQueue {
    items: Vec<Outgoing>,
    order: Vec<Place>,
    replies: Vec<u8>,
    /// Items that stand in records, and where those are among the replies. Empty where no item does.
    sealed: Vec<Option<(usize, usize)>>,
}

impl OutgoingQueue {
    pub(super) fn push(&mut self, target: Target, outgoing: Outgoing) {
        self.order.push(Place::new(target, outgoing.to, self.items.len()));
        self.items.push(outgoing);
    }

    /// Items queued.
    pub(super) fn len(&self) -> usize {
        self.order.len()
    }

    /// Where the item at a position goes.
    pub(super) fn target(&self, position: usize) -> Target {
        self.order[position].target()
    }

    /// The item at a position leaves by a listener, as this record. Not to be called once the queue is sorted.
    pub(super) fn seal(&mut self, position: usize, listener: usize, record: &[u8]) {
        let start = self.replies.len();
        self.replies.extend_from_slice(record);
        let index = self.order[position].index();
        self.order[position] = Place::new(Target::Listener(listener), self.items[index].to, index);
        self.sealed.resize(self.items.len(), None);
        self.sealed[index] = Some((start, self.replies.len()));
    }

    /// Copies a reply, which the core keeps only until its next input.
    pub(super) fn copy_reply(&mut self, reply: &[u8]) -> Body {
        let start = self.replies.len();
        self.replies.extend_from_slice(reply);
        Body::Reply { start, end: self.replies.len() }
    }

    /// The bytes of a reply.
    pub(super) fn reply(&self, range: Range<usize>) -> &[u8] {
        &self.replies[range]
    }

    /// Brings what leaves by one socket together, and there what has one destination, in the order it was pushed.
    pub(super) fn sort(&mut self) {
        self.order.sort_unstable();
    }

    /// The next run for one socket from position `start` on.
    pub(super) fn run(&self, start: usize) -> Option<(Target, Range<usize>)> {
        let first = *self.order.get(start)?;
        let length = self.order[start..].iter().take_while(|other| other.has_target_of(first)).count();
        Some((first.target(), start..start + length))
    }

    /// The relayed address that the item at a position of a run leaves from.
    pub(super) fn relayed(&self, position: usize) -> Option<usize> {
        match self.order.get(position)?.target() {
            Target::Relayed(key) => Some(key),
            Target::Listener(_) | Target::Connection(_) | Target::Session(_) => None,
        }
    }

    /// Where the items from `start` on, of a run that ends at `end`, begin to differ in DF.
    pub(super) fn same_fragmentation(&self, start: usize, end: usize) -> usize {
        let first = self.at(start).dont_fragment;
        (start..end).find(|position| self.at(*position).dont_fragment != first).unwrap_or(end)
    }

    /// How many items from `start` on, of a run that ends at `end`, one message can be that the kernel cuts again: to one
    /// destination, all as long as the first but the last, which may be shorter. Its length, if they are several.
    pub(super) fn joint(&self, start: usize, end: usize, packets: &Packets) -> (usize, Option<u16>) {
        let place = self.order[start];
        let neighbours = self.order[start..end.min(start + SEGMENTS)].iter().skip(1);
        let mut neighbours = neighbours.take_while(|other| other.has_destination_of(place)).peekable();
        if neighbours.peek().is_none() {
            return (1, None);
        }
        let first = self.at(start);
        let size = self.length(start, packets);
        let (mut count, mut bytes) = (1, size);
        // Nothing is no segment.
        while size > 0 && neighbours.next().is_some() && first.goes_with(self.at(start + count)) {
            let length = self.length(start + count, packets);
            if length == 0 || length > size || bytes + length > SEGMENTED_BYTES {
                break;
            }
            count += 1;
            bytes += length;
            if length < size {
                break;
            }
        }
        (count, u16::try_from(size).ok().filter(|_| count > 1))
    }

    /// The item at a position of a run.
    pub(super) fn at(&self, position: usize) -> &Outgoing {
        &self.items[self.order[position].index()]
    }

    /// The bytes of an item: head, payload, padding. As the client reads them, if they stand in a record.
    pub(super) fn parts<'a>(&'a self, item: &'a Outgoing, packets: &'a Packets) -> [&'a [u8]; 3] {
        let body = match item.body {
            Body::Packet(packet) => packets.bytes(packet),
            Body::Reply { start, end } => self.reply(start..end),
        };
        [item.head.as_slice(), body, &[0; 3][..usize::from(item.padding.min(3))]]
    }

    /// The bytes of the item at a position, as they leave.
    pub(super) fn wire<'a>(&'a self, position: usize, packets: &'a Packets) -> [&'a [u8]; 3] {
        let index = self.order[position].index();
        match self.sealed.get(index) {
            Some(&Some((start, end))) => [&self.replies[start..end], &[], &[]],
            _ => self.parts(&self.items[index], packets),
        }
    }

    fn length(&self, position: usize, packets: &Packets) -> usize {
        self.wire(position, packets).iter().map(|part| part.len()).sum()
    }

    /// So many items from a position on, as the kernel takes them; by a socket that is connected, or by one that is not.
    pub(super) fn message<'a>(
        &'a self,
        position: usize,
        (count, segment): (usize, Option<u16>),
        packets: &'a Packets,
        is_connected: bool,
    ) -> Message<impl Iterator<Item = &'a [u8]>> {
        let item = self.at(position);
        let parts = (position..position + count).flat_map(|position| self.wire(position, packets));
        let to = if is_connected { None } else { Some(item.to) };
        Message { to, from: item.from, tos: item.tos, segment, parts }
    }

    /// Everything has been sent or given up.
    pub(super) fn clear(&mut self) {
        self.items.clear();
        self.order.clear();
        self.replies.clear();
        self.sealed.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outgoing(queue: &mut OutgoingQueue, port: u16, text: &[u8]) -> Outgoing {
        let body = queue.copy_reply(text);
        Outgoing {
            to: ([127, 0, 0, 1], port).into(),
            from: None,
            tos: 0,
            dont_fragment: false,
            head: Head::EMPTY,
            body,
            padding: 0,
            direction: None,
            account: AccountId::NONE,
        }
    }

    fn text(queue: &OutgoingQueue, run: Range<usize>) -> String {
        let packets = Packets::new();
        let bytes: Vec<u8> = run.flat_map(|at| queue.wire(at, &packets).concat()).collect();
        String::from_utf8(bytes).expect("text")
    }

    #[test]
    fn runs_keep_the_order_of_each_socket() {
        let mut queue = OutgoingQueue::default();
        for (target, text) in [
            (Target::Relayed(3), "a"),
            (Target::Listener(0), "b"),
            (Target::Relayed(3), "c"),
            (Target::Connection(1), "d"),
            (Target::Listener(0), "e"),
        ] {
            let outgoing = Outgoing { padding: 2, ..outgoing(&mut queue, 1, text.as_bytes()) };
            queue.push(target, outgoing);
        }
        queue.sort();
        let (mut position, mut runs) = (0, Vec::new());
        while let Some((target, run)) = queue.run(position) {
            position = run.end;
            runs.push((target, text(&queue, run)));
        }
        assert_eq!(
            runs,
            [
                (Target::Relayed(3), "a\0\0c\0\0".into()),
                (Target::Listener(0), "b\0\0e\0\0".into()),
                (Target::Connection(1), "d\0\0".into()),
            ]
        );
    }

    #[test]
    fn places_hold_what_they_are_made_of() {
        let to = |port| SocketAddr::from(([192, 0, 2, 1], port));
        for target in
            [Target::Relayed(0), Target::Listener(7), Target::Connection((1 << 28) - 1), Target::Session(70_000)]
        {
            let place = Place::new(target, to(9), 70_001);
            assert_eq!((place.target(), place.index()), (target, 70_001));
            assert!(place.has_destination_of(Place::new(target, to(9), 3)));
        }
        let apart = |target: fn(usize) -> Target| {
            Place::new(target(1), to(1), 0).has_destination_of(Place::new(target(1), to(2), 0))
        };
        assert_eq!((apart(Target::Relayed), apart(Target::Connection)), (false, true));
    }

    /// The messages that the run of a listener becomes.
    fn messages(items: &[Outgoing], mut queue: OutgoingQueue) -> Vec<(String, Option<u16>)> {
        let packets = Packets::new();
        items.iter().for_each(|item| queue.push(Target::Listener(0), *item));
        queue.sort();
        let (mut position, mut found) = (0, Vec::new());
        while position < queue.len() {
            let (count, segment) = queue.joint(position, queue.len(), &packets);
            found.push((text(&queue, position..position + count), segment));
            position += count;
        }
        found.sort();
        found
    }

    #[test]
    fn what_is_alike_leaves_together() {
        type Case = (&'static str, &'static [&'static str], &'static [(&'static str, Option<u16>)]);
        let cases: [Case; 6] = [
            ("equal", &["aa", "bb", "cc"], &[("aabbcc", Some(2))]),
            ("a short one ends it", &["aa", "bb", "c", "d"], &[("aabbc", Some(2)), ("d", None)]),
            ("a longer one begins anew", &["a", "bb", "cc"], &[("a", None), ("bbcc", Some(2))]),
            ("nothing is no segment", &["aa", "", "bb"], &[("", None), ("aa", None), ("bb", None)]),
            ("nothing comes first", &["", "", "bb"], &[("", None), ("", None), ("bb", None)]),
            ("alone", &["aa"], &[("aa", None)]),
        ];
        for (what, texts, expected) in cases {
            let mut queue = OutgoingQueue::default();
            let items: Vec<_> = texts.iter().map(|text| outgoing(&mut queue, 1, text.as_bytes())).collect();
            let expected: Vec<_> = expected.iter().map(|(text, segment)| (text.to_string(), *segment)).collect();
            assert_eq!(messages(&items, queue), expected, "{what}");
        }
    }

    #[test]
    fn what_differs_leaves_apart() {
        type Change = (&'static str, fn(&mut Outgoing));
        let changes: [Change; 5] = [
            ("port", |item| item.to.set_port(2)),
            ("address", |item| item.to.set_ip([127, 0, 0, 2].into())),
            ("source", |item| item.from = Some([127, 0, 0, 9].into())),
            ("DSCP", |item| item.tos = 0xb8),
            ("DF", |item| item.dont_fragment = true),
        ];
        for (what, change) in changes {
            let mut queue = OutgoingQueue::default();
            let mut items: Vec<_> =
                ["aa", "bb", "cc", "dd"].map(|text| outgoing(&mut queue, 1, text.as_bytes())).into();
            change(&mut items[1]);
            let expected: &[&str] =
                if what == "port" || what == "address" { &["aaccdd", "bb"] } else { &["aa", "bb", "ccdd"] };
            let found: Vec<_> = messages(&items, queue).into_iter().map(|(text, _)| text).collect();
            assert_eq!(found, expected, "{what}");
        }
    }

    #[test]
    fn a_message_is_bounded_in_segments_and_bytes() {
        for (length, count, expected) in
            [(1, 150, [64, 64, 22].as_slice()), (1200, 60, &[54, 6]), (40_000, 3, &[1, 1, 1])]
        {
            let mut queue = OutgoingQueue::default();
            let items: Vec<_> = (0..count).map(|_| outgoing(&mut queue, 1, &vec![b'x'; length])).collect();
            let mut lengths: Vec<_> = messages(&items, queue).iter().map(|(text, _)| text.len() / length).collect();
            lengths.sort_by(|a, b| b.cmp(a));
            assert_eq!(lengths, expected, "of {length} bytes");
        }
    }
}
