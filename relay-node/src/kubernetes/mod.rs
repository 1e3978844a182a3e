//! What a relay that runs in Kubernetes asks its API server, as its own service account: where its node is (region, zone,
//! public address), whether the node is cordoned, and where the controllers are.
//!
//! A relay needs the API server as little as it needs a controller: what was found last is kept in the state directory,
//! and nothing that is served waits for an answer.

mod api;
mod facts;
mod node;
mod watch;

pub use api::{Api, ApiError};
pub use facts::{Facts, find, keep};
pub use watch::{follow_controllers, follow_node};
