//! One TCP connection: where frames begin and end (RFC 8656 §12.5), and what waits to be sent.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use turn_core::wire::stream::{Frame, frame};
use turn_core::{AllocationId, ConnectionId, FiveTuple};

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
    socket: TcpStream,
    /// The beginning of a frame whose end has not come.
    partial: Vec<u8>,
    unsent: VecDeque<u8>,
}

/// What a read brought.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Arrived {
    /// This many bytes at the start of the buffer; frames to be taken with [`Connection::next_frame`].
    Bytes(usize),
    /// Nothing more for now.
    Nothing,
    /// The end of the stream, or a broken one.
    End,
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
            socket,
            partial: Vec::new(),
            unsent: VecDeque::new(),
        }
    }

    pub(super) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Reads once. `buffer` has room for the longest frame. A frame that began in an earlier read is completed outside
    /// of it and only moved when it is whole, so that a client sending single bytes costs single bytes.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Arrived {
        if self.partial.is_empty() {
            return arrived(self.socket.read(buffer));
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
            let result = arrived(self.socket.read(&mut self.partial[have..]));
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
    pub(super) fn send(&mut self, parts: [&[u8]; 3], is_answer: bool, cap: usize) -> Sent {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let mut taken = 0;
        if self.unsent.is_empty() {
            taken = match self.socket.write_vectored(&parts.map(IoSlice::new)) {
                Ok(taken) => taken,
                Err(error) if is_transient(&error) => 0,
                Err(_) => return Sent::Broken,
            };
        } else if !is_answer && self.unsent.len() + length > cap {
            return Sent::Dropped;
        }
        for part in parts {
            self.unsent.extend(part.get(taken..).unwrap_or_default());
            taken = taken.saturating_sub(part.len());
        }
        Sent::Taken
    }

    /// Sends what waits, as far as the kernel takes it.
    pub(super) fn send_unsent(&mut self) -> Sent {
        while !self.unsent.is_empty() {
            let (front, back) = self.unsent.as_slices();
            match self.socket.write_vectored(&[IoSlice::new(front), IoSlice::new(back)]) {
                Ok(taken) if taken > 0 => drop(self.unsent.drain(..taken)),
                Ok(_) => return Sent::Broken,
                Err(error) if is_transient(&error) => break,
                Err(_) => return Sent::Broken,
            }
        }
        if self.unsent.is_empty() {
            self.unsent.shrink_to(KEPT_CAPACITY);
        }
        Sent::Taken
    }

    /// What to wait for. A client that asks and does not take the answers is not read, so that answers stay bounded.
    pub(super) fn wanted(&self, cap: usize) -> Interest {
        match self.unsent.len() {
            0 => Interest::Read,
            waiting if waiting > cap => Interest::Write,
            _ => Interest::ReadWrite,
        }
    }
}

/// Framing is lost for good.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct BrokenFraming;

fn arrived(result: io::Result<usize>) -> Arrived {
    match result {
        Ok(0) => Arrived::End,
        Ok(length) => Arrived::Bytes(length),
        Err(error) if is_transient(&error) => Arrived::Nothing,
        Err(_) => Arrived::End,
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use turn_core::Transport;

    use super::*;

    fn pair() -> io::Result<(Connection, TcpStream)> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let client = TcpStream::connect(listener.local_addr()?)?;
        client.set_nodelay(true)?;
        let (socket, from) = listener.accept()?;
        socket.set_nonblocking(true)?;
        let five_tuple = FiveTuple { transport: Transport::Tcp, client: from, server: listener.local_addr()? };
        Ok((Connection::new(socket, ConnectionId(1), five_tuple, Instant::now()), client))
    }

    /// Reads until `count` frames have come.
    fn frames(connection: &mut Connection, count: usize) -> Vec<Vec<u8>> {
        let (mut buffer, mut frames) = (vec![0; 65_600], Vec::new());
        while frames.len() < count {
            match connection.read(&mut buffer) {
                Arrived::Bytes(length) => {
                    let mut rest = &buffer[..length];
                    while let Some(length) = connection.next_frame(rest).expect("frames") {
                        frames.push(rest[..length].to_vec());
                        rest = &rest[length..];
                    }
                }
                Arrived::Nothing => std::thread::yield_now(),
                Arrived::End => panic!("the stream ended after {} frames", frames.len()),
            }
        }
        frames
    }

    fn channel_data(payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0x40, 0];
        frame.extend((payload.len() as u16).to_be_bytes());
        frame.extend(payload);
        frame.resize(frame.len().next_multiple_of(4), 0);
        frame
    }

    const BINDING: &[u8] = b"\x00\x01\x00\x00\x21\x12\xa4\x42abcdefghijkl";

    #[test]
    fn frames_come_whole_however_they_were_cut() -> io::Result<()> {
        let (mut connection, mut client) = pair()?;
        connection.allocation = Some(AllocationId([0; 16]));
        let sent = [
            BINDING.to_vec(),
            channel_data(b"x"),
            channel_data(b""),
            channel_data(&[7; 65_535]),
            channel_data(b"1234"),
        ];
        let stream = sent.concat();
        // Joined, in single bytes, and in pieces that straddle every boundary.
        for piece in [stream.len(), 1, 3, 1000, 65_541] {
            let writer = std::thread::spawn({
                let (stream, mut client) = (stream.clone(), client.try_clone()?);
                move || stream.chunks(piece).try_for_each(|piece| client.write_all(piece))
            });
            assert!(frames(&mut connection, sent.len()) == sent, "in pieces of {piece}");
            writer.join().expect("no panic")?;
            assert!(connection.partial.is_empty());
        }
        client.write_all(&BINDING[..7])?;
        drop(client);
        let mut buffer = vec![0; 65_600];
        loop {
            match connection.read(&mut buffer) {
                Arrived::Bytes(length) => assert_eq!(connection.next_frame(&buffer[..length]), Ok(None)),
                Arrived::Nothing => std::thread::yield_now(),
                Arrived::End => break,
            }
        }
        Ok(())
    }

    #[test]
    fn strangers_and_nonsense_end_the_connection() -> io::Result<()> {
        let (mut connection, _client) = pair()?;
        assert_eq!(connection.next_frame(b"GET / HTTP/1.1"), Err(BrokenFraming));
        let long = channel_data(&[0; STRANGERS_FRAME]);
        assert_eq!(connection.next_frame(&long), Err(BrokenFraming), "whole");
        assert_eq!(connection.next_frame(&long[..4]), Err(BrokenFraming), "announced");
        connection.allocation = Some(AllocationId([0; 16]));
        assert_eq!(connection.next_frame(&long), Ok(Some(long.len())));
        Ok(())
    }

    #[test]
    fn media_are_dropped_whole_and_answers_never() -> io::Result<()> {
        const CAP: usize = 10_000;
        let (mut connection, mut client) = pair()?;
        let media = channel_data(&[9; 996]);
        let mut taken = 0;
        while connection.send([&media[..4], &media[4..], b""], false, CAP) == Sent::Taken {
            taken += 1;
        }
        assert!(connection.unsent.len() <= CAP);
        assert_eq!(connection.wanted(CAP), Interest::ReadWrite);
        for _ in 0..20 {
            assert_eq!(connection.send([b"", &[1; 1000], b""], true, CAP), Sent::Taken, "an answer");
        }
        assert_eq!(connection.wanted(CAP), Interest::Write, "not read while it takes nothing");

        let reader = std::thread::spawn(move || {
            let mut all = vec![0; taken * 1000 + 20_000];
            client.read_exact(&mut all).map(|()| all)
        });
        while connection.wanted(CAP) != Interest::Read {
            assert_eq!(connection.send_unsent(), Sent::Taken);
        }
        let all = reader.join().expect("no panic")?;
        assert!(all[..taken * 1000].chunks(1000).all(|frame| frame == media), "whole frames in order");
        assert!(all[taken * 1000..].iter().all(|byte| *byte == 1));
        Ok(())
    }
}
