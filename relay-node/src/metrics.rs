//! Every metric name of this binary. Labels are bounded: worker index, direction, reason, method, code.

use std::sync::Weak;
use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

use crate::backbone::{LinkPath, LinkReport, Usability};
use crate::dataplane::{Dataplane, WorkerSnapshot};

const ALLOCATIONS: &str = "turn_allocations";
const BY_TRANSPORT: &str = "turn_allocations_by_transport";
const REDIRECTS: &str = "turn_redirects_total";
const DRAINING: &str = "turn_draining";
const OVERLOADED: &str = "turn_overloaded";
const CORDONED: &str = "turn_cordoned";
const ENDS_AT: &str = "turn_end_timestamp_seconds";
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
const USAGE_LOST: &str = "turn_usage_lost_total";
const JOURNAL_FAILED: &str = "turn_journal_failed";
const RESTORED: &str = "turn_restored_allocations_total";
const REFUSED_RECORDS: &str = "turn_refused_records_total";
const EPOCH: &str = "turn_epoch";
const CONTROL_CONNECTED: &str = "turn_control_connected";
const CONTROL_RECONNECTS: &str = "turn_control_reconnects_total";
const RECORDS_PENDING: &str = "turn_records_pending";
const BATCHES_IN_FLIGHT: &str = "turn_record_batches_in_flight";
const RESYNCS: &str = "turn_resyncs_total";
const STANDBY: &str = "turn_standby";
const ADDRESS_LOCAL: &str = "turn_address_local";
const ADDRESS_LOST: &str = "turn_address_lost_total";
const ADDRESS_CONFLICTS: &str = "turn_address_conflicts_total";
const ADDRESS_FAILURES: &str = "turn_address_failures_total";
const LINK_USABLE: &str = "turn_backbone_link";
const LINK_RTT: &str = "turn_backbone_rtt_seconds";
const LINK_LOSS: &str = "turn_backbone_loss_ratio";
const LINK_WINDOW: &str = "turn_backbone_window_bytes";
const LINK_QUEUE: &str = "turn_backbone_queued_bytes";
const LINK_DETOUR: &str = "turn_backbone_detour";
const LINK_PACKETS: &str = "turn_backbone_packets_total";
const LINK_BYTES: &str = "turn_backbone_bytes_total";
const LINK_PASSED_ON: &str = "turn_backbone_passed_on_packets_total";
const LINK_CONNECTS: &str = "turn_backbone_connects_total";
const LINK_DROPPED: &str = "turn_backbone_dropped_packets_total";
const BUILD_INFO: &str = "turn_build_info";

const TRANSPORTS: [&str; 4] = ["udp", "tcp", "tls", "dtls"];
const REDIRECT_REASONS: [&str; 2] = ["draining", "overloaded"];
const DIRECTIONS: [&str; 2] = ["to_peer", "to_client"];

/// Where records came from.
#[derive(Clone, Copy, Debug)]
pub enum Source {
    /// This relay's journal.
    Journal,
    /// The cluster's store.
    Store,
}

impl Source {
    fn label(self) -> &'static str {
        match self {
            Self::Journal => "journal",
            Self::Store => "store",
        }
    }
}

/// Why a record is left out. A bounded metric label.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Refusal {
    /// Its checksum or encoding is wrong.
    Damaged,
    /// Of a version this binary does not read.
    Version,
    /// Its seal is of no live key.
    Seal,
    /// Of another relay address.
    Foreign,
    /// A second one of an allocation, under a key that is not its own.
    Replayed,
    /// Somebody else owned the address since, and the store does not name it.
    Unnamed,
    /// Its allocation has ended here.
    Ended,
}

impl Refusal {
    fn label(self) -> &'static str {
        match self {
            Self::Damaged => "damaged",
            Self::Version => "version",
            Self::Seal => "seal",
            Self::Foreign => "foreign",
            Self::Replayed => "replayed",
            Self::Unnamed => "unnamed",
            Self::Ended => "ended",
        }
    }
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
    drain(false, false, None);
    cordoned(false);
    backlog(0, 0);
    counter!(CONTROL_RECONNECTS).absolute(0);
    counter!(RESYNCS).absolute(0);
    standby(false);
    counter!(ADDRESS_LOST).absolute(0);
    Ok(handle)
}

/// Describes every metric of this binary to the recorder in force.
pub fn describe() {
    describe_gauge!(ALLOCATIONS, "Allocations held, by worker");
    describe_gauge!(BY_TRANSPORT, "Allocations held, by worker and the transport of their clients");
    describe_counter!(REDIRECTS, "Clients sent to another relay (300), by worker and reason");
    describe_gauge!(DRAINING, "1 while new clients are to go to other relays because this one is to become empty");
    describe_gauge!(OVERLOADED, "1 while new clients are to go to other relays because this one has enough to do");
    describe_gauge!(CORDONED, "1 while the Kubernetes node of this relay is cordoned, which drains it");
    describe_gauge!(
        ENDS_AT,
        Unit::Seconds,
        "Unix time at which a relay that was told to stop ends at the latest, else 0"
    );
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
    describe_counter!(USAGE_LOST, "Allocations whose usage was not counted, or not reported, for want of room");
    describe_counter!(RESTORED, "Allocations brought back at start, by source");
    describe_counter!(REFUSED_RECORDS, "Records that were not believed, by source and reason");
    describe_gauge!(JOURNAL_FAILED, "1 while a worker's journal cannot be written, by worker");
    describe_gauge!(EPOCH, "Epoch under which this relay owns its address");
    describe_gauge!(CONTROL_CONNECTED, "1 while there is a session with a controller");
    describe_counter!(CONTROL_RECONNECTS, "Sessions with controllers that ended and were to be replaced");
    describe_gauge!(RECORDS_PENDING, "Allocations with changes that have not been sent to the controller");
    describe_gauge!(BATCHES_IN_FLIGHT, "Record batches the store has not acknowledged");
    describe_counter!(RESYNCS, "Full statements of all records sent to a controller");
    describe_gauge!(STANDBY, "1 while this relay waits for its address, which another one owns");
    describe_gauge!(ADDRESS_LOCAL, "1 while the relay addresses are this machine's; nothing is answered otherwise");
    describe_counter!(ADDRESS_LOST, "Times a relay address vanished from this machine while it was served");
    describe_counter!(ADDRESS_CONFLICTS, "Frames in which another machine claimed a relay address, by what was done");
    describe_counter!(ADDRESS_FAILURES, "Failures to raise, lower or announce a relay address, by what failed");
    describe_gauge!(LINK_USABLE, "1 while packets for the member travel by the backbone");
    describe_gauge!(LINK_RTT, Unit::Seconds, "Round trip of the direct link, smoothed");
    describe_gauge!(LINK_LOSS, "Packets lost on the direct link over ten seconds, 0 to 1");
    describe_gauge!(LINK_WINDOW, Unit::Bytes, "What may be on its way over the direct link");
    describe_gauge!(LINK_QUEUE, Unit::Bytes, "What waits for the link");
    describe_gauge!(LINK_DETOUR, "1 while packets for the member go over a third one");
    describe_counter!(LINK_PACKETS, "Packets of allocations, by member and direction");
    describe_counter!(LINK_BYTES, Unit::Bytes, "Their payload, by member and direction");
    describe_counter!(LINK_PASSED_ON, "Packets of connections over third members, by the member they were sent to");
    describe_counter!(LINK_CONNECTS, "Connections made, by member");
    describe_counter!(LINK_DROPPED, "Packets and frames of links that came to nothing, by member and reason");
    describe_gauge!(BUILD_INFO, "1, labelled with the version of this binary");
}

/// Publishes what the workers count until the data plane is gone.
pub async fn publish_each_second(dataplane: Weak<Dataplane>) {
    let mut second = tokio::time::interval(Duration::from_secs(1));
    loop {
        second.tick().await;
        let Some(dataplane) = dataplane.upgrade() else { return };
        publish(&dataplane.snapshots());
        counter!(USAGE_LOST).absolute(dataplane.accounts().lost());
    }
}

fn publish(workers: &[WorkerSnapshot]) {
    for (index, worker) in workers.iter().enumerate() {
        let label = index.to_string();
        gauge!(ALLOCATIONS, "worker" => label.clone()).set(worker.allocations as f64);
        for (transport, count) in TRANSPORTS.into_iter().zip(worker.by_transport) {
            gauge!(BY_TRANSPORT, "worker" => label.clone(), "transport" => transport).set(count as f64);
        }
        for (reason, count) in REDIRECT_REASONS.into_iter().zip(worker.redirected) {
            counter!(REDIRECTS, "worker" => label.clone(), "reason" => reason).absolute(count);
        }
        gauge!(CONNECTIONS, "worker" => label.clone()).set(worker.connections as f64);
        gauge!(DTLS_SESSIONS, "worker" => label.clone()).set(worker.dtls_sessions as f64);
        gauge!(DTLS_HANDSHAKES, "worker" => label.clone()).set(worker.dtls_handshakes as f64);
        counter!(HELLO_VERIFY_REQUESTS, "worker" => label.clone()).absolute(worker.hello_verify_requests);
        counter!(CROSSED, "worker" => label.clone()).absolute(worker.crossed);
        gauge!(JOURNAL_FAILED, "worker" => label.clone()).set(f64::from(u8::from(worker.journal_failed)));
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

/// What the links of the backbone tell of themselves; labels are the node ids of the member list.
pub fn backbone(links: &[LinkReport]) {
    for link in links {
        let member = link.node_id.to_string();
        let is = |value: bool| f64::from(u8::from(value));
        gauge!(LINK_USABLE, "member" => member.clone()).set(is(link.usability == Usability::Link));
        gauge!(LINK_RTT, "member" => member.clone()).set(link.rtt.unwrap_or_default().as_secs_f64());
        gauge!(LINK_LOSS, "member" => member.clone()).set(f64::from(link.loss_permille) / 1000.0);
        gauge!(LINK_WINDOW, "member" => member.clone()).set(link.congestion_window as f64);
        gauge!(LINK_QUEUE, "member" => member.clone()).set(link.queued_bytes as f64);
        gauge!(LINK_DETOUR, "member" => member.clone()).set(is(link.path != LinkPath::Direct));
        let counts = &link.counts;
        for (direction, packets, bytes) in [
            ("sent", counts.sent_packets, counts.sent_bytes),
            ("received", counts.received_packets, counts.received_bytes),
        ] {
            counter!(LINK_PACKETS, "member" => member.clone(), "direction" => direction).absolute(packets);
            counter!(LINK_BYTES, "member" => member.clone(), "direction" => direction).absolute(bytes);
        }
        counter!(LINK_PASSED_ON, "member" => member.clone()).absolute(counts.passed_on_packets);
        counter!(LINK_CONNECTS, "member" => member.clone()).absolute(counts.connects);
        for (reason, count) in counts.drops.iter() {
            counter!(LINK_DROPPED, "member" => member.clone(), "reason" => reason.label()).absolute(count);
        }
    }
}

/// Records were brought back.
pub fn restored(source: Source, restored: usize) {
    counter!(RESTORED, "source" => source.label()).increment(restored as u64);
}

/// Records were left out.
pub fn refused(source: Source, reason: Refusal, refused: u64) {
    counter!(REFUSED_RECORDS, "source" => source.label(), "reason" => reason.label()).increment(refused);
}

/// The relay owns its address under this epoch.
pub fn epoch(epoch: u64) {
    gauge!(EPOCH).set(epoch as f64);
}

/// Whether new clients are to go elsewhere, and why; when it ends, Unix milliseconds.
pub fn drain(draining: bool, overloaded: bool, ends_at: Option<u64>) {
    gauge!(DRAINING).set(f64::from(u8::from(draining)));
    gauge!(OVERLOADED).set(f64::from(u8::from(overloaded)));
    gauge!(ENDS_AT).set(ends_at.map_or(0.0, |milliseconds| milliseconds as f64 / 1000.0));
}

/// Whether the Kubernetes node of this relay is cordoned.
pub fn cordoned(cordoned: bool) {
    gauge!(CORDONED).set(f64::from(u8::from(cordoned)));
}

/// There is a session with a controller, or there is none.
pub fn control_connected(connected: bool) {
    gauge!(CONTROL_CONNECTED).set(f64::from(u8::from(connected)));
}

/// A session ended and is to be replaced.
pub fn control_reconnect() {
    counter!(CONTROL_RECONNECTS).increment(1);
}

/// This relay waits for its address, or does not.
pub fn standby(waits: bool) {
    gauge!(STANDBY).set(f64::from(u8::from(waits)));
}

/// The relay addresses are this machine's, or are not.
pub fn address_local(local: bool) {
    gauge!(ADDRESS_LOCAL).set(f64::from(u8::from(local)));
}

/// A relay address vanished while it was served.
pub fn address_lost() {
    counter!(ADDRESS_LOST).increment(1);
}

/// Another machine claimed a relay address; `answer` is `defended` or `yielded`.
pub fn address_conflict(answer: &'static str) {
    counter!(ADDRESS_CONFLICTS, "answer" => answer).increment(1);
}

/// Something about an address failed; `what` is `raise`, `lower`, `announce`, `hook` or `watch`.
pub fn address_failure(what: &'static str) {
    counter!(ADDRESS_FAILURES, "what" => what).increment(1);
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
