//! `turnctl nat`: what the network between here and the cluster does to calls.

use std::net::{SocketAddr, ToSocketAddrs as _};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use turn_core::Transport;
use turnpike_proto::v1::DiscoverRequest;

use super::discover;
use super::netcheck::{self, RegionView};
use crate::conform::wire::Trust;
use crate::connection::ConnectionOptions;
use crate::failure::{Exit, Failure, Result};
use crate::nat::{self, Filtering, Findings, Kind, Mapping, Reach, Server};
use crate::output::{Block, Cell, Output, Tone, View};
use crate::probe::ServerUri;
use crate::units;

/// Say what the network does to calls: kind of NAT, whether UDP, TCP and TLS pass, how far the regions are
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct NatArgs {
    /// Servers to try, stun:HOST[:PORT], turn:HOST[:PORT][?transport=udp|tcp] or turns:... [default: the cluster's]
    #[arg(value_name = "URI", value_parser = server_uri)]
    uris: Vec<ServerUri>,
    /// Certificate of the authority of TLS servers, instead of the system's
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// Take any certificate of TLS servers
    #[arg(long)]
    insecure: bool,
}

const EXAMPLES: &str = "\
Examples:
  turnctl nat
  turnctl nat stun:stun.example.org turns:turn.example.org:443
  turnctl nat stun:192.0.2.7 stun:192.0.2.8 -o json

How a NAT filters is told by a server with a second address (RFC 5780: a relay with
nat_discovery); its mapping also by two servers.
Exit codes: 0 a call from here is possible, 3 nothing passes.";

/// `stun:` is as good as `turn:` here.
fn server_uri(text: &str) -> std::result::Result<ServerUri, String> {
    let (scheme, rest) = text.split_once(':').unwrap_or_default();
    match scheme.to_ascii_lowercase().as_str() {
        "stun" => format!("turn:{rest}").parse(),
        "stuns" => format!("turns:{rest}").parse(),
        _ => text.parse(),
    }
    .map_err(|_| "write stun:HOST[:PORT], turn:HOST[:PORT][?transport=udp|tcp] or turns:HOST[:PORT]".to_owned())
}

pub(crate) async fn run(args: &NatArgs, connection: &ConnectionOptions, output: Output) -> Result {
    let mut regions = Vec::new();
    let mut servers = Vec::new();
    if args.uris.is_empty() {
        (servers, regions) = of_cluster(connection, output).await?;
    }
    for uri in &args.uris {
        servers.push(resolve(uri)?);
    }
    if servers.is_empty() {
        return Err(Failure::new(Exit::Unhealthy, "the cluster names no relay to try").remedy("name a server"));
    }
    let trust = Trust { insecure: args.insecure, ca: args.tls_ca.clone() };
    let examined = tokio::task::spawn_blocking(move || nat::examine(&servers, &trust)).await;
    let findings = examined
        .map_err(|error| Failure::failed(error.to_string()))?
        .map_err(|error| Failure::failed(format!("cannot use the network: {error}")))?;
    let kind = nat::kind(&findings);
    let is_hopeless = kind == Kind::UdpBlocked && !findings.streams.iter().any(|reach| reach.works);
    let view = NatView { kind, headline: kind.headline(), advice: nat::advice(&findings), findings, regions };
    output.show(&view)?;
    if is_hopeless && view.findings.streams.iter().any(Reach::passes) {
        return Err(Failure::new(Exit::Unhealthy, "what gets through to these servers is not trusted")
            .remedy("name the authority of their certificates with --tls-ca"));
    }
    if is_hopeless {
        return Err(Failure::new(Exit::Unhealthy, "nothing passes to these servers")
            .remedy("ask whoever runs this network to let UDP 3478 or TCP 443 out"));
    }
    Ok(())
}

fn resolve(uri: &ServerUri) -> Result<Server> {
    let name = (uri.host.as_str(), uri.port());
    let found = name.to_socket_addrs().map_err(|error| Failure::failed(format!("{}: {error}", uri.host)))?;
    let mut addresses: Vec<SocketAddr> = found.collect();
    // NATs are of IPv4.
    addresses.sort_by_key(SocketAddr::is_ipv6);
    let address = addresses.first().copied();
    let address = address.ok_or_else(|| Failure::failed(format!("{} has no address", uri.host)))?;
    let scheme = match uri.transport {
        Transport::Udp => "stun",
        Transport::Tcp => "tcp",
        Transport::Tls => "tls",
        Transport::Dtls => "dtls",
    };
    let name = format!("{scheme}:{}:{}", uri.host, uri.port());
    Ok(Server { name, host: uri.host.clone(), address, transport: uri.transport })
}

/// The relays that are worth measuring, and for TCP and TLS those that discovery gives.
async fn of_cluster(connection: &ConnectionOptions, output: Output) -> Result<(Vec<Server>, Vec<RegionView>)> {
    let cluster = connection.connect().await?;
    let (_, targets) = netcheck::targets(&cluster, None).await?;
    let mut servers: Vec<Server> = targets
        .iter()
        .filter_map(|target| {
            let address: SocketAddr = target.address.parse().ok()?;
            let name = format!("{} ({address})", target.node_id);
            Some(Server { name, host: address.ip().to_string(), address, transport: Transport::Udp })
        })
        .collect();
    let request = DiscoverRequest { user: b"turnctl-nat".to_vec(), ttl_seconds: 60, ..DiscoverRequest::default() };
    match discover::ask(&cluster, request).await {
        Ok(answer) => {
            let uris = answer.relays.iter().flat_map(|relay| &relay.uris);
            let streams = uris.filter_map(|uri| uri.parse::<ServerUri>().ok());
            for uri in streams.filter(|uri| uri.transport != Transport::Udp) {
                servers.push(resolve(&uri)?);
            }
        }
        // A viewer may not discover.
        Err(failure) => output.note(&format!("TCP and TLS are not tried: {failure}")),
    }
    Ok((servers, netcheck::measure(targets).await))
}

#[derive(Debug, Serialize)]
struct NatView {
    kind: Kind,
    headline: &'static str,
    advice: Vec<String>,
    #[serde(flatten)]
    findings: Findings,
    regions: Vec<RegionView>,
}

fn mapping_words(mapping: Option<Mapping>) -> &'static str {
    match mapping {
        None => "could not be told",
        Some(Mapping::None) => "none: the outside sees this machine's own address",
        Some(Mapping::EndpointIndependent) => "endpoint-independent: one outside port for all destinations",
        Some(Mapping::AddressDependent) => "address-dependent: another outside port for each destination IP",
        Some(Mapping::AddressAndPortDependent) => {
            "address- and port-dependent: another outside port for each destination"
        }
        Some(Mapping::Dependent) => "another outside port for another destination",
    }
}

fn filtering_words(filtering: Option<Filtering>) -> &'static str {
    match filtering {
        None => "could not be told",
        Some(Filtering::EndpointIndependent) => "endpoint-independent: anybody gets in at an open port",
        Some(Filtering::AddressDependent) => "address-dependent: whom this machine wrote to gets in, from any port",
        Some(Filtering::AddressAndPortDependent) => "address- and port-dependent: only answers get in",
    }
}

impl View for NatView {
    fn blocks(&self, _wide: bool, _now_ms: u64) -> Vec<Block> {
        let tone = match self.kind {
            Kind::UdpBlocked => Tone::Bad,
            Kind::Symmetric | Kind::Unknown => Tone::Attention,
            _ => Tone::Good,
        };
        let mut lines = vec![Cell::toned(self.headline, tone)];
        lines.extend(self.advice.iter().map(Cell::from));
        let mut fields = Vec::new();
        match &self.findings.udp {
            Some(udp) => {
                let rtt = units::measured(Duration::from_secs_f64(udp.rtt_ms / 1e3));
                fields.push(("UDP", Cell::from(format!("passes, {rtt} to {}", udp.server))));
                fields.push(("Seen as", Cell::from(format!("{} (here {})", udp.mapped, udp.local))));
                fields.push(("Mapping", Cell::from(mapping_words(udp.mapping))));
                fields.push(("Filtering", Cell::from(filtering_words(udp.filtering))));
                if let Some(hairpin) = udp.hairpin {
                    fields.push(("Hairpin", Cell::from(if hairpin { "yes" } else { "no" })));
                }
            }
            None => fields.push(("UDP", Cell::toned("blocked: no answer from any server", Tone::Bad))),
        }
        let mut blocks = vec![Block::Lines(lines), Block::Fields(fields)];
        if !self.findings.streams.is_empty() {
            let rows = self.findings.streams.iter().map(|reach| {
                let outcome = match (reach.works, &reach.untrusted) {
                    (true, _) => Cell::toned("passes", Tone::Good),
                    (false, Some(_)) => Cell::toned("certificate not trusted", Tone::Bad),
                    (false, None) => Cell::toned("blocked", Tone::Bad),
                };
                let transport = reach.transport.to_uppercase();
                vec![Cell::from(transport), outcome, Cell::from(&reach.server), Cell::from(&reach.problem)]
            });
            blocks.push(Block::Table { head: vec!["TRANSPORT", "RESULT", "SERVER", "PROBLEM"], rows: rows.collect() });
        }
        if !self.regions.is_empty() {
            let rows = self.regions.iter().map(RegionView::row).collect();
            blocks.push(Block::Table { head: vec!["REGION", "ROUND TRIP", "NODE", "ADDRESS"], rows });
        }
        blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_written_as_stun_turn_or_turns() {
        let uri = |text| server_uri(text).map(|uri| (uri.host.clone(), uri.port(), uri.transport));
        assert_eq!(uri("stun:192.0.2.1"), Ok(("192.0.2.1".into(), 3478, Transport::Udp)));
        assert_eq!(uri("stun:h:7"), Ok(("h".into(), 7, Transport::Udp)));
        assert_eq!(uri("turns:h:443"), Ok(("h".into(), 443, Transport::Tls)));
        assert_eq!(uri("turn:h?transport=tcp"), Ok(("h".into(), 3478, Transport::Tcp)));
        assert!(uri("http://h").is_err());
    }
}
