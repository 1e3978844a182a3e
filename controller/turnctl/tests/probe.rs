//! The probe against coturn, which nobody here wrote.

mod fake;

use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use fake::{Fake, World, parts, turnctl};
use turnpike_proto::v1::{Credential, DiscoverResponse, Relay, Transport};

#[test]
fn packets_pass_over_udp_and_tcp() -> Result<()> {
    let home = tempfile::tempdir()?;
    let coturn = Coturn::start(home.path(), &["--allow-loopback-peers"])?;
    for transport in ["udp", "tcp"] {
        let (code, stdout, stderr) = probe(home.path(), &coturn.uri(transport), "secret", "json")?;
        assert_eq!(code, Some(0), "{stderr}");
        let report: serde_json::Value = serde_json::from_str(&stdout)?;
        let probe = &report["probes"][0];
        assert_eq!(
            (&probe["ok"], &probe["packets_sent"], &probe["packets_returned"]),
            (&true.into(), &5.into(), &5.into())
        );
        let names: Vec<_> =
            probe["steps"].as_array().context("steps")?.iter().filter_map(|it| it["name"].as_str()).collect();
        let expected = [
            "resolve",
            "connect",
            "binding",
            "allocate a",
            "connect b",
            "allocate b",
            "permission a",
            "permission b",
            "channel a",
            "relay",
            "release",
        ];
        assert_eq!(names, expected);
    }
    let (code, stdout, _) = probe(home.path(), &coturn.uri("udp"), "secret", "table")?;
    assert_eq!(code, Some(0));
    assert!(stdout.contains("\nVERDICT") && stdout.contains("\ncarries packets"), "{stdout}");
    Ok(())
}

#[test]
fn refused_credentials_are_1_and_a_closed_port_5() -> Result<()> {
    let home = tempfile::tempdir()?;
    let coturn = Coturn::start(home.path(), &["--allow-loopback-peers"])?;
    let (code, stdout, stderr) = probe(home.path(), &coturn.uri("udp"), "wrong", "table")?;
    assert_eq!(code, Some(1), "{stdout}{stderr}");
    assert!(stderr.contains("401") && stderr.contains("password"), "{stderr}");
    let uris = ["udp", "tcp"].map(|transport| coturn.uri(transport));
    drop(coturn);
    for uri in uris {
        let (code, stdout, stderr) = probe(home.path(), &uri, "secret", "table")?;
        assert_eq!(code, Some(5), "{stdout}{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
    Ok(())
}

#[test]
fn a_relay_that_denies_the_peer_is_3_and_says_what_opens_it() -> Result<()> {
    let home = tempfile::tempdir()?;
    let coturn = Coturn::start(home.path(), &[])?;
    let (code, stdout, stderr) = probe(home.path(), &coturn.uri("udp"), "secret", "table")?;
    assert_eq!(code, Some(3), "{stdout}{stderr}");
    assert!(stderr.contains("403") && stderr.contains("allow_loopback_peers"), "{stderr}");
    Ok(())
}

#[test]
fn discovered_relays_are_probed_each_way_and_from_one_to_the_next() -> Result<()> {
    let home = tempfile::tempdir()?;
    let coturns = [
        Coturn::start(home.path(), &["--allow-loopback-peers"])?,
        Coturn::start(home.path(), &["--allow-loopback-peers"])?,
    ];
    let relay = |coturn: &Coturn| Relay {
        uris: vec![coturn.uri("udp"), coturn.uri("tcp"), "turns:127.0.0.1:5349?transport=tcp".into()],
        ..Relay::default()
    };
    let discovery = DiscoverResponse {
        relays: coturns.iter().map(relay).collect(),
        credential: Some(Credential {
            username: b"alice".to_vec(),
            password: "secret".into(),
            ..Credential::default()
        }),
        region: "eu".into(),
    };
    let fake = Fake::start(World { discovery, ..World::default() })?;
    let arguments = ["probe", "--region", "eu", "--relays", "2", "--transport", "udp,tcp", "-o", "json"];
    let (code, stdout, stderr) = parts(&fake.turnctl(&arguments)?);
    assert_eq!(code, Some(0), "{stdout}{stderr}");
    let report: serde_json::Value = serde_json::from_str(&stdout)?;
    let ways: Vec<_> = report["probes"]
        .as_array()
        .context("probes")?
        .iter()
        .map(|probe| (probe["server"].as_str().unwrap_or(""), probe["peer_server"].as_str().unwrap_or("")))
        .collect();
    let uri = |at: usize, transport| coturns[at].uri(transport);
    let (u0, t0, u1, t1) = (uri(0, "udp"), uri(0, "tcp"), uri(1, "udp"), uri(1, "tcp"));
    assert_eq!(ways, [(&*u0, &*u0), (&*t0, &*t0), (&*u1, &*u1), (&*t1, &*t1), (&*u0, &*u1)]);
    assert!(stderr.contains("passing over turns:"), "{stderr}");

    let world = fake.world.lock().expect("lock");
    let asked = world.discover_requests.first().context("a request")?;
    assert_eq!((asked.region.as_str(), asked.limit), ("eu", 2));
    assert_eq!(asked.transports, [Transport::Udp as i32, Transport::Tcp as i32]);
    Ok(())
}

fn probe(home: &Path, uri: &str, password: &str, form: &str) -> Result<(Option<i32>, String, String)> {
    let mut command = turnctl(home);
    command.args(["probe", "--server", uri, "--username", "alice", "-o", form]).env("TURNCTL_PASSWORD", password);
    Ok(parts(&command.output()?))
}

/// Debian's turnserver on a free loopback port; ended when dropped.
struct Coturn {
    process: Child,
    port: u16,
}

impl Coturn {
    fn start(home: &Path, further: &[&str]) -> Result<Self> {
        let port = free_port()?;
        let process = Command::new("turnserver")
            .args(["-n", "--listening-ip", "127.0.0.1", "--relay-ip", "127.0.0.1", "--no-tls", "--no-dtls", "--no-cli"])
            .args(["--lt-cred-mech", "--realm", "test", "--user", "alice:secret", "--log-file", "stdout"])
            .args(["--listening-port", &port.to_string()])
            .args(["--userdb", &home.join(format!("{port}.db")).to_string_lossy()])
            .args(["--pidfile", &home.join(format!("{port}.pid")).to_string_lossy()])
            .args(further)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("turnserver is missing: apt-get install coturn")?;
        let mut coturn = Self { process, port };
        let deadline = Instant::now() + Duration::from_secs(20);
        while !coturn.answers()? {
            if let Some(ended) = coturn.process.try_wait()? {
                bail!("turnserver ended: {ended}");
            }
            if Instant::now() > deadline {
                bail!("turnserver does not answer");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(coturn)
    }

    /// Whether it listens for TCP and answers a Binding over UDP; it opens them one after the other.
    fn answers(&self) -> Result<bool> {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        socket.connect(("127.0.0.1", self.port))?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        socket.send(b"\x00\x01\x00\x00\x21\x12\xA4\x42abcdefghijkl")?;
        let answered = socket.recv(&mut [0; 512]).is_ok();
        Ok(answered && TcpStream::connect(("127.0.0.1", self.port)).is_ok())
    }

    fn uri(&self, transport: &str) -> String {
        format!("turn:127.0.0.1:{}?transport={transport}", self.port)
    }
}

impl Drop for Coturn {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A port that UDP and TCP can have, below those that the kernel and relays give out.
fn free_port() -> Result<u16> {
    loop {
        let mut random = [0; 2];
        getrandom::fill(&mut random)?;
        let port = 10_000 + u16::from_ne_bytes(random) % 20_000;
        let address = ("127.0.0.1", port);
        if UdpSocket::bind(address).is_ok() && TcpListener::bind(address).is_ok() {
            return Ok(port);
        }
    }
}
