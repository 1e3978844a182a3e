//! Socket options, and the queue of ICMP errors.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::check;
use super::message::{Control, Name, control_messages};

/// asm-generic/socket.h; not in libc for glibc.
const SO_ATTACH_REUSEPORT_CBPF: libc::c_int = 51;
/// asm-generic/socket.h; not in libc for glibc.
const SO_RCVBUFFORCE: libc::c_int = 33;

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
    // SAFETY: sock_fprog is what this option takes; `filter` outlives the call, which copies it.
    unsafe { set_option(socket, libc::SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, program) }
}

/// Asks for a receive buffer of `bytes`: beyond net.core.rmem_max with CAP_NET_ADMIN, else up to it.
///
/// # Errors
/// As setsockopt(2).
pub fn set_receive_buffer(socket: BorrowedFd<'_>, bytes: libc::c_int) -> io::Result<()> {
    // SAFETY: both options take an int.
    unsafe {
        set_option(socket, libc::SOL_SOCKET, SO_RCVBUFFORCE, bytes)
            .or_else(|_| set_option(socket, libc::SOL_SOCKET, libc::SO_RCVBUF, bytes))
    }
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

/// An error that the network reported for a datagram sent before.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct IcmpError {
    /// Where the datagram had been sent.
    pub destination: SocketAddr,
    /// ICMP or ICMPv6 type.
    pub kind: u8,
    /// ICMP or ICMPv6 code.
    pub code: u8,
}

/// Takes one entry off the error queue. `Ok(None)` is an entry that did not come by ICMP (as for a datagram the kernel
/// itself found too long).
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
        // struct sock_extended_err: errno 4 bytes, origin, type, code, padding.
        if let (true, [_, _, _, _, origin, kind, code, ..]) = (ours, data)
            && matches!(*origin, libc::SO_EE_ORIGIN_ICMP | libc::SO_EE_ORIGIN_ICMP6)
        {
            error = Some(IcmpError { destination, kind: *kind, code: *code });
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
    use std::os::fd::AsFd;

    use super::*;

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
