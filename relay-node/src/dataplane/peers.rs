//! Connections between TCP allocations and peers (RFC 6062), as long as the allocation's worker has them: relayed
//! addresses listen, connects are on their way, and both hand over to the table of the node.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use rustc_hash::FxHashMap;
use slab::Slab;
use socket2::{SockRef, Socket};
use turn_core::{
    ClaimError, ConnectError, ConnectionId, DropReason, Family, Input, PeerAddr, PeerConnectionId, PeerEvent,
    RelayedAddr, Transport, WorkerId,
};

use super::listen;
use super::peer_table::{Claimed, Letter, PeerTable, Waiting};
use super::relayed::{Routes, TcpRoute};
use super::worker::{Token, Worker};
use crate::sys::epoll::{Epoll, Interest};
use crate::sys::link::set_freebind;

/// Peers accepted at one relayed address before others have their turn.
const ACCEPT_BUDGET: usize = 16;
/// Connections of peers that the kernel finishes before they are accepted.
const BACKLOG: i32 = 128;
/// What was sent to a peer and never acknowledged breaks the connection after this.
const UNACKNOWLEDGED: Duration = Duration::from_secs(30);
/// Unsent bytes in the kernel before it takes no more.
const KERNEL_QUEUE: u32 = 64 << 10;

/// The TCP side of a worker's relayed addresses.
pub(super) struct Peers {
    worker: WorkerId,
    table: Arc<PeerTable>,
    routes: Arc<Routes>,
    epoll: Arc<Epoll>,
    listeners: Slab<PeerListener>,
    by_port: FxHashMap<(Family, u16), usize>,
    opening: Slab<Opening>,
    by_id: FxHashMap<PeerConnectionId, usize>,
    /// Claimed in this turn, until the pipes begin.
    claimed: FxHashMap<PeerConnectionId, Claimed>,
    joins: Vec<(ConnectionId, PeerConnectionId)>,
}

/// The relayed address of a TCP allocation.
struct PeerListener {
    relayed: RelayedAddr,
    listener: TcpListener,
    /// Accepting waits: the process is out of descriptors.
    paused: bool,
}

/// A connection that nobody can claim yet.
struct Opening {
    id: PeerConnectionId,
    relayed: RelayedAddr,
    socket: TcpStream,
}

impl Peers {
    pub(super) fn new(worker: WorkerId, table: Arc<PeerTable>, routes: Arc<Routes>, epoll: Arc<Epoll>) -> Self {
        Self {
            worker,
            table,
            routes,
            epoll,
            listeners: Slab::new(),
            by_port: FxHashMap::default(),
            opening: Slab::new(),
            by_id: FxHashMap::default(),
            claimed: FxHashMap::default(),
            joins: Vec::new(),
        }
    }

    /// Accepts at a relayed address from now on.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub(super) fn watch(&mut self, relayed: RelayedAddr, listener: TcpListener) -> io::Result<()> {
        let entry = self.listeners.vacant_entry();
        self.epoll.add(listener.as_fd(), Token::PeerListener(entry.key()).encode(), Interest::Read)?;
        self.by_port.insert((relayed.family(), relayed.port()), entry.key());
        entry.insert(PeerListener { relayed, listener, paused: false });
        Ok(())
    }

    /// Closes a relayed address; whether it was one of TCP.
    pub(super) fn unwatch(&mut self, relayed: RelayedAddr) -> bool {
        let key = self.by_port.remove(&(relayed.family(), relayed.port()));
        key.and_then(|key| self.listeners.try_remove(key)).is_some()
    }

    /// See [`turn_core::Host::connect`].
    pub(super) fn connect(&mut self, relayed: RelayedAddr, to: PeerAddr) -> Result<PeerConnectionId, ConnectError> {
        let target = match self.routes.tcp_route(to) {
            TcpRoute::Internet => to.socket_addr(),
            // A loop of one (abuse.md A).
            TcpRoute::Relayed(bound) if bound == relayed.bound => return Err(ConnectError::Forbidden),
            TcpRoute::Relayed(bound) => bound,
            TcpRoute::Nobody => return Err(ConnectError::Forbidden),
        };
        let id = self.table.open(self.worker, relayed).ok_or(ConnectError::NoRoom)?;
        let entry = self.opening.vacant_entry();
        let begun = begin(relayed.bound, target).and_then(|socket| {
            self.epoll.add(socket.as_fd(), Token::Opening(entry.key()).encode(), Interest::Write)?;
            Ok(socket)
        });
        match begun {
            Ok(socket) => {
                self.by_id.insert(id, entry.key());
                entry.insert(Opening { id, relayed, socket });
                Ok(id)
            }
            Err(error) => {
                self.table.close(id);
                tracing::debug!(%error, "cannot begin a connection to a peer");
                Err(match error.raw_os_error() {
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => ConnectError::NoRoom,
                    _ => ConnectError::Failed,
                })
            }
        }
    }

    /// See [`turn_core::Host::claim`].
    pub(super) fn claim(&mut self, id: PeerConnectionId, username: &[u8]) -> Result<(), ClaimError> {
        let claimed = self.table.claim(id, username, self.worker)?;
        self.claimed.insert(id, claimed);
        Ok(())
    }

    /// See [`turn_core::Host::control_of`].
    pub(super) fn control_of(&self, id: PeerConnectionId) -> Option<SocketAddr> {
        self.table.control_of(id)
    }

    /// See [`turn_core::Output::Pend`].
    pub(super) fn pend(&mut self, id: PeerConnectionId, waiting: Waiting) {
        if let Some(Opening { socket, .. }) = self.take_opening(id) {
            self.table.park(id, socket, waiting);
        }
    }

    /// See [`turn_core::Output::ClosePeer`].
    pub(super) fn close(&mut self, id: PeerConnectionId) {
        self.take_opening(id);
        self.table.close(id);
    }

    /// See [`turn_core::Output::Join`].
    pub(super) fn join(&mut self, connection: ConnectionId, peer: PeerConnectionId) {
        self.joins.push((connection, peer));
    }

    /// What this turn has joined: the client's connection, and the peer's with its socket, unless it has ended
    /// since.
    pub(super) fn next_join(&mut self) -> Option<(ConnectionId, PeerConnectionId, Option<Claimed>)> {
        let (connection, peer) = self.joins.pop()?;
        Some((connection, peer, self.claimed.remove(&peer)))
    }

    /// A claimed connection ends before its pipe has begun.
    pub(super) fn forget_claim(&mut self, id: PeerConnectionId) {
        self.claimed.remove(&id);
    }

    /// A pipe has ended by itself.
    pub(super) fn ended(&self, id: PeerConnectionId) {
        self.table.ended(id);
    }

    /// What other workers have to say, oldest first.
    pub(super) fn letters(&self) -> Vec<Letter> {
        self.table.letters(self.worker)
    }

    /// Accepts again where that had to wait.
    pub(super) fn resume_accepting(&mut self) {
        for (key, listener) in &mut self.listeners {
            if listener.paused {
                let token = Token::PeerListener(key).encode();
                listener.paused = self.epoll.modify(listener.listener.as_fd(), token, Interest::Read).is_err();
            }
        }
    }

    /// The next peer that waits at a relayed address, under a name; no name, if there is no room for it.
    fn accept(&mut self, key: usize) -> Option<(RelayedAddr, PeerAddr, Option<PeerConnectionId>)> {
        let entry = self.listeners.get_mut(key)?;
        let relayed = entry.relayed;
        let (socket, address) = loop {
            let accepted = SockRef::from(&entry.listener).accept4(libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC);
            match accepted {
                Ok(accepted) => break accepted,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return None,
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                        // A listener that epoll knows cannot be refused a change.
                        let token = Token::PeerListener(key).encode();
                        entry.paused = self.epoll.modify(entry.listener.as_fd(), token, Interest::None).is_ok();
                        return None;
                    }
                    // One connection that ended before it was accepted (accept(2) names many errors).
                    _ => {}
                },
            }
        };
        let peer = self.routes.advertised(PeerAddr::new(address.as_socket()?));
        let id = prepare(&socket).ok().and_then(|()| self.table.open(self.worker, relayed));
        if let Some(id) = id {
            let key = self.opening.insert(Opening { id, relayed, socket: socket.into() });
            self.by_id.insert(id, key);
        }
        Some((relayed, peer, id))
    }

    /// What became of a connect that was on its way.
    fn settle(&mut self, key: usize) -> Option<(RelayedAddr, PeerConnectionId, PeerEvent)> {
        let &Opening { id, relayed, ref socket } = self.opening.get(key)?;
        let failed = match socket.take_error() {
            Ok(None) => socket.peer_addr().err(),
            Ok(Some(error)) | Err(error) => Some(error),
        };
        if let Some(error) = failed {
            if error.kind() == io::ErrorKind::NotConnected {
                return None;
            }
            tracing::debug!(%error, "a connection to a peer failed");
            self.close(id);
            return Some((relayed, id, PeerEvent::Failed));
        }
        // From here on nobody looks at it until it is claimed, perhaps by another worker.
        if self.epoll.remove(socket.as_fd()).is_err() {
            self.close(id);
            return Some((relayed, id, PeerEvent::Failed));
        }
        Some((relayed, id, PeerEvent::Connected))
    }

    fn take_opening(&mut self, id: PeerConnectionId) -> Option<Opening> {
        let key = self.by_id.remove(&id)?;
        self.opening.try_remove(key)
    }
}

impl Worker {
    /// Peers wait at a relayed address (RFC 6062 §5.3).
    pub(super) fn accept_peers(&mut self, key: usize) {
        for _ in 0..ACCEPT_BUDGET {
            let Some((relayed, peer, id)) = self.relayed.peers.accept(key) else {
                return;
            };
            let Some(connection) = id else {
                self.counters.dropped(DropReason::PeerConnections);
                continue;
            };
            self.handle(Input::PeerConnection { relayed, connection, event: PeerEvent::Arrived(peer) });
        }
    }

    /// A connection to a peer is there, or has failed (RFC 6062 §5.2).
    pub(super) fn settle_connect(&mut self, key: usize) {
        if let Some((relayed, connection, event)) = self.relayed.peers.settle(key) {
            self.handle(Input::PeerConnection { relayed, connection, event });
        }
    }

    /// What other workers did to connections of this one's allocations, or want of its pipes.
    pub(super) fn read_letters(&mut self) {
        for letter in self.relayed.peers.letters() {
            match letter {
                Letter::Event { relayed, connection, event } => {
                    self.handle(Input::PeerConnection { relayed, connection, event });
                }
                Letter::Close(id) => self.end_pipe_of(id),
            }
        }
    }
}

/// A listener at a relayed address of TCP.
///
/// # Errors
/// As bind(2) and listen(2): AddrInUse if anybody else has the port, another relay of this user too.
pub(super) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = new_socket(address)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    // Only now, so that the port was ours alone; from here on connects may leave from it (RFC 6062 §5.2).
    socket.set_reuse_port(true)?;
    Ok(socket.into())
}

/// Begins a connect from a relayed address.
fn begin(from: SocketAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = new_socket(from)?;
    socket.set_reuse_port(true)?;
    prepare(&socket)?;
    socket.bind(&from.into())?;
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket.into()),
    }
}

fn new_socket(address: SocketAddr) -> io::Result<Socket> {
    let socket = listen::new_socket(Transport::Tcp, address)?;
    set_freebind(socket.as_fd(), address.is_ipv6())?;
    Ok(socket)
}

fn prepare(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
    socket.set_tcp_notsent_lowat(KERNEL_QUEUE)
}
