//! The command line of a Turnpike cluster.
//!
//! `cli` reads the arguments, `connection` finds a controller, one module in `commands` does the work and
//! `output` alone writes to standard output. The certificates of [`pki`] serve the local cluster and the tests too.

pub mod pki;

mod abuse;
mod cli;
mod commands;
mod conform;
mod connection;
mod contexts;
mod failure;
mod files;
mod output;
mod probe;
mod units;

pub use cli::run;
