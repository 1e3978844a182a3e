//! What the cluster's tests stand on: real processes, a lab of NATs, a browser, an etcd, TURN clients.

pub mod cable;
pub mod call_page;
pub mod caller;
pub mod capture;
pub mod certificate;
pub mod chromium;
pub mod clock;
pub mod cluster;
pub mod coturn;
pub mod delay;
pub mod distance;
pub mod etcd;
pub mod etcd_cluster;
pub mod flood;
pub mod follow;
pub mod hands;
pub mod janus;
pub mod lab;
pub mod otlp;
pub mod partition;
pub mod peer;
pub mod picture;
pub mod place;
pub mod plot;
pub mod process;
pub mod scenario;
pub mod secure;
pub mod traffic;
pub mod turn;
pub mod uclient;
pub mod volume;
pub mod wait;
pub mod web;

pub use process::{Host, Process};
pub use scenario::{Scenario, number, run, run_within};
pub use wait::eventually;
