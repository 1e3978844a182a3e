//! The whole cluster on one machine: a controller with the embedded store, three relays in two regions, the console
//! and a call page.
//!
//! [`plan`] decides who listens where, [`files`] writes certificates and configurations, [`supervisor`] keeps the
//! processes running, [`ready`] waits until they serve, [`page`] is the call page, [`welcome`] says how to go on.
//! [`cluster`] joins them.

pub mod arguments;
pub mod child;
pub mod cluster;
pub mod description;
pub mod files;
pub mod machine;
pub mod page;
pub mod plan;
pub mod ready;
pub mod state_directory;
pub mod supervisor;
pub mod welcome;
