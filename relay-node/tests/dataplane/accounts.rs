//! The ledger says what was sent (promise P11): each packet of an allocation in its direction, over every way to its
//! client, whoever carries it; and it goes on after a restart, orderly or not.

use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use relay_node::accounts::{Totals, Usage};
use relay_node::dataplane::{Dataplane, DataplaneConfig, Listen, shard};
use turn_core::{EndReason, Transport};

use crate::client::{TurnClient, again, config, eventually, heard, peer, start};
use crate::restart::Relay;

/// A relay with controllers: what has ended stays until somebody has taken it.
fn with_store(ip: &str, workers: u16, directory: &Path) -> DataplaneConfig {
    DataplaneConfig { has_store: true, ..config(ip, workers, directory) }
}

/// What a user's only allocation has used, live or ended.
fn usage(dataplane: &Dataplane, user: &str) -> Option<Usage> {
    let accounts = dataplane.accounts();
    let mut all = accounts.live(0, 1).chain(accounts.ended(u64::MAX, usize::MAX));
    all.find(|usage| accounts.user(usage) == user.as_bytes())
}

/// What a client and its peer have said to each other, as the test knows it.
#[derive(Default)]
struct Said(Totals);

impl Said {
    fn out(&mut self, bytes: usize) {
        self.0.packets_to_peer += 1;
        self.0.bytes_to_peer += bytes as u64;
    }

    fn back(&mut self, bytes: usize) {
        self.0.packets_to_client += 1;
        self.0.bytes_to_client += bytes as u64;
    }
}

/// Packets of many lengths, both ways, by indications and by a channel.
fn talk(client: &mut TurnClient, relayed: SocketAddr, peer: &UdpSocket, said: &mut Said) -> Result<()> {
    let address = peer.local_addr()?;
    client.permit(address)?;
    for round in 0..2 {
        for length in [0, 1, 3, 172, 1200, 4000] {
            client.send(address, &vec![1; length])?;
            assert_eq!(heard(peer)?.1.len(), length);
            said.out(length);
            peer.send_to(&vec![2; length], relayed)?;
            assert_eq!(client.receive()?.1.len(), length);
            said.back(length);
        }
        // A burst, which leaves in few messages.
        for _ in 0..30 {
            client.send(address, &[3; 500])?;
            said.out(500);
        }
        for _ in 0..30 {
            heard(peer)?;
        }
        if round == 0 {
            client.bind_channel(0x4001, address)?;
        }
    }
    // Nobody permitted this one.
    UdpSocket::bind("127.0.0.2:0")?.send_to(b"stranger", relayed)?;
    Ok(())
}

fn expect(dataplane: &Dataplane, user: &str, said: &Said) -> Result<()> {
    let mut last = None;
    let result = eventually("everything is counted", || {
        last = usage(dataplane, user).map(|usage| usage.totals);
        (last == Some(said.0)).then_some(())
    });
    result.with_context(|| format!("{user}: {last:?} instead of {:?}", said.0))
}

#[test]
fn every_way_to_a_client_is_counted_exactly() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&with_store("127.1.20.1", 2, directory.path()))?;
    for transport in [Transport::Udp, Transport::Tcp] {
        // More than one of each, so that both workers have some.
        for _ in 0..4 {
            let mut client = TurnClient::to(&dataplane, transport, "127.0.0.1", "alice")?;
            let relayed = client.allocate()?;
            let mut said = Said::default();
            talk(&mut client, relayed, &peer("127.0.0.1")?, &mut said)?;
            expect(&dataplane, "alice", &said)?;
            client.delete()?;
            let ended = eventually("its end", || usage(&dataplane, "alice").filter(|usage| usage.ended.is_some()))?;
            assert_eq!(ended.ended.and_then(|ended| ended.reason), Some(EndReason::Deleted));
            assert_eq!((ended.totals, ended.continued, ended.unclean), (said.0, false, false), "after its end");
            dataplane.accounts().forget(ended.index, ended.origin);
        }
    }
    Ok(())
}

#[test]
fn both_allocations_of_a_pair_are_charged_on_one_worker_and_on_two() -> Result<()> {
    for (ip, apart) in [("127.1.20.2", 0), ("127.1.20.3", 1)] {
        let directory = tempfile::tempdir()?;
        let (dataplane, _changes) = start(&with_store(ip, 2, directory.path()))?;
        let client = |worker, user| {
            eventually("a port of that worker", || {
                let client = TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", user).ok()?;
                (shard::worker(client.local().ok()?, 2).0 == worker).then_some(client)
            })
        };
        let (mut alice, mut bob) = (client(0, "alice")?, client(apart, "bob")?);
        let (of_alice, of_bob) = (alice.allocate()?, bob.allocate()?);
        alice.bind_channel(0x4000, of_bob)?;
        bob.permit(of_alice)?;
        let (mut by_alice, mut by_bob) = (Said::default(), Said::default());
        for number in 0..200usize {
            alice.send(of_bob, &vec![1; number])?;
            assert_eq!(bob.receive()?.1.len(), number);
            by_alice.out(number);
            by_bob.back(number);
            bob.send(of_alice, b"six by")?;
            alice.receive()?;
            by_bob.out(6);
            by_alice.back(6);
        }
        expect(&dataplane, "alice", &by_alice)?;
        expect(&dataplane, "bob", &by_bob)?;
    }
    Ok(())
}

#[test]
fn a_restart_goes_on_counting_where_the_last_process_ended() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut config = with_store("127.1.20.4", 2, directory.path());
    let (mut dataplane, _) = start(&config)?;
    let mut client = TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice")?;
    let (relayed, peer) = (client.allocate()?, peer("127.0.0.1")?);
    let mut said = Said::default();
    let first = usage(&dataplane, "alice").context("counted")?.origin;
    for workers in [2, 1, 3] {
        if workers != config.workers {
            config = DataplaneConfig { workers, ..again(&config, &dataplane) };
            dataplane.stop();
            (dataplane, _) = start(&config)?;
        }
        talk(&mut client, relayed, &peer, &mut said)?;
        expect(&dataplane, "alice", &said)?;
    }
    let usage = usage(&dataplane, "alice").context("counted")?;
    assert_eq!((usage.origin, usage.continued), (first, false), "one count through all of it");
    Ok(())
}

/// Packets of one turn of a worker: what is not counted yet when it is killed.
const BATCH: u64 = 600;
/// Packets on their way at a time: no socket drops any.
const WINDOW: u64 = 200;

#[test]
fn after_kill_9_the_count_is_short_by_a_batch_at_most_and_never_over() -> Result<()> {
    const USERS: [&str; 2] = ["alice", "bob"];
    let directory = tempfile::tempdir()?;
    let mut address: SocketAddr = "127.1.20.5:0".parse()?;
    // One of each worker.
    let mut clients: Vec<(TurnClient, SocketAddr)> = Vec::new();
    let ends = [(peer("127.0.0.1")?, AtomicU64::new(0)), (peer("127.0.0.1")?, AtomicU64::new(0))];
    for round in 1..=4u64 {
        let relay = Relay::start(directory.path(), &address.to_string())?;
        address = relay.address;
        while clients.len() < 2 {
            let (number, to) = (clients.len(), ends[clients.len()].0.local_addr()?);
            let mut client = TurnClient::new(Transport::Udp, "127.0.0.1", address, USERS[number])?;
            if usize::from(shard::worker(client.local()?, 2).0) == number {
                client.allocate()?;
                client.bind_channel(0x4000, to)?;
                clients.push((client, to));
            }
        }
        let killed = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for (peer, received) in &ends {
                scope.spawn(|| receive_until(&killed, peer, received));
            }
            let flooded = flood(&mut clients, &ends, round * 2000);
            // In the middle of it.
            drop(relay);
            killed.store(true, Ordering::Release);
            flooded
        })?;
        let config = DataplaneConfig { listen: vec![udp(address)], ..with_store("127.1.20.5", 2, directory.path()) };
        let (dataplane, _) = start(&config)?;
        for (user, (_, received)) in USERS.into_iter().zip(&ends) {
            let (usage, received) = (usage(&dataplane, user).context(user)?, received.load(Ordering::Acquire));
            let Totals { packets_to_peer: packets, bytes_to_peer: bytes, .. } = usage.totals;
            assert!(packets <= received, "{user}: {packets} of {received}: over");
            assert!(received - packets <= BATCH * round, "{user}: {packets} of {received}, {round} kills");
            assert!(bytes <= received * 172 && received * 172 - bytes <= BATCH * round * 172, "{user}: {bytes} bytes");
        }
    }
    Ok(())
}

fn udp(bind: SocketAddr) -> Listen {
    Listen { transport: Transport::Udp, bind }
}

/// Counts what comes. Once the relay is dead nothing more does: what has come is in the socket.
fn receive_until(killed: &AtomicBool, peer: &UdpSocket, received: &AtomicU64) {
    let mut buffer = [0; 2048];
    // It cannot fail: the time is not zero.
    let _ = peer.set_read_timeout(Some(Duration::from_millis(20)));
    loop {
        let was_killed = killed.load(Ordering::Acquire);
        match peer.recv(&mut buffer) {
            Ok(_) => drop(received.fetch_add(1, Ordering::AcqRel)),
            Err(_) if was_killed => return,
            Err(_) => {}
        }
    }
}

/// Sends until every peer has so much, as fast as nothing is dropped.
fn flood(clients: &mut [(TurnClient, SocketAddr)], ends: &[(UdpSocket, AtomicU64); 2], enough: u64) -> Result<()> {
    let received = |number: usize| ends[number].1.load(Ordering::Acquire);
    let mut sent = [received(0), received(1)];
    let deadline = Instant::now() + Duration::from_secs(20);
    while received(0) < enough || received(1) < enough {
        for (number, (client, to)) in clients.iter_mut().enumerate() {
            while sent[number] < received(number) + WINDOW {
                client.send(*to, &[7; 172])?;
                sent[number] += 1;
            }
        }
        if Instant::now() > deadline {
            bail!("{sent:?} sent, {} and {} received", received(0), received(1));
        }
        std::thread::yield_now();
    }
    Ok(())
}

/// Of what begins and ends between two reports nothing is heard but what it has used, and it does not come back.
#[test]
fn what_is_never_told_is_counted_all_the_same() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let config = with_store("127.1.6.60", 1, directory.path());
    let (dataplane, mut changes) = start(&config)?;
    let peer = peer("127.0.0.1")?;
    let mut client = TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice")?;
    client.allocate()?;
    client.permit(peer.local_addr()?)?;
    client.send(peer.local_addr()?, b"short")?;
    assert_eq!(heard(&peer)?.1, b"short");
    client.delete()?;
    let used = eventually("its end", || usage(&dataplane, "alice").filter(|usage| usage.ended.is_some()))?;
    assert_eq!((used.totals.packets_to_peer, used.totals.bytes_to_peer), (1, 5));
    assert_eq!(used.ended.and_then(|ended| ended.reason), Some(EndReason::Deleted));
    assert!(changes.try_recv().is_err(), "nobody is told");

    let config = again(&config, &dataplane);
    dataplane.stop();
    let (dataplane, mut changes) = start(&config)?;
    assert!(changes.try_recv().is_err() && dataplane.accounts().live(0, 1).next().is_none(), "it has ended");
    Ok(())
}
