//! A real call in miniature: two allocations that exchange packets through their relays, each step timed.

mod peer;
mod report;
mod uri;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::net::lookup_host;
use turn_core::client::{Event, Failure};
use turn_core::wire::{ChannelNumber, ErrorCode};

use crate::failure::Exit;
use crate::units;
use peer::{Peer, Seen, Trouble};

pub(crate) use peer::Login;
pub(crate) use report::{Outcome, ProbeReport, Step};
pub(crate) use uri::{ServerUri, TurnUri};

/// A step that takes longer has failed: calls are set up in less.
const STEP_PATIENCE: Duration = Duration::from_secs(5);
/// A packet that is not back by then is lost.
const PACKET_PATIENCE: Duration = Duration::from_secs(1);
/// Bytes of a probe packet, about a packet of speech.
const PACKET_BYTES: usize = 160;

/// What one probe does.
#[derive(Clone)]
pub(crate) struct Plan {
    /// Server of the first client.
    pub(crate) a: TurnUri,
    /// Server of the second client; may be the same.
    pub(crate) b: TurnUri,
    pub(crate) login: Login,
    /// Packets sent there and back.
    pub(crate) count: u32,
}

/// Runs one probe to its end, good or bad. What it allocated is released, also when a step failed.
pub(crate) async fn run(plan: &Plan) -> ProbeReport {
    let mut report = ProbeReport::new(&plan.a, &plan.b);
    let (mut a, mut b) = (None, None);
    let carried = carry(plan, &mut report, &mut a, &mut b).await;
    if carried.is_some() {
        let released = async {
            for peer in [&mut a, &mut b].into_iter().flatten() {
                release(peer).await?;
            }
            Ok(())
        };
        report.time("release", released, |()| "both allocations ended".into()).await;
    } else {
        for peer in [&mut a, &mut b].into_iter().flatten() {
            // The report is about the step that failed before.
            let _ = release(peer).await;
        }
    }
    report
}

/// The steps up to the packets; `None` when one of them failed.
async fn carry(plan: &Plan, report: &mut ProbeReport, a: &mut Option<Peer>, b: &mut Option<Peer>) -> Option<()> {
    let at = |address: &SocketAddr| format!("server {address}");
    let server_a = report.time("resolve", resolve(&plan.a), at).await?;
    let server_b = if plan.b == plan.a { server_a } else { report.time("resolve b", resolve(&plan.b), at).await? };

    let connected = bounded(Peer::connect(server_a, plan.a.transport, &plan.login));
    let a = a.insert(report.time("connect", connected, |_| plan.a.to_string()).await?);
    let reflexive = async {
        a.client.binding(Instant::now());
        a.until(STEP_PATIENCE, |event| if let Event::Reflexive(mapped) = event { Some(mapped) } else { None }).await
    };
    report.time("binding", reflexive, |mapped| format!("seen as {mapped}")).await?;
    let relayed_a = allocate("allocate a", a, report).await?;

    let connected = bounded(Peer::connect(server_b, plan.b.transport, &plan.login));
    let b = b.insert(report.time("connect b", connected, |_| plan.b.to_string()).await?);
    let relayed_b = allocate("allocate b", b, report).await?;

    permit("permission a", a, relayed_b, report).await?;
    permit("permission b", b, relayed_a, report).await?;
    let channel = async {
        let number = ChannelNumber::new(0x4000).ok_or(Trouble::Garbage)?;
        a.client.bind_channel(Instant::now(), number, relayed_b);
        let bound = |event| if let Event::ChannelBound(number, _) = event { Some(number) } else { None };
        a.until(STEP_PATIENCE, bound).await
    };
    report.time("channel a", channel, |number| format!("{:#06x} to {relayed_b}", number.get())).await?;
    exchange(plan.count, (a, relayed_a), (b, relayed_b), report).await
}

/// The first address of the host: what a client would try first.
async fn resolve(uri: &TurnUri) -> Result<SocketAddr, Trouble> {
    let found = bounded(async { Ok(lookup_host((uri.host.as_str(), uri.port)).await?.next()) }).await?;
    found.ok_or_else(|| Trouble::Socket(std::io::Error::other("the name has no address")))
}

async fn bounded<T>(step: impl Future<Output = Result<T, Trouble>>) -> Result<T, Trouble> {
    tokio::time::timeout(STEP_PATIENCE, step).await.unwrap_or(Err(Trouble::Silence(STEP_PATIENCE)))
}

async fn allocate(name: &'static str, peer: &mut Peer, report: &mut ProbeReport) -> Option<SocketAddr> {
    let allocated = async {
        peer.client.allocate(Instant::now());
        let pick = |event| match event {
            Event::Allocated { relayed, lifetime, .. } => Some((relayed, lifetime)),
            _ => None,
        };
        peer.until(STEP_PATIENCE, pick).await
    };
    let detail = |(relayed, lifetime): &(SocketAddr, u32)| format!("relayed {relayed}, for {lifetime} s");
    report.time(name, allocated, detail).await.map(|(relayed, _)| relayed)
}

async fn permit(name: &'static str, peer: &mut Peer, other: SocketAddr, report: &mut ProbeReport) -> Option<()> {
    let permitted = async {
        peer.client.permit(Instant::now(), &[other.ip()]);
        peer.until(STEP_PATIENCE, |event| matches!(event, Event::Permitted(_)).then_some(())).await
    };
    report.time(name, permitted, |()| other.ip().to_string()).await
}

async fn release(peer: &mut Peer) -> Result<(), Trouble> {
    peer.client.refresh(Instant::now(), 0);
    peer.until(PACKET_PATIENCE, |event| matches!(event, Event::Refreshed(0)).then_some(())).await
}

/// Packets from `a` on its channel to `b`, and back from `b` in Send indications: all four forms of data are used.
async fn exchange(
    count: u32,
    (a, relayed_a): (&mut Peer, SocketAddr),
    (b, relayed_b): (&mut Peer, SocketAddr),
    report: &mut ProbeReport,
) -> Option<()> {
    let started = Instant::now();
    let mut round_trips = Vec::new();
    for _ in 0..count {
        let mut packet = vec![0; PACKET_BYTES];
        if let Err(error) = getrandom::fill(&mut packet) {
            report.fail("relay", started.elapsed(), &Trouble::Socket(std::io::Error::other(error)));
            return None;
        }
        let sent = Instant::now();
        let deadline = sent + PACKET_PATIENCE;
        let there_and_back = async {
            a.client.send(relayed_b, &packet);
            a.flush().await?;
            if !arrives(b, relayed_a, &packet, deadline).await? {
                return Ok(false);
            }
            b.client.send(relayed_a, &packet);
            b.flush().await?;
            arrives(a, relayed_b, &packet, deadline).await
        };
        match there_and_back.await {
            Ok(true) => round_trips.push(sent.elapsed()),
            Ok(false) => {}
            Err(trouble) => {
                report.fail("relay", started.elapsed(), &trouble);
                return None;
            }
        }
    }
    report.relayed(count, round_trips, started.elapsed())
}

/// Whether exactly this packet comes from exactly this address in time.
async fn arrives(peer: &mut Peer, from: SocketAddr, packet: &[u8], deadline: Instant) -> Result<bool, Trouble> {
    loop {
        match peer.next(deadline).await? {
            Some(Seen::Data(source, data)) if source == from && data == packet => return Ok(true),
            Some(_) => {}
            None => return Ok(false),
        }
    }
}

/// What the exit code and the hint of a failed step are. `answered`: something came from the server before.
fn classify(trouble: &Trouble, answered: bool) -> (Exit, &'static str) {
    match trouble {
        Trouble::Refused(Failure::Refused(ErrorCode::UNAUTHENTICATED)) => {
            (Exit::Failed, "check user name and password, and that a time-limited user name is not past its time")
        }
        Trouble::Refused(Failure::Refused(ErrorCode::FORBIDDEN)) => (
            Exit::Unhealthy,
            "the relay denies its own address as a peer; on loopback a Turnpike relay needs allow_loopback_peers, \
             coturn --allow-loopback-peers",
        ),
        Trouble::Refused(Failure::Refused(ErrorCode::ALLOCATION_QUOTA_REACHED)) => {
            (Exit::Failed, "this user holds as many allocations as it may")
        }
        Trouble::Refused(_) | Trouble::Garbage => (Exit::Unhealthy, "look at the server's log"),
        Trouble::Ended => (Exit::Unhealthy, "is this port a TURN port?"),
        Trouble::Silence(_) | Trouble::Socket(_) if answered => (Exit::Unhealthy, "look at the server's log"),
        Trouble::Silence(_) | Trouble::Socket(_) => {
            (Exit::Unreachable, "is the server running, and does a firewall let this transport through?")
        }
    }
}

/// The middle of the sorted times.
fn median(sorted: &[Duration]) -> Duration {
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

/// A span in milliseconds, for programs.
fn milliseconds(span: Duration) -> f64 {
    (span.as_secs_f64() * 1e6).round() / 1e3
}

fn spread(sorted: &[Duration]) -> String {
    match (sorted.first(), sorted.last()) {
        (Some(least), Some(most)) => {
            let median = units::measured(median(sorted));
            format!("round trip {median} ({} to {})", units::measured(*least), units::measured(*most))
        }
        _ => "nothing came back".into(),
    }
}
