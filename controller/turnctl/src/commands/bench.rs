//! `turnctl bench`: what a server carries, and whether it arrives whole.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs as _};
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::allocations::{UserName, user_name};
use super::conform::{beside, route};
use crate::bench::{Account, BenchError, Counts, Load, Measured, Mode, Pace, Plan};
use crate::conform::lab::rest_login;
use crate::failure::{Exit, Failure, Result};
use crate::output::{Block, Cell, Output, Tone, View};
use crate::probe::ServerUri;
use crate::units;

/// What a client may do to a server that is somebody else's: a call of two with video.
const CLIENT: Bounds = Bounds { flows: 4, rate: 1000, length: Duration::from_secs(30) };
/// What is too much for anybody.
const MOST: Bounds = Bounds { flows: 10_000, rate: 1_000_000, length: Duration::from_secs(600) };
/// Packets under way at `--rate max`.
const WINDOW: usize = 128;

struct Bounds {
    flows: usize,
    /// Packets a second.
    rate: u32,
    length: Duration,
}

/// Put load on a TURN server: packets a second, latency, and what was lost, changed or misdelivered
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct BenchArgs {
    /// The server: turn:HOST[:PORT][?transport=udp|tcp]
    #[arg(value_name = "URI")]
    uri: ServerUri,
    /// User name
    #[arg(long, visible_alias = "username", value_parser = user_name, requires = "password")]
    user: Option<UserName>,
    /// Password; TURNCTL_PASSWORD keeps it out of the process list
    #[arg(long, env = "TURNCTL_PASSWORD", hide_env = true, hide_env_values = true)]
    password: Option<String>,
    /// TURN REST secret to make a user with; TURNCTL_SECRET keeps it out of the process list
    #[arg(long, env = "TURNCTL_SECRET", hide_env = true, hide_env_values = true, conflicts_with = "user")]
    secret: Option<String>,
    /// Who sends to whom
    #[arg(long, value_enum, value_delimiter = ',', default_value = "up,down,echo,pair")]
    mode: Vec<Way>,
    /// Allocations, each with one channel
    #[arg(long, value_name = "N", default_value_t = 4)]
    flows: usize,
    /// Bytes of application data in a packet, 24 to 1400
    #[arg(long, value_name = "BYTES", default_value_t = 172)]
    size: usize,
    /// Packets that a flow sends behind each other, 1 to 64
    #[arg(long, value_name = "N", default_value_t = 1)]
    burst: usize,
    /// Packets a second of all flows, or max: as many as arrive
    #[arg(long, value_name = "N|max", value_parser = parse_rate, default_value = "200")]
    rate: Rate,
    /// How long each mode is measured
    #[arg(long, value_name = "TIME", value_parser = units::parse_span, default_value = "5s")]
    length: Duration,
    /// Address of this machine where the peers listen [default: the one the server is reached from; on loopback one beside it]
    #[arg(long, value_name = "IP")]
    peer_ip: Option<IpAddr>,
    /// Load beyond a client's is allowed, off loopback too
    #[arg(long)]
    i_own_this_server: bool,
}

const EXAMPLES: &str = "\
Examples:
  turnctl bench turn:192.0.2.7 --user alice --password secret
  turnctl bench turn:127.0.0.1 --user alice --password secret --flows 200 --rate max
  turnctl bench 'turn:192.0.2.7?transport=tcp' --secret s3cret --mode echo -o json
  turnctl bench turn:192.0.2.7 --secret s3cret --size 1200 --burst 16 --rate 20000 \\
    --i-own-this-server

More than 4 flows, 1,000 packets a second or 30 seconds a mode are put on
loopback servers only, or with --i-own-this-server. The peers listen on this
machine: the server must be able and willing to reach --peer-ip.

Exit codes: 0 what arrived was right, 1 something was not, 3 nothing arrived,
5 the server does not answer.";

/// Packets a second; nothing for as many as arrive.
#[derive(Clone, Copy, Debug)]
struct Rate(Option<u32>);

fn parse_rate(text: &str) -> std::result::Result<Rate, String> {
    if text == "max" {
        return Ok(Rate(None));
    }
    text.parse().ok().filter(|rate| *rate > 0).map(|rate| Rate(Some(rate))).ok_or_else(|| "a number, or max".into())
}

/// Modes, as the option writes them.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Way {
    Up,
    Down,
    Echo,
    Pair,
}

impl Way {
    fn mode(self) -> Mode {
        match self {
            Self::Up => Mode::Up,
            Self::Down => Mode::Down,
            Self::Echo => Mode::Echo,
            Self::Pair => Mode::Pair,
        }
    }
}

/// What a run showed.
#[derive(Debug, Serialize)]
struct BenchReport {
    server: String,
    transport: &'static str,
    flows: usize,
    size: usize,
    burst: usize,
    modes: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    mode: Mode,
    seconds: f64,
    /// Delivered a second.
    packets_per_second: f64,
    bytes_per_second: f64,
    loss_percent: f64,
    /// From the sender to the last receiver; nothing where nothing arrived.
    p50_ms: Option<f64>,
    p99_ms: Option<f64>,
    counts: Counts,
}

impl View for BenchReport {
    fn blocks(&self, wide: bool, _now_ms: u64) -> Vec<Block> {
        let mut head = vec!["MODE", "PACKETS/S", "RATE", "LOSS", "P50", "P99", "FAULTS"];
        if wide {
            head.extend(["SENT", "DELIVERED", "REORDERED"]);
        }
        let rows = self.modes.iter().map(|row| {
            let latency = |ms: Option<f64>| Cell::from(ms.map_or(String::new(), |ms| format!("{ms:.2} ms")));
            let faults = row.faults();
            let mut cells = vec![
                Cell::from(format!("{:?}", row.mode).to_lowercase()),
                Cell::from(format!("{:.0}", row.packets_per_second)),
                Cell::from(units::bit_rate(row.bytes_per_second as u64)),
                Cell::toned(
                    format!("{:.2}%", row.loss_percent),
                    if row.loss_percent < 0.5 { Tone::Plain } else { Tone::Attention },
                ),
                latency(row.p50_ms),
                latency(row.p99_ms),
                Cell::toned(&faults, if row.counts.is_clean() { Tone::Good } else { Tone::Bad }),
            ];
            if wide {
                let counts = [row.counts.sent, row.counts.delivered, row.counts.reordered];
                cells.extend(counts.map(|count| Cell::from(count.to_string())));
            }
            cells
        });
        vec![Block::Table { head, rows: rows.collect() }]
    }
}

impl Row {
    fn of(mode: Mode, size: usize, measured: &Measured) -> Self {
        let seconds = measured.elapsed.as_secs_f64();
        let packets_per_second = measured.delivered as f64 / seconds;
        let quantile = |permille| measured.latency.quantile(permille).map(|time| time.as_secs_f64() * 1e3);
        Self {
            mode,
            seconds,
            packets_per_second,
            bytes_per_second: packets_per_second * size as f64,
            loss_percent: measured.counts.loss_percent(),
            p50_ms: quantile(500),
            p99_ms: quantile(990),
            counts: measured.counts,
        }
    }

    fn faults(&self) -> String {
        let named = [
            ("duplicated", self.counts.duplicates),
            ("corrupt", self.counts.corrupt),
            ("misdelivered", self.counts.misdelivered),
        ];
        let seen: Vec<String> =
            named.into_iter().filter(|(_, count)| *count > 0).map(|(name, count)| format!("{count} {name}")).collect();
        if seen.is_empty() { "none".into() } else { seen.join(", ") }
    }
}

pub(crate) async fn run(args: &BenchArgs, output: Output) -> Result {
    let plan = plan(args)?;
    let (modes, length) = (args.mode.iter().map(|way| way.mode()).collect::<Vec<_>>(), args.length);
    let (done, outcome) = tokio::sync::oneshot::channel();
    let carried = plan.clone();
    // On a thread of its own: an interrupt ends it with the process.
    std::thread::spawn(move || {
        let rows: Result<Vec<Row>> = modes.into_iter().map(|mode| carry(&carried, mode, length)).collect();
        // The receiver is gone when the command was interrupted.
        let _ = done.send(rows);
    });
    let rows = outcome.await.map_err(|_| Failure::failed("the load ended without a report"))??;
    let report = BenchReport {
        server: plan.server.to_string(),
        transport: if plan.transport.is_stream() { "tcp" } else { "udp" },
        flows: plan.flows,
        size: plan.size,
        burst: plan.burst,
        modes: rows,
    };
    output.show(&report)?;
    if report.modes.iter().any(|row| !row.counts.is_clean()) {
        return Err(Failure::failed("packets arrived that were not sent so"));
    }
    if report.modes.iter().any(|row| row.counts.delivered == 0) {
        let remedy = "the server must reach the peers on this machine: --peer-ip";
        return Err(Failure::new(Exit::Unhealthy, "nothing arrived").remedy(remedy));
    }
    Ok(())
}

fn carry(plan: &Plan, mode: Mode, length: Duration) -> Result<Row> {
    let mut load = Load::open(Plan { mode, ..plan.clone() })?;
    let (measured, _) = load.run(Duration::from_millis(200), length, || ())?;
    load.close()?;
    Ok(Row::of(mode, plan.size, &measured))
}

impl From<BenchError> for Failure {
    fn from(error: BenchError) -> Self {
        let exit = match &error {
            BenchError::Silence | BenchError::Socket(_) => Exit::Unreachable,
            BenchError::Refused(..) => Exit::Failed,
            BenchError::Plan(_) => Exit::Usage,
        };
        Self::new(exit, error.to_string())
    }
}

fn plan(args: &BenchArgs) -> Result<Plan> {
    let account = match (&args.secret, &args.user) {
        (Some(secret), _) => {
            let login = rest_login(secret.as_bytes(), "bench", 3600);
            Account { username: login.username, password: login.password }
        }
        (None, Some(user)) => {
            Account { username: user.0.clone(), password: args.password.clone().unwrap_or_default().into_bytes() }
        }
        (None, None) => return Err(Failure::usage("a user is needed").remedy("--user and --password, or --secret")),
    };
    let host = &args.uri.host;
    let server: SocketAddr = (host.as_str(), args.uri.port())
        .to_socket_addrs()
        .map_err(|error| Failure::new(Exit::Unreachable, format!("{host}: {error}")))?
        .next()
        .ok_or_else(|| Failure::new(Exit::Unreachable, format!("{host} has no address")))?;
    within(args, &MOST).map_err(|what| Failure::usage(format!("{what} is too much for any server")))?;
    if !server.ip().is_loopback() && !args.i_own_this_server {
        within(args, &CLIENT).map_err(|what| {
            Failure::usage(format!("{what} is more than a client's load on {server}"))
                .remedy("if it is yours, --i-own-this-server")
        })?;
    }
    if !matches!(args.uri.transport, turn_core::Transport::Udp | turn_core::Transport::Tcp) {
        return Err(Failure::usage("load is put on a server by UDP or TCP"));
    }
    let from: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let peers = match args.peer_ip {
        Some(ip) => ip,
        // A relay on loopback is not its clients' peer; the addresses beside it are.
        None => match beside(server.ip(), 0x0200) {
            Some(ip) => ip,
            None => route(from, server)?,
        },
    };
    Ok(Plan {
        server,
        transport: args.uri.transport,
        account,
        far: None,
        from,
        peers,
        mode: Mode::Up,
        flows: args.flows,
        size: args.size,
        burst: args.burst,
        pace: args.rate.0.map_or(Pace::Window(WINDOW), Pace::Rate),
        spin: false,
    })
}

/// What of the load is beyond the bounds.
fn within(args: &BenchArgs, bounds: &Bounds) -> std::result::Result<(), String> {
    if args.flows > bounds.flows {
        return Err(format!("--flows {}", args.flows));
    }
    match args.rate.0 {
        Some(rate) if rate > bounds.rate => return Err(format!("--rate {rate}")),
        None if bounds.rate < MOST.rate => return Err("--rate max".into()),
        _ => {}
    }
    if args.length > bounds.length { Err(format!("--length {}", units::span(args.length))) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        bench: BenchArgs,
    }

    fn planned(arguments: &[&str]) -> std::result::Result<Plan, String> {
        let user = ["bench", "--user", "alice", "--password", "secret"];
        let line = Line::try_parse_from(user.iter().chain(arguments)).map_err(|error| error.to_string())?;
        plan(&line.bench).map_err(|failure| failure.to_string())
    }

    #[test]
    fn strangers_servers_get_a_clients_load() {
        for ok in
            [&["turn:192.0.2.7", "--peer-ip", "192.0.2.1"][..], &["turn:127.0.0.1", "--rate", "max", "--flows", "999"]]
        {
            assert!(planned(ok).is_ok(), "{ok:?}");
        }
        for beyond in [["--flows", "5"], ["--rate", "1001"], ["--rate", "max"], ["--length", "31s"]] {
            let arguments = [&["turn:192.0.2.7", "--peer-ip", "192.0.2.1"][..], &beyond].concat();
            let refused = planned(&arguments).expect_err("beyond a client's");
            assert!(refused.contains("--i-own-this-server"), "{refused}");
            assert!(planned(&[&arguments[..], &["--i-own-this-server"]].concat()).is_ok(), "{beyond:?}");
        }
        for beyond in [["--flows", "10001"], ["--rate", "1000001"], ["--length", "11m"]] {
            let refused = planned(&[&["turn:127.0.0.1"][..], &beyond].concat()).expect_err("beyond all bounds");
            assert!(refused.contains("any server"), "{refused}");
        }
    }
}
