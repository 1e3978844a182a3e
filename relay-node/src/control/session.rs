//! Joins a controller, reconnects, and hands on what it says.
//!
//! A session: Hello, Welcome, then both sides talk. After each Welcome the relay restates everything. The first session
//! after a start asks for the stored records before that, so that a restatement never wipes what only the store had.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use prost::Message;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use turn_core::AllocationId;
use turnpike_proto::v1::controller_message::Body as Hear;
use turnpike_proto::v1::{self, relay_message::Body as Say};

use super::backoff::{Backoff, Patience};
use super::cluster::{Adopted, Cluster, Local};
use super::connection::{Connection, Lost, check_protocol, hello};
use super::drain::Drain;
use super::elsewhere::Elsewhere;
use super::load::LoadMeter;
use super::mesh::Mesh;
use super::reporter::Reporter;
use super::restore::Unmerged;
use super::usage::UsageReporter;
use super::waiting::{Standing, StandingWatch};
use crate::backbone::{Backbone, MemberList};
use crate::config::{self, Controllers};
use crate::dataplane::{ChangeReceiver, Dataplane, FenceReason, Lookup, MemberRoute};
use crate::health::Status;
use crate::metrics;
use crate::state_directory::StateDirectory;

/// How often changes leave.
pub(super) const FLUSH: Duration = Duration::from_millis(100);
/// Most time that a change is on its way from a worker to the reporter.
const SETTLED: Duration = Duration::from_secs(1);
/// How often load is reported; renews the lease.
pub(super) const REPORT: Duration = Duration::from_secs(1);
/// How long the end waits for controllers to have the usage.
const TELL_USAGE: Duration = Duration::from_secs(1);
/// Different complaints between two sessions; more than that are repetitions in other words.
const MAX_COMPLAINTS: usize = 16;
/// Reports in a row for which the stream had no room: the controller is stuck, another may not be.
const MAX_UNREAD_REPORTS: u32 = 10;
/// Questions of workers that wait for a controller.
const LOOKUPS: usize = 1024;
/// Clients asked about in one call.
const LOCATED: usize = 64;
/// Changes taken from the data plane in one turn: as many as can wait.
const CHANGES_PER_TURN: usize = 16_384;

/// Why the control session is over for good.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Ended {
    /// It was asked to stop.
    #[error("stopped")]
    Stopped,
    /// Another node owns the relay address.
    #[error(
        "relay {owner:?} owns this relay address under epoch {epoch}: this one stops serving; give each relay a \
         public_ip of its own"
    )]
    Superseded {
        /// Its name.
        owner: String,
        /// Its epoch.
        epoch: u64,
    },
    /// It handed its address over to a relay that is preferred, or as an operator asked.
    #[error("the relay address is handed over to {to:?}")]
    HandedOver {
        /// Its name.
        to: String,
    },
    /// Another machine claims the relay address, and no controller says whose it is.
    #[error("another machine ({mac}) claims the relay address: this relay stops serving until a controller decides")]
    Conflict {
        /// Its hardware address.
        mac: String,
    },
}

/// This relay's side of the control plane. Without controllers it only knows the relay's own settings.
pub struct Control {
    pub(super) controllers: Option<Controllers>,
    pub(super) hello: v1::Hello,
    pub(super) state: StateDirectory,
    pub(super) cluster: Cluster,
    local: Local,
    pub(super) status: Arc<Status>,
    drain: Arc<Drain>,
    pub(super) reporter: Reporter,
    pub(super) usage: UsageReporter,
    /// The controller of the last Welcome takes usage.
    takes_usage: bool,
    dataplane: Option<Arc<Dataplane>>,
    /// Which endpoint is tried next.
    pub(super) turn: usize,
    /// Which one was tried last.
    pub(super) endpoint: String,
    /// How long the next one has.
    pub(super) patience: Patience,
    /// What has been said about controllers that cannot be reached, to say it once.
    pub(super) complaints: BTreeSet<String>,
    pub(super) joined: Option<Connection>,
    /// Set from the start until the store has been asked for its records.
    pub(super) unmerged: Option<Unmerged>,
    /// Looked for while this session's controller has lost the store.
    elsewhere: Elsewhere,
    mesh: Mesh,
    /// What workers want to know of clients, and the way they ask.
    lookups: (mpsc::Sender<Lookup>, mpsc::Receiver<Lookup>),
    /// Where the wait for the address ended.
    pub(super) welcomed: Option<(Connection, v1::Welcome)>,
    pub(super) standing: watch::Sender<Standing>,
    /// The address has left this machine.
    pub(super) left: Arc<Notify>,
    /// Somebody wants to know anew who owns the address.
    again: Arc<Notify>,
}

impl Control {
    /// Takes over what the last session left in the state directory. `epoch` is the one this process claims.
    ///
    /// # Errors
    /// When the state directory cannot be read, or the system has no randomness.
    pub fn new(
        settings: &config::Settings,
        state: StateDirectory,
        epoch: u64,
        status: Arc<Status>,
        drain: Arc<Drain>,
    ) -> anyhow::Result<Self> {
        let local = Local::new(settings, state.nonce_key()?);
        let mut cluster = Cluster::default();
        let mut mesh = Mesh::new(&settings.node_id, settings.relay_address);
        if settings.controllers.is_some() {
            cluster.lag(true);
            if let Some(Err(error)) = state.settings()?.map(|bytes| cluster.adopt_kept_settings(&bytes)) {
                tracing::warn!("settings kept from the last session are not used: {error}");
            }
            if let Some(message) = state.members()?.and_then(|bytes| v1::Members::decode(&*bytes).ok()) {
                cluster.adopt_members(&message);
                mesh.adopt(&message);
            }
        }
        status.set_credentials(cluster.has_credentials(&local));
        metrics::epoch(epoch);
        Ok(Self {
            hello: hello(settings, epoch)?,
            controllers: settings.controllers.clone(),
            state,
            cluster,
            local,
            status,
            drain,
            reporter: Reporter::default(),
            usage: UsageReporter::default(),
            takes_usage: false,
            dataplane: None,
            turn: 0,
            endpoint: String::new(),
            patience: Patience::default(),
            complaints: BTreeSet::new(),
            joined: None,
            unmerged: None,
            elsewhere: Elsewhere::default(),
            mesh,
            lookups: mpsc::channel(LOOKUPS),
            welcomed: None,
            standing: watch::Sender::default(),
            left: Arc::default(),
            again: Arc::default(),
        })
    }

    /// What is known of the hold on the address.
    pub fn standing(&self) -> StandingWatch {
        StandingWatch {
            standing: self.standing.subscribe(),
            again: Arc::clone(&self.again),
            left: Arc::clone(&self.left),
        }
    }

    /// Epoch under which this relay owns its address, as far as it knows.
    pub fn epoch(&self) -> u64 {
        self.hello.claimed_epoch
    }

    /// What workers run with.
    pub fn turn_settings(&self) -> Arc<turn_core::Settings> {
        let restoring = self.unmerged.as_ref().is_some_and(Unmerged::may_lack_records);
        Arc::new(turn_core::Settings { restoring, ..self.cluster.turn_settings(&self.local) })
    }

    /// The other members, for the packet path.
    pub fn routes(&self) -> &[MemberRoute] {
        self.mesh.routes()
    }

    /// The other members, for the backbone.
    pub fn members(&self) -> watch::Receiver<Arc<MemberList>> {
        self.mesh.list()
    }

    /// The way by which workers ask where clients are served.
    pub fn lookups(&self) -> mpsc::Sender<Lookup> {
        self.lookups.0.clone()
    }

    /// Links are reported with the load from now on.
    pub fn report_on(&mut self, backbone: Arc<Backbone>) {
        self.mesh.report_on(backbone);
    }

    /// Allocations one user may hold on this relay, 0 for no limit.
    pub fn user_quota(&self) -> usize {
        self.cluster.user_quota(&self.local)
    }

    /// Keeps a session with a controller until `stop`, or until another node has taken the address over. What
    /// [`Control::restore`] returned has been given to `dataplane`.
    pub async fn run(
        mut self,
        dataplane: Arc<Dataplane>,
        mut changes: ChangeReceiver,
        mut stop: oneshot::Receiver<()>,
    ) -> Ended {
        self.dataplane = Some(Arc::clone(&dataplane));
        self.route();
        let mut backoff = Backoff::default();
        loop {
            let began = Instant::now();
            match self.session(&dataplane, &mut changes, &mut stop).await {
                Ok(()) => return Ended::Stopped,
                Err(Lost::Superseded { owner, epoch }) => return Ended::Superseded { owner, epoch },
                // The next session is there already.
                Err(Lost::Moved) => continue,
                Err(Lost::HandedOver { to }) => return Ended::HandedOver { to },
                Err(Lost::Again) => continue,
                Err(lost) => self.complain(&lost),
            }
            if began.elapsed() > Backoff::CAP {
                backoff = Backoff::default();
            }
            tokio::select! {
                _ = &mut stop => return Ended::Stopped,
                never = discard(&mut changes) => match never {},
                () = self.again.notified() => {}
                () = sleep(backoff.next()) => {}
            }
        }
    }

    /// One session, from the first packet to its end. Ok when it was asked to stop.
    async fn session(
        &mut self,
        dataplane: &Arc<Dataplane>,
        changes: &mut ChangeReceiver,
        stop: &mut oneshot::Receiver<()>,
    ) -> Result<(), Lost> {
        let connection = match self.joined.take() {
            Some(connection) => connection,
            None => tokio::select! {
                _ = &mut *stop => return Ok(()),
                never = discard(changes) => match never {},
                connected = self.connect() => connected?,
            },
        };
        // Before anything is restated: what only the store has would be wiped.
        tokio::select! {
            _ = &mut *stop => return connection.close().await,
            never = discard(changes) => match never {},
            merged = self.merge_late(&connection, dataplane) => merged?,
        }
        metrics::control_connected(true);
        self.standing.send_modify(|standing| standing.connected = true);
        if self.cluster.lag(false) {
            self.configure();
        }
        self.drain.connected(true);
        let result = self.serve(connection, dataplane, changes, stop).await;
        self.standing.send_modify(|standing| standing.connected = false);
        self.reporter.disconnected();
        self.elsewhere.stay();
        if self.cluster.lag(true) {
            self.configure();
        }
        metrics::control_connected(false);
        self.drain.connected(false);
        metrics::backlog(0, 0);
        if result.is_err() {
            metrics::control_reconnect();
        }
        result
    }

    /// One try with the next controller: from nothing to a welcome.
    pub(super) async fn connect(&mut self) -> Result<Connection, Lost> {
        if self.controllers.is_none() {
            return std::future::pending().await;
        }
        let (connection, welcome) = match self.welcomed.take() {
            Some(welcomed) => welcomed,
            None => {
                let (connection, greeting) = self.greet().await?;
                (connection, greeting.welcome()?)
            }
        };
        let controller = welcome.controller_id.clone();
        self.welcome(welcome)?;
        tracing::info!(controller, endpoint = self.endpoint, epoch = self.epoch(), "joined the cluster");
        self.complaints.clear();
        Ok(connection)
    }

    fn welcome(&mut self, welcome: v1::Welcome) -> Result<(), Lost> {
        check_protocol(welcome.protocol)?;
        self.takes_usage = welcome.takes_usage;
        if welcome.epoch > self.hello.claimed_epoch {
            if let Some(unmerged) = &mut self.unmerged {
                unmerged.interrupt();
            }
            self.state.keep_epoch(welcome.epoch);
            self.hello.claimed_epoch = welcome.epoch;
            metrics::epoch(welcome.epoch);
            if let Some(dataplane) = &self.dataplane {
                dataplane.own(welcome.epoch);
            }
        }
        let was_lagging = self.cluster.lag(false);
        if let Some(settings) = welcome.settings {
            self.settings(&settings)?;
        }
        if was_lagging {
            self.configure();
        }
        if let Some(members) = welcome.members {
            self.adopt_members(&members)?;
        }
        self.standing.send_modify(|standing| {
            standing.welcomes += 1;
            standing.epoch = welcome.epoch;
            standing.lease = Duration::from_millis(welcome.lease_ms.into());
        });
        Ok(())
    }

    pub(super) fn settings(&mut self, message: &v1::Settings) -> Result<(), Lost> {
        let sealed_with = self.cluster.record_keys();
        match self.cluster.adopt_settings(message, Instant::now()) {
            Ok(adopted @ (Adopted::New | Adopted::Forked)) => {
                self.state.keep_settings(&self.cluster.kept(message).encode_to_vec());
                if self.cluster.record_keys().newest() != sealed_with.newest() {
                    // What the store holds is sealed anew, so that the old key can retire.
                    self.reporter.want_resync();
                }
                self.configure();
                tracing::info!(revision = message.revision, "new settings from the controller");
                if adopted == Adopted::Forked {
                    tracing::warn!(
                        "the store has lost the settings that this relay had: TURN REST secrets of before are accepted \
                         here for another day"
                    );
                }
            }
            Ok(Adopted::Known) => {}
            Ok(Adopted::Older(known)) => tracing::warn!(
                "the controller has settings of revision {}, this relay keeps its newer ones of revision {known}; if \
                 the cluster was made anew, delete this relay's state directory",
                message.revision
            ),
            Err(error) => tracing::warn!("settings from the controller are refused: {error}; the last ones go on"),
        }
        Ok(())
    }

    pub(super) fn adopt_members(&mut self, message: &v1::Members) -> Result<(), Lost> {
        let differs = self.cluster.adopt_members(message);
        if differs {
            self.state.keep_members(&message.encode_to_vec());
            self.mesh.adopt(message);
            // The policy names nobody that routes do not know.
            self.route();
            self.configure();
        }
        Ok(())
    }

    /// Tells the packet path who else is there.
    fn route(&self) {
        if let Some(dataplane) = &self.dataplane {
            dataplane.set_members(self.mesh.routes());
        }
    }

    pub(super) fn configure(&self) {
        self.status.set_credentials(self.cluster.has_credentials(&self.local));
        self.drain.configure(self.cluster.turn_settings(&self.local));
        if let Some(dataplane) = &self.dataplane {
            dataplane.set_user_quota(self.user_quota());
        }
    }

    /// From Welcome to the end. Ok when it was asked to stop.
    async fn serve(
        &mut self,
        mut connection: Connection,
        dataplane: &Arc<Dataplane>,
        changes: &mut ChangeReceiver,
        stop: &mut oneshot::Receiver<()>,
    ) -> Result<(), Lost> {
        // Whatever was lost before is in the resync.
        dataplane.take_overflow();
        self.reporter.connected();
        self.usage.connected(self.takes_usage);
        let (gathered, mut snapshots) = mpsc::channel(1);
        let mut flush = ticks(FLUSH);
        let mut report = ticks(REPORT);
        let mut meter = LoadMeter::default();
        let (mut unread, mut wanted) = (0, Vec::new());
        loop {
            tokio::select! {
                _ = &mut *stop => {
                    let now = unix_ms();
                    while let Ok(change) = changes.try_recv() {
                        self.reporter.note(change, now);
                    }
                    self.tell_all_usage(&mut connection, dataplane).await;
                    self.pump(&connection, true)?;
                    return connection.close().await;
                }
                () = self.again.notified() => return Err(Lost::Again),
                heard = connection.hear() => if let Some(body) = heard? {
                    if let Hear::StepBack(step) = body {
                        match self.hand_over(&mut connection, dataplane, changes, step).await {
                            Err(Lost::HandedOver { to }) => {
                                connection.close().await?;
                                return Err(Lost::HandedOver { to });
                            }
                            other => other?,
                        }
                        continue;
                    }
                    let revision = self.cluster.revision();
                    self.hear(body, dataplane)?;
                    if self.cluster.revision() != revision {
                        // A rotation waits to hear that its key is known here.
                        report.reset_immediately();
                    }
                    self.pump(&connection, false)?;
                },
                found = self.elsewhere.found() => {
                    let welcome = found.greeting.welcome()?;
                    tracing::info!(controller = welcome.controller_id, endpoint = found.endpoint, "moved over");
                    self.elsewhere.moved(Instant::now());
                    self.endpoint = found.endpoint;
                    self.welcome(welcome)?;
                    self.joined = Some(found.connection);
                    return Err(Lost::Moved);
                }
                Some((generation, records)) = snapshots.recv() => {
                    if self.reporter.snapshot(generation, records) {
                        metrics::resync();
                        // What an earlier process counted and is not among what lives has ended with it.
                        dataplane.accounts().end_unclaimed(unix_ms());
                    }
                    self.pump(&connection, false)?;
                }
                asked = self.lookups.1.recv_many(&mut wanted, LOCATED) => if asked > 0 {
                    let located = connection.locate(std::mem::take(&mut wanted), self.mesh.list());
                    let dataplane = Arc::clone(dataplane);
                    tokio::spawn(async move {
                        for (lookup, member) in located.await {
                            dataplane.located(lookup, member);
                        }
                    });
                },
                _ = report.tick() => {
                    self.state.catch_up();
                    self.usage.tick(dataplane.accounts());
                    let mut load = meter.sample(&dataplane.snapshots(), Instant::now());
                    load.settings_revision = self.cluster.revision();
                    load.links = self.mesh.report();
                    self.drain.report(&mut load);
                    if connection.room() > 0 {
                        unread = 0;
                        connection.say(Say::Load(load))?;
                    } else {
                        unread += 1;
                        if unread == MAX_UNREAD_REPORTS {
                            return Err(Lost::Protocol("it does not read what it is told"));
                        }
                    }
                }
                _ = flush.tick() => {
                    self.note_changes(changes)?;
                    if dataplane.take_overflow() {
                        self.reporter.want_resync();
                    }
                    if let Some(generation) = self.reporter.wants_snapshot() {
                        let (dataplane, gathered) = (Arc::clone(dataplane), gathered.clone());
                        tokio::spawn(async move {
                            let records = dataplane.records().await;
                            // Nobody waits for it when the session has ended meanwhile.
                            let _ = gathered.send((generation, records)).await;
                        });
                    }
                    let settled = self.reporter.settled(unix_ms());
                    if let Some(until) = settled.and_then(|age| Instant::now().checked_sub(age + SETTLED)) {
                        dataplane.settle(until);
                    }
                    self.pump(&connection, true)?;
                    let (pending, in_flight) = self.reporter.backlog();
                    metrics::backlog(pending, in_flight);
                }
            }
        }
    }

    /// Takes what has changed, each flush: a worker that has to wake somebody for each change spends more on that than on
    /// the allocation.
    fn note_changes(&mut self, changes: &mut ChangeReceiver) -> Result<(), Lost> {
        let now = unix_ms();
        for _ in 0..CHANGES_PER_TURN {
            match changes.try_recv() {
                Ok(change) => self.reporter.note(change, now),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Err(Lost::NoDataplane),
            }
        }
        Ok(())
    }

    pub(super) fn hear(&mut self, body: Hear, dataplane: &Dataplane) -> Result<(), Lost> {
        match body {
            Hear::Ack(ack) => self.reporter.acknowledged(ack.batch_id),
            Hear::UsageAck(ack) => self.usage.acknowledged(dataplane.accounts(), ack.batch_id),
            Hear::Settings(settings) => self.settings(&settings)?,
            Hear::Members(members) => self.adopt_members(&members)?,
            Hear::Revoke(revoke) => match revoke.allocation_id.try_into() {
                Ok(id) => dataplane.revoke(AllocationId(id)),
                Err(_) => return Err(Lost::Protocol("an allocation id is not 16 bytes long")),
            },
            Hear::Superseded(by) => {
                return Err(Lost::Superseded { owner: by.owner, epoch: by.epoch });
            }
            Hear::Drain(wish) => self.drain.told(wish),
            Hear::Redirects(redirects) => {
                if self.cluster.adopt_redirects(redirects) {
                    self.configure();
                }
            }
            Hear::Waiting(v1::Waiting { owner, epoch }) => return Err(Lost::Superseded { owner, epoch }),
            // It is heard where the session is.
            Hear::StepBack(_) => {}
            Hear::Store(state) => match &self.controllers {
                Some(controllers) if state.away => {
                    self.elsewhere.look(controllers, &self.endpoint, &self.hello, Instant::now());
                }
                _ => self.elsewhere.stay(),
            },
            Hear::Welcome(_) => return Err(Lost::Protocol("a second Welcome")),
        }
        Ok(())
    }

    /// A report of a relay that does nothing else yet.
    pub(super) fn life_sign(&self, dataplane: Option<&Dataplane>) -> Say {
        let snapshots = dataplane.map(Dataplane::snapshots).unwrap_or_default();
        Say::Load(LoadMeter::default().sample(&snapshots, Instant::now()))
    }

    /// Sends what may leave, as far as the stream takes it: a slow controller must not hold this task up.
    pub(super) fn pump(&mut self, connection: &Connection, flush: bool) -> Result<(), Lost> {
        let keys = self.cluster.record_keys();
        // One place is left for a load report.
        while connection.room() > 1 {
            let Some(body) = self.reporter.next(unix_ms(), &keys, flush) else { break };
            connection.say(body)?;
        }
        while connection.room() > 1
            && let Some(dataplane) = &self.dataplane
            && let Some(body) = self.usage.next(dataplane.accounts(), unix_ms())
        {
            connection.say(body)?;
        }
        Ok(())
    }

    /// Relays nothing any more, and tells what was counted: whoever has the address next begins where this relay ended.
    pub(super) async fn tell_all_usage(&mut self, connection: &mut Connection, dataplane: &Dataplane) {
        if !self.takes_usage {
            return;
        }
        dataplane.fence().raise(FenceReason::HandOver);
        dataplane.finish_turns().await;
        self.usage.close(dataplane.accounts());
        let told = async {
            while !self.usage.is_done() {
                self.pump(connection, true)?;
                if let Some(body) = connection.hear().await? {
                    self.hear(body, dataplane)?;
                }
            }
            Ok::<_, Lost>(())
        };
        // The next process has it in its state directory, or the controllers have the last checkpoint.
        if !matches!(timeout(TELL_USAGE, told).await, Ok(Ok(()))) {
            tracing::debug!("not every usage was told before the end");
        }
    }

    /// Says once what is wrong, not at each try.
    pub(super) fn complain(&mut self, lost: &Lost) {
        let complaint = format!("{}: {lost}", self.endpoint);
        if self.complaints.len() < MAX_COMPLAINTS && !self.complaints.contains(&complaint) {
            tracing::warn!("no session with a controller: {complaint}; trying again, calls go on");
            self.complaints.insert(complaint);
        } else {
            tracing::debug!("no session with a controller: {complaint}");
        }
    }
}

/// While there is no session changes are not kept: the next session begins with a resync.
async fn discard(changes: &mut ChangeReceiver) -> std::convert::Infallible {
    loop {
        while changes.try_recv().is_ok() {}
        sleep(FLUSH).await;
    }
}

pub(super) fn ticks(period: Duration) -> tokio::time::Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

pub(super) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
