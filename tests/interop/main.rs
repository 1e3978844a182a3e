//! The cluster and clients that were not written here.

mod agents;
mod coturn;
mod janus;
mod tcp_relay;
mod tokens;
mod uclient;
