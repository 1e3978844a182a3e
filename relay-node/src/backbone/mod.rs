//! The backbone: one QUIC connection between every two relays of the cluster, by which their packets for each other travel.
//!
//! Workers push packets into rings ([`BackboneOutbox`]); one thread of the backbone's own takes them, and hands over what
//! comes from others ([`Deliver`]). Whether a member can be reached by it, workers read from [`Usabilities`] for each
//! packet. The way of a packet: `outbox.rs` -> `hub.rs` -> `link.rs` (`queue.rs` where it has to wait) -> QUIC; and at the
//! far end QUIC -> `hub.rs` (`frame.rs`; is the source its own?) -> [`Deliver`].
//!
//! | module | what it is |
//! |---|---|
//! | `frame` | what stands in a datagram |
//! | `identity`, `tls` | who may be at the other end |
//! | `endpoint`, `transport`, `congestion`, `reset` | sockets, dialling, taking in; how QUIC behaves |
//! | `link`, `queue`, `bucket`, `join` | one member: its connection, what waits, how fast, what is cut and joined |
//! | `liveness`, `measure` | whether it lives, and how well |
//! | `path`, `detour` | whether to go over a third member, and how |
//! | `asked` | who may answer a client of this relay |
//! | `hub`, `tasks`, `rest` | everything together, on one thread |

mod asked;
mod bucket;
mod congestion;
mod deliver;
mod detour;
mod endpoint;
mod frame;
mod hub;
mod identity;
mod join;
mod link;
mod liveness;
mod measure;
mod members;
mod outbox;
mod path;
mod queue;
mod report;
mod reset;
mod rest;
mod settings;
mod tasks;
mod tls;
mod transport;
mod usability;

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;

use arc_swap::ArcSwap;
use tokio::sync::{oneshot, watch};
use tokio::task::LocalSet;

pub use deliver::{Deliver, Inbound};
pub use members::{MOST_MEMBERS, Member, MemberList, MemberNumbers};
pub use outbox::{BackboneOutbox, Full, Outbound};
pub use report::{LinkCounts, LinkDrop, LinkDrops, LinkPath, LinkReport};
pub use settings::{BackboneError, Identity, Settings};
pub use usability::{Usabilities, Usability};

use crate::sys::epoll::Waker;
use crate::sys::process::wait_for_those_who_run;

/// The running backbone. Dropping it closes every link in an orderly way, within a third of a second.
pub struct Backbone {
    node_id: String,
    addresses: Vec<SocketAddr>,
    usabilities: Usabilities,
    reports: Arc<ArcSwap<Vec<LinkReport>>>,
    tls: watch::Sender<tls::Tls>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Backbone {
    /// Binds the sockets and starts the thread, with a ring for each of so many workers. A list of members that is sent
    /// by `members` is in force at once.
    ///
    /// # Errors
    /// [`BackboneError`].
    pub fn start(
        settings: Settings,
        identity: &Identity,
        members: watch::Receiver<Arc<MemberList>>,
        workers: usize,
        deliver: impl Deliver,
    ) -> Result<(Self, Vec<BackboneOutbox>), BackboneError> {
        let tls = tls::Tls::new(identity, &settings.node_id)?;
        let sockets = endpoint::bind(&settings)?;
        let addresses = sockets.iter().map(std::net::UdpSocket::local_addr).collect::<Result<_, _>>()?;
        let waker = Arc::new(Waker::new()?);
        let (outboxes, inboxes) = outbox::rings(workers, &waker);
        let rest = Arc::new(rest::Rest::new());
        let before_waiting = {
            let rest = Arc::clone(&rest);
            move || rest.before_waiting()
        };
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().on_thread_park(before_waiting).build()?;
        let endpoints = {
            let _context = runtime.enter();
            endpoint::Endpoints::new(sockets, identity)?
        };
        let usabilities = Usabilities::new();
        let reports = Arc::new(ArcSwap::from_pointee(Vec::new()));
        let (stop, stopped) = oneshot::channel();
        let (tls_sender, tls_receiver) = watch::channel(tls.clone());
        let orders = tasks::Orders { members, tls: tls_receiver, stop: stopped };
        let node_id = settings.node_id.clone();
        let thread = {
            let (usabilities, reports) = (usabilities.clone(), Arc::clone(&reports));
            let deliver: Box<dyn Deliver> = Box::new(deliver);
            std::thread::Builder::new().name("backbone".into()).spawn(move || {
                if let Err(error) = wait_for_those_who_run() {
                    tracing::debug!("the backbone's thread interrupts workers: {error}");
                }
                let hub = Rc::new(hub::Hub::new(settings, endpoints, tls, deliver, usabilities, reports, rest));
                LocalSet::new().block_on(&runtime, tasks::run(hub, inboxes, waker, orders));
            })?
        };
        let backbone =
            Self { node_id, addresses, usabilities, reports, tls: tls_sender, stop: Some(stop), thread: Some(thread) };
        Ok((backbone, outboxes))
    }

    /// What it listens on, with the ports that were chosen.
    pub fn local_addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// How packets for each member travel.
    pub fn usabilities(&self) -> Usabilities {
        self.usabilities.clone()
    }

    /// Takes another certificate into use: new handshakes are made with it, and links that this relay has dialled are
    /// dialled anew beside the old connection, which ends when the new one stands.
    ///
    /// # Errors
    /// [`BackboneError`]; then the old one stays in use.
    pub fn renew(&self, identity: &Identity) -> Result<(), BackboneError> {
        let tls = tls::Tls::new(identity, &self.node_id)?;
        self.tls.send_replace(tls);
        Ok(())
    }

    /// Every link, at most a second old.
    pub fn report(&self) -> Arc<Vec<LinkReport>> {
        self.reports.load_full()
    }
}

impl Drop for Backbone {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the backbone's thread has panicked");
        }
    }
}
