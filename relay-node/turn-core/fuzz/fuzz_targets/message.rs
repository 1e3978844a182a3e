//! Any bytes as a STUN message or ChannelData: every reader is total, and ranges lie inside the packet.
#![no_main]

use libfuzzer_sys::fuzz_target;
use turn_core::wire::attribute::{Data, Lifetime, Nonce, Realm, Username, XorMappedAddress};
use turn_core::wire::{AttributeSet, AttributeType, ChannelData, ErrorCode, Message, kind};

fuzz_target!(|bytes: &[u8]| {
    let _ = kind(bytes);
    if let Ok(message) = ChannelData::parse(bytes) {
        assert_eq!(&bytes[message.range()], message.data());
    }
    let Ok(message) = Message::parse(bytes) else { return };
    let _ = message.attribute::<Username<'_>>();
    let _ = message.attribute::<Realm<'_>>();
    let _ = message.attribute::<Nonce<'_>>();
    let _ = message.attribute::<Lifetime>();
    let _ = message.attribute::<ErrorCode>();
    let _ = message.attribute::<XorMappedAddress>();
    if let Ok(Some(Data(data))) = message.attribute::<Data<'_>>() {
        assert_eq!(message.range(AttributeType::DATA).map(|range| &bytes[range]), Some(data));
    }
    let _ = message.peer_addresses().count();
    let _ = message.unknown_attributes(AttributeSet::of(&[AttributeType::EVEN_PORT]));
    let _ = message.verify_integrity(b"key");
});
