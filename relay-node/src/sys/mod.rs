//! The only unsafe code: what neither the standard library nor socket2 offers.
//!
//! | module | what it wraps |
//! |---|---|
//! | [`message`] | recvmmsg and sendmmsg with local address and DSCP/ECN, coalesced where they are of one flow |
//! | [`socket`] | socket options, the reuseport program, the error queue |
//! | [`link`] | interfaces, whole frames on them, addresses that are not here yet |
//! | [`steering`] | the BPF program that brings relayed ports to one socket |
//! | `bpf` | bpf(2) |
//! | [`raw`] | datagrams with headers of our own, and ICMP about them |
//! | [`rows`] | a mapped file of counters |
//! | [`epoll`] | readiness and wake-ups |
//! | [`process`] | descriptor limit, CPU time of a thread |
//! | [`heap`] | how memory goes back to the system |
#![allow(unsafe_code)]

mod bpf;
pub mod epoll;
pub mod heap;
pub mod link;
pub mod message;
pub mod process;
pub mod raw;
pub mod rows;
pub mod socket;
pub mod steering;

use std::io;

/// The result of a system call that answers -1 for an error.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}
