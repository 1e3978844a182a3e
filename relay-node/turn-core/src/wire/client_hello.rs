//! The first fragment of a DTLS ClientHello (RFC 6347 §4.1, §4.2.1, §4.2.2): as much as a server reads that keeps no
//! state until a client has proved its address.

/// Record header (RFC 6347 §4.1).
const RECORD_HEADER: usize = 13;
/// Handshake header (RFC 6347 §4.2.2).
const HANDSHAKE_HEADER: usize = 12;
/// ContentType handshake (RFC 5246 §6.2.1).
const HANDSHAKE: u8 = 22;
/// HandshakeType client_hello (RFC 5246 §7.4).
const CLIENT_HELLO: u8 = 1;
/// Upper byte of every DTLS version, one's complement of 1 (RFC 6347 §4.1).
const DTLS_MAJOR: u8 = 0xFE;

/// What a ClientHello says up to its cookie.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ClientHello<'a> {
    /// Sequence number of the record, 48 bits; its epoch is 0.
    pub record_sequence: u64,
    /// Number of the handshake message: 0 for the first ClientHello, 1 for the one that brings the cookie.
    pub message_sequence: u16,
    /// Everything from client_version to the end of session_id, which a client repeats unchanged when it brings the
    /// cookie (RFC 6347 §4.2.1). The random stands in it.
    pub parameters: &'a [u8],
    /// Empty in the first one.
    pub cookie: &'a [u8],
}

impl<'a> ClientHello<'a> {
    /// The ClientHello with which a datagram begins; none if it begins with anything else, with a later fragment, or
    /// with a first fragment that ends before the cookie does.
    pub fn read(datagram: &'a [u8]) -> Option<Self> {
        let (header, rest) = datagram.split_first_chunk::<RECORD_HEADER>()?;
        let [HANDSHAKE, DTLS_MAJOR, _, 0, 0, s0, s1, s2, s3, s4, s5, l0, l1] = *header else {
            return None;
        };
        let record = rest.get(..usize::from(u16::from_be_bytes([l0, l1])))?;
        let (header, rest) = record.split_first_chunk::<HANDSHAKE_HEADER>()?;
        // Offset 0: the first fragment, or the whole.
        let [CLIENT_HELLO, m0, m1, m2, q0, q1, 0, 0, 0, f0, f1, f2] = *header else {
            return None;
        };
        let (length, fragment) = (u32::from_be_bytes([0, m0, m1, m2]), u32::from_be_bytes([0, f0, f1, f2]));
        if fragment > length {
            return None;
        }
        let body = rest.get(..usize::try_from(fragment).ok()?)?;
        // client_version 2, random 32, session_id 1 + 0..=32 (RFC 5246 §7.4.1.2).
        let session_id = usize::from(*body.get(34)?);
        if body[0] != DTLS_MAJOR || session_id > 32 {
            return None;
        }
        let (parameters, rest) = body.split_at_checked(35 + session_id)?;
        let (length, rest) = rest.split_first()?;
        Some(Self {
            record_sequence: u64::from_be_bytes([0, 0, s0, s1, s2, s3, s4, s5]),
            message_sequence: u16::from_be_bytes([q0, q1]),
            parameters,
            cookie: rest.get(..usize::from(*length))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ClientHello as a client writes it, in one record.
    fn hello(session_id: &[u8], cookie: &[u8]) -> Vec<u8> {
        let mut body = vec![0xFE, 0xFD];
        body.extend([7; 32]);
        body.push(session_id.len() as u8);
        body.extend(session_id);
        body.push(cookie.len() as u8);
        body.extend(cookie);
        // One cipher suite, the null compression.
        body.extend([0, 2, 0xC0, 0x2B, 1, 0]);
        let length = body.len() as u8;
        let mut packet = vec![22, 0xFE, 0xFF, 0, 0, 0, 0, 0, 0, 0, 9, 0, length + 12];
        packet.extend([1, 0, 0, length, 0, 1, 0, 0, 0, 0, 0, length]);
        packet.extend(body);
        packet
    }

    #[test]
    fn reads_up_to_the_cookie() {
        for (session_id, cookie) in [(&b""[..], &b""[..]), (b"", b"cookie"), (&[3; 32], &[4; 100])] {
            let packet = hello(session_id, cookie);
            let read = ClientHello::read(&packet).expect("a ClientHello");
            assert_eq!((read.record_sequence, read.message_sequence), (9, 1));
            assert_eq!((read.parameters.len(), read.cookie), (35 + session_id.len(), cookie));
            assert_eq!(&read.parameters[2..34], &[7; 32]);
        }
    }

    #[test]
    fn a_first_fragment_that_holds_the_cookie_is_enough() {
        // RFC 6347 §4.2.3: record of the fragment's length, message of the whole one's.
        let whole = hello(b"", b"cookie");
        let end = RECORD_HEADER + HANDSHAKE_HEADER + 36 + 6;
        for length in RECORD_HEADER + HANDSHAKE_HEADER..whole.len() {
            let mut packet = whole[..length].to_vec();
            packet[12] = (length - RECORD_HEADER) as u8;
            packet[24] = (length - RECORD_HEADER - HANDSHAKE_HEADER) as u8;
            assert_eq!(ClientHello::read(&packet).is_some(), length >= end, "{length} bytes");
        }
    }

    #[test]
    fn everything_else_is_none() {
        let right = hello(b"", b"");
        for length in 0..right.len() {
            assert_eq!(ClientHello::read(&right[..length]), None, "cut at {length}");
        }
        let cases: &[(&str, usize, u8)] = &[
            ("application data", 0, 23),
            ("TLS", 1, 3),
            ("epoch 1", 4, 1),
            ("record longer than the datagram", 12, 255),
            ("ServerHello", 13, 2),
            ("a later fragment", 21, 1),
            ("fragment longer than the message", 16, 10),
            ("fragment longer than the record", 24, 255),
            ("client_version of TLS", 25, 3),
            ("session_id of 33 bytes", 59, 33),
            ("cookie beyond the end", 60, 200),
        ];
        for (what, at, value) in cases {
            let mut packet = right.clone();
            packet[*at] = *value;
            assert_eq!(ClientHello::read(&packet), None, "{what}");
        }
    }
}
