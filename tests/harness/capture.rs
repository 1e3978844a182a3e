//! Sees every error that servers answer to clients over UDP, and every Refresh request: a packet socket in their network
//! namespace.
//!
//! A promise is that no client is told that its allocation is gone, or that it is not who it says, while the allocation
//! goes on (P5). What a client makes of such an answer depends on the client; here it is caught on the wire.

use std::fmt;
use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use turn_core::wire::{Class, ErrorCode, Message, Method};

use crate::process::Host;

/// Ethernet header, on loopback too.
const ETHERNET: usize = 14;
/// Header of UDP.
const UDP: usize = 8;
/// Longest frame that is read: answers are shorter.
const FRAME: usize = 2048;
/// Between two looks at whether it is over.
const PATIENCE: Duration = Duration::from_millis(100);

/// Listens until it is dropped.
pub struct Capture {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Seen {
    refusals: Vec<Refusal>,
    refreshes: Vec<(Instant, SocketAddr)>,
}

/// An error answer on its way to a client.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Refusal {
    /// When it was seen.
    pub at: Instant,
    /// The server.
    pub from: SocketAddr,
    /// The client.
    pub to: SocketAddr,
    /// What was asked.
    pub method: Method,
    /// ERROR-CODE.
    pub code: u16,
}

impl Refusal {
    /// Whether nobody may be told this whose allocation goes on: that there is none, that the request makes no sense,
    /// that the nonce or the user is wrong. An Allocate is how clients begin, and 401 is how they are told to.
    #[must_use]
    pub fn is_wrong(&self) -> bool {
        match self.code {
            400 | 437 | 438 => true,
            401 => self.method != Method::Allocate,
            _ => false,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {} from {} to {}", self.method, self.code, self.from, self.to)
    }
}

impl Capture {
    /// Begins to listen on every interface of `host`.
    ///
    /// # Errors
    /// Not root, or the kernel refuses.
    pub async fn start(host: &Host) -> Result<Self> {
        let socket = host.run(async { open() }).await.context("listen for answers")?;
        let (seen, stop) = (Arc::<Mutex<Seen>>::default(), Arc::new(AtomicBool::new(false)));
        let (kept, over) = (Arc::clone(&seen), Arc::clone(&stop));
        let thread = std::thread::spawn(move || listen(socket, &kept, &over));
        Ok(Self { seen, stop, thread: Some(thread) })
    }

    /// Everything seen so far, the oldest first. What passes two interfaces is there twice.
    #[must_use]
    pub fn refusals(&self) -> Vec<Refusal> {
        self.lock().refusals.clone()
    }

    /// When Refresh requests came since `start`, and from whom, retransmissions too.
    #[must_use]
    pub fn refreshes_since(&self, start: Instant) -> Vec<(Instant, SocketAddr)> {
        self.lock().refreshes.iter().filter(|(at, _)| *at >= start).copied().collect()
    }

    /// Those of them that nobody may be told whose allocation goes on.
    #[must_use]
    pub fn wrong(&self) -> Vec<Refusal> {
        self.lock().refusals.iter().filter(|refusal| refusal.is_wrong()).copied().collect()
    }

    /// Fails if a client was told that its allocation is gone, or that it is not who it is.
    ///
    /// # Errors
    /// Names every such answer.
    pub fn ensure_no_wrong_answer(&self) -> Result<()> {
        let wrong: Vec<String> = self.wrong().iter().map(Refusal::to_string).collect();
        ensure!(wrong.is_empty(), "wrong answers: {}", wrong.join(", "));
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of its own has been said.
            let _ = thread.join();
        }
    }
}

fn open() -> Result<Socket> {
    const ETH_P_ALL: u16 = 3;
    let protocol = Protocol::from(i32::from(ETH_P_ALL.to_be()));
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol))?;
    socket.attach_filter(&errors_and_refreshes())?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// IPv4, UDP, an error answer of STUN or a Refresh request (RFC 8489 §5): the kernel passes nothing else, so nothing is
/// lost in a flood of media.
fn errors_and_refreshes() -> [SockFilter; 13] {
    const LOAD_HALF: u16 = 0x28;
    const LOAD_BYTE: u16 = 0x30;
    const HEADER_LENGTH: u16 = 0xB1;
    const LOAD_HALF_AT_X: u16 = 0x48;
    const LOAD_WORD_AT_X: u16 = 0x40;
    const AND: u16 = 0x54;
    const EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let payload = (ETHERNET + UDP) as u32;
    [
        SockFilter::new(LOAD_HALF, 0, 0, 12),
        SockFilter::new(EQUAL, 0, 10, 0x0800),
        SockFilter::new(LOAD_BYTE, 0, 0, 23),
        SockFilter::new(EQUAL, 0, 8, 17),
        SockFilter::new(HEADER_LENGTH, 0, 0, 14),
        SockFilter::new(LOAD_HALF_AT_X, 0, 0, payload),
        SockFilter::new(EQUAL, 2, 0, 0x0004),
        SockFilter::new(AND, 0, 0, 0xC110),
        SockFilter::new(EQUAL, 0, 3, 0x0110),
        SockFilter::new(LOAD_WORD_AT_X, 0, 0, payload + 4),
        SockFilter::new(EQUAL, 0, 1, 0x2112_A442),
        // All of it, or nothing.
        SockFilter::new(RETURN, 0, 0, FRAME as u32),
        SockFilter::new(RETURN, 0, 0, 0),
    ]
}

fn listen(mut socket: Socket, seen: &Mutex<Seen>, stop: &AtomicBool) {
    let mut frame = [0; FRAME];
    while !stop.load(Ordering::Relaxed) {
        match socket.read(&mut frame) {
            Ok(length) => {
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                match read(&frame[..length]) {
                    Some((from, _, Heard::Refresh)) => seen.refreshes.push((Instant::now(), from)),
                    Some((from, to, Heard::Error(method, code))) => {
                        seen.refusals.push(Refusal { at: Instant::now(), from, to, method, code });
                    }
                    None => {}
                }
            }
            Err(error)
                if [ErrorKind::WouldBlock, ErrorKind::TimedOut, ErrorKind::Interrupted].contains(&error.kind()) => {}
            // The interface went down; it may come back.
            Err(_) => std::thread::sleep(PATIENCE),
        }
    }
}

enum Heard {
    Refresh,
    Error(Method, u16),
}

/// Source, destination and what a frame says.
fn read(frame: &[u8]) -> Option<(SocketAddr, SocketAddr, Heard)> {
    let ip = frame.get(ETHERNET..)?;
    let header = usize::from(ip.first()? & 0x0F) * 4;
    let address = |at: usize| Some(Ipv4Addr::from(*ip.get(at..)?.first_chunk::<4>()?));
    let udp = ip.get(header..)?;
    let port = |at: usize| Some(u16::from_be_bytes(*udp.get(at..)?.first_chunk()?));
    let length = usize::from(port(4)?);
    let message = Message::parse(udp.get(UDP..length)?).ok()?;
    let heard = match message.class() {
        Class::Request => Heard::Refresh,
        _ => Heard::Error(message.method(), message.attribute::<ErrorCode>().ok()??.code()),
    };
    Some((SocketAddrV4::new(address(12)?, port(0)?).into(), SocketAddrV4::new(address(16)?, port(2)?).into(), heard))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use turn_core::wire::{MessageWriter, TransactionId};

    use super::*;
    use crate::wait::eventually;

    /// An answer as a server sends it.
    fn answer(class: Class, method: Method, code: ErrorCode) -> Vec<u8> {
        let mut buffer = [0; 128];
        let mut writer = MessageWriter::new(&mut buffer, class, method, TransactionId([7; 12]));
        writer.attribute(&code);
        let length = writer.finish().expect("it fits");
        buffer[..length].to_vec()
    }

    #[test]
    fn errors_are_seen_and_nothing_else() -> Result<()> {
        crate::run(async |_| {
            let capture = Capture::start(&Host::Machine).await?;
            let (server, client) = (UdpSocket::bind("127.0.0.1:0")?, UdpSocket::bind("127.0.0.1:0")?);
            let (from, to) = (server.local_addr()?, client.local_addr()?);
            server.send_to(b"media", to)?;
            server.send_to(&answer(Class::Success, Method::Refresh, ErrorCode::ALLOCATION_MISMATCH), to)?;
            let cases = [
                (Method::Allocate, ErrorCode::UNAUTHENTICATED, false),
                (Method::Allocate, ErrorCode::ALLOCATION_MISMATCH, true),
                (Method::Refresh, ErrorCode::UNAUTHENTICATED, true),
                (Method::Refresh, ErrorCode::FORBIDDEN, false),
            ];
            for (method, code, wrong) in cases {
                server.send_to(&answer(Class::Error, method, code), to)?;
                let ours = || capture.refusals().into_iter().filter(|refusal| (refusal.from, refusal.to) == (from, to));
                let (seen, _) = eventually("it is seen", Duration::from_secs(5), async || {
                    ours().find(|refusal| (refusal.method, refusal.code) == (method, code.code())).ok_or("not yet")
                })
                .await?;
                ensure!(seen.is_wrong() == wrong, "{seen}");
            }
            let start = Instant::now();
            client.send_to(&answer(Class::Request, Method::Refresh, ErrorCode::FORBIDDEN), from)?;
            client.send_to(&answer(Class::Request, Method::Allocate, ErrorCode::FORBIDDEN), from)?;
            eventually("the Refresh is seen", Duration::from_secs(5), async || {
                capture.refreshes_since(start).into_iter().find(|(_, asker)| *asker == to).ok_or("not yet")
            })
            .await?;
            let known = [Method::Allocate, Method::Refresh];
            let ours = capture.refusals().into_iter().filter(|refusal| refusal.from == from);
            ensure!(ours.clone().all(|refusal| known.contains(&refusal.method)) && ours.count() >= cases.len());
            Ok(())
        })
    }
}
