//! Starting a process that does not outlive this one.
//!
//! `PR_SET_PDEATHSIG` has to be set in the child, between fork and exec, which takes unsafe code; so this binary is
//! started as a go-between that sets it on itself and then becomes the wanted program. The kernel sends the signal when
//! the *thread* that started the child ends: children are started from the main thread only.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

/// First argument of the go-between.
const MARK: &str = "--become-child-of";

/// The program and arguments that start `program` as a child that is sent SIGTERM when this process ends.
///
/// # Errors
/// When the path of this very binary cannot be told.
pub fn tied(program: PathBuf, arguments: Vec<OsString>) -> std::io::Result<(PathBuf, Vec<OsString>)> {
    let mut all = vec![OsString::from(MARK), std::process::id().to_string().into(), program.into()];
    all.extend(arguments);
    Ok((std::env::current_exe()?, all))
}

/// Whether this process was started as a go-between; then it becomes the program and does not come back, unless that
/// fails.
pub fn become_program_if_asked() -> Option<std::io::Error> {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next()? != MARK {
        return None;
    }
    let parent = arguments.next()?.to_str()?.parse().ok().and_then(Pid::from_raw)?;
    let program = arguments.next()?;
    if let Err(error) = set_parent_process_death_signal(Some(Signal::TERM)) {
        return Some(error.into());
    }
    // The parent may have ended before the line above: then there is nobody left to work for.
    if getppid() != Some(parent) {
        return Some(std::io::Error::other("the parent has ended"));
    }
    Some(Command::new(program).args(arguments).exec())
}
