//! Grammar (abuse.md B) and the vectors of RFC 5769 and RFC 8489 B.1.

use std::net::SocketAddr;

use md5::{Digest, Md5};
use sha2::Sha256;

use super::*;
use crate::wire::attribute::*;
use crate::wire::error_code::ErrorCode;

const ID: TransactionId = TransactionId(*b"abcdefghijkl");
const RFC_5769_ID: TransactionId = TransactionId(*b"\xb7\xe7\xa7\x01\xbc\x34\xd6\x86\xfa\x87\xdf\xae");
const RFC_5769_PASSWORD: &[u8] = b"VOkJxbRl1RmTxUk/WvJxBt";

const RFC_5769_REQUEST: &[u8] = b"\x00\x01\x00\x58\x21\x12\xa4\x42\
    \xb7\xe7\xa7\x01\xbc\x34\xd6\x86\xfa\x87\xdf\xae\
    \x80\x22\x00\x10STUN test client\
    \x00\x24\x00\x04\x6e\x00\x01\xff\
    \x80\x29\x00\x08\x93\x2f\xf9\xb1\x51\x26\x3b\x36\
    \x00\x06\x00\x09\x65\x76\x74\x6a\x3a\x68\x36\x76\x59\x20\x20\x20\
    \x00\x08\x00\x14\x9a\xea\xa7\x0c\xbf\xd8\xcb\x56\x78\x1e\xf2\xb5\xb2\xd3\xf2\x49\xc1\xb5\x71\xa2\
    \x80\x28\x00\x04\xe5\x7a\x3b\xcf";

const RFC_5769_IPV4: &[u8] = b"\x01\x01\x00\x3c\x21\x12\xa4\x42\
    \xb7\xe7\xa7\x01\xbc\x34\xd6\x86\xfa\x87\xdf\xae\
    \x80\x22\x00\x0b\x74\x65\x73\x74\x20\x76\x65\x63\x74\x6f\x72\x20\
    \x00\x20\x00\x08\x00\x01\xa1\x47\xe1\x12\xa6\x43\
    \x00\x08\x00\x14\x2b\x91\xf5\x99\xfd\x9e\x90\xc3\x8c\x74\x89\xf9\x2a\xf9\xba\x53\xf0\x6b\xe7\xd7\
    \x80\x28\x00\x04\xc0\x7d\x4c\x96";

const RFC_5769_IPV6: &[u8] = b"\x01\x01\x00\x48\x21\x12\xa4\x42\
    \xb7\xe7\xa7\x01\xbc\x34\xd6\x86\xfa\x87\xdf\xae\
    \x80\x22\x00\x0b\x74\x65\x73\x74\x20\x76\x65\x63\x74\x6f\x72\x20\
    \x00\x20\x00\x14\x00\x02\xa1\x47\
    \x01\x13\xa9\xfa\xa5\xd3\xf1\x79\xbc\x25\xf4\xb5\xbe\xd2\xb9\xd9\
    \x00\x08\x00\x14\xa3\x82\x95\x4e\x4b\xe6\x7b\xf1\x17\x84\xc9\x7c\x82\x92\xc2\x75\xbf\xe3\xed\x41\
    \x80\x28\x00\x04\xc8\xfb\x0b\x4c";

const RFC_5769_LONG_TERM: &[u8] = b"\x00\x01\x00\x60\x21\x12\xa4\x42\
    \x78\xad\x34\x33\xc6\xad\x72\xc0\x29\xda\x41\x2e\
    \x00\x06\x00\x12\xe3\x83\x9e\xe3\x83\x88\xe3\x83\xaa\xe3\x83\x83\xe3\x82\xaf\xe3\x82\xb9\x00\x00\
    \x00\x15\x00\x1cf//499k954d6OL34oL9FSTvy64sA\
    \x00\x14\x00\x0bexample.org\x00\
    \x00\x08\x00\x14\xf6\x70\x24\x65\x6d\xd6\x4a\x3e\x02\xb8\xe0\x71\x2e\x85\xc9\xa2\x8c\xa8\x96\x66";

/// A Binding request with these attribute bytes and a right length.
fn request(attributes: &[u8]) -> Vec<u8> {
    let len = u16::try_from(attributes.len()).expect("short");
    let mut bytes = vec![0, 1];
    bytes.extend(len.to_be_bytes());
    bytes.extend(MAGIC_COOKIE);
    bytes.extend(ID.0);
    bytes.extend(attributes);
    bytes
}

#[test]
fn grammar() {
    let mut odd = request(&[0; 3]);
    odd[0] = 0;
    let mut longer = request(&[]);
    longer.extend([0; 4]);
    let cases: &[(&str, &[u8], Result<(), ParseError>)] = &[
        ("empty datagram", &[], Err(ParseError::Truncated)),
        ("header cut at byte 19", &[0; 19], Err(ParseError::Truncated)),
        ("RFC 3489, no cookie", &[0; 20], Err(ParseError::MagicCookie)),
        ("first bits set", &[0x40; 20], Err(ParseError::NotStun)),
        ("binding request", &request(&[]), Ok(())),
        ("odd length", &odd, Err(ParseError::Length(3))),
        ("longer than its length", &longer, Err(ParseError::Length(0))),
        ("shorter than its length", &request(&[0x80, 0x22, 0, 0])[..20], Err(ParseError::Length(4))),
        ("empty attribute", &request(&[0x80, 0x22, 0, 0]), Ok(())),
        (
            "attribute past the end",
            &request(&[0x80, 0x22, 0, 1]),
            Err(ParseError::AttributeLength { attribute: 0x8022, len: 1 }),
        ),
        (
            "attribute of the longest length",
            &request(&[0x80, 0x22, 0xFF, 0xFF]),
            Err(ParseError::AttributeLength { attribute: 0x8022, len: 0xFFFF }),
        ),
        ("bad FINGERPRINT", &request(&[0x80, 0x28, 0, 4, 1, 2, 3, 4]), Err(ParseError::Fingerprint)),
        ("empty FINGERPRINT", &request(&[0x80, 0x28, 0, 0]), Err(ParseError::Fingerprint)),
    ];
    for (what, bytes, expected) in cases {
        assert_eq!(Message::parse(bytes).map(|_| ()), *expected, "{what}");
    }
}

#[test]
fn fingerprint_is_last() {
    // RFC 8489 §14.7: the value is right, but something follows.
    let mut bytes = request(&[0x80, 0x28, 0, 4, 0, 0, 0, 0, 0x80, 0x22, 0, 0]);
    let crc = integrity::fingerprint(&bytes[..HEADER]);
    bytes[HEADER + 4..HEADER + 8].copy_from_slice(&crc.to_be_bytes());
    assert_eq!(Message::parse(&bytes).map(|_| ()), Err(ParseError::Fingerprint));
}

#[test]
fn types_split_and_join() {
    for number in 0..0x1000 {
        for class in [Class::Request, Class::Indication, Class::Success, Class::Error] {
            let method = Method::from_number(number);
            assert_eq!(split_type(join_type(class, method)), (class, method));
        }
    }
    // RFC 8489 §5.
    assert_eq!(join_type(Class::Success, Method::Binding), 0x0101);
    assert_eq!(join_type(Class::Error, Method::Allocate), 0x0113);
    assert_eq!(join_type(Class::Indication, Method::Data), 0x0017);
}

#[test]
fn rfc_5769_2_1_request() {
    let message = Message::parse(RFC_5769_REQUEST).expect("RFC 5769 §2.1");
    assert_eq!((message.class(), message.method()), (Class::Request, Method::Binding));
    assert_eq!(message.transaction_id(), RFC_5769_ID);
    assert_eq!(message.attribute(), Ok(Some(Software(b"STUN test client"))));
    assert_eq!(message.attribute(), Ok(Some(Username(b"evtj:h6vY"))));
    assert!(message.verify_integrity(RFC_5769_PASSWORD));
    assert!(!message.verify_integrity(b"another"));
    // PRIORITY is required and no TURN server's business.
    let unknown: Vec<_> = message.unknown_attributes(AttributeSet::default()).iter().collect();
    assert_eq!(unknown, [AttributeType(0x0024)]);
}

#[test]
fn rfc_5769_2_2_and_2_3_responses() {
    for (bytes, address) in
        [(RFC_5769_IPV4, "192.0.2.1:32853"), (RFC_5769_IPV6, "[2001:db8:1234:5678:11:2233:4455:6677]:32853")]
    {
        let address: SocketAddr = address.parse().expect("literal");
        let message = Message::parse(bytes).expect("RFC 5769");
        assert_eq!(message.class(), Class::Success);
        assert_eq!(message.attribute(), Ok(Some(XorMappedAddress(address))));
        assert!(message.verify_integrity(RFC_5769_PASSWORD));

        // The writer gives the vector but for its padding, which RFC 5769 made of spaces.
        let mut buffer = [0xEE; 256];
        let mut writer = MessageWriter::new(&mut buffer, Class::Success, Method::Binding, RFC_5769_ID);
        writer.attribute(&Software(b"test vector"));
        writer.attribute(&XorMappedAddress(address));
        let len = writer.finish().expect("fits");
        let mut expected = bytes[..len].to_vec();
        expected[2..4].copy_from_slice(&u16::try_from(len - HEADER).expect("short").to_be_bytes());
        expected[HEADER + 15] = 0;
        assert_eq!(buffer[..len], expected);
    }
}

#[test]
fn rfc_5769_2_4_long_term_request() {
    let message = Message::parse(RFC_5769_LONG_TERM).expect("RFC 5769 §2.4");
    let username = "\u{30DE}\u{30C8}\u{30EA}\u{30C3}\u{30AF}\u{30B9}".as_bytes();
    assert_eq!(message.attribute(), Ok(Some(Username(username))));
    assert_eq!(message.attribute(), Ok(Some(Realm(b"example.org"))));
    assert_eq!(message.attribute(), Ok(Some(Nonce(b"f//499k954d6OL34oL9FSTvy64sA"))));
    let key: [u8; 16] = Md5::digest([username, b":example.org:TheMatrIX"].concat()).into();
    assert!(message.verify_integrity(&key));

    let mut buffer = [0xEE; 256];
    let mut writer = MessageWriter::new(&mut buffer, Class::Request, Method::Binding, message.transaction_id());
    writer.attribute(&Username(username));
    writer.attribute(&Nonce(b"f//499k954d6OL34oL9FSTvy64sA"));
    writer.attribute(&Realm(b"example.org"));
    writer.integrity(&key);
    let len = writer.finish().expect("fits");
    assert_eq!(&buffer[..len], RFC_5769_LONG_TERM);
}

const RFC_8489_B_1: &[u8] =
    b"\x00\x01\x00\x9c\x21\x12\xa4\x42\x78\xad\x34\x33\xc6\xad\x72\xc0\x29\xda\x41\x2e\x00\x1e\x00\x20\x4a\x3c\
    \xf3\x8f\xef\x69\x92\xbd\xa9\x52\xc6\x78\x04\x17\xda\x0f\x24\x81\x94\x15\x56\x9e\x60\xb2\x05\xc4\x6e\x41\
    \x40\x7f\x17\x04\x00\x15\x00\x29\x6f\x62\x4d\x61\x74\x4a\x6f\x73\x32\x41\x41\x41\x43\x66\x2f\x2f\x34\x39\
    \x39\x6b\x39\x35\x34\x64\x36\x4f\x4c\x33\x34\x6f\x4c\x39\x46\x53\x54\x76\x79\x36\x34\x73\x41\x00\x00\x00\
    \x00\x14\x00\x0b\x65\x78\x61\x6d\x70\x6c\x65\x2e\x6f\x72\x67\x00\x00\x1c\x00\x20\xe4\x68\x6c\x8f\x0e\xde\
    \xb5\x90\x13\xe0\x70\x90\x01\x0a\x93\xef\xcc\xbc\xcc\x54\x4c\x0a\x45\xd9\xf8\x30\xaa\x6d\x6f\x73\x5a\x01";

#[test]
fn rfc_8489_b_1_userhash_and_sha256() {
    // As printed, the length counts the header too, and the HMAC covers that length. (Hashes of this vector and how
    // keys are made: `crate::key`.)
    assert_eq!(Message::parse(RFC_8489_B_1).err(), Some(ParseError::Length(0x9C)));
    let username = "\u{30DE}\u{30C8}\u{30EA}\u{30C3}\u{30AF}\u{30B9}".as_bytes();
    let key: [u8; 32] = Sha256::digest([username, b":example.org:TheMatrIX"].concat()).into();
    let (before, attribute) = RFC_8489_B_1.split_at(RFC_8489_B_1.len() - MESSAGE_INTEGRITY_SHA256_LEN);
    let printed =
        integrity::message_integrity_sha256(integrity::keyed(&key), before, MESSAGE_INTEGRITY_SHA256_LEN + HEADER);
    assert_eq!(printed, attribute[4..]);

    // With the length of RFC 8489 §5, and the HMAC over it.
    let hash: [u8; 32] = Sha256::digest([username, b":example.org"].concat()).into();
    let id = TransactionId(*RFC_8489_B_1[8..].first_chunk().expect("a header"));
    let mut buffer = [0xEE; 256];
    let mut writer = MessageWriter::new(&mut buffer, Class::Request, Method::Binding, id);
    writer.attribute(&Userhash(hash));
    writer.attribute(&Nonce(b"obMatJos2AAACf//499k954d6OL34oL9FSTvy64sA"));
    writer.attribute(&Realm(b"example.org"));
    writer.integrity_sha256(&key);
    let len = writer.finish().expect("fits");
    assert_eq!((buffer[3], &buffer[4..before.len()]), (0x88, &before[4..]));
    let message = Message::parse(&buffer[..len]).expect("well-formed");
    assert_eq!(message.attribute(), Ok(Some(Userhash(hash))));
    assert_eq!(message.attribute(), Ok(Some(Realm(b"example.org"))));
    assert!(message.verify_integrity_sha256(&key));
    assert!(!message.verify_integrity_sha256(b"another") && !message.verify_integrity(&key));
}

#[test]
fn sha256_verifies_in_the_lengths_it_may_have() {
    // RFC 8489 §14.6: 16 to 32 bytes, a multiple of 4; a truncated value is the beginning of that of its length.
    for len in 0..=40_usize {
        let padded = len.next_multiple_of(4);
        let mut attribute = vec![0, 0x1C, 0, u8::try_from(len).expect("short")];
        attribute.resize(4 + padded, 0);
        let mut bytes = request(&attribute);
        let mac = integrity::message_integrity_sha256(integrity::keyed(b"key"), &bytes[..HEADER], 4 + len);
        let shown = len.min(32);
        bytes[HEADER + 4..HEADER + 4 + shown].copy_from_slice(&mac[..shown]);
        let message = Message::parse(&bytes).expect("well-formed");
        let expected = matches!(len, 16 | 20 | 24 | 28 | 32);
        assert_eq!(message.verify_integrity_sha256(b"key"), expected, "{len} bytes");
        assert!(!message.verify_integrity_sha256(b"another"), "{len} bytes");
    }
}

#[test]
fn integrity_and_fingerprint_are_read_back() {
    let mut buffer = [0xEE; 256];
    let mut writer = MessageWriter::new(&mut buffer, Class::Error, Method::Refresh, ID);
    writer.attribute(&ErrorCode::BAD_REQUEST).integrity(b"key").fingerprint();
    let len = writer.finish().expect("fits");
    let message = Message::parse(&buffer[..len]).expect("the fingerprint verifies");
    assert!(message.verify_integrity(b"key"));
    assert!(message.contains(AttributeType::FINGERPRINT));
    // All but the type of FINGERPRINT itself, without which there is none.
    for byte in (0..len).filter(|byte| !(len - 8..len - 6).contains(byte)) {
        let mut damaged = buffer[..len].to_vec();
        damaged[byte] ^= 1;
        assert!(Message::parse(&damaged).is_err(), "byte {byte} is covered by FINGERPRINT");
    }
}

#[test]
fn first_occurrence_counts() {
    // RFC 8489 §14.
    let bytes = request(b"\x00\x0D\x00\x04\x00\x00\x00\x01\x00\x0D\x00\x04\x00\x00\x00\x02");
    let message = Message::parse(&bytes).expect("well-formed");
    assert_eq!(message.attribute(), Ok(Some(Lifetime(1))));
    // Also where the first is malformed.
    let bytes = request(b"\x00\x0D\x00\x00\x00\x0D\x00\x04\x00\x00\x00\x02");
    let message = Message::parse(&bytes).expect("well-formed");
    assert_eq!(message.attribute::<Lifetime>(), Err(AttributeError(AttributeType::LIFETIME)));
}

/// A message signed with "key", then these bytes with the length set right.
fn signed_then(behind: &[u8]) -> Vec<u8> {
    let mut buffer = [0; 256];
    let mut writer = MessageWriter::new(&mut buffer, Class::Request, Method::Refresh, ID);
    writer.attribute(&Username(b"u")).integrity(b"key");
    let len = writer.finish().expect("fits");
    let mut bytes = buffer[..len].to_vec();
    bytes.extend(behind);
    let len = u16::try_from(bytes.len() - HEADER).expect("short");
    bytes[2..4].copy_from_slice(&len.to_be_bytes());
    bytes
}

#[test]
fn what_follows_integrity_means_nothing() {
    // RFC 8489 §14.5; abuse.md B: coturn acted on an unsigned LIFETIME of 0.
    let bytes = signed_then(b"\x00\x0D\x00\x04\x00\x00\x00\x00\x7F\xFF\x00\x00\x00\x12\x00\x00");
    let message = Message::parse(&bytes).expect("well-formed");
    assert!(message.verify_integrity(b"key"));
    assert_eq!(message.attribute::<Lifetime>(), Ok(None));
    assert!(message.unknown_attributes(AttributeSet::default()).is_empty());
    let declined = AttributeSet::of(&[AttributeType::USERNAME]);
    assert_eq!(message.unknown_attributes(declined).iter().collect::<Vec<_>>(), [AttributeType::USERNAME]);
    assert_eq!(message.peer_addresses().count(), 0);
    // A second USERNAME and a second MESSAGE-INTEGRITY neither.
    let bytes = signed_then(b"\x00\x06\x00\x01v\0\0\0\x00\x08\x00\x14aaaaaaaaaaaaaaaaaaaa");
    let message = Message::parse(&bytes).expect("well-formed");
    assert!(message.verify_integrity(b"key"));
    assert_eq!(message.attribute(), Ok(Some(Username(b"u"))));
    // MESSAGE-INTEGRITY-SHA256 does count, what follows it does not.
    let bytes = signed_then(b"\x00\x1C\x00\x10aaaaaaaaaaaaaaaa\x00\x0D\x00\x04\x00\x00\x00\x00");
    let message = Message::parse(&bytes).expect("well-formed");
    assert!(message.contains(AttributeType::MESSAGE_INTEGRITY_SHA256));
    assert_eq!(message.attribute::<Lifetime>(), Ok(None));
}

#[test]
fn integrity_of_another_length_never_verifies() {
    let bytes = request(b"\x00\x08\x00\x00");
    assert!(!Message::parse(&bytes).expect("well-formed").verify_integrity(b"key"));
}

#[test]
fn unknown_attributes_are_listed_once_and_bounded() {
    let declined = AttributeSet::of(&[AttributeType::EVEN_PORT]);
    let bytes =
        request(b"\x7F\xFF\x00\x00\x00\x18\x00\x01\x80\x00\x00\x00\x7F\xFF\x00\x00\xFF\xFF\x00\x00\x00\x06\x00\x00");
    let message = Message::parse(&bytes).expect("well-formed");
    let unknown: Vec<_> = message.unknown_attributes(declined).iter().collect();
    assert_eq!(unknown, [AttributeType(0x7FFF), AttributeType::EVEN_PORT]);

    let many: Vec<u8> = (0x4000_u16..0x4100).flat_map(|attribute| [attribute.to_be_bytes(), [0, 0]].concat()).collect();
    let bytes = request(&many);
    let unknown = Message::parse(&bytes).expect("well-formed").unknown_attributes(declined);
    assert_eq!(unknown.iter().count(), UnknownAttributes::MAX);
    assert_eq!(unknown.iter().next(), Some(AttributeType(0x4000)));
}

#[test]
fn every_peer_address_counts() {
    // RFC 8656 §10.1.
    let peers: [SocketAddr; 2] = ["192.0.2.1:1", "[2001:db8::1]:2"].map(|peer| peer.parse().expect("literal"));
    let mut buffer = [0; 256];
    let mut writer = MessageWriter::new(&mut buffer, Class::Request, Method::CreatePermission, ID);
    for peer in peers {
        writer.attribute(&XorPeerAddress(peer));
    }
    let len = writer.finish().expect("fits");
    let message = Message::parse(&buffer[..len]).expect("well-formed");
    let read: Result<Vec<_>, _> = message.peer_addresses().map(|peer| peer.map(|peer| peer.0)).collect();
    assert_eq!(read, Ok(peers.to_vec()));
}

#[test]
fn a_buffer_too_short_is_an_error_at_the_end() {
    for len in 0..44 {
        let mut buffer = vec![0; len];
        let mut writer = MessageWriter::new(&mut buffer, Class::Success, Method::Refresh, ID);
        writer.integrity(b"key");
        assert_eq!(writer.finish(), Err(WriteError), "{len} bytes");
    }
    let mut buffer = vec![0; 70_000];
    let data = vec![0; 65_529];
    let mut writer = MessageWriter::new(&mut buffer, Class::Indication, Method::Send, ID);
    writer.attribute(&Data(&data));
    assert_eq!(writer.finish(), Err(WriteError), "length above 16 bits");
}

#[test]
fn data_follows_the_buffer() {
    let peer: SocketAddr = "[2001:db8::1]:2".parse().expect("literal");
    let mut buffer = [0; 48];
    let mut writer = MessageWriter::new(&mut buffer, Class::Indication, Method::Data, ID);
    writer.attribute(&XorPeerAddress(peer));
    assert_eq!(writer.finish_before_data(5), Ok(48));
    let mut packet = buffer.to_vec();
    packet.extend(b"hello\0\0\0");
    let message = Message::parse(&packet).expect("well-formed");
    assert_eq!(message.attribute(), Ok(Some(Data(b"hello"))));
    assert_eq!(message.range(AttributeType::DATA), Some(48..53));

    let too_long = MessageWriter::new(&mut buffer, Class::Indication, Method::Data, ID).finish_before_data(65_530);
    assert_eq!(too_long, Err(WriteError));
}

#[test]
fn no_bytes_panic() {
    // Every prefix and every one-byte change of every vector, read to the last attribute.
    for vector in [RFC_5769_REQUEST, RFC_5769_IPV4, RFC_5769_IPV6, RFC_5769_LONG_TERM] {
        for end in 0..=vector.len() {
            exercise(&vector[..end]);
        }
        for byte in 0..vector.len() {
            for value in [0, 1, 4, 0x7F, 0x80, 0xFF] {
                let mut changed = vector.to_vec();
                changed[byte] = value;
                exercise(&changed);
            }
        }
    }
}

fn exercise(bytes: &[u8]) {
    let Ok(message) = Message::parse(bytes) else { return };
    for attribute in AttributeType::KNOWN {
        if let Some(range) = message.range(*attribute) {
            assert!(range.end <= bytes.len());
        }
    }
    let _ = message.verify_integrity(b"key");
    let _ = message.peer_addresses().count();
    let _ = message.unknown_attributes(AttributeSet::of(AttributeType::KNOWN));
}
