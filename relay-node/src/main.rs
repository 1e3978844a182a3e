//! A Turnpike relay: arguments, wiring, exit codes.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use relay_node::address::Keeper;
use relay_node::config::{self, Arguments, ConfigError, Settings};
use relay_node::control::restore::Merged;
use relay_node::control::{Control, Drain, Ended, StandingWatch, interlink};
use relay_node::dataplane::{Beginning, Dataplane, FenceReason};
use relay_node::health::{self, Status};
use relay_node::state_directory::StateDirectory;
use relay_node::sys::heap::give_back_large_blocks;
use relay_node::{journal, kubernetes, log, metrics};
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::timeout;
use turn_core::KeyRing;

/// Wrong usage of the command line.
const EX_USAGE: u8 = 2;
/// Wrong configuration (sysexits.h).
const EX_CONFIG: u8 = 78;
/// How long tasks of the control plane may take to end.
const LINGER: Duration = Duration::from_millis(500);

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "before there is a log")]
fn main() -> ExitCode {
    give_back_large_blocks();
    // Before anything else: whoever is told to stop while it starts ends in order, too.
    let (runtime, mut told) = match begin() {
        Ok(begun) => begun,
        Err(error) => {
            eprintln!("relay-node: cannot start threads or catch signals: {error}");
            return ExitCode::FAILURE;
        }
    };
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
    let checks = arguments.check_config;
    let settings = match runtime.block_on(load(arguments, &mut told)) {
        Some(Ok(settings)) => settings,
        Some(Err(error)) => {
            eprintln!("relay-node: {error}");
            return EX_CONFIG.into();
        }
        None => {
            eprintln!("relay-node: told to stop before it knew its configuration");
            // What still waits for an answer ends with the process.
            runtime.shutdown_background();
            return if checks { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    if checks {
        println!("ok: relay {} at {}", settings.node_id, settings.relay_address);
        return ExitCode::SUCCESS;
    }
    let traces = match log::start(&settings) {
        Ok(traces) => traces,
        Err(error) => {
            eprintln!("relay-node: otlp_endpoint: {error}");
            return EX_CONFIG.into();
        }
    };
    let code = run(runtime, settings, told).unwrap_or_else(|error| {
        tracing::error!("{error:#}");
        ExitCode::FAILURE
    });
    if let Some(traces) = traces {
        traces.shut_down();
    }
    code
}

/// The threads of the control plane, which are never a worker's, and the signals.
fn begin() -> std::io::Result<(Runtime, Told)> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("control").enable_all().build()?;
    let told = {
        let _entered = runtime.enter();
        Told { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? }
    };
    Ok((runtime, told))
}

/// The configuration; none where it was told to stop meanwhile: an API server may keep it waiting.
async fn load(arguments: Arguments, told: &mut Told) -> Option<Result<Settings, ConfigError>> {
    let loading = tokio::task::spawn_blocking(move || config::load(&arguments));
    tokio::select! {
        loaded = loading => Some(loaded.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic()))),
        () = told.stop() => None,
    }
}

fn run(runtime: Runtime, settings: Settings, told: Told) -> anyhow::Result<ExitCode> {
    let result = runtime.block_on(serve(settings, told));
    runtime.shutdown_timeout(LINGER);
    let (code, dataplane) = result?;
    if let Some(dataplane) = dataplane.and_then(Arc::into_inner) {
        dataplane.stop();
    }
    Ok(code)
}

/// SIGTERM and SIGINT. What comes while nobody waits for it is found by whoever waits next.
struct Told {
    terminate: Signal,
    interrupt: Signal,
}

impl Told {
    async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// What outlives the hold on the relay address: a relay that waits for it again is the same process.
struct Process {
    told: Told,
    status: Arc<Status>,
    keeper: Keeper,
}

/// How a life ended: with a data plane that is still to be stopped, if it ever began.
enum End {
    /// The process ends.
    Exit(ExitCode, Option<Arc<Dataplane>>),
    /// Another node has the address; this one waits for it again.
    Again(Option<Arc<Dataplane>>),
}

async fn serve(settings: Settings, told: Told) -> anyhow::Result<(ExitCode, Option<Arc<Dataplane>>)> {
    let mut state = StateDirectory::open(&settings.state_dir, &settings.node_id)?;
    if let Some((_, facts)) = &settings.kubernetes
        && let Err(error) = kubernetes::keep(&settings.state_dir, facts)
    {
        tracing::warn!("state_dir: what Kubernetes said is not kept: {error}");
    }
    let keeper = Keeper::open(&settings.address, &settings.relay_ips)?;
    let mut process = Process { told, status: Arc::new(Status::default()), keeper };
    let recorder = metrics::install()?;
    if let Some(address) = settings.http {
        let listener = health::bind(address).await?;
        tokio::spawn(health::serve(listener, Arc::clone(&process.status), recorder));
    }
    settings.warn_of_ephemeral_ports();
    loop {
        match live(&settings, state, &mut process).await? {
            End::Exit(code, dataplane) => return Ok((code, dataplane)),
            End::Again(dataplane) => {
                stop(dataplane).await?;
                // What was kept of the records is the new owner's now.
                state = StateDirectory::open(&settings.state_dir, &settings.node_id)?;
                state.disown()?;
            }
        }
    }
}

/// Ends the workers, off the threads of the control plane.
async fn stop(dataplane: Option<Arc<Dataplane>>) -> anyhow::Result<()> {
    let Some(mut shared) = dataplane else { return Ok(()) };
    let alone = loop {
        match Arc::try_unwrap(shared) {
            Ok(dataplane) => break dataplane,
            // Somebody reads its counters just now.
            Err(again) => shared = again,
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    Ok(tokio::task::spawn_blocking(|| alone.stop()).await?)
}

/// From the state directory to the end of the hold on the relay address.
async fn live(settings: &Settings, state: StateDirectory, process: &mut Process) -> anyhow::Result<End> {
    let status = &process.status;
    // The lock on the state directory proves every earlier process dead: its ownership ends here.
    let epoch = state.next_epoch()?;
    let (journal, usage) = (state.journal(), state.usage());
    let began = Instant::now();
    let drain = Arc::new(Drain::new(settings, Arc::clone(status)));
    let mut control = Control::new(settings, state, epoch, Arc::clone(status), Arc::clone(&drain))?;
    let held = tokio::select! {
        biased;
        () = process.told.stop() => None,
        held = control.await_address(&mut process.keeper) => Some(held),
    };
    let Some(held) = held else { return Ok(end_before_serving(None)) };
    held?;

    let mut config = settings.dataplane(control.epoch(), (journal.clone(), usage), control.user_quota());
    config.streams.web_server = settings.streams.web_server(tokio::runtime::Handle::current());
    if let Some(certificates) = &settings.streams.certificates {
        tokio::spawn(Arc::clone(certificates).watch());
    }
    // First the sockets, then the records, then packets are read.
    let (dataplane, changes) = Dataplane::open(config, &control.turn_settings())?;
    let dataplane = Arc::new(dataplane);
    dataplane.set_members(control.routes());
    let loaded = journal::load(&journal, &KeyRing::default())
        .with_context(|| format!("state_dir: cannot read the journal in {}", journal.display()))?;
    let damaged = loaded.refused.total();
    let restored = tokio::select! {
        biased;
        () = process.told.stop() => None,
        restored = control.restore(loaded) => Some(restored),
    };
    let Some(restored) = restored else { return Ok(end_before_serving(Some(dataplane))) };
    let Merged { records, ended, .. } = match restored {
        Ok(merged) => merged,
        Err(ended) if settings.address.waits => {
            tracing::warn!("{ended}");
            return Ok(End::Again(Some(dataplane)));
        }
        Err(ended) => anyhow::bail!("{ended}"),
    };
    let restored = records.len();
    dataplane.begin(Beginning {
        epoch: control.epoch(),
        settings: control.turn_settings(),
        user_quota: control.user_quota(),
        records,
        ended,
    })?;
    let backbone = interlink::link_up(settings, &mut control, &dataplane)?;
    drain.serves(&dataplane, control.turn_settings());
    status.serves(&dataplane);
    tracing::info!(
        node = settings.node_id,
        region = settings.region,
        address = %settings.relay_address,
        listen = %settings.listen_text(),
        workers = settings.workers,
        restored,
        refused = damaged,
        took = ?began.elapsed(),
        "ready"
    );

    let publisher = tokio::spawn(metrics::publish_each_second(Arc::downgrade(&dataplane)));
    let watch = tokio::spawn(Arc::clone(&drain).watch());
    let (stop, stopped) = oneshot::channel();
    let standing = control.standing();
    let cluster = tokio::spawn(follow_kubernetes(settings, &drain, standing.clone()));
    let mut control = tokio::spawn(control.run(Arc::clone(&dataplane), changes, stopped));
    let ended = tokio::select! {
        ended = &mut control => ended?,
        ended = process.keeper.keep(&dataplane, standing.clone()) => {
            control.abort();
            // What it held is dropped with it, the lock on the state directory too.
            let _ = control.await;
            ended
        }
        () = drain.until_end(&mut process.told.terminate, &mut process.told.interrupt) => {
            if timeout(LINGER, dataplane.end_sessions()).await.is_err() {
                tracing::warn!("a worker took too long to end its connections; they end with the process");
            }
            if standing.now().connected {
                // Whoever waits for the address takes it over at once.
                process.keeper.lower().await;
            }
            stop_control(stop, control).await?
        }
    };
    publisher.abort();
    watch.abort();
    cluster.abort();
    // Its thread says goodbye to the other members.
    tokio::task::spawn_blocking(move || drop(backbone)).await?;
    match ended {
        Ended::Stopped => {
            tracing::info!("stopped; allocations are kept in the journal");
            Ok(End::Exit(ExitCode::SUCCESS, Some(dataplane)))
        }
        ended => {
            tracing::error!("{ended}");
            // Nothing is answered from here on, whatever the rest takes.
            dataplane.fence().raise(FenceReason::Address);
            process.keeper.lower().await;
            status.stops();
            let waits = settings.address.waits;
            Ok(if waits { End::Again(Some(dataplane)) } else { End::Exit(ExitCode::FAILURE, Some(dataplane)) })
        }
    }
}

/// Follows what a relay outside a pod does not have.
fn follow_kubernetes(
    settings: &Settings,
    drain: &Arc<Drain>,
    standing: StandingWatch,
) -> impl Future<Output = ()> + use<> {
    let kubernetes = settings.kubernetes.as_ref().map(|(kubernetes, _)| kubernetes.clone());
    let endpoints = settings.controllers.as_ref().map(|controllers| controllers.endpoints.clone());
    let drain = Arc::clone(drain);
    async move {
        let Some(kubernetes) = kubernetes else { return };
        let found = kubernetes.controllers.is_some().then_some(endpoints).flatten();
        let controllers = async {
            if let Some(endpoints) = found {
                kubernetes::follow_controllers(kubernetes.clone(), endpoints, standing).await;
            }
        };
        tokio::join!(kubernetes::follow_node(kubernetes.clone(), &drain), controllers);
    }
}

/// It was told to stop before it read a packet: nobody is served by it, and what it would have restored is where it was.
fn end_before_serving(dataplane: Option<Arc<Dataplane>>) -> End {
    tracing::info!("told to stop before it served");
    End::Exit(ExitCode::SUCCESS, dataplane)
}

async fn stop_control(stop: oneshot::Sender<()>, control: tokio::task::JoinHandle<Ended>) -> anyhow::Result<Ended> {
    // Fails only when the session has ended by itself just now.
    let _ = stop.send(());
    Ok(control.await?)
}
