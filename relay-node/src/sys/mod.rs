//! The only unsafe code: what neither the standard library nor socket2 offers.
//!
//! | module | what it wraps |
//! |---|---|
//! | [`message`] | recvmmsg and sendmmsg with local address and DSCP/ECN |
//! | [`socket`] | socket options, the reuseport program, the error queue |
//! | [`epoll`] | readiness and wake-ups |
//! | [`process`] | descriptor limit, CPU time of a thread |
#![allow(unsafe_code)]

pub mod epoll;
pub mod message;
pub mod process;
pub mod socket;

use std::io;

/// The result of a system call that answers -1 for an error.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}
