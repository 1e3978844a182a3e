//! `turnctl conform` and `turnctl abuse`: what the RFCs require of a TURN server, tried from outside.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs as _, UdpSocket};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use turn_core::Transport;

use super::allocations::{UserName, user_name};
use crate::abuse;
use crate::conform::check::{Check, Stop};
use crate::conform::craft::{BINDING, Craft};
use crate::conform::lab::{Bounds, Lab, Login, Target, Users};
use crate::conform::report::{Comparison, Report, name_of};
use crate::conform::wire::Trust;
use crate::conform::{self, Choice};
use crate::failure::{Exit, Failure, Result};
use crate::output::Output;
use crate::probe::ServerUri;
use crate::units;

/// Check what the TURN and STUN RFCs require, against any server
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ConformArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// Show saved runs (-o json) beside each other instead: what differs, or with -o wide everything
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with = "uris", value_delimiter = ',')]
    compare: Vec<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  turnctl conform turn:192.0.2.7 --user alice --password secret
  turnctl conform turn:127.0.0.1:3478 --transport udp,tcp,tls,dtls --insecure \\
    --user alice --password secret -o wide
  turnctl conform turn:192.0.2.7 --secret s3cret --only 'RFC 8656 §12'
  turnctl conform --compare ours.json,theirs.json -o markdown

The peers of the checks listen on this machine: the server must be able and
willing to reach --peer-ip. A relay that denies loopback or private peers needs
an address it allows, or its lab switch.

Exit codes: 0 every MUST holds, 1 one does not, 5 the server does not answer.";

/// Try hostile input against a TURN server: forbidden peers, broken messages, forged logins, floods
#[derive(Args, Debug)]
#[command(after_help = ABUSE_EXAMPLES)]
pub(crate) struct AbuseArgs {
    #[command(flatten)]
    server: ServerArgs,
}

const ABUSE_EXAMPLES: &str = "\
Examples:
  turnctl abuse turn:192.0.2.7 --secret s3cret --peer-ip 198.51.100.4
  turnctl abuse turn:127.0.0.1:3478 --transport udp,tcp --secret s3cret \\
    --relay-ports 16 --user-quota 4
  turnctl abuse turn:192.0.2.7 --user alice --password secret --only peer-

Checks that put load on the server (a few thousand packets, some hundred
connections) run only against loopback, or with --i-own-this-server. Limits are
reached only where you say how high they are. Give the server no lab switch:
with it, loopback peers are rightly let through.

Exit codes: 0 every MUST holds, 1 one does not, 5 the server does not answer.";

#[derive(Args, Debug)]
struct ServerArgs {
    /// The server: turn:HOST[:PORT][?transport=udp|tcp] or turns:..., one or several
    #[arg(value_name = "URI")]
    uris: Vec<ServerUri>,
    /// Transports to check at the first URI's host and port, instead of the URIs' own
    #[arg(long, value_enum, value_delimiter = ',')]
    transport: Vec<Via>,
    /// User name
    #[arg(long, visible_alias = "username", value_parser = user_name, requires = "password")]
    user: Option<UserName>,
    /// Password; TURNCTL_PASSWORD keeps it out of the process list
    #[arg(long, env = "TURNCTL_PASSWORD", hide_env = true, hide_env_values = true)]
    password: Option<String>,
    /// Another user, for the checks on whose allocation it is
    #[arg(long, value_parser = user_name, requires = "other_password")]
    other_user: Option<UserName>,
    /// Password of the other user
    #[arg(long)]
    other_password: Option<String>,
    /// TURN REST secret to make users with; TURNCTL_SECRET keeps it out of the process list
    #[arg(long, env = "TURNCTL_SECRET", hide_env = true, hide_env_values = true, conflicts_with = "user")]
    secret: Option<String>,
    /// Fail if the server's realm is another
    #[arg(long)]
    realm: Option<String>,
    /// Only checks whose name starts so, or whose section contains it
    #[arg(long, value_name = "NAME|SECTION", value_delimiter = ',')]
    only: Vec<String>,
    /// Address the checks' clients send from [default: the route's]
    #[arg(long, value_name = "IP")]
    from: Option<IpAddr>,
    /// Address of this machine where the checks' peers listen [default: the one the server is reached from; on loopback one beside it]
    #[arg(long, value_name = "IP")]
    peer_ip: Option<IpAddr>,
    /// A second address for peers [default: on loopback the next one]
    #[arg(long, value_name = "IP")]
    other_peer_ip: Option<IpAddr>,
    /// Name in the server's certificate [default: the URI's host]
    #[arg(long, value_name = "NAME")]
    server_name: Option<String>,
    /// Accept any certificate
    #[arg(long)]
    insecure: bool,
    /// Trust this authority instead of the system's, PEM
    #[arg(long = "server-ca", value_name = "FILE", conflicts_with = "insecure")]
    ca: Option<PathBuf>,
    /// Run the checks that wait for minutes too (up to 20)
    #[arg(long)]
    slow: bool,
    /// Checks that run beside each other
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=64))]
    jobs: u16,
    /// How long an answer may take
    #[arg(long, value_name = "TIME", value_parser = units::parse_span, default_value = "3s")]
    patience: Duration,
    /// Name of the server in the report [default: the URI's host and port]
    #[arg(long, value_name = "NAME")]
    label: Option<String>,
    /// Load beyond a client's is allowed, off loopback too
    #[arg(long)]
    i_own_this_server: bool,
    /// Allocations a user may have at this server
    #[arg(long, value_name = "N", help_heading = "Limits of the server")]
    user_quota: Option<u32>,
    /// Ports this server has for relayed addresses
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=256), help_heading = "Limits of the server")]
    relay_ports: Option<u32>,
    /// Permissions an allocation may have
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096), help_heading = "Limits of the server")]
    max_permissions: Option<u32>,
    /// Channels an allocation may have
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4095), help_heading = "Limits of the server")]
    max_channels: Option<u32>,
}

/// Transports, as the option writes them.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Via {
    Udp,
    Tcp,
    Tls,
    Dtls,
}

impl Via {
    fn transport(self) -> Transport {
        match self {
            Self::Udp => Transport::Udp,
            Self::Tcp => Transport::Tcp,
            Self::Tls => Transport::Tls,
            Self::Dtls => Transport::Dtls,
        }
    }
}

pub(crate) async fn run(args: &ConformArgs, output: Output) -> Result {
    if args.compare.is_empty() {
        return check(&args.server, conform::checks(), output).await;
    }
    let reports = args.compare.iter().map(|file| {
        let text = std::fs::read(file).map_err(|error| Failure::usage(format!("{}: {error}", file.display())))?;
        serde_json::from_slice::<Report>(&text)
            .map_err(|error| Failure::usage(format!("{} is no saved run: {error}", file.display())))
    });
    output.show(&Comparison(reports.collect::<Result<_>>()?))
}

pub(crate) async fn run_abuse(args: &AbuseArgs, output: Output) -> Result {
    check(&args.server, abuse::checks(), output).await
}

/// Runs the checks on threads of their own: an interrupt ends them with the process.
async fn check(args: &ServerArgs, checks: Vec<&'static Check>, output: Output) -> Result {
    let target = target(args)?;
    let choice = Choice { only: args.only.clone(), slow: args.slow, jobs: usize::from(args.jobs) };
    let label = args.label.clone();
    let (done, outcome) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        // The receiver is gone when the command was interrupted.
        let _ = done.send(all(target, &checks, &choice, label));
    });
    let report = outcome.await.map_err(|_| Failure::failed("the checks ended without a report"))??;
    output.show(&report)?;
    match report.summary.failed_must {
        0 => Ok(()),
        failed => Err(Failure::failed(format!("{failed} MUST do not hold"))),
    }
}

fn all(mut target: Target, checks: &[&'static Check], choice: &Choice, label: Option<String>) -> Result<Report> {
    let first = target.servers.first().map(|(_, server)| server.to_string()).unwrap_or_default();
    meet(&mut target)?;
    let mut report = conform::run(&target, checks, choice);
    report.server = label.unwrap_or(first);
    report.close();
    Ok(report)
}

/// Sees that every transport answers and the user is let in, before a hundred checks say so each in its own words.
fn meet(target: &mut Target) -> Result {
    let mut slowest = Duration::ZERO;
    for (transport, server) in target.servers.clone() {
        let unreachable = |stop: Stop| {
            let seen = match stop {
                Stop::Fail(seen) | Stop::NotOffered(seen) | Stop::NotApplicable(seen) => seen,
            };
            Failure::new(Exit::Unreachable, format!("{server} over {}: {seen}", name_of(transport)))
                .remedy("is it served there, and is the certificate trusted (--insecure, --server-ca)?")
        };
        let lab = Lab::new(target, transport);
        let mut client = lab.stranger().map_err(unreachable)?;
        let start = Instant::now();
        client.ask(&Craft::request(BINDING)).map_err(unreachable)?;
        slowest = slowest.max(start.elapsed());
        let mut client = lab.client().map_err(unreachable)?;
        match client.signed(lab.allocate()).map_err(unreachable)?.code() {
            0 => {
                if let Err(stop) = client.delete() {
                    return Err(unreachable(stop));
                }
            }
            code => {
                return Err(Failure::failed(format!("Allocate over {} is refused: {code}", name_of(transport)))
                    .remedy("check user and password, or the secret"));
            }
        }
    }
    // Three round trips, and never less than a busy machine takes to schedule two programs.
    target.settle = (slowest * 3).clamp(Duration::from_millis(120), Duration::from_secs(2));
    Ok(())
}

fn target(args: &ServerArgs) -> Result<Target> {
    let users = match (&args.secret, &args.user) {
        (Some(secret), _) => Users::Rest(secret.clone().into_bytes()),
        (None, Some(user)) => {
            let login = |name: &UserName, password: &Option<String>| Login {
                username: name.0.clone(),
                password: password.clone().unwrap_or_default().into_bytes(),
            };
            let other = args.other_user.as_ref().map(|name| login(name, &args.other_password));
            Users::Fixed(login(user, &args.password), other)
        }
        (None, None) => return Err(Failure::usage("a user is needed").remedy("--user and --password, or --secret")),
    };
    let Some(first) = args.uris.first() else { return Err(Failure::usage("a server is needed")) };
    let wanted: Vec<(String, u16, Transport)> = if args.transport.is_empty() {
        args.uris.iter().map(|uri| (uri.host.clone(), uri.port(), uri.transport)).collect()
    } else {
        args.transport
            .iter()
            .map(|via| (first.host.clone(), first.port_for(via.transport()), via.transport()))
            .collect()
    };
    let mut servers = Vec::new();
    for (host, port, transport) in wanted {
        let found = (host.as_str(), port)
            .to_socket_addrs()
            .map_err(|error| Failure::new(Exit::Unreachable, format!("{host}: {error}")))?
            .next()
            .ok_or_else(|| Failure::new(Exit::Unreachable, format!("{host} has no address")))?;
        servers.push((transport, found));
    }
    let server = servers[0].1;
    let from =
        args.from.unwrap_or(if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() });
    let peer_ip = match args.peer_ip {
        Some(ip) => ip,
        // A relay on loopback is not its clients' peer; the addresses beside it are.
        None => match beside(server.ip(), 0x0200) {
            Some(ip) => ip,
            None => route(from, server)?,
        },
    };
    Ok(Target {
        host: args.server_name.clone().unwrap_or_else(|| first.host.clone()),
        servers,
        users,
        realm: args.realm.clone(),
        from,
        peer_ip,
        other_peer_ip: args.other_peer_ip.or_else(|| beside(peer_ip, 0x0100)),
        trust: Trust { insecure: args.insecure, ca: args.ca.clone() },
        bounds: Bounds {
            user_quota: args.user_quota,
            relay_ports: args.relay_ports,
            permissions: args.max_permissions,
            channels: args.max_channels,
        },
        owned: args.i_own_this_server,
        patience: args.patience,
        settle: Duration::from_millis(200),
    })
}

/// The address this machine sends from.
pub(super) fn route(from: IpAddr, server: SocketAddr) -> Result<IpAddr> {
    let local = || -> std::io::Result<IpAddr> {
        let socket = UdpSocket::bind((from, 0))?;
        socket.connect(server)?;
        Ok(socket.local_addr()?.ip())
    };
    local().map_err(|error| Failure::new(Exit::Unreachable, format!("no way to {server}: {error}")))
}

/// Another address of loopback: the whole network is this machine's.
pub(super) fn beside(ip: IpAddr, distance: u32) -> Option<IpAddr> {
    match ip {
        IpAddr::V4(ip) if ip.is_loopback() => Some(Ipv4Addr::from_bits(ip.to_bits() ^ distance).into()),
        _ => None,
    }
}
