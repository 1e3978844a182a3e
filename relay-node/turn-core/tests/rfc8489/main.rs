//! RFC 8489 (STUN): what it demands of a server, one test a rule, in its order.

#[path = "../support/mod.rs"]
mod support;

mod algorithms;
mod alternate;
mod attributes;
mod credentials;
mod integrity;
mod messages;
