//! The command line of a Turnpike cluster, as a library: the local cluster and the tests use its certificates.

pub mod pki;
