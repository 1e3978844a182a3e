//! coturn's options, by what becomes of them.

use super::relay::Relay;

/// Writes a value into the result: the key it became, or why it did not.
pub(super) type Map = fn(&mut Relay, &str) -> Result<String, String>;

/// What becomes of an option.
pub(super) enum Fate {
    /// It has a counterpart.
    Mapped(Map),
    /// Nothing has to be done; why.
    Implied(&'static str),
    /// Something has to be done or decided; what.
    NotMapped(&'static str),
}

/// By its name in the file; none is an option nobody knows.
pub(super) fn fate_of(option: &str) -> Option<Fate> {
    Some(match option {
        "listening-port" => Fate::Mapped(Relay::port),
        "tls-listening-port" => Fate::Mapped(Relay::tls_port),
        "listening-ip" => Fate::Mapped(Relay::listening_ip),
        "relay-ip" => Fate::Mapped(Relay::relay_ip),
        "external-ip" => Fate::Mapped(Relay::external_ip),
        "min-port" => Fate::Mapped(Relay::min_port),
        "max-port" => Fate::Mapped(Relay::max_port),
        "realm" => Fate::Mapped(Relay::realm),
        "static-auth-secret" => Fate::Mapped(Relay::secret),
        "user" => Fate::Mapped(Relay::user),
        "cert" => Fate::Mapped(Relay::certificate),
        "pkey" => Fate::Mapped(Relay::key),
        "no-udp" => Fate::Mapped(Relay::no_udp),
        "no-tcp" => Fate::Mapped(Relay::no_tcp),
        "no-tls" => Fate::Mapped(Relay::no_tls),
        "no-dtls" => Fate::Mapped(Relay::no_dtls),
        "no-tcp-relay" => Fate::Mapped(Relay::no_tcp_relay),
        "denied-peer-ip" => Fate::Mapped(Relay::denied_peer),
        "allow-loopback-peers" => Fate::Mapped(Relay::allow_loopback),
        "user-quota" => Fate::Mapped(Relay::user_quota),
        "total-quota" => Fate::Mapped(Relay::total_quota),
        "max-bps" => Fate::Mapped(Relay::max_bps),
        "bps-capacity" => Fate::Mapped(Relay::bps_capacity),
        "relay-threads" => Fate::Mapped(Relay::threads),
        "prometheus" => Fate::Mapped(Relay::prometheus),
        "prometheus-port" => Fate::Mapped(Relay::prometheus_port),
        "verbose" | "Verbose" => Fate::Mapped(Relay::verbose),

        "use-auth-secret" => Fate::Implied("TURN REST credentials are taken where there are rest_secrets"),
        "lt-cred-mech" => Fate::Implied("long-term credentials are the only ones there are"),
        "fingerprint" => Fate::Implied("every message carries one"),
        "stale-nonce" => Fate::Implied("nonces end after an hour, and a client is given a new one"),
        "mobility" => Fate::Implied("offered; features.mobility = false turns it off"),
        "no-multicast-peers" => Fate::Implied("multicast peers are denied, always"),
        "no-loopback-peers" => Fate::Implied("loopback peers are denied unless allow_loopback_peers is set"),
        "no-rfc5780" => Fate::Implied("NAT discovery is off without nat_discovery"),
        "response-origin-only-with-rfc5780" => Fate::Implied("so it is"),
        "no-stun-backward-compatibility" => Fate::Implied("RFC 3489 is not spoken"),
        "no-software-attribute" => Fate::Implied("SOFTWARE is not told to strangers"),
        "no-tlsv1" | "no-tlsv1_1" => Fate::Implied("TLS 1.2 and 1.3 only"),
        "cipher-list" | "ec-curve-name" => Fate::Implied("suites and curves are those of RFC 9325"),
        "dh566" | "dh1066" | "dh2066" | "dh-file" => Fate::Implied("keys are agreed over elliptic curves only"),
        "keep-address-family" | "allocation-default-address-family" => {
            Fate::Implied("IPv4 unless a client asks for IPv6 or both (RFC 8656)")
        }
        "syslog"
        | "syslog-facility"
        | "log-file"
        | "no-stdout-log"
        | "simple-log"
        | "new-log-timestamp"
        | "new-log-timestamp-format"
        | "log-binding"
        | "pidfile" => {
            Fate::Implied("the log goes to standard error, log_format = \"json\" for machines; a supervisor keeps it")
        }
        "proc-user" | "proc-group" => Fate::Implied("the supervisor starts it as the user it is to be"),
        "no-cli" | "cli-ip" | "cli-port" | "cli-password" | "cli-max-output-sessions" => {
            Fate::Implied("turnctl asks the controllers, with a certificate")
        }
        "web-admin" | "web-admin-ip" | "web-admin-port" | "web-admin-listen-on-workers" => {
            Fate::Implied("the console is the controller's, at /console")
        }
        "udp-self-balance" | "ne" | "sock-buf-size" => Fate::Implied("every worker serves every listener"),
        "redis-statsdb" => Fate::Implied("statistics are Prometheus metrics, at /metrics of `http`"),
        "check-origin-consistency" => Fate::Implied("ORIGIN decides nothing"),

        "alternate-server" | "tls-alternate-server" => {
            Fate::NotMapped("a relay of a cluster is told by its controllers where to send clients: join it to one")
        }
        "no-auth" => Fate::NotMapped("every client authenticates here: make credentials (static_users, rest_secrets)"),
        "allowed-peer-ip" => Fate::NotMapped("private networks are denied as peers and there is no exception to that"),
        "psql-userdb" | "mysql-userdb" | "mongo-userdb" | "redis-userdb" | "userdb" => Fate::NotMapped(
            "users of a database are not read: use TURN REST credentials, or write them into static_users",
        ),
        "secret-key-file" => Fate::NotMapped("passwords of a database are not read"),
        "oauth" | "server-name" => Fate::NotMapped("access tokens: write third_party with server_name and keys"),
        "tcp-proxy-port" => {
            Fate::NotMapped("write the proxy's network into trusted_proxies; every listener then takes its headers")
        }
        "alt-listening-port" | "alt-tls-listening-port" => Fate::NotMapped(
            "the second address of NAT discovery: write nat_discovery = { alternate_ip, alternate_port }",
        ),
        "aux-server" => Fate::NotMapped("a further listener: add it to listen"),
        "listening-device" | "relay-device" => Fate::NotMapped("write the device's address into listen and relay_ip"),
        "pkey-pwd" => Fate::NotMapped("keys with a passphrase are not read: openssl pkey takes it off"),
        "no-tlsv1_2" => Fate::NotMapped("TLS 1.2 is served beside 1.3; there are clients that know no other"),
        "CA-file" => Fate::NotMapped("clients show no certificates"),
        "secure-stun" => Fate::NotMapped("Binding requests are answered without credentials, as browsers send them"),
        "stun-only" => Fate::NotMapped("a relay serves TURN; without credentials nobody can allocate"),
        "no-stun" => Fate::NotMapped("Binding requests are answered: clients ask before they allocate"),
        "no-udp-relay" => Fate::NotMapped("UDP is what a relay relays"),
        "server-relay" => Fate::NotMapped("peers have to be permitted by their clients (RFC 8656)"),
        "max-allocate-lifetime" | "max-allocate-timeout" | "channel-lifetime" | "permission-lifetime" => {
            Fate::NotMapped("times are those of RFC 8656")
        }
        "rest-api-separator" => Fate::NotMapped("TURN REST names are TIMESTAMP:NAME"),
        "acme-redirect" => Fate::NotMapped("TLS for other protocols goes to web_server; port 80 is not served"),
        _ => return None,
    })
}
