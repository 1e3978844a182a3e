//! The session with a controller; off the packet threads, and never needed to carry a packet.
//!
//! | module | what it is |
//! |---|---|
//! | [`session`] | joins, reconnects, hands on what the controller says |
//! | `connection` | one connection to one controller: mTLS, Hello, Welcome |
//! | [`reporter`] | which record changes the controller is told, and when (pure) |
//! | `cluster` | what the controller said, laid over this relay's own configuration (pure) |
//! | `load`, `backoff` | what a relay reports of itself each second (pure) |

mod backoff;
mod cluster;
mod connection;
mod load;
pub mod reporter;
pub mod session;

pub use session::{Control, Ended};
