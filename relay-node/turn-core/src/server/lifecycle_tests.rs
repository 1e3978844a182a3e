//! Restore, ownership, revocation (promises P2 and P12).

use super::super::lab::{Lab, addr, ip, udp};
use super::super::{DropReason, Input, IpMeta, Out, Verdict};
use super::*;
use crate::wire::{AttributeType, MessageWriter, Method};
use crate::{FiveTuple, PeerAddr, Transport};

/// The record of an allocation with a permission and a channel, and the server that wrote it.
fn recorded() -> (Lab, Record) {
    let mut lab = Lab::allocated();
    assert_eq!(lab.bind(0x4000, "192.0.2.1:9"), 0);
    lab.permit("192.0.2.2");
    let record = lab.server.records(lab.now).next().expect("one allocation");
    (lab, record)
}

/// Another process with the same settings, the clocks going on.
fn restarted(lab: &Lab) -> Lab {
    let mut other = Lab::new();
    other.now = lab.now;
    other
}

fn reason_of(outputs: &[Output]) -> Option<EndReason> {
    outputs.iter().find_map(|output| match output {
        Output::Record(Change::End { reason, .. }) => Some(*reason),
        _ => None,
    })
}

fn releases(outputs: &[Output]) -> usize {
    outputs.iter().filter(|output| matches!(output, Output::Release { .. })).count()
}

#[test]
fn goes_on_without_a_message_from_the_client() {
    // Promise P2.
    let (mut before, record) = recorded();
    before.pass(100);
    let mut lab = restarted(&before);
    lab.restore(record.clone());
    assert!(lab.outputs().is_empty());
    assert_eq!(lab.server.allocations(), 1);
    assert_eq!(lab.relayed_of(0), record.relayed[0]);
    assert_eq!(lab.channel_data(0x4000, b"x").sent().expect("bound").bytes, b"x");
    let sent = lab.at_relayed(record.relayed[0], "192.0.2.1:9", b"x").sent().expect("permitted");
    assert_eq!(sent.bytes, b"\x40\0\0\x01x");
    let (to, path) = (lab.from, lab.path);
    assert_eq!(sent.out, Out::Client { to, path });
    // The clocks go on where they were.
    assert_eq!(lab.server.poll_timeout(), Some(lab.now.mono + Duration::from_secs(500)));
    lab.pass(200);
    let dropped = lab.at_relayed(record.relayed[0], "192.0.2.1:9", b"x").dropped();
    assert_eq!(dropped, Some(DropReason::NoPermission));
    // Its next change is the next in sequence.
    assert_eq!(lab.refresh(600), 0);
    let changes = lab.changes();
    assert!(matches!(&changes[..], [Change::Put(put)] if put.sequence == record.sequence + 1 && put.id == record.id));
    // It is known by its five-tuple; another transaction is another Allocate.
    assert_eq!(lab.request(Method::Allocate, udp).code(), 437);
}

#[test]
fn a_retransmitted_allocate_gets_the_answer_it_had_before_the_restart() {
    // RFC 8656 §7.2, note; with every attribute that only the first answer knew.
    let pair = |writer: &mut MessageWriter<'_>| {
        udp(writer);
        writer.raw(0x0018, &[0x80]);
    };
    let both = |writer: &mut MessageWriter<'_>| {
        udp(writer);
        writer.raw(0x8000, &[2, 0, 0, 0]);
    };
    type Case = (fn(&mut MessageWriter<'_>), AttributeType);
    let cases: [Case; 2] = [(pair, AttributeType::RESERVATION_TOKEN), (both, AttributeType::ADDRESS_ERROR_CODE)];
    for (write, known) in cases {
        let mut before = Lab::new();
        let with = before.credentials();
        let packet = before.packet(Some(&with), Method::Allocate, write);
        let first = before.exchange(&packet);
        assert!(first.code() == 0 && first.message().contains(known));
        let record = before.server.records(before.now).next().expect("one allocation");
        let mut lab = restarted(&before);
        lab.restore(record);
        assert_eq!(lab.exchange(&packet).bytes, first.bytes);
        assert_eq!(lab.refresh(600), 0, "with the first transaction of this lab");
        assert_eq!(lab.request(Method::Allocate, udp).code(), 437);
    }
}

#[test]
fn while_records_may_be_missing_nothing_is_said_of_what_is_not_known() {
    // Promise P5: neither 437, nor 401, 400 or 438 on the way to it.
    let (_, mut record) = recorded();
    // Labs begin with the same port and draw the same ids, which servers do not.
    record.id = AllocationId([7; 16]);
    for relayed in &mut record.relayed {
        relayed.bound.set_port(50_100);
        relayed.advertised.set_port(50_100);
    }
    let mut lab = Lab::new();
    lab.configure(|settings| settings.restoring = true);
    let with = lab.credentials();
    for method in [Method::Refresh, Method::CreatePermission, Method::ChannelBind, Method::Connect] {
        for packet in [lab.packet(Some(&with), method, |_| {}), lab.packet(None, method, |_| {})] {
            let (from, path) = (lab.from, lab.path);
            let input = Input::FromClient { from, path, packet: &packet, ip: IpMeta::default() };
            let verdict = lab.server.handle_input(lab.now, input, &mut lab.host);
            assert!(matches!(verdict, Verdict::Drop(DropReason::NotReady)), "{method:?}: {verdict:?}");
        }
    }
    // What is known is served as ever, and so is whoever is new.
    lab.restore(record);
    assert_eq!(lab.refresh(600), 0);
    lab.client(addr("203.0.113.9:7"));
    assert_eq!(lab.unsigned(Method::Allocate, udp).code(), 401);
    assert_eq!(lab.request(Method::Allocate, udp).code(), 0);
}

#[test]
fn a_client_behind_a_proxy_is_recorded_with_its_way() {
    let mut lab = Lab::new();
    let proxy = addr("198.51.100.200:4000");
    lab.path = Path::Proxied(crate::ListenerId(0), proxy);
    assert_eq!(lab.request(Method::Allocate, udp).code(), 0);
    let record = lab.server.records(lab.now).next().expect("one allocation");
    assert_eq!((record.proxy, record.five_tuple.client), (Some(proxy), lab.from.client));
}

#[test]
fn what_is_not_brought_back() {
    type Case = (&'static str, fn(&mut Record, &mut Path), EndReason);
    let cases: &[Case] = &[
        ("expired", |record, _| record.expires_at = 0, EndReason::Expired),
        ("a stream's, without its stream", |record, _| record.five_tuple.transport = Transport::Tcp, EndReason::Closed),
        ("a datagram's, on a stream", |_, path| *path = Path::Connection(ConnectionId(1)), EndReason::Closed),
    ];
    for (what, change, expected) in cases {
        let (before, mut record) = recorded();
        let mut lab = restarted(&before);
        let mut path = lab.path;
        change(&mut record, &mut path);
        lab.path = path;
        lab.restore(record);
        let outputs = lab.outputs();
        assert_eq!(reason_of(&outputs), Some(*expected), "{what}");
        // Its address was bound for it.
        assert_eq!(releases(&outputs), 1, "{what}");
        assert_eq!(lab.server.allocations(), 0, "{what}");
    }
}

#[test]
fn a_newer_record_replaces_and_an_older_one_does_not() {
    let (before, record) = recorded();
    let mut lab = restarted(&before);
    lab.restore(record.clone());

    let mut older = record.clone();
    older.channels.clear();
    for (epoch, sequence) in [(record.epoch, record.sequence), (record.epoch, record.sequence - 1), (0, 99)] {
        (older.epoch, older.sequence) = (epoch, sequence);
        lab.restore(older.clone());
        assert!(lab.outputs().is_empty());
        assert_eq!(lab.channel_data(0x4000, b"x").dropped(), None);
    }
    let mut newer = record.clone();
    newer.sequence += 1;
    newer.channels.clear();
    lab.restore(newer);
    assert!(lab.outputs().is_empty());
    assert_eq!(lab.server.allocations(), 1);
    assert_eq!(lab.channel_data(0x4000, b"x").dropped(), Some(DropReason::NoChannel));
    // A newer one that has expired ends it.
    let mut newer = record;
    newer.sequence += 2;
    newer.expires_at = 0;
    lab.restore(newer);
    let outputs = lab.outputs();
    assert_eq!((reason_of(&outputs), releases(&outputs)), (Some(EndReason::Expired), 1));
    assert_eq!(lab.server.allocations(), 0);
}

#[test]
fn a_client_that_came_back_first_keeps_its_new_allocation() {
    let (before, mut record) = recorded();
    // Labs have one seed, so the other process would give the same name.
    record.id = AllocationId::new(1, [1; 10]);
    let mut lab = restarted(&before);
    assert_eq!(lab.allocate(), 0);
    let held = lab.relayed_of(0);
    lab.outputs();
    // Another address: given back. The same address: held, and not given back.
    let mut elsewhere = record.clone();
    elsewhere.relayed[0].bound = addr("10.0.0.5:60000");
    lab.restore(elsewhere);
    let outputs = lab.outputs();
    assert_eq!((reason_of(&outputs), releases(&outputs)), (Some(EndReason::Deleted), 1));
    let mut same = record;
    same.relayed[0] = held;
    lab.restore(same);
    let outputs = lab.outputs();
    assert_eq!((reason_of(&outputs), releases(&outputs)), (Some(EndReason::Deleted), 0));
    assert_eq!(lab.server.allocations(), 1);
}

#[test]
fn a_record_is_not_believed_beyond_its_bounds() {
    let (before, mut record) = recorded();
    record.expires_at = u64::MAX;
    record.permissions = vec![
        (ip("192.0.2.1"), u64::MAX),
        (ip("10.0.0.1"), u64::MAX),
        (ip("2001:db8::1"), u64::MAX),
        (ip("192.0.2.3"), 1),
    ];
    let peer = |text| PeerAddr::new(addr(text));
    record.channels = vec![
        (0x4000, peer("192.0.2.1:9"), u64::MAX),
        (0x4000, peer("192.0.2.2:9"), u64::MAX),
        (0x4001, peer("10.0.0.1:9"), u64::MAX),
        (0x5000, peer("192.0.2.4:9"), u64::MAX),
    ];
    record.relayed.push(RelayedAddr { bound: addr("10.0.0.5:50009"), advertised: addr("198.51.100.7:50009") });
    let mut lab = restarted(&before);
    lab.restore(record.clone());
    // A second address of one family is nobody's.
    assert_eq!(releases(&lab.outputs()), 1);
    let back = lab.server.records(lab.now).next().expect("restored");
    assert_eq!(back.expires_at, lab.now.wall + 3_600_000);
    assert_eq!(back.permissions, [(ip("192.0.2.1"), lab.now.wall + 300_000)]);
    assert_eq!(back.channels, [(0x4000, peer("192.0.2.1:9"), lab.now.wall + 600_000)]);

    record.relayed.clear();
    let mut lab = restarted(&before);
    lab.restore(record);
    assert_eq!(reason_of(&lab.outputs()), Some(EndReason::Deleted));
}

#[test]
fn records_carry_the_ownership_of_their_time() {
    let mut lab = Lab::allocated();
    lab.input(Input::Own { epoch: 7 });
    assert!(lab.outputs().is_empty());
    assert_eq!(lab.server.records(lab.now).next().map(|record| record.epoch), Some(7));
    assert_eq!(lab.refresh(600), 0);
    assert_eq!(lab.refresh(0), 0);
    let changes = lab.changes();
    let numbers: Vec<(u64, u64)> = changes
        .iter()
        .map(|change| match change {
            Change::Put(record) => (record.epoch, record.sequence),
            Change::End { epoch, sequence, .. } => (*epoch, *sequence),
        })
        .collect();
    assert_eq!(numbers, [(7, 2), (7, 3)]);
    assert_eq!(lab.server.records(lab.now).count(), 0);
}

#[test]
fn revoked_at_once() {
    for stream in [false, true] {
        let mut lab = Lab::new();
        if stream {
            lab.from.transport = Transport::Tls;
            lab.path = Path::Connection(ConnectionId(4));
        }
        assert_eq!(lab.allocate(), 0);
        let id = lab.server.records(lab.now).next().expect("one").id;
        lab.outputs();
        lab.input(Input::Revoke(AllocationId([9; 16])));
        assert!(lab.outputs().is_empty());
        lab.input(Input::Revoke(id));
        let outputs = lab.outputs();
        assert_eq!((reason_of(&outputs), releases(&outputs)), (Some(EndReason::Revoked), 1));
        let closes = outputs.iter().filter(|output| matches!(output, Output::Close(ConnectionId(4))));
        assert_eq!(closes.count(), usize::from(stream));
        assert_eq!(lab.refresh(600), 437);
    }
}

#[test]
fn many_end_in_order_and_none_too_soon() {
    let mut lab = Lab::new();
    for port in 0..100 {
        lab.client(FiveTuple { client: ([203, 0, 113, 9], 1000 + port).into(), ..lab.from }.client);
        assert_eq!(lab.allocate(), 0);
        lab.pass(1);
    }
    lab.outputs();
    lab.pass(500 - 1);
    lab.timeout();
    assert!(lab.outputs().is_empty());
    for left in (0..100).rev() {
        lab.pass(1);
        assert!(lab.server.poll_timeout().is_some_and(|at| at <= lab.now.mono));
        lab.timeout();
        assert_eq!(lab.server.allocations(), left);
        assert_eq!(lab.outputs().len(), 2);
    }
    assert_eq!(lab.server.poll_timeout(), None);
}

#[test]
fn inputs_of_later_work_do_nothing() {
    let mut lab = Lab::allocated();
    lab.bind(0x4000, "192.0.2.1:9");
    lab.outputs();
    let relayed = lab.relayed();
    lab.input(Input::KernelActivity(relayed));
    lab.input(Input::Icmp { relayed, peer: PeerAddr::new(addr("192.0.2.1:9")), kind: 3, code: 3, mtu: 0 });
    assert!(lab.outputs().is_empty());
    assert_eq!(lab.server.allocations(), 1);
}
