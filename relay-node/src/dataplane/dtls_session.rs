//! One DTLS session as a value: datagrams in, plaintext and datagrams out. OpenSSL does the cryptography and keeps the
//! clock of retransmissions; nothing here has a socket.
//!
//! OpenSSL is to begin where the client's second ClientHello brings a good cookie, without having seen the first one.
//! It is given a first one of our own; its HelloVerifyRequest is thrown away, and with it everything it remembers but
//! the numbers of the messages (RFC 6347 §4.2.6: neither of the two is part of the transcript).

use std::io::{self, ErrorKind, Read, Write};

use openssl::ssl::{ErrorCode, ShutdownState, SslStream};

use super::dtls_context::Context;

/// The highest number of a ClientHello that begins a session: a client that waits for long may be asked for a cookie
/// more than once.
const MOST_HELLOS: u16 = 4;
/// Type, version, epoch, sequence number, length (RFC 6347 §4.1).
const RECORD_HEADER: usize = 13;

/// What goes between a session and its worker in one call. The worker lends it, so that its memory exists once.
#[derive(Default)]
pub(super) struct Exchange {
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    /// Where each outgoing datagram ends.
    ends: Vec<usize>,
    plain: Vec<u8>,
}

impl Exchange {
    /// The datagram for the session.
    pub(super) fn bring(&mut self, datagram: &[u8]) {
        self.incoming.clear();
        self.incoming.extend_from_slice(datagram);
    }

    /// What the session sends: one item a datagram.
    pub(super) fn outgoing(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, end)| &self.outgoing[start..*end])
    }

    /// It has been taken.
    pub(super) fn clear(&mut self) {
        self.incoming.clear();
        self.outgoing.clear();
        self.ends.clear();
    }
}

/// What OpenSSL reads from and writes to: a read is a datagram, so is a write.
#[derive(Default)]
struct Wire(Exchange);

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.0.incoming.is_empty() {
            return Err(ErrorKind::WouldBlock.into());
        }
        // As of a socket: what does not fit is lost.
        let length = self.0.incoming.len().min(buffer.len());
        buffer[..length].copy_from_slice(&self.0.incoming[..length]);
        self.0.incoming.clear();
        Ok(length)
    }
}

impl Write for Wire {
    fn write(&mut self, datagram: &[u8]) -> io::Result<usize> {
        self.0.outgoing.extend_from_slice(datagram);
        self.0.ends.push(self.0.outgoing.len());
        Ok(datagram.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How far a handshake is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Handshake {
    /// It waits for the client.
    Pending,
    /// It is complete.
    Done,
    /// It has failed.
    Failed,
}

/// What a session's datagram held.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Opened {
    /// This many bytes of application data.
    Data(usize),
    /// Nothing more.
    Nothing,
    /// The end: close_notify, or an error that ends it.
    End,
}

/// A session.
pub(super) struct Session {
    stream: SslStream<Wire>,
    /// What record sequence numbers of epoch 0 are ahead of OpenSSL's.
    ahead: u64,
}

impl Session {
    /// A session that waits for the ClientHello of these numbers, which has brought a good cookie.
    /// None for numbers that no client gets to, and where OpenSSL is out of memory.
    pub(super) fn new(
        context: &Context,
        message_sequence: u16,
        record_sequence: u64,
        exchange: &mut Exchange,
    ) -> Option<Self> {
        let first = u64::from(message_sequence);
        if !(1..=MOST_HELLOS).contains(&message_sequence) || record_sequence < first {
            return None;
        }
        let stream = SslStream::new(context.session().ok()?, Wire::default()).ok()?;
        // RFC 6347 §4.2.1: the ServerHello's record has the number of the ClientHello's.
        let mut session = Self { stream, ahead: record_sequence - first };
        for number in 0..message_sequence {
            exchange.bring(&first_hello(number as u8));
            session.handshake(exchange);
            exchange.clear();
        }
        Some(session)
    }

    /// Takes in a datagram of the handshake; without one, sends again what is due to be.
    pub(super) fn handshake(&mut self, exchange: &mut Exchange) -> Handshake {
        let (result, ahead) = (self.with(exchange, |stream| stream.do_handshake()), self.ahead);
        if ahead != 0 {
            renumber(exchange, ahead);
        }
        match result {
            Ok(()) => Handshake::Done,
            Err(error) if error.code() == ErrorCode::WANT_READ => Handshake::Pending,
            Err(_) => Handshake::Failed,
        }
    }

    /// Takes in a datagram. To be called again, without one, until there is nothing more. `plain` has room for a record.
    pub(super) fn open(&mut self, exchange: &mut Exchange, plain: &mut [u8]) -> Opened {
        let (result, ahead) = (self.with(exchange, |stream| stream.ssl_read(plain)), self.ahead);
        if ahead != 0 {
            renumber(exchange, ahead);
        }
        match result {
            Ok(length) => Opened::Data(length),
            Err(error) if error.code() == ErrorCode::WANT_READ => Opened::Nothing,
            Err(_) => Opened::End,
        }
    }

    /// Makes one record of these parts. Whether it did: not beyond 2^14 bytes (RFC 6347 §4.1.1), nor after the end.
    pub(super) fn seal(&mut self, exchange: &mut Exchange, parts: [&[u8]; 3]) -> bool {
        let mut plain = std::mem::take(&mut exchange.plain);
        plain.clear();
        parts.iter().for_each(|part| plain.extend_from_slice(part));
        let sealed = self.with(exchange, |stream| stream.ssl_write(&plain));
        exchange.plain = plain;
        sealed.is_ok()
    }

    /// Ends it with close_notify, unless the client's handshake is not complete.
    pub(super) fn close(&mut self, exchange: &mut Exchange) {
        if self.stream.ssl().is_init_finished() && !self.stream.get_shutdown().contains(ShutdownState::SENT) {
            // There is nobody to tell of what may be wrong now.
            let _ = self.with(exchange, |stream| stream.shutdown());
        }
    }

    fn with<T>(&mut self, exchange: &mut Exchange, act: impl FnOnce(&mut SslStream<Wire>) -> T) -> T {
        std::mem::swap(&mut self.stream.get_mut().0, exchange);
        let result = act(&mut self.stream);
        std::mem::swap(&mut self.stream.get_mut().0, exchange);
        result
    }
}

/// Adds to the sequence numbers of the records of epoch 0, which nothing protects.
fn renumber(exchange: &mut Exchange, ahead: u64) {
    let mut start = 0;
    // Records do not span datagrams, so the datagrams are one row of records.
    while let Some(header) = exchange.outgoing.get_mut(start..start + RECORD_HEADER) {
        if header[3..5] == [0, 0] {
            let mut number = [0; 8];
            number[2..].copy_from_slice(&header[5..11]);
            let number = u64::from_be_bytes(number).wrapping_add(ahead).to_be_bytes();
            header[5..11].copy_from_slice(&number[2..]);
        }
        start += RECORD_HEADER + usize::from(u16::from_be_bytes([header[11], header[12]]));
    }
}

/// A ClientHello without a cookie, of one cipher suite.
fn first_hello(number: u8) -> [u8; 67] {
    let mut packet = [0; 67];
    packet[..3].copy_from_slice(&[22, 0xFE, 0xFD]);
    (packet[10], packet[12]) = (number, 54);
    (packet[13], packet[16], packet[18], packet[24]) = (1, 42, number, 42);
    packet[25..27].copy_from_slice(&[0xFE, 0xFD]);
    // Random, session_id and cookie stay zero; then the suites, and the null compression.
    packet[61..].copy_from_slice(&[0, 2, 0xC0, 0x2B, 1, 0]);
    packet
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::time::Instant;

    use openssl::ssl::{Ssl, SslContext, SslMethod, SslVerifyMode};
    use turn_core::wire::client_hello::ClientHello;

    use super::*;
    use crate::certificates::CertificateFiles;
    use crate::dataplane::dtls_context::Contexts;
    use crate::dataplane::dtls_context::tests::{contexts, self_signed, write};
    use crate::dataplane::dtls_hello::Cookies;

    /// A client that is a value too.
    struct Client {
        stream: SslStream<Wire>,
        exchange: Exchange,
    }

    impl Client {
        fn new(set: impl FnOnce(&mut Ssl)) -> Self {
            let mut builder = SslContext::builder(SslMethod::dtls_client()).expect("a context");
            builder.set_verify(SslVerifyMode::NONE);
            let mut ssl = Ssl::new(&builder.build()).expect("a session");
            ssl.set_connect_state();
            set(&mut ssl);
            Self { stream: SslStream::new(ssl, Wire::default()).expect("a stream"), exchange: Exchange::default() }
        }

        /// Hands in what came; what it sends then, and whether its handshake is complete.
        fn handshake(&mut self, incoming: &[Vec<u8>]) -> (Vec<Vec<u8>>, bool) {
            let (mut sent, mut done) = (Vec::new(), false);
            for datagram in incoming.iter().map(Vec::as_slice).chain([&[][..]]) {
                self.exchange.bring(datagram);
                done = self.with(SslStream::do_handshake).is_ok();
                sent.extend(self.exchange.outgoing().map(<[u8]>::to_vec));
                self.exchange.clear();
            }
            (sent, done)
        }

        fn with<T>(&mut self, act: impl FnOnce(&mut SslStream<Wire>) -> T) -> T {
            std::mem::swap(&mut self.stream.get_mut().0, &mut self.exchange);
            let result = act(&mut self.stream);
            std::mem::swap(&mut self.stream.get_mut().0, &mut self.exchange);
            result
        }
    }

    fn taken(exchange: &mut Exchange) -> Vec<Vec<u8>> {
        let sent = exchange.outgoing().map(<[u8]>::to_vec).collect();
        exchange.clear();
        sent
    }

    /// Has a client's hellos answered until one brings a cookie; the session that begins with it, and its first flight.
    fn begin(client: &mut Client, context: &Context, lost: usize) -> (Session, Vec<Vec<u8>>, Exchange) {
        let address: SocketAddr = "192.0.2.1:5000".parse().expect("literal");
        let cookies = Cookies::new([1; 64], Instant::now());
        let (mut hellos, _) = client.handshake(&[]);
        for _ in 0..lost {
            // It asks again in its own time.
            hellos.clear();
            while hellos.is_empty() {
                hellos = client.handshake(&[]).0;
            }
        }
        let hello = ClientHello::read(&hellos[0]).expect("a ClientHello");
        let verify = cookies.request(address, address, &hello, Instant::now()).to_vec();
        let (hellos, _) = client.handshake(&[verify]);
        let hello = ClientHello::read(&hellos[0]).expect("a ClientHello");
        assert!(cookies.verify(address, address, &hello, Instant::now()));
        let mut exchange = Exchange::default();
        let mut session =
            Session::new(context, hello.message_sequence, hello.record_sequence, &mut exchange).expect("a session");
        assert_eq!(exchange.outgoing().count(), 0, "the HelloVerifyRequest of OpenSSL stays here");
        // A long one comes in fragments.
        for hello in &hellos {
            exchange.bring(hello);
            assert_eq!(session.handshake(&mut exchange), Handshake::Pending);
        }
        let flight = taken(&mut exchange);
        assert_eq!(flight[0][5..11], hello.record_sequence.to_be_bytes()[2..], "RFC 6347 §4.2.1");
        assert!(flight.iter().all(|datagram| datagram.len() <= 1232));
        (session, flight, exchange)
    }

    fn finish(client: &mut Client, session: &mut Session, flight: &[Vec<u8>], exchange: &mut Exchange) {
        let (sent, _) = client.handshake(flight);
        let mut state = Handshake::Pending;
        for datagram in &sent {
            exchange.bring(datagram);
            state = session.handshake(exchange);
        }
        assert_eq!(state, Handshake::Done);
        assert!(client.handshake(&taken(exchange)).1);
    }

    fn talk(client: &mut Client, session: &mut Session, exchange: &mut Exchange) {
        let mut plain = vec![0; 1 << 14];
        for length in [1, 172, 1 << 14] {
            let data = vec![length as u8; length];
            client.with(|stream| stream.ssl_write(&data)).expect("sealed");
            let sent = taken(&mut client.exchange);
            exchange.bring(&sent[0]);
            assert_eq!(session.open(exchange, &mut plain), Opened::Data(length));
            assert_eq!(session.open(exchange, &mut [0; 1 << 14]), Opened::Nothing);
            assert_eq!(plain[..length], data);
            // A replay is nothing.
            exchange.bring(&sent[0]);
            assert_eq!(session.open(exchange, &mut plain), Opened::Nothing);

            assert!(session.seal(exchange, [&data[..length / 2], &data[length / 2..], &[]]));
            let sent = taken(exchange);
            client.exchange.bring(&sent[0]);
            assert_eq!(client.with(|stream| stream.ssl_read(&mut plain)).expect("opened"), length);
            assert_eq!(plain[..length], data);
        }
        assert!(!session.seal(exchange, [&[0; 1 << 14], b"x", &[]]), "longer than a record");
        exchange.clear();
    }

    /// An ECDSA key, for `a.example`.
    fn ecdsa() -> Contexts {
        let directory = tempfile::tempdir().expect("a directory");
        contexts(&[self_signed(directory.path(), "a", &["a.example"])])
    }

    fn rsa(directory: &std::path::Path) -> CertificateFiles {
        let key = openssl::pkey::PKey::from_rsa(openssl::rsa::Rsa::generate(2048).expect("a key")).expect("a key");
        let pem = String::from_utf8(key.private_key_to_pem_pkcs8().expect("PEM")).expect("text");
        let pair = rcgen::KeyPair::from_pem_and_sign_algo(&pem, &rcgen::PKCS_RSA_SHA256).expect("a pair");
        let params = rcgen::CertificateParams::new(vec!["rsa.example".into()]).expect("a name");
        write(directory, "rsa", &params.self_signed(&pair).expect("signed").pem(), &pem)
    }

    #[test]
    fn a_session_begins_at_the_second_hello() {
        let directory = tempfile::tempdir().expect("a directory");
        for (what, contexts) in [("ECDSA", ecdsa()), ("RSA", contexts(&[rsa(directory.path())]))] {
            let context = contexts.current();
            let mut client = Client::new(|_| ());
            let (mut session, flight, mut exchange) = begin(&mut client, &context, 0);
            finish(&mut client, &mut session, &flight, &mut exchange);
            talk(&mut client, &mut session, &mut exchange);
            assert_eq!(client.stream.ssl().version_str(), "DTLSv1.2", "{what}");

            session.close(&mut exchange);
            let sent = taken(&mut exchange);
            assert_eq!(sent.len(), 1);
            client.exchange.bring(&sent[0]);
            let error = client.with(|stream| stream.ssl_read(&mut [0; 100])).expect_err("the end");
            assert_eq!(error.code(), ErrorCode::ZERO_RETURN, "close_notify");
        }
    }

    #[test]
    fn records_are_numbered_from_the_hello_that_brought_the_cookie() {
        let context = ecdsa().current();
        let mut client = Client::new(|_| ());
        let (mut session, flight, mut exchange) = begin(&mut client, &context, 1);
        finish(&mut client, &mut session, &flight, &mut exchange);
        talk(&mut client, &mut session, &mut exchange);
    }

    #[test]
    fn what_is_lost_is_sent_again() {
        let context = ecdsa().current();
        let mut client = Client::new(|_| ());
        let (mut session, flight, mut exchange) = begin(&mut client, &context, 0);
        let mut again = Vec::new();
        while again.is_empty() {
            assert_eq!(session.handshake(&mut exchange), Handshake::Pending);
            again = taken(&mut exchange);
        }
        assert_eq!(again.concat().len(), flight.concat().len());
        assert_ne!(again.concat(), flight.concat(), "records of a retransmission have new numbers");
        finish(&mut client, &mut session, &again, &mut exchange);
        talk(&mut client, &mut session, &mut exchange);
    }

    #[test]
    fn certificate_and_protocol_are_chosen_by_the_client() {
        let directory = tempfile::tempdir().expect("a directory");
        let first = self_signed(directory.path(), "a", &["a.example"]);
        let second = self_signed(directory.path(), "b", &["b.example", "*.c.example"]);
        let context = contexts(&[first, second]).current();
        let named = |name: Option<&str>| {
            let mut client = Client::new(|ssl| {
                if let Some(name) = name {
                    ssl.set_hostname(name).expect("a name");
                }
                ssl.set_alpn_protos(b"\x12stun.nat-discovery\x09stun.turn").expect("a list");
            });
            let (mut session, flight, mut exchange) = begin(&mut client, &context, 0);
            finish(&mut client, &mut session, &flight, &mut exchange);
            let certificate = client.stream.ssl().peer_certificate().expect("a certificate");
            let names = certificate.subject_alt_names().expect("names");
            let protocol = client.stream.ssl().selected_alpn_protocol().map(<[u8]>::to_vec);
            assert_eq!(protocol.as_deref(), Some(&b"stun.turn"[..]), "RFC 7443 §3");
            names[0].dnsname().map(str::to_owned)
        };
        let fragments = Client::new(|ssl| ssl.set_hostname(&"long".repeat(50)).expect("a name")).handshake(&[]).0.len();
        assert!(fragments > 1, "the client of this test writes small datagrams");
        for (asked, expected) in [
            (None, "a.example"),
            (Some("a.example"), "a.example"),
            (Some("B.example"), "b.example"),
            (Some("x.c.example"), "b.example"),
            (Some("unknown.example"), "a.example"),
            (Some(&"long.".repeat(40)), "a.example"),
        ] {
            assert_eq!(named(asked).as_deref(), Some(expected), "{asked:?}");
        }
    }

    #[test]
    fn a_client_of_other_protocols_is_told() {
        let context = ecdsa().current();
        let mut client = Client::new(|ssl| ssl.set_alpn_protos(b"\x06webrtc").expect("a list"));
        let (hellos, _) = client.handshake(&[]);
        let hello = ClientHello::read(&hellos[0]).expect("a ClientHello");
        let address: SocketAddr = "192.0.2.1:5000".parse().expect("literal");
        let verify = Cookies::new([1; 64], Instant::now()).request(address, address, &hello, Instant::now()).to_vec();
        let (hellos, _) = client.handshake(&[verify]);
        let mut exchange = Exchange::default();
        let mut session = Session::new(&context, 1, 1, &mut exchange).expect("a session");
        exchange.bring(&hellos[0]);
        assert_eq!(session.handshake(&mut exchange), Handshake::Failed);
        let sent = taken(&mut exchange);
        // RFC 7301 §3.2: no_application_protocol, fatal.
        assert_eq!((sent[0][0], &sent[0][13..]), (21, &[2, 120][..]));
        assert!(Session::new(&context, 0, 1, &mut exchange).is_none(), "the first hello never begins one");
        assert!(Session::new(&context, 5, 9, &mut exchange).is_none());
        assert!(Session::new(&context, 2, 1, &mut exchange).is_none(), "fewer records than hellos");
    }
}
