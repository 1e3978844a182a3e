//! What the findings mean, in words: pure.

use serde::Serialize;

use super::{Filtering, Findings, Mapping, Reach};

/// The kind of network, by the names that people know (RFC 3489 §5).
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    Open,
    Firewall,
    FullCone,
    AddressRestricted,
    PortRestricted,
    Symmetric,
    /// A NAT with steady ports; who may send in is not known.
    Cone,
    UdpBlocked,
    /// UDP passes; nothing more could be told.
    Unknown,
}

/// The kind of network.
pub(crate) fn kind(findings: &Findings) -> Kind {
    let Some(udp) = &findings.udp else { return Kind::UdpBlocked };
    match (udp.mapping, udp.filtering) {
        (Some(Mapping::None), Some(Filtering::EndpointIndependent) | None) => Kind::Open,
        (Some(Mapping::None), Some(_)) => Kind::Firewall,
        (Some(Mapping::EndpointIndependent), Some(Filtering::EndpointIndependent)) => Kind::FullCone,
        (Some(Mapping::EndpointIndependent), Some(Filtering::AddressDependent)) => Kind::AddressRestricted,
        (Some(Mapping::EndpointIndependent), Some(Filtering::AddressAndPortDependent)) => Kind::PortRestricted,
        (Some(Mapping::EndpointIndependent), None) => Kind::Cone,
        (Some(Mapping::AddressDependent | Mapping::AddressAndPortDependent | Mapping::Dependent), _) => Kind::Symmetric,
        (None, _) => Kind::Unknown,
    }
}

impl Kind {
    /// One line that says what it is.
    pub(crate) fn headline(self) -> &'static str {
        match self {
            Self::Open => "no NAT: packets from anybody reach this machine",
            Self::Firewall => "no NAT, but a firewall that lets only answers in",
            Self::FullCone => "a NAT that lets anybody in where somebody went out (full cone)",
            Self::AddressRestricted => "a NAT that lets in whom this machine wrote to (address-restricted cone)",
            Self::PortRestricted => "a NAT that lets in answers only, as most home routers (port-restricted cone)",
            Self::Symmetric => "a NAT that gives every destination another port (symmetric)",
            Self::Cone => "a NAT with one outside port for all destinations; whom it lets in could not be told",
            Self::UdpBlocked => "UDP does not pass",
            Self::Unknown => "UDP passes behind a NAT; its kind could not be told",
        }
    }
}

/// What it means for calls, and what can be done: sentences for people.
pub(crate) fn advice(findings: &Findings) -> Vec<String> {
    let kind = kind(findings);
    let mut sentences: Vec<String> = Vec::new();
    sentences.push(match kind {
        Kind::Open | Kind::FullCone => "Direct calls work with nearly everybody; a relay is seldom needed.".into(),
        Kind::Firewall | Kind::AddressRestricted | Kind::PortRestricted | Kind::Cone => {
            "Direct calls work unless the other side has a symmetric NAT or no UDP; then a relay carries them.".into()
        }
        Kind::Symmetric => "Direct calls work only with open networks: most calls from here need a relay.".into(),
        Kind::UdpBlocked if findings.streams.iter().any(|reach| reach.works) => {
            "Every call goes by TCP or TLS through a relay: it works, with more delay when packets are lost.".into()
        }
        Kind::UdpBlocked if findings.streams.is_empty() => {
            "TCP and TLS were not tried: name a turn:...?transport=tcp or turns: server.".into()
        }
        Kind::UdpBlocked if findings.streams.iter().any(Reach::passes) => {
            "TLS gets through, but clients refuse the certificate: as it is, no call is possible from here.".into()
        }
        Kind::UdpBlocked => "Nor do TCP and TLS to these servers: from here no call is possible.".into(),
        Kind::Unknown => {
            "A server with a second address (the relay's nat_discovery), or two servers, would tell.".into()
        }
    });
    if only_443(findings) {
        sentences.push("Only port 443 passes: relays need a TLS or TCP listener there.".into());
    }
    let mut issuers = Vec::new();
    for (reach, untrusted) in findings.streams.iter().filter_map(|reach| Some((reach, reach.untrusted.as_ref()?))) {
        if issuers.contains(&&untrusted.issuer) {
            continue;
        }
        issuers.push(&untrusted.issuer);
        sentences.push(format!(
            "The certificate that {} shows was issued by {} and is not trusted ({}). If that is the authority of your \
             relays, name its file with --tls-ca; if nobody of yours, something on the way opens TLS, and calls by TLS \
             do not pass.",
            reach.server, untrusted.issuer, untrusted.reason
        ));
    }
    if findings.udp.as_ref().is_some_and(|udp| udp.hairpin == Some(false)) {
        sentences.push(
            "Two machines behind this NAT do not reach each other by their outside addresses; they do by their inside ones."
                .into(),
        );
    }
    sentences
}

/// Whether nothing but port 443 got through although other ports were tried.
pub(crate) fn only_443(findings: &Findings) -> bool {
    let (on_443, elsewhere): (Vec<&Reach>, Vec<&Reach>) = findings.streams.iter().partition(|reach| reach.port == 443);
    let passes = |list: &[&Reach]| list.iter().any(|reach| reach.passes());
    findings.udp.is_none() && passes(&on_443) && !elsewhere.is_empty() && !passes(&elsewhere)
}

#[cfg(test)]
mod tests {
    use super::super::{Udp, Untrusted};
    use super::*;

    fn found(mapping: Option<Mapping>, filtering: Option<Filtering>) -> Findings {
        let address = "192.0.2.1:5000".parse().expect("literal");
        let udp =
            Udp { server: "s".into(), local: address, mapped: address, rtt_ms: 1.0, mapping, filtering, hairpin: None };
        Findings { udp: Some(udp), streams: Vec::new() }
    }

    #[test]
    fn the_classic_kinds_have_their_names() {
        use Filtering as F;
        use Mapping as M;
        let cases = [
            (Some(M::None), Some(F::EndpointIndependent), Kind::Open),
            (Some(M::None), Some(F::AddressAndPortDependent), Kind::Firewall),
            (Some(M::EndpointIndependent), Some(F::EndpointIndependent), Kind::FullCone),
            (Some(M::EndpointIndependent), Some(F::AddressDependent), Kind::AddressRestricted),
            (Some(M::EndpointIndependent), Some(F::AddressAndPortDependent), Kind::PortRestricted),
            (Some(M::AddressDependent), Some(F::AddressDependent), Kind::Symmetric),
            (Some(M::AddressAndPortDependent), Some(F::AddressAndPortDependent), Kind::Symmetric),
            (Some(M::Dependent), None, Kind::Symmetric),
            (Some(M::EndpointIndependent), None, Kind::Cone),
            (None, None, Kind::Unknown),
        ];
        for (mapping, filtering, expected) in cases {
            assert_eq!(kind(&found(mapping, filtering)), expected, "{mapping:?} {filtering:?}");
        }
        assert_eq!(kind(&Findings::default()), Kind::UdpBlocked);
    }

    #[test]
    fn what_passes_is_said() {
        let reach = |port, works| Reach {
            server: "s".into(),
            transport: "tcp",
            port,
            works,
            problem: String::new(),
            untrusted: None,
        };
        let untrusted = |issuer: &str| Reach {
            untrusted: Some(Untrusted { issuer: format!("{issuer:?}"), reason: "unknown".into() }),
            ..reach(443, false)
        };
        let cases: &[(&str, &[Reach], &[&str])] = &[
            ("nothing tried", &[], &["TCP and TLS were not tried"]),
            ("nothing", &[reach(3478, false), reach(443, false)], &["no call is possible"]),
            ("all", &[reach(3478, true), reach(443, true)], &["by TCP or TLS through a relay"]),
            (
                "443",
                &[reach(3478, false), reach(443, true)],
                &["by TCP or TLS through a relay", "Only port 443 passes"],
            ),
            (
                "somebody else's certificate, twice",
                &[untrusted("Office proxy"), untrusted("Office proxy"), reach(3478, true)],
                &["by TCP or TLS through a relay", "issued by \"Office proxy\" and is not trusted (unknown)"],
            ),
            (
                "nothing but that",
                &[untrusted("Office proxy"), reach(3478, false)],
                &["clients refuse the certificate", "Only port 443 passes", "issued by \"Office proxy\""],
            ),
        ];
        for (what, streams, expected) in cases {
            let sentences = advice(&Findings { udp: None, streams: streams.to_vec() });
            assert_eq!(sentences.len(), expected.len(), "{what}: {sentences:?}");
            for (sentence, part) in sentences.iter().zip(*expected) {
                assert!(sentence.contains(part), "{what}: {sentence}");
            }
        }
    }
}
