//! No heap per relayed packet, in any direction, proved by counting every allocation of the thread.
#![allow(unsafe_code, reason = "a global allocator cannot be written without")]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use support::{CHANNEL_PEER, CLIENT, OTHER_PEER, PATH, Station, addr, five_tuple};
use turn_core::{Input, IpMeta, PeerAddr, Verdict};

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
