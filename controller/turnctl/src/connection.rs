//! From options, environment and context to a channel to a controller.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use tonic::Status;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use crate::contexts::{self, Context, Contexts};
use crate::failure::{Exit, Failure, Result, exit_of};
use crate::pki::{CONTROLLER_NAME, Facts};

/// A controller that has not answered by then is passed over.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Which cluster, and as whom.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Connection")]
pub(crate) struct ConnectionOptions {
    /// Context to use instead of the current one
    #[arg(long, global = true, env = "TURNCTL_CONTEXT", value_name = "NAME", hide_env = true)]
    pub(crate) context: Option<String>,
    /// Controller, https://HOST:PORT; several are tried in turn
    #[arg(
        long = "controller",
        global = true,
        env = "TURNCTL_CONTROLLER",
        value_name = "URL",
        value_delimiter = ',',
        hide_env = true
    )]
    pub(crate) controllers: Vec<String>,
    /// Certificate of the authority that controllers must come from
    #[arg(long, global = true, env = "TURNCTL_CA", value_name = "FILE", hide_env = true)]
    pub(crate) ca: Option<PathBuf>,
    /// Your certificate
    #[arg(long, global = true, env = "TURNCTL_CERT", value_name = "FILE", hide_env = true)]
    pub(crate) cert: Option<PathBuf>,
    /// The key of your certificate
    #[arg(long, global = true, env = "TURNCTL_KEY", value_name = "FILE", hide_env = true)]
    pub(crate) key: Option<PathBuf>,
    /// Configuration file [default: ~/.config/turnpike/config.toml]
    #[arg(long, global = true, env = "TURNCTL_CONFIG", value_name = "FILE", hide_env = true)]
    pub(crate) config: Option<PathBuf>,
}

impl ConnectionOptions {
    /// The context that remains when options stand over the file; its paths are usable from here.
    pub(crate) fn resolve(&self) -> Result<Context> {
        let mut target = Context::default();
        let complete = !self.controllers.is_empty() && self.ca.is_some() && self.cert.is_some() && self.key.is_some();
        // A broken file is no obstacle to somebody who does not need it.
        if !complete || self.context.is_some() {
            let file = contexts::location(self.config.as_deref())?;
            let contexts = Contexts::load(&file)?;
            if let Some(name) = self.context.as_ref().or(contexts.current.as_ref()) {
                let beside = file.parent().unwrap_or(Path::new(""));
                let context = contexts.named(name)?.clone();
                target = Context {
                    ca: beside.join(context.ca),
                    certificate: beside.join(context.certificate),
                    key: beside.join(context.key),
                    controllers: context.controllers,
                };
            }
        }
        if !self.controllers.is_empty() {
            target.controllers.clone_from(&self.controllers);
        }
        for (place, given) in
            [(&mut target.ca, &self.ca), (&mut target.certificate, &self.cert), (&mut target.key, &self.key)]
        {
            if let Some(given) = given {
                place.clone_from(given);
            }
        }
        for (missing, option) in [
            (target.controllers.is_empty(), "--controller"),
            (target.ca.as_os_str().is_empty(), "--ca"),
            (target.certificate.as_os_str().is_empty(), "--cert"),
            (target.key.as_os_str().is_empty(), "--key"),
        ] {
            if missing {
                let remedy = format!("give {option}, or choose a cluster with 'turnctl context use'");
                return Err(Failure::usage("no cluster to talk to").remedy(remedy));
            }
        }
        Ok(target)
    }

    /// Connects to the first controller that takes us.
    pub(crate) async fn connect(&self) -> Result<Cluster> {
        let target = self.resolve()?;
        let certificate = read("certificate", &target.certificate)?;
        let facts = Facts::from_pem(&certificate)
            .map_err(|error| Failure::usage(format!("{}: {error}", target.certificate.display())))?;
        let identity = facts.identity.map_or_else(|| "unknown to this cluster".into(), |identity| identity.to_string());
        if facts.not_after <= time::OffsetDateTime::now_utc() {
            let file = target.certificate.display();
            return Err(Failure::usage(format!("the certificate {file} expired on {}", facts.not_after.date()))
                .remedy("have a new one made with 'turnctl ca issue'"));
        }
        let tls = ClientTlsConfig::new()
            .domain_name(CONTROLLER_NAME)
            .ca_certificate(Certificate::from_pem(read("certificate authority", &target.ca)?))
            .identity(tonic::transport::Identity::from_pem(certificate, read("key", &target.key)?));

        let mut reasons = Vec::new();
        for controller in &target.controllers {
            let endpoint = endpoint(controller, &tls, &target)?;
            // The endpoint's own limit ends with TCP; the kernel answers that for a process that hangs.
            match tokio::time::timeout(CONNECT_TIMEOUT, endpoint.connect()).await {
                Ok(Ok(channel)) => {
                    return Ok(Cluster { channel, controller: controller.clone(), identity });
                }
                Ok(Err(error)) => reasons.push((controller, Reason::of(&error))),
                Err(_) => reasons.push((controller, Reason::TimedOut)),
            }
        }
        let all: Vec<_> = reasons.iter().map(|(controller, reason)| format!("{controller}: {reason}")).collect();
        let remedy = reasons.first().map_or(Reason::Other(String::new()), |(_, reason)| reason.clone()).remedy(&target);
        Err(Failure::new(Exit::Unreachable, format!("cannot reach a controller ({})", all.join(", "))).remedy(remedy))
    }
}

fn read(what: &str, file: &Path) -> Result<String> {
    std::fs::read_to_string(file)
        .map_err(|error| Failure::usage(format!("cannot read the {what} {}: {error}", file.display())))
}

fn endpoint(controller: &str, tls: &ClientTlsConfig, target: &Context) -> Result<Endpoint> {
    let wrong =
        || Failure::usage(format!("'{controller}' is not a controller's address")).remedy("write https://HOST:PORT");
    let url = match controller.split_once("://") {
        None => format!("https://{controller}"),
        Some(("https", _)) => controller.to_owned(),
        Some(_) => return Err(wrong()),
    };
    let endpoint = Endpoint::from_shared(url).map_err(|_| wrong())?;
    if endpoint.uri().port().is_none() {
        return Err(wrong());
    }
    let endpoint = endpoint.connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true).tls_config(tls.clone());
    endpoint.map_err(|error| {
        let files = format!("{}, {}", target.certificate.display(), target.key.display());
        Failure::usage(format!("cannot use the certificate and key ({files}): {}", innermost(&error)))
    })
}

/// Why a controller could not be talked to.
#[derive(Clone, Debug)]
enum Reason {
    Refused,
    TimedOut,
    /// Its certificate is not what we trust.
    Untrusted(String),
    /// It does not take ours.
    Rejected(String),
    Other(String),
}

impl Reason {
    fn of(error: &(dyn Error + 'static)) -> Self {
        let mut next = Some(error);
        while let Some(error) = next {
            // An I/O error that wraps another has it as its inner error, not as its source.
            let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
            let tls = error.downcast_ref::<rustls::Error>();
            match tls.or_else(|| inner.and_then(|inner| inner.downcast_ref())) {
                Some(rustls::Error::AlertReceived(alert)) => return Self::Rejected(format!("{alert:?}")),
                Some(tls) => return Self::Untrusted(tls.to_string()),
                None => {}
            }
            match error.downcast_ref::<io::Error>().map(io::Error::kind) {
                Some(io::ErrorKind::ConnectionRefused) => return Self::Refused,
                Some(io::ErrorKind::TimedOut) => return Self::TimedOut,
                _ => {}
            }
            next = error.source();
        }
        Self::Other(innermost(error))
    }

    fn remedy(&self, target: &Context) -> String {
        match self {
            Self::Refused | Self::TimedOut => "is it running, and is the address right?".into(),
            Self::Untrusted(_) => format!("is {} the authority of this cluster?", target.ca.display()),
            Self::Rejected(_) => {
                format!("is {} a certificate of this cluster, and still valid?", target.certificate.display())
            }
            Self::Other(_) => "look at the controller's log".into(),
        }
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Refused => f.write_str("connection refused"),
            Self::TimedOut => f.write_str("no answer"),
            Self::Untrusted(why) => write!(f, "its certificate is not trusted: {why}"),
            Self::Rejected(why) => write!(f, "it refuses our certificate: {why}"),
            Self::Other(why) => f.write_str(why),
        }
    }
}

fn innermost(error: &(dyn Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// A controller that answered, and who we are to it.
#[derive(Clone, Debug)]
pub(crate) struct Cluster {
    pub(crate) channel: Channel,
    pub(crate) controller: String,
    /// Our identity, for the message that it is not enough.
    identity: String,
}

impl Cluster {
    /// Turns a refused call into what the user reads. `what` goes on after "cannot".
    pub(crate) fn failure(&self, what: &str, status: &Status) -> Failure {
        // A status with a source was made on this side: the answer never came. A server that refuses our certificate
        // says so only now, after the handshake as TLS 1.3 has it, and its alert loses the race against our request.
        if let Some(source) = status.source() {
            let (reason, controller, identity) = (Reason::of(source), &self.controller, &self.identity);
            return Failure::new(Exit::Unreachable, format!("cannot {what}: {controller}: {reason}")).remedy(format!(
                "it is stopping, or it refuses your certificate ({identity}): is that of this cluster, and still valid?"
            ));
        }
        let failure = Failure::new(exit_of(status.code()), format!("cannot {what}: {}", message(status)));
        match status.code() {
            tonic::Code::PermissionDenied | tonic::Code::Unauthenticated => {
                failure.remedy(format!("you are {}: choose another context or certificate", self.identity))
            }
            tonic::Code::Unavailable => failure.remedy("'turnctl status' says more"),
            _ => failure,
        }
    }
}

fn message(status: &Status) -> String {
    if status.message().is_empty() { status.code().description().to_owned() } else { status.message().to_owned() }
}
