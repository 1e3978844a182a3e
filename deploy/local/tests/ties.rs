//! Processes started by the local cluster do not outlive it, however it ends.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// A stand-in for the cluster: a shell that starts the go-between, says the child's process id and waits.
fn parent_with_child() -> (Child, u32) {
    let binary = env!("CARGO_BIN_EXE_turnpike-local");
    let script = format!("{binary} --become-child-of $$ sleep 600 & echo $!; wait");
    let mut parent = Command::new("sh").args(["-c", &script]).stdout(Stdio::piped()).spawn().expect("a shell");
    let mut line = String::new();
    BufReader::new(parent.stdout.take().expect("output")).read_line(&mut line).expect("a process id");
    (parent, line.trim().parse().expect("a number"))
}

fn eventually(what: &str, holds: impl Fn() -> bool) {
    let limit = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < limit, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn program(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

/// Gone, or waiting for somebody to ask how it ended.
fn has_ended(pid: u32) -> bool {
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z')),
        Err(_) => true,
    }
}

#[test]
fn a_child_ends_with_its_parent_even_when_that_is_killed() {
    let (mut parent, child) = parent_with_child();
    eventually("the go-between becomes the program, under the same process id", || program(child) == "sleep");
    parent.kill().expect("killed");
    parent.wait().expect("ended");
    eventually("the child has ended", || has_ended(child));
}

#[test]
fn a_child_whose_parent_lives_is_left_alone_and_can_be_stopped() {
    let (mut parent, child) = parent_with_child();
    eventually("the program runs", || program(child) == "sleep");
    assert!(Path::new(&format!("/proc/{child}")).exists() && !has_ended(child));
    let pid = Pid::from_raw(i32::try_from(child).expect("a process id")).expect("not 0");
    kill_process(pid, Signal::TERM).expect("told to end");
    parent.wait().expect("the shell ends with its child");
}

#[test]
fn a_child_whose_parent_is_gone_already_does_not_start() {
    // Process 1 is nobody's stand-in for the parent: this process is.
    let output = Command::new(env!("CARGO_BIN_EXE_turnpike-local"))
        .args(["--become-child-of", "1", "sleep", "600"])
        .output()
        .expect("the binary");
    assert!(!output.status.success());
    assert_eq!(String::from_utf8_lossy(&output.stderr), "error: cannot start the program: the parent has ended\n");
}
