//! The session with a controller; off the packet threads, and never needed to carry a packet.
//!
//! | module | what it is |
//! |---|---|
//! | [`session`] | joins, reconnects, hands on what the controller says |
//! | `connection` | one connection to one controller: mTLS, Hello, Welcome |
//! | `elsewhere` | looks for a better controller while the one in use has lost the store |
//! | [`restore`] | journal and store together |
//! | [`reporter`] | which record changes the controller is told, and when (pure) |
//! | [`usage`] | which usage the controller is told, and when |
//! | `cluster` | what the controller said, laid over this relay's own configuration (pure) |
//! | `waiting` | waiting for the address, and handing it over |
//! | [`drain`] | sending new clients elsewhere, and ending |
//! | [`interlink`] | starts the backbone |
//! | `mesh` | the other relays, and the links to them |
//! | `alternates`, `overload` | where they may be sent; whether there is too much to do (pure) |
//! | `load`, `backoff` | what a relay reports of itself each second (pure) |

mod alternates;
pub(crate) mod backoff;
mod cluster;
mod connection;
pub mod drain;
mod elsewhere;
pub mod interlink;
mod load;
mod mesh;
mod overload;
pub mod reporter;
pub mod restore;
pub mod session;
pub mod usage;
mod waiting;

pub use drain::Drain;
pub use session::{Control, Ended};
pub use waiting::{Free, Neighbourhood, Standing, StandingWatch};
