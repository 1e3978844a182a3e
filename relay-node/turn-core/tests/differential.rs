//! Our codec against one we did not write: `stun-types` and `turn-types`.

use std::net::SocketAddr;

use proptest::prelude::*;
use turn_core::credential::long_term_key;
use turn_core::wire::attribute::{
    AttributeType, Data, Lifetime, Nonce, Realm, RequestedTransport, Username, XorMappedAddress, XorPeerAddress,
    XorRelayedAddress,
};
use turn_core::wire::{ChannelData, ChannelNumber, Class, ErrorCode, Message, MessageWriter, Method, TransactionId};
use turn_types::stun::attribute as theirs;
use turn_types::stun::message as their;
use turn_types::stun::message::{IntegrityAlgorithm, LongTermKeyCredentials, MessageWrite, MessageWriteExt};

fn their_credentials(user: &str, realm: &str, password: &str) -> their::MessageIntegrityCredentials {
    LongTermKeyCredentials::new(user.into(), password.into(), realm.into()).into()
}

fn id_number(id: [u8; 12]) -> u128 {
    id.iter().fold(0, |number, byte| number << 8 | u128::from(*byte))
}

fn any_address() -> impl Strategy<Value = SocketAddr> {
    prop_oneof![any::<([u8; 4], u16)>().prop_map(SocketAddr::from), any::<([u8; 16], u16)>().prop_map(SocketAddr::from),]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// What we write and sign, they read and verify.
    #[test]
    fn they_read_what_we_write(
        id: [u8; 12],
        peer in any_address(),
        lifetime: u32,
        user in "[a-z0-9:]{1,40}",
        realm in "[a-z.]{1,20}",
        nonce in "[a-zA-Z0-9]{1,60}",
        password in "[ -~]{1,40}",
        data: Vec<u8>,
    ) {
        let mut buffer = vec![0; 4096];
        let mut writer = MessageWriter::new(&mut buffer, Class::Request, Method::Allocate, TransactionId(id));
        writer
            .attribute(&RequestedTransport(17))
            .attribute(&Lifetime(lifetime))
            .attribute(&XorPeerAddress(peer))
            .attribute(&Data(&data))
            .attribute(&Username(user.as_bytes()))
            .attribute(&Realm(realm.as_bytes()))
            .attribute(&Nonce(nonce.as_bytes()))
            .integrity(&long_term_key(user.as_bytes(), &realm, password.as_bytes()))
            .fingerprint();
        let len = writer.finish().expect("fits");
        let read = their::Message::from_bytes(&buffer[..len]).expect("a message to them");

        prop_assert_eq!(read.method(), turn_types::message::ALLOCATE);
        prop_assert_eq!(u128::from(read.transaction_id()), id_number(id));
        prop_assert_eq!(read.attribute::<turn_types::attribute::Lifetime>().expect("there").seconds(), lifetime);
        let their_peer = read.attribute::<turn_types::attribute::XorPeerAddress>().expect("there");
        prop_assert_eq!(their_peer.addr(read.transaction_id()), peer);
        let their_data = read.attribute::<turn_types::attribute::Data<'_>>().expect("there");
        prop_assert_eq!(their_data.data(), &data[..]);
        let right = read.validate_integrity(&their_credentials(&user, &realm, &password));
        prop_assert_eq!(right.expect("verifies"), IntegrityAlgorithm::Sha1);
        prop_assert!(read.validate_integrity(&their_credentials(&user, &realm, "another password")).is_err());
    }

    /// What they write and sign, we read and verify.
    #[test]
    fn we_read_what_they_write(
        mapped in any_address(),
        relayed in any_address(),
        code in 300_u16..700,
        user in "[a-z0-9:]{1,40}",
        realm in "[a-z.]{1,20}",
        password in "[ -~]{1,40}",
    ) {
        let kind = their::MessageType::from_class_method(their::MessageClass::Success, turn_types::message::ALLOCATE);
        let id = their::TransactionId::generate();
        let mut message = their::Message::builder(kind, id, their::MessageWriteVec::new());
        let relayed_attribute = turn_types::attribute::XorRelayedAddress::new(relayed, id);
        message.add_attribute(&theirs::XorMappedAddress::new(mapped, id)).expect("fits");
        message.add_attribute(&relayed_attribute).expect("fits");
        message.add_attribute(&theirs::ErrorCode::new(code, "some reason").expect("in range")).expect("fits");
        let credentials = their_credentials(&user, &realm, &password);
        message.add_message_integrity(&credentials, IntegrityAlgorithm::Sha1).expect("fits");
        message.add_fingerprint().expect("fits");
        let bytes = message.finish();

        let read = Message::parse(&bytes).expect("a message to us");
        prop_assert_eq!((read.class(), read.method()), (Class::Success, Method::Allocate));
        prop_assert_eq!(id_number(read.transaction_id().0), u128::from(id));
        prop_assert_eq!(read.attribute::<XorMappedAddress>(), Ok(Some(XorMappedAddress(mapped))));
        prop_assert_eq!(read.attribute::<XorRelayedAddress>(), Ok(Some(XorRelayedAddress(relayed))));
        prop_assert_eq!(read.attribute::<ErrorCode>().map(|error| error.map(ErrorCode::code)), Ok(Some(code)));
        prop_assert!(read.verify_integrity(&long_term_key(user.as_bytes(), &realm, password.as_bytes())));
        prop_assert!(!read.verify_integrity(&long_term_key(user.as_bytes(), &realm, b"another password")));
    }

    /// Where both call bytes a message, both see the same attributes; damaged and random bytes included.
    #[test]
    fn both_see_the_same_attributes(mut bytes in signed_or_not(), flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4)) {
        for (index, value) in flips {
            let index = index.index(bytes.len());
            bytes[index] = value;
        }
        let (ours, other) = (Message::parse(&bytes), their::Message::from_bytes(&bytes));
        if let (Ok(ours), Ok(other)) = (ours, other) {
            for attribute in [AttributeType::USERNAME, AttributeType::LIFETIME, AttributeType::XOR_PEER_ADDRESS, AttributeType::DATA] {
                // Theirs keeps what follows MESSAGE-INTEGRITY out as well, so a value seen by both is the same one.
                let theirs = other.raw_attribute(theirs::AttributeType::new(attribute.0));
                if let (Some(range), Some(theirs)) = (ours.range(attribute), theirs) {
                    prop_assert_eq!(&bytes[range], &*theirs.value);
                }
            }
        }
    }

    /// ChannelData, both ways.
    #[test]
    fn channel_data_agrees(number in 0x4000_u16..=0x4FFF, data: Vec<u8>) {
        let channel = ChannelNumber::new(number).expect("in range");
        let mut ours = ChannelData::header(channel, u16::try_from(data.len()).expect("short")).to_vec();
        ours.extend(&data);
        let read = turn_types::channel::ChannelData::parse(&ours).expect("ChannelData to them");
        prop_assert_eq!((read.id(), read.data()), (number, &data[..]));

        let mut written = vec![0; data.len() + 4];
        turn_types::channel::ChannelData::new(number, &data).write_into_unchecked(&mut written);
        let read = ChannelData::parse(&written).expect("ChannelData to us");
        prop_assert_eq!((read.channel(), read.data()), (channel, &data[..]));
    }
}

fn signed_or_not() -> impl Strategy<Value = Vec<u8>> {
    (any::<[u8; 12]>(), any_address(), any::<bool>(), proptest::collection::vec(any::<u8>(), 0..40)).prop_map(
        |(id, peer, signed, data)| {
            let mut buffer = vec![0; 512];
            let mut writer = MessageWriter::new(&mut buffer, Class::Request, Method::ChannelBind, TransactionId(id));
            writer.attribute(&XorPeerAddress(peer)).attribute(&Data(&data));
            if signed {
                writer.attribute(&Username(b"user")).integrity(b"key").attribute(&Lifetime(0));
            }
            let len = writer.finish().expect("fits");
            buffer.truncate(len);
            buffer
        },
    )
}
