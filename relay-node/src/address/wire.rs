//! Frames on the interface of the relay addresses.

use std::io;
use std::net::IpAddr;

use tokio::net::UdpSocket;

use super::frame::{self, Claim, Mac};
use crate::sys::link::open_frames;

/// A socket for ARP and neighbour discovery.
pub(super) struct Wire {
    /// Of packet(7), not of UDP: what is received and sent by it are whole frames.
    socket: UdpSocket,
}

impl Wire {
    /// # Errors
    /// No such interface, or no CAP_NET_RAW.
    pub(super) fn open(interface: u32) -> io::Result<Self> {
        let socket = open_frames(interface, &frame::filter())?;
        Ok(Self { socket: UdpSocket::from_std(socket.into())? })
    }

    /// The next claim of anybody to anything. May be dropped and called again.
    pub(super) async fn claim(&self) -> io::Result<Claim> {
        let mut buffer = [0; frame::LONGEST];
        loop {
            match self.socket.recv(&mut buffer).await {
                Ok(length) => {
                    if let Some(claim) = frame::claim(&buffer[..length]) {
                        return Ok(claim);
                    }
                }
                // The interface went down and will be up again: the socket stays.
                Err(error) if error.raw_os_error() == Some(libc::ENETDOWN) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Tells the neighbours where the address is.
    pub(super) fn announce(&self, address: IpAddr, mac: Mac) -> io::Result<()> {
        frame::announcements(address, mac).iter().try_for_each(|frame| self.send(frame))
    }

    /// Asks who has the address.
    pub(super) fn probe(&self, address: IpAddr, mac: Mac) -> io::Result<()> {
        self.send(&frame::probe(address, mac))
    }

    fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.socket.try_send(frame).map(drop)
    }
}
