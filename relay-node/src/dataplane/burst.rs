//! Bursts of relayed addresses that share a socket: segmentation offload knows no raw sockets, so a relayed address that
//! sends many packets to one peer at a time has a socket to send by, and only to send.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::ops::Range;
use std::os::fd::AsFd;

use turn_core::Transport;

use super::listen::new_socket;
use super::relayed::Relayed;
use super::udp::{Turn, Way};
use super::worker::Worker;
use crate::sys::link::set_freebind;
use crate::sys::socket::{Fragmentation, set_fragmentation};

/// Packets to one peer from which on one message of segments costs less than as many raw datagrams.
const LEAST: usize = 4;
/// Sockets that a worker has open for this. The oldest makes room: it is opened again when it is needed.
const OPEN: usize = 1024;

/// Which relayed addresses of a worker have such a socket, the oldest first. A key may have become another's.
#[derive(Default)]
pub(super) struct Senders(VecDeque<usize>);

impl Worker {
    /// The next items between two positions that are to leave as one message; nothing at `end` if there are none.
    pub(super) fn next_burst(&self, start: usize, end: usize) -> Range<usize> {
        let mut next = start;
        while next + LEAST <= end {
            let (count, _) = self.outgoing.joint(next, end, &self.packets);
            if count >= LEAST {
                return next..next + count;
            }
            next += count;
        }
        end..end
    }

    /// Sends items of one relayed address to one peer, and counts what the kernel took and what it did not; or says that
    /// it has no socket to send them by.
    pub(super) fn send_burst(&mut self, items: Range<usize>, senders: &mut Senders) -> bool {
        let Some(entry) = self.outgoing.relayed(items.start).and_then(|key| self.relayed.sender(key, senders)) else {
            return false;
        };
        let turn = Turn { outgoing: &self.outgoing, packets: &self.packets, now: self.now.mono };
        self.sender.send_run(Way::Open(entry.as_fd()), items, turn, &mut self.counters);
        true
    }
}

impl Relayed {
    fn sender(&mut self, key: usize, senders: &mut Senders) -> Option<&UdpSocket> {
        if self.socket(key)?.sender.is_none() {
            let opened = open(self.socket(key)?.relayed.bound).ok()?;
            if senders.0.len() >= OPEN
                && let Some(oldest) = senders.0.pop_front().and_then(|oldest| self.socket_mut(oldest))
            {
                oldest.sender = None;
            }
            senders.0.push_back(key);
            self.socket_mut(key)?.sender = Some(opened);
        }
        self.socket(key)?.sender.as_ref()
    }
}

/// A socket that sends from an address. What arrives there and is not steered is from nobody who may, and nobody reads
/// it: there is room for one datagram.
fn open(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = new_socket(Transport::Udp, address)?;
    socket.set_recv_buffer_size(1)?;
    set_fragmentation(socket.as_fd(), address.is_ipv6(), Fragmentation::Allowed)?;
    set_freebind(socket.as_fd(), address.is_ipv6())?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}
