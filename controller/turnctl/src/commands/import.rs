//! `turnctl import`: configurations of other servers.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::coturn::{self, Import, Outcome};
use crate::failure::{Exit, Failure, Result};
use crate::output::{Block, Cell, Output, View, say};

/// Turn another server's configuration into a relay's
#[derive(Debug, Subcommand)]
pub(crate) enum ImportCommand {
    /// Read coturn's turnserver.conf; prints relay.toml, and says what could not be mapped
    #[command(after_help = EXAMPLES)]
    Coturn(CoturnArgs),
}

const EXAMPLES: &str = "\
Examples:
  turnctl import coturn /etc/turnserver.conf > relay.toml
  turnctl import coturn /etc/turnserver.conf -o json | jq .options
  relay-node --config relay.toml --check-config

The relay's configuration goes to standard output, what became of each option to standard error.
With --strict the exit code is 1 where an option could not be mapped.";

/// What to read.
#[derive(Args, Debug)]
pub(crate) struct CoturnArgs {
    /// coturn's configuration
    file: PathBuf,
    /// Fail where something could not be mapped
    #[arg(long)]
    strict: bool,
}

pub(crate) fn run(command: &ImportCommand, output: Output) -> Result {
    let ImportCommand::Coturn(args) = command;
    let bytes = std::fs::read(&args.file)
        .map_err(|error| Failure::new(Exit::NotFound, format!("cannot read {}: {error}", args.file.display())))?;
    let import = coturn::import(&String::from_utf8_lossy(&bytes));
    let mut unmapped = 0;
    for line in &import.options {
        let what = match line.outcome {
            Outcome::Mapped => "mapped",
            Outcome::Implied => "implied",
            Outcome::NotMapped => "NOT MAPPED",
        };
        unmapped += usize::from(line.outcome == Outcome::NotMapped);
        say(&format!("line {:<4} {what:<10} {}: {}", line.line, line.option, line.why));
    }
    say(&format!("{} options, {unmapped} not mapped", import.options.len()));
    if output.format.is_table() {
        output.raw(import.relay.as_bytes())?;
    } else {
        output.show(&import)?;
    }
    if args.strict && unmapped > 0 {
        return Err(Failure::failed(format!("{unmapped} options could not be mapped")));
    }
    Ok(())
}

impl View for Import {
    fn blocks(&self, _: bool, _: u64) -> Vec<Block> {
        vec![Block::Lines(self.relay.lines().map(Cell::from).collect())]
    }
}
