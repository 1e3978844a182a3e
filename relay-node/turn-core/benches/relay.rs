//! What the core alone spends on a packet: `cargo bench -p turn-core`. The kernel's share is measured elsewhere.

#[path = "../tests/support/mod.rs"]
mod support;

use criterion::{Criterion, criterion_group, criterion_main};
use std::hint::black_box;
use support::{PATH, Station, addr, five_tuple};
use turn_core::wire::Message;
use turn_core::{Input, IpMeta, PeerAddr};

fn relay(criterion: &mut Criterion) {
    let mut station = Station::new();
    let (now, relayed, ip) = (station.clock.now(), station.relayed, IpMeta::default());
    let from = five_tuple(addr(support::CLIENT));
    let mut channel_data = vec![0x40, 0, 0, 172];
    channel_data.resize(176, 9);
    let indication = support::send_indication(addr(support::OTHER_PEER), &[9; 172]);

    criterion.bench_function("parse a Send indication of 172 bytes", |bench| {
        bench.iter(|| Message::parse(black_box(&indication)).is_ok());
    });
    for (name, packet) in [("ChannelData to a peer", &channel_data), ("Send to a peer", &indication)] {
        criterion.bench_function(name, |bench| {
            bench.iter(|| {
                let input = Input::FromClient { from, path: PATH, packet: black_box(packet), ip };
                station.server.handle_input(now, input, &mut station.ports)
            });
        });
    }
    for (name, peer) in
        [("peer to a channel", support::CHANNEL_PEER), ("peer to a Data indication", support::OTHER_PEER)]
    {
        let from = PeerAddr::new(addr(peer));
        criterion.bench_function(name, |bench| {
            bench.iter(|| {
                let input = Input::FromPeer { relayed, from, packet: black_box(&[9; 172]), ip };
                station.server.handle_input(now, input, &mut station.ports)
            });
        });
    }
}

/// The same with limits of bandwidth for the allocation, its user and the node, none of which is reached.
fn limited(criterion: &mut Criterion) {
    let mut station = Station::limited();
    let (relayed, ip) = (station.relayed, IpMeta::default());
    let from = five_tuple(addr(support::CLIENT));
    let mut channel_data = vec![0x40, 0, 0, 172];
    channel_data.resize(176, 9);
    criterion.bench_function("limited: ChannelData to a peer", |bench| {
        bench.iter(|| {
            let input = Input::FromClient { from, path: PATH, packet: black_box(&channel_data), ip };
            station.clock.elapsed += std::time::Duration::from_nanos(500);
            station.server.handle_input(station.clock.now(), input, &mut station.ports)
        });
    });
    let peer = PeerAddr::new(addr(support::CHANNEL_PEER));
    criterion.bench_function("limited: peer to a channel", |bench| {
        bench.iter(|| {
            let input = Input::FromPeer { relayed, from: peer, packet: black_box(&[9; 172]), ip };
            station.clock.elapsed += std::time::Duration::from_nanos(500);
            station.server.handle_input(station.clock.now(), input, &mut station.ports)
        });
    });
}

criterion_group!(benches, relay, limited);
criterion_main!(benches);
