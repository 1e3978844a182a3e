//! Interfaces, whole frames on them, and sockets on addresses that are not here yet.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::check;
use super::socket::{Instruction, filter};

/// Index of an interface.
///
/// # Errors
/// There is none of this name.
pub fn index_of(name: &str) -> io::Result<u32> {
    let name = CString::new(name).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: `name` is a string that ends with a zero and outlives the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok(index),
    }
}

/// Lets a socket be bound to an address that this machine does not have (IP_FREEBIND, IPV6_FREEBIND): it is served from
/// the moment the address is here.
///
/// # Errors
/// As setsockopt(2).
pub fn set_freebind(socket: BorrowedFd<'_>, v6: bool) -> io::Result<()> {
    let (level, name) =
        if v6 { (libc::IPPROTO_IPV6, libc::IPV6_FREEBIND) } else { (libc::IPPROTO_IP, libc::IP_FREEBIND) };
    let on: libc::c_int = 1;
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: both options take an int; `on` is alive for the call.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const on).cast(), length) })?;
    Ok(())
}

/// A non-blocking socket for whole Ethernet frames of one interface (packet(7)); only what `program` takes is received.
///
/// # Errors
/// As socket(2), setsockopt(2) and bind(2): EPERM without CAP_NET_RAW.
pub fn open_frames(interface: u32, program: &[Instruction]) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // Of no protocol, so that nothing is received before the filter stands.
    // SAFETY: no pointers are passed.
    let socket = check(unsafe { libc::socket(libc::AF_PACKET, kind, 0) })?;
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    filter(&socket, program)?;
    // SAFETY: a sockaddr_ll of zeros is valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as libc::c_ushort;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = interface.try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: `address` is a sockaddr_ll of the length given, alive for the call.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    use socket2::{Domain, Socket, Type};

    use super::*;

    #[test]
    fn interfaces_have_numbers() {
        assert!(index_of("lo").expect("there is one") > 0);
        assert!(index_of("no-such-link").is_err());
        assert!(index_of("with\0zero").is_err());
    }

    #[test]
    fn an_address_of_tomorrow_can_be_bound() -> io::Result<()> {
        for (domain, address) in [(Domain::IPV4, "192.0.2.77:0"), (Domain::IPV6, "[2001:db8::77]:0")] {
            let address: std::net::SocketAddr = address.parse().expect("literal");
            assert!(UdpSocket::bind(address).is_err());
            let socket = Socket::new(domain, Type::DGRAM, None)?;
            set_freebind(socket.as_fd(), address.is_ipv6())?;
            socket.bind(&address.into())?;
        }
        Ok(())
    }
}
