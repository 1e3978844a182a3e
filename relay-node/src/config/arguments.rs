//! Flags and their environment variables.

use std::path::PathBuf;

use clap::Parser;

const IDENTITY: &str = "Identity";
const ADDRESSES: &str = "Addresses";
const CREDENTIALS: &str = "Credentials of a relay without controllers";
const CLUSTER: &str = "Cluster";
const LIMITS: &str = "Limits and policy";
const WATCHING: &str = "Watching";

const EXAMPLES: &str = "\
Examples:
  A relay of its own, for a try on this machine:
    relay-node --node-id lab --region lab --state-dir /tmp/lab --listen udp://127.0.0.1:3478,tcp://127.0.0.1:3478 \\
      --static-users alice:secret --allow-loopback-peers
  A relay of a cluster, everything in a file:
    relay-node --config /etc/turnpike/relay.toml
  The same file, another address, checked only:
    TURNPIKE_PUBLIC_IP=198.51.100.7 relay-node --config /etc/turnpike/relay.toml --check-config

Every flag is a variable too (--public-ip is TURNPIKE_PUBLIC_IP) and a key of the file (public_ip; tls-ca is
ca under [tls]). Flags win over variables, variables over the file. Lists are separated by commas.

Exit codes:
  0   ended as asked
  1   could not start, or another node owns the relay address
  2   wrong usage
  78  wrong configuration";

/// Turnpike's relay: serves STUN and TURN, and keeps its allocations through its own death.
#[derive(Debug, Parser)]
#[command(name = "relay-node", version, after_help = EXAMPLES, max_term_width = 110)]
pub struct Arguments {
    /// Read this TOML file
    #[arg(short, long, env = "TURNPIKE_CONFIG", value_name = "FILE", hide_env = true)]
    pub config: Option<PathBuf>,
    /// Check the configuration, print one line, exit (0 or 78)
    #[arg(long)]
    pub check_config: bool,

    /// Name of this relay, the one in its certificate (required)
    #[arg(long, env = "TURNPIKE_NODE_ID", value_name = "NAME", help_heading = IDENTITY, hide_env = true)]
    node_id: Option<String>,
    /// Region it serves (required)
    #[arg(long, env = "TURNPIKE_REGION", value_name = "NAME", help_heading = IDENTITY, hide_env = true)]
    region: Option<String>,
    /// Zone inside the region
    #[arg(long, env = "TURNPIKE_ZONE", value_name = "NAME", help_heading = IDENTITY, hide_env = true)]
    zone: Option<String>,
    /// Where journal, epoch and the last session's settings live [default: /var/lib/turnpike]
    #[arg(long, env = "TURNPIKE_STATE_DIR", value_name = "DIR", help_heading = IDENTITY, hide_env = true)]
    state_dir: Option<String>,

    /// Client-facing addresses [default: udp://0.0.0.0:3478,tcp://0.0.0.0:3478]
    #[arg(long, env = "TURNPIKE_LISTEN", value_name = "URL,..", help_heading = ADDRESSES, hide_env = true)]
    listen: Option<String>,
    /// What TLS is served with, the default first
    #[arg(long, env = "TURNPIKE_CERTIFICATES", value_name = "FILE:KEYFILE,..", help_heading = ADDRESSES, hide_env = true)]
    certificates: Option<String>,
    /// Host name by which clients reach this relay over TLS [default: its IP]
    #[arg(long, env = "TURNPIKE_PUBLIC_HOST", value_name = "NAME", help_heading = ADDRESSES, hide_env = true)]
    public_host: Option<String>,
    /// Load balancers whose PROXY headers are believed
    #[arg(long, env = "TURNPIKE_TRUSTED_PROXIES", value_name = "CIDR,..", help_heading = ADDRESSES, hide_env = true)]
    trusted_proxies: Option<String>,
    /// Where TLS connections for other hosts and protocols go
    #[arg(long, env = "TURNPIKE_WEB_SERVER", value_name = "IP:PORT", help_heading = ADDRESSES, hide_env = true)]
    web_server: Option<String>,
    /// IPv4 that relayed sockets bind [default: the listen address, or the default route's source]
    #[arg(long, env = "TURNPIKE_RELAY_IP", value_name = "IP", help_heading = ADDRESSES, hide_env = true)]
    relay_ip: Option<String>,
    /// IPv4 that clients and peers see [default: relay_ip where it is public]
    #[arg(long, env = "TURNPIKE_PUBLIC_IP", value_name = "IP", help_heading = ADDRESSES, hide_env = true)]
    public_ip: Option<String>,
    /// IPv6 that relayed sockets bind
    #[arg(long, env = "TURNPIKE_RELAY_IP6", value_name = "IP", help_heading = ADDRESSES, hide_env = true)]
    relay_ip6: Option<String>,
    /// IPv6 that clients and peers see
    #[arg(long, env = "TURNPIKE_PUBLIC_IP6", value_name = "IP", help_heading = ADDRESSES, hide_env = true)]
    public_ip6: Option<String>,
    /// Ports of relayed addresses [default: 49152-65535]
    #[arg(long, env = "TURNPIKE_RELAY_PORTS", value_name = "LOW-HIGH", help_heading = ADDRESSES, hide_env = true)]
    relay_ports: Option<String>,
    /// One socket for all relayed addresses (wildcard) or one each (sockets); auto is the first where it can be had
    #[arg(long, env = "TURNPIKE_RELAYED", value_name = "HOW", help_heading = ADDRESSES, hide_env = true)]
    relayed: Option<String>,

    /// Realm [default: turnpike]
    #[arg(long, env = "TURNPIKE_REALM", value_name = "REALM", help_heading = CREDENTIALS, hide_env = true)]
    realm: Option<String>,
    /// TURN REST secrets, newest first; others can see flags: prefer the variable or the file
    #[arg(long, env = "TURNPIKE_REST_SECRETS", value_name = "SECRET,..", help_heading = CREDENTIALS, hide_env = true)]
    rest_secrets: Option<String>,
    /// Users with fixed passwords
    #[arg(long, env = "TURNPIKE_STATIC_USERS", value_name = "NAME:PASSWORD,..", help_heading = CREDENTIALS, hide_env = true)]
    static_users: Option<String>,

    /// Controllers to join; none is a relay of its own
    #[arg(long, env = "TURNPIKE_CONTROLLERS", value_name = "URL,..", help_heading = CLUSTER, hide_env = true)]
    controllers: Option<String>,
    /// The cluster's CA certificate, PEM
    #[arg(long, env = "TURNPIKE_TLS_CA", value_name = "FILE", help_heading = CLUSTER, hide_env = true)]
    tls_ca: Option<String>,
    /// This relay's certificate, PEM
    #[arg(long, env = "TURNPIKE_TLS_CERTIFICATE", value_name = "FILE", help_heading = CLUSTER, hide_env = true)]
    tls_certificate: Option<String>,
    /// Its key, PEM
    #[arg(long, env = "TURNPIKE_TLS_KEY", value_name = "FILE", help_heading = CLUSTER, hide_env = true)]
    tls_key: Option<String>,

    /// Node of Kubernetes this relay runs on: gives region, zone and public address; its cordon drains the relay
    #[arg(long, env = "TURNPIKE_KUBERNETES_NODE", value_name = "NAME", help_heading = CLUSTER, hide_env = true)]
    kubernetes_node: Option<String>,
    /// Service of the controllers, whose endpoints are joined
    #[arg(long, env = "TURNPIKE_KUBERNETES_CONTROLLERS", value_name = "NAMESPACE/NAME", help_heading = CLUSTER, hide_env = true)]
    kubernetes_controllers: Option<String>,
    /// Service whose load balancer has the public address
    #[arg(long, env = "TURNPIKE_KUBERNETES_SERVICE", value_name = "NAME", help_heading = CLUSTER, hide_env = true)]
    kubernetes_service: Option<String>,
    /// UDP addresses of the QUIC links to other relays; without them and [backbone] there are none
    #[arg(long, env = "TURNPIKE_BACKBONE_LISTEN", value_name = "IP:PORT,..", help_heading = CLUSTER, hide_env = true)]
    backbone_listen: Option<String>,
    /// Where other relays reach them [default: what they are known as outside]
    #[arg(long, env = "TURNPIKE_BACKBONE_ADVERTISE", value_name = "IP:PORT,..", help_heading = CLUSTER, hide_env = true)]
    backbone_advertise: Option<String>,
    /// any, or cluster-only: no public relayed ports, the backbone is the only way out [default: any]
    #[arg(long, env = "TURNPIKE_PEERS", value_name = "WHOM", help_heading = CLUSTER, hide_env = true)]
    peers: Option<String>,

    /// Worker threads; 0 is one per core, at most 64 [default: 0]
    #[arg(long, env = "TURNPIKE_WORKERS", value_name = "N", help_heading = LIMITS, hide_env = true)]
    workers: Option<String>,
    /// Allocations on this relay, 0 for no limit [default: 0]
    #[arg(long, env = "TURNPIKE_MAX_ALLOCATIONS", value_name = "N", help_heading = LIMITS, hide_env = true)]
    max_allocations: Option<String>,
    /// Allocations of one user on this relay, 0 for the cluster's number [default: 0]
    #[arg(long, env = "TURNPIKE_USER_QUOTA", value_name = "N", help_heading = LIMITS, hide_env = true)]
    user_quota: Option<String>,
    /// Bytes queued for a TCP client before whole frames are dropped [default: 262144]
    #[arg(long, env = "TURNPIKE_STREAM_SEND_CAP", value_name = "BYTES", help_heading = LIMITS, hide_env = true)]
    stream_send_cap: Option<String>,
    /// TCP connections per worker [default: 10000]
    #[arg(long, env = "TURNPIKE_MAX_CONNECTIONS", value_name = "N", help_heading = LIMITS, hide_env = true)]
    max_connections: Option<String>,
    /// Seconds that a relay told to stop (SIGTERM) goes on with its calls, 0 for none [default: 1800]
    #[arg(long, env = "TURNPIKE_DRAIN_DEADLINE", value_name = "SECONDS", help_heading = LIMITS, hide_env = true)]
    drain_deadline: Option<String>,
    /// The lab switch: lets clients reach loopback peers, and a relay live on loopback
    #[arg(long, env = "TURNPIKE_ALLOW_LOOPBACK_PEERS", value_name = "BOOL", help_heading = LIMITS, hide_env = true,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    allow_loopback_peers: Option<String>,
    /// Peer networks denied beyond the built-in list
    #[arg(long, env = "TURNPIKE_DENIED_PEERS", value_name = "CIDR,..", help_heading = LIMITS, hide_env = true)]
    denied_peers: Option<String>,

    /// Where /livez, /readyz and /metrics are served, empty for nowhere [default: 127.0.0.1:9478]
    #[arg(long, env = "TURNPIKE_HTTP", value_name = "IP:PORT", help_heading = WATCHING, hide_env = true)]
    http: Option<String>,
    /// error, warn, info, debug, trace, or tracing directives [default: info]
    #[arg(long, env = "TURNPIKE_LOG", value_name = "FILTER", help_heading = WATCHING, hide_env = true)]
    log: Option<String>,
    /// text or json [default: text]
    #[arg(long, env = "TURNPIKE_LOG_FORMAT", value_name = "FORMAT", help_heading = WATCHING, hide_env = true)]
    log_format: Option<String>,
    /// OTLP collector (gRPC) that traces go to [default: OTEL_EXPORTER_OTLP_ENDPOINT, else none]
    #[arg(long, env = "TURNPIKE_OTLP_ENDPOINT", value_name = "URL", help_heading = WATCHING, hide_env = true)]
    otlp_endpoint: Option<String>,
}

impl Arguments {
    /// The keys that a variable or a flag sets.
    pub(crate) fn overrides(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let all: [(&'static str, &Option<String>); 40] = [
            ("node_id", &self.node_id),
            ("region", &self.region),
            ("zone", &self.zone),
            ("state_dir", &self.state_dir),
            ("listen", &self.listen),
            ("certificates", &self.certificates),
            ("public_host", &self.public_host),
            ("trusted_proxies", &self.trusted_proxies),
            ("web_server", &self.web_server),
            ("relay_ip", &self.relay_ip),
            ("public_ip", &self.public_ip),
            ("relay_ip6", &self.relay_ip6),
            ("public_ip6", &self.public_ip6),
            ("relay_ports", &self.relay_ports),
            ("relayed", &self.relayed),
            ("realm", &self.realm),
            ("rest_secrets", &self.rest_secrets),
            ("static_users", &self.static_users),
            ("controllers", &self.controllers),
            ("tls.ca", &self.tls_ca),
            ("tls.certificate", &self.tls_certificate),
            ("tls.key", &self.tls_key),
            ("kubernetes.node", &self.kubernetes_node),
            ("kubernetes.controllers", &self.kubernetes_controllers),
            ("kubernetes.service", &self.kubernetes_service),
            ("backbone.listen", &self.backbone_listen),
            ("backbone.advertise", &self.backbone_advertise),
            ("peers", &self.peers),
            ("workers", &self.workers),
            ("max_allocations", &self.max_allocations),
            ("user_quota", &self.user_quota),
            ("stream_send_cap", &self.stream_send_cap),
            ("max_connections", &self.max_connections),
            ("drain_deadline", &self.drain_deadline),
            ("allow_loopback_peers", &self.allow_loopback_peers),
            ("denied_peers", &self.denied_peers),
            ("http", &self.http),
            ("log", &self.log),
            ("log_format", &self.log_format),
            ("otlp_endpoint", &self.otlp_endpoint),
        ];
        all.into_iter().filter_map(|(key, value)| Some((key, value.as_deref()?)))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn every_flag_has_its_variable_and_its_key() {
        let command = Arguments::command();
        command.clone().debug_assert();
        let mut line = vec!["relay-node".to_owned()];
        let mut count = 0;
        for argument in command.get_arguments() {
            let Some(long) = argument.get_long().filter(|l| !["help", "version", "check-config"].contains(l)) else {
                continue;
            };
            let variable = format!("TURNPIKE_{}", long.to_uppercase().replace('-', "_"));
            assert_eq!(argument.get_env().and_then(|v| v.to_str()), Some(variable.as_str()), "{long}");
            if long != "config" {
                line.push(format!("--{long}=1"));
                count += 1;
            }
        }
        let arguments = Arguments::try_parse_from(line).expect("every flag takes a value");
        assert_eq!(arguments.overrides().count(), count);
    }
}
