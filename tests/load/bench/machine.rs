//! Clocks and meters of the machine.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::time::ClockId;
use nix::unistd::Pid;

/// The core of the servers.
pub(crate) const SERVER_CORE: usize = 0;
/// The core of everything else.
pub(crate) const LOAD_CORE: usize = 1;

/// Leaves the servers' core to them. Whoever is started from here on is not on it either.
pub(crate) fn leave_the_core() -> Result<()> {
    let cores = std::thread::available_parallelism()?.get();
    ensure!(cores > LOAD_CORE, "a measurement needs two cores: one for the server, one for the load");
    let mut set = CpuSet::new();
    set.set(LOAD_CORE)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// CPU time of a process: its threads, those that have ended included.
pub(crate) fn process_time(pid: u32) -> Result<Duration> {
    let clock = ClockId::pid_cpu_clock_id(Pid::from_raw(i32::try_from(pid)?))?;
    Ok(clock.now()?.into())
}

/// Time all cores were busy, interrupts included, in steps of 10 ms.
pub(crate) fn busy_time() -> Result<Duration> {
    let stat = fs::read_to_string("/proc/stat")?;
    let line = stat.lines().next().context("/proc/stat is empty")?;
    let ticks: Vec<u64> = line.split_whitespace().skip(1).map(str::parse).collect::<Result<_, _>>()?;
    // user nice system idle iowait irq softirq steal; what guests used is in user already.
    let busy: u64 = ticks.iter().take(8).enumerate().filter(|(index, _)| !matches!(index, 3 | 4)).map(|(_, n)| n).sum();
    Ok(Duration::from_millis(busy * 10))
}

/// Resident memory of a process in bytes.
pub(crate) fn resident(pid: u32) -> Result<u64> {
    field(Path::new(&format!("/proc/{pid}/status")), "VmRSS:")
}

/// Memory of the kernel that cannot be taken back, in bytes.
pub(crate) fn kernel_memory() -> Result<u64> {
    field(Path::new("/proc/meminfo"), "SUnreclaim:")
}

/// A field in kB.
fn field(file: &Path, name: &str) -> Result<u64> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
    let kib: u64 = line.split_whitespace().next().context("no number")?.parse()?;
    Ok(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meters_move() -> Result<()> {
        let (own, all) = (process_time(std::process::id())?, busy_time()?);
        let mut sum = 0_u64;
        while process_time(std::process::id())? < own + Duration::from_millis(60) {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(busy_time()? > all);
        assert!(resident(std::process::id())? > 100_000 && kernel_memory()? > 100_000);
        Ok(())
    }
}
