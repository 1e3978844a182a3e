//! 300 Try Alternate (RFC 8489 §10, §14.15; RFC 8656 §7.2, item 11), by the rules of design.md, "Redirect".

use std::net::{IpAddr, SocketAddr};

use turn_core::{FiveTuple, Transport};

use super::super::stun::{
    self, ADDITIONAL_ADDRESS_FAMILY, ALLOCATE, ALTERNATE_SERVER, REQUESTED_ADDRESS_FAMILY, RESERVATION_TOKEN, Read,
};
use super::methods::word;
use super::{Answer, Model, S, Signature, error};

/// A client that was sent elsewhere is served where it asks again within this time.
const PATIENCE: u64 = 10 * S;
/// From another port of its IP, not at once: the other sockets of one that follows ask then.
const OTHER_PORT: u64 = 500;

/// Where clients are sent.
#[derive(Clone, Debug)]
pub struct Alternate {
    pub transport: Transport,
    pub address: SocketAddr,
    pub relays_ipv6: bool,
}

/// A source that has asked.
#[derive(Clone, Debug)]
pub(super) struct Redirected {
    from: FiveTuple,
    transaction: [u8; 12],
    at: u64,
    /// By a voucher; it is served from then on.
    served: bool,
}

/// Good for as many clients of this host.
#[derive(Clone, Debug)]
pub(super) struct Voucher {
    transport: Transport,
    host: Vec<u8>,
    /// Of the first.
    at: u64,
    count: usize,
}

impl Model {
    /// The 300, if there is to be one.
    pub(super) fn try_alternate(&mut self, from: &FiveTuple, message: &Read) -> Option<Answer> {
        if !self.redirecting || message.method != ALLOCATE || self.by_five_tuple(from).is_some() {
            return None;
        }
        // Before the 401 only, and not away from a port that is held for it here.
        let known = [
            stun::MESSAGE_INTEGRITY,
            stun::MESSAGE_INTEGRITY_SHA256,
            stun::USERNAME,
            stun::USERHASH,
            stun::REALM,
            stun::NONCE,
            stun::ACCESS_TOKEN,
            RESERVATION_TOKEN,
        ];
        if known.iter().any(|kind| message.has(*kind)) {
            return None;
        }
        let asks_for_ipv6 = [REQUESTED_ADDRESS_FAMILY, ADDITIONAL_ADDRESS_FAMILY]
            .into_iter()
            .any(|kind| word(message, kind).ok().flatten().is_some_and(|value| value[0] == 2));
        // §14.15: of the family the request came by.
        let target = self.alternates.iter().find(|alternate| {
            alternate.transport == from.transport
                && alternate.address.is_ipv4() == from.client.is_ipv4()
                && alternate.address != from.server
                && (!asks_for_ipv6 || alternate.relays_ipv6)
        })?;
        let target = target.address;
        let now = self.now;
        self.redirected.retain(|before| now - before.at < PATIENCE);
        self.vouchers.retain(|voucher| now - voucher.at < PATIENCE);
        let host = host(from.client.ip());
        let voucher =
            self.vouchers.iter().position(|voucher| (voucher.transport, &voucher.host) == (from.transport, &host));
        match self.redirected.iter().find(|before| before.from == *from) {
            Some(before) if before.served || before.transaction != message.transaction => return None,
            Some(_) => {}
            None => {
                let usable = voucher.filter(|at| now - self.vouchers[*at].at >= OTHER_PORT);
                let served = usable.is_some();
                self.redirected.push(Redirected { from: *from, transaction: message.transaction, at: now, served });
                if let Some(at) = usable {
                    self.vouchers[at].count -= 1;
                    self.vouchers.retain(|voucher| voucher.count > 0);
                    return None;
                }
                match voucher {
                    Some(at) => self.vouchers[at].count = 15.min(self.vouchers[at].count + 1),
                    None => self.vouchers.push(Voucher { transport: from.transport, host, at: now, count: 1 }),
                }
            }
        }
        let mut answer = error(300, Signature::None, message);
        answer.attributes.push((ALTERNATE_SERVER, Some(stun::address(target))));
        Some(answer)
    }
}

/// An IPv4 address; of IPv6 the /64.
fn host(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets()[..8].to_vec(),
    }
}
