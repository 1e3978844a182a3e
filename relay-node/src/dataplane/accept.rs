//! From a connection in the backlog to one whose bytes are STUN and ChannelData: accepted, counted, asked what it is,
//! its TLS handshake done. Nobody waits for anybody here.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use socket2::{SockRef, Socket};
use turn_core::{ConnectionId, FiveTuple, Transport};

use super::StreamConfig;
use super::counters::Loss;
use super::listen::ListenerSocket;
use super::opening::{Found, LONGEST_OPENING, Rules, TlsRules};
use super::prefixes::{Place, Prefixes};
use super::refusals::Refusal;
use super::streams::IDLE;
use super::web::{Visitor, WebServer};
use super::worker::{Token, Worker};
use crate::sys::epoll::Interest;

/// Connections accepted before others have their turn.
const ACCEPT_BUDGET: usize = 64;
/// How long accepting rests when the process is out of descriptors.
const PAUSE: Duration = Duration::from_secs(1);
/// Unsent bytes in the kernel before it takes no more: the rest waits here, where media can still be dropped.
const KERNEL_QUEUE: u32 = 64 << 10;
/// CPU time that handshakes get in one turn of the loop, so that a storm of them holds no media back for longer. One
/// handshake takes some 0.2 ms with an elliptic-curve key and 1 ms with RSA.
const HANDSHAKE_TIME: Duration = Duration::from_millis(2);

/// What connections meet first; shared by the workers.
pub(super) struct Door {
    rules: Rules,
    prefixes: Arc<Prefixes>,
    web_server: Option<WebServer>,
    /// Half-open connections per worker.
    most_half_open: usize,
    /// How long a connection may be half-open.
    patience: Duration,
}

impl Door {
    pub(super) fn new(config: &StreamConfig) -> anyhow::Result<Arc<Self>> {
        let has_web_server = config.web_server.is_some();
        let tls = |certificates| TlsRules::new(certificates, config.public_host.clone(), has_web_server);
        let tls = config.certificates.clone().map(tls).transpose().context("cannot set TLS up")?;
        Ok(Arc::new(Self {
            rules: Rules { trusted_proxies: config.trusted_proxies.clone(), tls },
            prefixes: Prefixes::new(config.connections_per_prefix),
            web_server: config.web_server.clone(),
            most_half_open: config.handshakes,
            patience: config.handshake_time,
        }))
    }
}

/// Connections that have not shown what they are, or whose handshake has not ended.
pub(super) struct HalfOpen {
    door: Arc<Door>,
    /// In the order of their deadlines; those that have settled meanwhile too.
    queue: VecDeque<(Instant, ConnectionId)>,
    count: usize,
    /// CPU time spent on handshakes in this turn of the loop.
    spent: Duration,
    /// First bytes are read here.
    buffer: Box<[u8]>,
}

impl HalfOpen {
    pub(super) fn new(door: Arc<Door>) -> Self {
        let buffer = vec![0; LONGEST_OPENING].into();
        Self { door, queue: VecDeque::new(), count: 0, spent: Duration::ZERO, buffer }
    }

    /// One less.
    pub(super) fn settled(&mut self) {
        self.count = self.count.saturating_sub(1);
    }

    /// Whether a source may say by a PROXY header whom it speaks for.
    pub(super) fn trusts(&self, source: IpAddr) -> bool {
        self.door.rules.trusts(source)
    }

    /// A new turn of the loop begins.
    pub(super) fn begin_turn(&mut self) {
        self.spent = Duration::ZERO;
    }

    /// Whether handshakes have had their share of this turn. What they left unread is ready in the next one.
    pub(super) fn is_spent(&self) -> bool {
        self.spent >= HANDSHAKE_TIME
    }

    /// Does a step of a handshake on the account of this turn.
    pub(super) fn charge<T>(&mut self, step: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let result = step();
        self.spend(began.elapsed());
        result
    }

    /// Notes time that a handshake took.
    pub(super) fn spend(&mut self, time: Duration) {
        self.spent += time;
    }
}

impl Worker {
    /// Accepts what waits at a TCP listener.
    pub(super) fn accept(&mut self, index: usize) {
        for _ in 0..ACCEPT_BUDGET {
            let listener = &self.listeners[index];
            let ListenerSocket::Tcp { listener: socket, .. } = &listener.socket else {
                return;
            };
            let accepted = SockRef::from(socket).accept4(libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC);
            let (socket, client) = match accepted {
                Ok((socket, address)) => (socket, address.as_socket()),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                        self.pause_accepting(index);
                        return;
                    }
                    Some(libc::EAGAIN) => return,
                    // One connection that ended before it was accepted (accept(2) names many errors).
                    _ => continue,
                },
            };
            if self.streams.is_full() {
                self.counters.lost(Loss::Connections);
                continue;
            }
            // What cannot even be set up is gone already.
            if let Some(client) = client {
                let _ = self.admit(socket, client);
            }
        }
    }

    fn admit(&mut self, socket: Socket, client: SocketAddr) -> io::Result<()> {
        let door = &self.streams.half_open.door;
        // A proxy's connections are its clients': each is counted when the header has said whose it is.
        let place = if door.rules.trusts(client.ip()) {
            None
        } else {
            let place = door.prefixes.take(client.ip());
            if place.is_none() {
                self.refusals.count(Refusal::Prefix);
                return Ok(());
            }
            place
        };
        let deadline = self.now.mono + door.patience;
        let crowded = self.streams.half_open.count >= door.most_half_open;
        if crowded {
            self.end_oldest_half_open();
        }
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_user_timeout(Some(IDLE))?;
        socket.set_tcp_notsent_lowat(KERNEL_QUEUE)?;
        let socket = TcpStream::from(socket);
        let five_tuple = FiveTuple { transport: Transport::Tcp, client, server: socket.local_addr()? };
        let (key, connection) = self.streams.insert(socket, five_tuple, self.now.mono);
        connection.place = place;
        let id = connection.id;
        let added = self.epoll.add(connection.socket().as_fd(), Token::Connection(key).encode(), Interest::Read);
        self.streams.half_open.count += 1;
        self.streams.half_open.queue.push_back((deadline, id));
        if added.is_err() {
            self.streams.remove(key);
        }
        added
    }

    /// The oldest has had the most time; a newcomer that means it needs a few round trips only.
    fn end_oldest_half_open(&mut self) {
        while let Some((_, id)) = self.streams.half_open.queue.pop_front() {
            if let Some(key) = self.streams.key(id)
                && self.streams.is_half_open(key)
            {
                self.refuse(key, Refusal::HalfOpen);
                return;
            }
        }
    }

    /// Closes half-open connections whose time is over.
    pub(super) fn end_slow_openings(&mut self) {
        while let Some(&(deadline, id)) = self.streams.half_open.queue.front() {
            let half_open = self.streams.key(id).filter(|key| self.streams.is_half_open(*key));
            match half_open {
                Some(key) if deadline <= self.now.mono => self.refuse(key, Refusal::Slow),
                Some(_) => return,
                None => {}
            }
            self.streams.half_open.queue.pop_front();
        }
    }

    /// Closes a connection, and counts why.
    pub(super) fn refuse(&mut self, key: usize, refusal: Refusal) {
        self.refusals.count(refusal);
        self.streams.close_soon(key);
    }

    fn pause_accepting(&mut self, index: usize) {
        tracing::warn!("out of descriptors: new TCP connections wait; raise the limit (LimitNOFILE, ulimit -n)");
        self.watch_listener(index, Some(self.now.mono + PAUSE));
    }

    /// Accepts again where accepting has paused long enough.
    pub(super) fn resume_accepting(&mut self) {
        for index in 0..self.listeners.len() {
            if let ListenerSocket::Tcp { paused: Some(until), .. } = self.listeners[index].socket
                && until <= self.now.mono
            {
                self.watch_listener(index, None);
            }
        }
    }

    fn watch_listener(&mut self, index: usize, until: Option<Instant>) {
        let ListenerSocket::Tcp { listener, paused } = &mut self.listeners[index].socket else {
            return;
        };
        let interest = if until.is_some() { Interest::None } else { Interest::Read };
        // A listener that epoll knows cannot be refused a change.
        if self.epoll.modify(listener.as_fd(), Token::Listener(index).encode(), interest).is_ok() {
            *paused = until;
        }
    }

    /// Reads the first bytes of a connection. Whether it has shown what it is, and its frames can be read.
    pub(super) fn read_opening(&mut self, key: usize) -> bool {
        let Some(connection) = self.streams.table.get_mut(key) else {
            return false;
        };
        let source = match connection.socket().peer_addr() {
            Ok(source) => source.ip(),
            // It has ended.
            Err(_) => {
                self.streams.close_soon(key);
                return false;
            }
        };
        let mut ends = (connection.five_tuple.client, connection.five_tuple.server);
        let half_open = &mut self.streams.half_open;
        let mut socket = connection.bytes.socket();
        let Some(opening) = connection.opening.as_deref_mut() else {
            return true;
        };
        let room = opening.room().min(half_open.buffer.len());
        let found = match socket.read(&mut half_open.buffer[..room]) {
            Ok(0) => None,
            Ok(length) => Some(opening.take(&half_open.buffer[..length], &half_open.door.rules, source, &mut ends)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            Err(_) => None,
        };
        let is_proxied = opening.is_proxied();
        (connection.five_tuple.client, connection.five_tuple.server) = ends;
        let Some(found) = found else {
            self.streams.close_soon(key);
            return false;
        };
        if matches!(found, Found::Plain | Found::Tls | Found::Web) && connection.place.is_none() && is_proxied {
            connection.place = half_open.door.prefixes.take(ends.0.ip());
            if connection.place.is_none() {
                self.refuse(key, Refusal::Prefix);
                return false;
            }
        }
        let refusal = match found {
            Found::Unknown => return false,
            Found::Plain => {
                connection.open_plain();
                self.streams.settle(key);
                return true;
            }
            Found::Tls => {
                connection.five_tuple.transport = Transport::Tls;
                let config = half_open.door.rules.tls.as_ref().map(|tls| Arc::clone(&tls.config));
                match config.map(|config| half_open.charge(|| connection.open_tls(config))) {
                    Some(Ok(())) => return true,
                    _ => Refusal::Handshake,
                }
            }
            Found::Web => {
                if self.hand_to_web_server(key) {
                    return false;
                }
                Refusal::WebServerBusy
            }
            Found::BadProxyHeader => Refusal::ProxyHeader,
            Found::Nonsense => Refusal::Nonsense,
        };
        self.refuse(key, refusal);
        false
    }

    /// Gives a connection away. Whether it was taken; if not, its socket is gone all the same.
    fn hand_to_web_server(&mut self, key: usize) -> bool {
        let Some(web_server) = self.streams.half_open.door.web_server.clone() else {
            return false;
        };
        let Some(mut connection) = self.streams.remove(key) else {
            return false;
        };
        // Closing would do; but the socket lives on.
        if self.epoll.remove(connection.socket().as_fd()).is_err() {
            return false;
        }
        let FiveTuple { client, server, .. } = connection.five_tuple;
        let place: Option<Place> = connection.place.take();
        let (first, socket) = connection.into_first_bytes();
        web_server.take(Visitor { socket, first, client, server, place })
    }
}
