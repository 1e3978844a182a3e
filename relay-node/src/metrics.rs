//! Every metric name of this binary. Labels are bounded: worker index, direction, reason, method, code.

use std::sync::Weak;
use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

use crate::dataplane::{Dataplane, WorkerSnapshot};

const ALLOCATIONS: &str = "turn_allocations";
const CONNECTIONS: &str = "turn_connections";
const DTLS_SESSIONS: &str = "turn_dtls_sessions";
const DTLS_HANDSHAKES: &str = "turn_dtls_handshakes";
const HELLO_VERIFY_REQUESTS: &str = "turn_dtls_hello_verify_requests_total";
const RELAYED_PACKETS: &str = "turn_relayed_packets_total";
const RELAYED_BYTES: &str = "turn_relayed_bytes_total";
const REFUSED_CONNECTIONS: &str = "turn_refused_connections_total";
const DROPPED: &str = "turn_dropped_packets_total";
const REQUESTS: &str = "turn_requests_total";
const CROSSED: &str = "turn_crossed_packets_total";
const WORKER_CPU: &str = "turn_worker_cpu_seconds_total";
const JOURNAL_ERRORS: &str = "turn_journal_errors_total";
const RESTORED: &str = "turn_restored_allocations_total";
const REFUSED_RECORDS: &str = "turn_refused_records_total";
const EPOCH: &str = "turn_epoch";
const CONTROL_CONNECTED: &str = "turn_control_connected";
const CONTROL_RECONNECTS: &str = "turn_control_reconnects_total";
const RECORDS_PENDING: &str = "turn_records_pending";
const BATCHES_IN_FLIGHT: &str = "turn_record_batches_in_flight";
const RESYNCS: &str = "turn_resyncs_total";
const BUILD_INFO: &str = "turn_build_info";

const DIRECTIONS: [&str; 2] = ["to_peer", "to_client"];

/// Where records came from.
#[derive(Clone, Copy, Debug)]
pub enum Source {
    /// This relay's journal.
    Journal,
    /// The cluster's store.
    Store,
}

/// Installs the recorder of this process and describes every metric.
///
/// # Errors
/// When the process has a recorder already.
pub fn install() -> anyhow::Result<PrometheusHandle> {
    let recorder = PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder)?;
    describe();
    gauge!(BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1);
    // Rates and alerts need a zero to start from.
    control_connected(false);
    backlog(0, 0);
    counter!(CONTROL_RECONNECTS).absolute(0);
    counter!(RESYNCS).absolute(0);
    Ok(handle)
}

fn describe() {
    describe_gauge!(ALLOCATIONS, "Allocations held, by worker");
    describe_gauge!(CONNECTIONS, "Open stream connections of clients, by worker");
    describe_gauge!(DTLS_SESSIONS, "DTLS sessions, those with half a handshake too, by worker");
    describe_gauge!(DTLS_HANDSHAKES, "DTLS handshakes that have not ended, by worker");
    describe_counter!(HELLO_VERIFY_REQUESTS, "ClientHellos answered with a cookie and nothing kept, by worker");
    describe_counter!(RELAYED_PACKETS, "Packets relayed, by worker and direction");
    describe_counter!(RELAYED_BYTES, Unit::Bytes, "Application bytes relayed, by worker and direction");
    describe_counter!(DROPPED, "Packets dropped, by worker and reason");
    describe_counter!(REFUSED_CONNECTIONS, "Stream connections closed before they were of use, by worker and reason");
    describe_counter!(REQUESTS, "Requests answered, by worker, method and error code (0 is success)");
    describe_counter!(CROSSED, "Packets handed to the worker that owns their shard, by the worker that got them");
    describe_counter!(WORKER_CPU, Unit::Seconds, "CPU time of a worker's thread");
    describe_counter!(JOURNAL_ERRORS, "Journal writes that failed, by worker");
    describe_counter!(RESTORED, "Allocations brought back at start, by source");
    describe_counter!(REFUSED_RECORDS, "Records that were damaged or of another seal, by source");
    describe_gauge!(EPOCH, "Epoch under which this relay owns its address");
    describe_gauge!(CONTROL_CONNECTED, "1 while there is a session with a controller");
    describe_counter!(CONTROL_RECONNECTS, "Sessions with controllers that ended and were to be replaced");
    describe_gauge!(RECORDS_PENDING, "Allocations with changes that have not been sent to the controller");
    describe_gauge!(BATCHES_IN_FLIGHT, "Record batches the store has not acknowledged");
    describe_counter!(RESYNCS, "Full statements of all records sent to a controller");
    describe_gauge!(BUILD_INFO, "1, labelled with the version of this binary");
}

/// Publishes what the workers count until the data plane is gone.
pub async fn publish_each_second(dataplane: Weak<Dataplane>) {
    let mut second = tokio::time::interval(Duration::from_secs(1));
    loop {
        second.tick().await;
        let Some(dataplane) = dataplane.upgrade() else { return };
        publish(&dataplane.snapshots());
    }
}

fn publish(workers: &[WorkerSnapshot]) {
    for (index, worker) in workers.iter().enumerate() {
        let label = index.to_string();
        gauge!(ALLOCATIONS, "worker" => label.clone()).set(worker.allocations as f64);
        gauge!(CONNECTIONS, "worker" => label.clone()).set(worker.connections as f64);
        gauge!(DTLS_SESSIONS, "worker" => label.clone()).set(worker.dtls_sessions as f64);
        gauge!(DTLS_HANDSHAKES, "worker" => label.clone()).set(worker.dtls_handshakes as f64);
        counter!(HELLO_VERIFY_REQUESTS, "worker" => label.clone()).absolute(worker.hello_verify_requests);
        counter!(CROSSED, "worker" => label.clone()).absolute(worker.crossed);
        counter!(JOURNAL_ERRORS, "worker" => label.clone()).absolute(worker.journal_errors);
        counter!(WORKER_CPU, "worker" => label.clone()).absolute(worker.cpu_micros / 1_000_000);
        for (direction, name) in DIRECTIONS.into_iter().enumerate() {
            counter!(RELAYED_PACKETS, "worker" => label.clone(), "direction" => name)
                .absolute(worker.packets[direction]);
            counter!(RELAYED_BYTES, "worker" => label.clone(), "direction" => name).absolute(worker.bytes[direction]);
        }
        for (reason, count) in &worker.dropped {
            counter!(DROPPED, "worker" => label.clone(), "reason" => *reason).absolute(*count);
        }
        for (reason, count) in &worker.refused_connections {
            counter!(REFUSED_CONNECTIONS, "worker" => label.clone(), "reason" => *reason).absolute(*count);
        }
        for (method, code, count) in &worker.answers {
            counter!(REQUESTS, "worker" => label.clone(), "method" => *method, "code" => code.to_string())
                .absolute(*count);
        }
    }
}

/// Records were brought back and refused.
pub fn restored(source: Source, restored: usize, refused: u64) {
    let label = match source {
        Source::Journal => "journal",
        Source::Store => "store",
    };
    counter!(RESTORED, "source" => label).increment(restored as u64);
    counter!(REFUSED_RECORDS, "source" => label).increment(refused);
}

/// The relay owns its address under this epoch.
pub fn epoch(epoch: u64) {
    gauge!(EPOCH).set(epoch as f64);
}

/// There is a session with a controller, or there is none.
pub fn control_connected(connected: bool) {
    gauge!(CONTROL_CONNECTED).set(f64::from(u8::from(connected)));
}

/// A session ended and is to be replaced.
pub fn control_reconnect() {
    counter!(CONTROL_RECONNECTS).increment(1);
}

/// What the reporter holds back.
pub fn backlog(pending: usize, in_flight: usize) {
    gauge!(RECORDS_PENDING).set(pending as f64);
    gauge!(BATCHES_IN_FLIGHT).set(in_flight as f64);
}

/// A full resync has begun.
pub fn resync() {
    counter!(RESYNCS).increment(1);
}
