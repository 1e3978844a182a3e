//! A client: its socket, its allocation, its channel.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Socket, Type};
use turn_core::client::{Client, ClientConfig, Event, Failure, Security};
use turn_core::wire::stream::{Frame, frame};
use turn_core::wire::{ChannelNumber, Method};
use turn_core::{Family, Transport};

use super::batch::{CAPACITY, Receiver, Sender};

/// A request that is not answered by then has failed.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no load.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A socket.
    #[error("{0}")]
    Socket(#[from] io::Error),
    /// The server refused, or did not answer.
    #[error("{0:?}: {1}")]
    Refused(Method, Failure),
    /// No answer in time.
    #[error("no answer within {} s", PATIENCE.as_secs())]
    Silence,
    /// What was asked for cannot be.
    #[error("{0}")]
    Plan(String),
}

/// Who the clients are.
#[derive(Clone, Debug)]
pub struct Account {
    /// USERNAME.
    pub username: Vec<u8>,
    /// Password.
    pub password: Vec<u8>,
}

/// A client with a socket that is connected to the server.
pub struct Caller {
    wire: Wire,
    client: Client,
    relayed: Option<SocketAddr>,
}

enum Wire {
    Udp(UdpSocket),
    Tcp(Stream),
}

/// A connection, with what came of a frame and what is left of one.
struct Stream {
    socket: TcpStream,
    received: Box<[u8]>,
    filled: usize,
    unsent: Vec<u8>,
}

impl Caller {
    /// A client that has asked for nothing yet, on a port of `from`.
    ///
    /// # Errors
    /// The socket.
    pub fn new(server: SocketAddr, transport: Transport, from: IpAddr, account: &Account) -> Result<Self, BenchError> {
        let wire = if transport.is_stream() {
            let socket = Socket::new(Domain::for_address(server), Type::STREAM, None)?;
            socket.bind(&SocketAddr::new(from, 0).into())?;
            socket.set_tcp_nodelay(true)?;
            socket.connect_timeout(&server.into(), PATIENCE)?;
            Wire::Tcp(Stream::new(socket.into()))
        } else {
            let socket = UdpSocket::bind((from, 0))?;
            socket.connect(server)?;
            Wire::Udp(socket)
        };
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(io::Error::other)?;
        let client = Client::new(ClientConfig {
            transport,
            username: account.username.clone(),
            password: account.password.clone(),
            family: server.is_ipv6().then_some(Family::V6),
            lifetime: None,
            seed,
        })
        // As browsers do; and what a server offers beside it is not always what it takes.
        .with_security(Security::Rfc5389);
        match &wire {
            Wire::Udp(socket) => socket.set_nonblocking(true)?,
            Wire::Tcp(stream) => stream.socket.set_nonblocking(true)?,
        }
        Ok(Self { wire, client, relayed: None })
    }

    /// Its relayed transport address.
    pub fn relayed(&self) -> Option<SocketAddr> {
        self.relayed
    }

    /// Allocates.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn allocate(&mut self) -> Result<SocketAddr, BenchError> {
        self.client.allocate(Instant::now());
        self.until(|event| if let Event::Allocated { relayed, .. } = event { Some(relayed) } else { None })
    }

    /// Binds a channel, which permits its peer.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn bind(&mut self, channel: ChannelNumber, peer: SocketAddr) -> Result<(), BenchError> {
        self.client.bind_channel(Instant::now(), channel, peer);
        self.until(|event| matches!(event, Event::ChannelBound(..)).then_some(()))
    }

    /// Ends the allocation.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn release(&mut self) -> Result<(), BenchError> {
        if self.relayed.take().is_none() {
            return Ok(());
        }
        self.client.refresh(Instant::now(), 0);
        self.until(|event| matches!(event, Event::Refreshed(0)).then_some(()))
    }

    /// Its socket, to be waited for.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        match &self.wire {
            Wire::Udp(socket) => socket.as_fd(),
            Wire::Tcp(stream) => stream.socket.as_fd(),
        }
    }

    /// Sends messages without waiting; says how many were taken.
    ///
    /// # Errors
    /// As send(2).
    pub(super) fn send(&mut self, sender: &mut Sender, messages: &[Vec<u8>]) -> io::Result<usize> {
        match (&mut self.wire, messages) {
            (Wire::Udp(socket), [message]) => sender.send_one(socket, None, message),
            (Wire::Udp(socket), messages) => {
                let messages: Vec<&[u8]> = messages.iter().map(Vec::as_slice).collect();
                sender.send(socket, None, &messages)
            }
            (Wire::Tcp(stream), messages) => stream.send(messages),
        }
    }

    /// Takes what has arrived without waiting, `most` messages if they are datagrams; says how many.
    ///
    /// # Errors
    /// As recv(2); the server has closed the connection.
    pub(super) fn receive(
        &mut self,
        receiver: &mut Receiver,
        most: usize,
        mut each: impl FnMut(&[u8]),
    ) -> io::Result<usize> {
        match &mut self.wire {
            Wire::Udp(socket) => receiver.receive(socket, most, |_, bytes| each(bytes)),
            Wire::Tcp(stream) => stream.receive(each),
        }
    }

    /// When [`Caller::step`] has something to do though nothing arrives.
    pub(super) fn wake(&self) -> Option<Instant> {
        self.client.poll_timeout()
    }

    /// Sends, takes what has arrived, and says what came of it.
    pub(super) fn step(&mut self, sender: &mut Sender, receiver: &mut Receiver) -> io::Result<Option<Event>> {
        self.flush(sender)?;
        if let Some(event) = self.event() {
            return Ok(Some(event));
        }
        let mut packets = Vec::new();
        self.receive(receiver, CAPACITY, |bytes| packets.push(bytes.to_vec()))?;
        let now = Instant::now();
        for packet in packets {
            self.client.handle_packet(now, &packet);
        }
        self.client.handle_timeout(now);
        self.flush(sender)?;
        Ok(self.event())
    }

    fn event(&mut self) -> Option<Event> {
        let event = self.client.poll_event();
        if let Some(Event::Allocated { relayed, .. }) = event {
            self.relayed = Some(relayed);
        }
        event
    }

    fn flush(&mut self, sender: &mut Sender) -> io::Result<()> {
        while let Some(packet) = self.client.poll_transmit() {
            self.send(sender, &[packet])?;
        }
        Ok(())
    }

    /// Runs the client until an event is picked. What else comes meanwhile is left unread.
    fn until<T>(&mut self, mut pick: impl FnMut(Event) -> Option<T>) -> Result<T, BenchError> {
        let deadline = Instant::now() + PATIENCE;
        let (mut sender, mut receiver) = (Sender::new(), Receiver::new());
        loop {
            while let Some(event) = self.step(&mut sender, &mut receiver)? {
                if let Event::Failed(method, failure) = event {
                    return Err(BenchError::Refused(method, failure));
                }
                if let Some(picked) = pick(event) {
                    return Ok(picked);
                }
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(BenchError::Silence);
            }
            let wake = self.wake().map_or(deadline, |at| at.min(deadline));
            let wait = wake.saturating_duration_since(now).as_millis() + 1;
            let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
            poll(&mut [PollFd::new(self.socket(), PollFlags::POLLIN)], timeout).map_err(io::Error::from)?;
        }
    }
}

impl Stream {
    /// Bytes taken from the socket at a time; no frame here is longer.
    const ROOM: usize = 16_384;

    fn new(socket: TcpStream) -> Self {
        Self { socket, received: vec![0; Self::ROOM].into_boxed_slice(), filled: 0, unsent: Vec::new() }
    }

    fn send(&mut self, messages: &[Vec<u8>]) -> io::Result<usize> {
        if !self.unsent.is_empty() {
            let written = self.write(&self.unsent)?;
            self.unsent.drain(..written);
            if !self.unsent.is_empty() {
                return Ok(0);
            }
        }
        for (index, message) in messages.iter().enumerate() {
            match self.write(message)? {
                0 => return Ok(index),
                written if written < message.len() => {
                    self.unsent = message[written..].to_vec();
                    return Ok(index + 1);
                }
                _ => {}
            }
        }
        Ok(messages.len())
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match (&self.socket).write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            written => written,
        }
    }

    fn receive(&mut self, mut each: impl FnMut(&[u8])) -> io::Result<usize> {
        match (&self.socket).read(&mut self.received[self.filled..]) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the server closed the connection")),
            Ok(read) => self.filled += read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
            Err(error) => return Err(error),
        }
        let (mut at, mut count) = (0, 0);
        loop {
            match frame(&self.received[at..self.filled]) {
                Frame::Whole(length) => {
                    each(&self.received[at..at + length]);
                    count += 1;
                    at += length;
                }
                Frame::Partial(length) if length <= Self::ROOM => break,
                Frame::Partial(_) | Frame::Invalid => {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "what came is no frame"));
                }
            }
        }
        self.received.copy_within(at..self.filled, 0);
        self.filled -= at;
        Ok(count)
    }
}
