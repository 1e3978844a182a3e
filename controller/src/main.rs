//! Arguments, wiring and exit codes of the controller.

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use controller::api::console::Feed;
use controller::api::grpc::Switch;
use controller::config::{ConfigError, LogFormat, Settings};
use controller::dns::Listeners;
use controller::health::Health;
use controller::replica::Opener;
use controller::server::tls::ServerTls;
use controller::server::{self, Limits};
use controller::{api, audit, config, metrics, replica};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, Registry, fmt};
use turnpike_proto::trace::{self, Exporter};

/// sysexits.h: something is wrong with the configuration.
const EX_CONFIG: u8 = 78;

fn main() -> ExitCode {
    let matches = config::command().get_matches();
    let (settings, tls, opener) = match prepare(&matches) {
        Ok(prepared) => prepared,
        Err(error) => return fail(&error, EX_CONFIG),
    };
    if matches.get_flag("check-config") {
        // Nobody to tell when standard output is closed.
        let _ = writeln!(std::io::stdout(), "the configuration is good");
        return ExitCode::SUCCESS;
    }
    let traces = match start_logging(&settings) {
        Ok(traces) => traces,
        Err(error) => return fail(&error, EX_CONFIG),
    };
    let ended = run(settings, tls, opener);
    if let Some(traces) = traces {
        traces.shut_down();
    }
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&format_args!("{error:#}"), 1),
    }
}

fn prepare(matches: &clap::ArgMatches) -> Result<(Settings, Arc<ServerTls>, Opener), ConfigError> {
    let settings = config::load(matches)?;
    let tls = server::tls::load(&settings.tls, &settings.id)?;
    let opener = Opener::new(&settings.store)?;
    Ok((settings, tls, opener))
}

fn fail(error: &dyn std::fmt::Display, code: u8) -> ExitCode {
    // Nobody to tell when standard error is closed.
    let _ = writeln!(std::io::stderr(), "controller: {error}");
    ExitCode::from(code)
}

fn start_logging(settings: &Settings) -> Result<Option<Exporter>, ConfigError> {
    let exporter = trace::endpoint(settings.otlp_endpoint.as_deref())
        .map(|endpoint| Exporter::start(&endpoint, "turnpike-controller", env!("CARGO_PKG_VERSION"), &settings.id))
        .transpose()
        .map_err(|error| ConfigError::new("otlp_endpoint", error.to_string()))?;
    let mut filter = EnvFilter::new(&settings.log);
    // Who changed what is said whatever else is not, unless it is spoken of.
    if !settings.log.contains(audit::TARGET)
        && let Ok(always) = format!("{}=info", audit::TARGET).parse()
    {
        filter = filter.add_directive(always);
    }
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(colours);
    let registry = tracing_subscriber::registry().with(exporter.as_ref().map(Exporter::layer::<Registry>));
    match settings.log_format {
        LogFormat::Text => registry.with(lines.with_filter(filter)).init(),
        LogFormat::Json => registry.with(lines.json().with_filter(filter)).init(),
    }
    Ok(exporter)
}

#[tokio::main]
async fn run(settings: Settings, tls: Arc<ServerTls>, opener: Opener) -> anyhow::Result<()> {
    let prometheus = metrics::install().context("cannot record metrics")?;
    let grpc_listener = server::bind("grpc", settings.grpc).await?;
    let http_listener = server::bind("http", settings.http).await?;
    let dns_listeners = match &settings.dns {
        Some(dns) => Some((Listeners::bind(dns).await?, dns.clone())),
        None => None,
    };
    let version = env!("CARGO_PKG_VERSION");
    let (grpc, http) = (grpc_listener.local_addr()?, http_listener.local_addr()?);
    tracing::info!(id = settings.id, version, %grpc, %http, "the controller starts");
    if settings.api_keys.is_empty() {
        tracing::warn!("api_keys is empty: discovery and the console are open to all who reach the http address");
    }

    let shutdown = CancellationToken::new();
    let health = Health::default();
    let feed = Feed::new(shutdown.clone());
    let limits = Limits::default();
    let switch = Switch::new().await.context("cannot serve gRPC reflection")?;
    let grpc = server::serve_grpc(grpc_listener, tls, switch.clone(), limits, shutdown.clone());
    let grpc = tokio::spawn(grpc);
    let router = api::http(health.clone(), &settings.cors_origins, feed.clone(), prometheus.clone());
    let http = tokio::spawn(server::serve_http(http_listener, router, limits, shutdown.clone()));
    let dns = dns_listeners.map(|(listeners, dns)| {
        tracing::info!(zone = %dns.zone, addresses = ?listeners.addresses(), "DNS is served");
        tokio::spawn(listeners.serve(dns, health.clone(), shutdown.clone()))
    });
    let stop = tokio::spawn(stop_on_signal(shutdown.clone())?);

    let joined = tokio::select! {
        joined = replica::join(&opener, &settings, &health) => Some(joined?),
        () = shutdown.cancelled() => None,
    };
    if let Some(replica) = joined {
        switch.open(&replica, shutdown.clone()).await;
        health.ready(replica.clone());
        tracing::info!(
            store = replica.store_kind,
            nodes = replica.fleet.snapshot().nodes.len(),
            "the controller is ready"
        );
        let background = async {
            let close_sessions = async {
                shutdown.cancelled().await;
                // The relays go to another replica at once.
                replica.relays.close();
                replica.push.close();
            };
            tokio::join!(feed.run(replica.clone()), close_sessions);
        };
        tokio::select! {
            () = background => {}
            () = upkeep(prometheus) => {}
        }
    }
    let dns = async {
        match dns {
            Some(dns) => dns.await,
            None => Ok(()),
        }
    };
    let (grpc, http, dns, stop) = tokio::join!(grpc, http, dns, stop);
    grpc.and(http).and(dns).and(stop).context("a server broke")?;
    tracing::info!("the controller has stopped");
    Ok(())
}

/// Histograms are folded now and then, or they would grow while nobody asks for metrics.
async fn upkeep(prometheus: PrometheusHandle) {
    loop {
        tokio::time::sleep(Duration::from_secs(5)).await;
        prometheus.run_upkeep();
    }
}

/// Ends the process in order on SIGTERM or SIGINT.
fn stop_on_signal(shutdown: CancellationToken) -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("the controller stops: open calls get a few seconds");
        shutdown.cancel();
    })
}
