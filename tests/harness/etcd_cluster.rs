//! A real etcd of several members, and what can go wrong with it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::etcd::{BALLAST, Etcd, PREFIX};
use crate::place::Place;
use crate::wait::eventually;

/// Longest that a majority may take to elect a leader and answer.
const ELECTION: Duration = Duration::from_secs(30);

/// A slow cluster runs for so long at a time: a transaction or two.
const RUNS: Duration = Duration::from_millis(60);

/// The members stand still most of the time, all at once, until this is dropped.
#[derive(Debug)]
pub struct Slow {
    members: Vec<Pid>,
    task: JoinHandle<()>,
}

impl Drop for Slow {
    fn drop(&mut self) {
        self.task.abort();
        signal(&self.members, Signal::SIGCONT);
    }
}

fn signal(members: &[Pid], signal: Signal) {
    for member in members {
        // One that is gone is slow enough.
        let _ = kill(*member, signal);
    }
}

/// The members; they die with this value.
pub struct EtcdCluster {
    /// One at each place, in the order of the places.
    pub members: Vec<Etcd>,
}

impl EtcdCluster {
    /// Starts a member at each place, `more` among its arguments, and waits until all answer.
    ///
    /// # Errors
    /// etcd is not installed, or does not answer.
    pub async fn start(places: &[Place], directory: &Path, more: &[&str]) -> Result<Self> {
        let names: Vec<String> = (1..=places.len()).map(|number| number.to_string()).collect();
        let urls = names.iter().zip(places).map(|(name, place)| format!("{name}=http://{}", place.at(2380)));
        let urls = urls.collect::<Vec<_>>().join(",");
        let member =
            |(name, place): (&String, &Place)| Etcd::member(name, place.clone(), directory, urls.clone(), more);
        let mut cluster = Self { members: names.iter().zip(places).map(member).collect() };
        for member in &mut cluster.members {
            member.launch()?;
        }
        cluster.answers().await?;
        Ok(cluster)
    }

    /// Waits until every member that runs answers.
    ///
    /// # Errors
    /// One does not.
    pub async fn answers(&self) -> Result<()> {
        for member in self.members.iter().filter(|member| member.runs()) {
            eventually("a member of etcd answers", ELECTION, async || member.get(PREFIX).await).await?;
        }
        Ok(())
    }

    /// Makes it slow: between two moments in which it runs it stands still for `stops`.
    #[must_use]
    pub fn slow(&self, stops: Duration) -> Slow {
        let pids = self.members.iter().filter_map(Etcd::pid).filter_map(|pid| i32::try_from(pid).ok());
        let members: Vec<Pid> = pids.map(Pid::from_raw).collect();
        let stopped = members.clone();
        let task = tokio::spawn(async move {
            loop {
                signal(&stopped, Signal::SIGSTOP);
                sleep(stops).await;
                signal(&stopped, Signal::SIGCONT);
                sleep(RUNS).await;
            }
        });
        Slow { members, task }
    }

    /// Client URLs of all members.
    #[must_use]
    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(Etcd::endpoint).collect()
    }

    /// Which member leads.
    ///
    /// # Errors
    /// No member that runs says that it does.
    pub async fn leader(&self) -> Result<usize> {
        for (index, member) in self.members.iter().enumerate().filter(|(_, member)| member.runs()) {
            let Ok(status) = member.etcdctl(&["endpoint", "status", "-w", "json"]).await else { continue };
            let status: Value = serde_json::from_str(&status)?;
            let status = &status[0]["Status"];
            if status["leader"].as_u64().is_some_and(|leader| Some(leader) == status["header"]["member_id"].as_u64()) {
                return Ok(index);
            }
        }
        Err(anyhow!("no member says that it leads"))
    }

    /// What is stored under `prefix`, from the first member that answers: keys (with the root prefix) and values.
    ///
    /// # Errors
    /// None does.
    pub async fn get(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>> {
        let mut last = anyhow!("no member runs");
        for member in self.members.iter().filter(|member| member.runs()) {
            match member.get(prefix).await {
                Ok(found) => return Ok(found),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Forgets all history before `revision`.
    ///
    /// # Errors
    /// No member answers.
    pub async fn compact(&self, revision: i64) -> Result<()> {
        self.etcdctl(&["compact", &revision.to_string()]).await?;
        Ok(())
    }

    /// Undoes [`Etcd::fill`] of a member: removes, compacts, defragments, takes the alarm back.
    ///
    /// # Errors
    /// A member does not answer.
    pub async fn make_room(&self) -> Result<()> {
        self.etcdctl(&["del", "--prefix", BALLAST]).await?;
        let answer: Value = serde_json::from_str(&self.etcdctl(&["get", PREFIX, "-w", "json"]).await?)?;
        let revision = answer["header"]["revision"].as_i64().context("etcdctl tells no revision")?;
        self.etcdctl(&["compact", "--physical", &revision.to_string()]).await?;
        for member in self.members.iter().filter(|member| member.runs()) {
            member.etcdctl(&["defrag"]).await?;
        }
        self.etcdctl(&["alarm", "disarm"]).await?;
        Ok(())
    }

    /// What `etcdctl` prints, asked of the first member that answers.
    ///
    /// # Errors
    /// None does.
    pub async fn etcdctl(&self, arguments: &[&str]) -> Result<String> {
        let mut last = anyhow!("no member runs");
        for member in self.members.iter().filter(|member| member.runs()) {
            match member.etcdctl(arguments).await {
                Ok(text) => return Ok(text),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}
