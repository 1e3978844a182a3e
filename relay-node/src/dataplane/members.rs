//! Other members of the cluster, as the packet path sees them: whose an address is, and how it is reached now.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;

use rustc_hash::FxHashMap;
use smallvec::SmallVec;
use turn_core::{MemberId, Route};

use crate::backbone::{Usabilities, Usability};

/// The relayed addresses of another member.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MemberRoute {
    /// Its number.
    pub id: MemberId,
    /// Its relay IPs, advertised.
    pub relay_ips: Vec<IpAddr>,
    /// Its relayed ports, inclusive; its others are nobody's peer (abuse.md A).
    pub relay_ports: RangeInclusive<u16>,
    /// It has no public relayed ports: plain UDP leads nowhere.
    pub cluster_only: bool,
}

/// Who has which address. Replaced whole; read per packet by every worker.
#[derive(Clone, Default)]
pub(super) struct MemberRoutes {
    /// Members behind one IP have ranges of ports of their own.
    pub(super) by_ip: FxHashMap<IpAddr, SmallVec<[MemberRoute; 1]>>,
    /// None without a backbone.
    pub(super) usabilities: Option<Usabilities>,
}

impl MemberRoutes {
    pub(super) fn new(members: &[MemberRoute], usabilities: Option<Usabilities>) -> Self {
        let mut by_ip: FxHashMap<IpAddr, SmallVec<[MemberRoute; 1]>> = FxHashMap::default();
        for member in members {
            for ip in &member.relay_ips {
                by_ip.entry(*ip).or_default().push(member.clone());
            }
        }
        Self { by_ip, usabilities }
    }

    /// The way to an address, if its IP is a member's.
    pub(super) fn route(&self, to: SocketAddr) -> Option<Route> {
        let members = self.by_ip.get(&to.ip())?;
        let Some(member) = members.iter().find(|member| member.relay_ports.contains(&to.port())) else {
            return Some(Route::Nobody);
        };
        let plain_udp = match &self.usabilities {
            Some(usabilities) => usabilities.of(member.id) == Usability::PlainUdp,
            None => true,
        };
        Some(if plain_udp && !member.cluster_only { Route::Internet } else { Route::Member(member.id) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: u16, ip: &str, relay_ports: RangeInclusive<u16>, cluster_only: bool) -> MemberRoute {
        let relay_ips = vec![ip.parse().expect("literal"), "2001:db8::1".parse().expect("literal")];
        MemberRoute { id: MemberId(id), relay_ips, relay_ports, cluster_only }
    }

    #[test]
    fn relayed_ports_of_members_are_theirs_and_their_other_ports_nobody_s() {
        let members = [
            member(1, "198.51.100.1", 50_000..=50_999, false),
            member(2, "198.51.100.1", 51_000..=51_999, true),
            member(3, "198.51.100.3", 49_152..=65_535, true),
        ];
        let routes = MemberRoutes::new(&members, None);
        let cases = [
            // Without a backbone: by plain UDP, where there are public ports.
            ("198.51.100.1:50000", Some(Route::Internet)),
            ("198.51.100.1:50999", Some(Route::Internet)),
            ("198.51.100.1:51000", Some(Route::Member(MemberId(2)))),
            ("198.51.100.3:65535", Some(Route::Member(MemberId(3)))),
            ("[2001:db8::1]:50500", Some(Route::Internet)),
            ("198.51.100.1:52000", Some(Route::Nobody)),
            ("198.51.100.1:3478", Some(Route::Nobody)),
            ("198.51.100.3:22", Some(Route::Nobody)),
            ("198.51.100.2:50000", None),
        ];
        for (to, expected) in cases {
            assert_eq!(routes.route(to.parse().expect("literal")), expected, "{to}");
        }
    }
}
