//! Client-facing sockets: one per worker and address, opened before anything is read.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsFd;
use std::time::Instant;

use anyhow::Context;
use socket2::{Domain, Socket, Type};
use turn_core::Transport;

use super::packet::Appetite;
use super::{Listen, shard};
use crate::sys::link::set_freebind;
use crate::sys::socket::{
    Fragmentation, attach_reuseport_program, receive_coalesced, receive_local_address, set_buffers, set_fragmentation,
};

/// Receive and send buffer asked for: a burst of every client of a worker while it turns its loop.
const BUFFER: i32 = 4 << 20;
/// Many clients share a listener, so that it hardly ever has a single datagram.
const LEAST_SLOTS: u16 = 8;
/// Connections the kernel finishes before they are accepted.
const BACKLOG: i32 = 1024;

/// One worker's socket of one listen address.
pub(super) struct Listener {
    /// What it is bound to; the port is known even where 0 was asked for.
    pub(super) address: SocketAddr,
    /// What it is advertised as; a stream's first bytes say what is served.
    pub(super) transport: Transport,
    pub(super) socket: ListenerSocket,
    /// Of datagrams.
    pub(super) appetite: Appetite,
}

/// The socket, by transport.
pub(super) enum ListenerSocket {
    Udp(UdpSocket),
    Tcp {
        listener: TcpListener,
        /// Accepting waits until then: the process is out of descriptors.
        paused: Option<Instant>,
    },
}

impl Listener {
    /// Whether it serves every local address, so that each packet says which one it came to.
    pub(super) fn is_wildcard(&self) -> bool {
        self.address.ip().is_unspecified()
    }

    /// Whether a client that sent to `server` reached this one.
    pub(super) fn serves(&self, transport: Transport, server: SocketAddr) -> bool {
        self.transport.is_stream() == transport.is_stream()
            && self.address.port() == server.port()
            && (self.address.ip() == server.ip() || self.is_wildcard() && self.address.is_ipv4() == server.is_ipv4())
    }
}

/// Opens every address for every worker; the result is by worker, then in the order of `listen`. Of a relay whose
/// address `moves` it need not be here yet.
///
/// # Errors
/// One line that names the address and what to do.
pub(super) fn open(listen: &[Listen], workers: u16, moves: bool) -> anyhow::Result<Vec<Vec<Listener>>> {
    let mut by_worker: Vec<Vec<Listener>> = (0..workers).map(|_| Vec::new()).collect();
    for Listen { transport, bind } in listen {
        let mut address = *bind;
        if address.port() != 0 {
            probe(*transport, address, moves).with_context(|| what_to_do(*transport, address))?;
        }
        for (index, listeners) in by_worker.iter_mut().enumerate() {
            let listener = open_one(*transport, address, index == 0, workers);
            let listener = listener.with_context(|| what_to_do(*transport, address))?;
            address = listener.address;
            listeners.push(listener);
        }
    }
    Ok(by_worker)
}

/// Finds out whether anybody else has the address: with SO_REUSEPORT alone, two relays of one user would share it and
/// each lose half of its packets.
fn probe(transport: Transport, address: SocketAddr, moves: bool) -> io::Result<()> {
    let socket = new_socket(transport, address)?;
    if moves {
        set_freebind(socket.as_fd(), address.is_ipv6())?;
    }
    socket.bind(&address.into())?;
    if transport.is_stream() {
        socket.listen(1)?;
    }
    Ok(())
}

/// A socket for an address, which it does not bind yet.
pub(super) fn new_socket(transport: Transport, address: SocketAddr) -> io::Result<Socket> {
    let kind = if transport.is_stream() { Type::STREAM } else { Type::DGRAM };
    let socket = Socket::new(Domain::for_address(address), kind.nonblocking(), None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if transport.is_stream() {
        // Connections of the process before this one linger in TIME_WAIT.
        socket.set_reuse_address(true)?;
    }
    Ok(socket)
}

fn open_one(transport: Transport, address: SocketAddr, first: bool, workers: u16) -> io::Result<Listener> {
    let socket = new_socket(transport, address)?;
    socket.set_reuse_port(true)?;
    // [`probe`] has seen that the address is here, or it comes later.
    set_freebind(socket.as_fd(), address.is_ipv6())?;
    if !transport.is_stream() {
        if address.is_ipv6() {
            socket.set_recv_tclass_v6(true)?;
        } else {
            socket.set_recv_tos_v4(true)?;
        }
        if address.ip().is_unspecified() {
            receive_local_address(socket.as_fd(), address.is_ipv6())?;
        }
        // RFC 8656 §14, alternate behavior: the DF bit of what peers send is not known, and taken for 0.
        set_fragmentation(socket.as_fd(), address.is_ipv6(), Fragmentation::Allowed)?;
        receive_coalesced(socket.as_fd())?;
        set_buffers(socket.as_fd(), BUFFER)?;
        if first {
            attach_reuseport_program(socket.as_fd(), &shard::program(workers))?;
        }
    }
    socket.bind(&address.into())?;
    let bound = socket.local_addr()?.as_socket();
    let socket = if !transport.is_stream() {
        ListenerSocket::Udp(socket.into())
    } else {
        socket.listen(BACKLOG)?;
        ListenerSocket::Tcp { listener: socket.into(), paused: None }
    };
    Ok(Listener { address: bound.unwrap_or(address), transport, socket, appetite: Appetite::new(LEAST_SLOTS) })
}

/// What was tried, for the line an operator reads; the system's own words follow.
fn what_to_do(transport: Transport, address: SocketAddr) -> String {
    let name = format!("{transport:?}").to_lowercase();
    format!(
        "cannot listen on {name}://{address}; another server may have it (ss -lnp), the address may not be of this \
         machine, or a port below 1024 needs CAP_NET_BIND_SERVICE: change `listen` or what is in the way"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listen(transport: Transport, bind: &str) -> Listen {
        Listen { transport, bind: bind.parse().expect("literal") }
    }

    #[test]
    fn every_worker_gets_every_address() -> anyhow::Result<()> {
        let wanted = [
            listen(Transport::Udp, "127.0.0.1:0"),
            listen(Transport::Tcp, "127.0.0.1:0"),
            listen(Transport::Udp, "[::1]:0"),
        ];
        let opened = open(&wanted, 3, false)?;
        assert_eq!(opened.len(), 3);
        for worker in &opened {
            let addresses: Vec<SocketAddr> = worker.iter().map(|listener| listener.address).collect();
            assert_eq!(addresses, opened[0].iter().map(|listener| listener.address).collect::<Vec<_>>());
            assert!(addresses.iter().all(|address| address.port() != 0));
            assert_eq!(worker[1].transport, Transport::Tcp);
        }
        Ok(())
    }

    #[test]
    fn an_address_of_another_server_is_refused_and_named() -> anyhow::Result<()> {
        for transport in [Transport::Udp, Transport::Tcp] {
            // The other server shares as we do; it is refused all the same.
            let other = open(&[listen(transport, "127.0.0.1:0")], 2, false)?;
            let address = other[0][0].address;
            let Err(error) = open(&[Listen { transport, bind: address }], 2, false) else {
                panic!("two relays share {address}");
            };
            assert!(error.to_string().contains(&address.to_string()), "{error}");
        }
        assert!(open(&[listen(Transport::Udp, "192.0.2.1:3478")], 1, false).is_err(), "not of this machine");
        Ok(())
    }

    #[test]
    fn a_wildcard_serves_its_family_and_port() -> anyhow::Result<()> {
        let opened = open(&[listen(Transport::Udp, "0.0.0.0:0")], 1, false)?;
        let listener = &opened[0][0];
        let port = listener.address.port();
        let at = |ip: &str, port: u16| SocketAddr::new(ip.parse().expect("literal"), port);
        assert!(listener.serves(Transport::Udp, at("192.0.2.1", port)));
        assert!(!listener.serves(Transport::Tcp, at("192.0.2.1", port)));
        assert!(!listener.serves(Transport::Udp, at("192.0.2.1", port ^ 1)));
        assert!(!listener.serves(Transport::Udp, at("2001:db8::1", port)));
        Ok(())
    }
}
