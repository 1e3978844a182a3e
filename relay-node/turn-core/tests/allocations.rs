//! No heap per relayed packet, in any direction, and little of it per allocation of a client, proved by counting every
//! allocation of the thread.
#![allow(unsafe_code, reason = "a global allocator cannot be written without")]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::{Ipv4Addr, SocketAddr};

use support::{CHANNEL_PEER, CLIENT, Clock, OTHER_PEER, PATH, Station, addr, five_tuple};
use turn_core::{
    BindError, BindRequest, Bound, FiveTuple, Host, Input, IpMeta, PeerAddr, RelayedAddr, Route, Server, Verdict,
};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    static BYTES: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    ALLOCATIONS.with(|count| count.set(count.get() + 1));
    BYTES.with(|count| count.set(count.get() + bytes));
}

struct Counting;

// SAFETY: every call goes to the system allocator unchanged; the counters are plain thread-local integers.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        BYTES.with(|count| count.set(count.get() - layout.size() as isize));
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: the caller keeps the contract of `realloc`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn assert_no_heap(what: &str, mut relay: impl FnMut() -> bool) {
    for _ in 0..16 {
        assert!(relay(), "{what} is relayed");
    }
    let before = ALLOCATIONS.with(Cell::get);
    for _ in 0..1000 {
        relay();
    }
    assert_eq!(ALLOCATIONS.with(Cell::get) - before, 0, "heap allocations in 1,000 packets of {what}");
}

#[test]
fn no_heap_per_relayed_packet() {
    no_heap_in(Station::new());
    no_heap_in(Station::limited());
}

fn no_heap_in(station: Station) {
    let Station { clock, mut server, mut ports, relayed } = station;
    let mut packet = vec![0x40, 0, 0, 172];
    packet.resize(176, 9);
    let indication = support::send_indication(addr(OTHER_PEER), &[9; 172]);

    for (what, packet) in [("ChannelData", &packet), ("Send", &indication)] {
        assert_no_heap(what, || {
            let from = five_tuple(addr(CLIENT));
            let input = Input::FromClient { from, path: PATH, packet, ip: IpMeta::default() };
            matches!(server.handle_input(clock.now(), input, &mut ports), Verdict::Send { .. })
        });
    }
    for (what, peer) in [("peer data by channel", CHANNEL_PEER), ("peer data by indication", OTHER_PEER)] {
        let from = PeerAddr::new(addr(peer));
        assert_no_heap(what, || {
            let input = Input::FromPeer { relayed, from, packet: &[9; 172], ip: IpMeta::default() };
            matches!(server.handle_input(clock.now(), input, &mut ports), Verdict::Send { .. })
        });
    }
}

/// Bytes that an idle allocation takes of the core: itself, its names in the indexes, its timer; in tables that have room
/// for 1,024. What the whole process has of it is measured by `relay-node/tests/memory.rs`.
const IDLE: isize = 640;

/// As many ports as anybody wants, and no heap for them.
struct Endless(u32);

impl Host for Endless {
    fn bind(&mut self, _: BindRequest<'_>) -> Result<Bound, BindError> {
        self.0 += 1;
        let ip = Ipv4Addr::from_bits(0xC633_6400 + (self.0 >> 14));
        let address = SocketAddr::from((ip, 49_152 + (self.0 & 0x3FFF) as u16));
        Ok(Bound { relayed: RelayedAddr { bound: address, advertised: address }, reservation: None })
    }

    fn route(&self, _: PeerAddr) -> Route {
        Route::Internet
    }
}

fn exchange(server: &mut Server, ports: &mut Endless, clock: &Clock, from: FiveTuple, packet: &[u8]) {
    let input = Input::FromClient { from, path: PATH, packet, ip: IpMeta::default() };
    assert!(matches!(server.handle_input(clock.now(), input, ports), Verdict::Reply { .. }));
    while server.poll_output().is_some() {}
}

/// The requests by which a client makes an allocation and ends it.
fn requests(server: &mut Server, ports: &mut Endless, from: FiveTuple) -> [Vec<u8>; 2] {
    let clock = Clock::new();
    let mut client = support::client(None, None, 1);
    let mut last = Vec::new();
    client.allocate(clock.mono());
    while let Some(packet) = client.poll_transmit() {
        exchange(server, ports, &clock, from, &packet);
        client.handle_packet(clock.mono(), server.reply());
        last = packet;
    }
    client.refresh(clock.mono(), 0);
    let end = client.poll_transmit().expect("a Refresh");
    exchange(server, ports, &clock, from, &end);
    [last, end]
}

#[test]
fn an_idle_allocation_is_small_and_leaves_nothing() {
    const CLIENTS: u32 = 800;
    let clock = Clock::new();
    let mut ports = Endless(0);
    let (mut server, mut helper) = (support::server(), support::server());
    let said: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let from = five_tuple((Ipv4Addr::from_bits(0x0A01_0000 + (number << 8)), 5000).into());
            (from, requests(&mut helper, &mut ports, from))
        })
        .collect();
    let bytes = || BYTES.with(Cell::get);
    let empty = bytes();
    let mut left = [0; 5];
    for left in &mut left {
        for (from, [allocate, _]) in &said {
            exchange(&mut server, &mut ports, &clock, *from, allocate);
        }
        assert_eq!(server.allocations(), said.len());
        let each = (bytes() - empty) / said.len() as isize;
        assert!(each <= IDLE, "{each} bytes each");
        for (from, [_, end]) in &said {
            exchange(&mut server, &mut ports, &clock, *from, end);
        }
        assert_eq!((server.allocations(), server.poll_timeout()), (0, None));
        *left = bytes() - empty;
    }
    // An index may double once, because of what was taken out of it.
    assert!(left[3] == left[4] && left[4] <= left[0] + left[0] / 10, "bytes left behind: {left:?}");
}
