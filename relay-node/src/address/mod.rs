//! The relay addresses on this machine: whether they are here, who else claims them, and moving them.
//!
//! The network address is the fence for packets, as the epoch is the one for records: nothing is answered while the
//! address is not this machine's. An address that this relay manages carries a lifetime of at most [`LIFETIME`] and is renewed
//! each second: a process that dies or stands still loses it without anybody's help, before its lease has ended.
//!
//! | module | what it is |
//! |---|---|
//! | [`frame`] | ARP and neighbour discovery, as bytes (pure) |
//! | `guard` | what a claim of another machine, a cut or a pause leads to (pure) |
//! | [`netlink`] | the kernel's addresses and interfaces |
//! | `wire` | frames on the interface |
//! | `hook` | the program for networks that move addresses by other means |
//! | [`keeper`] | raises, renews, watches, defends, yields, lowers |

pub mod frame;
mod guard;
mod hook;
pub mod keeper;
pub mod netlink;
mod wire;

use std::time::Duration;

pub use self::keeper::Keeper;

/// How long a managed address stays when nobody renews it, at most.
pub const LIFETIME: Duration = Duration::from_secs(4);

/// How long a managed address stays under a lease of this length (zero if it is not known): it is gone before anybody
/// else is given the address, and outlasts a renewal that is late.
fn lifetime(lease: Duration) -> Duration {
    match lease {
        Duration::ZERO => LIFETIME,
        lease => lease.saturating_sub(Duration::from_secs(1)).clamp(Duration::from_secs(2), LIFETIME),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_gone_before_its_lease() {
        for (lease, expected) in [(0, 4), (1, 2), (2, 2), (3, 2), (4, 3), (5, 4), (60, 4)] {
            assert_eq!(lifetime(Duration::from_secs(lease)), Duration::from_secs(expected), "{lease} s");
        }
    }
}
