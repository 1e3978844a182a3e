//! `turnutils_uclient`: coturn's load generator as a client of ours.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::process::Host;

/// What it is asked to do.
#[derive(Clone, Debug)]
pub struct Load {
    /// Server.
    pub server: SocketAddr,
    /// TURN REST user name.
    pub username: String,
    /// Its password.
    pub password: String,
    /// Sessions; half of them talk to the other half.
    pub sessions: u16,
    /// Messages of each session.
    pub messages: u16,
    /// Bytes of each message.
    pub size: u16,
    /// Flags for the way to the server and for what is asked of it, as its manual lists them: `-t` is TCP, `-S` TLS or
    /// DTLS, `-T` TCP allocations, `-x` IPv6, `-M` mobility.
    pub flags: &'static [&'static str],
}

/// What it counted, over all sessions.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Tally {
    /// Messages sent.
    pub sent: u64,
    /// Messages received.
    pub received: u64,
}

impl Load {
    /// Runs it to its end.
    ///
    /// # Errors
    /// It fails, or its last figures cannot be read.
    pub async fn run(&self, host: &Host, limit: Duration) -> Result<Tally> {
        let mut command = Command::new("turnutils_uclient");
        // -y: sessions talk to each other; -c: no second (RTCP) port; -z: milliseconds between two messages; -s: Send
        // indications, since it draws its channel numbers from RFC 5766's range, most of which RFC 8656 §12 reserves.
        command.args(["-y", "-c", "-s", "-z", "20"]);
        command.args(self.flags);
        command.args(["-u", &self.username, "-w", &self.password, "-p", &self.server.port().to_string()]);
        command.args([
            "-m",
            &self.sessions.to_string(),
            "-n",
            &self.messages.to_string(),
            "-l",
            &self.size.to_string(),
        ]);
        command.arg(self.server.ip().to_string());
        let output =
            tokio::time::timeout(limit, host.output(command)).await.context("turnutils_uclient did not end")??;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let tail = || text.lines().rev().take(8).collect::<Vec<_>>().join(" | ");
        ensure!(output.status.success(), "turnutils_uclient: {}; {}", output.status, tail());
        let Some(tally) = parse(&text) else { bail!("turnutils_uclient printed no totals: {}", tail()) };
        Ok(tally)
    }
}

/// Reads the last line of the form `… tot_send_msgs=N, tot_recv_msgs=N, …`.
fn parse(text: &str) -> Option<Tally> {
    let line = text.lines().rev().find(|line| line.contains("tot_recv_msgs"))?;
    let field = |name: &str| {
        let (_, rest) = line.split_once(name)?;
        rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok()
    };
    Some(Tally { sent: field("tot_send_msgs=")?, received: field("tot_recv_msgs=")? })
}
