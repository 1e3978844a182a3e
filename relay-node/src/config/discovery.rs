//! The table `nat_discovery`: a second address, so that clients can find out how their NATs behave (RFC 5780).

use std::net::{IpAddr, SocketAddr};

use serde::Deserialize;
use turn_core::{Family, Transport};

use super::ConfigError;
use crate::dataplane::{DiscoveryAddress, Listen, RelayIp};

/// The second address, as it is written.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct WrittenNatDiscovery {
    /// Another IP of this machine.
    pub alternate_ip: IpAddr,
    /// Another port, of both IPs.
    pub alternate_port: u16,
    /// What clients know `alternate_ip` as behind a one-to-one NAT.
    pub alternate_public_ip: Option<IpAddr>,
}

/// The checked form.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NatDiscovery {
    /// Two IPs with two ports each, as RFC 5780 §6.1 orders them: A1:P1, A1:P2, A2:P1, A2:P2.
    pub addresses: [DiscoveryAddress; 4],
    /// Those that `listen` does not serve yet.
    pub listen: Vec<Listen>,
}

impl WrittenNatDiscovery {
    /// Finds the first address, of the same family, among what is served.
    pub(super) fn check(self, listen: &[Listen], relay_ips: &[RelayIp]) -> Result<NatDiscovery, ConfigError> {
        let wrong = |key: &str, problem: String| ConfigError::new(format!("nat_discovery.{key}"), problem);
        let alternate = self.alternate_ip;
        if alternate.is_unspecified() || alternate.is_multicast() {
            return Err(wrong(
                "alternate_ip",
                format!("{alternate} is not one address; name a second one of this machine"),
            ));
        }
        let family = Family::of(alternate);
        let of_family = |listen: &&Listen| !listen.transport.is_stream() && Family::of(listen.bind.ip()) == family;
        let Some(first) = listen.iter().find(of_family) else {
            let problem = format!("listen has no udp:// address of the family of {alternate}; add one");
            return Err(wrong("alternate_ip", problem));
        };
        let relay = relay_ips.iter().find(|relay| Family::of(relay.bound) == family);
        let everywhere = first.bind.ip().is_unspecified();
        let Some(bound) = (if everywhere { relay.map(|relay| relay.bound) } else { Some(first.bind.ip()) }) else {
            let problem = format!("the first address is not known: listen names {}; name one IP there", first.bind);
            return Err(wrong("alternate_ip", problem));
        };
        if bound == alternate {
            let problem = format!("{alternate} is the first address itself; name a second one of this machine");
            return Err(wrong("alternate_ip", problem));
        }
        let (port, other) = (first.bind.port(), self.alternate_port);
        if other == 0 || other == port {
            return Err(wrong("alternate_port", format!("{other} is no second port beside {port}; name another")));
        }
        let advertised = relay.filter(|relay| relay.bound == bound).map_or(bound, |relay| relay.advertised);
        let advertised_alternate = self.alternate_public_ip.unwrap_or(alternate);
        if Family::of(advertised_alternate) != family || advertised_alternate == advertised {
            let problem = format!("{advertised_alternate} is not another address of the family of {alternate}");
            return Err(wrong("alternate_public_ip", problem));
        }
        let address = |bound, advertised, port| DiscoveryAddress {
            bound: SocketAddr::new(bound, port),
            advertised: SocketAddr::new(advertised, port),
        };
        let addresses = [
            address(bound, advertised, port),
            address(bound, advertised, other),
            address(alternate, advertised_alternate, port),
            address(alternate, advertised_alternate, other),
        ];
        let mut more: Vec<Listen> = Vec::new();
        for DiscoveryAddress { bound, .. } in addresses {
            let serves = |listen: &Listen| {
                let at = listen.bind;
                let ip = at.ip() == bound.ip() || at.ip().is_unspecified() && at.is_ipv4() == bound.is_ipv4();
                !listen.transport.is_stream() && at.port() == bound.port() && ip
            };
            if !listen.iter().chain(&more).any(serves) {
                let bind = if everywhere { SocketAddr::new(first.bind.ip(), bound.port()) } else { bound };
                more.push(Listen { transport: Transport::Udp, bind });
            }
        }
        Ok(NatDiscovery { addresses, listen: more })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("literal")
    }

    fn check(listen: &[&str], written: WrittenNatDiscovery) -> Result<NatDiscovery, String> {
        let listen: Vec<Listen> = listen
            .iter()
            .map(|bind| Listen { transport: Transport::Udp, bind: bind.parse().expect("literal") })
            .collect();
        let relay_ips = [
            RelayIp { bound: ip("10.0.0.7"), advertised: ip("198.51.100.7") },
            RelayIp { bound: ip("2001:db8::7"), advertised: ip("2001:db8::7") },
        ];
        written.check(&listen, &relay_ips).map_err(|error| error.to_string())
    }

    fn written(alternate: &str, port: u16, public: Option<&str>) -> WrittenNatDiscovery {
        WrittenNatDiscovery { alternate_ip: ip(alternate), alternate_port: port, alternate_public_ip: public.map(ip) }
    }

    #[test]
    fn all_four_addresses_are_served() {
        // What listens, what is written, the four, the first and last as clients know them, what listens beside.
        type Row<'a> = (&'a [&'a str], WrittenNatDiscovery, [&'a str; 4], [&'a str; 2], &'a [&'a str]);
        let cases: &[Row<'_>] = &[
            (
                &["10.0.0.7:3478"],
                written("10.0.0.8", 3479, Some("198.51.100.8")),
                ["10.0.0.7:3478", "10.0.0.7:3479", "10.0.0.8:3478", "10.0.0.8:3479"],
                ["198.51.100.7:3478", "198.51.100.8:3479"],
                &["10.0.0.7:3479", "10.0.0.8:3478", "10.0.0.8:3479"],
            ),
            // Some are served anyway.
            (
                &["10.0.0.7:3478", "10.0.0.8:3478"],
                written("10.0.0.8", 443, None),
                ["10.0.0.7:3478", "10.0.0.7:443", "10.0.0.8:3478", "10.0.0.8:443"],
                ["198.51.100.7:3478", "10.0.0.8:443"],
                &["10.0.0.7:443", "10.0.0.8:443"],
            ),
            // A socket on every address serves both IPs.
            (
                &["0.0.0.0:3478"],
                written("10.0.0.8", 3479, Some("198.51.100.8")),
                ["10.0.0.7:3478", "10.0.0.7:3479", "10.0.0.8:3478", "10.0.0.8:3479"],
                ["198.51.100.7:3478", "198.51.100.8:3479"],
                &["0.0.0.0:3479"],
            ),
            (
                &["10.0.0.7:3478", "[2001:db8::7]:3478"],
                written("2001:db8::8", 3479, None),
                ["[2001:db8::7]:3478", "[2001:db8::7]:3479", "[2001:db8::8]:3478", "[2001:db8::8]:3479"],
                ["[2001:db8::7]:3478", "[2001:db8::8]:3479"],
                &["[2001:db8::7]:3479", "[2001:db8::8]:3478", "[2001:db8::8]:3479"],
            ),
        ];
        for (listen, written, bound, [first, last], more) in cases {
            let checked = check(listen, *written).expect("good");
            assert_eq!(checked.addresses.map(|address| address.bound.to_string()), *bound);
            assert_eq!(checked.addresses[0].advertised.to_string(), *first);
            assert_eq!(checked.addresses[3].advertised.to_string(), *last);
            let opened: Vec<String> = checked.listen.iter().map(|listen| listen.bind.to_string()).collect();
            assert_eq!(opened, *more);
        }
    }

    #[test]
    fn mistakes_name_their_key() {
        let cases = [
            (written("0.0.0.0", 3479, None), "nat_discovery.alternate_ip: 0.0.0.0 is not one address"),
            (written("10.0.0.7", 3479, None), "nat_discovery.alternate_ip: 10.0.0.7 is the first address itself"),
            (
                written("2001:db8::8", 3479, None),
                "nat_discovery.alternate_ip: listen has no udp:// address of the family",
            ),
            (written("10.0.0.8", 0, None), "nat_discovery.alternate_port: 0 is no second port beside 3478"),
            (written("10.0.0.8", 3478, None), "nat_discovery.alternate_port: 3478 is no second port beside 3478"),
            (
                written("10.0.0.8", 1, Some("198.51.100.7")),
                "nat_discovery.alternate_public_ip: 198.51.100.7 is not another",
            ),
            (
                written("10.0.0.8", 1, Some("2001:db8::8")),
                "nat_discovery.alternate_public_ip: 2001:db8::8 is not another",
            ),
        ];
        for (written, expected) in cases {
            let error = check(&["10.0.0.7:3478"], written).expect_err(expected);
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
