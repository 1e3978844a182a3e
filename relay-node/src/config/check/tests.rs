use std::net::Ipv4Addr;

use super::*;

const MACHINE: Machine = Machine { cores: 4, route_v4: Some(Ipv4Addr::new(8, 8, 4, 4)), route_v6: None };
const NAMED: &str = "node_id = \"eu-1\"\nregion = \"eu\"\n";

fn check(text: &str, machine: &Machine) -> Result<Settings, ConfigError> {
    Config::parse(&format!("{NAMED}{text}"))?.check(machine)
}

#[test]
fn what_is_left_out_is_found() {
    let settings = check("", &MACHINE).expect("the defaults are good");
    assert_eq!(settings.workers, 4);
    assert_eq!(settings.relay_address, "8.8.4.4".parse::<IpAddr>().expect("literal"));
    assert_eq!(settings.relay_ips.len(), 1);
    assert_eq!(settings.relay_ports, 49152..=65535);
    assert_eq!(settings.controllers, None);
    let many = Machine { cores: 500, ..MACHINE };
    assert_eq!(check("", &many).expect("good").workers, 64);
}

#[test]
fn relay_addresses_are_given_or_found() {
    type Row<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)]);
    let cases: &[Row] = &[
        ("default route", "", &[("8.8.4.4", "8.8.4.4")]),
        ("the listen address", "listen = [\"udp://8.8.8.8:3478\"]", &[("8.8.8.8", "8.8.8.8")]),
        ("given", "relay_ip = \"9.9.9.9\"", &[("9.9.9.9", "9.9.9.9")]),
        ("one-to-one NAT", "relay_ip = \"10.0.0.5\"\npublic_ip = \"8.8.8.8\"", &[("10.0.0.5", "8.8.8.8")]),
        ("a private network", "relay_ip = \"10.0.0.5\"\npublic_ip = \"10.0.0.5\"", &[("10.0.0.5", "10.0.0.5")]),
        ("the lab", "listen = [\"udp://127.0.0.2:3478\"]\nallow_loopback_peers = true", &[("127.0.0.2", "127.0.0.2")]),
        ("both families", "relay_ip6 = \"2a00:1450::1\"", &[("8.8.4.4", "8.8.4.4"), ("2a00:1450::1", "2a00:1450::1")]),
        ("IPv6 only", "listen = [\"udp://[2a00:1450::1]:3478\"]", &[("2a00:1450::1", "2a00:1450::1")]),
    ];
    for (what, text, expected) in cases {
        let settings = check(text, &MACHINE).unwrap_or_else(|error| panic!("{what}: {error}"));
        let found: Vec<_> =
            settings.relay_ips.iter().map(|ip| (ip.bound.to_string(), ip.advertised.to_string())).collect();
        let expected: Vec<_> = expected.iter().map(|(a, b)| ((*a).into(), (*b).into())).collect();
        assert_eq!(found, expected, "{what}");
        assert_eq!(settings.relay_address, settings.relay_ips[0].advertised, "{what}");
    }
}

#[test]
fn listeners_are_advertised_by_their_outer_address() {
    let text = "relay_ip = \"10.0.0.5\"\npublic_ip = \"8.8.8.8\"\n\
                listen = [\"udp://0.0.0.0:3478\", \"tcp://10.0.0.5:443\", \"tcp://9.9.9.9:80\", \"udp://[::]:3478\"]";
    let listeners = check(text, &MACHINE).expect("good").advertised_listeners();
    let text: Vec<_> = listeners.iter().map(|(t, a)| format!("{t:?} {a}")).collect();
    assert_eq!(text, ["Udp 8.8.8.8:3478", "Tcp 8.8.8.8:443", "Tcp 9.9.9.9:80"]);
}

#[test]
fn mistakes_name_the_key_and_the_way_out() {
    let nowhere = Machine { route_v4: None, ..MACHINE };
    let tls = "tls = { ca = \"a\", certificate = \"b\" }";
    let cases: &[(&str, &Machine, &str)] = &[
        ("", &nowhere, "relay_ip: no address found: there is no default route; set relay_ip"),
        ("public_ip = \"8.8.8.8\"", &nowhere, "relay_ip: no address found to serve 8.8.8.8 from; set relay_ip"),
        ("relay_ip = \"0.0.0.0\"", &MACHINE, "relay_ip: 0.0.0.0 is not one address"),
        ("public_ip = \"224.0.0.1\"", &MACHINE, "public_ip: 224.0.0.1 is not one address"),
        (
            "relay_ip = \"10.0.0.5\"",
            &MACHINE,
            "public_ip: the relay address 10.0.0.5 is private; set public_ip to the address clients and peers reach",
        ),
        (
            "listen = [\"udp://127.0.0.1:3478\"]",
            &MACHINE,
            "public_ip: the relay address 127.0.0.1 is loopback; set public_ip to the address clients and peers reach, \
             or allow_loopback_peers = true for a lab",
        ),
        ("relay_ip6 = \"fd00::1\"", &MACHINE, "public_ip6: the relay address fd00::1 is private; set public_ip6"),
        ("public_ip6 = \"2a00:1450::1\"", &MACHINE, "relay_ip6: no address found to serve 2a00:1450::1 from"),
        ("listen = []", &MACHINE, "listen: is empty"),
        (
            "listen = [\"0.0.0.0:3478\"]",
            &MACHINE,
            "listen: \"0.0.0.0:3478\" must start with udp://, tcp://, tls:// or dtls://",
        ),
        ("listen = [\"dtls://0.0.0.0:5349\"]", &MACHINE, "certificates: missing, and listen names dtls://0.0.0.0:5349"),
        ("listen = [\"udp://host:3478\"]", &MACHINE, "listen: \"udp://host:3478\" must end in IP:PORT"),
        ("listen = [\"udp://0.0.0.0:0\"]", &MACHINE, "listen: \"udp://0.0.0.0:0\" needs a port"),
        (
            "listen = [\"udp://0.0.0.0:1\", \"udp://0.0.0.0:1\"]",
            &MACHINE,
            "listen: \"udp://0.0.0.0:1\" is already served by udp://0.0.0.0:1",
        ),
        (
            "listen = [\"udp://0.0.0.0:1\", \"udp://8.8.8.8:1\"]",
            &MACHINE,
            "listen: \"udp://8.8.8.8:1\" is already served by udp://0.0.0.0:1",
        ),
        ("relay_ports = [5000, 4000]", &MACHINE, "relay_ports: 5000-4000 is no range"),
        ("relay_ports = [0, 4000]", &MACHINE, "relay_ports: 0-4000 is no range"),
        ("relay_ports = [3000, 4000]", &MACHINE, "relay_ports: 3000-4000 holds the listen port 3478 on the same IP"),
        ("workers = 65", &MACHINE, "workers: 65 is more than 64"),
        ("realm = \"\"", &MACHINE, "realm: must have 1 to 127 characters"),
        ("rest_secrets = [\"\"]", &MACHINE, "rest_secrets: holds an empty secret"),
        ("static_users = [{ username = \"\", password = \"\" }]", &MACHINE, "static_users: a user name must have"),
        ("http = \"9478\"", &MACHINE, "http: \"9478\" is not IP:PORT"),
        ("http = \"0.0.0.0:3478\"", &MACHINE, "http: 0.0.0.0:3478 is in listen too"),
        ("stream_send_cap = 1000", &MACHINE, "stream_send_cap: 1000 is less than one frame"),
        ("max_connections = 0", &MACHINE, "max_connections: 0 would refuse"),
        ("denied_peers = [\"10.0.0.0\"]", &MACHINE, "denied_peers: \"10.0.0.0\" is not a network"),
        ("denied_peers = [\"10.0.0.0/33\"]", &MACHINE, "denied_peers: \"10.0.0.0/33\" is not a network"),
        ("log = \"loud=very\"", &MACHINE, "log: \"loud=very\" is not a filter"),
        ("log_format = \"xml\"", &MACHINE, "log_format: \"xml\" is neither text nor json"),
        ("controllers = [\"localhost\"]", &MACHINE, "controllers: \"localhost\" is not a controller's address"),
        ("controllers = [\"http://a:1\"]", &MACHINE, "controllers: \"http://a:1\" is not a controller's address"),
        ("controllers = [\"https://a:1\"]", &MACHINE, "tls.ca: missing"),
        (&format!("controllers = [\"https://a:1\"]\n{tls}"), &MACHINE, "tls.key: missing"),
        ("zone = \"a b\"", &MACHINE, "zone: \"a b\" is not a name"),
    ];
    for (text, machine, expected) in cases {
        let error = check(text, machine).expect_err(text).to_string();
        assert!(error.starts_with(expected), "{text}\n  said:     {error}\n  expected: {expected}");
        assert!(!error.contains('\n'), "{error}");
    }
    let unnamed = Config::default().check(&MACHINE).expect_err("a relay has a name").to_string();
    assert!(unnamed.starts_with("node_id: missing: name it"), "{unnamed}");
}

#[test]
fn listeners_on_other_addresses_may_use_relay_ports() {
    check("relay_ip = \"9.9.9.9\"\nlisten = [\"udp://8.8.8.8:50000\"]", &MACHINE).expect("another IP");
}
