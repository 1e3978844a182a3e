//! Bytes as a history: what a fuzzer or a property test makes up, done to a server, with what must hold after each step.

use std::sync::Arc;
use std::time::Duration;

use turn_core::client::{Client, Event};
use turn_core::wire::ChannelNumber;
use turn_core::{Family, Input, IpMeta, Output, PeerAddr, Policy, Record, RelayedAddr, Server, Settings, Verdict};

use super::{Clock, PATH, Ports, addr, five_tuple};

const CLIENTS: usize = 4;
const IP: IpMeta = IpMeta { dscp_ecn: 0, ttl: 0, dont_fragment: false };

/// The history so far.
struct Driver {
    clock: Clock,
    server: Server,
    ports: Ports,
    clients: Vec<Client>,
    last: Vec<u8>,
    records: Vec<Record>,
    draining: bool,
}

/// Runs `bytes` as a history. Panics where something does not hold.
pub fn drive(bytes: &[u8]) {
    let client = |number| super::client((number == 3).then_some(Family::V6), (number == 2).then_some(60), number);
    let mut driver = Driver {
        clock: Clock::new(),
        server: super::server(),
        ports: Ports::default(),
        clients: (0..CLIENTS as u8).map(client).collect(),
        last: Vec::new(),
        records: Vec::new(),
        draining: false,
    };
    let mut rest = bytes;
    while let Some((&[step, argument], behind)) = rest.split_first_chunk::<2>() {
        let len = usize::from(argument).min(behind.len());
        let used = driver.step(step, argument, &behind[..len]);
        driver.check();
        rest = &behind[used.min(len)..];
    }
}

fn client_address(index: usize) -> std::net::SocketAddr {
    std::net::SocketAddr::new(addr("203.0.113.1:0").ip(), 5000 + index as u16)
}

impl Driver {
    /// One step; says how many bytes of `payload` it used up.
    fn step(&mut self, step: u8, argument: u8, payload: &[u8]) -> usize {
        let index = usize::from(step >> 4) % CLIENTS;
        let mono = self.clock.mono();
        let peer = self.peer(argument);
        let channel = ChannelNumber::new(0x4000 + u16::from(argument % 8)).expect("in range");
        match step & 0x0F {
            0 => {
                self.hand_in(index + CLIENTS, payload);
                return payload.len();
            }
            1 => self.clients[index].allocate(mono),
            2 => self.clients[index].permit(mono, &[peer.ip(), addr("192.0.2.9:0").ip()]),
            3 => self.clients[index].bind_channel(mono, channel, peer),
            4 => self.clients[index].refresh(mono, u32::from(argument) * 7),
            5 => self.clients[index].send(peer, payload),
            6 => {
                let relayed = self.relayed(argument);
                let input = Input::FromPeer { relayed, from: PeerAddr::new(peer), packet: payload, ip: IP };
                self.serve(input, payload);
                return payload.len();
            }
            7 => self.pass(Duration::from_millis(u64::from(argument) * 4000)),
            8 => {
                // The last signed packet again, with one byte changed or none.
                let mut packet = self.last.clone();
                if let (Some(at), Some(byte)) = (payload.first(), packet.get_mut(usize::from(argument))) {
                    *byte ^= at;
                }
                self.hand_in(index, &packet);
                return 1;
            }
            9 => self.records = self.server.records(self.clock.now()).collect(),
            10 => {
                for record in std::mem::take(&mut self.records) {
                    for relayed in &record.relayed {
                        self.ports.held.entry(relayed.advertised).or_default();
                    }
                    self.serve(Input::Restore { record: Box::new(record), path: PATH }, &[]);
                }
                // A refused record leaves its port to the caller.
                let live: Vec<_> = self.server.records(self.clock.now()).flat_map(|record| record.relayed).collect();
                self.ports.held.retain(|address, _| live.iter().any(|relayed| relayed.advertised == *address));
            }
            11 => {
                self.draining = !self.draining;
                let policy = Policy { members: vec![addr(super::SERVER).ip()], ..Policy::default() };
                let settings = Settings { draining: self.draining, policy, ..super::settings() };
                self.serve(Input::Configure(Arc::new(settings)), &[]);
            }
            12 => {
                let id = self.server.records(self.clock.now()).nth(usize::from(argument)).map(|record| record.id);
                if let Some(id) = id {
                    self.serve(Input::Revoke(id), &[]);
                }
            }
            13 => {
                self.serve(Input::Own { epoch: u64::from(argument) }, &[]);
            }
            14 => self.ports.exhausted = argument.is_multiple_of(2),
            _ => {
                let relayed = self.relayed(argument);
                self.serve(Input::Icmp { relayed, peer: PeerAddr::new(peer), kind: 3, code: argument }, &[]);
            }
        }
        self.pump();
        0
    }

    fn relayed(&self, argument: u8) -> RelayedAddr {
        let mut held: Vec<_> = self.ports.held.keys().copied().collect();
        held.sort();
        let address = held.get(usize::from(argument) % held.len().max(1)).copied().unwrap_or(addr("198.51.100.1:9"));
        RelayedAddr { bound: address, advertised: address }
    }

    /// A peer on the internet, one that is forbidden, or one of the server's own relayed addresses.
    fn peer(&self, argument: u8) -> std::net::SocketAddr {
        match argument % 4 {
            0 => self.relayed(argument >> 2).advertised,
            1 => addr("10.0.0.1:9"),
            2 => addr("[2001:db9::77]:7000"),
            _ => std::net::SocketAddr::new(addr("203.0.113.77:0").ip(), u16::from(argument)),
        }
    }

    fn pass(&mut self, time: Duration) {
        self.clock.elapsed += time;
        if self.server.poll_timeout().is_some_and(|at| at <= self.clock.mono()) {
            self.serve(Input::Timeout, &[]);
        }
        for index in 0..CLIENTS {
            let mono = self.clock.mono();
            self.clients[index].handle_timeout(mono);
        }
    }

    /// Carries what clients want to send, and the answers back, without loss.
    fn pump(&mut self) {
        for index in 0..CLIENTS {
            while let Some(packet) = self.clients[index].poll_transmit() {
                if self.hand_in(index, &packet) {
                    let mono = self.clock.mono();
                    let reply = self.server.reply().to_vec();
                    self.clients[index].handle_packet(mono, &reply);
                }
                while let Some(event) = self.clients[index].poll_event() {
                    assert!(!matches!(event, Event::Failed(_, turn_core::client::Failure::Invalid)), "{event:?}");
                }
                self.last = packet;
            }
        }
    }

    /// Hands in a packet of a client; true if it was answered.
    fn hand_in(&mut self, index: usize, packet: &[u8]) -> bool {
        let from = five_tuple(client_address(index));
        let verdict = self.serve(Input::FromClient { from, path: PATH, packet, ip: IP }, packet);
        let answered = matches!(verdict, Verdict::Reply { .. });
        if answered && index >= CLIENTS {
            // abuse.md D: to a stranger at most three times what it sent, IP and UDP headers counted.
            let reply = self.server.reply().len();
            assert!(reply + 28 <= 3 * (packet.len() + 28), "{reply} bytes for {}", packet.len());
        }
        answered
    }

    fn serve(&mut self, input: Input<'_>, packet: &[u8]) -> Verdict {
        let verdict = self.server.handle_input(self.clock.now(), input, &mut self.ports);
        if let Verdict::Send { payload, padding, .. } = &verdict {
            assert!(packet.get(payload.clone()).is_some() && *padding < 4, "{verdict:?} of {} bytes", packet.len());
        }
        while let Some(output) = self.server.poll_output() {
            if let Output::Release { relayed, .. } = output {
                assert!(self.ports.held.remove(&relayed.advertised).is_some(), "a port is released once");
            }
        }
        verdict
    }

    fn check(&self) {
        assert_eq!(
            self.server.allocations(),
            self.ports.held.len(),
            "every allocation holds one port, nobody else does"
        );
        assert!(self.server.allocations() == 0 || self.server.poll_timeout().is_some(), "who lives has a deadline");
    }
}
