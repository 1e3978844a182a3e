//! See the library.

use std::process::ExitCode;

use clap::Parser as _;
use turnpike_local::arguments::Arguments;
use turnpike_local::{child, cluster, welcome};

fn main() -> ExitCode {
    if let Some(error) = child::become_program_if_asked() {
        return welcome::fail(&anyhow::Error::new(error).context("cannot start the program"));
    }
    let arguments = Arguments::parse();
    // One thread: the kernel ties children to the thread that started them (child.rs).
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime.map_err(anyhow::Error::new).and_then(|runtime| runtime.block_on(cluster::run(arguments))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => welcome::fail(&error),
    }
}
