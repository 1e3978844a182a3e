//! Raises the relay addresses, renews them, watches them, defends them or yields, lowers them.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::time::{MissedTickBehavior, interval, sleep_until, timeout};

use super::frame::{Claim, Mac};
use super::guard::{Answer, Conflicts, Doubt, Schedule};
use super::hook;
use super::lifetime;
use super::netlink::{Link, Netlink};
use super::wire::Wire;
use crate::config::AddressSettings;
use crate::control::{Ended, Free, Neighbourhood, StandingWatch};
use crate::dataplane::{Dataplane, FenceReason, RelayIp};
use crate::metrics;
use crate::sys::process::boot_time;

/// How often an address is renewed and looked for.
const TICK: Duration = Duration::from_secs(1);
/// How long a controller has to say who owns the address.
const CONFIRM: Duration = Duration::from_secs(2);
/// Probes of RFC 5227 §2.1.1, and the time between them and after the last. The RFC takes 1-2 s; a call that stands
/// still for 6 s is over.
const PROBES: (u32, Duration) = (3, Duration::from_millis(200));

/// The relay addresses of this machine.
pub struct Keeper {
    settings: AddressSettings,
    /// As sockets are bound to them; the identity of the allocations first.
    addresses: Vec<IpAddr>,
    netlink: Netlink,
    wire: Option<Wire>,
    /// Hardware addresses of this machine.
    own: HashSet<Mac>,
    conflicts: Conflicts,
    schedule: Schedule,
    /// How long an address stays when it is not renewed.
    lifetime: Duration,
    /// The hook has been told that the address is here.
    hooked: bool,
    /// What failed last, to say it once.
    failure: Option<String>,
}

/// Whether nothing else may be answered from the addresses, in one look.
struct Look {
    link: Option<Link>,
    /// The identity of the allocations is this machine's.
    here: bool,
    /// All of them are.
    all: bool,
}

impl Keeper {
    /// Begins to look at the addresses; nothing is changed yet.
    ///
    /// # Errors
    /// The kernel does not talk, or CAP_NET_RAW is missing.
    pub fn open(settings: &AddressSettings, relay_ips: &[RelayIp]) -> anyhow::Result<Self> {
        let netlink = Netlink::open().context("cannot follow the addresses of this machine")?;
        let wire = match settings.interface.as_deref().filter(|_| settings.waits) {
            Some(name) => {
                let opened = crate::sys::link::index_of(name).and_then(Wire::open);
                Some(opened.with_context(|| format!("address.interface: cannot listen on {name}"))?)
            }
            None => None,
        };
        Ok(Self {
            settings: settings.clone(),
            addresses: relay_ips.iter().map(|ip| ip.bound).collect(),
            netlink,
            wire,
            own: HashSet::new(),
            conflicts: Conflicts::default(),
            schedule: Schedule::default(),
            lifetime: lifetime(Duration::ZERO),
            hooked: false,
            failure: None,
        })
    }

    /// Keeps the addresses for a relay that owns them, from the moment it serves: raises what is managed, lets nothing
    /// be answered while they are not here. Returns when another machine has them and no controller says otherwise.
    pub async fn keep(&mut self, dataplane: &Dataplane, mut standing: StandingWatch) -> Ended {
        let fence = dataplane.fence();
        let mut doubt = Doubt::new(boot_time(), self.settings.waits);
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut was_here = false;
        self.own = self.netlink.macs().await.unwrap_or_default();
        // Whoever was welcomed has been confirmed.
        if standing.now().welcomes > 0 {
            self.conflicts.confirmed(Instant::now());
        }
        self.lifetime = lifetime(standing.now().lease);
        self.forget_claims().await;
        self.raise().await;
        loop {
            let look = self.look().await;
            if self.settings.waits {
                doubt.tick(boot_time());
                if let Some(link) = look.link {
                    doubt.carrier(link.carrier, Instant::now());
                }
                if fence.is_up_for(FenceReason::Lapse) {
                    doubt.raise();
                }
                // Lost to somebody else's hand, or to a pause that was shorter than it seemed.
                if was_here && !look.here && !self.settings.managed.is_empty() {
                    doubt.raise();
                }
            }
            let serves = look.here && !doubt.is_raised();
            if serves {
                fence.lower(FenceReason::Address);
            } else {
                fence.raise(FenceReason::Address);
            }
            self.say(was_here, &look, doubt.is_raised());
            was_here = look.here;
            if doubt.is_raised() {
                self.lower().await;
                if !doubt.can_ask() {
                    // Nobody can be asked, and nobody is served: wait for the link.
                } else if let Err(ended) = self.ask(&mut standing).await {
                    return ended;
                } else {
                    doubt = Doubt::new(boot_time(), self.settings.waits);
                    fence.lower(FenceReason::Lapse);
                    self.raise().await;
                    continue;
                }
            }
            tokio::select! {
                _ = ticks.tick() => {
                    if !doubt.is_raised() && !lapsed(&mut doubt) {
                        self.raise().await;
                        self.probe(&standing).await;
                    }
                }
                () = self.netlink.changed() => {}
                () = standing.changed() => if !standing.now().leaving {
                    self.lifetime = lifetime(standing.now().lease);
                } else {
                    self.lower().await;
                    standing.left();
                    // What is left is the end of the control session.
                    std::future::pending::<()>().await;
                },
                () = until(self.schedule.next()) => self.announce(Instant::now(), false).await,
                claim = claim(self.wire.as_ref()) => {
                    if let Some(ended) = self.on_claim(claim, &mut standing).await {
                        fence.raise(FenceReason::Address);
                        self.lower().await;
                        return ended;
                    }
                }
            }
        }
    }

    /// Takes every managed address off this machine, and tells the hook.
    pub async fn lower(&mut self) {
        self.schedule.end();
        metrics::address_local(false);
        let Some(name) = self.settings.interface.clone() else { return };
        for (address, prefix) in self.settings.managed.clone() {
            let lowered = match self.netlink.link(&name).await {
                Ok(link) => self.netlink.lower(link.index, address, prefix).await,
                // Without the interface the address is gone too.
                Err(_) => Ok(()),
            };
            if let Err(error) = lowered {
                self.failed("lower", &format!("cannot take {address} off {name}: {error}"));
            }
        }
        if self.hooked {
            self.hook(false).await;
        }
    }

    /// Puts every managed address on its interface, or renews it.
    async fn raise(&mut self) {
        let Some(name) = self.settings.interface.clone() else { return };
        let mut raised = true;
        for (address, prefix) in self.settings.managed.clone() {
            let done = match self.netlink.link(&name).await {
                Ok(link) => self.netlink.raise(link.index, address, prefix, self.lifetime).await,
                Err(error) => Err(error),
            };
            if let Err(error) = done {
                raised = false;
                self.failed("raise", &format!("cannot put {address} on {name}: {error}"));
            }
        }
        if raised && self.settings.hook.is_some() && !self.hooked {
            raised = self.hook(true).await;
        }
        if raised {
            self.failure = None;
        }
        if raised && !self.schedule.has_begun() {
            tracing::info!(interface = name, "the relay address is on this machine");
            self.schedule.begin(Instant::now());
        }
    }

    async fn hook(&mut self, up: bool) -> bool {
        let (Some(hook), Some(name)) = (self.settings.hook.clone(), self.settings.interface.clone()) else {
            return true;
        };
        let mut done = true;
        for address in self.addresses.clone() {
            if let Err(error) = hook::run(&hook, up, address, &name).await {
                done = false;
                self.failed("hook", &format!("address.hook: {error}"));
            }
        }
        // A hook that failed to take the address away is not asked for ever: the next owner's takes it over.
        self.hooked = up && done;
        done
    }

    async fn look(&mut self) -> Look {
        let link = match &self.settings.interface {
            Some(name) => self.netlink.link(name).await.ok(),
            None => None,
        };
        let mut local = Vec::new();
        for address in self.addresses.clone() {
            match self.netlink.is_local(address).await {
                Ok(is_local) => local.push(is_local),
                Err(error) => {
                    self.failed("watch", &format!("the kernel does not say whether {address} is here: {error}"));
                    // It was found before this began, or the next look finds it.
                    local.push(true);
                }
            }
        }
        let here = local.first().copied().unwrap_or(true);
        Look { link, here, all: local.into_iter().all(|is_local| is_local) }
    }

    fn say(&self, was_here: bool, look: &Look, doubted: bool) {
        metrics::address_local(look.all && !doubted);
        let address = self.addresses.first();
        if was_here && !look.here {
            metrics::address_lost();
            tracing::error!(
                ?address,
                "the relay address is not on this machine any more: nothing is answered until it is"
            );
        } else if !was_here && look.here && !look.all {
            tracing::warn!(addresses = ?self.addresses, "not every relay address is on this machine");
        }
    }

    /// Whether this relay is the owner after all: a controller says so, or none answers and nobody else has the address.
    async fn ask(&mut self, standing: &mut StandingWatch) -> Result<(), Ended> {
        tracing::warn!("cut off or stopped for a while: asking who owns the relay address before anything is answered");
        if standing.confirm(CONFIRM).await {
            self.conflicts.confirmed(Instant::now());
            return Ok(());
        }
        match self.probe_all().await {
            Free::Taken(mac) => Err(self.yields(mac)),
            Free::Yes | Free::Unknown => Ok(()),
        }
    }

    /// What was claimed while this relay waited was the former owner's.
    async fn forget_claims(&self) {
        let Some(wire) = &self.wire else { return };
        while let Ok(Ok(_)) = timeout(Duration::ZERO, wire.claim()).await {}
    }

    async fn on_claim(&mut self, claim: std::io::Result<Claim>, standing: &mut StandingWatch) -> Option<Ended> {
        let claim = match claim {
            Ok(claim) => claim,
            Err(error) => {
                self.failed("watch", &format!("conflicts are not seen any more: {error}"));
                self.wire = None;
                return None;
            }
        };
        if !self.addresses.contains(&claim.address) || self.own.contains(&claim.mac) {
            return None;
        }
        let now = Instant::now();
        match self.conflicts.claimed(standing.now().connected, now) {
            Answer::Ignore => None,
            Answer::Defend { alert } => {
                self.defend(claim, alert).await;
                None
            }
            Answer::Ask => {
                // A machine may have come by another interface since.
                self.own = self.netlink.macs().await.unwrap_or_default();
                if self.own.contains(&claim.mac) {
                    return None;
                }
                if standing.confirm(CONFIRM).await {
                    self.conflicts.confirmed(Instant::now());
                    let alert = self.conflicts.alert(now);
                    self.defend(claim, alert).await;
                    return None;
                }
                // Of two that no controller vouches for, the standby goes first.
                if !self.settings.standby && !matches!(self.probe_all().await, Free::Taken(_)) {
                    return None;
                }
                Some(self.yields(claim.mac))
            }
        }
    }

    async fn defend(&mut self, claim: Claim, alert: bool) {
        metrics::address_conflict("defended");
        if alert {
            tracing::error!(
                address = %claim.address, mac = %claim.mac,
                "another machine claims the relay address, which this relay owns: announcing it again"
            );
        }
        self.announce(Instant::now(), true).await;
    }

    fn yields(&mut self, mac: Mac) -> Ended {
        metrics::address_conflict("yielded");
        Ended::Conflict { mac: mac.to_string() }
    }

    /// Tells the neighbours, if it is time or urgent.
    async fn announce(&mut self, now: Instant, urgent: bool) {
        if !self.schedule.announces(now) && !urgent {
            return;
        }
        let (Some(wire), Some(name)) = (&self.wire, &self.settings.interface) else { return };
        let Ok(link) = self.netlink.link(name).await else { return };
        let told = self.addresses.iter().try_for_each(|address| wire.announce(*address, link.mac));
        if let Err(error) = told {
            self.failed("announce", &format!("cannot announce the relay address: {error}"));
        }
    }

    /// Asks whether anybody else has an address; answers arrive as claims.
    async fn probe(&mut self, standing: &StandingWatch) {
        let now = Instant::now();
        let worried = !standing.now().connected || self.conflicts.goes_on(now);
        if !self.schedule.probes(worried, now) {
            return;
        }
        let (Some(wire), Some(name)) = (&self.wire, &self.settings.interface) else { return };
        if let Ok(link) = self.netlink.link(name).await {
            // What cannot be sent now is sent in a second.
            let _ = self.addresses.iter().try_for_each(|address| wire.probe(*address, link.mac));
        }
    }

    async fn probe_all(&mut self) -> Free {
        let Some(name) = self.settings.interface.clone() else { return Free::Yes };
        let Ok(link) = self.netlink.link(&name).await else { return Free::Unknown };
        if !link.carrier {
            return Free::Unknown;
        }
        self.own = self.netlink.macs().await.unwrap_or_default();
        let Some(wire) = &self.wire else { return Free::Yes };
        for _ in 0..PROBES.0 {
            for address in &self.addresses {
                if wire.probe(*address, link.mac).is_err() {
                    return Free::Unknown;
                }
            }
            let deadline = Instant::now() + PROBES.1;
            while let Ok(Ok(claim)) = timeout(deadline.saturating_duration_since(Instant::now()), wire.claim()).await {
                if self.addresses.contains(&claim.address) && !self.own.contains(&claim.mac) {
                    return Free::Taken(claim.mac);
                }
            }
        }
        Free::Yes
    }

    /// Says once what fails, and counts it each time.
    fn failed(&mut self, what: &'static str, problem: &str) {
        metrics::address_failure(what);
        if self.failure.as_deref() != Some(problem) {
            tracing::error!("{problem}; trying again each second");
            self.failure = Some(problem.to_owned());
        }
    }
}

impl Neighbourhood for Keeper {
    async fn holds(&mut self) -> bool {
        if self.settings.managed.is_empty() {
            return false;
        }
        self.look().await.all
    }

    async fn is_free(&mut self) -> Free {
        self.probe_all().await
    }

    async fn leave(&mut self) {
        self.lower().await;
    }
}

/// Whether the process stood still since the last tick: then nothing is renewed.
fn lapsed(doubt: &mut Doubt) -> bool {
    doubt.tick(boot_time());
    doubt.is_raised()
}

async fn claim(wire: Option<&Wire>) -> std::io::Result<Claim> {
    match wire {
        Some(wire) => wire.claim().await,
        None => std::future::pending().await,
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
