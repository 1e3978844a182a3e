//! The first bytes of a connection: they say what it is (RFC 8656 §12 for STUN and ChannelData, RFC 8446 §5.1 for TLS).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::server::Acceptor;
use turn_core::policy::Network;
use turn_core::wire::{Kind, kind};

use super::proxy::{self, Proxied};
use crate::certificates::Certificates;

/// First byte of a TLS record with a handshake message.
const TLS_HANDSHAKE: u8 = 0x16;
/// Bytes of a PROXY header and a ClientHello at most; a ClientHello with post-quantum keys has some 2,000.
pub(super) const LONGEST_OPENING: usize = 16 << 10;
/// Application protocols of ours (RFC 7443 §3).
pub(super) const ALPN: [&[u8]; 2] = [b"stun.turn", b"stun.nat-discovery"];

/// What is fixed for all connections.
pub(super) struct Rules {
    /// Who may say by a PROXY header whom it speaks for.
    pub(super) trusted_proxies: Vec<Network>,
    /// TLS, if there are certificates.
    pub(super) tls: Option<TlsRules>,
}

/// How TLS is served.
pub(super) struct TlsRules {
    pub(super) config: Arc<ServerConfig>,
    pub(super) certificates: Arc<Certificates>,
    /// A name of ours that need not be in a certificate.
    pub(super) public_host: Option<String>,
    /// Whether there is a web server for the ClientHellos that are not for us.
    pub(super) has_web_server: bool,
}

/// What a connection turns out to be.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Found {
    /// More bytes are needed to tell.
    Unknown,
    /// STUN and ChannelData as they are.
    Plain,
    /// TLS for us.
    Tls,
    /// TLS for the web server.
    Web,
    /// Begins as a PROXY header and is none.
    BadProxyHeader,
    /// None of these.
    Nonsense,
}

/// The bytes so far of a connection that has not shown what it is.
#[derive(Default)]
pub(super) struct Opening {
    /// What follows a PROXY header.
    bytes: Vec<u8>,
    /// A PROXY header has been read; there is only one.
    proxied: bool,
    /// Reads the ClientHello, and how many of `bytes` it has got.
    hello: Option<(Box<Acceptor>, usize)>,
}

impl Opening {
    /// How many bytes may follow.
    pub(super) fn room(&self) -> usize {
        LONGEST_OPENING.saturating_sub(self.bytes.len())
    }

    /// Takes more bytes. `ends` are client and server address, to be replaced where a trusted proxy says so.
    pub(super) fn take(
        &mut self,
        more: &[u8],
        rules: &Rules,
        source: IpAddr,
        ends: &mut (SocketAddr, SocketAddr),
    ) -> Found {
        self.bytes.extend_from_slice(more);
        if !self.proxied && rules.trusts(source) {
            match proxy::header(&self.bytes) {
                Proxied::No => {}
                Proxied::Partial => return Found::Unknown,
                Proxied::Malformed => return Found::BadProxyHeader,
                Proxied::Header { length, ends: said } => {
                    self.proxied = true;
                    self.bytes.drain(..length);
                    *ends = said.unwrap_or(*ends);
                }
            }
        }
        let Some(first) = self.bytes.first() else {
            return Found::Unknown;
        };
        match (kind(&self.bytes), &rules.tls) {
            (Kind::Stun | Kind::ChannelData, _) => Found::Plain,
            (_, Some(tls)) if *first == TLS_HANDSHAKE => {
                if tls.has_web_server {
                    self.whose(tls)
                } else {
                    Found::Tls
                }
            }
            _ => Found::Nonsense,
        }
    }

    /// Whether an address was said by a PROXY header.
    pub(super) fn is_proxied(&self) -> bool {
        self.proxied
    }

    /// The bytes that were read and belong to what the connection is.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Reads the ClientHello as far as it is there.
    fn whose(&mut self, tls: &TlsRules) -> Found {
        let (acceptor, fed) = self.hello.get_or_insert_with(|| (Box::default(), 0));
        while *fed < self.bytes.len() {
            match acceptor.read_tls(&mut &self.bytes[*fed..]) {
                Ok(0) => break,
                Ok(read) => *fed += read,
                // It takes no more before it has looked: a message that long is no ClientHello.
                Err(_) => return Found::Tls,
            }
            match acceptor.accept() {
                Ok(None) => {}
                Ok(Some(accepted)) => {
                    let hello = accepted.client_hello();
                    return if tls.is_foreign(hello.server_name(), hello.alpn()) { Found::Web } else { Found::Tls };
                }
                // Our own TLS finds the same and says so to the client.
                Err(_) => return Found::Tls,
            }
        }
        if self.room() == 0 { Found::Nonsense } else { Found::Unknown }
    }
}

impl Rules {
    /// Whether PROXY headers of this source are believed.
    pub(super) fn trusts(&self, source: IpAddr) -> bool {
        let source = source.to_canonical();
        self.trusted_proxies.iter().any(|network| network.contains(source))
    }
}

impl TlsRules {
    /// TLS 1.3 and 1.2 with these certificates. Clients may resume sessions by tickets (RFC 8446 §2.2), which cost no
    /// memory here.
    ///
    /// # Errors
    /// The system has no randomness.
    pub(super) fn new(
        certificates: Arc<Certificates>,
        public_host: Option<String>,
        has_web_server: bool,
    ) -> Result<Self, rustls::Error> {
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&certificates) as _);
        config.alpn_protocols = ALPN.map(<[u8]>::to_vec).to_vec();
        config.ticketer = ring::Ticketer::new()?;
        config.send_tls13_tickets = 1;
        Ok(Self { config: Arc::new(config), certificates, public_host, has_web_server })
    }

    /// Whether a client asks for a host or for protocols that are not ours. One that names neither is ours.
    fn is_foreign<'a>(&self, name: Option<&str>, protocols: Option<impl Iterator<Item = &'a [u8]>>) -> bool {
        let ours = |name: &str| {
            self.public_host.as_deref().is_some_and(|host| host.eq_ignore_ascii_case(name))
                || self.certificates.current().find(name).is_some()
        };
        name.is_some_and(|name| !ours(name))
            || protocols.is_some_and(|mut protocols| !protocols.any(|protocol| ALPN.contains(&protocol)))
    }
}
