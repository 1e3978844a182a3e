//! The members of an etcd cluster: one is used until it fails, then the next, so that a member that hangs costs one
//! call and not every second one. And what a failure means: whether it passes, whether the call may have had an effect.

use std::error::Error as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Error};
use tokio::sync::OnceCell;
use tokio::time::{Instant, sleep, timeout};
use tonic::Code;

use crate::store::StoreError;

/// How long a call goes on retrying. A leader change takes etcd 1-1.5 s.
const DEADLINE: Duration = Duration::from_secs(5);
/// How long one attempt waits of a call that may be repeated, and of one that may not where there are other members.
pub(super) const ATTEMPT: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(3));
/// First pause between attempts; doubles up to the second one.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(25), Duration::from_millis(400));

/// What it means when etcd says so.
pub(super) const NO_LEADER: &str = "etcd has no leader: are most of its members running and in reach of each other?";

/// The members, connected to when they are first used.
pub(super) struct Members {
    members: Vec<Member>,
    /// Which one is used; modulo their number.
    current: AtomicUsize,
}

struct Member {
    endpoint: String,
    options: ConnectOptions,
    client: OnceCell<Client>,
}

/// Which calls are repeated after an attempt of unknown outcome.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Repeat {
    Always,
    IfNotApplied,
}

impl Members {
    /// Begins with a random one, so that replicas spread.
    pub(super) fn new(endpoints: Vec<String>, options: &ConnectOptions) -> Self {
        let first = usize::try_from(getrandom::u32().unwrap_or_default()).unwrap_or_default();
        let member = |endpoint| Member { endpoint, options: options.clone(), client: OnceCell::new() };
        Self { members: endpoints.into_iter().map(member).collect(), current: AtomicUsize::new(first) }
    }

    /// Makes a call that may be made twice, until it is answered, refused or the deadline has passed.
    pub(super) async fn repeat<T, F>(&self, call: impl Fn(Client) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        self.attempt(Repeat::Always, ATTEMPT.0, call).await
    }

    /// Makes a call that must not be made twice: it is repeated only while it has had no effect for sure.
    pub(super) async fn once<T, F>(&self, call: impl Fn(Client) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let patience = if self.members.len() > 1 { ATTEMPT.1 } else { DEADLINE };
        self.attempt(Repeat::IfNotApplied, patience, call).await
    }

    async fn attempt<T, F>(
        &self,
        repeat: Repeat,
        patience: Duration,
        call: impl Fn(Client) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let deadline = Instant::now() + DEADLINE;
        let mut pause = BACKOFF.0;
        loop {
            let current = self.current.load(Ordering::Relaxed);
            let patience = patience.min(deadline.saturating_duration_since(Instant::now()));
            let fault = match timeout(patience, self.client(current)).await {
                Ok(Ok(client)) => match timeout(patience, call(client)).await {
                    Ok(Ok(answer)) => return Ok(answer),
                    Ok(Err(error)) => fault(&error),
                    Err(_) => Fault::silence(Applied::Perhaps),
                },
                Ok(Err(error)) => Fault { applied: Applied::No, ..fault(&error) },
                Err(_) => Fault::silence(Applied::No),
            };
            if fault.passing {
                self.leave(current);
            }
            let may_repeat = fault.passing && (repeat == Repeat::Always || fault.applied == Applied::No);
            if !may_repeat || Instant::now() + pause >= deadline {
                return Err(fault.error);
            }
            tracing::debug!(error = %fault.error, "another attempt");
            sleep(pause).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    /// The member in use, for a call that goes on for long, and its number for [`Members::leave`].
    ///
    /// # Errors
    /// As a call's.
    pub(super) async fn current(&self) -> Result<(usize, Client), StoreError> {
        let current = self.current.load(Ordering::Relaxed);
        match within(ATTEMPT.0, self.client(current)).await {
            Ok(client) => Ok((current, client)),
            Err(error) => {
                self.leave(current);
                Err(error)
            }
        }
    }

    /// Goes to the next member, unless somebody already did.
    pub(super) fn leave(&self, current: usize) {
        let next = current.wrapping_add(1);
        if self.current.compare_exchange(current, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
            && let [_, _, ..] = self.members.as_slice()
        {
            let member = &self.members[next % self.members.len()];
            tracing::debug!(endpoint = member.endpoint, "another member of etcd is used");
        }
    }

    async fn client(&self, current: usize) -> Result<Client, Error> {
        if self.members.is_empty() {
            return Err(Error::InvalidArgs("no endpoints".to_owned()));
        }
        let member = &self.members[current % self.members.len()];
        let connect = || Client::connect([&member.endpoint], Some(member.options.clone()));
        member.client.get_or_try_init(connect).await.cloned()
    }
}

/// Bounds what would otherwise wait for as long as etcd does.
pub(super) async fn within<T>(limit: Duration, call: impl Future<Output = Result<T, Error>>) -> Result<T, StoreError> {
    match timeout(limit, call).await {
        Ok(answer) => answer.map_err(|error| fault(&error).error),
        Err(_) => Err(Fault::silence(Applied::Perhaps).error),
    }
}

/// Backs off between a watch's attempts.
pub(super) async fn pause_after(failures: u32) {
    let pause = BACKOFF.0 * 2u32.saturating_pow(failures.min(10));
    sleep(pause.min(Duration::from_secs(1))).await;
}

/// A failed attempt.
struct Fault {
    error: StoreError,
    /// May go away by itself within seconds.
    passing: bool,
    applied: Applied,
}

/// Whether a failed attempt can have had an effect.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Applied {
    No,
    Perhaps,
}

impl Fault {
    fn silence(applied: Applied) -> Self {
        let error = StoreError::Unavailable("no answer in time".to_owned());
        Self { error, passing: true, applied }
    }
}

fn fault(error: &Error) -> Fault {
    let (passing, applied) = match error {
        Error::GRpcStatus(status) => judge(status),
        Error::TransportError(_) | Error::IoError(_) => (true, Applied::No),
        Error::LeaseKeepAliveError(text) if text == "lease not found" => {
            return Fault { error: StoreError::LeaseEnded, passing: false, applied: Applied::No };
        }
        Error::LeaseKeepAliveError(_) | Error::WatchError(_) => (true, Applied::Perhaps),
        _ => (false, Applied::No),
    };
    let text = match error {
        Error::GRpcStatus(status) => status.source().map_or_else(|| status.message().to_owned(), chain),
        Error::TransportError(error) => chain(error),
        other => other.to_string(),
    };
    let error = if text.contains("requested lease not found") {
        return Fault { error: StoreError::LeaseEnded, passing: false, applied };
    } else if text.contains("database space exceeded") {
        full(&text)
    } else if is_denial(error, &text) {
        StoreError::Denied(format!(
            "{text}; give its user readwrite on store.prefix, or correct store.user and store.password"
        ))
    } else if text == "etcdserver: no leader" {
        StoreError::Unavailable(NO_LEADER.to_owned())
    } else if passing {
        StoreError::Unavailable(text)
    } else {
        StoreError::Refused(text)
    };
    Fault { error, passing, applied }
}

/// What a member's own complaints mean: its alarms, or that it has no leader.
pub(super) fn complaint(text: &str) -> StoreError {
    if text.contains("NOSPACE") {
        full("alarm NOSPACE")
    } else if text.contains("no leader") {
        StoreError::Unavailable(NO_LEADER.to_owned())
    } else {
        StoreError::Unavailable(format!("etcd says: {text}"))
    }
}

fn full(text: &str) -> StoreError {
    StoreError::Full(format!(
        "etcd has used up its --quota-backend-bytes ({text}); compact and defragment it, or raise the quota, then run \
         'etcdctl alarm disarm'"
    ))
}

/// Whether credentials or permissions are wrong, however etcd codes it.
fn is_denial(error: &Error, text: &str) -> bool {
    let Error::GRpcStatus(status) = error else {
        return false;
    };
    matches!(status.code(), Code::PermissionDenied | Code::Unauthenticated)
        || ["authentication failed", "user name is empty", "invalid auth token", "authentication is not enabled"]
            .iter()
            .any(|known| text.contains(known))
}

/// Whether a status is of the passing kind, and whether its call may have had an effect.
fn judge(status: &tonic::Status) -> (bool, Applied) {
    let text = status.message();
    match status.code() {
        Code::Unavailable if never_sent(status) || text == "etcdserver: no leader" => (true, Applied::No),
        Code::ResourceExhausted if text == "etcdserver: too many requests" => (true, Applied::No),
        // The client fetches a token anew for the next attempt; roles that change meanwhile are looked at again.
        Code::Unauthenticated => (true, Applied::No),
        Code::InvalidArgument if text == "etcdserver: revision of auth store is old" => (true, Applied::No),
        // A broken connection is Unknown, Internal or Cancelled, by where it broke.
        Code::Unavailable
        | Code::DeadlineExceeded
        | Code::Cancelled
        | Code::Unknown
        | Code::Internal
        | Code::Aborted => (true, Applied::Perhaps),
        _ => (false, Applied::No),
    }
}

/// An error with its causes, each said once: "tcp connect error: Connection refused (os error 111)".
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        source = error.source();
    }
    text
}

/// Whether there was no connection to send it on, or it was still queued when that one broke.
fn never_sent(status: &tonic::Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.is::<tonic::ConnectError>() || error.downcast_ref().is_some_and(hyper::Error::is_canceled) {
            return true;
        }
        source = error.source();
    }
    false
}
