//! No heap per relayed packet, in any direction, proved by counting every allocation of the thread.
#![allow(unsafe_code, reason = "a global allocator cannot be written without")]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use support::{Clock, PATH, Ports, addr, five_tuple};
use turn_core::client::{Client, ClientConfig, Event};
use turn_core::wire::ChannelNumber;
use turn_core::{Input, IpMeta, PeerAddr, RelayedAddr, Server, Transport, Verdict};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call goes to the system allocator unchanged; the counter is a plain thread-local integer.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps the contract of `realloc`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

struct Fixture {
    clock: Clock,
    server: Server,
    ports: Ports,
    relayed: RelayedAddr,
}

const CLIENT: &str = "203.0.113.1:5000";
const CHANNEL_PEER: &str = "203.0.113.77:7000";
const OTHER_PEER: &str = "203.0.113.78:7000";

/// One allocation with a channel to one peer and a permission for another.
fn fixture() -> Fixture {
    let clock = Clock::new();
    let (mut server, mut ports) = (support::server(), Ports::default());
    let config = ClientConfig {
        transport: Transport::Udp,
        username: b"user".to_vec(),
        password: b"password".to_vec(),
        family: None,
        lifetime: None,
        seed: [1; 32],
    };
    let mut client = Client::new(config);
    client.allocate(clock.mono());
    let mut allocated = None;
    let mut asked = false;
    while let Some(packet) = client.poll_transmit() {
        let input =
            Input::FromClient { from: five_tuple(addr(CLIENT)), path: PATH, packet: &packet, ip: IpMeta::default() };
        let verdict = server.handle_input(clock.now(), input, &mut ports);
        assert!(matches!(verdict, Verdict::Reply { .. }), "{verdict:?}");
        client.handle_packet(clock.mono(), server.reply());
        while server.poll_output().is_some() {}
        while let Some(event) = client.poll_event() {
            match event {
                Event::Allocated { relayed, .. } => allocated = Some(relayed),
                Event::Failed(..) => panic!("{event:?}"),
                _ => {}
            }
        }
        if allocated.is_some() && !asked {
            asked = true;
            let channel = ChannelNumber::new(0x4000).expect("in range");
            client.bind_channel(clock.mono(), channel, addr(CHANNEL_PEER));
            client.permit(clock.mono(), &[addr(OTHER_PEER).ip()]);
        }
    }
    let relayed = allocated.expect("allocated");
    Fixture { clock, server, ports, relayed: RelayedAddr { bound: relayed, advertised: relayed } }
}

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
    let Fixture { clock, mut server, mut ports, relayed } = fixture();
    let mut packet = vec![0x40, 0, 0, 172];
    packet.resize(176, 9);
    let mut channel_user = Client::new(ClientConfig {
        transport: Transport::Udp,
        username: Vec::new(),
        password: Vec::new(),
        family: None,
        lifetime: None,
        seed: [2; 32],
    });
    channel_user.send(addr(OTHER_PEER), &[9; 172]);
    let indication = channel_user.poll_transmit().expect("a Send indication");

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
