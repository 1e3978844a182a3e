//! Datagrams from relayed addresses that have no socket: IP and UDP headers are written here, and many leave by one
//! system call (raw(7), IPPROTO_RAW). And what the network says about them: ICMP, which no socket is told of then.

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use socket2::{Domain, Protocol, Socket, Type};

use super::check;
use super::link::set_freebind;
use super::message::{Name, SendBatch};
use super::socket::{Fragmentation, IcmpError, set_buffers, set_fragmentation, set_icmp_filter};

/// Send buffer asked for: every allocation of a worker shares it.
const SEND_BUFFER: libc::c_int = 4 << 20;
const HEADER_V4: usize = 20;
const HEADER_V6: usize = 40;
const HEADER_UDP: usize = 8;
/// The longest of them.
const HEADERS: usize = HEADER_V6 + HEADER_UDP;
/// RFC 8200 §5: what every link carries. A longer datagram of IPv6 may need a path MTU, which a raw socket does not
/// look at.
const LEAST_MTU: usize = 1280;

/// A datagram to send, gathered from three parts.
#[derive(Clone, Copy, Debug)]
pub struct RawDatagram<'a> {
    /// Source, of the family of the destination.
    pub from: SocketAddr,
    /// Destination.
    pub to: SocketAddr,
    /// DSCP/ECN octet.
    pub tos: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// DF; of no meaning to IPv6, where a raw datagram is never fragmented.
    pub dont_fragment: bool,
    /// The bytes, in order.
    pub parts: [&'a [u8]; 3],
}

impl RawDatagram<'_> {
    /// Whether a raw socket can be asked to send it.
    pub fn is_short_enough(&self) -> bool {
        self.to.is_ipv4() || HEADER_V6 + HEADER_UDP + self.length() <= LEAST_MTU
    }

    fn length(&self) -> usize {
        self.parts.iter().map(|part| part.len()).sum()
    }

    /// Writes the headers; how many bytes they are. Nothing if the addresses are of two families, or it is too long.
    fn write_headers(&self, headers: &mut [u8; HEADERS]) -> Option<usize> {
        let udp_length = u16::try_from(HEADER_UDP + self.length()).ok()?.to_be_bytes();
        let mut udp = [0; HEADER_UDP];
        udp[..2].copy_from_slice(&self.from.port().to_be_bytes());
        udp[2..4].copy_from_slice(&self.to.port().to_be_bytes());
        udp[4..6].copy_from_slice(&udp_length);
        let ip = match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                headers[..HEADER_V4].fill(0);
                headers[0] = 0x45;
                headers[1] = self.tos;
                // Length, identification and checksum are the kernel's to fill in.
                headers[6] = if self.dont_fragment { 0x40 } else { 0 };
                headers[8] = self.ttl;
                headers[9] = libc::IPPROTO_UDP as u8;
                headers[12..16].copy_from_slice(&from.octets());
                headers[16..20].copy_from_slice(&to.octets());
                HEADER_V4
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                headers[..8].fill(0);
                headers[0] = 0x60 | self.tos >> 4;
                headers[1] = self.tos << 4;
                headers[4..6].copy_from_slice(&udp_length);
                headers[6] = libc::IPPROTO_UDP as u8;
                headers[7] = self.ttl;
                headers[8..24].copy_from_slice(&from.octets());
                headers[24..40].copy_from_slice(&to.octets());
                HEADER_V6
            }
            _ => return None,
        };
        // RFC 768: a pseudo header of both addresses, protocol and length, then the datagram.
        let mut checksum = Checksum::default();
        checksum.add(&headers[if ip == HEADER_V4 { 12..20 } else { 8..40 }]);
        checksum.add(&[0, libc::IPPROTO_UDP as u8]);
        checksum.add(&udp_length);
        checksum.add(&udp);
        self.parts.iter().for_each(|part| checksum.add(part));
        let sum = match checksum.finish() {
            // Zero would say that there is none.
            0 => u16::MAX,
            sum => sum,
        };
        udp[6..].copy_from_slice(&sum.to_ne_bytes());
        headers[ip..ip + HEADER_UDP].copy_from_slice(&udp);
        Some(ip + HEADER_UDP)
    }
}

/// The Internet checksum (RFC 1071) of bytes that come in pieces. It is summed in this machine's byte order, which the
/// sum does not depend on.
#[derive(Default)]
struct Checksum {
    sum: u64,
    /// The next byte is the second one of its word.
    odd: bool,
}

impl Checksum {
    fn add(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<4>();
        let mut sum: u64 = words.iter().map(|word| u64::from(u32::from_ne_bytes(*word))).sum();
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        sum += u64::from(u32::from_ne_bytes(last));
        let folded = fold(sum);
        self.sum += u64::from(if self.odd { folded.swap_bytes() } else { folded });
        self.odd ^= bytes.len() % 2 == 1;
    }

    /// As it stands in a header, in this machine's byte order. Zero if what was summed holds its own, and it is right.
    fn finish(self) -> u16 {
        !fold(self.sum)
    }
}

fn fold(mut sum: u64) -> u16 {
    while sum > u64::from(u16::MAX) {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    sum as u16
}

/// Room for one batch of raw datagrams to send.
pub struct RawBatch {
    messages: Box<[libc::mmsghdr]>,
    iovecs: Box<[[libc::iovec; 4]]>,
    names: Box<[Name]>,
    headers: Box<[[u8; HEADERS]]>,
}

// SAFETY: its pointers lead to itself and to what is being sent, and are read within `send` only, which sets them.
unsafe impl Send for RawBatch {}

impl RawBatch {
    /// An empty batch.
    pub fn new() -> Self {
        // SAFETY: mmsghdr and iovec of zeros are valid: null pointers with zero lengths.
        let (message, iovec) = unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        Self {
            messages: vec![message; SendBatch::CAPACITY].into_boxed_slice(),
            iovecs: vec![[iovec; 4]; SendBatch::CAPACITY].into_boxed_slice(),
            names: vec![Name::EMPTY; SendBatch::CAPACITY].into_boxed_slice(),
            headers: vec![[0; HEADERS]; SendBatch::CAPACITY].into_boxed_slice(),
        }
    }

    /// Sends, without waiting, at most [`SendBatch::CAPACITY`] datagrams by a socket of [`open_raw`]; says how many the
    /// kernel took.
    ///
    /// # Errors
    /// As sendmmsg(2), for the first datagram: then none was taken. EMSGSIZE for one that the first link does not carry
    /// whole, whether it may be fragmented or not.
    pub fn send<'a>(
        &mut self,
        socket: BorrowedFd<'_>,
        datagrams: impl Iterator<Item = RawDatagram<'a>>,
    ) -> io::Result<usize> {
        let mut count = 0;
        for (index, datagram) in datagrams.take(SendBatch::CAPACITY).enumerate() {
            let Some(length) = datagram.write_headers(&mut self.headers[index]) else {
                break;
            };
            let [header, parts @ ..] = &mut self.iovecs[index];
            *header = libc::iovec { iov_base: self.headers[index].as_mut_ptr().cast(), iov_len: length };
            for (iovec, part) in parts.iter_mut().zip(datagram.parts) {
                *iovec = libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() };
            }
            let message = &mut self.messages[index].msg_hdr;
            // The port would be taken for a protocol.
            message.msg_namelen = self.names[index].set(SocketAddr::new(datagram.to.ip(), 0));
            message.msg_name = (&raw mut self.names[index]).cast();
            message.msg_iov = self.iovecs[index].as_mut_ptr();
            message.msg_iovlen = 4;
            count = index + 1;
        }
        if count == 0 {
            return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
        }
        // SAFETY: the first `count` messages were just pointed at this value's own arrays and at the parts, which `'a`
        // keeps alive beyond the call; the kernel reads them and writes only msg_len.
        let sent = check(unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                self.messages.as_mut_ptr(),
                count as libc::c_uint,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        })?;
        Ok(usize::try_from(sent).unwrap_or(0))
    }
}

impl Default for RawBatch {
    fn default() -> Self {
        Self::new()
    }
}

/// A socket that sends whole IP packets from `ip`, and receives none.
///
/// # Errors
/// As socket(2), setsockopt(2) and bind(2): EPERM without CAP_NET_RAW.
pub fn open_raw(ip: IpAddr) -> io::Result<Socket> {
    let socket = open(ip, libc::IPPROTO_RAW)?;
    if ip.is_ipv4() {
        // No path MTU is believed, as by the sockets of relayed addresses.
        set_fragmentation(socket.as_fd(), false, Fragmentation::Forbidden)?;
    }
    set_buffers(socket.as_fd(), SEND_BUFFER)?;
    Ok(socket)
}

/// A socket that receives the ICMP errors that come to `ip`.
///
/// # Errors
/// As socket(2), setsockopt(2) and bind(2): EPERM without CAP_NET_RAW.
pub fn open_icmp(ip: IpAddr) -> io::Result<Socket> {
    let (protocol, wanted): (_, &[u8]) = match ip {
        // Destination unreachable, time exceeded (RFC 792).
        IpAddr::V4(_) => (libc::IPPROTO_ICMP, &[3, 11]),
        // Destination unreachable, packet too big, time exceeded (RFC 4443).
        IpAddr::V6(_) => (libc::IPPROTO_ICMPV6, &[1, 2, 3]),
    };
    let socket = open(ip, protocol)?;
    set_icmp_filter(socket.as_fd(), ip.is_ipv6(), wanted)?;
    Ok(socket)
}

fn open(ip: IpAddr, protocol: libc::c_int) -> io::Result<Socket> {
    let address = SocketAddr::new(ip, 0);
    let socket = Socket::new(Domain::for_address(address), Type::RAW, Some(Protocol::from(protocol)))?;
    socket.set_nonblocking(true)?;
    set_freebind(socket.as_fd(), ip.is_ipv6())?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Takes an ICMP error from a socket of [`open_icmp`]: who had sent the datagram that it is about, and the rest.
/// `Ok(None)` is one that is about no UDP datagram, or broken.
///
/// # Errors
/// WouldBlock when there is none; else as recv(2).
pub fn receive_raw_icmp(mut socket: &Socket, v6: bool) -> io::Result<Option<(SocketAddr, IcmpError)>> {
    // Longer ones than a packet of Ethernet are not looked at.
    let mut buffer = [0; 1520];
    let length = socket.read(&mut buffer)?;
    let message = buffer.get(..length).filter(|_| length < buffer.len());
    Ok(message.and_then(if v6 { icmp_v6 } else { icmp_v4 }))
}

/// RFC 792; the packet begins with its IP header, and nobody has looked at its checksum.
fn icmp_v4(packet: &[u8]) -> Option<(SocketAddr, IcmpError)> {
    let message = packet.get(usize::from(packet.first()? & 0xF) * 4..)?;
    let mut checksum = Checksum::default();
    checksum.add(message);
    if checksum.finish() != 0 {
        return None;
    }
    let (&[kind, code, _, _, _, _, high, low], quoted) = message.split_first_chunk()?;
    let length = usize::from(quoted.first()? & 0xF) * 4;
    let fragment = u16::from_be_bytes([*quoted.get(6)?, *quoted.get(7)?]) & 0x1FFF;
    if quoted[0] >> 4 != 4 || length < HEADER_V4 || fragment != 0 || *quoted.get(9)? != libc::IPPROTO_UDP as u8 {
        return None;
    }
    let ip = |at: usize| -> Option<IpAddr> { Some(<[u8; 4]>::try_from(quoted.get(at..at + 4)?).ok()?.into()) };
    let (from, to) = ports(quoted.get(length..)?)?;
    let mtu = u16::from_be_bytes([high, low]).into();
    let destination = SocketAddr::new(ip(16)?, to);
    Some((SocketAddr::new(ip(12)?, from), IcmpError { destination, kind, code, mtu }))
}

/// RFC 4443; without the IP header, and the kernel has looked at the checksum.
fn icmp_v6(message: &[u8]) -> Option<(SocketAddr, IcmpError)> {
    /// RFC 8200 §4.5.
    const FRAGMENT: u8 = 44;
    let (&[kind, code, _, _, m0, m1, m2, m3], quoted) = message.split_first_chunk()?;
    let (header, rest) = quoted.split_first_chunk::<HEADER_V6>()?;
    let (next, datagram) = match header[6] {
        FRAGMENT => {
            let (&[next, _, high, low, ..], rest) = rest.split_first_chunk::<8>()?;
            (Some(next).filter(|_| u16::from_be_bytes([high, low]) >> 3 == 0)?, rest)
        }
        next => (next, rest),
    };
    if header[0] >> 4 != 6 || next != libc::IPPROTO_UDP as u8 {
        return None;
    }
    let ip = |at: usize| -> Option<IpAddr> { Some(<[u8; 16]>::try_from(header.get(at..at + 16)?).ok()?.into()) };
    let (from, to) = ports(datagram)?;
    let destination = SocketAddr::new(ip(24)?, to);
    let mtu = u32::from_be_bytes([m0, m1, m2, m3]);
    Some((SocketAddr::new(ip(8)?, from), IcmpError { destination, kind, code, mtu }))
}

fn ports(datagram: &[u8]) -> Option<(u16, u16)> {
    let (&[f0, f1, t0, t1], _) = datagram.split_first_chunk()?;
    Some((u16::from_be_bytes([f0, f1]), u16::from_be_bytes([t0, t1])))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    /// Beyond any scheduling on a loaded machine.
    const PATIENCE: std::time::Duration = std::time::Duration::from_secs(20);

    fn local(ip: &str) -> UdpSocket {
        let socket = UdpSocket::bind((ip, 0)).expect("loopback");
        socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
        socket
    }

    fn datagram<'a>(from: SocketAddr, to: SocketAddr, parts: [&'a [u8]; 3]) -> RawDatagram<'a> {
        RawDatagram { from, to, tos: 0xB8, ttl: 64, dont_fragment: false, parts }
    }

    #[test]
    fn checksums_do_not_depend_on_where_the_pieces_end() {
        let bytes: Vec<u8> = (0..1500u32).map(|number| ((number * 7919) >> 3) as u8).collect();
        let sum = |pieces: &[&[u8]]| {
            let mut checksum = Checksum::default();
            pieces.iter().for_each(|piece| checksum.add(piece));
            checksum.finish().to_be_bytes()
        };
        // RFC 1071 §3, by the book.
        let mut expected: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_ne_bytes([pair[0], pair[1]]))).sum();
        while expected > 0xFFFF {
            expected = (expected & 0xFFFF) + (expected >> 16);
        }
        let expected = (!(expected as u16)).to_be_bytes();
        for (one, two) in [(0, 0), (1, 2), (3, 8), (4, 1499), (5, 6), (333, 900), (1500, 1500)] {
            assert_eq!(sum(&[&bytes[..one], &bytes[one..two], &bytes[two..]]), expected, "cut at {one} and {two}");
        }
    }

    #[test]
    fn a_batch_arrives_whole_from_where_it_says() -> io::Result<()> {
        for (relay_ip, peer_ip) in [("127.8.2.1", "127.0.0.1"), ("::1", "::1")] {
            let (one, two) = (local(peer_ip), local(peer_ip));
            let ip: IpAddr = relay_ip.parse().expect("literal");
            let (raw, mut batch) = (open_raw(ip)?, RawBatch::new());
            let bytes: Vec<u8> = (0..1200u32).map(|number| number as u8).collect();
            let mut sent = Vec::new();
            for (port, length) in [(5000, 0), (5001, 1), (5000, 2), (65_535, 3), (1, 172), (5000, 1199)] {
                for to in [one.local_addr()?, two.local_addr()?] {
                    // An odd head puts the payload on odd bytes of the checksum.
                    sent.push(datagram(SocketAddr::new(ip, port), to, [&[9; 5], &bytes[..length], &[0; 1]]));
                }
            }
            assert_eq!(batch.send(raw.as_fd(), sent.iter().copied())?, sent.len());
            let mut buffer = [0; 2048];
            for datagram in &sent {
                let receiver = if datagram.to == one.local_addr()? { &one } else { &two };
                // The kernel has looked at the checksum.
                let (length, from) = receiver.recv_from(&mut buffer)?;
                assert_eq!((from, &buffer[..length]), (datagram.from, &datagram.parts.concat()[..]));
            }
        }
        Ok(())
    }

    #[test]
    fn what_needs_fragments_is_refused_or_not_tried() -> io::Result<()> {
        let long = vec![0; 65_500];
        let (from, to) = ("127.8.2.2:5000".parse().expect("literal"), "127.0.0.1:9".parse().expect("literal"));
        let datagram = datagram(from, to, [&long, &[0; 200], &[]]);
        assert!(datagram.is_short_enough());
        let refused = RawBatch::new().send(open_raw(from.ip())?.as_fd(), std::iter::once(datagram));
        assert_eq!(refused.expect_err("too long").raw_os_error(), Some(libc::EMSGSIZE));
        let (from, to) = ("[::1]:5000".parse().expect("literal"), "[::1]:9".parse().expect("literal"));
        for (length, expected) in [(1232, true), (1233, false)] {
            let datagram = RawDatagram { from, to, parts: [&long[..length], &[], &[]], ..datagram };
            assert_eq!(datagram.is_short_enough(), expected);
        }
        Ok(())
    }

    #[test]
    fn a_closed_port_is_told_with_both_ends() -> io::Result<()> {
        for relay_ip in ["127.8.2.3", "::1"] {
            let ip: IpAddr = relay_ip.parse().expect("literal");
            let (raw, icmp) = (open_raw(ip)?, open_icmp(ip)?);
            let closed = local(relay_ip).local_addr()?;
            let from = SocketAddr::new(ip, 5003);
            RawBatch::new().send(raw.as_fd(), std::iter::once(datagram(from, closed, [b"x", b"", b""])))?;
            icmp.set_nonblocking(false)?;
            icmp.set_read_timeout(Some(PATIENCE))?;
            // At ::1 those of others come too.
            let (told, error) = loop {
                match receive_raw_icmp(&icmp, ip.is_ipv6())? {
                    Some((told, error)) if told == from => break (told, error),
                    _ => {}
                }
            };
            assert_eq!((told, error.destination), (from, closed));
            assert_eq!((error.kind, error.code), if ip.is_ipv6() { (1, 4) } else { (3, 3) });
        }
        Ok(())
    }

    #[test]
    fn broken_icmp_is_nothing() {
        // Fragmentation needed, MTU 1400, about a datagram from 192.0.2.1:5000 to 198.51.100.9:7000.
        let mut quoted = vec![0x45, 0, 0, 48, 0, 0, 0x40, 0, 64, 17, 0, 0, 192, 0, 2, 1, 198, 51, 100, 9];
        quoted.extend([0x13, 0x88, 0x1B, 0x58, 0, 28, 0, 0]);
        let packet = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut message = vec![3, 4, 0, 0, 0, 0, 0x05, 0x78];
            let mut quoted = quoted.clone();
            change(&mut quoted);
            message.extend(quoted);
            let mut checksum = Checksum::default();
            checksum.add(&message);
            message[2..4].copy_from_slice(&checksum.finish().to_ne_bytes());
            [vec![0x45; 20], message].concat()
        };
        let whole = packet(&|_| {});
        let destination = "198.51.100.9:7000".parse().expect("literal");
        let expected = IcmpError { destination, kind: 3, code: 4, mtu: 1400 };
        assert_eq!(icmp_v4(&whole), Some(("192.0.2.1:5000".parse().expect("literal"), expected)));
        for cut in 0..whole.len() {
            icmp_v4(&whole[..cut]);
            icmp_v6(&whole[..cut]);
        }
        let mut damaged = whole;
        damaged[27] ^= 1;
        assert_eq!(icmp_v4(&damaged), None, "checksum");
        assert_eq!(icmp_v4(&packet(&|quoted| quoted[9] = 6)), None, "about TCP");
        assert_eq!(icmp_v4(&packet(&|quoted| quoted[7] = 1)), None, "a later fragment has no ports");
        assert_eq!(icmp_v4(&packet(&|quoted| quoted[0] = 0x44)), None, "no header");
        assert_eq!(icmp_v4(&packet(&|quoted| quoted.truncate(22))), None, "no ports");
    }
}
