//! Starts one worker per core and holds the handles; the only place that knows about cores.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;

use turn_core::{AllocationId, Change, Record, Settings};

/// A client-facing address.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Listen {
    /// UDP or TCP.
    pub transport: turn_core::Transport,
    /// Address to bind; an unspecified IP serves every local one and answers from the one a packet came to.
    pub bind: SocketAddr,
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
    /// Allocations per node, 0 for no limit: one more is 486.
    pub max_allocations: usize,
    /// Allocations per user on this node, 0 for no limit: one more is 486.
    pub user_quota: usize,
    /// TCP: bytes queued for a connection before whole frames are dropped.
    pub stream_send_cap: usize,
    /// TCP connections per worker.
    pub max_connections: usize,
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
}

/// The running data plane.
pub struct Dataplane {}

/// Record changes on their way to the reporter.
pub type ChangeReceiver = tokio::sync::mpsc::Receiver<Change>;

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
        let _ = (config, settings, records);
        anyhow::bail!("not yet")
    }

    /// Hands new settings to every worker.
    pub fn configure(&self, settings: Arc<Settings>) {
        let _ = settings;
    }

    /// Records are written under this epoch from now on.
    pub fn own(&self, epoch: u64) {
        let _ = epoch;
    }

    /// Ends an allocation, whichever worker has it.
    pub fn revoke(&self, id: AllocationId) {
        let _ = id;
    }

    /// Adds records that came later (from the store); known ones are kept if newer.
    pub fn restore(&self, records: Vec<Record>) {
        let _ = records;
    }

    /// Every live record, for a resync.
    pub async fn records(&self) -> Vec<Record> {
        std::future::ready(Vec::new()).await
    }

    /// Whether changes were lost to a full queue since the last call: a full resync is due.
    pub fn take_overflow(&self) -> bool {
        false
    }

    /// Counters, one entry per worker.
    pub fn snapshots(&self) -> Vec<WorkerSnapshot> {
        Vec::new()
    }

    /// Whether every worker has turned its loop within the last `within`.
    pub fn alive(&self, within: std::time::Duration) -> bool {
        let _ = within;
        true
    }

    /// Ends the workers and closes the journal; allocations stay in it.
    pub fn stop(self) {}
}
