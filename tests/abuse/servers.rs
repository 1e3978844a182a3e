//! The servers under test: a relay of ours and coturn, each with every transport it has.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use harness::certificate::{Authority, Pair};
use harness::cluster::binary;
use harness::coturn::binding;
use harness::eventually;
use harness::place::Place;
use harness::process::Process;

/// TURN REST secret of both.
const SECRET: &str = "secret of a test";
/// Two users with fixed passwords, for a relay that knows all its users by name.
const FIXED: &str =
    "static_users = [{ username = \"alice\", password = \"one\" }, { username = \"bob\", password = \"two\" }]";
/// The second of these as options of turnctl.
const FIXED_OPTIONS: [&str; 8] =
    ["--user", "alice", "--password", "one", "--other-user", "bob", "--other-password", "two"];
/// Longest a server may take to answer after its start.
const READY: Duration = Duration::from_secs(20);

/// A server that runs, and how to reach it.
pub(crate) struct Server {
    /// How the reports call it.
    pub(crate) label: &'static str,
    /// Where it runs.
    pub(crate) place: Place,
    /// One a transport.
    pub(crate) uris: Vec<String>,
    /// Options that tell turnctl who its users are.
    pub(crate) users: Vec<String>,
    /// Authority of its certificate.
    pub(crate) authority: PathBuf,
    process: Process,
}

impl Server {
    /// A release relay without controllers, with TURN REST users. `more` are further lines of its configuration.
    ///
    /// # Errors
    /// It does not answer.
    pub(crate) async fn ours(place: &Place, directory: &Path, name: &str, more: &str) -> Result<Self> {
        Self::relay(place, directory, name, &format!("rest_secrets = [{SECRET:?}]"), more).await
    }

    /// The same with two fixed users: only such a relay can offer anonymous user names (RFC 8489 §9.2).
    ///
    /// # Errors
    /// It does not answer.
    pub(crate) async fn ours_with_fixed_users(place: &Place, directory: &Path, name: &str, more: &str) -> Result<Self> {
        let mut server = Self::relay(place, directory, name, FIXED, more).await?;
        server.users = FIXED_OPTIONS.map(str::to_owned).to_vec();
        Ok(server)
    }

    async fn relay(place: &Place, directory: &Path, name: &str, users: &str, more: &str) -> Result<Self> {
        let (pair, authority) = certificate(place, directory, name)?;
        let (plain, secure) = (place.at(3478), place.at(5349));
        let text = format!(
            "node_id = \"{name}\"\nregion = \"test\"\nstate_dir = {:?}\nworkers = 2\nhttp = \"\"\n\
             listen = [\"udp://{plain}\", \"tcp://{plain}\", \"tls://{secure}\", \"dtls://{secure}\"]\n\
             relay_ip = \"{ip}\"\npublic_ip = \"{ip}\"\n{users}\n\
             certificates = [{}]\n{more}\n",
            directory.join(format!("{name}.state")),
            pair.entry(),
            ip = place.address,
        );
        let config = directory.join(format!("{name}.toml"));
        fs::write(&config, text)?;
        let mut command = Command::new(binary("relay-node")?);
        command.arg("--config").arg(config);
        Self::start("Turnpike", place, directory, name, command, authority).await
    }

    /// Debian's coturn as it comes, with a second address, which turns its RFC 5780 on. `more` are further options.
    ///
    /// # Errors
    /// It does not answer.
    pub(crate) async fn coturn(place: &Place, directory: &Path, name: &str, more: &[&str]) -> Result<Self> {
        let (Pair { certificate, key }, authority) = certificate(place, directory, name)?;
        let mut command = Command::new("turnserver");
        command.args(["-n", "--no-cli", "--use-auth-secret", "--realm=coturn", "--log-file=stdout", "-m", "2"]);
        command.arg(format!("--static-auth-secret={SECRET}"));
        command.arg(format!("--listening-ip={ip}", ip = place.address)).arg(format!("--relay-ip={}", place.address));
        command.arg(format!("--cert={}", certificate.display())).arg(format!("--pkey={}", key.display()));
        command.arg(format!("--userdb={}", directory.join(format!("{name}.sqlite")).display()));
        command.arg(format!("--pidfile={}", directory.join(format!("{name}.pid")).display()));
        command.args(more);
        Self::start("coturn 4.6.1", place, directory, name, command, authority).await
    }

    async fn start(
        label: &'static str,
        place: &Place,
        directory: &Path,
        name: &str,
        command: Command,
        authority: PathBuf,
    ) -> Result<Self> {
        let process = Process::start(&place.host, directory, name, command)?;
        let (plain, secure) = (place.at(3478), place.at(5349));
        let uris = vec![
            format!("turn:{plain}?transport=udp"),
            format!("turn:{plain}?transport=tcp"),
            format!("turns:{secure}?transport=tcp"),
            format!("turns:{secure}?transport=udp"),
        ];
        let users = vec!["--secret".to_owned(), SECRET.to_owned()];
        let mut server = Self { label, place: place.clone(), uris, users, authority, process };
        eventually(&format!("{name} answers a Binding request"), READY, async || server.answers(plain).await).await?;
        Ok(server)
    }

    async fn answers(&mut self, at: SocketAddr) -> Result<()> {
        self.process.must_run()?;
        self.place.host.run(async move { binding(at).await }).await
    }

    /// Fails if it has ended.
    ///
    /// # Errors
    /// It has; the message holds its last words.
    pub(crate) fn must_run(&mut self) -> Result<()> {
        self.process.must_run().context("after the checks")
    }
}

fn certificate(place: &Place, directory: &Path, name: &str) -> Result<(Pair, PathBuf)> {
    let own = directory.join(format!("{name}.certificates"));
    fs::create_dir_all(&own)?;
    let authority = Authority::new(&own)?;
    let pair = authority.issue(name, &["localhost"], &[place.address])?;
    Ok((pair, authority.root()))
}
