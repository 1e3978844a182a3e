//! `turnctl version`.

use clap::Args;
use serde::Serialize;

use crate::failure::Result;
use crate::output::{Block, Cell, Output, View};

/// Print the version of turnctl; 'turnctl status' shows the controller's
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  turnctl version -o json")]
pub(crate) struct VersionArgs {}

pub(crate) fn run(_: &VersionArgs, output: Output) -> Result {
    output.show(&VersionView { version: env!("CARGO_PKG_VERSION") })
}

#[derive(Debug, Serialize)]
struct VersionView {
    version: &'static str,
}

impl View for VersionView {
    fn blocks(&self, _wide: bool, _now_ms: u64) -> Vec<Block> {
        vec![Block::Lines(vec![Cell::from(format!("turnctl {}", self.version))])]
    }
}
