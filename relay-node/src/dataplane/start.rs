//! From a configuration to running workers: everything is bound and restored before anything is read.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Instant;

use anyhow::{Context, anyhow};
use turn_core::{Change, DiscoveryPlace, ListenerId, NatDiscovery, Record, Server, Settings, Transport, WorkerId};

use super::accept::Door;
use super::dtls::Sessions;
use super::dtls_context::Contexts;
use super::listen::Listener;
use super::peer_table::PeerTable;
use super::relayed::{Relayed, Routes};
use super::ring::{self, Ends};
use super::worker::{Reporting, Setup, Shown, Worker};
use super::{DataplaneConfig, DiscoveryAddress, Handle, Listen};
use crate::journal::Succession;
use crate::registry::{Bounds, Registry};
use crate::sys::epoll::{Epoll, Waker};

/// Workers on their way.
pub(super) struct Starting {
    pub(super) handles: Vec<Handle>,
    pub(super) reporting: Reporting,
    pub(super) registry: Arc<Registry>,
    routes: Arc<Routes>,
    door: Arc<Door>,
    contexts: Option<Arc<Contexts>>,
    peers: Arc<PeerTable>,
    wakers: Vec<Arc<Waker>>,
    /// Rings of the workers that have not been spawned, the first one last.
    ends: Vec<Ends>,
    /// Each worker says here that its records are restored and journaled, or why not.
    ready: (Sender<anyhow::Result<()>>, Receiver<anyhow::Result<()>>),
    /// A word to each worker to begin to read; dropped, they end.
    go: Vec<Sender<()>>,
}

impl Starting {
    pub(super) fn new(
        config: &DataplaneConfig,
        listeners: &[Listener],
        changes: tokio::sync::mpsc::Sender<Change>,
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
        Ok(Self {
            handles: Vec::new(),
            reporting: Reporting { changes, overflow: Arc::new(AtomicBool::new(false)) },
            registry: Arc::new(Registry::new(config.relay_ips.clone(), config.relay_ports.clone(), bounds)),
            routes: Arc::new(Routes::new(&config.relay_ips, &served, &local_addresses(&served)?)),
            door: Door::new(&config.streams)?,
            contexts: contexts.map(Arc::new),
            peers: Arc::new(PeerTable::new(config.max_connections.saturating_mul(config.workers.into()), &wakers)),
            wakers,
            ends,
            ready: mpsc::channel(),
            go: Vec::new(),
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
        if let Some(addresses) = config.nat_discovery {
            server.set_nat_discovery(discovery(addresses, &listeners)?);
        }
        let relayed = Relayed::new(
            id,
            Arc::clone(&self.registry),
            Arc::clone(&self.routes),
            Arc::clone(&self.peers),
            Arc::clone(&epoll),
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
            reporting: self.reporting.clone(),
            stream_send_cap: config.stream_send_cap,
            max_connections: config.max_connections,
            door: Arc::clone(&self.door),
            dtls: Sessions::new(id, self.contexts.clone(), config.dtls_limits, cookie_secret, Instant::now()),
        })
    }

    /// Starts the next worker: it restores its records, journals them, and waits.
    pub(super) fn spawn(
        &mut self,
        config: &DataplaneConfig,
        settings: &Arc<Settings>,
        listeners: Vec<Listener>,
        records: Vec<Record>,
        succession: &Arc<Succession>,
    ) -> anyhow::Result<()> {
        let setup = self.set_up(config, settings, listeners)?;
        let id = setup.id;
        let (ready, (go, word)) = (self.ready.0.clone(), mpsc::channel());
        let succession = Arc::clone(succession);
        let thread = thread::Builder::new()
            .name(format!("worker-{}", id.0))
            .spawn(move || {
                let mut worker = Worker::new(setup);
                worker.restore(records);
                let kept = worker.keep_journal(|records| succession.open(id, records));
                drop(succession);
                // Without anybody to tell, or without the word, the start has failed elsewhere.
                let told = ready.send(kept.with_context(|| format!("cannot write the journal of worker {}", id.0)));
                drop(ready);
                if told.is_ok() && word.recv().is_ok() && let Err(error) = worker.run() {
                    tracing::error!(worker = id.0, %error, "a worker cannot go on; the relay ends, and its journal brings it back");
                    std::process::abort();
                }
            })
            .with_context(|| format!("cannot start the thread of worker {}", id.0))?;
        self.go.push(go);
        self.handles[usize::from(id.0)].thread = Some(thread);
        Ok(())
    }

    /// Waits until every worker has restored and journaled its records, removes the journals they came from, and lets
    /// the workers read.
    pub(super) fn finish(self, succession: Arc<Succession>) -> anyhow::Result<()> {
        let (told, ready) = self.ready;
        // Only the workers are left to say something: one that panics is noticed.
        drop(told);
        for _ in &self.go {
            ready.recv().map_err(|_| anyhow!("a worker died while it restored its records"))??;
        }
        let succession = Arc::into_inner(succession).context("a worker still writes its first journal")?;
        succession.finish().context("cannot remove the journals of the last start; see `state_dir`")?;
        for go in self.go {
            go.send(()).map_err(|_| anyhow!("a worker died before it served"))?;
        }
        Ok(())
    }
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
