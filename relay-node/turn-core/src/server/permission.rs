//! Permissions (RFC 8656 §9) and CreatePermission (RFC 8656 §10).

use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::auth::User;
use super::relays::Relays;
use super::reply::Request;
use super::table::{Allocation, Slot};
use super::{Output, Server, Verdict};
use crate::Family;
use crate::wire::ErrorCode;

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

    /// Forgets some, which are handed out.
    fn take(&mut self, gone: impl Fn(IpAddr, Instant) -> bool) -> impl Iterator<Item = IpAddr> {
        self.0.extract_if(.., move |(ip, deadline)| gone(*ip, *deadline)).map(|(ip, _)| ip)
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
    /// Installs or refreshes a permission, and says so to whoever filters.
    pub(super) fn permit(&mut self, slot: Slot, peer: IpAddr, until: Instant) {
        let allocation = self.table.get_mut(slot);
        allocation.permissions.install(peer, until);
        if let Some(relay) = allocation.relays().of(Family::of(peer)) {
            self.outputs.push_back(Output::Permit { relayed: relay.address, peer, until });
        }
    }

    /// Forgets the permissions that have ended.
    pub(super) fn purge_permissions(&mut self, slot: Slot, now: Instant) {
        let allocation = self.table.get_mut(slot);
        let relays = allocation.relays().clone();
        self.outputs.extend(forbid(relays, allocation.permissions.take(|_, deadline| deadline <= now)));
    }

    /// Forgets the permissions that the policy forbids; whether there was any.
    pub(super) fn enforce_on_permissions(&mut self, slot: Slot) -> bool {
        let allocation = self.table.get_mut(slot);
        let (relays, policy, before) = (allocation.relays().clone(), &self.settings.policy, self.outputs.len());
        self.outputs.extend(forbid(relays, allocation.permissions.take(|ip, _| policy.check_ip(ip).is_err())));
        self.outputs.len() != before
    }

    /// Forgets the permissions of a family, whose relayed address is about to go (RFC 8656 §8.1).
    pub(super) fn forget_permissions(&mut self, slot: Slot, family: Family) {
        let allocation = self.table.get_mut(slot);
        let relays = allocation.relays().clone();
        self.outputs.extend(forbid(relays, allocation.permissions.take(|ip, _| Family::of(ip) == family)));
    }

    /// The permissions of an allocation that is gone go with it.
    pub(super) fn take_back_permissions(&mut self, allocation: &Allocation) {
        self.outputs.extend(forbid(allocation.relays().clone(), allocation.permissions.iter().map(|(ip, _)| ip)));
    }

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
        self.purge_permissions(slot, request.now.mono);
        if self.table.get(slot).permissions.len_with(&ips) > limit {
            return Err(ErrorCode::INSUFFICIENT_CAPACITY);
        }
        for ip in ips {
            self.permit(slot, ip, request.now.mono + PERMISSION_LIFETIME);
        }
        self.heard_from(request.now, slot, &request.from);
        self.record(slot, request.now);
        Ok(self.success(request, user, |_| {}))
    }
}

fn forbid(relays: Relays, gone: impl Iterator<Item = IpAddr>) -> impl Iterator<Item = Output> {
    gone.filter_map(move |peer| {
        let relay = relays.of(Family::of(peer))?;
        Some(Output::Forbid { relayed: relay.address, peer })
    })
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
    fn whoever_filters_is_told() {
        // What is said from here on, without the records.
        let said = |lab: &mut Lab| -> Vec<(bool, String)> {
            let outputs = lab.all_outputs();
            let told = |output| match output {
                Output::Permit { relayed, peer, until } => {
                    assert_eq!((relayed, until), (lab.relayed(), lab.now.mono + super::PERMISSION_LIFETIME));
                    Some((true, peer.to_string()))
                }
                Output::Forbid { relayed, peer } => {
                    assert_eq!(relayed, lab.relayed());
                    Some((false, peer.to_string()))
                }
                _ => None,
            };
            outputs.into_iter().filter_map(told).collect()
        };
        let mut lab = Lab::allocated();
        assert_eq!(create(&mut lab, &["192.0.2.1:0", "192.0.2.2:0"]), 0);
        assert_eq!(said(&mut lab), [(true, "192.0.2.1".into()), (true, "192.0.2.2".into())]);
        lab.pass(200);
        assert_eq!(lab.bind(0x4000, "192.0.2.1:9"), 0);
        assert_eq!(said(&mut lab), [(true, "192.0.2.1".into())], "refreshed");
        lab.pass(100);
        assert_eq!(create(&mut lab, &["192.0.2.3:0"]), 0);
        assert_eq!(said(&mut lab), [(false, "192.0.2.2".into()), (true, "192.0.2.3".into())], "what has ended goes");
        lab.configure(|settings| {
            settings.policy.denied.push(crate::policy::Network { address: ip("192.0.2.1"), prefix: 32 });
        });
        assert_eq!(said(&mut lab), [(false, "192.0.2.1".into())], "a new policy");
        let record = lab.server.records(lab.now).next().expect("one");
        assert_eq!(lab.refresh(0), 0);
        assert_eq!(said(&mut lab), [(false, "192.0.2.3".into())], "with the allocation");
        let mut lab = Lab::new();
        lab.restore(record);
        let until = lab.now.mono + super::PERMISSION_LIFETIME;
        let outputs = lab.all_outputs();
        assert!(
            matches!(&outputs[..], [Output::Permit { peer, until: told, .. }] if *peer == ip("192.0.2.3") && *told <= until),
            "restored: {outputs:?}"
        );
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
        assert!(!lab.all_outputs().iter().any(|output| matches!(output, Output::Release { .. })));
        assert_eq!(lab.server.allocations(), 1);
    }
}
