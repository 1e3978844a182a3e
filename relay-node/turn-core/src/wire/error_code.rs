//! ERROR-CODE (RFC 8489 §14.8) and the codes of RFC 8489, RFC 8656, RFC 6062 and RFC 8016.

use super::attribute::{Attribute, AttributeType};
use super::message::TransactionId;

/// An error code, 300..=699, written with its recommended reason phrase.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct ErrorCode(u16);

macro_rules! error_codes {
    ($($code:literal $name:ident $reason:literal $rfc:literal)*) => {
        impl ErrorCode {
            $(#[doc = concat!($code, " ", $reason, " (", $rfc, ").")] pub const $name: Self = Self($code);)*

            /// The reason phrase the RFCs recommend; empty for a code they do not define.
            pub const fn reason(self) -> &'static str {
                match self.0 {
                    $($code => $reason,)*
                    _ => "",
                }
            }
        }
    };
}

error_codes! {
    300 TRY_ALTERNATE "Try Alternate" "RFC 8489 §14.8"
    400 BAD_REQUEST "Bad Request" "RFC 8489 §14.8"
    401 UNAUTHENTICATED "Unauthenticated" "RFC 8489 §14.8"
    403 FORBIDDEN "Forbidden" "RFC 8656 §19"
    405 MOBILITY_FORBIDDEN "Mobility Forbidden" "RFC 8016 §3.2.2"
    420 UNKNOWN_ATTRIBUTE "Unknown Attribute" "RFC 8489 §14.8"
    437 ALLOCATION_MISMATCH "Allocation Mismatch" "RFC 8656 §19"
    438 STALE_NONCE "Stale Nonce" "RFC 8489 §14.8"
    440 ADDRESS_FAMILY_NOT_SUPPORTED "Address Family not Supported" "RFC 8656 §19"
    441 WRONG_CREDENTIALS "Wrong Credentials" "RFC 8656 §19"
    442 UNSUPPORTED_TRANSPORT_PROTOCOL "Unsupported Transport Protocol" "RFC 8656 §19"
    443 PEER_ADDRESS_FAMILY_MISMATCH "Peer Address Family Mismatch" "RFC 8656 §19"
    446 CONNECTION_ALREADY_EXISTS "Connection Already Exists" "RFC 6062 §6.3"
    447 CONNECTION_TIMEOUT_OR_FAILURE "Connection Timeout or Failure" "RFC 6062 §6.3"
    486 ALLOCATION_QUOTA_REACHED "Allocation Quota Reached" "RFC 8656 §19"
    500 SERVER_ERROR "Server Error" "RFC 8489 §14.8"
    508 INSUFFICIENT_CAPACITY "Insufficient Capacity" "RFC 8656 §19"
}

impl ErrorCode {
    /// The code, if it is in 300..=699.
    pub const fn new(code: u16) -> Option<Self> {
        match code {
            300..=699 => Some(Self(code)),
            _ => None,
        }
    }

    /// The number.
    pub const fn code(self) -> u16 {
        self.0
    }

    /// Class (hundreds) and number (the rest), as the wire has them.
    const fn digits(self) -> [u8; 2] {
        [(self.0 / 100) as u8, (self.0 % 100) as u8]
    }

    /// RFC 8489 §14.8: the reserved bits are ignored, the class is 3..=6, the number 0..=99.
    fn from_digits(class: u8, number: u8) -> Option<Self> {
        match (class & 0x07, number) {
            (class @ 3..=6, 0..=99) => Some(Self(u16::from(class) * 100 + u16::from(number))),
            _ => None,
        }
    }
}

impl Attribute<'_> for ErrorCode {
    const TYPE: AttributeType = AttributeType::ERROR_CODE;

    fn decode(value: &[u8], _: &TransactionId) -> Option<Self> {
        let [_, _, class, number] = *value.first_chunk()?;
        Self::from_digits(class, number)
    }

    fn value_len(&self) -> usize {
        4 + self.reason().len()
    }

    fn encode(&self, value: &mut [u8], _: &TransactionId) {
        let [class, number] = self.digits();
        value[..4].copy_from_slice(&[0, 0, class, number]);
        value[4..].copy_from_slice(self.reason().as_bytes());
    }
}

/// ERROR-CODE without a reason phrase, which is for people (RFC 8489 §14.8): where an answer must be short.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BareErrorCode(pub ErrorCode);

impl Attribute<'_> for BareErrorCode {
    const TYPE: AttributeType = AttributeType::ERROR_CODE;

    fn decode(value: &[u8], transaction_id: &TransactionId) -> Option<Self> {
        ErrorCode::decode(value, transaction_id).map(Self)
    }

    fn value_len(&self) -> usize {
        4
    }

    fn encode(&self, value: &mut [u8], _: &TransactionId) {
        let [class, number] = self.0.digits();
        value.copy_from_slice(&[0, 0, class, number]);
    }
}

/// ADDRESS-ERROR-CODE (RFC 8656 §18.12): why one of two address families was not granted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct AddressErrorCode {
    /// 1 is IPv4, 2 is IPv6.
    pub family: u8,
    /// 440 or 508.
    pub error: ErrorCode,
}

impl Attribute<'_> for AddressErrorCode {
    const TYPE: AttributeType = AttributeType::ADDRESS_ERROR_CODE;

    fn decode(value: &[u8], _: &TransactionId) -> Option<Self> {
        let [family, _, class, number] = *value.first_chunk()?;
        let error = ErrorCode::from_digits(class, number)?;
        Some(Self { family, error })
    }

    fn value_len(&self) -> usize {
        4 + self.error.reason().len()
    }

    fn encode(&self, value: &mut [u8], _: &TransactionId) {
        let [class, number] = self.error.digits();
        value[..4].copy_from_slice(&[self.family, 0, class, number]);
        value[4..].copy_from_slice(self.error.reason().as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: TransactionId = TransactionId([0; 12]);

    #[test]
    fn codes_are_class_and_number() {
        // RFC 8489 §14.8.
        let cases: &[(&str, &[u8], Option<u16>)] = &[
            ("438", &[0, 0, 4, 38], Some(438)),
            ("with a reason", b"\0\0\x05\x08Insufficient", Some(508)),
            ("reserved bits set", &[0xFF, 0xFF, 0xFC, 38], Some(438)),
            ("class 2", &[0, 0, 2, 0], None),
            ("class 7", &[0, 0, 7, 0], None),
            ("number 100", &[0, 0, 4, 100], None),
            ("three bytes", &[0, 0, 4], None),
        ];
        for (what, value, expected) in cases {
            assert_eq!(ErrorCode::decode(value, &ID).map(ErrorCode::code), *expected, "{what}");
        }
    }

    #[test]
    fn written_with_the_reason() {
        let mut value = [0; 15];
        assert_eq!(ErrorCode::BAD_REQUEST.value_len(), value.len());
        ErrorCode::BAD_REQUEST.encode(&mut value, &ID);
        assert_eq!(&value, b"\0\0\x04\x00Bad Request");
    }
}
