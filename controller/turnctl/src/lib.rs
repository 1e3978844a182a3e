//! The command line of a Turnpike cluster.
//!
//! `cli` reads the arguments, `connection` finds a controller, one module in `commands` does the work and
//! `output` alone writes to standard output. The certificates of [`pki`] serve the local cluster and the tests too, the load of
//! [`mod@bench`] the tests.

pub mod bench;
pub mod pki;

mod abuse;
mod cli;
mod commands;
mod conform;
mod connection;
mod contexts;
mod coturn;
mod failure;
mod files;
mod nat;
mod output;
mod probe;
mod stun;
mod units;

pub use cli::{command, run};
