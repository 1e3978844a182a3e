//! Checks what a relay says of itself.

use std::net::{IpAddr, SocketAddr};

use tonic::Status;
use turn_core::Transport;
use turnpike_proto::v1;

use crate::fleet::{NodeListener, NodeRecord, unix_ms};
use crate::identity::is_name;

/// Version of `fleet.proto` this controller speaks.
pub(super) const PROTOCOL: u32 = 2;
/// Protocols understood: N reads N-1, and a relay of the next version talks ours.
const PROTOCOLS: std::ops::RangeInclusive<u32> = PROTOCOL - 1..=PROTOCOL + 1;
/// Most addresses and listeners of a relay.
const MANY: usize = 64;
/// Most addresses of its backbone.
const BACKBONE: usize = 8;
/// Most worker threads.
const WORKERS: u32 = 4096;

/// A relay speaks only for the node its certificate names.
pub(super) fn is_its_own(name: &str, node_id: &str) -> Result<(), Status> {
    if name == node_id {
        return Ok(());
    }
    Err(Status::permission_denied(format!("the certificate is of relay {name}, which does not speak for another node")))
}

/// Reads an IP address, canonical.
pub(super) fn address(field: &str, text: &str) -> Result<IpAddr, Status> {
    let ip: IpAddr = text.parse().map_err(|_| invalid(field, "is no IP address"))?;
    let ip = ip.to_canonical();
    if ip.is_unspecified() || ip.is_multicast() {
        return Err(invalid(field, "is no address of a host"));
    }
    Ok(ip)
}

/// The node record of a Hello from the node `name`; its lease is yet to be granted.
pub(super) fn read(hello: &v1::Hello, name: &str) -> Result<NodeRecord, Status> {
    is_its_own(name, &hello.node_id)?;
    if !PROTOCOLS.contains(&hello.protocol) {
        let spoken = hello.protocol;
        return Err(Status::failed_precondition(format!(
            "the relay speaks protocol {spoken}, this controller {} to {}; upgrade the older one",
            PROTOCOLS.start(),
            PROTOCOLS.end()
        )));
    }
    if !is_name(&hello.region) {
        return Err(invalid("region", "is not a name of at most 63 letters, digits, '.', '_' and '-'"));
    }
    if !hello.zone.is_empty() && !is_name(&hello.zone) {
        return Err(invalid("zone", "is not a name of at most 63 letters, digits, '.', '_' and '-'"));
    }
    if !is_name(&hello.boot_id) {
        return Err(invalid("boot_id", "is not 1 to 63 letters and digits"));
    }
    let relay_address = address("relay_address", &hello.relay_address)?;
    if hello.relay_ips.len() > MANY || hello.listeners.len() > MANY {
        return Err(invalid("relay_ips and listeners", "are more than 64"));
    }
    let relay_ips = hello.relay_ips.iter().map(|ip| address("relay_ips", ip));
    let relay_ips = relay_ips.collect::<Result<Vec<_>, _>>()?;
    if !relay_ips.contains(&relay_address) {
        return Err(invalid("relay_ips", "do not hold the relay address"));
    }
    Ok(NodeRecord {
        node_id: name.to_owned(),
        region: hello.region.clone(),
        zone: hello.zone.clone(),
        version: hello.version.chars().filter(|c| c.is_ascii_graphic()).take(64).collect(),
        relay_address,
        relay_ips,
        listeners: hello.listeners.iter().map(listener).collect::<Result<_, _>>()?,
        public_host: host(&hello.public_host)?,
        relay_ports: ports(hello.relay_port_low, hello.relay_port_high)?,
        workers: hello.workers.min(WORKERS),
        max_allocations: hello.max_allocations,
        boot_id: hello.boot_id.clone(),
        registered_at: unix_ms(),
        lease: 0,
        standby: hello.standby,
        waiting: false,
        backbone: backbone(&hello.backbone_addresses)?,
        cluster_only: hello.cluster_only,
    })
}

/// Where other members send: addresses of hosts, with ports.
fn backbone(written: &[String]) -> Result<Vec<SocketAddr>, Status> {
    if written.len() > BACKBONE {
        return Err(invalid("backbone_addresses", "are more than 8"));
    }
    let read = |text: &String| {
        let address: SocketAddr = text.parse().map_err(|_| invalid("backbone_addresses", "are not IP:port"))?;
        let ip = self::address("backbone_addresses", &address.ip().to_string())?;
        match address.port() {
            0 => Err(invalid("backbone_addresses", "have port 0")),
            port => Ok(SocketAddr::new(ip, port)),
        }
    };
    written.iter().map(read).collect()
}

fn listener(listener: &v1::Listener) -> Result<NodeListener, Status> {
    let transport = match listener.transport() {
        v1::Transport::Udp => Transport::Udp,
        v1::Transport::Tcp => Transport::Tcp,
        v1::Transport::Tls => Transport::Tls,
        v1::Transport::Dtls => Transport::Dtls,
        v1::Transport::Unspecified => return Err(invalid("listeners", "have no transport")),
    };
    let address: Result<SocketAddr, _> = listener.address.parse();
    let address = address.map_err(|_| invalid("listeners", "are not IP:port"))?;
    Ok(NodeListener { transport, address, ip_in_certificate: listener.ip_in_certificate })
}

/// It becomes part of URIs: a host name and nothing else. Empty is none.
fn host(name: &str) -> Result<String, Status> {
    let label = |label: &str| {
        let is_good = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        !label.is_empty() && label.len() <= 63 && label.chars().all(is_good)
    };
    if name.len() > 253 || !(name.is_empty() || name.split('.').all(label)) {
        return Err(invalid("public_host", "is not a host name"));
    }
    Ok(name.to_ascii_lowercase())
}

fn ports(low: u32, high: u32) -> Result<(u16, u16), Status> {
    match (u16::try_from(low), u16::try_from(high)) {
        (Ok(low), Ok(high)) if 0 < low && low <= high => Ok((low, high)),
        _ => Err(invalid("relay_port_low and relay_port_high", "are no range of ports")),
    }
}

fn invalid(field: &str, what: &str) -> Status {
    Status::invalid_argument(format!("Hello: {field} {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_is_checked_field_by_field() {
        type Change = fn(&mut v1::Hello);
        let cases: &[(&str, Change, Option<&str>)] = &[
            ("as it should be", |_| {}, None),
            ("no zone", |hello| hello.zone.clear(), None),
            ("of the version before", |hello| hello.protocol = PROTOCOL - 1, None),
            ("of the next version", |hello| hello.protocol = PROTOCOL + 1, None),
            (
                "of the version after that",
                |hello| hello.protocol = PROTOCOL + 2,
                Some("protocol 4, this controller 1 to 3"),
            ),
            ("of no version", |hello| hello.protocol = 0, Some("protocol 0, this controller 1 to 3")),
            ("for another node", |hello| hello.node_id = "eu-2".to_owned(), Some("does not speak for")),
            ("no region", |hello| hello.region.clear(), Some("region")),
            ("a region that is a path", |hello| hello.region = "eu/../x".to_owned(), Some("region")),
            ("a zone with a newline", |hello| hello.zone = "a\nb".to_owned(), Some("zone")),
            ("no boot id", |hello| hello.boot_id.clear(), Some("boot_id")),
            ("a boot id with a space", |hello| hello.boot_id = "a b".to_owned(), Some("boot_id")),
            ("no relay address", |hello| hello.relay_address.clear(), Some("relay_address")),
            ("every address", |hello| hello.relay_address = "0.0.0.0".to_owned(), Some("relay_address")),
            ("foreign relay IPs", |hello| hello.relay_ips = vec!["192.0.2.9".to_owned()], Some("relay_ips")),
            ("endless relay IPs", |hello| hello.relay_ips = vec!["192.0.2.1".to_owned(); 65], Some("relay_ips")),
            ("a listener without port", |hello| hello.listeners[0].address = "192.0.2.1".to_owned(), Some("listeners")),
            ("a listener without transport", |hello| hello.listeners[0].transport = 0, Some("listeners")),
            ("a host name", |hello| hello.public_host = "eu-1.turn.example.org".to_owned(), None),
            ("a host with a port", |hello| hello.public_host = "example.org:443".to_owned(), Some("public_host")),
            ("a host that ends the URI", |hello| hello.public_host = "a?b".to_owned(), Some("public_host")),
            ("a backbone", |hello| hello.backbone_addresses = vec!["10.0.0.1:3479".to_owned()], None),
            ("a backbone by name", |hello| hello.backbone_addresses = vec!["eu-1:3479".to_owned()], Some("backbone")),
            ("a backbone nowhere", |hello| hello.backbone_addresses = vec!["0.0.0.0:1".to_owned()], Some("backbone")),
            ("a backbone at port 0", |hello| hello.backbone_addresses = vec!["10.0.0.1:0".to_owned()], Some("port 0")),
            (
                "endless backbones",
                |hello| hello.backbone_addresses = vec!["10.0.0.1:3479".to_owned(); 9],
                Some("backbone_addresses are more than 8"),
            ),
            ("port 0", |hello| hello.relay_port_low = 0, Some("relay_port_low")),
            ("ports above 65535", |hello| hello.relay_port_high = 65536, Some("relay_port_high")),
            ("ports backwards", |hello| hello.relay_port_low = 65535, Some("relay_port_low")),
        ];
        for (what, change, refused) in cases {
            let mut hello = v1::Hello {
                node_id: "eu-1".to_owned(),
                version: "0.1.0".to_owned(),
                protocol: PROTOCOL,
                region: "eu".to_owned(),
                zone: "a".to_owned(),
                relay_address: "::ffff:192.0.2.1".to_owned(),
                relay_ips: vec!["192.0.2.1".to_owned(), "2001:db8::1".to_owned()],
                listeners: vec![v1::Listener {
                    transport: 1,
                    address: "192.0.2.1:3478".to_owned(),
                    ..v1::Listener::default()
                }],
                claimed_epoch: 1,
                boot_id: "b00t".to_owned(),
                workers: 2,
                max_allocations: 0,
                relay_port_low: 49152,
                public_host: String::new(),
                relay_port_high: 65534,
                ..v1::Hello::default()
            };
            change(&mut hello);
            match (read(&hello, "eu-1"), refused) {
                (Ok(record), None) => assert_eq!(record.relay_address, IpAddr::from([192, 0, 2, 1]), "{what}"),
                (Err(status), Some(text)) => assert!(status.message().contains(text), "{what}: {status}"),
                (answer, _) => panic!("{what}: {answer:?}"),
            }
        }
    }
}
