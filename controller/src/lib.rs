//! The control plane: fleet, store, steering, discovery and the console.

pub mod config;
pub mod fleet;
pub mod identity;
pub mod steering;
pub mod store;
