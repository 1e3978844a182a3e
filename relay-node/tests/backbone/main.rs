//! Links between relays: real QUIC over loopback, the relays being nothing but their backbone.

mod abuse;
mod links;
mod networks;
mod node;
mod rogue;
mod speed;
mod wire;
