//! A real etcd, and what stands in it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use etcd_client::{Client, GetOptions};

use crate::place::Place;
use crate::process::Process;
use crate::wait::eventually;

/// Root prefix of the cluster's keys (the controller's default).
pub const PREFIX: &str = "turnpike/";

/// Keys under which [`Etcd::fill`] puts what fills it.
pub(crate) const BALLAST: &str = "ballast/";

/// One etcd member; dies with this value.
pub struct Etcd {
    /// Where it runs.
    pub place: Place,
    name: String,
    directory: PathBuf,
    /// `--initial-cluster`.
    members: String,
    /// More arguments.
    more: Vec<String>,
    process: Option<Process>,
}

impl Etcd {
    /// Starts it on ports 2379 and 2380 of `place`.
    ///
    /// # Errors
    /// It is not installed or does not answer.
    pub async fn start(place: Place, directory: &Path) -> Result<Self> {
        let members = format!("test=http://{}", place.at(2380));
        let mut etcd = Self::member("test", place, directory, members, &[]);
        etcd.restart().await?;
        Ok(etcd)
    }

    /// A member of a cluster whose `--initial-cluster` is `members`; it does not run yet.
    pub(crate) fn member(name: &str, place: Place, directory: &Path, members: String, more: &[&str]) -> Self {
        let more = more.iter().map(|&argument| argument.to_owned()).collect();
        Self { place, name: name.to_owned(), directory: directory.to_owned(), members, more, process: None }
    }

    /// Starts it again on the same data, after [`Etcd::kill`], and waits until it answers.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn restart(&mut self) -> Result<()> {
        self.launch()?;
        eventually("etcd answers", Duration::from_secs(30), async || {
            self.process.as_mut().context("etcd does not run")?.must_run()?;
            self.get(PREFIX).await
        })
        .await?;
        Ok(())
    }

    /// Starts it and does not wait: a member of a cluster answers when a majority of it is there.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn launch(&mut self) -> Result<()> {
        let (client, peer) = (self.endpoint(), format!("http://{}", self.place.at(2380)));
        let mut command = Command::new("etcd");
        command.args(["--name", &self.name, "--log-level", "warn", "--logger", "zap"]);
        command.arg("--data-dir").arg(self.data());
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &self.members]).args(&self.more);
        let log = format!("etcd-{}", self.name);
        self.process = Some(Process::start(&self.place.host, &self.directory, &log, command)?);
        Ok(())
    }

    /// Whether it was started and not killed.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.process.is_some()
    }

    /// SIGSTOP, or SIGCONT.
    ///
    /// # Errors
    /// It does not run.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        self.process.as_ref().context("etcd does not run")?.freeze(frozen)
    }

    /// Its process id, if it runs.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::id)
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().context("etcd does not run")?.kill()
    }

    /// SIGKILL, and its data is gone.
    ///
    /// # Errors
    /// It does not run, or the data stays.
    pub fn lose(&mut self) -> Result<()> {
        self.kill()?;
        Ok(std::fs::remove_dir_all(self.data())?)
    }

    /// Saves a snapshot.
    ///
    /// # Errors
    /// etcdctl fails.
    pub async fn save(&self, to: &Path) -> Result<()> {
        self.etcdctl(&["snapshot", "save", &to.display().to_string()]).await.map(drop)
    }

    /// Makes data of a snapshot, as of a cluster of this member alone, where there is none; [`Etcd::restart`] serves it.
    ///
    /// # Errors
    /// etcdctl fails.
    pub async fn restore(&self, from: &Path) -> Result<()> {
        let (from, data) = (from.display().to_string(), self.data().display().to_string());
        let peer = format!("http://{}", self.place.at(2380));
        let arguments = ["snapshot", "restore", &from, "--data-dir", &data, "--name", &self.name];
        let member = ["--initial-cluster", &self.members, "--initial-advertise-peer-urls", &peer];
        self.etcdctl(&[&arguments[..], &member].concat()).await.map(drop)
    }

    fn data(&self) -> PathBuf {
        self.directory.join(format!("{}.etcd", self.name))
    }

    /// Its client URL.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.place.at(2379))
    }

    /// Client address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.place.at(2379)
    }

    /// Keys (with the root prefix) and values under `prefix`.
    ///
    /// # Errors
    /// It does not answer within a second.
    pub async fn get(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>> {
        let (endpoint, prefix) = (self.endpoint(), prefix.to_owned());
        let query = async move {
            let mut client = Client::connect([endpoint], None).await?;
            let answer = client.get(prefix, Some(GetOptions::new().with_prefix())).await?;
            let pairs =
                answer.kvs().iter().map(|kv| (String::from_utf8_lossy(kv.key()).into_owned(), kv.value().to_vec()));
            anyhow::Ok(pairs.collect())
        };
        self.place.host.run(async { tokio::time::timeout(Duration::from_secs(1), query).await? }).await
    }

    /// Ids of the allocations stored.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn allocations(&self) -> Result<Vec<String>> {
        let entries = self.get(&format!("{PREFIX}allocations/")).await?;
        Ok(entries.into_iter().filter_map(|(key, _)| key.rsplit('/').next().map(str::to_owned)).collect())
    }

    /// What `etcdctl get --prefix --keys-only` prints for `prefix`, a key a line.
    ///
    /// # Errors
    /// etcdctl fails.
    pub async fn etcdctl_keys(&self, prefix: &str) -> Result<Vec<String>> {
        let text = self.etcdctl(&["get", "--prefix", "--keys-only", prefix]).await?;
        Ok(text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect())
    }

    /// What `etcdctl` prints to these arguments, asked of this member.
    ///
    /// # Errors
    /// etcdctl fails, or takes longer than five seconds.
    pub async fn etcdctl(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new("etcdctl");
        command
            .env("ETCDCTL_API", "3")
            .args(["--command-timeout", "5s", "--endpoints", &self.endpoint()])
            .args(arguments);
        let output = self.place.host.output(command).await?;
        ensure!(output.status.success(), "etcdctl: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Writes keys of 1 MiB until etcd's quota (`--quota-backend-bytes`) is used up: it then refuses every write but
    /// deletes (alarm NOSPACE).
    ///
    /// # Errors
    /// It does not answer, or 256 MiB fit into it.
    pub async fn fill(&self) -> Result<()> {
        let endpoint = self.endpoint();
        let filling = async move {
            let mut client = Client::connect([endpoint], None).await?;
            for number in 0..256 {
                match client.put(format!("{BALLAST}{number}"), vec![b'x'; 1 << 20], None).await {
                    Ok(_) => {}
                    Err(error) if error.to_string().contains("database space exceeded") => return Ok(()),
                    Err(error) => return Err(error.into()),
                }
            }
            bail!("256 MiB fit into etcd: give it a smaller --quota-backend-bytes")
        };
        self.place.host.run(filling).await
    }
}
