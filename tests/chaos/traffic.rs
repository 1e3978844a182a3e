//! Calls: a client with an allocation and a peer send each other numbered messages, for as long as they can.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use harness::place::Place;
use harness::turn::{Login, Next, TurnClient};
use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use turn_core::Transport;
use turn_core::client::{Event, Failure};
use turn_core::wire::{ChannelNumber, Method};

use crate::evidence::{Call, Flow, Watch};
use crate::plan::Dice;

/// Between two messages of a call, in each direction.
const PACE: Duration = Duration::from_millis(50);
/// Between two requests of a call: Refresh, CreatePermission and ChannelBind in turn. Far more often than browsers ask,
/// so that many fall into faults.
const ASK: (u64, u64) = (1500, 4000);
/// Longest a client waits for its first answers before it begins anew.
const PATIENCE: Duration = Duration::from_secs(4);
/// Length of a message.
const LENGTH: usize = 160;
/// The channel each client binds.
const CHANNEL: u16 = 0x4000;

/// Which way a message goes.
const UP: u8 = 1;
const DOWN: u8 = 2;

/// A place for one call after the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) relay: usize,
    pub(crate) transport: Transport,
    /// Calls end by themselves after this time; none last to the end of the run.
    pub(crate) life: Option<Duration>,
}

/// All calls of a run.
pub(crate) struct Traffic {
    shared: Arc<Shared>,
    tasks: JoinSet<()>,
}

struct Shared {
    watch: Watch,
    login: Login,
    clients: Place,
    peers: Place,
    relays: Vec<SocketAddr>,
    calls: Mutex<Vec<Arc<Mutex<Call>>>>,
    numbers: AtomicU32,
    stop: AtomicBool,
}

/// A test's own mutex: whoever panicked while holding it has failed the test already.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Traffic {
    pub(crate) fn start(
        watch: Watch,
        login: Login,
        clients: &Place,
        peers: &Place,
        relays: Vec<SocketAddr>,
        slots: &[Slot],
    ) -> Self {
        let shared = Arc::new(Shared {
            watch,
            login,
            clients: clients.clone(),
            peers: peers.clone(),
            relays,
            calls: Mutex::default(),
            numbers: AtomicU32::new(0),
            stop: AtomicBool::new(false),
        });
        let mut tasks = JoinSet::new();
        for slot in slots {
            tasks.spawn(keep_calling(Arc::clone(&shared), *slot));
        }
        Self { shared, tasks }
    }

    /// Calls that have not ended, and how many of them have had messages both ways.
    pub(crate) fn living(&self) -> (Vec<Call>, usize) {
        let calls = lock(&self.shared.calls);
        let living: Vec<Call> = calls.iter().map(|call| lock(call).clone()).filter(Call::lives).collect();
        let talk = |flow: &Flow| flow.arrived.iter().any(Option::is_some);
        let talking = living.iter().filter(|call| talk(&call.up) && talk(&call.down)).count();
        (living, talking)
    }

    /// Ends sending; what is under way has a second to arrive.
    pub(crate) async fn stop(mut self) -> Vec<Call> {
        self.shared.stop.store(true, Ordering::Relaxed);
        while self.tasks.join_next().await.is_some() {}
        lock(&self.shared.calls).iter().map(|call| lock(call).clone()).collect()
    }
}

async fn keep_calling(shared: Arc<Shared>, slot: Slot) {
    while !shared.stop.load(Ordering::Relaxed) {
        if let Ok(Ok(client)) = timeout(PATIENCE * 2, allocated(&shared, slot)).await {
            let number = shared.numbers.fetch_add(1, Ordering::Relaxed);
            // What goes wrong is in the call's record.
            let _ = call(&shared, slot, number, client).await;
        }
        sleep(Duration::from_millis(200)).await;
    }
}

async fn allocated(shared: &Shared, slot: Slot) -> Result<TurnClient> {
    let (host, from) = (&shared.clients.host, shared.clients.address);
    let open = TurnClient::open(host, from, shared.relays[slot.relay], slot.transport, &shared.login);
    let mut client = timeout(PATIENCE, open).await??;
    timeout(PATIENCE, served(&mut client)).await??;
    Ok(client)
}

/// Makes the allocation, as a client that does not follow 300: it asks once more, and is served.
pub(crate) async fn served(client: &mut TurnClient) -> Result<()> {
    match client.allocate().await {
        Err(_) if client.take_refusals().iter().any(|refusal| refusal.code == 300) => client.allocate().await?,
        answered => answered?,
    };
    Ok(())
}

async fn call(shared: &Arc<Shared>, slot: Slot, number: u32, mut client: TurnClient) -> Result<()> {
    // The challenge that every first Allocate gets.
    client.take_refusals();
    let relayed = client.relayed()?;
    let record = Arc::new(Mutex::new(Call {
        number,
        relay: slot.relay,
        transport: slot.transport,
        relayed,
        born: shared.watch.now(),
        bound: None,
        ended: None,
        broke: None,
        refusals: Vec::new(),
        up: Flow::default(),
        down: Flow::default(),
        foreign: 0,
        damaged: 0,
    }));
    lock(&shared.calls).push(Arc::clone(&record));
    let address = shared.peers.address;
    let socket = shared.peers.host.run(async move { Ok(UdpSocket::bind((address, 0)).await?) }).await?;
    let peer = socket.local_addr()?;
    let over = Arc::new(AtomicBool::new(false));
    let other = tokio::spawn(answer(Arc::clone(shared), Arc::clone(&record), socket, relayed, Arc::clone(&over)));
    hold(shared, slot, &record, &mut client, peer).await;
    over.store(true, Ordering::Relaxed);
    other.await?;
    Ok(())
}

/// The client's side, until the call is over.
async fn hold(shared: &Shared, slot: Slot, record: &Mutex<Call>, client: &mut TurnClient, peer: SocketAddr) {
    let watch = shared.watch;
    let number = lock(record).number;
    let mut dice = Dice(u64::from(number) << 8);
    let born = Instant::now();
    let mut speak = born;
    let mut ask = born;
    let mut turn = 0;
    loop {
        let next = match client.next(speak.min(ask)).await {
            Ok(next) => next,
            Err(error) => {
                lock(record).broke = Some((watch.now(), format!("{error:#}")));
                return;
            }
        };
        for refusal in client.take_refusals() {
            lock(record).refusals.push((watch.at(refusal.at), refusal.method, refusal.code));
        }
        match next {
            Some(Next::Data(_, bytes)) => take(&mut lock(record), &bytes, DOWN, watch.now()),
            Some(Next::Event(Event::ChannelBound(..))) => {
                lock(record).bound.get_or_insert(watch.now());
            }
            Some(Next::Event(Event::Failed(Method::Refresh, failure @ Failure::Refused(_)))) => {
                lock(record).broke = Some((watch.now(), format!("Refresh: {failure}")));
                return;
            }
            Some(Next::Event(_)) | None => {}
        }
        if shared.stop.load(Ordering::Relaxed) {
            break;
        }
        let now = Instant::now();
        if slot.life.is_some_and(|life| now > born + life) {
            lock(record).ended = Some(watch.now());
            client.core().refresh(now, 0);
            // Its retransmissions go on until it is answered: an end that is lost would be an orphan.
            while let Ok(Some(next)) = client.next(now + PATIENCE).await {
                if matches!(next, Next::Event(Event::Refreshed(_) | Event::Failed(..))) {
                    break;
                }
            }
            return;
        }
        if now >= speak {
            speak = now.max(speak + PACE);
            let bound = lock(record).bound.is_some();
            if bound {
                let message = lock(record).up.send(watch.now());
                // A connection that is broken says so when it is read.
                let _ = client.send(peer, &compose(number, UP, message)).await;
            }
        }
        if now >= ask {
            ask = now + Duration::from_millis(dice.between(ASK.0, ASK.1));
            let bound = lock(record).bound.is_some();
            let core = client.core();
            match (bound, turn % 3, ChannelNumber::new(CHANNEL)) {
                (false, _, Some(channel)) | (true, 2, Some(channel)) => core.bind_channel(now, channel, peer),
                (true, 1, _) => core.permit(now, &[peer.ip()]),
                _ => core.refresh(now, 600),
            }
            turn += 1;
        }
    }
    // What is still under way.
    let end = Instant::now() + Duration::from_secs(1);
    while let Ok(Some(next)) = client.next(end).await {
        if let Next::Data(_, bytes) = next {
            take(&mut lock(record), &bytes, DOWN, watch.now());
        }
    }
}

/// The peer's side.
async fn answer(
    shared: Arc<Shared>,
    record: Arc<Mutex<Call>>,
    socket: UdpSocket,
    relayed: SocketAddr,
    over: Arc<AtomicBool>,
) {
    let watch = shared.watch;
    let number = lock(&record).number;
    let mut buffer = [0; 2048];
    let mut ticks = tokio::time::interval(PACE);
    while !over.load(Ordering::Relaxed) {
        tokio::select! {
            // An ICMP error of a relay that is away is no message.
            received = socket.recv_from(&mut buffer) => if let Ok((length, from)) = received {
                let mut call = lock(&record);
                if from == relayed {
                    take(&mut call, &buffer[..length], UP, watch.now());
                } else {
                    call.foreign += 1;
                }
            },
            _ = ticks.tick() => {
                let talks = lock(&record).up.arrived.iter().any(Option::is_some);
                if talks && !shared.stop.load(Ordering::Relaxed) {
                    let message = lock(&record).down.send(watch.now());
                    let _ = socket.send_to(&compose(number, DOWN, message), relayed).await;
                }
            }
        }
    }
}

fn compose(call: u32, way: u8, number: u32) -> Vec<u8> {
    let mut message = Vec::with_capacity(LENGTH);
    message.extend(call.to_be_bytes());
    message.push(way);
    message.extend(number.to_be_bytes());
    // Different in each message, so that a mix of two shows.
    message.extend((message.len()..LENGTH - 8).map(|place| (place as u32).wrapping_mul(number | 1).to_le_bytes()[1]));
    message.extend(checksum(&message).to_be_bytes());
    message
}

/// FNV-1a.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3))
}

fn take(call: &mut Call, message: &[u8], way: u8, now: Duration) {
    let Some((body, sum)) = message.split_last_chunk::<8>() else {
        call.damaged += 1;
        return;
    };
    let (number, place) = match body {
        [a, b, c, d, towards, e, f, g, h, ..] if *towards == way && body.len() == LENGTH - 8 => {
            (u32::from_be_bytes([*a, *b, *c, *d]), u32::from_be_bytes([*e, *f, *g, *h]))
        }
        _ => {
            call.damaged += 1;
            return;
        }
    };
    if checksum(body).to_be_bytes() != *sum {
        call.damaged += 1;
    } else if number != call.number {
        call.foreign += 1;
    } else {
        let flow = if way == UP { &mut call.up } else { &mut call.down };
        if !flow.arrive(place, now) {
            call.damaged += 1;
        }
    }
}
