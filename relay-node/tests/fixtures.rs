//! What versions have written, read for ever (promise P12): state directories with their journals, and the messages
//! between relays and controllers.
//!
//! `fixtures/<generation>/` is frozen: a generation is the version of the protocol between relays and controllers that
//! was spoken when its files were written. A new generation is written, once, by
//! `cargo test -p relay-node --test fixtures -- --ignored freeze`.

use std::fmt::Debug;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use prost::Message;
use relay_node::journal::{self, Ends, Succession};
use relay_node::state_directory::StateDirectory;
use turn_core::{
    AllocationId, Change, EndReason, FiveTuple, Key, KeyRing, PeerTransport, Record, RelayedAddr, Transport, WorkerId,
};
use turnpike_proto::v1;

/// What this version writes.
const GENERATION: u32 = 2;
/// The relay whose state directory is frozen.
const NODE: &str = "eu-1";

fn directory(generation: u32) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures", &generation.to_string()].iter().collect()
}

fn record(number: u8, epoch: u64, sequence: u64) -> Record {
    let address = |text: &str| text.parse::<SocketAddr>().expect("literal");
    let port = 50_000 + u16::from(number);
    Record {
        relay_address: "198.51.100.7".parse().expect("literal"),
        epoch,
        sequence,
        id: AllocationId([number; 16]),
        five_tuple: FiveTuple {
            transport: if number.is_multiple_of(2) { Transport::Udp } else { Transport::Tcp },
            client: SocketAddr::new(address("203.0.113.9:0").ip(), 51_000 + u16::from(number)),
            server: address("198.51.100.7:3478"),
        },
        relayed: vec![RelayedAddr {
            bound: SocketAddr::new(address("10.0.0.5:0").ip(), port),
            advertised: SocketAddr::new(address("198.51.100.7:0").ip(), port),
        }],
        peer_transport: PeerTransport::Udp,
        mobility: None,
        proxy: None,
        transaction_id: None,
        address_error: None,
        reservation: None,
        username: format!("1800086400:user{number}").into_bytes(),
        session: None,
        created_at: 1_799_999_000_000,
        expires_at: 1_800_000_600_000 + sequence,
        family_expires_at: Vec::new(),
        permissions: vec![("192.0.2.1".parse().expect("literal"), 1_800_000_300_000)],
        channels: Vec::new(),
    }
}

/// What two workers wrote to their journals: first the records they began with, then changes.
fn journals() -> [(Vec<Record>, Vec<Change>); 2] {
    let put = |number, epoch, sequence| Change::Put(Box::new(record(number, epoch, sequence)));
    let end = |number, sequence| Change::End {
        id: AllocationId([number; 16]),
        epoch: 8,
        sequence,
        reason: EndReason::Expired,
    };
    [
        (vec![record(1, 7, 3), record(2, 7, 9)], vec![put(1, 8, 4), put(3, 8, 1), end(3, 2), put(4, 8, 1)]),
        // An older word on an allocation that has moved to the other worker, and the end of one it began with.
        (vec![record(5, 7, 1), record(6, 7, 2)], vec![put(4, 7, 30), end(5, 2), put(6, 8, 3)]),
    ]
}

/// What is left of them.
fn live() -> Vec<Record> {
    vec![record(1, 8, 4), record(2, 7, 9), record(4, 8, 1), record(6, 8, 3)]
}

fn secret(id: u32) -> v1::Secret {
    v1::Secret { id, value: vec![u8::try_from(id).expect("small"); 32] }
}

fn settings() -> v1::Settings {
    v1::Settings {
        revision: 1_800_000_000_001,
        realm: "turnpike".to_owned(),
        rest_secrets: vec![secret(3), secret(2)],
        nonce_keys: vec![secret(9), secret(4)],
        record_keys: vec![secret(7), secret(6)],
        denied_peers: vec!["10.96.0.0/12".to_owned(), "2001:db8::/32".to_owned()],
        user_quota: 10,
        static_users: vec![v1::StaticUser { username: b"alice".to_vec(), password: b"pass\xFF".to_vec() }],
        lineage: Vec::new(),
    }
}

fn members() -> v1::Members {
    let member = v1::Member {
        node_id: NODE.to_owned(),
        relay_address: "198.51.100.7".to_owned(),
        relay_ips: vec!["198.51.100.7".to_owned(), "2001:db8::7".to_owned()],
        region: "eu".to_owned(),
        relay_port_low: 49_152,
        relay_port_high: 65_535,
        ..v1::Member::default()
    };
    v1::Members { revision: 1_800_000_000_002, members: vec![member], ..v1::Members::default() }
}

fn hello(generation: u32) -> v1::Hello {
    let listener = |transport: v1::Transport, address: &str| v1::Listener {
        transport: transport.into(),
        address: address.to_owned(),
        ip_in_certificate: generation >= 2 && transport == v1::Transport::Tls,
    };
    v1::Hello {
        node_id: NODE.to_owned(),
        version: "0.1.0".to_owned(),
        protocol: generation,
        region: "eu".to_owned(),
        zone: "a".to_owned(),
        relay_address: "198.51.100.7".to_owned(),
        relay_ips: vec!["198.51.100.7".to_owned(), "2001:db8::7".to_owned()],
        listeners: vec![
            listener(v1::Transport::Udp, "198.51.100.7:3478"),
            listener(v1::Transport::Tls, "[2001:db8::7]:443"),
        ],
        claimed_epoch: 8,
        boot_id: "0123456789abcdef0123456789abcdef".to_owned(),
        workers: 2,
        max_allocations: 5000,
        relay_port_low: 49_152,
        relay_port_high: 65_535,
        public_host: "eu-1.turn.example.org".to_owned(),
        standby: generation >= 2,
        waits: generation >= 2,
        ..v1::Hello::default()
    }
}

fn load(generation: u32) -> v1::Load {
    let by =
        |transport: v1::Transport, allocations| v1::TransportAllocations { transport: transport.into(), allocations };
    let mut load = v1::Load {
        allocations: 42,
        packets: 1_000_001,
        bytes: 1_000_000_001,
        busiest_worker_permille: 371,
        dropped: 12,
        draining: true,
        bytes_per_second: 125_000,
        by_transport: Vec::new(),
        settings_revision: 0,
        ends_at: 0,
        journal_failed: false,
        overloaded: false,
        ..v1::Load::default()
    };
    if generation >= 2 {
        load.by_transport = vec![by(v1::Transport::Udp, 40), by(v1::Transport::Dtls, 2)];
        load.settings_revision = 1_800_000_000_001;
        load.ends_at = 1_800_000_009_000;
        load.journal_failed = true;
        load.overloaded = true;
    }
    load
}

fn batch() -> v1::RecordBatch {
    let ring = KeyRing(vec![Key { id: 7, secret: vec![7; 32] }]);
    let put = v1::RecordChange {
        allocation_id: vec![1; 16],
        epoch: 8,
        sequence: 4,
        record: record(1, 8, 4).seal(&ring),
        ended: 0,
        traceparent: String::new(),
    };
    let end = v1::RecordChange {
        allocation_id: vec![3; 16],
        epoch: 8,
        sequence: 2,
        record: Vec::new(),
        ended: v1::EndReason::Revoked.into(),
        traceparent: String::new(),
    };
    v1::RecordBatch { batch_id: 17, changes: vec![put, end] }
}

fn usage() -> v1::Usage {
    v1::Usage {
        allocation_id: vec![1; 16],
        origin: 0x0123_4567_89AB_CDEF,
        username: b"1800086400:user1".to_vec(),
        packets_to_peer: 3,
        bytes_to_peer: 300,
        packets_to_client: 2,
        bytes_to_client: 2000,
        continued: true,
        unclean: true,
        closed: true,
        ended_at: 1_800_000_000_000,
        reason: v1::EndReason::Revoked.into(),
    }
}

/// What a relay says, by the name of its file.
fn said(generation: u32) -> Vec<(&'static str, v1::RelayMessage)> {
    use v1::relay_message::Body;
    let mut bodies = vec![
        ("hello", Body::Hello(hello(generation))),
        ("load", Body::Load(load(generation))),
        ("records", Body::Records(batch())),
        ("resync-begin", Body::ResyncBegin(v1::ResyncBegin {})),
        ("resync-end", Body::ResyncEnd(v1::ResyncEnd { batch_id: 18 })),
        ("goodbye", Body::Goodbye(v1::Goodbye { reason: "stopped".to_owned() })),
    ];
    if generation >= 2 {
        bodies.push(("usage", Body::Usage(v1::UsageBatch { batch_id: 19, usage: vec![usage()] })));
    }
    bodies.into_iter().map(|(name, body)| (name, v1::RelayMessage { body: Some(body) })).collect()
}

/// What a relay hears, by the name of its file.
fn heard(generation: u32) -> Vec<(&'static str, v1::ControllerMessage)> {
    use v1::controller_message::Body;
    let mut bodies = vec![
        (
            "welcome",
            Body::Welcome(v1::Welcome {
                controller_id: "controller-1".to_owned(),
                epoch: 9,
                lease_ms: 5000,
                settings: Some(settings()),
                members: Some(members()),
                protocol: if generation >= 2 { generation } else { 0 },
                takes_usage: false,
            }),
        ),
        ("ack", Body::Ack(v1::BatchAck { batch_id: 17 })),
        ("settings", Body::Settings(settings())),
        ("members", Body::Members(members())),
        ("revoke", Body::Revoke(v1::RevokeAllocation { allocation_id: vec![1; 16] })),
        ("superseded", Body::Superseded(v1::Superseded { epoch: 10, owner: "eu-2".to_owned() })),
    ];
    if generation >= 2 {
        let target = v1::RedirectTarget {
            node_id: "eu-2".to_owned(),
            transport: v1::Transport::Udp.into(),
            address: "198.51.100.8:3478".to_owned(),
        };
        bodies.extend([
            ("waiting", Body::Waiting(v1::Waiting { owner: "eu-2".to_owned(), epoch: 10 })),
            ("drain", Body::Drain(v1::Drain { draining: true, deadline: 1_800_000_009_000 })),
            ("redirects", Body::Redirects(v1::Redirects { targets: vec![target] })),
            ("step-back", Body::StepBack(v1::StepBack { to: "eu-2".to_owned(), now: true })),
            ("usage-ack", Body::UsageAck(v1::UsageAck { batch_id: 19 })),
        ]);
    }
    bodies.into_iter().map(|(name, body)| (name, v1::ControllerMessage { body: Some(body) })).collect()
}

/// Writes this version's generation. A frozen one is never written again.
#[test]
#[ignore = "writes the fixtures of a new generation"]
fn freeze() {
    let directory = directory(GENERATION);
    assert!(!directory.exists(), "{} is frozen", directory.display());
    let messages = directory.join("messages");
    fs::create_dir_all(&messages).expect("made");
    for (name, message) in said(GENERATION) {
        fs::write(messages.join(name), message.encode_to_vec()).expect("written");
    }
    for (name, message) in heard(GENERATION) {
        fs::write(messages.join(name), message.encode_to_vec()).expect("written");
    }
    let state = StateDirectory::open(&directory.join("state"), NODE).expect("made");
    state.keep_epoch(8);
    state.keep_settings(&settings().encode_to_vec());
    state.keep_members(&members().encode_to_vec());
    let succession = Succession::begin(&state.journal(), 2, Arc::new(Ends::new(false))).expect("made");
    for (worker, (begun, changes)) in (0..).zip(journals()) {
        let now = Instant::now();
        let mut journal = succession.open(WorkerId(worker), begun.into_iter(), now);
        changes.iter().for_each(|change| journal.append(change, now));
        journal.commit(now);
    }
    drop(state);
    fs::remove_file(directory.join("state/lock")).expect("a lock");
}

/// Decodes a frozen message and compares it; answers with its bytes.
fn same<M: Message + Default + Debug + PartialEq>(directory: &Path, name: &str, expected: &M) -> Vec<u8> {
    let bytes = fs::read(directory.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    let decoded = M::decode(bytes.as_slice()).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(decoded, *expected, "{}: {name}", directory.display());
    bytes
}

#[test]
fn messages_of_every_generation_are_read_field_by_field() {
    for generation in 1..=GENERATION {
        let messages = directory(generation).join("messages");
        let mut known = 0;
        // A field and a message that only a later version knows: number 1000, of four bytes.
        let later = [0xC5, 0x3E, 1, 2, 3, 4];
        for (name, expected) in said(generation) {
            let bytes = [same(&messages, name, &expected), later.to_vec()].concat();
            assert_eq!(v1::RelayMessage::decode(bytes.as_slice()), Ok(expected), "{name}");
            known += 1;
        }
        for (name, expected) in heard(generation) {
            let bytes = [same(&messages, name, &expected), later.to_vec()].concat();
            assert_eq!(v1::ControllerMessage::decode(bytes.as_slice()), Ok(expected), "{name}");
            known += 1;
        }
        assert_eq!(v1::ControllerMessage::decode(&later[..]), Ok(v1::ControllerMessage { body: None }));
        assert_eq!(fs::read_dir(&messages).expect("a directory").count(), known, "every file is compared");
    }
}

#[test]
fn state_directories_of_every_generation_are_taken_over() {
    for generation in 1..=GENERATION {
        let copy = tempfile::tempdir().expect("tempdir");
        copy_all(&directory(generation).join("state"), copy.path());
        let state = StateDirectory::open(copy.path(), NODE).expect("its own");
        assert_eq!(state.next_epoch().expect("a number"), 9, "{generation}");
        let kept = state.settings().expect("readable").expect("kept");
        assert_eq!(v1::Settings::decode(kept.as_slice()), Ok(settings()), "{generation}");
        let kept = state.members().expect("readable").expect("kept");
        assert_eq!(v1::Members::decode(kept.as_slice()), Ok(members()), "{generation}");

        let loaded = journal::load(&state.journal(), &KeyRing::default()).expect("readable");
        let mut records = loaded.records;
        records.sort_by_key(|record| record.id);
        assert_eq!(records, live(), "{generation}");
        assert_eq!((loaded.refused.total(), loaded.files), (0, 2), "{generation}");
    }
}

fn copy_all(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("made");
    for entry in fs::read_dir(from).expect("a directory").flatten() {
        let (path, to) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy_all(&path, &to);
        } else {
            fs::copy(&path, &to).expect("copied");
        }
    }
}
