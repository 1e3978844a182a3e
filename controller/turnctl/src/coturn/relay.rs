//! The relay that is being written.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use super::networks::networks;
use super::{Line, Outcome};

/// What has been read so far.
#[derive(Default)]
pub(super) struct Relay {
    port: Option<u16>,
    tls_port: Option<u16>,
    ips: Vec<IpAddr>,
    relay_ips: Vec<IpAddr>,
    public_ips: Vec<IpAddr>,
    ports: (Option<u16>, Option<u16>),
    realm: Option<String>,
    secrets: Vec<String>,
    users: Vec<(String, String)>,
    certificate: Option<String>,
    key: Option<String>,
    off: Off,
    denied: Vec<String>,
    loopback: bool,
    user_quota: Option<u32>,
    total_quota: Option<u32>,
    max_bps: Option<u64>,
    bps_capacity: Option<u64>,
    threads: Option<u16>,
    metrics_port: Option<u16>,
    verbose: bool,
}

/// What is not served.
#[derive(Default)]
struct Off {
    udp: bool,
    tcp: bool,
    tls: bool,
    dtls: bool,
    tcp_relay: bool,
}

type Mapped = Result<String, String>;

const PORT: u16 = 3478;
const TLS_PORT: u16 = 5349;
const METRICS_PORT: u16 = 9641;

fn number<T: std::str::FromStr>(value: &str, what: &str) -> Result<T, String> {
    value.parse().map_err(|_| format!("{value:?} is no {what}"))
}

impl Relay {
    pub(super) fn port(&mut self, value: &str) -> Mapped {
        self.port = Some(number(value, "port")?);
        Ok("listen".into())
    }

    pub(super) fn tls_port(&mut self, value: &str) -> Mapped {
        self.tls_port = Some(number(value, "port")?);
        Ok("listen (tls://, dtls://), where there is a certificate".into())
    }

    pub(super) fn listening_ip(&mut self, value: &str) -> Mapped {
        self.ips.push(number(value, "address")?);
        Ok("listen".into())
    }

    pub(super) fn relay_ip(&mut self, value: &str) -> Mapped {
        let ip: IpAddr = number(value, "address")?;
        if self.relay_ips.iter().any(|other| other.is_ipv4() == ip.is_ipv4()) {
            return Err("a relay has one address of each family: run another relay for this one".into());
        }
        self.relay_ips.push(ip);
        Ok(if ip.is_ipv4() { "relay_ip" } else { "relay_ip6" }.into())
    }

    pub(super) fn external_ip(&mut self, value: &str) -> Mapped {
        let (public, private) =
            value.split_once('/').map_or((value, None), |(public, private)| (public, Some(private)));
        let public: IpAddr = number(public, "address")?;
        if self.public_ips.iter().any(|other| other.is_ipv4() == public.is_ipv4()) {
            return Err("a relay has one address of each family: run another relay for this one".into());
        }
        if let Some(private) = private {
            let private: IpAddr = number(private, "address")?;
            if !self.relay_ips.contains(&private) {
                self.relay_ip(&private.to_string())?;
            }
        }
        self.public_ips.push(public);
        Ok(if public.is_ipv4() { "public_ip" } else { "public_ip6" }.into())
    }

    pub(super) fn min_port(&mut self, value: &str) -> Mapped {
        self.ports.0 = Some(number(value, "port")?);
        Ok("relay_ports".into())
    }

    pub(super) fn max_port(&mut self, value: &str) -> Mapped {
        self.ports.1 = Some(number(value, "port")?);
        Ok("relay_ports".into())
    }

    pub(super) fn realm(&mut self, value: &str) -> Mapped {
        match &self.realm {
            Some(first) if first != value => return Err(format!("there is one realm, {first:?}")),
            _ => self.realm = Some(value.to_owned()),
        }
        Ok("realm (of a cluster: the controllers')".into())
    }

    pub(super) fn secret(&mut self, value: &str) -> Mapped {
        self.secrets.push(value.to_owned());
        Ok("rest_secrets (of a cluster: the controllers', or turnctl keys rotate --secret-file)".into())
    }

    pub(super) fn user(&mut self, value: &str) -> Mapped {
        let Some((name, password)) = value.split_once(':') else { return Err("it is not NAME:PASSWORD".into()) };
        if password.starts_with("0x") {
            return Err(format!("user {name:?} has what is a key, from which no password can be found: set a new one"));
        }
        self.users.push((name.to_owned(), password.to_owned()));
        Ok("static_users (of a cluster: the controllers')".into())
    }

    pub(super) fn certificate(&mut self, value: &str) -> Mapped {
        self.certificate = Some(value.to_owned());
        Ok("certificates".into())
    }

    pub(super) fn key(&mut self, value: &str) -> Mapped {
        self.key = Some(value.to_owned());
        Ok("certificates".into())
    }

    pub(super) fn no_udp(&mut self, _: &str) -> Mapped {
        self.off.udp = true;
        Ok("listen without udp://".into())
    }

    pub(super) fn no_tcp(&mut self, _: &str) -> Mapped {
        self.off.tcp = true;
        Ok("listen without tcp://".into())
    }

    pub(super) fn no_tls(&mut self, _: &str) -> Mapped {
        self.off.tls = true;
        Ok("listen without tls://".into())
    }

    pub(super) fn no_dtls(&mut self, _: &str) -> Mapped {
        self.off.dtls = true;
        Ok("listen without dtls://".into())
    }

    pub(super) fn no_tcp_relay(&mut self, _: &str) -> Mapped {
        self.off.tcp_relay = true;
        Ok("features.tcp_allocations".into())
    }

    pub(super) fn denied_peer(&mut self, value: &str) -> Mapped {
        self.denied.extend(networks(value).ok_or_else(|| format!("{value:?} is no address and no range"))?);
        Ok("denied_peers (private networks are denied anyway)".into())
    }

    pub(super) fn allow_loopback(&mut self, _: &str) -> Mapped {
        self.loopback = true;
        Ok("allow_loopback_peers (for a lab)".into())
    }

    pub(super) fn user_quota(&mut self, value: &str) -> Mapped {
        self.user_quota = Some(number(value, "number")?);
        Ok("user_quota".into())
    }

    pub(super) fn total_quota(&mut self, value: &str) -> Mapped {
        self.total_quota = Some(number(value, "number")?);
        Ok("max_allocations".into())
    }

    pub(super) fn max_bps(&mut self, value: &str) -> Mapped {
        self.max_bps = Some(number(value, "number")?);
        Ok("limits.bytes_per_allocation".into())
    }

    pub(super) fn bps_capacity(&mut self, value: &str) -> Mapped {
        self.bps_capacity = Some(number(value, "number")?);
        Ok("limits.bytes_per_node".into())
    }

    pub(super) fn threads(&mut self, value: &str) -> Mapped {
        self.threads = Some(number(value, "number")?);
        Ok("workers (0 is one per core)".into())
    }

    pub(super) fn prometheus(&mut self, _: &str) -> Mapped {
        self.metrics_port.get_or_insert(METRICS_PORT);
        Ok("http (/metrics beside /livez and /readyz)".into())
    }

    pub(super) fn prometheus_port(&mut self, value: &str) -> Mapped {
        self.metrics_port = Some(number(value, "port")?);
        Ok("http".into())
    }

    pub(super) fn verbose(&mut self, _: &str) -> Mapped {
        self.verbose = true;
        Ok("log".into())
    }

    /// The file, with what is left to do at its end.
    pub(super) fn finish(&self, options: &[Line]) -> String {
        let mut out = String::from(
            "# From coturn's turnserver.conf, by turnctl import coturn. A relay of its own: to join a cluster give it controllers\n\
             # and tls, and leave realm, rest_secrets and static_users to the controllers.\n\
             node_id = \"relay-1\"\nregion = \"main\"\n",
        );
        let mut put = |key: &str, value: toml::Value| {
            // Writing to a String does not fail.
            let _ = writeln!(out, "{key} = {value}");
        };
        put("listen", strings(self.listeners()));
        let of_family = |ips: &[IpAddr], v4: bool| ips.iter().find(|ip| ip.is_ipv4() == v4).map(IpAddr::to_string);
        for (key, ips, v4) in [
            ("relay_ip", &self.relay_ips, true),
            ("relay_ip6", &self.relay_ips, false),
            ("public_ip", &self.public_ips, true),
            ("public_ip6", &self.public_ips, false),
        ] {
            if let Some(ip) = of_family(ips, v4) {
                put(key, ip.into());
            }
        }
        if let (low, high) = self.ports
            && (low.is_some() || high.is_some())
        {
            put("relay_ports", vec![i64::from(low.unwrap_or(49152)), i64::from(high.unwrap_or(65535))].into());
        }
        for (key, text) in [("realm", &self.realm), ("log", &self.verbose.then(|| "debug".to_owned()))] {
            if let Some(text) = text {
                put(key, text.clone().into());
            }
        }
        if !self.secrets.is_empty() {
            put("rest_secrets", strings(self.secrets.clone()));
        }
        if !self.users.is_empty() {
            let user = |(name, password): &(String, String)| {
                let pair = [("username", name), ("password", password)];
                toml::Value::Table(pair.into_iter().map(|(key, text)| (key.to_owned(), text.clone().into())).collect())
            };
            put("static_users", toml::Value::Array(self.users.iter().map(user).collect()));
        }
        if let Some((certificate, key)) = self.pair() {
            let pair = [("certificate", certificate), ("key", key)];
            let pair = pair.into_iter().map(|(name, file)| (name.to_owned(), file.to_owned().into())).collect();
            put("certificates", toml::Value::Array(vec![toml::Value::Table(pair)]));
        }
        if let Some(port) = self.metrics_port {
            put("http", format!("0.0.0.0:{port}").into());
        }
        for (key, value) in [
            ("workers", self.threads.map(i64::from)),
            ("user_quota", self.user_quota.map(i64::from)),
            ("max_allocations", self.total_quota.map(i64::from)),
        ] {
            if let Some(value) = value {
                put(key, value.into());
            }
        }
        if self.loopback {
            put("allow_loopback_peers", true.into());
        }
        if !self.denied.is_empty() {
            put("denied_peers", strings(self.denied.clone()));
        }
        for (key, value) in [("bytes_per_allocation", self.max_bps), ("bytes_per_node", self.bps_capacity)] {
            if let Some(value) = value {
                put(&format!("limits.{key}"), i64::try_from(value).unwrap_or(i64::MAX).into());
            }
        }
        if self.off.tcp_relay {
            put("features.tcp_allocations", false.into());
        }
        for Line { line, option, why, .. } in options.iter().filter(|line| line.outcome == Outcome::NotMapped) {
            let _ = writeln!(out, "# not mapped: {option} (line {line}): {}", why.escape_debug());
        }
        out
    }

    fn pair(&self) -> Option<(&str, &str)> {
        self.certificate.as_deref().zip(self.key.as_deref())
    }

    fn listeners(&self) -> Vec<String> {
        let everywhere = [IpAddr::from([0, 0, 0, 0])];
        let ips = if self.ips.is_empty() { &everywhere[..] } else { &self.ips };
        let (port, tls_port) = (self.port.unwrap_or(PORT), self.tls_port.unwrap_or(TLS_PORT));
        let tls = self.pair().is_some();
        let schemes = [
            ("udp", port, !self.off.udp),
            ("tcp", port, !self.off.tcp),
            ("tls", tls_port, tls && !self.off.tls),
            ("dtls", tls_port, tls && !self.off.dtls),
        ];
        let served = schemes.into_iter().filter(|(_, _, served)| *served);
        let of_ip = |ip: &IpAddr| {
            let ip = *ip;
            served.clone().map(move |(scheme, port, _)| format!("{scheme}://{}", SocketAddr::new(ip, port)))
        };
        ips.iter().flat_map(of_ip).collect()
    }
}

fn strings(all: Vec<String>) -> toml::Value {
    toml::Value::Array(all.into_iter().map(Into::into).collect())
}
