//! A rolling restart under calls (P4): every relay is drained, ended, started again and taken back, one after the other.
//! UDP calls stay where they are and live; TCP, TLS and DTLS clients are told by push and move in time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use harness::call_page::{self, CallPage, call};
use harness::caller::{Caller, Calling, Journey, echo};
use harness::certificate::Authority;
use harness::chromium::Browser;
use harness::cluster::{Cluster, Controller, HTTP, Relay, RelayOptions, Store};
use harness::etcd::Etcd;
use harness::follow::Follower;
use harness::peer::{Peer, connect};
use harness::place::Place;
use harness::{Host, Scenario, eventually, run_within};
use turn_core::Transport;

/// Port of TLS and DTLS.
const SECURE: u16 = 5349;
/// How long a relay that was told to end waits for those who can leave, seconds.
const DRAIN: u64 = 6;
/// Longest a page may take to connect or to show pictures.
const CONNECT: Duration = Duration::from_secs(20);
/// P2: media flow again within this time of a relay's start. Its end and its start are part of the gap: both are asserted.
const GAP: Duration = Duration::from_secs(2);

/// Calls in all; `.ci/long` makes it the 50 of the promise.
fn calls() -> Result<usize> {
    harness::number("TURNPIKE_ROLLING_CALLS", 16)
}

/// How long an operator gives a relay to get empty, seconds: pages leave at a random moment of its first half.
fn window(calls: usize) -> u64 {
    if calls >= 50 { 30 } else { 12 }
}

struct Fleet {
    cluster: Cluster,
    controller: Controller,
    relays: Vec<Relay>,
    follower: Follower,
    calling: Calling,
    _etcd: Etcd,
}

async fn fleet(test: &Scenario) -> Result<Fleet> {
    let etcd = Etcd::start(Place::on_loopback(1), test.path()).await?;
    let authority = Arc::new(Authority::new(test.path())?);
    let mut cluster = Cluster::new(test.path())?;
    let place = Place::on_loopback(2);
    let controller = cluster.controller(&place, Store::Etcd(&etcd), "").await?;
    let mut relays = Vec::new();
    for number in 1..=3 {
        let (id, place) = (format!("eu-{number}"), Place::on_loopback(10 + number));
        let certificate = authority.issue(&id, &[], &[place.address])?;
        let options = RelayOptions {
            listen: vec![("tls", SECURE), ("dtls", SECURE)],
            more: format!("drain_deadline = {DRAIN}\ncertificates = [{}]", certificate.entry()),
            ..RelayOptions::in_region("eu")
        };
        relays.push(cluster.relay(&id, &place, &options).await?);
    }
    let follower = Follower::start(&Host::Machine, vec![place.at(HTTP)]);
    let told = follower.relays();
    eventually("all relays are told of", Duration::from_secs(10), async || {
        let ready = told.borrow().values().filter(|relay| relay.is_ready()).count();
        if ready == 3 { Ok(()) } else { Err(anyhow!("{ready}")) }
    })
    .await?;
    let calling = Calling {
        place: Place::on_loopback(100),
        login: controller.login("rolling").await?,
        relays: told,
        authority,
        peer: echo(&Place::on_loopback(101)).await?,
    };
    Ok(Fleet { cluster, controller, relays, follower, calling, _etcd: etcd })
}

/// Half of them over UDP, the rest over what dies with its relay, at all relays.
async fn begin(fleet: &Fleet, count: usize) -> Result<Vec<Caller>> {
    let transports = [Transport::Udp, Transport::Tcp, Transport::Udp, Transport::Tls, Transport::Udp, Transport::Dtls];
    let mut callers = Vec::new();
    for number in 0..count {
        let at = &fleet.relays[number / 2 % fleet.relays.len()].id;
        callers.push(Caller::start(&fleet.calling, transports[number % transports.len()], at).await?);
    }
    Ok(callers)
}

/// Waits until nobody is at the relay whose connection would end with it, by what the clients say.
async fn left(callers: &[Caller], pages: &[CallPage], relay: &Relay, window: Duration) -> Result<Duration> {
    let what = format!("TCP, TLS and DTLS clients leave {}", relay.id);
    let (_, took) = eventually(&what, window, async || {
        let still = callers.iter().map(Caller::journey).find(|j| j.transport != Transport::Udp && j.at == relay.id);
        ensure!(still.is_none(), "{still:?}");
        for page in pages {
            // The browser gives its former allocation back in its own time.
            let used: Vec<String> = page.page.evaluate("turnpike.relays").await?;
            ensure!(!used.contains(&relay.id), "{used:?}, {:?}", page.notices().await?);
        }
        Ok(())
    })
    .await?;
    Ok(took)
}

/// Waits until every call has had an answer after now.
async fn all_talk(callers: &[Caller]) -> Result<Duration> {
    let since = Instant::now();
    let (_, took) = eventually("all calls talk", Duration::from_secs(20), async || {
        for caller in callers {
            let journey = caller.journey();
            ensure!(journey.lost.is_none() && journey.last > since, "{journey:?}");
        }
        anyhow::Ok(())
    })
    .await?;
    Ok(took)
}

#[test]
fn a_rolling_restart_loses_no_call() -> Result<()> {
    run_within(Duration::from_secs(300), async |test| {
        let count = calls()?;
        let mut fleet = fleet(test).await?;
        let callers = begin(&fleet, count).await?;
        let window = window(count);
        let stays = browsers_meet(test, &fleet).await?;
        let moves = pages_meet(test, &fleet).await?;
        all_talk(&callers).await?;

        let mut windows = Vec::new();
        for number in 0..fleet.relays.len() {
            let id = fleet.relays[number].id.clone();
            // An operator drains before the end; the last relay is only told to end, which is a drain of its own.
            let operator = number + 1 < fleet.relays.len();
            if operator {
                told(&fleet.cluster, &["drain", &id, "--deadline", &format!("{window}s")]).await?;
                windows.push(left(&callers, &moves.2, &fleet.relays[number], Duration::from_secs(window)).await?);
            }
            let stopping = Instant::now();
            let ended = fleet.relays[number].stop().await?;
            ensure!(ended.success(), "{id} ended with {ended}");
            if !operator {
                let still = callers.iter().map(Caller::journey).find(|j| j.transport != Transport::Udp && j.at == id);
                ensure!(still.is_none(), "SIGTERM did not wait for {still:?}");
                windows.push(stopping.elapsed());
            }
            // Not ready while the operator's word holds, yet its calls go on.
            fleet.relays[number].launch()?;
            let talk = all_talk(&callers).await?;
            test.figure(&format!("{id} restarted under {count} calls, all talk after"), format!("{talk:?}"));
            ensure!(talk < GAP, "media flowed only {talk:?} after the start of {id}");
            if operator {
                told(&fleet.cluster, &["uncordon", &id]).await?;
            }
            handed_out(&fleet, &id).await?;
            for page in &moves.2 {
                page.gets_pictures(CONNECT).await?;
            }
        }
        test.figure("TCP, TLS and DTLS clients had moved after", format!("{windows:?}"));

        browsers_talk(test, stays).await?;
        pages_talk(test, &moves.2).await?;
        let mut journeys = Vec::new();
        for caller in callers {
            journeys.push(caller.stop().await?);
        }
        conclude(test, &journeys)
    })
}

fn conclude(test: &Scenario, journeys: &[Journey]) -> Result<()> {
    for journey in journeys {
        ensure!(journey.lost.is_none(), "a call was lost: {journey:?}");
        ensure!(journey.refusals.is_empty(), "a client was refused: {journey:?}");
        // A relay that is away for its restart; who moves in time loses nothing.
        let most = if journey.transport == Transport::Udp { GAP * 2 } else { GAP };
        ensure!(journey.longest_gap < most, "a long silence: {journey:?}");
    }
    for transport in [Transport::Udp, Transport::Tcp, Transport::Tls, Transport::Dtls] {
        let those: Vec<&Journey> = journeys.iter().filter(|journey| journey.transport == transport).collect();
        let sum = |what: fn(&Journey) -> usize| those.iter().map(|journey| what(journey)).sum::<usize>();
        let (sent, answered) = (sum(|j| j.sent), sum(|j| j.answered));
        let moves: Vec<Duration> = those.iter().flat_map(|journey| journey.moves.iter().copied()).collect();
        let gap = those.iter().map(|journey| journey.longest_gap).max().unwrap_or_default();
        test.figure(
            &format!("rolling restart of 3 relays, {transport:?}"),
            format!(
                "{} calls, 0 lost; {sent} messages, {} not answered; longest gap {gap:?}; {} moves, the slowest took {:?}",
                those.len(),
                sent - answered,
                moves.len(),
                moves.iter().max()
            ),
        );
        ensure!(transport == Transport::Udp || moves.len() >= those.len(), "not everybody was moved: {those:?}");
    }
    Ok(())
}

async fn told(cluster: &Cluster, arguments: &[&str]) -> Result<()> {
    let output = cluster.turnctl(&Host::Machine, arguments).await?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "turnctl {}: {error}", arguments.join(" "));
    Ok(())
}

/// Waits until new clients are sent to it again.
async fn handed_out(fleet: &Fleet, id: &str) -> Result<()> {
    let told = fleet.follower.relays();
    eventually(&format!("{id} takes new clients"), Duration::from_secs(15), async || {
        let answer: serde_json::Value = fleet.controller.http_json("/v1/ice-servers?region=eu&limit=8").await?;
        ensure!(answer["nodes"].to_string().contains(id), "{answer}");
        match told.borrow().get(id) {
            Some(relay) if relay.is_ready() => Ok(()),
            other => bail!("{other:?}"),
        }
    })
    .await?;
    Ok(())
}

/// Two Chromium pages in a call over UDP, through whichever relays they were given.
async fn browsers_meet(test: &Scenario, fleet: &Fleet) -> Result<[Peer; 2]> {
    let servers = fleet.cluster.ice_servers(&fleet.controller, "region=eu&transport=udp").await?;
    let mut alice = Peer::start(&Host::Machine, test.path(), "alice").await?;
    let mut bob = Peer::start(&Host::Machine, test.path(), "bob").await?;
    connect((&mut alice, &servers), (&mut bob, &servers), Duration::from_secs(20)).await?;
    for peer in [&alice, &bob] {
        peer.decodes(10, Duration::from_secs(20)).await?;
        peer.watch_silence().await?;
    }
    Ok([alice, bob])
}

async fn browsers_talk(test: &Scenario, pair: [Peer; 2]) -> Result<()> {
    let mut silences = Vec::new();
    for peer in &pair {
        let report = peer.decodes(10, Duration::from_secs(20)).await.context("Chromium after the restarts")?;
        let states: Vec<&str> = report.states.iter().map(|state| state.state.as_str()).collect();
        ensure!(states == ["connecting", "connected"], "a state changed: {report:?}");
        silences.push(peer.longest_silence().await?);
    }
    test.figure("rolling restart of 3 relays, Chromium over UDP: longest silences", format!("{silences:?}"));
    Ok(())
}

/// A call over TCP on the call page, whose module follows the push.
async fn pages_meet(test: &Scenario, fleet: &Fleet) -> Result<(Browser, Browser, [CallPage; 2])> {
    let place = Place::on_loopback(3);
    let url = call_page::serve(&place, fleet.controller.place.at(HTTP)).await?;
    let alice = Browser::launch(&Host::Machine, test.path(), "page-1").await?;
    let bob = Browser::launch(&Host::Machine, test.path(), "page-2").await?;
    let ends = call([&alice, &bob], &url, "room=tcp&transport=tcp", CONNECT).await?;
    for end in &ends {
        end.forget_pauses().await?;
    }
    Ok((alice, bob, ends))
}

async fn pages_talk(test: &Scenario, ends: &[CallPage; 2]) -> Result<()> {
    for end in ends {
        let (restarts, course, pause) = (end.restarts().await?, end.course().await?, end.longest_pause().await?);
        test.figure(
            "rolling restart of 3 relays, Chromium over TCP",
            format!("{} ICE restarts, longest pause {pause:?}", restarts.len()),
        );
        ensure!(restarts.iter().all(|why| why == "draining"), "restarts: {restarts:?}");
        // The connection left behind may be told of as failed for a moment; the call goes on meanwhile.
        ensure!(!course.states.iter().any(|state| state == "interrupted"), "{:?}", course.states);
        eventually("the page says it is connected", CONNECT, async || {
            let states = end.course().await?.states;
            if states.last().is_some_and(|last| last == "connected") { Ok(()) } else { Err(anyhow!("{states:?}")) }
        })
        .await?;
        ensure!(pause < GAP, "no picture for {pause:?}");
    }
    Ok(())
}
