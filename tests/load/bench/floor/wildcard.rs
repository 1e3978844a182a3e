//! One socket for all relayed addresses of the floor, as the relay has it with `relayed = "wildcard"`.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use relay_node::sys::link::set_freebind;
use relay_node::sys::raw::{RawBatch, RawDatagram, open_raw};
use relay_node::sys::socket::{receive_destination, set_buffers};
use relay_node::sys::steering::Steering;
use socket2::Socket;

/// First port of a relayed address: allocations are numbered from here.
const FIRST: u16 = 49_152;
/// Receive buffer of it, as the relay has it.
const RECEIVE_BUFFER: i32 = 16 << 20;
/// The system's TTL.
const TTL: u8 = 64;
/// Longer than any measurement.
const FOR_EVER: Duration = Duration::from_secs(86_400);

pub(super) struct Wildcard {
    ip: IpAddr,
    pub(super) receiver: UdpSocket,
    raw: Socket,
    batch: RawBatch,
    steering: Steering,
}

impl Wildcard {
    pub(super) fn open(ip: IpAddr) -> Result<Self> {
        // Where it is bound does not matter to what is steered to it.
        let receiver = UdpSocket::bind((IpAddr::from([127, 0, 0, 1]), 0))?;
        receiver.set_nonblocking(true)?;
        receive_destination(receiver.as_fd(), false)?;
        set_freebind(receiver.as_fd(), false)?;
        set_buffers(receiver.as_fd(), RECEIVE_BUFFER)?;
        let steering = Steering::attach(&[ip], std::iter::once((0, false, &receiver)))?;
        Ok(Self { ip, receiver, raw: open_raw(ip)?, batch: RawBatch::new(), steering })
    }

    /// The relayed address of an allocation.
    pub(super) fn steer(&self, allocation: usize) -> Result<SocketAddr> {
        let port = u16::try_from(allocation).ok().and_then(|index| FIRST.checked_add(index)).context("no port left")?;
        let relayed = SocketAddr::new(self.ip, port);
        self.steering.steer(relayed, 0);
        Ok(relayed)
    }

    pub(super) fn permit(&self, relayed: SocketAddr, peer: IpAddr) {
        self.steering.permit(relayed, peer, Instant::now() + FOR_EVER);
    }

    /// Whose relayed address this is.
    pub(super) fn allocation(relayed: SocketAddr) -> Option<usize> {
        relayed.port().checked_sub(FIRST).map(usize::from)
    }

    /// Sends all of them, or loses what the kernel has no room for.
    pub(super) fn send<'a>(
        &mut self,
        datagrams: impl Iterator<Item = (SocketAddr, SocketAddr, &'a [u8])> + Clone,
    ) -> Result<()> {
        let mut rest = datagrams.map(|(from, to, payload)| {
            let parts = [payload, &[], &[]];
            RawDatagram { from, to, tos: 0, ttl: TTL, dont_fragment: false, parts }
        });
        while rest.clone().next().is_some() {
            match self.batch.send(self.raw.as_fd(), rest.clone()) {
                Ok(0) => return Ok(()),
                Ok(taken) => {
                    rest.nth(taken - 1);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => bail!(error),
            }
        }
        Ok(())
    }
}
