//! What versions have stored, read for ever (promise P12): the documents of the store, and records under their keys.
//!
//! `fixtures/<generation>/` is frozen: a generation is the version of the protocol between relays and controllers that
//! was spoken when its files were written; a file is the value of a key whose slashes are written as `+`. A new
//! generation is written, once, by `cargo test -p controller --test fixtures -- --ignored freeze`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use controller::fleet::{
    ByTransport, DrainRecord, FleetView, Granted, LoadRecord, NodeListener, NodeRecord, OwnerRecord, ViewOptions,
};
use controller::keys::{KeyOptions, Keys};
use controller::store::{EmbeddedStore, Op, Store};
use controller::usage::{Checkpoint, Entry, Reason, Segment, Totals};
use serde::Serialize;
use serde_json::Value;
use turn_core::{AllocationId, FiveTuple, KeyRing, PeerTransport, Record, RelayedAddr, StaticUser, Transport};

/// What this version writes.
const GENERATION: u32 = 2;
const ADDRESS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 7));

fn directory(generation: u32) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures", &generation.to_string()].iter().collect()
}

fn node(generation: u32) -> NodeRecord {
    let listener = |transport, address: &str, ip_in_certificate| NodeListener {
        transport,
        address: address.parse().expect("literal"),
        ip_in_certificate,
    };
    NodeRecord {
        node_id: "eu-1".to_owned(),
        region: "eu".to_owned(),
        zone: "a".to_owned(),
        version: "0.1.0".to_owned(),
        relay_address: ADDRESS,
        relay_ips: vec![ADDRESS, "2001:db8::7".parse().expect("literal")],
        listeners: vec![
            listener(Transport::Udp, "198.51.100.7:3478", false),
            listener(Transport::Tcp, "198.51.100.7:3478", false),
            listener(Transport::Tls, "198.51.100.7:443", generation >= 2),
            listener(Transport::Dtls, "[2001:db8::7]:443", generation >= 2),
        ],
        public_host: "eu-1.turn.example.org".to_owned(),
        relay_ports: (49_152, 65_535),
        workers: 2,
        max_allocations: 5000,
        boot_id: "0123456789abcdef".to_owned(),
        registered_at: 1_800_000_000_000,
        lease: 77,
        standby: generation >= 2,
        waiting: false,
        backbone: Vec::new(),
        cluster_only: false,
    }
}

/// A standby that waits for the address.
fn waiting(generation: u32) -> NodeRecord {
    NodeRecord { node_id: "eu-2".to_owned(), waiting: true, ..node(generation) }
}

fn owner() -> OwnerRecord {
    OwnerRecord { node_id: "eu-1".to_owned(), epoch: 9, session: "5e551011".to_owned() }
}

fn load(generation: u32) -> LoadRecord {
    let mut load = LoadRecord {
        allocations: 42,
        packets: 1_000_001,
        bytes: 1_000_000_001,
        bytes_per_second: 125_000,
        busiest_worker_permille: 371,
        dropped: 12,
        draining: true,
        suspect: true,
        reported_at: 1_800_000_001_000,
        ..LoadRecord::default()
    };
    if generation >= 2 {
        load.by_transport = ByTransport { udp: 39, tcp: 1, tls: 1, dtls: 1 };
        load.settings_revision = 1_800_000_000_001;
        load.ends_at = 1_800_000_009_000;
        load.journal_failed = true;
        load.overloaded = true;
    }
    load
}

fn granted(generation: u32) -> Granted {
    let node_id = if generation >= 2 { "eu-1" } else { "" };
    Granted { epoch: 9, boot_id: "0123456789abcdef".to_owned(), node_id: node_id.to_owned() }
}

fn drain() -> DrainRecord {
    DrainRecord { since: 1_800_000_002_000, deadline: 1_800_003_600_000, by: "operator/erika".to_owned() }
}

fn record() -> Record {
    let at = |port| std::net::SocketAddr::new(ADDRESS, port);
    Record {
        relay_address: ADDRESS,
        epoch: 9,
        sequence: 4,
        id: AllocationId([1; 16]),
        five_tuple: FiveTuple {
            transport: Transport::Udp,
            client: "203.0.113.9:51234".parse().expect("literal"),
            server: at(3478),
        },
        relayed: vec![RelayedAddr { bound: at(50_000), advertised: at(50_000) }],
        peer_transport: PeerTransport::Udp,
        mobility: None,
        proxy: None,
        transaction_id: None,
        address_error: None,
        reservation: None,
        username: b"1800086400:alice".to_vec(),
        session: None,
        created_at: 1_800_000_000_000,
        expires_at: 1_800_000_600_000,
        family_expires_at: Vec::new(),
        permissions: Vec::new(),
        channels: Vec::new(),
    }
}

fn segment() -> Segment {
    Segment {
        origin: "00000000000000ff".to_owned(),
        node_id: "eu-1".to_owned(),
        totals: Totals { packets_to_peer: 3, bytes_to_peer: 300, packets_to_client: 2, bytes_to_client: u64::MAX },
        continued: true,
        unclean: true,
        closed: true,
        at: 1_800_000_003_000,
    }
}

fn checkpoint() -> Checkpoint {
    Checkpoint { user: "1800086400:al\\x1bice".to_owned(), segment: segment() }
}

fn entry() -> Entry {
    Entry {
        user: "1800086400:al\\x1bice".to_owned(),
        relay_address: ADDRESS,
        ended_at: 1_800_000_004_000,
        reason: Reason::Revoked,
        unclean: true,
        segments: vec![segment(), Segment { continued: false, unclean: false, closed: false, ..segment() }],
    }
}

fn options() -> KeyOptions {
    KeyOptions {
        realm: "turnpike".to_owned(),
        rest_secrets: vec![b"configured newest".to_vec(), b"configured before".to_vec()],
        static_users: vec![StaticUser { username: b"alice".to_vec(), password: b"pass\xFF".to_vec() }],
        denied_peers: vec!["10.96.0.0/12".to_owned()],
        user_quota: 10,
        ..KeyOptions::default()
    }
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("JSON")
}

/// Keys with their values but for the key rings and what they seal, which are made anew for each generation.
fn documents(generation: u32) -> BTreeMap<String, Vec<u8>> {
    let mut documents = BTreeMap::from([
        ("nodes/eu-1".to_owned(), json(&node(generation))),
        (format!("owners/{ADDRESS}"), json(&owner())),
        (format!("epochs/{ADDRESS}"), granted(generation).to_text()),
        ("load/eu-1".to_owned(), json(&load(generation))),
    ]);
    if generation >= 2 {
        documents.insert("drains/eu-1".to_owned(), json(&drain()));
        documents.insert("waiting/eu-2".to_owned(), json(&waiting(generation)));
        documents.insert("drains/us-1".to_owned(), json(&DrainRecord { deadline: 0, ..drain() }));
        let id = record().id.to_text();
        documents.insert(format!("counters/{ADDRESS}/{id}/{}", segment().origin), json(&checkpoint()));
        documents.insert(format!("ledger/{id}"), json(&entry()));
    }
    documents
}

/// Everything frozen of a generation.
fn frozen(generation: u32) -> BTreeMap<String, Vec<u8>> {
    let files = std::fs::read_dir(directory(generation)).expect("a directory").flatten();
    files
        .map(|file| {
            let key = file.file_name().to_string_lossy().replace('+', "/");
            (key, std::fs::read(file.path()).expect("readable"))
        })
        .collect()
}

/// Writes this version's generation. A frozen one is never written again.
#[tokio::test]
#[ignore = "writes the fixtures of a new generation"]
async fn freeze() {
    let directory = directory(GENERATION);
    assert!(!directory.exists(), "{} is frozen", directory.display());
    std::fs::create_dir_all(&directory).expect("made");
    let store: Arc<dyn Store> = Arc::new(EmbeddedStore::in_memory());
    // The secret that is made where none is configured, then the configured ones.
    let generated = KeyOptions { rest_secrets: Vec::new(), ..options() };
    drop(Keys::start(store.clone(), &generated).await.expect("keys"));
    let keys = Keys::start(store.clone(), &options()).await.expect("keys");
    keys.rotate(&[controller::keys::Ring::Nonce], None).await.expect("begun");
    let settings = store.get("keys/settings").await.expect("a store").expect("made").value;
    let mut documents = documents(GENERATION);
    documents.insert("keys/settings".to_owned(), settings);
    documents.insert("keys/lifetimes".to_owned(), br#"{"rest":{"0":86400,"1":3600}}"#.to_vec());
    let sealed = record().seal(&keys.current().record_keys);
    documents.insert(format!("allocations/{ADDRESS}/{}", record().id.to_text()), sealed);
    for (key, value) in documents {
        std::fs::write(directory.join(key.replace('/', "+")), value).expect("written");
    }
}

#[test]
fn documents_of_every_generation_are_read_field_by_field() {
    for generation in 1..=GENERATION {
        let frozen = frozen(generation);
        assert_eq!(serde_json::from_slice::<NodeRecord>(&frozen["nodes/eu-1"]).expect("JSON"), node(generation));
        let owners = &frozen[&format!("owners/{ADDRESS}")];
        assert_eq!(serde_json::from_slice::<OwnerRecord>(owners).expect("JSON"), owner());
        assert_eq!(Granted::from_text(&frozen[&format!("epochs/{ADDRESS}")]), granted(generation));
        assert_eq!(serde_json::from_slice::<LoadRecord>(&frozen["load/eu-1"]).expect("JSON"), load(generation));
        if generation >= 2 {
            assert_eq!(serde_json::from_slice::<DrainRecord>(&frozen["drains/eu-1"]).expect("JSON"), drain());
            let waiting = waiting(generation);
            assert_eq!(serde_json::from_slice::<NodeRecord>(&frozen["waiting/eu-2"]).expect("JSON"), waiting);
            let id = record().id.to_text();
            let counters = &frozen[&format!("counters/{ADDRESS}/{id}/{}", segment().origin)];
            assert_eq!(serde_json::from_slice::<Checkpoint>(counters).expect("JSON"), checkpoint());
            let ledger = &frozen[&format!("ledger/{id}")];
            assert_eq!(serde_json::from_slice::<Entry>(ledger).expect("JSON"), entry());
        }
        // Nothing is left out of the comparison but what the tests below look at.
        let others = ["keys/settings", "keys/lifetimes"];
        let left = frozen.keys().filter(|key| !others.contains(&key.as_str()) && !key.starts_with("allocations/"));
        assert_eq!(left.collect::<Vec<_>>(), documents(generation).keys().collect::<Vec<_>>());
    }
}

#[test]
fn what_a_later_version_adds_to_documents_is_passed_over() {
    for (key, value) in frozen(GENERATION) {
        let Ok(Value::Object(mut object)) = serde_json::from_slice(&value) else { continue };
        object.insert("of a later version".to_owned(), serde_json::json!({"a": [1]}));
        let later = json(&object);
        let kind = key.split('/').next().expect("a prefix");
        let read = match kind {
            "nodes" => serde_json::from_slice(&later).map(|read: NodeRecord| assert_eq!(read, node(GENERATION))),
            "waiting" => serde_json::from_slice(&later).map(|read: NodeRecord| assert!(read.waiting)),
            "owners" => serde_json::from_slice(&later).map(|read: OwnerRecord| assert_eq!(read, owner())),
            "load" => serde_json::from_slice(&later).map(|read: LoadRecord| assert_eq!(read, load(GENERATION))),
            "drains" => serde_json::from_slice(&later).map(|read: DrainRecord| assert_eq!(read.since, drain().since)),
            "counters" => serde_json::from_slice(&later).map(|read: Checkpoint| assert_eq!(read, checkpoint())),
            "ledger" => serde_json::from_slice(&later).map(|read: Entry| assert_eq!(read, entry())),
            "keys" => Ok(()),
            _ => panic!("{key}: who reads it?"),
        };
        read.unwrap_or_else(|error| panic!("{key}: {error}"));
    }
}

#[tokio::test]
async fn a_cluster_of_every_generation_is_taken_over() {
    for generation in 1..=GENERATION {
        let frozen = frozen(generation);
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::in_memory());
        let put = |(key, value): (&String, &Vec<u8>)| Op::Put { key: key.clone(), value: value.clone(), lease: None };
        store.transact(Vec::new(), frozen.iter().map(put).collect()).await.expect("a store");

        let fleet = FleetView::start(store.clone(), ViewOptions::default());
        tokio::time::timeout(Duration::from_secs(20), fleet.synced()).await.expect("in time");
        let snapshot = fleet.snapshot();
        let seen = &snapshot.nodes["eu-1"];
        assert_eq!((&seen.record, &seen.load, seen.epoch), (&node(generation), &load(generation), 9));
        assert_eq!(seen.drain, (generation >= 2).then(drain));

        // Its keys are everybody's: nothing is made anew, and what they sealed opens.
        let keys = Keys::start(store.clone(), &options()).await.expect("keys");
        let current = keys.current();
        let stored: Value = serde_json::from_slice(&frozen["keys/settings"]).expect("JSON");
        let ring = |name: &str| {
            let keys = stored[name].as_array().expect("a list").iter();
            keys.map(|key| (key["id"].as_u64().expect("a number"), key["value"].as_str().expect("text").to_owned()))
                .collect::<Vec<_>>()
        };
        let read = |ring: &KeyRing| {
            use base64::Engine as _;
            let encode = |secret: &[u8]| base64::prelude::BASE64_STANDARD.encode(secret);
            ring.0.iter().map(|key| (u64::from(key.id), encode(&key.secret))).collect::<Vec<_>>()
        };
        assert_eq!(read(&current.rest_secrets), ring("rest_secrets"), "{generation}");
        assert_eq!(read(&current.nonce_keys), ring("nonce_keys"), "{generation}");
        assert_eq!(read(&current.record_keys), ring("record_keys"), "{generation}");
        assert_eq!(
            (current.rest_secrets.0.len(), current.rest_secrets.0[0].secret.as_slice()),
            (3, &b"configured newest"[..])
        );
        assert_eq!(current.nonce_keys.0.len(), if generation >= 2 { 2 } else { 1 });
        let message = &current.message;
        assert_eq!((message.realm.as_str(), message.user_quota), ("turnpike", 10));
        assert_eq!(
            (message.denied_peers.as_slice(), message.static_users.len()),
            (&["10.96.0.0/12".to_owned()][..], 1)
        );

        let key = format!("allocations/{ADDRESS}/{}", record().id.to_text());
        assert_eq!(Record::open(&frozen[&key], &current.record_keys), Ok(record()), "{generation}");
    }
}
