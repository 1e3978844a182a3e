//! Two clients and a server as values on a lossy, reordering, seeded link in virtual time.

mod support;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand_chacha::ChaCha12Rng;
use rand_core::{Rng, SeedableRng};
use support::{Clock, PATH, Ports, addr, five_tuple};
use turn_core::client::{Client, Event};
use turn_core::wire::ChannelNumber;
use turn_core::{Input, IpMeta, Out, Output, PeerAddr, Server, Verdict};

const DELAY: u32 = 20;

/// A packet under way: when it arrives, a number that keeps order stable, to whom.
type InFlight = Reverse<(Instant, u64, To, Vec<u8>)>;

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum To {
    Server(usize),
    Client(usize),
}

struct World {
    clock: Clock,
    random: ChaCha12Rng,
    loss_percent: u32,
    server: Server,
    ports: Ports,
    clients: Vec<(SocketAddr, Client)>,
    flying: BinaryHeap<InFlight>,
    sent: u64,
    events: Vec<(usize, Event, Vec<u8>)>,
}

impl World {
    fn new(seed: u8, loss_percent: u32, clients: usize) -> Self {
        let client = |number: usize| {
            let address = SocketAddr::new(addr("203.0.113.1:0").ip(), 5000 + number as u16);
            (address, support::client(None, None, seed.wrapping_add(number as u8)))
        };
        Self {
            clock: Clock::new(),
            random: ChaCha12Rng::from_seed([seed; 32]),
            loss_percent,
            server: support::server(),
            ports: Ports::default(),
            clients: (0..clients).map(client).collect(),
            flying: BinaryHeap::new(),
            sent: 0,
            events: Vec::new(),
        }
    }

    /// Loses, delays by 20..=60 ms and sometimes doubles a packet.
    fn launch(&mut self, to: To, packet: &[u8]) {
        let copies = if self.random.next_u32().is_multiple_of(20) { 2 } else { 1 };
        for _ in 0..copies {
            if self.random.next_u32() % 100 < self.loss_percent {
                continue;
            }
            let delay = Duration::from_millis(u64::from(DELAY + self.random.next_u32() % (2 * DELAY)));
            self.sent += 1;
            self.flying.push(Reverse((self.clock.mono() + delay, self.sent, to, packet.to_vec())));
        }
    }

    fn serve(&mut self, input: Input<'_>, packet: &[u8]) {
        let verdict = self.server.handle_input(self.clock.now(), input, &mut self.ports);
        self.apply(verdict, packet);
        while let Some(output) = self.server.poll_output() {
            if let Output::Release { relayed, .. } = output {
                self.ports.held.remove(&relayed.advertised).expect("released once, by its holder");
            }
        }
    }

    fn apply(&mut self, verdict: Verdict, packet: &[u8]) {
        match verdict {
            Verdict::Reply { out: Out::Client { to, .. } } => {
                let reply = self.server.reply().to_vec();
                self.launch(To::Client(self.index(to.client)), &reply);
            }
            Verdict::Send { out, head, payload, padding, .. } => {
                let mut bytes = head.as_slice().to_vec();
                bytes.extend_from_slice(&packet[payload]);
                bytes.resize(bytes.len() + usize::from(padding), 0);
                match out {
                    Out::Client { to, .. } => self.launch(To::Client(self.index(to.client)), &bytes),
                    Out::Worker { via, to, .. } => {
                        let relayed = turn_core::RelayedAddr { bound: to.socket_addr(), advertised: to.socket_addr() };
                        let from = PeerAddr::new(via.advertised);
                        let input = Input::FromPeer { relayed, from, packet: &bytes, ip: IpMeta::default() };
                        let verdict = self.server.handle_input(self.clock.now(), input, &mut self.ports);
                        self.apply(verdict, &bytes);
                    }
                    other => panic!("nobody is at {other:?}"),
                }
            }
            Verdict::Done | Verdict::Drop(_) => {}
            Verdict::Elsewhere(worker) => panic!("there is no {worker:?}"),
            Verdict::Reply { out } => panic!("a reply to {out:?}"),
        }
    }

    fn index(&self, client: SocketAddr) -> usize {
        self.clients.iter().position(|(address, _)| *address == client).expect("one of ours")
    }

    fn drain_client(&mut self, index: usize, packet: &[u8]) {
        while let Some(event) = self.clients[index].1.poll_event() {
            self.events.push((index, event, packet.to_vec()));
        }
        while let Some(packet) = self.clients[index].1.poll_transmit() {
            self.launch(To::Server(index), &packet);
        }
    }

    /// Lets a client act and sends what it wants to send.
    fn act<R>(&mut self, index: usize, action: impl FnOnce(&mut Client, Instant) -> R) -> R {
        let result = action(&mut self.clients[index].1, self.clock.mono());
        self.drain_client(index, &[]);
        result
    }

    /// Runs until `end` of virtual time.
    fn run_for(&mut self, time: Duration) {
        let end = self.clock.mono() + time;
        loop {
            let arrival = self.flying.peek().map(|Reverse((at, ..))| *at);
            let timers = self.clients.iter().filter_map(|(_, client)| client.poll_timeout());
            let next = timers.chain(arrival).chain(self.server.poll_timeout()).min();
            let Some(next) = next.filter(|at| *at <= end) else {
                break;
            };
            self.clock.advance_to(next);
            if self.server.poll_timeout().is_some_and(|at| at <= self.clock.mono()) {
                self.serve(Input::Timeout, &[]);
                assert!(self.server.poll_timeout().is_none_or(|at| at > self.clock.mono()), "the timer was handled");
            }
            for index in 0..self.clients.len() {
                if self.clients[index].1.poll_timeout().is_some_and(|at| at <= self.clock.mono()) {
                    self.act(index, Client::handle_timeout);
                }
            }
            while self.flying.peek().is_some_and(|Reverse((at, ..))| *at <= self.clock.mono()) {
                let Some(Reverse((.., to, packet))) = self.flying.pop() else {
                    break;
                };
                match to {
                    To::Server(index) => {
                        let from = five_tuple(self.clients[index].0);
                        let input = Input::FromClient { from, path: PATH, packet: &packet, ip: IpMeta::default() };
                        self.serve(input, &packet);
                    }
                    To::Client(index) => {
                        self.clients[index].1.handle_packet(self.clock.mono(), &packet);
                        self.drain_client(index, &packet);
                    }
                }
            }
        }
        self.clock.advance_to(end);
    }

    fn relayed(&self, index: usize) -> SocketAddr {
        let of = |(who, event, _): &(usize, Event, Vec<u8>)| match event {
            Event::Allocated { relayed, .. } if *who == index => Some(*relayed),
            _ => None,
        };
        self.events.iter().find_map(of).expect("allocated")
    }

    fn failures(&self) -> Vec<&Event> {
        self.events.iter().map(|(_, event, _)| event).filter(|event| matches!(event, Event::Failed(..))).collect()
    }

    /// Data received by a client, with its sender.
    fn received(&self, index: usize) -> Vec<(SocketAddr, Vec<u8>)> {
        let data = |(who, event, packet): &(usize, Event, Vec<u8>)| match event {
            Event::Data(from, range) if *who == index => Some((*from, packet[range.clone()].to_vec())),
            _ => None,
        };
        self.events.iter().filter_map(data).collect()
    }
}

fn meet(seed: u8, loss_percent: u32) -> World {
    let mut world = World::new(seed, loss_percent, 2);
    for index in 0..2 {
        world.act(index, Client::allocate);
    }
    world.run_for(Duration::from_secs(60));
    let (alice, bob) = (world.relayed(0), world.relayed(1));
    let channel = ChannelNumber::new(0x4000).expect("in range");
    world.act(0, |client, now| client.bind_channel(now, channel, bob));
    world.act(1, |client, now| client.permit(now, &[alice.ip()]));
    world.run_for(Duration::from_secs(60));
    assert_eq!(world.failures(), Vec::<&Event>::new(), "seed {seed}");
    world
}

#[test]
fn clients_meet_and_only_get_what_was_sent_to_them() {
    for seed in 0..20 {
        let loss = u32::from(seed % 4) * 10;
        let mut world = meet(seed, loss);
        let (alice, bob) = (world.relayed(0), world.relayed(1));
        for number in 0..200_u32 {
            world.act(0, |client, _| client.send(bob, format!("from alice {number}").as_bytes()));
            world.act(1, |client, _| client.send(alice, format!("from bob {number}").as_bytes()));
            world.run_for(Duration::from_millis(20));
        }
        world.run_for(Duration::from_secs(1));
        for (index, peer, name) in [(0, bob, "bob"), (1, alice, "alice")] {
            let received = world.received(index);
            for (from, data) in &received {
                let text = String::from_utf8_lossy(data);
                assert_eq!(*from, peer, "seed {seed}: the source is the other's relayed address");
                let number = text.strip_prefix(&format!("from {name} ")).and_then(|number| number.parse().ok());
                assert!(number.is_some_and(|number: u32| number < 200), "seed {seed}: {text}");
            }
            let distinct: std::collections::BTreeSet<_> = received.iter().map(|(_, data)| data).collect();
            if loss == 0 {
                assert_eq!(distinct.len(), 200, "seed {seed}: nothing is lost in the relay");
            } else {
                assert!(distinct.len() > 40, "seed {seed}: {} of 200 arrived", distinct.len());
            }
        }
    }
}

#[test]
fn an_allocation_lives_as_long_as_it_is_kept_alive() {
    for seed in 100..105 {
        // 15 % loss each way: seven tries make a lost request a one in 10^4 event; the seeds are such that none is.
        let mut world = meet(seed, 15);
        let bob = world.relayed(1);
        // RFC 8656 §8: several lifetimes, kept by Refresh, CreatePermission and ChannelBind alone.
        world.run_for(Duration::from_secs(3600));
        assert_eq!(world.failures(), Vec::<&Event>::new(), "seed {seed}");
        assert_eq!(world.server.allocations(), 2, "seed {seed}");
        for _ in 0..40 {
            world.act(0, |client, _| client.send(bob, b"still there"));
        }
        world.run_for(Duration::from_secs(1));
        assert!(!world.received(1).is_empty(), "seed {seed}: channel and permission were renewed");

        // RFC 8656 §5: and no longer.
        world.act(0, |client, _| client.abandon());
        world.run_for(Duration::from_secs(601));
        assert_eq!(world.server.allocations(), 1, "seed {seed}");
        assert_eq!(world.ports.held.len(), 1, "seed {seed}: its port is free again");
    }
}

#[test]
fn deletion_survives_loss() {
    for seed in 30..40 {
        let mut world = meet(seed, 20);
        world.act(0, |client, now| client.refresh(now, 0));
        world.run_for(Duration::from_secs(60));
        assert_eq!(world.server.allocations(), 1, "seed {seed}");
        assert_eq!(world.ports.held.len(), 1, "seed {seed}");
    }
}
