//! The cluster that is broken: etcd of three members, two controllers, three relays and a standby of one of them, each on
//! a machine of its own, all on one Ethernet.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::cable::Cable;
use harness::clock::Clock;
use harness::cluster::{Cluster, Controller, Relay, RelayOptions, Store};
use harness::etcd_cluster::EtcdCluster;
use harness::lab::DataCenter;
use harness::place::Place;
use harness::process::Around;
use harness::turn::Login;
use harness::volume::Volume;
use harness::{Scenario, eventually};

use crate::plan::{CONTROLLERS, HOME, MACHINES, MEMBERS, RELAYS, STANDBY, node};

/// Size of a relay's disk, KiB: room for its journal, and soon full.
const DISK: u32 = 8192;

/// Everything, and where those stand who use and watch it.
pub(crate) struct Site {
    pub(crate) cluster: Cluster,
    pub(crate) etcd: EtcdCluster,
    pub(crate) controllers: Vec<(Controller, Clock)>,
    /// Of the relay addresses, in their order, and last the standby's of [`HOME`].
    pub(crate) machines: Vec<Machine>,
    pub(crate) login: Login,
    /// Where clients are.
    pub(crate) clients: Place,
    /// Where their peers are.
    pub(crate) peers: Place,
    /// Who is never cut off.
    pub(crate) observer: Place,
    _lab: DataCenter,
}

/// A relay with its disk, its clock and its cable.
pub(crate) struct Machine {
    pub(crate) relay: Relay,
    pub(crate) disk: Volume,
    pub(crate) clock: Clock,
    pub(crate) cable: Cable,
}

/// Which of these places have an address just now, by their numbers in the list.
pub(crate) async fn holders(places: &[(usize, Place)], address: IpAddr) -> BTreeSet<usize> {
    let mut holders = BTreeSet::new();
    for (machine, place) in places {
        if place.has(address).await.unwrap_or(false) {
            holders.insert(*machine);
        }
    }
    holders
}

impl Site {
    pub(crate) async fn start(test: &Scenario) -> Result<Self> {
        let lab = DataCenter::start().await?;
        let mut members = Vec::new();
        for number in 0..MEMBERS {
            members.push(lab.server(&format!("etcd-{number}")).await?);
        }
        let etcd = EtcdCluster::start(&members, test.path(), &[]).await?;
        let mut cluster = Cluster::new(test.path())?;
        let mut controllers = Vec::new();
        for number in 0..CONTROLLERS {
            let place = lab.server(&format!("controller-{number}")).await?;
            let clock = Clock::new(test.path(), &format!("controller-{number}"))?;
            let mut controller = cluster.controller(&place, Store::EtcdCluster(&etcd), "").await?;
            controller.around = clock.around(Around::default());
            controller.kill()?;
            controller.start().await?;
            controllers.push((controller, clock));
        }
        let mut machines = Vec::new();
        let moving = lab.free_address()?;
        for number in 0..MACHINES {
            let name = node(number);
            let place = lab.server(&name).await?;
            let disk = Volume::mount(&place.host, &cluster.state_of(&name), DISK)?;
            let clock = Clock::new(test.path(), &name)?;
            // Told to end, it waits no longer for TCP clients than its place in the plan is long.
            let mut more = "drain_deadline = 2\n".to_owned();
            if [HOME, STANDBY].contains(&number) {
                more += "[address]\nmanage = true\ninterface = \"eth0\"\n";
            }
            if number == STANDBY {
                more += "standby = true\n";
            }
            let options = RelayOptions {
                around: clock.around(disk.around()),
                address: [HOME, STANDBY].contains(&number).then_some(moving),
                more,
                ..RelayOptions::in_region("eu")
            };
            let relay = if number == STANDBY {
                cluster.launch_relay(&name, &place, &options)?
            } else {
                cluster.relay(&name, &place, &options).await?
            };
            machines.push(Machine { relay, disk, clock, cable: lab.cable(&place).await? });
        }
        waits(&cluster, &controllers[0].0).await?;
        let login = controllers[0].0.login("chaos").await?;
        let (clients, peers) = (lab.server("clients").await?, lab.server("peers").await?);
        let observer = lab.server("observer").await?;
        Ok(Self { cluster, etcd, controllers, machines, login, clients, peers, observer, _lab: lab })
    }

    /// The relay addresses.
    pub(crate) fn addresses(&self) -> Vec<std::net::SocketAddr> {
        self.machines.iter().take(RELAYS).map(|machine| machine.relay.address()).collect()
    }

    /// Where those are of whom one has [`HOME`].
    pub(crate) fn candidates(&self) -> Vec<(usize, Place)> {
        [HOME, STANDBY].map(|machine| (machine, self.machines[machine].relay.place.clone())).to_vec()
    }
}

async fn waits(cluster: &Cluster, controller: &Controller) -> Result<()> {
    eventually("the standby waits", Duration::from_secs(20), async || {
        let answer = cluster.turnctl_json(&controller.place.host, &["nodes"]).await?;
        let nodes = answer["nodes"].as_array().with_context(|| format!("no nodes in {answer}"))?;
        let waits = nodes.iter().any(|shown| shown["node_id"] == node(STANDBY).as_str() && shown["state"] == "standby");
        ensure!(waits, "{answer}");
        Ok(())
    })
    .await
    .map(drop)
}
