//! What versions have written, read for ever (promise P12): records of every tag, nonces, tickets, credentials.
//!
//! `fixtures/<generation>/` is frozen: a generation is the version of the protocol between relays and controllers that
//! was spoken when its files were written. A new generation is written, once, by
//! `cargo test -p turn-core --test fixtures -- --ignored freeze`.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::path::PathBuf;

use turn_core::nonce::{Freshness, Nonce, SecurityFeatures, verify};
use turn_core::record::{MobilityRecord, MoveRecord, decode_change, encode_change};
use turn_core::wire::attribute::ReservationToken;
use turn_core::wire::error_code::AddressErrorCode;
use turn_core::wire::{ErrorCode, Integrity, TransactionId};
use turn_core::{
    AllocationId, Change, EndReason, FiveTuple, IntegrityKey, Key, KeyRing, PeerAddr, PeerTransport, Record,
    RelayedAddr, Session, Ticket, Transport, credential,
};

/// What this version writes.
const GENERATION: u32 = 2;
/// Unix seconds of everything.
const NOW: u64 = 1_800_000_000;

fn directory(generation: u32) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures", &generation.to_string()].iter().collect()
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("literal")
}

/// The ring that everything frozen is made with: the newest key is 9, 4 is the one before.
fn ring() -> KeyRing {
    let key = |id: u8| Key { id, secret: vec![id; 32] };
    KeyRing(vec![key(9), key(4)])
}

fn plain() -> Record {
    Record {
        relay_address: "198.51.100.7".parse().expect("literal"),
        epoch: 3,
        sequence: 17,
        id: AllocationId::new(1_799_999_000_123, *b"0123456789"),
        five_tuple: FiveTuple {
            transport: Transport::Udp,
            client: address("203.0.113.9:51234"),
            server: address("198.51.100.7:3478"),
        },
        relayed: vec![RelayedAddr { bound: address("10.0.0.5:50000"), advertised: address("198.51.100.7:50000") }],
        peer_transport: PeerTransport::Udp,
        mobility: None,
        proxy: None,
        transaction_id: None,
        address_error: None,
        reservation: None,
        username: b"1800086400:alice@example.org".to_vec(),
        session: None,
        created_at: 1_799_999_000_123,
        expires_at: 1_800_000_600_123,
        family_expires_at: Vec::new(),
        permissions: vec![
            ("192.0.2.1".parse().expect("literal"), 1_800_000_300_123),
            ("2001:db8::1".parse().expect("literal"), 1_800_000_300_124),
        ],
        channels: vec![
            (0x4000, PeerAddr::new(address("192.0.2.1:7000")), 1_800_000_600_125),
            (0x4FFF, PeerAddr::new(address("[2001:db8::1]:7001")), 1_800_000_600_126),
        ],
    }
}

/// Every frozen change of a generation, by the name of its file.
fn changes(generation: u32) -> Vec<(&'static str, Change)> {
    let with = |change: &dyn Fn(&mut Record)| {
        let mut record = plain();
        change(&mut record);
        Change::Put(Box::new(record))
    };
    let ticket = Ticket::from_bytes([7; Ticket::LEN]);
    let to = FiveTuple {
        transport: Transport::Udp,
        client: address("203.0.113.77:40000"),
        server: address("198.51.100.7:3478"),
    };
    let mut changes = vec![
        ("plain", with(&|_| {})),
        ("tls", with(&|record| record.five_tuple.transport = Transport::Tls)),
        (
            "dual",
            with(&|record| {
                record.relay_address = "2001:db8::7".parse().expect("literal");
                record.five_tuple.transport = Transport::Dtls;
                record.five_tuple.client = SocketAddrV6::new("fe80::9".parse().expect("literal"), 5, 0, 3).into();
                let v6 = address("[2001:db8::7]:50002");
                record.relayed.push(RelayedAddr { bound: v6, advertised: v6 });
                record.family_expires_at = vec![1_800_000_600_123, 1_800_000_300_123];
                record.username = b"\0%/\n\xFF".to_vec();
                record.permissions.clear();
                record.channels.clear();
            }),
        ),
        (
            "tcp-allocation",
            with(&|record| {
                record.five_tuple.transport = Transport::Tcp;
                record.peer_transport = PeerTransport::Tcp;
            }),
        ),
        ("mobile", with(&|record| record.mobility = Some(MobilityRecord { ticket, moving: None }))),
        (
            "moving",
            with(&|record| {
                let by = Ticket::from_bytes([8; Ticket::LEN]);
                let moving = Some(MoveRecord { to, by, transaction_id: *b"transaction!" });
                record.mobility = Some(MobilityRecord { ticket, moving });
            }),
        ),
        (
            "third-party",
            with(&|record| {
                let key = IntegrityKey::new(&[5; 20], Integrity::Sha1).expect("20 bytes");
                record.session = Some(Session { key, expires_at: 1_800_003_600_000 });
            }),
        ),
        (
            "many",
            with(&|record| {
                record.permissions = (0..1500_u32).map(|ip| (IpAddr::from(ip.to_be_bytes()), u64::from(ip))).collect();
            }),
        ),
    ];
    for (name, reason) in [
        ("end-deleted", EndReason::Deleted),
        ("end-expired", EndReason::Expired),
        ("end-closed", EndReason::Closed),
        ("end-revoked", EndReason::Revoked),
    ] {
        changes.push((name, Change::End { id: plain().id, epoch: 3, sequence: 18, reason }));
    }
    if generation >= 2 {
        changes.extend([
            ("proxied", with(&|record| record.proxy = Some(address("192.0.2.200:9000")))),
            ("transaction", with(&|record| record.transaction_id = Some(TransactionId(*b"transaction?")))),
            (
                "address-error",
                with(&|record| {
                    let error = ErrorCode::ADDRESS_FAMILY_NOT_SUPPORTED;
                    record.address_error = Some(AddressErrorCode { family: 2, error });
                }),
            ),
            (
                "reserving",
                with(&|record| record.reservation = Some((ReservationToken(*b"8 bytes!"), 1_800_000_040_000))),
            ),
        ]);
    }
    changes
}

fn client() -> SocketAddr {
    address("203.0.113.9:51234")
}

fn features() -> SecurityFeatures {
    SecurityFeatures { password_algorithms: true, username_anonymity: false }
}

/// Writes this version's generation. A frozen one is never written again.
#[test]
#[ignore = "writes the fixtures of a new generation"]
fn freeze() {
    let directory = directory(GENERATION);
    assert!(!directory.exists(), "{} is frozen", directory.display());
    std::fs::create_dir_all(&directory).expect("made");
    let write = |name: &str, bytes: &[u8]| std::fs::write(directory.join(name), bytes).expect("written");
    for (name, change) in changes(GENERATION) {
        write(&format!("{name}.record"), &encode_change(&change, &ring()));
    }
    write("unsealed.record", &plain().seal(&KeyRing::default()));
    let nonce = Nonce::mint(&ring(), client(), NOW, features()).expect("a key");
    write("nonce", nonce.as_bytes());
    write("nonce-short", nonce.shortened().as_bytes());
    write("ticket", &Ticket::mint(&ring(), [3; 16]).expect("a key").text());
    let key = ring().0.remove(0);
    for (name, minted) in [
        ("credential-sha1", credential::mint(&key, b"alice", NOW + 60)),
        ("credential-sha256", credential::mint_sha256(&key, b"alice", NOW + 60)),
    ] {
        write(name, &[minted.username.as_slice(), b" ", minted.password.as_bytes()].concat());
    }
}

#[test]
fn every_generation_is_read_field_by_field() {
    for generation in 1..=GENERATION {
        let directory = directory(generation);
        let read = |name: &str| {
            let path = directory.join(name);
            std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        };
        let changes = changes(generation);
        for (name, expected) in &changes {
            let bytes = read(&format!("{name}.record"));
            // A reader whose newest key is another one, as after a rotation.
            let mut rotated = ring();
            rotated.0.insert(0, Key { id: 10, secret: vec![10; 32] });
            for keys in [ring(), rotated, KeyRing::default()] {
                assert_eq!(decode_change(&bytes, &keys).as_ref(), Ok(expected), "{generation}/{name}");
            }
        }
        let records = std::fs::read_dir(&directory).expect("a directory").flatten();
        let records = records.filter(|file| file.path().extension().is_some_and(|it| it == "record")).count();
        assert_eq!(records, changes.len() + 1, "{generation}: every file is compared");
        assert_eq!(Record::open(&read("unsealed.record"), &KeyRing::default()), Ok(plain()));

        for name in ["nonce", "nonce-short"] {
            let nonce = read(name);
            assert_eq!(verify(&ring(), &nonce, client(), NOW + 3600, 3600), Freshness::Fresh, "{generation}/{name}");
            assert_eq!(SecurityFeatures::of(&nonce), Some(features()));
        }
        let ticket = Ticket::read(&read("ticket")).expect("a ticket");
        assert!(ticket.is_authentic(&ring()), "{generation}");
        let settings = turn_core::Settings { rest_secrets: ring(), ..turn_core::Settings::default() };
        for name in ["credential-sha1", "credential-sha256"] {
            let credential = read(name);
            let (username, password) = credential.split_at(credential.iter().position(|c| *c == b' ').expect("two"));
            let mut passwords = credential::rest_passwords(&settings, username, NOW);
            assert!(passwords.any(|known| known.as_bytes() == &password[1..]), "{generation}/{name}");
        }
    }
}

#[test]
fn what_a_later_version_adds_is_passed_over() {
    let unsealed = |change: &Change| encode_change(change, &KeyRing::default());
    // A tag nobody knows yet, at the end and at the beginning.
    for (name, change) in changes(GENERATION) {
        let mut bytes = unsealed(&change);
        bytes.splice(1..1, [200, 0, 3, 1, 2, 3]);
        bytes.extend([201, 0, 0]);
        assert_eq!(decode_change(&bytes, &KeyRing::default()), Ok(change), "{name}");
    }
    // An allocation that ended for a reason of its own has ended.
    let Change::Put(record) = changes(1).remove(0).1 else { panic!("a record") };
    let end = Change::End { id: record.id, epoch: 3, sequence: 18, reason: EndReason::Deleted };
    let mut bytes = unsealed(&end);
    let reason = bytes.len() - 1;
    bytes[reason] = 77;
    assert_eq!(decode_change(&bytes, &KeyRing::default()), Ok(end));
}
