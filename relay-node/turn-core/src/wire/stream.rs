//! Where a frame ends on TCP and TLS (RFC 8656 §12.5, RFC 8489 §6.2.2). Pure: the caller keeps the bytes.

use super::message::MAGIC_COOKIE;
use super::{Kind, kind, padded};

/// What stands at the start of a stream's buffer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Frame {
    /// A frame of this many bytes, padding included, is there. The core leaves the padding out by itself.
    Whole(usize),
    /// The frame, or as much as is known of it, needs at least this many bytes from its start.
    Partial(usize),
    /// Neither STUN nor ChannelData: framing is lost for good, close the connection.
    Invalid,
}

/// Longest frame there is: a STUN message. A padded ChannelData message ends 12 bytes earlier.
pub const MAX_FRAME: usize = 20 + 65_532;

/// Looks at the start of a stream's buffer.
///
/// ChannelData on a stream is padded to 4 bytes (RFC 8656 §12.5). A STUN length that is no multiple of 4 or a wrong
/// cookie cannot be skipped over, since its length cannot be believed.
pub fn frame(buffer: &[u8]) -> Frame {
    let len = match kind(buffer) {
        _ if buffer.is_empty() => return Frame::Partial(4),
        Kind::ChannelData => match buffer.first_chunk::<4>() {
            Some(&[_, _, l0, l1]) => padded(4 + usize::from(u16::from_be_bytes([l0, l1]))),
            None => return Frame::Partial(4),
        },
        Kind::Stun => match buffer.first_chunk::<8>() {
            Some(&[_, _, l0, l1, ref cookie @ ..]) => {
                let len = usize::from(u16::from_be_bytes([l0, l1]));
                if *cookie != MAGIC_COOKIE || len % 4 != 0 {
                    return Frame::Invalid;
                }
                20 + len
            }
            None => return Frame::Partial(8),
        },
        Kind::Dtls | Kind::Other => return Frame::Invalid,
    };
    if buffer.len() < len { Frame::Partial(len) } else { Frame::Whole(len) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_end_where_rfc_8656_12_5_says() {
        let stun = b"\x00\x01\x00\x04\x21\x12\xA4\x42abcdefghijkl\x80\x22\x00\x00";
        let cases: &[(&str, &[u8], Frame)] = &[
            ("nothing yet", &[], Frame::Partial(4)),
            ("one byte of a channel", &[0x40], Frame::Partial(4)),
            ("empty ChannelData", &[0x40, 0, 0, 0], Frame::Whole(4)),
            ("padding to come", &[0x40, 0, 0, 1, 9], Frame::Partial(8)),
            ("padded", &[0x40, 0, 0, 1, 9, 0, 0, 0, 0x40], Frame::Whole(8)),
            ("longest ChannelData", &[0x4F, 0xFF, 0xFF, 0xFF], Frame::Partial(65_540)),
            ("longest STUN", b"\x00\x01\xFF\xFC\x21\x12\xA4\x42", Frame::Partial(MAX_FRAME)),
            ("one byte of STUN", &stun[..1], Frame::Partial(8)),
            ("half a STUN header", &stun[..10], Frame::Partial(24)),
            ("STUN but for a byte", &stun[..23], Frame::Partial(24)),
            ("STUN", stun, Frame::Whole(24)),
            ("wrong cookie", b"\x00\x01\x00\x04\x21\x12\xA4\x43", Frame::Invalid),
            ("odd length", b"\x00\x01\x00\x03\x21\x12\xA4\x42", Frame::Invalid),
            ("TLS on the plain port", &[0x16, 3, 1], Frame::Invalid),
            ("HTTP PUT", b"PUT / HTTP/1.1\r\n", Frame::Invalid),
            ("RTP", &[0x80], Frame::Invalid),
        ];
        for (what, buffer, expected) in cases {
            assert_eq!(frame(buffer), *expected, "{what}");
        }
    }
}
