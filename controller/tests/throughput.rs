//! How much one controller stores in an etcd of three members: a fleet of fake relays offers allocation events at growing
//! rates; the table and the picture say what was stored, and how long after each event. `tests/store` runs it.

mod etcd;
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod replica;

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use etcd::{Extra, Trio, connect_to};
use replica::{Pki, Relay, Replica, hello};
use tokio::task::JoinSet;
use tokio::time::{Instant, interval};
use turnpike_proto::v1;

/// Relays of the fleet.
const RELAYS: u8 = 100;
/// As real relays: changes leave each 100 ms, at most so many batches of so many changes unacknowledged.
const FLUSH: Duration = Duration::from_millis(100);
const IN_FLIGHT: usize = 8;
const BATCH: usize = 128;
/// Allocation events offered in a second, all relays together.
const RATES: [u32; 9] = [500, 1000, 2000, 3000, 4000, 5000, 7000, 10_000, 14_000];

/// One row of the table.
struct Row {
    offered: u32,
    /// Events a second.
    stored: f64,
    /// From event to acknowledgement.
    p50: Duration,
    p99: Duration,
}

/// Each event is a create or, half a second later, its delete, as a relay reports them.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement; tests/store runs it alone, in release"]
async fn events_per_second() {
    let seconds = std::env::var("TURNPIKE_STORE_SECONDS").map_or(10, |text| text.parse().expect("seconds"));
    let mut series = vec![("etcd 3.4", Extra::default())];
    series.extend(Extra::newer().map(|newer| ("etcd 3.5", newer)));
    let mut measured = Vec::new();
    for (name, extra) in series {
        let etcd = Trio::start_with(extra).await;
        let mut rows = Vec::new();
        for offered in RATES {
            let row = offer(&etcd, offered, Duration::from_secs(seconds)).await;
            let is_full = row.stored < f64::from(offered) * 0.9;
            rows.push(row);
            if is_full {
                break;
            }
        }
        measured.push((name, rows));
    }
    let table = table(&measured, seconds);
    if let Some(directory) = std::env::var_os("TURNPIKE_RESULTS") {
        std::fs::write(Path::new(&directory).join("store.txt"), &table).expect("a table");
        std::fs::write(Path::new(&directory).join("store.svg"), picture(&measured)).expect("a picture");
    }
    std::io::Write::write_all(&mut std::io::stderr(), table.as_bytes()).expect("standard error");
}

async fn offer(etcd: &Trio, offered: u32, length: Duration) -> Row {
    let store = connect_to(etcd.endpoints()).await;
    let pki = Pki::new();
    let replica = Replica::start(store, &pki, Duration::from_secs(10)).await;
    let mut relays = Vec::new();
    for n in 1..=RELAYS {
        relays.push(Relay::join(&pki, &replica, hello(&format!("eu-{n}"), n, &format!("boot-{offered}"), 1)).await);
    }
    let every = Duration::from_secs(1) * u32::from(RELAYS) / offered;
    let mut fleet = JoinSet::new();
    for relay in relays {
        fleet.spawn(report(relay, every, length));
    }
    let begun = Instant::now();
    let mut lags: Vec<Duration> = fleet.join_all().await.into_iter().flatten().collect();
    // With the time that the last ones took to be acknowledged.
    let took = begun.elapsed();
    lags.sort_unstable();
    let at = |share: f64| lags[((lags.len() - 1) as f64 * share) as usize];
    Row { offered, stored: lags.len() as f64 / took.as_secs_f64(), p50: at(0.5), p99: at(0.99) }
}

/// One relay: an event each `every`, for `length`. Returns the lag of each from event to acknowledgement.
async fn report(mut relay: Relay, every: Duration, length: Duration) -> Vec<Duration> {
    let begun = Instant::now();
    let mut flush = interval(FLUSH);
    let mut load = interval(Duration::from_secs(1));
    let mut next = begun + every.mul_f64(f64::from(getrandom::u32().expect("randomness")) / f64::from(u32::MAX));
    let mut number = 0;
    let mut pending: VecDeque<(Instant, v1::RecordChange)> = VecDeque::new();
    let mut living: VecDeque<(Instant, u32)> = VecDeque::new();
    let mut sent: VecDeque<(u64, Vec<Instant>)> = VecDeque::new();
    let mut lags = Vec::new();
    loop {
        let over = begun.elapsed() > length;
        if over && pending.is_empty() && sent.is_empty() {
            return lags;
        }
        tokio::select! {
            _ = flush.tick() => {
                let now = Instant::now();
                while !over && next <= now {
                    let old = living.front().is_some_and(|(born, _)| next - *born > Duration::from_millis(500));
                    let change = if old {
                        let (_, gone) = living.pop_front().expect("just seen");
                        relay.ended(gone, 2)
                    } else {
                        number += 1;
                        living.push_back((next, number));
                        relay.put(number, 1)
                    };
                    pending.push_back((next, change));
                    next += every;
                }
                while !pending.is_empty() && sent.len() < IN_FLIGHT {
                    let (at, changes) = pending.drain(..pending.len().min(BATCH)).unzip();
                    sent.push_back((relay.batch(changes).await, at));
                }
            }
            _ = load.tick() => relay.load(v1::Load::default()).await,
            acknowledged = relay.acknowledgement(), if !sent.is_empty() => {
                while sent.front().is_some_and(|(batch, _)| *batch <= acknowledged) {
                    let (_, at) = sent.pop_front().expect("just seen");
                    lags.extend(at.into_iter().map(|at| at.elapsed()));
                }
            }
        }
    }
}

fn table(measured: &[(&str, Vec<Row>)], seconds: u64) -> String {
    let mut text = format!(
        "# Allocation events through one controller into etcd of three members, {RELAYS} relays, {seconds} s a rate, all on\n\
         # one machine with {} cores. Lag: from the event on its relay, which sends each 100 ms, to \"stored\" heard there.\n\n\
         store      offered/s   stored/s    p50 ms    p99 ms\n",
        std::thread::available_parallelism().map_or(0, usize::from),
    );
    for (name, rows) in measured {
        for row in rows {
            let (p50, p99) = (row.p50.as_secs_f64() * 1e3, row.p99.as_secs_f64() * 1e3);
            writeln!(text, "{name:9} {:10} {:10.0} {p50:9.0} {p99:9.0}", row.offered, row.stored).expect("memory");
        }
    }
    text
}

/// Lag (logarithmic) over the offered rate.
fn picture(measured: &[(&str, Vec<Row>)]) -> String {
    let (width, height, left, bottom) = (640.0, 360.0, 60.0, 320.0);
    let highest = measured.iter().flat_map(|(_, rows)| rows).map(|row| row.offered).max().unwrap_or(1);
    let x = |offered: u32| left + f64::from(offered) / f64::from(highest) * (width - left - 20.0);
    // 10 ms at the bottom, 10 s at the top.
    let y = |lag: Duration| bottom - (lag.as_secs_f64() * 100.0).max(1.0).log10() / 3.0 * (bottom - 40.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n<text x=\"{left}\" y=\"20\">Lag from \
         allocation event to stored, by events offered a second (one controller, etcd of three members)</text>\n"
    );
    for (lag, name) in [(10, "10 ms"), (100, "100 ms"), (1000, "1 s"), (10_000, "10 s")] {
        let y = y(Duration::from_millis(lag));
        writeln!(
            svg,
            "<path d=\"M{left} {y:.1}H{width}\" stroke=\"#ddd\"/><text x=\"4\" y=\"{:.1}\">{name}</text>",
            y + 4.0
        )
        .expect("memory");
    }
    for (n, (name, rows)) in measured.iter().enumerate() {
        let colour = ["#c2410c", "#1d4ed8"][n % 2];
        for (which, dash, lag) in
            [("p50", "", (|row: &Row| row.p50) as fn(&Row) -> Duration), ("p99", "5 3", |row: &Row| row.p99)]
        {
            let points: Vec<String> =
                rows.iter().map(|row| format!("{:.1},{:.1}", x(row.offered), y(lag(row)))).collect();
            writeln!(
                svg,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" stroke-dasharray=\"{dash}\"/>",
                points.join(" ")
            )
            .expect("memory");
            if let Some(last) = rows.last() {
                let (x, y) = (x(last.offered) - 90.0, y(lag(last)) - 6.0);
                writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" fill=\"{colour}\">{name} {which}</text>")
                    .expect("memory");
            }
        }
    }
    for offered in RATES.into_iter().filter(|rate| *rate <= highest && *rate >= 1000) {
        writeln!(svg, "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{offered}</text>", x(offered), bottom + 20.0)
            .expect("memory");
    }
    svg.push_str("</svg>\n");
    svg
}
