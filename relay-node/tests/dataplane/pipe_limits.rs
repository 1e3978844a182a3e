//! Limits of bandwidth for the data connections of TCP allocations (RFC 6062; abuse.md E): nothing is lost, it takes longer.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use relay_node::dataplane::Dataplane;
use rustls::ClientConfig as TlsConfig;
use turn_core::{Limits, Settings};

use crate::client::{config, settings};
use crate::tcp_allocations::{Data, Session, accept, listener, noise, secure};

/// Bytes a second.
const RATE: u64 = 100_000;
/// What 300 kB take, of which the first 100 kB are a second's burst.
const TWO_SECONDS: Duration = Duration::from_secs(2);
/// Rounding, and what a read may take too much.
const EARLY: Duration = Duration::from_millis(100);
/// Beyond any scheduling on a loaded machine.
const LATE: Duration = Duration::from_secs(6);

/// A relay of three workers, so that those who share a limit are of several.
struct Relay {
    dataplane: Dataplane,
    tls: Arc<TlsConfig>,
    _directory: tempfile::TempDir,
}

impl Relay {
    fn start(ip: &str, limits: Limits) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let (config, tls) = secure(config(ip, 3, directory.path()), directory.path())?;
        let (dataplane, _changes) = Dataplane::start(config, with(limits), Vec::new())?;
        Ok(Self { dataplane, tls, _directory: directory })
    }

    fn allocate(&self, tls: bool, user: &str) -> Result<Session> {
        Ok(Session::allocated_by(&self.dataplane, tls.then_some(&self.tls), user)?.0)
    }

    /// A data connection and its peer, who listens at an address of its own (RFC 6062 §5.2: one connection to each).
    fn join(&self, control: &mut Session, tls: bool, user: &str) -> Result<(Data, TcpStream)> {
        let (listener, address) = listener()?;
        let id = control.connect(address)?;
        let (peer, _) = accept(&listener)?;
        Ok((Data::bind_by(&self.dataplane, tls.then_some(&self.tls), user, id, b"")?, peer))
    }
}

fn with(limits: Limits) -> Arc<Settings> {
    Arc::new(Settings { limits, ..Settings::clone(&settings()) })
}

/// Sends so much to the client and ends; how long that takes.
fn pull(began: Instant, mut data: Data, mut peer: TcpStream, length: usize) -> Result<Duration> {
    let payload = noise(length);
    let writer = std::thread::spawn({
        let payload = payload.clone();
        move || peer.write_all(&payload).and_then(|()| peer.shutdown(Shutdown::Write)).map(|()| peer)
    });
    ensure!(data.read(length)? == payload, "whole and in order");
    let took = began.elapsed();
    let _peer = writer.join().expect("no panic")?;
    data.ends().context("the end stands behind the last byte")?;
    Ok(took)
}

/// As many transfers to clients at once, each of the same length; how long each takes.
fn pull_all(pairs: Vec<(Data, TcpStream)>, length: usize) -> Result<Vec<Duration>> {
    let began = Instant::now();
    let pull = |(data, peer)| std::thread::spawn(move || pull(began, data, peer, length));
    let threads: Vec<_> = pairs.into_iter().map(pull).collect();
    threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
}

fn is_two_seconds(took: Duration) -> Result<()> {
    ensure!((TWO_SECONDS - EARLY..TWO_SECONDS + LATE).contains(&took), "it took {took:?}");
    Ok(())
}

#[test]
fn a_data_connection_keeps_the_limit_of_its_allocation_both_ways() -> Result<()> {
    let limits = Limits { bytes_per_allocation: RATE, ..Limits::default() };
    let relay = Relay::start("127.1.7.1", limits)?;
    for tls in [false, true] {
        let mut control = relay.allocate(tls, "alice")?;
        let (data, peer) = relay.join(&mut control, tls, "alice")?;
        is_two_seconds(pull_all(vec![(data, peer)], 300_000)?[0]).with_context(|| format!("to the client, {tls}"))?;

        // That has used nothing of the other direction.
        let (mut data, mut peer) = relay.join(&mut control, tls, "alice")?;
        let payload = noise(300_000);
        let began = Instant::now();
        let reader = std::thread::spawn(move || {
            let mut all = vec![0; 300_000];
            peer.read_exact(&mut all).map(|()| (all, began.elapsed(), peer))
        });
        data.write(&payload)?;
        let (all, took, _peer) = reader.join().expect("no panic")?;
        assert!(all == payload, "whole and in order");
        is_two_seconds(took).with_context(|| format!("to the peer, {tls}"))?;
        // Who waits for bandwidth does not turn round and round.
        for worker in relay.dataplane.snapshots() {
            assert!(worker.cpu_micros < 1_000_000, "{} us", worker.cpu_micros);
        }
    }
    Ok(())
}

#[test]
fn data_connections_of_an_allocation_share_its_limit() -> Result<()> {
    let limits = Limits { bytes_per_allocation: RATE, ..Limits::default() };
    let relay = Relay::start("127.1.7.2", limits)?;
    let mut control = relay.allocate(false, "alice")?;
    let pairs = [false, true].map(|tls| relay.join(&mut control, tls, "alice"));
    let pairs = pairs.into_iter().collect::<Result<Vec<_>>>()?;
    // Another one of hers is not slower for it.
    let mut other = relay.allocate(false, "alice")?;
    let apart = relay.join(&mut other, false, "alice")?;
    let apart = std::thread::spawn(move || pull_all(vec![apart], 100_000));
    let took = pull_all(pairs, 150_000)?;
    let last = took.iter().max().context("two")?;
    is_two_seconds(*last)?;
    // By turns: who has all of the burst still waits for the rest of it in twice the time that it takes alone.
    let first = took.iter().min().context("two")?;
    assert!(*first > Duration::from_millis(700), "{took:?}");
    assert!(apart.join().expect("no panic")?[0] < *last);
    Ok(())
}

#[test]
fn allocations_of_a_user_and_of_the_node_share() -> Result<()> {
    let none = Limits::default();
    for (ip, limits, users, another) in [
        ("127.1.7.3", Limits { bytes_per_user: RATE, ..none.clone() }, ["alice", "alice"], Some("bob")),
        ("127.1.7.4", Limits { bytes_per_node: RATE, ..none }, ["alice", "bob"], None),
    ] {
        let relay = Relay::start(ip, limits)?;
        let mut controls = Vec::new();
        let mut join = |user| {
            let mut control = relay.allocate(false, user)?;
            let pair = relay.join(&mut control, false, user)?;
            controls.push(control);
            anyhow::Ok(pair)
        };
        let pairs = users.into_iter().map(&mut join).collect::<Result<Vec<_>>>()?;
        let another = another.map(&mut join).transpose()?;
        let another = another.map(|pair| std::thread::spawn(move || pull_all(vec![pair], 100_000)));
        let took = pull_all(pairs, 150_000)?;
        let last = *took.iter().max().context("two")?;
        is_two_seconds(last).with_context(|| ip.to_owned())?;
        if let Some(another) = another {
            assert!(another.join().expect("no panic")?[0] < last, "another user is not slower for it");
        }
    }
    Ok(())
}

#[test]
fn who_waits_goes_on_when_the_limit_is_lifted() -> Result<()> {
    // Three minutes.
    let limits = Limits { bytes_per_allocation: 1000, ..Limits::default() };
    let relay = Relay::start("127.1.7.5", limits)?;
    let mut control = relay.allocate(false, "alice")?;
    let (mut data, mut peer) = relay.join(&mut control, false, "alice")?;
    let payload = noise(200_000);
    let writer = std::thread::spawn({
        let payload = payload.clone();
        move || peer.write_all(&payload).map(|()| peer)
    });
    // The burst has gone before that, and it waits.
    let began = Instant::now();
    assert!(data.read(4000)? == payload[..4000]);
    assert!(began.elapsed() > Duration::from_secs(1), "{:?}", began.elapsed());
    relay.dataplane.configure(settings());
    assert!(data.read(196_000)? == payload[4000..], "whole and in order");
    let _peer = writer.join().expect("no panic")?;
    Ok(())
}
