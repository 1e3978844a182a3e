//! Any bytes as ChannelData: by the letter of RFC 8656 §12.4 to §12.6, and back.
#![no_main]

use libfuzzer_sys::fuzz_target;
use turn_core::wire::stream::{Frame, frame};
use turn_core::wire::{ChannelData, Kind, kind};

fuzz_target!(|bytes: &[u8]| {
    let expected = match *bytes {
        [high @ 0x40..=0x4F, low, l0, l1, ref rest @ ..] => {
            let len = usize::from(u16::from_be_bytes([l0, l1]));
            rest.get(..len).map(|data| (u16::from_be_bytes([high, low]), data))
        }
        _ => None,
    };
    let read = ChannelData::parse(bytes).ok();
    assert_eq!(read.map(|message| (message.channel().get(), message.data())), expected);
    let Some(message) = read else { return };
    assert_eq!(kind(bytes), Kind::ChannelData);
    assert_eq!(&bytes[message.range()], message.data());
    let len = message.data().len();
    assert_eq!(ChannelData::header(message.channel(), len as u16), bytes[..4]);
    // On a stream its frame ends at the next multiple of four (§12.5).
    let whole = (4 + len).next_multiple_of(4);
    let expected = if bytes.len() < whole { Frame::Partial(whole) } else { Frame::Whole(whole) };
    assert_eq!(frame(bytes), expected);
});
