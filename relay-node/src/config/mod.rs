//! What is written ([`Config`]: a TOML file, `TURNPIKE_*` variables, flags) and what is checked ([`Settings`]).
//!
//! Flags win over variables, variables over the file, the file over the defaults. Every error is one line that names
//! the key, says what is wrong and what to do.

mod address;
mod arguments;
mod backbone;
mod check;
mod discovery;
mod drain;
mod kubernetes;
mod limits;
mod machine;
mod streams;
mod third_party;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use serde::Deserialize;

pub use address::{AddressSettings, WrittenAddress};
pub use arguments::Arguments;
pub use backbone::{BackboneSettings, PORT as BACKBONE_PORT, WrittenBackbone};
pub use check::{Controllers, LogFormat, Settings, parse_network};
pub use discovery::{NatDiscovery, WrittenNatDiscovery};
pub use drain::{Overload, WrittenOverload};
pub use kubernetes::{Endpoints, KubernetesSettings, WrittenKubernetes};
pub use limits::{Features, Limits};
use machine::Machine;
pub use streams::{Streams, WrittenCertificate};
pub use third_party::ThirdParty;

/// The written form. Its defaults run on a laptop once `node_id` and `region` are given.
#[derive(Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Name of this relay in the cluster, the one in its certificate. Required.
    pub node_id: String,
    /// Region it serves. Required.
    pub region: String,
    /// Zone inside the region.
    pub zone: String,
    /// Where the journal, the epoch and the last session's settings are kept; mode 0700. A relative path starts at the
    /// file's directory, as all paths of the file do.
    pub state_dir: PathBuf,
    /// Client-facing addresses, `udp://IP:PORT`, `tcp://`, `tls://` or `dtls://`; 3478 is TURN's registered port, 5349
    /// that of TURN over TLS.
    pub listen: Vec<String>,
    /// What TLS and DTLS are served with: the default first, others chosen by the name a client asks for.
    pub certificates: Vec<WrittenCertificate>,
    /// Host name by which clients reach this relay over TLS; without one its IP is advertised.
    pub public_host: String,
    /// Networks of load balancers whose PROXY headers are believed, CIDR.
    pub trusted_proxies: Vec<String>,
    /// IP and port where TLS connections for other hosts and protocols go; empty for nowhere.
    pub web_server: String,
    /// Tell the web server by PROXY headers (version 2) who its clients are.
    pub web_server_proxy_protocol: bool,
    /// IPv4 address that relayed sockets bind.
    pub relay_ip: Option<Ipv4Addr>,
    /// IPv4 address that clients and peers see.
    pub public_ip: Option<Ipv4Addr>,
    /// IPv6 address that relayed sockets bind; without it and `public_ip6` there is no IPv6.
    pub relay_ip6: Option<Ipv6Addr>,
    /// IPv6 address that clients and peers see.
    pub public_ip6: Option<Ipv6Addr>,
    /// Ports for relayed transport addresses, inclusive (RFC 8656 §7.2 suggests 49152-65535).
    pub relay_ports: (u16, u16),
    /// How relayed addresses are held: `sockets`, one each; `wildcard`, one socket per worker, which takes CAP_BPF,
    /// CAP_NET_ADMIN and CAP_NET_RAW; `auto`, the second where it can be had.
    pub relayed: String,
    /// Worker threads, at most 64; 0 is one per core.
    pub workers: u16,
    /// REALM of a relay without controllers.
    pub realm: String,
    /// TURN REST secrets of a relay without controllers, newest first; all are accepted.
    pub rest_secrets: Vec<String>,
    /// Users with a fixed password, for a relay without controllers.
    pub static_users: Vec<StaticUser>,
    /// Controllers to join, `https://HOST:PORT`; none is a stand-alone relay.
    pub controllers: Vec<String>,
    /// This relay's certificate for the controllers, and for the other members on the backbone.
    pub tls: Tls,
    /// QUIC links to the other relays; without it packets for them leave by plain UDP.
    pub backbone: Option<WrittenBackbone>,
    /// Whom clients may reach: `any`, or `cluster-only`, which opens no public relayed ports, so that only relayed
    /// addresses of the cluster are peers, and the backbone is the way to them. TCP allocations are then not offered.
    pub peers: String,
    /// IP and port of `/livez`, `/readyz` and `/metrics`; empty for none.
    pub http: String,
    /// Relayed addresses on this relay, 0 for no limit; a dual allocation has two.
    pub max_allocations: u32,
    /// Relayed addresses of one user on this relay, 0 for the cluster's number.
    pub user_quota: u32,
    /// Bytes queued for a TCP client before whole frames are dropped.
    pub stream_send_cap: u32,
    /// TCP connections per worker.
    pub max_connections: u32,
    /// A second address, for NAT behaviour discovery (RFC 5780).
    pub nat_discovery: Option<WrittenNatDiscovery>,
    /// Further bounds.
    pub limits: Limits,
    /// Extensions that are offered.
    pub features: Features,
    /// Authorization servers whose access tokens are taken (RFC 7635).
    pub third_party: ThirdParty,
    /// Whether the relay addresses move, and whether this relay waits for them.
    pub address: WrittenAddress,
    /// What a relay in a pod asks the API server.
    pub kubernetes: WrittenKubernetes,
    /// Seconds that a relay told to stop goes on with the calls it has, at most 86400; 0 ends at once.
    pub drain_deadline: u32,
    /// When it sends new clients to other relays.
    pub overload: WrittenOverload,
    /// The lab switch: opens loopback peers and nothing else.
    pub allow_loopback_peers: bool,
    /// Peer networks denied beyond the built-in list, CIDR.
    pub denied_peers: Vec<String>,
    /// What is logged: a level, or `tracing` directives.
    pub log: String,
    /// `text` or `json`.
    pub log_format: String,
    /// Where traces go, `http://HOST:PORT` of an OTLP collector (gRPC); else what `OTEL_EXPORTER_OTLP_ENDPOINT` says.
    pub otlp_endpoint: Option<String>,
}

/// A user with a fixed password (RFC 8489 §9.2).
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StaticUser {
    /// USERNAME, 1..=508 bytes.
    pub username: String,
    /// Password.
    pub password: String,
}

/// PEM files for mTLS.
#[derive(Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tls {
    /// Certificate of the cluster's CA.
    pub ca: PathBuf,
    /// This relay's certificate; it carries the URI SAN `turnpike://relay/<node_id>`.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            node_id: String::new(),
            region: String::new(),
            zone: String::new(),
            state_dir: "/var/lib/turnpike".into(),
            listen: vec!["udp://0.0.0.0:3478".into(), "tcp://0.0.0.0:3478".into()],
            certificates: Vec::new(),
            public_host: String::new(),
            trusted_proxies: Vec::new(),
            web_server: String::new(),
            web_server_proxy_protocol: false,
            relay_ip: None,
            public_ip: None,
            relay_ip6: None,
            public_ip6: None,
            relay_ports: (49152, 65535),
            relayed: "sockets".into(),
            workers: 0,
            realm: "turnpike".into(),
            rest_secrets: Vec::new(),
            static_users: Vec::new(),
            controllers: Vec::new(),
            tls: Tls::default(),
            backbone: None,
            peers: "any".into(),
            http: "127.0.0.1:9478".into(),
            max_allocations: 0,
            user_quota: 0,
            stream_send_cap: 262_144,
            max_connections: 10_000,
            nat_discovery: None,
            limits: Limits::default(),
            features: Features::default(),
            third_party: ThirdParty::default(),
            address: WrittenAddress::default(),
            kubernetes: WrittenKubernetes::default(),
            drain_deadline: 1800,
            overload: WrittenOverload::default(),
            allow_loopback_peers: false,
            denied_peers: Vec::new(),
            log: "info".into(),
            log_format: "text".into(),
            otlp_endpoint: None,
        }
    }
}

/// What is wrong with the configuration: one line that names the key, says what is wrong and what to do.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct ConfigError {
    /// The key as the file writes it.
    pub key: String,
    /// What is wrong, and what to do.
    pub problem: String,
}

impl ConfigError {
    pub(crate) fn new(key: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { key: key.into(), problem: problem.into() }
    }
}

/// Reads the file and lays variables and flags over it, then checks the whole against this machine.
///
/// # Errors
/// [`ConfigError`], for exit code 78.
pub fn load(arguments: &Arguments) -> Result<Settings, ConfigError> {
    let mut config = match &arguments.config {
        Some(file) => Config::read(file)?,
        None => Config::default(),
    };
    for (key, value) in arguments.overrides() {
        config.set(key, value)?;
    }
    let kubernetes = config.kubernetes.check()?;
    let facts = kubernetes.as_ref().map(|settings| kubernetes::find(settings, &config.state_dir)).transpose()?;
    if let (Some(settings), Some(facts)) = (&kubernetes, &facts) {
        config.adopt(settings, facts);
    }
    let mut settings = config.check(&Machine::look())?;
    settings.kubernetes = kubernetes.zip(facts);
    settings.streams.load_certificates()?;
    settings.address.check_machine()?;
    settings.check_relayed()?;
    if let Some(controllers) = &settings.controllers {
        controllers.read_identity()?;
    }
    Ok(settings)
}

impl Config {
    /// Reads a TOML file.
    fn read(file: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(file)
            .map_err(|error| ConfigError::new("config", format!("cannot read {}: {error}", file.display())))?;
        let mut config = Self::parse(&text)
            .map_err(|error| ConfigError { problem: format!("{} (in {})", error.problem, file.display()), ..error })?;
        let directory = file.parent().unwrap_or(Path::new(""));
        for certificate in &mut config.certificates {
            certificate.start_at(directory);
        }
        config.address.start_at(directory);
        let tls = &mut config.tls;
        for path in [&mut config.state_dir, &mut tls.ca, &mut tls.certificate, &mut tls.key] {
            if !path.as_os_str().is_empty() {
                *path = directory.join(&*path);
            }
        }
        Ok(config)
    }

    /// Reads TOML text.
    pub(crate) fn parse(text: &str) -> Result<Self, ConfigError> {
        let line = |span: Option<std::ops::Range<usize>>| {
            span.map_or(0, |span| text[..span.start.min(text.len())].matches('\n').count() + 1)
        };
        let deserializer = toml::Deserializer::parse(text).map_err(|error| {
            let at = error.span().and_then(|span| text.get(span)).unwrap_or_default().trim();
            let at = if at.is_empty() || at.len() > 40 { String::new() } else { format!(", at {at:?}") };
            ConfigError::new(format!("line {}", line(error.span())), one_line(error.message()) + &at)
        })?;
        serde_path_to_error::deserialize(deserializer).map_err(|error| {
            let path = error.path().to_string();
            let cause = error.inner();
            let problem = match cause.message().split_once(", expected one of ") {
                Some((unknown, known)) if unknown.starts_with("unknown field") => {
                    format!("unknown key; known are {}", known.replace('`', ""))
                }
                _ => one_line(cause.message()),
            };
            ConfigError::new(path, format!("{problem}; line {}", line(cause.span())))
        })
    }

    /// The table, added where there is none.
    fn backbone(&mut self) -> &mut WrittenBackbone {
        self.backbone.get_or_insert_default()
    }

    /// Sets one key from a variable or a flag. Lists are separated by commas.
    fn set(&mut self, key: &'static str, value: &str) -> Result<(), ConfigError> {
        let list = || value.split(',').map(str::trim).filter(|v| !v.is_empty());
        match key {
            "node_id" => self.node_id = value.into(),
            "region" => self.region = value.into(),
            "zone" => self.zone = value.into(),
            "state_dir" => self.state_dir = value.into(),
            "listen" => self.listen = list().map(Into::into).collect(),
            "certificates" => self.certificates = list().map(WrittenCertificate::parse).collect::<Result<_, _>>()?,
            "public_host" => self.public_host = value.into(),
            "trusted_proxies" => self.trusted_proxies = list().map(Into::into).collect(),
            "web_server" => self.web_server = value.into(),
            "relay_ip" => self.relay_ip = optional(key, value, "an IPv4 address")?,
            "public_ip" => self.public_ip = optional(key, value, "an IPv4 address")?,
            "relay_ip6" => self.relay_ip6 = optional(key, value, "an IPv6 address")?,
            "public_ip6" => self.public_ip6 = optional(key, value, "an IPv6 address")?,
            "relay_ports" => {
                let (low, high) = value.split_once('-').unwrap_or((value, value));
                let wanted = "a range such as 49152-65535";
                self.relay_ports = (parsed(key, low.trim(), wanted)?, parsed(key, high.trim(), wanted)?);
            }
            "relayed" => self.relayed = value.into(),
            "workers" => self.workers = parsed(key, value, "a number from 0 to 64")?,
            "realm" => self.realm = value.into(),
            "rest_secrets" => self.rest_secrets = list().map(Into::into).collect(),
            "static_users" => {
                let user = |text: &str| match text.split_once(':') {
                    Some((username, password)) => {
                        Ok(StaticUser { username: username.into(), password: password.into() })
                    }
                    None => Err(ConfigError::new(key, "a user is written name:password")),
                };
                self.static_users = list().map(user).collect::<Result<_, _>>()?;
            }
            "controllers" => self.controllers = list().map(Into::into).collect(),
            "tls.ca" => self.tls.ca = value.into(),
            "tls.certificate" => self.tls.certificate = value.into(),
            "tls.key" => self.tls.key = value.into(),
            "peers" => self.peers = value.into(),
            "backbone.listen" => self.backbone().listen = list().map(Into::into).collect(),
            "backbone.advertise" => self.backbone().advertise = list().map(Into::into).collect(),
            "http" => self.http = value.into(),
            "max_allocations" => self.max_allocations = parsed(key, value, "a number")?,
            "user_quota" => self.user_quota = parsed(key, value, "a number")?,
            "stream_send_cap" => self.stream_send_cap = parsed(key, value, "a number of bytes")?,
            "max_connections" => self.max_connections = parsed(key, value, "a number")?,
            "kubernetes.node" => self.kubernetes.node = value.into(),
            "kubernetes.controllers" => self.kubernetes.controllers = value.into(),
            "kubernetes.service" => self.kubernetes.service = value.into(),
            "drain_deadline" => self.drain_deadline = parsed(key, value, "a number of seconds")?,
            "allow_loopback_peers" => self.allow_loopback_peers = parsed(key, value, "true or false")?,
            "denied_peers" => self.denied_peers = list().map(Into::into).collect(),
            "log" => self.log = value.into(),
            "log_format" => self.log_format = value.into(),
            "otlp_endpoint" => self.otlp_endpoint = Some(value.into()),
            other => return Err(ConfigError::new(other, "cannot be set by a variable or a flag")),
        }
        Ok(())
    }
}

fn parsed<T: std::str::FromStr>(key: &str, value: &str, wanted: &str) -> Result<T, ConfigError> {
    value.parse().map_err(|_| ConfigError::new(key, format!("{value:?} is not {wanted}")))
}

fn optional<T: std::str::FromStr>(key: &str, value: &str, wanted: &str) -> Result<Option<T>, ConfigError> {
    if value.is_empty() {
        return Ok(None);
    }
    parsed(key, value, wanted).map(Some)
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_file_is_read_and_mistakes_name_their_key() {
        let cases: &[(&str, &str, Result<(), &str>)] = &[
            ("empty", "", Ok(())),
            (
                "every kind of value",
                "node_id = \"a\"\nrelay_ip = \"10.0.0.5\"\nrelay_ports = [5000, 5001]\nallow_loopback_peers = true\n\
                 static_users = [{ username = \"a\", password = \"b\" }]\n[tls]\nca = \"ca.pem\"",
                Ok(()),
            ),
            ("unknown key", "node_id = \"a\"\nrelm = \"x\"", Err("relm: unknown key; known are node_id, ")),
            ("unknown nested key", "[tls]\ncert = \"x\"", Err("tls.cert: unknown key; known are ca, ")),
            ("wrong type", "workers = \"many\"", Err("workers: invalid type: string \"many\", expected u16; line 1")),
            ("out of range", "\nworkers = 70000", Err("workers: invalid value")),
            ("not an address", "relay_ip = \"10.0.0\"", Err("relay_ip: invalid IPv4 address syntax")),
            ("wrong place in a list", "relay_ports = [1, \"x\"]", Err("relay_ports[1]: invalid type")),
            ("twice", "zone = \"a\"\nzone = \"b\"", Err("line 2: duplicate key, at \"zone\"")),
            ("not TOML", "node_id = \"a\"\n= 3", Err("line 2: ")),
        ];
        for (what, text, expected) in cases {
            match (Config::parse(text), expected) {
                (Ok(_), Ok(())) => {}
                (Err(error), Err(start)) => {
                    let error = error.to_string();
                    assert!(error.starts_with(start), "{what}: {error}");
                    assert!(!error.contains('\n'), "{what}: {error}");
                }
                (result, _) => panic!("{what}: {:?}", result.err()),
            }
        }
    }

    #[test]
    fn variables_and_flags_lie_over_the_file() {
        let mut config = Config::parse("region = \"eu\"\nlisten = [\"udp://0.0.0.0:1\"]").expect("good");
        let settings = [
            ("region", "us"),
            ("listen", "udp://127.0.0.1:3478, tcp://127.0.0.1:3478"),
            ("relay_ports", "50000-50010"),
            ("static_users", "a:b:c"),
            ("allow_loopback_peers", "true"),
            ("public_ip", ""),
        ];
        for (key, value) in settings {
            config.set(key, value).expect(key);
        }
        assert_eq!(config.region, "us");
        assert_eq!(config.listen, ["udp://127.0.0.1:3478", "tcp://127.0.0.1:3478"]);
        assert_eq!(config.relay_ports, (50000, 50010));
        assert_eq!(config.static_users[0].password, "b:c");
        assert!(config.allow_loopback_peers);
        assert_eq!(config.public_ip, None);
    }

    #[test]
    fn bad_overrides_name_their_key() {
        let cases = [
            ("workers", "many", "workers: \"many\" is not a number from 0 to 64"),
            ("relay_ports", "1-x", "relay_ports: \"x\" is not a range such as 49152-65535"),
            ("static_users", "alice", "static_users: a user is written name:password"),
            ("relay_ip6", "10.0.0.1", "relay_ip6: \"10.0.0.1\" is not an IPv6 address"),
            ("allow_loopback_peers", "yes\n", "allow_loopback_peers: \"yes\\n\" is not true or false"),
        ];
        for (key, value, expected) in cases {
            let error = Config::default().set(key, value).expect_err(key);
            assert_eq!(error.to_string(), expected);
        }
    }
}
