//! A TURN client on a real socket: `turn_core::client::Client` with somebody to carry its packets.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio_rustls::client::TlsStream;
use turn_core::Transport;
use turn_core::client::{Client, ClientConfig, Event, Security};
use turn_core::wire::stream::{Frame, frame};
use turn_core::wire::{ChannelNumber, Class, ErrorCode, Kind, Message, Method, kind};

use crate::process::Host;
use crate::secure::{Dtls, Trust};

/// Longest a request may take: the retransmissions of three seconds and a slow machine.
const REQUEST: Duration = Duration::from_secs(10);

/// User name and password.
#[derive(Clone, Debug)]
pub struct Login {
    /// USERNAME.
    pub username: String,
    /// Password.
    pub password: String,
}

/// A client with at most one allocation. It keeps allocation, permissions and channels alive only while a method of it
/// waits: see [`TurnClient::tend`].
pub struct TurnClient {
    link: Link,
    core: Client,
    events: VecDeque<Event>,
    received: VecDeque<(SocketAddr, Vec<u8>)>,
    relayed: Option<SocketAddr>,
    refusals: Vec<Refusal>,
}

/// An error response, also one that the client follows without a word.
#[derive(Clone, Copy, Debug)]
pub struct Refusal {
    /// When it came.
    pub at: Instant,
    /// To what.
    pub method: Method,
    /// ERROR-CODE.
    pub code: u16,
}

/// What came next; see [`TurnClient::next`].
#[derive(Clone, Debug)]
pub enum Next {
    /// Application data from a peer.
    Data(SocketAddr, Vec<u8>),
    /// What became of a request.
    Event(Event),
}

enum Link {
    Udp(UdpSocket),
    Tcp { stream: TcpStream, buffer: Vec<u8> },
    Tls { stream: Box<TlsStream<TcpStream>>, buffer: Vec<u8> },
    Dtls(Box<Dtls>),
}

impl TurnClient {
    /// A client with a socket of its own on `host`, bound to `from` (port 0: any).
    ///
    /// # Errors
    /// The socket cannot be opened, or the server does not take the connection.
    pub async fn open(
        host: &Host,
        from: IpAddr,
        server: SocketAddr,
        transport: Transport,
        login: &Login,
    ) -> Result<Self> {
        let link = host.run(async move {
            Ok(match transport {
                Transport::Udp => {
                    let socket = UdpSocket::bind((from, 0)).await?;
                    socket.connect(server).await?;
                    Link::Udp(socket)
                }
                Transport::Tcp => {
                    let socket = if from.is_ipv4() {
                        tokio::net::TcpSocket::new_v4()?
                    } else {
                        tokio::net::TcpSocket::new_v6()?
                    };
                    socket.bind((from, 0).into())?;
                    Link::Tcp { stream: socket.connect(server).await?, buffer: Vec::new() }
                }
                other => bail!("{other:?} needs somebody to trust: see open_secure"),
            })
        });
        Self::over(link.await.with_context(|| format!("connect to {server}"))?, transport, login)
    }

    /// A client that reaches the server by TLS or DTLS.
    ///
    /// # Errors
    /// The server does not take the connection, or is not to be trusted.
    pub async fn open_secure(
        host: &Host,
        from: IpAddr,
        server: SocketAddr,
        transport: Transport,
        login: &Login,
        trust: &Trust,
    ) -> Result<Self> {
        let trust = trust.clone();
        let link = host.run(async move {
            Ok(match transport {
                Transport::Tls => Link::Tls { stream: Box::new(trust.tls(from, server).await?), buffer: Vec::new() },
                Transport::Dtls => Link::Dtls(Box::new(trust.dtls(from, server).await?)),
                other => bail!("{other:?} is not encrypted"),
            })
        });
        Self::over(link.await.with_context(|| format!("connect to {server}"))?, transport, login)
    }

    fn over(link: Link, transport: Transport, login: &Login) -> Result<Self> {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|e| anyhow!("{e}"))?;
        let core = Client::new(ClientConfig {
            transport,
            username: login.username.clone().into_bytes(),
            password: login.password.clone().into_bytes(),
            family: None,
            lifetime: None,
            seed,
        });
        Ok(Self { link, core, events: VecDeque::new(), received: VecDeque::new(), relayed: None, refusals: Vec::new() })
    }

    /// The same client with other mechanisms of authentication.
    #[must_use]
    pub fn with_security(mut self, security: Security) -> Self {
        self.core = self.core.with_security(security);
        self
    }

    /// Makes the allocation; answers its relayed address.
    ///
    /// # Errors
    /// Refused, or no answer.
    pub async fn allocate(&mut self) -> Result<SocketAddr> {
        self.core.allocate(Instant::now());
        let relayed = self
            .until("Allocate", REQUEST, |event| match event {
                Event::Allocated { relayed, .. } => Some(*relayed),
                _ => None,
            })
            .await?;
        self.relayed = Some(relayed);
        Ok(relayed)
    }

    /// The relayed address.
    ///
    /// # Errors
    /// There is no allocation yet.
    pub fn relayed(&self) -> Result<SocketAddr> {
        self.relayed.context("no allocation was made")
    }

    /// Refreshes with a lifetime in seconds; 0 ends the allocation.
    ///
    /// # Errors
    /// Refused, or no answer.
    pub async fn refresh(&mut self, lifetime: u32) -> Result<()> {
        self.core.refresh(Instant::now(), lifetime);
        self.until("Refresh", REQUEST, |event| matches!(event, Event::Refreshed(_)).then_some(())).await
    }

    /// Permits a peer.
    ///
    /// # Errors
    /// Refused, or no answer.
    pub async fn permit(&mut self, peer: IpAddr) -> Result<()> {
        self.core.permit(Instant::now(), &[peer]);
        self.until("CreatePermission", REQUEST, |event| matches!(event, Event::Permitted(_)).then_some(())).await
    }

    /// Binds a channel, 0x4000..=0x4FFF.
    ///
    /// # Errors
    /// Refused, or no answer.
    pub async fn bind_channel(&mut self, number: u16, peer: SocketAddr) -> Result<()> {
        let channel = ChannelNumber::new(number).context("not a channel number")?;
        self.core.bind_channel(Instant::now(), channel, peer);
        self.until("ChannelBind", REQUEST, |event| matches!(event, Event::ChannelBound(..)).then_some(())).await
    }

    /// Sends data to a peer, by its channel if there is one.
    ///
    /// # Errors
    /// The socket refuses.
    pub async fn send(&mut self, peer: SocketAddr, data: &[u8]) -> Result<()> {
        self.core.send(peer, data);
        self.flush().await
    }

    /// Next data from a peer, and which.
    ///
    /// # Errors
    /// None came within `limit`.
    pub async fn receive(&mut self, limit: Duration) -> Result<(SocketAddr, Vec<u8>)> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(data) = self.received.pop_front() {
                return Ok(data);
            }
            ensure!(self.step(deadline).await?, "no data within {limit:?}");
            self.events.clear();
        }
    }

    /// Keeps the allocation, its permissions and channels alive for so long; data that comes is kept for
    /// [`TurnClient::receive`].
    ///
    /// # Errors
    /// A refresh was refused or not answered, or the connection broke.
    pub async fn tend(&mut self, time: Duration) -> Result<()> {
        let deadline = Instant::now() + time;
        while self.step(deadline).await? {
            for event in self.events.drain(..) {
                if let Event::Failed(method, failure) = event {
                    bail!("{method:?} failed: {failure}");
                }
            }
        }
        Ok(())
    }

    /// What comes next, nothing if that is not before `deadline`. For clients that wait for nothing: they ask by
    /// [`TurnClient::core`].
    ///
    /// # Errors
    /// The connection broke.
    pub async fn next(&mut self, deadline: Instant) -> Result<Option<Next>> {
        loop {
            if let Some((from, data)) = self.received.pop_front() {
                return Ok(Some(Next::Data(from, data)));
            }
            if let Some(event) = self.events.pop_front() {
                if let Event::Allocated { relayed, .. } = event {
                    self.relayed = Some(relayed);
                }
                return Ok(Some(Next::Event(event)));
            }
            if !self.step(deadline).await? {
                return Ok(None);
            }
        }
    }

    /// The client as a value: requests made here leave with the next [`TurnClient::next`].
    pub fn core(&mut self) -> &mut Client {
        &mut self.core
    }

    /// Every error response so far, oldest first; they are not told again.
    pub fn take_refusals(&mut self) -> Vec<Refusal> {
        std::mem::take(&mut self.refusals)
    }

    fn note_refusal(&mut self, packet: &[u8]) {
        let Ok(message) = Message::parse(packet) else { return };
        if message.class() == Class::Error
            && let Ok(Some(error)) = message.attribute::<ErrorCode>()
        {
            self.refusals.push(Refusal { at: Instant::now(), method: message.method(), code: error.code() });
        }
    }

    async fn until<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut wanted: impl FnMut(&Event) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + limit;
        loop {
            while let Some(event) = self.events.pop_front() {
                if let Some(value) = wanted(&event) {
                    return Ok(value);
                }
                if let Event::Failed(method, failure) = event {
                    bail!("{what}: {method:?} failed: {failure}");
                }
            }
            ensure!(self.step(deadline).await?, "{what}: no answer within {limit:?}");
        }
    }

    /// Carries what there is to carry until a packet came or a timer fired; false at the deadline.
    async fn step(&mut self, deadline: Instant) -> Result<bool> {
        self.flush().await?;
        let wake = self.core.poll_timeout().map_or(deadline, |at| at.min(deadline));
        let packet = tokio::select! {
            packet = self.link.packet() => packet?,
            () = tokio::time::sleep_until(wake.into()) => {
                self.core.handle_timeout(Instant::now());
                self.events.extend(std::iter::from_fn(|| self.core.poll_event()));
                self.flush().await?;
                return Ok(wake < deadline);
            }
        };
        if kind(&packet) == Kind::Stun {
            self.note_refusal(&packet);
        }
        self.core.handle_packet(Instant::now(), &packet);
        // Data names a range of this very packet: it has to be taken out now.
        while let Some(event) = self.core.poll_event() {
            match event {
                Event::Data(peer, range) => self.received.push_back((peer, packet[range].to_vec())),
                other => self.events.push_back(other),
            }
        }
        Ok(true)
    }

    async fn flush(&mut self) -> Result<()> {
        while let Some(packet) = self.core.poll_transmit() {
            match &mut self.link {
                // A relay that is being restarted answers with ICMP, which the kernel reports in the place of the next
                // send: that one is made again. A second refusal is a lost datagram.
                Link::Udp(socket) => {
                    if socket.send(&packet).await.is_err() {
                        drop(socket.send(&packet).await);
                    }
                }
                Link::Tcp { stream, .. } => stream.write_all(&packet).await?,
                Link::Tls { stream, .. } => {
                    stream.write_all(&packet).await?;
                    stream.flush().await?;
                }
                Link::Dtls(association) => association.send(&packet).await?,
            }
        }
        Ok(())
    }
}

impl Link {
    /// The next datagram or frame. May be dropped at any time without losing anything.
    async fn packet(&mut self) -> Result<Vec<u8>> {
        match self {
            Self::Udp(socket) => {
                let mut buffer = vec![0; 65_536];
                loop {
                    // A relay that is being restarted answers with ICMP: for a UDP client that is silence.
                    if let Ok(length) = socket.recv(&mut buffer).await {
                        buffer.truncate(length);
                        return Ok(buffer);
                    }
                }
            }
            Self::Dtls(association) => association.receive().await,
            Self::Tls { stream, buffer } => loop {
                if let Some(packet) = whole(buffer)? {
                    return Ok(packet);
                }
                ensure!(stream.read_buf(buffer).await? > 0, "the server closed the connection");
            },
            Self::Tcp { stream, buffer } => loop {
                if let Some(packet) = whole(buffer)? {
                    return Ok(packet);
                }
                stream.readable().await?;
                match stream.try_read_buf(buffer) {
                    Ok(0) => bail!("the server closed the connection"),
                    Ok(_) => {}
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error.into()),
                }
            },
        }
    }
}

/// Takes the first frame out of what has come over a stream, if it is whole.
fn whole(buffer: &mut Vec<u8>) -> Result<Option<Vec<u8>>> {
    match frame(buffer) {
        Frame::Whole(length) => Ok(Some(buffer.drain(..length).collect())),
        Frame::Partial(_) => Ok(None),
        Frame::Invalid => bail!("the server sent neither STUN nor ChannelData"),
    }
}
