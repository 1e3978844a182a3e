//! The control plane: fleet, store, steering, discovery and the console.

pub mod allocations;
pub mod api;
pub mod audit;
pub mod config;
pub mod discovery;
pub mod dns;
pub mod fleet;
pub mod geo;
pub mod health;
pub mod identity;
pub mod keys;
pub mod leader;
pub mod metrics;
pub mod presence;
pub mod push;
pub mod replica;
pub mod server;
pub mod sharing;
pub mod steering;
pub mod store;
pub mod sweeper;
pub mod usage;
