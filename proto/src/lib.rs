//! The gRPC contracts of Turnpike, generated from `proto/turnpike/v1/*.proto`, and how traces travel with its calls.

#[cfg(feature = "trace")]
pub mod trace;

/// Version 1 of the contracts.
#[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all)]
pub mod v1 {
    tonic::include_proto!("turnpike.v1");

    /// The descriptors of every service, for gRPC reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("turnpike.v1");
}
