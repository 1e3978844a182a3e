//! The zone as a pure function: name and type to records, over a snapshot of the fleet.
//!
//! | name | types |
//! |---|---|
//! | `ZONE`, `REGION.ZONE` | A, AAAA, NAPTR (RFC 5928); the apex SOA and NS too |
//! | `_turn._udp`, `_turn._tcp`, `_turns._tcp`, `_turns._udp` before either, `_stun._udp` too | SRV (RFC 8656 §6, RFC 7350) |
//! | `NODE.nodes.ZONE` | A, AAAA: what SRV leads to |

use std::net::IpAddr;

use hickory_server::proto::op::ResponseCode;
use hickory_server::proto::rr::rdata::{A, AAAA, NAPTR, NS, SOA, SRV};
use hickory_server::proto::rr::{Name, RData, Record, RecordType};
use turn_core::Transport;

use super::{DnsSettings, Records};
use crate::fleet::{NodeView, Snapshot};
use crate::steering::Choice;

/// The label under which nodes have names of their own.
const NODES: &str = "nodes";
/// Seconds after which a secondary would ask again; there is none.
const REFRESH: i32 = 3600;

/// A service of the zone: its labels, and which listeners it is about.
const SERVICES: [(&str, &str, Transport); 5] = [
    ("_turn", "_udp", Transport::Udp),
    ("_turn", "_tcp", Transport::Tcp),
    ("_turns", "_tcp", Transport::Tls),
    ("_turns", "_udp", Transport::Dtls),
    ("_stun", "_udp", Transport::Udp),
];

/// What RFC 5928 §3 and RFC 7350 §4.6 call them, in the order to try.
const RELAY_SERVICES: [(&str, usize); 4] =
    [("RELAY:turn.udp", 0), ("RELAY:turn.tcp", 1), ("RELAY:turn.tls", 2), ("RELAY:turn.dtls", 3)];

/// The zone.
pub(super) struct Zone {
    settings: DnsSettings,
}

/// What a name stands for.
enum Meaning<'a> {
    /// The nearest relays, of the whole cluster or as seen from a region.
    Nearest(Option<&'a str>),
    /// A service of them.
    Service(Transport, Option<&'a str>),
    /// A node.
    Node(&'a NodeView),
    /// A name in the middle.
    Nothing,
}

impl Zone {
    pub(super) fn new(settings: DnsSettings) -> Self {
        Self { settings }
    }

    /// Whether a name is in the zone.
    pub(super) fn holds(&self, name: &Name) -> bool {
        self.settings.zone.zone_of(name)
    }

    /// What is answered to a question; `choose` gives the relays for whoever asks, of the cluster or as seen from a region.
    pub(super) fn answer(
        &self,
        snapshot: &Snapshot,
        name: &Name,
        kind: RecordType,
        choose: impl FnOnce(Option<&str>) -> Option<Choice>,
    ) -> (ResponseCode, Records) {
        let Some(meaning) = self.meaning(snapshot, name) else {
            let records = Records { authority: vec![self.soa()], ..Records::default() };
            return (ResponseCode::NXDomain, records);
        };
        let mut records = Records::default();
        let is_apex = *name == self.settings.zone;
        match (meaning, kind) {
            (_, RecordType::SOA) if is_apex => records.answers.push(self.soa()),
            (_, RecordType::NS) if is_apex => {
                let servers = self.settings.name_servers.iter();
                records.answers.extend(servers.map(|server| self.record(name, RData::NS(NS(server.clone())))));
            }
            (Meaning::Nearest(region), RecordType::A | RecordType::AAAA | RecordType::ANY) => {
                let nodes = nodes(snapshot, choose(region));
                records.answers = self.addresses(name, &nodes, kind);
            }
            (Meaning::Nearest(region), RecordType::NAPTR) => {
                let nodes = nodes(snapshot, choose(region));
                records.answers = self.naptr(name, &nodes);
            }
            (Meaning::Service(transport, region), RecordType::SRV | RecordType::ANY) => {
                let nodes = nodes(snapshot, choose(region));
                for (place, node) in nodes.iter().enumerate() {
                    let services = self.srv(name, place, node, transport);
                    if let (false, Some(host)) = (services.is_empty(), self.host(node)) {
                        records.answers.extend(services);
                        for kind in [RecordType::A, RecordType::AAAA] {
                            records.additional.extend(self.addresses(&host, &[*node], kind));
                        }
                    }
                }
            }
            (Meaning::Node(node), RecordType::A | RecordType::AAAA | RecordType::ANY) => {
                records.answers = self.addresses(name, &[node], kind);
            }
            _ => {}
        }
        if records.answers.is_empty() {
            // How long nothing is true (RFC 2308 §3).
            records.authority = vec![self.soa()];
        }
        (ResponseCode::NoError, records)
    }

    fn meaning<'a>(&self, snapshot: &'a Snapshot, name: &Name) -> Option<Meaning<'a>> {
        let below = name.iter().count().checked_sub(self.settings.zone.iter().count())?;
        let labels: Vec<String> =
            name.iter().take(below).map(|label| String::from_utf8_lossy(label).to_ascii_lowercase()).collect();
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        let region = |labels: &[&str]| {
            let wanted = labels.join(".");
            let mut regions = snapshot.nodes.values().map(|node| node.record.region.as_str());
            regions.find(|region| region.eq_ignore_ascii_case(&wanted))
        };
        let within = |labels: &[&str]| if labels.is_empty() { Some(None) } else { region(labels).map(Some) };
        match &labels[..] {
            ["_udp" | "_tcp", rest @ ..] => within(rest).map(|_| Meaning::Nothing),
            [service, protocol @ ("_udp" | "_tcp"), rest @ ..] => {
                let known = SERVICES.iter().find(|(a, b, _)| a == service && b == protocol)?;
                within(rest).map(|region| Meaning::Service(known.2, region))
            }
            [NODES] => Some(Meaning::Nothing),
            [node @ .., NODES] => {
                let wanted = node.join(".");
                let node = snapshot.nodes.values().find(|node| node.record.node_id.eq_ignore_ascii_case(&wanted));
                node.map(Meaning::Node)
            }
            labels => within(labels).map(Meaning::Nearest),
        }
    }

    fn record(&self, name: &Name, data: RData) -> Record {
        Record::from_rdata(name.clone(), self.settings.ttl, data)
    }

    fn soa(&self) -> Record {
        let zone = &self.settings.zone;
        let primary = self.settings.name_servers.first().unwrap_or(zone).clone();
        let mailbox = Name::from_ascii("hostmaster").and_then(|host| host.append_domain(zone));
        let ttl = self.settings.ttl;
        let data = SOA::new(primary, mailbox.unwrap_or_else(|_| zone.clone()), 1, REFRESH, REFRESH, REFRESH, ttl);
        self.record(zone, RData::SOA(data))
    }

    /// Addresses of nodes, best first, each once.
    fn addresses(&self, name: &Name, nodes: &[&NodeView], kind: RecordType) -> Vec<Record> {
        let mut ips: Vec<IpAddr> = Vec::new();
        for listener in nodes.iter().flat_map(|node| &node.record.listeners) {
            let ip = listener.address.ip();
            let is_wanted = match kind {
                RecordType::A => ip.is_ipv4(),
                RecordType::AAAA => ip.is_ipv6(),
                _ => true,
            };
            if is_wanted && !ip.is_unspecified() && !ips.contains(&ip) {
                ips.push(ip);
            }
        }
        let data = |ip| match ip {
            IpAddr::V4(ip) => RData::A(A(ip)),
            IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
        };
        ips.into_iter().map(|ip| self.record(name, data(ip))).collect()
    }

    fn srv(&self, name: &Name, place: usize, node: &NodeView, transport: Transport) -> Vec<Record> {
        let Some(host) = self.host(node) else { return Vec::new() };
        let mut ports: Vec<u16> = node
            .record
            .listeners
            .iter()
            .filter(|listener| listener.transport == transport && !listener.address.ip().is_unspecified())
            .map(|listener| listener.address.port())
            .collect();
        ports.sort_unstable();
        ports.dedup();
        let priority = u16::try_from(place + 1).unwrap_or(u16::MAX).saturating_mul(10);
        let data = |port| RData::SRV(SRV::new(priority, 100, port, host.clone()));
        ports.into_iter().map(|port| self.record(name, data(port))).collect()
    }

    fn naptr(&self, name: &Name, nodes: &[&NodeView]) -> Vec<Record> {
        let mut records = Vec::new();
        for (place, (service, index)) in RELAY_SERVICES.into_iter().enumerate() {
            let (label, protocol, transport) = SERVICES[index];
            let is_there = |node: &&NodeView| node.record.listeners.iter().any(|it| it.transport == transport);
            let target = Name::from_ascii(format!("{label}.{protocol}")).and_then(|labels| labels.append_domain(name));
            if let (true, Ok(target)) = (nodes.iter().any(is_there), target) {
                let preference = u16::try_from(place + 1).unwrap_or(u16::MAX).saturating_mul(10);
                let bytes = |text: &str| text.as_bytes().into();
                let data = NAPTR::new(10, preference, bytes("S"), bytes(service), bytes(""), target);
                records.push(self.record(name, RData::NAPTR(data)));
            }
        }
        records
    }

    /// Its name in the zone.
    fn host(&self, node: &NodeView) -> Option<Name> {
        let under = Name::from_ascii(format!("{}.{NODES}", node.record.node_id)).ok()?;
        under.append_domain(&self.settings.zone).ok()
    }
}

/// The nodes chosen, best first.
fn nodes(snapshot: &Snapshot, choice: Option<Choice>) -> Vec<&NodeView> {
    let relays = choice.map(|choice| choice.relays).unwrap_or_default();
    relays.iter().filter_map(|relay| snapshot.nodes.get(&relay.node_id)).collect()
}
