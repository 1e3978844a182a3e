//! Bursts of one flow: coalesced on arrival (UDP_GRO), sent as one message (UDP_SEGMENT), and no byte of a packet in
//! another's place. Loopback carries a message whole to a socket that asks for coalesced datagrams, and apart to others.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use relay_node::dataplane::{Dataplane, DataplaneConfig, RelayedMode};
use relay_node::sys::message::{Message, ReceiveSlots, SendBatch};
use relay_node::sys::socket::receive_coalesced;
use turn_core::Transport;

use crate::client::{TurnClient, config, dropped, eventually, start};

/// Sends datagrams of one length, but the last, as one message.
fn send_burst(socket: &UdpSocket, to: SocketAddr, datagrams: &[Vec<u8>]) -> Result<()> {
    let segment = (datagrams.len() > 1).then(|| datagrams[0].len() as u16);
    let parts = datagrams.iter().map(Vec::as_slice);
    let message = Message { to: Some(to), from: None, tos: 0, segment, parts };
    ensure!(SendBatch::new().send(socket.as_fd(), std::iter::once(message))? == 1, "the burst was not sent");
    Ok(())
}

/// A socket that gets bursts as they were sent.
struct Coalesced {
    socket: UdpSocket,
    slots: ReceiveSlots,
}

impl Coalesced {
    fn on(socket: UdpSocket) -> Result<Self> {
        receive_coalesced(socket.as_fd())?;
        Ok(Self { socket, slots: ReceiveSlots::new(1) })
    }

    fn address(&self) -> Result<SocketAddr> {
        Ok(self.socket.local_addr()?)
    }

    /// The next message, if there is one: its source, and the datagrams in it.
    fn receive(&mut self) -> Option<(SocketAddr, Vec<Vec<u8>>)> {
        self.slots.receive(self.socket.as_fd(), 0, 1).ok()?;
        let bytes = self.slots.bytes(0, self.slots.length(0));
        let size = self.slots.ancillary(0).segment.unwrap_or(bytes.len()).max(1);
        let mut datagrams: Vec<Vec<u8>> = bytes.chunks(size).map(<[u8]>::to_vec).collect();
        if datagrams.is_empty() {
            datagrams.push(Vec::new());
        }
        Some((self.slots.source(0)?, datagrams))
    }
}

/// Stands between a client and a relay, and gathers what the client sends into bursts.
struct Gatherer {
    /// Where the client sends to.
    address: SocketAddr,
    /// Datagrams of the next burst; 1 passes each on as it comes.
    gather: Arc<AtomicUsize>,
    /// Datagrams that came from the relay coalesced.
    coalesced: Arc<AtomicUsize>,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Gatherer {
    fn new(local: &str, relay: SocketAddr) -> Result<Self> {
        let front = UdpSocket::bind("127.0.0.1:0")?;
        front.set_read_timeout(Some(Duration::from_millis(1)))?;
        let back = UdpSocket::bind((local, 0))?;
        let mut gatherer = Self {
            address: front.local_addr()?,
            gather: Arc::new(AtomicUsize::new(1)),
            coalesced: Arc::default(),
            stopped: Arc::default(),
            thread: None,
        };
        let (gather, coalesced) = (Arc::clone(&gatherer.gather), Arc::clone(&gatherer.coalesced));
        let stopped = Arc::clone(&gatherer.stopped);
        let thread = move || {
            let mut back = Coalesced::on(back)?;
            let (mut client, mut burst, mut buffer) = (None, Vec::new(), vec![0; 65_536]);
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((length, from)) = front.recv_from(&mut buffer) {
                    client = Some(from);
                    burst.push(buffer[..length].to_vec());
                    if burst.len() >= gather.load(Ordering::Relaxed) {
                        send_burst(&back.socket, relay, &burst)?;
                        burst.clear();
                    }
                }
                while let (Some(client), Some((_, datagrams))) = (client, back.receive()) {
                    if datagrams.len() > 1 {
                        coalesced.fetch_add(datagrams.len(), Ordering::Relaxed);
                    }
                    for datagram in datagrams {
                        front.send_to(&datagram, client)?;
                    }
                }
            }
            Ok(())
        };
        gatherer.thread = Some(std::thread::spawn(thread));
        Ok(gatherer)
    }

    /// Whatever the client sends next leaves as bursts of so many.
    fn gather(&self, count: usize) {
        self.gather.store(count, Ordering::Relaxed);
    }

    fn coalesced(&self) -> usize {
        self.coalesced.load(Ordering::Relaxed)
    }
}

impl Drop for Gatherer {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // What went wrong there has shown in the test.
            let _ = thread.join();
        }
    }
}

/// So many payloads of one length, the last of another; no two are alike, nor is any a shifted other.
fn payloads(seed: u32, count: usize, length: usize, last: usize) -> Vec<Vec<u8>> {
    let byte = |index: usize, at: usize| {
        let mixed = (seed.wrapping_mul(31) ^ index as u32).wrapping_mul(0x9E37_79B1) ^ at as u32;
        (mixed.wrapping_mul(0x85EB_CA6B) >> 24) as u8
    };
    let length = |index| if index + 1 == count { last } else { length };
    (0..count).map(|index| (0..length(index)).map(|at| byte(index, at)).collect()).collect()
}

/// Bursts both ways, by indications and then by a channel; how many bytes each way.
fn talk_in_bursts(client: &mut TurnClient, gatherer: &Gatherer) -> Result<u64> {
    let relayed = client.allocate()?;
    let mut peer = Coalesced::on(UdpSocket::bind("127.0.0.1:0")?)?;
    let address = peer.address()?;
    client.permit(address)?;
    let mut bytes = 0;
    for round in 0..2 {
        for (count, length, last) in [(16, 1200, 1200), (16, 1200, 333), (40, 172, 171), (3, 1, 1), (2, 1000, 4)] {
            let what = format!("{count} of {length} and {last} bytes, round {round}");
            let sent = payloads(round, count, length, last);
            bytes += sent.iter().map(|payload| payload.len() as u64).sum::<u64>();
            gatherer.gather(count);
            for payload in &sent {
                client.send(address, payload)?;
            }
            let mut heard = Vec::new();
            while heard.len() < count {
                let (from, datagrams) = eventually(&what, || peer.receive())?;
                assert_eq!(from, relayed, "{what}");
                // A shorter one is not worth a socket where addresses share one.
                assert!(datagrams.len() > 1 || count < 4, "{what}: they left one by one");
                heard.extend(datagrams);
            }
            assert_eq!(heard, sent, "{what}");
            gatherer.gather(1);

            let before = gatherer.coalesced();
            send_burst(&peer.socket, relayed, &sent)?;
            for (index, payload) in sent.iter().enumerate() {
                let (from, data) = client.receive().with_context(|| format!("{what}: {index}"))?;
                assert_eq!((from, &data), (address, payload), "{what}: {index}");
            }
            assert!(gatherer.coalesced() > before, "{what}: they came back one by one");
        }
        client.bind_channel(0x4001, address)?;
    }
    Ok(bytes)
}

fn relayed_bytes(dataplane: &Dataplane) -> [u64; 2] {
    let snapshots = dataplane.snapshots();
    [0, 1].map(|direction| snapshots.iter().map(|worker| worker.bytes[direction]).sum())
}

fn all_is_counted(dataplane: &Dataplane, bytes: u64) -> Result<()> {
    eventually("each byte is counted once", || (relayed_bytes(dataplane) == [bytes; 2]).then_some(()))?;
    for reason in ["malformed", "send_refused", "send_buffer", "too_long"] {
        assert_eq!(dropped(dataplane, reason), 0, "{reason}");
    }
    Ok(())
}

#[test]
fn bursts_cross_whole_in_both_directions() -> Result<()> {
    for relayed in [RelayedMode::Sockets, RelayedMode::Wildcard] {
        let directory = tempfile::tempdir()?;
        let config = DataplaneConfig { relayed, ..config("127.1.15.1", 2, directory.path()) };
        let (dataplane, _changes) = start(&config)?;
        let relay = dataplane.listen()[0].bind;
        let mut bytes = 0;
        for _ in 0..3 {
            let gatherer = Gatherer::new("127.0.0.1", relay)?;
            let mut client = TurnClient::new(Transport::Udp, "127.0.0.1", gatherer.address, "alice")?;
            bytes += talk_in_bursts(&mut client, &gatherer).with_context(|| format!("{relayed:?}"))?;
        }
        all_is_counted(&dataplane, bytes)?;
    }
    Ok(())
}

#[test]
fn bursts_of_dtls_records_are_opened_one_by_one() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&crate::dtls::config("127.1.15.2", 1, directory.path())?)?;
    let gatherer = Gatherer::new("127.0.0.1", dataplane.listen()[0].bind)?;
    let mut client = TurnClient::new(Transport::Dtls, "127.0.0.1", gatherer.address, "alice")?;
    let bytes = talk_in_bursts(&mut client, &gatherer)?;
    all_is_counted(&dataplane, bytes)
}

#[test]
fn pairs_in_bursts_keep_their_order_within_a_worker_and_across_two() -> Result<()> {
    for (ip, workers) in [("127.1.15.3", 1), ("127.1.15.4", 2)] {
        let directory = tempfile::tempdir()?;
        let (dataplane, _changes) = start(&config(ip, workers, directory.path()))?;
        let relay = dataplane.listen()[0].bind;
        let mut bytes = 0;
        // Some of them are on one worker, some are not.
        for _ in 0..6 {
            let gatherers = [Gatherer::new("127.0.0.1", relay)?, Gatherer::new("127.0.0.1", relay)?];
            let mut alice = TurnClient::new(Transport::Udp, "127.0.0.1", gatherers[0].address, "alice")?;
            let mut bob = TurnClient::new(Transport::Udp, "127.0.0.1", gatherers[1].address, "bob")?;
            let (of_alice, of_bob) = (alice.allocate()?, bob.allocate()?);
            alice.bind_channel(0x4000, of_bob)?;
            bob.bind_channel(0x4000, of_alice)?;
            gatherers[0].gather(20);
            for round in 0..4 {
                let sent = payloads(round, 20, 900, 77);
                bytes += sent.iter().map(|payload| payload.len() as u64).sum::<u64>();
                for payload in &sent {
                    alice.send(of_bob, payload)?;
                }
                for (index, payload) in sent.iter().enumerate() {
                    assert_eq!(bob.receive()?, (of_alice, payload.clone()), "{workers} workers: {index} of {round}");
                }
            }
            assert!(gatherers[1].coalesced() > 0, "a burst stays one");
            gatherers[0].gather(1);
        }
        all_is_counted(&dataplane, bytes)?;
    }
    Ok(())
}
