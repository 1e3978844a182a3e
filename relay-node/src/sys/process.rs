//! Limits, clocks and threads of the process.

use std::io;
use std::time::Duration;

use super::check;

/// Raises the soft limit of open descriptors to the hard one: every allocation is a socket.
///
/// # Errors
/// As getrlimit(2) and setrlimit(2).
pub fn raise_descriptor_limit() -> io::Result<()> {
    let limit = descriptors()?;
    let limit = libc::rlimit { rlim_cur: limit.rlim_max, ..limit };
    // SAFETY: `limit` is a valid rlimit, only read.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) })?;
    Ok(())
}

/// How many descriptors may be open.
pub fn descriptor_limit() -> u64 {
    descriptors().map_or(0, |limit| limit.rlim_cur)
}

fn descriptors() -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid, writable rlimit.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    Ok(limit)
}

/// Lets the calling thread never take the place of one that runs when it is woken (SCHED_BATCH of sched(7)): it waits until
/// that one has done what it is at. For its share of the time that makes no difference.
///
/// # Errors
/// As sched_setscheduler(2).
pub fn wait_for_those_who_run() -> io::Result<()> {
    // SAFETY: all zero is a valid sched_param, whatever is in it beside the priority.
    let none: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: 0 is the calling thread; `none` is a valid sched_param, only read.
    check(unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const none) })?;
    Ok(())
}

/// CPU time of the calling thread since it began.
pub fn thread_cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid, writable timespec. The clock exists on every Linux, so the call cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Time since the machine was booted, suspension included.
pub fn boot_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid, writable timespec. The clock exists on every Linux, so the call cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_gets_older() {
        let before = boot_time();
        std::thread::sleep(Duration::from_millis(2));
        assert!(boot_time() >= before + Duration::from_millis(2));
    }

    #[test]
    fn cpu_time_grows_with_work() {
        let before = thread_cpu_time();
        let mut sum = 0u64;
        while thread_cpu_time() < before + Duration::from_millis(2) {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(thread_cpu_time() > before);
    }
}
