//! Where servers and load stand: on loopback, or in network namespaces of their own.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, anyhow};
use harness::Host;
use harness::lab::DataCenter;
use harness::place::Place;

use crate::floor::Tamper;
use crate::say;
use crate::scene::{Net, Scene};
use crate::servers::{self, Server};

/// Last octets of the clients' and of the peers' address on loopback.
const CLIENTS: u8 = 201;
const PEERS: u8 = 202;
/// How long segments wait for others to be put together with, nanoseconds, as long as a network card's interrupts are
/// kept back.
const COALESCE: &str = "50000";

/// Servers, and where their load comes from.
pub(crate) struct Site {
    net: Net,
    pub(crate) servers: Vec<Server>,
    pub(crate) clients: Place,
    pub(crate) peers: Place,
    _ethernet: Option<DataCenter>,
}

impl Site {
    /// Starts these servers; those that this machine does not have are left out.
    pub(crate) async fn open(
        net: Net,
        names: &[&'static str],
        directory: &Path,
        tamper: Option<Tamper>,
    ) -> Result<Self> {
        let ethernet = match net {
            Net::Loopback => None,
            Net::Veth => Some(DataCenter::start().await?),
        };
        let (clients, peers) = match &ethernet {
            None => (Place::on_loopback(CLIENTS), Place::on_loopback(PEERS)),
            Some(ethernet) => {
                let place = ethernet.server("load").await?;
                (place.clone(), place)
            }
        };
        let mut site = Self { net, servers: Vec::new(), clients, peers, _ethernet: None };
        for (name, number) in names.iter().zip(1..) {
            let place = match &ethernet {
                None => Place::on_loopback(number),
                Some(ethernet) => {
                    let place = ethernet.server(name).await?;
                    ethernet.cable(&place).await?.segment().await?;
                    coalesce(&place.host).await?;
                    place
                }
            };
            match servers::start(name, &place, directory, tamper).await.with_context(|| name.to_string())? {
                Some(server) => site.servers.push(server),
                None => say(&format!("{name}: not on this machine")),
            }
        }
        site._ethernet = ethernet;
        Ok(site)
    }

    /// Whether a scene plays here.
    pub(crate) fn has(&self, scene: &Scene) -> bool {
        scene.net == self.net
    }

    /// Runs what opens sockets of the load.
    pub(crate) fn run<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        match &self.clients.host {
            Host::Machine => work(),
            Host::Device(device) => device.spawn_thread(work)?.join().map_err(|_| anyhow!("the load has panicked"))?,
        }
    }
}

/// Generic receive offload, which veth has switched off, and time for it: packets that are sent one by one would be
/// handed on one by one.
async fn coalesce(host: &Host) -> Result<()> {
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec"]);
    command.arg(
        "name=$(ip -o link show type veth | head -n 1 | cut -d ' ' -f 2 | cut -d @ -f 1)
         ethtool -K \"$name\" gro on
         mount -t sysfs sysfs /sys
         echo \"$1\" >\"/sys/class/net/$name/gro_flush_timeout\"
         echo 2 >\"/sys/class/net/$name/napi_defer_hard_irqs\"",
    );
    command.args(["sh", COALESCE]);
    let output = host.output(command).await?;
    let error = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "receive offload: {}: {error}", output.status);
    Ok(())
}
