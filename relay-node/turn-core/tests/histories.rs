//! Histories nobody thought of: random bytes drive a server; `fuzz/fuzz_targets/server.rs` runs the same with coverage.

mod support;

use proptest::prelude::*;
use support::{Clock, PATH, Ports, addr, driver::drive, duel::duel, five_tuple};
use turn_core::wire::Message;
use turn_core::{Input, IpMeta, KeyRing, Record, Verdict};

proptest! {
    // The fuzz target does the same a million times as often.
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// The server does what a model written from the RFCs says, whatever happens.
    #[test]
    fn any_history_is_what_the_model_says(bytes in proptest::collection::vec(any::<u8>(), 0..1200)) {
        duel(&bytes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_history_keeps_the_tables_true(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        drive(&bytes);
    }

    /// Long steps without payload: many requests in one history.
    #[test]
    fn any_sequence_of_requests_keeps_the_tables_true(steps in proptest::collection::vec((any::<u8>(), any::<u8>()), 0..200)) {
        // Steps 0, 6 and 8 eat payload; the others leave it to the next step.
        drive(&steps.into_iter().flat_map(|(step, argument)| [step, argument]).collect::<Vec<_>>());
    }

    #[test]
    fn any_bytes_from_a_stranger_leave_nothing_behind(packet: Vec<u8>, stun: bool) {
        let mut packet = packet;
        if stun && packet.len() >= 20 {
            let len = ((packet.len() - 20) & !3) as u16;
            packet.truncate(20 + usize::from(len));
            packet[0] &= 0x01;
            packet[2..4].copy_from_slice(&len.to_be_bytes());
            packet[4..8].copy_from_slice(&[0x21, 0x12, 0xA4, 0x42]);
        }
        let (clock, mut server, mut ports) = (Clock::new(), support::server(), Ports::default());
        let from = five_tuple(addr("203.0.113.1:5000"));
        let input = Input::FromClient { from, path: PATH, packet: &packet, ip: IpMeta::default() };
        let verdict = server.handle_input(clock.now(), input, &mut ports);
        prop_assert!(server.poll_output().is_none() && server.allocations() == 0 && server.poll_timeout().is_none());
        if matches!(verdict, Verdict::Reply { .. }) {
            prop_assert!(Message::parse(server.reply()).is_ok());
            prop_assert!(server.reply().len() + 28 <= 3 * (packet.len() + 28));
        }
    }

    #[test]
    fn any_bytes_as_a_record_are_read_or_refused(bytes: Vec<u8>) {
        let keys = KeyRing::default();
        if let Ok(record) = Record::open(&bytes, &keys) {
            prop_assert_eq!(Record::open(&record.seal(&keys), &keys), Ok(record));
        }
    }
}
