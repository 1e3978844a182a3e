//! What relaying costs at least: a server that looks up and forwards, and nothing else. It authenticates nobody, forgets
//! nothing, counts nothing. recvmmsg and sendmmsg of 64, and a socket an allocation or one for all.

mod wildcard;

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::ops::Range;
use std::os::fd::AsFd;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use relay_node::sys::epoll::{Epoll, Events, Interest};
use relay_node::sys::message::{self, ReceiveSlots, SendBatch};
use relay_node::sys::process::raise_descriptor_limit;
use relay_node::sys::socket::set_buffers;
use rustc_hash::FxHashMap;
use turn_core::wire::attribute::{self, Lifetime, XorMappedAddress, XorPeerAddress, XorRelayedAddress};
use turn_core::wire::{ChannelData, ChannelNumber, Class, Kind, Message, MessageWriter, Method, kind};

use wildcard::Wildcard;

/// Token of the socket that clients send to; others are indexes of allocations.
const LISTENER: u64 = u64::MAX;
/// Token of the socket of all relayed addresses, where there is one.
const STEERED: u64 = u64::MAX - 1;
/// Receive buffer of it, as the relay has it.
const RECEIVE_BUFFER: i32 = 4 << 20;
/// One packet of so many is tampered with.
const EVERY: u64 = 101;

/// Look up and forward, until killed.
#[derive(Args, Debug)]
pub(crate) struct FloorArgs {
    /// Address of clients, and of the relayed addresses
    #[arg(long)]
    listen: SocketAddr,
    /// One socket for all relayed addresses, and raw sends
    #[arg(long)]
    wildcard: bool,
    /// What to do to one packet of a hundred: the harness has to notice
    #[arg(long, value_enum)]
    tamper: Option<Tamper>,
}

/// What a broken forwarder does.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Tamper {
    /// Changes a bit.
    Corrupt,
    /// Sends it twice.
    Duplicate,
    /// Sends it to another client or peer.
    Misdeliver,
    /// Loses it.
    Drop,
}

struct Allocation {
    client: SocketAddr,
    /// None where all share one.
    socket: Option<UdpSocket>,
    relayed: SocketAddr,
    /// The other side of its one channel.
    binding: Option<(ChannelNumber, SocketAddr)>,
}

struct Floor {
    ip: IpAddr,
    listener: UdpSocket,
    wildcard: Option<Wildcard>,
    epoll: Epoll,
    allocations: Vec<Allocation>,
    by_client: FxHashMap<SocketAddr, usize>,
    by_client_and_channel: FxHashMap<(SocketAddr, ChannelNumber), usize>,
    by_relayed_and_peer: FxHashMap<(usize, SocketAddr), usize>,
    slots: ReceiveSlots,
    batch: SendBatch,
    tamper: Option<Tamper>,
    forwarded: u64,
}

/// A datagram in a slot and where it goes: allocation, and the bytes before its payload.
#[derive(Clone, Copy)]
struct Onward {
    slot: usize,
    allocation: usize,
    head: [u8; ChannelData::HEADER],
}

/// The same, to a peer, where all relayed addresses share a socket.
#[derive(Clone)]
struct Inward {
    slot: usize,
    payload: Range<usize>,
    from: SocketAddr,
    to: SocketAddr,
}

pub(crate) fn run(args: &FloorArgs) -> Result<()> {
    raise_descriptor_limit()?;
    let listener = UdpSocket::bind(args.listen)?;
    set_buffers(listener.as_fd(), RECEIVE_BUFFER)?;
    let epoll = Epoll::new()?;
    epoll.add(listener.as_fd(), LISTENER, Interest::Read)?;
    let wildcard = args.wildcard.then(|| Wildcard::open(args.listen.ip())).transpose()?;
    if let Some(wildcard) = &wildcard {
        epoll.add(wildcard.receiver.as_fd(), STEERED, Interest::Read)?;
    }
    let mut floor = Floor {
        ip: args.listen.ip(),
        listener,
        wildcard,
        epoll,
        allocations: Vec::new(),
        by_client: FxHashMap::default(),
        by_client_and_channel: FxHashMap::default(),
        by_relayed_and_peer: FxHashMap::default(),
        slots: ReceiveSlots::new(SendBatch::CAPACITY),
        batch: SendBatch::new(),
        tamper: args.tamper,
        forwarded: 0,
    };
    let mut events = Events::with_capacity(SendBatch::CAPACITY);
    loop {
        floor.epoll.wait(&mut events, None)?;
        floor.turn(&events)?;
    }
}

impl Floor {
    fn turn(&mut self, events: &Events) -> Result<()> {
        let mut from_peers = Vec::with_capacity(SendBatch::CAPACITY);
        let mut filled = 0;
        for index in 0..events.len() {
            match events.at(index).token {
                LISTENER => {
                    // The slots are needed.
                    self.flush(&mut from_peers)?;
                    filled = 0;
                    self.take_clients()?;
                }
                STEERED => {
                    self.flush(&mut from_peers)?;
                    filled = 0;
                    self.take_steered(&mut from_peers)?;
                    self.flush(&mut from_peers)?;
                }
                allocation => {
                    let allocation = usize::try_from(allocation)?;
                    filled = self.take_peers(allocation, filled, &mut from_peers)?;
                    if filled == self.slots.count() {
                        self.flush(&mut from_peers)?;
                        filled = 0;
                    }
                }
            }
        }
        self.flush(&mut from_peers)
    }

    fn receive(&mut self, token: u64, first: usize) -> Result<usize> {
        let socket = match token {
            LISTENER => Some(&self.listener),
            STEERED => self.wildcard.as_ref().map(|wildcard| &wildcard.receiver),
            allocation => self.allocations[usize::try_from(allocation)?].socket.as_ref(),
        };
        let Some(socket) = socket else { return Ok(0) };
        let most = self.slots.count();
        match self.slots.receive(socket.as_fd(), first, most) {
            Ok(count) => Ok(count),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionRefused) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    fn take_clients(&mut self) -> Result<()> {
        let count = self.receive(LISTENER, 0)?;
        let mut to_peers = Vec::with_capacity(SendBatch::CAPACITY);
        for slot in 0..count {
            let (Some(client), length) = (self.slots.source(slot), self.slots.length(slot)) else { continue };
            match kind(self.slots.bytes(slot, length)) {
                Kind::ChannelData => self.forward(client, slot, length, &mut to_peers)?,
                Kind::Stun => self.answer(client, slot, length)?,
                Kind::Dtls | Kind::Other => {}
            }
        }
        let Some(wildcard) = &mut self.wildcard else { return Ok(()) };
        let datagram = |Inward { slot, payload, from, to }: &Inward| {
            (*from, *to, &self.slots.bytes(*slot, payload.end)[payload.start..])
        };
        wildcard.send(to_peers.iter().map(datagram))
    }

    fn forward(&mut self, client: SocketAddr, slot: usize, length: usize, to_peers: &mut Vec<Inward>) -> Result<()> {
        let Ok(message) = ChannelData::parse(self.slots.bytes(slot, length)) else { return Ok(()) };
        let (channel, range) = (message.channel(), message.range());
        let Some(&(mut index)) = self.by_client_and_channel.get(&(client, channel)) else { return Ok(()) };
        let Some((_, to)) = self.allocations[index].binding else { return Ok(()) };
        let mut times = 1;
        match self.tampered() {
            None => {}
            Some(Tamper::Corrupt) => self.slots.slot(slot)[range.end - 1] ^= 1,
            Some(Tamper::Duplicate) => times = 2,
            Some(Tamper::Misdeliver) => index = (index + 1) % self.allocations.len(),
            Some(Tamper::Drop) => return Ok(()),
        }
        let allocation = &self.allocations[index];
        let Some(socket) = &allocation.socket else {
            let inward = Inward { slot, payload: range, from: allocation.relayed, to };
            to_peers.extend(std::iter::repeat_n(inward, times));
            return Ok(());
        };
        let parts = [&[][..], &self.slots.bytes(slot, length)[range], &[]];
        let datagram = message::Message { to: Some(to), from: None, tos: 0, segment: None, parts };
        send(&mut self.batch, socket, std::iter::repeat_n(datagram, times))
    }

    fn take_peers(&mut self, allocation: usize, first: usize, onward: &mut Vec<Onward>) -> Result<usize> {
        let count = self.receive(u64::try_from(allocation)?, first)?;
        for slot in first..first + count {
            self.take_peer(allocation, slot, onward);
        }
        Ok(first + count)
    }

    fn take_steered(&mut self, onward: &mut Vec<Onward>) -> Result<()> {
        for slot in 0..self.receive(STEERED, 0)? {
            if let Some(allocation) = self.slots.destination(slot).and_then(Wildcard::allocation) {
                self.take_peer(allocation, slot, onward);
            }
        }
        Ok(())
    }

    fn take_peer(&mut self, allocation: usize, slot: usize, onward: &mut Vec<Onward>) {
        let Some(peer) = self.slots.source(slot) else { return };
        let Some(&(mut index)) = self.by_relayed_and_peer.get(&(allocation, peer)) else { return };
        let length = self.slots.length(slot);
        let Some((channel, _)) = self.allocations[index].binding else { return };
        let head = ChannelData::header(channel, u16::try_from(length).unwrap_or(u16::MAX));
        match self.tampered() {
            None => {}
            Some(Tamper::Corrupt) => self.slots.slot(slot)[length - 1] ^= 1,
            Some(Tamper::Duplicate) => onward.push(Onward { slot, allocation: index, head }),
            Some(Tamper::Misdeliver) => index = (index + 1) % self.allocations.len(),
            Some(Tamper::Drop) => return,
        }
        onward.push(Onward { slot, allocation: index, head });
    }

    fn flush(&mut self, onward: &mut Vec<Onward>) -> Result<()> {
        let datagrams = onward.iter().map(|packet| message::Message {
            to: Some(self.allocations[packet.allocation].client),
            from: None,
            tos: 0,
            segment: None,
            parts: [&packet.head[..], self.slots.bytes(packet.slot, self.slots.length(packet.slot)), &[]],
        });
        send(&mut self.batch, &self.listener, datagrams)?;
        onward.clear();
        Ok(())
    }

    /// What to do to this packet.
    fn tampered(&mut self) -> Option<Tamper> {
        self.forwarded += 1;
        self.tamper.filter(|_| self.forwarded.is_multiple_of(EVERY))
    }

    /// Says yes to a request.
    fn answer(&mut self, client: SocketAddr, slot: usize, length: usize) -> Result<()> {
        let Ok(request) = Message::parse(self.slots.bytes(slot, length)) else { return Ok(()) };
        if request.class() != Class::Request {
            return Ok(());
        }
        let mut room = [0; 128];
        let mut writer = MessageWriter::new(&mut room, Class::Success, request.method(), request.transaction_id());
        match request.method() {
            Method::Binding => {
                writer.attribute(&XorMappedAddress(client));
            }
            Method::Allocate => {
                let index = match self.by_client.get(&client) {
                    Some(index) => *index,
                    None => self.allocate(client)?,
                };
                let relayed = self.allocations[index].relayed;
                writer.attribute(&XorRelayedAddress(relayed)).attribute(&XorMappedAddress(client));
                writer.attribute(&Lifetime(600));
            }
            Method::ChannelBind => {
                let number = request.attribute::<attribute::ChannelNumber>().ok().flatten();
                let channel = number.and_then(|number| ChannelNumber::new(number.0));
                let peer = request.attribute::<XorPeerAddress>().ok().flatten();
                let (Some(channel), Some(XorPeerAddress(peer)), Some(&index)) =
                    (channel, peer, self.by_client.get(&client))
                else {
                    return Ok(());
                };
                self.allocations[index].binding = Some((channel, peer));
                if let Some(wildcard) = &self.wildcard {
                    wildcard.permit(self.allocations[index].relayed, peer.ip());
                }
                self.by_client_and_channel.insert((client, channel), index);
                self.by_relayed_and_peer.insert((index, peer), index);
            }
            // Allocations live as long as the process: released ones only stop to be found.
            Method::Refresh => {
                self.release(client);
                writer.attribute(&Lifetime(0));
            }
            _ => {}
        }
        let length = writer.finish()?;
        self.listener.send_to(&room[..length], client)?;
        Ok(())
    }

    fn allocate(&mut self, client: SocketAddr) -> Result<usize> {
        let index = self.allocations.len();
        let (socket, relayed) = match &self.wildcard {
            Some(wildcard) => (None, wildcard.steer(index)?),
            None => {
                let socket = UdpSocket::bind((self.ip, 0))?;
                socket.set_nonblocking(true)?;
                self.epoll.add(socket.as_fd(), index as u64, Interest::Read)?;
                let relayed = socket.local_addr()?;
                (Some(socket), relayed)
            }
        };
        self.allocations.push(Allocation { client, socket, relayed, binding: None });
        self.by_client.insert(client, index);
        Ok(index)
    }

    fn release(&mut self, client: SocketAddr) {
        let Some(index) = self.by_client.remove(&client) else { return };
        if let Some((channel, peer)) = self.allocations[index].binding.take() {
            self.by_client_and_channel.remove(&(client, channel));
            self.by_relayed_and_peer.remove(&(index, peer));
        }
        // The indexes of others stay what they are.
        if let Some(socket) = &self.allocations[index].socket {
            let _ = self.epoll.remove(socket.as_fd());
        }
    }
}

/// Sends all of them, or loses what the kernel has no room for.
fn send<'a>(
    batch: &mut SendBatch,
    socket: &UdpSocket,
    datagrams: impl Iterator<Item = message::Message<[&'a [u8]; 3]>> + Clone,
) -> Result<()> {
    let mut rest = datagrams;
    loop {
        match batch.send(socket.as_fd(), rest.clone()) {
            Ok(0) => return Ok(()),
            Ok(taken) => {
                rest.nth(taken - 1);
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionRefused => return Ok(()),
                _ => bail!(error),
            },
        }
    }
}
