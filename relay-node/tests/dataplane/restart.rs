//! Allocations outlive the process (promise P2).

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, UdpSocket};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use relay_node::dataplane::{Listen, RelayIp};
use relay_node::journal;
use turn_core::{KeyRing, Transport};

use crate::client::{TurnClient, again, config, dropped, eventually, heard, peer, start, start_with};

/// A client with a channel, and the peer at its other end.
struct Call {
    client: TurnClient,
    peer: UdpSocket,
    relayed: SocketAddr,
}

impl Call {
    fn new(mut client: TurnClient) -> Result<Self> {
        let peer = peer("127.0.0.1")?;
        let relayed = client.allocate()?;
        client.bind_channel(0x4000, peer.local_addr()?)?;
        Ok(Self { client, peer, relayed })
    }

    /// The peer speaks first: not a byte has come from the client.
    fn goes_on(&mut self) -> Result<()> {
        let address = self.peer.local_addr()?;
        self.peer.send_to(b"ping", self.relayed)?;
        assert_eq!(self.client.receive()?, (address, b"ping".to_vec()));
        self.client.send(address, b"pong")?;
        assert_eq!(heard(&self.peer)?, (self.relayed, b"pong".to_vec()));
        Ok(())
    }
}

#[test]
fn a_thousand_clients_stay_with_their_workers_through_a_restart_with_more_of_them() -> Result<()> {
    const CLIENTS: usize = 1000;
    let directory = tempfile::tempdir()?;
    let mut config = config("127.1.2.1", 2, directory.path());
    let (mut dataplane, _) = start(&config)?;
    let mut calls = Vec::new();
    for _ in 0..CLIENTS {
        calls.push(Call::new(TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice")?)?);
    }
    for workers in [2, 3, 1] {
        if workers != config.workers {
            config = again(&config, &dataplane);
            config.workers = workers;
            dataplane.stop();
            (dataplane, _) = start(&config)?;
        }
        for call in &mut calls {
            call.goes_on().with_context(|| format!("with {workers} workers"))?;
        }
        let snapshots = eventually("every packet is counted", || {
            let snapshots = dataplane.snapshots();
            let packets: u64 = snapshots.iter().map(|worker| worker.packets[0]).sum();
            (packets == CLIENTS as u64).then_some(snapshots)
        })?;
        assert_eq!(snapshots.iter().map(|worker| worker.crossed).sum::<u64>(), 0, "{workers} workers");
        assert_eq!(snapshots.iter().map(|worker| worker.allocations).sum::<u64>(), CLIENTS as u64);
        let least = CLIENTS as u64 / u64::from(workers) / 2;
        assert!(snapshots.iter().all(|worker| worker.allocations >= least), "one worker has them all: {snapshots:?}");
    }
    Ok(())
}

#[test]
fn stopping_leaves_allocations_in_the_journal_and_ended_ones_out_of_it() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let config = config("127.1.2.2", 2, directory.path());
    let (dataplane, _changes) = start(&config)?;
    let mut calls = Vec::new();
    for _ in 0..5 {
        calls.push(Call::new(TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice")?)?);
    }
    calls[0].client.delete()?;
    dataplane.stop();
    let loaded = journal::load(directory.path(), &KeyRing::default())?;
    let by_port: HashMap<u16, _> = loaded.records.iter().map(|record| (record.relayed[0].port(), record)).collect();
    assert_eq!((by_port.len(), loaded.refused.total()), (4, 0));
    for call in &calls[1..] {
        let record = by_port[&call.relayed.port()];
        assert_eq!(record.five_tuple.client, call.client.local()?);
        assert_eq!(record.channels[0].1.socket_addr(), call.peer.local_addr()?);
    }
    Ok(())
}

/// Serves until it is killed; run as a process of its own by [`Relay::start`].
#[test]
#[ignore = "the process that another test kills"]
fn relay_process() -> Result<()> {
    let directory = std::env::var("RELAY_PROCESS").context("RELAY_PROCESS names no directory")?;
    let bind: SocketAddr = std::env::var("RELAY_LISTEN")?.parse()?;
    let mut config = config(&bind.ip().to_string(), 2, directory.as_ref());
    config.listen = vec![Listen { transport: Transport::Udp, bind }];
    config.has_store = true;
    let (dataplane, _changes) = start(&config)?;
    writeln!(std::io::stderr(), "listen={}", dataplane.listen()[0].bind)?;
    loop {
        std::thread::park();
    }
}

/// A process that is killed when this goes.
pub(crate) struct Relay {
    child: Child,
    pub(crate) address: SocketAddr,
}

impl Relay {
    pub(crate) fn start(directory: &std::path::Path, listen: &str) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--ignored", "--exact", "restart::relay_process", "--nocapture"])
            .env("RELAY_PROCESS", directory)
            .env("RELAY_LISTEN", listen)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut lines = BufReader::new(child.stderr.take().context("a pipe")?).lines();
        let address = lines.find_map(|line| line.ok()?.strip_prefix("listen=")?.parse().ok());
        match address {
            Some(address) => Ok(Self { child, address }),
            None => anyhow::bail!("the process ended: {:?}", child.wait()),
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // SIGKILL: no goodbye.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn allocations_go_on_after_kill_9() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let relay = Relay::start(directory.path(), "127.1.2.3:0")?;
    let address = relay.address;
    let mut calls = Vec::new();
    for _ in 0..20 {
        calls.push(Call::new(TurnClient::new(Transport::Udp, "127.0.0.1", address, "alice")?)?);
    }
    // At once after the last answer: what was answered was in the journal before.
    drop(relay);
    let relay = Relay::start(directory.path(), &address.to_string())?;
    for call in &mut calls {
        call.goes_on()?;
        call.client.permit("127.0.0.2:1".parse()?).context("credentials go on too")?;
    }
    drop(relay);
    let _relay = Relay::start(directory.path(), &address.to_string())?;
    calls.iter_mut().try_for_each(Call::goes_on)
}

#[test]
fn records_come_back_only_where_they_belong() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut config = config("127.1.2.4", 2, directory.path());
    let (dataplane, _changes) = start(&config)?;
    let mut calls = Vec::new();
    for _ in 0..3 {
        calls.push(Call::new(TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice")?)?);
    }
    config = again(&config, &dataplane);
    dataplane.stop();
    let records = journal::load(directory.path(), &KeyRing::default())?.records;
    let find = |call: &Call| records.iter().position(|record| record.relayed[0].advertised == call.relayed);
    let order: Vec<usize> = calls.iter().filter_map(find).collect();
    let mut foreign = records[order[0]].clone();
    foreign.relayed[0].advertised.set_ip("192.0.2.1".parse()?);
    let taken = records[order[1]].clone();
    let _thief = UdpSocket::bind(taken.relayed[0].bound)?;
    // Behind a NAT the address sockets are bound to may be another one on this machine.
    let mut moved = records[order[2]].clone();
    moved.relayed[0].bound.set_ip("10.9.9.9".parse()?);
    // An older state of the same allocation does not count.
    let mut older = moved.clone();
    older.epoch = 0;
    older.channels.clear();

    let (dataplane, _changes) = start_with(&config, vec![older.clone(), foreign, taken, moved, older])?;
    calls[2].goes_on()?;
    eventually("both are counted", || {
        (dropped(&dataplane, "restore_foreign") == 1 && dropped(&dataplane, "restore_address") == 1).then_some(())
    })?;
    let held = || dataplane.snapshots().iter().map(|worker| worker.allocations).sum::<u64>();
    eventually("the one that belongs is held", || (held() == 1).then_some(()))
}

#[test]
fn records_that_come_while_serving_join_and_change_nothing_that_lives() -> Result<()> {
    let (directory, empty) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let first = config("127.1.2.5", 2, directory.path());
    let (dataplane, _changes) = start(&first)?;
    let mut call = Call::new(TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice")?)?;
    let mut second = again(&first, &dataplane);
    dataplane.stop();
    let records = journal::load(directory.path(), &KeyRing::default())?.records;

    // The state directory was deleted; the store's records come when the relay serves already.
    second.journal = empty.path().into();
    let (dataplane, _changes) = start(&second)?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    dataplane.restore(records.clone());
    assert_eq!(runtime.block_on(dataplane.records()).len(), 1, "asked behind the restore");
    call.goes_on()?;
    let mut stale = records;
    stale[0].channels.clear();
    dataplane.restore(stale);
    call.goes_on()?;
    dataplane.stop();
    assert_eq!(journal::load(empty.path(), &KeyRing::default())?.records.len(), 1, "journaled here too");

    let mut elsewhere = again(&second, &start(&second)?.0);
    elsewhere.relay_ips = vec![RelayIp { bound: "127.1.2.55".parse()?, advertised: "127.1.2.55".parse()? }];
    let (dataplane, _changes) = start(&elsewhere)?;
    eventually("refused on a relay of another address", || {
        (dropped(&dataplane, "restore_foreign") == 1).then_some(())
    })?;
    Ok(())
}
