//! Keys are replaced under calls: every member within five seconds, nothing refused, whoever is killed meanwhile.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use harness::cluster::{Cluster, HTTP, Relay, RelayOptions, Store, http_get};
use harness::etcd::Etcd;
use harness::place::Place;
use harness::traffic::{Pair, Traffic};
use harness::turn::{Login, TurnClient};
use harness::{Host, eventually, run_within};
use serde_json::Value;
use tokio::net::UdpSocket;
use tokio::runtime::Builder;
use turn_core::wire::attribute::{Nonce, Realm, RequestedTransport, Username};
use turn_core::wire::error_code::ErrorCode;
use turn_core::wire::{Class, Message, MessageWriter, Method, TransactionId};
use turn_core::{IntegrityKey, PasswordAlgorithm, Transport};

/// All members within this.
const PROMISED: Duration = Duration::from_secs(5);

async fn client(server: SocketAddr, login: &Login) -> Result<TurnClient> {
    let from = Place::on_loopback(100).address;
    let mut client = TurnClient::open(&Host::Machine, from, server, Transport::Udp, login).await?;
    client.allocate().await?;
    Ok(client)
}

/// Credentials of a controller that may be killed at any time: asks until one is there.
async fn login(place: &Place, user: &str) -> Result<Login> {
    let (answer, _) = eventually("credentials", Duration::from_secs(5), async || {
        http_get(place, HTTP, &format!("/v1/turn?service=turn&username={user}")).await
    })
    .await?;
    let answer: Value = serde_json::from_str(&answer)?;
    let text = |key: &str| answer[key].as_str().map(str::to_owned).context("credentials");
    Ok(Login { username: text("username")?, password: text("password")? })
}

/// New clients, one after another, each with credentials of its own; ends with the first that is refused.
struct Newcomers {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<u32>>,
}

impl Newcomers {
    fn start(controller: Place, relay: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        // A thread of its own: they must not wait for what the test does meanwhile.
        let newcomers = async move || {
            let mut count = 0;
            while !stopped.load(Ordering::Relaxed) {
                let login = login(&controller, &format!("newcomer{count}")).await?;
                let mut client = client(relay, &login).await.with_context(|| format!("newcomer {count}"))?;
                client.permit(relay.ip()).await?;
                client.refresh(0).await?;
                count += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Ok(count)
        };
        let thread = thread::spawn(move || Builder::new_current_thread().enable_all().build()?.block_on(newcomers()));
        Self { stop, thread }
    }

    async fn stop(self) -> Result<u32> {
        self.stop.store(true, Ordering::Relaxed);
        let joined = tokio::task::spawn_blocking(|| self.thread.join()).await?;
        joined.map_err(|_| anyhow!("the newcomers panicked"))?
    }
}

/// A client between its two Allocates: it has a nonce and has not used it.
struct Between {
    socket: UdpSocket,
    login: Login,
    realm: Vec<u8>,
    nonce: Vec<u8>,
}

impl Between {
    async fn begin(relay: &Relay, login: &Login) -> Result<Self> {
        let socket = UdpSocket::bind((Place::on_loopback(101).address, 0)).await?;
        socket.connect(relay.address()).await?;
        let mut between = Self { socket, login: login.clone(), realm: Vec::new(), nonce: Vec::new() };
        let answer = between.allocate(false).await?;
        let message = Message::parse(&answer)?;
        let (realm, nonce) = (message.attribute()?, message.attribute()?);
        let (Some(Realm(realm)), Some(Nonce(nonce))) = (realm, nonce) else { bail!("no challenge") };
        (between.realm, between.nonce) = (realm.to_vec(), nonce.to_vec());
        Ok(between)
    }

    async fn allocate(&self, signed: bool) -> Result<Vec<u8>> {
        let mut id = [0; 12];
        getrandom::fill(&mut id).map_err(|error| anyhow!("{error}"))?;
        let mut buffer = vec![0; 1024];
        let mut writer = MessageWriter::new(&mut buffer, Class::Request, Method::Allocate, TransactionId(id));
        writer.attribute(&RequestedTransport(17));
        if signed {
            let (username, password) = (self.login.username.as_bytes(), self.login.password.as_bytes());
            writer.attribute(&Username(username)).attribute(&Realm(&self.realm)).attribute(&Nonce(&self.nonce));
            IntegrityKey::long_term(PasswordAlgorithm::Md5, username, &self.realm, password).sign(&mut writer);
        }
        let length = writer.finish().map_err(|error| anyhow!("{error:?}"))?;
        self.socket.send(&buffer[..length]).await?;
        let mut answer = vec![0; 2048];
        let length = tokio::time::timeout(Duration::from_secs(3), self.socket.recv(&mut answer)).await??;
        answer.truncate(length);
        Ok(answer)
    }

    /// The second Allocate: browsers do not survive 438 to it.
    async fn end(self) -> Result<()> {
        let answer = self.allocate(true).await?;
        let message = Message::parse(&answer)?;
        let code: Option<ErrorCode> = message.attribute()?;
        ensure!(message.class() == Class::Success, "an Allocate with a nonce of before: {code:?}");
        Ok(())
    }
}

/// (key, state) of a ring, newest first.
async fn states(cluster: &Cluster, ring: &str) -> Result<Vec<(u64, String)>> {
    let list = cluster.turnctl_json(&Host::Machine, &["keys", "list"]).await?;
    let keys = list["keys"].as_array().context("keys")?.iter().filter(|key| key["ring"] == ring);
    keys.map(|key| Ok((key["id"].as_u64().context("id")?, key["state"].as_str().context("state")?.to_owned())))
        .collect()
}

/// Rotates every ring and waits; answers how long it took until all relays used the new keys.
async fn rotate(cluster: &Cluster) -> Result<Duration> {
    let start = Instant::now();
    let output = cluster.turnctl(&Host::Machine, &["keys", "rotate", "--wait"]).await?;
    ensure!(output.status.success(), "turnctl: {}", String::from_utf8_lossy(&output.stderr));
    Ok(start.elapsed())
}

/// Waits until each ring's newest key is this one.
async fn all_are_newest(cluster: &Cluster, id: u64) -> Result<()> {
    eventually("the rotation has ended", Duration::from_secs(20), async || {
        for ring in ["rest", "nonce", "record"] {
            let states = states(cluster, ring).await?;
            ensure!(states.first() == Some(&(id, "newest".to_owned())), "{ring}: {states:?}");
        }
        Ok(())
    })
    .await?;
    Ok(())
}

/// Ten clients in five calls over two relays, newcomers all the time; every ring is rotated three times: undisturbed,
/// with a relay killed in the middle, with the controller killed that began it; then a relay comes back from the store
/// alone whose records are sealed with a key that has been replaced meanwhile.
#[test]
fn keys_rotate_under_calls() -> Result<()> {
    run_within(Duration::from_secs(150), async |test| {
        let etcd = Etcd::start(Place::on_loopback(1), test.path()).await?;
        let mut cluster = Cluster::new(test.path())?;
        let mut first = cluster.controller(&Place::on_loopback(2), Store::Etcd(&etcd), "").await?;
        let second = cluster.controller(&Place::on_loopback(3), Store::Etcd(&etcd), "").await?;
        let options = RelayOptions::in_region("eu");
        let steady = cluster.relay("eu-1", &Place::on_loopback(11), &options).await?;
        let mut killed = cluster.relay("eu-2", &Place::on_loopback(12), &options).await?;

        let before = login(&second.place, "before").await?;
        let mut calls = Vec::new();
        for relay in [&steady, &steady, &steady, &killed, &killed] {
            let pair = Pair::join(client(relay.address(), &before).await?, client(relay.address(), &before).await?);
            calls.push(Traffic::start(pair.await?));
        }
        let mut quiet = client(steady.address(), &before).await?;
        let mut between = Vec::new();
        for _ in 0..3 {
            between.push(Between::begin(&steady, &before).await?);
        }
        let newcomers = Newcomers::start(second.place.clone(), steady.address());

        let took = rotate(&cluster).await?;
        all_are_newest(&cluster, 1).await?;
        test.figure("keys of every ring replaced on all members after", format!("{took:?}"));
        ensure!(took < PROMISED, "the rotation took {took:?}");
        quiet.refresh(600).await?;
        between.pop().context("a client")?.end().await?;

        // A relay is killed while the key is being made known.
        let begun = Instant::now();
        let output = cluster.turnctl(&Host::Machine, &["keys", "rotate"]).await?;
        ensure!(output.status.success(), "turnctl: {}", String::from_utf8_lossy(&output.stderr));
        killed.kill()?;
        killed.start().await?;
        all_are_newest(&cluster, 2).await?;
        test.figure("the same with a relay killed in the middle", format!("{:?}", begun.elapsed()));
        quiet.permit(steady.place.address).await?;
        between.pop().context("a client")?.end().await?;

        // The controller that began it is killed.
        let begun = Instant::now();
        let output = cluster.turnctl(&Host::Machine, &["keys", "rotate"]).await?;
        ensure!(output.status.success(), "turnctl: {}", String::from_utf8_lossy(&output.stderr));
        first.kill()?;
        all_are_newest(&cluster, 3).await?;
        test.figure("the same with the controller killed that began it", format!("{:?}", begun.elapsed()));
        first.start().await?;
        quiet.refresh(600).await?;
        between.pop().context("a client")?.end().await?;

        let newcomers = newcomers.stop().await.context("somebody was refused during a rotation")?;
        test.figure("clients that allocated during three rotations", newcomers);

        // Whoever has credentials of before or of now gets an allocation, on either relay.
        let after = login(&first.place, "after").await?;
        for relay in [&steady, &killed] {
            for login in [&before, &after] {
                client(relay.address(), login).await?.refresh(0).await?;
            }
        }
        for (number, call) in calls.into_iter().enumerate() {
            let (mut pair, count) = call.stop().await.context("a call was dropped")?;
            let lost = count.sent - count.received;
            test.figure(
                &format!("call {number}"),
                format!("{lost} of {} lost, gap {:?}", count.sent, count.longest_gap),
            );
            ensure!(number >= 3 || lost == 0, "a call lost {lost} messages on a relay that nobody touched");
            ensure!(count.longest_gap < Duration::from_secs(2), "a call was silent for {:?}", count.longest_gap);
            pair.exchange(5).await?;
            for client in [&mut pair.first, &mut pair.second] {
                client.refresh(600).await?;
            }
        }

        // Records sealed with a key that is replaced while their relay and its state directory are gone.
        let mut survivor = client(killed.address(), &after).await?;
        tokio::time::sleep(Duration::from_millis(500)).await;
        killed.kill()?;
        let output = cluster.turnctl(&Host::Machine, &["keys", "rotate", "--ring", "record"]).await?;
        ensure!(output.status.success(), "turnctl: {}", String::from_utf8_lossy(&output.stderr));
        eventually("a new key of records", Duration::from_secs(10), async || {
            let states = states(&cluster, "record").await?;
            ensure!(states.first() == Some(&(4, "newest".to_owned())), "{states:?}");
            Ok(())
        })
        .await?;
        std::fs::remove_dir_all(cluster.state_of("eu-2"))?;
        killed.start().await?;
        survivor.refresh(600).await.context("restored from records under an older key")
    })
}
