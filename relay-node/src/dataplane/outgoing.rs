//! What a turn sends: gathered while packets are handled, sent once the journal has been written.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use turn_core::Head;

use super::counters::Direction;
use super::packet::{PacketRef, Packets};
use crate::sys::message::Datagram;

/// By which of the worker's sockets, in the order in which they are flushed.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
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
}

/// The queue of a turn. Its memory stays, so that a turn in steady state takes none.
#[derive(Default)]
pub(super) struct OutgoingQueue {
    items: Vec<Outgoing>,
    order: Vec<(Target, usize)>,
    replies: Vec<u8>,
    /// Items that stand in records, and where those are among the replies.
    sealed: Vec<Option<(usize, usize)>>,
}

impl OutgoingQueue {
    pub(super) fn push(&mut self, target: Target, outgoing: Outgoing) {
        self.order.push((target, self.items.len()));
        self.items.push(outgoing);
        self.sealed.push(None);
    }

    /// Items, before they are sorted.
    pub(super) fn len(&self) -> usize {
        self.order.len()
    }

    /// Where the item at a position goes.
    pub(super) fn target(&self, position: usize) -> Target {
        self.order[position].0
    }

    /// The item at a position leaves by a listener, as this record. Not to be called once the queue is sorted.
    pub(super) fn seal(&mut self, position: usize, listener: usize, record: &[u8]) {
        let start = self.replies.len();
        self.replies.extend_from_slice(record);
        self.order[position].0 = Target::Listener(listener);
        self.sealed[position] = Some((start, self.replies.len()));
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

    /// Brings what leaves by one socket together, in the order it was pushed.
    pub(super) fn sort(&mut self) {
        self.order.sort_unstable();
    }

    /// The next run for one socket from position `start` on.
    pub(super) fn run(&self, start: usize) -> Option<(Target, Range<usize>)> {
        let (target, _) = *self.order.get(start)?;
        let length = self.order[start..].iter().take_while(|(other, _)| *other == target).count();
        Some((target, start..start + length))
    }

    /// Where the items from `start` on, of a run that ends at `end`, begin to differ in DF.
    pub(super) fn same_fragmentation(&self, start: usize, end: usize) -> usize {
        let first = self.at(start).dont_fragment;
        (start..end).find(|position| self.at(*position).dont_fragment != first).unwrap_or(end)
    }

    /// The item at a position of a run.
    pub(super) fn at(&self, position: usize) -> &Outgoing {
        &self.items[self.order[position].1]
    }

    /// The bytes of an item: head, payload, padding. As the client reads them, if they stand in a record.
    pub(super) fn parts<'a>(&'a self, item: &'a Outgoing, packets: &'a Packets) -> [&'a [u8]; 3] {
        let body = match item.body {
            Body::Packet(packet) => packets.bytes(packet),
            Body::Reply { start, end } => self.reply(start..end),
        };
        [item.head.as_slice(), body, &[0; 3][..usize::from(item.padding.min(3))]]
    }

    /// The item at a position of a run, as the kernel takes it.
    pub(super) fn datagram<'a>(&'a self, position: usize, packets: &'a Packets) -> Datagram<'a> {
        let item = self.at(position);
        let parts = match self.sealed[self.order[position].1] {
            Some((start, end)) => [&self.replies[start..end], &[], &[]],
            None => self.parts(item, packets),
        };
        Datagram { to: item.to, from: item.from, tos: item.tos, parts }
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

    #[test]
    fn runs_keep_the_order_of_each_socket() {
        let mut queue = OutgoingQueue::default();
        let packets = Packets::new();
        for (target, text) in [
            (Target::Relayed(3), "a"),
            (Target::Listener(0), "b"),
            (Target::Relayed(3), "c"),
            (Target::Connection(1), "d"),
            (Target::Listener(0), "e"),
        ] {
            let body = queue.copy_reply(text.as_bytes());
            let outgoing = Outgoing {
                to: ([127, 0, 0, 1], 1).into(),
                from: None,
                tos: 0,
                dont_fragment: false,
                head: Head::EMPTY,
                body,
                padding: 2,
                direction: None,
            };
            queue.push(target, outgoing);
        }
        queue.sort();
        let (mut position, mut runs) = (0, Vec::new());
        while let Some((target, run)) = queue.run(position) {
            position = run.end;
            let bytes: Vec<u8> = run.flat_map(|at| queue.datagram(at, &packets).parts.concat()).collect();
            runs.push((target, String::from_utf8(bytes).expect("text")));
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
}
