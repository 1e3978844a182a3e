//! From the written form to the checked one, which cannot be wrong.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use turn_core::policy::Network;
use turn_core::{Family, Key, KeyRing, Policy, StaticUser, Transport};

use super::machine::{Machine, ephemeral_overlap};
use super::streams::Streams;
use super::{
    AddressSettings, BackboneSettings, Config, ConfigError, Endpoints, KubernetesSettings, NatDiscovery, Overload,
    backbone, drain,
};
use crate::dataplane::{DataplaneConfig, Listen, RelayIp, RelayedMode, check_wildcard};
use crate::kubernetes::Facts;

/// Worker threads a relay can have.
const MAX_WORKERS: u16 = 64;
/// The longest frame of a stream: a ChannelData header and 65,535 bytes, padded (RFC 8656 §12.5).
const LONGEST_FRAME: u32 = 65_540;

/// The checked form.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name of this relay.
    pub node_id: String,
    /// Region it serves.
    pub region: String,
    /// Zone inside the region; may be empty.
    pub zone: String,
    /// State directory.
    pub state_dir: PathBuf,
    /// Client-facing addresses, at least one.
    pub listen: Vec<Listen>,
    /// TLS, and what stands before it.
    pub streams: Streams,
    /// Relay IPs, IPv4 first, at least one, at most one per family.
    pub relay_ips: Vec<RelayIp>,
    /// Identity of the allocations: the first advertised relay IP.
    pub relay_address: IpAddr,
    /// Where NAT behaviour discovery (RFC 5780) is offered.
    pub nat_discovery: Option<NatDiscovery>,
    /// Ports of relayed addresses.
    pub relay_ports: RangeInclusive<u16>,
    /// How those of UDP are held.
    pub relayed: RelayedMode,
    /// Worker threads, 1..=64.
    pub workers: u16,
    /// Realm until a controller names one.
    pub realm: String,
    /// TURN REST secrets until a controller names some.
    pub rest_secrets: KeyRing,
    /// Users until a controller names some.
    pub static_users: Vec<StaticUser>,
    /// The controllers, or none for a relay of its own.
    pub controllers: Option<Controllers>,
    /// The links to other members; none is a relay without.
    pub backbone: Option<BackboneSettings>,
    /// There are no public relayed ports: peers are those of the cluster.
    pub cluster_only: bool,
    /// Address of health checks and metrics.
    pub http: Option<SocketAddr>,
    /// Allocations on this relay, 0 for no limit.
    pub max_allocations: usize,
    /// Allocations of one user on this relay, 0 for the cluster's number.
    pub user_quota: usize,
    /// Bytes queued per TCP connection.
    pub stream_send_cap: usize,
    /// TCP connections per worker.
    pub max_connections: usize,
    /// What the protocol bounds.
    pub limits: turn_core::Limits,
    /// What the protocol offers.
    pub features: turn_core::Features,
    /// Whose access tokens are taken.
    pub third_party: Option<turn_core::ThirdParty>,
    /// Whether the relay addresses move.
    pub address: AddressSettings,
    /// What the API server of Kubernetes is asked, and what it said before the start.
    pub kubernetes: Option<(KubernetesSettings, Facts)>,
    /// How long a relay that is told to stop goes on with the calls it has.
    pub drain_deadline: Duration,
    /// When new clients are sent elsewhere.
    pub overload: Overload,
    /// The lab switch.
    pub allow_loopback_peers: bool,
    /// Peer networks denied beyond the built-in list and the cluster's.
    pub denied_peers: Vec<Network>,
    /// `tracing` directives.
    pub log: String,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Where traces go.
    pub otlp_endpoint: Option<String>,
}

/// Where the controllers are and how this relay proves who it is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Controllers {
    /// `https://host:port`, at least one.
    pub endpoints: Endpoints,
    /// The cluster's CA, PEM.
    pub ca: PathBuf,
    /// This relay's certificate, PEM.
    pub certificate: PathBuf,
    /// Its key, PEM.
    pub key: PathBuf,
}

/// The three PEM texts of [`Controllers`].
pub(crate) struct Identity {
    pub(crate) ca: Vec<u8>,
    pub(crate) certificate: Vec<u8>,
    pub(crate) key: Vec<u8>,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl Config {
    /// Checks everything that can be checked without touching the machine.
    pub(super) fn check(self, machine: &Machine) -> Result<Settings, ConfigError> {
        name("node_id", &self.node_id, false)?;
        name("region", &self.region, false)?;
        name("zone", &self.zone, true)?;
        if self.state_dir.as_os_str().is_empty() {
            return Err(ConfigError::new("state_dir", "is empty; name a directory this relay may write"));
        }
        let listen = listeners(&self.listen)?;
        let relay_ips = self.relay_ips(&listen, machine)?;
        let nat_discovery = self.nat_discovery.map(|written| written.check(&listen, &relay_ips)).transpose()?;
        let alternates = nat_discovery.as_ref().map_or(&[][..], |discovery| &discovery.listen);
        let relay_ports = relay_ports(self.relay_ports, &[&listen, alternates].concat(), &relay_ips)?;
        if self.workers > MAX_WORKERS {
            let problem = format!("{} is more than {MAX_WORKERS}; 0 is one per core", self.workers);
            return Err(ConfigError::new("workers", problem));
        }
        let cores = u16::try_from(machine.cores).unwrap_or(MAX_WORKERS).clamp(1, MAX_WORKERS);
        let workers = if self.workers == 0 { cores } else { self.workers };
        if self.stream_send_cap < LONGEST_FRAME {
            let problem = format!("{} is less than one frame; at least {LONGEST_FRAME}", self.stream_send_cap);
            return Err(ConfigError::new("stream_send_cap", problem));
        }
        if self.max_connections == 0 {
            let problem = "0 would refuse every TCP client; leave tcp:// out of listen instead";
            return Err(ConfigError::new("max_connections", problem));
        }
        let denied_peers = self
            .denied_peers
            .iter()
            .map(|text| {
                let problem = || format!("{text:?} is not a network; write it as 10.96.0.0/12");
                parse_network(text).ok_or_else(|| ConfigError::new("denied_peers", problem()))
            })
            .collect::<Result<_, _>>()?;
        tracing_subscriber::EnvFilter::try_new(&self.log)
            .map_err(|error| ConfigError::new("log", format!("{:?} is not a filter: {error}", self.log)))?;
        let links = self.backbone.as_ref().map(|written| {
            if self.controllers.is_empty() {
                let problem = "a relay of its own has nobody to link to; add controllers, or leave it out";
                return Err(ConfigError::new("backbone", problem));
            }
            written.check(&[&listen, alternates].concat(), &relay_ips, self.relay_ports)
        });
        let links = links.transpose()?;
        let cluster_only = backbone::cluster_only(&self.peers, links.is_some())?;
        let mut features = turn_core::Features::from(self.features);
        features.tcp_allocations &= !cluster_only;
        let named = self.relay_ip.is_some() || self.relay_ip6.is_some();
        Ok(Settings {
            address: self.address.clone().check(&relay_ips, named, !self.controllers.is_empty())?,
            relay_address: relay_ips[0].advertised,
            relay_ips,
            relay_ports,
            relayed: relayed(&self.relayed)?,
            nat_discovery,
            workers,
            realm: realm(&self.realm)?,
            rest_secrets: secrets(&self.rest_secrets)?,
            static_users: static_users(&self.static_users)?,
            controllers: self.controllers()?,
            http: http(&self.http, &listen)?,
            streams: self.streams(&listen)?,
            listen,
            node_id: self.node_id,
            region: self.region,
            zone: self.zone,
            state_dir: self.state_dir,
            max_allocations: self.max_allocations as usize,
            user_quota: self.user_quota as usize,
            stream_send_cap: self.stream_send_cap as usize,
            max_connections: self.max_connections as usize,
            limits: self.limits.check()?,
            features,
            backbone: links,
            cluster_only,
            third_party: self.third_party.check()?,
            kubernetes: None,
            drain_deadline: drain::deadline(self.drain_deadline)?,
            overload: self.overload.check(self.max_allocations)?,
            allow_loopback_peers: self.allow_loopback_peers,
            denied_peers,
            log: self.log,
            otlp_endpoint: self.otlp_endpoint,
            log_format: match self.log_format.as_str() {
                "text" => LogFormat::Text,
                "json" => LogFormat::Json,
                other => {
                    return Err(ConfigError::new("log_format", format!("{other:?} is neither text nor json")));
                }
            },
        })
    }

    /// Bound and advertised relay IPs, given or found.
    fn relay_ips(&self, listen: &[Listen], machine: &Machine) -> Result<Vec<RelayIp>, ConfigError> {
        let concrete = |family| {
            let mut ips = listen.iter().map(|l| l.bind.ip());
            ips.find(|ip| !ip.is_unspecified() && Family::of(*ip) == family)
        };
        let listens_everywhere = listen.iter().any(|l| l.bind.ip().is_unspecified());
        let v4 = self.relay_ip.map(IpAddr::V4).or_else(|| concrete(Family::V4)).or_else(|| {
            let wanted = listens_everywhere || self.public_ip.is_some();
            wanted.then_some(machine.route_v4.map(IpAddr::V4)).flatten()
        });
        // IPv6 is served where it is asked for, or where there is nothing else.
        let v6_wanted = self.relay_ip6.is_some() || self.public_ip6.is_some() || v4.is_none();
        let v6 = self.relay_ip6.map(IpAddr::V6).or_else(|| {
            let found = concrete(Family::V6).or(machine.route_v6.map(IpAddr::V6));
            v6_wanted.then_some(found).flatten()
        });
        let mut relay_ips = Vec::new();
        let families = [
            ("relay_ip", "public_ip", v4, self.public_ip.map(IpAddr::V4)),
            ("relay_ip6", "public_ip6", v6, self.public_ip6.map(IpAddr::V6)),
        ];
        for (bound_key, public_key, bound, public) in families {
            match (bound, public) {
                (None, None) => {}
                (None, Some(public)) => {
                    let problem = format!("no address found to serve {public} from; set {bound_key} to a local one");
                    return Err(ConfigError::new(bound_key, problem));
                }
                (Some(bound), _) if bound.is_unspecified() || bound.is_multicast() => {
                    let problem = format!("{bound} is not one address; set it to the one that relayed sockets bind");
                    return Err(ConfigError::new(bound_key, problem));
                }
                (_, Some(public)) if public.is_unspecified() || public.is_multicast() => {
                    let problem = format!("{public} is not one address; set it to the one clients and peers reach");
                    return Err(ConfigError::new(public_key, problem));
                }
                (Some(bound), Some(advertised)) => relay_ips.push(RelayIp { bound, advertised }),
                (Some(bound), None) => {
                    let advertised = self.public_from(public_key, bound)?;
                    relay_ips.push(RelayIp { bound, advertised });
                }
            }
        }
        if relay_ips.is_empty() {
            let problem = "no address found: there is no default route; set relay_ip to the one relayed sockets bind";
            return Err(ConfigError::new("relay_ip", problem));
        }
        Ok(relay_ips)
    }

    /// The bound address is advertised where the world can reach it, or where the lab is all the world there is.
    fn public_from(&self, key: &str, bound: IpAddr) -> Result<IpAddr, ConfigError> {
        let world = Policy { allow_loopback: self.allow_loopback_peers, ..Policy::default() };
        if world.check_ip(bound).is_ok() {
            return Ok(bound);
        }
        let (kind, way_out) = if bound.is_loopback() {
            ("loopback", ", or allow_loopback_peers = true for a lab")
        } else {
            ("private", " (behind a one-to-one NAT the outer address, in a private network this one again)")
        };
        let problem =
            format!("the relay address {bound} is {kind}; set {key} to the address clients and peers reach{way_out}");
        Err(ConfigError::new(key, problem))
    }

    fn controllers(&self) -> Result<Option<Controllers>, ConfigError> {
        let tls = &self.tls;
        let files = [("tls.ca", &tls.ca), ("tls.certificate", &tls.certificate), ("tls.key", &tls.key)];
        if self.controllers.is_empty() {
            return Ok(None);
        }
        for endpoint in &self.controllers {
            let uri: Option<tonic::transport::Uri> = endpoint.parse().ok();
            let is_good = uri.is_some_and(|uri| {
                uri.scheme_str() == Some("https") && uri.port().is_some() && matches!(uri.path(), "" | "/")
            });
            if !is_good {
                let problem = format!("{endpoint:?} is not a controller's address; write it as https://HOST:PORT");
                return Err(ConfigError::new("controllers", problem));
            }
        }
        if let Some((key, _)) = files.iter().find(|(_, file)| file.as_os_str().is_empty()) {
            let problem = "missing: a relay proves who it is to its controllers; turnctl ca issue makes the files";
            return Err(ConfigError::new(*key, problem));
        }
        Ok(Some(Controllers {
            endpoints: Endpoints::new(self.controllers.clone()),
            ca: tls.ca.clone(),
            certificate: tls.certificate.clone(),
            key: tls.key.clone(),
        }))
    }
}

impl Settings {
    /// Where clients reach this relay: each listener with the IP that is advertised for it.
    pub fn advertised_listeners(&self) -> Vec<(Transport, SocketAddr)> {
        let mut all = Vec::new();
        for listen in &self.listen {
            let ip = listen.bind.ip();
            let served = |relay: &&RelayIp| {
                let same_family = Family::of(relay.bound) == Family::of(ip);
                relay.bound == ip || (ip.is_unspecified() && same_family)
            };
            let advertised = self.relay_ips.iter().find(served).map(|relay| relay.advertised);
            match advertised {
                Some(ip) => all.push((listen.transport, SocketAddr::new(ip, listen.bind.port()))),
                None if ip.is_unspecified() => {}
                None => all.push((listen.transport, listen.bind)),
            }
        }
        all
    }

    /// What the data plane is started with. `user_quota` is this relay's number, or the cluster's.
    pub fn dataplane(&self, epoch: u64, (journal, usage): (PathBuf, PathBuf), user_quota: usize) -> DataplaneConfig {
        let alternates = self.nat_discovery.iter().flat_map(|discovery| &discovery.listen);
        DataplaneConfig {
            workers: self.workers,
            listen: self.listen.iter().chain(alternates).cloned().collect(),
            nat_discovery: self.nat_discovery.as_ref().map(|discovery| discovery.addresses),
            relay_ips: self.relay_ips.clone(),
            relay_ports: self.relay_ports.clone(),
            relayed: self.relayed,
            public_ports: !self.cluster_only,
            relay_address: self.relay_address,
            epoch,
            journal,
            usage,
            has_store: self.controllers.is_some(),
            max_allocations: self.max_allocations,
            user_quota,
            stream_send_cap: self.stream_send_cap,
            max_connections: self.max_connections,
            streams: self.streams.dataplane(),
            dtls_limits: self.streams.dtls_limits(),
            moves: self.address.waits,
        }
    }

    /// Checks against this machine that one socket for all relayed addresses can be had, where nothing else will do.
    pub(super) fn check_relayed(&self) -> Result<(), ConfigError> {
        if self.relayed != RelayedMode::Wildcard {
            return Ok(());
        }
        let relay_ips: Vec<IpAddr> = self.relay_ips.iter().map(|ip| ip.bound).collect();
        check_wildcard(&relay_ips)
            .map_err(|error| ConfigError::new("relayed", format!("{error:#}; grant that, or write relayed = \"auto\"")))
    }

    /// The listen addresses on one line, for people.
    pub fn listen_text(&self) -> String {
        self.listen.iter().map(text_of).collect::<Vec<_>>().join(",")
    }

    /// Says so if other programs may be given ports that relayed addresses need.
    pub fn warn_of_ephemeral_ports(&self) {
        if let Some(ports) = ephemeral_overlap(&self.relay_ports) {
            let (low, high) = (self.relay_ports.start(), self.relay_ports.end());
            tracing::warn!(
                "net.ipv4.ip_local_port_range lets other programs take ports {}-{} of relay_ports; reserve them: \
                 sysctl net.ipv4.ip_local_reserved_ports={low}-{high}",
                ports.start(),
                ports.end(),
            );
        }
    }
}

impl Controllers {
    /// Reads the PEM files anew: certificates are replaced while a relay runs.
    ///
    /// # Errors
    /// A file that cannot be read or holds no PEM block of its kind.
    pub(crate) fn read_identity(&self) -> Result<Identity, ConfigError> {
        let read = |key: &str, file: &PathBuf, block: &str| {
            let text = std::fs::read(file)
                .map_err(|error| ConfigError::new(key, format!("cannot read {}: {error}", file.display())))?;
            if !String::from_utf8_lossy(&text).contains(block) {
                let problem = format!("{} holds no PEM block {block:?}", file.display());
                return Err(ConfigError::new(key, problem));
            }
            Ok(text)
        };
        Ok(Identity {
            ca: read("tls.ca", &self.ca, "BEGIN CERTIFICATE")?,
            certificate: read("tls.certificate", &self.certificate, "BEGIN CERTIFICATE")?,
            key: read("tls.key", &self.key, "PRIVATE KEY")?,
        })
    }
}

/// Reads `address/prefix`; bits behind the prefix are ignored by whoever compares.
pub fn parse_network(text: &str) -> Option<Network> {
    let (address, prefix) = text.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    let prefix: u8 = prefix.parse().ok()?;
    let bits = if address.is_ipv4() { 32 } else { 128 };
    (prefix <= bits).then_some(Network { address, prefix })
}

/// Names stand in certificates and store keys.
fn name(key: &str, text: &str, may_be_empty: bool) -> Result<(), ConfigError> {
    if text.is_empty() && !may_be_empty {
        let problem = format!("missing: name it, for example {key} = \"eu-1\"");
        return Err(ConfigError::new(key, problem));
    }
    let is_good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    if text.len() > 63 || !text.chars().all(is_good) {
        let problem = format!("{text:?} is not a name; use at most 63 letters, digits, '-', '.', '_'");
        return Err(ConfigError::new(key, problem));
    }
    Ok(())
}

fn listeners(written: &[String]) -> Result<Vec<Listen>, ConfigError> {
    let wrong = |problem: String| ConfigError::new("listen", problem);
    let mut all: Vec<Listen> = Vec::new();
    for text in written {
        let (scheme, address) = text.split_once("://").unwrap_or(("", text));
        let transport = match scheme {
            "udp" => Transport::Udp,
            "tcp" => Transport::Tcp,
            "tls" => Transport::Tls,
            "dtls" => Transport::Dtls,
            _ => return Err(wrong(format!("{text:?} must start with udp://, tcp://, tls:// or dtls://"))),
        };
        let bind: SocketAddr =
            address.parse().map_err(|_| wrong(format!("{text:?} must end in IP:PORT, as in udp://0.0.0.0:3478")))?;
        if bind.port() == 0 {
            return Err(wrong(format!("{text:?} needs a port; 3478 is TURN's")));
        }
        let overlaps = |other: &&Listen| {
            let (a, b) = (other.bind.ip(), bind.ip());
            other.transport.is_stream() == transport.is_stream()
                && other.bind.port() == bind.port()
                && (a == b || (Family::of(a) == Family::of(b) && (a.is_unspecified() || b.is_unspecified())))
        };
        if let Some(other) = all.iter().find(overlaps) {
            let other = text_of(other);
            let problem = format!("{text:?} is already served by {other}; leave one of them out");
            return Err(wrong(problem));
        }
        all.push(Listen { transport, bind });
    }
    if all.is_empty() {
        return Err(wrong("is empty; name at least one address, as in udp://0.0.0.0:3478".into()));
    }
    Ok(all)
}

fn text_of(listen: &Listen) -> String {
    format!("{:?}://{}", listen.transport, listen.bind).to_lowercase()
}

fn relay_ports(
    (low, high): (u16, u16),
    listen: &[Listen],
    relay_ips: &[RelayIp],
) -> Result<RangeInclusive<u16>, ConfigError> {
    let wrong = |problem| Err(ConfigError::new("relay_ports", problem));
    if low == 0 || low > high {
        return wrong(format!("{low}-{high} is no range; write [49152, 65535]"));
    }
    let ports = low..=high;
    let on_relay_ip = |ip: IpAddr| ip.is_unspecified() || relay_ips.iter().any(|relay| relay.bound == ip);
    for listener in listen {
        if ports.contains(&listener.bind.port()) && on_relay_ip(listener.bind.ip()) {
            let port = listener.bind.port();
            return wrong(format!("{low}-{high} holds the listen port {port} on the same IP; move one of them"));
        }
    }
    Ok(ports)
}

fn relayed(written: &str) -> Result<RelayedMode, ConfigError> {
    match written {
        "auto" => Ok(RelayedMode::Auto),
        "sockets" => Ok(RelayedMode::Sockets),
        "wildcard" => Ok(RelayedMode::Wildcard),
        other => Err(ConfigError::new("relayed", format!("{other:?} is none of auto, sockets, wildcard"))),
    }
}

/// RFC 8489 §14.9: a REALM is shorter than 128 characters.
fn realm(text: &str) -> Result<String, ConfigError> {
    if text.is_empty() || text.chars().count() > 127 {
        return Err(ConfigError::new("realm", "must have 1 to 127 characters"));
    }
    Ok(text.into())
}

fn secrets(written: &[String]) -> Result<KeyRing, ConfigError> {
    let key = |(index, text): (usize, &String)| {
        let id = u8::try_from(index).map_err(|_| ConfigError::new("rest_secrets", "holds more than 256 secrets"))?;
        if text.is_empty() {
            return Err(ConfigError::new("rest_secrets", "holds an empty secret; leave it out"));
        }
        Ok(Key { id, secret: text.as_bytes().to_vec() })
    };
    written.iter().enumerate().map(key).collect::<Result<_, _>>().map(KeyRing)
}

/// RFC 8489 §14.3: a USERNAME has fewer than 509 bytes.
fn static_users(written: &[super::StaticUser]) -> Result<Vec<StaticUser>, ConfigError> {
    let user = |user: &super::StaticUser| {
        if user.username.is_empty() || user.username.len() > 508 {
            return Err(ConfigError::new("static_users", "a user name must have 1 to 508 bytes"));
        }
        Ok(StaticUser { username: user.username.as_bytes().to_vec(), password: user.password.as_bytes().to_vec() })
    };
    written.iter().map(user).collect()
}

fn http(written: &str, listen: &[Listen]) -> Result<Option<SocketAddr>, ConfigError> {
    if written.is_empty() {
        return Ok(None);
    }
    let address: SocketAddr = written.parse().map_err(|_| {
        ConfigError::new("http", format!("{written:?} is not IP:PORT; write 127.0.0.1:9478, or \"\" for none"))
    })?;
    if listen.iter().any(|l| l.transport.is_stream() && l.bind == address) {
        return Err(ConfigError::new("http", format!("{address} is in listen too; take another port")));
    }
    Ok(Some(address))
}

#[cfg(test)]
mod tests;
