//! Datagrams in batches: recvmmsg(2) and sendmmsg(2), with the local address and the DSCP/ECN octet of each; several of
//! one flow at once where the kernel has coalesced them (UDP_GRO) or is to cut them (UDP_SEGMENT).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use super::check;

/// A socket address as the kernel writes it.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) union Name {
    family: libc::sa_family_t,
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl Name {
    pub(super) const SIZE: libc::socklen_t = size_of::<Self>() as libc::socklen_t;
    // SAFETY: all three variants are plain integers, for which zeros are valid.
    pub(super) const EMPTY: Self = unsafe { std::mem::zeroed() };

    pub(super) fn set(&mut self, address: SocketAddr) -> libc::socklen_t {
        let size = match address {
            SocketAddr::V4(address) => {
                self.v4 = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: address.port().to_be(),
                    sin_addr: v4_to_raw(*address.ip()),
                    sin_zero: [0; 8],
                };
                size_of::<libc::sockaddr_in>()
            }
            SocketAddr::V6(address) => {
                self.v6 = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: address.port().to_be(),
                    sin6_flowinfo: 0,
                    sin6_addr: v6_to_raw(*address.ip()),
                    sin6_scope_id: address.scope_id(),
                };
                size_of::<libc::sockaddr_in6>()
            }
        };
        size as libc::socklen_t
    }

    /// The address; nothing for a family that is not IP.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        // SAFETY: the union was zeroed or written by `set` or the kernel, so every variant is made of initialised
        // integers; the family says which one is meant.
        unsafe {
            match libc::c_int::from(self.family) {
                libc::AF_INET => {
                    Some(SocketAddr::from((v4_from_raw(self.v4.sin_addr), u16::from_be(self.v4.sin_port))))
                }
                libc::AF_INET6 => Some(SocketAddr::V6(SocketAddrV6::new(
                    Ipv6Addr::from(self.v6.sin6_addr.s6_addr),
                    u16::from_be(self.v6.sin6_port),
                    0,
                    self.v6.sin6_scope_id,
                ))),
                _ => None,
            }
        }
    }
}

fn v4_to_raw(ip: Ipv4Addr) -> libc::in_addr {
    libc::in_addr { s_addr: u32::from_ne_bytes(ip.octets()) }
}

fn v4_from_raw(raw: libc::in_addr) -> Ipv4Addr {
    Ipv4Addr::from(raw.s_addr.to_ne_bytes())
}

fn v6_to_raw(ip: Ipv6Addr) -> libc::in6_addr {
    libc::in6_addr { s6_addr: ip.octets() }
}

/// Room for control messages: local address and DSCP/ECN of either family, or one ICMP error.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub(super) struct Control([u8; 96]);

impl Control {
    pub(super) const SIZE: usize = size_of::<Self>();
    pub(super) const EMPTY: Self = Self([0; 96]);
}

/// Length of a control message's header, and the alignment of all of them (cmsg(3)).
const CONTROL_HEADER: usize = size_of::<libc::cmsghdr>();
const CONTROL_ALIGN: usize = size_of::<usize>();

/// Hands every control message (level, type, data) in the first `length` bytes to `each`.
pub(super) fn control_messages(
    control: &Control,
    length: usize,
    mut each: impl FnMut(libc::c_int, libc::c_int, &[u8]),
) {
    let mut rest = &control.0[..length.min(Control::SIZE)];
    while rest.len() >= CONTROL_HEADER {
        // SAFETY: `rest` holds at least a cmsghdr of plain integers; the read does not ask for alignment.
        let header = unsafe { ptr::read_unaligned(rest.as_ptr().cast::<libc::cmsghdr>()) };
        let size = header.cmsg_len as usize;
        let Some(data) = rest.get(CONTROL_HEADER..size) else {
            return;
        };
        each(header.cmsg_level, header.cmsg_type, data);
        rest = rest.get(size.next_multiple_of(CONTROL_ALIGN)..).unwrap_or_default();
    }
}

/// Writes control messages one behind the other.
struct ControlWriter<'a> {
    control: &'a mut Control,
    length: usize,
}

impl ControlWriter<'_> {
    /// Appends a message whose data is a plain C type.
    fn push<T: Copy>(&mut self, level: libc::c_int, kind: libc::c_int, data: T) {
        let size = CONTROL_HEADER + size_of::<T>();
        let end = self.length + size.next_multiple_of(CONTROL_ALIGN);
        let room = &mut self.control.0[self.length..end];
        // SAFETY: a cmsghdr of zeros is valid: plain integers (some libcs add private padding).
        let mut header: libc::cmsghdr = unsafe { std::mem::zeroed() };
        header.cmsg_len = size as _;
        header.cmsg_level = level;
        header.cmsg_type = kind;
        // SAFETY: the slice just taken has room for the header and the data; unaligned writes do not ask for alignment.
        unsafe {
            ptr::write_unaligned(room.as_mut_ptr().cast(), header);
            ptr::write_unaligned(room.as_mut_ptr().add(CONTROL_HEADER).cast(), data);
        }
        self.length = end;
    }
}

/// Slots that datagrams are received into, with what the kernel told about each.
pub struct ReceiveSlots {
    memory: Box<[u8]>,
    headers: Box<[libc::mmsghdr]>,
    iovecs: Box<[libc::iovec]>,
    names: Box<[Name]>,
    controls: Box<[Control]>,
}

impl ReceiveSlots {
    /// Bytes of a slot: the longest datagram, or the longest frame of a stream (RFC 8656 §12.5; 20 + 65,535 bytes).
    pub const SIZE: usize = 65_536 + 64;
    /// Distance of slots. Not a multiple of a page, or the heads of all slots would share a few cache sets.
    const STRIDE: usize = Self::SIZE + 64 * 3;

    /// `count` slots. Memory is touched as far as datagrams fill it.
    pub fn new(count: usize) -> Self {
        // SAFETY: mmsghdr and iovec of zeros are valid: null pointers with zero lengths.
        let (header, iovec) = unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        Self {
            memory: vec![0; count * Self::STRIDE].into_boxed_slice(),
            headers: vec![header; count].into_boxed_slice(),
            iovecs: vec![iovec; count].into_boxed_slice(),
            names: vec![Name::EMPTY; count].into_boxed_slice(),
            controls: vec![Control::EMPTY; count].into_boxed_slice(),
        }
    }

    /// How many slots there are.
    pub fn count(&self) -> usize {
        self.headers.len()
    }

    /// Receives at most `most` datagrams, without waiting, into the slots from `first` on.
    ///
    /// # Errors
    /// As recvmmsg(2): WouldBlock when there is none, an ICMP error that was pending on the socket.
    pub fn receive(&mut self, socket: BorrowedFd<'_>, first: usize, most: usize) -> io::Result<usize> {
        let most = most.min(self.count() - first);
        let memory = self.memory.as_mut_ptr();
        for index in first..first + most {
            self.iovecs[index] =
                libc::iovec { iov_base: memory.wrapping_add(index * Self::STRIDE).cast(), iov_len: Self::SIZE };
            let header = &mut self.headers[index].msg_hdr;
            header.msg_name = (&raw mut self.names[index]).cast();
            header.msg_namelen = Name::SIZE;
            header.msg_iov = &raw mut self.iovecs[index];
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut self.controls[index]).cast();
            header.msg_controllen = Control::SIZE as _;
            header.msg_flags = 0;
        }
        if most == 1 {
            let header = &mut self.headers[first];
            // SAFETY: the header was just pointed at this value's own arrays, each with its length; nothing else touches
            // them during the call.
            let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header.msg_hdr, libc::MSG_DONTWAIT) };
            header.msg_len = u32::try_from(length).map_err(|_| io::Error::last_os_error())?;
            return Ok(1);
        }
        // SAFETY: the headers from `first` on, `most` of them, were just pointed at this value's own arrays, each with
        // its length; nothing else touches them during the call.
        let received = check(unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers[first..].as_mut_ptr(),
                most as libc::c_uint,
                libc::MSG_DONTWAIT,
                ptr::null_mut(),
            )
        })?;
        Ok(usize::try_from(received).unwrap_or(0))
    }

    /// The whole of a slot.
    pub fn slot(&mut self, index: usize) -> &mut [u8] {
        &mut self.memory[index * Self::STRIDE..][..Self::SIZE]
    }

    /// The first `length` bytes of a slot.
    pub fn bytes(&self, index: usize, length: usize) -> &[u8] {
        &self.memory[index * Self::STRIDE..][..length]
    }

    /// Length of the datagram received into a slot.
    pub fn length(&self, index: usize) -> usize {
        (self.headers[index].msg_len as usize).min(Self::SIZE)
    }

    /// Source of the datagram received into a slot.
    pub fn source(&self, index: usize) -> Option<SocketAddr> {
        self.names[index].address()
    }

    /// What control messages told about the datagram received into a slot.
    pub fn ancillary(&self, index: usize) -> Ancillary {
        let mut ancillary = Ancillary::default();
        let length = self.headers[index].msg_hdr.msg_controllen;
        control_messages(&self.controls[index], length, |level, kind, data| match (level, kind) {
            // struct in_pktinfo: interface, local address, destination in the header. The second differs from the
            // third for a broadcast only, and is the one to answer from.
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                if let Some(octets) = data.get(4..8).and_then(|octets| <[u8; 4]>::try_from(octets).ok()) {
                    ancillary.local = Some(IpAddr::from(octets));
                }
            }
            // struct in6_pktinfo: address, interface.
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                if let Some(octets) = data.get(..16).and_then(|octets| <[u8; 16]>::try_from(octets).ok()) {
                    ancillary.local = Some(IpAddr::from(octets));
                }
            }
            (libc::IPPROTO_IP, libc::IP_TOS) => ancillary.tos = data.first().copied().unwrap_or(0),
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => ancillary.tos = int(data).unwrap_or(0) as u8,
            (libc::SOL_UDP, libc::UDP_GRO) => {
                ancillary.segment = int(data).and_then(|size| usize::try_from(size).ok()).filter(|size| *size > 0);
            }
            _ => {}
        });
        ancillary
    }
}

impl ReceiveSlots {
    /// Address and port that the datagram in a slot was sent to, where
    /// [`receive_destination`](super::socket::receive_destination) was asked for.
    pub fn destination(&self, index: usize) -> Option<SocketAddr> {
        let mut destination = None;
        let length = self.headers[index].msg_hdr.msg_controllen;
        control_messages(&self.controls[index], length, |level, kind, data| match (level, kind) {
            // struct sockaddr_in: family, port, address.
            (libc::IPPROTO_IP, libc::IP_ORIGDSTADDR) => {
                if let Some(&[_, _, p0, p1, a, b, c, d]) = data.first_chunk() {
                    destination = Some(SocketAddr::from(([a, b, c, d], u16::from_be_bytes([p0, p1]))));
                }
            }
            // struct sockaddr_in6: family, port, flow, address, scope.
            (libc::IPPROTO_IPV6, libc::IPV6_ORIGDSTADDR) => {
                let ip = data.get(8..24).and_then(|octets| <[u8; 16]>::try_from(octets).ok());
                if let (Some(&[_, _, p0, p1]), Some(ip)) = (data.first_chunk(), ip) {
                    destination = Some(SocketAddr::from((ip, u16::from_be_bytes([p0, p1]))));
                }
            }
            _ => {}
        });
        destination
    }
}

fn int(data: &[u8]) -> Option<i32> {
    Some(i32::from_ne_bytes(*data.first_chunk()?))
}

/// What the kernel tells of a received datagram beside its source.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Ancillary {
    /// Address it came to, where [`receive_local_address`](super::socket::receive_local_address) was asked for.
    pub local: Option<IpAddr>,
    /// Its DSCP/ECN octet.
    pub tos: u8,
    /// It is several datagrams of one flow, each of this length but the last, which may be shorter. Only where
    /// [`receive_coalesced`](super::socket::receive_coalesced) was asked for.
    pub segment: Option<usize>,
}

/// Something to send to one destination: a datagram, or several.
#[derive(Clone, Copy, Debug)]
pub struct Message<P> {
    /// Destination; none by a socket that is connected.
    pub to: Option<SocketAddr>,
    /// Source address, where the socket is bound to none.
    pub from: Option<IpAddr>,
    /// DSCP/ECN octet; 0 leaves the socket's, and so does any without a destination.
    pub tos: u8,
    /// The kernel is to cut it into datagrams of this length, the last of which may be shorter: at most
    /// [`SEGMENTS`] of them.
    pub segment: Option<u16>,
    /// The bytes, in order. At most [`SendBatch::PARTS`].
    pub parts: P,
}

/// Most datagrams of one message that is cut (UDP_MAX_SEGMENTS of Linux before 6.9), and most bytes of all of them (the
/// longest datagram of IPv4).
pub const SEGMENTS: usize = 64;
/// See [`SEGMENTS`].
pub const SEGMENTED_BYTES: usize = 65_507;

/// Room for one batch of messages to send.
pub struct SendBatch {
    headers: Box<[libc::mmsghdr]>,
    iovecs: Box<[libc::iovec]>,
    names: Box<[Name]>,
    controls: Box<[Control]>,
}

impl SendBatch {
    /// Messages of one system call.
    pub const CAPACITY: usize = 64;
    /// Most parts of one message: three of each of its datagrams.
    pub const PARTS: usize = 3 * SEGMENTS;
    /// Parts of one system call.
    const IOVECS: usize = 1024;

    /// An empty batch.
    pub fn new() -> Self {
        // SAFETY: mmsghdr and iovec of zeros are valid: null pointers with zero lengths.
        let (header, iovec) = unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        Self {
            headers: vec![header; Self::CAPACITY].into_boxed_slice(),
            iovecs: vec![iovec; Self::IOVECS].into_boxed_slice(),
            names: vec![Name::EMPTY; Self::CAPACITY].into_boxed_slice(),
            controls: vec![Control::EMPTY; Self::CAPACITY].into_boxed_slice(),
        }
    }

    /// Sends, without waiting, as many messages as there is room for, at most [`SendBatch::CAPACITY`]; says how many the
    /// kernel took. Empty parts cost nothing.
    ///
    /// # Errors
    /// As sendmmsg(2), for the first message: then none was taken.
    pub fn send<'a, P: IntoIterator<Item = &'a [u8]>>(
        &mut self,
        socket: BorrowedFd<'_>,
        messages: impl Iterator<Item = Message<P>>,
    ) -> io::Result<usize> {
        let (mut count, mut used) = (0, 0);
        for (index, message) in messages.take(Self::CAPACITY).enumerate() {
            let Message { to, from, tos, segment, parts } = message;
            let first = used;
            let room = &mut self.iovecs[first..first + Self::PARTS];
            // Not by a loop: chains of chains go on by themselves at a fraction of the cost.
            parts.into_iter().for_each(|part| {
                if let Some(iovec) = room.get_mut(used - first).filter(|_| !part.is_empty()) {
                    *iovec = libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() };
                    used += 1;
                }
            });
            let header = &mut self.headers[index].msg_hdr;
            (header.msg_name, header.msg_namelen) = match to {
                Some(to) => ((&raw mut self.names[index]).cast(), self.names[index].set(to)),
                None => (ptr::null_mut(), 0),
            };
            header.msg_iov = self.iovecs[first..].as_mut_ptr();
            header.msg_iovlen = (used - first) as _;
            let length = write_control(&mut self.controls[index], to, from, tos, segment);
            header.msg_control = if length == 0 { ptr::null_mut() } else { (&raw mut self.controls[index]).cast() };
            header.msg_controllen = length as _;
            count = index + 1;
            if used + Self::PARTS > Self::IOVECS {
                break;
            }
        }
        if count == 0 {
            return Ok(0);
        }
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        if count == 1 {
            let header = &self.headers[0].msg_hdr;
            // SAFETY: the header was just pointed at this value's own arrays and at the parts, which `'a` keeps alive
            // beyond the call; the kernel only reads them. The same goes for the one part of it.
            let sent = unsafe {
                match self.iovecs[0] {
                    part if used == 1 && header.msg_controllen == 0 => libc::sendto(
                        socket.as_raw_fd(),
                        part.iov_base,
                        part.iov_len,
                        flags,
                        header.msg_name.cast(),
                        header.msg_namelen,
                    ),
                    _ => libc::sendmsg(socket.as_raw_fd(), header, flags),
                }
            };
            return if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(1) };
        }
        // SAFETY: the first `count` headers were just pointed at this value's own arrays and at the parts, which `'a`
        // keeps alive beyond the call; the kernel reads them and writes only msg_len.
        let sent = check(unsafe {
            libc::sendmmsg(socket.as_raw_fd(), self.headers.as_mut_ptr(), count as libc::c_uint, flags)
        })?;
        Ok(usize::try_from(sent).unwrap_or(0))
    }
}

impl Default for SendBatch {
    fn default() -> Self {
        Self::new()
    }
}

fn write_control(
    control: &mut Control,
    to: Option<SocketAddr>,
    from: Option<IpAddr>,
    tos: u8,
    segment: Option<u16>,
) -> usize {
    let mut writer = ControlWriter { control, length: 0 };
    match from {
        Some(IpAddr::V4(ip)) => writer.push(
            libc::IPPROTO_IP,
            libc::IP_PKTINFO,
            libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: v4_to_raw(ip), ipi_addr: libc::in_addr { s_addr: 0 } },
        ),
        Some(IpAddr::V6(ip)) => writer.push(
            libc::IPPROTO_IPV6,
            libc::IPV6_PKTINFO,
            libc::in6_pktinfo { ipi6_addr: v6_to_raw(ip), ipi6_ifindex: 0 },
        ),
        None => {}
    }
    if tos != 0 {
        let class = libc::c_int::from(tos);
        match to {
            Some(SocketAddr::V4(_)) => writer.push(libc::IPPROTO_IP, libc::IP_TOS, class),
            Some(SocketAddr::V6(_)) => writer.push(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, class),
            None => {}
        }
    }
    if let Some(size) = segment {
        writer.push(libc::SOL_UDP, libc::UDP_SEGMENT, size);
    }
    writer.length
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    use super::*;
    use crate::sys::socket::{receive_coalesced, receive_local_address};

    /// A socket on every address of a family that tells local address and DSCP/ECN.
    fn receiver(any: &str) -> io::Result<UdpSocket> {
        let socket = UdpSocket::bind(any)?;
        let v6 = socket.local_addr()?.is_ipv6();
        receive_local_address(socket.as_fd(), v6)?;
        let options = socket2::SockRef::from(&socket);
        if v6 {
            options.set_recv_tclass_v6(true)?;
        } else {
            options.set_recv_tos_v4(true)?;
        }
        Ok(socket)
    }

    #[test]
    fn a_batch_arrives_gathered_with_its_addresses_and_dscp() -> io::Result<()> {
        for (any, loopback, source) in [("0.0.0.0:0", "127.0.0.3", "127.0.0.9"), ("[::]:0", "::1", "::1")] {
            let (receiver, sender) = (receiver(any)?, UdpSocket::bind(any)?);
            let to = SocketAddr::new(loopback.parse().expect("literal"), receiver.local_addr()?.port());
            let from: IpAddr = source.parse().expect("literal");
            let long = vec![7; 9000];
            let message =
                |tos, parts: [&'static [u8]; 3]| Message { to: Some(to), from: Some(from), tos, segment: None, parts };
            let datagrams = [
                message(0xb9, [b"he", b"llo", b"\0"]),
                message(0, [b"", b"", b""]),
                Message { parts: [b"", &long, b"!"], ..message(0, [b""; 3]) },
            ];
            assert_eq!(SendBatch::new().send(sender.as_fd(), datagrams.into_iter())?, 3);

            let mut slots = ReceiveSlots::new(8);
            assert_eq!(slots.receive(receiver.as_fd(), 2, 6)?, 3);
            assert_eq!(slots.bytes(2, slots.length(2)), b"hello\0");
            assert_eq!(slots.length(3), 0);
            assert_eq!((slots.length(4), slots.bytes(4, 9001)[9000]), (9001, b'!'));
            for (index, tos) in [(2, 0xb9), (3, 0), (4, 0)] {
                assert_eq!(slots.ancillary(index), Ancillary { local: Some(to.ip()), tos, segment: None });
                assert_eq!(slots.source(index), Some(SocketAddr::new(from, sender.local_addr()?.port())));
            }
            assert_eq!(slots.receive(receiver.as_fd(), 0, 8).expect_err("empty").kind(), io::ErrorKind::WouldBlock);
        }
        Ok(())
    }

    #[test]
    fn more_than_a_batch_is_left_to_the_caller() -> io::Result<()> {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        let to = socket.local_addr()?;
        let mut batch = SendBatch::new();
        let mut send = |parts, length: usize, segment, count| {
            let bytes = vec![7; length];
            let parts = std::iter::repeat_n(bytes.as_slice(), parts);
            let message = Message { to: Some(to), from: None, tos: 0, segment, parts };
            batch.send(socket.as_fd(), std::iter::repeat_n(message, count))
        };
        assert_eq!(send(1, 1, None, 100)?, SendBatch::CAPACITY);
        assert_eq!(send(SendBatch::PARTS, 20, Some(60), 9)?, 5, "more have no room");
        assert_eq!(send(3, 1, None, 100)?, SendBatch::CAPACITY);
        assert_eq!(send(1, 1, None, 0)?, 0);
        Ok(())
    }

    #[test]
    fn what_is_cut_on_its_way_arrives_coalesced_or_apart() -> io::Result<()> {
        for any in ["127.0.0.1:0", "[::1]:0"] {
            let (receiver, sender) = (receiver(any)?, UdpSocket::bind(any)?);
            let bytes: Vec<u8> = (0..2500u32).map(|value| (value % 251) as u8).collect();
            // Parts and segments have nothing to do with one another.
            let parts: Vec<&[u8]> = bytes.chunks(333).collect();
            let to = receiver.local_addr()?;
            let message = Message { to: Some(to), from: None, tos: 0xb8, segment: Some(1200), parts };
            let mut slots = ReceiveSlots::new(8);
            assert_eq!(SendBatch::new().send(sender.as_fd(), std::iter::once(message.clone()))?, 1);
            assert_eq!(slots.receive(receiver.as_fd(), 0, 8)?, 3);
            let apart: Vec<u8> = (0..3).flat_map(|index| slots.bytes(index, slots.length(index)).to_vec()).collect();
            assert_eq!((slots.length(0), slots.length(2), apart == bytes), (1200, 100, true), "{any}");
            assert_eq!(slots.ancillary(0), Ancillary { tos: 0xb8, segment: None, ..slots.ancillary(0) });

            receive_coalesced(receiver.as_fd())?;
            assert_eq!(SendBatch::new().send(sender.as_fd(), std::iter::once(message))?, 1);
            assert_eq!(slots.receive(receiver.as_fd(), 0, 8)?, 1, "{any}");
            assert_eq!(slots.bytes(0, slots.length(0)), bytes);
            assert_eq!(slots.ancillary(0), Ancillary { tos: 0xb8, segment: Some(1200), ..slots.ancillary(0) });
        }
        Ok(())
    }

    #[test]
    fn control_messages_cut_short_are_not_read() {
        let mut control = Control::EMPTY;
        let ip = [127, 0, 0, 1];
        let length = write_control(&mut control, Some((ip, 1).into()), Some(ip.into()), 1, Some(1200));
        for cut in 0..=length {
            let mut seen = 0;
            control_messages(&control, cut, |_, _, _| seen += 1);
            assert!(seen < 3 || cut + CONTROL_ALIGN > length, "{cut} of {length}");
        }
    }
}
