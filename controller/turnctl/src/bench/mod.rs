//! Load on a TURN server by a light client, and what of it arrived: behind `turnctl bench` and `tests/bench`.
//!
//! Control messages are those of [`turn_core::client`]; the load is ChannelData in batches (sendmmsg, recvmmsg), every
//! packet numbered and with a checksum, so that loss, duplicates, corruption and misdelivery are counted and not assumed
//! away. One thread carries it.
//!
//! | module | what it is |
//! |---|---|
//! | [`caller`] | a client: its socket, its allocation, its channel |
//! | [`packet`] | what a packet carries besides ballast |
//! | [`tally`] | what arrived of a flow |
//! | [`batch`] | datagrams by sendmmsg and recvmmsg |
//! | [`load`] | the flows between clients and peers, and how fast |
//! | [`spread`] | latencies, counted |

pub mod batch;
pub mod caller;
pub mod load;
pub mod packet;
pub mod spread;
pub mod tally;

pub use caller::{Account, BenchError, Caller};
pub use load::{Load, Measured, Mode, Pace, Plan};
pub use spread::Spread;
pub use tally::Counts;
