//! What an etcd can suffer, for real, and what the cluster makes of it: relays go on, nobody is declared dead, what is
//! wrong is said in one line, and everything is stored soon after it is over.

mod etcd;
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod replica;

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use controller::fleet::FleetChange;
use controller::store::{EmbeddedStore, EtcdOptions, EtcdStore, Op, Store, StoreError};
use etcd::{Etcd, Extra, Mode, Proxy, Trio, connect, connect_to};
use etcd_client::{Client, CompactionOptions, DeleteOptions, Permission};
use replica::{PATIENCE, Pki, Relay, Replica, eventually, hello, id, stored, timeout};
use turnpike_proto::v1;
use turnpike_proto::v1::controller_message::Body as Heard;

const LEASE: Duration = Duration::from_secs(3);
/// How soon after it is over everything must be stored.
const TRUE_AGAIN: Duration = Duration::from_secs(5);
const EU_1: &str = "192.0.2.1";

/// The leader of three members is killed, and hangs: what is reported meanwhile is stored within the four seconds that a
/// relay must live through, by the session it was reported to.
#[tokio::test(flavor = "multi_thread")]
#[allow(clippy::print_stderr)]
async fn a_lost_leader_delays_writes_and_nothing_else() {
    let mut etcd = Trio::start().await;
    let store = connect_to(etcd.endpoints()).await;
    let mut case = Case::start(store.clone()).await;
    for how in ["killed", "frozen"] {
        let leader = etcd.leader().await;
        let lost = Instant::now();
        match how {
            "killed" => etcd.members[leader].kill(),
            _ => etcd.members[leader].freeze(true),
        }
        let mut longest = Duration::ZERO;
        while lost.elapsed() < LEASE * 2 {
            let reported = Instant::now();
            let batch = case.report().await;
            case.acked(batch).await;
            longest = longest.max(reported.elapsed());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        eprintln!("figure: leader {how}, longest from report to stored: {longest:?}");
        assert!(longest < Duration::from_secs(if how == "killed" { 4 } else { 8 }), "{how}: {longest:?}");
        match how {
            "killed" => assert!(etcd.members[leader].start_again().await),
            _ => etcd.members[leader].freeze(false),
        }
        case.is_well(&store).await;
    }
    case.nobody_left();
}

/// etcd runs into its quota. Leases go on, so the fleet stays; the relay's changes wait. With room again, they are there.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_etcd_keeps_the_fleet_and_takes_everything_when_there_is_room() {
    let arguments = vec!["--quota-backend-bytes".to_owned(), (16 << 20).to_string()];
    let etcd = Etcd::start_with(Extra { arguments, ..Extra::default() }).await;
    let store = connect(&etcd.endpoint()).await;
    let mut case = Case::start(store.clone()).await;
    let mut admin = etcd.client().await;
    fill(&mut admin).await;

    case.endures(|error| matches!(error, StoreError::Full(text) if text.contains("alarm disarm"))).await;
    // A controller that starts now serves what there is, and a relay that comes to it keeps its lease.
    let second = Replica::start(connect(&etcd.endpoint()).await, &case.pki, LEASE).await;
    assert!(second.fleet.snapshot().nodes.contains_key("eu-1"));
    assert!(second.keys.current() == case.replica.keys.current());

    make_room(&etcd, &mut admin).await;
    case.is_well(&store).await;
    case.nobody_left();
}

/// The controller's user may only read for a while.
#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_turns_us_away_is_told_apart_and_comes_back() {
    let etcd = Etcd::start().await;
    let mut admin = etcd.client().await;
    for user in ["root", "turnpike"] {
        admin.user_add(user, "secret", None).await.expect("a user");
        admin.role_add(user).await.ok();
        admin.user_grant_role(user, user).await.expect("a role");
    }
    let keys = || Permission::read_write("turnpike/").with_prefix();
    admin.role_grant_permission("turnpike", keys()).await.expect("a permission");
    admin.auth_enable().await.expect("authentication");
    let login = etcd_client::ConnectOptions::new().with_user("root", "secret");
    let mut admin = Client::connect([etcd.endpoint()], Some(login)).await.expect("root");
    let options = EtcdOptions {
        endpoints: vec![etcd.endpoint()],
        prefix: "turnpike/".to_owned(),
        user: Some(("turnpike".to_owned(), "secret".to_owned())),
        ..EtcdOptions::default()
    };
    let store: Arc<dyn Store> = Arc::new(EtcdStore::connect(options).await.expect("etcd answers"));
    let mut case = Case::start(store.clone()).await;

    let read = Permission::read("turnpike/").with_prefix();
    admin.role_grant_permission("turnpike", read).await.expect("a permission");
    case.endures(|error| matches!(error, StoreError::Denied(text) if text.contains("store.user"))).await;
    admin.role_grant_permission("turnpike", keys()).await.expect("a permission");
    case.is_well(&store).await;
    case.nobody_left();
}

/// One of two controllers is cut off from etcd. Its relay hears of it in time to go to the other one, with its lease and
/// its epoch; nobody is called dead on either side.
#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_lost_the_store_gives_its_relay_away_in_time() {
    let etcd = Etcd::start().await;
    let proxy = Proxy::start(etcd.address()).await;
    let pki = Pki::new();
    let lease = Duration::from_secs(5);
    let direct = connect(&etcd.endpoint()).await;
    let cut_off = Replica::start(connect(&proxy.endpoint()).await, &pki, lease).await;
    let healthy = Replica::start(direct.clone(), &pki, lease).await;
    let mut relay = Relay::join(&pki, &cut_off, hello("eu-1", 1, "boot", 1)).await;
    relay.load(v1::Load::default()).await;
    let first = vec![relay.put(1, 1)];
    let batch = relay.batch(first).await;
    relay.acked(batch).await;
    healthy.sees("the node", |seen| seen.nodes.contains_key("eu-1")).await;
    let mut events = healthy.fleet.subscribe();
    let registered = replica::node(&direct, "eu-1").await.expect("registered");

    proxy.set(Mode::Hold);
    let cut = Instant::now();
    loop {
        relay.load(v1::Load::default()).await;
        match tokio::time::timeout(Duration::from_millis(500), relay.hear()).await {
            Ok(Ok(Some(Heard::Store(state)))) if state.away => break,
            Ok(Ok(None) | Err(_)) => panic!("the session must go on until there is a better one"),
            _ => assert!(cut.elapsed() < lease, "not told in time"),
        }
    }
    let mut moved = Relay::join(&pki, &healthy, hello("eu-1", 1, "boot", 1)).await;
    assert_eq!(moved.welcome.epoch, relay.welcome.epoch);
    assert_eq!(replica::node(&direct, "eu-1").await.expect("registered").lease, registered.lease, "it was in time");
    while cut.elapsed() < lease * 2 {
        moved.load(v1::Load::default()).await;
        assert!(cut_off.fleet.snapshot().nodes.contains_key("eu-1"), "who is cut off answers from memory");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let change = vec![moved.put(1, 2)];
    let batch = moved.batch(change).await;
    moved.acked(batch).await;
    assert!(matches!(cut_off.presence.store_health(), Err(StoreError::Unavailable(_))));
    proxy.set(Mode::Pass);
    eventually("it is well again", || async { cut_off.presence.store_health().is_ok() }).await;
    timeout(cut_off.fleet.synced()).await;
    while let Ok(event) = events.try_recv() {
        assert!(matches!(event.change, FleetChange::Changed(_)), "{event:?}");
    }
}

/// A controller dies together with the only session of its relay, which takes longer than its lease to come back: it
/// is suspect meanwhile, not dead. One that dies with all controllers alive is dead at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_gets_time_to_leave_a_lost_controller() {
    let etcd = Etcd::start().await;
    let pki = Pki::new();
    // The controller's own key lives two seconds shorter.
    let lease = Duration::from_secs(4);
    let store = connect(&etcd.endpoint()).await;
    let lost = Replica::start(connect(&etcd.endpoint()).await, &pki, lease).await;
    let stays = Replica::start(store.clone(), &pki, lease).await;
    let first = Relay::join(&pki, &lost, hello("eu-1", 1, "boot", 1)).await;
    let second = Relay::join(&pki, &stays, hello("eu-2", 2, "boot", 1)).await;
    first.load(v1::Load::default()).await;
    second.load(v1::Load::default()).await;
    // Past the grace of the start, so that only the lost controller is a reason for a new one.
    let settled = Instant::now();
    let waiting = stays.fleet.settled();
    tokio::pin!(waiting);
    while tokio::time::timeout(Duration::from_millis(500), &mut waiting).await.is_err() {
        first.load(v1::Load::default()).await;
        second.load(v1::Load::default()).await;
        assert!(settled.elapsed() < PATIENCE);
    }
    drop(lost);
    drop(first);
    let gone = Instant::now();
    stays.sees("suspect", |seen| seen.nodes.get("eu-1").is_some_and(|node| node.load.suspect)).await;
    while gone.elapsed() < lease + Duration::from_secs(3) {
        second.load(v1::Load::default()).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(stays.fleet.snapshot().nodes.contains_key("eu-1"));
    }
    let back = Relay::join(&pki, &stays, hello("eu-1", 1, "boot", 1)).await;
    back.load(v1::Load::default()).await;
    stays.sees("ready", |seen| seen.nodes.get("eu-1").is_some_and(|node| !node.load.suspect)).await;
    let node = stays.fleet.snapshot().nodes["eu-1"].clone();
    assert_eq!(node.epoch, 1, "the same process has the same epoch");
}

/// The embedded store's disk fills up, and gets room again: no restart, nothing lost, also not after one.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_keeps_the_fleet_and_takes_everything_when_there_is_room() {
    let disk = SmallDisk::mount(8 * 1024);
    let path = disk.path().join("store");
    let store: Arc<dyn Store> = Arc::new(EmbeddedStore::open(&path).expect("a new store"));
    let mut case = Case::start(store.clone()).await;
    let filler = disk.path().join("filler");
    let mut file = std::fs::File::create(&filler).expect("a file");
    while file.write_all(&[0; 4096]).is_ok() {}
    // Until the file has to grow.
    let mut n = 0;
    while store.transact(Vec::new(), vec![large(n)]).await.is_ok() {
        n += 1;
        assert!(n < 1000, "the disk is not full");
    }
    case.endures(|error| matches!(error, StoreError::Full(text) if text.contains("make room"))).await;
    std::fs::remove_file(&filler).expect("a file");
    drop(file);
    case.is_well(&store).await;
    case.nobody_left();

    let before = stored(&store, EU_1).await;
    drop(case);
    drop(store);
    let deadline = Instant::now() + PATIENCE;
    let again = loop {
        // The tasks of the replica hold on to it for a moment.
        match EmbeddedStore::open(&path) {
            Ok(store) => break store,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let again: Arc<dyn Store> = Arc::new(again);
    assert_eq!(stored(&again, EU_1).await, before);
}

fn large(n: usize) -> Op {
    Op::Put { key: format!("large/{n}"), value: vec![0x5a; 60_000], lease: None }
}

/// A tmpfs in a mount namespace of its own, kept by a process that ends with this.
struct SmallDisk {
    holder: Child,
    _pipe: ChildStdin,
    at: tempfile::TempDir,
}

impl SmallDisk {
    fn mount(kib: u32) -> Self {
        let at = tempfile::tempdir().expect("a directory");
        let script = "mount -t tmpfs -o size=$2k turnpike-test \"$1\" && echo mounted && exec cat";
        let mut holder = Command::new("unshare")
            .args(["--map-root-user", "--mount", "sh", "-c", script, "sh"])
            .arg(at.path())
            .arg(kib.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare, from util-linux");
        let pipe = holder.stdin.take().expect("asked for");
        let mut line = String::new();
        BufReader::new(holder.stdout.take().expect("asked for")).read_line(&mut line).expect("a pipe");
        assert_eq!(line, "mounted\n");
        Self { holder, _pipe: pipe, at }
    }

    /// Where this process sees it.
    fn path(&self) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.holder.id()));
        root.join(self.at.path().strip_prefix("/").expect("absolute"))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        self.holder.kill().expect("our child");
        self.holder.wait().expect("our child");
    }
}

/// A relay with records, a controller, and what must hold of them whatever happens to the store.
struct Case {
    pki: Pki,
    replica: Replica,
    relay: Relay,
    events: tokio::sync::broadcast::Receiver<controller::fleet::FleetEvent>,
    number: u32,
    last: u64,
    /// Acknowledged up to this batch.
    stored: u64,
}

impl Case {
    async fn start(store: Arc<dyn Store>) -> Self {
        let pki = Pki::new();
        let replica = Replica::start(store, &pki, LEASE).await;
        let relay = Relay::join(&pki, &replica, hello("eu-1", 1, "boot", 1)).await;
        replica.sees("the node", |seen| seen.nodes.contains_key("eu-1")).await;
        let events = replica.fleet.subscribe();
        let mut case = Self { pki, replica, relay, events, number: 0, last: 0, stored: 0 };
        let batch = case.report().await;
        case.acked(batch).await;
        case
    }

    /// A load, an allocation made and an older one ended.
    async fn report(&mut self) -> u64 {
        self.number += 1;
        self.relay.load(v1::Load::default()).await;
        let mut changes = vec![self.relay.put(self.number, 1)];
        if self.number > 5 {
            changes.push(self.relay.ended(self.number - 5, 2));
        }
        self.last = self.relay.batch(changes).await;
        self.last
    }

    /// Reports load until a batch is acknowledged.
    async fn acked(&mut self, batch: u64) {
        if self.stored >= batch {
            return;
        }
        let mut load = tokio::time::interval(Duration::from_millis(500));
        timeout(async {
            loop {
                tokio::select! {
                    stored = self.relay.acknowledgement() => {
                        self.stored = stored;
                        if stored >= batch {
                            return;
                        }
                    }
                    _ = load.tick() => self.relay.load(v1::Load::default()).await,
                }
            }
        })
        .await;
    }

    /// Longer than the lease: the controller says what is wrong, and the relay is neither sent away nor called dead.
    async fn endures(&mut self, expected: impl Fn(&StoreError) -> bool) {
        let begun = Instant::now();
        let mut said = false;
        while begun.elapsed() < LEASE + Duration::from_secs(3) {
            self.report().await;
            let health = self.replica.presence.store_health();
            if let Err(error) = &health
                && begun.elapsed() > LEASE
            {
                assert!(expected(error), "{error}");
                assert!(!error.to_string().contains('\n'));
                said = true;
            }
            let node = self.replica.fleet.snapshot().nodes.get("eu-1").cloned().expect("never gone");
            assert!(!node.load.suspect);
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        assert!(said, "nothing was said");
    }

    /// Over: all that was reported is stored in time, and the store is called well.
    async fn is_well(&mut self, store: &Arc<dyn Store>) {
        let over = Instant::now();
        self.acked(self.last).await;
        assert!(over.elapsed() < TRUE_AGAIN, "stored only after {:?}", over.elapsed());
        eventually("the store is called well", || async { self.replica.presence.store_health().is_ok() }).await;
        timeout(self.replica.fleet.synced()).await;
        assert!(over.elapsed() < TRUE_AGAIN, "well only after {:?}", over.elapsed());
        let found: Vec<String> = stored(store, EU_1).await.into_iter().map(|(id, _)| id).collect();
        let first = self.number.saturating_sub(4).max(1);
        let expected: Vec<String> = (first..=self.number).map(|number| id(number).to_text()).collect();
        assert_eq!(found, expected);
    }

    fn nobody_left(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            assert!(matches!(event.change, FleetChange::Changed(_)), "{event:?}");
        }
    }
}

/// Writes until etcd takes no more.
async fn fill(admin: &mut Client) {
    let filler = vec![b'x'; 512 * 1024];
    for n in 0..1000 {
        if admin.put(format!("filler/{n}"), filler.clone(), None).await.is_err() {
            return;
        }
    }
    panic!("etcd has no quota");
}

/// As the operator is told to.
async fn make_room(etcd: &Etcd, admin: &mut Client) {
    let deleted = admin.delete("filler/", Some(DeleteOptions::new().with_prefix())).await.expect("etcd deletes");
    let revision = deleted.header().expect("a header").revision();
    let physical = CompactionOptions::new().with_physical();
    admin.compact(revision, Some(physical)).await.expect("etcd compacts");
    for command in [["defrag"].as_slice(), &["alarm", "disarm"]] {
        let mut etcdctl = Command::new("etcdctl");
        etcdctl.env("ETCDCTL_API", "3").args(["--endpoints", &etcd.endpoint()]).args(command);
        let output = etcdctl.output().expect("etcdctl, from Debian's etcd-client");
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}
