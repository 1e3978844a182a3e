//! The real binary, started and looked at from outside.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// No condition here takes longer, unless it is never met.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

const SIGTERM: u32 = 15;

/// A loopback IP of this test's own, so that tests beside it and their ports are out of the way.
pub(crate) fn own_ip() -> Ipv4Addr {
    let mut random = [0; 3];
    getrandom::fill(&mut random).expect("randomness");
    Ipv4Addr::new(127, 100 + random[0] % 100, random[1], random[2] | 1)
}

/// A configuration that serves on loopback, with its state beside it.
pub(crate) fn configuration(directory: &Path, ip: Ipv4Addr, more: &str) -> String {
    format!(
        "node_id = \"eu-1\"\nregion = \"eu\"\nstate_dir = \"{}\"\nallow_loopback_peers = true\nworkers = 2\n\
         listen = [\"udp://{ip}:3478\", \"tcp://{ip}:3478\"]\nhttp = \"{ip}:9478\"\n{more}\n",
        directory.join("state").display()
    )
}

/// The binary without this process's own settings.
pub(crate) fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_relay-node"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TURNPIKE_")) {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

/// Runs it to its end.
pub(crate) fn run(command: &mut Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.output().expect("the binary runs");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (status.code().expect("it exits"), text(stdout), text(stderr))
}

/// A relay that runs; killed when dropped.
pub(crate) struct Relay {
    child: Child,
    lines: mpsc::Receiver<String>,
    /// Where it serves.
    pub(crate) ip: Ipv4Addr,
}

impl Relay {
    /// Starts it with this configuration in `directory`. It ends at once when it is told to, unless `more` says otherwise.
    pub(crate) fn start(directory: &Path, ip: Ipv4Addr, more: &str) -> Self {
        let file = directory.join("relay.toml");
        std::fs::write(&file, configuration(directory, ip, more)).expect("written");
        let mut command = command();
        if !more.contains("drain_deadline") {
            command.env("TURNPIKE_DRAIN_DEADLINE", "0");
        }
        Self::run(command.arg("--config").arg(file), ip)
    }

    /// Starts it by this command.
    pub(crate) fn run(command: &mut Command, ip: Ipv4Addr) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the binary runs");
        let log = child.stderr.take().expect("piped");
        let (told, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in std::io::BufRead::lines(std::io::BufReader::new(log)).map_while(Result::ok) {
                eprintln!("{line}");
                // The test may have heard enough.
                let _ = told.send(line);
            }
        });
        Self { child, lines, ip }
    }

    /// Bytes of memory it has (RSS).
    pub(crate) fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
        let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
        kilobytes << 10
    }

    /// Waits for a log line that holds `text`.
    pub(crate) fn log(&self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if line.contains(text) => return line,
                Ok(_) => {}
                Err(_) => panic!("no log line holds {text:?}"),
            }
        }
    }

    /// Where clients send to.
    pub(crate) fn address(&self) -> SocketAddr {
        (self.ip, 3478).into()
    }

    /// Status and body of a GET; none while nobody listens.
    pub(crate) fn get(&self, path: &str) -> Option<(u16, String)> {
        let mut stream = TcpStream::connect((self.ip, 9478)).ok()?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        Some((head.split(' ').nth(1)?.parse().ok()?, body.into()))
    }

    /// Waits until a GET is answered with this status, and returns the body.
    pub(crate) fn wait_for(&self, path: &str, status: u16) -> String {
        eventually(&format!("{path} is {status}"), || {
            self.get(path).filter(|(got, _)| *got == status).map(|(_, body)| body)
        })
    }

    /// Waits for a metric line.
    pub(crate) fn metric(&self, line: &str) {
        eventually(line, || {
            let (_, body) = self.get("/metrics")?;
            body.lines().any(|l| l == line).then_some(())
        });
    }

    /// Asks it to end, and waits.
    pub(crate) fn terminate(&mut self) -> ExitStatus {
        self.signal("TERM");
        self.wait()
    }

    /// Waits until SIGTERM no longer ends it by itself: the loader has handed over to its `main`.
    pub(crate) fn catches_signals(&self) {
        let status = format!("/proc/{}/status", self.child.id());
        eventually("it catches SIGTERM", || {
            let status = std::fs::read_to_string(&status).expect("it runs");
            let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).expect("a line");
            let caught = u64::from_str_radix(caught.trim(), 16).expect("a bit for each signal");
            ((caught >> (SIGTERM - 1)) & 1 == 1).then_some(())
        });
    }

    /// Sends it this signal.
    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status();
        assert!(sent.is_ok_and(|status| status.success()));
    }

    /// Kills it as a crash would.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("it runs");
        self.wait();
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        eventually("the relay ends", || self.child.try_wait().expect("it is ours"))
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks until there is an answer.
pub(crate) fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A TURN client over UDP.
pub(crate) struct TurnClient {
    socket: UdpSocket,
    client: turn_core::client::Client,
}

impl TurnClient {
    /// A client on an address of its own.
    pub(crate) fn new(relay: SocketAddr, username: &str, password: &str) -> Self {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).expect("randomness");
        let local: IpAddr = Ipv4Addr::LOCALHOST.into();
        let socket = UdpSocket::bind((local, 0)).expect("a port");
        socket.connect(relay).expect("loopback");
        socket.set_read_timeout(Some(Duration::from_millis(20))).expect("set");
        let config = turn_core::client::ClientConfig {
            transport: turn_core::Transport::Udp,
            username: username.into(),
            password: password.into(),
            family: None,
            lifetime: None,
            seed,
        };
        Self { socket, client: turn_core::client::Client::new(config) }
    }

    /// Does something and waits for what comes of it.
    pub(crate) fn perform(
        &mut self,
        act: impl FnOnce(&mut turn_core::client::Client, Instant),
    ) -> turn_core::client::Event {
        act(&mut self.client, Instant::now());
        let mut buffer = [0; 2048];
        eventually("the relay answers", || {
            while let Some(packet) = self.client.poll_transmit() {
                self.socket.send(&packet).expect("sent");
            }
            if let Ok(length) = self.socket.recv(&mut buffer) {
                self.client.handle_packet(Instant::now(), &buffer[..length]);
            }
            if self.client.poll_timeout().is_some_and(|at| at <= Instant::now()) {
                self.client.handle_timeout(Instant::now());
            }
            self.client.poll_event()
        })
    }

    /// Allocates, and returns the relayed address.
    pub(crate) fn allocate(&mut self) -> SocketAddr {
        match self.perform(|client, now| client.allocate(now)) {
            turn_core::client::Event::Allocated { relayed, .. } => relayed,
            other => panic!("no allocation: {other:?}"),
        }
    }
}
