//! Strangers in numbers: what they cost the relay, the calls it carries, and who wants to join meanwhile (P9).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use harness::certificate::Authority;
use harness::cluster::{Cluster, Relay, RelayOptions};
use harness::coturn::rest_credentials;
use harness::flood::{self, Tally, Trickle, resident, source, strangers};
use harness::place::Place;
use harness::secure::{Trust, client_hello};
use harness::traffic::{Pair, Traffic};
use harness::turn::{Login, TurnClient};
use harness::{Host, Scenario, eventually, run_within};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use turn_core::Transport;

/// Secret of the relay, which stands alone.
const SECRET: &str = "secret-of-a-flooded-relay";
/// Port of TLS and DTLS.
const SECURE: u16 = 5349;
/// Source addresses of a flood.
const SOURCES: u32 = 100_000;
/// Packets of a flood a second: more than a busy relay's legitimate strangers by far, less than what makes the kernel
/// drop before the relay reads on a machine whose two cores also run the flood.
const RATE: u32 = 20_000;
/// What a flood of UDP may add to the relay's memory.
const GROWTH: u64 = 16 << 20;
/// Longest a newcomer may take to its allocation.
const NEWCOMER: Duration = Duration::from_secs(1);
/// All ways to a relay.
const TRANSPORTS: [Transport; 4] = [Transport::Udp, Transport::Tcp, Transport::Tls, Transport::Dtls];

/// A relay, and somebody who knows how to reach it.
#[derive(Clone)]
struct Door {
    plain: SocketAddr,
    secure: SocketAddr,
    login: Login,
    trust: Trust,
}

impl Door {
    async fn client(&self, from: IpAddr, transport: Transport) -> Result<TurnClient> {
        let host = Host::Machine;
        let mut client = match transport {
            Transport::Udp | Transport::Tcp => {
                TurnClient::open(&host, from, self.plain, transport, &self.login).await?
            }
            _ => TurnClient::open_secure(&host, from, self.secure, transport, &self.login, &self.trust).await?,
        };
        client.allocate().await?;
        Ok(client)
    }

    /// A call over each transport.
    async fn calls(&self) -> Result<Vec<(Transport, Traffic)>> {
        let from = Place::on_loopback(100).address;
        let mut calls = Vec::new();
        for transport in TRANSPORTS {
            let (first, second) = (self.client(from, transport).await?, self.client(from, transport).await?);
            calls.push((transport, Traffic::start(Pair::join(first, second).await?)));
        }
        Ok(calls)
    }

    /// Lets newcomers of every transport in, one after the other, until told to stop; answers how many came and the
    /// longest that one took.
    async fn newcomers(self, stop: Arc<AtomicBool>) -> Result<(u32, Duration)> {
        let (mut count, mut longest) = (0, Duration::ZERO);
        while !stop.load(Ordering::Relaxed) || count == 0 {
            for transport in TRANSPORTS {
                // From the midst of those who flood.
                let from = source(7919 * count).into();
                let start = Instant::now();
                let mut client =
                    self.client(from, transport).await.with_context(|| format!("newcomer over {transport:?}"))?;
                longest = longest.max(start.elapsed());
                // What it leaves behind would look like the strangers' doing.
                client.refresh(0).await?;
                count += 1;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok((count, longest))
    }
}

async fn lone_relay(test: &Scenario) -> Result<(Cluster, Relay, Door)> {
    let place = Place::on_loopback(11);
    let authority = Authority::new(test.path())?;
    let certificate = authority.issue("relay", &[], &[place.address])?;
    let options = RelayOptions {
        workers: 2,
        listen: vec![("tls", SECURE), ("dtls", SECURE)],
        more: format!("rest_secrets = [{SECRET:?}]\ncertificates = [{}]", certificate.entry()),
        ..RelayOptions::in_region("eu")
    };
    let cluster = Cluster::new(test.path())?;
    let relay = cluster.relay("eu-1", &place, &options).await?;
    let door = Door {
        plain: relay.address(),
        secure: place.at(SECURE),
        login: rest_credentials(SECRET.as_bytes(), "flood")?,
        trust: Trust::new(&authority, &place.address.to_string())?,
    };
    Ok((cluster, relay, door))
}

/// The relay's memory once it has served somebody over every transport: what comes on top is the strangers' doing.
async fn serving(relay: &Relay, door: &Door) -> Result<u64> {
    for transport in TRANSPORTS {
        door.client(Place::on_loopback(101).address, transport).await?.refresh(0).await?;
    }
    resident(relay.pid()?)
}

/// Runs `flood` beside calls and newcomers: no message of a call is lost, no newcomer waits. Answers what the flood
/// answered, and by how much the relay has grown since `before`.
async fn beside_calls<T: Send + 'static>(
    test: &Scenario,
    what: &str,
    relay: &Relay,
    door: &Door,
    before: u64,
    flood: impl Future<Output = Result<T>>,
) -> Result<(T, u64)> {
    let calls = door.calls().await?;
    let stop = Arc::new(AtomicBool::new(false));
    let newcomers = tokio::spawn(door.clone().newcomers(Arc::clone(&stop)));
    let outcome = flood.await?;
    let growth = resident(relay.pid()?)?.saturating_sub(before);
    stop.store(true, Ordering::Relaxed);
    let (count, longest) = newcomers.await??;
    let mut carried = 0;
    for (transport, call) in calls {
        let (_, tally) = call.stop().await?;
        ensure!(tally.sent == tally.received, "{what}: the call over {transport:?} lost messages: {tally:?}");
        carried += tally.received;
    }
    test.figure(
        what,
        format!(
            "RSS grew by {} KiB; {carried} messages of calls, none lost; {count} newcomers, the slowest in {longest:?}",
            growth / 1024
        ),
    );
    ensure!(longest < NEWCOMER, "{what}: a newcomer took {longest:?}");
    Ok((outcome, growth))
}

/// Floods over UDP, from 100,000 addresses each: the relay's memory stays flat, an answer never exceeds three times its
/// request.
#[test]
fn udp_strangers_cost_nothing() -> Result<()> {
    run_within(Duration::from_secs(150), async |test| {
        let (_cluster, relay, door) = lone_relay(test).await?;
        let before = serving(&relay, &door).await?;
        let hello = client_hello()?;
        let challenge = Challenge::of(door.plain).await?;
        type Packet = Box<dyn Fn(u32) -> Vec<u8> + Send>;
        let floods: [(&str, SocketAddr, Packet); 4] = [
            ("flood of Binding requests", door.plain, Box::new(|number| message(BINDING, number, &[]))),
            ("flood of Allocate requests", door.plain, Box::new(|number| message(ALLOCATE, number, &UDP_WANTED))),
            ("flood of forged integrity", door.plain, Box::new(move |number| challenge.forged(number))),
            ("flood of DTLS ClientHellos", door.secure, Box::new(move |number| fresh(&hello, number))),
        ];
        for (what, server, packet) in floods {
            let flood = async { tokio::task::spawn_blocking(move || strangers(server, SOURCES, RATE, packet)).await? };
            let (tally, growth) = beside_calls(test, what, &relay, &door, before, flood).await?;
            answered_modestly(test, what, &tally)?;
            ensure!(growth < GROWTH, "{what}: the relay grew by {growth} bytes");
        }
        Ok(())
    })
}

fn answered_modestly(test: &Scenario, what: &str, tally: &Tally) -> Result<()> {
    let (mean, worst) = (tally.amplification(), tally.worst_amplification());
    let share = 100.0 * tally.answers as f64 / tally.sent as f64;
    test.figure(
        &format!("{what}, answers"),
        format!(
            "{} packets in {:?}, {share:.0} % answered; bytes back for a byte: {mean:.2}, worst {worst:.2}",
            tally.sent, tally.took
        ),
    );
    ensure!(worst <= 3.0, "{what}: an answer of {} bytes to {}", tally.largest_answer, tally.smallest);
    ensure!(tally.answers > 0, "{what}: no stranger is served at all");
    Ok(())
}

/// What a connection may cost the relay, whatever it says or does not say, as README tells.
const TCP_COST: u64 = 4 << 10;
/// The same with TLS.
const TLS_COST: u64 = 24 << 10;
/// Connections that stay open at a time.
const IDLE: u32 = 10_000;
/// Connections whose first bytes come one by one.
const SLOW: u32 = 1000;

/// Connections that say nothing, half of something, or everything byte by byte: each costs no more memory than
/// documented, who dawdles is served, and nobody waits for them.
#[test]
fn dawdlers_cost_what_is_documented() -> Result<()> {
    run_within(Duration::from_secs(150), async |test| {
        let (_cluster, relay, door) = lone_relay(test).await?;
        let before = serving(&relay, &door).await?;
        let (binding, allocate) = (message(BINDING, 1, &[]), message(ALLOCATE, 1, &UDP_WANTED));

        let slow = flood::crowd(door.plain, SLOW, async |stream| {
            let mut stream = Trickle::new(stream, allocate.len());
            stream.write_all(&allocate).await?;
            answered(&mut stream, [0x01, 0x13]).await?;
            Ok(stream)
        });
        let (open, growth) = beside_calls(test, "1,000 slow TCP connections", &relay, &door, before, slow).await?;
        cost(test, "a slow TCP connection", growth, open.len(), TCP_COST)?;
        drop(open);

        let silent = async {
            let open = flood::crowd(door.plain, IDLE, async |stream| Ok(stream)).await?;
            seen(&relay, open.len()).await?;
            Ok(open)
        };
        let (open, growth) = beside_calls(test, "10,000 silent TCP connections", &relay, &door, before, silent).await?;
        cost(test, "a silent TCP connection", growth, open.len(), TCP_COST)?;
        drop(open);

        let idle = async {
            let open = flood::crowd(door.plain, IDLE, async |mut stream| {
                stream.write_all(&binding).await?;
                answered(&mut stream, [0x01, 0x01]).await?;
                Ok(stream)
            });
            let open = open.await?;
            held(&relay, open.len()).await?;
            Ok(open)
        };
        let (open, growth) = beside_calls(test, "10,000 idle TCP connections", &relay, &door, before, idle).await?;
        cost(test, "an idle TCP connection", growth, open.len(), TCP_COST)
    })
}

/// Idle connections whose handshake is done. So many handshakes cost time, the client's half the test's own: `.ci/long`
/// makes it 10,000.
fn idle_by_tls() -> Result<u32> {
    harness::number("TURNPIKE_IDLE_TLS", 2000)
}

/// The same of TLS.
#[test]
fn dawdlers_over_tls_cost_what_is_documented() -> Result<()> {
    run_within(Duration::from_secs(150), async |test| {
        let (_cluster, relay, door) = lone_relay(test).await?;
        let before = serving(&relay, &door).await?;
        let allocate = message(ALLOCATE, 1, &UDP_WANTED);

        let slow = flood::crowd(door.secure, SLOW, async |stream| {
            let mut stream = door.trust.over(Trickle::new(stream, 100)).await?;
            stream.write_all(&allocate).await?;
            stream.flush().await?;
            answered(&mut stream, [0x01, 0x13]).await?;
            Ok(stream)
        });
        let (open, growth) = beside_calls(test, "1,000 slow TLS connections", &relay, &door, before, slow).await?;
        cost(test, "a slow TLS connection", growth, open.len(), TLS_COST)?;
        drop(open);

        let half = async {
            let open = flood::crowd(door.secure, IDLE, async |mut stream: TcpStream| {
                // The beginning of a record that announces a ClientHello of 252 bytes.
                stream.write_all(&[22, 3, 1, 1, 0, 1, 0, 0, 252, 3, 3]).await?;
                Ok(stream)
            });
            let open = open.await?;
            seen(&relay, open.len()).await?;
            Ok(open)
        };
        let (open, growth) = beside_calls(test, "10,000 half ClientHellos", &relay, &door, before, half).await?;
        cost(test, "half a ClientHello", growth, open.len(), TLS_COST)?;
        drop(open);

        let idle = async {
            let open = flood::crowd(door.secure, idle_by_tls()?, async |stream| door.trust.over(stream).await).await?;
            held(&relay, open.len()).await?;
            Ok(open)
        };
        let (open, growth) = beside_calls(test, "idle TLS connections", &relay, &door, before, idle).await?;
        cost(test, "an idle TLS connection", growth, open.len(), TLS_COST)
    })
}

/// Waits until the relay holds so many connections.
async fn held(relay: &Relay, count: usize) -> Result<()> {
    eventually("the relay has accepted all", Duration::from_secs(10), async || {
        let held = relay.metric("turn_connections", "").await?;
        if held >= count as f64 { Ok(()) } else { Err(anyhow!("{held}")) }
    })
    .await?;
    Ok(())
}

/// Waits until the relay has taken so many connections, and closed those beyond its limit of silent ones.
async fn seen(relay: &Relay, count: usize) -> Result<()> {
    eventually("the relay has accepted all", Duration::from_secs(10), async || {
        let held = relay.metric("turn_connections", "").await?;
        let closed = relay.metric("turn_refused_connections_total", "half_open_limit").await?;
        if held + closed >= count as f64 { Ok(()) } else { Err(anyhow!("{held} held, {closed} closed")) }
    })
    .await?;
    Ok(())
}

fn cost(test: &Scenario, what: &str, growth: u64, count: usize, bound: u64) -> Result<()> {
    let each = growth / count as u64;
    test.figure(&format!("{what} costs"), format!("{each} bytes of {count}"));
    ensure!(each <= bound, "{what} costs {each} bytes, {bound} are documented");
    Ok(())
}

/// Waits for the head of a response of this type.
async fn answered(stream: &mut (impl AsyncRead + Unpin), kind: [u8; 2]) -> Result<()> {
    let mut head = [0; 20];
    tokio::time::timeout(Duration::from_secs(20), stream.read_exact(&mut head)).await.context("no answer")??;
    ensure!(head[..2] == kind, "not {kind:?} but {head:?}");
    Ok(())
}

const BINDING: u16 = 0x0001;
const ALLOCATE: u16 = 0x0003;
/// REQUESTED-TRANSPORT: UDP.
const UDP_WANTED: [u8; 8] = [0x00, 0x19, 0x00, 0x04, 17, 0, 0, 0];

/// A STUN message with its attributes as bytes.
#[allow(clippy::cast_possible_truncation, reason = "requests are short")]
fn message(kind: u16, number: u32, attributes: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(20 + attributes.len());
    message.extend(kind.to_be_bytes());
    message.extend((attributes.len() as u16).to_be_bytes());
    message.extend([0x21, 0x12, 0xA4, 0x42, 0, 0, 0, 0, 0, 0, 0, 0]);
    message.extend(number.to_be_bytes());
    message.extend(attributes);
    message
}

#[allow(clippy::cast_possible_truncation, reason = "values are short")]
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = [kind.to_be_bytes(), (value.len() as u16).to_be_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// REALM and NONCE of a 401.
struct Challenge {
    realm: Vec<u8>,
    nonce: Vec<u8>,
}

impl Challenge {
    async fn of(server: SocketAddr) -> Result<Self> {
        let socket = tokio::net::UdpSocket::bind((Place::on_loopback(101).address, 0)).await?;
        socket.send_to(&message(ALLOCATE, 0, &UDP_WANTED), server).await?;
        let mut answer = [0; 1024];
        let answered = tokio::time::timeout(Duration::from_secs(2), socket.recv(&mut answer)).await;
        let length = answered.context("no 401")??;
        let (mut challenge, mut rest) = (Self { realm: Vec::new(), nonce: Vec::new() }, &answer[20..length]);
        while let [kind_high, kind_low, length_high, length_low, value @ ..] = rest {
            let length = usize::from(u16::from_be_bytes([*length_high, *length_low]));
            let value_of = value.get(..length).context("an attribute overruns the 401")?;
            match u16::from_be_bytes([*kind_high, *kind_low]) {
                0x0014 => challenge.realm = value_of.to_vec(),
                0x0015 => challenge.nonce = value_of.to_vec(),
                _ => {}
            }
            rest = value.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        ensure!(!challenge.realm.is_empty() && !challenge.nonce.is_empty(), "a 401 without REALM or NONCE");
        Ok(challenge)
    }

    /// An Allocate whose user could exist, so that its integrity has to be computed, and whose integrity is made up.
    fn forged(&self, number: u32) -> Vec<u8> {
        let mut attributes = UDP_WANTED.to_vec();
        attributes.extend(attribute(0x0006, format!("4000000000:{number}").as_bytes()));
        attributes.extend(attribute(0x0014, &self.realm));
        attributes.extend(attribute(0x0015, &self.nonce));
        attributes.extend(attribute(0x0008, &[0x5A; 20]));
        message(ALLOCATE, number, &attributes)
    }
}

/// The same ClientHello with another random (RFC 6347 §4.2.2: behind 13 bytes of record and 12 of handshake header, and
/// the version).
fn fresh(hello: &[u8], number: u32) -> Vec<u8> {
    let mut hello = hello.to_vec();
    hello[27..31].copy_from_slice(&number.to_be_bytes());
    hello
}
