//! A call that lasts: numbered messages to a peer that sends each of them back. Clients whose connection ends with their
//! relay move to another one when they are told that theirs drains.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use turn_core::Transport;
use turn_core::client::Event;
use turn_core::wire::ChannelNumber;

use crate::certificate::Authority;
use crate::follow::Relays;
use crate::place::Place;
use crate::secure::Trust;
use crate::turn::{Login, Next, TurnClient};

/// Between two messages.
const PACE: Duration = Duration::from_millis(50);
/// Between two requests: Refresh, CreatePermission and ChannelBind in turn.
const ASK: Duration = Duration::from_millis(2300);
/// The channel each client binds.
const CHANNEL: u16 = 0x4000;
/// What is under way when a client moves has so long to arrive.
const UNDER_WAY: Duration = Duration::from_millis(300);

/// What callers share.
#[derive(Clone)]
pub struct Calling {
    /// Where they are.
    pub place: Place,
    /// As whom.
    pub login: Login,
    /// What they are told of relays.
    pub relays: watch::Receiver<Relays>,
    /// Who issued the relays' certificates.
    pub authority: Arc<Authority>,
    /// Who answers.
    pub peer: SocketAddr,
}

/// What came of a call.
#[derive(Clone, Debug)]
pub struct Journey {
    /// How the client reaches its relay.
    pub transport: Transport,
    /// Node it is at.
    pub at: String,
    /// When it was told to leave, and how long after that it talked from elsewhere.
    pub moves: Vec<Duration>,
    /// Messages sent.
    pub sent: usize,
    /// Messages that came back.
    pub answered: usize,
    /// Longest time without one that came back.
    pub longest_gap: Duration,
    /// When the last one came.
    pub last: Instant,
    /// Error responses, but for the challenge of each first Allocate, as `437 to Refresh`.
    pub refusals: Vec<String>,
    /// Why it ended, if it did before it was stopped.
    pub lost: Option<String>,
}

/// A call; ends when stopped.
pub struct Caller {
    journey: Arc<Mutex<Journey>>,
    stop: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

/// A peer that sends back what it gets, for as long as the test runs.
///
/// # Errors
/// The socket cannot be opened.
pub async fn echo(place: &Place) -> Result<SocketAddr> {
    let address = place.address;
    let socket = place.host.run(async move { Ok(UdpSocket::bind((address, 0)).await?) }).await?;
    let own = socket.local_addr()?;
    tokio::spawn(async move {
        let mut buffer = [0; 2048];
        loop {
            // ICMP errors of relays that are away are no messages.
            if let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                let _ = socket.send_to(&buffer[..length], from).await;
            }
        }
    });
    Ok(own)
}

impl Caller {
    /// Begins a call at node `at`.
    ///
    /// # Errors
    /// The relay is not known, or refuses.
    pub async fn start(calling: &Calling, transport: Transport, at: &str) -> Result<Self> {
        let client = arrive(calling, transport, at).await.with_context(|| format!("{transport:?} to {at}"))?;
        let journey = Journey {
            transport,
            at: at.to_owned(),
            moves: Vec::new(),
            sent: 0,
            answered: 0,
            longest_gap: Duration::ZERO,
            last: Instant::now(),
            refusals: Vec::new(),
            lost: None,
        };
        let (journey, stop) = (Arc::new(Mutex::new(journey)), Arc::new(AtomicBool::new(false)));
        let task = tokio::spawn({
            let (calling, journey, stop) = (calling.clone(), Arc::clone(&journey), Arc::clone(&stop));
            async move {
                if let Err(error) = call(calling, client, &journey, &stop).await {
                    edit(&journey, |journey| journey.lost = Some(format!("{error:#}")));
                }
            }
        });
        Ok(Self { journey, stop, task })
    }

    /// How it is going.
    #[must_use]
    pub fn journey(&self) -> Journey {
        self.journey.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends it.
    ///
    /// # Errors
    /// It panicked.
    pub async fn stop(self) -> Result<Journey> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await?;
        let journey = self.journey.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Journey { longest_gap: journey.longest_gap.max(journey.last.elapsed()), ..journey.clone() })
    }
}

fn edit(journey: &Mutex<Journey>, change: impl FnOnce(&mut Journey)) {
    change(&mut journey.lock().unwrap_or_else(PoisonError::into_inner));
}

/// A client with an allocation and a channel at a node.
async fn arrive(calling: &Calling, transport: Transport, at: &str) -> Result<TurnClient> {
    let relay = calling.relays.borrow().get(at).cloned().with_context(|| format!("nobody told of {at}"))?;
    let scheme = match transport {
        Transport::Udp => "udp",
        Transport::Tcp => "tcp",
        Transport::Tls => "tls",
        Transport::Dtls => "dtls",
    };
    let server = relay.listener(scheme).with_context(|| format!("{at} has no {scheme}: {relay:?}"))?;
    let Place { host, address } = &calling.place;
    let mut client = match transport {
        Transport::Udp | Transport::Tcp => TurnClient::open(host, *address, server, transport, &calling.login).await?,
        Transport::Tls | Transport::Dtls => {
            let trust = Trust::new(&calling.authority, &server.ip().to_string())?;
            TurnClient::open_secure(host, *address, server, transport, &calling.login, &trust).await?
        }
    };
    client.allocate().await?;
    client.take_refusals();
    client.bind_channel(CHANNEL, calling.peer).await?;
    Ok(client)
}

async fn call(mut calling: Calling, mut client: TurnClient, journey: &Mutex<Journey>, stop: &AtomicBool) -> Result<()> {
    let mut under_way: HashSet<u64> = HashSet::new();
    let mut number = 0_u64;
    let (mut speak, mut ask, mut turn) = (Instant::now(), Instant::now() + ASK, 0);
    while !stop.load(Ordering::Relaxed) {
        let next = client.next(speak.min(ask)).await?;
        note(&mut client, next, &mut under_way, journey)?;
        let now = Instant::now();
        if now >= speak {
            speak = now.max(speak + PACE);
            under_way.insert(number);
            client.send(calling.peer, &number.to_be_bytes()).await?;
            number += 1;
            edit(journey, |journey| journey.sent += 1);
        }
        if now >= ask {
            ask = now + ASK;
            let channel = ChannelNumber::new(CHANNEL).context("a channel number")?;
            match turn % 3 {
                0 => client.core().refresh(now, 600),
                1 => client.core().permit(now, &[calling.peer.ip()]),
                _ => client.core().bind_channel(now, channel, calling.peer),
            }
            turn += 1;
        }
        if let Some((left, to)) = leaves(&mut calling, journey) {
            let told = Instant::now();
            let transport = left.transport;
            let next = arrive(&calling, transport, &to).await.with_context(|| format!("from {} to {to}", left.at))?;
            let mut former = std::mem::replace(&mut client, next);
            edit(journey, |journey| {
                journey.at.clone_from(&to);
                journey.moves.push(told.elapsed());
            });
            let end = Instant::now() + UNDER_WAY;
            while let Some(next) = former.next(end).await? {
                note(&mut former, Some(next), &mut under_way, journey)?;
            }
            former.refresh(0).await?;
        }
    }
    Ok(())
}

/// Whether it has to go, and where to.
fn leaves(calling: &mut Calling, journey: &Mutex<Journey>) -> Option<(Journey, String)> {
    let journey = journey.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if journey.transport == Transport::Udp {
        return None;
    }
    let relays = calling.relays.borrow_and_update();
    if !relays.get(&journey.at)?.draining {
        return None;
    }
    let to = relays.values().find(|relay| relay.is_ready())?.node.clone();
    Some((journey, to))
}

fn note(
    client: &mut TurnClient,
    next: Option<Next>,
    under_way: &mut HashSet<u64>,
    journey: &Mutex<Journey>,
) -> Result<()> {
    let refusals: Vec<String> =
        client.take_refusals().iter().map(|refusal| format!("{} to {:?}", refusal.code, refusal.method)).collect();
    edit(journey, |journey| journey.refusals.extend(refusals));
    match next {
        Some(Next::Data(_, data)) => {
            let number = u64::from_be_bytes(data.try_into().map_err(|_| anyhow!("a message of another length"))?);
            if under_way.remove(&number) {
                edit(journey, |journey| {
                    journey.answered += 1;
                    journey.longest_gap = journey.longest_gap.max(journey.last.elapsed());
                    journey.last = Instant::now();
                });
            }
        }
        Some(Next::Event(Event::Failed(method, failure))) => bail!("{method:?}: {failure}"),
        Some(Next::Event(_)) | None => {}
    }
    Ok(())
}
