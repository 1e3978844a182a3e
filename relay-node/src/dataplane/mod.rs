//! Starts one worker per core and holds the handles; the only place that knows about cores.

mod accept;
mod apply;
mod burst;
mod changes;
mod commands;
mod connected;
mod counters;
mod delivery;
mod dtls;
mod dtls_context;
mod dtls_hello;
mod dtls_session;
mod ending;
mod fence;
mod ingress;
mod listen;
mod members;
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
#[cfg(test)]
mod sample;
pub mod shard;
mod start;
mod stream;
mod streams;
mod transport;
mod udp;
mod web;
mod whereabouts;
mod wildcard;
mod worker;

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use turn_core::policy::Network;
use turn_core::{AllocationId, Change, MemberId, Record, Settings, WorkerId};

pub use self::changes::ChangeReceiver;
use self::commands::Command;
use self::delivery::BackboneEnd;
pub use self::delivery::Delivery;
pub use self::dtls::DtlsLimits;
pub use self::fence::{Fence, FenceReason};
use self::ingress::Ingress;
pub use self::ingress::Lookup;
pub use self::members::MemberRoute;
use self::members::MemberRoutes;
use self::relayed::Routes;
use self::start::Starting;
pub use self::web::WebServer;
pub use self::wildcard::{RelayedMode, check as check_wildcard};
use self::worker::Shown;
use crate::accounts::Accounts;
use crate::backbone::{BackboneOutbox, Usabilities};
use crate::certificates::Certificates;
use crate::journal::{Ends, Succession};
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
    /// How they are held.
    pub relayed: RelayedMode,
    /// Whether they are bound at all: without public ports they are reached by the backbone, and on this node.
    pub public_ports: bool,
    /// Ports of relayed addresses.
    pub relay_ports: RangeInclusive<u16>,
    /// Identity of the allocations.
    pub relay_address: IpAddr,
    /// Ownership at start.
    pub epoch: u64,
    /// Where the journal lives.
    pub journal: PathBuf,
    /// Where usage is counted.
    pub usage: PathBuf,
    /// Records go to a store as well: what has ended is remembered until the store has it.
    pub has_store: bool,
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
    /// The relay addresses move between machines: sockets are bound before an address is here, nothing is answered
    /// until [`Dataplane::fence`] is lowered, and a worker that stood still raises it.
    pub moves: bool,
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
    /// Those, by the transport of their clients: UDP, TCP, TLS, DTLS.
    pub by_transport: [u64; 4],
    /// Clients sent to other relays, by why: draining, overloaded.
    pub redirected: [u64; 2],
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
    /// The journal lacks records until it can be written again: they are in the store alone.
    pub journal_failed: bool,
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
    journal: PathBuf,
    ends: Arc<Ends>,
    registry: Arc<Registry>,
    routes: Arc<Routes>,
    overflow: Arc<AtomicBool>,
    fence: Arc<Fence>,
    accounts: Arc<Accounts>,
}

/// What a data plane begins to serve with.
#[derive(Debug)]
pub struct Beginning {
    /// Ownership.
    pub epoch: u64,
    /// As workers run with them from here on.
    pub settings: Arc<Settings>,
    /// Relayed addresses per user on this node, 0 for no limit.
    pub user_quota: usize,
    /// Of allocations that go on, newest already chosen.
    pub records: Vec<Record>,
    /// Tombstones that the store may not know.
    pub ended: Vec<Change>,
}

/// A running worker, as others see it.
struct Handle {
    commands: mpsc::Sender<Command>,
    waker: Arc<Waker>,
    shown: Arc<Shown>,
    thread: Option<JoinHandle<()>>,
}

impl Dataplane {
    /// [`Dataplane::open`] and [`Dataplane::begin`] at once.
    ///
    /// # Errors
    /// Theirs.
    pub fn start(
        config: DataplaneConfig,
        settings: Arc<Settings>,
        records: Vec<Record>,
    ) -> anyhow::Result<(Self, ChangeReceiver)> {
        let (epoch, user_quota) = (config.epoch, config.user_quota);
        let (dataplane, changes) = Self::open(config, &settings)?;
        dataplane.begin(Beginning { epoch, settings, user_quota, records, ended: Vec::new() })?;
        Ok((dataplane, changes))
    }

    /// Binds everything and does not read: packets wait in the kernel until [`Dataplane::begin`]. From three seconds on
    /// Binding requests are answered, and nothing else (promise P5). Changes overflow into
    /// [`Dataplane::take_overflow`].
    ///
    /// # Errors
    /// One line that names the address and what to do.
    pub fn open(config: DataplaneConfig, settings: &Settings) -> anyhow::Result<(Self, ChangeReceiver)> {
        if !(1..=MAX_WORKERS).contains(&config.workers) {
            anyhow::bail!("workers: {} is not in 1..={MAX_WORKERS}", config.workers);
        }
        // Where it cannot be raised, the limit stays what it was: running out is said when it happens.
        let _ = raise_descriptor_limit();
        if !config.moves {
            relayed::check(&config.relay_ips)?;
        }
        let listeners = listen::open(&config.listen, config.workers, config.moves)?;
        let overflow = Arc::default();
        let (senders, receiver) = changes::queues(config.workers.into(), &overflow);
        let mut starting = Starting::new(&config, &listeners[0], senders)?;
        let listen = start::addresses(&listeners[0]);
        let mute = Arc::new(start::mute(settings));
        for listeners in listeners {
            starting.spawn(&config, &mute, listeners)?;
        }
        let dataplane = Self {
            workers: std::mem::take(&mut starting.handles),
            listen,
            journal: config.journal,
            ends: Arc::new(Ends::new(config.has_store)),
            registry: starting.registry,
            routes: starting.routes,
            overflow,
            fence: starting.fence,
            accounts: starting.accounts,
        };
        Ok((dataplane, receiver))
    }

    /// Restores records, each worker its own, and journals them; when all have done so they read. A record whose client
    /// came over a stream ends as `Closed`.
    ///
    /// # Errors
    /// The journal's directory cannot be read, or a worker died.
    pub fn begin(&self, beginning: Beginning) -> anyhow::Result<()> {
        let Beginning { epoch, settings, user_quota, records, ended } = beginning;
        let workers = self.workers.len() as u16;
        self.registry.set_user_quota(user_quota);
        for ended in &ended {
            self.ends.note(WorkerId(0), ended, Instant::now());
            if let Change::End { id, reason, .. } = ended {
                // The process that ended it may not have come so far.
                self.accounts.end(*id, *reason, unix_ms());
            }
        }
        let succession = Succession::begin(&self.journal, workers, Arc::clone(&self.ends))
            .with_context(|| format!("cannot read the journal in {}; see `state_dir`", self.journal.display()))?;
        let (ready, all_ready) = mpsc::channel();
        let mut dealt = restore::deal(records, workers).into_iter();
        self.tell(|| {
            let records = dealt.next().unwrap_or_default();
            Command::Begin { epoch, records, succession: Arc::clone(&succession), ready: ready.clone() }
        });
        // Only the workers are left to say something: one that panics is noticed.
        drop(ready);
        for _ in &self.workers {
            all_ready.recv().context("a worker died while it restored its records")?;
        }
        self.tell(|| Command::Serve(Arc::clone(&settings)));
        if !self.ends.are_kept() {
            // There is no store that could bring back more.
            self.accounts.end_unclaimed(unix_ms());
        }
        Ok(())
    }

    /// The client-facing addresses; where port 0 was asked for, with the one the system chose.
    pub fn listen(&self) -> &[Listen] {
        &self.listen
    }

    /// Whether anything is answered.
    pub fn fence(&self) -> &Fence {
        &self.fence
    }

    /// What each allocation has used.
    pub fn accounts(&self) -> &Accounts {
        &self.accounts
    }

    /// Who else is in the cluster, from now on.
    pub fn set_members(&self, members: &[MemberRoute]) {
        self.routes.members().rcu(|known| MemberRoutes::new(members, known.usabilities.clone()));
    }

    /// What the backbone is to deliver into.
    pub fn delivery(&self) -> Delivery {
        let mut outboxes = Vec::new();
        for worker in &self.workers {
            let (outbox, inbox) = ring::pair(&worker.waker);
            // A worker that is gone takes no commands.
            let _ = worker.commands.send(Command::HearBackbone(inbox));
            worker.waker.wake();
            outboxes.push(outbox);
        }
        Delivery::new(outboxes, Arc::clone(&self.routes), Arc::clone(&self.fence))
    }

    /// Packets for other members go by the backbone from now on, as far as it carries them. `outboxes` are in the order of
    /// workers. What they want to know of clients is asked through the channel; see [`Dataplane::located`].
    pub fn join_backbone(
        &self,
        outboxes: Vec<BackboneOutbox>,
        usabilities: &Usabilities,
        lookups: &tokio::sync::mpsc::Sender<Lookup>,
    ) {
        for (id, (worker, outbox)) in (0..).map(WorkerId).zip(self.workers.iter().zip(outboxes)) {
            let ingress = Ingress::new(id, lookups.clone(), Instant::now());
            let end = BackboneEnd { outbox, usabilities: usabilities.clone(), ingress };
            // As above.
            let _ = worker.commands.send(Command::JoinBackbone(Box::new(end)));
            worker.waker.wake();
        }
        // Routes lead there once the workers have heard of it; until then packets are dropped as on any link.
        let known =
            |routes: &Arc<MemberRoutes>| MemberRoutes { usabilities: Some(usabilities.clone()), ..(**routes).clone() };
        self.routes.members().rcu(known);
    }

    /// Answers a question of [`Dataplane::join_backbone`]: which member has the client's allocation.
    pub fn located(&self, lookup: Lookup, member: Option<MemberId>) {
        if let Some(worker) = self.workers.get(usize::from(lookup.worker.0)) {
            // As above.
            let _ = worker.commands.send(Command::Located { client: lookup.client, member });
            worker.waker.wake();
        }
    }

    /// Worker threads.
    pub fn workers(&self) -> usize {
        self.workers.len()
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

    /// The store has every end that happened before `until`.
    pub fn settle(&self, until: Instant) {
        self.ends.settle(until);
    }

    /// Ends what cannot outlive the process: connections of clients, DTLS sessions, and their allocations. They are told
    /// as far as that takes no waiting, and their ends are in the journal when this is done.
    pub async fn end_sessions(&self) {
        let mut answers = Vec::new();
        self.tell(|| {
            let (answer, receiver) = tokio::sync::oneshot::channel();
            answers.push(receiver);
            Command::EndSessions(answer)
        });
        for answer in answers {
            // A worker that is gone has none.
            let _ = answer.await;
        }
    }

    /// Everything that was received before has left and is counted when this is done, also what went from worker to
    /// worker.
    pub async fn finish_turns(&self) {
        for _ in 0..2 {
            let mut answers = Vec::new();
            self.tell(|| {
                let (answer, receiver) = tokio::sync::oneshot::channel();
                answers.push(receiver);
                Command::FinishTurn(answer)
            });
            for answer in answers {
                // A worker that is gone has none.
                let _ = answer.await;
            }
        }
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

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl Drop for Dataplane {
    fn drop(&mut self) {
        self.tell(|| Command::Stop);
        for thread in self.workers.iter_mut().filter_map(|worker| worker.thread.take()) {
            // A worker that panicked has said so.
            let _ = thread.join();
        }
        self.accounts.close();
    }
}
