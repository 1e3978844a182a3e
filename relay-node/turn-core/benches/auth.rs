//! What the core alone spends on requests: a stranger's, and an authenticated one. `cargo bench -p turn-core --bench auth`.

#[path = "../tests/support/mod.rs"]
mod support;

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use support::{CLIENT, Clock, PATH, Ports, addr, five_tuple, settings};
use turn_core::client::{Client, ClientConfig, Security};
use turn_core::wire::attribute::{Nonce, Realm, Username};
use turn_core::wire::{Class, MessageWriter, Method, TransactionId};
use turn_core::{Input, IpMeta, Key, Server, Transport, Verdict, WorkerId, credential};

/// A bare Allocate, the smallest request there is, and a Binding request.
fn bare(method: u8) -> Vec<u8> {
    [&[0, method, 0, 0, 0x21, 0x12, 0xA4, 0x42][..], &[7; 12]].concat()
}

/// A Refresh under a time-limited name, with integrity of no key and a nonce of nobody.
fn forged() -> Vec<u8> {
    let mut buffer = vec![0; 256];
    let mut writer = MessageWriter::new(&mut buffer, Class::Request, Method::Refresh, TransactionId([7; 12]));
    writer.attribute(&Username(b"4000000000:alice")).attribute(&Realm(b"turnpike")).attribute(&Nonce(&[b'n'; 41]));
    writer.integrity(b"no key");
    let len = writer.finish().expect("it is short");
    buffer.truncate(len);
    buffer
}

/// A server with a ring of two secrets.
fn server() -> Server {
    let mut settings = settings();
    settings.rest_secrets.0.insert(0, Key { id: 2, secret: b"newer".to_vec() });
    Server::new(WorkerId(0), addr(support::SERVER).ip(), 1, Arc::new(settings), [7; 32])
}

/// Allocates by these credentials and gives the Refresh that follows.
fn refresh(
    server: &mut Server,
    ports: &mut Ports,
    username: Vec<u8>,
    password: Vec<u8>,
    security: Security,
) -> Vec<u8> {
    let clock = Clock::new();
    let (transport, family, lifetime) = (Transport::Udp, None, None);
    let mut client = Client::new(ClientConfig { transport, username, password, family, lifetime, seed: [1; 32] })
        .with_security(security);
    client.allocate(clock.mono());
    while let Some(packet) = client.poll_transmit() {
        let input =
            Input::FromClient { from: five_tuple(addr(CLIENT)), path: PATH, packet: &packet, ip: IpMeta::default() };
        server.handle_input(clock.now(), input, ports);
        client.handle_packet(clock.mono(), server.reply());
    }
    assert_eq!(server.allocations(), 1);
    client.refresh(clock.mono(), 600);
    client.poll_transmit().expect("a Refresh")
}

fn requests(criterion: &mut Criterion) {
    let from = five_tuple(addr(CLIENT));
    let ip = IpMeta::default();
    // One request each 2 ms is answered, one each microsecond is soon one too many.
    let (answered, flood) = (Duration::from_millis(2), Duration::from_micros(1));
    for (name, packet, pace) in [
        ("401 to an Allocate", bare(3), answered),
        ("Binding", bare(1), answered),
        ("silence for an Allocate", bare(3), flood),
        ("silence for forged integrity", forged(), flood),
    ] {
        let (mut server, mut ports, mut clock) = (server(), Ports::default(), Clock::new());
        criterion.bench_function(name, |bench| {
            bench.iter(|| {
                clock.elapsed += pace;
                let input = Input::FromClient { from, path: PATH, packet: black_box(&packet), ip };
                server.handle_input(clock.now(), input, &mut ports)
            });
        });
    }
    let rest = |id, secret: &[u8]| {
        let minted = credential::mint(&Key { id, secret: secret.to_vec() }, b"alice", 4_000_000_000);
        (minted.username, minted.password.into_bytes())
    };
    let fixed = (b"user".to_vec(), b"password".to_vec());
    for (name, (username, password), security) in [
        ("Refresh by a fixed password", fixed.clone(), Security::Rfc5389),
        ("Refresh by the newest of two secrets", rest(2, b"newer"), Security::Rfc5389),
        ("Refresh by the oldest of two secrets", rest(1, b"secret"), Security::Rfc5389),
        ("Refresh by a fixed password, SHA-256", fixed.clone(), Security::Rfc8489),
        ("Refresh by a fixed password, USERHASH", fixed, Security::Userhash),
        ("Refresh by the newest of two secrets, SHA-256", rest(2, b"newer"), Security::Rfc8489),
    ] {
        let (mut server, mut ports, clock) = (server(), Ports::default(), Clock::new());
        let packet = refresh(&mut server, &mut ports, username, password, security);
        criterion.bench_function(name, |bench| {
            bench.iter(|| {
                let input = Input::FromClient { from, path: PATH, packet: black_box(&packet), ip };
                let verdict = server.handle_input(clock.now(), input, &mut ports);
                while server.poll_output().is_some() {}
                assert!(matches!(verdict, Verdict::Reply { .. }));
            });
        });
    }
}

criterion_group!(benches, requests);
criterion_main!(benches);
