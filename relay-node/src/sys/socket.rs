//! Socket options, and the queue of ICMP errors.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use super::check;
use super::message::{Control, Name, control_messages};

/// asm-generic/socket.h; not in libc for glibc.
const SO_ATTACH_REUSEPORT_CBPF: libc::c_int = 51;
/// asm-generic/socket.h; not in libc for glibc.
const SO_SNDBUFFORCE: libc::c_int = 32;
/// asm-generic/socket.h; not in libc for glibc.
const SO_RCVBUFFORCE: libc::c_int = 33;
/// linux/icmp.h; not in libc.
const ICMP_FILTER: libc::c_int = 1;
/// linux/icmpv6.h; not in libc.
const ICMPV6_FILTER: libc::c_int = 1;

/// One instruction of a classic BPF program (linux/filter.h).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Instruction {
    /// Operation.
    pub code: u16,
    /// Instructions to skip if a jump's condition holds.
    pub jump_true: u8,
    /// Instructions to skip if it does not.
    pub jump_false: u8,
    /// Operand.
    pub operand: u32,
}

/// Lets `program` choose among the sockets of a SO_REUSEPORT group: its result is the index of a socket, in the order
/// in which they were bound. A result beyond the last leaves the choice to the kernel's own hash.
///
/// # Errors
/// As setsockopt(2): EINVAL for a program that the kernel refuses, or without SO_REUSEPORT.
pub fn attach_reuseport_program(socket: BorrowedFd<'_>, program: &[Instruction]) -> io::Result<()> {
    // SAFETY: sock_fprog is what this option takes.
    unsafe { attach(socket, SO_ATTACH_REUSEPORT_CBPF, program) }
}

/// Lets a socket receive only what `program` takes (SO_ATTACH_FILTER).
///
/// # Errors
/// As setsockopt(2): EINVAL for a program that the kernel refuses.
pub(super) fn filter(socket: &impl AsFd, program: &[Instruction]) -> io::Result<()> {
    // SAFETY: sock_fprog is what this option takes.
    unsafe { attach(socket.as_fd(), libc::SO_ATTACH_FILTER, program) }
}

/// Hands a classic BPF program to an option.
///
/// # Safety
/// The option must take a sock_fprog.
unsafe fn attach(socket: BorrowedFd<'_>, name: libc::c_int, program: &[Instruction]) -> io::Result<()> {
    let mut filter: Vec<libc::sock_filter> = program
        .iter()
        .map(|instruction| libc::sock_filter {
            code: instruction.code,
            jt: instruction.jump_true,
            jf: instruction.jump_false,
            k: instruction.operand,
        })
        .collect();
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the caller vouches for the option; `filter` outlives the call, which copies it.
    unsafe { set_option(socket, libc::SOL_SOCKET, name, program) }
}

/// Asks for buffers of `bytes` each way: beyond net.core.rmem_max and wmem_max with CAP_NET_ADMIN, else up to them.
///
/// # Errors
/// As setsockopt(2).
pub fn set_buffers(socket: BorrowedFd<'_>, bytes: libc::c_int) -> io::Result<()> {
    for (forced, asked) in [(SO_RCVBUFFORCE, libc::SO_RCVBUF), (SO_SNDBUFFORCE, libc::SO_SNDBUF)] {
        // SAFETY: all four options take an int.
        unsafe {
            set_option(socket, libc::SOL_SOCKET, forced, bytes)
                .or_else(|_| set_option(socket, libc::SOL_SOCKET, asked, bytes))?;
        }
    }
    Ok(())
}

/// Lets a raw socket of ICMP or ICMPv6 receive only these types; those of ICMP are below 32.
///
/// # Errors
/// As setsockopt(2).
pub fn set_icmp_filter(socket: BorrowedFd<'_>, v6: bool, types: &[u8]) -> io::Result<()> {
    // Both filters are sets of what is kept out.
    let mut out = [u32::MAX; 8];
    for kind in types {
        out[usize::from(kind / 32)] &= !(1 << (kind % 32));
    }
    if v6 {
        // SAFETY: icmp6_filter is eight words.
        unsafe { set_option(socket, libc::IPPROTO_ICMPV6, ICMPV6_FILTER, out) }
    } else {
        // SAFETY: icmp_filter is one word.
        unsafe { set_option(socket, libc::SOL_RAW, ICMP_FILTER, out[0]) }
    }
}

/// Asks for address and port that each datagram was sent to (IP_RECVORIGDSTADDR, IPV6_RECVORIGDSTADDR).
///
/// # Errors
/// As setsockopt(2).
pub fn receive_destination(socket: BorrowedFd<'_>, v6: bool) -> io::Result<()> {
    let (level, name) = if v6 {
        (libc::IPPROTO_IPV6, libc::IPV6_RECVORIGDSTADDR)
    } else {
        (libc::IPPROTO_IP, libc::IP_RECVORIGDSTADDR)
    };
    // SAFETY: both options take an int.
    unsafe { set_option::<libc::c_int>(socket, level, name, 1) }
}

/// Asks for the local address of each datagram (IP_PKTINFO, IPV6_RECVPKTINFO).
///
/// # Errors
/// As setsockopt(2).
pub fn receive_local_address(socket: BorrowedFd<'_>, v6: bool) -> io::Result<()> {
    let (level, name) =
        if v6 { (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO) } else { (libc::IPPROTO_IP, libc::IP_PKTINFO) };
    // SAFETY: both options take an int.
    unsafe { set_option::<libc::c_int>(socket, level, name, 1) }
}

/// Lets datagrams of one flow arrive together, as the kernel has coalesced them (UDP_GRO).
///
/// # Errors
/// As setsockopt(2): ENOPROTOOPT before Linux 5.0.
pub fn receive_coalesced(socket: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the option takes an int.
    unsafe { set_option::<libc::c_int>(socket, libc::SOL_UDP, libc::UDP_GRO, 1) }
}

/// Sends without checksums: then the kernel refuses to cut a message, as if no interface could.
///
/// # Errors
/// As setsockopt(2).
#[cfg(test)]
pub(crate) fn send_without_checksums(socket: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the option takes an int.
    unsafe { set_option::<libc::c_int>(socket, libc::SOL_SOCKET, libc::SO_NO_CHECK, 1) }
}

/// Asks for ICMP errors, to be read with [`receive_icmp`] (IP_RECVERR, IPV6_RECVERR).
///
/// # Errors
/// As setsockopt(2).
pub fn receive_errors(socket: BorrowedFd<'_>, v6: bool) -> io::Result<()> {
    let (level, name) =
        if v6 { (libc::IPPROTO_IPV6, libc::IPV6_RECVERR) } else { (libc::IPPROTO_IP, libc::IP_RECVERR) };
    // SAFETY: both options take an int.
    unsafe { set_option::<libc::c_int>(socket, level, name, 1) }
}

/// What becomes of a datagram that is longer than a hop takes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fragmentation {
    /// It is fragmented: DF is 0.
    Allowed,
    /// It is lost, and the loss is told: DF is 1.
    Forbidden,
}

/// Sets DF of the datagrams sent from now on (IP_MTU_DISCOVER, IPV6_MTU_DISCOVER). Neither way does a socket of IPv4
/// believe ICMP about the path: whoever forges it would cut everybody's datagrams. That of IPv6 has to, because no
/// router fragments for it.
///
/// # Errors
/// As setsockopt(2).
pub fn set_fragmentation(socket: BorrowedFd<'_>, v6: bool, fragmentation: Fragmentation) -> io::Result<()> {
    let (level, name, value) = match (v6, fragmentation) {
        // Unlike DONT, OMIT lets ICMP "fragmentation needed" reach the error queue.
        (false, Fragmentation::Allowed) => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_OMIT),
        (false, Fragmentation::Forbidden) => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE),
        (true, Fragmentation::Allowed) => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_WANT),
        (true, Fragmentation::Forbidden) => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE),
    };
    // SAFETY: both options take an int.
    unsafe { set_option::<libc::c_int>(socket, level, name, value) }
}

/// An error that the network reported for a datagram sent before.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct IcmpError {
    /// Where the datagram had been sent.
    pub destination: SocketAddr,
    /// ICMP or ICMPv6 type.
    pub kind: u8,
    /// ICMP or ICMPv6 code.
    pub code: u8,
    /// MTU of the next hop, where type and code carry one; of no meaning with others.
    pub mtu: u32,
}

/// Takes one entry off the error queue. A datagram that the kernel itself found too long for its first hop, because it
/// may not be fragmented, is an entry as a router would have sent it; IPv4 tells no port then. `Ok(None)` is any other
/// entry that did not come by ICMP.
///
/// # Errors
/// WouldBlock when the queue is empty; else as recvmsg(2).
pub fn receive_icmp(socket: BorrowedFd<'_>) -> io::Result<Option<IcmpError>> {
    let (mut name, mut control) = (Name::EMPTY, Control::EMPTY);
    // SAFETY: a msghdr of zeros is valid: null pointers with zero lengths.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_name = (&raw mut name).cast();
    header.msg_namelen = Name::SIZE;
    header.msg_control = (&raw mut control).cast();
    header.msg_controllen = Control::SIZE as _;
    // SAFETY: `header` points at `name` and `control`, of the lengths it says, both alive and writable; no payload is asked for.
    let result = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let Some(destination) = name.address() else {
        return Ok(None);
    };
    let mut error = None;
    control_messages(&control, header.msg_controllen as _, |level, kind, data| {
        let ours =
            matches!((level, kind), (libc::IPPROTO_IP, libc::IP_RECVERR) | (libc::IPPROTO_IPV6, libc::IPV6_RECVERR));
        // struct sock_extended_err: errno 4 bytes, origin, type, code, padding, info 4 bytes (the MTU).
        if let (true, [e0, e1, e2, e3, origin, kind, code, _, i0, i1, i2, i3, ..]) = (ours, data) {
            let mtu = u32::from_ne_bytes([*i0, *i1, *i2, *i3]);
            let too_long = i32::from_ne_bytes([*e0, *e1, *e2, *e3]) == libc::EMSGSIZE;
            let (kind, code) = match *origin {
                libc::SO_EE_ORIGIN_ICMP | libc::SO_EE_ORIGIN_ICMP6 => (*kind, *code),
                // Fragmentation needed (RFC 792); packet too big (RFC 4443 §3.2).
                libc::SO_EE_ORIGIN_LOCAL if too_long => {
                    if destination.is_ipv4() {
                        (3, 4)
                    } else {
                        (2, 0)
                    }
                }
                _ => return,
            };
            error = Some(IcmpError { destination, kind, code, mtu });
        }
    });
    Ok(error)
}

/// Sets an option whose value is a plain C type.
///
/// # Safety
/// `T` must be the type the kernel reads for this option, and pointers in it must be valid for the call.
unsafe fn set_option<T: Copy>(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: T,
) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of::<T>()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: `value` is alive for the call and `length` bytes long; the caller vouches for its type.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), length) })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn a_datagram_that_must_not_be_fragmented_is_told_to_be_too_long() -> io::Result<()> {
        // Loopback takes 65,536 bytes: one less than IP and UDP headers and the longest payload of IPv4.
        for (local, length, expected) in [("127.0.0.1:0", 65_507, None), ("[::1]:0", 65_527, Some((2, 0, 65_536)))] {
            let socket = UdpSocket::bind(local)?;
            let v6 = socket.local_addr()?.is_ipv6();
            receive_errors(socket.as_fd(), v6)?;
            let peer = UdpSocket::bind(local)?;
            for (fragmentation, expected) in
                [(Fragmentation::Allowed, None), (Fragmentation::Forbidden, expected), (Fragmentation::Allowed, None)]
            {
                set_fragmentation(socket.as_fd(), v6, fragmentation)?;
                let sent = socket.send_to(&vec![0; length], peer.local_addr()?);
                let told = receive_icmp(socket.as_fd()).ok().flatten();
                assert_eq!(
                    told.map(|error| (error.kind, error.code, error.mtu)),
                    expected,
                    "{local} {fragmentation:?}"
                );
                assert_eq!(sent.is_err(), expected.is_some(), "{local} {fragmentation:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn a_closed_port_is_reported_with_the_destination() -> io::Result<()> {
        for local in ["127.0.0.1:0", "[::1]:0"] {
            let socket = UdpSocket::bind(local)?;
            receive_errors(socket.as_fd(), socket.local_addr()?.is_ipv6())?;
            let closed = {
                let gone = UdpSocket::bind(local)?;
                gone.local_addr()?
            };
            assert_eq!(receive_icmp(socket.as_fd()).expect_err("empty").kind(), io::ErrorKind::WouldBlock);
            socket.send_to(b"x", closed)?;
            // Loopback delivers the error within the send.
            let error = receive_icmp(socket.as_fd())?.expect("by ICMP");
            assert_eq!(error.destination, closed);
            // Port unreachable: ICMP 3/3, ICMPv6 1/4.
            assert_eq!((error.kind, error.code), if closed.is_ipv6() { (1, 4) } else { (3, 3) });
        }
        Ok(())
    }
}
