//! One socket of each family per worker for all relayed addresses, where the machine allows: a BPF program steers
//! datagrams for allocated ports to it (`sys/steering.rs`), and what relayed addresses send leaves by a raw socket with
//! headers of our own (`sys/raw.rs`). A port then costs no descriptor, and a turn no system call for each.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use anyhow::Context;
use socket2::{Domain, Socket, Type};
use turn_core::{Input, PeerAddr, RelayedAddr, Transport};

use super::DataplaneConfig;
use super::burst::Senders;
use super::counters::Loss;
use super::listen::new_socket;
use super::outgoing::{Outgoing, OutgoingQueue};
use super::packet::Packets;
use super::relayed::{self, Relayed};
use super::udp::{self, Turn};
use super::worker::{Token, Worker};
use crate::sys::link::set_freebind;
use crate::sys::raw::{RawBatch, RawDatagram, open_icmp, open_raw, receive_raw_icmp};
use crate::sys::socket::{IcmpError, receive_coalesced, receive_destination, receive_icmp, set_buffers};
use crate::sys::steering::Steering;

/// Receive buffer asked for: a burst of every peer of a worker while it turns its loop.
const RECEIVE_BUFFER: i32 = 16 << 20;
/// Datagrams taken before others have their turn.
const BUDGET: usize = 64;
/// ICMP errors taken before others have their turn.
const ERRORS: usize = 16;

const PORTS: usize = 1 << 16;
/// How long a port that was free is taken for free.
const PROBE_SECONDS: u32 = 60;

/// How relayed addresses of UDP are held.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum RelayedMode {
    /// As [`RelayedMode::Wildcard`] where this process may and the kernel can, else as [`RelayedMode::Sockets`].
    Auto,
    /// A socket each.
    #[default]
    Sockets,
    /// A socket of each family per worker. It takes CAP_BPF, CAP_NET_ADMIN and CAP_NET_RAW, and Linux 5.11.
    Wildcard,
}

/// The sockets of a worker.
pub(super) struct Wildcard {
    worker: usize,
    steering: Arc<Steering>,
    probes: Arc<Probes>,
    /// IPv4 first.
    places: [Option<Place>; 2],
    batch: RawBatch,
    senders: Senders,
    /// What the kernel said at once about a datagram, to be handed in with the next turn.
    told: Vec<(RelayedAddr, IcmpError)>,
}

/// The sockets of a family.
struct Place {
    receiver: UdpSocket,
    raw: Socket,
    icmp: Socket,
    /// The system's TTL or hop limit.
    ttl: u8,
}

/// When each port was last seen to be free. A program that binds one later goes unnoticed, for as long as an allocation
/// lasts: a look is good for a while after it, too, and costs three system calls.
struct Probes {
    start: Instant,
    /// Seconds since the start, plus one; of IPv4 first.
    seen: Box<[AtomicU32]>,
}

impl Probes {
    fn new() -> Self {
        Self { start: Instant::now(), seen: (0..2 * PORTS).map(|_| AtomicU32::new(0)).collect() }
    }

    fn probe(&self, address: SocketAddr, now: Instant) -> io::Result<()> {
        let seen = &self.seen[usize::from(address.is_ipv6()) * PORTS + usize::from(address.port())];
        let seconds = u32::try_from(now.saturating_duration_since(self.start).as_secs()).unwrap_or(u32::MAX - 1);
        let last = seen.load(Ordering::Relaxed);
        if last != 0 && seconds - (last - 1).min(seconds) < PROBE_SECONDS {
            return Ok(());
        }
        let socket = new_socket(Transport::Udp, address)?;
        set_freebind(socket.as_fd(), address.is_ipv6())?;
        socket.bind(&address.into())?;
        seen.store(seconds + 1, Ordering::Relaxed);
        Ok(())
    }
}

/// The sockets of each worker, the last one first; none where each relayed address is to have its own.
///
/// # Errors
/// What is in the way, on one line, where nothing else is wanted.
pub(super) fn open(config: &DataplaneConfig) -> anyhow::Result<Vec<Wildcard>> {
    if config.relayed == RelayedMode::Sockets || !config.public_ports {
        return Ok(Vec::new());
    }
    let relay_ips: Vec<IpAddr> = config.relay_ips.iter().map(|ip| ip.bound).collect();
    match open_all(&relay_ips, config.workers) {
        Ok(all) => {
            tracing::info!("relayed addresses share one socket per worker");
            Ok(all)
        }
        Err(error) if config.relayed == RelayedMode::Auto => {
            tracing::info!("each relayed address has a socket of its own: {error:#}");
            Ok(Vec::new())
        }
        Err(error) => Err(error),
    }
}

/// Whether these relay IPs can be served by one socket.
///
/// # Errors
/// What is in the way, on one line.
pub fn check(relay_ips: &[IpAddr]) -> anyhow::Result<()> {
    open_all(relay_ips, 1).map(drop)
}

fn open_all(relay_ips: &[IpAddr], workers: u16) -> anyhow::Result<Vec<Wildcard>> {
    const NEEDED: &str = "it takes CAP_BPF, CAP_NET_ADMIN and CAP_NET_RAW, and Linux 5.11";
    let mut by_worker = Vec::new();
    for _ in 0..workers {
        let mut places = [None, None];
        for ip in relay_ips {
            let place = Place::open(*ip).with_context(|| format!("cannot open a raw socket ({NEEDED})"))?;
            places[usize::from(ip.is_ipv6())] = Some(place);
        }
        by_worker.push(places);
    }
    let receivers = by_worker.iter().enumerate().flat_map(|(worker, places)| {
        let of_family = places.iter().enumerate();
        of_family.filter_map(move |(family, place)| Some((worker, family == 1, &place.as_ref()?.receiver)))
    });
    let steering = Steering::attach(relay_ips, receivers).with_context(|| format!("no sk_lookup ({NEEDED})"))?;
    let (steering, probes) = (Arc::new(steering), Arc::new(Probes::new()));
    let with_places = |(worker, places)| {
        let (batch, senders, told) = (RawBatch::new(), Senders::default(), Vec::new());
        Wildcard { worker, steering: Arc::clone(&steering), probes: Arc::clone(&probes), places, batch, senders, told }
    };
    Ok(by_worker.into_iter().enumerate().rev().map(with_places).collect())
}

impl Place {
    fn open(ip: IpAddr) -> io::Result<Self> {
        let v6 = ip.is_ipv6();
        // Where it is bound does not matter to what is steered to it; of what comes there by itself nothing is taken.
        let anywhere = if v6 { IpAddr::from(Ipv6Addr::LOCALHOST) } else { Ipv4Addr::LOCALHOST.into() };
        let anywhere = SocketAddr::new(anywhere, 0);
        let receiver = Socket::new(Domain::for_address(anywhere), Type::DGRAM, None)?;
        let ttl = if v6 { receiver.unicast_hops_v6()? } else { receiver.ttl_v4()? };
        if v6 {
            receiver.set_recv_tclass_v6(true)?;
        } else {
            receiver.set_recv_tos_v4(true)?;
        }
        receive_destination(receiver.as_fd(), v6)?;
        receive_coalesced(receiver.as_fd())?;
        set_buffers(receiver.as_fd(), RECEIVE_BUFFER)?;
        receiver.set_nonblocking(true)?;
        set_freebind(receiver.as_fd(), v6)?;
        receiver.bind(&anywhere.into())?;
        let ttl = u8::try_from(ttl).unwrap_or(u8::MAX);
        Ok(Self { receiver: receiver.into(), raw: open_raw(ip)?, icmp: open_icmp(ip)?, ttl })
    }
}

impl Wildcard {
    /// What is to be watched for something to read.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = (BorrowedFd<'_>, Token)> {
        let places = self.places.iter().enumerate();
        places.filter_map(|(family, place)| Some((family, place.as_ref()?))).flat_map(|(family, place)| {
            [(place.receiver.as_fd(), Token::Steered(family)), (place.icmp.as_fd(), Token::SteeredErrors(family))]
        })
    }

    /// Makes sure that no other program has a port.
    ///
    /// # Errors
    /// As bind(2).
    pub(super) fn probe(&self, address: SocketAddr) -> io::Result<()> {
        self.probes.probe(address, Instant::now())
    }

    /// Has what permitted peers send to a relayed address.
    pub(super) fn steer(&self, relayed: RelayedAddr) {
        self.steering.steer(relayed.bound, self.worker);
    }

    /// No more.
    pub(super) fn let_go(&self, relayed: RelayedAddr) {
        self.steering.let_go(relayed.bound);
    }

    /// See [`turn_core::Output::Permit`].
    pub(super) fn permit(&self, relayed: RelayedAddr, peer: IpAddr, until: Instant) {
        self.steering.permit(relayed.bound, peer, until);
    }

    /// See [`turn_core::Output::Forbid`].
    pub(super) fn forbid(&self, relayed: RelayedAddr, peer: IpAddr) {
        self.steering.forbid(relayed.bound, peer);
    }

    /// Whether the next turn has something to hand in.
    pub(super) fn has_told(&self) -> bool {
        !self.told.is_empty()
    }
}

/// An item of the queue, as the raw socket of its family takes it.
fn datagram<'a>(
    places: &[Option<Place>; 2],
    position: usize,
    (outgoing, packets, relayed): (&'a OutgoingQueue, &'a Packets, &Relayed),
) -> Option<RawDatagram<'a>> {
    let from = relayed.socket(outgoing.relayed(position)?)?.relayed.bound;
    let ttl = places[usize::from(from.is_ipv6())].as_ref()?.ttl;
    let &Outgoing { to, tos, dont_fragment, .. } = outgoing.at(position);
    Some(RawDatagram { from, to, tos, ttl, dont_fragment, parts: outgoing.wire(position, packets) })
}

impl Worker {
    /// Datagrams for relayed addresses.
    pub(super) fn receive_steered(&mut self, family: usize) {
        let Some(place) = self.relayed.wildcard.as_ref().and_then(|wildcard| wildcard.places[family].as_ref()) else {
            return;
        };
        let offered = BUDGET.min(self.packets.room());
        let Ok(slots) = self.packets.receive(place.receiver.as_fd(), offered) else {
            return;
        };
        for slot in slots {
            let Some((received, destination)) = self.packets.received(slot).zip(self.packets.destination(slot)) else {
                continue;
            };
            // It may have ended while this waited.
            let Some(relayed) = self.relayed.steered(destination) else {
                continue;
            };
            self.feed_from_peer(relayed, &received);
        }
    }

    /// ICMP errors for what relayed addresses sent (RFC 8656 §11.5). Every worker hears of all, and takes its own.
    pub(super) fn receive_steered_errors(&mut self, family: usize) {
        for _ in 0..ERRORS {
            let place = self.relayed.wildcard.as_ref().and_then(|wildcard| wildcard.places[family].as_ref());
            let Some(Ok(told)) = place.map(|place| receive_raw_icmp(&place.icmp, family == 1)) else {
                return;
            };
            if let Some((from, error)) = told
                && let Some(relayed) = self.relayed.steered(from)
            {
                self.handle(icmp(relayed, error));
            }
        }
    }

    /// Hands in what the kernel said in the turn before.
    pub(super) fn tell_steered(&mut self) {
        let told = self.relayed.wildcard.as_mut().map(|wildcard| std::mem::take(&mut wildcard.told));
        for (relayed, error) in told.into_iter().flatten() {
            self.handle(icmp(relayed, error));
        }
    }

    /// Sends items from relayed addresses that have no socket; counts what the kernel took and what it did not. Never
    /// waits.
    pub(super) fn send_steered(&mut self, run: Range<usize>) {
        let Some(mut wildcard) = self.relayed.wildcard.take() else {
            return;
        };
        let Wildcard { places, batch, told, senders, .. } = &mut *wildcard;
        let mut next = run.start;
        if self.fence.is_up() {
            // The kernel would let it leave from an address that is another machine's now.
            (next..run.end).for_each(|_| self.counters.lost(Loss::Fenced));
            next = run.end;
        }
        let mut burst = self.next_burst(next, run.end);
        while next < run.end {
            if burst.start == next {
                if self.send_burst(burst.clone(), senders) {
                    next = burst.end;
                }
                burst = self.next_burst(burst.end, run.end);
                continue;
            }
            let queue = (&self.outgoing, &self.packets, &self.relayed);
            let first = datagram(places, next, queue);
            let v6 = first.is_some_and(|first| first.to.is_ipv6());
            let place = places[usize::from(v6)].as_ref().filter(|_| first.is_some());
            let sent = match place {
                Some(place) => {
                    // One that is too long ends the batch, and what begins with it is empty.
                    let alike = |datagram: &RawDatagram<'_>| datagram.to.is_ipv6() == v6 && datagram.is_short_enough();
                    let rest = (next..burst.start).map_while(|at| datagram(places, at, queue).filter(alike));
                    batch.send(place.raw.as_fd(), rest)
                }
                // It ended within this turn; what it sent leaves before, so this does not happen.
                None => Err(io::Error::from_raw_os_error(libc::EBADF)),
            };
            let error = match sent {
                Ok(taken) if taken > 0 => {
                    let taken = next..next + taken;
                    next = taken.end;
                    taken.for_each(|at| udp::count(&self.outgoing, &self.packets, at, &mut self.counters));
                    continue;
                }
                Ok(_) => libc::EAGAIN,
                Err(error) => error.raw_os_error().unwrap_or(libc::EAGAIN),
            };
            match error {
                libc::EINTR => {}
                libc::EAGAIN | libc::ENOBUFS => {
                    (next..run.end).for_each(|_| self.counters.lost(Loss::SendBuffer));
                    break;
                }
                libc::EMSGSIZE => {
                    self.send_long(next, v6, told);
                    next += 1;
                }
                _ => {
                    self.counters.lost(Loss::SendRefused);
                    next += 1;
                }
            }
        }
        self.unfinished |= wildcard.has_told();
        self.relayed.wildcard = Some(wildcard);
    }

    /// Sends an item that is too long for one packet, or may be: by a socket of its own, which knows how to fragment it
    /// and what it may not.
    fn send_long(&mut self, position: usize, v6: bool, told: &mut Vec<(RelayedAddr, IcmpError)>) {
        let relayed = self.outgoing.relayed(position).and_then(|key| Some(self.relayed.socket(key)?.relayed));
        let Some((relayed, Ok(socket))) = relayed.map(|relayed| (relayed, relayed::open(relayed.bound))) else {
            self.counters.lost(Loss::SendRefused);
            return;
        };
        let turn = Turn { outgoing: &self.outgoing, packets: &self.packets, now: self.now.mono };
        self.sender.send_to_peers((socket.as_fd(), v6), position..position + 1, turn, &mut self.counters);
        while let Ok(error) = receive_icmp(socket.as_fd()) {
            told.extend(error.map(|error| (relayed, error)));
        }
    }
}

fn icmp(relayed: RelayedAddr, error: IcmpError) -> Input<'static> {
    let IcmpError { destination, kind, code, mtu } = error;
    Input::Icmp { relayed, peer: PeerAddr::new(destination), kind, code, mtu }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_port_is_looked_at_again_after_a_while_and_a_taken_one_each_time() {
        let probes = Probes::new();
        let foreign = UdpSocket::bind("127.0.0.1:0").expect("a port");
        let address = foreign.local_addr().expect("bound");
        let after = |seconds| probes.probe(address, probes.start + Duration::from_secs(seconds));
        for _ in 0..2 {
            assert_eq!(after(0).expect_err("another program's").kind(), io::ErrorKind::AddrInUse);
        }
        drop(foreign);
        after(1).expect("free");
        let _foreign = UdpSocket::bind(address).expect("nothing holds it");
        after(60).expect("it was free a while ago");
        assert_eq!(after(61).expect_err("long ago").kind(), io::ErrorKind::AddrInUse);
    }
}
