//! Configuration: `Config` as it is written (file, environment, flags), [`Settings`] as it was checked.

mod layers;

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hickory_server::proto::rr::Name;
use serde::Deserialize;
use tracing_subscriber::EnvFilter;
use turn_core::policy::Network;

pub use self::layers::{command, load};
use crate::api::Rates;
use crate::dns::DnsSettings;
use crate::fleet::Thresholds;
use crate::geo::Geo;
use crate::identity::is_name;
use crate::steering::{Distances, Place, Terms};
use crate::usage::Retention;

/// The configuration as it is written. Relative paths are relative to the working directory.
#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Config {
    id: Option<String>,
    region: Option<String>,
    grpc: SocketAddr,
    http: SocketAddr,
    tls: TlsConfig,
    store: StoreConfig,
    realm: String,
    rest_secrets: Vec<String>,
    static_users: Vec<StaticUser>,
    api_keys: Vec<String>,
    console_keys: Vec<ConsoleKey>,
    credential_ttl: u32,
    cors_origins: Vec<String>,
    distances: Vec<Distance>,
    regions: Vec<RegionPlace>,
    geo: Option<PathBuf>,
    trusted_proxies: Vec<String>,
    rate: RateConfig,
    dns: DnsConfig,
    user_quota: u32,
    denied_peers: Vec<String>,
    lease: u32,
    usage: UsageConfig,
    overload: OverloadConfig,
    log: String,
    log_format: LogFormat,
    otlp_endpoint: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            id: None,
            region: None,
            grpc: SocketAddr::from(([127, 0, 0, 1], 9443)),
            http: SocketAddr::from(([127, 0, 0, 1], 8080)),
            tls: TlsConfig::default(),
            store: StoreConfig::default(),
            realm: "turnpike".to_owned(),
            rest_secrets: Vec::new(),
            static_users: Vec::new(),
            api_keys: Vec::new(),
            console_keys: Vec::new(),
            credential_ttl: 86_400,
            cors_origins: vec!["*".to_owned()],
            distances: Vec::new(),
            regions: Vec::new(),
            geo: None,
            trusted_proxies: Vec::new(),
            rate: RateConfig::default(),
            dns: DnsConfig::default(),
            user_quota: 0,
            denied_peers: Vec::new(),
            lease: 5,
            usage: UsageConfig::default(),
            overload: OverloadConfig::default(),
            log: "info".to_owned(),
            log_format: LogFormat::Text,
            otlp_endpoint: None,
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct TlsConfig {
    ca: Option<PathBuf>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct StoreConfig {
    kind: Option<StoreKind>,
    path: Option<PathBuf>,
    endpoints: Vec<String>,
    prefix: Option<String>,
    ca: Option<PathBuf>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    user: Option<String>,
    password: Option<String>,
}

#[derive(Clone, Copy, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
enum StoreKind {
    Embedded,
    Etcd,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Distance {
    from: String,
    to: String,
    ms: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RegionPlace {
    name: String,
    latitude: f64,
    longitude: f64,
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RateConfig {
    address: u32,
    key: u32,
}

impl Default for RateConfig {
    fn default() -> Self {
        let Rates { address, key } = Rates::default();
        Self { address, key }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct DnsConfig {
    listen: Vec<SocketAddr>,
    zone: Option<String>,
    name_servers: Vec<String>,
    ttl: u32,
    rate: u32,
}

impl Default for DnsConfig {
    fn default() -> Self {
        Self { listen: Vec::new(), zone: None, name_servers: Vec::new(), ttl: 10, rate: 100 }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct OverloadConfig {
    cpu_permille: u32,
    allocations_percent: u64,
}

impl Default for OverloadConfig {
    fn default() -> Self {
        let Thresholds { cpu_permille, allocations_percent } = Thresholds::default();
        Self { cpu_permille, allocations_percent }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct UsageConfig {
    retention_hours: u32,
    max_entries: u32,
}

impl Default for UsageConfig {
    fn default() -> Self {
        let Retention { age, entries } = Retention::default();
        // Both are small.
        Self { retention_hours: (age.as_secs() / 3600) as u32, max_entries: entries as u32 }
    }
}

/// A user with a fixed password.
#[derive(Clone, Deserialize, Eq, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct StaticUser {
    /// 1 to 508 bytes.
    pub username: String,
    /// Not empty.
    pub password: String,
}

/// A person at the console, who signs in with a key.
#[derive(Clone, Deserialize, Eq, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct ConsoleKey {
    /// Who it is, in the audit log; see [`is_name`].
    pub name: String,
    /// What the holder may do.
    pub role: ConsoleRole,
    /// 16 to 256 bytes.
    pub key: String,
}

/// What a person at the console may do, as with a certificate of that role.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum ConsoleRole {
    /// Look.
    Viewer,
    /// Drain, uncordon and end allocations too.
    Operator,
    /// The same: what only an admin may do, the console does not offer.
    Admin,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The configuration as it was checked. Holds secrets: it has no `Debug` on purpose.
pub struct Settings {
    /// Name of this replica; its certificate is made out to it.
    pub id: String,
    /// Where gRPC (mTLS) listens.
    pub grpc: SocketAddr,
    /// Where plain HTTP listens.
    pub http: SocketAddr,
    /// Certificate files of the gRPC listener.
    pub tls: TlsFiles,
    /// Where state lives.
    pub store: StoreSettings,
    /// REALM of the cluster.
    pub realm: String,
    /// TURN REST secrets, newest first; empty: made at the first start and kept in the store.
    pub rest_secrets: Vec<String>,
    /// Users with fixed passwords.
    pub static_users: Vec<StaticUser>,
    /// Keys that open HTTP discovery and the console; empty leaves them open to all.
    pub api_keys: Vec<String>,
    /// People who may do more at the console than look.
    pub console_keys: Vec<ConsoleKey>,
    /// Life of a credential where none is asked for.
    pub credential_ttl: Duration,
    /// Origins whose pages may ask; `*` is all.
    pub cors_origins: Vec<String>,
    /// Home region, distances and thresholds.
    pub terms: Terms,
    /// Where addresses are.
    pub geo: Option<Arc<Geo>>,
    /// Proxies before the HTTP listener: `X-Forwarded-For` of others is not believed.
    pub trusted_proxies: Vec<Network>,
    /// How often HTTP discovery is answered.
    pub rates: Rates,
    /// The DNS server, if there is to be one.
    pub dns: Option<DnsSettings>,
    /// Allocations one user may hold on one relay; 0 is no limit.
    pub user_quota: u32,
    /// Peer networks denied beyond the built-in list, CIDR.
    pub denied_peers: Vec<String>,
    /// Life of a node's lease.
    pub lease: Duration,
    /// What the ledger of usage remembers.
    pub retention: Retention,
    /// Filter directives of the log.
    pub log: String,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Where traces go, `http://HOST:PORT` of an OTLP collector (gRPC); else what `OTEL_EXPORTER_OTLP_ENDPOINT` says.
    pub otlp_endpoint: Option<String>,
}

/// PEM files of a TLS side that authenticates itself and its peers.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TlsFiles {
    /// Certificates that peers' certificates must go back to.
    pub ca: PathBuf,
    /// Own certificate chain.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Which store, and how to reach it.
#[derive(Clone, Eq, PartialEq)]
pub enum StoreSettings {
    /// In this process, in one file.
    Embedded {
        /// The file.
        path: PathBuf,
    },
    /// etcd.
    Etcd {
        /// URLs of its members.
        endpoints: Vec<String>,
        /// Prefix of every key.
        prefix: String,
        /// Certificates that the members' certificates must go back to; given for https endpoints.
        ca: Option<PathBuf>,
        /// Client certificate chain and private key.
        identity: Option<(PathBuf, PathBuf)>,
        /// User name and password.
        user: Option<(String, String)>,
    },
}

/// What is wrong with the configuration: one line that names the key.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{origin}{key}: {why}")]
pub struct ConfigError {
    /// Where it was written (`FILE: `, `environment: ` or empty).
    origin: String,
    /// The key, e.g. `store.path`.
    pub key: String,
    /// What is wrong and what to do.
    pub why: String,
}

impl ConfigError {
    /// About `key`.
    pub fn new(key: impl Into<String>, why: impl Into<String>) -> Self {
        Self { origin: String::new(), key: key.into(), why: why.into() }
    }

    fn from(self, origin: impl Into<String>) -> Self {
        Self { origin: origin.into(), ..self }
    }
}

/// A month: what a leaked credential may be good for at most.
const MAX_CREDENTIAL_TTL: u32 = 30 * 86_400;
/// Some 600 MB of etcd's 2 GB.
const MAX_LEDGER: u32 = 2_000_000;

impl TryFrom<Config> for Settings {
    type Error = ConfigError;

    fn try_from(config: Config) -> Result<Self, ConfigError> {
        let tls = |key: &str, path: Option<PathBuf>| {
            path.ok_or_else(|| {
                ConfigError::new(key, "missing; gRPC is always mTLS (`turnctl ca issue` makes the files)")
            })
        };
        check(!config.realm.is_empty() && config.realm.chars().count() <= 127, "realm", "must be 1 to 127 characters")?;
        check(
            !config.realm.chars().any(|c| c.is_control() || c == '"' || c == '\\'),
            "realm",
            "must not hold quotes, backslashes or control characters",
        )?;
        check(config.grpc != config.http || config.http.port() == 0, "http", "must be another address than grpc")?;
        check(
            (60..=MAX_CREDENTIAL_TTL).contains(&config.credential_ttl),
            "credential_ttl",
            format!("must be 60 to {MAX_CREDENTIAL_TTL} seconds"),
        )?;
        check((2..=60).contains(&config.lease), "lease", "must be 2 to 60 seconds")?;
        check_secrets(&config)?;
        for (i, origin) in config.cors_origins.iter().enumerate() {
            let is_origin = origin == "*"
                || origin.parse::<axum::http::Uri>().is_ok_and(|uri| {
                    uri.scheme().is_some() && uri.authority().is_some() && !origin.ends_with('/') && uri.path() == "/"
                });
            check(
                is_origin,
                format!("cors_origins[{i}]"),
                format!("{origin:?} is not an origin; write \"*\" or e.g. \"https://example.org\""),
            )?;
        }
        networks("denied_peers", &config.denied_peers)?;
        let trusted_proxies = networks("trusted_proxies", &config.trusted_proxies)?;
        if let Err(error) = EnvFilter::try_new(&config.log) {
            return Err(ConfigError::new("log", format!("{error}; write e.g. \"info\" or \"info,controller=debug\"")));
        }
        Ok(Self {
            id: name("id", "a name for this replica, e.g. \"controller-1\"", config.id.clone())?,
            terms: terms(&config)?,
            geo: config.geo.as_deref().map(geo).transpose()?,
            trusted_proxies,
            dns: dns(config.dns)?,
            rates: Rates { address: config.rate.address, key: config.rate.key },
            grpc: config.grpc,
            http: config.http,
            tls: TlsFiles {
                ca: tls("tls.ca", config.tls.ca)?,
                certificate: tls("tls.certificate", config.tls.certificate)?,
                key: tls("tls.key", config.tls.key)?,
            },
            store: config.store.try_into()?,
            realm: config.realm,
            rest_secrets: config.rest_secrets,
            static_users: config.static_users,
            api_keys: config.api_keys,
            console_keys: config.console_keys,
            credential_ttl: Duration::from_secs(u64::from(config.credential_ttl)),
            cors_origins: config.cors_origins,
            user_quota: config.user_quota,
            denied_peers: config.denied_peers,
            lease: Duration::from_secs(u64::from(config.lease)),
            retention: retention(&config.usage)?,
            log: config.log,
            log_format: config.log_format,
            otlp_endpoint: config.otlp_endpoint,
        })
    }
}

impl TryFrom<StoreConfig> for StoreSettings {
    type Error = ConfigError;

    fn try_from(config: StoreConfig) -> Result<Self, ConfigError> {
        let Some(kind) = config.kind else {
            return Err(ConfigError::new(
                "store.kind",
                "missing; write \"embedded\" (with path) or \"etcd\" (with endpoints)",
            ));
        };
        let foreign = |key: &str, given: bool, kind: &str| {
            check(!given, format!("store.{key}"), format!("has no meaning for kind = {kind:?}"))
        };
        if kind == StoreKind::Embedded {
            foreign("endpoints", !config.endpoints.is_empty(), "embedded")?;
            foreign("prefix", config.prefix.is_some(), "embedded")?;
            foreign("ca", config.ca.is_some(), "embedded")?;
            foreign("certificate", config.certificate.is_some(), "embedded")?;
            foreign("key", config.key.is_some(), "embedded")?;
            foreign("user", config.user.is_some(), "embedded")?;
            foreign("password", config.password.is_some(), "embedded")?;
            let path = config.path.ok_or_else(|| {
                ConfigError::new("store.path", "missing; the embedded store keeps its state in this file")
            })?;
            return Ok(Self::Embedded { path });
        }
        foreign("path", config.path.is_some(), "etcd")?;
        check(!config.endpoints.is_empty(), "store.endpoints", "missing; write e.g. [\"https://etcd-0:2379\"]")?;
        for (i, endpoint) in config.endpoints.iter().enumerate() {
            let is_url = endpoint
                .parse::<axum::http::Uri>()
                .is_ok_and(|uri| matches!(uri.scheme_str(), Some("http" | "https")) && uri.authority().is_some());
            check(is_url, format!("store.endpoints[{i}]"), format!("{endpoint:?} is not an http:// or https:// URL"))?;
        }
        check(
            config.ca.is_some() || !config.endpoints.iter().any(|endpoint| endpoint.starts_with("https:")),
            "store.ca",
            "missing; https endpoints are checked against this CA",
        )?;
        let prefix = config.prefix.unwrap_or_else(|| "turnpike/".to_owned());
        check(
            prefix.ends_with('/') && prefix.len() > 1,
            "store.prefix",
            "must be text that ends in \"/\", e.g. \"turnpike/\"",
        )?;
        Ok(Self::Etcd {
            endpoints: config.endpoints,
            prefix,
            ca: config.ca,
            identity: both("store.certificate", config.certificate, "store.key", config.key)?,
            user: both("store.user", config.user, "store.password", config.password)?,
        })
    }
}

fn check(holds: bool, key: impl Into<String>, why: impl Into<String>) -> Result<(), ConfigError> {
    if holds { Ok(()) } else { Err(ConfigError::new(key, why)) }
}

fn both<A, B>(a_key: &str, a: Option<A>, b_key: &str, b: Option<B>) -> Result<Option<(A, B)>, ConfigError> {
    match (a, b) {
        (Some(a), Some(b)) => Ok(Some((a, b))),
        (None, None) => Ok(None),
        (Some(_), None) => Err(ConfigError::new(b_key, format!("missing, but {a_key} is set; set both or none"))),
        (None, Some(_)) => Err(ConfigError::new(a_key, format!("missing, but {b_key} is set; set both or none"))),
    }
}

fn name(key: &str, what: &str, value: Option<String>) -> Result<String, ConfigError> {
    let value = value.ok_or_else(|| ConfigError::new(key, format!("missing; write {what}")))?;
    check(
        is_name(&value),
        key,
        format!("{value:?} must be 1 to 63 of A-Z a-z 0-9 . _ - and begin with a letter or digit"),
    )?;
    Ok(value)
}

fn check_secrets(config: &Config) -> Result<(), ConfigError> {
    check(config.rest_secrets.len() <= 16, "rest_secrets", "holds more than 16 secrets")?;
    let lists = [("rest_secrets", &config.rest_secrets), ("api_keys", &config.api_keys)];
    for (key, list) in lists {
        for (i, secret) in list.iter().enumerate() {
            check((1..=256).contains(&secret.len()), format!("{key}[{i}]"), "must be 1 to 256 bytes")?;
        }
    }
    let mut people = BTreeSet::new();
    for (i, person) in config.console_keys.iter().enumerate() {
        let key = |field: &str| format!("console_keys[{i}].{field}");
        check(is_name(&person.name), key("name"), "must be 1 to 63 of A-Z a-z 0-9 . _ -")?;
        check(
            (16..=256).contains(&person.key.len()),
            key("key"),
            "must be 16 to 256 bytes; `openssl rand -hex 32` makes one",
        )?;
        check(!config.api_keys.contains(&person.key), key("key"), "is an API key too, which programs have")?;
        check(people.insert(&person.key), key("key"), "is there twice")?;
    }
    let mut names = BTreeSet::new();
    for (i, user) in config.static_users.iter().enumerate() {
        // RFC 8489 §14.3: a USERNAME is shorter than 509 bytes.
        check(
            (1..=508).contains(&user.username.len()),
            format!("static_users[{i}].username"),
            "must be 1 to 508 bytes",
        )?;
        check(!user.password.is_empty(), format!("static_users[{i}].password"), "must not be empty")?;
        check(names.insert(&user.username), format!("static_users[{i}].username"), "is there twice")?;
    }
    Ok(())
}

fn terms(config: &Config) -> Result<Terms, ConfigError> {
    let home = name("region", "the region for clients that ask for none, e.g. \"eu\"", config.region.clone())?;
    let mut distances = Distances::default();
    let mut pairs = BTreeSet::new();
    for (i, distance) in config.distances.iter().enumerate() {
        let key = format!("distances[{i}]");
        check(is_name(&distance.from), format!("{key}.from"), "is not the name of a region")?;
        check(is_name(&distance.to), format!("{key}.to"), "is not the name of a region")?;
        check(distance.from != distance.to, &*key, "joins a region to itself, which is always 0 ms")?;
        let mut pair = [&distance.from, &distance.to];
        pair.sort();
        check(pairs.insert(pair), &*key, "gives a pair of regions a second distance; both directions are one pair")?;
        distances.set(&distance.from, &distance.to, distance.ms);
    }
    let OverloadConfig { cpu_permille, allocations_percent } = config.overload;
    check((1..=1000).contains(&cpu_permille), "overload.cpu_permille", "must be 1 to 1000 thousandths")?;
    check((1..=100).contains(&allocations_percent), "overload.allocations_percent", "must be 1 to 100 per cent")?;
    let thresholds = Thresholds { cpu_permille, allocations_percent };
    Ok(Terms { home, distances, places: places(config)?, thresholds })
}

fn retention(usage: &UsageConfig) -> Result<Retention, ConfigError> {
    check((1..=87_600).contains(&usage.retention_hours), "usage.retention_hours", "must be 1 to 87600 hours")?;
    check(
        (1..=MAX_LEDGER).contains(&usage.max_entries),
        "usage.max_entries",
        format!("must be 1 to {MAX_LEDGER}; each takes about 300 bytes of the store"),
    )?;
    let age = Duration::from_secs(u64::from(usage.retention_hours) * 3600);
    Ok(Retention { age, entries: usage.max_entries as usize })
}

fn places(config: &Config) -> Result<HashMap<String, Place>, ConfigError> {
    let mut places = HashMap::new();
    for (i, region) in config.regions.iter().enumerate() {
        let key = format!("regions[{i}]");
        check(is_name(&region.name), format!("{key}.name"), "is not the name of a region")?;
        let place = Place::new(region.latitude, region.longitude).ok_or_else(|| {
            ConfigError::new(&*key, "is not on the globe: latitude is -90 to 90, longitude -180 to 180 degrees")
        })?;
        check(places.insert(region.name.clone(), place).is_none(), format!("{key}.name"), "is there twice")?;
    }
    check(
        config.geo.is_none() || !places.is_empty(),
        "regions",
        "missing, but geo is set: write where regions are, e.g. [{ name = \"eu\", latitude = 50.1, longitude = 8.7 }]",
    )?;
    Ok(places)
}

fn dns(config: DnsConfig) -> Result<Option<DnsSettings>, ConfigError> {
    let Some(zone) = config.zone else {
        check(config.listen.is_empty(), "dns.zone", "missing, but dns.listen is set: write e.g. \"turn.example.org\"")?;
        return Ok(None);
    };
    let name = |key: String, text: &str| {
        let name = Name::from_ascii(text).ok().filter(|name| !name.is_root());
        let mut name = name.ok_or_else(|| ConfigError::new(key, format!("{text:?} is not a domain name")))?;
        name.set_fqdn(true);
        Ok(name)
    };
    let zone = name("dns.zone".to_owned(), &zone)?;
    check(!config.listen.is_empty(), "dns.listen", "missing, but dns.zone is set: write e.g. [\"0.0.0.0:53\"]")?;
    check((1..=3600).contains(&config.ttl), "dns.ttl", "must be 1 to 3600 seconds")?;
    let mut name_servers = Vec::new();
    for (i, server) in config.name_servers.iter().enumerate() {
        let key = format!("dns.name_servers[{i}]");
        let server = name(key.clone(), server)?;
        check(!zone.zone_of(&server), key, "lies in the zone, where only relays have names; name it elsewhere")?;
        name_servers.push(server);
    }
    let why =
        "missing; write the names by which the zone is delegated to these controllers, e.g. [\"ns1.example.org\"]";
    check(!name_servers.is_empty(), "dns.name_servers", why)?;
    Ok(Some(DnsSettings { listen: config.listen, zone, name_servers, ttl: config.ttl, rate: config.rate }))
}

fn geo(path: &Path) -> Result<Arc<Geo>, ConfigError> {
    let geo = Geo::open(path).map_err(|error| ConfigError::new("geo", format!("{}: {error}", path.display())))?;
    Ok(Arc::new(geo))
}

fn networks(key: &str, written: &[String]) -> Result<Vec<Network>, ConfigError> {
    let each = written.iter().enumerate().map(|(i, text)| {
        network(text).ok_or_else(|| {
            ConfigError::new(format!("{key}[{i}]"), format!("{text:?} is not a network; write e.g. \"10.96.0.0/12\""))
        })
    });
    each.collect()
}

fn network(text: &str) -> Option<Network> {
    let (address, prefix) = text.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    let digits = prefix.bytes().all(|b| b.is_ascii_digit());
    let prefix = prefix.parse::<u8>().ok().filter(|prefix| digits && *prefix <= most)?;
    Some(Network { address, prefix })
}
