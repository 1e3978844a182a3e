//! Datagrams by sendmmsg(2) and recvmmsg(2).

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmmsg};

/// Datagrams of one system call.
pub const CAPACITY: usize = 64;
/// Bytes of a received datagram.
const ROOM: usize = 2048;

/// Room to receive into.
pub struct Receiver {
    headers: MultiHeaders<SockaddrStorage>,
    buffers: Box<[[u8; ROOM]; CAPACITY]>,
}

impl Receiver {
    /// Room for [`CAPACITY`] datagrams.
    pub fn new() -> Self {
        Self { headers: MultiHeaders::preallocate(CAPACITY, None), buffers: Box::new([[0; ROOM]; CAPACITY]) }
    }

    /// Receives at most `most` datagrams, and never more than [`CAPACITY`], without waiting; hands out source and bytes
    /// of each, and says how many there were. An ICMP error that was pending is none.
    ///
    /// # Errors
    /// As recvmmsg(2).
    pub fn receive(
        &mut self,
        socket: &impl AsRawFd,
        most: usize,
        mut each: impl FnMut(Option<SocketAddr>, &[u8]),
    ) -> io::Result<usize> {
        let mut slices = self.buffers.each_mut().map(|buffer| [IoSliceMut::new(buffer)]);
        let fd: RawFd = socket.as_raw_fd();
        let received = match recvmmsg(fd, &mut self.headers, slices.iter_mut().take(most), MsgFlags::MSG_DONTWAIT, None)
        {
            Ok(received) => received,
            Err(Errno::EAGAIN | Errno::ECONNREFUSED | Errno::EINTR) => return Ok(0),
            Err(error) => return Err(error.into()),
        };
        let mut count = 0;
        for message in received {
            count += 1;
            let source = message.address.and_then(address_of);
            each(source, message.iovs().next().unwrap_or_default());
        }
        Ok(count)
    }
}

impl Default for Receiver {
    fn default() -> Self {
        Self::new()
    }
}

fn address_of(storage: SockaddrStorage) -> Option<SocketAddr> {
    let v4 = storage.as_sockaddr_in().map(|address| SocketAddr::new(IpAddr::V4(address.ip()), address.port()));
    v4.or_else(|| storage.as_sockaddr_in6().map(|address| SocketAddr::new(IpAddr::V6(address.ip()), address.port())))
}

/// Room to send from.
pub struct Sender {
    headers: MultiHeaders<SockaddrStorage>,
}

impl Sender {
    /// Room for [`CAPACITY`] datagrams.
    pub fn new() -> Self {
        Self { headers: MultiHeaders::preallocate(CAPACITY, None) }
    }

    /// Sends at most [`CAPACITY`] datagrams to one address, or where the socket is connected to; says how many the
    /// kernel took, which may be none.
    ///
    /// # Errors
    /// As sendmmsg(2).
    pub fn send(&mut self, socket: &impl AsRawFd, to: Option<SocketAddr>, datagrams: &[&[u8]]) -> io::Result<usize> {
        let slices: Vec<[IoSlice<'_>; 1]> = datagrams.iter().map(|bytes| [IoSlice::new(bytes)]).collect();
        let addresses = vec![to.map(SockaddrStorage::from); slices.len()];
        match sendmmsg(socket.as_raw_fd(), &mut self.headers, &slices, &addresses, [], MsgFlags::MSG_DONTWAIT) {
            Ok(sent) => Ok(sent.count()),
            // An ICMP error of a packet before; the socket goes on.
            Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::ECONNREFUSED | Errno::EINTR) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }
}

impl Sender {
    /// As [`Sender::send`], of one datagram.
    ///
    /// # Errors
    /// As send(2).
    pub fn send_one(&mut self, socket: &UdpSocket, to: Option<SocketAddr>, datagram: &[u8]) -> io::Result<usize> {
        let sent = match to {
            Some(to) => socket.send_to(datagram, to),
            None => socket.send(datagram),
        };
        match sent {
            Ok(_) => Ok(1),
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::ConnectionRefused | ErrorKind::Interrupted => Ok(0),
                _ if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => Ok(0),
                _ => Err(error),
            },
        }
    }
}

impl Default for Sender {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_received() -> io::Result<()> {
        for any in ["127.0.0.1:0", "[::1]:0"] {
            let (from, to) = (UdpSocket::bind(any)?, UdpSocket::bind(any)?);
            to.set_nonblocking(true)?;
            let mut receiver = Receiver::new();
            for round in 0..2 {
                let datagrams: [&[u8]; 3] = [b"one", &[round; 1400], b"three"];
                assert_eq!(Sender::new().send(&from, Some(to.local_addr()?), &datagrams)?, 3);
                let mut seen = Vec::new();
                let count = receiver.receive(&to, CAPACITY, |source, bytes| seen.push((source, bytes.to_vec())))?;
                assert_eq!(count, 3);
                for (sent, (source, bytes)) in datagrams.iter().zip(&seen) {
                    assert_eq!((*source, &bytes[..]), (Some(from.local_addr()?), *sent));
                }
            }
            assert_eq!(receiver.receive(&to, CAPACITY, |_, _| {})?, 0);
        }
        Ok(())
    }
}
