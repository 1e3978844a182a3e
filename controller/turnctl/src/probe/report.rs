//! What a probe found out.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::peer::Trouble;
use super::{TurnUri, classify, median, milliseconds, spread};
use crate::failure::Exit;
use crate::units;

/// One probe, step by step.
#[derive(Debug, Serialize)]
pub(crate) struct ProbeReport {
    /// Server of the first client.
    pub(crate) server: String,
    /// Server of the second client.
    pub(crate) peer_server: String,
    pub(crate) ok: bool,
    pub(crate) steps: Vec<Step>,
    /// What to do when it is not well.
    pub(crate) hint: Option<&'static str>,
    pub(crate) packets_sent: u32,
    pub(crate) packets_returned: u32,
    /// Median over the packets that came back.
    pub(crate) round_trip_ms: Option<f64>,
    #[serde(skip)]
    pub(crate) exit: Option<Exit>,
}

/// One step of a probe.
#[derive(Debug, Serialize)]
pub(crate) struct Step {
    pub(crate) name: &'static str,
    pub(crate) outcome: Outcome,
    pub(crate) ms: f64,
    pub(crate) detail: String,
    #[serde(skip)]
    pub(crate) took: Duration,
}

/// How a step ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Outcome {
    Ok,
    /// Some packets were lost.
    Lossy,
    Failed,
}

impl ProbeReport {
    pub(super) fn new(a: &TurnUri, b: &TurnUri) -> Self {
        Self {
            server: a.to_string(),
            peer_server: b.to_string(),
            ok: true,
            steps: Vec::new(),
            hint: None,
            packets_sent: 0,
            packets_returned: 0,
            round_trip_ms: None,
            exit: None,
        }
    }

    /// Runs a step and notes how long it took; `None` when it failed.
    pub(super) async fn time<T>(
        &mut self,
        name: &'static str,
        step: impl Future<Output = Result<T, Trouble>>,
        detail: impl FnOnce(&T) -> String,
    ) -> Option<T> {
        let started = Instant::now();
        match step.await {
            Ok(value) => {
                self.note(name, Outcome::Ok, started.elapsed(), detail(&value));
                Some(value)
            }
            Err(trouble) => {
                self.fail(name, started.elapsed(), &trouble);
                None
            }
        }
    }

    pub(super) fn fail(&mut self, name: &'static str, took: Duration, trouble: &Trouble) {
        // Finding the name and a UDP socket are answers of nobody.
        let answered = self.steps.iter().any(|step| !matches!(step.name, "resolve" | "resolve b" | "connect"));
        let (exit, hint) = classify(trouble, answered);
        (self.ok, self.exit, self.hint) = (false, Some(exit), Some(hint));
        self.note(name, Outcome::Failed, took, trouble.to_string());
    }

    /// Notes how many packets came back; `None` when none did.
    pub(super) fn relayed(&mut self, sent: u32, mut round_trips: Vec<Duration>, took: Duration) -> Option<()> {
        round_trips.sort_unstable();
        let returned = u32::try_from(round_trips.len()).unwrap_or(u32::MAX);
        (self.packets_sent, self.packets_returned) = (sent, returned);
        self.round_trip_ms = (returned > 0).then(|| milliseconds(median(&round_trips)));
        let outcome = match returned {
            0 => Outcome::Failed,
            _ if returned < sent => Outcome::Lossy,
            _ => Outcome::Ok,
        };
        self.note("relay", outcome, took, format!("{returned} of {sent} packets back, {}", spread(&round_trips)));
        if returned == 0 {
            let hint = "the allocations stand, the media does not pass: look at the relay's address, its firewall and \
                        its peer policy";
            (self.ok, self.exit, self.hint) = (false, Some(Exit::Unhealthy), Some(hint));
            return None;
        }
        Some(())
    }

    fn note(&mut self, name: &'static str, outcome: Outcome, took: Duration, detail: String) {
        let detail = units::printable(&detail);
        self.steps.push(Step { name, outcome, ms: milliseconds(took), detail, took });
    }
}
