//! A TURN client on a real socket: `turn_core`'s client value, driven.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use turn_core::Transport;
use turn_core::client::{Client, ClientConfig, Event, Failure};
use turn_core::wire::stream::{Frame, MAX_FRAME, frame};

/// User name and password.
#[derive(Clone)]
pub(crate) struct Login {
    pub(crate) username: Vec<u8>,
    pub(crate) password: Vec<u8>,
}

/// Why a step did not succeed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Trouble {
    #[error("no answer within {}", crate::units::measured(*.0))]
    Silence(Duration),
    #[error("{0}")]
    Socket(#[from] io::Error),
    #[error("the server refused: {0}")]
    Refused(Failure),
    #[error("the server ended the connection")]
    Ended,
    #[error("the server sent what is neither STUN nor ChannelData")]
    Garbage,
}

/// What the client saw.
pub(crate) enum Seen {
    Event(Event),
    /// Application data and the peer it is from.
    Data(SocketAddr, Vec<u8>),
}

/// One client and its socket.
pub(crate) struct Peer {
    pub(crate) client: Client,
    link: Link,
    packet: Vec<u8>,
}

enum Link {
    Udp(UdpSocket),
    /// With the bytes of frames that are not whole yet.
    Tcp(TcpStream, Vec<u8>),
}

impl Peer {
    /// Connects; over UDP that only chooses the addresses.
    pub(crate) async fn connect(server: SocketAddr, transport: Transport, login: &Login) -> Result<Self, Trouble> {
        let link = if transport.is_stream() {
            let stream = TcpStream::connect(server).await?;
            stream.set_nodelay(true)?;
            Link::Tcp(stream, Vec::new())
        } else {
            let any: IpAddr =
                if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            let socket = UdpSocket::bind((any, 0)).await?;
            // Connected, so that a closed port is an error and not silence.
            socket.connect(server).await?;
            Link::Udp(socket)
        };
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(io::Error::other)?;
        let client = Client::new(ClientConfig {
            transport,
            username: login.username.clone(),
            password: login.password.clone(),
            family: None,
            lifetime: None,
            seed,
        });
        Ok(Self { client, link, packet: Vec::new() })
    }

    /// Waits for an event that `pick` takes; others are passed over, a refusal ends it.
    pub(crate) async fn until<T>(
        &mut self,
        patience: Duration,
        mut pick: impl FnMut(Event) -> Option<T>,
    ) -> Result<T, Trouble> {
        let deadline = Instant::now() + patience;
        loop {
            match self.next(deadline).await? {
                None => return Err(Trouble::Silence(patience)),
                Some(Seen::Event(Event::Failed(_, Failure::TimedOut))) => return Err(Trouble::Silence(patience)),
                Some(Seen::Event(Event::Failed(_, failure))) => return Err(Trouble::Refused(failure)),
                Some(Seen::Event(event)) => {
                    if let Some(picked) = pick(event) {
                        return Ok(picked);
                    }
                }
                Some(Seen::Data(..)) => {}
            }
        }
    }

    /// The next thing that happens; `None` when nothing does before the deadline.
    pub(crate) async fn next(&mut self, deadline: Instant) -> Result<Option<Seen>, Trouble> {
        loop {
            self.flush().await?;
            match self.client.poll_event() {
                Some(Event::Data(from, range)) => {
                    let data = self.packet.get(range).map(<[u8]>::to_vec).unwrap_or_default();
                    return Ok(Some(Seen::Data(from, data)));
                }
                Some(event) => return Ok(Some(Seen::Event(event))),
                None => {}
            }
            let wake = self.client.poll_timeout().map_or(deadline, |at| at.min(deadline));
            match tokio::time::timeout_at(wake.into(), self.link.receive(&mut self.packet)).await {
                Ok(received) => {
                    received?;
                    self.client.handle_packet(Instant::now(), &self.packet);
                }
                Err(_) if Instant::now() >= deadline => return Ok(None),
                Err(_) => self.client.handle_timeout(Instant::now()),
            }
        }
    }

    /// Sends what the client wants sent.
    pub(crate) async fn flush(&mut self) -> Result<(), Trouble> {
        while let Some(packet) = self.client.poll_transmit() {
            match &mut self.link {
                Link::Udp(socket) => {
                    socket.send(&packet).await?;
                }
                Link::Tcp(stream, _) => stream.write_all(&packet).await?,
            }
        }
        Ok(())
    }
}

impl Link {
    /// Puts the next whole packet into `packet`. Safe to drop half-way: what has arrived is kept.
    async fn receive(&mut self, packet: &mut Vec<u8>) -> Result<(), Trouble> {
        packet.clear();
        match self {
            Self::Udp(socket) => {
                packet.reserve(MAX_FRAME);
                socket.recv_buf(packet).await?;
            }
            Self::Tcp(stream, buffer) => loop {
                match frame(buffer) {
                    Frame::Whole(len) => {
                        packet.extend(buffer.drain(..len));
                        break;
                    }
                    Frame::Invalid => return Err(Trouble::Garbage),
                    Frame::Partial(_) if stream.read_buf(buffer).await? == 0 => return Err(Trouble::Ended),
                    Frame::Partial(_) => {}
                }
            },
        }
        Ok(())
    }
}
