//! Any bytes at the start of a stream's buffer: the scanner makes progress or gives up, and never points past the end.
#![no_main]

use libfuzzer_sys::fuzz_target;
use turn_core::wire::stream::{Frame, MAX_FRAME, frame};

fuzz_target!(|bytes: &[u8]| {
    let mut rest = bytes;
    loop {
        match frame(rest) {
            Frame::Whole(len) => {
                assert!((4..=MAX_FRAME).contains(&len) && len <= rest.len());
                rest = &rest[len..];
            }
            Frame::Partial(len) => {
                assert!(len > rest.len() && len <= MAX_FRAME);
                break;
            }
            Frame::Invalid => break,
        }
    }
});
