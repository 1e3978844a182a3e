//! STUN and TURN (RFC 8489, RFC 8656) as a value.
//!
//! A [`Server`] turns (time, bytes, addresses) into a [`Verdict`] for the packet in hand and [`Output`]s for
//! whoever mirrors its state. It owns no socket, clock, thread or task; both clocks and the random seed are
//! arguments, so a test can replay any history.
//!
//! The contract: after every [`Server::handle_input`], drain [`Server::poll_output`], then arm
//! [`Server::poll_timeout`]. A success answer is only given for what a [`Host`] has already bound, and the worker
//! writes the drained [`Output::Record`]s to its journal *before* it sends the answer (journal before reply).
//!
//! | module | what it knows |
//! |---|---|
//! | [`wire`] | bytes: STUN messages, attributes, ChannelData, integrity; imports nothing outside itself |
//! | [`address`] | five-tuples, paths, peers, relayed addresses: different things, different types |
//! | [`policy`] | which peers a client may reach |
//! | [`credential`] | time-limited and static credentials: mint and verify |
//! | [`key`] | keys of message integrity, password algorithms, USERHASH |
//! | [`third_party`] | access tokens of authorization servers (RFC 7635) |
//! | [`nonce`] | nonces that need no table |
//! | [`meter`] | bandwidth: rates that threads share without a lock |
//! | [`record`] | the versioned allocation record: encode, decode, merge |
//! | [`index`] | places by a hash of their names |
//! | [`ticket`] | tickets of mobility |
//! | [`server`] | the TURN server |
//! | [`text`] | names from the wire, for people |
//! | [`client`] | a TURN client as a value, for probes and tests |

pub mod address;
pub mod client;
pub mod credential;
pub mod index;
pub mod key;
pub mod meter;
pub mod nonce;
pub mod policy;
pub mod record;
pub mod server;
pub mod settings;
pub mod text;
pub mod third_party;
pub mod ticket;
pub mod wire;

pub use address::{
    AccountId, ConnectionId, Family, FiveTuple, ListenerId, MemberId, Path, PeerAddr, PeerConnectionId, PeerTransport,
    RelayedAddr, Transport, WorkerId,
};
pub use key::{IntegrityKey, PasswordAlgorithm};
pub use meter::{Meter, Meters};
pub use policy::Policy;
pub use record::{AllocationId, Change, EndReason, Record};
pub use server::{
    BindError, BindRequest, Bound, ClaimError, ConnectError, DiscoveryPlace, DropReason, Head, Host, Input, IpMeta,
    NatDiscovery, Now, Out, Output, PeerEvent, PortRequest, RESERVED_FOR, Redirected, Route, Server, Verdict, Vouchers,
};
pub use settings::{Alternate, Features, Key, KeyRing, Limits, Settings, StaticUser};
pub use third_party::{Session, ThirdParty};
pub use ticket::Ticket;
