//! Workers put together by hand, where a running data plane would not show what happens inside.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use turn_core::client::{Client, ClientConfig, Event};
use turn_core::{Key, KeyRing, StaticUser, Transport};

use super::*;
use crate::dataplane::commands::Command;
use crate::dataplane::{Beginning, Dataplane, changes, listen, sample};
use crate::journal::{Ends, Journal, Succession};
use crate::sys::epoll::Readiness;

const PATIENCE: Duration = Duration::from_secs(20);

fn config(ip: &str, workers: u16, journal: &Path) -> DataplaneConfig {
    DataplaneConfig { stream_send_cap: 10_000, max_connections: 10, ..sample::config(ip, workers, journal) }
}

fn settings() -> Arc<Settings> {
    Arc::new(Settings {
        realm: "test".into(),
        nonce_keys: KeyRing(vec![Key { id: 1, secret: vec![7; 32] }]),
        static_users: vec![StaticUser { username: b"alice".into(), password: b"secret".into() }],
        ..Settings::default()
    })
}

fn client() -> Client {
    Client::new(ClientConfig {
        transport: Transport::Udp,
        username: b"alice".into(),
        password: b"secret".into(),
        family: None,
        lifetime: None,
        seed: [3; 32],
    })
}

/// Asks until there is an answer.
fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Some(answer) = ask() {
            return Ok(answer);
        }
        thread::sleep(Duration::from_millis(1));
    }
    bail!("not within {PATIENCE:?}: {what}")
}

/// The first worker of a configuration, not running. The rest keeps its channels open.
fn first_worker(config: &DataplaneConfig) -> Result<(Setup, SocketAddr, Starting)> {
    let mut listeners = listen::open(&config.listen, config.workers, false)?;
    let address = listeners[0][0].address;
    let (changes, _) = changes::queues(config.workers.into(), &Arc::default());
    let mut starting = Starting::new(config, &listeners[0], changes)?;
    let setup = starting.set_up(config, &settings(), listeners.remove(0))?;
    Ok((setup, address, starting))
}

/// Binding requests of several clients are answered although every one of them lands at another worker's socket.
#[test]
fn packets_that_land_wrong_cross_to_their_worker_and_back() -> Result<()> {
    const CLIENTS: u64 = 30;
    let directory = tempfile::tempdir()?;
    let config = config("127.1.3.1", 3, directory.path());
    let mut listeners = listen::open(&config.listen, config.workers, false)?;
    let listen = addresses(&listeners[0]);
    let overflow = Arc::default();
    let (changes, _receiver) = changes::queues(config.workers.into(), &overflow);
    let mut starting = Starting::new(&config, &listeners[0], changes)?;
    listeners.rotate_left(1);
    for listeners in listeners {
        starting.spawn(&config, &settings(), listeners)?;
    }
    let dataplane = Dataplane {
        workers: std::mem::take(&mut starting.handles),
        listen,
        journal: config.journal.clone(),
        ends: Arc::new(Ends::new(false)),
        registry: Arc::clone(&starting.registry),
        routes: Arc::clone(&starting.routes),
        overflow,
        fence: Arc::clone(&starting.fence),
        accounts: Arc::clone(&starting.accounts),
    };
    let (records, ended) = (Vec::new(), Vec::new());
    dataplane.begin(Beginning { epoch: 1, settings: settings(), user_quota: 0, records, ended })?;
    for _ in 0..CLIENTS {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        socket.connect(dataplane.listen()[0].bind)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let mut client = client();
        client.binding(Instant::now());
        socket.send(&client.poll_transmit().context("a request")?)?;
        let mut buffer = [0; 512];
        let length = socket.recv(&mut buffer)?;
        client.handle_packet(Instant::now(), &buffer[..length]);
        assert_eq!(client.poll_event(), Some(Event::Reflexive(socket.local_addr()?)));
    }
    eventually("every packet is counted", || {
        let crossed: u64 = dataplane.snapshots().iter().map(|worker| worker.crossed).sum();
        (crossed == CLIENTS).then_some(())
    })?;
    Ok(())
}

/// The calling thread, as /proc shows it.
fn this_thread() -> io::Result<PathBuf> {
    Ok(Path::new("/proc").join(fs::read_link("/proc/thread-self")?))
}

/// Whether a thread is within write(2).
fn is_writing(thread: &Path) -> bool {
    let writing = format!("{} ", libc::SYS_write);
    fs::read_to_string(thread.join("syscall")).is_ok_and(|call| call.starts_with(&writing))
}

/// A write to the journal that does not return holds the answer back.
#[test]
fn no_success_leaves_before_the_journal_has_it() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (setup, address, starting) = first_worker(&config("127.1.3.2", 1, directory.path()))?;
    let succession = Succession::begin(directory.path(), 1, Arc::new(Ends::new(false)))?;
    let (mut reader, mut writer) = io::pipe()?;
    let file = File::from(OwnedFd::from(writer.try_clone()?));
    let (threads, thread_of) = mpsc::channel();
    let filler = thread::spawn({
        let threads = threads.clone();
        move || {
            // More than any pipe holds.
            threads.send(this_thread()).map_or(Ok(()), |()| writer.write_all(&vec![0; 8 << 20]))
        }
    });
    let filling = thread_of.recv()??;
    eventually("the pipe is full", || is_writing(&filling).then_some(()))?;
    let worker = thread::spawn(move || {
        let mut worker = Worker::new(setup);
        worker.keep_journal(|_| Journal::of_file(succession, file));
        let told = threads.send(this_thread());
        worker.run().map(|()| told.is_ok())
    });
    let working = thread_of.recv()??;

    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.connect(address)?;
    socket.set_nonblocking(true)?;
    let (mut client, mut buffer) = (client(), [0; 1024]);
    client.allocate(Instant::now());
    let mut receive = |client: &mut Client| {
        if let Ok(length) = socket.recv(&mut buffer) {
            client.handle_packet(Instant::now(), &buffer[..length]);
        }
        while let Some(packet) = client.poll_transmit() {
            socket.send(&packet).ok()?;
        }
        client.poll_event()
    };
    let outcome = eventually("the worker writes its journal", || match receive(&mut client) {
        Some(event) => Some(ControlFlow::Break(event)),
        None if is_writing(&working) => Some(ControlFlow::Continue(())),
        None => None,
    })?;
    assert_eq!(outcome, ControlFlow::Continue(()), "answered, not journaled");
    assert_eq!(receive(&mut client), None, "answered, not journaled");

    let drain = thread::spawn(move || io::copy(&mut reader, &mut io::sink()));
    let allocated = eventually("the answer", || receive(&mut client))?;
    assert!(matches!(allocated, Event::Allocated { .. }), "{allocated:?}");
    starting.handles[0].commands.send(Command::Stop).map_err(|_| anyhow!("the worker is gone"))?;
    starting.handles[0].waker.wake();
    assert!(worker.join().expect("no panic")?);
    assert!(filler.join().expect("no panic").is_ok());
    drain.join().expect("no panic")?;
    Ok(())
}

#[test]
fn connections_of_no_use_end_after_half_a_minute() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (setup, _, _starting) = first_worker(&config("127.1.3.3", 1, directory.path()))?;
    let mut worker = Worker::new(setup);
    let address = worker.listeners[1].address;
    let mut silent = TcpStream::connect(address)?;
    worker.accept(1);
    let mut chatty = TcpStream::connect(address)?;
    worker.accept(1);
    assert_eq!(worker.streams.open(), 2);

    let pass = |worker: &mut Worker, seconds| {
        worker.now.mono += Duration::from_secs(seconds);
        worker.end_idle_connections();
        worker.finish_turn();
        worker.streams.open()
    };
    assert_eq!(pass(&mut worker, 29), 2);
    let mut client = client();
    client.binding(Instant::now());
    chatty.write_all(&client.poll_transmit().context("a request")?)?;
    // Places are given in the order of acceptance.
    worker.on_connection(1, Readiness { token: 0, readable: true, writable: false, error: false });
    assert_eq!(pass(&mut worker, 1), 1);
    silent.set_read_timeout(Some(PATIENCE))?;
    assert_eq!(silent.read(&mut [0; 8])?, 0, "the client is told");
    chatty.set_read_timeout(Some(PATIENCE))?;
    assert_eq!(chatty.read(&mut [0; 2])?, 2, "answered and open");
    assert_eq!(pass(&mut worker, 30), 0);
    Ok(())
}
