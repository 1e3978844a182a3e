//! The cluster from end to end: real binaries, real sockets, a real etcd, real NATs, real browsers.

mod backbone;
mod controllers;
mod crossing;
mod disaster;
mod drain;
mod draining;
mod flood;
mod keys;
mod local;
mod misuse;
mod nat;
mod nat_kinds;
mod nearest;
mod outage;
mod port443;
mod push;
mod restore;
mod rolling;
mod rotation;
mod standby;
mod steering;
mod store;
mod upgrade;
mod usage;
mod ways;
mod workers;
