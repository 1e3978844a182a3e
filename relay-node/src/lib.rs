//! A TURN relay: serves STUN/TURN, keeps its allocations through its own death, reports to the controller.
//!
//! | module | what it is |
//! |---|---|
//! | [`accounts`] | what each allocation has used, in a file that outlives the process |
//! | [`address`] | the relay addresses on this machine: watched, raised, defended, lowered |
//! | [`backbone`] | the links to other relays of the cluster |
//! | [`certificates`] | what TLS and DTLS are served with; read anew when a file changes |
//! | [`config`] | what is written (TOML, environment, flags) and what is checked |
//! | [`dataplane`] | one worker thread per core: sockets, the loop, rings between workers |
//! | [`registry`] | node-wide slow-path state: bound ports, counts per user |
//! | [`journal`] | append-only record log in the state directory |
//! | [`kubernetes`] | what a relay in a pod asks the API server: its node, the controllers |
//! | [`control`] | the session with a controller |
//! | [`sys`] | the only unsafe code |

pub mod accounts;
pub mod address;
pub mod backbone;
pub mod certificates;
pub mod config;
pub mod control;
pub mod dataplane;
pub mod health;
pub mod journal;
pub mod kubernetes;
pub mod log;
pub mod metrics;
pub mod registry;
#[cfg(test)]
#[path = "../turn-core/tests/support/sample.rs"]
mod sample;
pub mod state_directory;
pub mod sys;
