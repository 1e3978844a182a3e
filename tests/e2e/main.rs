//! The cluster from end to end: real binaries, real sockets, a real etcd, real NATs, real browsers.

mod flood;
mod local;
mod misuse;
mod nat;
mod outage;
mod port443;
mod rotation;
mod steering;
mod store;
mod workers;
