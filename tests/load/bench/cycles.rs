//! Allocations made and ended again, as many as a server can.
//!
//! Every cycle comes from a five-tuple of its own, as those of clients do. coturn keeps an allocation for one second after
//! a Refresh with 0, and answers 437 to whoever comes from the same five-tuple meanwhile: from ports that come back within
//! it, a third of its cycles failed, and what they cost it was charged to the others.
//!
//! All clients share one socket on loopback, and each has an address of it: neither the load nor, when it sends, the
//! server pays for the opening and closing of sockets of clients, which are elsewhere in life.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use relay_node::sys::message::{Message, ReceiveSlots, SendBatch};
use relay_node::sys::socket::receive_local_address;
use turn_core::Transport;
use turn_core::client::{Client, ClientConfig, Event, Failure, Security};
use turn_core::wire::Method;
use turnctl::bench::{Account, Spread};

/// How often those are looked at that hear nothing.
const LOOK: Duration = Duration::from_millis(100);
/// Cycles refused before one succeeds, after which there is no point in it.
const REFUSALS: u64 = 64;
/// How long those may take that are under way at the end.
const LEAVE: Duration = Duration::from_secs(2);
/// 127.64.0.0/10, the clients' network. No run comes to its end, and the next one has another port.
const NETWORK: u32 = 0x7F40_0000;
const ADDRESSES: u32 = 1 << 22;

/// Who allocates, and how many at a time.
#[derive(Clone, Debug)]
pub(crate) struct CyclePlan {
    /// The server, by UDP, on loopback.
    pub(crate) server: SocketAddr,
    /// Who the clients are.
    pub(crate) account: Account,
    /// Cycles under way at a time.
    pub(crate) concurrent: usize,
}

/// What came of it.
#[derive(Clone, Debug)]
pub(crate) struct Cycled {
    /// Cycles ended within `elapsed`: the challenge, an Allocate, a Refresh with 0, each answered.
    pub(crate) cycles: u64,
    /// Cycles that the server refused within it, or did not answer.
    pub(crate) failed: u64,
    /// Why the last of them failed.
    pub(crate) failure: Option<(Method, Failure)>,
    /// The measured time.
    pub(crate) elapsed: Duration,
    /// Of it, the time this thread had nothing to do.
    pub(crate) idle: Duration,
    /// From the first request of a cycle to its last answer.
    pub(crate) latency: Spread,
}

/// A cycle under way.
struct Cycle {
    client: Client,
    address: Ipv4Addr,
    begun: Instant,
}

struct Round {
    plan: CyclePlan,
    socket: UdpSocket,
    slots: ReceiveSlots,
    batch: SendBatch,
    /// What is to be sent, and from where.
    outgoing: VecDeque<(Ipv4Addr, Vec<u8>)>,
    /// Those under way. The last bits of an address are the place in here.
    places: Vec<Option<Cycle>>,
    /// Cycles begun, of all places alike.
    turns: Vec<u32>,
    leaving: bool,
    cycles: u64,
    failed: u64,
    failure: Option<(Method, Failure)>,
    latency: Spread,
    idle: Duration,
}

/// Makes and ends allocations for `warm` and then for `length`; `sample` is called at the beginning and at the end of
/// the measured time. It never sleeps.
///
/// # Errors
/// The socket fails; the server refuses everybody.
pub(crate) fn cycle<T>(
    plan: CyclePlan,
    warm: Duration,
    length: Duration,
    mut sample: impl FnMut() -> T,
) -> Result<(Cycled, [T; 2])> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    receive_local_address(socket.as_fd(), false)?;
    let mut round = Round {
        socket,
        slots: ReceiveSlots::new(SendBatch::CAPACITY),
        batch: SendBatch::new(),
        outgoing: VecDeque::new(),
        places: (0..plan.concurrent).map(|_| None).collect(),
        turns: vec![0; plan.concurrent],
        leaving: false,
        cycles: 0,
        failed: 0,
        failure: None,
        latency: Spread::new(),
        idle: Duration::ZERO,
        plan,
    };
    for place in 0..round.places.len() {
        round.begin(place)?;
    }
    round.go_on(warm)?;
    if round.cycles == 0 && round.failed > 0 {
        bail!("none of {} cycles succeeded: {:?}", round.failed, round.failure);
    }
    (round.cycles, round.failed, round.idle, round.latency) = (0, 0, Duration::ZERO, Spread::new());
    let (start, first) = (Instant::now(), sample());
    round.go_on(length)?;
    let (last, elapsed) = (sample(), start.elapsed());
    let (cycles, failed, idle) = (round.cycles, round.failed, round.idle);
    let latency = std::mem::replace(&mut round.latency, Spread::new());
    // What they made would stay for ten minutes.
    round.leaving = true;
    round.go_on(LEAVE)?;
    Ok((Cycled { cycles, failed, failure: round.failure, elapsed, idle, latency }, [first, last]))
}

impl Round {
    /// The next cycle of a place.
    fn begin(&mut self, place: usize) -> Result<()> {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(io::Error::other)?;
        let client = Client::new(ClientConfig {
            transport: Transport::Udp,
            username: self.plan.account.username.clone(),
            password: self.plan.account.password.clone(),
            family: None,
            lifetime: None,
            seed,
        });
        let number = self.turns[place].wrapping_mul(self.width()) | place as u32;
        self.turns[place] = self.turns[place].wrapping_add(1);
        let address = Ipv4Addr::from_bits(NETWORK | (number % ADDRESSES));
        let begun = Instant::now();
        // As browsers do; and what a server offers beside it is not always what it takes.
        let mut cycle = Cycle { client: client.with_security(Security::Rfc5389), address, begun };
        cycle.client.allocate(begun);
        self.outgoing.extend(std::iter::from_fn(|| cycle.client.poll_transmit()).map(|packet| (address, packet)));
        self.places[place] = Some(cycle);
        Ok(())
    }

    /// Numbers of places, a power of two.
    fn width(&self) -> u32 {
        (self.places.len() as u32).next_power_of_two()
    }

    fn go_on(&mut self, length: Duration) -> Result<()> {
        let start = Instant::now();
        let (mut now, mut look) = (start, start + LOOK);
        while now < start + length && !(self.leaving && self.places.iter().all(Option::is_none)) {
            self.send()?;
            let received = match self.slots.receive(self.socket.as_fd(), 0, SendBatch::CAPACITY) {
                Ok(received) => received,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionRefused) => 0,
                Err(error) => return Err(error.into()),
            };
            for slot in 0..received {
                self.take(slot, now)?;
            }
            if now >= look {
                look = now + LOOK;
                for place in 0..self.places.len() {
                    if let Some(cycle) = &mut self.places[place] {
                        cycle.client.handle_timeout(now);
                        self.step(place, now)?;
                    }
                }
            }
            let then = std::mem::replace(&mut now, Instant::now());
            if received == 0 {
                self.idle += now - then;
            }
        }
        Ok(())
    }

    /// An answer, if it is one to somebody who is still there.
    fn take(&mut self, slot: usize, now: Instant) -> Result<()> {
        let Some(IpAddr::V4(address)) = self.slots.ancillary(slot).local else {
            return Ok(());
        };
        let place = (address.to_bits() & (self.width() - 1)) as usize;
        if let Some(Some(cycle)) = self.places.get_mut(place)
            && cycle.address == address
        {
            cycle.client.handle_packet(now, self.slots.bytes(slot, self.slots.length(slot)));
            self.step(place, now)?;
        }
        Ok(())
    }

    /// What a client has to say.
    fn step(&mut self, place: usize, now: Instant) -> Result<()> {
        let Some(cycle) = &mut self.places[place] else {
            return Ok(());
        };
        let mut over = false;
        while let Some(event) = cycle.client.poll_event() {
            match event {
                Event::Allocated { .. } => cycle.client.refresh(now, 0),
                Event::Refreshed(_) => {
                    self.cycles += 1;
                    self.latency.enter(cycle.begun.elapsed().as_nanos() as u64);
                    over = true;
                }
                Event::Failed(method, failure) => {
                    self.failed += 1;
                    self.failure = Some((method, failure));
                    over = true;
                }
                _ => {}
            }
        }
        let address = cycle.address;
        self.outgoing.extend(std::iter::from_fn(|| cycle.client.poll_transmit()).map(|packet| (address, packet)));
        if over {
            self.places[place] = None;
            if self.cycles == 0 && self.failed >= REFUSALS {
                bail!("{} cycles failed one after the other: {:?}", self.failed, self.failure);
            }
            if !self.leaving {
                self.begin(place)?;
            }
        }
        Ok(())
    }

    /// What the kernel does not take now it is offered again.
    fn send(&mut self) -> io::Result<()> {
        let to = self.plan.server;
        let messages = self.outgoing.iter().map(|(from, packet)| Message {
            to: Some(to),
            from: Some(IpAddr::V4(*from)),
            tos: 0,
            segment: None,
            parts: [&packet[..]],
        });
        match self.batch.send(self.socket.as_fd(), messages) {
            Ok(sent) => drop(self.outgoing.drain(..sent)),
            // An ICMP error of a packet before.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionRefused) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }
}
