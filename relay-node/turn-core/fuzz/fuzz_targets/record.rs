//! Any bytes as a record or a journal entry: read or refused, and what is read is written back the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use turn_core::{KeyRing, Record};

fuzz_target!(|bytes: &[u8]| {
    let keys = KeyRing::default();
    if let Ok(record) = Record::open(bytes, &keys) {
        assert_eq!(Record::open(&record.seal(&keys), &keys), Ok(record));
    }
    let _ = turn_core::record::decode_change(bytes, &keys);
});
