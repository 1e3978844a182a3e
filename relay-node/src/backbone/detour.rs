//! Connections over a third member. To QUIC they are connections like any other, to an address that stands for "that
//! member, over this one": its packets go as frames over the link to the one in the middle, which passes them on over its own
//! link to the other. So both ends see each other's certificate and nobody in the middle can read or write. It passes on what
//! comes over a link of its own and never what comes over a detour: there is one hop at most.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use tokio::sync::Notify;
use turn_core::MemberId;

/// Packets that wait on either side.
const MOST_WAITING: usize = 1024;
/// A part of the reserved 240.0.0.0/4: no packet of the network comes from there.
const V4: u32 = 0xF000_0000;
const V4_MASK: u32 = 0xFF00_0000;
/// A part of the discard prefix (RFC 6666).
const V6: u128 = 0x0100_0000_0000_0000_7475_726E_0000_0000;
const V6_MASK: u128 = !0xFFFF_FFFF;
const PORT: u16 = 1;
const BITS: u32 = 12;

/// The way to `far` over `via`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Detour {
    pub(super) via: MemberId,
    pub(super) far: MemberId,
}

impl Detour {
    /// The address that stands for it.
    pub(super) fn address(self, is_v6: bool) -> SocketAddr {
        let both = u32::from(self.via.0) << BITS | u32::from(self.far.0);
        let ip: IpAddr = match is_v6 {
            false => Ipv4Addr::from_bits(V4 | both).into(),
            true => Ipv6Addr::from_bits(V6 | u128::from(both)).into(),
        };
        (ip, PORT).into()
    }

    /// What an address stands for; none where it is an address.
    pub(super) fn of(address: SocketAddr) -> Option<Self> {
        let both = match address.ip().to_canonical() {
            IpAddr::V4(ip) if ip.to_bits() & V4_MASK == V4 => ip.to_bits() & !V4_MASK,
            IpAddr::V6(ip) if ip.to_bits() & V6_MASK == V6 => (ip.to_bits() & !V6_MASK) as u32,
            _ => return None,
        };
        let number = |bits: u32| MemberId((bits & ((1 << BITS) - 1)) as u16);
        Some(Self { via: number(both >> BITS), far: number(both) })
    }
}

/// What is between QUIC's socket and the links.
#[derive(Default)]
pub(super) struct Crossing {
    outgoing: Mutex<VecDeque<(Detour, Bytes)>>,
    incoming: Mutex<VecDeque<(Detour, Bytes)>>,
    reader: AtomicWaker,
    /// Something goes out.
    pub(super) sends: Notify,
}

impl Crossing {
    /// The next packet that goes out.
    pub(super) fn next(&self) -> Option<(Detour, Bytes)> {
        self.outgoing.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    /// A packet has come by this way. `false` where too many wait.
    pub(super) fn arrived(&self, by: Detour, packet: &[u8]) -> bool {
        {
            let mut incoming = self.incoming.lock().unwrap_or_else(PoisonError::into_inner);
            if incoming.len() >= MOST_WAITING {
                return false;
            }
            incoming.push_back((by, Bytes::copy_from_slice(packet)));
        }
        self.reader.wake();
        true
    }

    fn send(&self, by: Detour, transmit: &Transmit<'_>) {
        let mut outgoing = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        let segment = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        for packet in transmit.contents.chunks(segment) {
            // As in a network: what there is no room for is lost.
            if outgoing.len() < MOST_WAITING {
                outgoing.push_back((by, Bytes::copy_from_slice(packet)));
            }
        }
        drop(outgoing);
        self.sends.notify_one();
    }
}

/// A socket that has the links beside the network.
pub(super) struct Socket {
    pub(super) network: Arc<dyn AsyncUdpSocket>,
    pub(super) crossing: Arc<Crossing>,
}

impl fmt::Debug for Socket {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Socket").field("network", &self.network).finish_non_exhaustive()
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.network).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        match Detour::of(transmit.destination) {
            None => self.network.try_send(transmit),
            Some(detour) => {
                self.crossing.send(detour, transmit);
                Ok(())
            }
        }
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.crossing.reader.register(context.waker());
        let packet = self.crossing.incoming.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        if let (Some((by, packet)), Some(buffer), Some(meta)) = (packet, buffers.first_mut(), metas.first_mut()) {
            let is_v6 = self.network.local_addr().is_ok_and(|local| local.is_ipv6());
            let length = packet.len().min(buffer.len());
            buffer[..length].copy_from_slice(&packet[..length]);
            *meta = RecvMeta::default();
            (meta.addr, meta.len, meta.stride) = (by.address(is_v6), length, length);
            return Poll::Ready(Ok(1));
        }
        let received = self.network.poll_recv(context, buffers, metas);
        if let Poll::Ready(Ok(count)) = &received {
            // Whoever forges such a source is not taken for the member it stands for.
            for meta in metas.iter_mut().take(*count).filter(|meta| Detour::of(meta.addr).is_some()) {
                meta.len = 0;
            }
        }
        received
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.network.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.network.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.network.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.network.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_detour_has_an_address_and_no_address_is_one() {
        for is_v6 in [false, true] {
            for (via, far) in [(0, 1), (1023, 0), (5, 1023)] {
                let detour = Detour { via: MemberId(via), far: MemberId(far) };
                assert_eq!(Detour::of(detour.address(is_v6)), Some(detour));
            }
        }
        for address in
            ["192.0.2.1:1", "239.255.0.1:1", "255.255.255.255:1", "241.0.0.1:1", "[2001:db8::1]:1", "[100::1]:1"]
        {
            assert_eq!(Detour::of(address.parse().expect("an address")), None, "{address}");
        }
    }

    #[test]
    fn packets_of_a_batch_are_told_apart_and_bounded() {
        let crossing = Crossing::default();
        let detour = Detour { via: MemberId(1), far: MemberId(2) };
        let transmit = Transmit {
            destination: detour.address(false),
            ecn: None,
            contents: b"aaabbbc",
            segment_size: Some(3),
            src_ip: None,
        };
        crossing.send(detour, &transmit);
        let packets: Vec<_> = std::iter::from_fn(|| crossing.next()).map(|(_, packet)| packet).collect();
        assert_eq!(packets, [&b"aaa"[..], b"bbb", b"c"]);
        for _ in 0..1000 {
            crossing.send(detour, &transmit);
        }
        assert_eq!(std::iter::from_fn(|| crossing.next()).count(), MOST_WAITING);
        assert!((0..MOST_WAITING).all(|_| crossing.arrived(detour, b"x")));
        assert!(!crossing.arrived(detour, b"x"));
    }
}
