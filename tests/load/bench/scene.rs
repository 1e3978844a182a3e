//! What is measured: who sends what to whom.

use anyhow::{Result, bail};
use turn_core::Transport;
use turnctl::bench::{Mode, Pace};

/// Packets under way. Less than what fits the receive buffers that coturn gives its sockets.
const WINDOW: usize = 128;

/// What is counted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum What {
    /// Packets that arrive.
    Packets,
    /// Allocations made and ended, as [`crate::cycles`] says; `flows` is how many at a time.
    Allocations,
}

/// What is between server and load.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Net {
    /// The loopback interface of this machine.
    Loopback,
    /// Network namespaces on one Ethernet, whose servers' ends put segments of a flow together as network cards do.
    Veth,
}

/// One load.
#[derive(Clone, Debug)]
pub(crate) struct Scene {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) net: Net,
    pub(crate) what: What,
    pub(crate) mode: Mode,
    /// The second client of every pair is at another server.
    pub(crate) across: bool,
    pub(crate) transport: Transport,
    pub(crate) flows: usize,
    pub(crate) size: usize,
    pub(crate) burst: usize,
    pub(crate) pace: Pace,
}

impl Scene {
    /// In words.
    pub(crate) fn legend(&self) -> String {
        let Self { name, about, flows, size, burst, .. } = self;
        match self.what {
            What::Packets if *burst > 1 => format!("{name}: {about}; {flows} flows, bursts of {burst} x {size} B"),
            What::Packets => format!("{name}: {about}; {flows} flows, {size} B"),
            What::Allocations => format!("{name}: {about}, {flows} at a time"),
        }
    }
}

/// Speech in many thin flows.
const AUDIO: Scene = Scene {
    name: "",
    about: "",
    net: Net::Loopback,
    what: What::Packets,
    mode: Mode::Up,
    across: false,
    transport: Transport::Udp,
    flows: 200,
    size: 172,
    burst: 1,
    pace: Pace::Window(WINDOW),
};

/// Calls whose two ends are at different servers.
const ACROSS: Scene =
    Scene { about: "client of one server to client of another", mode: Mode::Pair, across: true, size: 200, ..AUDIO };

/// Everything there is.
const SCENES: &[Scene] = &[
    Scene { name: "up", about: "clients to peers", mode: Mode::Up, ..AUDIO },
    Scene { name: "down", about: "peers to clients", mode: Mode::Down, ..AUDIO },
    Scene { name: "echo", about: "clients to peers and back, each way counted", mode: Mode::Echo, ..AUDIO },
    Scene { name: "pair", about: "client to client of one server", mode: Mode::Pair, ..AUDIO },
    Scene { name: "video", about: "clients to peers", flows: 8, size: 1200, burst: 16, ..AUDIO },
    Scene {
        name: "veth-video",
        about: "the same over veth with receive offload",
        net: Net::Veth,
        flows: 8,
        size: 1200,
        burst: 16,
        ..AUDIO
    },
    Scene { name: "tcp-up", about: "clients to peers, clients by TCP", transport: Transport::Tcp, ..AUDIO },
    Scene {
        name: "tcp-down",
        about: "peers to clients, clients by TCP",
        mode: Mode::Down,
        transport: Transport::Tcp,
        ..AUDIO
    },
    Scene {
        name: "latency",
        about: "echo, 1,000 a second",
        mode: Mode::Echo,
        flows: 10,
        pace: Pace::Rate(1000),
        ..AUDIO
    },
    Scene { name: "across", ..ACROSS },
    Scene { name: "across-1200", size: 1200, ..ACROSS },
    Scene { name: "across-20k", about: "the same, 20,000 a second", pace: Pace::Rate(20_000), ..ACROSS },
    Scene {
        name: "across-20k-1200",
        about: "the same, 20,000 a second",
        size: 1200,
        pace: Pace::Rate(20_000),
        ..ACROSS
    },
    Scene { name: "across-latency", about: "the same, 1,000 a second", flows: 10, pace: Pace::Rate(1000), ..ACROSS },
    Scene {
        name: "allocate",
        about: "allocations made and ended, each from a five-tuple of its own",
        what: What::Allocations,
        flows: 64,
        ..AUDIO
    },
];

/// The one that is no load: see `memory`.
pub(crate) const MEMORY: &str = "memory";

/// Those of these names; all without any.
pub(crate) fn chosen(names: &[String]) -> Result<Vec<Scene>> {
    let known: Vec<&str> = SCENES.iter().map(|scene| scene.name).chain([MEMORY]).collect();
    if let Some(unknown) = names.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("{unknown} is none of {}", known.join(", "));
    }
    let wanted = |scene: &&Scene| names.is_empty() || names.iter().any(|name| name == scene.name);
    Ok(SCENES.iter().filter(wanted).cloned().collect())
}
