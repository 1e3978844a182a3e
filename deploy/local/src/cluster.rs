//! The life of a local cluster: prepare, start, wait, tell, keep, stop.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::arguments::Arguments;
use crate::description::{Description, Process};
use crate::machine::{Machine, Programs, check_free, own_addresses};
use crate::plan::{Plan, plan};
use crate::ready::{self, Check};
use crate::state_directory::{StateDirectory, write_whole};
use crate::supervisor::{Event, Member, Order, supervise};
use crate::welcome::Screen;
use crate::{files, page};

/// How long processes may take to end in order before they are killed.
const STOP: Duration = Duration::from_secs(10);
/// How long a relay that was started again may take to be ready before that is said.
const AGAIN: Duration = Duration::from_secs(30);
/// User the printed credential is made out to.
const GUEST: &str = "guest";

/// Runs a cluster until Ctrl-C or SIGTERM.
///
/// # Errors
/// One line for people, and the last log lines of a process that failed.
pub async fn run(arguments: Arguments) -> Result<()> {
    let plan = plan(&arguments.public_ip, arguments.https, arguments.port_offset, &Machine)?;
    let programs = Programs::find()?;
    let directory = StateDirectory::open(&arguments.dir, arguments.fresh)?;
    for port in plan.ports() {
        check_free(&port)?;
    }
    files::make_certificates(&directory, &plan, &own_addresses())?;
    let console_key = files::console_key()?;
    files::write_configurations(&directory, &plan, &arguments.log, &console_key)?;

    let mut signals = Signals::new()?;
    let mut cluster = Cluster::new(&arguments, plan, directory, &programs)?;
    cluster.description.console_key = console_key;
    cluster.serve_page()?;
    let outcome = tokio::select! {
        outcome = cluster.live(&programs) => outcome,
        () = signals.next() => Ok(()),
    };
    // A second Ctrl-C does not wait for anybody.
    cluster.stop(signals.next()).await;
    outcome
}

struct Cluster {
    screen: Screen,
    plan: Plan,
    directory: StateDirectory,
    description: Description,
    ready_file: Option<PathBuf>,
    ready_timeout: Duration,
    client: reqwest::Client,
    relays: Group,
    controller: Group,
    page: JoinSet<()>,
    sender: mpsc::Sender<Event>,
    events: mpsc::Receiver<Event>,
}

/// Processes that are stopped together.
struct Group {
    orders: watch::Sender<Order>,
    tasks: JoinSet<()>,
}

impl Group {
    fn new() -> Self {
        Self { orders: watch::Sender::new(Order::Run), tasks: JoinSet::new() }
    }

    /// Ends all in order; those that do not end are killed after [`STOP`], or as soon as `hurry` is done.
    async fn stop(&mut self, hurry: &mut (impl Future<Output = ()> + Unpin)) {
        self.orders.send_replace(Order::Stop);
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        let all = tokio::select! {
            () = ended => true,
            () = tokio::time::sleep(STOP) => false,
            () = hurry => false,
        };
        if !all {
            self.orders.send_replace(Order::Kill);
            while self.tasks.join_next().await.is_some() {}
        }
    }
}

impl Cluster {
    fn new(arguments: &Arguments, plan: Plan, directory: StateDirectory, programs: &Programs) -> Result<Self> {
        let description = Description::new(&plan, &directory, &programs.turnctl);
        let (sender, events) = mpsc::channel(64);
        Ok(Self {
            screen: Screen::new(arguments.json),
            description,
            ready_file: arguments.ready_file.clone(),
            ready_timeout: arguments.ready_timeout,
            client: ready::client()?,
            relays: Group::new(),
            controller: Group::new(),
            page: JoinSet::new(),
            sender,
            events,
            plan,
            directory,
        })
    }

    /// Opens the call page; it answers 502 for discovery until the controller is up.
    fn serve_page(&mut self) -> Result<()> {
        let tls = self.plan.https.then(|| files::page_certificate(&self.directory));
        let app = page::router(page::Upstream {
            client: self.client.clone(),
            base: self.description.discovery.clone(),
            ca: self.directory.pki().join("ca.pem"),
        });
        self.page.spawn(page::serve(self.plan.page, tls, app)?);
        Ok(())
    }

    fn start_controller(&mut self, programs: &Programs) -> Result<()> {
        // One file a run: what is shown of it later belongs to this run.
        for process in self.description.processes() {
            write_whole(&process.log, "")?;
        }
        let config = files::controller_file(&self.directory);
        let member = member(&self.description.controller, &programs.controller, config);
        // The runtime has one thread, the main one: children are tied to its life (child.rs).
        let orders = self.controller.orders.subscribe();
        self.controller.tasks.spawn(supervise(member, orders, self.sender.clone()));
        Ok(())
    }

    fn start_relays(&mut self, programs: &Programs) {
        for relay in &self.description.relays {
            let member = member(&relay.process, &programs.relay_node, relay.config.clone());
            self.relays.tasks.spawn(supervise(member, self.relays.orders.subscribe(), self.sender.clone()));
        }
    }

    /// Starts everything, says so when it is ready, and then looks after the processes for ever.
    async fn live(&mut self, programs: &Programs) -> Result<()> {
        let began = Instant::now();
        let limit = began + self.ready_timeout;
        self.start_controller(programs)?;
        self.until_ready(&ready::controller(&self.plan), limit).await?;
        self.start_relays(programs);
        for check in ready::relays(&self.plan) {
            self.until_ready(&check, limit).await?;
        }
        let credential = ready::credential(&self.client, &self.plan, GUEST).await;
        let credential = credential.context("no credential from discovery")?;
        self.description.username = credential.username;
        self.description.password = credential.password;
        self.description.ttl = credential.ttl;
        self.publish()?;
        self.screen.welcome(&self.description, &self.plan, began.elapsed())?;
        let (back, mut came_back) = mpsc::channel::<(String, Result<Duration, String>)>(16);
        loop {
            tokio::select! {
                Some(event) = self.events.recv() => {
                    if let Event::Started { name, pid } = &event {
                        self.description.started(name, *pid);
                        self.publish()?;
                        tokio::spawn(watch_return(self.client.clone(), self.health_of(name), back.clone()));
                    }
                    self.screen.event(&event);
                }
                Some((name, outcome)) = came_back.recv() => self.screen.back(&name, outcome),
            }
        }
    }

    async fn until_ready(&mut self, check: &Check, limit: Instant) -> Result<()> {
        let client = self.client.clone();
        let waiting = ready::until_ready(&client, check, limit);
        tokio::pin!(waiting);
        loop {
            tokio::select! {
                outcome = &mut waiting => return outcome.map_err(|wrong| {
                    let seconds = self.ready_timeout.as_secs();
                    anyhow!("not ready after {seconds} s: {}: {wrong}{}", check.member, self.log_of(&check.member))
                }),
                Some(event) = self.events.recv() => match event {
                    Event::Started { name, pid } => self.description.started(&name, pid),
                    Event::Ended { name, how, .. } => {
                        bail!("{name} ended while starting ({how}){}", self.log_of(&name));
                    }
                    Event::Unstartable { name, error } => bail!("cannot start {name}: {error}"),
                },
            }
        }
    }

    /// The end of a member's log, as an addition to an error.
    fn log_of(&self, name: &str) -> String {
        let log = self.directory.logs().join(format!("{name}.log"));
        let lines = ready::last_lines(&log);
        if lines.is_empty() {
            format!("; its log {} is empty", log.display())
        } else {
            format!("; the end of {}:\n{}", log.display(), lines.trim_end())
        }
    }

    fn health_of(&self, name: &str) -> Check {
        let relay = self.plan.relays.iter().find(|relay| relay.id == name);
        relay.map_or_else(|| ready::controller(&self.plan), ready::health)
    }

    fn publish(&self) -> Result<()> {
        self.description.publish(self.ready_file.as_deref())
    }

    /// Relays first: they take leave of the controller.
    async fn stop(mut self, hurry: impl Future<Output = ()>) {
        self.screen.stopping();
        // Events are not for anybody any more; a full queue must not hold a supervisor up.
        self.events.close();
        tokio::pin!(hurry);
        self.relays.stop(&mut hurry).await;
        self.controller.stop(&mut hurry).await;
        self.page.shutdown().await;
        self.screen.stopped();
    }
}

fn member(process: &Process, program: &Path, config: PathBuf) -> Member {
    Member {
        name: process.id.clone(),
        program: program.to_owned(),
        arguments: vec![OsString::from("--config"), config.into()],
        log: process.log.clone(),
    }
}

async fn watch_return(client: reqwest::Client, check: Check, back: mpsc::Sender<(String, Result<Duration, String>)>) {
    let began = Instant::now();
    let outcome = ready::until_ready(&client, &check, began + AGAIN).await.map(|()| began.elapsed());
    // Nobody listens any more when the cluster is stopping.
    let _ = back.send((check.member, outcome)).await;
}

/// Ctrl-C, SIGTERM and SIGHUP (the terminal was closed).
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        let on = |kind| signal(kind).context("signals");
        Ok(Self {
            interrupt: on(SignalKind::interrupt())?,
            terminate: on(SignalKind::terminate())?,
            hangup: on(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }
}
