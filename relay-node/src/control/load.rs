//! What a relay reports of itself each second (pure).

use std::time::{Duration, Instant};

use turnpike_proto::v1;

use crate::dataplane::WorkerSnapshot;

/// Turns counters into a [`v1::Load`]; rates are over the time since the last sample.
#[derive(Debug, Default)]
pub(crate) struct LoadMeter {
    last: Option<Sample>,
}

#[derive(Debug)]
struct Sample {
    at: Instant,
    bytes: u64,
    cpu_micros: Vec<u64>,
}

impl LoadMeter {
    /// Takes a sample. The first one has no rates.
    pub(crate) fn sample(&mut self, workers: &[WorkerSnapshot], now: Instant) -> v1::Load {
        let sum = |count: fn(&WorkerSnapshot) -> u64| workers.iter().map(count).sum::<u64>();
        let bytes = sum(|w| w.bytes.iter().sum());
        let cpu_micros: Vec<u64> = workers.iter().map(|w| w.cpu_micros).collect();
        let mut load = v1::Load {
            allocations: sum(|w| w.allocations),
            packets: sum(|w| w.packets.iter().sum()),
            bytes,
            busiest_worker_permille: 0,
            dropped: sum(|w| w.dropped.iter().map(|(_, count)| count).sum()),
            bytes_per_second: 0,
            journal_failed: workers.iter().any(|w| w.journal_failed),
            by_transport: by_transport(workers),
            ..v1::Load::default()
        };
        if let Some(last) = &self.last {
            let elapsed = now.saturating_duration_since(last.at).max(Duration::from_millis(1));
            let micros = elapsed.as_micros();
            let per_second = u128::from(bytes.saturating_sub(last.bytes)) * 1_000_000 / micros;
            load.bytes_per_second = u64::try_from(per_second).unwrap_or(u64::MAX);
            let busiest = cpu_micros.iter().zip(&last.cpu_micros).map(|(now, then)| now.saturating_sub(*then)).max();
            let permille = u128::from(busiest.unwrap_or(0)) * 1000 / micros;
            load.busiest_worker_permille = u32::try_from(permille).unwrap_or(1000).min(1000);
        }
        self.last = Some(Sample { at: now, bytes, cpu_micros });
        load
    }
}

/// Allocations by the transport of their clients; what there is none of is left out.
fn by_transport(workers: &[WorkerSnapshot]) -> Vec<v1::TransportAllocations> {
    let transports = [v1::Transport::Udp, v1::Transport::Tcp, v1::Transport::Tls, v1::Transport::Dtls];
    let sum = |(index, transport): (usize, v1::Transport)| v1::TransportAllocations {
        transport: transport.into(),
        allocations: workers.iter().map(|worker| worker.by_transport[index]).sum(),
    };
    transports.into_iter().enumerate().map(sum).filter(|sum| sum.allocations > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_over_the_time_between_samples() {
        let worker = |bytes, cpu_micros| WorkerSnapshot {
            allocations: 2,
            by_transport: [1, 0, 1, 0],
            packets: [3, 4],
            bytes: [bytes, bytes],
            dropped: vec![("no_permission", 1), ("malformed", 2)],
            cpu_micros,
            ..WorkerSnapshot::default()
        };
        let mut meter = LoadMeter::default();
        let start = Instant::now();
        let first = meter.sample(&[worker(0, 0), worker(0, 1_000_000)], start);
        assert_eq!((first.bytes_per_second, first.busiest_worker_permille), (0, 0));
        assert_eq!((first.allocations, first.packets, first.dropped), (4, 14, 6));
        let by_transport: Vec<_> = first.by_transport.iter().map(|t| (t.transport(), t.allocations)).collect();
        assert_eq!(by_transport, [(v1::Transport::Udp, 2), (v1::Transport::Tls, 2)]);
        let later = start + Duration::from_secs(2);
        let second = meter.sample(&[worker(500, 1_500_000), worker(500, 1_200_000)], later);
        assert_eq!(second.bytes, 2000);
        assert_eq!(second.bytes_per_second, 1000);
        assert_eq!(second.busiest_worker_permille, 750);
        // A clock that stands still, or a worker that ran more than the interval, stays in range.
        let third = meter.sample(&[worker(500, 9_500_000), worker(500, 1_200_000)], later);
        assert_eq!(third.busiest_worker_permille, 1000);
    }
}
