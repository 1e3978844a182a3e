//! A Turnpike relay: arguments, wiring, exit codes.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use relay_node::config::{self, Arguments, Settings};
use relay_node::control::{Control, Ended};
use relay_node::dataplane::Dataplane;
use relay_node::health::{self, Status};
use relay_node::state_directory::StateDirectory;
use relay_node::{journal, log, metrics};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use turn_core::KeyRing;

/// Wrong usage of the command line.
const EX_USAGE: u8 = 2;
/// Wrong configuration (sysexits.h).
const EX_CONFIG: u8 = 78;
/// How long a relay without a journal waits for the store's records before it serves.
const RESTORE_PATIENCE: Duration = Duration::from_secs(2);
/// How long tasks of the control plane may take to end.
const LINGER: Duration = Duration::from_millis(500);

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "before there is a log")]
fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) if error.use_stderr() => {
            let text = error.to_string();
            let line = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
            eprintln!("relay-node: {line}; relay-node --help lists what there is");
            return EX_USAGE.into();
        }
        Err(help) => {
            // A reader that has seen enough (`| head`) is no error.
            let _ = help.print();
            return ExitCode::SUCCESS;
        }
    };
    let settings = match config::load(&arguments) {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("relay-node: {error}");
            return EX_CONFIG.into();
        }
    };
    if arguments.check_config {
        println!("ok: relay {} at {}", settings.node_id, settings.relay_address);
        return ExitCode::SUCCESS;
    }
    log::start(&settings);
    run(settings).unwrap_or_else(|error| {
        tracing::error!("{error:#}");
        ExitCode::FAILURE
    })
}

fn run(settings: Settings) -> anyhow::Result<ExitCode> {
    // The control plane has threads of its own: never a worker's.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("control").enable_all().build()?;
    let result = runtime.block_on(serve(settings));
    runtime.shutdown_timeout(LINGER);
    let (code, dataplane) = result?;
    if let Some(dataplane) = Arc::into_inner(dataplane) {
        dataplane.stop();
    }
    Ok(code)
}

async fn serve(settings: Settings) -> anyhow::Result<(ExitCode, Arc<Dataplane>)> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let state = StateDirectory::open(&settings.state_dir, &settings.node_id)?;
    let status = Arc::new(Status::default());
    let recorder = metrics::install()?;
    if let Some(address) = settings.http {
        let listener = health::bind(address).await?;
        tokio::spawn(health::serve(listener, Arc::clone(&status), recorder));
    }
    settings.warn_of_ephemeral_ports();

    // The lock on the state directory proves every earlier process dead: its ownership ends here.
    let epoch = state.next_epoch()?;
    let journal = state.journal();
    let loaded = journal::load(&journal, &KeyRing::default())
        .with_context(|| format!("state_dir: cannot read the journal in {}", journal.display()))?;
    metrics::restored(metrics::Source::Journal, loaded.records.len(), loaded.refused);
    let mut records = loaded.records;
    let mut control = Control::new(&settings, state, epoch, Arc::clone(&status))?;
    match control.join(RESTORE_PATIENCE).await {
        Ok(stored) => records.extend(stored),
        Err(ended) => anyhow::bail!("{ended}"),
    }

    let restored = records.len();
    let mut config = settings.dataplane(control.epoch(), journal, control.user_quota());
    config.streams.web_server = settings.streams.web_server(tokio::runtime::Handle::current());
    if let Some(certificates) = &settings.streams.certificates {
        tokio::spawn(Arc::clone(certificates).watch());
    }
    let (dataplane, changes) = Dataplane::start(config, control.turn_settings(), records)?;
    let dataplane = Arc::new(dataplane);
    status.serves(&dataplane);
    tracing::info!(
        node = settings.node_id,
        region = settings.region,
        address = %settings.relay_address,
        listen = %settings.listen_text(),
        workers = settings.workers,
        restored,
        refused = loaded.refused,
        "ready"
    );

    let publisher = tokio::spawn(metrics::publish_each_second(Arc::downgrade(&dataplane)));
    let (stop, stopped) = oneshot::channel();
    let mut control = tokio::spawn(control.run(Arc::clone(&dataplane), changes, stopped));
    let ended = tokio::select! {
        ended = &mut control => ended?,
        _ = terminate.recv() => stop_control(stop, control).await?,
        _ = interrupt.recv() => stop_control(stop, control).await?,
    };
    publisher.abort();
    match ended {
        Ended::Stopped => {
            tracing::info!("stopped; allocations are kept in the journal");
            Ok((ExitCode::SUCCESS, dataplane))
        }
        Ended::Superseded { .. } => {
            tracing::error!("{ended}");
            Ok((ExitCode::FAILURE, dataplane))
        }
    }
}

async fn stop_control(stop: oneshot::Sender<()>, control: tokio::task::JoinHandle<Ended>) -> anyhow::Result<Ended> {
    // Fails only when the session has ended by itself just now.
    let _ = stop.send(());
    Ok(control.await?)
}
