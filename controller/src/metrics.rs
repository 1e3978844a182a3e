//! Every metric of this binary. Labels are closed sets or names that `identity::is_name` has passed; nothing a client
//! sends becomes one.

use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tonic::Code;

use crate::fleet::{ByTransport, LoadRecord, NodeState, Snapshot, Thresholds};
use crate::store::StoreError;

const BUILD: &str = "turnpike_controller_build_info";
const STORE_UP: &str = "turnpike_controller_store_up";
const STORE_PROBLEM: &str = "turnpike_controller_store_problem";
const NODES: &str = "turnpike_controller_nodes";
const ALLOCATIONS: &str = "turnpike_controller_allocations";
const BY_TRANSPORT: &str = "turnpike_controller_client_allocations";
const LEFT: &str = "turnpike_controller_draining_allocations";
const OVERDUE: &str = "turnpike_controller_drains_overdue";
const JOURNALS_FAILED: &str = "turnpike_controller_journals_failed";
const SETTINGS_BEHIND: &str = "turnpike_controller_settings_behind";
const DISCOVERIES: &str = "turnpike_controller_discoveries_total";
const DNS: &str = "turnpike_controller_dns_answers_total";
const NETCHECKS: &str = "turnpike_controller_netcheck_regions_total";
const SHARED: &str = "turnpike_controller_measured_networks_shared_total";
const GRPC_CALLS: &str = "turnpike_controller_grpc_calls_total";
const GRPC_SECONDS: &str = "turnpike_controller_grpc_call_seconds";
const GRPC_IN_FLIGHT: &str = "turnpike_controller_grpc_calls_in_flight";
const HTTP_REQUESTS: &str = "turnpike_controller_http_requests_total";
const HTTP_SECONDS: &str = "turnpike_controller_http_request_seconds";
const WATCHERS: &str = "turnpike_controller_watchers";
const WATCHERS_BEHIND: &str = "turnpike_controller_watchers_behind_total";
const RELAY_EVENTS: &str = "turnpike_controller_relay_events_total";
const ADMIN_ACTIONS: &str = "turnpike_controller_admin_actions_total";
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

/// Describes every metric of this binary to the recorder in force.
pub fn describe() {
    describe_gauge!(BUILD, "1, with the version of the binary");
    describe_gauge!(STORE_UP, "1 while the store answers, 0 in an outage");
    describe_gauge!(STORE_PROBLEM, "1 for what is wrong with the store (away, full, denied), else 0");
    describe_gauge!(NODES, "Relays known, by state");
    describe_gauge!(ALLOCATIONS, "Allocations on all relays, as last reported");
    describe_gauge!(BY_TRANSPORT, "Allocations on all relays by the transport of their clients, as last reported");
    describe_gauge!(LEFT, "Allocations left on relays that drain");
    describe_gauge!(OVERDUE, "Relays that are past the deadline of their drain and not empty");
    describe_gauge!(JOURNALS_FAILED, "Relays that cannot write their journal: their records are in the store alone");
    describe_gauge!(SETTINGS_BEHIND, "Relays that run with settings older than the newest");
    describe_counter!(DISCOVERIES, "Discovery answers, by outcome (answered, no_relay)");
    describe_counter!(DNS, "DNS answers, by outcome (answered, empty, no_such_name, refused, limited)");
    describe_counter!(NETCHECKS, "Round trips to regions that clients have measured and reported");
    describe_counter!(SHARED, "Measured networks shared between replicas, by outcome (told, lost, taken)");
    describe_counter!(GRPC_CALLS, "gRPC calls and streams ended, by method and status code");
    describe_histogram!(GRPC_SECONDS, Unit::Seconds, "Duration of gRPC calls and streams, by method");
    describe_gauge!(GRPC_IN_FLIGHT, "gRPC calls and streams under way");
    describe_counter!(HTTP_REQUESTS, "HTTP requests answered, by route and status");
    describe_histogram!(HTTP_SECONDS, Unit::Seconds, "Time to the head of an HTTP answer, by route");
    describe_gauge!(WATCHERS, "Open streams of relay events (Steering.Watch and /v1/events)");
    describe_counter!(WATCHERS_BEHIND, "Watchers that fell behind and were told the state anew");
    describe_counter!(RELAY_EVENTS, "Relay events told to watchers, by kind");
    describe_counter!(
        ADMIN_ACTIONS,
        "Calls that change the cluster, by action and outcome (done, denied, failed, unknown)"
    );
    describe_gauge!(CONNECTIONS, "Open client connections, by listener (grpc, http)");
    describe_counter!(HANDSHAKES, "TLS handshakes of the gRPC listener, by outcome (ok, failed, timeout)");
    describe_counter!(REFUSED, "Connections closed at once because too many are open or shaking hands, by listener");
}

/// The fleet as it looks now.
pub fn fleet(snapshot: &Snapshot, thresholds: &Thresholds) {
    let everyone = snapshot.everyone();
    for state in [NodeState::Ready, NodeState::Draining, NodeState::Overloaded, NodeState::Suspect, NodeState::Standby]
    {
        let count = everyone.iter().filter(|node| node.state(thresholds) == state).count();
        gauge!(NODES, "state" => state.to_string()).set(count as f64);
    }
    let allocations: u64 = snapshot.nodes.values().map(|node| node.load.allocations).sum();
    gauge!(ALLOCATIONS).set(allocations as f64);
}

/// How the store did when it was last asked.
pub fn store(health: &Result<(), StoreError>) {
    let problem = match health {
        Ok(()) => "",
        Err(StoreError::Full(_)) => "full",
        Err(StoreError::Denied(_)) => "denied",
        Err(_) => "away",
    };
    gauge!(STORE_UP).set(f64::from(u8::from(problem != "away")));
    for known in ["away", "full", "denied"] {
        gauge!(STORE_PROBLEM, "problem" => known).set(f64::from(u8::from(problem == known)));
    }
}

/// What relays have reported; `overdue` are past the deadline of their drain, `revision` is that of the newest settings.
pub fn reports(snapshot: &Snapshot, overdue: usize, revision: u64) {
    let mut by_transport = ByTransport::default();
    for (transport, count) in snapshot.nodes.values().flat_map(|node| node.load.by_transport.each()) {
        by_transport.add(transport, count);
    }
    let ByTransport { udp, tcp, tls, dtls } = by_transport;
    for (transport, count) in [("udp", udp), ("tcp", tcp), ("tls", tls), ("dtls", dtls)] {
        gauge!(BY_TRANSPORT, "transport" => transport).set(count as f64);
    }
    let left: u64 = snapshot.nodes.values().filter(|node| node.drains()).map(|node| node.load.allocations).sum();
    gauge!(LEFT).set(left as f64);
    gauge!(OVERDUE).set(overdue as f64);
    let count = |is: fn(&LoadRecord, u64) -> bool| {
        snapshot.nodes.values().filter(|node| is(&node.load, revision)).count() as f64
    };
    gauge!(JOURNALS_FAILED).set(count(|load, _| load.journal_failed));
    gauge!(SETTINGS_BEHIND).set(count(|load, newest| (1..newest).contains(&load.settings_revision)));
}

/// A watcher did not keep up.
pub fn watcher_fell_behind() {
    counter!(WATCHERS_BEHIND).increment(1);
}

/// Something was told to watchers. `kind` is of a closed set.
pub fn relay_event(kind: &'static str) {
    counter!(RELAY_EVENTS, "kind" => kind).increment(1);
}

/// A discovery was answered, with relays or with the sentence that there are none.
pub fn discovery(answered: bool) {
    counter!(DISCOVERIES, "outcome" => if answered { "answered" } else { "no_relay" }).increment(1);
}

/// A DNS question has been answered; `outcome` is of a closed set.
pub fn dns(outcome: &'static str) {
    counter!(DNS, "outcome" => outcome).increment(1);
}

/// A client has reported its round trips to so many regions.
pub fn netcheck(regions: usize) {
    counter!(NETCHECKS).increment(regions as u64);
}

/// Measured networks were written to the store (`told`), or not (`lost`), or read from it (`taken`).
pub fn shared(outcome: &'static str, networks: usize) {
    counter!(SHARED, "outcome" => outcome).increment(networks as u64);
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

/// A call that changes the cluster has ended. Both are of closed sets.
pub fn admin_action(action: &str, outcome: &'static str) {
    counter!(ADMIN_ACTIONS, "action" => action.to_owned(), "outcome" => outcome).increment(1);
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

    /// A stream of relay events.
    pub fn watcher() -> Self {
        Self::new(gauge!(WATCHERS))
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
