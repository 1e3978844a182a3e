//! Identity, seals, damage, and what version 1 wrote.

use super::*;

fn address(text: &str) -> SocketAddr {
    text.parse().expect("literal")
}

fn ring(ids: &[u8]) -> KeyRing {
    let key = |id: &u8| Key { id: *id, secret: vec![*id; 32] };
    KeyRing(ids.iter().map(key).collect())
}

fn record() -> Record {
    Record {
        relay_address: "198.51.100.7".parse().expect("literal"),
        epoch: 3,
        sequence: 17,
        id: AllocationId::new(1_700_000_000_123, *b"0123456789"),
        five_tuple: FiveTuple {
            transport: Transport::Udp,
            client: address("203.0.113.9:51234"),
            server: address("198.51.100.7:3478"),
        },
        relayed: vec![RelayedAddr { bound: address("10.0.0.5:50000"), advertised: address("198.51.100.7:50000") }],
        peer_transport: PeerTransport::Udp,
        username: b"1700086400:alice@example.org".to_vec(),
        session: None,
        created_at: 1_700_000_000_123,
        expires_at: 1_700_000_600_123,
        family_expires_at: Vec::new(),
        mobility: None,
        proxy: None,
        transaction_id: None,
        address_error: None,
        reservation: None,
        permissions: vec![
            ("192.0.2.1".parse().expect("literal"), 1_700_000_300_123),
            ("192.0.2.2".parse().expect("literal"), 1_700_000_300_124),
        ],
        channels: vec![(0x4000, PeerAddr::new(address("192.0.2.1:7000")), 1_700_000_600_125)],
    }
}

fn tombstone() -> Change {
    Change::End { id: record().id, epoch: 3, sequence: 18, reason: EndReason::Revoked }
}

#[test]
fn what_is_sealed_is_opened() {
    let mut ipv6 = record();
    ipv6.relay_address = "2001:db8::7".parse().expect("literal");
    ipv6.five_tuple.transport = Transport::Tls;
    ipv6.five_tuple.client = SocketAddrV6::new("fe80::9".parse().expect("literal"), 5, 0, 3).into();
    ipv6.relayed
        .push(RelayedAddr { bound: address("[2001:db8::7]:50000"), advertised: address("[2001:db8::7]:50000") });
    ipv6.family_expires_at = vec![1_700_000_600_123, 1_700_000_300_123];
    ipv6.username = b"\0%/\n\xFF".to_vec();
    ipv6.permissions.clear();
    ipv6.channels.clear();
    let mut tcp = record();
    tcp.five_tuple.transport = Transport::Tcp;
    tcp.peer_transport = PeerTransport::Tcp;
    let mut answered = record();
    answered.proxy = Some(address("[2001:db8::77]:4000"));
    answered.transaction_id = Some(TransactionId(*b"twelve bytes"));
    answered.address_error = Some(AddressErrorCode { family: 2, error: ErrorCode::INSUFFICIENT_CAPACITY });
    answered.reservation = Some((ReservationToken(*b"8 bytes!"), 1_700_000_040_123));
    for record in [record(), ipv6, tcp, answered] {
        for keys in [ring(&[]), ring(&[1]), ring(&[9, 1])] {
            assert_eq!(Record::open(&record.seal(&keys), &keys), Ok(record.clone()));
        }
    }
}

#[test]
fn long_lists_take_more_than_one_section() {
    let mut record = record();
    record.permissions = (0..70_000_u32).map(|ip| (IpAddr::from(ip.to_be_bytes()), 1)).collect();
    assert_eq!(Record::open(&record.seal(&ring(&[])), &ring(&[])), Ok(record));
}

#[test]
fn a_typical_record_is_small() {
    let record = Record { transaction_id: Some(TransactionId(*b"twelve bytes")), ..record() };
    assert!(record.seal(&ring(&[1])).len() <= 256);
}

#[test]
fn changes_are_read_back() {
    for change in [Change::Put(Box::new(record())), tombstone()] {
        let bytes = encode_change(&change, &ring(&[1]));
        assert_eq!(decode_change(&bytes, &ring(&[1])), Ok(change));
    }
    let bytes = encode_change(&tombstone(), &ring(&[1]));
    assert_eq!(Record::open(&bytes, &ring(&[1])), Err(RecordError::Damaged));
}

#[test]
fn seals() {
    let sealed = record().seal(&ring(&[1]));
    let plain = record().seal(&ring(&[]));
    assert_eq!((seal_key(&sealed), seal_key(&plain), seal_key(b"")), (Some(1), None, None));
    let mut other_secret = ring(&[1]);
    other_secret.0[0].secret = b"another".to_vec();
    type Case<'a> = (&'static str, &'a [u8], KeyRing, Result<Record, RecordError>);
    let cases: &[Case<'_>] = &[
        ("retired key", &sealed, ring(&[2, 1]), Ok(record())),
        ("key gone", &sealed, ring(&[2]), Err(RecordError::Seal)),
        ("same id, other secret", &sealed, other_secret, Err(RecordError::Seal)),
        ("nobody checks", &sealed, ring(&[]), Ok(record())),
        ("none where one is due", &plain, ring(&[1]), Err(RecordError::Seal)),
    ];
    for (what, bytes, keys, expected) in cases {
        assert_eq!(Record::open(bytes, keys), *expected, "{what}");
    }
    // Byte 0 is the version, refused as such.
    for byte in 1..sealed.len() {
        let mut tampered = sealed.clone();
        tampered[byte] ^= 1;
        let opened = Record::open(&tampered, &ring(&[1]));
        assert_eq!(opened, Err(RecordError::Seal), "byte {byte}");
    }
}

#[test]
fn a_newer_writer_may_add_sections() {
    // P12: an unknown tag in front, one behind.
    let plain = record().seal(&ring(&[]));
    let mut newer = vec![VERSION, 77, 0, 2, 1, 2];
    newer.extend(&plain[1..]);
    newer.extend([200, 0, 0]);
    assert_eq!(Record::open(&newer, &ring(&[])), Ok(record()));

    let mut later = plain;
    later[0] = 2;
    assert_eq!(Record::open(&later, &ring(&[])), Err(RecordError::Version(2)));
}

#[test]
fn damaged_bytes_are_refused() {
    let plain = record().seal(&ring(&[]));
    assert_eq!(Record::open(&[], &ring(&[])), Err(RecordError::Damaged));
    for end in 1..plain.len() {
        // Cut between sections the lists at the end are shorter; nothing that must be there is missed.
        if let Ok(cut) = Record::open(&plain[..end], &ring(&[])) {
            assert_eq!(cut.expires_at, record().expires_at, "cut at {end}");
        }
        let opened = Record::open(&plain[..end], &ring(&[1]));
        assert_eq!(opened, Err(RecordError::Seal), "cut at {end}");
    }
    for byte in 1..plain.len() {
        for value in [0, 1, 0x7F, 0xFF] {
            let mut changed = plain.clone();
            changed[byte] = value;
            let _ = decode_change(&changed, &ring(&[]));
        }
    }
    let mut no_relayed = record();
    no_relayed.relayed.clear();
    let bytes = no_relayed.seal(&ring(&[]));
    assert_eq!(Record::open(&bytes, &ring(&[])), Err(RecordError::Damaged));
}

#[test]
fn the_encoding_is_frozen() {
    // P12: what version 1 wrote is read for ever. Not to be regenerated.
    let frozen = "0101000504c633640702000800000000000000030300080000000000000011040010018bcfe5687b3031323334353637\
        383905000f0104cb007109c82204c63364070d9606000e040a000005c35004c6336407c35007001c3137303030383634\
        30303a616c696365406578616d706c652e6f72670800080000018bcfe5687b0900080000018bcfee903b0a001a04c000\
        02010000018bcfe9fc5b04c00002020000018bcfe9fc5c0b0011400004c00002011b580000018bcfee903dff00110164\
        a5a4ac7a867cc8c6d4a500eddaae13";
    let bytes: Vec<u8> = (0..frozen.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&frozen[at..at + 2], 16).expect("hexadecimal"))
        .collect();
    assert_eq!(Record::open(&bytes, &ring(&[1])), Ok(record()));
    assert_eq!(record().seal(&ring(&[1])), bytes);
}

#[test]
fn merge_looks_at_epoch_then_sequence() {
    let record = record();
    let cases: &[(u64, u64, bool)] = &[(3, 16, true), (3, 17, false), (3, 18, false), (2, 99, true), (4, 0, false)];
    for (epoch, sequence, expected) in cases {
        assert_eq!(record.supersedes(*epoch, *sequence), *expected);
    }
}

#[test]
fn ulid_text() {
    // The example of the ULID specification.
    let text = "01ARZ3NDEKTSV4RRFFQ69G5FAV";
    let id = AllocationId::from_text(text).expect("well-formed");
    assert_eq!(id.to_text(), text);
    assert_eq!(AllocationId::from_text(&text.to_lowercase()), Some(id));
    assert_eq!(AllocationId([0xFF; 16]).to_text(), "7ZZZZZZZZZZZZZZZZZZZZZZZZZ");
    for text in [
        "",
        "01ARZ3NDEKTSV4RRFFQ69G5FA",
        "01ARZ3NDEKTSV4RRFFQ69G5FAVV",
        "81ARZ3NDEKTSV4RRFFQ69G5FAV",
        "01ARZ3NDEKTSV4RRFFQ69G5FAU",
        "01ARZ3NDEKTSV4RRFFQ69G5F\u{e9}",
    ] {
        assert_eq!(AllocationId::from_text(text), None, "{text}");
    }
    let older = AllocationId::new(1, [0xFF; 10]);
    let newer = AllocationId::new(2, [0; 10]);
    assert!(older < newer && older.to_text() < newer.to_text());
}
