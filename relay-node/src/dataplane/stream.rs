//! One connection of a client: where frames begin and end (RFC 8656 §12.5), and what is dropped when it does not take
//! what is sent. Whether its bytes travel in TLS makes no difference here.

use std::collections::VecDeque;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Instant;

use rustls::ServerConfig;

use turn_core::wire::stream::{Frame, frame};
use turn_core::{AccountId, AllocationId, ConnectionId, FiveTuple};

use super::counters::{Counters, Direction};
use super::opening::Opening;
use super::prefixes::Place;
use super::transport::{Arrived, BrokenTls, ByteStream, Scratch};
use crate::sys::epoll::Interest;

/// Longest frame of a connection without an allocation. No request is near it, and strangers hold no more memory.
const STRANGERS_FRAME: usize = 4096;
/// A partial frame's memory is given back above this once the frame is whole.
const KEPT_CAPACITY: usize = 4096;

/// A connection of a client.
pub(super) struct Connection {
    pub(super) id: ConnectionId,
    pub(super) five_tuple: FiveTuple,
    /// The allocation that lives and dies with it.
    pub(super) allocation: Option<AllocationId>,
    /// When it last sent something that was not dropped, or was accepted.
    pub(super) last_valid: Instant,
    /// What epoll has been told.
    pub(super) interest: Interest,
    /// It ends with this turn.
    pub(super) closing: bool,
    /// It becomes a pipe with this turn: what follows is no frame (RFC 6062 §5.4).
    pub(super) joining: bool,
    /// Its place among the connections of its source prefix, until it has an allocation: those are bounded by quotas.
    pub(super) place: Option<Place>,
    /// It counts among those that have not shown what they are or whose handshake has not ended.
    pub(super) half_open: bool,
    /// Its first bytes, until they say what it is.
    pub(super) opening: Option<Box<Opening>>,
    /// What its bytes travel in.
    pub(super) bytes: ByteStream,
    /// The beginning of a frame whose end has not come.
    partial: Vec<u8>,
    /// What waits for the kernel and is to be charged when it has taken it, in order: no more than `bytes` has unsent.
    owed: VecDeque<Owed>,
    /// Bytes that left after they had waited.
    left: u64,
}

/// A frame that waits.
struct Owed {
    /// It has left when so many bytes have.
    until: u64,
    bytes: usize,
    account: AccountId,
}

/// What became of a frame to send.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Sent {
    /// It left or waits.
    Taken,
    /// It was dropped whole: more waits already than allowed.
    Dropped,
    /// The connection is broken.
    Broken,
}

impl Connection {
    /// A connection just accepted, not blocking.
    pub(super) fn new(socket: TcpStream, id: ConnectionId, five_tuple: FiveTuple, now: Instant) -> Self {
        Self {
            id,
            five_tuple,
            allocation: None,
            last_valid: now,
            interest: Interest::Read,
            closing: false,
            joining: false,
            place: None,
            half_open: true,
            opening: Some(Box::default()),
            bytes: ByteStream::new(socket),
            partial: Vec::new(),
            owed: VecDeque::new(),
            left: 0,
        }
    }

    pub(super) fn socket(&self) -> &TcpStream {
        self.bytes.socket()
    }

    /// It carries STUN and ChannelData as they are.
    pub(super) fn open_plain(&mut self) {
        let first = self.first_bytes();
        self.bytes.put_back(first);
    }

    /// It carries TLS; the ClientHello is answered.
    ///
    /// # Errors
    /// As [`ByteStream::start_tls`].
    pub(super) fn open_tls(&mut self, config: Arc<ServerConfig>) -> Result<(), BrokenTls> {
        let first = self.first_bytes();
        self.bytes.start_tls(&first, config)
    }

    /// It is somebody else's: its first bytes, those of a PROXY header left out, and its socket.
    pub(super) fn into_first_bytes(mut self) -> (Vec<u8>, TcpStream) {
        (self.first_bytes(), self.bytes.into_socket())
    }

    fn first_bytes(&mut self) -> Vec<u8> {
        self.opening.take().map_or_else(Vec::new, |opening| opening.into_bytes())
    }

    /// Reads once; frames are to be taken with [`Connection::next_frame`]. `buffer` has room for the longest frame. A
    /// frame that began in an earlier read is completed outside of it and only moved when it is whole, so that a client
    /// sending single bytes costs single bytes.
    pub(super) fn read(&mut self, buffer: &mut [u8], scratch: &mut Scratch) -> Arrived {
        if self.partial.is_empty() {
            return self.bytes.read(buffer, scratch);
        }
        loop {
            let Frame::Partial(needed) = frame(&self.partial) else {
                return Arrived::End;
            };
            if needed > self.longest_frame() || needed > buffer.len() {
                return Arrived::End;
            }
            let have = self.partial.len();
            self.partial.resize(needed, 0);
            let result = self.bytes.read(&mut self.partial[have..], scratch);
            let got = if let Arrived::Bytes(got) = result { got } else { 0 };
            self.partial.truncate(have + got);
            if got == 0 {
                return result;
            }
            if let Frame::Whole(length) = frame(&self.partial) {
                buffer[..length].copy_from_slice(&self.partial[..length]);
                self.partial.clear();
                self.partial.shrink_to(KEPT_CAPACITY);
                return Arrived::Bytes(length);
            }
        }
    }

    /// Length of the frame at the start of `bytes`. What is no whole frame is kept for the next read, and the answer
    /// is nothing.
    ///
    /// # Errors
    /// The bytes are no frame of TURN, or a stranger's frame is too long: the connection has to be closed.
    pub(super) fn next_frame(&mut self, bytes: &[u8]) -> Result<Option<usize>, BrokenFraming> {
        if bytes.is_empty() {
            return Ok(None);
        }
        match frame(bytes) {
            Frame::Whole(length) if length <= self.longest_frame() => Ok(Some(length)),
            Frame::Partial(needed) if needed <= self.longest_frame() => {
                self.partial.extend_from_slice(bytes);
                Ok(None)
            }
            Frame::Whole(_) | Frame::Partial(_) | Frame::Invalid => Err(BrokenFraming),
        }
    }

    fn longest_frame(&self) -> usize {
        if self.allocation.is_some() { usize::MAX } else { STRANGERS_FRAME }
    }

    /// Sends a frame or queues what the kernel does not take. Media are dropped whole while more than `cap` bytes
    /// wait; answers never are.
    pub(super) fn send(&mut self, parts: [&[u8]; 3], is_answer: bool, cap: usize, scratch: &mut Scratch) -> Sent {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let waiting = self.bytes.unsent();
        if waiting > 0 && !is_answer && waiting + length > cap {
            return Sent::Dropped;
        }
        match self.bytes.write(parts, scratch) {
            Ok(()) => Sent::Taken,
            Err(_) => Sent::Broken,
        }
    }

    /// The frame just taken, with so many bytes of application data, is charged when the kernel has taken all of it.
    pub(super) fn owe(&mut self, bytes: usize, account: AccountId, counters: &Counters) {
        match self.bytes.unsent() {
            0 => counters.pay(Direction::ToClient, 1, bytes as u64, account),
            waiting => self.owed.push_back(Owed { until: self.left + waiting as u64, bytes, account }),
        }
    }

    /// Sends what waits, as far as the kernel takes it, and charges that.
    pub(super) fn send_unsent(&mut self, counters: &Counters) -> Sent {
        let before = self.bytes.unsent();
        let flushed = self.bytes.flush();
        self.left += (before - self.bytes.unsent()) as u64;
        while let Some(Owed { bytes, account, .. }) = self.owed.pop_front_if(|owed| owed.until <= self.left) {
            counters.pay(Direction::ToClient, 1, bytes as u64, account);
        }
        match flushed {
            Ok(()) => Sent::Taken,
            Err(_) => Sent::Broken,
        }
    }

    /// What to wait for. A client that asks and does not take the answers is not read, so that answers stay bounded.
    pub(super) fn wanted(&self, cap: usize) -> Interest {
        match self.bytes.unsent() {
            0 => Interest::Read,
            waiting if waiting > cap => Interest::Write,
            _ => Interest::ReadWrite,
        }
    }
}

/// Framing is lost for good.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct BrokenFraming;

#[cfg(test)]
mod tests;
