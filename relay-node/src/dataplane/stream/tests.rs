//! Framing and backpressure, over TCP and over TLS.

use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::thread::JoinHandle;

use rustls::pki_types::PrivateKeyDer;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion, version};
use turn_core::Transport;

use super::*;
use crate::accounts::Accounts;

/// What the bytes travel in.
const WIRES: [Option<&SupportedProtocolVersion>; 3] = [None, Some(&version::TLS12), Some(&version::TLS13)];

/// A client's socket that takes a few bytes at a time.
struct Chopped {
    socket: TcpStream,
    piece: usize,
}

impl Read for Chopped {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.read(buffer)
    }
}

impl Write for Chopped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.write(&bytes[..bytes.len().min(self.piece)])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The client's end.
enum Client {
    Plain(Chopped),
    Tls(Box<StreamOwned<ClientConnection, Chopped>>),
}

impl Client {
    fn chopped(&mut self) -> &mut Chopped {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => &mut stream.sock,
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.write_all(bytes),
            Self::Tls(stream) => stream.write_all(bytes).and_then(|()| stream.flush()),
        }
    }

    fn read_exact(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.read_exact(buffer),
            Self::Tls(stream) => stream.read_exact(buffer),
        }
    }
}

/// Both configurations for a certificate made now.
fn tls(version: &'static SupportedProtocolVersion) -> anyhow::Result<(Arc<ServerConfig>, Arc<ClientConfig>)> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone())?;
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).map_err(anyhow::Error::msg)?;
    let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[version])?
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)?;
    let client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok((Arc::new(server), Arc::new(client)))
}

/// A connection, past its handshake if there is one.
fn pair(
    version: Option<&'static SupportedProtocolVersion>,
    scratch: &mut Scratch,
) -> anyhow::Result<(Connection, Client)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let socket = TcpStream::connect(listener.local_addr()?)?;
    socket.set_nodelay(true)?;
    let mut client = Chopped { socket, piece: usize::MAX };
    let (socket, from) = listener.accept()?;
    socket.set_nonblocking(true)?;
    let five_tuple = FiveTuple { transport: Transport::Tcp, client: from, server: listener.local_addr()? };
    let mut connection = Connection::new(socket, ConnectionId(1), five_tuple, Instant::now());
    let Some(version) = version else {
        connection.open_plain();
        return Ok((connection, Client::Plain(client)));
    };
    let (server_config, client_config) = tls(version)?;
    connection.open_tls(server_config).map_err(|_| anyhow::anyhow!("no TLS"))?;
    let shaking: JoinHandle<anyhow::Result<Client>> = std::thread::spawn(move || {
        let mut session = ClientConnection::new(client_config, "localhost".try_into()?)?;
        while session.is_handshaking() {
            session.complete_io(&mut client)?;
        }
        Ok(Client::Tls(Box::new(StreamOwned::new(session, client))))
    });
    while connection.bytes.is_handshaking() {
        assert_eq!(connection.read(&mut [0; 100], scratch), Arrived::Nothing);
        assert_eq!(connection.send_unsent(&Counters::default()), Sent::Taken);
    }
    Ok((connection, shaking.join().expect("no panic")?))
}

/// Reads until `count` frames have come.
fn frames(connection: &mut Connection, count: usize, scratch: &mut Scratch) -> Vec<Vec<u8>> {
    let (mut buffer, mut frames) = (vec![0; 65_600], Vec::new());
    while frames.len() < count {
        match connection.read(&mut buffer, scratch) {
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
fn frames_come_whole_however_they_were_cut() -> anyhow::Result<()> {
    let scratch = &mut Scratch::new();
    for version in WIRES {
        let (mut connection, mut client) = pair(version, scratch)?;
        connection.allocation = Some(AllocationId([0; 16]));
        let sent = [
            BINDING.to_vec(),
            channel_data(b"x"),
            channel_data(b""),
            channel_data(&[7; 65_535]),
            channel_data(b"1234"),
        ];
        let stream = sent.concat();
        // Joined, in single bytes, and in pieces that straddle every boundary; of frames, and of records.
        let cuts: [(usize, usize); 7] = [
            (stream.len(), usize::MAX),
            (stream.len(), 1),
            (stream.len(), 1000),
            (3, usize::MAX),
            (1000, 7),
            (16_383, 5000),
            (65_541, usize::MAX),
        ];
        for (piece, segment) in cuts {
            client.chopped().piece = segment;
            let writer = std::thread::spawn({
                let stream = stream.clone();
                move || stream.chunks(piece).try_for_each(|piece| client.write_all(piece)).map(|()| client)
            });
            let arrived = frames(&mut connection, sent.len(), scratch);
            assert!(arrived == sent, "{version:?} in pieces of {piece}, {segment} bytes at a time");
            client = writer.join().expect("no panic")?;
            assert!(connection.partial.is_empty());
        }
        client.write_all(&BINDING[..7])?;
        drop(client);
        let mut buffer = vec![0; 65_600];
        loop {
            match connection.read(&mut buffer, scratch) {
                Arrived::Bytes(length) => assert_eq!(connection.next_frame(&buffer[..length]), Ok(None)),
                Arrived::Nothing => std::thread::yield_now(),
                Arrived::End => break,
            }
        }
    }
    Ok(())
}

#[test]
fn strangers_and_nonsense_end_the_connection() -> anyhow::Result<()> {
    let (mut connection, _client) = pair(None, &mut Scratch::new())?;
    assert_eq!(connection.next_frame(b"GET / HTTP/1.1"), Err(BrokenFraming));
    let long = channel_data(&[0; STRANGERS_FRAME]);
    assert_eq!(connection.next_frame(&long), Err(BrokenFraming), "whole");
    assert_eq!(connection.next_frame(&long[..4]), Err(BrokenFraming), "announced");
    connection.allocation = Some(AllocationId([0; 16]));
    assert_eq!(connection.next_frame(&long), Ok(Some(long.len())));
    Ok(())
}

#[test]
fn media_are_dropped_whole_and_answers_never_and_what_waits_is_charged_when_it_leaves() -> anyhow::Result<()> {
    const CAP: usize = 10_000;
    let scratch = &mut Scratch::new();
    let directory = tempfile::tempdir()?;
    for version in WIRES {
        let accounts = Arc::new(Accounts::open(directory.path(), 9, false)?);
        let account = accounts.take(AllocationId([1; 16]), b"alice", false);
        let counters = Counters::new(Arc::clone(&accounts));
        let charged = || {
            let totals = accounts.live(0, 1).next().map(|usage| usage.totals).unwrap_or_default();
            assert_eq!(totals.bytes_to_client, totals.packets_to_client * 996);
            totals.packets_to_client as usize
        };
        let (mut connection, mut client) = pair(version, scratch)?;
        let media = channel_data(&[9; 996]);
        let mut taken = 0;
        while connection.send([&media[..4], &media[4..], b""], false, CAP, scratch) == Sent::Taken {
            taken += 1;
            connection.owe(996, account, &counters);
        }
        assert!(charged() < taken && taken - charged() <= CAP / 996 + 1, "{} of {taken}", charged());
        assert!(connection.bytes.unsent() <= CAP);
        assert_eq!(connection.wanted(CAP), Interest::ReadWrite);
        for _ in 0..20 {
            assert_eq!(connection.send([b"", &[1; 1000], b""], true, CAP, scratch), Sent::Taken, "an answer");
        }
        assert_eq!(connection.wanted(CAP), Interest::Write, "not read while it takes nothing");

        let reader = std::thread::spawn(move || {
            let mut all = vec![0; taken * 1000 + 20_000];
            client.read_exact(&mut all).map(|()| all)
        });
        while connection.wanted(CAP) != Interest::Read {
            assert_eq!(connection.send_unsent(&counters), Sent::Taken);
        }
        assert_eq!(charged(), taken);
        accounts.end(AllocationId([1; 16]), turn_core::EndReason::Closed, 1);
        let all = reader.join().expect("no panic")?;
        assert!(all[..taken * 1000].chunks(1000).all(|frame| frame == media), "whole frames in order");
        assert!(all[taken * 1000..].iter().all(|byte| *byte == 1));
    }
    Ok(())
}

/// RFC 8446 §5.1: a record holds 2^14 bytes; media are shorter and leave as one.
#[test]
fn a_frame_leaves_as_one_record() -> anyhow::Result<()> {
    let scratch = &mut Scratch::new();
    let (mut connection, mut client) = pair(Some(&version::TLS13), scratch)?;
    let mut sizes = Vec::new();
    for length in [4, 1200, 9000, 16_380] {
        let frame = channel_data(&vec![3; length]);
        assert_eq!(connection.send([&frame[..4], &frame[4..], b""], false, 100_000, scratch), Sent::Taken);
        let mut header = [0; 5];
        let socket = &mut client.chopped().socket;
        // Session tickets come first.
        loop {
            socket.read_exact(&mut header)?;
            let mut body = vec![0; usize::from(u16::from_be_bytes([header[3], header[4]]))];
            socket.read_exact(&mut body)?;
            if body.len() == frame.len() + 17 {
                break;
            }
            assert!(sizes.is_empty(), "a record of {} bytes for a frame of {}", body.len(), frame.len());
        }
        sizes.push(length);
    }
    Ok(())
}

/// RFC 8446 §6.1: whoever closes says so; what follows a broken record is not read.
#[test]
fn ends_are_told() -> anyhow::Result<()> {
    let scratch = &mut Scratch::new();
    for version in WIRES.into_iter().flatten() {
        let (mut connection, client) = pair(Some(version), scratch)?;
        connection.bytes.close();
        drop(connection);
        let Client::Tls(mut client) = client else { unreachable!() };
        assert_eq!(client.read(&mut [0; 10])?, 0, "an orderly end, which rustls tells apart");

        let (mut connection, mut client) = pair(Some(version), scratch)?;
        client.write_all(BINDING)?;
        let Client::Tls(mut client) = client else { unreachable!() };
        client.conn.send_close_notify();
        client.conn.complete_io(&mut client.sock)?;
        let mut buffer = vec![0; 1000];
        assert_eq!(frames(&mut connection, 1, scratch), [BINDING]);
        while connection.read(&mut buffer, scratch) != Arrived::End {}

        let (mut connection, mut client) = pair(Some(version), scratch)?;
        client
            .chopped()
            .socket
            .write_all(&[23, 3, 3, 0, 20, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20])?;
        while connection.read(&mut buffer, scratch) != Arrived::End {}
        let Client::Tls(mut client) = client else { unreachable!() };
        let alert = client.read(&mut [0; 10]).expect_err("an alert");
        assert!(alert.to_string().contains("BadRecordMac"), "{alert}");
    }
    Ok(())
}

/// What a client may make us hold is bounded, in a handshake and after it: RFC 8446 §4 lets a handshake message announce
/// 16 MiB.
#[test]
fn handshake_messages_without_end_are_not_collected() -> anyhow::Result<()> {
    let scratch = &mut Scratch::new();
    let endless =
        [&b"\x16\x03\x01\x40\x00\x01\x00\xff\xf0"[..], &[0; 16_380], b"\x16\x03\x01\x40\x00", &[0; 16_384]].concat();
    let (server_config, _) = tls(&version::TLS13)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    let (socket, from) = listener.accept()?;
    socket.set_nonblocking(true)?;
    let five_tuple = FiveTuple { transport: Transport::Tcp, client: from, server: listener.local_addr()? };
    let mut connection = Connection::new(socket, ConnectionId(1), five_tuple, Instant::now());
    connection.open_tls(server_config).map_err(|_| anyhow::anyhow!("no TLS"))?;
    let writer = std::thread::spawn(move || client.write_all(&endless).map(|()| client));
    loop {
        match connection.read(&mut [0; 1000], scratch) {
            Arrived::End => break,
            Arrived::Nothing => std::thread::yield_now(),
            Arrived::Bytes(_) => panic!("plaintext"),
        }
    }
    drop(connection);
    // Whether the client could send the rest is its own concern.
    let _ = writer.join().expect("no panic");
    Ok(())
}
