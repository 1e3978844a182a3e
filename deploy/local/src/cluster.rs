//! The life of a local cluster: prepare, start, wait, tell, keep, stop.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::arguments::Arguments;
use crate::plan::{Network, Plan, Port, plan};
use crate::ready::{self, Check, Credential};
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

/// Everything others need to use the cluster: `--json`, `--ready-file` and `cluster.json` in the directory.
#[derive(Clone, Debug, Serialize)]
pub struct Description {
    /// Process to end (SIGTERM) to end the cluster.
    pub pid: u32,
    /// Certificates, state and logs.
    pub dir: PathBuf,
    /// URL of the call page.
    pub call_page: String,
    /// URL of the console.
    pub console: String,
    /// Base URL of discovery.
    pub discovery: String,
    /// URL of the controller for gRPC.
    pub grpc: String,
    /// Context file for `turnctl`.
    pub turnctl_config: PathBuf,
    /// The `turnctl` built with this binary.
    pub turnctl: PathBuf,
    /// The authority's certificate.
    pub ca: PathBuf,
    /// Realm of the credentials.
    pub realm: String,
    /// A TURN user name that works for `ttl` seconds.
    pub username: String,
    /// Its password.
    pub password: String,
    /// Seconds.
    pub ttl: u64,
    /// The controller's process.
    pub controller: Process,
    /// The relays.
    pub relays: Vec<Relay>,
}

/// A supervised process.
#[derive(Clone, Debug, Serialize)]
pub struct Process {
    /// Its name.
    pub id: String,
    /// 0 until it was started.
    pub pid: u32,
    /// Times it was started.
    pub starts: u32,
    /// Its output.
    pub log: PathBuf,
}

/// A relay and where it is.
#[derive(Clone, Debug, Serialize)]
pub struct Relay {
    /// Its process.
    #[serde(flatten)]
    pub process: Process,
    /// Its region.
    pub region: String,
    /// Where clients reach it, UDP and TCP.
    pub address: String,
    /// Base URL of health and metrics.
    pub http: String,
    /// Its state directory.
    pub state_dir: PathBuf,
    /// Its configuration.
    pub config: PathBuf,
}

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
    files::write_configurations(&directory, &plan, &arguments.log)?;

    let mut signals = Signals::new()?;
    let mut cluster = Cluster::new(&arguments, plan, directory, &programs)?;
    cluster.serve_page()?;
    cluster.start(&programs)?;
    let outcome = tokio::select! {
        outcome = cluster.until_stopped() => outcome,
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
        let log = |name: &str| directory.logs().join(format!("{name}.log"));
        let process = |id: &str| Process { id: id.to_owned(), pid: 0, starts: 0, log: log(id) };
        let relays = plan.relays.iter().map(|relay| Relay {
            process: process(relay.id),
            region: relay.region.to_owned(),
            address: relay.advertised().to_string(),
            http: format!("http://{}", relay.http),
            state_dir: directory.relay(relay.id),
            config: files::relay_file(&directory, relay.id),
        });
        let description = Description {
            pid: std::process::id(),
            dir: directory.path().to_owned(),
            call_page: plan.page_url(),
            console: plan.console_url(),
            discovery: format!("http://{}", plan.http),
            grpc: format!("https://{}", plan.grpc),
            turnctl_config: files::turnctl_file(&directory),
            turnctl: programs.turnctl.clone(),
            ca: directory.pki().join("ca.pem"),
            realm: "turnpike".into(),
            username: String::new(),
            password: String::new(),
            ttl: 0,
            controller: process("controller"),
            relays: relays.collect(),
        };
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

    fn start(&mut self, programs: &Programs) -> Result<()> {
        let argument = |file: PathBuf| vec![OsString::from("--config"), file.into()];
        // One file a run: what is shown of it later belongs to this run.
        for log in self.logs() {
            write_whole(&log, "")?;
        }
        let controller = Member {
            name: "controller".into(),
            program: programs.controller.clone(),
            arguments: argument(files::controller_file(&self.directory)),
            log: self.description.controller.log.clone(),
        };
        let orders = self.controller.orders.subscribe();
        // The runtime has one thread, the main one: children are tied to its life (child.rs).
        self.controller.tasks.spawn(supervise(controller, orders, self.sender.clone()));
        for relay in &self.description.relays {
            let member = Member {
                name: relay.process.id.clone(),
                program: programs.relay_node.clone(),
                arguments: argument(relay.config.clone()),
                log: relay.process.log.clone(),
            };
            self.relays.tasks.spawn(supervise(member, self.relays.orders.subscribe(), self.sender.clone()));
        }
        Ok(())
    }

    fn logs(&self) -> Vec<PathBuf> {
        let relays = self.description.relays.iter().map(|relay| relay.process.log.clone());
        relays.chain([self.description.controller.log.clone()]).collect()
    }

    /// Waits for readiness, says so, and then looks after the processes for ever.
    async fn until_stopped(&mut self) -> Result<()> {
        let began = Instant::now();
        let credential = self.until_ready().await?;
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
                        self.note_start(name, *pid);
                        self.publish()?;
                        tokio::spawn(watch_return(self.client.clone(), self.health_of(name), back.clone()));
                    }
                    self.screen.event(&event);
                }
                Some((name, outcome)) = came_back.recv() => self.screen.back(&name, outcome),
            }
        }
    }

    async fn until_ready(&mut self) -> Result<Credential> {
        let limit = Instant::now() + self.ready_timeout;
        for check in ready::checks(&self.plan) {
            let client = self.client.clone();
            let waiting = ready::until_ready(&client, &check, limit);
            tokio::pin!(waiting);
            loop {
                tokio::select! {
                    outcome = &mut waiting => match outcome {
                        Ok(()) => break,
                        Err(wrong) => bail!(
                            "not ready after {} s: {}: {wrong}{}",
                            self.ready_timeout.as_secs(), check.member, self.log_of(&check.member)
                        ),
                    },
                    Some(event) = self.events.recv() => match event {
                        Event::Started { name, pid } => self.note_start(&name, pid),
                        Event::Ended { name, how, .. } => {
                            bail!("{name} ended while starting ({how}){}", self.log_of(&name));
                        }
                        Event::Unstartable { name, error } => bail!("cannot start {name}: {error}"),
                    },
                }
            }
        }
        ready::credential(&self.client, &self.plan, GUEST).await.context("no credential from discovery")
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
        let address = relay.map_or(self.plan.http, |relay| relay.http);
        Check { member: name.to_owned(), url: format!("http://{address}/readyz") }
    }

    fn note_start(&mut self, name: &str, pid: u32) {
        let relays = self.description.relays.iter_mut().map(|relay| &mut relay.process);
        for process in relays.chain([&mut self.description.controller]).filter(|process| process.id == name) {
            process.pid = pid;
            process.starts += 1;
        }
    }

    /// Writes the description where others look for it.
    fn publish(&self) -> Result<()> {
        let json = serde_json::to_string(&self.description)?;
        write_whole(&self.directory.path().join("cluster.json"), &format!("{json}\n"))?;
        self.ready_file.as_deref().map_or(Ok(()), |file: &Path| write_whole(file, &format!("{json}\n")))
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

/// The programs beside this one.
struct Programs {
    controller: PathBuf,
    relay_node: PathBuf,
    turnctl: PathBuf,
}

impl Programs {
    fn find() -> Result<Self> {
        let own = std::env::current_exe().context("cannot tell where this program is")?;
        let directory = own.parent().unwrap_or(Path::new("/"));
        let missing: Vec<_> = ["controller", "relay-node", "turnctl"]
            .into_iter()
            .filter(|name| !directory.join(name).is_file())
            .collect();
        if !missing.is_empty() {
            bail!(
                "{} not found in {}: run deploy/local/up, which builds it, or cargo build --release -p {}",
                missing.join(", "),
                directory.display(),
                missing.join(" -p ")
            );
        }
        let path = |name| directory.join(name);
        Ok(Self { controller: path("controller"), relay_node: path("relay-node"), turnctl: path("turnctl") })
    }
}

/// Says whose port is taken and how to go on. It is free again at once: nothing was connected to it.
fn check_free(port: &Port) -> Result<()> {
    let bound =
        if port.udp { UdpSocket::bind(port.address).map(drop) } else { TcpListener::bind(port.address).map(drop) };
    let Err(error) = bound else { return Ok(()) };
    let (kind, flag) = if port.udp { ("UDP", "-lpnu") } else { ("TCP", "-lpnt") };
    let (address, number) = (port.address, port.address.port());
    match error.kind() {
        std::io::ErrorKind::AddrInUse => bail!(
            "{kind} port {number} for {} is taken ({address}): see by whom with  ss {flag} 'sport = :{number}'  or move all ports with --port-offset 1000",
            port.owner
        ),
        _ => bail!("cannot bind {kind} {address} for {}: {error}", port.owner),
    }
}

/// This machine's addresses; none when they cannot be listed, then the page's certificate does not name them.
fn own_addresses() -> Vec<IpAddr> {
    let addresses = if_addrs::get_if_addrs().unwrap_or_default();
    addresses.into_iter().map(|interface| interface.ip()).filter(|ip| !is_link_local(*ip)).collect()
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// This machine's network.
struct Machine;

impl Network for Machine {
    fn is_local(&self, ip: Ipv4Addr) -> bool {
        UdpSocket::bind((ip, 0)).is_ok()
    }

    fn source_towards(&self, ip: Ipv4Addr) -> Option<Ipv4Addr> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
        // Connecting a UDP socket sends nothing; it asks the routing table.
        socket.connect((ip, 9)).ok()?;
        match socket.local_addr().ok()?.ip() {
            IpAddr::V4(ip) => Some(ip),
            IpAddr::V6(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_is_named_with_its_owner_and_the_way_out() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("listener");
        let port = Port { address: taken.local_addr().expect("address"), udp: false, owner: "call page".into() };
        let message = check_free(&port).expect_err("taken").to_string();
        let number = port.address.port();
        assert!(message.starts_with(&format!("TCP port {number} for call page is taken")), "{message}");
        assert!(message.contains(&format!("ss -lpnt 'sport = :{number}'")) && !message.contains('\n'), "{message}");
        drop(taken);
        check_free(&port).expect("free again");
    }
}
