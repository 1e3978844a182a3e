//! A longer way from one machine of a lab to others: UDP that it sends to them is late, lost, or waits for a narrow line.
//! The kernels of the machines that tests run on have no netem, so packets take a turn through this process: a rule of
//! routing sends them into a cable that ends on the same machine, and what comes out of its other end is put back when it
//! is due, and then goes where it was going.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::place::Place;

/// Header of Ethernet, the destination's place behind it, and the checksum's place behind the headers of IP and Ethernet.
const ETHERNET: usize = 14;
const DESTINATION: usize = ETHERNET + 16;
const CHECKSUM: usize = 6;
/// Longest frame.
const FRAME: usize = 2048;
/// Between two looks at whether it is over.
const PATIENCE: TimeVal = TimeVal::new(0, 100_000);

/// What happens to packets on their way.
#[derive(Clone, Copy, Debug, Default)]
pub struct Conditions {
    /// How much later they arrive.
    pub delay: Duration,
    /// And up to so much later than that, at random.
    pub jitter: Duration,
    /// Lost packets in a thousand.
    pub loss_permille: u32,
    /// Bits per second of IP packets; 0 is no limit.
    pub rate: u64,
    /// What would wait longer than this for its turn at that rate is lost.
    pub queue: Duration,
}

impl Conditions {
    /// A way of this length.
    #[must_use]
    pub fn late(delay: Duration) -> Self {
        Self { delay, ..Self::default() }
    }
}

type Ways = Arc<Mutex<HashMap<Ipv4Addr, Conditions>>>;

/// The way of one machine to others, for as long as this lives and its network namespace stands.
pub struct Distance {
    ways: Ways,
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Distance {
    /// Packets from `place` to each of these addresses go under these conditions from now on.
    ///
    /// # Errors
    /// It is not a machine of a lab, an address is not of IPv4, or the kernel refuses.
    pub async fn from(place: &Place, ways: &[(IpAddr, Conditions)]) -> Result<Self> {
        ensure!(!matches!(place.host, crate::Host::Machine), "this machine's own routes are left alone");
        let own = place.address;
        let mut script = format!(
            "ip link add late0 type veth peer name late1
             sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.late0.rp_filter=0
             sysctl -qw net.ipv4.conf.late0.accept_local=1
             ip link set late0 gso_max_segs 1 up
             ip link set late1 up
             ip neigh add 192.0.2.1 lladdr \"$(cat /sys/class/net/late0/address)\" dev late0 nud permanent
             ip route add default via 192.0.2.1 dev late0 src {own} onlink table 77\n"
        );
        let mut conditions = HashMap::new();
        for (ip, way) in ways {
            let IpAddr::V4(v4) = ip else { anyhow::bail!("{ip} is not of IPv4") };
            script += &format!("ip rule add iif lo to {v4} ipproto udp lookup 77\n");
            conditions.insert(*v4, *way);
        }
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-ec", &format!("mount -t sysfs sysfs /sys\n{script}")]);
        let output = place.host.output(command).await?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "a longer way: {}: {error}", output.status);
        let end = Arc::new(place.host.run(async { open() }).await.context("the end of the cable")?);
        let (ways, over) = (Arc::new(Mutex::new(conditions)), Arc::new(AtomicBool::new(false)));
        let mut threads = Vec::new();
        let mut queues = HashMap::new();
        for ip in ways.lock().unwrap_or_else(PoisonError::into_inner).keys() {
            let (queue, due) = mpsc::channel();
            queues.insert(*ip, queue);
            let end = Arc::clone(&end);
            threads.push(std::thread::spawn(move || put_back(&end, due)));
        }
        let (known, stop) = (Arc::clone(&ways), Arc::clone(&over));
        threads.push(std::thread::spawn(move || take(&end, &known, &queues, &stop)));
        Ok(Self { ways, over, threads })
    }

    /// Packets to this address go under these conditions from now on.
    pub fn set(&self, to: IpAddr, conditions: Conditions) {
        if let IpAddr::V4(to) = to {
            self.ways.lock().unwrap_or_else(PoisonError::into_inner).insert(to, conditions);
        }
    }
}

impl Drop for Distance {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A panic of its own has been said.
            let _ = thread.join();
        }
    }
}

/// Two machines, each as far from the other.
///
/// # Errors
/// As [`Distance::from`].
pub async fn apart(places: [&Place; 2], round_trip: Duration) -> Result<[Distance; 2]> {
    let way = Conditions::late(round_trip / 2);
    let [one, two] = places;
    Ok([Distance::from(one, &[(two.address, way)]).await?, Distance::from(two, &[(one.address, way)]).await?])
}

/// The far end of the cable.
fn open() -> Result<OwnedFd> {
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
    let own = |name: &str, address: Option<&LinkAddr>| (name == "late1").then(|| address.copied()).flatten();
    let mut all = nix::ifaddrs::getifaddrs()?;
    let end = all.find_map(|it| own(&it.interface_name, it.address.as_ref().and_then(|it| it.as_link_addr())));
    bind(socket.as_raw_fd(), &end.context("there is no late1")?)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &PATIENCE)?;
    setsockopt(&socket, sockopt::RcvBuf, &(4 << 20))?;
    Ok(socket)
}

type Queue = mpsc::Sender<(Instant, Vec<u8>)>;

/// Takes packets out of the cable.
fn take(end: &OwnedFd, ways: &Ways, queues: &HashMap<Ipv4Addr, Queue>, over: &AtomicBool) {
    let (mut frame, mut free, mut random) = ([0; FRAME], HashMap::new(), 12_345_u32);
    while !over.load(Ordering::Relaxed) {
        let length = match recv(end.as_raw_fd(), &mut frame, MsgFlags::empty()) {
            Ok(length) => length,
            Err(Errno::EAGAIN | Errno::EINTR) => continue,
            // The namespace has ended.
            Err(_) => return,
        };
        let frame = &mut frame[..length];
        let Some(to) = frame.get(DESTINATION..DESTINATION + 4) else { continue };
        let to = Ipv4Addr::new(to[0], to[1], to[2], to[3]);
        let Some(way) = ways.lock().unwrap_or_else(PoisonError::into_inner).get(&to).copied() else { continue };
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        if (random >> 8) % 1000 < way.loss_permille {
            continue;
        }
        // Nobody has computed it yet: that is left to network cards. None is as good (RFC 768).
        let checksum = ETHERNET + usize::from(frame[ETHERNET] & 0x0F) * 4 + CHECKSUM;
        if let Some(checksum) = frame.get_mut(checksum..checksum + 2) {
            checksum.fill(0);
        }
        let now = Instant::now();
        let free = free.entry(to).or_insert(now);
        *free = (*free).max(now);
        let bits = (length - ETHERNET) as u64 * 8;
        if let Some(nanoseconds) = (bits * 1_000_000_000).checked_div(way.rate) {
            if free.duration_since(now) > way.queue {
                continue;
            }
            *free += Duration::from_nanos(nanoseconds);
        }
        let jitter = way.jitter * ((random >> 8) % 1000) / 1000;
        if let Some(queue) = queues.get(&to) {
            // Nobody takes it any more: it is over.
            let _ = queue.send((*free + way.delay + jitter, frame.to_vec()));
        }
    }
}

/// Puts packets back, in their order, when they are due.
fn put_back(end: &OwnedFd, due: mpsc::Receiver<(Instant, Vec<u8>)>) {
    for (at, frame) in due {
        std::thread::sleep(at.saturating_duration_since(Instant::now()));
        // As in a network: what cannot be sent is lost.
        let _ = send(end.as_raw_fd(), &frame, MsgFlags::empty());
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::net::UdpSocket;
    use tokio::time::timeout;

    use super::*;
    use crate::lab::DataCenter;

    #[test]
    fn packets_are_late_one_way_and_whole() -> Result<()> {
        crate::run(async |_| {
            let center = DataCenter::start().await?;
            let (one, two) = (center.server("one").await?, center.server("two").await?);
            let at = async |place: &Place| {
                let address = SocketAddr::new(place.address, 7000);
                place.host.run(async move { Ok(UdpSocket::bind(address).await?) }).await
            };
            let (near, far) = (at(&one).await?, at(&two).await?);
            let way = Conditions::late(Duration::from_millis(60));
            let distance = Distance::from(&one, &[(two.address, way)]).await?;
            let mut bytes = [0; 1500];
            for length in [1, 1200, 1472] {
                let began = Instant::now();
                near.send_to(&vec![7; length], two.at(7000)).await?;
                let (seen, from) = timeout(Duration::from_secs(5), far.recv_from(&mut bytes)).await??;
                let took = began.elapsed();
                ensure!(
                    (seen, from) == (length, one.at(7000)) && bytes[..seen] == vec![7; length],
                    "{seen} from {from}"
                );
                ensure!((60..200).contains(&took.as_millis()), "{took:?}");
                let began = Instant::now();
                far.send_to(b"back", from).await?;
                timeout(Duration::from_secs(5), near.recv_from(&mut bytes)).await??;
                ensure!(began.elapsed() < Duration::from_millis(40), "the way back is as it was");
            }
            distance.set(two.address, Conditions { loss_permille: 1000, ..way });
            near.send_to(b"lost", two.at(7000)).await?;
            ensure!(timeout(Duration::from_millis(300), far.recv_from(&mut bytes)).await.is_err(), "it is not lost");
            Ok(())
        })
    }
}
