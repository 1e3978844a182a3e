//! Another controller, looked for while the one in use has lost the store: the relay's lease would run out with it. The
//! session in use goes on until another controller has said Welcome, because an outage of the whole store makes none
//! of them better. A store that is slow makes all of them look worse than the next one: each move costs a resync, which a
//! slow store has to take too, so that moves which follow each other do so in ever greater distance.

use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::sleep;
use turnpike_proto::v1;

use super::backoff::{Backoff, Patience};
use super::connection::{Connection, Greeting, Lost};
use crate::config::Controllers;

/// A session that another controller has begun.
pub(super) struct Found {
    pub(super) endpoint: String,
    pub(super) connection: Connection,
    pub(super) greeting: Greeting,
}

/// The search, if there is one. Dropping it ends it.
#[derive(Default)]
pub(super) struct Elsewhere {
    search: Option<(mpsc::Receiver<Found>, JoinSet<()>)>,
    restraint: Restraint,
}

/// When the next move may be looked for (pure).
#[derive(Debug, Default)]
struct Restraint {
    moved: Option<Instant>,
    /// How long this move has to last.
    stay: Duration,
}

impl Restraint {
    /// How long the first of several moves lasts at least, and the last of many.
    const STAYS: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(40));

    /// The session has moved. One that follows soon lasts twice as long; after a long time all is forgotten.
    fn moved(&mut self, now: Instant) {
        let soon = self.moved.is_some_and(|at| now.saturating_duration_since(at) < 4 * self.stay);
        self.stay = if soon { (2 * self.stay).min(Self::STAYS.1) } else { Self::STAYS.0 };
        self.moved = Some(now);
    }

    /// How long to wait before anybody is looked for.
    fn wait(&self, now: Instant) -> Duration {
        self.moved.map_or(Duration::ZERO, |at| (at + self.stay).saturating_duration_since(now))
    }
}

impl Elsewhere {
    /// Begins to look at every endpoint but the one in use, unless it looks already.
    pub(super) fn look(&mut self, controllers: &Controllers, in_use: &str, hello: &v1::Hello, now: Instant) {
        let endpoints = controllers.endpoints.now();
        let others: Vec<String> = endpoints.iter().filter(|other| *other != in_use).cloned().collect();
        if self.search.is_some() || others.is_empty() {
            return;
        }
        let wait = self.restraint.wait(now);
        tracing::warn!(
            controller = in_use,
            ?wait,
            "the controller has lost the store: looking for another one, calls go on"
        );
        let (sender, found) = mpsc::channel(1);
        let mut task = JoinSet::new();
        let search = search(others, controllers.clone(), hello.clone(), sender);
        task.spawn(async move {
            sleep(wait).await;
            search.await;
        });
        self.search = Some((found, task));
    }

    /// The session that was found is in use.
    pub(super) fn moved(&mut self, now: Instant) {
        self.restraint.moved(now);
    }

    /// Ends the search.
    pub(super) fn stay(&mut self) {
        self.search = None;
    }

    /// The session found. Waits for ever while nothing is looked for.
    pub(super) async fn found(&mut self) -> Found {
        if let Some((found, _)) = &mut self.search
            && let Some(found) = found.recv().await
        {
            self.search = None;
            return found;
        }
        std::future::pending().await
    }
}

async fn search(endpoints: Vec<String>, controllers: Controllers, hello: v1::Hello, found: mpsc::Sender<Found>) {
    let (mut backoff, mut patience) = (Backoff::default(), Patience::default());
    let others = endpoints.len();
    for endpoint in endpoints.into_iter().cycle() {
        match Connection::open(&endpoint, &controllers, hello.clone(), patience.now(others)).await {
            Ok((connection, greeting)) => {
                // The session in use may have ended meanwhile.
                let _ = found.send(Found { endpoint, connection, greeting }).await;
                return;
            }
            Err(lost) => {
                tracing::debug!("{endpoint} is no better: {lost}");
                if matches!(lost, Lost::Silent(_)) {
                    patience.silent();
                }
            }
        }
        sleep(backoff.next()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_that_follow_each_other_come_ever_later() {
        let mut restraint = Restraint::default();
        let mut now = Instant::now();
        assert_eq!(restraint.wait(now), Duration::ZERO, "the first comes at once");
        let mut waits = Vec::new();
        for _ in 0..5 {
            restraint.moved(now);
            waits.push(restraint.wait(now).as_secs());
            now += restraint.wait(now) + Duration::from_secs(3);
        }
        assert_eq!(waits, [5, 10, 20, 40, 40]);
        assert_eq!(restraint.wait(now), Duration::ZERO);
        restraint.moved(now + Duration::from_secs(300));
        assert_eq!(restraint.wait(now + Duration::from_secs(300)).as_secs(), 5, "forgotten");
    }
}
