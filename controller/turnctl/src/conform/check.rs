//! What a check is and what can come of it.

use serde::{Deserialize, Serialize};
use turn_core::Transport;

use super::lab::Lab;

/// How binding a requirement is (RFC 2119).
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub(crate) enum Level {
    Must,
    Should,
}

impl Level {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Must => "MUST",
            Self::Should => "SHOULD",
        }
    }
}

/// How a check ended.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Outcome {
    /// The server does it.
    Pass,
    /// The server does something else.
    Fail,
    /// The requirement belongs to an extension that the server declined as its RFC says.
    NotOffered,
    /// It could not be tried here: another transport, a missing second address or user.
    NotApplicable,
}

impl Outcome {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Fail => "FAIL",
            Self::NotOffered => "not offered",
            Self::NotApplicable => "n/a",
        }
    }
}

/// Why a check ends before its end, with what was seen.
#[derive(Debug)]
pub(crate) enum Stop {
    Fail(String),
    NotOffered(String),
    NotApplicable(String),
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Self {
        Self::Fail(format!("socket: {error}"))
    }
}

/// What a step of a check gives.
pub(crate) type Step<T = ()> = Result<T, Stop>;

/// The server did something else than it should.
pub(crate) fn fail<T>(seen: impl Into<String>) -> Step<T> {
    Err(Stop::Fail(seen.into()))
}

/// The server declined properly.
pub(crate) fn not_offered<T>(seen: impl Into<String>) -> Step<T> {
    Err(Stop::NotOffered(seen.into()))
}

/// It cannot be tried here.
pub(crate) fn not_applicable<T>(why: impl Into<String>) -> Step<T> {
    Err(Stop::NotApplicable(why.into()))
}

/// Goes on if `holds`; fails with what was seen otherwise.
pub(crate) fn expect(holds: bool, seen: impl FnOnce() -> String) -> Step {
    if holds { Ok(()) } else { fail(seen()) }
}

/// Transports a check makes sense on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum On {
    Every,
    /// UDP and DTLS.
    Datagrams,
    /// TCP and TLS.
    Streams,
    Only(Transport),
}

impl On {
    pub(crate) fn includes(self, transport: Transport) -> bool {
        match self {
            Self::Every => true,
            Self::Datagrams => !transport.is_stream(),
            Self::Streams => transport.is_stream(),
            Self::Only(only) => only == transport,
        }
    }
}

/// One row of the table: what is required where, and the function that tries it.
pub(crate) struct Check {
    /// Names it, for `--only` and for comparing runs; never changes.
    pub(crate) id: &'static str,
    /// Where it is required.
    pub(crate) section: &'static str,
    pub(crate) level: Level,
    /// The requirement in one sentence.
    pub(crate) says: &'static str,
    pub(crate) run: fn(&Lab<'_>) -> Step,
    pub(crate) on: On,
    /// Runs while no other check does: it measures or exhausts what all share.
    pub(crate) alone: bool,
    /// Waits for minutes: only with `--slow`.
    pub(crate) slow: bool,
}

pub(crate) const fn must(
    id: &'static str,
    section: &'static str,
    says: &'static str,
    run: fn(&Lab<'_>) -> Step,
) -> Check {
    Check { id, section, level: Level::Must, says, run, on: On::Every, alone: false, slow: false }
}

pub(crate) const fn should(
    id: &'static str,
    section: &'static str,
    says: &'static str,
    run: fn(&Lab<'_>) -> Step,
) -> Check {
    Check { level: Level::Should, ..must(id, section, says, run) }
}

impl Check {
    pub(crate) const fn on(self, on: On) -> Self {
        Self { on, ..self }
    }

    pub(crate) const fn alone(self) -> Self {
        Self { alone: true, ..self }
    }

    pub(crate) const fn slow(self) -> Self {
        Self { slow: true, ..self }
    }
}
