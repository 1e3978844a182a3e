//! Real etcds on loopback, of one member or three, and a proxy in front of them that can hold or cut connections.
// Each test binary uses a part of this.
#![allow(dead_code, unused_imports, unused_macros)]

mod trio;

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use controller::store::{EtcdOptions, EtcdStore, Store};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

pub(crate) use self::trio::Trio;

/// Each test of the module `on_any_store` beside the call, against the embedded store and against a real etcd of its own.
macro_rules! on_both_stores {
    ($($test:ident),+ $(,)?) => {
        mod embedded {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $test() {
                super::on_any_store::$test(std::sync::Arc::new(controller::store::EmbeddedStore::in_memory())).await;
            })+
        }
        mod etcd_for_real {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $test() {
                let etcd = super::etcd::Etcd::start().await;
                super::on_any_store::$test(super::etcd::connect(&etcd.endpoint()).await).await;
            })+
        }
    };
}
pub(crate) use on_both_stores;

/// The store of a controller whose configuration names this endpoint.
pub(crate) async fn connect(endpoint: &str) -> Arc<dyn Store> {
    connect_to(vec![endpoint.to_owned()]).await
}

/// As [`connect`], with several.
pub(crate) async fn connect_to(endpoints: Vec<String>) -> Arc<dyn Store> {
    let options = EtcdOptions { endpoints, prefix: "turnpike/".to_owned(), ..EtcdOptions::default() };
    Arc::new(EtcdStore::connect(options).await.expect("etcd answers"))
}

/// A running (or killed) etcd; its process ends with this.
pub(crate) struct Etcd {
    process: Option<Child>,
    directory: TempDir,
    client: SocketAddr,
    peer: SocketAddr,
    name: &'static str,
    /// All members, `name=peer URL`, comma separated; empty: it is alone.
    cluster: String,
    extra: Extra,
}

/// How an etcd differs from the plainest one.
#[derive(Clone, Default)]
pub(crate) struct Extra {
    /// More arguments.
    pub(crate) arguments: Vec<String>,
    /// The program; Debian's if there is none.
    pub(crate) program: Option<std::path::PathBuf>,
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
            let mut etcd = Self::new("one", extra.clone());
            if etcd.start_again().await {
                return etcd;
            }
        }
        panic!("etcd does not start; is the package etcd-server installed?");
    }

    fn new(name: &'static str, extra: Extra) -> Self {
        Self {
            process: None,
            directory: tempfile::tempdir().expect("a directory"),
            client: free_address(),
            peer: free_address(),
            name,
            cluster: String::new(),
            extra,
        }
    }

    /// Starts the process on the same data; false if it ended or does not answer in 20 s.
    pub(crate) async fn start_again(&mut self) -> bool {
        self.spawn();
        self.answers().await
    }

    fn peer_url(&self) -> String {
        format!("http://{}", self.peer)
    }

    fn spawn(&mut self) {
        let log = std::fs::File::create(self.directory.path().join("log")).expect("a log file");
        let (client, peer) = (self.endpoint(), self.peer_url());
        let alone = format!("{}={peer}", self.name);
        let data = self.directory.path().join("data");
        let program = self.extra.program.as_deref().unwrap_or(Path::new("etcd"));
        let process = Command::new(program)
            .args(["--name", self.name, "--log-level", "error", "--data-dir"])
            .arg(data)
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", if self.cluster.is_empty() { &alone } else { &self.cluster }])
            .args(&self.extra.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("etcd, from Debian's etcd-server");
        self.process = Some(process);
    }

    /// False if the process ends or does not answer in 20 s.
    async fn answers(&mut self) -> bool {
        let Some(mut process) = self.process.take() else {
            return false;
        };
        let answers = self.answers_while(&mut process).await;
        self.process = Some(process);
        answers
    }

    async fn answers_while(&self, process: &mut Child) -> bool {
        let client = self.endpoint();
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

    /// SIGSTOP, or SIGCONT: it hangs, its connections stay.
    pub(crate) fn freeze(&self, frozen: bool) {
        let process = self.process.as_ref().expect("it runs").id().to_string();
        let signal = if frozen { "-STOP" } else { "-CONT" };
        assert!(Command::new("kill").args([signal, &process]).status().expect("kill, from procps").success());
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
    /// An etcd 3.5, where the environment names one.
    pub(crate) fn newer() -> Option<Self> {
        let program = std::env::var_os("TURNPIKE_ETCD_3_5")?;
        Some(Self { program: Some(program.into()), ..Self::default() })
    }

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
