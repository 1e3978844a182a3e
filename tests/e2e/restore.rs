//! Allocations outlive their relay (P2), and nobody is told otherwise meanwhile (P5): a relay is killed with -9 and started
//! again in the middle of calls, in every way that has been thought of.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use harness::capture::Capture;
use harness::cluster::{Cluster, Controller, RELAY_HTTP, Relay, RelayOptions, Store, http_get};
use harness::etcd::Etcd;
use harness::lab::NatLab;
use harness::peer::{Peer, Report, connect};
use harness::place::Place;
use harness::turn::{Login, TurnClient};
use harness::volume::Volume;
use harness::{Host, Scenario, eventually, number, run_within};
use serde_json::json;
use turn_core::Transport;
use turn_core::wire::Method;

/// Most time from the start of a relay until media flow again.
const GAP: Duration = Duration::from_secs(2);
/// Longest anything may take that has no promise of its own.
const PATIENCE: Duration = Duration::from_secs(20);
/// The store has what happened longer ago than this (P2: 250 ms).
const STORED: Duration = Duration::from_millis(500);

/// A call between two browsers, a client of our own beside it, and somebody who listens on the relay's wire.
struct Stage {
    lab: NatLab,
    etcd: Etcd,
    cluster: Cluster,
    controller: Controller,
    relay: Relay,
    alice: Peer,
    bob: Peer,
    own: TurnClient,
    capture: Capture,
    /// How often the relay was killed.
    kills: u8,
    /// What the browsers said when the call began.
    began: [Report; 2],
}

/// How a round differs from the plainest one: the relay is killed and started at once, with everything else in place.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Round {
    Plain,
    EtcdDown,
    ControllerDown,
    JournalDeleted,
}

impl Stage {
    async fn start(test: &Scenario) -> Result<Self> {
        let lab = NatLab::start().await?;
        let etcd = Etcd::start(lab.server("etcd").await?, test.path()).await?;
        let mut cluster = Cluster::new(test.path())?;
        let controller = cluster.controller(&lab.server("controller").await?, Store::Etcd(&etcd), "").await?;
        let options = RelayOptions { workers: 2, ..RelayOptions::in_region("eu") };
        let place = lab.server("eu-1").await?;
        let relay = cluster.relay("eu-1", &place, &options).await?;
        let capture = Capture::start(&place.host).await?;
        let mut alice = Peer::start(&lab.alice().host(), test.path(), "alice").await?;
        let mut bob = Peer::start(&lab.bob().host(), test.path(), "bob").await?;
        let servers = cluster.ice_servers(&controller, "region=eu&transport=udp").await?;
        connect((&mut alice, &servers), (&mut bob, &servers), PATIENCE).await?;
        let login = controller.login("own").await?;
        let from = lab.server("own").await?;
        let mut own = TurnClient::open(&from.host, from.address, relay.address(), Transport::Udp, &login).await?;
        own.allocate().await?;
        let began = [alice.report().await?, bob.report().await?];
        Ok(Self { lab, etcd, cluster, controller, relay, alice, bob, own, capture, kills: 0, began })
    }

    /// Kills the relay and starts it again; answers how long after the start media flow in both directions.
    async fn round(&mut self, round: Round) -> Result<Duration> {
        tokio::time::sleep(STORED).await;
        self.relay.kill()?;
        match round {
            Round::Plain => {}
            Round::EtcdDown => self.etcd.kill()?,
            Round::ControllerDown => self.controller.kill()?,
            Round::JournalDeleted => std::fs::remove_dir_all(self.cluster.state_of(&self.relay.id))?,
        }
        // Requests that fall into the gap: a Refresh of our own, and from the browser what a new candidate of its peer
        // makes it ask for. Both are sent again and again until somebody answers.
        let mut refresh = Box::pin(self.own.refresh(600));
        let asked = tokio::time::timeout(Duration::from_millis(100), &mut refresh).await;
        ensure!(asked.is_err(), "answered by a relay that is dead");
        self.kills += 1;
        self.alice.page().evaluate::<bool>(&format!("candidate({})", candidate(self.kills))).await?;
        // Nothing arrives any more: what arrives from here on came through the new process.
        let silent = [quiet(&self.alice).await?, quiet(&self.bob).await?];
        let start = Instant::now();
        self.relay.launch()?;
        let resumed =
            async { tokio::try_join!(resumed(&self.alice, &silent[0], start), resumed(&self.bob, &silent[1], start)) };
        let (gaps, refreshed) = tokio::join!(resumed, &mut refresh);
        refreshed.with_context(|| format!("{round:?}: the Refresh that fell into the gap"))?;
        drop(refresh);
        let (alice, bob) = gaps.with_context(|| format!("{round:?}"))?;
        match round {
            Round::Plain | Round::JournalDeleted => {}
            Round::EtcdDown => self.etcd.restart().await?,
            Round::ControllerDown => self.controller.start().await?,
        }
        eventually("the browser may send to the new candidate", PATIENCE, async || {
            match self.relay.metric("turn_requests_total", "method=\"create_permission\",code=\"0\"").await? {
                0.0 => Err(anyhow!("no CreatePermission was answered")),
                _ => Ok(()),
            }
        })
        .await?;
        self.goes_on(round).await?;
        Ok(alice.max(bob))
    }

    /// Both ends decode over the pair the call began with, no state has changed, and nobody was told anything wrong.
    async fn goes_on(&self, round: Round) -> Result<()> {
        for (peer, before) in [&self.alice, &self.bob].into_iter().zip(&self.began) {
            let after = peer.decodes(5, PATIENCE).await.with_context(|| format!("{round:?}"))?;
            ensure!(after.pair == before.pair, "{round:?}: another pair: {before:?}, {after:?}");
            ensure!(after.relayed == before.relayed, "{round:?}: another relayed address: {before:?}, {after:?}");
            ensure!(after.states.len() == before.states.len(), "{round:?}: the state changed: {:?}", after.states);
        }
        self.capture.ensure_no_wrong_answer().with_context(|| format!("{round:?}"))
    }

    /// Waits for a session with the controller, in which everything has been restated.
    async fn joined(&self) -> Result<()> {
        eventually("the relay has joined", PATIENCE, async || {
            let unstored = self.relay.metric("turn_record_batches_in_flight", "").await?;
            let resyncs = self.relay.metric("turn_resyncs_total", "").await?;
            if resyncs > 0.0 && unstored == 0.0 {
                Ok(())
            } else {
                Err(anyhow!("{resyncs} resyncs, {unstored} unstored"))
            }
        })
        .await?;
        Ok(())
    }

    /// Kills and starts the relay again and again in the one call; the longest gap of all rounds of a kind is a figure.
    async fn rounds(&mut self, test: &Scenario, what: &str, round: Round, count: usize) -> Result<()> {
        let mut longest = Duration::ZERO;
        for _ in 0..count {
            // A controller or store that was away is found again, and the store is whole.
            self.joined().await?;
            let gap = self.round(round).await?;
            longest = longest.max(gap);
            ensure!(gap <= GAP, "{what}: media flowed again only {gap:?} after the start");
        }
        test.figure(
            &format!("media after the start of the relay, {what}, {count} kills"),
            format!("at most {longest:?}"),
        );
        Ok(())
    }
}

/// A candidate of the peer that nobody answers at; another one for each kill.
fn candidate(kill: u8) -> serde_json::Value {
    let candidate = format!("candidate:1 1 udp 1 198.18.77.{kill} 40000 typ host");
    json!({"candidate": candidate, "sdpMid": "0", "sdpMLineIndex": 0})
}

/// Waits until no packet has come for a while.
async fn quiet(peer: &Peer) -> Result<Report> {
    let (report, _) = eventually("silence", Duration::from_secs(5), async || {
        let first = peer.report().await?;
        tokio::time::sleep(Duration::from_millis(150)).await;
        let second = peer.report().await?;
        if first.packets_received == second.packets_received { Ok(second) } else { Err(anyhow!("still receiving")) }
    })
    .await?;
    Ok(report)
}

/// Waits until packets come again; answers how long after `start`.
async fn resumed(peer: &Peer, silent: &Report, start: Instant) -> Result<Duration> {
    eventually("media flow again", PATIENCE, async || {
        let now = peer.report().await?.packets_received;
        if now > silent.packets_received { Ok(()) } else { Err(anyhow!("still {now} packets")) }
    })
    .await?;
    Ok(start.elapsed())
}

/// Allocations of clients that do nothing else. They end when their sockets do: the relay does not know that.
async fn crowd(place: &Place, relay: &Relay, login: &Login, count: usize) -> Result<Vec<TurnClient>> {
    let one = |_| async {
        let mut client = TurnClient::open(&place.host, place.address, relay.address(), Transport::Udp, login).await?;
        client.allocate().await?;
        anyhow::Ok(client)
    };
    stream::iter(0..count).map(one).buffer_unordered(64).try_collect().await
}

/// A call of two browsers goes on over the same candidate pair, without a change of state, less than two seconds after
/// each start of its relay: killed again and again; with etcd down, with the controller down; with thousands of other
/// allocations on the node; with the state directory deleted; each time with requests of clients falling into the gap.
#[test]
fn a_call_outlives_kills_of_its_relay() -> Result<()> {
    run_within(Duration::from_secs(600), async |test| {
        let mut stage = Stage::start(test).await?;
        stage.rounds(test, "journal", Round::Plain, number("TURNPIKE_KILLS", 3)?).await?;
        stage.rounds(test, "etcd down", Round::EtcdDown, 1).await?;
        stage.rounds(test, "controller down", Round::ControllerDown, 1).await?;
        stage.rounds(test, "journal deleted", Round::JournalDeleted, 1).await?;

        let others = number("TURNPIKE_OTHERS", 5000)?;
        let login = stage.controller.login("crowd").await?;
        let place = stage.lab.server("crowd").await?;
        let crowd = crowd(&place, &stage.relay, &login, others).await?;
        stage.rounds(test, &format!("{others} others"), Round::Plain, 1).await?;
        stage.rounds(test, &format!("{others} others, journal deleted"), Round::JournalDeleted, 1).await?;
        // Some of the crowd, from the first to the last, are still known.
        for mut client in crowd.into_iter().step_by(others / 20 + 1) {
            client.refresh(600).await?;
        }

        // The capture can see what it did not see: an allocation that is really gone.
        stage.own.refresh(0).await?;
        ensure!(stage.own.refresh(600).await.is_err(), "it has ended");
        let (told, _) = eventually("the capture sees it", PATIENCE, async || {
            let told = stage.capture.wrong();
            if told.is_empty() { Err("nothing") } else { Ok(told) }
        })
        .await?;
        ensure!(told.iter().all(|refusal| (refusal.method, refusal.code) == (Method::Refresh, 437)), "{told:?}");
        Ok(())
    })
}

/// Both browsers refresh their allocations while the relay is dead, and are answered by its successor: their call goes on.
/// Browsers ask for ten minutes and refresh one before the end; no server may shorten that (RFC 8656 §7.2).
#[test]
#[ignore = "takes ten minutes: .ci/long"]
fn a_refresh_of_a_browser_falls_into_the_gap() -> Result<()> {
    const REFRESHED: Duration = Duration::from_secs(540);
    const BEFORE: Duration = Duration::from_millis(1500);
    const AFTER: Duration = Duration::from_millis(500);
    run_within(Duration::from_secs(700), async |test| {
        let mut stage = Stage::start(test).await?;
        // Both began within a second or so; the first request that is seen says when the other comes.
        let connected = Instant::now();
        tokio::time::sleep_until((connected + REFRESHED).checked_sub(BEFORE * 3).context("clock")?.into()).await;
        stage.relay.kill()?;
        let killed = Instant::now();
        let askers = async || {
            let mut askers: Vec<_> = stage.capture.refreshes_since(killed).into_iter().map(|(_, from)| from).collect();
            askers.sort_unstable();
            askers.dedup();
            if askers.is_empty() { Err(anyhow!("nobody has asked")) } else { Ok(askers) }
        };
        let (askers, _) = eventually("a browser refreshes", Duration::from_secs(5), askers).await?;
        tokio::time::sleep(AFTER).await;
        let start = Instant::now();
        stage.relay.launch()?;
        let answered = async || match stage.relay.metric("turn_requests_total", "method=\"refresh\",code=\"0\"").await?
        {
            count if count as usize >= askers.len() => Ok(()),
            count => Err(anyhow!("{count} Refreshes were answered")),
        };
        eventually("it is answered", PATIENCE, answered).await?;
        stage.goes_on(Round::Plain).await?;
        test.figure(
            "browsers whose Refresh fell into the gap",
            format!("{} of 2, relay dead for {:?}", askers.len(), start.duration_since(killed)),
        );
        Ok(())
    })
}

/// A relay with its state directory on a disk that is full: answers go on, the alert is raised, the store alone restores
/// everything after kill -9; with room again the journal alone does.
#[test]
fn a_full_disk_costs_no_allocation() -> Result<()> {
    run_within(Duration::from_secs(120), async |test| {
        let etcd = Etcd::start(Place::on_loopback(1), test.path()).await?;
        let mut cluster = Cluster::new(test.path())?;
        let mut controller = cluster.controller(&Place::on_loopback(2), Store::Etcd(&etcd), "").await?;
        let place = Place::on_loopback(11);
        let disk = Volume::mount(&place.host, &cluster.state_of("eu-1"), 512)?;
        let options = RelayOptions { around: disk.around(), ..RelayOptions::in_region("eu") };
        let mut relay = cluster.relay("eu-1", &place, &options).await?;
        let capture = Capture::start(&Host::Machine).await?;
        let login = controller.login("disk").await?;
        let from = Place::on_loopback(100);
        let mut clients = crowd(&from, &relay, &login, 1).await?;

        disk.fill()?;
        clients.extend(crowd(&from, &relay, &login, 60).await?);
        let failed = async || relay.metric("turn_journal_failed", "").await;
        eventually("the alert is raised", PATIENCE, async || match failed().await {
            Ok(0.0) => Err(anyhow!("0")),
            other => other,
        })
        .await?;
        let ready = http_get(&place, RELAY_HTTP, "/readyz").await?;
        ensure!(ready.contains("the journal cannot be written"), "/readyz: {ready}");
        let said = relay.log()?.matches("the journal cannot be written").count();
        ensure!(said == 1, "said {said} times");
        tokio::time::sleep(STORED).await;
        for round in ["full", "full again"] {
            relay.kill()?;
            let start = Instant::now();
            relay.start().await?;
            test.figure(&format!("relay on a full disk started, {round}"), format!("{:?}", start.elapsed()));
            for client in &mut clients {
                client.refresh(600).await?;
            }
        }

        disk.free()?;
        eventually("the journal is whole again", PATIENCE, async || {
            match relay.metric("turn_journal_failed", "").await {
                Ok(0.0) => Ok(()),
                other => Err(anyhow!("{other:?}")),
            }
        })
        .await?;
        controller.kill()?;
        relay.kill()?;
        relay.start().await?;
        for client in &mut clients {
            client.refresh(600).await?;
        }
        let ip = place.address;
        let wrong = capture.wrong().into_iter().filter(|refusal| refusal.from.ip() == ip).collect::<Vec<_>>();
        ensure!(wrong.is_empty(), "{wrong:?}");
        Ok(())
    })
}
