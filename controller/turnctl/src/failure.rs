//! How a command ends when it does not end well: one line for people, one exit code for scripts.

use std::fmt;

use tonic::Code;

use crate::pki::PkiError;

/// What a command gives.
pub(crate) type Result<T = ()> = std::result::Result<T, Failure>;

/// Exit codes of an end before the end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// Nobody reads on, as in `turnctl ... | head`: a quiet end and no fault.
    Closed = 0,
    /// Asked and refused, or it did not work.
    Failed = 1,
    /// The command line or the configuration is wrong.
    Usage = 2,
    /// It answered, and it is not well.
    Unhealthy = 3,
    /// What was asked for does not exist.
    NotFound = 4,
    /// Nobody answered.
    Unreachable = 5,
    /// `--timeout` ran out; the code of timeout(1).
    Timeout = 124,
    /// Ctrl-C before the end of something that has one; the shell's code for it.
    Interrupted = 130,
}

/// An end other than success.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    what: String,
    remedy: Option<String>,
}

impl Failure {
    pub(crate) fn new(exit: Exit, what: impl Into<String>) -> Self {
        Self { exit, what: what.into(), remedy: None }
    }

    pub(crate) fn failed(what: impl Into<String>) -> Self {
        Self::new(Exit::Failed, what)
    }

    pub(crate) fn usage(what: impl Into<String>) -> Self {
        Self::new(Exit::Usage, what)
    }

    /// Whether the same may go well a moment later.
    pub(crate) fn is_passing(&self) -> bool {
        matches!(self.exit, Exit::Unreachable | Exit::Unhealthy)
    }

    /// Adds what to do about it.
    pub(crate) fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        self.remedy.iter().try_for_each(|remedy| write!(f, "; {remedy}"))
    }
}

impl From<PkiError> for Failure {
    fn from(error: PkiError) -> Self {
        let exit = match error {
            PkiError::Name(_) | PkiError::DnsName(_) | PkiError::Validity(_) => Exit::Usage,
            _ => Exit::Failed,
        };
        Self::new(exit, error.to_string())
    }
}

/// The exit code of a gRPC answer.
pub(crate) fn exit_of(code: Code) -> Exit {
    match code {
        Code::InvalidArgument | Code::OutOfRange => Exit::Usage,
        Code::NotFound => Exit::NotFound,
        // It answered that it cannot serve: no relay has joined, the store is away.
        Code::Unavailable => Exit::Unhealthy,
        Code::DeadlineExceeded => Exit::Timeout,
        _ => Exit::Failed,
    }
}
