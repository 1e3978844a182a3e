//! Any history of clients and a server that are both ours: see `tests/support/driver.rs`.
#![no_main]

#[path = "../../tests/support/mod.rs"]
mod support;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| support::driver::drive(bytes));
