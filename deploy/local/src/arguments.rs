//! The command line.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

/// Starts a Turnpike cluster on this machine and keeps it running until Ctrl-C: a controller, relays in two regions,
/// the console and a call page.
#[derive(Clone, Debug, Parser)]
#[command(name = "turnpike-local", version, max_term_width = 100)]
pub struct Arguments {
    /// Directory of certificates, configurations, state and logs.
    #[arg(long, env = "TURNPIKE_LOCAL_DIR", default_value = ".turnpike", value_name = "DIR")]
    pub dir: PathBuf,

    /// IPv4 address under which other devices reach this machine: relays serve on it, the call page on all addresses.
    /// One relay serves on one address; given two or three times, as many relays start.
    #[arg(long, value_name = "IP")]
    pub public_ip: Vec<Ipv4Addr>,

    /// Serve the call page over https, with a certificate from the local authority: browsers give camera and
    /// microphone to other devices only so.
    #[arg(long)]
    pub https: bool,

    /// Added to every port: 3478 (TURN), 8000 (call page), 8080 (console), 9443 (gRPC), 9478-9480 (relay health).
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=39_000))]
    pub port_offset: u16,

    /// Forget certificates, store and relay state of earlier runs first.
    #[arg(long)]
    pub fresh: bool,

    /// Print one line of JSON when the cluster is ready, instead of the text for people.
    #[arg(long)]
    pub json: bool,

    /// Write the same JSON to FILE when the cluster is ready, and again when a process was started anew.
    #[arg(long, value_name = "FILE")]
    pub ready_file: Option<PathBuf>,

    /// Give up when the cluster is not ready after this many seconds.
    #[arg(long, default_value = "30", value_name = "SECONDS", value_parser = seconds)]
    pub ready_timeout: Duration,

    /// Log level of controller and relays, as their `log` key takes it.
    #[arg(long, default_value = "info", value_name = "LEVEL")]
    pub log: String,
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<u64>() {
        Ok(seconds @ 1..=3600) => Ok(Duration::from_secs(seconds)),
        _ => Err("give a number of seconds from 1 to 3600".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser as _};

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn offsets_that_would_reach_the_relayed_ports_are_refused() {
        assert!(Arguments::try_parse_from(["turnpike-local", "--port-offset", "39000"]).is_ok());
        assert!(Arguments::try_parse_from(["turnpike-local", "--port-offset", "39001"]).is_err());
    }
}
