//! Numbered messages between two clients, as a call would send them, counted at the other end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::task::JoinHandle;

use crate::turn::TurnClient;

/// Two clients that may send to each other by channels.
pub struct Pair {
    /// Sends.
    pub first: TurnClient,
    /// Receives.
    pub second: TurnClient,
}

impl Pair {
    /// Binds a channel to the other at each.
    ///
    /// # Errors
    /// Refused.
    pub async fn join(mut first: TurnClient, mut second: TurnClient) -> Result<Self> {
        let (a, b) = (first.relayed()?, second.relayed()?);
        tokio::try_join!(first.bind_channel(0x4000, b), second.bind_channel(0x4000, a))?;
        Ok(Self { first, second })
    }

    /// Sends `count` numbered messages each way, one each way at a time, and asserts that all arrive, in order, from
    /// the right address.
    ///
    /// # Errors
    /// One did not.
    pub async fn exchange(&mut self, count: u32) -> Result<()> {
        let (a, b) = (self.first.relayed()?, self.second.relayed()?);
        for number in 0..count {
            self.first.send(b, &number.to_be_bytes()).await?;
            self.second.send(a, &number.to_be_bytes()).await?;
            expect(&mut self.second, a, number).await?;
            expect(&mut self.first, b, number).await?;
        }
        Ok(())
    }
}

async fn expect(client: &mut TurnClient, from: SocketAddr, number: u32) -> Result<()> {
    let (source, data) =
        client.receive(Duration::from_secs(5)).await.with_context(|| format!("message {number} from {from}"))?;
    ensure!(source == from, "message {number} comes from {source}, not from {from}");
    ensure!(data == number.to_be_bytes(), "message {number} from {from} is {data:?}");
    Ok(())
}

/// As a voice call sends.
const PACE: Duration = Duration::from_millis(20);

/// A stream of messages from the first to the second of a pair, 50 a second unless told otherwise, until it is stopped.
pub struct Traffic {
    stop: Arc<AtomicBool>,
    received: Arc<AtomicU32>,
    task: JoinHandle<Result<(Pair, Count)>>,
}

/// What a stream came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Count {
    /// Messages sent.
    pub sent: u32,
    /// Messages that arrived.
    pub received: u32,
    /// Longest time without one that arrived.
    pub longest_gap: Duration,
}

impl Traffic {
    /// Begins to send.
    #[must_use]
    pub fn start(pair: Pair) -> Self {
        Self::start_each(pair, PACE)
    }

    /// Begins to send, a message each `pace`.
    #[must_use]
    pub fn start_each(mut pair: Pair, pace: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let received = Arc::new(AtomicU32::new(0));
        let (stopped, counter) = (Arc::clone(&stop), Arc::clone(&received));
        let task = tokio::spawn(async move {
            let mut count = Count::default();
            let mut last = Instant::now();
            let to = pair.second.relayed()?;
            while !stopped.load(Ordering::Relaxed) {
                pair.first.send(to, &count.sent.to_be_bytes()).await?;
                count.sent += 1;
                let next = Instant::now() + pace;
                let (_, tended) =
                    tokio::join!(arrivals(&mut pair.second, &mut count, &mut last, next), pair.first.tend(pace));
                tended?;
                counter.store(count.received, Ordering::Relaxed);
            }
            // A silence that has not ended is one too.
            count.longest_gap = count.longest_gap.max(last.elapsed());
            // What is still under way has a second to arrive.
            let end = Instant::now() + Duration::from_secs(1);
            while count.received < count.sent && Instant::now() < end {
                arrivals(&mut pair.second, &mut count, &mut last, end.min(Instant::now() + Duration::from_millis(20)))
                    .await;
            }
            Ok((pair, count))
        });
        Self { stop, received, task }
    }

    /// Messages that have arrived so far.
    #[must_use]
    pub fn received(&self) -> u32 {
        self.received.load(Ordering::Relaxed)
    }

    /// Stops it.
    ///
    /// # Errors
    /// A client could not send.
    pub async fn stop(self) -> Result<(Pair, Count)> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await?
    }
}

/// Takes what arrives until `until`.
async fn arrivals(client: &mut TurnClient, count: &mut Count, last: &mut Instant, until: Instant) {
    while let Some(left) = until.checked_duration_since(Instant::now()) {
        if client.receive(left).await.is_ok() {
            count.received += 1;
            count.longest_gap = count.longest_gap.max(last.elapsed());
            *last = Instant::now();
        }
    }
}
