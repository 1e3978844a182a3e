//! Waiting for the relay address while another node owns it, and handing it over.
//!
//! A relay that waits keeps a session open, like one that serves: it is heard of each second, goes to another controller
//! when this one is gone, and is welcomed when the owner is gone or gives the address up.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};
use turnpike_proto::v1::{self, controller_message::Body as Hear, relay_message::Body as Say};

use super::backoff::Backoff;
use super::connection::{Connection, Greeting, Lost};
use super::session::{Control, FLUSH, REPORT, ticks};
use crate::address::frame::Mac;
use crate::dataplane::{Dataplane, FenceReason};
use crate::metrics;

/// How long controllers are asked before a relay that was the owner goes on without them (P1).
const ALONE: Duration = Duration::from_secs(1);
/// How long what is left to be stored may take when the address is handed over: media stand still meanwhile.
const HAND_OVER: Duration = Duration::from_secs(2);

/// What a relay knows of its hold on its address.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Standing {
    /// There is a session in which this relay is the owner.
    pub connected: bool,
    /// How often a controller has said so.
    pub welcomes: u64,
    /// Under which epoch.
    pub epoch: u64,
    /// Life of the lease; zero if no controller has said.
    pub lease: Duration,
    /// The address is being handed over: it has to leave this machine.
    pub leaving: bool,
}

/// Asks the controllers again who owns the address, and hears what they say.
#[derive(Clone, Debug)]
pub struct StandingWatch {
    pub(super) standing: watch::Receiver<Standing>,
    pub(super) again: Arc<Notify>,
    pub(super) left: Arc<Notify>,
}

impl StandingWatch {
    /// What is known now.
    pub fn now(&self) -> Standing {
        *self.standing.borrow()
    }

    /// Something about it has changed. May be dropped and called again.
    pub async fn changed(&mut self) {
        if self.standing.changed().await.is_err() {
            // The control session is over, and so is whoever waits here, in a moment.
            std::future::pending::<()>().await;
        }
    }

    /// The address has left this machine, as [`Standing::leaving`] asked for.
    pub fn left(&self) {
        self.left.notify_one();
    }

    /// Asks a controller anew; whether one has confirmed within this time that this relay is the owner. If one denies
    /// it, the control session ends by itself.
    pub async fn confirm(&mut self, within: Duration) -> bool {
        let before = self.now().welcomes;
        self.again.notify_one();
        let confirmed = self.standing.wait_for(|standing| standing.welcomes > before);
        timeout(within, confirmed).await.is_ok_and(|standing| standing.is_ok())
    }
}

/// Whether nobody else answers for an address.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Free {
    /// Nobody does.
    Yes,
    /// A machine with this hardware address does.
    Taken(Mac),
    /// Nobody can be asked now.
    Unknown,
}

/// Whose the address is, as far as this machine can tell without a controller.
pub trait Neighbourhood {
    /// Whether the address has been here all the time: the process before this one held it a moment ago.
    fn holds(&mut self) -> impl Future<Output = bool> + Send;
    /// Whether nobody else answers for the address.
    fn is_free(&mut self) -> impl Future<Output = Free> + Send;
    /// Takes the address off this machine, if it is this relay that puts it there.
    fn leave(&mut self) -> impl Future<Output = ()> + Send;
}

impl Control {
    /// Waits until this relay owns its address. One that does not wait, or whose predecessor held the address a moment
    /// ago, owns it at once; else a controller decides. While none can be reached a relay that was the owner goes on
    /// alone (P1) if nobody else has the address; any other one never does.
    ///
    /// # Errors
    /// The state directory's.
    pub async fn await_address(&mut self, neighbourhood: &mut impl Neighbourhood) -> anyhow::Result<()> {
        if !self.hello.waits {
            return Ok(());
        }
        if self.state.is_owner() && neighbourhood.holds().await {
            return Ok(());
        }
        neighbourhood.leave().await;
        let began = Instant::now();
        let mut backoff = Backoff::default();
        let mut alone = self.state.is_owner();
        loop {
            // One that was the owner gives a controller that cannot decide just now no longer than one that is gone.
            let limit = if alone { ALONE } else { Duration::MAX };
            let greeted = timeout(limit, self.greet()).await.unwrap_or(Err(Lost::Silent(ALONE)));
            let lost = match greeted {
                Ok((connection, Greeting::Welcome(welcome))) => {
                    self.welcomed = Some((connection, *welcome));
                    break;
                }
                Ok((connection, Greeting::Waiting(owner))) => {
                    alone = false;
                    backoff = Backoff::default();
                    match self.wait(connection, owner).await {
                        Ok(welcomed) => {
                            self.welcomed = Some(welcomed);
                            break;
                        }
                        Err(lost) => lost,
                    }
                }
                Err(lost) => lost,
            };
            if let Lost::Superseded { owner, epoch } = lost {
                // Of a controller that knows no waiting.
                self.state.disown()?;
                alone = false;
                tracing::info!(owner, epoch, "another relay owns the address");
            } else {
                self.complain(&lost);
            }
            if alone && began.elapsed() >= ALONE {
                match neighbourhood.is_free().await {
                    Free::Yes => {
                        tracing::warn!("no controller answers: this relay owned its address last and goes on alone");
                        break;
                    }
                    Free::Taken(mac) => {
                        alone = false;
                        self.state.disown()?;
                        tracing::warn!(%mac, "another machine has the relay address and no controller answers: waiting");
                    }
                    Free::Unknown => {}
                }
            }
            sleep(backoff.next()).await;
        }
        self.state.own()?;
        self.status.owns();
        metrics::standby(false);
        Ok(())
    }

    pub(super) async fn greet(&mut self) -> Result<(Connection, Greeting), Lost> {
        let controllers = self.controllers.as_ref().ok_or(Lost::NoDataplane)?;
        let endpoints = controllers.endpoints.now();
        self.endpoint.clone_from(&endpoints[self.turn % endpoints.len()]);
        self.turn = self.turn.wrapping_add(1);
        let patience = self.patience.now(endpoints.len());
        let opened = Connection::open(&self.endpoint, controllers, self.hello.clone(), patience).await;
        match &opened {
            Ok(_) => self.patience.answered(),
            Err(Lost::Silent(_)) => self.patience.silent(),
            Err(_) => {}
        }
        opened
    }

    /// Waits in one session, until Welcome or its end.
    async fn wait(
        &mut self,
        mut connection: Connection,
        owner: v1::Waiting,
    ) -> Result<(Connection, v1::Welcome), Lost> {
        self.waits_for(&owner)?;
        let mut report = ticks(REPORT);
        loop {
            tokio::select! {
                heard = connection.hear() => match heard? {
                    Some(Hear::Welcome(welcome)) => return Ok((connection, welcome)),
                    Some(Hear::Waiting(owner)) => self.waits_for(&owner)?,
                    Some(Hear::Superseded(by)) => {
                        return Err(Lost::Superseded { owner: by.owner, epoch: by.epoch });
                    }
                    Some(Hear::Settings(settings)) => self.settings(&settings)?,
                    Some(Hear::Members(members)) => self.adopt_members(&members)?,
                    // Of no use to one that does not serve.
                    _ => {}
                },
                _ = report.tick() => if connection.room() > 0 {
                    connection.say(Say::Load(v1::Load::default()))?;
                },
            }
        }
    }

    fn waits_for(&mut self, owner: &v1::Waiting) -> Result<(), Lost> {
        // What this relay holds of records is the other one's now.
        self.state.disown()?;
        self.status.waits(&owner.owner);
        metrics::standby(true);
        tracing::info!(
            owner = owner.owner,
            epoch = owner.epoch,
            controller = self.endpoint,
            "waiting for the relay address"
        );
        self.complaints.clear();
        Ok(())
    }

    /// Hands the address over: nothing is answered any more, everything is stored, then the hold is released. Not done
    /// (Ok) if there are allocations and nobody insists.
    ///
    /// # Errors
    /// [`Lost::HandedOver`] when it is done, else as the connection.
    pub(super) async fn hand_over(
        &mut self,
        connection: &mut Connection,
        dataplane: &Dataplane,
        changes: &mut crate::dataplane::ChangeReceiver,
        step: v1::StepBack,
    ) -> Result<(), Lost> {
        let fence = dataplane.fence();
        fence.raise(FenceReason::HandOver);
        // Every worker has seen the fence, and has said what it did before, when it tells its records.
        let held = dataplane.records().await.len();
        if held > 0 && !step.now {
            fence.lower(FenceReason::HandOver);
            return Ok(());
        }
        let deadline = Instant::now() + HAND_OVER;
        let mut flush = ticks(FLUSH);
        loop {
            while let Ok(change) = changes.try_recv() {
                self.reporter.note(change, super::session::unix_ms());
            }
            self.pump(connection, true)?;
            if self.reporter.backlog() == (0, 0) || Instant::now() > deadline {
                break;
            }
            tokio::select! {
                heard = connection.hear() => if let Some(body) = heard? { self.hear(body, dataplane)? },
                _ = flush.tick() => {}
            }
        }
        self.tell_all_usage(connection, dataplane).await;
        // First off this machine, then on the other one.
        self.standing.send_modify(|standing| standing.leaving = true);
        if timeout(HAND_OVER, self.left.notified()).await.is_err() {
            tracing::warn!("the relay address is handed over, but may still be on this machine");
        }
        tracing::info!(to = step.to, allocations = held, "handing the relay address over");
        Err(Lost::HandedOver { to: step.to })
    }
}
