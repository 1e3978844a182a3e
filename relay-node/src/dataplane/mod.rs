//! Starts one worker per core and holds the handles; the only place that knows about cores.

mod accept;
mod apply;
mod counters;
mod dtls;
mod dtls_context;
mod dtls_hello;
mod dtls_session;
mod listen;
mod moved;
mod opening;
mod outgoing;
mod packet;
mod peer_table;
mod peers;
mod pipe;
mod prefixes;
mod proxy;
mod refusals;
mod relayed;
mod restore;
mod ring;
pub mod shard;
mod start;
mod stream;
mod streams;
mod transport;
mod udp;
mod web;
mod whereabouts;
mod worker;

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use turn_core::policy::Network;
use turn_core::{AllocationId, Change, Record, Settings};

pub use self::dtls::DtlsLimits;
use self::start::Starting;
pub use self::web::WebServer;
use self::worker::{Command, Shown};
use crate::certificates::Certificates;
use crate::journal::Succession;
use crate::registry::Registry;
use crate::sys::epoll::Waker;
use crate::sys::process::raise_descriptor_limit;

/// Most worker threads.
pub const MAX_WORKERS: u16 = 64;

/// A client-facing address.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Listen {
    /// UDP or TCP.
    pub transport: turn_core::Transport,
    /// Address to bind; an unspecified IP serves every local one and answers from the one a packet came to.
    pub bind: SocketAddr,
}

/// One of the addresses of NAT behaviour discovery (RFC 5780 §6).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DiscoveryAddress {
    /// As packets carry it to this machine.
    pub bound: SocketAddr,
    /// As clients know it.
    pub advertised: SocketAddr,
}

/// A relay IP: what sockets bind and what peers see.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RelayIp {
    /// IP of the sockets.
    pub bound: IpAddr,
    /// IP in XOR-RELAYED-ADDRESS.
    pub advertised: IpAddr,
}

/// What the data plane is started with. Fixed for the life of the process.
#[derive(Clone, Debug)]
pub struct DataplaneConfig {
    /// Worker threads, 1..=64.
    pub workers: u16,
    /// Client-facing addresses.
    pub listen: Vec<Listen>,
    /// A1:P1, A1:P2, A2:P1, A2:P2 of RFC 5780 §6.1, all of them served by `listen`.
    pub nat_discovery: Option<[DiscoveryAddress; 4]>,
    /// Relay IPs, at most one per family.
    pub relay_ips: Vec<RelayIp>,
    /// Ports of relayed addresses.
    pub relay_ports: RangeInclusive<u16>,
    /// Identity of the allocations.
    pub relay_address: IpAddr,
    /// Ownership at start.
    pub epoch: u64,
    /// Where the journal lives.
    pub journal: PathBuf,
    /// Relayed addresses per node, 0 for no limit: one more is 508.
    pub max_allocations: usize,
    /// Relayed addresses per user on this node, 0 for no limit: one more is 486.
    pub user_quota: usize,
    /// TCP: bytes queued for a connection before whole frames are dropped.
    pub stream_send_cap: usize,
    /// TCP connections per worker.
    pub max_connections: usize,
    /// Certificates, and how connections are let in.
    pub streams: StreamConfig,
    /// How many DTLS sessions there are; they have the certificates of `streams`.
    pub dtls_limits: DtlsLimits,
}

/// How stream connections are let in.
#[derive(Clone, Debug)]
pub struct StreamConfig {
    /// What TLS and DTLS are served with; none is neither.
    pub certificates: Option<Arc<Certificates>>,
    /// A name of this relay that need not be in a certificate.
    pub public_host: Option<String>,
    /// Who may say by a PROXY header whom it speaks for.
    pub trusted_proxies: Vec<Network>,
    /// Where TLS connections for another host or protocol go; none is nowhere.
    pub web_server: Option<WebServer>,
    /// Connections per worker that have not shown what they are, or not ended their TLS handshake. One more closes the
    /// oldest.
    pub handshakes: usize,
    /// How long a connection may be one of those.
    pub handshake_time: Duration,
    /// Connections without an allocation of one source (an IPv4 address, an IPv6 /56) on this node; 0 for no limit.
    pub connections_per_prefix: u32,
}

impl Default for StreamConfig {
    fn default() -> Self {
        Self {
            certificates: None,
            public_host: None,
            trusted_proxies: Vec::new(),
            web_server: None,
            handshakes: 1024,
            handshake_time: Duration::from_secs(10),
            connections_per_prefix: 1000,
        }
    }
}

/// Counters of one worker, published once a second; a plain copy.
#[derive(Clone, Debug, Default)]
pub struct WorkerSnapshot {
    /// Allocations held now.
    pub allocations: u64,
    /// Relayed packets client to peer, peer to client.
    pub packets: [u64; 2],
    /// Relayed application bytes client to peer, peer to client.
    pub bytes: [u64; 2],
    /// Packets dropped, by label.
    pub dropped: Vec<(&'static str, u64)>,
    /// Answers by (method, error code; 0 is success), both bounded.
    pub answers: Vec<(&'static str, u16, u64)>,
    /// Packets handed to another worker because of the shard.
    pub crossed: u64,
    /// CPU of the thread since it began, microseconds.
    pub cpu_micros: u64,
    /// Journal writes that failed.
    pub journal_errors: u64,
    /// Open stream connections.
    pub connections: u64,
    /// Stream connections closed before they were of use, by label.
    pub refused_connections: Vec<(&'static str, u64)>,
    /// DTLS sessions, those with half a handshake too.
    pub dtls_sessions: u64,
    /// DTLS handshakes that are not complete.
    pub dtls_handshakes: u64,
    /// ClientHellos that were answered with a cookie.
    pub hello_verify_requests: u64,
}

/// The running data plane.
pub struct Dataplane {
    workers: Vec<Handle>,
    listen: Vec<Listen>,
    registry: Arc<Registry>,
    overflow: Arc<AtomicBool>,
}

/// A running worker, as others see it.
struct Handle {
    commands: mpsc::Sender<Command>,
    waker: Arc<Waker>,
    shown: Arc<Shown>,
    thread: Option<JoinHandle<()>>,
}

/// Record changes on their way to the reporter.
pub type ChangeReceiver = tokio::sync::mpsc::Receiver<Change>;

/// Record changes that wait for the reporter before a full resync is due instead.
const CHANGES: usize = 16_384;

impl Dataplane {
    /// Binds everything, restores `records` (newest already chosen; sockets first, then records), then starts to read.
    /// A record whose client came over a stream ends as `Closed`. Changes overflow into [`Dataplane::take_overflow`].
    ///
    /// # Errors
    /// One line that names the address and what to do.
    pub fn start(
        config: DataplaneConfig,
        settings: Arc<Settings>,
        records: Vec<Record>,
    ) -> anyhow::Result<(Self, ChangeReceiver)> {
        if !(1..=MAX_WORKERS).contains(&config.workers) {
            anyhow::bail!("workers: {} is not in 1..={MAX_WORKERS}", config.workers);
        }
        // Where it cannot be raised, the limit stays what it was: running out is said when it happens.
        let _ = raise_descriptor_limit();
        relayed::check(&config.relay_ips)?;
        let listeners = listen::open(&config.listen, config.workers)?;
        let succession = Succession::begin(&config.journal)
            .with_context(|| format!("cannot write the journal in {}; see `state_dir`", config.journal.display()))?;

        let (changes, receiver) = tokio::sync::mpsc::channel(CHANGES);
        let mut starting = Starting::new(&config, &listeners[0], changes)?;
        let listen = start::addresses(&listeners[0]);
        let dealt = restore::deal(records, config.workers);
        let succession = Arc::new(succession);
        for (listeners, records) in listeners.into_iter().zip(dealt) {
            starting.spawn(&config, &settings, listeners, records, &succession)?;
        }
        let overflow = Arc::clone(&starting.reporting.overflow);
        let registry = Arc::clone(&starting.registry);
        // From here on dropping the handles ends the workers, which wait for the word to read.
        let dataplane = Self { workers: std::mem::take(&mut starting.handles), listen, registry, overflow };
        starting.finish(succession)?;
        Ok((dataplane, receiver))
    }

    /// The client-facing addresses; where port 0 was asked for, with the one the system chose.
    pub fn listen(&self) -> &[Listen] {
        &self.listen
    }

    /// Hands new settings to every worker.
    pub fn configure(&self, settings: Arc<Settings>) {
        self.tell(|| Command::Configure(Arc::clone(&settings)));
    }

    /// Allocations one user may hold on this node from now on, 0 for no limit; those held stay.
    pub fn set_user_quota(&self, user_quota: usize) {
        self.registry.set_user_quota(user_quota);
    }

    /// Records are written under this epoch from now on.
    pub fn own(&self, epoch: u64) {
        self.tell(|| Command::Own(epoch));
    }

    /// Ends an allocation, whichever worker has it.
    pub fn revoke(&self, id: AllocationId) {
        self.tell(|| Command::Revoke(id));
    }

    /// Adds records that came later (from the store); known ones are kept if newer.
    pub fn restore(&self, records: Vec<Record>) {
        let workers = self.workers.len() as u16;
        let mut dealt = restore::deal(records, workers).into_iter();
        self.tell(|| Command::Restore(dealt.next().unwrap_or_default()));
    }

    /// Every live record, for a resync.
    pub async fn records(&self) -> Vec<Record> {
        let mut answers = Vec::new();
        self.tell(|| {
            let (answer, receiver) = tokio::sync::oneshot::channel();
            answers.push(receiver);
            Command::Records(answer)
        });
        let mut records = Vec::new();
        for answer in answers {
            // A worker that is gone has no records.
            records.append(&mut answer.await.unwrap_or_default());
        }
        records
    }

    /// Whether changes were lost to a full queue since the last call: a full resync is due.
    pub fn take_overflow(&self) -> bool {
        self.overflow.swap(false, Ordering::Relaxed)
    }

    /// Counters, one entry per worker.
    pub fn snapshots(&self) -> Vec<WorkerSnapshot> {
        self.workers.iter().map(|worker| worker.shown.snapshot()).collect()
    }

    /// Whether every worker has turned its loop within the last `within`.
    pub fn alive(&self, within: Duration) -> bool {
        self.workers.iter().all(|worker| worker.shown.silence() <= within)
    }

    /// Ends the workers and closes the journal; allocations stay in it.
    pub fn stop(self) {
        drop(self);
    }

    fn tell(&self, mut command: impl FnMut() -> Command) {
        for worker in &self.workers {
            // A worker that is gone takes no commands.
            let _ = worker.commands.send(command());
            worker.waker.wake();
        }
    }
}

impl Drop for Dataplane {
    fn drop(&mut self) {
        self.tell(|| Command::Stop);
        for thread in self.workers.iter_mut().filter_map(|worker| worker.thread.take()) {
            // A worker that panicked has said so.
            let _ = thread.join();
        }
    }
}
