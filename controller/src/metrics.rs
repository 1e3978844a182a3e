//! Every metric of this binary. Labels are closed sets or names that `identity::is_name` has passed; nothing a client
//! sends becomes one.

use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tonic::Code;

use crate::fleet::{NodeState, Snapshot, Thresholds};

const BUILD: &str = "turnpike_controller_build_info";
const STORE_UP: &str = "turnpike_controller_store_up";
const NODES: &str = "turnpike_controller_nodes";
const ALLOCATIONS: &str = "turnpike_controller_allocations";
const DISCOVERIES: &str = "turnpike_controller_discoveries_total";
const GRPC_CALLS: &str = "turnpike_controller_grpc_calls_total";
const GRPC_SECONDS: &str = "turnpike_controller_grpc_call_seconds";
const GRPC_IN_FLIGHT: &str = "turnpike_controller_grpc_calls_in_flight";
const HTTP_REQUESTS: &str = "turnpike_controller_http_requests_total";
const HTTP_SECONDS: &str = "turnpike_controller_http_request_seconds";
const CONNECTIONS: &str = "turnpike_controller_connections";
const HANDSHAKES: &str = "turnpike_controller_tls_handshakes_total";
const REFUSED: &str = "turnpike_controller_connections_refused_total";

/// Seconds; discovery takes well under a millisecond, a store write a few.
const BUCKETS: &[f64] = &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// Makes this process's recorder. Streams are left out of durations by their callers' labels.
///
/// # Errors
/// If the process has one already.
pub fn install() -> Result<PrometheusHandle, BuildError> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), BUCKETS)?
        .install_recorder()?;
    describe();
    gauge!(BUILD, "version" => env!("CARGO_PKG_VERSION")).set(1);
    Ok(handle)
}

fn describe() {
    describe_gauge!(BUILD, "1, with the version of the binary");
    describe_gauge!(STORE_UP, "1 while the store answers, 0 in an outage");
    describe_gauge!(NODES, "Relays known, by state");
    describe_gauge!(ALLOCATIONS, "Allocations on all relays, as last reported");
    describe_counter!(DISCOVERIES, "Discovery answers, by outcome (answered, no_relay)");
    describe_counter!(GRPC_CALLS, "gRPC calls and streams ended, by method and status code");
    describe_histogram!(GRPC_SECONDS, Unit::Seconds, "Duration of gRPC calls and streams, by method");
    describe_gauge!(GRPC_IN_FLIGHT, "gRPC calls and streams under way");
    describe_counter!(HTTP_REQUESTS, "HTTP requests answered, by route and status");
    describe_histogram!(HTTP_SECONDS, Unit::Seconds, "Time to the head of an HTTP answer, by route");
    describe_gauge!(CONNECTIONS, "Open client connections, by listener (grpc, http)");
    describe_counter!(HANDSHAKES, "TLS handshakes of the gRPC listener, by outcome (ok, failed, timeout)");
    describe_counter!(REFUSED, "Connections closed at once because too many are open or shaking hands, by listener");
}

/// The fleet as it looks now.
pub fn fleet(snapshot: &Snapshot, thresholds: &Thresholds, store_healthy: bool) {
    for state in [NodeState::Ready, NodeState::Draining, NodeState::Overloaded, NodeState::Suspect] {
        let count = snapshot.nodes.values().filter(|node| node.state(thresholds) == state).count();
        gauge!(NODES, "state" => state.to_string()).set(count as f64);
    }
    let allocations: u64 = snapshot.nodes.values().map(|node| node.load.allocations).sum();
    gauge!(ALLOCATIONS).set(allocations as f64);
    gauge!(STORE_UP).set(f64::from(u8::from(store_healthy)));
}

/// A discovery was answered, with relays or with the sentence that there are none.
pub fn discovery(answered: bool) {
    counter!(DISCOVERIES, "outcome" => if answered { "answered" } else { "no_relay" }).increment(1);
}

/// A gRPC call or stream has ended. `method` is of a closed set.
pub fn grpc_call(method: &'static str, code: Code, took: Duration) {
    counter!(GRPC_CALLS, "method" => method, "code" => code_name(code)).increment(1);
    histogram!(GRPC_SECONDS, "method" => method).record(took.as_secs_f64());
}

/// An HTTP request has been answered. `route` is a route of the router, not a path from the wire.
pub fn http_request(route: String, status: u16, took: Duration) {
    counter!(HTTP_REQUESTS, "route" => route.clone(), "status" => status.to_string()).increment(1);
    histogram!(HTTP_SECONDS, "route" => route).record(took.as_secs_f64());
}

/// A TLS handshake has ended: `ok`, `failed` or `timeout`.
pub fn handshake(outcome: &'static str) {
    counter!(HANDSHAKES, "outcome" => outcome).increment(1);
}

/// A connection was closed at once.
pub fn refused(listener: &'static str) {
    counter!(REFUSED, "listener" => listener).increment(1);
}

/// Counts something that is under way for as long as it lives.
#[derive(Debug)]
pub struct InFlight(metrics::Gauge);

impl InFlight {
    /// A gRPC call or stream.
    pub fn grpc() -> Self {
        Self::new(gauge!(GRPC_IN_FLIGHT))
    }

    /// A connection of `listener`.
    pub fn connection(listener: &'static str) -> Self {
        Self::new(gauge!(CONNECTIONS, "listener" => listener))
    }

    fn new(gauge: metrics::Gauge) -> Self {
        gauge.increment(1);
        Self(gauge)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.decrement(1);
    }
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::Cancelled => "cancelled",
        Code::Unknown => "unknown",
        Code::InvalidArgument => "invalid_argument",
        Code::DeadlineExceeded => "deadline_exceeded",
        Code::NotFound => "not_found",
        Code::AlreadyExists => "already_exists",
        Code::PermissionDenied => "permission_denied",
        Code::ResourceExhausted => "resource_exhausted",
        Code::FailedPrecondition => "failed_precondition",
        Code::Aborted => "aborted",
        Code::OutOfRange => "out_of_range",
        Code::Unimplemented => "unimplemented",
        Code::Internal => "internal",
        Code::Unavailable => "unavailable",
        Code::DataLoss => "data_loss",
        Code::Unauthenticated => "unauthenticated",
    }
}
