//! Configuration: `Config` as it is written (file, environment, flags), [`Settings`] as it was checked.

mod layers;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use tracing_subscriber::EnvFilter;

pub use self::layers::{command, load};
use crate::fleet::Thresholds;
use crate::identity::is_name;
use crate::steering::{Distances, Terms};

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
    credential_ttl: u32,
    cors_origins: Vec<String>,
    distances: Vec<Distance>,
    user_quota: u32,
    denied_peers: Vec<String>,
    lease: u32,
    overload: OverloadConfig,
    log: String,
    log_format: LogFormat,
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
            credential_ttl: 86_400,
            cors_origins: vec!["*".to_owned()],
            distances: Vec::new(),
            user_quota: 0,
            denied_peers: Vec::new(),
            lease: 5,
            overload: OverloadConfig::default(),
            log: "info".to_owned(),
            log_format: LogFormat::Text,
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

/// A user with a fixed password.
#[derive(Clone, Deserialize, Eq, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct StaticUser {
    /// 1 to 508 bytes.
    pub username: String,
    /// Not empty.
    pub password: String,
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
    /// Life of a credential where none is asked for.
    pub credential_ttl: Duration,
    /// Origins whose pages may ask; `*` is all.
    pub cors_origins: Vec<String>,
    /// Home region, distances and thresholds.
    pub terms: Terms,
    /// Allocations one user may hold on one relay; 0 is no limit.
    pub user_quota: u32,
    /// Peer networks denied beyond the built-in list, CIDR.
    pub denied_peers: Vec<String>,
    /// Life of a node's lease.
    pub lease: Duration,
    /// Filter directives of the log.
    pub log: String,
    /// How log lines look.
    pub log_format: LogFormat,
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
        for (i, network) in config.denied_peers.iter().enumerate() {
            check(
                is_network(network),
                format!("denied_peers[{i}]"),
                format!("{network:?} is not a network; write e.g. \"10.96.0.0/12\""),
            )?;
        }
        if let Err(error) = EnvFilter::try_new(&config.log) {
            return Err(ConfigError::new("log", format!("{error}; write e.g. \"info\" or \"info,controller=debug\"")));
        }
        Ok(Self {
            id: name("id", "a name for this replica, e.g. \"controller-1\"", config.id.clone())?,
            terms: terms(&config)?,
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
            credential_ttl: Duration::from_secs(u64::from(config.credential_ttl)),
            cors_origins: config.cors_origins,
            user_quota: config.user_quota,
            denied_peers: config.denied_peers,
            lease: Duration::from_secs(u64::from(config.lease)),
            log: config.log,
            log_format: config.log_format,
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
    Ok(Terms { home, distances, thresholds: Thresholds { cpu_permille, allocations_percent } })
}

fn is_network(text: &str) -> bool {
    let Some((address, prefix)) = text.split_once('/') else {
        return false;
    };
    let most = match address.parse::<IpAddr>() {
        Ok(IpAddr::V4(_)) => 32,
        Ok(IpAddr::V6(_)) => 128,
        Err(_) => return false,
    };
    prefix.bytes().all(|b| b.is_ascii_digit()) && prefix.parse::<u8>().is_ok_and(|prefix| prefix <= most)
}
