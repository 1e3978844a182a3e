//! The cluster and clients that were not written here.

mod agents;
mod coturn;
mod janus;
mod tokens;
mod uclient;
