//! A watch that survives compaction, reconnects and slow consumers: on any doubt it says Reset and tells anew.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

use etcd_client::{Event, EventType, WatchOptions, WatchResponse, WatchStream};
use tokio::sync::mpsc;

use super::members::{ATTEMPT, Members, pause_after, within};
use super::{MAX_ANSWER, entry, page, prefix_end};
use crate::store::{MAX_PAGE, StoreError, Watch, WatchEvent};

/// Events between here and a consumer that keeps up.
const QUEUE: usize = 256;
/// Events kept for a slow consumer before it has to be told anew. Kept here, because events left in the connection
/// would hold up every other call on it.
const BACKLOG: usize = 16 * 1024;

/// Starts a watch of `prefix` (a whole key prefix, with the root). It ends when the receiver is dropped.
pub(super) fn start(members: Arc<Members>, root: String, prefix: Vec<u8>) -> Watch {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let teller = Teller { members, root, prefix, sender };
    tokio::spawn(teller.run());
    receiver
}

struct Teller {
    members: Arc<Members>,
    root: String,
    prefix: Vec<u8>,
    sender: mpsc::Sender<WatchEvent>,
}

/// Why a telling broke off.
enum Break {
    /// The consumer is gone.
    Dropped,
    /// What was told may be incomplete.
    Doubt(String),
}

impl From<StoreError> for Break {
    fn from(error: StoreError) -> Self {
        Self::Doubt(error.to_string())
    }
}

impl Teller {
    async fn run(self) {
        let mut failures = 0;
        loop {
            let mut told = 0;
            let Err(broken) = self.tell(&mut told).await;
            let Break::Doubt(reason) = broken else {
                return;
            };
            tracing::debug!(prefix = %String::from_utf8_lossy(&self.prefix), reason, "the watch begins anew");
            // At once and not when etcd is back: the consumer should know that its view is stale.
            if told > 0 && self.sender.send(WatchEvent::Reset).await.is_err() {
                return;
            }
            failures = if told > 0 { 0 } else { failures + 1 };
            tokio::select! {
                () = pause_after(failures) => {}
                () = self.sender.closed() => return,
            }
        }
    }

    /// Tells the prefix as of one revision, then follows from the next one. Counts what it has sent in `told`.
    async fn tell(&self, told: &mut usize) -> Result<Infallible, Break> {
        let mut revision = 0;
        let mut after = None;
        loop {
            let page = page(&self.members, &self.root, &self.prefix, after, MAX_PAGE, revision).await?;
            if revision == 0 {
                revision = page.revision;
            }
            after = page.entries.last().map(|entry| [self.root.as_bytes(), entry.key.as_bytes()].concat());
            for entry in page.entries {
                self.send(WatchEvent::Put(entry), told).await?;
            }
            if !page.more || after.is_none() {
                break;
            }
        }
        let options =
            WatchOptions::new().with_range(prefix_end(&self.prefix)).with_start_revision(revision + 1).with_fragment();
        let (member, client) = self.members.current().await?;
        let mut client = client.watch_client().max_decoding_message_size(MAX_ANSWER);
        let begun = within(ATTEMPT.1, async {
            let mut stream = client.watch(self.prefix.clone(), Some(options)).await?;
            let created = stream.message().await?;
            Ok((stream, created))
        });
        let (stream, created) = begun.await.inspect_err(|_| self.members.leave(member))?;
        let created = created.ok_or_else(|| Break::Doubt("the watch was not created".to_owned()))?;
        let mut backlog = VecDeque::new();
        self.queue(&created, &mut backlog)?;
        self.send(WatchEvent::Synced, told).await?;
        self.follow(member, stream, backlog, told).await
    }

    /// Passes changes on as they come; reading never waits for the consumer.
    async fn follow(
        &self,
        member: usize,
        mut stream: WatchStream,
        mut backlog: VecDeque<WatchEvent>,
        told: &mut usize,
    ) -> Result<Infallible, Break> {
        loop {
            tokio::select! {
                message = stream.message() => {
                    let message = message.map_err(|error| {
                        self.members.leave(member);
                        Break::Doubt(error.to_string())
                    })?;
                    let message = message.ok_or_else(|| Break::Doubt("the stream ended".to_owned()))?;
                    self.queue(&message, &mut backlog)?;
                    if backlog.len() > BACKLOG {
                        return Err(Break::Doubt("the consumer is too slow".to_owned()));
                    }
                }
                permit = self.sender.reserve(), if !backlog.is_empty() => {
                    let permit = permit.map_err(|_| Break::Dropped)?;
                    if let Some(event) = backlog.pop_front() {
                        permit.send(event);
                        *told += 1;
                    }
                }
                () = self.sender.closed() => return Err(Break::Dropped),
            }
        }
    }

    fn queue(&self, message: &WatchResponse, backlog: &mut VecDeque<WatchEvent>) -> Result<(), Break> {
        if message.canceled() || message.compact_revision() != 0 {
            let (revision, reason) = (message.compact_revision(), message.cancel_reason());
            return Err(Break::Doubt(format!("cancelled, compacted to {revision}: {reason}")));
        }
        backlog.extend(message.events().iter().filter_map(|event| self.event(event)));
        Ok(())
    }

    fn event(&self, event: &Event) -> Option<WatchEvent> {
        let entry = entry(&self.root, event.kv()?.clone())?;
        Some(match event.event_type() {
            EventType::Put => WatchEvent::Put(entry),
            EventType::Delete => WatchEvent::Delete { key: entry.key, revision: entry.revision },
        })
    }

    async fn send(&self, event: WatchEvent, told: &mut usize) -> Result<(), Break> {
        self.sender.send(event).await.map_err(|_| Break::Dropped)?;
        *told += 1;
        Ok(())
    }
}
