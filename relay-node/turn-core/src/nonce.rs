//! Nonces that need no table (promise P9): a MAC under the cluster's key ring over the client's address and a time,
//! in the `obMatJos2` form of RFC 8489 §9.2, valid on every member.
