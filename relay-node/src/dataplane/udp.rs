//! Batched sends on datagram sockets: what goes to one destination leaves in one message that the kernel cuts
//! (UDP_SEGMENT), as far as the way there allows. (Batched receives are [`Packets::receive`].)

use std::net::IpAddr;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use turn_core::{AccountId, DropReason};

use super::counters::{Counters, Loss};
use super::outgoing::OutgoingQueue;
use super::packet::Packets;
use crate::sys::message::SendBatch;
use crate::sys::socket::{Fragmentation, set_fragmentation};

/// How long it is believed that a destination takes no message that is cut: routes and interfaces change.
const BELIEF: Duration = Duration::from_secs(60);
/// Destinations of which that is known; who has no place among them is asked again.
const REFUSALS: usize = 32;

/// Where messages that are cut are refused: the interface has no checksum offload, or the segments do not fit its MTU.
#[derive(Default)]
struct Refusals {
    /// Destination, the length from which on it refuses, how long that is believed.
    list: Vec<(IpAddr, u16, Instant)>,
    next: usize,
}

impl Refusals {
    /// Whether segments of a length may be tried.
    fn allow(&self, to: IpAddr, size: u16, now: Instant) -> bool {
        !self.list.iter().any(|(ip, from, until)| *ip == to && size >= *from && now < *until)
    }

    fn note(&mut self, to: IpAddr, size: u16, now: Instant) {
        let refusal = (to, size, now + BELIEF);
        if let Some(known) = self.list.iter_mut().find(|(ip, ..)| *ip == to) {
            let is_believed = now < known.2;
            *known = (to, if is_believed { known.1.min(size) } else { size }, refusal.2);
        } else if self.list.len() < REFUSALS {
            self.list.push(refusal);
        } else {
            self.list[self.next] = refusal;
            self.next = (self.next + 1) % REFUSALS;
        }
    }
}

/// Sends from a worker's sockets.
#[derive(Default)]
pub(super) struct Sender {
    batch: SendBatch,
    refusals: Refusals,
}

/// A socket to send by.
#[derive(Clone, Copy)]
pub(super) enum Way<'a> {
    /// To anybody.
    Open(BorrowedFd<'a>),
    /// To the one it is connected to.
    Connected(BorrowedFd<'a>),
}

/// What a turn sends.
#[derive(Clone, Copy)]
pub(super) struct Turn<'a> {
    pub(super) outgoing: &'a OutgoingQueue,
    pub(super) packets: &'a Packets,
    pub(super) now: Instant,
}

impl Sender {
    /// Sends a run by one socket; counts what the kernel took and what it did not. Never waits.
    pub(super) fn send_run(&mut self, way: Way<'_>, run: Range<usize>, turn: Turn<'_>, counters: &mut Counters) {
        let Turn { outgoing, packets, now } = turn;
        let (socket, is_connected) = match way {
            Way::Open(socket) => (socket, false),
            Way::Connected(socket) => (socket, true),
        };
        let mut next = run.start;
        let mut again = true;
        // Up to there each item is a message: together they were refused.
        let mut apart = next;
        while next < run.end {
            // Items of each message: at most 64.
            let mut joined = [0u8; SendBatch::CAPACITY];
            let mut position = next;
            let messages = joined.iter_mut().map_while(|joined| {
                let start = Some(position).filter(|start| *start < run.end)?;
                let mut joint = (1, None);
                if start >= apart && start + 1 < run.end {
                    joint = outgoing.joint(start, run.end, packets);
                    let refused = |size| !self.refusals.allow(outgoing.at(start).to.ip(), size, now);
                    if joint.1.is_some_and(refused) {
                        joint = (1, None);
                    }
                }
                *joined = joint.0 as u8;
                position += joint.0;
                Some(outgoing.message(start, joint, packets, is_connected))
            });
            let error = match self.batch.send(socket, messages) {
                Ok(taken) if taken > 0 => {
                    let end = next + joined[..taken].iter().map(|items| usize::from(*items)).sum::<usize>();
                    for position in next..end {
                        count(outgoing, packets, position, counters);
                    }
                    next = end;
                    again = true;
                    continue;
                }
                Ok(_) => None,
                Err(error) => error.raw_os_error(),
            };
            match error {
                Some(libc::EINTR) => {}
                Some(libc::EAGAIN | libc::ENOBUFS) | None => {
                    for _ in next..run.end {
                        counters.lost(Loss::SendBuffer);
                    }
                    return;
                }
                // An ICMP error for an earlier datagram is told to the next call, which then sends nothing.
                Some(_) if again => again = false,
                Some(code) if joined[0] > 1 => {
                    // EIO is of the interface, the others are of the length.
                    if matches!(code, libc::EIO | libc::EINVAL | libc::EMSGSIZE) {
                        let (_, size) = outgoing.joint(next, run.end, packets);
                        let size = size.filter(|_| code != libc::EIO).unwrap_or(0);
                        self.refusals.note(outgoing.at(next).to.ip(), size, now);
                    }
                    apart = next + usize::from(joined[0]);
                    again = true;
                }
                Some(code) => {
                    if code == libc::EMSGSIZE {
                        counters.dropped(DropReason::TooLong);
                    } else {
                        counters.lost(Loss::SendRefused);
                    }
                    next += 1;
                    again = true;
                }
            }
        }
    }

    /// Sends a run from a relayed address: DF is a matter of the socket, so it is set for those in a row that want it
    /// (RFC 8656 §14).
    pub(super) fn send_to_peers(
        &mut self,
        (socket, v6): (BorrowedFd<'_>, bool),
        run: Range<usize>,
        turn: Turn<'_>,
        counters: &mut Counters,
    ) {
        let outgoing = turn.outgoing;
        let mut next = run.start;
        while next < run.end {
            let end = outgoing.same_fragmentation(next, run.end);
            if !outgoing.at(next).dont_fragment {
                self.send_run(Way::Open(socket), next..end, turn, counters);
            } else if set_fragmentation(socket, v6, Fragmentation::Forbidden).is_ok() {
                self.send_run(Way::Open(socket), next..end, turn, counters);
                // What could be set can be set back.
                let _ = set_fragmentation(socket, v6, Fragmentation::Allowed);
            } else {
                (next..end).for_each(|_| counters.lost(Loss::SendRefused));
            }
            next = end;
        }
    }
}

/// Counts an item that has left, and charges it.
pub(super) fn count(outgoing: &OutgoingQueue, packets: &Packets, position: usize, counters: &mut Counters) {
    if let Some((bytes, account)) = count_unpaid(outgoing, packets, position, counters)
        && let Some(direction) = outgoing.at(position).direction
    {
        counters.pay(direction, 1, bytes as u64, account);
    }
}

/// Counts an item that is on its way. What is to be charged for it once it has left, if it is application data.
pub(super) fn count_unpaid(
    outgoing: &OutgoingQueue,
    packets: &Packets,
    position: usize,
    counters: &mut Counters,
) -> Option<(usize, AccountId)> {
    let item = outgoing.at(position);
    let [_, body, _] = outgoing.parts(item, packets);
    match item.direction {
        Some(direction) => counters.relayed(direction, body.len()),
        None => counters.answered(body),
    }
    item.direction.map(|_| (body.len(), item.account))
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::net::{SocketAddr, UdpSocket};
    use std::os::fd::AsFd;

    use turn_core::{AccountId, Head};

    use super::*;
    use crate::dataplane::counters::Direction;
    use crate::dataplane::outgoing::{Outgoing, Target};
    use crate::sys::socket::{receive_errors, send_without_checksums};

    fn queue(datagrams: &[(SocketAddr, Vec<u8>)]) -> OutgoingQueue {
        let mut queue = OutgoingQueue::default();
        for (to, bytes) in datagrams {
            let body = queue.copy_reply(bytes);
            let outgoing = Outgoing {
                to: *to,
                from: None,
                tos: 0,
                dont_fragment: false,
                head: Head::EMPTY,
                body,
                padding: 0,
                direction: Some(Direction::ToPeer),
                account: AccountId::NONE,
            };
            queue.push(Target::Relayed(0), outgoing);
        }
        queue.sort();
        queue
    }

    fn send(sender: &mut Sender, socket: &UdpSocket, queue: &OutgoingQueue, now: Instant) -> Counters {
        let (packets, mut counters) = (Packets::new(), Counters::default());
        let turn = Turn { outgoing: queue, packets: &packets, now };
        sender.send_run(Way::Open(socket.as_fd()), 0..queue.len(), turn, &mut counters);
        counters
    }

    fn receiver() -> io::Result<UdpSocket> {
        let receiver = UdpSocket::bind("127.0.0.1:0")?;
        receiver.set_nonblocking(true)?;
        Ok(receiver)
    }

    fn arrived(receiver: &UdpSocket) -> Vec<Vec<u8>> {
        let mut buffer = vec![0; 65_536];
        std::iter::from_fn(|| receiver.recv(&mut buffer).ok().map(|length| buffer[..length].to_vec())).collect()
    }

    #[test]
    fn a_refused_datagram_takes_no_other_with_it() -> io::Result<()> {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        receive_errors(socket.as_fd(), false)?;
        let receiver = receiver()?;
        let to = receiver.local_addr()?;
        let closed = UdpSocket::bind("127.0.0.1:0")?.local_addr()?;
        let broadcast = "255.255.255.255:9".parse().expect("literal");
        let queue = queue(&[
            (to, b"first".to_vec()),
            (closed, b"nobody".to_vec()),
            (to, b"second".to_vec()),
            (to, vec![0; 65_535]),
            // Together they are refused as each of them is.
            (broadcast, b"broadcast".to_vec()),
            (broadcast, b"broadcast".to_vec()),
            (to, b"third".to_vec()),
        ]);
        let snapshot = send(&mut Sender::default(), &socket, &queue, Instant::now()).snapshot();
        assert_eq!(arrived(&receiver), [&b"first"[..], b"second", b"third"]);
        assert_eq!((snapshot.packets, snapshot.bytes), ([4, 0], [5 + 6 + 6 + 5, 0]));
        assert_eq!(snapshot.dropped, [("too_long", 1), ("send_refused", 2)]);
        Ok(())
    }

    #[test]
    fn bursts_of_several_destinations_arrive_whole_and_in_order() -> io::Result<()> {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        let receivers = [receiver()?, receiver()?, receiver()?];
        let mut datagrams = Vec::new();
        for number in 0..150u8 {
            let to = receivers[usize::from(number) % 3].local_addr()?;
            // Some are shorter, one is longer, one is empty.
            let length = [100, 100, 100, 100, 40, 100, 120, 0][usize::from(number / 3) % 8];
            datagrams.push((to, vec![number; length]));
        }
        let counters = send(&mut Sender::default(), &socket, &queue(&datagrams), Instant::now());
        for receiver in &receivers {
            let to = receiver.local_addr()?;
            let expected: Vec<_> =
                datagrams.iter().filter(|(at, _)| *at == to).map(|(_, bytes)| bytes.clone()).collect();
            assert_eq!(arrived(receiver), expected);
        }
        let bytes: usize = datagrams.iter().map(|(_, bytes)| bytes.len()).sum();
        assert_eq!((counters.snapshot().packets, counters.snapshot().bytes), ([150, 0], [bytes as u64, 0]));
        Ok(())
    }

    #[test]
    fn where_nothing_can_be_cut_nothing_is_lost_and_it_is_learnt() -> io::Result<()> {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        send_without_checksums(socket.as_fd())?;
        let receiver = receiver()?;
        let to = receiver.local_addr()?;
        let datagrams: Vec<_> = (0..100u8).map(|number| (to, vec![number; 200])).collect();
        let (mut sender, start) = (Sender::default(), Instant::now());
        for round in 0..2 {
            let counters = send(&mut sender, &socket, &queue(&datagrams), start);
            let expected: Vec<_> = datagrams.iter().map(|(_, bytes)| bytes.clone()).collect();
            assert_eq!(arrived(&receiver), expected, "round {round}");
            assert_eq!(counters.snapshot().packets, [100, 0]);
            assert!(counters.snapshot().dropped.is_empty());
        }
        let asked = |size, after| sender.refusals.allow(to.ip(), size, start + after);
        assert!(!asked(200, Duration::ZERO) && asked(199, Duration::ZERO), "shorter ones may pass");
        assert!(asked(200, BELIEF), "for a while");
        Ok(())
    }

    #[test]
    fn refusals_are_bounded() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        let ip = |number: u8| IpAddr::from([192, 0, 2, number]);
        for number in 0..200 {
            refusals.note(ip(number), 1200, now);
            assert!(!refusals.allow(ip(number), 1200, now));
        }
        assert!(refusals.list.len() <= REFUSALS && refusals.allow(ip(0), 1200, now), "the oldest is forgotten");
        refusals.note(ip(199), 0, now);
        refusals.note(ip(199), 1400, now);
        assert!(!refusals.allow(ip(199), 1, now), "the strictest counts");
    }
}
