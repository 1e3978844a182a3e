//! No heap per relayed packet in a worker's loop, from socket to socket: what every thread but the test's own allocates
//! while packets are relayed is counted.
#![allow(unsafe_code, reason = "a global allocator cannot be written without")]

#[path = "../src/dataplane/sample.rs"]
mod sample;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use relay_node::dataplane::{Dataplane, DataplaneConfig, DtlsLimits, Listen, RelayIp, RelayedMode, StreamConfig};
use turn_core::client::{Client, ClientConfig, Event};
use turn_core::wire::ChannelNumber;
use turn_core::{Key, KeyRing, Policy, Settings, StaticUser, Transport};

/// Of all threads but those that are not to be counted.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static COUNTED: Cell<bool> = const { Cell::new(true) };
}

struct Counting;

fn count() {
    if COUNTED.with(Cell::get) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call goes to the system allocator unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `realloc`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const CHANNEL: ChannelNumber = ChannelNumber::new(0x4000).expect("may be bound");
const PATIENCE: Duration = Duration::from_secs(20);

/// Asks the relay for something and waits for the answer.
fn ask(socket: &UdpSocket, client: &mut Client, ask: impl FnOnce(&mut Client, Instant)) -> Result<Event> {
    ask(client, Instant::now());
    let (deadline, mut buffer) = (Instant::now() + PATIENCE, [0; 2048]);
    while Instant::now() < deadline {
        while let Some(packet) = client.poll_transmit() {
            socket.send(&packet)?;
        }
        if let Ok(length) = socket.recv(&mut buffer) {
            client.handle_packet(Instant::now(), &buffer[..length]);
        }
        if let Some(event) = client.poll_event() {
            return Ok(event);
        }
        client.handle_timeout(Instant::now());
    }
    bail!("the relay does not answer")
}

/// A client with an allocation, and its relayed address.
fn allocate(relay: SocketAddr, seed: u8) -> Result<(UdpSocket, Client, SocketAddr)> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.connect(relay)?;
    socket.set_read_timeout(Some(Duration::from_millis(20)))?;
    let mut client = Client::new(ClientConfig {
        transport: Transport::Udp,
        username: "alice".into(),
        password: (*b"secret").into(),
        family: None,
        lifetime: None,
        seed: [seed; 32],
    });
    match ask(&socket, &mut client, Client::allocate)? {
        Event::Allocated { relayed, .. } => Ok((socket, client, relayed)),
        other => bail!("no allocation: {other:?}"),
    }
}

fn bind(socket: &UdpSocket, client: &mut Client, peer: SocketAddr) -> Result<()> {
    match ask(socket, client, |client, now| client.bind_channel(now, CHANNEL, peer))? {
        Event::ChannelBound(..) => Ok(()),
        other => bail!("no channel: {other:?}"),
    }
}

fn dataplane(ip: &str, journal: &std::path::Path) -> Result<Dataplane> {
    let settings = Settings {
        realm: "test".into(),
        nonce_keys: KeyRing(vec![Key { id: 1, secret: vec![7; 32] }]),
        static_users: vec![StaticUser { username: (*b"alice").into(), password: (*b"secret").into() }],
        policy: Policy { allow_loopback: true, ..Policy::default() },
        ..Settings::default()
    };
    let config = DataplaneConfig {
        listen: vec![Listen { transport: Transport::Udp, bind: SocketAddr::new(ip.parse()?, 0) }],
        ..sample::config(ip, 2, journal)
    };
    Ok(Dataplane::start(config, Arc::new(settings), Vec::new())?.0)
}

/// Relays packets one by one, and says how many allocations that took.
fn relayed(count: usize, from: &UdpSocket, to: SocketAddr, at: &UdpSocket, packet: &[u8]) -> Result<u64> {
    let mut buffer = [0; 2048];
    at.set_read_timeout(Some(PATIENCE))?;
    let mut before = 0;
    for number in 0..count + 200 {
        if number == 200 {
            before = ALLOCATIONS.load(Ordering::Relaxed);
        }
        if from.peer_addr().is_ok() {
            from.send(packet)?
        } else {
            from.send_to(packet, to)?
        };
        let length = at.recv(&mut buffer).context("a packet was not relayed")?;
        assert!(length >= 172);
    }
    Ok(ALLOCATIONS.load(Ordering::Relaxed) - before)
}

#[test]
fn no_heap_per_relayed_packet_from_socket_to_socket() -> Result<()> {
    const PACKETS: usize = 5000;
    COUNTED.with(|counted| counted.set(false));
    let directory = tempfile::tempdir()?;
    let dataplane = dataplane("127.1.17.1", directory.path())?;
    let relay = dataplane.listen()[0].bind;
    let peer = UdpSocket::bind("127.0.0.1:0")?;
    let mut channel_data = vec![0x40, 0, 0, 172];
    channel_data.resize(176, 9);

    let (socket, mut client, address) = allocate(relay, 1)?;
    bind(&socket, &mut client, peer.local_addr()?)?;
    // Two pairs, so that one may be of one worker and the other of two.
    let mut pairs = Vec::new();
    for seed in [2, 4] {
        let (mut alice, mut bob) = (allocate(relay, seed)?, allocate(relay, seed + 1)?);
        bind(&alice.0, &mut alice.1, bob.2)?;
        bind(&bob.0, &mut bob.1, alice.2)?;
        pairs.push((alice.0, bob.0));
    }
    let mut found = vec![
        ("to the peer", relayed(PACKETS, &socket, relay, &peer, &channel_data)?),
        ("to the client", relayed(PACKETS, &peer, address, &socket, &channel_data[4..])?),
    ];
    for (alice, bob) in &pairs {
        found.push(("between two clients", relayed(PACKETS, alice, relay, bob, &channel_data)?));
    }
    // Once a second a worker shows its counters.
    for (what, allocations) in found {
        assert!(allocations < PACKETS as u64 / 20, "{allocations} allocations in {PACKETS} packets {what}");
    }
    Ok(())
}
