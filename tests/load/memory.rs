//! What idle allocations cost a relay as it is shipped, with journal, reports and accounting, and what is left of those
//! that have ended.
//!
//! By default three fills of 10,000, and 5,000 cycles. What `.ci/long` asks for, ten fills among it:
//!
//! ```text
//! TURNPIKE_IDLE_ALLOCATIONS=10000 TURNPIKE_ALLOCATIONS=50000 TURNPIKE_ALLOCATION_CYCLES=1000000 \
//!     tests/run -E 'package(turnpike-tests) & test(/^memory/)'
//! ```

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use harness::cluster::{Cluster, Controller, Relay, RelayOptions, Store};
use harness::flood::resident;
use harness::place::Place;
use harness::scenario::Scenario;
use harness::{eventually, number, run_within};
use turn_core::Transport;
use turn_core::client::{Client, ClientConfig, Event};

/// Of an idle allocation, bytes of the process over the empty one.
const BOUND: u64 = 1024;
/// What waits for the controller while thousands are made in a second, bytes: room that is used again.
const BURST: u64 = 1 << 20;
/// What later fills may add to the second one, and cycles to what was before, bytes: how much waits at a time differs. No
/// more for ten fills than for three, and for a million cycles than for thousands.
const GROWTH: u64 = 2 << 20;
/// Descriptors of the process that are no relayed addresses: connections to the controller come and go.
const DESCRIPTORS: u64 = 20;
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn idle_allocations_with_sockets_cost_a_kilobyte() -> Result<()> {
    idle("sockets")
}

#[test]
fn idle_allocations_of_one_socket_cost_a_kilobyte() -> Result<()> {
    idle("wildcard")
}

#[test]
fn every_port_of_one_socket_is_no_descriptor() -> Result<()> {
    let count = number("TURNPIKE_ALLOCATIONS", 12_000)?;
    run_within(Duration::from_secs(700), async |test| {
        let site = Site::start(test, "wildcard").await?;
        let filled = site.fill(count, 1).await?;
        test.figure(&format!("{count} allocations of one socket"), &filled);
        ensure!(filled.each <= BOUND && filled.descriptors <= DESCRIPTORS, "{filled}");
        Ok(())
    })
}

#[test]
fn cycles_of_allocations_leave_nothing() -> Result<()> {
    let cycles = number("TURNPIKE_ALLOCATION_CYCLES", 5000)?;
    run_within(Duration::from_secs(2300), async |test| {
        let site = Site::start(test, "wildcard").await?;
        let mut callers: Vec<Caller> = (0..100).map(|number| site.caller(number)).collect();
        let mut cycle = |times: usize| -> Result<()> {
            for _ in 0..times {
                for caller in &mut callers {
                    caller.allocate()?;
                    caller.refresh(600)?;
                    caller.refresh(0)?;
                }
            }
            Ok(())
        };
        // Every table and every row that such a rate needs is there after some seconds.
        cycle(cycles / 1000 + 50)?;
        site.is_empty().await?;
        let (before, descriptors) = (site.resident()?, site.descriptors()?);
        cycle(cycles / 100)?;
        site.is_empty().await?;
        let growth = site.resident()?.saturating_sub(before);
        let taken = site.descriptors()?.saturating_sub(descriptors);
        test.figure(&format!("{cycles} cycles of allocate, refresh and delete"), format!("{growth} bytes more"));
        ensure!(growth <= GROWTH && taken <= DESCRIPTORS, "{growth} bytes, {taken} descriptors");
        Ok(())
    })
}

/// Fills an empty relay with allocations again and again: what they cost, and that it is the same each time.
fn idle(relayed: &'static str) -> Result<()> {
    let count = number("TURNPIKE_IDLE_ALLOCATIONS", 10_000)?;
    let fills = if std::env::var_os("TURNPIKE_IDLE_ALLOCATIONS").is_some() { 10 } else { 3 };
    run_within(Duration::from_secs(700), async |test| {
        let site = Site::start(test, relayed).await?;
        let filled = site.fill(count, fills).await?;
        test.figure(&format!("{count} idle allocations, {relayed}, {fills} times"), &filled);
        ensure!(filled.each <= BOUND && filled.growth <= GROWTH, "{filled}");
        let expected = if relayed == "sockets" { count as u64 } else { 0 };
        ensure!(filled.descriptors.abs_diff(expected) <= DESCRIPTORS, "{filled}");
        Ok(())
    })
}

/// A relay and its controller.
struct Site {
    cluster: Cluster,
    controller: Controller,
    relay: Relay,
    place: Place,
    username: Vec<u8>,
    password: Vec<u8>,
}

/// What idle allocations cost.
struct Filled {
    /// Bytes of the process, each, beside [`BURST`].
    each: u64,
    /// Bytes of the process that the fullest of the fills after the second has more than that.
    growth: u64,
    /// The process with each fill.
    full: Vec<u64>,
    /// In all.
    descriptors: u64,
}

impl std::fmt::Display for Filled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { each, growth, descriptors, full } = self;
        let full: Vec<u64> = full.iter().map(|bytes| bytes >> 10).collect();
        write!(f, "{each} bytes each, {growth} bytes more in later fills (KiB: {full:?}), {descriptors} descriptors")
    }
}

impl Site {
    async fn start(test: &Scenario, relayed: &str) -> Result<Self> {
        let mut cluster = Cluster::new(test.path())?;
        let place = Place::on_loopback(1);
        let controller = cluster.controller(&place, Store::Embedded, "").await?;
        let more = "relay_ports = [10000, 65535]";
        let more = format!("relayed = \"{relayed}\"\n{more}\n[limits]\nstrangers_per_prefix = 0");
        let relay = cluster.relay("eu-1", &place, &RelayOptions { more, ..RelayOptions::in_region("eu") }).await?;
        let login = controller.login("memory").await?;
        let (username, password) = (login.username.into_bytes(), login.password.into_bytes());
        Ok(Self { cluster, controller, relay, place, username, password })
    }

    async fn fill(&self, count: usize, fills: usize) -> Result<Filled> {
        let mut callers: Vec<Caller> = (0..count).map(|number| self.caller(number)).collect();
        // What is made once is there when the first ones have gone, and the store has heard of it.
        for caller in callers.iter_mut().take(10) {
            caller.allocate()?;
            caller.refresh(0)?;
        }
        self.is_empty().await?;
        let (empty, descriptors) = (self.resident()?, self.descriptors()?);
        let mut full = Vec::new();
        let mut taken = 0;
        for _ in 0..fills {
            callers.iter_mut().try_for_each(Caller::allocate)?;
            full.push(self.resident()?);
            taken = self.descriptors()?.saturating_sub(descriptors);
            callers.iter_mut().try_for_each(|caller| caller.refresh(0))?;
            self.is_empty().await?;
        }
        let each = full[0].saturating_sub(empty + BURST) / count as u64;
        let later = full.iter().skip(2).max().zip(full.get(1));
        let growth = later.map_or(0, |(fullest, second)| fullest.saturating_sub(*second));
        Ok(Filled { each, growth, full, descriptors: taken })
    }

    /// The relay has no allocation, and the store has none of it.
    async fn is_empty(&self) -> Result<()> {
        eventually("nothing is left", PATIENCE, async || {
            let held = self.relay.metric("turn_allocations", "").await?;
            let stored = self.cluster.allocations(&self.controller.place.host).await?.len();
            if held == 0.0 && stored == 0 { Ok(()) } else { Err(anyhow!("{held} held, {stored} stored")) }
        })
        .await?;
        Ok(())
    }

    /// A client with an address of its own.
    fn caller(&self, number: usize) -> Caller {
        let [_, network, ..] = match self.place.address {
            IpAddr::V4(ip) => ip.octets(),
            IpAddr::V6(_) => [0; 4],
        };
        let [.., high, low] = (number as u32).to_be_bytes();
        let from = (Ipv4Addr::new(127, network, high, low), 0).into();
        let client = Client::new(ClientConfig {
            transport: Transport::Udp,
            username: self.username.clone(),
            password: self.password.clone(),
            family: None,
            lifetime: None,
            seed: [number as u8; 32],
        });
        Caller { client, from, relay: self.relay.address() }
    }

    fn resident(&self) -> Result<u64> {
        resident(self.relay.pid()?)
    }

    fn descriptors(&self) -> Result<u64> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.relay.pid()?))?.count() as u64)
    }
}

/// A client whose socket is open only while it speaks: there are more of them than a process may have descriptors.
struct Caller {
    client: Client,
    /// Its port is chosen when it first speaks.
    from: SocketAddr,
    relay: SocketAddr,
}

impl Caller {
    fn perform(&mut self, act: impl FnOnce(&mut Client, Instant)) -> Result<Event> {
        let socket = UdpSocket::bind(self.from)?;
        self.from = socket.local_addr()?;
        socket.connect(self.relay)?;
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        act(&mut self.client, Instant::now());
        let (mut answer, deadline) = ([0; 1500], Instant::now() + PATIENCE);
        loop {
            while let Some(packet) = self.client.poll_transmit() {
                socket.send(&packet)?;
            }
            if let Ok(length) = socket.recv(&mut answer) {
                self.client.handle_packet(Instant::now(), &answer[..length]);
            }
            if self.client.poll_timeout().is_some_and(|at| at <= Instant::now()) {
                self.client.handle_timeout(Instant::now());
            }
            if let Some(event) = self.client.poll_event() {
                return Ok(event);
            }
            ensure!(Instant::now() < deadline, "no answer");
        }
    }

    fn allocate(&mut self) -> Result<()> {
        let event = self.perform(Client::allocate)?;
        ensure!(matches!(event, Event::Allocated { .. }), "{event:?}");
        Ok(())
    }

    fn refresh(&mut self, lifetime: u32) -> Result<()> {
        let event = self.perform(|client, now| client.refresh(now, lifetime))?;
        ensure!(matches!(event, Event::Refreshed(granted) if granted == lifetime), "{event:?}");
        Ok(())
    }
}
