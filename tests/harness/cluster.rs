//! A cluster of real release binaries: certificates, controllers, relays, and the questions a user would ask it.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::signal::Signal;
use serde::de::DeserializeOwned;
use serde_json::Value;
use turnctl::pki::{self, Ca, Identity};

use crate::etcd::Etcd;
use crate::etcd_cluster::EtcdCluster;
use crate::place::Place;
use crate::process::{Around, Host, Process};
use crate::turn::Login;
use crate::wait::eventually;

/// Longest a member may take from its start to its readiness. A promise is asserted where it is made; this only ends a
/// test whose member will never be ready.
const READY: Duration = Duration::from_secs(20);
/// Validity of the certificates.
const VALIDITY: Duration = Duration::from_secs(86_400);

/// Port of a controller's gRPC.
pub const GRPC: u16 = 9443;
/// Port of a controller's HTTP.
pub const HTTP: u16 = 8080;
/// Port of a relay's STUN and TURN.
pub const TURN: u16 = 3478;
/// Port of a relay's health and metrics.
pub const RELAY_HTTP: u16 = 9478;

/// Root of the repository.
#[must_use]
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(PathBuf::new, Path::to_owned)
}

/// Where Cargo builds.
#[must_use]
pub fn target_directory() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository().join("target"), PathBuf::from)
}

/// Path of a binary of this workspace: the release one, or what `TURNPIKE_BINARIES` (a directory) holds, for a quick try
/// of what was built for debugging.
///
/// # Errors
/// It is not built.
pub fn binary(name: &str) -> Result<PathBuf> {
    let directory =
        std::env::var_os("TURNPIKE_BINARIES").map_or_else(|| target_directory().join("release"), PathBuf::from);
    let path = directory.join(name);
    ensure!(
        path.is_file(),
        "{} is missing: run `cargo build --release -p relay-node -p controller -p turnctl -p turnpike-local` (tests/run does)",
        path.display()
    );
    Ok(path)
}

/// Where a cluster's controllers keep their state.
#[derive(Clone, Copy)]
pub enum Store<'a> {
    /// A file of the one controller.
    Embedded,
    /// Real etcd.
    Etcd(&'a Etcd),
    /// Real etcd of several members.
    EtcdCluster(&'a EtcdCluster),
}

/// A controller.
pub struct Controller {
    /// Where it runs.
    pub place: Place,
    /// What it is started in, from its next start.
    pub around: Around,
    config: PathBuf,
    process: Option<Process>,
}

/// A relay.
pub struct Relay {
    /// Its node id.
    pub id: String,
    /// Where it runs.
    pub place: Place,
    /// Its relay address.
    served: Place,
    /// What it is started in, from its next start.
    pub around: Around,
    config: PathBuf,
    process: Option<Process>,
}

/// How a relay differs from the usual one.
#[derive(Clone, Debug)]
pub struct RelayOptions {
    /// Region.
    pub region: String,
    /// Worker threads.
    pub workers: u16,
    /// Listeners besides UDP and TCP on [`TURN`], as schemes and ports: `("tls", 443)`.
    pub listen: Vec<(&'static str, u16)>,
    /// Its relay address, if that is not the one of its machine.
    pub address: Option<IpAddr>,
    /// Where clients reach it, if that is another address than its own.
    pub public: Option<IpAddr>,
    /// More lines for its configuration.
    pub more: String,
    /// What it is started in.
    pub around: Around,
}

impl RelayOptions {
    /// A relay in this region with one worker.
    #[must_use]
    pub fn in_region(region: &str) -> Self {
        Self {
            region: region.to_owned(),
            workers: 1,
            listen: Vec::new(),
            address: None,
            public: None,
            more: String::new(),
            around: Around::default(),
        }
    }
}

/// The cluster: its authority and where its files are.
pub struct Cluster {
    directory: PathBuf,
    ca: Ca,
    controllers: Vec<SocketAddr>,
}

impl Cluster {
    /// A cluster with nothing but a certificate authority.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn new(directory: &Path) -> Result<Self> {
        let ca = pki::create_ca("test cluster")?;
        ca.write(directory, false)?;
        let cluster = Self { directory: directory.to_owned(), ca, controllers: Vec::new() };
        cluster.issue(&Identity::Admin("test".into()))?;
        Ok(cluster)
    }

    fn issue(&self, identity: &Identity) -> Result<(PathBuf, PathBuf)> {
        let pair = self.ca.issue(identity, &[], &[], VALIDITY)?;
        Ok(pair.write(&self.directory, &identity.file_stem(), true)?)
    }

    fn tls(&self, identity: &Identity) -> Result<String> {
        let (certificate, key) = self.issue(identity)?;
        let ca = self.directory.join(pki::CA_CERTIFICATE);
        Ok(format!("tls = {{ ca = {ca:?}, certificate = {certificate:?}, key = {key:?} }}"))
    }

    /// Starts a controller and waits until it is ready. `more` are further lines of its configuration.
    ///
    /// # Errors
    /// It does not get ready.
    pub async fn controller(&mut self, place: &Place, store: Store<'_>, more: &str) -> Result<Controller> {
        let id = format!("controller-{}", self.controllers.len() + 1);
        let store = match store {
            Store::Embedded => {
                format!("{{ kind = \"embedded\", path = {:?} }}", self.directory.join(format!("{id}.store")))
            }
            Store::Etcd(etcd) => format!("{{ kind = \"etcd\", endpoints = [\"{}\"] }}", etcd.endpoint()),
            Store::EtcdCluster(etcd) => format!("{{ kind = \"etcd\", endpoints = {:?} }}", etcd.endpoints()),
        };
        let mut text = String::new();
        writeln!(text, "id = \"{id}\"\nregion = \"eu\"\ngrpc = \"{}\"\nhttp = \"{}\"", place.at(GRPC), place.at(HTTP))?;
        writeln!(text, "{}\nstore = {store}\n{more}", self.tls(&Identity::Controller(id.clone()))?)?;
        let config = self.directory.join(format!("{id}.toml"));
        fs::write(&config, text)?;
        self.controllers.push(place.at(GRPC));
        let mut controller = Controller { place: place.clone(), around: Around::default(), config, process: None };
        controller.start().await?;
        Ok(controller)
    }

    /// Starts a relay that joins the controllers started so far, and waits until it is ready.
    ///
    /// # Errors
    /// It does not get ready.
    pub async fn relay(&self, id: &str, place: &Place, options: &RelayOptions) -> Result<Relay> {
        let mut relay = self.new_relay(id, place, options)?;
        relay.start().await?;
        Ok(relay)
    }

    /// Starts a relay that joins the controllers started so far, and does not wait: it may have to wait itself.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn launch_relay(&self, id: &str, place: &Place, options: &RelayOptions) -> Result<Relay> {
        let mut relay = self.new_relay(id, place, options)?;
        relay.launch()?;
        Ok(relay)
    }

    fn new_relay(&self, id: &str, place: &Place, options: &RelayOptions) -> Result<Relay> {
        let served = Place { address: options.address.unwrap_or(place.address), ..place.clone() };
        let relay = Relay {
            id: id.to_owned(),
            place: place.clone(),
            served,
            around: options.around.clone(),
            config: self.directory.join(format!("{id}.toml")),
            process: None,
        };
        self.configure(&relay, options)?;
        Ok(relay)
    }

    /// Writes a relay's configuration again; it holds from its next start.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn configure(&self, relay: &Relay, options: &RelayOptions) -> Result<()> {
        let (place, served) = (&relay.place, &relay.served);
        let controllers: Vec<String> = self.controllers.iter().map(|at| format!("https://{at}")).collect();
        let mut text = String::new();
        writeln!(text, "node_id = \"{}\"\nregion = \"{}\"", relay.id, options.region)?;
        writeln!(text, "state_dir = {:?}", self.state_of(&relay.id))?;
        let listeners = [("udp", TURN), ("tcp", TURN)].into_iter().chain(options.listen.iter().copied());
        let listeners: Vec<String> =
            listeners.map(|(scheme, port)| format!("{scheme}://{}", served.at(port))).collect();
        writeln!(text, "listen = {listeners:?}")?;
        writeln!(text, "relay_ip = \"{}\"", served.address)?;
        writeln!(text, "public_ip = \"{}\"", options.public.unwrap_or(served.address))?;
        writeln!(text, "allow_loopback_peers = {}", place.address.is_loopback())?;
        writeln!(text, "workers = {}\nhttp = \"{}\"", options.workers, place.at(RELAY_HTTP))?;
        if !controllers.is_empty() {
            let tls = self.tls(&Identity::Relay(relay.id.clone()))?;
            writeln!(text, "controllers = {controllers:?}\n{tls}")?;
        }
        // Whoever stops a relay here waits for its end.
        if !options.more.contains("drain_deadline") {
            writeln!(text, "drain_deadline = 0")?;
        }
        writeln!(text, "{}", options.more)?;
        fs::write(&relay.config, text)?;
        Ok(())
    }

    /// Gives a relay another certificate, in the place of the one it has.
    ///
    /// # Errors
    /// The files cannot be written.
    pub fn renew(&self, relay: &Relay) -> Result<()> {
        self.issue(&Identity::Relay(relay.id.clone())).map(drop)
    }

    /// State directory of a relay.
    #[must_use]
    pub fn state_of(&self, id: &str) -> PathBuf {
        self.directory.join(format!("{id}.state"))
    }

    /// What points `turnctl` here, as an administrator.
    #[must_use]
    pub fn turnctl_variables(&self) -> [(&'static str, OsString); 5] {
        let stem = Identity::Admin("test".into()).file_stem();
        let controllers: Vec<String> = self.controllers.iter().map(|at| format!("https://{at}")).collect();
        let file = |name: &str| self.directory.join(name).into_os_string();
        [
            ("TURNCTL_CONTROLLER", controllers.join(",").into()),
            ("TURNCTL_CA", file(pki::CA_CERTIFICATE)),
            ("TURNCTL_CERT", file(&format!("{stem}.pem"))),
            ("TURNCTL_KEY", file(&format!("{stem}.key"))),
            ("TURNCTL_CONFIG", file("turnctl.toml")),
        ]
    }

    /// Runs `turnctl` as an administrator on `host`.
    ///
    /// # Errors
    /// It cannot be started; how it ended is in the output.
    pub async fn turnctl(&self, host: &Host, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(binary("turnctl")?);
        command.envs(self.turnctl_variables());
        command.args(arguments);
        host.output(command).await
    }

    /// Runs `turnctl … -o json` and reads its answer.
    ///
    /// # Errors
    /// It fails, or the answer is not JSON.
    pub async fn turnctl_json(&self, host: &Host, arguments: &[&str]) -> Result<Value> {
        let output = self.turnctl(host, &[arguments, &["-o", "json"]].concat()).await?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "turnctl {}: {}: {error}", arguments.join(" "), output.status);
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// All allocations, as `turnctl allocations list` shows them.
    ///
    /// # Errors
    /// turnctl fails.
    pub async fn allocations(&self, host: &Host) -> Result<Vec<Value>> {
        let answer = self.turnctl_json(host, &["allocations", "list"]).await?;
        let list =
            answer.as_array().or(answer["allocations"].as_array()).with_context(|| format!("no list in {answer}"))?;
        Ok(list.clone())
    }

    /// Relayed addresses of all allocations, as turnctl shows them.
    ///
    /// # Errors
    /// turnctl fails.
    pub async fn relayed_addresses(&self, host: &Host) -> Result<BTreeSet<String>> {
        let list = self.allocations(host).await?;
        let relayed = list.iter().flat_map(|a| a["relayed"].as_array().into_iter().flatten());
        Ok(relayed.filter_map(|r| r.as_str().map(str::to_owned)).collect())
    }

    /// `iceServers` of `/v1/ice-servers` with these transports, in the form `RTCPeerConnection` takes.
    ///
    /// # Errors
    /// The controller does not answer with any.
    pub async fn ice_servers(&self, controller: &Controller, query: &str) -> Result<Value> {
        let answer = controller.discovered(&format!("/v1/ice-servers?{query}")).await?;
        let servers = answer["iceServers"].clone();
        ensure!(servers.as_array().is_some_and(|list| !list.is_empty()), "no ICE servers in {answer}");
        Ok(servers)
    }
}

impl Controller {
    /// Starts it, again if it ran before, and waits until it is ready.
    ///
    /// # Errors
    /// It does not get ready.
    pub async fn start(&mut self) -> Result<()> {
        self.launch()?;
        ready(&self.place, HTTP, self.process.as_mut().context("started")?).await
    }

    /// Starts it and does not wait.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn launch(&mut self) -> Result<()> {
        self.process = Some(start(&self.place, "controller", &self.config, &self.around)?);
        Ok(())
    }

    /// SIGSTOP, or SIGCONT.
    ///
    /// # Errors
    /// It does not run.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        self.process.as_ref().context("the controller does not run")?.freeze(frozen)
    }

    /// SIGTERM, and waits for its orderly end.
    ///
    /// # Errors
    /// It does not run, or ends otherwise.
    pub async fn stop(&mut self) -> Result<()> {
        let mut process = self.process.take().context("the controller does not run")?;
        let ended = process.terminate(Duration::from_secs(10)).await?;
        ensure!(ended.success(), "the controller ended with {ended}");
        Ok(())
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().context("the controller does not run")?.kill()
    }

    /// TURN REST credentials made out to `user`.
    ///
    /// # Errors
    /// The controller does not answer.
    pub async fn login(&self, user: &str) -> Result<Login> {
        let answer = self.discovered(&format!("/v1/turn?service=turn&username={user}")).await?;
        let text = |key: &str| answer[key].as_str().map(str::to_owned).with_context(|| format!("no {key} in {answer}"));
        Ok(Login { username: text("username")?, password: text("password")? })
    }

    /// What discovery says, once a relay is in its picture: one that is ready may have joined a moment ago.
    async fn discovered(&self, path: &str) -> Result<Value> {
        let (answer, _) = eventually("a relay is discovered", READY, async || self.http_json(path).await).await?;
        Ok(answer)
    }

    /// Reads JSON from its HTTP address.
    ///
    /// # Errors
    /// No answer, or not a success.
    pub async fn http_json<T: DeserializeOwned + Send + 'static>(&self, path: &str) -> Result<T> {
        let text = http_get(&self.place, HTTP, path).await?;
        serde_json::from_str(&text).with_context(|| format!("{path} answered {text}"))
    }
}

impl Relay {
    /// Starts it, again if it ran before, and waits until it is ready.
    ///
    /// # Errors
    /// It does not get ready.
    pub async fn start(&mut self) -> Result<()> {
        self.launch()?;
        ready(&self.place, RELAY_HTTP, self.process.as_mut().context("started")?).await
    }

    /// Starts it and does not wait.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn launch(&mut self) -> Result<()> {
        self.process = Some(start(&self.place, "relay-node", &self.config, &self.around)?);
        Ok(())
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().with_context(|| format!("{} does not run", self.id))?.kill()
    }

    /// SIGTERM; answers how it ended.
    ///
    /// # Errors
    /// It did not end.
    pub async fn stop(&mut self) -> Result<ExitStatus> {
        self.terminate().await?;
        self.process.take().with_context(|| format!("{} does not run", self.id))?.wait(Duration::from_secs(10)).await
    }

    /// SIGTERM, as soon as it is the relay that hears it and no longer what loads it; does not wait, see [`Relay::ended`].
    ///
    /// # Errors
    /// It does not run, or never listens.
    pub async fn terminate(&self) -> Result<()> {
        let process = self.process.as_ref().with_context(|| format!("{} does not run", self.id))?;
        eventually("the relay catches SIGTERM", READY, async || process.must_catch(Signal::SIGTERM)).await?;
        process.signal(Signal::SIGTERM)
    }

    /// Waits until it has ended in order, after [`Relay::terminate`].
    ///
    /// # Errors
    /// It did not within ten seconds, or not in order.
    pub async fn ended(&mut self) -> Result<()> {
        let mut process = self.process.take().with_context(|| format!("{} does not run", self.id))?;
        let status = process.wait(Duration::from_secs(10)).await?;
        ensure!(status.success(), "{} ended with {status}", self.id);
        Ok(())
    }

    /// SIGSTOP, or SIGCONT: it hangs, with all its connections open, or goes on.
    ///
    /// # Errors
    /// It does not run.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        self.process.as_ref().with_context(|| format!("{} does not run", self.id))?.freeze(frozen)
    }

    /// Fails if it has ended by itself.
    ///
    /// # Errors
    /// It has; the message carries the last lines of its log.
    pub fn must_run(&mut self) -> Result<()> {
        self.process.as_mut().with_context(|| format!("{} does not run", self.id))?.must_run()
    }

    /// Its process id.
    ///
    /// # Errors
    /// It does not run.
    pub fn pid(&self) -> Result<u32> {
        Ok(self.process.as_ref().with_context(|| format!("{} does not run", self.id))?.id())
    }

    /// What it has logged so far.
    ///
    /// # Errors
    /// It does not run.
    pub fn log(&self) -> Result<String> {
        Ok(self.process.as_ref().with_context(|| format!("{} does not run", self.id))?.output())
    }

    /// Where clients reach it.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.served.at(TURN)
    }

    /// Sum of a metric's samples whose labels contain `labels`; 0 if there are none.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn metric(&self, name: &str, labels: &str) -> Result<f64> {
        let text = http_get(&self.place, RELAY_HTTP, "/metrics").await?;
        Ok(sum_of(&text, name, labels))
    }

    /// All metrics, as Prometheus reads them.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn metrics(&self) -> Result<String> {
        http_get(&self.place, RELAY_HTTP, "/metrics").await
    }
}

fn sum_of(text: &str, name: &str, labels: &str) -> f64 {
    text.lines()
        .filter_map(|line| line.strip_prefix(name))
        .filter(|rest| rest.starts_with(['{', ' ']) && rest.contains(labels))
        .filter_map(|rest| rest.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

fn start(place: &Place, program: &str, config: &Path, around: &Around) -> Result<Process> {
    let name = config.file_stem().context("configuration without a name")?.to_string_lossy().into_owned();
    let mut command = around.command(binary(program)?);
    command.arg("--config").arg(config);
    let directory = config.parent().context("configuration without a directory")?;
    Process::start(&place.host, directory, &name, command)
}

async fn ready(place: &Place, port: u16, process: &mut Process) -> Result<()> {
    eventually("/readyz answers 200", READY, async || {
        process.must_run()?;
        http_get(place, port, "/readyz").await
    })
    .await?;
    Ok(())
}

/// Body of a successful GET.
///
/// # Errors
/// No answer within two seconds, or not a success.
pub async fn http_get(place: &Place, port: u16, path: &str) -> Result<String> {
    let url = format!("http://{}{path}", place.at(port));
    place
        .host
        .run(async move {
            // A client of its own: its connections belong to the namespace they were opened in.
            let client = reqwest::Client::builder().timeout(Duration::from_secs(2)).build()?;
            let answer = client.get(&url).send().await?;
            let (status, body) = (answer.status(), answer.text().await?);
            if !status.is_success() {
                bail!("{url}: {status}: {body}");
            }
            Ok(body)
        })
        .await
        .map_err(|e| anyhow!("{e:#}"))
}
