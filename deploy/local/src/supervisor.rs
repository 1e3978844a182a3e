//! Keeps one process running until told to stop it.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};

use crate::child;

/// A process that lived this long is started again at once when it ends.
const SETTLED: Duration = Duration::from_secs(5);
/// How long to wait before starting one that ends again and again: whoever tries `kill -9` twice sees no wait.
const BACKOFF: [Duration; 5] =
    [Duration::ZERO, Duration::ZERO, Duration::from_millis(500), Duration::from_secs(2), Duration::from_secs(5)];

/// A program to keep running.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its name, for people.
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Where its output is appended.
    pub log: PathBuf,
}

/// What a member is told. It starts as `Run` and only ever goes down the list.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Order {
    /// Be running.
    Run,
    /// End in order (SIGTERM).
    Stop,
    /// End now (SIGKILL).
    Kill,
}

/// What happened to a member.
#[derive(Debug)]
pub enum Event {
    /// It runs.
    Started {
        /// Which.
        name: String,
        /// Its process id.
        pid: u32,
    },
    /// It ended without having been told to.
    Ended {
        /// Which.
        name: String,
        /// How.
        how: String,
        /// It is started again after this time.
        again_after: Duration,
    },
    /// It could not be started.
    Unstartable {
        /// Which.
        name: String,
        /// Why.
        error: io::Error,
    },
}

/// Runs `member` until `orders` says stop. Ends when the process has ended, or could not be started.
pub async fn supervise(member: Member, mut orders: watch::Receiver<Order>, events: mpsc::Sender<Event>) {
    let mut failures: usize = 0;
    while *orders.borrow_and_update() == Order::Run {
        let began = Instant::now();
        let mut process = match start(&member) {
            Ok(process) => process,
            Err(error) => {
                report(&events, Event::Unstartable { name: member.name, error }).await;
                return;
            }
        };
        if let Some(pid) = process.id() {
            report(&events, Event::Started { name: member.name.clone(), pid }).await;
        }
        let Some(how) = until_ended(&mut process, &mut orders).await else { return };
        failures = if began.elapsed() >= SETTLED { 1 } else { failures + 1 };
        let again_after = BACKOFF[failures.min(BACKOFF.len()) - 1];
        report(&events, Event::Ended { name: member.name.clone(), how, again_after }).await;
        // An order to stop ends the wait early.
        let _ = tokio::time::timeout(again_after, orders.wait_for(|order| *order != Order::Run)).await;
    }
}

/// Nobody listening means that the cluster is ending anyway.
async fn report(events: &mpsc::Sender<Event>, event: Event) {
    let _ = events.send(event).await;
}

fn start(member: &Member) -> io::Result<Child> {
    let log = File::options().create(true).append(true).open(&member.log)?;
    let (program, arguments) = child::tied(member.program.clone(), member.arguments.clone())?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    // Ctrl-C on the terminal is for this process alone: it stops the others in their order.
    command.process_group(0);
    // The files say everything; a variable meant for another relay must not change these.
    for (variable, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TURNPIKE_")) {
        command.env_remove(variable);
    }
    command.spawn()
}

/// How the process ended by itself; `None` when it ended because it was told to.
async fn until_ended(process: &mut Child, orders: &mut watch::Receiver<Order>) -> Option<String> {
    let mut told = Order::Run;
    loop {
        tokio::select! {
            status = process.wait() => {
                let how = status.map_or_else(|error| error.to_string(), describe);
                return (told == Order::Run).then_some(how);
            }
            order = wait_past(orders, told) => {
                told = order;
                let signal = if order == Order::Kill { Signal::KILL } else { Signal::TERM };
                if let Some(pid) = process.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw) {
                    // It may have ended in this instant; the wait above sees that.
                    let _ = kill_process(pid, signal);
                }
            }
        }
    }
}

/// The first order after `told`; one who gives orders no more wants an end.
async fn wait_past(orders: &mut watch::Receiver<Order>, told: Order) -> Order {
    let order = orders.wait_for(|order| *order > told).await.map(|order| *order);
    match order {
        Ok(order) => order,
        Err(_) if told < Order::Kill => Order::Kill,
        Err(_) => std::future::pending().await,
    }
}

/// `exit code 78 (configuration)`, `signal 9`.
fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(78), _) => "exit code 78: its configuration".to_owned(),
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}
