//! Joins a controller, reconnects, and hands on what it says.
//!
//! A session: Hello, Welcome, then both sides talk. After each Welcome the relay restates everything. A relay whose
//! state directory had no journal asks for the stored records first, so that a restatement never wipes what only the
//! store had.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use prost::Message;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use turn_core::{AllocationId, Record};
use turnpike_proto::v1::controller_message::Body as Hear;
use turnpike_proto::v1::{self, relay_message::Body as Say};

use super::backoff::Backoff;
use super::cluster::{Adopted, Cluster, Local};
use super::connection::{Connection, Lost, hello};
use super::load::LoadMeter;
use super::reporter::Reporter;
use crate::config::{self, Controllers};
use crate::dataplane::{ChangeReceiver, Dataplane};
use crate::health::Status;
use crate::metrics;
use crate::state_directory::StateDirectory;

/// How often changes leave.
const FLUSH: Duration = Duration::from_millis(100);
/// How often load is reported; renews the lease.
const REPORT: Duration = Duration::from_secs(1);
/// The longest that a restore may take where clients are served meanwhile.
const RESTORE: Duration = Duration::from_secs(30);
/// Different complaints between two sessions; more than that are repetitions in other words.
const MAX_COMPLAINTS: usize = 16;
/// Reports in a row for which the stream had no room: the controller is stuck, another may not be.
const MAX_UNREAD_REPORTS: u32 = 10;
/// Changes taken from the data plane in one turn.
const CHANGES_PER_TURN: usize = 1024;

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
}

/// This relay's side of the control plane. Without controllers it only knows the relay's own settings.
pub struct Control {
    controllers: Option<Controllers>,
    hello: v1::Hello,
    state: StateDirectory,
    cluster: Cluster,
    local: Local,
    status: Arc<Status>,
    reporter: Reporter,
    dataplane: Option<Arc<Dataplane>>,
    /// Which endpoint is tried next.
    turn: usize,
    /// Which one was tried last.
    endpoint: String,
    /// What has been said about controllers that cannot be reached, to say it once.
    complaints: BTreeSet<String>,
    joined: Option<Connection>,
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
    ) -> anyhow::Result<Self> {
        let local = Local::new(settings, state.nonce_key()?);
        let mut cluster = Cluster::default();
        if settings.controllers.is_some() {
            if let Some(Err(error)) = state.settings()?.map(|bytes| cluster.adopt_kept_settings(&bytes)) {
                tracing::warn!("settings kept from the last session are not used: {error}");
            }
            if let Some(bytes) = state.members()? {
                cluster.adopt_kept_members(&bytes);
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
            reporter: Reporter::default(),
            dataplane: None,
            turn: 0,
            endpoint: String::new(),
            complaints: BTreeSet::new(),
            joined: None,
        })
    }

    /// Epoch under which this relay owns its address, as far as it knows.
    pub fn epoch(&self) -> u64 {
        self.hello.claimed_epoch
    }

    /// What workers run with.
    pub fn turn_settings(&self) -> Arc<turn_core::Settings> {
        Arc::new(self.cluster.turn_settings(&self.local))
    }

    /// Allocations one user may hold on this relay, 0 for no limit.
    pub fn user_quota(&self) -> usize {
        self.cluster.user_quota(&self.local)
    }

    /// Joins before anything is served, where the store may hold records this relay has lost, and returns them. Gives
    /// up after `within`: they are asked for again when a controller can be reached.
    ///
    /// # Errors
    /// [`Ended::Superseded`].
    pub async fn join(&mut self, within: Duration) -> Result<Vec<Record>, Ended> {
        let Some(controllers) = self.controllers.as_ref().filter(|_| self.state.wants_restore()) else {
            return Ok(Vec::new());
        };
        // A silent one must not use up the time of the others.
        let share = within / u32::try_from(controllers.endpoints.len()).unwrap_or(u32::MAX);
        let deadline = Instant::now() + within;
        let left = || deadline.saturating_duration_since(Instant::now());
        let mut backoff = Backoff::default();
        while !left().is_zero() {
            match timeout(left().min(share), self.connect()).await {
                Ok(Ok((connection, records))) => {
                    self.joined = Some(connection);
                    return Ok(records);
                }
                Ok(Err(Lost::Superseded { owner, epoch })) => return Err(Ended::Superseded { owner, epoch }),
                Ok(Err(lost)) => self.complain(&lost),
                Err(_) => self.complain(&Lost::Silent(share)),
            }
            sleep(backoff.next().min(left())).await;
        }
        tracing::warn!("serving without the records in the store: no controller has answered yet");
        Ok(Vec::new())
    }

    /// Keeps a session with a controller until `stop`, or until another node has taken the address over. What
    /// [`Control::join`] returned has been given to `dataplane`.
    pub async fn run(
        mut self,
        dataplane: Arc<Dataplane>,
        mut changes: ChangeReceiver,
        mut stop: oneshot::Receiver<()>,
    ) -> Ended {
        self.dataplane = Some(Arc::clone(&dataplane));
        let mut backoff = Backoff::default();
        loop {
            let began = Instant::now();
            match self.session(&dataplane, &mut changes, &mut stop).await {
                Ok(()) => return Ended::Stopped,
                Err(Lost::Superseded { owner, epoch }) => return Ended::Superseded { owner, epoch },
                Err(lost) => self.complain(&lost),
            }
            if began.elapsed() > Backoff::CAP {
                backoff = Backoff::default();
            }
            tokio::select! {
                _ = &mut stop => return Ended::Stopped,
                never = discard(&mut changes) => match never {},
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
                connected = self.connect() => {
                    let (connection, records) = connected?;
                    if !records.is_empty() {
                        dataplane.restore(records);
                    }
                    connection
                }
            },
        };
        // The stored records are in the data plane, and so in the journal.
        self.state.restored()?;
        metrics::control_connected(true);
        let result = self.serve(connection, dataplane, changes, stop).await;
        self.reporter.disconnected();
        metrics::control_connected(false);
        metrics::backlog(0, 0);
        if result.is_err() {
            metrics::control_reconnect();
        }
        result
    }

    /// One try with the next controller: from nothing to a welcome, and the stored records if they are wanted.
    async fn connect(&mut self) -> Result<(Connection, Vec<Record>), Lost> {
        let Some(controllers) = &self.controllers else {
            return std::future::pending().await;
        };
        self.endpoint.clone_from(&controllers.endpoints[self.turn % controllers.endpoints.len()]);
        self.turn = self.turn.wrapping_add(1);
        let (mut connection, welcome) = Connection::open(&self.endpoint, controllers, self.hello.clone()).await?;
        let controller = welcome.controller_id.clone();
        self.welcome(welcome)?;
        let records = if self.state.wants_restore() { self.restore(&mut connection).await? } else { Vec::new() };
        tracing::info!(
            controller,
            endpoint = self.endpoint,
            epoch = self.epoch(),
            restored = records.len(),
            "joined the cluster"
        );
        self.complaints.clear();
        Ok((connection, records))
    }

    fn welcome(&mut self, welcome: v1::Welcome) -> Result<(), Lost> {
        if welcome.epoch > self.hello.claimed_epoch {
            self.state.keep_epoch(welcome.epoch)?;
            self.hello.claimed_epoch = welcome.epoch;
            metrics::epoch(welcome.epoch);
            if let Some(dataplane) = &self.dataplane {
                dataplane.own(welcome.epoch);
            }
        }
        if let Some(settings) = welcome.settings {
            self.settings(&settings)?;
        }
        if let Some(members) = welcome.members {
            self.members(&members)?;
        }
        Ok(())
    }

    fn settings(&mut self, message: &v1::Settings) -> Result<(), Lost> {
        let sealed_with = self.cluster.record_keys();
        match self.cluster.adopt_settings(message) {
            Ok(Adopted::New) => {
                self.state.keep_settings(&message.encode_to_vec())?;
                if self.cluster.record_keys() != sealed_with {
                    // What the store holds is sealed anew, so that the old key can retire.
                    self.reporter.want_resync();
                }
                self.configure();
                tracing::info!(revision = message.revision, "new settings from the controller");
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

    fn members(&mut self, message: &v1::Members) -> Result<(), Lost> {
        if self.cluster.adopt_members(message) {
            self.state.keep_members(&message.encode_to_vec())?;
            self.configure();
        }
        Ok(())
    }

    fn configure(&self) {
        self.status.set_credentials(self.cluster.has_credentials(&self.local));
        if let Some(dataplane) = &self.dataplane {
            dataplane.configure(self.turn_settings());
            dataplane.set_user_quota(self.user_quota());
        }
    }

    /// The stored records of this relay's address; what is damaged is left out and counted.
    async fn restore(&self, connection: &mut Connection) -> Result<Vec<Record>, Lost> {
        let request =
            v1::RestoreRequest { node_id: self.hello.node_id.clone(), relay_address: self.hello.relay_address.clone() };
        let sealed = timeout(RESTORE, connection.restore(request)).await.map_err(|_| Lost::Silent(RESTORE))??;
        let keys = self.cluster.record_keys();
        let mut records = Vec::new();
        for bytes in &sealed {
            match Record::open(bytes, &keys) {
                Ok(record) if record.relay_address.to_string() == self.hello.relay_address => records.push(record),
                Ok(_) => tracing::debug!("a stored record is of another relay address"),
                Err(error) => tracing::debug!("a stored record is refused: {error}"),
            }
        }
        let refused = sealed.len() - records.len();
        metrics::restored(metrics::Source::Store, records.len(), refused as u64);
        if refused > 0 {
            tracing::warn!(refused, "records in the store are damaged or not this relay's");
        }
        Ok(records)
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
        let (gathered, mut snapshots) = mpsc::channel(1);
        let mut flush = ticks(FLUSH);
        let mut report = ticks(REPORT);
        let mut meter = LoadMeter::default();
        let mut unread = 0;
        loop {
            tokio::select! {
                _ = &mut *stop => {
                    self.pump(&connection, true)?;
                    return connection.close().await;
                }
                heard = connection.hear() => if let Some(body) = heard? {
                    self.hear(body, dataplane)?;
                    self.pump(&connection, false)?;
                },
                change = changes.recv() => {
                    let now = unix_ms();
                    self.reporter.note(change.ok_or(Lost::NoDataplane)?, now);
                    for _ in 1..CHANGES_PER_TURN {
                        let Ok(change) = changes.try_recv() else { break };
                        self.reporter.note(change, now);
                    }
                    self.pump(&connection, false)?;
                }
                Some((generation, records)) = snapshots.recv() => {
                    if self.reporter.snapshot(generation, records) {
                        metrics::resync();
                    }
                    self.pump(&connection, false)?;
                }
                _ = report.tick() => {
                    let load = meter.sample(&dataplane.snapshots(), Instant::now());
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
                    self.pump(&connection, true)?;
                    let (pending, in_flight) = self.reporter.backlog();
                    metrics::backlog(pending, in_flight);
                }
            }
        }
    }

    fn hear(&mut self, body: Hear, dataplane: &Dataplane) -> Result<(), Lost> {
        match body {
            Hear::Ack(ack) => self.reporter.acknowledged(ack.batch_id),
            Hear::Settings(settings) => self.settings(&settings)?,
            Hear::Members(members) => self.members(&members)?,
            Hear::Revoke(revoke) => match revoke.allocation_id.try_into() {
                Ok(id) => dataplane.revoke(AllocationId(id)),
                Err(_) => return Err(Lost::Protocol("an allocation id is not 16 bytes long")),
            },
            Hear::Superseded(by) => {
                return Err(Lost::Superseded { owner: by.owner, epoch: by.epoch });
            }
            Hear::Welcome(_) => return Err(Lost::Protocol("a second Welcome")),
        }
        Ok(())
    }

    /// Sends what may leave, as far as the stream takes it: a slow controller must not hold this task up.
    fn pump(&mut self, connection: &Connection, flush: bool) -> Result<(), Lost> {
        let keys = self.cluster.record_keys();
        // One place is left for a load report.
        while connection.room() > 1 {
            let Some(body) = self.reporter.next(unix_ms(), &keys, flush) else { break };
            connection.say(body)?;
        }
        Ok(())
    }

    /// Says once what is wrong, not at each try.
    fn complain(&mut self, lost: &Lost) {
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
    while changes.recv().await.is_some() {}
    std::future::pending().await
}

fn ticks(period: Duration) -> tokio::time::Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
