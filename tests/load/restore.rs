//! How long a relay takes from its start until it serves again what it had: from its journal, and from the store alone.
//!
//! By default only the size of the promise is looked at. `TURNPIKE_RESTORE_SIZES=100,1000,5000,10000,20000,50000` measures
//! each of these, and writes table and picture to `tests/results/restore.{txt,svg}`:
//!
//! ```text
//! TURNPIKE_RESTORE_SIZES=100,1000,5000,10000,20000,50000 tests/run -E 'test(allocations_are_restored_in_time)'
//! ```

use std::ffi::OsString;
use std::fmt::Write;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, ensure};
use harness::cluster::{Cluster, Relay, RelayOptions, Store, repository};
use harness::etcd::{Etcd, PREFIX};
use harness::place::Place;
use harness::plot::{Chart, Line};
use harness::process::Around;
use harness::{eventually, run_within};
use nix::sys::resource::{Resource, getrlimit};
use relay_node::journal::{Ends, Succession};
use turn_core::wire::TransactionId;
use turn_core::{AllocationId, FiveTuple, PeerAddr, PeerTransport, Record, RelayedAddr, Transport, WorkerId};

/// Allocations of the promise, and what they may take from the journal and from the store.
const PROMISE: (usize, Duration, Duration) = (10_000, Duration::from_secs(1), Duration::from_secs(3));
/// First relayed port: the rest of the range holds the largest size.
const FIRST_PORT: u16 = 10_000;
/// Longest that the store may take to hold all of them.
const STORED: Duration = Duration::from_secs(120);

/// What one size took.
struct Measured {
    size: usize,
    journal: Duration,
    store: Duration,
}

#[test]
fn allocations_are_restored_in_time() -> Result<()> {
    let asked = std::env::var("TURNPIKE_RESTORE_SIZES").ok();
    let sizes = match &asked {
        Some(sizes) => sizes.split(',').map(|size| Ok(size.trim().parse()?)).collect::<Result<Vec<usize>>>()?,
        None => vec![PROMISE.0],
    };
    run_within(Duration::from_secs(900), async |test| {
        let etcd = Etcd::start(Place::on_loopback(1), test.path()).await?;
        let mut cluster = Cluster::new(test.path())?;
        let _controller = cluster.controller(&Place::on_loopback(2), Store::Etcd(&etcd), "").await?;
        let mut measured = Vec::new();
        for (index, size) in sizes.into_iter().enumerate() {
            let place = Place::on_loopback(u8::try_from(11 + index)?);
            let Some(files) = enough_files(size)? else {
                test.figure(&format!("{size} allocations"), "not measured: too few open files are allowed here");
                continue;
            };
            let one = measure(&cluster, &etcd, &format!("eu-{index}"), &place, (size, files)).await?;
            test.figure(&format!("{size} allocations restored from the journal"), format!("{:?}", one.journal));
            test.figure(&format!("{size} allocations restored from etcd"), format!("{:?}", one.store));
            measured.push(one);
        }
        if asked.is_some() {
            report(&measured)?;
        }
        let promised = measured.iter().filter(|one| one.size <= PROMISE.0);
        for Measured { size, journal, store } in promised {
            ensure!(*journal < PROMISE.1, "{size} allocations took {journal:?} from the journal");
            ensure!(*store < PROMISE.2, "{size} allocations took {store:?} from etcd");
        }
        Ok(())
    })
}

/// What lets a program open `size` sockets and some files: nothing where it may already, none where it cannot be had
/// (which root in a container cannot).
fn enough_files(size: usize) -> Result<Option<Vec<OsString>>> {
    let wanted = u64::try_from(size)? + 1000;
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft >= wanted {
        return Ok(Some(Vec::new()));
    }
    let limit = format!("--nofile={wanted}:{wanted}");
    let allowed = Command::new("prlimit").args([&limit, "--", "true"]).stderr(Stdio::null()).status()?.success();
    ensure!(allowed || size > PROMISE.0, "{size} sockets are not allowed here: raise the limit of open files");
    Ok(allowed.then(|| vec!["prlimit".into(), limit.into(), "--".into()]))
}

async fn measure(
    cluster: &Cluster,
    etcd: &Etcd,
    id: &str,
    place: &Place,
    (size, prefix): (usize, Vec<OsString>),
) -> Result<Measured> {
    let options = RelayOptions {
        workers: 2,
        more: format!("relay_ports = [{FIRST_PORT}, 65535]"),
        // A socket each.
        around: Around { prefix, variables: Vec::new() },
        ..RelayOptions::in_region("eu")
    };
    let mut relay = cluster.relay(id, place, &options).await?;
    relay.kill()?;
    let state = cluster.state_of(id);
    let journal = state.join("journal");
    fs::remove_dir_all(&journal)?;
    let records = (0..size).map(|number| record(place, number));
    Succession::begin(&journal, 1, Arc::new(Ends::new(true)))?.open(WorkerId(0), records, Instant::now());

    let from_journal = restart(&mut relay, size).await?;
    let keys = format!("{PREFIX}allocations/{}/", place.address);
    eventually("the store has all of them", STORED, async || {
        let stored = etcd.etcdctl_keys(&keys).await?.len();
        if stored == size { Ok(()) } else { Err(anyhow!("{stored} of {size}")) }
    })
    .await?;
    relay.kill()?;
    fs::remove_dir_all(&state)?;
    let from_store = restart(&mut relay, size).await?;
    Ok(Measured { size, journal: from_journal, store: from_store })
}

/// From the start of the process to its readiness, with all of them served.
async fn restart(relay: &mut Relay, size: usize) -> Result<Duration> {
    let start = Instant::now();
    relay.start().await?;
    let took = start.elapsed();
    eventually("all are counted", Duration::from_secs(5), async || {
        let served = relay.metric("turn_allocations", "").await?;
        if served == size as f64 { Ok(()) } else { Err(anyhow!("{served} of {size}")) }
    })
    .await?;
    Ok(took)
}

/// What a browser in a call has: three permissions and a channel.
fn record(place: &Place, number: usize) -> Record {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
    let [_, _, high, low] = u32::try_from(number).unwrap_or(u32::MAX).to_be_bytes();
    let relayed = SocketAddr::new(place.address, FIRST_PORT + u16::from_be_bytes([high, low]));
    let peer = |last| Ipv4Addr::new(198, 51, 100, last);
    let mut random = [0; 10];
    random[..8].copy_from_slice(&(number as u64).to_be_bytes());
    Record {
        relay_address: place.address,
        epoch: 1,
        sequence: 3,
        id: AllocationId::new(now, random),
        five_tuple: FiveTuple {
            transport: Transport::Udp,
            client: (Ipv4Addr::new(127, 255, high, low), 40_000).into(),
            server: place.at(harness::cluster::TURN),
        },
        relayed: vec![RelayedAddr { bound: relayed, advertised: relayed }],
        peer_transport: PeerTransport::Udp,
        mobility: None,
        proxy: None,
        transaction_id: Some(TransactionId([high; 12])),
        address_error: None,
        reservation: None,
        username: format!("{}:user-{}", now / 1000 + 86_400, number % 1000).into_bytes(),
        session: None,
        created_at: now,
        expires_at: now + 600_000,
        family_expires_at: Vec::new(),
        permissions: (1..=3).map(|last| (peer(last).into(), now + 300_000)).collect(),
        channels: vec![(0x4000, PeerAddr::new((peer(1), 50_000).into()), now + 600_000)],
    }
}

/// Table and picture.
fn report(measured: &[Measured]) -> Result<()> {
    let mut table = format!(
        "# From the start of a relay's process until it serves what it had; etcd 3.4 on the same machine, {} cores.\n\
         # TURNPIKE_RESTORE_SIZES=... tests/run -E 'test(allocations_are_restored_in_time)'\n\
         allocations  journal_s  store_s\n",
        std::thread::available_parallelism()?
    );
    for Measured { size, journal, store } in measured {
        writeln!(table, "{size:>11}  {:>9.3}  {:>7.3}", journal.as_secs_f64(), store.as_secs_f64())?;
    }
    let line = |name: &str, of: fn(&Measured) -> Duration| Line {
        name: name.into(),
        points: measured.iter().map(|one| (one.size as f64, of(one).as_secs_f64())).collect(),
    };
    let chart = Chart {
        title: "A relay's restart against its allocations".into(),
        across: "allocations".into(),
        up: "seconds".into(),
        lines: vec![line("from the journal", |one| one.journal), line("from etcd alone", |one| one.store)],
        bounds: [("journal: 1 s", PROMISE.1), ("etcd: 3 s", PROMISE.2)]
            .map(|(name, most)| (name.into(), PROMISE.0 as f64, most.as_secs_f64()))
            .to_vec(),
    };
    let results = repository().join("tests/results");
    fs::create_dir_all(&results)?;
    fs::write(results.join("restore.txt"), table).context("tests/results/restore.txt")?;
    fs::write(results.join("restore.svg"), chart.svg()).context("tests/results/restore.svg")
}
