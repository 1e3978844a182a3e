//! Bytes: which kind a packet is (RFC 8656 §12), STUN messages, ChannelData. Imports nothing outside this module.
//!
//! Every reader here is total: any bytes give a value or an error, in time linear in their number, without heap.
//!
//! | module | what it knows |
//! |---|---|
//! | [`message`] | the STUN message: a borrowed one-pass reader and an in-place writer |
//! | [`attribute`] | one type per attribute, by RFC name and number |
//! | [`channel_data`] | the ChannelData message |
//! | [`client_hello`] | the first fragment of a DTLS ClientHello |
//! | [`error_code`] | ERROR-CODE and the codes of RFC 8489 and RFC 8656 |
//! | [`integrity`] | MESSAGE-INTEGRITY, MESSAGE-INTEGRITY-SHA256 and FINGERPRINT |
//! | [`stream`] | where a frame ends on TCP and TLS |

pub mod attribute;
pub mod channel_data;
pub mod client_hello;
pub mod error_code;
pub mod integrity;
pub mod message;
pub mod stream;

pub use attribute::{Attribute, AttributeSet, AttributeType};
pub use channel_data::{ChannelData, ChannelDataError, ChannelNumber};
pub use error_code::ErrorCode;
pub use integrity::{Integrity, PreparedKey};
pub use message::{
    AttributeError, Class, Message, MessageWriter, Method, ParseError, TransactionId, UnknownAttributes, WriteError,
};

/// What the first byte of a packet says (RFC 7983 §7, RFC 8656 §12 Table 3).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// 0..=3: a STUN message.
    Stun,
    /// 20..=63: a DTLS record.
    Dtls,
    /// 64..=79: a ChannelData message.
    ChannelData,
    /// Anything else, and the empty packet: never served.
    Other,
}

/// Demultiplexes a packet by its first byte (RFC 8656 §12).
pub fn kind(packet: &[u8]) -> Kind {
    match packet.first() {
        Some(0..=3) => Kind::Stun,
        Some(20..=63) => Kind::Dtls,
        Some(64..=79) => Kind::ChannelData,
        _ => Kind::Other,
    }
}

/// `len` rounded up to the 4-byte boundary on which attributes end (RFC 8489 §14) and stream frames too
/// (RFC 8656 §12.5).
pub(crate) const fn padded(len: usize) -> usize {
    len.next_multiple_of(4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_byte_decides() {
        // RFC 8656 §12, Table 3.
        let cases: &[(&str, &[u8], Kind)] = &[
            ("empty", &[], Kind::Other),
            ("lowest STUN", &[0], Kind::Stun),
            ("highest STUN", &[3], Kind::Stun),
            ("below ZRTP", &[15], Kind::Other),
            ("ZRTP", &[16], Kind::Other),
            ("lowest DTLS", &[20], Kind::Dtls),
            ("highest DTLS", &[63], Kind::Dtls),
            ("channel 0x40..", &[0x40], Kind::ChannelData),
            ("channel 0x4F..", &[0x4F], Kind::ChannelData),
            ("reserved 0x50..", &[0x50], Kind::Other),
            ("RTP", &[128], Kind::Other),
            ("highest", &[255], Kind::Other),
        ];
        for (what, packet, expected) in cases {
            assert_eq!(kind(packet), *expected, "{what}");
        }
    }
}
