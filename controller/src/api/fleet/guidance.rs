//! What a relay is told about new clients: whether it takes any, and where others are.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use turnpike_proto::v1::{self, controller_message::Body};

use crate::api::load::transport;
use crate::fleet::{Drains, FleetView};
use crate::steering::{Terms, alternates};

/// Between two looks at the fleet for better relays: they report each second.
const LOOK: Duration = Duration::from_secs(1);
/// Between two looks while this replica does not see the relay itself yet.
const FIRST_LOOK: Duration = Duration::from_millis(100);

/// One relay's guidance, made from this replica's picture of the fleet; each thing is said when it changes.
pub(super) struct Guidance {
    node_id: String,
    fleet: Arc<FleetView>,
    terms: Arc<Terms>,
    drains: watch::Receiver<Option<Arc<Drains>>>,
    drain: Option<v1::Drain>,
    redirects: Option<v1::Redirects>,
    look: Instant,
}

impl Guidance {
    /// For a relay that was just welcomed: everything is said once.
    pub(super) fn new(node_id: &str, fleet: Arc<FleetView>, terms: Arc<Terms>) -> Self {
        let drains = fleet.drains();
        let (node_id, look) = (node_id.to_owned(), Instant::now());
        Self { node_id, fleet, terms, drains, drain: None, redirects: None, look }
    }

    /// The next thing to say. May be dropped and called again.
    pub(super) async fn next(&mut self) -> Body {
        loop {
            if let Some(drain) = self.new_drain() {
                // Where to, at once: the answer to the drain of another is never older than the drain.
                self.look = Instant::now();
                return Body::Drain(drain);
            }
            if self.look <= Instant::now()
                && let Some(redirects) = self.new_redirects()
            {
                return Body::Redirects(redirects);
            }
            tokio::select! {
                Ok(()) = self.drains.changed() => self.look = Instant::now(),
                () = sleep_until(self.look) => {}
            }
        }
    }

    /// Nothing before this replica knows: a word of "go on" must not come from ignorance.
    fn new_drain(&mut self) -> Option<v1::Drain> {
        let drains = self.drains.borrow_and_update().clone()?;
        let told = drains.get(&self.node_id);
        let drain = v1::Drain { draining: told.is_some(), deadline: told.map_or(0, |told| told.deadline) };
        let is_new = self.drain.as_ref() != Some(&drain);
        self.drain = Some(drain);
        is_new.then_some(drain)
    }

    fn new_redirects(&mut self) -> Option<v1::Redirects> {
        let snapshot = self.fleet.snapshot();
        let Some(own) = snapshot.nodes.get(&self.node_id) else {
            self.look = Instant::now() + FIRST_LOOK;
            return None;
        };
        self.look = Instant::now() + LOOK;
        let target = |alternate: crate::steering::Alternate| v1::RedirectTarget {
            node_id: alternate.node_id,
            transport: transport(alternate.transport).into(),
            address: alternate.address.to_string(),
        };
        let targets = alternates(&snapshot, &self.terms, &own.record).into_iter().map(target).collect();
        let redirects = v1::Redirects { targets };
        let is_new = self.redirects.as_ref() != Some(&redirects);
        if is_new {
            self.redirects = Some(redirects.clone());
        }
        is_new.then_some(redirects)
    }
}
