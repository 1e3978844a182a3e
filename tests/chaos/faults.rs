//! Breaks what the plan says and mends it again.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::etcd_cluster::Slow;
use harness::partition::{Cut, Way};
use tokio::time::{Instant, sleep_until};

use crate::evidence::{Timeline, Watch};
use crate::plan::{Fault, HOME, Step};
use crate::site::{Machine, Site, holders};

/// What happens at a time of the plan.
#[derive(Clone, Copy, Debug)]
enum Moment {
    Begin,
    /// Half of it is over.
    Middle,
    End,
}

/// Whoever breaks and mends.
pub(crate) struct Wrecker<'a> {
    site: &'a mut Site,
    watch: Watch,
    timeline: Timeline,
    cuts: HashMap<usize, Vec<Cut>>,
    slow: HashMap<usize, Slow>,
    /// Which member led when it was killed.
    led: HashMap<usize, usize>,
    /// Which machine was hit, where a relay was.
    hit: HashMap<usize, usize>,
    /// The machine that was seen last with the relay address that moves.
    home: usize,
    /// Up to which revision history is known to whoever records it.
    recorded: Box<dyn Fn() -> i64 + Send>,
}

impl<'a> Wrecker<'a> {
    pub(crate) fn new(site: &'a mut Site, watch: Watch, recorded: impl Fn() -> i64 + Send + 'static) -> Self {
        Self {
            site,
            watch,
            timeline: Timeline::default(),
            cuts: HashMap::new(),
            slow: HashMap::new(),
            led: HashMap::new(),
            hit: HashMap::new(),
            home: HOME,
            recorded: Box::new(recorded),
        }
    }

    /// Plays the plan from now on; answers what was really done when.
    pub(crate) async fn play(mut self, steps: &[Step]) -> Result<Timeline> {
        let start = Instant::now();
        let mut moments: Vec<(Duration, usize, Moment)> = Vec::new();
        for (number, step) in steps.iter().enumerate() {
            moments.push((step.at, number, Moment::Begin));
            moments.push((step.at + step.lasts / 2, number, Moment::Middle));
            moments.push((step.end(), number, Moment::End));
        }
        moments.sort_by_key(|(at, ..)| *at);
        for (at, number, moment) in moments {
            sleep_until(start + at).await;
            let fault = steps[number].fault;
            match moment {
                Moment::Begin => {
                    if let Some(relay) = fault.relay() {
                        let machine = self.whose(relay).await;
                        self.hit.insert(number, machine);
                    }
                    self.timeline.begin(number, fault, self.watch.now());
                    if let Some(machine) = self.hit.get(&number) {
                        self.timeline.hits(number, *machine);
                    }
                    self.begin(number, fault).await
                }
                Moment::Middle => self.middle(number, fault),
                Moment::End => {
                    let outcome = self.end(number, fault).await;
                    self.timeline.end(number, self.watch.now());
                    outcome
                }
            }
            .with_context(|| format!("{fault}: {moment:?}"))?;
        }
        Ok(self.timeline)
    }

    /// The machine that has a relay address. While it moves: the one that had it.
    async fn whose(&mut self, relay: usize) -> usize {
        if relay != HOME {
            return relay;
        }
        let address = self.site.machines[HOME].relay.address().ip();
        let mut found = holders(&self.site.candidates(), address).await;
        if let (1, Some(machine)) = (found.len(), found.pop_first()) {
            self.home = machine;
        }
        self.home
    }

    /// The machine that a fault has hit.
    fn machine(&mut self, number: usize) -> Result<&mut Machine> {
        let machine = *self.hit.get(&number).context("a machine was hit")?;
        self.site.machines.get_mut(machine).context("there is one")
    }

    async fn begin(&mut self, number: usize, fault: Fault) -> Result<()> {
        match fault {
            Fault::KillRelay(_) => self.machine(number)?.relay.kill()?,
            Fault::EndRelay(_) => self.machine(number)?.relay.terminate().await?,
            Fault::DrainRelay(_) => self.drain("drain", number).await?,
            Fault::FreezeRelay(_) => self.machine(number)?.relay.freeze(true)?,
            Fault::WipeRelay(_) => {
                let machine = self.machine(number)?;
                machine.relay.kill()?;
                machine.disk.wipe()?;
            }
            Fault::FullDisk(_) | Fault::FullDiskKill(_) => self.machine(number)?.disk.fill()?,
            Fault::CutRelay(_) => {
                let others: Vec<_> = self.site.controllers.iter().map(|(c, _)| c.place.address).collect();
                let cut = Cut::between(&self.machine(number)?.relay.place, &others, Way::Both).await?;
                self.cuts.insert(number, vec![cut]);
            }
            Fault::CutClients(_) => {
                let others = [self.site.clients.address, self.site.peers.address];
                let cut = Cut::between(&self.machine(number)?.relay.place, &others, Way::Both).await?;
                self.cuts.insert(number, vec![cut]);
            }
            Fault::MachineGone => self.machine(number)?.cable.cut(true).await?,
            Fault::RelayClock(_, by) => self.machine(number)?.clock.step(by)?,
            Fault::KillController(n) => self.site.controllers[n].0.kill()?,
            Fault::FreezeController(n) => self.site.controllers[n].0.freeze(true)?,
            Fault::CutController(n) => {
                let others: Vec<_> = self.site.etcd.members.iter().map(|m| m.place.address).collect();
                let cut = Cut::between(&self.site.controllers[n].0.place, &others, Way::Both).await?;
                self.cuts.insert(number, vec![cut]);
            }
            Fault::ControllerClock(n, by) => self.site.controllers[n].1.step(by)?,
            Fault::KillMember(n) => self.site.etcd.members[n].kill()?,
            Fault::KillLeader => {
                // Where nobody leads just now the first one is as good.
                let leader = self.site.etcd.leader().await.unwrap_or(0);
                self.led.insert(number, leader);
                self.site.etcd.members[leader].kill()?;
            }
            Fault::FreezeMember(n) => self.site.etcd.members[n].freeze(true)?,
            Fault::CutMember(n) => {
                let members = self.site.etcd.members.iter().enumerate();
                let others: Vec<_> = members.filter(|(m, _)| *m != n).map(|(_, m)| m.place.address).collect();
                let cut = Cut::between(&self.site.etcd.members[n].place, &others, Way::Both).await?;
                self.cuts.insert(number, vec![cut]);
            }
            Fault::SlowStore(stops) => {
                self.slow.insert(number, self.site.etcd.slow(Duration::from_millis(stops)));
            }
            Fault::StoreGone => {
                for member in &mut self.site.etcd.members {
                    member.kill()?;
                }
            }
            Fault::ControllersGone => {
                for (controller, _) in &mut self.site.controllers {
                    controller.kill()?;
                }
            }
            Fault::Compact => self.site.etcd.compact((self.recorded)()).await?,
        }
        Ok(())
    }

    fn middle(&mut self, number: usize, fault: Fault) -> Result<()> {
        if let Fault::FullDiskKill(_) = fault {
            let machine = self.machine(number)?;
            machine.relay.kill()?;
            machine.relay.launch()?;
            self.timeline.restarted(number, self.watch.now());
        }
        Ok(())
    }

    async fn end(&mut self, number: usize, fault: Fault) -> Result<()> {
        match fault {
            Fault::KillRelay(_) | Fault::WipeRelay(_) => self.machine(number)?.relay.launch()?,
            Fault::EndRelay(_) => {
                let machine = self.machine(number)?;
                machine.relay.ended().await?;
                machine.relay.launch()?;
            }
            Fault::DrainRelay(_) => self.drain("uncordon", number).await?,
            Fault::FreezeRelay(_) => self.machine(number)?.relay.freeze(false)?,
            Fault::FullDisk(_) | Fault::FullDiskKill(_) => self.machine(number)?.disk.free()?,
            Fault::MachineGone => self.machine(number)?.cable.cut(false).await?,
            Fault::RelayClock(..) => self.machine(number)?.clock.step(0)?,
            Fault::KillController(n) => self.site.controllers[n].0.launch()?,
            Fault::FreezeController(n) => self.site.controllers[n].0.freeze(false)?,
            Fault::ControllerClock(n, _) => self.site.controllers[n].1.step(0)?,
            Fault::KillMember(n) => self.site.etcd.members[n].launch()?,
            Fault::KillLeader => {
                let leader = self.led.remove(&number).context("a leader was killed")?;
                self.site.etcd.members[leader].launch()?;
            }
            Fault::FreezeMember(n) => self.site.etcd.members[n].freeze(false)?,
            Fault::SlowStore(_) => drop(self.slow.remove(&number)),
            Fault::StoreGone => {
                for member in &mut self.site.etcd.members {
                    member.launch()?;
                }
            }
            Fault::ControllersGone => {
                for (controller, _) in &mut self.site.controllers {
                    controller.launch()?;
                }
            }
            Fault::CutRelay(_) | Fault::CutClients(_) | Fault::CutController(_) | Fault::CutMember(_) => {
                for cut in self.cuts.remove(&number).unwrap_or_default() {
                    cut.heal().await?;
                }
            }
            Fault::Compact => {}
        }
        Ok(())
    }

    /// `turnctl drain` or `turnctl uncordon`.
    async fn drain(&mut self, verb: &str, number: usize) -> Result<()> {
        let id = self.machine(number)?.relay.id.clone();
        let output = self.site.cluster.turnctl(&self.site.observer.host, &[verb, &id]).await?;
        ensure!(output.status.success(), "turnctl: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}
