//! Permissions (RFC 8656 §9) and CreatePermission (RFC 8656 §10).

use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::auth::User;
use super::reply::Request;
use super::{Server, Verdict};
use crate::wire::ErrorCode;
use crate::{Family, Policy};

/// RFC 8656 §9: the Permission Lifetime.
pub(super) const PERMISSION_LIFETIME: Duration = Duration::from_secs(300);

/// The permissions of an allocation: few, looked up for each packet, so a sorted list.
#[derive(Debug, Default)]
pub(super) struct Permissions(Vec<(IpAddr, Instant)>);

impl Permissions {
    /// Whether a peer at this IP may be talked to (RFC 8656 §9: ports are not looked at).
    pub(super) fn allow(&self, ip: IpAddr, now: Instant) -> bool {
        self.find(ip).is_ok_and(|index| self.0[index].1 > now)
    }

    /// Installs or refreshes.
    pub(super) fn install(&mut self, ip: IpAddr, deadline: Instant) {
        match self.find(ip) {
            Ok(index) => self.0[index].1 = deadline,
            Err(index) => self.0.insert(index, (ip, deadline)),
        }
    }

    /// Forgets what has ended.
    pub(super) fn purge(&mut self, now: Instant) {
        self.0.retain(|(_, deadline)| *deadline > now);
    }

    /// Forgets what a policy forbids; whether there was any.
    pub(super) fn enforce(&mut self, policy: &Policy) -> bool {
        let before = self.0.len();
        self.0.retain(|(ip, _)| policy.check_ip(*ip).is_ok());
        self.0.len() != before
    }

    /// Forgets a family, whose relayed address has gone (RFC 8656 §8.1).
    pub(super) fn forget(&mut self, family: Family) {
        self.0.retain(|(ip, _)| Family::of(*ip) != family);
    }

    /// How many there would be with these IPs too, each of which is named once.
    pub(super) fn len_with(&self, ips: &[IpAddr]) -> usize {
        self.0.len() + ips.iter().filter(|ip| self.find(**ip).is_err()).count()
    }

    /// (IP, end), those included that have ended since the last purge.
    pub(super) fn iter(&self) -> impl Iterator<Item = (IpAddr, Instant)> + '_ {
        self.0.iter().copied()
    }

    fn find(&self, ip: IpAddr) -> Result<usize, usize> {
        self.0.binary_search_by(|(known, _)| known.cmp(&ip))
    }
}

impl Server {
    /// RFC 8656 §10.2: all peers or none.
    pub(super) fn create_permission(&mut self, request: &Request<'_>, user: &User<'_>) -> Result<Verdict, ErrorCode> {
        let slot = self.held(request, user)?;
        let allocation = self.table.get(slot);
        let mut ips = Vec::new();
        for peer in request.message.peer_addresses() {
            // As written, not canonical: an IPv4-mapped address is of no IPv4 allocation's family and in no policy.
            ips.push(peer.map_err(|_| ErrorCode::BAD_REQUEST)?.0.ip());
        }
        if ips.is_empty() {
            return Err(ErrorCode::BAD_REQUEST);
        }
        if ips.iter().any(|ip| allocation.relays().of(Family::of(*ip)).is_none()) {
            return Err(ErrorCode::PEER_ADDRESS_FAMILY_MISMATCH);
        }
        ips.sort_unstable();
        ips.dedup();
        if ips.iter().any(|ip| self.settings.policy.check_ip(*ip).is_err()) {
            return Err(ErrorCode::FORBIDDEN);
        }
        let limit = self.settings.limits.permissions_per_allocation;
        let permissions = &mut self.table.get_mut(slot).permissions;
        permissions.purge(request.now.mono);
        if permissions.len_with(&ips) > limit {
            return Err(ErrorCode::INSUFFICIENT_CAPACITY);
        }
        for ip in ips {
            permissions.install(ip, request.now.mono + PERMISSION_LIFETIME);
        }
        self.heard_from(request.now, slot, &request.from);
        self.record(slot, request.now);
        Ok(self.success(request, user, |_| {}))
    }
}

#[cfg(test)]
mod tests {
    use super::super::lab::{Lab, addr, ip};
    use crate::wire::Method;
    use crate::wire::attribute::{Software, XorPeerAddress};
    use crate::{Change, DropReason, Limits, Output};

    /// CreatePermission for these peers; its code, 0 for success.
    fn create(lab: &mut Lab, peers: &[&str]) -> u16 {
        lab.request(Method::CreatePermission, |writer| {
            for peer in peers {
                writer.attribute(&XorPeerAddress(addr(peer)));
            }
        })
        .code()
    }

    #[test]
    fn what_is_refused() {
        // RFC 8656 §10.2.
        let cases: &[(&str, &[&str], u16)] = &[
            ("no peer", &[], 400),
            ("a peer", &["192.0.2.1:0"], 0),
            ("two peers", &["192.0.2.1:9", "192.0.2.2:9"], 0),
            ("the same twice", &["192.0.2.1:9", "192.0.2.1:8"], 0),
            ("IPv6 on an IPv4 allocation", &["[2001:db8::1]:9"], 443),
            ("one of the other family", &["192.0.2.1:9", "[2001:db8::1]:9"], 443),
            ("IPv4-mapped", &["[::ffff:192.0.2.1]:9"], 443),
            ("private", &["10.1.2.3:9"], 403),
            ("one of them forbidden", &["192.0.2.3:9", "169.254.169.254:80"], 403),
        ];
        for (what, peers, expected) in cases {
            let mut lab = Lab::allocated();
            assert_eq!(create(&mut lab, peers), *expected, "{what}");
            let changes = lab.changes();
            if *expected == 0 {
                assert_eq!(changes.len(), 1, "{what}");
            } else {
                // All or nothing (abuse.md A).
                assert!(changes.is_empty(), "{what}");
                assert_eq!(lab.peer_packet("192.0.2.3:9", b"x").dropped(), Some(DropReason::NoPermission));
            }
        }
    }

    #[test]
    fn ipv6_allocations_take_ipv6_peers() {
        let cases: &[(&str, &str, u16)] = &[
            ("IPv6", "[2001:db8::1]:9", 0),
            ("IPv4", "192.0.2.1:9", 443),
            ("IPv4-mapped", "[::ffff:192.0.2.1]:9", 403),
            ("NAT64", "[64:ff9b::c000:201]:9", 403),
            ("link-local", "[fe80::1]:9", 403),
        ];
        for (what, peer, expected) in cases {
            let mut lab = Lab::allocated_v6();
            assert_eq!(create(&mut lab, &[peer]), *expected, "{what}");
        }
    }

    #[test]
    fn malformed_peers_are_400() {
        // abuse.md B: an empty XOR-PEER-ADDRESS; RFC 8656 §10.2: if any of them is invalid.
        let mut lab = Lab::allocated();
        let reply = lab.request(Method::CreatePermission, |writer| {
            writer.attribute(&XorPeerAddress(addr("192.0.2.1:9")));
            writer.raw(0x0012, &[]);
        });
        assert_eq!(reply.code(), 400);
    }

    #[test]
    fn lasts_300_seconds_and_is_refreshed() {
        // RFC 8656 §9.
        let mut lab = Lab::allocated();
        assert_eq!(create(&mut lab, &["192.0.2.1:0"]), 0);
        lab.pass(299);
        assert_eq!(lab.peer_packet("192.0.2.1:9", b"x").dropped(), None);
        assert_eq!(create(&mut lab, &["192.0.2.1:0"]), 0);
        lab.pass(299);
        assert_eq!(lab.peer_packet("192.0.2.1:10", b"x").dropped(), None);
        lab.pass(1);
        assert_eq!(lab.peer_packet("192.0.2.1:9", b"x").dropped(), Some(DropReason::NoPermission));
    }

    #[test]
    fn the_limit_is_508_and_counts_what_lives() {
        let limits = Limits { permissions_per_allocation: 2, ..Limits::default() };
        let mut lab = Lab::allocated();
        lab.configure(|settings| settings.limits = limits);
        assert_eq!(create(&mut lab, &["192.0.2.1:0", "192.0.2.2:0", "192.0.2.3:0"]), 508);
        assert_eq!(create(&mut lab, &["192.0.2.1:0", "192.0.2.2:0"]), 0);
        assert_eq!(create(&mut lab, &["192.0.2.2:0"]), 0);
        assert_eq!(create(&mut lab, &["192.0.2.3:0"]), 508);
        lab.pass(300);
        assert_eq!(create(&mut lab, &["192.0.2.3:0"]), 0);
    }

    #[test]
    fn a_new_policy_ends_permissions_at_once() {
        let mut lab = Lab::allocated();
        assert_eq!(create(&mut lab, &["192.0.2.1:0", "192.0.2.2:0"]), 0);
        assert_eq!(lab.bind(0x4000, "192.0.2.1:9"), 0);
        lab.changes();
        lab.configure(|settings| {
            settings.policy.denied.push(crate::policy::Network { address: ip("192.0.2.1"), prefix: 32 });
        });
        let changes = lab.changes();
        let [Change::Put(record)] = &changes[..] else { panic!("{changes:?}") };
        assert_eq!(record.permissions.len(), 1);
        assert!(record.channels.is_empty());
        assert_eq!(lab.peer_packet("192.0.2.1:9", b"x").dropped(), Some(DropReason::NoPermission));
        assert_eq!(lab.channel_data(0x4000, b"x").dropped(), Some(DropReason::NoChannel));
        assert_eq!(lab.peer_packet("192.0.2.2:9", b"x").dropped(), None);
    }

    #[test]
    fn members_are_allowed_in_private_ranges() {
        let mut lab = Lab::allocated();
        lab.configure(|settings| settings.policy.members.push(ip("10.0.0.6")));
        assert_eq!(create(&mut lab, &["10.0.0.6:0"]), 0);
        assert_eq!(create(&mut lab, &["10.0.0.7:0"]), 403);
    }

    #[test]
    fn known_but_unexpected_attributes_are_ignored() {
        // RFC 8489 §6.3.
        let mut lab = Lab::allocated();
        let reply = lab.request(Method::CreatePermission, |writer| {
            writer.attribute(&Software(b"client"));
            writer.attribute(&XorPeerAddress(addr("192.0.2.1:9")));
            writer.raw(0x000D, &[0, 0, 0, 0]);
        });
        assert_eq!(reply.code(), 0);
        assert!(!lab.outputs().iter().any(|output| matches!(output, Output::Release { .. })));
        assert_eq!(lab.server.allocations(), 1);
    }
}
