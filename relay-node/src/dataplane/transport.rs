//! The bytes of a connection: as TCP carries them, or inside TLS (RFC 8446, RFC 5246). What is above sees plaintext and
//! need not know which.
//!
//! Nothing here blocks. What the kernel does not take waits in one queue, sealed already, so that its length is what a
//! client really holds back.

use std::collections::VecDeque;
use std::io::{self, BufRead, IoSlice, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use rustls::{ServerConfig, ServerConnection};

/// Bytes read from a TLS connection at once.
const READ: usize = 32 << 10;
/// Bytes from which no plaintext comes before a client is not believed any more. A handshake without a client's
/// certificate has a few KiB, and a record 16 KiB (RFC 8446 §5.1); a handshake message could announce 16 MiB.
const LONGEST_SILENCE: usize = 20 << 10;
/// Memory of an empty queue above this is given back.
const KEPT_CAPACITY: usize = 4096;
/// Room for a frame of any length.
const LONGEST_FRAME: usize = 66 << 10;

/// What a read brought.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Arrived {
    /// This many bytes at the start of the buffer.
    Bytes(usize),
    /// Nothing more for now.
    Nothing,
    /// The end of the stream, or a broken one.
    End,
}

/// Memory that one connection at a time works in; each worker has one.
pub(super) struct Scratch {
    /// Records as they arrived.
    sealed: Vec<u8>,
    /// A frame in one piece.
    frame: Vec<u8>,
}

impl Scratch {
    pub(super) fn new() -> Self {
        Self { sealed: vec![0; READ], frame: Vec::with_capacity(LONGEST_FRAME) }
    }
}

/// A connection's bytes.
pub(super) struct ByteStream {
    socket: TcpStream,
    tls: Option<Box<Tls>>,
    /// Plaintext that has arrived and was not asked for yet, from `spare_start` on.
    spare: Vec<u8>,
    spare_start: usize,
    unsent: VecDeque<u8>,
}

/// The client broke the protocol, or nothing it offers is acceptable. It has been told by an alert.
#[derive(Debug)]
pub(super) struct BrokenTls;

/// The TLS of a connection.
struct Tls {
    session: ServerConnection,
    /// Bytes that arrived since the last plaintext.
    silence: usize,
    /// The client has said that nothing follows, or broke the protocol.
    ended: bool,
}

impl ByteStream {
    /// TCP and nothing else. The socket must not block.
    pub(super) fn new(socket: TcpStream) -> Self {
        Self { socket, tls: None, spare: Vec::new(), spare_start: 0, unsent: VecDeque::new() }
    }

    /// From here on the client speaks TLS. `first` are bytes of it that were read from the socket already; they are
    /// answered.
    ///
    /// # Errors
    /// [`BrokenTls`].
    pub(super) fn start_tls(&mut self, first: &[u8], config: Arc<ServerConfig>) -> Result<(), BrokenTls> {
        let mut session = ServerConnection::new(config).map_err(|_| BrokenTls)?;
        // The queue is ours, and bounded by what is put into it.
        session.set_buffer_limit(None);
        let tls = self.tls.insert(Box::new(Tls { session, silence: 0, ended: false }));
        let spare = &mut self.spare;
        let result = tls.open(first, |plaintext| spare.extend_from_slice(plaintext));
        // A broken connection shows itself with the next read.
        let _ = Self::send_records(&self.socket, &mut self.unsent, &mut tls.session);
        result
    }

    /// These bytes of plaintext are the next to be read.
    pub(super) fn put_back(&mut self, bytes: Vec<u8>) {
        self.spare.splice(..self.spare_start, bytes);
        self.spare_start = 0;
    }

    /// The socket, to be served by somebody else.
    pub(super) fn into_socket(self) -> TcpStream {
        self.socket
    }

    pub(super) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Whether a TLS handshake has begun and not ended.
    pub(super) fn is_handshaking(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.session.is_handshaking())
    }

    /// Whether [`ByteStream::read`] has something to say that no readiness of the socket tells of.
    pub(super) fn has_unread(&self) -> bool {
        self.spare_start < self.spare.len() || self.tls.as_ref().is_some_and(|tls| tls.ended)
    }

    /// Bytes that wait for the kernel to take them.
    pub(super) fn unsent(&self) -> usize {
        self.unsent.len()
    }

    /// Reads plaintext, from the socket at most once. Handshake messages are answered on the way.
    pub(super) fn read(&mut self, buffer: &mut [u8], scratch: &mut Scratch) -> Arrived {
        if self.spare_start < self.spare.len() {
            let rest = &self.spare[self.spare_start..];
            let length = rest.len().min(buffer.len());
            buffer[..length].copy_from_slice(&rest[..length]);
            self.spare_start += length;
            if self.spare_start == self.spare.len() {
                (self.spare, self.spare_start) = (Vec::new(), 0);
            }
            return Arrived::Bytes(length);
        }
        let Some(tls) = &mut self.tls else {
            return arrived(self.socket.read(buffer));
        };
        if tls.ended {
            return Arrived::End;
        }
        let got = match arrived(self.socket.read(&mut scratch.sealed)) {
            Arrived::Bytes(got) => got,
            nothing_or_end => return nothing_or_end,
        };
        let (mut length, spare) = (0, &mut self.spare);
        let opened = tls.open(&scratch.sealed[..got], |plaintext| {
            let room = &mut buffer[length..];
            let fits = room.len().min(plaintext.len());
            room[..fits].copy_from_slice(&plaintext[..fits]);
            length += fits;
            spare.extend_from_slice(&plaintext[fits..]);
        });
        tls.ended |= opened.is_err();
        if tls.session.wants_write() && Self::send_records(&self.socket, &mut self.unsent, &mut tls.session).is_err() {
            tls.ended = true;
        }
        match length {
            0 if tls.ended => Arrived::End,
            0 => Arrived::Nothing,
            length => Arrived::Bytes(length),
        }
    }

    /// Sends, or queues what the kernel does not take. In TLS the parts leave as one record where that is long enough.
    ///
    /// # Errors
    /// The connection is broken.
    pub(super) fn write(&mut self, parts: [&[u8]; 3], scratch: &mut Scratch) -> io::Result<()> {
        let Some(tls) = &mut self.tls else {
            return write_to(&self.socket, &mut self.unsent, &parts.map(IoSlice::new)).map(drop);
        };
        scratch.frame.clear();
        for part in parts {
            scratch.frame.extend_from_slice(part);
        }
        tls.session.writer().write_all(&scratch.frame)?;
        Self::send_records(&self.socket, &mut self.unsent, &mut tls.session)
    }

    /// Sends what waits, as far as the kernel takes it.
    ///
    /// # Errors
    /// The connection is broken.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            let (front, back) = self.unsent.as_slices();
            match self.socket.write_vectored(&[IoSlice::new(front), IoSlice::new(back)]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(taken) => drop(self.unsent.drain(..taken)),
                Err(error) if is_transient(&error) => break,
                Err(error) => return Err(error),
            }
        }
        if self.unsent.is_empty() && self.unsent.capacity() > KEPT_CAPACITY {
            self.unsent.shrink_to(KEPT_CAPACITY);
        }
        Ok(())
    }

    /// Says that nothing follows (close_notify, RFC 8446 §6.1), as far as that can be said without waiting.
    pub(super) fn close(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.session.send_close_notify();
            // Who does not take it will see the end of the stream.
            let _ = Self::send_records(&self.socket, &mut self.unsent, &mut tls.session);
        }
    }

    /// Sends the records that a session has ready, or queues them.
    fn send_records(socket: &TcpStream, unsent: &mut VecDeque<u8>, session: &mut ServerConnection) -> io::Result<()> {
        let mut sink = Sink { socket, unsent };
        while session.wants_write() {
            session.write_tls(&mut sink)?;
        }
        Ok(())
    }
}

impl Tls {
    /// Opens records. `take` gets the plaintext.
    fn open(&mut self, mut sealed: &[u8], mut take: impl FnMut(&[u8])) -> Result<(), BrokenTls> {
        self.silence += sealed.len();
        while !sealed.is_empty() {
            // What it has no room for it leaves in `sealed`; an error is a record longer than there may be.
            if self.session.read_tls(&mut sealed).is_err() {
                return Err(BrokenTls);
            }
            let state = self.session.process_new_packets();
            // What came before the fault counts.
            let mut reader = self.session.reader();
            while let Ok(plaintext) = reader.fill_buf()
                && !plaintext.is_empty()
            {
                let length = plaintext.len();
                self.silence = 0;
                take(plaintext);
                reader.consume(length);
            }
            if state.map_err(|_| BrokenTls)?.peer_has_closed() {
                self.ended = true;
                return Ok(());
            }
        }
        if self.silence > LONGEST_SILENCE {
            return Err(BrokenTls);
        }
        Ok(())
    }
}

/// Where records go: to the socket, or behind what waits for it. Takes everything.
struct Sink<'a> {
    socket: &'a TcpStream,
    unsent: &'a mut VecDeque<u8>,
}

impl Write for Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write_to(self.socket, self.unsent, &[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        write_to(self.socket, self.unsent, parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes, and queues what the kernel does not take; how much that is together.
fn write_to(mut socket: &TcpStream, unsent: &mut VecDeque<u8>, parts: &[IoSlice<'_>]) -> io::Result<usize> {
    let length = parts.iter().map(|part| part.len()).sum();
    let mut taken = 0;
    if unsent.is_empty() {
        taken = match socket.write_vectored(parts) {
            Ok(taken) => taken,
            Err(error) if is_transient(&error) => 0,
            Err(error) => return Err(error),
        };
        if taken == length {
            return Ok(length);
        }
    }
    for part in parts {
        unsent.extend(part.get(taken..).unwrap_or_default());
        taken = taken.saturating_sub(part.len());
    }
    Ok(length)
}

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
