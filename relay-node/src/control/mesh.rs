//! The other relays, as the controller lists them: numbered, and in the forms that the packet path and the backbone
//! take; and what there is to report of the links to them.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::sync::watch;
use turnpike_proto::v1;

use crate::backbone::{Backbone, LinkPath, LinkReport, Member, MemberList, MemberNumbers, Usability};
use crate::dataplane::MemberRoute;

/// Most links that are reported.
const REPORTED: usize = 256;

/// Everybody else in the cluster.
pub(crate) struct Mesh {
    node_id: String,
    relay_address: IpAddr,
    numbers: MemberNumbers,
    routes: Vec<MemberRoute>,
    list: watch::Sender<Arc<MemberList>>,
    backbone: Option<Arc<Backbone>>,
}

impl Mesh {
    /// As this relay sees it.
    pub(crate) fn new(node_id: &str, relay_address: IpAddr) -> Self {
        Self {
            node_id: node_id.to_owned(),
            relay_address,
            numbers: MemberNumbers::default(),
            routes: Vec::new(),
            list: watch::Sender::default(),
            backbone: None,
        }
    }

    /// Takes a member list over. What cannot be read, or is of this relay or its address, is left out.
    pub(crate) fn adopt(&mut self, message: &v1::Members) {
        let (mut list, mut routes) = (MemberList::default(), Vec::new());
        for member in &message.members {
            // Whoever had the address before is in the list until its lease has ended.
            let own = member.node_id == self.node_id || member.relay_address.parse() == Ok(self.relay_address);
            let ports = (u16::try_from(member.relay_port_low), u16::try_from(member.relay_port_high));
            let (false, (Ok(low), Ok(high))) = (own, ports) else { continue };
            let Some(id) = self.numbers.number(&member.node_id) else { continue };
            let relay_ips: Vec<IpAddr> = member.relay_ips.iter().filter_map(|ip| ip.parse().ok()).collect();
            let addresses = member.backbone_addresses.iter().filter_map(|address| address.parse::<SocketAddr>().ok());
            // A controller of an earlier version does not say which ports are relayed.
            let relay_ports = if high == 0 { 1..=u16::MAX } else { low..=high };
            routes.push(MemberRoute {
                id,
                relay_ips: relay_ips.clone(),
                relay_ports: relay_ports.clone(),
                cluster_only: member.cluster_only,
            });
            list.members.push(Member {
                id,
                node_id: member.node_id.as_str().into(),
                addresses: addresses.collect(),
                relay_ips,
                relay_ports,
            });
        }
        list.revoked_serials = message.revoked.iter().map(|revoked| revoked.serial.clone()).collect();
        list.revoked_serials.retain(|serial| !serial.is_empty());
        self.routes = routes;
        self.list.send_replace(Arc::new(list));
    }

    /// For the packet path.
    pub(crate) fn routes(&self) -> &[MemberRoute] {
        &self.routes
    }

    /// For the backbone.
    pub(crate) fn list(&self) -> watch::Receiver<Arc<MemberList>> {
        self.list.subscribe()
    }

    /// Links are reported from now on.
    pub(crate) fn report_on(&mut self, backbone: Arc<Backbone>) {
        self.backbone = Some(backbone);
    }

    /// This relay's end of every link.
    pub(crate) fn report(&self) -> Vec<v1::LinkReport> {
        let report = self.backbone.as_ref().map(|backbone| backbone.report());
        report.iter().flat_map(|links| links.iter()).take(REPORTED).map(link).collect()
    }
}

fn link(link: &LinkReport) -> v1::LinkReport {
    let via = match &link.path {
        LinkPath::Direct => String::new(),
        LinkPath::Via { node_id } => node_id.to_string(),
    };
    let (path, why) = match link.usability {
        Usability::Link if via.is_empty() => (v1::LinkPath::Direct, link.path_why),
        Usability::Link => (v1::LinkPath::Via, link.path_why),
        Usability::PlainUdp => (v1::LinkPath::PlainUdp, link.why),
        Usability::Nothing => (v1::LinkPath::None, link.why),
    };
    let state = match (link.remote, link.usability, link.why) {
        (None, ..) => v1::LinkState::Down,
        (Some(_), Usability::Link, "") => v1::LinkState::Up,
        (Some(_), ..) => v1::LinkState::Suspect,
    };
    v1::LinkReport {
        node_id: link.node_id.to_string(),
        state: state.into(),
        path: path.into(),
        via: if path == v1::LinkPath::Via { via } else { String::new() },
        why: why.to_owned(),
        rtt_us: link.rtt.map_or(0, |rtt| u32::try_from(rtt.as_micros()).unwrap_or(u32::MAX)),
        loss_permille: link.loss_permille.into(),
        cwnd: link.congestion_window,
        queued_bytes: link.queued_bytes,
        sent_packets: link.counts.sent_packets,
        sent_bytes: link.counts.sent_bytes,
        received_packets: link.counts.received_packets,
        received_bytes: link.counts.received_bytes,
        dropped: link.counts.drops.iter().map(|(_, count)| count).sum(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_else_is_numbered_for_good() {
        let member = |node_id: &str, ip: &str| v1::Member {
            node_id: node_id.to_owned(),
            relay_address: ip.to_owned(),
            relay_ips: vec![ip.to_owned(), "nonsense".to_owned()],
            relay_port_low: 50_000,
            relay_port_high: 50_999,
            backbone_addresses: vec![format!("{ip}:3480"), "nonsense".to_owned()],
            ..v1::Member::default()
        };
        let message = |members: &[v1::Member]| v1::Members { members: members.to_vec(), ..v1::Members::default() };
        let mut mesh = Mesh::new("eu-1", "192.0.2.1".parse().expect("literal"));
        let list = mesh.list();
        let numbers = |mesh: &Mesh| mesh.routes().iter().map(|route| route.id.0).collect::<Vec<_>>();

        let (own, before) = (member("eu-1", "192.0.2.1"), member("eu-0", "192.0.2.1"));
        let others = [member("us-1", "192.0.2.3"), member("us-2", "192.0.2.4")];
        mesh.adopt(&message(&[own, before, others[0].clone(), others[1].clone()]));
        assert_eq!(numbers(&mesh), [0, 1]);
        mesh.adopt(&message(&others[1..]));
        assert_eq!(numbers(&mesh), [1]);
        let mut revoking = message(&others);
        let refused = |serial: &[u8]| v1::RevokedCertificate { node_id: "x".into(), serial: serial.to_vec() };
        revoking.revoked = vec![refused(&[7]), refused(&[])];
        mesh.adopt(&revoking);
        assert_eq!(numbers(&mesh), [0, 1]);

        let list = list.borrow().clone();
        assert_eq!(list.revoked_serials, [[7]]);
        assert_eq!(list.members[0].addresses, ["192.0.2.3:3480".parse().expect("literal")]);
        assert_eq!((list.members[0].relay_ips.len(), &list.members[0].relay_ports), (1, &(50_000..=50_999)));
        assert!(mesh.report().is_empty(), "without a backbone");
    }
}
