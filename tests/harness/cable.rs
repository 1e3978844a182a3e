//! The cable between a server and its Ethernet: cut at the plug, or somewhere in the network, and mended; and who on
//! that Ethernet answers for an address.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use patchbay::Router;
use tokio::io::{AsyncBufReadExt, AsyncReadExt};
use tokio::process::Command;
use tokio::time::sleep;

use crate::place::Place;

/// How long answers are waited for.
const ANSWERS: Duration = Duration::from_millis(1500);
/// Between two questions.
const BETWEEN: Duration = Duration::from_millis(300);
/// Port of a datagram that nobody is to read (RFC 863).
const DISCARD: u16 = 9;

/// One server's cable.
pub struct Cable {
    router: Router,
    /// The switch's end of it.
    port: String,
}

impl Cable {
    pub(crate) async fn of(router: &Router, place: &Place) -> Result<Self> {
        let mut command = std::process::Command::new("ip");
        command.args(["-o", "link", "show", "type", "veth"]);
        let output = place.host.output(command).await?;
        // 2: eth0@if12: <...
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let index = text.split_once("@if").and_then(|(_, rest)| rest.split(':').next());
        let index: u32 = index.with_context(|| format!("no cable in {text:?}"))?.parse()?;
        let links = run(router, "ip", &["-o", "link"]).await?;
        let line = links.lines().find(|line| line.starts_with(&format!("{index}: ")));
        let name = line.and_then(|line| line.split([' ', '@', ':']).filter(|word| !word.is_empty()).nth(1));
        Ok(Self { router: router.clone(), port: name.with_context(|| format!("no {index} in {links}"))?.to_owned() })
    }

    /// Cut at the plug, which the server's interface notices; or mended.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn cut(&self, cut: bool) -> Result<()> {
        let state = if cut { "down" } else { "up" };
        run(&self.router, "ip", &["link", "set", "dev", &self.port, state]).await.map(drop)
    }

    /// Cut somewhere in the network, so that nobody notices; or mended.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn mute(&self, mute: bool) -> Result<()> {
        // Disabled, forwarding.
        let state = if mute { "0" } else { "3" };
        run(&self.router, "bridge", &["link", "set", "dev", &self.port, "state", state]).await.map(drop)
    }

    /// Has the switch hand over segments one by one, as a network does: only then does the server's end of a veth put
    /// together what belongs together.
    ///
    /// # Errors
    /// ethtool refuses.
    pub async fn segment(&self) -> Result<()> {
        run(&self.router, "ethtool", &["-K", &self.port, "tso", "off"]).await.map(drop)
    }

    /// Hardware addresses of everybody on the Ethernet who answers for an address.
    ///
    /// # Errors
    /// tcpdump does not run.
    pub async fn answering(&self, address: IpAddr) -> Result<BTreeSet<String>> {
        let mut command = Command::new("tcpdump");
        command.args(["-l", "-n", "-i", "any", &format!("arp[6:2] = 2 and arp src host {address}")]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut listener = self.router.spawn_command(command)?;
        let mut said = BTreeSet::new();
        let (output, errors) = (listener.stdout.take().context("piped")?, listener.stderr.take().context("piped")?);
        let mut errors = tokio::io::BufReader::new(errors);
        let mut line = String::new();
        while !line.contains("listening on") {
            line.clear();
            let read = errors.read_line(&mut line).await?;
            ensure!(read > 0, "tcpdump ended");
        }
        for _ in 0..3 {
            // Forgotten, then asked for again by a packet to it.
            run(&self.router, "ip", &["neigh", "flush", "to", &address.to_string()]).await?;
            self.router.run_sync(move || {
                let any: IpAddr =
                    if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
                Ok(UdpSocket::bind((any, 0))?.send_to(&[], (address, DISCARD))?)
            })?;
            sleep(BETWEEN).await;
        }
        // It ends never by itself.
        sleep(ANSWERS).await;
        listener.kill().await?;
        let mut lines = String::new();
        tokio::io::BufReader::new(output).read_to_string(&mut lines).await?;
        for word in lines.split_whitespace().collect::<Vec<_>>().windows(2) {
            if word[0] == "is-at" {
                said.insert(word[1].trim_end_matches(',').to_owned());
            }
        }
        Ok(said)
    }
}

async fn run(router: &Router, program: &str, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = router.spawn_command(command)?.wait_with_output().await?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {}: {}: {error}", arguments.join(" "), output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
