//! One relay's control session, from Hello to its end.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tonic::{Status, Streaming};
use turn_core::AllocationId;
use turnpike_proto::v1::{self, ControllerMessage, RelayMessage, controller_message, relay_message};

use super::guidance::Guidance;
use super::revocations::Revocations;
use super::step_back::StepBack;
use super::work::{Done, Pipeline};
use super::{FleetOptions, hello};
use crate::api::load;
use crate::fleet::revoked::Serial;
use crate::fleet::{Claim, FleetView, LoadRecord, Lost, NodeRecord, Reported, unix_ms};
use crate::keys::Keys;
use crate::store::Store;

/// A stream must begin with a Hello within this.
const HELLO: Duration = Duration::from_secs(10);
/// A relay that takes no message for this long is not there.
const TAKE: Duration = Duration::from_secs(10);
/// Between two reports of the same load to a store that is away.
const PAUSE: Duration = Duration::from_millis(200);
/// A lease of which this share has gone by without being renewed is in danger: the relay is told, so that it looks for
/// another controller.
const DANGER: (u32, u32) = (3, 5);

/// A stream that a relay has opened.
pub(super) struct Joining {
    /// From its certificate.
    pub(super) node_id: String,
    /// Of that certificate; none where something else than TLS says who it is.
    pub(super) certificate: Option<Serial>,
    /// What it has said of itself.
    pub(super) record: Option<NodeRecord>,
    pub(super) store: Arc<dyn Store>,
    pub(super) keys: Arc<Keys>,
    pub(super) fleet: Arc<FleetView>,
    pub(super) revocations: Arc<Revocations>,
    pub(super) options: FleetOptions,
    pub(super) closing: watch::Receiver<bool>,
    pub(super) inbound: Streaming<RelayMessage>,
    pub(super) out: mpsc::Sender<Result<ControllerMessage, Status>>,
}

/// Why a session is over.
pub(super) enum End {
    /// The relay said Goodbye.
    Left,
    /// Its stream broke, or it broke the protocol.
    Broken(Status),
    /// It no longer owns its address.
    Lost(Lost),
    /// This replica ends.
    Closing,
}

impl From<Status> for End {
    fn from(status: Status) -> Self {
        Self::Broken(status)
    }
}

impl From<Lost> for End {
    fn from(lost: Lost) -> Self {
        Self::Lost(lost)
    }
}

impl Joining {
    /// Runs the session to its end.
    pub(super) async fn run(mut self) {
        let claim = match self.join().await {
            Ok(claim) => Arc::new(claim),
            Err(End::Lost(lost)) => return self.say_lost(lost).await,
            Err(End::Broken(status)) => {
                tracing::debug!(node = self.node_id, %status, "a relay could not join");
                return self.refuse(status).await;
            }
            Err(End::Left | End::Closing) => return,
        };
        let (node, epoch) = (self.node_id.clone(), claim.epoch());
        tracing::info!(node, epoch, "a relay's session began");
        match self.serve(&claim).await {
            End::Left => tracing::info!(node, "a relay left"),
            End::Broken(status) => {
                tracing::info!(node, reason = status.message(), "a relay's session broke");
                claim.suspect().await;
                self.refuse(status).await;
            }
            End::Lost(lost) => {
                tracing::info!(node, reason = %lost, "a relay's session is over");
                self.say_lost(lost).await;
            }
            End::Closing => self.refuse(Status::unavailable("this controller is shutting down")).await,
        }
    }

    /// Hello to Welcome.
    async fn join(&mut self) -> Result<Claim, End> {
        let first = timeout(HELLO, self.inbound.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no Hello in time"))??;
        let Some(relay_message::Body::Hello(hello)) = first.and_then(|message| message.body) else {
            return Err(Status::failed_precondition("a session begins with Hello").into());
        };
        let record = hello::read(&hello, &self.node_id)?;
        self.must_be_trusted()?;
        self.record = Some(record.clone());
        let claim = self.claim(&hello, record).await?;
        let members = self.fleet.members().borrow().clone();
        let welcome = v1::Welcome {
            controller_id: self.options.controller_id.clone(),
            epoch: claim.epoch(),
            lease_ms: u32::try_from(self.options.lease.as_millis()).unwrap_or(u32::MAX),
            settings: Some(self.keys.current().message.clone()),
            // Revision 0: this replica has not seen the fleet yet. The list follows when it has.
            members: (members.revision > 0).then(|| (*members).clone()),
            protocol: hello::PROTOCOL,
            takes_usage: true,
        };
        self.say(controller_message::Body::Welcome(welcome)).await?;
        Ok(claim)
    }

    /// From Welcome to the end.
    async fn serve(&mut self, claim: &Arc<Claim>) -> End {
        match self.talk(claim).await {
            Ok(never) => match never {},
            Err(end) => end,
        }
    }

    async fn talk(&mut self, claim: &Arc<Claim>) -> Result<std::convert::Infallible, End> {
        let mut work = Pipeline::new(claim.clone(), self.store.clone());
        let mut settings = self.keys.subscribe();
        let mut members = self.fleet.members();
        settings.mark_changed();
        members.mark_changed();
        let mut revocations = self.revocations.subscribe();
        for id in self.revocations.pending(claim.relay_address()) {
            self.revoke(id).await?;
        }
        let mut guidance = Guidance::new(&self.node_id, self.fleet.clone(), self.options.terms.clone());
        let mut step_back = StepBack::new(self.record.clone(), self.fleet.clone());
        let mut closing = self.closing.clone();
        let mut reporter = Reporter::new(claim.clone());
        let mut away = false;
        let patience = self.options.lease * 2;
        let mut silent = Instant::now() + patience;
        // After Goodbye the stream ends, perhaps before what was queued is done.
        let mut leaving = false;
        loop {
            let reading = work.has_room() && !leaving;
            if !reading {
                // Who is not listened to is not silent.
                silent = Instant::now() + patience;
            }
            let danger = reporter.renewed + self.options.lease * DANGER.0 / DANGER.1;
            tokio::select! {
                message = self.inbound.message(), if reading => {
                    silent = Instant::now() + patience;
                    let message = message?.ok_or_else(|| Status::cancelled("the relay closed its stream"))?;
                    match message.body {
                        Some(relay_message::Body::Load(load)) => {
                            step_back.reported(load.allocations);
                            reporter.report(&load);
                        }
                        Some(relay_message::Body::Records(batch)) => work.batch(batch)?,
                        Some(relay_message::Body::ResyncBegin(_)) => work.resync_begin()?,
                        Some(relay_message::Body::ResyncEnd(end)) => work.resync_end(end.batch_id)?,
                        Some(relay_message::Body::Usage(batch)) => work.usage(batch, &self.node_id)?,
                        Some(relay_message::Body::Goodbye(_)) => {
                            work.goodbye()?;
                            leaving = true;
                        }
                        Some(relay_message::Body::Hello(_)) => {
                            return Err(Status::failed_precondition("a second Hello").into());
                        }
                        // Of a newer protocol.
                        None => {}
                    }
                }
                done = work.next() => match done? {
                    Done::Stored { batch_id } => {
                        self.say(controller_message::Body::Ack(v1::BatchAck { batch_id })).await?;
                    }
                    Done::Counted { batch_id } => {
                        self.say(controller_message::Body::UsageAck(v1::UsageAck { batch_id })).await?;
                    }
                    Done::Left => return Err(End::Left),
                },
                word = guidance.next() => self.say(word).await?,
                word = step_back.next() => self.say(word).await?,
                reported = reporter.next() => if reported? && std::mem::take(&mut away) {
                    self.say(store_state(false)).await?;
                },
                () = sleep_until(danger), if !away => {
                    away = true;
                    self.say(store_state(true)).await?;
                }
                changed = settings.changed() => {
                    changed.map_err(|_| End::Closing)?;
                    let message = settings.borrow_and_update().message.clone();
                    self.say(controller_message::Body::Settings(message)).await?;
                }
                changed = members.changed() => {
                    changed.map_err(|_| End::Closing)?;
                    let message = members.borrow_and_update().clone();
                    self.must_be_trusted()?;
                    if message.revision > 0 {
                        self.say(controller_message::Body::Members((*message).clone())).await?;
                    }
                }
                revocation = revocations.recv() => match revocation {
                    Ok((address, id)) if address == claim.relay_address() => self.revoke(id).await?,
                    Ok(_) => {}
                    Err(RecvError::Lagged(_)) => {
                        for id in self.revocations.pending(claim.relay_address()) {
                            self.revoke(id).await?;
                        }
                    }
                    Err(RecvError::Closed) => return Err(End::Closing),
                },
                () = sleep_until(silent), if reading => {
                    return Err(Status::deadline_exceeded("the relay is silent").into());
                }
                _ = closing.changed() => return Err(End::Closing),
            }
        }
    }

    /// A certificate that was revoked ends its session, and begins none.
    pub(super) fn must_be_trusted(&self) -> Result<(), Status> {
        super::must_be_trusted(&self.fleet, &self.node_id, self.certificate.as_ref())
    }

    async fn revoke(&self, id: AllocationId) -> Result<(), End> {
        let revoke = v1::RevokeAllocation { allocation_id: id.0.to_vec() };
        self.say(controller_message::Body::Revoke(revoke)).await
    }

    pub(super) async fn say(&self, body: controller_message::Body) -> Result<(), End> {
        let message = ControllerMessage { body: Some(body) };
        match timeout(TAKE, self.out.send(Ok(message))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Status::cancelled("the relay closed its stream").into()),
            Err(_) => Err(Status::deadline_exceeded("the relay takes no messages").into()),
        }
    }

    async fn say_lost(&self, lost: Lost) {
        let status = match lost {
            Lost::Superseded { epoch, owner } => {
                // A relay that hears nothing any more has nothing to stop.
                let _ = self.say(controller_message::Body::Superseded(v1::Superseded { epoch, owner })).await;
                return;
            }
            Lost::Replaced => Status::aborted(lost.to_string()),
            Lost::Refused(text) => Status::failed_precondition(format!("the store refuses: {text}")),
        };
        self.refuse(status).await;
    }

    async fn refuse(&self, status: Status) {
        // The relay may be gone already.
        let _ = timeout(TAKE, self.out.send(Err(status))).await;
    }
}

fn store_state(away: bool) -> controller_message::Body {
    controller_message::Body::Store(v1::StoreState { away })
}

/// Stores the newest load, one at a time; a load that the store did not take is repeated until there is a newer one,
/// because each of them renews the lease.
struct Reporter {
    claim: Arc<Claim>,
    newest: Option<LoadRecord>,
    reporting: Option<BoxFuture<'static, Result<Outcome, Lost>>>,
    /// When the lease was last renewed for sure.
    renewed: Instant,
}

/// What became of a report: when the lease was renewed by it, and the load if it has to be repeated.
type Outcome = (Option<Instant>, Option<LoadRecord>);

impl Reporter {
    /// The claim has just been taken, and its lease with it.
    fn new(claim: Arc<Claim>) -> Self {
        Self { claim, newest: None, reporting: None, renewed: Instant::now() }
    }

    fn report(&mut self, load: &v1::Load) {
        self.newest = Some(LoadRecord {
            allocations: load.allocations,
            packets: load.packets,
            bytes: load.bytes,
            bytes_per_second: load.bytes_per_second,
            busiest_worker_permille: load.busiest_worker_permille.min(1000),
            dropped: load.dropped,
            draining: load.draining,
            suspect: false,
            reported_at: unix_ms(),
            by_transport: load::by_transport(&load.by_transport),
            settings_revision: load.settings_revision,
            ends_at: load.ends_at,
            journal_failed: load.journal_failed,
            overloaded: load.overloaded,
            links: load::links(&load.links),
        });
        self.begin();
    }

    fn begin(&mut self) {
        if self.reporting.is_some() {
            return;
        }
        let Some(load) = self.newest.take() else { return };
        let claim = self.claim.clone();
        self.reporting = Some(Box::pin(async move {
            let begun = Instant::now();
            let reported = claim.report(load.clone()).await?;
            if reported == Reported::Stored {
                return Ok((Some(begun), None));
            }
            sleep(PAUSE).await;
            Ok(((reported == Reported::Renewed).then_some(begun), Some(load)))
        }));
    }

    /// Ends when a report did, with whether it renewed the lease. Waits for ever while there is none.
    async fn next(&mut self) -> Result<bool, Lost> {
        let Some(reporting) = &mut self.reporting else {
            return std::future::pending().await;
        };
        let outcome = reporting.await;
        self.reporting = None;
        let (renewed, untaken) = outcome?;
        if let Some(load) = untaken {
            self.newest.get_or_insert(load);
        }
        self.renewed = renewed.unwrap_or(self.renewed);
        self.begin();
        Ok(renewed.is_some())
    }
}
