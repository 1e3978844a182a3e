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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustls::{ClientConfig, ClientConnection, RootCertStore};

    use super::*;
    use crate::certificates::CertificateFiles;

    const V1: &[u8] = b"PROXY TCP4 198.51.100.7 203.0.113.1 4321 443\r\n";

    fn rules() -> anyhow::Result<Rules> {
        let directory = tempfile::tempdir()?;
        let made = rcgen::generate_simple_self_signed(["turn.example.org".to_owned()])?;
        let files = CertificateFiles { certificate: directory.path().join("a"), key: directory.path().join("b") };
        std::fs::write(&files.certificate, made.cert.pem())?;
        std::fs::write(&files.key, made.signing_key.serialize_pem())?;
        let certificates = Certificates::load(&[files]).map_err(|(_, error)| error)?;
        let tls = TlsRules::new(Arc::new(certificates), None, true)?;
        Ok(Rules { trusted_proxies: vec![Network { address: [10, 0, 0, 0].into(), prefix: 8 }], tls: Some(tls) })
    }

    fn hello(name: &str) -> anyhow::Result<Vec<u8>> {
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let mut bytes = Vec::new();
        ClientConnection::new(Arc::new(config), name.to_owned().try_into()?)?.write_tls(&mut bytes)?;
        Ok(bytes)
    }

    /// What the bytes turn out to be, taken in pieces of at most these sizes; and whose they are then.
    fn found(rules: &Rules, source: [u8; 4], bytes: &[u8], sizes: &[usize]) -> (Found, SocketAddr, Vec<u8>) {
        let mut opening = Opening::default();
        let mut ends = (SocketAddr::from((source, 1)), SocketAddr::from(([192, 0, 2, 1], 443)));
        let (mut rest, mut sizes) = (bytes, sizes.iter().cycle());
        while !rest.is_empty() {
            let (piece, more) = rest.split_at((*sizes.next().unwrap_or(&1)).clamp(1, rest.len()));
            rest = more;
            let found = opening.take(piece, rules, source.into(), &mut ends);
            if found != Found::Unknown {
                return (found, ends.0, [opening.into_bytes(), rest.to_vec()].concat());
            }
        }
        (Found::Unknown, ends.0, opening.into_bytes())
    }

    /// Whatever is found, no byte of it is lost, and how it was cut makes no difference.
    #[test]
    fn first_bytes_say_what_a_connection_is() -> anyhow::Result<()> {
        let rules = rules()?;
        let (ours, theirs) = (hello("turn.example.org")?, hello("www.example.org")?);
        let (stun, channel) = (&b"\x00\x01\x00\x00\x21\x12\xa4\x42"[..], &b"\x40\x00\x00\x04"[..]);
        let rows: [(&str, &[u8], Found); 7] = [
            ("STUN", stun, Found::Plain),
            ("ChannelData", channel, Found::Plain),
            ("our host", &ours, Found::Tls),
            ("another host", &theirs, Found::Web),
            ("SSH", b"SSH-2.0-x", Found::Nonsense),
            ("half a hello", &ours[..ours.len() - 1], Found::Unknown),
            ("TLS that is no hello", b"\x16\x03\x03\x00\x04\x02\x00\x00\x00", Found::Tls),
        ];
        for (what, bytes, expected) in rows {
            for sizes in [&[usize::MAX][..], &[1], &[7, 1, 100]] {
                let (found, _, kept) = found(&rules, [192, 0, 2, 9], bytes, sizes);
                assert_eq!((&found, &kept[..]), (&expected, bytes), "{what} in pieces of {sizes:?}");
                let proxied = [V1, bytes].concat();
                let (found, client, kept) = self::found(&rules, [10, 1, 2, 3], &proxied, sizes);
                assert_eq!((&found, &kept[..]), (&expected, bytes), "{what} behind a proxy");
                assert_eq!(client.to_string(), "198.51.100.7:4321", "{what}");
                let (found, _, _) = self::found(&rules, [192, 0, 2, 9], &proxied, sizes);
                assert_eq!(found, Found::Nonsense, "a header of anybody");
            }
        }
        Ok(())
    }

    #[test]
    fn any_bytes_in_any_pieces_are_survived() -> anyhow::Result<()> {
        let rules = rules()?;
        let starts = [vec![], V1.to_vec(), b"\r\n\r\n\0\r\nQUIT\n".to_vec(), hello("a.example.org")?, vec![0x16, 3, 1]];
        let any_bytes = proptest::collection::vec(any::<u8>(), 0..400);
        let sizes = proptest::collection::vec(1..200usize, 1..5);
        proptest!(|(start in 0..starts.len(), cut in 0..600usize, more in any_bytes, sizes in sizes, trusted: bool)| {
            let start = &starts[start];
            let bytes = [&start[..start.len().min(cut)], &more].concat();
            let source = if trusted { [10, 0, 0, 1] } else { [192, 0, 2, 9] };
            let whole = found(&rules, source, &bytes, &[usize::MAX]);
            let pieces = found(&rules, source, &bytes, &sizes);
            if whole.0 != Found::Unknown {
                prop_assert_eq!(whole.0, pieces.0);
                prop_assert_eq!(whole.1, pieces.1);
            }
        });
        Ok(())
    }

    #[test]
    fn an_opening_without_end_ends() -> anyhow::Result<()> {
        let rules = rules()?;
        let endless = [&b"\x16\x03\x01\x40\x00\x01\x00\xff\xff"[..], &[0; 40_000]].concat();
        let mut opening = Opening::default();
        let mut ends = (SocketAddr::from(([192, 0, 2, 9], 1)), SocketAddr::from(([192, 0, 2, 1], 443)));
        let mut rest = &endless[..];
        loop {
            let (piece, more) = rest.split_at(opening.room().min(1000));
            anyhow::ensure!(!piece.is_empty(), "no room, and no word");
            rest = more;
            match opening.take(piece, &rules, ends.0.ip(), &mut ends) {
                Found::Unknown => {}
                found => {
                    // Refused by us, or by the TLS that reads it next.
                    assert!(matches!(found, Found::Nonsense | Found::Tls), "{found:?}");
                    return Ok(());
                }
            }
        }
    }
}
