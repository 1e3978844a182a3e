//! From a worker to the backbone: a ring with one producer and one consumer, bounded in packets and in bytes.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::BytesMut;
use rtrb::{Consumer, Producer, RingBuffer};
use turn_core::{IpMeta, MemberId};

use crate::sys::epoll::Waker;

/// Packets on their way in one ring.
const PACKETS: usize = 4096;
/// Bytes on their way in one ring.
const BYTES: usize = 2 << 20;

/// What a worker has for another member.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outbound {
    /// From an allocation of this relay to a relayed address of `member`.
    Data {
        /// Whose address `destination` is.
        member: MemberId,
        /// The allocation's relayed address, as it is advertised.
        source: SocketAddr,
        /// Where to.
        destination: SocketAddr,
        /// IP header fields to be carried over.
        ip: IpMeta,
    },
    /// A client's packet that arrived here, and whose allocation `member` has.
    Ingress {
        /// Who has the allocation.
        member: MemberId,
        /// Where it came from.
        client: SocketAddr,
        /// Where the client sent it to.
        server: SocketAddr,
        /// IP header fields.
        ip: IpMeta,
    },
    /// For a client whose packets arrive at `member`: it leaves there, from `server` to `client`.
    IngressReply {
        /// Where the client's packets arrive.
        member: MemberId,
        /// Where to.
        client: SocketAddr,
        /// Where from.
        server: SocketAddr,
        /// IP header fields.
        ip: IpMeta,
    },
}

impl Outbound {
    pub(super) fn member(&self) -> MemberId {
        match self {
            Self::Data { member, .. } | Self::Ingress { member, .. } | Self::IngressReply { member, .. } => *member,
        }
    }
}

/// The ring is full: the packet is dropped, and its worker counts it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Full;

/// The end that a worker holds.
pub struct BackboneOutbox {
    packets: Producer<(Outbound, usize)>,
    bytes: Producer<u8>,
    waker: Arc<Waker>,
    pushed: bool,
}

impl BackboneOutbox {
    /// Copies a packet, given in parts, into the ring.
    ///
    /// # Errors
    /// [`Full`].
    pub fn push(&mut self, what: Outbound, parts: [&[u8]; 2]) -> Result<(), Full> {
        let length = parts.iter().map(|part| part.len()).sum();
        if self.packets.slots() == 0 || self.bytes.slots() < length {
            return Err(Full);
        }
        // Bytes first: whoever sees the packet finds them all.
        for part in parts {
            self.bytes.push_entire_slice(part).map_err(|_| Full)?;
        }
        self.packets.push((what, length)).map_err(|_| Full)?;
        self.pushed = true;
        Ok(())
    }

    /// Wakes the backbone if it sleeps and anything was pushed since the last time: once a turn, behind the last push.
    pub fn wake(&mut self) {
        if std::mem::take(&mut self.pushed) {
            self.waker.wake_dozing();
        }
    }
}

/// The backbone's end.
pub(super) struct Inbox {
    packets: Consumer<(Outbound, usize)>,
    bytes: Consumer<u8>,
}

impl Inbox {
    /// What the next packet is, and how long. Its bytes are to be taken before the next call.
    pub(super) fn pop(&mut self) -> Option<(Outbound, usize)> {
        self.packets.pop().ok()
    }

    /// Appends that packet's bytes.
    pub(super) fn take(&mut self, length: usize, into: &mut BytesMut) {
        if let Ok(chunk) = self.bytes.read_chunk(length) {
            let (first, second) = chunk.as_slices();
            into.extend_from_slice(first);
            into.extend_from_slice(second);
            chunk.commit_all();
        }
    }

    /// Forgets that packet's bytes.
    pub(super) fn skip(&mut self, length: usize) {
        if let Ok(chunk) = self.bytes.read_chunk(length) {
            chunk.commit_all();
        }
    }

    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }
}

/// A ring for each of so many workers.
pub(super) fn rings(workers: usize, waker: &Arc<Waker>) -> (Vec<BackboneOutbox>, Vec<Inbox>) {
    let ring = |_| {
        let (packets, packets_end) = RingBuffer::new(PACKETS);
        let (bytes, bytes_end) = RingBuffer::new(BYTES);
        let outbox = BackboneOutbox { packets, bytes, waker: Arc::clone(waker), pushed: false };
        (outbox, Inbox { packets: packets_end, bytes: bytes_end })
    };
    (0..workers).map(ring).unzip()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(port: u16) -> Outbound {
        let address = SocketAddr::from(([192, 0, 2, 1], port));
        Outbound::Data { member: MemberId(1), source: address, destination: address, ip: IpMeta::default() }
    }

    fn ring() -> std::io::Result<(BackboneOutbox, Inbox)> {
        let (mut outboxes, mut inboxes) = rings(1, &Arc::new(Waker::new()?));
        Ok((outboxes.pop().expect("one worker"), inboxes.pop().expect("one worker")))
    }

    #[test]
    fn packets_cross_whole_and_in_order_around_the_end_of_the_ring() -> std::io::Result<()> {
        let (mut outbox, mut inbox) = ring()?;
        let long: Vec<u8> = (0..40_001u32).map(|value| value as u8).collect();
        let mut bytes = BytesMut::new();
        for round in 0..200 {
            outbox.push(data(round), [b"ab", &long]).expect("room");
            outbox.push(data(round), [b"skipped", b""]).expect("room");
            assert_eq!(inbox.pop(), Some((data(round), long.len() + 2)));
            inbox.take(long.len() + 2, &mut bytes);
            assert!(bytes.starts_with(b"ab") && bytes.ends_with(&long) && bytes.len() == long.len() + 2);
            bytes.clear();
            assert_eq!(inbox.pop(), Some((data(round), 7)));
            inbox.skip(7);
            assert!(inbox.pop().is_none() && inbox.is_empty());
        }
        Ok(())
    }

    #[test]
    fn a_full_ring_refuses_whole_packets() -> std::io::Result<()> {
        let (mut outbox, mut inbox) = ring()?;
        let pushed = |outbox: &mut BackboneOutbox, part: &[u8]| {
            (0..).take_while(|_| outbox.push(data(1), [part, b""]).is_ok()).count()
        };
        assert_eq!(pushed(&mut outbox, b"x"), PACKETS, "bounded in packets");
        while let Some((_, length)) = inbox.pop() {
            inbox.skip(length);
        }
        assert_eq!(pushed(&mut outbox, &[0; 65_000]), BYTES / 65_000, "bounded in bytes");
        Ok(())
    }
}
