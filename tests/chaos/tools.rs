//! What the faults are made of does what it says: otherwise a green run would prove nothing.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use harness::clock::Clock;
use harness::etcd_cluster::EtcdCluster;
use harness::lab::DataCenter;
use harness::partition::{Cut, Way};
use harness::process::Around;
use harness::volume::Volume;
use harness::{Host, eventually, run};

/// A quota that is soon used up, and elections that are soon over.
const ETCD: [&str; 6] =
    ["--quota-backend-bytes", "16777216", "--heartbeat-interval", "50", "--election-timeout", "500"];

/// A partition stops etcd's members from electing a leader, whichever side has the rules, and heals; a killed leader is
/// replaced; a full etcd refuses writes and takes them again.
#[test]
fn partitions_and_members_of_etcd() -> Result<()> {
    run(async |test| {
        let lab = DataCenter::start().await?;
        let mut places = Vec::new();
        for name in ["etcd-1", "etcd-2", "etcd-3"] {
            places.push(lab.server(name).await?);
        }
        let mut etcd = EtcdCluster::start(&places, test.path(), &ETCD).await?;

        for way in [Way::Both, Way::Out] {
            let leader = etcd.leader().await?;
            let others: Vec<_> = places.iter().map(|p| p.address).filter(|a| *a != places[leader].address).collect();
            let cut = Cut::between(&places[leader], &others, way).await?;
            let (next, _) = eventually("another leads", Duration::from_secs(20), async || match etcd.leader().await {
                Ok(now) if now != leader => Ok(now),
                other => Err(anyhow!("{other:?}")),
            })
            .await?;
            ensure!(etcd.members[next].get("").await.is_ok(), "a majority does not answer");
            cut.heal().await?;
            etcd.answers().await?;
        }

        let leader = etcd.leader().await?;
        etcd.members[leader].kill()?;
        eventually("another leads", Duration::from_secs(20), async || etcd.leader().await).await?;
        etcd.members[leader].launch()?;
        etcd.answers().await?;

        etcd.members[0].fill().await?;
        ensure!(etcd.etcdctl(&["put", "a", "b"]).await.is_err(), "a full etcd takes a key");
        etcd.make_room().await?;
        etcd.etcdctl(&["put", "a", "b"]).await?;
        Ok(())
    })
}

/// A volume is full and has room again for those who see it, and nobody else sees it; a clock steps under a program
/// that runs.
#[test]
fn disks_and_clocks() -> Result<()> {
    run(async |test| {
        let at = test.file("small");
        let volume = Volume::mount(&Host::Machine, &at, 64)?;
        let write = async |name: &str| {
            let mut command = volume.around().command("sh");
            command.arg("-c").arg("echo hello > \"$1\"").arg("sh").arg(at.join(name));
            anyhow::Ok(Host::Machine.output(command).await?.status.success())
        };
        ensure!(write("file").await?, "an empty volume takes no file");
        ensure!(fs::read_to_string(volume.path().join("file"))? == "hello\n", "it is not there");
        ensure!(fs::read_dir(&at)?.next().is_none(), "it is seen from outside");
        volume.fill()?;
        ensure!(!write("another").await?, "a full volume takes a file");
        volume.free()?;
        ensure!(write("third").await?, "a volume with room again takes no file");
        volume.wipe()?;
        ensure!(fs::read_dir(volume.path())?.next().is_none(), "something is left");

        let clock = Clock::new(test.path(), "test")?;
        let mut command: Command = clock.around(Around::default()).command("sh");
        command.args(["-c", "while sleep 0.1; do date +%s > now.new && mv now.new now; done"]);
        command.current_dir(test.path());
        let _running = harness::Process::start(&Host::Machine, test.path(), "clock", command)?;
        for step in [0, 3600, -3600] {
            clock.step(step)?;
            eventually("the program sees it", Duration::from_secs(5), async || {
                let now: i64 = fs::read_to_string(test.file("now"))?.trim().parse()?;
                let right = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
                let off = now - i64::try_from(right)?;
                if (off - step).abs() <= 2 { Ok(()) } else { Err(anyhow!("{off} s off")) }
            })
            .await?;
        }
        Ok(())
    })
}
