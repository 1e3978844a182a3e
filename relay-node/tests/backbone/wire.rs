//! A wire between two relays: a forwarder that delays, loses, narrows, doubles or cuts.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

/// What the wire does to packets, in both directions.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Conditions {
    /// Each way.
    pub(crate) delay: Duration,
    /// Lost packets in a thousand.
    pub(crate) loss_permille: u32,
    /// Bits per second; what waits longer than [`Conditions::queue`] is lost. 0 is no limit.
    pub(crate) rate: u64,
    pub(crate) queue: Duration,
    /// Each packet arrives twice.
    pub(crate) doubles: bool,
    pub(crate) cut: bool,
}

/// One wire. Each end has an address of its own: the one that the relay there takes for the other relay's.
pub(crate) struct Wire {
    ends: [SocketAddr; 2],
    conditions: Arc<Mutex<Conditions>>,
    retries: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
}

impl Wire {
    /// Between relays that listen at these addresses.
    pub(crate) fn between(relays: [SocketAddr; 2], conditions: Conditions) -> Result<Self> {
        let sockets = [UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?, UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?];
        let ends = [sockets[0].local_addr()?, sockets[1].local_addr()?];
        let conditions = Arc::new(Mutex::new(conditions));
        let stop = Arc::new(AtomicBool::new(false));
        let retries = Arc::new(AtomicUsize::new(0));
        for (from, to) in [(0, 1), (1, 0)] {
            let (receive, send) = (sockets[from].try_clone()?, sockets[to].try_clone()?);
            socket2::SockRef::from(&receive).set_recv_buffer_size(4 << 20)?;
            receive.set_read_timeout(Some(Duration::from_millis(100)))?;
            let (due, packets) = mpsc::channel::<(Instant, Vec<u8>)>();
            let target = relays[to];
            thread::spawn(move || {
                for (at, packet) in packets {
                    thread::sleep(at.saturating_duration_since(Instant::now()));
                    let _ = send.send_to(&packet, target);
                }
            });
            let (conditions, stop, retries) = (Arc::clone(&conditions), Arc::clone(&stop), Arc::clone(&retries));
            thread::spawn(move || {
                let (mut buffer, mut free_at, mut random) = ([0; 65_536], Instant::now(), 12_345u32);
                while !stop.load(Ordering::Relaxed) {
                    let Ok(length) = receive.recv(&mut buffer) else { continue };
                    let now = Instant::now();
                    // RFC 9000 §17.2.5: a long header of type 3.
                    retries.fetch_add(usize::from(buffer[0] & 0xB0 == 0xB0), Ordering::Relaxed);
                    let conditions = *conditions.lock().expect("nobody panics with it");
                    random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    if conditions.cut || (random >> 8) % 1000 < conditions.loss_permille {
                        continue;
                    }
                    free_at = free_at.max(now);
                    // IP and UDP headers count.
                    let bits = (length as u64 + 28) * 8;
                    if let Some(nanoseconds) = (bits * 1_000_000_000).checked_div(conditions.rate) {
                        if free_at.duration_since(now) > conditions.queue {
                            continue;
                        }
                        free_at += Duration::from_nanos(nanoseconds);
                    }
                    let packet = buffer[..length].to_vec();
                    if conditions.doubles {
                        let _ = due.send((free_at + conditions.delay, packet.clone()));
                    }
                    if due.send((free_at + conditions.delay, packet)).is_err() {
                        return;
                    }
                }
            });
        }
        Ok(Self { ends, conditions, retries, stop })
    }

    /// Where the first relay reaches the second one, and the other way round.
    pub(crate) fn ends(&self) -> [SocketAddr; 2] {
        self.ends
    }

    /// How often somebody was asked to show where it is.
    pub(crate) fn retries(&self) -> usize {
        self.retries.load(Ordering::Relaxed)
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut Conditions)) {
        change(&mut self.conditions.lock().expect("nobody panics with it"));
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
