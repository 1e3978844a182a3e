//! RFC 8656 (TURN): what it demands of a server, one test a rule, in its order.

#[path = "../support/mod.rs"]
mod support;

mod allocate;
mod attributes;
mod channel;
mod data;
mod general;
mod permission;
mod refresh;
mod relay;
mod security;
