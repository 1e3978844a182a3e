//! Transactions that are asked for at the same time go to etcd as one. etcd pays for each by a round of its members and
//! a flush of their disks; a hundred relays with a few changes each would be bounded by that and not by the changes.
//!
//! Each stays what it was: a nested transaction with guards of its own, which holds or not by itself. Only those that
//! do not touch each other's keys share one, because etcd looks at all guards before it writes anything.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use etcd_client::{Compare, CompareOp, PutOptions, Txn, TxnOp, TxnOpResponse};
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::members::Members;
use crate::store::{Guard, MAX_OPS, Op, StoreError};

/// Sent before the first of them is answered; more wait and are combined.
const PARALLEL: usize = 8;
/// Callers that may wait.
const QUEUE: usize = 1024;
/// Most transactions in one. What etcd counts is this plus the operations of the longest of them.
const TOGETHER: usize = 64;
/// Most operations and bytes of all of them: one flush should not hold the next up.
const OPS: usize = 1024;
const BYTES: usize = 512 * 1024;

/// Sends transactions, together where it can. Ends with this.
pub(super) struct Combiner {
    jobs: mpsc::Sender<Job>,
    _task: JoinSet<()>,
}

struct Job {
    guards: Vec<Guard>,
    ops: Vec<Op>,
    done: oneshot::Sender<Result<bool, StoreError>>,
}

impl Combiner {
    pub(super) fn new(members: Arc<Members>, root: String) -> Self {
        let (jobs, queue) = mpsc::channel(QUEUE);
        let mut task = JoinSet::new();
        task.spawn(run(Sender { members, root }, queue));
        Self { jobs, _task: task }
    }

    pub(super) async fn transact(&self, guards: Vec<Guard>, ops: Vec<Op>) -> Result<bool, StoreError> {
        let (done, answer) = oneshot::channel();
        let closed = || StoreError::Unavailable("the store is being closed".to_owned());
        self.jobs.send(Job { guards, ops, done }).await.map_err(|_| closed())?;
        answer.await.unwrap_or_else(|_| Err(closed()))
    }
}

async fn run(sender: Sender, mut queue: mpsc::Receiver<Job>) {
    let mut waiting = VecDeque::new();
    let mut sent = FuturesUnordered::new();
    loop {
        tokio::select! {
            job = queue.recv() => match job {
                Some(job) => waiting.push_back(job),
                None => return,
            },
            Some(()) = sent.next() => {}
        }
        while let Ok(job) = queue.try_recv() {
            waiting.push_back(job);
        }
        while sent.len() < PARALLEL && !waiting.is_empty() {
            sent.push(sender.send(take(&mut waiting)));
        }
    }
}

/// Those from the front that may go together, at least one.
fn take(waiting: &mut VecDeque<Job>) -> Vec<Job> {
    let mut group: Vec<Job> = Vec::new();
    let (mut looked_at, mut written) = (HashSet::new(), HashSet::new());
    let (mut ops, mut bytes, mut longest) = (0, 0, 0);
    while let Some(job) = waiting.pop_front() {
        let length = job.ops.len().max(job.guards.len());
        let size: usize = job.ops.iter().map(|op| key_of(op).len() + value_of(op).len()).sum();
        let fits = group.len() < TOGETHER
            && group.len() + 1 + length.max(longest) <= MAX_OPS
            && ops + length <= OPS
            && bytes + size <= BYTES;
        let is_apart = || {
            job.guards.iter().all(|guard| !written.contains(guarded(guard)))
                && job.ops.iter().all(|op| !written.contains(key_of(op)) && !looked_at.contains(key_of(op)))
        };
        let joins = fits && is_apart();
        if !(group.is_empty() || joins) {
            waiting.push_front(job);
            break;
        }
        looked_at.extend(job.guards.iter().map(|guard| guarded(guard).to_owned()));
        written.extend(job.ops.iter().map(|op| key_of(op).to_owned()));
        (ops, bytes, longest) = (ops + length, bytes + size, longest.max(length));
        group.push(job);
    }
    group
}

struct Sender {
    members: Arc<Members>,
    root: String,
}

impl Sender {
    async fn send(&self, group: Vec<Job>) {
        // A caller that has gone away asked for it all the same.
        if let [_, _, ..] = group.as_slice() {
            match self.together(&group).await {
                Ok(outcomes) => {
                    for (job, outcome) in group.into_iter().zip(outcomes) {
                        let _ = job.done.send(Ok(outcome));
                    }
                    return;
                }
                Err(error @ StoreError::Unavailable(_)) => {
                    for job in group {
                        let _ = job.done.send(Err(error.clone()));
                    }
                    return;
                }
                // One of them is to blame, and nothing was applied: each for itself.
                Err(_) => {}
            }
        }
        let each = group.into_iter().map(|job| async move {
            let _ = job.done.send(self.alone(&job.guards, &job.ops).await);
        });
        join_all(each).await;
    }

    async fn alone(&self, guards: &[Guard], ops: &[Op]) -> Result<bool, StoreError> {
        Ok(self.once(self.txn(guards, ops)).await?.succeeded())
    }

    async fn together(&self, group: &[Job]) -> Result<Vec<bool>, StoreError> {
        let nested = group.iter().map(|job| TxnOp::txn(self.txn(&job.guards, &job.ops)));
        let answer = self.once(Txn::new().and_then(nested.collect::<Vec<_>>())).await?;
        let outcomes: Vec<bool> = answer
            .op_responses()
            .iter()
            .map(|response| matches!(response, TxnOpResponse::Txn(nested) if nested.succeeded()))
            .collect();
        if outcomes.len() != group.len() {
            let text = format!("etcd answered {} of {} transactions", outcomes.len(), group.len());
            return Err(StoreError::Unavailable(text));
        }
        Ok(outcomes)
    }

    async fn once(&self, txn: Txn) -> Result<etcd_client::TxnResponse, StoreError> {
        let answer = self.members.once(|client| {
            let (mut kv, txn) = (client.kv_client(), txn.clone());
            async move { kv.txn(txn).await }
        });
        answer.await
    }

    fn txn(&self, guards: &[Guard], ops: &[Op]) -> Txn {
        let compares: Vec<Compare> = guards.iter().map(|guard| self.compare(guard)).collect();
        let ops: Vec<TxnOp> = ops.iter().map(|op| self.op(op)).collect();
        Txn::new().when(compares).and_then(ops)
    }

    fn compare(&self, guard: &Guard) -> Compare {
        let key = self.key(guarded(guard));
        match guard {
            Guard::Value(_, value) => Compare::value(key, CompareOp::Equal, value.clone()),
            Guard::Revision(_, revision) => Compare::mod_revision(key, CompareOp::Equal, *revision),
            Guard::Absent(_) => Compare::create_revision(key, CompareOp::Equal, 0),
        }
    }

    fn op(&self, op: &Op) -> TxnOp {
        match op {
            Op::Put { key, value, lease } => {
                let options = lease.map(|lease| PutOptions::new().with_lease(lease.0));
                TxnOp::put(self.key(key), value.clone(), options)
            }
            Op::Delete(key) => TxnOp::delete(self.key(key), None),
        }
    }

    fn key(&self, key: &str) -> Vec<u8> {
        [self.root.as_bytes(), key.as_bytes()].concat()
    }
}

fn guarded(guard: &Guard) -> &str {
    match guard {
        Guard::Value(key, _) | Guard::Revision(key, _) | Guard::Absent(key) => key,
    }
}

fn key_of(op: &Op) -> &str {
    match op {
        Op::Put { key, .. } | Op::Delete(key) => key,
    }
}

fn value_of(op: &Op) -> &[u8] {
    match op {
        Op::Put { value, .. } => value,
        Op::Delete(_) => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(guards: &[&str], keys: &[&str]) -> Job {
        Job {
            guards: guards.iter().map(|key| Guard::Absent((*key).to_owned())).collect(),
            ops: keys.iter().map(|key| Op::Delete((*key).to_owned())).collect(),
            done: oneshot::channel().0,
        }
    }

    #[test]
    fn only_what_does_not_touch_goes_together() {
        let many: Vec<String> = (0..MAX_OPS).map(|n| format!("m/{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        type Case<'a> = (&'a str, Vec<Job>, usize);
        let cases: Vec<Case<'_>> = vec![
            ("one alone", vec![job(&["o"], &["a"])], 1),
            ("same guard, other keys", vec![job(&["o"], &["a"]), job(&["o"], &["b"])], 2),
            ("the same key", vec![job(&["o"], &["a"]), job(&["p"], &["a"])], 1),
            ("writes what another looks at", vec![job(&["o"], &["a"]), job(&[], &["o"])], 1),
            ("looks at what another writes", vec![job(&[], &["o"]), job(&["o"], &["a"])], 1),
            ("a full one goes alone", vec![job(&["o"], &many), job(&["p"], &["a"])], 1),
            ("a full one is waited for", vec![job(&["p"], &["a"]), job(&["o"], &many)], 1),
            ("no more than etcd counts", vec![job(&["o"], &many[..126]), job(&["p"], &["a"])], 2),
        ];
        for (what, jobs, together) in cases {
            let all = jobs.len();
            let mut waiting = VecDeque::from(jobs);
            assert_eq!(take(&mut waiting).len(), together, "{what}");
            assert_eq!(waiting.len(), all - together, "{what}");
        }
        let mut waiting: VecDeque<Job> = (0..100).map(|n| job(&[], &[format!("k/{n}").as_str()])).collect();
        assert_eq!(take(&mut waiting).len(), TOGETHER);
    }
}
