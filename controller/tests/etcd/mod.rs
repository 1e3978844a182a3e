//! A real etcd of one member on loopback, and a proxy in front of it that can hold or cut connections.
// Each test binary uses a part of this.
#![allow(dead_code)]

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// A running (or killed) etcd; its process ends with this.
pub(crate) struct Etcd {
    process: Option<Child>,
    directory: TempDir,
    client: SocketAddr,
    peer: SocketAddr,
    extra: Extra,
}

/// How an etcd differs from the plainest one.
#[derive(Clone, Default)]
pub(crate) struct Extra {
    /// More arguments.
    pub(crate) arguments: Vec<String>,
    /// Set if it serves TLS: how the harness itself connects.
    pub(crate) tls: Option<etcd_client::TlsOptions>,
}

impl Etcd {
    pub(crate) async fn start() -> Self {
        Self::start_with(Extra::default()).await
    }

    pub(crate) async fn start_with(extra: Extra) -> Self {
        // Ports are free when asked for; should another process be faster, take others.
        for _ in 0..5 {
            let mut etcd = Self {
                process: None,
                directory: tempfile::tempdir().expect("a directory"),
                client: free_address(),
                peer: free_address(),
                extra: extra.clone(),
            };
            if etcd.start_again().await {
                return etcd;
            }
        }
        panic!("etcd does not start; is the package etcd-server installed?");
    }

    /// Starts the process on the same data; false if it ended or does not answer in 20 s.
    pub(crate) async fn start_again(&mut self) -> bool {
        let log = std::fs::File::create(self.directory.path().join("log")).expect("a log file");
        let client = self.endpoint();
        let peer = format!("http://{}", self.peer);
        let data = self.directory.path().join("data");
        let process = Command::new("etcd")
            .args(["--name", "one", "--log-level", "error", "--data-dir"])
            .arg(data)
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("one={peer}")])
            .args(&self.extra.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("etcd, from Debian's etcd-server");
        let process = self.process.insert(process);
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if process.try_wait().expect("a child").is_some() {
                return false;
            }
            if let Ok(mut connected) = etcd_client::Client::connect([client.as_str()], self.extra.options()).await
                && is_answer(&connected.get("health", None).await)
            {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        false
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().expect("our child");
            process.wait().expect("our child");
        }
    }

    pub(crate) fn endpoint(&self) -> String {
        let scheme = if self.extra.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.client)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.client
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A client of its own, beside the store under test.
    pub(crate) async fn client(&self) -> etcd_client::Client {
        etcd_client::Client::connect([self.endpoint()], self.extra.options()).await.expect("etcd")
    }
}

impl Extra {
    fn options(&self) -> Option<etcd_client::ConnectOptions> {
        self.tls.clone().map(|tls| etcd_client::ConnectOptions::new().with_tls(tls))
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What a proxy does with bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Mode {
    /// Passes them.
    Pass,
    /// Keeps them back.
    Hold,
    /// Ends connections and takes none.
    Cut,
}

/// A TCP proxy that ends with this.
pub(crate) struct Proxy {
    address: SocketAddr,
    mode: watch::Sender<Mode>,
    held: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    pub(crate) async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let address = listener.local_addr().expect("bound");
        let (mode, modes) = watch::channel(Mode::Pass);
        let held = Arc::new(AtomicUsize::new(0));
        let counter = held.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.expect("loopback");
                if *modes.borrow() != Mode::Cut
                    && let Ok(server) = TcpStream::connect(target).await
                {
                    connections.spawn(join(client, server, modes.clone(), counter.clone()));
                }
            }
        });
        Self { address, mode, held, _tasks: tasks }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// How often bytes of a client were held back.
    pub(crate) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    pub(crate) fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

async fn join(client: TcpStream, server: TcpStream, modes: watch::Receiver<Mode>, held: Arc<AtomicUsize>) {
    let unheard = AtomicUsize::new(0);
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let pass = async {
        tokio::join!(
            copy(from_client, to_server, modes.clone(), &held),
            copy(from_server, to_client, modes.clone(), &unheard)
        );
    };
    let mut watched = modes.clone();
    tokio::select! {
        () = pass => {}
        _ = watched.wait_for(|mode| *mode == Mode::Cut) => {}
    }
}

async fn copy(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut modes: watch::Receiver<Mode>,
    held: &AtomicUsize,
) {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(n) => {
                if *modes.borrow() == Mode::Hold {
                    held.fetch_add(1, Ordering::Relaxed);
                }
                if modes.wait_for(|mode| *mode != Mode::Hold).await.is_err() {
                    return;
                }
                if to.write_all(&buffer[..n]).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Once there are users, the harness is none: a refusal is an answer, too.
fn is_answer<T>(answer: &Result<T, etcd_client::Error>) -> bool {
    match answer {
        Ok(_) => true,
        Err(etcd_client::Error::GRpcStatus(status)) => {
            matches!(status.code(), tonic::Code::InvalidArgument | tonic::Code::PermissionDenied)
        }
        Err(_) => false,
    }
}

fn free_address() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback");
    listener.local_addr().expect("bound")
}
