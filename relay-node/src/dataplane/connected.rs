//! Relayed addresses that keep sending to one peer: beside their socket they get another one, at the same address and
//! connected to that peer. For what leaves by it the kernel looks up neither route nor source; what the peer sends
//! comes in by it. Other peers are served by the first socket, as before.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::ops::Range;
use std::os::fd::AsRawFd;

use socket2::SockRef;

use super::outgoing::{Outgoing, OutgoingQueue, few_bits};
use super::relayed::{self, Relayed};
use super::worker::{Token, Worker};
use crate::sys::process::descriptor_limit;

/// Packets in a row to one peer, at first: a second of audio. Each time they are for another one than before it takes
/// twice as many.
const EVIDENCE: u16 = 50;
/// Such sockets of a worker.
const OPEN: usize = 4096;

/// The socket for one peer.
pub(super) struct Connected {
    peer: SocketAddr,
    pub(super) socket: UdpSocket,
}

/// Whom a relayed address sends to, and how often in a row.
pub(super) struct Habit {
    peer: u16,
    packets: u16,
    evidence: u16,
}

impl Habit {
    pub(super) fn new() -> Self {
        Self { peer: 0, packets: 0, evidence: EVIDENCE }
    }

    /// So many packets more have left for a peer. Whether it is the one to connect to.
    fn learn(&mut self, to: SocketAddr, packets: usize) -> bool {
        // Others with the same bits are taken for it, which costs a socket.
        let peer = few_bits(to) as u16;
        if peer != self.peer {
            (self.peer, self.packets) = (peer, 0);
        }
        self.packets = self.packets.saturating_add(u16::try_from(packets).unwrap_or(u16::MAX));
        let is_proved = self.packets >= self.evidence;
        if is_proved {
            (self.packets, self.evidence) = (0, self.evidence.saturating_mul(2));
        }
        is_proved
    }
}

/// Those of a worker.
#[derive(Default)]
pub(super) struct Connections {
    /// Keys and peers to connect once nothing is on its way.
    proved: Vec<(usize, SocketAddr)>,
    open: usize,
}

impl Connections {
    /// An address has let go of its socket, if it had one.
    pub(super) fn closed(&mut self, was_open: bool) {
        self.open -= usize::from(was_open);
    }
}

impl Relayed {
    /// The socket that is connected to where a run of packets goes, if there is one.
    pub(super) fn connected(&self, key: usize, outgoing: &OutgoingQueue, mut run: Range<usize>) -> Option<&UdpSocket> {
        let connected = self.socket(key)?.connected.as_deref()?;
        let fits = |item: &Outgoing| item.to == connected.peer && item.tos == 0 && !item.dont_fragment;
        // What differs in an IP header field takes the way through the lookups anyway.
        run.all(|position| fits(outgoing.at(position))).then_some(&connected.socket)
    }

    /// Takes note of a run of packets that has left by the first socket.
    pub(super) fn learn(&mut self, key: usize, outgoing: &OutgoingQueue, run: Range<usize>) {
        let to = outgoing.at(run.start).to;
        if run.clone().all(|position| outgoing.at(position).to == to)
            && let Some(entry) = self.socket_mut(key)
            && entry.habit.learn(to, run.len())
        {
            self.connections.proved.push((key, to));
        }
    }

    fn connect_to(&mut self, key: usize, peer: SocketAddr) -> io::Result<()> {
        if self.connections.open >= OPEN {
            return Ok(());
        }
        let Some(entry) = self.socket(key) else { return Ok(()) };
        let Some(first) = &entry.socket else { return Ok(()) };
        let socket = open(first, entry.relayed.bound, peer)?;
        self.watch(&socket, Token::Connected(key))?;
        if let Some(entry) = self.socket_mut(key) {
            entry.connected = Some(Box::new(Connected { peer, socket }));
            self.connections.open += 1;
        }
        Ok(())
    }
}

impl Worker {
    /// Connects what was found to be worth it. Between turns: what still waits in a socket that makes room is taken.
    pub(super) fn connect_proved(&mut self) {
        while let Some((key, peer)) = self.relayed.connections.proved.pop() {
            if self.relayed.socket(key).is_some_and(|entry| entry.connected.is_some()) {
                loop {
                    let room = self.packets.room();
                    self.receive_from_peers(key, true);
                    if self.packets.room() == room {
                        break;
                    }
                }
                let before = self.relayed.socket_mut(key).and_then(|entry| entry.connected.take());
                self.relayed.connections.closed(before.is_some());
            }
            // Without it everything goes on by the first socket.
            let _ = self.relayed.connect_to(key, peer);
        }
    }
}

/// A socket beside the first one at an address, connected.
fn open(first: &UdpSocket, bound: SocketAddr, peer: SocketAddr) -> io::Result<UdpSocket> {
    // Only in here two may have the address, so that nobody else takes a port that is in use.
    SockRef::from(first).set_reuse_address(true)?;
    let opened = relayed::open_beside(bound).and_then(|socket| {
        socket.connect(peer)?;
        SockRef::from(&socket).set_reuse_address(false)?;
        Ok(socket)
    });
    SockRef::from(first).set_reuse_address(false)?;
    // Half of the descriptors are for allocations.
    let is_scarce = |socket: &UdpSocket| u64::try_from(socket.as_raw_fd()).is_ok_and(|fd| fd > descriptor_limit() / 2);
    opened.and_then(|socket| if is_scarce(&socket) { Err(io::ErrorKind::QuotaExceeded.into()) } else { Ok(socket) })
}
