//! When a standby that owns an address gives it back.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Interval, MissedTickBehavior, interval};
use turnpike_proto::v1::{self, controller_message::Body};

use crate::fleet::{FleetView, NodeRecord, unix_ms};

/// Between two looks at who waits.
const LOOK: Duration = Duration::from_secs(1);
/// Reports without allocations in a row, so that a client between two allocations is not the idle moment.
const IDLE_REPORTS: u32 = 3;

/// Watches for the moment, for the session of one owner.
pub(super) struct StepBack {
    record: Option<NodeRecord>,
    fleet: Arc<FleetView>,
    idle: u32,
    looks: Interval,
}

impl StepBack {
    /// Of a relay that owns its address; one that is no standby keeps it.
    pub(super) fn new(record: Option<NodeRecord>, fleet: Arc<FleetView>) -> Self {
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { record: record.filter(|record| record.standby), fleet, idle: 0, looks }
    }

    /// It has said how many allocations it has.
    pub(super) fn reported(&mut self, allocations: u64) {
        self.idle = if allocations == 0 { self.idle.saturating_add(1) } else { 0 };
    }

    /// What to say to it; said again each second until it has gone. Waits for ever for one that keeps its address. May
    /// be dropped and called again.
    pub(super) async fn next(&mut self) -> Body {
        let Some(record) = &self.record else { return std::future::pending().await };
        loop {
            self.looks.tick().await;
            let snapshot = self.fleet.snapshot();
            let Some(to) = snapshot.preferred(record.relay_address) else { continue };
            let deadline = snapshot.drains.get(&record.node_id).map_or(0, |drain| drain.deadline);
            let now = deadline > 0 && deadline <= unix_ms();
            if now || self.idle >= IDLE_REPORTS {
                return Body::StepBack(v1::StepBack { to: to.node_id.clone(), now });
            }
        }
    }
}
