//! The command line: arguments, dispatch, exit code.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::commands::{
    allocations, audit, backbone, bench, ca, completions, conform, context, discover, drain, events, explain, import,
    keys, nat, netcheck, nodes, probe, revoke, status, top, usage, version,
};
use crate::connection::ConnectionOptions;
use crate::failure::{Exit, Failure, Result};
use crate::output::{Format, Output, say};
use crate::units;

/// See and steer a Turnpike cluster of TURN relays.
#[derive(Debug, Parser)]
#[command(name = "turnctl", version, max_term_width = 100, after_help = AFTER_HELP)]
pub(crate) struct Cli {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Examples:
  turnctl status                      is the cluster well, and what to do if not
  turnctl top                         what each relay carries, live
  turnctl explain --client ADDR       why a client is sent where
  turnctl probe                       carry packets through the nearest relays
  turnctl conform turn:example.org    does a server keep to the RFCs
  turnctl allocations list -o json    every live allocation, for programs
  turnctl drain eu-1 --wait           empty a relay before work on it

Connection options are read from TURNCTL_CONTEXT, TURNCTL_CONTROLLER,
TURNCTL_CA, TURNCTL_CERT, TURNCTL_KEY and TURNCTL_CONFIG too.

Exit codes: 0 ok, 1 failed, 2 usage, 3 unhealthy, 4 not found,
5 unreachable, 124 timed out.";

#[derive(Args, Debug)]
struct Options {
    #[command(flatten)]
    connection: ConnectionOptions,
    /// Form of the output; wide is a table with more columns
    #[arg(short, long, global = true, value_enum, default_value_t, help_heading = "Output")]
    output: Format,
    /// Never colour; NO_COLOR does the same
    #[arg(long, global = true, help_heading = "Output")]
    no_color: bool,
    /// Give up after this long, as 10s, 500ms or 2m [default: 30s, endless when watching]
    #[arg(long, global = true, value_name = "TIME", value_parser = units::parse_span, help_heading = "Connection")]
    timeout: Option<Duration>,
}

#[derive(Debug, Subcommand)]
enum Command {
    Status(status::StatusArgs),
    Nodes(nodes::NodesArgs),
    Top(top::TopArgs),
    Regions(nodes::RegionsArgs),
    Allocations(allocations::AllocationsArgs),
    Usage(usage::UsageArgs),
    Drain(drain::DrainArgs),
    Uncordon(drain::UncordonArgs),
    Backbone(backbone::BackboneArgs),
    RevokeRelay(revoke::RevokeArgs),
    ReinstateRelay(revoke::ReinstateArgs),
    Discover(discover::DiscoverArgs),
    Explain(explain::ExplainArgs),
    Credentials(discover::CredentialsArgs),
    Events(events::EventsArgs),
    Audit(audit::AuditArgs),
    Keys(keys::KeysArgs),
    Netcheck(netcheck::NetcheckArgs),
    Nat(nat::NatArgs),
    Probe(probe::ProbeArgs),
    Conform(Box<conform::ConformArgs>),
    Abuse(Box<conform::AbuseArgs>),
    Bench(Box<bench::BenchArgs>),
    #[command(subcommand)]
    Context(context::ContextCommand),
    #[command(subcommand)]
    Import(import::ImportCommand),
    #[command(subcommand)]
    Ca(ca::CaCommand),
    Completions(completions::CompletionsArgs),
    Version(version::VersionArgs),
}

impl Command {
    /// Whether it goes on until it is stopped, so that being stopped is its good end.
    fn is_endless(&self) -> bool {
        match self {
            Self::Status(args) => args.watch,
            Self::Nodes(args) => args.watch,
            Self::Backbone(args) => args.watch,
            Self::Top(args) => args.is_endless(),
            Self::Events(_) => true,
            _ => false,
        }
    }

    /// How long it may take when nobody says so.
    fn patience(&self) -> Option<Duration> {
        match self {
            _ if self.is_endless() => None,
            Self::Drain(args) if args.wait => None,
            Self::Status(args) if args.wait => Some(Duration::from_secs(300)),
            Self::Probe(_) | Self::Nat(_) => Some(Duration::from_secs(120)),
            Self::Conform(_) | Self::Abuse(_) | Self::Bench(_) => Some(Duration::from_secs(3600)),
            _ => Some(Duration::from_secs(30)),
        }
    }

    async fn run(&self, options: &Options) -> Result {
        let output = Output::new(options.output, options.no_color);
        let connection = &options.connection;
        match self {
            Self::Status(args) => status::run(args, connection, output).await,
            Self::Nodes(args) => nodes::run(args, connection, output).await,
            Self::Top(args) => top::run(args, connection, output).await,
            Self::Regions(args) => nodes::regions(args, connection, output).await,
            Self::Allocations(args) => allocations::run(args, connection, output).await,
            Self::Usage(args) => usage::run(args, connection, output).await,
            Self::Drain(args) => drain::drain(args, connection, output).await,
            Self::Uncordon(args) => drain::uncordon(args, connection, output).await,
            Self::Backbone(args) => backbone::run(args, connection, output).await,
            Self::RevokeRelay(args) => revoke::revoke(args, connection, output).await,
            Self::ReinstateRelay(args) => revoke::reinstate(args, connection, output).await,
            Self::Discover(args) => discover::run(args, connection, output).await,
            Self::Explain(args) => explain::run(args, connection, output).await,
            Self::Credentials(args) => discover::credentials(args, connection, output).await,
            Self::Events(args) => events::run(args, connection, output).await,
            Self::Audit(args) => audit::run(args, connection, output).await,
            Self::Keys(args) => keys::run(args, connection, output).await,
            Self::Nat(args) => nat::run(args, connection, output).await,
            Self::Netcheck(args) => netcheck::run(args, connection, output).await,
            Self::Probe(args) => probe::run(args, connection, output).await,
            Self::Conform(args) => conform::run(args, output).await,
            Self::Abuse(args) => conform::run_abuse(args, output).await,
            Self::Bench(args) => bench::run(args, output).await,
            Self::Context(command) => context::run(command, connection, output),
            Self::Import(command) => import::run(command, output),
            Self::Ca(command) => ca::run(command, output),
            Self::Completions(args) => completions::run(args, output),
            Self::Version(args) => version::run(args, output),
        }
    }
}

/// The command line as clap knows it, for whoever wants to know whether a line is one.
pub fn command() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}

/// Runs `turnctl` with the arguments of this process.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    let ended = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::failed(format!("cannot start: {error}")))
        .and_then(|runtime| runtime.block_on(to_the_end(&cli)));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !matches!(failure.exit, Exit::Closed | Exit::Interrupted) {
                say(&format!("error: {failure}"));
            }
            ExitCode::from(failure.exit as u8)
        }
    }
}

async fn to_the_end(cli: &Cli) -> Result {
    let patience = cli.options.timeout.or_else(|| cli.command.patience());
    let deadline = async {
        match patience {
            Some(patience) => tokio::time::sleep(patience).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        ended = cli.command.run(&cli.options) => ended,
        () = deadline => {
            let patience = units::span(patience.unwrap_or_default());
            Err(Failure::new(Exit::Timeout, format!("not done after {patience}")).remedy("--timeout gives it longer"))
        }
        _ = tokio::signal::ctrl_c() => {
            if cli.command.is_endless() { Ok(()) } else { Err(Failure::new(Exit::Interrupted, "interrupted")) }
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_says_what_it_is_for_and_shows_an_example() {
        fn visit(command: &clap::Command) {
            assert!(command.get_about().is_some(), "{} has no about", command.get_name());
            if command.has_subcommands() {
                command.get_subcommands().for_each(visit);
            } else {
                let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(after.contains("turnctl"), "{} shows no example", command.get_name());
            }
        }
        Cli::command().get_subcommands().for_each(visit);
    }
}
