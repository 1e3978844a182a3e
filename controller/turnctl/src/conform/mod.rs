//! Black-box checks of what the RFCs require of a TURN server, for any server.
//!
//! A check is a row of a table in one of the files here: an id, a section, one sentence, and a function that meets the
//! server as a client would (`Lab`, `Client`, `Peer`) and says what it saw. To add one, write the function and its row.
//!
//! | module | what it knows |
//! |---|---|
//! | `check` | rows and outcomes |
//! | `wire` | a socket over UDP, TCP, TLS, DTLS |
//! | `craft`, `reply` | messages out and in, byte by byte |
//! | `client`, `lab` | a client, users, peers: what a check works with |
//! | `report` | what came of it all, and comparing two runs |
//! | the others | the checks, by section |

mod algorithms;
pub(crate) mod allocate;
mod auth;
mod channel;
pub(crate) mod check;
pub(crate) mod client;
pub(crate) mod craft;
mod discovery;
mod framing;
pub(crate) mod lab;
mod mobility;
mod permission;
mod refresh;
pub(crate) mod reply;
pub(crate) mod report;
pub(crate) mod secure;
mod slow;
mod stun;
pub(crate) mod tcp_allocation;
pub(crate) mod wire;

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::thread;

use turn_core::Transport;

use check::{Check, Outcome, Stop};
use lab::{Lab, Target};
use report::Report;

/// Every check of conformance, in the order of the RFCs.
pub(crate) fn checks() -> Vec<&'static Check> {
    [
        stun::CHECKS,
        auth::CHECKS,
        algorithms::CHECKS,
        allocate::CHECKS,
        refresh::CHECKS,
        permission::CHECKS,
        channel::CHECKS,
        framing::CHECKS,
        secure::CHECKS,
        tcp_allocation::CHECKS,
        discovery::CHECKS,
        mobility::CHECKS,
        slow::CHECKS,
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Which checks run and how many at a time.
pub(crate) struct Choice {
    /// Ids or sections; empty for all.
    pub(crate) only: Vec<String>,
    /// Those that wait for minutes too.
    pub(crate) slow: bool,
    /// Checks that run beside each other.
    pub(crate) jobs: usize,
}

impl Choice {
    pub(crate) fn takes(&self, check: &Check) -> bool {
        let named = |only: &String| {
            let only = only.to_lowercase();
            check.id.starts_with(&only) || check.section.to_lowercase().contains(&only)
        };
        (self.only.is_empty() || self.only.iter().any(named)) && (self.slow || !check.slow)
    }
}

/// Runs the checks over every transport of the target.
pub(crate) fn run(target: &Target, checks: &[&'static Check], choice: &Choice) -> Report {
    let chosen: Vec<&'static Check> = checks.iter().copied().filter(|check| choice.takes(check)).collect();
    let transports: Vec<Transport> = target.servers.iter().map(|(transport, _)| *transport).collect();
    let mut report = Report::new(target, &chosen, &transports);
    let tasks = |alone: bool| -> VecDeque<(usize, Transport)> {
        let rows = chosen.iter().enumerate().filter(|(_, check)| check.alone == alone);
        rows.flat_map(|(row, check)| {
            transports.iter().filter(|transport| check.on.includes(**transport)).map(move |at| (row, *at))
        })
        .collect()
    };
    for (alone, jobs) in [(false, choice.jobs), (true, 1)] {
        let waiting = Mutex::new(tasks(alone));
        let done = Mutex::new(Vec::new());
        thread::scope(|scope| {
            for _ in 0..jobs.max(1) {
                scope.spawn(|| {
                    while let Some((row, transport)) = locked(&waiting).pop_front() {
                        let came = outcome((chosen[row].run)(&Lab::new(target, transport)));
                        locked(&done).push((row, transport, came));
                    }
                });
            }
        });
        for (row, transport, (outcome, seen)) in done.into_inner().unwrap_or_else(PoisonError::into_inner) {
            report.note(row, transport, outcome, seen);
        }
    }
    report
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Whoever panicked with the lock left a whole list behind.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn outcome(came: check::Step) -> (Outcome, String) {
    match came {
        Ok(()) => (Outcome::Pass, String::new()),
        Err(Stop::Fail(seen)) => (Outcome::Fail, seen),
        Err(Stop::NotOffered(seen)) => (Outcome::NotOffered, seen),
        Err(Stop::NotApplicable(seen)) => (Outcome::NotApplicable, seen),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn checks_have_names_of_their_own_and_a_sentence() {
        let checks: Vec<_> = checks().into_iter().chain(crate::abuse::checks()).collect();
        let mut ids = BTreeSet::new();
        for check in &checks {
            assert!(ids.insert(check.id), "{} twice", check.id);
            assert!(check.id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b)));
            assert!(check.says.len() > 10 && !check.says.ends_with('.'), "{}", check.id);
            assert!(!check.section.is_empty());
        }
        assert!(super::checks().len() > 100, "{}", super::checks().len());
    }

    #[test]
    fn checks_are_chosen_by_id_and_by_section() {
        let choice = |only: &str| Choice { only: vec![only.into()], slow: false, jobs: 1 };
        let count = |only| checks().into_iter().filter(|check| choice(only).takes(check)).count();
        assert_eq!(count("delete-at-once"), 1);
        assert!(count("rfc 8656 §8") > 5);
        assert!(count("RFC 6062") > 10);
        assert_eq!(count("nothing of this name"), 0);
        assert_eq!(count("allocation-lifetime"), 0, "slow ones are asked for");
    }
}
