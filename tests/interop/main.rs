//! The cluster and clients that were not written here.

mod coturn;
mod janus;
mod tokens;
mod uclient;
