//! Packets of strangers: from as many source addresses as the loopback network has, counted both ways.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures_util::{StreamExt, TryStreamExt};
use nix::libc::{in_addr, in_pktinfo};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrIn, sendmsg};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::Sleep;

/// IPv4 and UDP headers.
const HEADERS: u64 = 28;
/// Packets between two looks at the clock and at what came back.
const BATCH: u32 = 50;
/// How long answers may be under way after the last packet.
const AFTERMATH: Duration = Duration::from_millis(300);
/// Connections that are being opened at a time.
const AT_ONCE: usize = 1000;
/// Between two bytes of a trickling connection.
const PAUSE: Duration = Duration::from_millis(40);

/// What was sent and what came back, IPv4 and UDP headers counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Packets sent.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Bytes of the smallest packet sent.
    pub smallest: u64,
    /// Packets that came back.
    pub answers: u64,
    /// Their bytes.
    pub answer_bytes: u64,
    /// Bytes of the largest packet that came back.
    pub largest_answer: u64,
    /// How long it took to send them.
    pub took: Duration,
}

impl Tally {
    /// How many bytes came back for each byte sent.
    #[must_use]
    pub fn amplification(&self) -> f64 {
        self.answer_bytes as f64 / self.sent_bytes.max(1) as f64
    }

    /// The same for the worst answer there can have been.
    #[must_use]
    pub fn worst_amplification(&self) -> f64 {
        self.largest_answer as f64 / self.smallest.max(1) as f64
    }

    fn answer(&mut self, length: usize) {
        let bytes = length as u64 + HEADERS;
        self.answers += 1;
        self.answer_bytes += bytes;
        self.largest_answer = self.largest_answer.max(bytes);
    }
}

/// Source address number `number`: 250 to a /24, in 127.128.0.0/9, which no [`crate::place::Place`] below 127.128 has.
#[must_use]
#[allow(clippy::cast_possible_truncation, reason = "each part is below 256")]
pub fn source(number: u32) -> Ipv4Addr {
    let network = number / 250;
    Ipv4Addr::new(127, 200 + (network / 256 % 50) as u8, (network % 256) as u8, 1 + (number % 250) as u8)
}

/// Sends one packet from each of `sources` addresses to `server`, `rate` a second, `packet` making the one of a number;
/// then waits for the last answers. Blocks.
///
/// # Errors
/// The server is not on the IPv4 loopback network, or the kernel refuses.
pub fn strangers(server: SocketAddr, sources: u32, rate: u32, mut packet: impl FnMut(u32) -> Vec<u8>) -> Result<Tally> {
    let SocketAddr::V4(server) = server else { anyhow::bail!("{server} is not IPv4") };
    ensure!(server.ip().is_loopback(), "{server}: floods stay on this machine");
    // Whatever comes back to any of these addresses comes back to this socket.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_nonblocking(true)?;
    let mut tally = Tally { smallest: u64::MAX, ..Tally::default() };
    let start = Instant::now();
    for number in 0..sources {
        let packet = packet(number);
        send(&socket, source(number), server, &packet)?;
        let bytes = packet.len() as u64 + HEADERS;
        tally.sent += 1;
        tally.sent_bytes += bytes;
        tally.smallest = tally.smallest.min(bytes);
        if number % BATCH == BATCH - 1 {
            take(&socket, &mut tally)?;
            let due = start + Duration::from_secs_f64(f64::from(number) / f64::from(rate));
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    }
    tally.took = start.elapsed();
    let end = Instant::now() + AFTERMATH;
    while Instant::now() < end {
        take(&socket, &mut tally)?;
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(tally)
}

fn send(socket: &UdpSocket, from: Ipv4Addr, to: SocketAddrV4, packet: &[u8]) -> Result<()> {
    let from = in_addr { s_addr: u32::from_ne_bytes(from.octets()) };
    let information = in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: from, ipi_addr: in_addr { s_addr: 0 } };
    let to = SockaddrIn::from(to);
    let control = [ControlMessage::Ipv4PacketInfo(&information)];
    loop {
        let sent = sendmsg(socket.as_raw_fd(), &[io::IoSlice::new(packet)], &control, MsgFlags::empty(), Some(&to));
        match sent {
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EAGAIN) => std::thread::sleep(Duration::from_micros(100)),
            Err(error) => return Err(error).context("send"),
        }
    }
}

fn take(socket: &UdpSocket, tally: &mut Tally) -> Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match socket.recv(&mut buffer) {
            Ok(length) => tally.answer(length),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error).context("receive"),
        }
    }
}

/// Opens `count` TCP connections, each from an address of its own, and does with each what `then` says; all of them are
/// open at the end.
///
/// # Errors
/// The server does not take one, or `then` fails.
pub async fn crowd<T, F>(server: SocketAddr, count: u32, then: impl Fn(TcpStream) -> F) -> Result<Vec<T>>
where
    F: Future<Output = Result<T>>,
{
    let connected = futures_util::stream::iter(0..count).map(|number| {
        let then = &then;
        async move {
            let socket = TcpSocket::new_v4()?;
            socket.bind((source(number), 0).into())?;
            let stream = socket.connect(server).await.with_context(|| format!("connection {number}"))?;
            stream.set_nodelay(true)?;
            then(stream).await.with_context(|| format!("connection {number}"))
        }
    });
    connected.buffer_unordered(AT_ONCE).try_collect().await
}

/// A stream whose first bytes are sent one by one.
#[derive(Debug)]
pub struct Trickle {
    stream: TcpStream,
    left: usize,
    pause: Pin<Box<Sleep>>,
}

impl Trickle {
    /// Sends `first` bytes one by one.
    #[must_use]
    pub fn new(stream: TcpStream, first: usize) -> Self {
        Self { stream, left: first, pause: Box::pin(tokio::time::sleep(Duration::ZERO)) }
    }
}

impl AsyncRead for Trickle {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Trickle {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if self.left == 0 || data.is_empty() {
            return Pin::new(&mut self.stream).poll_write(context, data);
        }
        ready!(self.pause.as_mut().poll(context));
        let written = ready!(Pin::new(&mut self.stream).poll_write(context, &data[..1]))?;
        self.left -= written;
        self.pause.set(tokio::time::sleep(PAUSE));
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Resident memory of a process, in bytes.
///
/// # Errors
/// It does not run.
pub fn resident(pid: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find(|line| line.starts_with("VmRSS:")).context("no VmRSS")?;
    let kilobytes: u64 = line.split_whitespace().nth(1).context("no number")?.parse()?;
    Ok(kilobytes * 1024)
}
