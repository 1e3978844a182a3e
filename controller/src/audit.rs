//! Who changed what in the cluster: every call that changes something, done or refused, with its outcome.
//!
//! Each is a line of the log (target `audit`, which the log filter cannot silence) and an entry under
//! `audit/<controller>/<slot>` in the store, where each replica keeps its last hundred for the consoles of all. The log
//! is the record to keep; the store is for looking at.

use std::cmp::Reverse;
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tonic::{Code, Request, Status};
use turn_core::text::escape;

use crate::fleet::unix_ms;
use crate::identity::Identity;
use crate::metrics;
use crate::store::{Entry as Stored, Op, Store, StoreError};

/// Target of the log lines.
pub const TARGET: &str = "audit";
/// Before the key of every entry.
pub(crate) const PREFIX: &str = "audit/";
/// Entries that a replica keeps.
const RING: usize = 100;
/// Entries read for a list: those of many replicas.
const READ: usize = 1000;
/// Longest target and detail, in bytes: they may hold what a caller wrote.
const LONGEST: usize = 400;
/// Between two tries to reach the store.
const AGAIN: Duration = Duration::from_secs(5);

/// Where a call came in.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Via {
    /// gRPC: `turnctl`, or a program.
    #[default]
    Grpc,
    /// The console.
    Console,
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Grpc => "grpc",
            Self::Console => "console",
        })
    }
}

/// How it ended.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It was done.
    Done,
    /// The caller may not do it.
    Denied,
    /// It could not be done; nothing changed, or the store did not say.
    Failed,
    /// The caller went away before it was known.
    Unknown,
}

impl Outcome {
    /// As metrics and the log write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Denied => "denied",
            Self::Failed => "failed",
            Self::Unknown => "unknown",
        }
    }
}

/// Something that was done or tried.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Action {
    /// Unix ms, when it was asked for.
    pub at: u64,
    /// `role/name`, or `nobody`.
    pub caller: String,
    /// Where it came in.
    pub via: Via,
    /// The controller that was asked.
    pub controller: String,
    /// `drain`, `rotate_keys`, …
    pub action: String,
    /// What it was about.
    pub on: String,
    /// How it ended.
    pub outcome: Outcome,
    /// What was asked for beyond that, or why it was not done.
    pub detail: String,
    /// Counts this controller's actions as they are stored: clocks are too coarse to order them.
    pub number: u64,
}

/// Writes down what is done. Its task ends with it.
#[derive(Debug)]
pub struct Audit {
    inner: Arc<Inner>,
    _task: JoinSet<()>,
}

struct Inner {
    store: Arc<dyn Store>,
    controller: String,
    ring: Mutex<Ring>,
    written: Notify,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").field("controller", &self.controller).finish_non_exhaustive()
    }
}

/// This replica's own, oldest first.
#[derive(Debug, Default)]
struct Ring {
    actions: VecDeque<Action>,
    /// The last so many of them are not in the store yet.
    unstored: usize,
    /// Number of the next one that is stored.
    number: u64,
}

impl Ring {
    fn push(&mut self, action: Action) {
        if self.actions.len() == RING {
            self.actions.pop_front();
        }
        self.actions.push_back(action);
        self.unstored = (self.unstored + 1).min(self.actions.len());
    }

    fn next(&self) -> Option<Action> {
        let index = self.actions.len().checked_sub(self.unstored)?;
        self.actions.get(index).map(|action| Action { number: self.number, ..action.clone() })
    }

    fn stored(&mut self) {
        self.unstored = self.unstored.saturating_sub(1);
        self.number += 1;
    }
}

impl Audit {
    /// Writes as this controller.
    pub fn start(store: Arc<dyn Store>, controller: &str) -> Self {
        let inner = Arc::new(Inner {
            store,
            controller: controller.to_owned(),
            ring: Mutex::default(),
            written: Notify::new(),
        });
        let mut task = JoinSet::new();
        task.spawn(inner.clone().keep());
        Self { inner, _task: task }
    }

    /// A call begins that shall do `action` to `on`.
    pub fn begin<T>(&self, request: &Request<T>, action: &'static str, on: String, detail: String) -> Attempt {
        let action = Action {
            at: unix_ms(),
            caller: Identity::of(request).map_or_else(|_| "nobody".to_owned(), |caller| caller.to_string()),
            via: request.extensions().get::<Via>().copied().unwrap_or_default(),
            controller: self.inner.controller.clone(),
            action: action.to_owned(),
            on: shortened(on),
            outcome: Outcome::Unknown,
            detail: shortened(detail),
            number: 0,
        };
        Attempt { inner: self.inner.clone(), action: Some(action) }
    }

    /// The newest of all replicas, newest first. Those of others are missing while the store is away.
    pub async fn newest(&self, limit: usize) -> Vec<Action> {
        let others = match self.inner.store.range(PREFIX, None, READ).await {
            Ok(page) => page.entries,
            Err(error) => {
                tracing::debug!(%error, "what was done at other replicas cannot be read");
                Vec::new()
            }
        };
        let own = self.inner.ring().actions.iter().rev().cloned().collect::<Vec<_>>();
        let others = others.iter().filter_map(read).filter(|action| action.controller != self.inner.controller);
        let mut others: Vec<Action> = others.collect();
        others.sort_by_key(|action| Reverse(action.number));
        // Those of one controller stay in their order where a millisecond does not tell.
        let mut all: Vec<Action> = own.into_iter().chain(others).collect();
        all.sort_by_key(|action| Reverse(action.at));
        all.truncate(limit);
        all
    }
}

/// A call under way. What has not been settled when it is dropped is written down as unknown.
#[derive(Debug)]
pub struct Attempt {
    inner: Arc<Inner>,
    action: Option<Action>,
}

impl Attempt {
    /// It has ended; the answer is handed on.
    pub fn settle<T>(mut self, answer: Result<T, Status>) -> Result<T, Status> {
        if let Some(mut action) = self.action.take() {
            action.outcome = match &answer {
                Ok(_) => Outcome::Done,
                Err(status) if matches!(status.code(), Code::PermissionDenied | Code::Unauthenticated) => {
                    Outcome::Denied
                }
                Err(_) => Outcome::Failed,
            };
            if let Err(status) = &answer {
                action.detail = shortened(status.message().to_owned());
            }
            self.inner.write(action);
        }
        answer
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if let Some(action) = self.action.take() {
            self.inner.write(action);
        }
    }
}

impl Inner {
    fn write(&self, action: Action) {
        let Action { caller, via, action: what, on, outcome, detail, .. } = &action;
        let outcome = outcome.name();
        tracing::info!(target: TARGET, caller, %via, action = what, on, outcome, detail, "admin action");
        metrics::admin_action(what, outcome);
        self.ring().push(action);
        self.written.notify_one();
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings what is written into the store, after what an earlier process of this name has left there.
    async fn keep(self: Arc<Self>) {
        let earlier = loop {
            match self.earlier().await {
                Ok(earlier) => break earlier,
                Err(error) => tracing::debug!(%error, "earlier admin actions cannot be read"),
            }
            tokio::time::sleep(AGAIN).await;
        };
        {
            let mut ring = self.ring();
            ring.number = earlier.last().map_or(0, |action| action.number + 1);
            for action in earlier.into_iter().rev() {
                if ring.actions.len() < RING {
                    ring.actions.push_front(action);
                }
            }
        }
        loop {
            let next = self.ring().next();
            let Some(action) = next else {
                self.written.notified().await;
                continue;
            };
            match self.store(&action).await {
                // Refused for good: it is in the log.
                Ok(()) | Err(StoreError::Refused(_)) => self.ring().stored(),
                Err(error) => {
                    tracing::debug!(%error, "an admin action is not in the store yet");
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
    }

    /// Oldest first.
    async fn earlier(&self) -> Result<Vec<Action>, StoreError> {
        let page = self.store.range(&format!("{PREFIX}{}/", self.controller), None, RING).await?;
        let mut earlier: Vec<Action> = page.entries.iter().filter_map(read).collect();
        earlier.sort_by_key(|action| action.number);
        Ok(earlier)
    }

    async fn store(&self, action: &Action) -> Result<(), StoreError> {
        let slot = action.number % RING as u64;
        let value = serde_json::to_vec(action).map_err(|error| StoreError::Refused(error.to_string()))?;
        let put = Op::Put { key: format!("{PREFIX}{}/{slot:03}", self.controller), value, lease: None };
        self.store.transact(Vec::new(), vec![put]).await.map(drop)
    }
}

fn read(entry: &Stored) -> Option<Action> {
    serde_json::from_slice(&entry.value).ok()
}

/// What callers wrote, without control characters and not longer than an entry should be.
fn shortened(text: String) -> String {
    let mut text = escape(text.as_bytes());
    if text.len() > LONGEST {
        text.truncate(text.floor_char_boundary(LONGEST));
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Role;
    use crate::store::EmbeddedStore;

    fn request(role: Role) -> Request<()> {
        let mut request = Request::new(());
        request.extensions_mut().insert(Identity { role, name: "ann".to_owned() });
        request
    }

    async fn sees(audit: &Audit, on: &str) -> Vec<Action> {
        loop {
            let newest = audit.newest(1000).await;
            if newest.iter().any(|action| action.on == on) {
                return newest;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn who_did_what_and_how_it_ended() {
        let audit = Audit::start(Arc::new(EmbeddedStore::in_memory()), "c1");
        let begin = |request: &Request<()>| audit.begin(request, "drain", "eu-1".to_owned(), "10 minutes".to_owned());
        let answers = [
            (Role::Operator, Some(Ok(())), Outcome::Done, "10 minutes"),
            (Role::Viewer, Some(Err(Status::permission_denied("no\ncontrol"))), Outcome::Denied, "no\\x0acontrol"),
            (Role::Admin, Some(Err(Status::not_found("nobody"))), Outcome::Failed, "nobody"),
            (Role::Admin, None, Outcome::Unknown, "10 minutes"),
        ];
        for (role, answer, outcome, detail) in answers {
            let attempt = begin(&request(role));
            match answer {
                Some(answer) => drop(attempt.settle(answer)),
                None => drop(attempt),
            }
            let newest = audit.inner.ring().actions.back().cloned().expect("written");
            assert_eq!((newest.outcome, newest.detail.as_str()), (outcome, detail));
            assert_eq!((newest.caller, newest.via), (format!("{role}/ann"), Via::Grpc));
        }
        let attempt = audit.begin(&Request::new(()), "drain", "x".repeat(1000), String::new());
        drop(attempt.settle(Ok(())));
        let newest = audit.inner.ring().actions.back().cloned().expect("written");
        assert_eq!(newest.caller, "nobody");
        assert!(newest.on.len() < 410, "{}", newest.on);
    }

    #[tokio::test]
    async fn every_replica_shows_what_was_done_at_any_and_each_keeps_its_last_hundred() {
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::in_memory());
        let (one, other) = (Audit::start(store.clone(), "c1"), Audit::start(store.clone(), "c2"));
        let act = |audit: &Audit, on: String| {
            drop(audit.begin(&request(Role::Admin), "drain", on, String::new()).settle(Ok(())));
        };
        act(&other, "eu-9".to_owned());
        assert_eq!(sees(&one, "eu-9").await.len(), 1);
        for n in 0..RING + 5 {
            act(&one, format!("eu-{n}"));
            while one.inner.ring().unstored > 0 {
                tokio::task::yield_now().await;
            }
        }
        let page = store.range("audit/c1/", None, 1000).await.expect("a store");
        assert_eq!(page.entries.len(), RING, "no more than a ring");
        drop(one);
        let again = Audit::start(store, "c1");
        let newest = sees(&again, "eu-104").await;
        assert!(newest.len() == RING + 1 && !newest.iter().any(|action| action.on == "eu-4"));
        act(&again, "eu-1000".to_owned());
        let newest = sees(&other, "eu-1000").await;
        assert!(newest.len() == RING + 1 && newest[0].on == "eu-1000" && !newest.iter().any(|a| a.on == "eu-5"));
    }
}
