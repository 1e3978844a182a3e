//! coturn: the server that ours is compared with, and its load generator.

use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use serde_json::{Value, json};
use sha1::Sha1;

use crate::certificate::Pair;
use crate::place::Place;
use crate::process::{Around, Process};
use crate::turn::Login;
use crate::wait::eventually;

/// Secret of the coturn that a test starts.
const SECRET: &str = "coturn-of-a-test";
/// Realm of it.
const REALM: &str = "coturn";

/// Its port of TLS and DTLS.
const TLS: u16 = 443;

/// How it is started.
pub struct Flavour {
    /// Its path, or name.
    pub program: PathBuf,
    /// Threads that relay.
    pub threads: u16,
    /// What it is started in.
    pub around: Around,
    /// More arguments.
    pub more: Vec<String>,
}

impl Default for Flavour {
    fn default() -> Self {
        Self { program: "turnserver".into(), threads: 2, around: Around::default(), more: Vec::new() }
    }
}

/// A running `turnserver`.
pub struct Coturn {
    process: Process,
    address: SocketAddr,
}

impl Coturn {
    /// Starts it on port 3478 of an address of `host`; relays between any addresses.
    ///
    /// # Errors
    /// It is not installed or does not answer.
    pub async fn start(place: &Place, directory: &Path) -> Result<Self> {
        Self::launch(place, directory, None, &Flavour::default()).await
    }

    /// The same, with TLS and DTLS on port 443.
    ///
    /// # Errors
    /// It is not installed or does not answer.
    pub async fn start_secure(place: &Place, directory: &Path, certificate: &Pair) -> Result<Self> {
        Self::launch(place, directory, Some(certificate), &Flavour::default()).await
    }

    /// The same as [`Coturn::start`], otherwise.
    ///
    /// # Errors
    /// It is not installed or does not answer.
    pub async fn start_as(place: &Place, directory: &Path, flavour: &Flavour) -> Result<Self> {
        Self::launch(place, directory, None, flavour).await
    }

    async fn launch(place: &Place, directory: &Path, certificate: Option<&Pair>, flavour: &Flavour) -> Result<Self> {
        let address = place.address;
        let mut command = flavour.around.command(&flavour.program);
        match certificate {
            Some(pair) => {
                command.arg(format!("--cert={}", pair.certificate.display()));
                command.arg(format!("--pkey={}", pair.key.display())).arg(format!("--tls-listening-port={TLS}"));
            }
            None => {
                command.args(["--no-tls", "--no-dtls"]);
            }
        }
        command.args(["-n", "--no-cli", "--fingerprint", "--use-auth-secret", "--log-file=stdout"]);
        command.args(["--allow-loopback-peers", "--no-software-attribute"]);
        command.arg("-m").arg(flavour.threads.to_string()).args(&flavour.more);
        command.arg(format!("--static-auth-secret={SECRET}")).arg(format!("--realm={REALM}"));
        command.arg(format!("--listening-ip={address}")).arg(format!("--relay-ip={address}"));
        command.arg(format!("--userdb={}", directory.join("coturn.sqlite").display()));
        command.arg(format!("--pidfile={}", directory.join("coturn.pid").display()));
        let process = Process::start(&place.host, directory, "coturn", command)?;
        let mut server = Self { process, address: SocketAddr::new(address, 3478) };
        let to = server.address;
        eventually("coturn answers a Binding request", Duration::from_secs(20), async || {
            server.process.must_run()?;
            place.host.run(async move { binding(to).await }).await
        })
        .await?;
        Ok(server)
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Where clients reach it.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where clients reach it by TLS and DTLS.
    #[must_use]
    pub fn secure_address(&self) -> SocketAddr {
        SocketAddr::new(self.address.ip(), TLS)
    }

    /// Fresh credentials.
    ///
    /// # Errors
    /// The clock stands before 1970.
    pub fn login(&self) -> Result<Login> {
        rest_credentials(SECRET.as_bytes(), "test")
    }

    /// `iceServers` with fresh credentials; `transport` is `udp`, `tcp` or `tls`.
    ///
    /// # Errors
    /// The clock stands before 1970.
    pub fn ice_servers(&self, transport: &str) -> Result<Value> {
        let login = self.login()?;
        let url = match transport {
            "tls" => format!("turns:{}?transport=tcp", self.secure_address()),
            plain => format!("turn:{}?transport={plain}", self.address),
        };
        Ok(json!([{"urls": [url], "username": login.username, "credential": login.password}]))
    }
}

/// User name and password as a TURN REST service mints them, good for an hour. Written here once more on purpose: it
/// checks the cluster's own against an independent reading of the draft.
///
/// # Errors
/// The clock stands before 1970.
pub fn rest_credentials(secret: &[u8], user: &str) -> Result<Login> {
    let expires = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs() + 3600;
    let username = format!("{expires}:{user}");
    let mut mac = Hmac::<Sha1>::new_from_slice(secret)?;
    mac.update(username.as_bytes());
    let password = STANDARD.encode(mac.finalize().into_bytes());
    Ok(Login { username, password })
}

/// One STUN Binding request over UDP, answered or not within 200 ms.
///
/// # Errors
/// No answer.
pub async fn binding(server: SocketAddr) -> Result<()> {
    let any: SocketAddr = if server.is_ipv4() { "0.0.0.0:0".parse()? } else { "[::]:0".parse()? };
    let socket = UdpSocket::bind(any)?;
    socket.set_nonblocking(true)?;
    let socket = tokio::net::UdpSocket::from_std(socket)?;
    let mut request = [0; 20];
    request[1] = 1;
    request[4..8].copy_from_slice(&[0x21, 0x12, 0xA4, 0x42]);
    getrandom::fill(&mut request[8..]).map_err(|e| anyhow!("{e}"))?;
    socket.send_to(&request, server).await?;
    let mut answer = [0; 512];
    let receive = tokio::time::timeout(Duration::from_millis(200), socket.recv_from(&mut answer));
    let (length, _) = receive.await.context("no answer to a Binding request")??;
    if length < 20 || answer[..2] != [0x01, 0x01] || answer[8..20] != request[8..] {
        bail!("not an answer to the Binding request");
    }
    Ok(())
}
