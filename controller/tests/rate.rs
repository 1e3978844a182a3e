//! How many discoveries one core answers, and how late: a controller on a thread of its own over 500 relays in 25 regions,
//! asked over HTTP with 4,000 networks measured. `tests/discovery` runs it.

mod site;

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::Instant;

use self::site::{Site, node};

const RELAYS: u8 = 250;
const REGIONS: u8 = 25;
const CONNECTIONS: u32 = 32;
/// What is promised for one core.
const RATE: u32 = 5000;
const P99: Duration = Duration::from_millis(5);

struct Measured {
    answers: f64,
    p50: Duration,
    p99: Duration,
    most: Duration,
}

#[test]
#[ignore = "a measurement; tests/discovery runs it alone, in release"]
fn discoveries_per_second() -> Result<()> {
    let seconds =
        Duration::from_secs(std::env::var("TURNPIKE_DISCOVERY_SECONDS").map_or(10, |it| it.parse().expect("seconds")));
    let (sender, address) = std::sync::mpsc::channel();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    // One thread: what it answers is what one core answers.
    let server = std::thread::spawn(move || -> Result<()> {
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
            let regions: Vec<String> = (0..REGIONS).map(|i| format!("region-{i}")).collect();
            let relay = |i: u8| {
                node(&format!("{}-{i}", regions[usize::from(i % REGIONS)]), &regions[usize::from(i % REGIONS)], i)
            };
            let more = |i: u8| node(&format!("more-{i}"), &regions[usize::from(i % REGIONS)], i);
            let nodes: Vec<_> = (0..RELAYS).map(relay).chain((0..RELAYS).map(more)).collect();
            let site = Site::start(&["--rate-address=0", "--lease=60"], &nodes).await?;
            let discovery = &site.replica().discovery;
            for i in 0..4000_u32 {
                let rtts = (0..6).map(|j| (regions[(i as usize + j) % regions.len()].clone(), 10.0 + j as f32 * 9.0));
                discovery.report(client(i).parse()?, &rtts.collect::<Vec<_>>());
            }
            sender.send(site.http)?;
            let _ = stopped.await;
            Ok(())
        })
    });
    let address = address.recv().context("the controller did not start")?;
    let load = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (fastest, paced) = load.block_on(async {
        // Warm.
        ask(address, None, Duration::from_secs(1)).await?;
        let fastest = ask(address, None, seconds).await?;
        Ok::<_, anyhow::Error>((fastest, ask(address, Some(RATE), seconds).await?))
    })?;
    drop(stop);
    server.join().expect("the server's thread")?;

    let mut text = format!(
        "HTTP discovery by a controller on one thread, {} relays in {REGIONS} regions, {seconds:?} each\n\n",
        u32::from(RELAYS) * 2
    );
    for (what, it) in [
        (format!("{CONNECTIONS} connections, as fast as they can"), &fastest),
        (format!("{RATE} a second offered"), &paced),
    ] {
        writeln!(
            text,
            "{what:<42} {:>7.0} answers/s   p50 {:>8.2?}   p99 {:>8.2?}   max {:>8.2?}",
            it.answers, it.p50, it.p99, it.most
        )?;
    }
    std::io::stderr().write_all(text.as_bytes())?;
    if let Some(directory) = std::env::var_os("TURNPIKE_RESULTS") {
        std::fs::write(Path::new(&directory).join("discovery.txt"), &text)?;
    }
    ensure!(fastest.answers >= f64::from(RATE), "only {:.0} answers a second", fastest.answers);
    ensure!(paced.p99 <= P99, "p99 of {:?} at {RATE} a second", paced.p99);
    Ok(())
}

fn client(i: u32) -> String {
    format!("203.{}.{}.9", i / 256 % 256, i % 256)
}

/// Asks over all connections for this long; `rate` of all of them together, or as fast as answers come.
async fn ask(address: SocketAddr, rate: Option<u32>, length: Duration) -> Result<Measured> {
    let begun = Instant::now();
    let mut connections = JoinSet::new();
    for connection in 0..CONNECTIONS {
        let every = rate.map(|rate| Duration::from_secs(1) * CONNECTIONS / rate);
        connections.spawn(one(address, connection, every, begun, length));
    }
    let mut late = Vec::new();
    while let Some(one) = connections.join_next().await {
        late.extend(one??);
    }
    let took = begun.elapsed();
    late.sort_unstable();
    let at = |share: f64| late[((late.len() - 1) as f64 * share) as usize];
    Ok(Measured { answers: late.len() as f64 / took.as_secs_f64(), p50: at(0.5), p99: at(0.99), most: at(1.0) })
}

/// How late each answer was, from when it was to be asked for: waiting in line counts.
async fn one(
    address: SocketAddr,
    number: u32,
    every: Option<Duration>,
    begun: Instant,
    length: Duration,
) -> Result<Vec<Duration>> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let mut late = Vec::new();
    let mut due = begun + every.unwrap_or_default() * number / CONNECTIONS;
    let mut buffer = vec![0; 16 * 1024];
    for i in number.. {
        let now = Instant::now();
        match every {
            Some(every) => {
                tokio::time::sleep_until(due).await;
                due += every;
            }
            None => due = now,
        }
        let asked = if every.is_some() { due - every.unwrap_or_default() } else { now };
        if asked > begun + length {
            break;
        }
        let path = format!("/v1/ice-servers?limit=2&user=u{i}&client={}", client(i.wrapping_mul(2_654_435_761) % 8000));
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: c\r\n\r\n").as_bytes()).await?;
        let mut len = 0;
        loop {
            let read = stream.read(&mut buffer[len..]).await?;
            ensure!(read > 0, "closed");
            len += read;
            if is_whole(&buffer[..len])? {
                break;
            }
        }
        late.push(asked.elapsed());
    }
    Ok(late)
}

fn is_whole(answer: &[u8]) -> Result<bool> {
    let Some(end) = answer.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(false) };
    let head = std::str::from_utf8(&answer[..end])?;
    ensure!(head.starts_with("HTTP/1.1 200"), "{head}");
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).context("a length")?;
    Ok(answer.len() >= end + 4 + length.parse::<usize>()?)
}
