//! `turnctl completions`: what the shell asks for.

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use crate::cli::Cli;
use crate::failure::Result;
use crate::output::Output;

/// Print a completion script for a shell
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

const EXAMPLES: &str = "\
Examples:
  source <(turnctl completions bash)
  turnctl completions zsh > ~/.zfunc/_turnctl
  turnctl completions fish > ~/.config/fish/completions/turnctl.fish";

pub(crate) fn run(args: &CompletionsArgs, output: Output) -> Result {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "turnctl", &mut script);
    output.raw(&script)
}
