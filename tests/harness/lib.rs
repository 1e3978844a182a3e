//! What the cluster's tests stand on: real processes, a lab of NATs, a browser, an etcd, TURN clients.

pub mod certificate;
pub mod chromium;
pub mod cluster;
pub mod coturn;
pub mod etcd;
pub mod flood;
pub mod janus;
pub mod lab;
pub mod peer;
pub mod picture;
pub mod place;
pub mod process;
pub mod scenario;
pub mod secure;
pub mod traffic;
pub mod turn;
pub mod uclient;
pub mod wait;
pub mod web;

pub use process::{Host, Process};
pub use scenario::{Scenario, run, run_within};
pub use wait::eventually;
