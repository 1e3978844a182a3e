//! The BPF program that steers datagrams for relayed ports to a few sockets (`bpf/sk_lookup.bpf.c`), and its maps.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use super::bpf::{Map, Object, Wanted};
use super::check;

/// Compiled from `bpf/sk_lookup.bpf.c` by `bpf/build`.
static OBJECT: &[u8] = include_bytes!("../../bpf/sk_lookup.bpf.o");

/// Families, and where each stands in everything below: IPv4 first.
const FAMILIES: usize = 2;
const PORTS: usize = 1 << 16;
/// In the program `struct steering`: an address of each family, then an owner for each port.
const ADDRESS: usize = 16;
const OWNERS: usize = FAMILIES * ADDRESS;
const SIZE: usize = OWNERS + FAMILIES * PORTS;
/// In the program, in an owner: the port's permissions are not all in the map.
const UNFILTERED: u8 = 0x80;

/// Permissions of all allocations that there is room for: the table they are found by takes 16 bytes of kernel memory for
/// each, used or not.
const PERMISSIONS: u32 = 1 << 18;

/// The relay reads its clock once a turn, so that its permissions end a little later than the program would see it.
const SLACK: Duration = Duration::from_secs(1);

/// In the program `struct permission`: peer, port, family.
type Key = [u8; 20];

/// What is in the way of steering, on one line.
#[derive(Debug, thiserror::Error)]
pub enum SteeringError {
    /// The object is not what this was written for.
    #[error("the BPF object is broken")]
    Object,
    /// bpf(2), mmap(2) or the namespace.
    #[error("{0}: {1}")]
    System(&'static str, io::Error),
}

/// The program in this network namespace; it goes when this is dropped, and when the process ends. Shared by all
/// workers.
pub struct Steering {
    shared: Shared,
    permissions: Map,
    /// Sockets stay in it by themselves, as long as they are open.
    _sockets: Map,
    _link: OwnedFd,
}

impl Steering {
    /// Attaches the program for these relay IPs, at most one of each family. Nothing is steered yet, and `sockets` (of a
    /// worker, whether of IPv6, bound) get what will be.
    ///
    /// # Errors
    /// What is in the way: as a rule the capabilities (CAP_BPF, CAP_NET_ADMIN), or a kernel before 5.11.
    pub fn attach<'a, S: AsFd + 'a>(
        relay_ips: &[IpAddr],
        sockets: impl Iterator<Item = (usize, bool, &'a S)>,
    ) -> Result<Self, SteeringError> {
        Self::with_room(PERMISSIONS, relay_ips, sockets)
    }

    fn with_room<'a, S: AsFd + 'a>(
        permissions: u32,
        relay_ips: &[IpAddr],
        sockets: impl Iterator<Item = (usize, bool, &'a S)>,
    ) -> Result<Self, SteeringError> {
        let object = Object::read(OBJECT, "sk_lookup").ok_or(SteeringError::Object)?;
        let make = |name: &str, size: (usize, usize), change: fn(Wanted, u32) -> Wanted| {
            let wanted = object.map(name).ok_or(SteeringError::Object)?;
            if (wanted.key as usize, wanted.value as usize) != size {
                return Err(SteeringError::Object);
            }
            change(wanted, permissions).create().map_err(|error| SteeringError::System("no BPF map", error))
        };
        let by_worker = make("sockets", (size_of::<u32>(), size_of::<u32>()), |wanted, _| wanted)?;
        let steering = make("steering", (size_of::<u32>(), SIZE), |wanted, _| wanted)?;
        let permissions =
            make("permissions", (size_of::<Key>(), size_of::<u64>()), |wanted, entries| Wanted { entries, ..wanted })?;
        for (worker, v6, socket) in sockets {
            let index = u32::try_from(worker * FAMILIES + usize::from(v6)).unwrap_or(u32::MAX);
            let socket = socket.as_fd().as_raw_fd().cast_unsigned();
            // SAFETY: key and value are words, as was just compared.
            unsafe { by_worker.update(&index, &socket) }
                .map_err(|error| SteeringError::System("a socket cannot be steered to", error))?;
        }
        let shared =
            Shared::map(&steering).map_err(|error| SteeringError::System("a BPF map cannot be mapped", error))?;
        for ip in relay_ips {
            shared.set_address(*ip);
        }
        let maps = [("steering", &steering), ("permissions", &permissions), ("sockets", &by_worker)];
        let program = object.load(&maps).map_err(|error| SteeringError::System("the BPF program is refused", error))?;
        let link =
            program.attach().map_err(|error| SteeringError::System("the BPF program cannot be attached", error))?;
        Ok(Self { shared, permissions, _sockets: by_worker, _link: link })
    }

    /// Steers a port of the relay IP of its family to a worker, as far as peers are permitted.
    pub fn steer(&self, address: SocketAddr, worker: usize) {
        let owner = u8::try_from(worker + 1).unwrap_or(0);
        self.shared.owner(address).store(owner, Ordering::Release);
    }

    /// The port is nobody's again.
    pub fn let_go(&self, address: SocketAddr) {
        self.shared.owner(address).store(0, Ordering::Release);
    }

    /// Lets a peer through to a steered port until then, and a little longer: the relay looks at its own clock. Where there is no room to remember it, the port is not
    /// filtered from now on.
    pub fn permit(&self, address: SocketAddr, peer: IpAddr, until: Instant) {
        let left = until.saturating_duration_since(Instant::now());
        self.permit_until(address, peer, monotonic() + left + SLACK);
    }

    fn permit_until(&self, address: SocketAddr, peer: IpAddr, until: Duration) {
        let until = u64::try_from(until.as_nanos()).unwrap_or(u64::MAX);
        // SAFETY: key and value have the sizes that were compared when the map was made.
        if unsafe { self.permissions.update(&key(address, peer), &until) }.is_err() {
            self.shared.owner(address).fetch_or(UNFILTERED, Ordering::Release);
        }
    }

    /// As if it had not been permitted.
    pub fn forbid(&self, address: SocketAddr, peer: IpAddr) {
        // SAFETY: as above. One that there was no room for is not there.
        let _ = unsafe { self.permissions.delete(&key(address, peer)) };
    }
}

fn key(address: SocketAddr, peer: IpAddr) -> Key {
    let mut key = [0; size_of::<Key>()];
    match peer {
        IpAddr::V4(ip) => key[..4].copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => key[..16].copy_from_slice(&ip.octets()),
    }
    key[16..18].copy_from_slice(&address.port().to_ne_bytes());
    key[18..].copy_from_slice(&u16::from(address.is_ipv6()).to_ne_bytes());
    key
}

/// CLOCK_MONOTONIC, which the program reads too.
fn monotonic() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a timespec that the call writes.
    let read = check(unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) });
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or(0);
    // The clock cannot fail; if it did, everything would be permitted for long enough to notice.
    read.map_or(Duration::from_secs(u64::from(u32::MAX)), |_| Duration::new(seconds, nanoseconds))
}

/// The program's `struct steering`, in memory that it shares with this process.
struct Shared(NonNull<u8>);

// SAFETY: the memory is there until `drop`, belongs to no thread, and everything in it is read and written atomically.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn map(map: &Map) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let fd = map.as_fd().as_raw_fd();
        // SAFETY: a new mapping at a place of the kernel's choice, of a descriptor that is open during the call.
        let address = unsafe { libc::mmap(ptr::null_mut(), SIZE, protection, libc::MAP_SHARED, fd, 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(address.cast()).map(Self).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn byte(&self, index: usize) -> &AtomicU8 {
        assert!(index < SIZE);
        // SAFETY: the mapping is SIZE bytes long and lives as long as `self`; the kernel program only reads it.
        unsafe { AtomicU8::from_ptr(self.0.as_ptr().add(index)) }
    }

    fn set_address(&self, ip: IpAddr) {
        let start = usize::from(ip.is_ipv6()) * ADDRESS;
        let octets = match ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        for (index, octet) in octets.into_iter().enumerate() {
            self.byte(start + index).store(octet, Ordering::Relaxed);
        }
    }

    fn owner(&self, address: SocketAddr) -> &AtomicU8 {
        self.byte(OWNERS + usize::from(address.is_ipv6()) * PORTS + usize::from(address.port()))
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length; nothing borrowed from it outlives `self`.
        unsafe { libc::munmap(self.0.as_ptr().cast(), SIZE) };
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    /// Beyond any scheduling on a loaded machine.
    const PATIENCE: Duration = Duration::from_secs(20);

    /// Whether a datagram from `peer` to `to` arrives at `socket`, which has an address of its own.
    fn arrives(peer: &UdpSocket, to: SocketAddr, socket: &UdpSocket) -> bool {
        peer.send_to(b"x", to).expect("loopback");
        peer.send_to(b"behind it", socket.local_addr().expect("bound")).expect("loopback");
        let (mut buffer, mut arrived) = ([0; 16], false);
        while socket.recv(&mut buffer).expect("what was sent behind it") == 1 {
            arrived = true;
        }
        arrived
    }

    /// Waits for a datagram from `peer` to the address of `socket`.
    fn is_heard(peer: &UdpSocket, socket: &UdpSocket) -> bool {
        peer.send_to(b"x", socket.local_addr().expect("bound")).expect("loopback");
        socket.recv(&mut [0; 16]).is_ok()
    }

    fn local(address: impl std::net::ToSocketAddrs) -> UdpSocket {
        let socket = UdpSocket::bind(address).expect("loopback");
        socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
        socket
    }

    /// A relay IP for a test, with two workers' sockets. The port is held by nobody.
    fn steered(relay_ip: &str) -> (Steering, SocketAddr, [UdpSocket; 2]) {
        with_room(PERMISSIONS, relay_ip)
    }

    fn with_room(permissions: u32, relay_ip: &str) -> (Steering, SocketAddr, [UdpSocket; 2]) {
        let ip: IpAddr = relay_ip.parse().expect("literal");
        let any = if ip.is_ipv6() { "[::1]:0" } else { "127.0.0.1:0" };
        let sockets = [any; 2].map(local);
        let of_workers = sockets.iter().enumerate().map(|(worker, socket)| (worker, ip.is_ipv6(), socket));
        let steering = Steering::with_room(permissions, &[ip], of_workers).expect("root, and a kernel that can");
        let port = UdpSocket::bind((ip, 0)).and_then(|socket| socket.local_addr()).expect("loopback").port();
        (steering, SocketAddr::new(ip, port), sockets)
    }

    #[test]
    fn permitted_peers_of_allocated_ports_come_through_and_nobody_else() {
        for (relay_ip, peers) in [("127.8.0.1", ["127.8.1.1", "127.8.1.2"]), ("::1", ["::1", "::1"])] {
            let (steering, address, [one, two]) = steered(relay_ip);
            let [friend, stranger] = peers.map(|ip| local((ip, 0)));
            let friend_ip = friend.local_addr().expect("bound").ip();

            assert!(!arrives(&friend, address, &one), "{relay_ip}: not allocated");
            steering.permit(address, friend_ip, soon());
            assert!(!arrives(&friend, address, &one), "{relay_ip}: permitted, but not allocated");
            steering.steer(address, 1);
            assert!(arrives(&friend, address, &two), "{relay_ip}");
            assert!(!arrives(&friend, address, &one), "{relay_ip}: another worker's");
            two.recv(&mut [0; 16]).expect("which has it");
            if relay_ip != "::1" {
                assert!(!arrives(&stranger, address, &two), "a stranger");
            }
            let neighbour = SocketAddr::new(address.ip(), address.port() ^ 1);
            assert!(!arrives(&friend, neighbour, &two), "{relay_ip}: another port");
            steering.permit(address, friend_ip, Instant::now());
            assert!(arrives(&friend, address, &two), "{relay_ip}: the relay may be a turn behind");
            steering.permit_until(address, friend_ip, monotonic());
            assert!(!arrives(&friend, address, &two), "{relay_ip}: it has ended");
            steering.permit(address, friend_ip, soon());
            assert!(arrives(&friend, address, &two), "{relay_ip}: and is installed again");
            steering.forbid(address, friend_ip);
            assert!(!arrives(&friend, address, &two), "{relay_ip}: taken back");
            steering.permit(address, friend_ip, soon());
            steering.let_go(address);
            assert!(!arrives(&friend, address, &two), "{relay_ip}: nobody's any more");
        }
    }

    #[test]
    fn other_services_are_left_alone() {
        let (steering, address, [one, _]) = steered("127.8.0.2");
        let (other, elsewhere) = (local(address), local(("127.8.0.3", address.port())));
        let peer = local("127.8.1.3:0");
        assert!(is_heard(&peer, &other), "not allocated");
        steering.steer(address, 0);
        steering.permit(address, "127.8.1.3".parse().expect("literal"), soon());
        assert!(is_heard(&peer, &elsewhere), "another address");
        assert!(arrives(&peer, address, &one), "allocated: it comes before what is bound");
        drop(steering);
        assert!(is_heard(&peer, &other), "nothing is left behind");
        other.set_nonblocking(true).expect("a socket");
        assert!(other.recv(&mut [0; 16]).is_err(), "what was steered");
    }

    #[test]
    fn where_there_is_no_room_the_port_is_open() {
        let (steering, address, [one, _]) = with_room(1, "127.8.0.4");
        let peer = local("127.8.1.4:0");
        steering.steer(address, 0);
        steering.permit(address, "127.8.1.5".parse().expect("literal"), soon());
        assert!(!arrives(&peer, address, &one));
        steering.permit(address, "127.8.1.6".parse().expect("literal"), soon());
        assert!(arrives(&peer, address, &one), "the relay looks itself");
        steering.let_go(address);
        steering.steer(address, 0);
        assert!(!arrives(&peer, address, &one), "the next allocation begins anew");
    }
}
