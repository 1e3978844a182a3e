//! `turn:` URIs (RFC 7065).

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use turn_core::Transport;

/// The registered port of TURN over UDP and TCP (RFC 8656 §6).
const TURN_PORT: u16 = 3478;

/// The registered port of TURN over TLS and DTLS (RFC 8656 §6).
const TURNS_PORT: u16 = 5349;

/// Where a TURN server is and how to talk to it, TLS and DTLS included.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct ServerUri {
    pub(crate) host: String,
    /// As written.
    explicit: Option<u16>,
    pub(crate) transport: Transport,
}

impl ServerUri {
    /// The port of its own transport.
    pub(crate) fn port(&self) -> u16 {
        self.port_for(self.transport)
    }

    /// The port as written, else the registered one of a transport.
    pub(crate) fn port_for(&self, transport: Transport) -> u16 {
        let secure = matches!(transport, Transport::Tls | Transport::Dtls);
        self.explicit.unwrap_or(if secure { TURNS_PORT } else { TURN_PORT })
    }
}

impl std::str::FromStr for ServerUri {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "write turn:HOST[:PORT][?transport=udp|tcp]".to_owned();
        let (scheme, rest) = text.split_once(':').ok_or_else(wrong)?;
        let secure = match scheme.to_ascii_lowercase().as_str() {
            "turn" => false,
            "turns" => true,
            _ => return Err(wrong()),
        };
        let (authority, query) =
            rest.split_once('?').map_or((rest, None), |(authority, query)| (authority, Some(query)));
        // RFC 7065 §3.2: turns without a transport is TLS over TCP.
        let transport = match (secure, query) {
            (false, None | Some("transport=udp")) => Transport::Udp,
            (false, Some("transport=tcp")) => Transport::Tcp,
            (true, None | Some("transport=tcp")) => Transport::Tls,
            (true, Some("transport=udp")) => Transport::Dtls,
            (_, Some(_)) => return Err(wrong()),
        };
        let (host, port) = match authority.strip_prefix('[') {
            Some(bracketed) => {
                let (host, port) = bracketed.split_once(']').ok_or_else(wrong)?;
                host.parse::<Ipv6Addr>().map_err(|_| wrong())?;
                let port = if port.is_empty() { None } else { Some(port.strip_prefix(':').ok_or_else(wrong)?) };
                (host, port)
            }
            None => authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port))),
        };
        let explicit = port.map(|port| port.parse().map_err(|_| wrong())).transpose()?;
        if host.is_empty() || host.contains(['/', '@', ' ']) || explicit == Some(0) {
            return Err(wrong());
        }
        Ok(Self { host: host.to_owned(), explicit, transport })
    }
}

/// Where a TURN server is and how to talk to it. Only plain UDP and TCP: the probe speaks no TLS.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct TurnUri {
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) transport: Transport,
}

impl std::str::FromStr for TurnUri {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let uri: ServerUri = text.parse()?;
        if matches!(uri.transport, Transport::Tls | Transport::Dtls) {
            return Err("turns: is not probed, only turn: over UDP and TCP".into());
        }
        Ok(Self { port: uri.port(), host: uri.host, transport: uri.transport })
    }
}

impl fmt::Display for TurnUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let transport = if self.transport == Transport::Tcp { "tcp" } else { "udp" };
        match self.host.parse() {
            Ok(IpAddr::V6(host)) => write!(f, "turn:[{host}]:{}?transport={transport}", self.port),
            _ => write!(f, "turn:{}:{}?transport={transport}", self.host, self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_read_as_rfc_7065_writes_them() {
        let cases = [
            ("turn:192.0.2.1", "turn:192.0.2.1:3478?transport=udp"),
            ("turn:example.org:5349?transport=tcp", "turn:example.org:5349?transport=tcp"),
            ("TURN:[2001:db8::1]", "turn:[2001:db8::1]:3478?transport=udp"),
            ("turn:[2001:db8::1]:99?transport=udp", "turn:[2001:db8::1]:99?transport=udp"),
        ];
        for (text, expected) in cases {
            assert_eq!(text.parse::<TurnUri>().map(|uri| uri.to_string()).as_deref(), Ok(expected), "{text}");
        }
        let wrong = [
            "",
            "turn",
            "turn:",
            "stun:a",
            "turns:a",
            "turn:a:0",
            "turn:a:70000",
            "turn:a:",
            "turn:a?transport=sctp",
            "turn:[::1",
            "turn:[x]",
            "turn:[::1]1",
            "turn://a",
            "turn:u@a",
        ];
        for text in wrong {
            assert!(text.parse::<TurnUri>().is_err(), "{text}");
        }
    }
}
