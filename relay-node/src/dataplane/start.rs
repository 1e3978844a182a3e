//! From a configuration to running workers: everything is bound and restored before anything is read.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use turn_core::{DiscoveryPlace, KeyRing, ListenerId, NatDiscovery, Server, Settings, Transport, Vouchers, WorkerId};

use super::accept::Door;
use super::changes::ChangeSender;
use super::dtls::Sessions;
use super::dtls_context::Contexts;
use super::fence::{Fence, FenceReason, Pause};
use super::listen::Listener;
use super::peer_table::PeerTable;
use super::relayed::{Relayed, Routes};
use super::ring::{self, Ends};
use super::wildcard::{self, Wildcard};
use super::worker::{Setup, Shown, Worker};
use super::{DataplaneConfig, DiscoveryAddress, Handle, Listen};
use crate::accounts::Accounts;
use crate::registry::{Bounds, Registry};
use crate::sys::epoll::{Epoll, Waker};

/// How long packets wait in the kernel while records are loaded; then Binding requests are answered meanwhile.
const MUTE_AFTER: Duration = Duration::from_secs(3);

/// Workers on their way.
pub(super) struct Starting {
    pub(super) handles: Vec<Handle>,
    pub(super) registry: Arc<Registry>,
    pub(super) fence: Arc<Fence>,
    pub(super) accounts: Arc<Accounts>,
    pub(super) routes: Arc<Routes>,
    door: Arc<Door>,
    contexts: Option<Arc<Contexts>>,
    peers: Arc<PeerTable>,
    vouchers: Arc<Vouchers>,
    wakers: Vec<Arc<Waker>>,
    /// Ways to the reporter of the workers that have not been spawned.
    changes: Vec<ChangeSender>,
    /// Rings of the workers that have not been spawned, the first one last.
    ends: Vec<Ends>,
    /// What relayed addresses share, if they do, of the workers that have not been spawned, the first one last.
    wildcards: Vec<Wildcard>,
}

impl Starting {
    pub(super) fn new(
        config: &DataplaneConfig,
        listeners: &[Listener],
        changes: Vec<ChangeSender>,
    ) -> anyhow::Result<Self> {
        let wakers: Vec<Arc<Waker>> = (0..config.workers)
            .map(|_| Waker::new().map(Arc::new))
            .collect::<Result<_, _>>()
            .context("cannot make an eventfd")?;
        let mut ends = ring::mesh(&wakers);
        ends.reverse();
        let bounds = Bounds { max_allocations: config.max_allocations, user_quota: config.user_quota };
        let served: Vec<SocketAddr> = listeners.iter().map(|listener| listener.address).collect();
        let contexts = config.streams.certificates.clone().map(Contexts::new);
        let contexts = contexts.transpose().context("certificates: OpenSSL, which serves DTLS, refuses them")?;
        let fence = Fence::default();
        if config.moves {
            fence.raise(FenceReason::Address);
        }
        let mut secret = [[0; 8]; 2];
        getrandom::fill(secret.as_flattened_mut()).context("the system has no randomness")?;
        let secret = secret.map(u64::from_ne_bytes);
        Ok(Self {
            handles: Vec::new(),
            fence: Arc::new(fence),
            accounts: Arc::new(accounts(config).context("no memory to count usage in")?),
            changes,
            registry: Arc::new(Registry::new(config.relay_ips.clone(), config.relay_ports.clone(), bounds)),
            routes: Arc::new(Routes::new(&config.relay_ips, &served, &local_addresses(&served)?)),
            door: Door::new(&config.streams)?,
            contexts: contexts.map(Arc::new),
            vouchers: Arc::new(Vouchers::new(secret)),
            peers: Arc::new(PeerTable::new(config.max_connections.saturating_mul(config.workers.into()), &wakers)),
            wakers,
            ends,
            wildcards: wildcard::open(config)?,
        })
    }

    /// What the next worker is made of; its handle is added.
    fn set_up(
        &mut self,
        config: &DataplaneConfig,
        settings: &Arc<Settings>,
        listeners: Vec<Listener>,
    ) -> anyhow::Result<Setup> {
        let id = WorkerId(self.handles.len() as u16);
        let epoll = Arc::new(Epoll::new().context("cannot make an epoll instance")?);
        let waker = Arc::clone(&self.wakers[usize::from(id.0)]);
        let (outboxes, inboxes) = self.ends.pop().context("more workers than rings")?;
        let (commands, receiver) = mpsc::channel();
        let shown = Arc::new(Shown::new());
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).context("the system has no randomness")?;
        let mut cookie_secret = [0; 64];
        getrandom::fill(&mut cookie_secret).context("the system has no randomness")?;
        let mut server = Server::new(id, config.relay_address, config.epoch, Arc::clone(settings), seed);
        server.share_vouchers(Arc::clone(&self.vouchers));
        if let Some(addresses) = config.nat_discovery {
            server.set_nat_discovery(discovery(addresses, &listeners)?);
        }
        let relayed = Relayed::new(
            id,
            Arc::clone(&self.registry),
            Arc::clone(&self.routes),
            Arc::clone(&self.peers),
            Arc::clone(&epoll),
            (self.wildcards.pop().map(Box::new), !config.public_ports),
            Arc::clone(&self.accounts),
        );
        self.handles.push(Handle { commands, waker: Arc::clone(&waker), shown: Arc::clone(&shown), thread: None });
        Ok(Setup {
            id,
            workers: config.workers,
            server,
            epoch: config.epoch,
            listeners,
            relayed,
            epoll,
            waker,
            commands: receiver,
            outboxes,
            inboxes,
            shown,
            changes: self.changes.pop().context("more workers than ways to the reporter")?,
            stream_send_cap: config.stream_send_cap,
            max_connections: config.max_connections,
            door: Arc::clone(&self.door),
            fence: Arc::clone(&self.fence),
            pause: Pause::new(config.moves),
            accounts: Arc::clone(&self.accounts),
            dtls: Sessions::new(id, self.contexts.clone(), config.dtls_limits, cookie_secret, Instant::now()),
        })
    }

    /// Starts the next worker: it waits for its records, and for the word to read.
    pub(super) fn spawn(
        &mut self,
        config: &DataplaneConfig,
        settings: &Arc<Settings>,
        listeners: Vec<Listener>,
    ) -> anyhow::Result<()> {
        let setup = self.set_up(config, settings, listeners)?;
        let id = setup.id;
        let thread = thread::Builder::new()
            .name(format!("worker-{}", id.0))
            .spawn(move || {
                let mut worker = Worker::new(setup);
                if worker.await_beginning(MUTE_AFTER) && let Err(error) = worker.run() {
                    tracing::error!(worker = id.0, %error, "a worker cannot go on; the relay ends, and its journal brings it back");
                    std::process::abort();
                }
            })
            .with_context(|| format!("cannot start the thread of worker {}", id.0))?;
        self.handles[usize::from(id.0)].thread = Some(thread);
        Ok(())
    }
}

/// What usage is counted in: an allocation has at least one port.
fn accounts(config: &DataplaneConfig) -> std::io::Result<Accounts> {
    let ports = config.relay_ports.len() * config.relay_ips.len();
    let most = if config.max_allocations == 0 { ports } else { ports.min(config.max_allocations) };
    Accounts::open(&config.usage, u32::try_from(most).unwrap_or(u32::MAX), config.has_store)
}

/// Settings with which only Binding requests are answered: nobody can be authenticated.
pub(super) fn mute(settings: &Settings) -> Settings {
    Settings { nonce_keys: KeyRing::default(), ..settings.clone() }
}

/// The four addresses with the sockets that serve them (RFC 5780 §6).
fn discovery(addresses: [DiscoveryAddress; 4], listeners: &[Listener]) -> anyhow::Result<NatDiscovery> {
    let mut places = Vec::new();
    for DiscoveryAddress { bound, advertised } in addresses {
        let index = listeners.iter().position(|listener| listener.serves(Transport::Udp, bound));
        let index = index.with_context(|| format!("nat_discovery: nothing listens on udp://{bound}"))?;
        places.push(DiscoveryPlace { bound, advertised, listener: ListenerId(index as u16) });
    }
    let places = <[DiscoveryPlace; 4]>::try_from(places).map_err(|_| anyhow!("nat_discovery: four addresses"))?;
    Ok(NatDiscovery(places))
}

/// What the listeners are bound to.
pub(super) fn addresses(listeners: &[Listener]) -> Vec<Listen> {
    listeners.iter().map(|listener| Listen { transport: listener.transport, bind: listener.address }).collect()
}

/// The addresses of this machine, if a listener serves them all.
fn local_addresses(served: &[SocketAddr]) -> anyhow::Result<Vec<IpAddr>> {
    if !served.iter().any(|address| address.ip().is_unspecified()) {
        return Ok(Vec::new());
    }
    let interfaces = if_addrs::get_if_addrs().context("cannot list the addresses of this machine")?;
    Ok(interfaces.iter().map(if_addrs::Interface::ip).collect())
}

#[cfg(test)]
mod tests;
