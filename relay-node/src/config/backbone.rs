//! The table `[backbone]` and the key `peers`: how this relay reaches other members.

use std::net::{IpAddr, SocketAddr};

use serde::Deserialize;
use turn_core::policy::Network;
use turn_core::{Family, Transport};

use super::{ConfigError, parse_network};
use crate::dataplane::{Listen, RelayIp};

/// UDP port of the backbone; 3479 beside it is the usual alternate port of RFC 5780.
pub const PORT: u16 = 3480;
/// Most addresses that are advertised.
const MANY: usize = 8;
/// Most bits a second that `capacity_mbit` may say: a terabit.
const FASTEST: u32 = 1_000_000;

/// QUIC links to the other relays of the cluster, as written. The table may be empty; without it there are none.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct WrittenBackbone {
    /// UDP addresses the links use, `IP:PORT`, one of each family at most; empty is port 3480 of the relay IPs.
    pub listen: Vec<String>,
    /// Where other members reach it, `IP:PORT`, best first; empty is what `listen` is known as outside.
    pub advertise: Vec<String>,
    /// Networks that are private lines: their links have a window of their own instead of Cubic, CIDR. Empty is none.
    pub private_networks: Vec<String>,
    /// What a link over a private line may use, Mbit/s, at most 1000000; 0 is measured.
    pub capacity_mbit: u32,
}

/// The checked form.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BackboneSettings {
    /// UDP addresses, at most one of each family.
    pub listen: Vec<SocketAddr>,
    /// Where other members reach it, at least one, best first.
    pub advertised: Vec<SocketAddr>,
    /// Private lines.
    pub private_networks: Vec<Network>,
    /// Bits a second that a private link may use, if that is known.
    pub capacity: Option<u64>,
}

impl WrittenBackbone {
    pub(super) fn check(
        &self,
        listen: &[Listen],
        relay_ips: &[RelayIp],
        relay_ports: (u16, u16),
    ) -> Result<BackboneSettings, ConfigError> {
        let bound = self.bound(listen, relay_ips, relay_ports)?;
        let networks = self.private_networks.iter().map(|text| {
            let problem = || format!("{text:?} is not a network; write it as 10.0.0.0/8");
            parse_network(text).ok_or_else(|| wrong("private_networks", problem()))
        });
        if self.capacity_mbit > FASTEST {
            let problem = format!("{} is more than {FASTEST}; it is in Mbit/s, 0 is measured", self.capacity_mbit);
            return Err(wrong("capacity_mbit", problem));
        }
        Ok(BackboneSettings {
            advertised: self.advertised(&bound, relay_ips)?,
            listen: bound,
            private_networks: networks.collect::<Result<_, _>>()?,
            capacity: Some(u64::from(self.capacity_mbit) * 1_000_000).filter(|bits| *bits > 0),
        })
    }

    fn bound(
        &self,
        listen: &[Listen],
        relay_ips: &[RelayIp],
        (low, high): (u16, u16),
    ) -> Result<Vec<SocketAddr>, ConfigError> {
        let mut bound: Vec<SocketAddr> = Vec::new();
        for text in &self.listen {
            bound.push(address("listen", text)?);
        }
        if bound.is_empty() {
            bound.extend(relay_ips.iter().map(|ip| SocketAddr::new(ip.bound, PORT)));
        }
        for (index, own) in bound.iter().enumerate() {
            if bound[..index].iter().any(|other| Family::of(other.ip()) == Family::of(own.ip())) {
                return Err(wrong("listen", format!("{own} is a second address of its family; leave one of them out")));
            }
            let same_ip = |ip: IpAddr| {
                ip == own.ip()
                    || Family::of(ip) == Family::of(own.ip()) && (ip.is_unspecified() || own.ip().is_unspecified())
            };
            let is_datagram = |transport| matches!(transport, Transport::Udp | Transport::Dtls);
            let served = |other: &&Listen| {
                is_datagram(other.transport) && other.bind.port() == own.port() && same_ip(other.bind.ip())
            };
            if let Some(other) = listen.iter().find(served) {
                return Err(wrong(
                    "listen",
                    format!("{own} is served to clients by {}; take another port", other.bind),
                ));
            }
            if (low..=high).contains(&own.port()) && relay_ips.iter().any(|ip| same_ip(ip.bound)) {
                return Err(wrong("listen", format!("{own} lies in relay_ports; take another port")));
            }
        }
        Ok(bound)
    }

    fn advertised(&self, bound: &[SocketAddr], relay_ips: &[RelayIp]) -> Result<Vec<SocketAddr>, ConfigError> {
        let mut advertised: Vec<SocketAddr> = Vec::new();
        for text in &self.advertise {
            let address = address("advertise", text)?;
            if address.ip().is_unspecified() || address.ip().is_multicast() {
                return Err(wrong("advertise", format!("{address} is not an address that others can send to")));
            }
            advertised.push(address);
        }
        if advertised.is_empty() {
            for own in bound {
                let outside = relay_ips.iter().find(|ip| ip.bound == own.ip());
                if own.ip().is_unspecified() {
                    let of_family = relay_ips.iter().filter(|ip| Family::of(ip.bound) == Family::of(own.ip()));
                    advertised.extend(of_family.map(|ip| SocketAddr::new(ip.advertised, own.port())));
                } else {
                    let ip = outside.map_or(own.ip(), |ip| ip.advertised);
                    advertised.push(SocketAddr::new(ip, own.port()));
                }
            }
        }
        if advertised.is_empty() || advertised.len() > MANY {
            let problem = format!("{} addresses; name 1 to {MANY} that other members can send to", advertised.len());
            return Err(wrong("advertise", problem));
        }
        Ok(advertised)
    }
}

/// Whether this relay has peers beyond the cluster.
pub(super) fn cluster_only(peers: &str, has_backbone: bool) -> Result<bool, ConfigError> {
    match peers {
        "any" => Ok(false),
        "cluster-only" if has_backbone => Ok(true),
        "cluster-only" => {
            let problem = "cluster-only leaves no way out without a backbone; add the table [backbone]";
            Err(ConfigError::new("peers", problem))
        }
        other => Err(ConfigError::new("peers", format!("{other:?} is neither any nor cluster-only"))),
    }
}

fn address(key: &str, text: &str) -> Result<SocketAddr, ConfigError> {
    let address: Option<SocketAddr> = text.parse().ok();
    let good = address.filter(|address| address.port() != 0);
    good.ok_or_else(|| wrong(key, format!("{text:?} is not IP:PORT; write 10.0.0.5:{PORT}")))
}

fn wrong(key: &str, problem: String) -> ConfigError {
    ConfigError::new(format!("backbone.{key}"), problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(written: &WrittenBackbone) -> Result<BackboneSettings, String> {
        let ip = |text: &str| text.parse::<IpAddr>().expect("literal");
        let relay_ips = [
            RelayIp { bound: ip("10.0.0.5"), advertised: ip("198.51.100.7") },
            RelayIp { bound: ip("2001:db8::7"), advertised: ip("2001:db8::7") },
        ];
        let listen = [Listen { transport: Transport::Udp, bind: "0.0.0.0:3478".parse().expect("literal") }];
        written.check(&listen, &relay_ips, (50_000, 50_999)).map_err(|error| error.to_string())
    }

    fn listening(address: &str) -> WrittenBackbone {
        WrittenBackbone { listen: vec![address.to_owned()], ..WrittenBackbone::default() }
    }

    fn texts(addresses: &[SocketAddr]) -> Vec<String> {
        addresses.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_is_not_written_is_found() {
        let settings = check(&WrittenBackbone::default()).expect("good");
        assert_eq!(texts(&settings.listen), ["10.0.0.5:3480", "[2001:db8::7]:3480"]);
        assert_eq!(texts(&settings.advertised), ["198.51.100.7:3480", "[2001:db8::7]:3480"]);
        assert_eq!(settings.capacity, None);
        let everywhere = check(&listening("0.0.0.0:4000")).expect("good");
        assert_eq!(texts(&everywhere.advertised), ["198.51.100.7:4000"]);
        let elsewhere = check(&listening("10.9.0.5:3480")).expect("good");
        assert_eq!(texts(&elsewhere.advertised), ["10.9.0.5:3480"], "another network of this machine");
        let written = WrittenBackbone {
            advertise: vec!["10.9.0.5:3480".into(), "192.0.2.1:9".into()],
            private_networks: vec!["10.0.0.0/8".into()],
            capacity_mbit: 20,
            ..WrittenBackbone::default()
        };
        let settings = check(&written).expect("good");
        assert_eq!(texts(&settings.advertised), ["10.9.0.5:3480", "192.0.2.1:9"]);
        assert_eq!((settings.private_networks.len(), settings.capacity), (1, Some(20_000_000)));
    }

    #[test]
    fn mistakes_name_their_key() {
        let of = |written: WrittenBackbone| check(&written).expect_err("a mistake");
        let cases = [
            (of(listening("eu-1:3480")), "backbone.listen: \"eu-1:3480\" is not IP:PORT; write 10.0.0.5:3480"),
            (of(listening("10.0.0.5:0")), "backbone.listen: \"10.0.0.5:0\" is not IP:PORT; write 10.0.0.5:3480"),
            (
                of(listening("10.0.0.5:3478")),
                "backbone.listen: 10.0.0.5:3478 is served to clients by 0.0.0.0:3478; take another port",
            ),
            (of(listening("0.0.0.0:50001")), "backbone.listen: 0.0.0.0:50001 lies in relay_ports; take another port"),
            (
                of(WrittenBackbone {
                    listen: vec!["10.0.0.5:1".into(), "10.0.0.6:1".into()],
                    ..WrittenBackbone::default()
                }),
                "backbone.listen: 10.0.0.6:1 is a second address of its family; leave one of them out",
            ),
            (
                of(WrittenBackbone { advertise: vec!["0.0.0.0:1".into()], ..WrittenBackbone::default() }),
                "backbone.advertise: 0.0.0.0:1 is not an address that others can send to",
            ),
            (
                of(WrittenBackbone { private_networks: vec!["10.0.0.0".into()], ..WrittenBackbone::default() }),
                "backbone.private_networks: \"10.0.0.0\" is not a network; write it as 10.0.0.0/8",
            ),
            (
                of(WrittenBackbone { capacity_mbit: 1_000_001, ..WrittenBackbone::default() }),
                "backbone.capacity_mbit: 1000001 is more than 1000000; it is in Mbit/s, 0 is measured",
            ),
        ];
        for (error, expected) in cases {
            assert_eq!(error, expected);
        }
        assert_eq!(cluster_only("cluster-only", true), Ok(true));
        let errors = [cluster_only("cluster-only", false), cluster_only("some", true)];
        let errors = errors.map(|result| result.expect_err("a mistake").to_string());
        assert_eq!(errors[0], "peers: cluster-only leaves no way out without a backbone; add the table [backbone]");
        assert_eq!(errors[1], "peers: \"some\" is neither any nor cluster-only");
    }
}
