//! What a packet costs, and how late it is. Figures, for people: `cargo test --release -p relay-node --test backbone
//! speed -- --ignored --nocapture`.
#![allow(clippy::print_stderr)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::node::pair;

/// CPU time of the threads of all backbones of this process, in microseconds.
fn cpu_micros() -> Result<f64> {
    let mut nanos = 0;
    for task in std::fs::read_dir("/proc/self/task")? {
        let task = task?.path();
        if std::fs::read_to_string(task.join("comm"))?.trim_end() == "backbone" {
            let stat = std::fs::read_to_string(task.join("schedstat"))?;
            nanos += stat.split_whitespace().next().context("a schedstat file")?.parse::<u64>()?;
        }
    }
    Ok(nanos as f64 / 1e3)
}

#[test]
#[ignore = "figures, not a judgement: needs a quiet machine and a release build"]
fn packets_at_a_rate() -> Result<()> {
    for length in [200, 1200] {
        let (_ca, mut one, two) = pair()?;
        let payload = vec![1; length];
        let (before, began) = (cpu_micros()?, Instant::now());
        let mut sent = 0u64;
        while began.elapsed() < Duration::from_secs(5) {
            let due = began.elapsed().as_micros() as u64 / 50;
            while sent < due {
                one.send(&two, (sent % 100) as u16, &payload);
                sent += 1;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        std::thread::sleep(Duration::from_millis(100));
        let micros = cpu_micros()? - before;
        let arrived = two.all().len();
        eprintln!(
            "{length} B at 20,000/s: {:.2} us of CPU a packet on both sides, {arrived} of {sent} arrived",
            micros / sent as f64
        );
    }
    Ok(())
}

#[test]
#[ignore = "figures, not a judgement: needs a quiet machine and a release build"]
fn packets_as_fast_as_they_go() -> Result<()> {
    for length in [200, 1200] {
        let (_ca, mut one, two) = pair()?;
        let payload = vec![1; length];
        let (before, began) = (cpu_micros()?, Instant::now());
        let (mut sent, mut arrived) = (0u64, 0);
        while began.elapsed() < Duration::from_secs(3) {
            for _ in 0..64 {
                if one.send(&two, (sent % 100) as u16, &payload) {
                    sent += 1;
                }
            }
            if sent.saturating_sub(arrived) > 2_000 {
                std::thread::sleep(Duration::from_micros(100));
            }
            arrived += two.all().len() as u64;
        }
        let micros = cpu_micros()? - before;
        eprintln!(
            "{length} B: {} packets a second, {:.2} us of CPU a packet on both sides, {arrived} of {sent} arrived",
            arrived / 3,
            micros / arrived as f64
        );
    }
    Ok(())
}

#[test]
#[ignore = "figures, not a judgement: needs a quiet machine and a release build"]
fn how_late_one_packet_is() -> Result<()> {
    let (_ca, mut one, two) = pair()?;
    let mut delays = Vec::new();
    for _ in 0..1000 {
        std::thread::sleep(Duration::from_millis(3));
        let at = Instant::now();
        one.send(&two, 0, &[0; 200]);
        delays.push(two.next()?.2.duration_since(at));
    }
    delays.sort_unstable();
    eprintln!("ring to ring: p50 {:?}, p99 {:?}", delays[500], delays[990]);
    Ok(())
}
