//! Watches of the embedded store.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use tokio::sync::mpsc;

use super::{State, lock};
use crate::store::{Entry, Watch, WatchEvent};

/// Events between the feed and a consumer that keeps up.
const QUEUE: usize = 256;
/// Events kept for a slow consumer before it has to be told anew.
const BACKLOG: usize = 16 * 1024;

/// Who watches what.
#[derive(Default)]
pub(super) struct Feeds {
    feeds: Vec<Feed>,
    next: u64,
}

struct Feed {
    id: u64,
    prefix: String,
    sender: mpsc::Sender<WatchEvent>,
    /// Something did not fit: the consumer must be told anew.
    lagging: Arc<AtomicBool>,
}

impl Feeds {
    /// Tells a change to every watch of its prefix. Never waits.
    pub(super) fn publish(&mut self, key: &str, event: impl Fn() -> WatchEvent) {
        for feed in self.feeds.iter().filter(|feed| key.starts_with(&feed.prefix)) {
            if feed.sender.try_send(event()).is_err() {
                feed.lagging.store(true, Ordering::Release);
            }
        }
    }
}

/// Starts a watch. It ends when the receiver or the store is dropped.
pub(super) fn start(state: &Arc<Mutex<State>>, prefix: &str) -> Watch {
    let (consumer, receiver) = mpsc::channel(QUEUE);
    let (sender, changes) = mpsc::channel(BACKLOG);
    let lagging = Arc::new(AtomicBool::new(false));
    let mut locked = lock(state);
    let id = locked.feeds.next;
    locked.feeds.next += 1;
    locked.feeds.feeds.push(Feed { id, prefix: prefix.to_owned(), sender, lagging: lagging.clone() });
    let entries = locked.under(prefix);
    drop(locked);
    let pump = Pump { state: Arc::downgrade(state), id, prefix: prefix.to_owned(), changes, lagging, consumer };
    tokio::spawn(pump.run(entries));
    receiver
}

impl State {
    fn under(&self, prefix: &str) -> Vec<Entry> {
        let from = self.entries.range(prefix.to_owned()..);
        let under = from.take_while(|(key, _)| key.starts_with(prefix));
        under.map(|(_, entry)| entry.clone()).collect()
    }
}

struct Pump {
    /// Weak: a watch that is still held does not keep the store's file open.
    state: Weak<Mutex<State>>,
    id: u64,
    prefix: String,
    changes: mpsc::Receiver<WatchEvent>,
    lagging: Arc<AtomicBool>,
    consumer: mpsc::Sender<WatchEvent>,
}

impl Pump {
    async fn run(mut self, entries: Vec<Entry>) {
        let ended = self.pump(entries).await;
        debug_assert!(ended.is_none());
        if let Some(state) = self.state.upgrade() {
            lock(&state).feeds.feeds.retain(|feed| feed.id != self.id);
        }
    }

    /// Ends (with `None`) when the consumer or the store is gone.
    async fn pump(&mut self, mut entries: Vec<Entry>) -> Option<()> {
        loop {
            for entry in entries {
                self.consumer.send(WatchEvent::Put(entry)).await.ok()?;
            }
            self.consumer.send(WatchEvent::Synced).await.ok()?;
            while !self.lagging.load(Ordering::Acquire) {
                tokio::select! {
                    change = self.changes.recv() => self.consumer.send(change?).await.ok()?,
                    () = self.consumer.closed() => return None,
                }
            }
            self.consumer.send(WatchEvent::Reset).await.ok()?;
            entries = self.catch_up()?;
        }
    }

    /// Reads the prefix and drops the changes it already contains.
    fn catch_up(&mut self) -> Option<Vec<Entry>> {
        let state = self.state.upgrade()?;
        let locked = lock(&state);
        while self.changes.try_recv().is_ok() {}
        self.lagging.store(false, Ordering::Release);
        Some(locked.under(&self.prefix))
    }
}
