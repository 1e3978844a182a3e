//! TLS and DTLS, and what stands before it: certificates, PROXY headers, the web server behind the same port.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use turn_core::Transport;
use turn_core::policy::Network;

use super::check::parse_network;
use super::{Config, ConfigError};
use crate::certificates::{CertificateFiles, Certificates};
use crate::dataplane::{DtlsLimits, Listen, StreamConfig, WebServer};

/// One certificate for clients, as it is written.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct WrittenCertificate {
    /// PEM file: the certificate first, then its chain.
    pub certificate: PathBuf,
    /// PEM file: its key.
    pub key: PathBuf,
}

impl WrittenCertificate {
    /// Reads `CERTIFICATE:KEY`.
    pub(super) fn parse(text: &str) -> Result<Self, ConfigError> {
        match text.split_once(':') {
            Some((certificate, key)) if !certificate.is_empty() && !key.is_empty() => {
                Ok(Self { certificate: certificate.into(), key: key.into() })
            }
            _ => Err(ConfigError::new("certificates", format!("{text:?} is not CERTIFICATE-FILE:KEY-FILE"))),
        }
    }

    /// Relative paths start at the file's directory.
    pub(super) fn start_at(&mut self, directory: &Path) {
        for path in [&mut self.certificate, &mut self.key] {
            *path = directory.join(&*path);
        }
    }
}

/// The checked form.
#[derive(Clone, Debug)]
pub struct Streams {
    /// What TLS and DTLS are served with, the default first; none is neither.
    pub certificates: Option<Arc<Certificates>>,
    /// Files of the certificates.
    pub files: Vec<CertificateFiles>,
    /// Host name in `turns:` URIs.
    pub public_host: Option<String>,
    /// Sources whose PROXY headers are believed.
    pub trusted_proxies: Vec<Network>,
    /// Where TLS connections for other hosts and protocols go.
    pub web_server: Option<SocketAddr>,
    /// Whether the web server is told by PROXY headers who its clients are.
    pub web_server_proxy_protocol: bool,
    /// Connections to the web server.
    pub web_connections: usize,
    /// Half-open connections per worker.
    pub handshakes: usize,
    /// How long a connection may be half-open.
    pub handshake_time: Duration,
    /// Connections without an allocation of one source prefix; 0 for no limit.
    pub connections_per_prefix: u32,
    /// DTLS sessions per worker.
    pub dtls_sessions: usize,
}

impl Streams {
    /// What the data plane is started with; the web server is to be added.
    pub(super) fn dataplane(&self) -> StreamConfig {
        StreamConfig {
            certificates: self.certificates.clone(),
            public_host: self.public_host.clone(),
            trusted_proxies: self.trusted_proxies.clone(),
            web_server: None,
            handshakes: self.handshakes,
            handshake_time: self.handshake_time,
            connections_per_prefix: self.connections_per_prefix,
        }
    }

    /// How many DTLS sessions there are.
    pub(super) fn dtls_limits(&self) -> DtlsLimits {
        DtlsLimits {
            sessions: self.dtls_sessions,
            handshakes: self.handshakes,
            handshake_time: self.handshake_time,
            ..DtlsLimits::default()
        }
    }

    /// The web server, its connections carried by `runtime`.
    pub fn web_server(&self, runtime: tokio::runtime::Handle) -> Option<WebServer> {
        let address = self.web_server?;
        Some(WebServer::new(address, self.web_server_proxy_protocol, self.web_connections, runtime))
    }

    /// Whether clients that know nothing but this IP can trust this relay: they name no host, and meet the default
    /// certificate.
    pub fn certificate_names(&self, ip: IpAddr) -> bool {
        let certificates = self.certificates.as_ref().map(|certificates| certificates.current());
        certificates.is_some_and(|loaded| loaded.pairs().first().is_some_and(|pair| pair.names(&ip.to_string())))
    }

    /// Reads the certificates.
    pub(super) fn load_certificates(&mut self) -> Result<(), ConfigError> {
        if !self.files.is_empty() {
            let certificates = Certificates::load(&self.files)
                .map_err(|(index, error)| ConfigError::new(format!("certificates[{index}]"), error.to_string()))?;
            self.certificates = Some(Arc::new(certificates));
        }
        Ok(())
    }
}

impl Config {
    /// Checks what concerns streams before they are TURN.
    pub(super) fn streams(&self, listen: &[Listen]) -> Result<Streams, ConfigError> {
        let files: Vec<CertificateFiles> = self
            .certificates
            .iter()
            .map(|written| CertificateFiles { certificate: written.certificate.clone(), key: written.key.clone() })
            .collect();
        let encrypted = listen.iter().find(|listen| matches!(listen.transport, Transport::Tls | Transport::Dtls));
        if let (true, Some(listen)) = (files.is_empty(), encrypted) {
            let scheme = if listen.transport == Transport::Tls { "tls" } else { "dtls" };
            let problem = format!(
                "missing, and listen names {scheme}://{}; write \
                 certificates = [{{ certificate = \"fullchain.pem\", key = \"key.pem\" }}]",
                listen.bind
            );
            return Err(ConfigError::new("certificates", problem));
        }
        let limits = &self.limits;
        if limits.handshakes == 0 {
            let problem = "0 would let no client in; 1024 is the default";
            return Err(ConfigError::new("limits.handshakes", problem));
        }
        if !(1..=300).contains(&limits.handshake_seconds) {
            let problem = format!("{} is not in 1..=300", limits.handshake_seconds);
            return Err(ConfigError::new("limits.handshake_seconds", problem));
        }
        if !(1..=1 << 24).contains(&limits.dtls_sessions) {
            let problem = format!("{} is not in 1..={}", limits.dtls_sessions, 1 << 24);
            return Err(ConfigError::new("limits.dtls_sessions", problem));
        }
        let web_server = self.checked_web_server(listen)?;
        if web_server.is_some() && files.is_empty() {
            let problem = "needs certificates: without any, no TLS is read, and none can be passed on";
            return Err(ConfigError::new("web_server", problem));
        }
        Ok(Streams {
            certificates: None,
            files,
            public_host: public_host(&self.public_host)?,
            trusted_proxies: self.trusted_proxies.iter().map(|text| proxy(text)).collect::<Result<_, _>>()?,
            web_server,
            web_server_proxy_protocol: self.web_server_proxy_protocol,
            web_connections: limits.web_connections as usize,
            handshakes: limits.handshakes as usize,
            handshake_time: Duration::from_secs(limits.handshake_seconds.into()),
            connections_per_prefix: limits.connections_per_prefix,
            dtls_sessions: limits.dtls_sessions as usize,
        })
    }

    fn checked_web_server(&self, listen: &[Listen]) -> Result<Option<SocketAddr>, ConfigError> {
        if self.web_server.is_empty() {
            return Ok(None);
        }
        let wrong = |problem| ConfigError::new("web_server", problem);
        let address: SocketAddr = self
            .web_server
            .parse()
            .map_err(|_| wrong(format!("{:?} is not IP:PORT; write it as 127.0.0.1:8443", self.web_server)))?;
        let is_ours = |listen: &Listen| {
            let served = listen.bind.ip() == address.ip()
                || listen.bind.ip().is_unspecified() && (address.ip().is_loopback() || address.ip().is_unspecified());
            listen.transport.is_stream() && listen.bind.port() == address.port() && served
        };
        if listen.iter().any(is_ours) {
            return Err(wrong(format!("{address} is this relay itself; name the server behind it")));
        }
        Ok(Some(address))
    }
}

/// A host name: what a certificate and a URI can hold.
fn public_host(text: &str) -> Result<Option<String>, ConfigError> {
    if text.is_empty() {
        return Ok(None);
    }
    let label = |label: &str| {
        let is_good = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        !label.is_empty() && label.len() <= 63 && label.chars().all(is_good)
    };
    if text.len() > 253 || !text.split('.').all(label) || text.parse::<IpAddr>().is_ok() {
        let problem =
            format!("{text:?} is not a host name; write it as eu-1.turn.example.org, without scheme and port");
        return Err(ConfigError::new("public_host", problem));
    }
    Ok(Some(text.to_ascii_lowercase()))
}

fn proxy(text: &str) -> Result<Network, ConfigError> {
    let network = parse_network(text).or_else(|| {
        let address: IpAddr = text.parse().ok()?;
        Some(Network { address, prefix: if address.is_ipv4() { 32 } else { 128 } })
    });
    let problem = || format!("{text:?} is neither a network nor an address; write it as 10.0.0.0/8");
    network.ok_or_else(|| ConfigError::new("trusted_proxies", problem()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(text: &str) -> Result<Streams, String> {
        let listen = [
            Listen { transport: Transport::Tcp, bind: "0.0.0.0:3478".parse().expect("literal") },
            Listen { transport: Transport::Tls, bind: "192.0.2.1:443".parse().expect("literal") },
        ];
        Config::parse(text).and_then(|config| config.streams(&listen)).map_err(|error| error.to_string())
    }

    #[test]
    fn mistakes_name_their_key() {
        let with = "certificates = [{ certificate = \"a\", key = \"b\" }]\n";
        let cases = [
            ("", "certificates: missing, and listen names tls://192.0.2.1:443; "),
            ("certificates = [{ certificate = \"a\" }]", "certificates[0]: missing field `key`"),
            ("public_host = \"turns:a\"", "public_host: \"turns:a\" is not a host name"),
            ("public_host = \"192.0.2.1\"", "public_host: \"192.0.2.1\" is not a host name"),
            ("trusted_proxies = [\"10.0.0.0/40\"]", "trusted_proxies: \"10.0.0.0/40\" is neither"),
            ("web_server = \"localhost:80\"", "web_server: \"localhost:80\" is not IP:PORT"),
            ("web_server = \"192.0.2.1:443\"", "web_server: 192.0.2.1:443 is this relay itself"),
            ("web_server = \"127.0.0.1:3478\"", "web_server: 127.0.0.1:3478 is this relay itself"),
            ("[limits]\nhandshakes = 0", "limits.handshakes: 0 would let no client in"),
            ("[limits]\ndtls_sessions = 0", "limits.dtls_sessions: 0 is not in 1..=16777216"),
            ("[limits]\nhandshake_seconds = 301", "limits.handshake_seconds: 301 is not in 1..=300"),
        ];
        for (text, expected) in cases {
            let text = if text.contains("certificates") || text.is_empty() {
                text.to_owned()
            } else {
                format!("{with}{text}")
            };
            let error = checked(&text).expect_err(expected);
            assert!(error.starts_with(expected), "{error}");
        }
        let listen = [Listen { transport: Transport::Tcp, bind: "0.0.0.0:3478".parse().expect("literal") }];
        let config = Config::parse("web_server = \"127.0.0.1:8443\"").expect("good");
        assert!(config.streams(&listen).expect_err("no TLS").to_string().starts_with("web_server: needs certificates"));
    }

    #[test]
    fn what_is_written_is_what_holds() {
        let text = "certificates = [{ certificate = \"a\", key = \"b\" }]\npublic_host = \"EU-1.example.org\"\n\
                    trusted_proxies = [\"10.0.0.0/8\", \"::1\"]\nweb_server = \"127.0.0.1:8443\"\n\
                    [limits]\nhandshakes = 7\nhandshake_seconds = 3\nconnections_per_prefix = 5\nweb_connections = 9";
        let streams = checked(text).expect("good");
        assert_eq!(streams.public_host.as_deref(), Some("eu-1.example.org"));
        assert_eq!(streams.trusted_proxies.iter().map(|n| n.prefix).collect::<Vec<_>>(), [8, 128]);
        assert_eq!(streams.handshake_time, Duration::from_secs(3));
        let numbers = (streams.handshakes, streams.connections_per_prefix, streams.web_connections);
        assert_eq!(numbers, (7, 5, 9));
    }
}
