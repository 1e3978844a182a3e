//! Rings between workers: single producer, single consumer, bounded, one for each ordered pair. A packet crosses as a
//! copy, with what it means to the worker that gets it.

use std::net::SocketAddr;
use std::sync::Arc;

use rtrb::{Consumer, Producer, RingBuffer};
use turn_core::{FiveTuple, IpMeta, MemberId, Path, PeerAddr};

use super::moved::Crossing;
use crate::sys::epoll::Waker;

/// Packets on their way in one ring.
const PACKETS: usize = 4096;
/// Bytes on their way to one worker, shared evenly among the others.
const BYTES: usize = 8 << 20;
/// A ring holds the longest datagram at least twice.
const LEAST_BYTES: usize = 128 << 10;

/// What a packet from another worker is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Meaning {
    /// It came from a client that this worker owns and the kernel delivered elsewhere.
    FromClient { from: FiveTuple, path: Path, ip: IpMeta },
    /// An allocation of the other worker, or of another member, sent it to a relayed address of this one.
    FromPeer { relayed: PeerAddr, from: PeerAddr, ip: IpMeta },
    /// It came from a client of this relay, at another member.
    Ingress { member: MemberId, client: SocketAddr, server: SocketAddr, ip: IpMeta },
    /// Another member has it for a client whose packets arrive here.
    IngressReply { member: MemberId, client: SocketAddr, server: SocketAddr, ip: IpMeta },
    /// It is of a client that has moved.
    Moved(Crossing),
}

/// The ring is full: the packet is dropped and counted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Full;

/// The end that sends to one worker.
pub(super) struct Outbox {
    packets: Producer<(Meaning, usize)>,
    bytes: Producer<u8>,
    waker: Arc<Waker>,
    pushed: bool,
}

impl Outbox {
    /// Copies a packet, given in parts, into the ring.
    pub(super) fn push(&mut self, meaning: Meaning, parts: [&[u8]; 3]) -> Result<(), Full> {
        let length = parts.iter().map(|part| part.len()).sum();
        if self.packets.slots() == 0 || self.bytes.slots() < length {
            return Err(Full);
        }
        // Bytes first: whoever sees the packet finds them all.
        for part in parts {
            self.bytes.push_entire_slice(part).map_err(|_| Full)?;
        }
        self.packets.push((meaning, length)).map_err(|_| Full)?;
        self.pushed = true;
        Ok(())
    }

    /// Wakes the other worker if it sleeps and anything was pushed since the last time: once a turn. One that is awake
    /// looks into its rings in each turn.
    pub(super) fn wake(&mut self) {
        if std::mem::take(&mut self.pushed) {
            self.waker.wake_dozing();
        }
    }
}

/// The end that receives from one worker.
pub(super) struct Inbox {
    packets: Consumer<(Meaning, usize)>,
    bytes: Consumer<u8>,
}

impl Inbox {
    /// Takes the next packet into `buffer`, which has room for the longest one. Says what it means and how long it is.
    pub(super) fn pop(&mut self, buffer: &mut [u8]) -> Option<(Meaning, usize)> {
        let (meaning, length) = self.packets.pop().ok()?;
        let buffer = buffer.get_mut(..length)?;
        self.bytes.pop_entire_slice(buffer).ok()?;
        Some((meaning, length))
    }

    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }
}

/// A ring to one worker from a thread that is none.
pub(super) fn pair(waker: &Arc<Waker>) -> (Outbox, Inbox) {
    let (packets, packets_end) = RingBuffer::new(PACKETS);
    let (bytes, bytes_end) = RingBuffer::new(BYTES);
    let outbox = Outbox { packets, bytes, waker: Arc::clone(waker), pushed: false };
    (outbox, Inbox { packets: packets_end, bytes: bytes_end })
}

/// The ends that one worker holds: outboxes by worker (none to itself), inboxes in no order.
pub(super) type Ends = (Vec<Option<Outbox>>, Vec<Inbox>);

/// Joins every worker with every other.
pub(super) fn mesh(wakers: &[Arc<Waker>]) -> Vec<Ends> {
    let others = wakers.len().saturating_sub(1).max(1);
    let bytes = (BYTES / others).max(LEAST_BYTES);
    let mut ends: Vec<Ends> = wakers.iter().map(|_| (Vec::new(), Vec::new())).collect();
    for from in 0..wakers.len() {
        for (to, waker) in wakers.iter().enumerate() {
            if from == to {
                ends[from].0.push(None);
                continue;
            }
            let (packets, packets_end) = RingBuffer::new(PACKETS);
            let (bytes, bytes_end) = RingBuffer::new(bytes);
            ends[from].0.push(Some(Outbox { packets, bytes, waker: Arc::clone(waker), pushed: false }));
            ends[to].1.push(Inbox { packets: packets_end, bytes: bytes_end });
        }
    }
    ends
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::time::Duration;

    use super::*;
    use crate::sys::epoll::{Epoll, Events, Interest};

    fn meaning(port: u16) -> Meaning {
        let address = |port| PeerAddr::new(([192, 0, 2, 1], port).into());
        Meaning::FromPeer { relayed: address(port), from: address(1), ip: IpMeta::default() }
    }

    fn pair() -> std::io::Result<(Outbox, Inbox, Arc<Waker>)> {
        let wakers = [Arc::new(Waker::new()?), Arc::new(Waker::new()?)];
        let mut ends = mesh(&wakers);
        let (_, mut inboxes) = ends.pop().expect("two workers");
        let (mut outboxes, _) = ends.pop().expect("two workers");
        let outbox = outboxes.pop().flatten().expect("to the second");
        let [_, waker] = wakers;
        Ok((outbox, inboxes.pop().expect("from the first"), waker))
    }

    #[test]
    fn packets_cross_whole_and_in_order_around_the_end_of_the_ring() -> std::io::Result<()> {
        let (mut outbox, mut inbox, _) = pair()?;
        let mut buffer = vec![0; 65_536];
        // 65,507 bytes are no divisor of the ring, so packets wrap at every position in the end.
        let long: Vec<u8> = (0..65_507u32).map(|value| value as u8).collect();
        for round in 0..400u16 {
            outbox.push(meaning(round), [b"ab", &long, b"c"]).expect("room");
            outbox.push(meaning(round), [b"", b"", b""]).expect("room");
            let (Meaning::FromPeer { relayed, .. }, length) = inbox.pop(&mut buffer).expect("there") else {
                panic!("not what was pushed");
            };
            assert_eq!((relayed.port(), length), (round, long.len() + 3));
            assert_eq!((&buffer[..2], &buffer[2..length - 1], buffer[length - 1]), (&b"ab"[..], &long[..], b'c'));
            assert_eq!(inbox.pop(&mut buffer).map(|(_, length)| length), Some(0));
            assert!(inbox.pop(&mut buffer).is_none());
        }
        Ok(())
    }

    #[test]
    fn a_full_ring_refuses_whole_packets() -> std::io::Result<()> {
        let (mut outbox, mut inbox, _) = pair()?;
        let mut buffer = vec![0; 65_536];
        let pushed = |outbox: &mut Outbox, part: &[u8]| {
            (0..).take_while(|_| outbox.push(meaning(1), [part, b"", b""]).is_ok()).count()
        };
        assert_eq!(pushed(&mut outbox, b"x"), PACKETS, "bounded in packets");
        while inbox.pop(&mut buffer).is_some() {}
        assert_eq!(pushed(&mut outbox, &[0; 65_000]), BYTES / 65_000, "bounded in bytes");
        assert_eq!(inbox.pop(&mut buffer).map(|(_, length)| length), Some(65_000), "what is in stays whole");
        Ok(())
    }

    #[test]
    fn the_other_worker_is_woken_once_and_only_if_it_sleeps() -> std::io::Result<()> {
        let (mut outbox, _inbox, waker) = pair()?;
        let woken = || {
            let mut count = [0; 8];
            let file = std::fs::File::from(waker.as_fd().try_clone_to_owned().expect("a copy"));
            std::io::Read::read(&mut &file, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
        };
        let push = |outbox: &mut Outbox| outbox.push(meaning(1), [b"x", b"", b""]).expect("room");
        push(&mut outbox);
        outbox.wake();
        assert_eq!(woken(), 0, "it is awake");
        waker.doze();
        outbox.wake();
        assert_eq!(woken(), 0, "nothing was pushed");
        for _ in 0..3 {
            push(&mut outbox);
            outbox.wake();
        }
        assert_eq!(woken(), 1);
        waker.doze();
        waker.rise();
        push(&mut outbox);
        outbox.wake();
        assert_eq!(woken(), 0, "it has got up by itself");
        Ok(())
    }

    #[test]
    fn no_packet_is_slept_through() -> std::io::Result<()> {
        const PACKETS: usize = 50_000;
        let (mut outbox, mut inbox, waker) = pair()?;
        let (epoll, mut events) = (Epoll::new()?, Events::with_capacity(1));
        epoll.add(waker.as_fd(), 0, Interest::Read)?;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for _ in 0..PACKETS {
                    while outbox.push(meaning(1), [b"x", b"", b""]).is_err() {
                        outbox.wake();
                        std::thread::yield_now();
                    }
                    outbox.wake();
                }
            });
            let (mut buffer, mut seen) = ([0; 64], 0);
            while seen < PACKETS {
                waker.doze();
                if inbox.is_empty() {
                    epoll.wait(&mut events, Some(Duration::from_secs(20)))?;
                    assert!(!events.is_empty(), "asleep with {} packets to come", PACKETS - seen);
                    waker.reset();
                }
                waker.rise();
                while inbox.pop(&mut buffer).is_some() {
                    seen += 1;
                }
            }
            Ok(())
        })
    }
}
