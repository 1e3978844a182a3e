//! Batched sends on datagram sockets. (Batched receives are [`Packets::receive`].)

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use turn_core::DropReason;

use super::counters::{Counters, Loss};
use super::outgoing::OutgoingQueue;
use super::packet::Packets;
use crate::sys::message::SendBatch;
use crate::sys::socket::{Fragmentation, set_fragmentation};

/// Sends a run by one socket; counts what the kernel took and what it did not. Never waits.
pub(super) fn send_run(
    batch: &mut SendBatch,
    socket: BorrowedFd<'_>,
    outgoing: &OutgoingQueue,
    packets: &Packets,
    run: Range<usize>,
    counters: &mut Counters,
) {
    let mut next = run.start;
    let mut again = true;
    while next < run.end {
        let rest = next..run.end;
        let error = match batch.send(socket, rest.map(|position| outgoing.datagram(position, packets))) {
            Ok(taken) if taken > 0 => {
                for position in next..next + taken {
                    count(outgoing, packets, position, counters);
                }
                next += taken;
                again = true;
                continue;
            }
            Ok(_) => io::ErrorKind::WouldBlock.into(),
            Err(error) => error,
        };
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EAGAIN | libc::ENOBUFS) | None => {
                for _ in next..run.end {
                    counters.lost(Loss::SendBuffer);
                }
                return;
            }
            // An ICMP error for an earlier datagram is told to the next call, which then sends nothing.
            Some(_) if again => again = false,
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
    socket: BorrowedFd<'_>,
    v6: bool,
    run: Range<usize>,
    (batch, outgoing, packets, counters): (&mut SendBatch, &OutgoingQueue, &Packets, &mut Counters),
) {
    let mut next = run.start;
    while next < run.end {
        let end = outgoing.same_fragmentation(next, run.end);
        if !outgoing.at(next).dont_fragment {
            send_run(batch, socket, outgoing, packets, next..end, counters);
        } else if set_fragmentation(socket, v6, Fragmentation::Forbidden).is_ok() {
            send_run(batch, socket, outgoing, packets, next..end, counters);
            // What could be set can be set back.
            let _ = set_fragmentation(socket, v6, Fragmentation::Allowed);
        } else {
            (next..end).for_each(|_| counters.lost(Loss::SendRefused));
        }
        next = end;
    }
}

/// Counts an item that has left.
pub(super) fn count(outgoing: &OutgoingQueue, packets: &Packets, position: usize, counters: &mut Counters) {
    let item = outgoing.at(position);
    let [_, body, _] = outgoing.parts(item, packets);
    match item.direction {
        Some(direction) => counters.relayed(direction, body.len()),
        None => counters.answered(body),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, UdpSocket};
    use std::os::fd::AsFd;

    use turn_core::Head;

    use super::*;
    use crate::dataplane::counters::Direction;
    use crate::dataplane::outgoing::{Outgoing, Target};
    use crate::sys::socket::receive_errors;

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
            };
            queue.push(Target::Relayed(0), outgoing);
        }
        queue.sort();
        queue
    }

    #[test]
    fn a_refused_datagram_takes_no_other_with_it() -> io::Result<()> {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        receive_errors(socket.as_fd(), false)?;
        let receiver = UdpSocket::bind("127.0.0.1:0")?;
        receiver.set_nonblocking(true)?;
        let to = receiver.local_addr()?;
        let closed = UdpSocket::bind("127.0.0.1:0")?.local_addr()?;
        let queue = queue(&[
            (to, b"first".to_vec()),
            (closed, b"nobody".to_vec()),
            (to, b"second".to_vec()),
            (to, vec![0; 65_535]),
            ("255.255.255.255:9".parse().expect("literal"), b"broadcast".to_vec()),
            (to, b"third".to_vec()),
        ]);
        let (packets, mut counters) = (Packets::new(), Counters::default());
        send_run(&mut SendBatch::new(), socket.as_fd(), &queue, &packets, 0..6, &mut counters);
        let mut buffer = [0; 16];
        for expected in [&b"first"[..], b"second", b"third"] {
            let length = receiver.recv(&mut buffer)?;
            assert_eq!(&buffer[..length], expected);
        }
        let snapshot = counters.snapshot();
        assert_eq!((snapshot.packets, snapshot.bytes), ([4, 0], [5 + 6 + 6 + 5, 0]));
        assert_eq!(snapshot.dropped, [("too_long", 1), ("send_refused", 1)]);
        Ok(())
    }
}
