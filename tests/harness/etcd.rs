//! A real etcd, and what stands in it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use etcd_client::{Client, GetOptions};

use crate::place::Place;
use crate::process::Process;
use crate::wait::eventually;

/// Root prefix of the cluster's keys (the controller's default).
pub const PREFIX: &str = "turnpike/";

/// One etcd member; dies with this value.
pub struct Etcd {
    place: Place,
    directory: PathBuf,
    process: Option<Process>,
}

impl Etcd {
    /// Starts it on ports 2379 and 2380 of `place`.
    ///
    /// # Errors
    /// It is not installed or does not answer.
    pub async fn start(place: Place, directory: &Path) -> Result<Self> {
        let mut etcd = Self { place, directory: directory.to_owned(), process: None };
        etcd.restart().await?;
        Ok(etcd)
    }

    /// Starts it again on the same data, after [`Etcd::kill`].
    ///
    /// # Errors
    /// It does not answer.
    pub async fn restart(&mut self) -> Result<()> {
        let (client, peer) = (self.endpoint(), format!("http://{}", self.place.at(2380)));
        let mut command = Command::new("etcd");
        command.args(["--name", "test", "--log-level", "warn", "--logger", "zap"]);
        command.arg("--data-dir").arg(self.directory.join("etcd"));
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &format!("test={peer}")]);
        let mut process = Process::start(&self.place.host, &self.directory, "etcd", command)?;
        eventually("etcd answers", Duration::from_secs(30), async || {
            process.must_run()?;
            self.get(PREFIX).await
        })
        .await?;
        self.process = Some(process);
        Ok(())
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().context("etcd does not run")?.kill()
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
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args([
            "--endpoints",
            &self.endpoint(),
            "get",
            "--prefix",
            "--keys-only",
            prefix,
        ]);
        let output = self.place.host.output(command).await?;
        ensure!(output.status.success(), "etcdctl: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout)?;
        Ok(text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect())
    }
}
