//! The flows between clients and peers, and how fast they go.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use serde::{Deserialize, Serialize};
use turn_core::Transport;
use turn_core::client::Failure;
use turn_core::wire::{ChannelData, ChannelNumber, ErrorCode, Kind, kind};

use super::batch::{CAPACITY, Receiver, Sender};
use super::caller::{Account, BenchError, Caller};
use super::packet::{self, Packet};
use super::spread::Spread;
use super::tally::{Counts, Seen, Tally};

/// Nothing has arrived for so long: what is under way is lost.
const STALL: Duration = Duration::from_millis(20);
/// Nothing has arrived for so long after the last was sent: nothing will.
const QUIET: Duration = Duration::from_millis(100);
/// Losses of a thousand above which fewer packets are kept under way.
const TOLERATED: u64 = 5;
/// Ports that a client tries.
const PORTS_TRIED: usize = 64;

/// Who sends to whom.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Clients to peers.
    Up,
    /// Peers to clients.
    Down,
    /// Clients to peers, which send everything back. Every packet is relayed, and counted, twice.
    Echo,
    /// Client to client through the relayed addresses of both, in both directions.
    Pair,
}

/// How fast.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Pace {
    /// As fast as it goes with at most so many packets under way; fewer where they are lost.
    Window(usize),
    /// So many packets a second.
    Rate(u32),
}

/// A load.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The server.
    pub server: SocketAddr,
    /// How clients reach it: UDP or TCP.
    pub transport: Transport,
    /// Who the clients are.
    pub account: Account,
    /// Another server, and who the clients are there: of every pair, the second client is its. [`Mode::Pair`] only.
    pub far: Option<(SocketAddr, Account)>,
    /// Address of the clients.
    pub from: IpAddr,
    /// Address of the peers.
    pub peers: IpAddr,
    /// Who sends to whom.
    pub mode: Mode,
    /// Flows: allocations with one channel each; an even number for [`Mode::Pair`].
    pub flows: usize,
    /// Bytes of application data in a packet, [`packet::HEADER`]..=[`packet::LARGEST`].
    pub size: usize,
    /// Packets that a flow sends behind each other, 1..=[`CAPACITY`].
    pub burst: usize,
    /// How fast.
    pub pace: Pace,
    /// Never sleep: a sleeper is woken on the server's account.
    pub spin: bool,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Measured {
    /// All packets of the measured time and of those still under way at its end.
    pub counts: Counts,
    /// Delivered within `elapsed`.
    pub delivered: u64,
    /// The measured time.
    pub elapsed: Duration,
    /// Of it, the time this thread had nothing to do.
    pub idle: Duration,
    /// Packets that were kept under way; 0 at a rate.
    pub window: usize,
    /// From sending to the last receiver.
    pub latency: Spread,
}

struct Flow {
    sent: u64,
    /// What the last receiver has.
    arrived: Tally,
    /// What the peer of an echo has.
    turned: Option<Tally>,
}

#[derive(Default)]
struct Faults {
    duplicates: u64,
    corrupt: u64,
    misdelivered: u64,
    reordered: u64,
}

/// Allocations and channels, ready to carry.
pub struct Load {
    plan: Plan,
    callers: Vec<Caller>,
    relayed: Vec<SocketAddr>,
    peers: Vec<UdpSocket>,
    flows: Vec<Flow>,
    epoll: Epoll,
    events: Vec<EpollEvent>,
    receiver: Receiver,
    sender: Sender,
    /// Packets to be sent, each behind a ChannelData header.
    buffers: Vec<Vec<u8>>,
    /// Payloads to be sent back by an echoing peer.
    echo: Vec<u8>,
    echoed: u64,
    next: usize,
    window: usize,
    in_flight: u64,
    faults: Faults,
    latency: Spread,
    begun: Instant,
    idle: Duration,
    last_arrival: Instant,
}

const CHANNEL: ChannelNumber = match ChannelNumber::new(0x4000) {
    Some(channel) => channel,
    None => panic!("in range"),
};

/// The client of a flow, with its allocation. A server may still know its port from a client that has gone without a word; the client
/// then takes another one (RFC 8656 §7.4).
fn settle(plan: &Plan, flow: usize) -> Result<(Caller, SocketAddr), BenchError> {
    let (server, account) = match &plan.far {
        Some((server, account)) if flow % 2 == 1 => (*server, account),
        _ => (plan.server, &plan.account),
    };
    let mut mistaken = Vec::new();
    loop {
        let mut caller = Caller::new(server, plan.transport, plan.from, account)?;
        match caller.allocate() {
            Ok(relayed) => return Ok((caller, relayed)),
            Err(BenchError::Refused(_, Failure::Refused(ErrorCode::ALLOCATION_MISMATCH)))
                if mistaken.len() < PORTS_TRIED =>
            {
                mistaken.push(caller);
            }
            Err(error) => return Err(error),
        }
    }
}

impl Load {
    /// Opens the sockets, allocates, binds a channel for every flow.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn open(plan: Plan) -> Result<Self, BenchError> {
        let wrong = |what: &str| Err(BenchError::Plan(what.to_owned()));
        if !(packet::HEADER..=packet::LARGEST).contains(&plan.size) {
            return wrong("a packet has 24 to 1400 bytes");
        }
        if !(1..=CAPACITY).contains(&plan.burst) {
            return wrong("a burst has 1 to 64 packets");
        }
        if plan.flows == 0 || plan.mode == Mode::Pair && plan.flows % 2 == 1 {
            return wrong("a load has at least one flow, and pairs of them between relayed addresses");
        }
        if plan.far.is_some() && plan.mode != Mode::Pair {
            return wrong("only a pair has an end at another server");
        }
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(io::Error::from)?;
        let mut header = vec![0; ChannelData::HEADER];
        header.copy_from_slice(&ChannelData::header(CHANNEL, u16::try_from(plan.size).unwrap_or(u16::MAX)));
        header.extend(packet::ballast(plan.size));
        if plan.transport.is_stream() {
            // RFC 8656 §12.5.
            header.resize(header.len().next_multiple_of(4), 0);
        }
        let now = Instant::now();
        let flow = |_| Flow { sent: 0, arrived: Tally::new(), turned: (plan.mode == Mode::Echo).then(Tally::new) };
        let mut load = Self {
            callers: Vec::new(),
            relayed: Vec::new(),
            peers: Vec::new(),
            flows: (0..plan.flows).map(flow).collect(),
            epoll,
            events: vec![EpollEvent::empty(); 256],
            receiver: Receiver::new(),
            sender: Sender::new(),
            buffers: vec![header; plan.burst],
            echo: Vec::new(),
            echoed: 0,
            next: 0,
            window: if let Pace::Window(window) = plan.pace { window.max(plan.burst) } else { 0 },
            in_flight: 0,
            faults: Faults::default(),
            latency: Spread::new(),
            begun: now,
            idle: Duration::ZERO,
            last_arrival: now,
            plan,
        };
        load.connect()?;
        Ok(load)
    }

    fn connect(&mut self) -> Result<(), BenchError> {
        let plan = &self.plan;
        for flow in 0..plan.flows {
            let (caller, relayed) = settle(plan, flow)?;
            self.relayed.push(relayed);
            self.callers.push(caller);
        }
        if plan.mode != Mode::Pair {
            for _ in 0..plan.flows {
                self.peers.push(UdpSocket::bind((plan.peers, 0))?);
            }
        }
        for (index, caller) in self.callers.iter_mut().enumerate() {
            let peer = match self.peers.get(index) {
                Some(peer) => peer.local_addr()?,
                None => self.relayed[index ^ 1],
            };
            caller.bind(CHANNEL, peer)?;
        }
        self.peers.iter().try_for_each(|peer| peer.set_nonblocking(true))?;
        let sockets = self.callers.iter().map(Caller::socket).chain(self.peers.iter().map(AsFd::as_fd));
        for (index, socket) in sockets.enumerate() {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, index as u64);
            self.epoll.add(socket, event).map_err(io::Error::from)?;
        }
        Ok(())
    }

    /// Carries: first until losses are tolerable, then for `length`, then until nothing is under way. `sample` is called
    /// at the beginning and at the end of the measured time.
    ///
    /// # Errors
    /// A socket fails.
    pub fn run<T>(
        &mut self,
        warm: Duration,
        length: Duration,
        mut sample: impl FnMut() -> T,
    ) -> Result<(Measured, [T; 2]), BenchError> {
        loop {
            let before = self.counts();
            self.carry(warm)?;
            self.drain()?;
            let after = self.counts();
            let (lost, sent) = (after.lost - before.lost, after.sent - before.sent);
            if self.window <= 2 * self.plan.burst || lost * 1000 <= sent * TOLERATED {
                break;
            }
            self.window /= 2;
        }
        // The beginning of the measured time finds packets under way.
        let before = self.counts();
        self.carry(warm / 2)?;
        self.latency = Spread::new();
        self.idle = Duration::ZERO;
        let delivered = self.counts().delivered;
        let (start, first) = (Instant::now(), sample());
        self.carry(length)?;
        let (last, elapsed) = (sample(), start.elapsed());
        let delivered = self.counts().delivered - delivered;
        let idle = self.idle;
        self.drain()?;
        let latency = std::mem::take(&mut self.latency);
        let counts = difference(&self.counts(), &before);
        Ok((Measured { counts, delivered, elapsed, idle, window: self.window, latency }, [first, last]))
    }

    /// Ends the allocations.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn close(mut self) -> Result<(), BenchError> {
        self.callers.iter_mut().try_for_each(Caller::release)
    }

    /// What was counted so far; what is under way counts as lost.
    fn counts(&self) -> Counts {
        let sent = self.flows.iter().map(|flow| flow.sent).sum::<u64>() + self.echoed;
        let unique = |flow: &Flow| flow.arrived.unique() + flow.turned.as_ref().map_or(0, Tally::unique);
        let delivered = self.flows.iter().map(unique).sum::<u64>();
        let Faults { duplicates, corrupt, misdelivered, reordered } = self.faults;
        Counts { sent, delivered, lost: sent.saturating_sub(delivered), duplicates, corrupt, misdelivered, reordered }
    }

    fn carry(&mut self, length: Duration) -> io::Result<()> {
        let start = Instant::now();
        self.last_arrival = start;
        let mut paced: u64 = 0;
        let mut now = start;
        while now < start + length {
            let sent = match self.plan.pace {
                Pace::Window(_) => self.fill_window(now)?,
                Pace::Rate(rate) => {
                    let due = (now - start).as_nanos() as u64 * u64::from(rate) / 1_000_000_000;
                    let sent = self.send_bursts(now, due.saturating_sub(paced))?;
                    paced += sent;
                    sent
                }
            };
            let arrived = self.receive()?;
            let then = std::mem::replace(&mut now, Instant::now());
            if arrived > 0 {
                self.last_arrival = now;
            } else if sent == 0 {
                self.idle += now - then;
                if now > self.last_arrival + STALL {
                    self.in_flight = 0;
                }
            }
        }
        Ok(())
    }

    /// Receives until nothing is under way, or nothing comes any more.
    fn drain(&mut self) -> io::Result<()> {
        self.last_arrival = Instant::now();
        let mut now = self.last_arrival;
        while now < self.last_arrival + QUIET && self.counts().lost > 0 {
            if self.receive()? > 0 {
                self.last_arrival = now;
            }
            now = Instant::now();
        }
        self.in_flight = 0;
        Ok(())
    }

    fn fill_window(&mut self, now: Instant) -> io::Result<u64> {
        let room = (self.window as u64).saturating_sub(self.in_flight);
        self.send_bursts(now, room.min(CAPACITY as u64))
    }

    /// Sends whole bursts of one flow after the other, `most` packets at most.
    fn send_bursts(&mut self, now: Instant, most: u64) -> io::Result<u64> {
        let mut sent = 0;
        while sent + self.plan.burst as u64 <= most {
            let taken = self.send_burst(now)?;
            if taken == 0 {
                break;
            }
            sent += taken;
        }
        Ok(sent)
    }

    fn send_burst(&mut self, now: Instant) -> io::Result<u64> {
        let index = self.next;
        self.next = (self.next + 1) % self.flows.len();
        let flow = &mut self.flows[index];
        let stamp = (now - self.begun).as_nanos() as u64;
        for (buffer, number) in self.buffers.iter_mut().zip(flow.sent + 1..) {
            let packet = Packet { flow: u32::try_from(index).unwrap_or(u32::MAX), number, sent: stamp };
            packet.write(&mut buffer[ChannelData::HEADER..][..self.plan.size]);
        }
        let taken = match self.plan.mode {
            Mode::Up | Mode::Echo | Mode::Pair => self.callers[index].send(&mut self.sender, &self.buffers)?,
            Mode::Down => {
                let (peer, to) = (&self.peers[index], Some(self.relayed[index]));
                let payload = ChannelData::HEADER..ChannelData::HEADER + self.plan.size;
                if let [buffer] = &self.buffers[..] {
                    self.sender.send_one(peer, to, &buffer[payload])?
                } else {
                    let datagrams: Vec<&[u8]> = self.buffers.iter().map(|buffer| &buffer[payload.clone()]).collect();
                    self.sender.send(peer, to, &datagrams)?
                }
            }
        };
        flow.sent += taken as u64;
        self.in_flight += taken as u64;
        Ok(taken as u64)
    }

    /// Takes what has arrived; says how many packets.
    fn receive(&mut self) -> io::Result<u64> {
        let timeout = if self.plan.spin { EpollTimeout::ZERO } else { EpollTimeout::from(1_u8) };
        let mut events = std::mem::take(&mut self.events);
        let ready = self.epoll.wait(&mut events, timeout).or_else(|error| match error {
            nix::errno::Errno::EINTR => Ok(0),
            error => Err(io::Error::from(error)),
        })?;
        let mut arrived = 0;
        for event in &events[..ready] {
            let index = usize::try_from(event.data()).unwrap_or(0);
            arrived += match index.checked_sub(self.callers.len()) {
                None => self.receive_at_caller(index)?,
                Some(peer) => self.receive_at_peer(peer)?,
            };
        }
        self.events = events;
        Ok(arrived as u64)
    }

    fn most(&self) -> usize {
        (2 * self.plan.burst).clamp(4, CAPACITY)
    }

    fn receive_at_caller(&mut self, index: usize) -> io::Result<usize> {
        let most = self.most();
        let now = (self.begun.elapsed()).as_nanos() as u64;
        let Self { receiver, callers, flows, faults, latency, in_flight, plan, .. } = self;
        let wanted = match plan.mode {
            Mode::Up => None,
            Mode::Down | Mode::Echo => Some(index),
            Mode::Pair => Some(index ^ 1),
        };
        callers[index].receive(receiver, most, |bytes| match kind(bytes) {
            Kind::ChannelData => {
                let message = ChannelData::parse(bytes).ok().filter(|message| message.channel() == CHANNEL);
                let packet = message.and_then(|message| Packet::read(message.data(), plan.size));
                if let Some(packet) = faults.check(packet, wanted) {
                    arrive(&mut flows[packet.flow as usize], &packet, faults, latency, in_flight, now);
                }
            }
            // A late answer to a request of the beginning.
            Kind::Stun => {}
            Kind::Dtls | Kind::Other => faults.corrupt += 1,
        })
    }

    fn receive_at_peer(&mut self, index: usize) -> io::Result<usize> {
        let most = self.most();
        let now = (self.begun.elapsed()).as_nanos() as u64;
        let Self { receiver, peers, relayed, flows, faults, latency, in_flight, plan, echo, .. } = self;
        let wanted = (plan.mode != Mode::Down).then_some(index);
        echo.clear();
        let count = receiver.receive(&peers[index], most, |source, bytes| {
            let Some(packet) = faults.check(Packet::read(bytes, plan.size), wanted) else { return };
            if source != Some(relayed[index]) {
                faults.misdelivered += 1;
                return;
            }
            let flow = &mut flows[index];
            match &mut flow.turned {
                None => arrive(flow, &packet, faults, latency, in_flight, now),
                Some(tally) => match tally.enter(&packet) {
                    Seen::Duplicate => faults.duplicates += 1,
                    seen => {
                        faults.reordered += u64::from(seen == Seen::Late);
                        echo.extend_from_slice(bytes);
                    }
                },
            }
        })?;
        let mut rest = &self.echo[..];
        while !rest.is_empty() {
            let (socket, to) = (&self.peers[index], Some(self.relayed[index]));
            let taken = if rest.len() == self.plan.size {
                self.sender.send_one(socket, to, rest)?
            } else {
                let datagrams: Vec<&[u8]> = rest.chunks(self.plan.size).take(CAPACITY).collect();
                self.sender.send(socket, to, &datagrams)?
            };
            if taken == 0 {
                break;
            }
            self.echoed += taken as u64;
            rest = &rest[taken * self.plan.size..];
        }
        Ok(count)
    }
}

impl Faults {
    /// Counts what is not a packet, or not one of the flow that is wanted here.
    fn check(&mut self, packet: Option<Packet>, wanted: Option<usize>) -> Option<Packet> {
        let Some(packet) = packet else {
            self.corrupt += 1;
            return None;
        };
        if wanted != Some(packet.flow as usize) {
            self.misdelivered += 1;
            return None;
        }
        Some(packet)
    }
}

/// A packet has reached the last receiver of its flow.
fn arrive(flow: &mut Flow, packet: &Packet, faults: &mut Faults, latency: &mut Spread, in_flight: &mut u64, now: u64) {
    match flow.arrived.enter(packet) {
        // Those of the gap are lost, or will not be waited for.
        Seen::New(gap) => {
            *in_flight = in_flight.saturating_sub(1 + gap);
            latency.enter(now.saturating_sub(packet.sent));
        }
        Seen::Late => faults.reordered += 1,
        Seen::Duplicate => faults.duplicates += 1,
    }
}

fn difference(after: &Counts, before: &Counts) -> Counts {
    Counts {
        sent: after.sent - before.sent,
        delivered: after.delivered - before.delivered,
        lost: after.lost - before.lost,
        duplicates: after.duplicates - before.duplicates,
        corrupt: after.corrupt - before.corrupt,
        misdelivered: after.misdelivered - before.misdelivered,
        reordered: after.reordered - before.reordered,
    }
}
