//! Allocations made and ended again, as many as a server can.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use turn_core::Transport;
use turn_core::client::{Event, Failure};
use turn_core::wire::Method;

use super::batch::{Receiver, Sender};
use super::caller::{Account, BenchError, Caller};
use super::spread::Spread;

/// How often those are looked at that hear nothing.
const LOOK: Duration = Duration::from_millis(100);
/// Newcomers refused at once, one behind the other, after which there is no point in it.
const REFUSALS: u64 = 64;

/// Who allocates, and how many at a time.
#[derive(Clone, Debug)]
pub struct CyclePlan {
    /// The server, by UDP.
    pub server: SocketAddr,
    /// Who the clients are.
    pub account: Account,
    /// Address of the clients.
    pub from: IpAddr,
    /// Cycles under way at a time.
    pub concurrent: usize,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Cycled {
    /// Cycles ended within `elapsed`: the challenge, an Allocate, a Refresh with 0, each answered, on a port of its own.
    pub cycles: u64,
    /// Cycles that the server refused or did not answer, over the whole time.
    pub failed: u64,
    /// Why the last of them failed.
    pub failure: Option<(Method, Failure)>,
    /// The measured time.
    pub elapsed: Duration,
    /// Of it, the time this thread had nothing to do.
    pub idle: Duration,
    /// From the first request of a cycle to its last answer.
    pub latency: Spread,
}

struct Cycler {
    caller: Caller,
    begun: Instant,
}

struct Round {
    plan: CyclePlan,
    epoll: Epoll,
    cyclers: Vec<Cycler>,
    sender: Sender,
    receiver: Receiver,
    cycles: u64,
    failed: u64,
    failure: Option<(Method, Failure)>,
    latency: Spread,
    idle: Duration,
}

/// Makes and ends allocations for `warm` and then for `length`; `sample` is called at the beginning and at the end of
/// the measured time. It never sleeps.
///
/// # Errors
/// A socket fails.
pub fn cycle<T>(
    plan: CyclePlan,
    warm: Duration,
    length: Duration,
    mut sample: impl FnMut() -> T,
) -> Result<(Cycled, [T; 2]), BenchError> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(io::Error::from)?;
    let mut round = Round {
        epoll,
        cyclers: Vec::new(),
        sender: Sender::new(),
        receiver: Receiver::new(),
        cycles: 0,
        failed: 0,
        failure: None,
        latency: Spread::new(),
        idle: Duration::ZERO,
        plan,
    };
    for index in 0..round.plan.concurrent {
        let cycler = round.newcomer(index)?;
        round.cyclers.push(cycler);
    }
    round.go_on(warm)?;
    (round.cycles, round.idle, round.latency) = (0, Duration::ZERO, Spread::new());
    let (start, first) = (Instant::now(), sample());
    round.go_on(length)?;
    let (last, elapsed) = (sample(), start.elapsed());
    let Round { cycles, failed, failure, latency, idle, .. } = round;
    let cycled = Cycled { cycles, failed, failure, elapsed, idle, latency };
    for mut cycler in round.cyclers {
        // Those that got theirs; the others have nothing to release.
        let _ = cycler.caller.release();
    }
    Ok((cycled, [first, last]))
}

impl Round {
    fn newcomer(&mut self, index: usize) -> Result<Cycler, BenchError> {
        let mut tried = 0_u64;
        loop {
            let plan = &self.plan;
            let mut caller = Caller::new(plan.server, Transport::Udp, plan.from, &plan.account)?;
            let event = EpollEvent::new(EpollFlags::EPOLLIN, index as u64);
            self.epoll.add(caller.socket(), event).map_err(io::Error::from)?;
            let begun = Instant::now();
            caller.begin(begun);
            let Some(Event::Failed(method, failure)) = caller.step(&mut self.sender, &mut self.receiver)? else {
                return Ok(Cycler { caller, begun });
            };
            // The answer was there at once. The next one has another port.
            tried += 1;
            if tried == REFUSALS {
                return Err(BenchError::Refused(method, failure));
            }
            self.failed += 1;
            self.failure = Some((method, failure));
        }
    }

    fn go_on(&mut self, length: Duration) -> Result<(), BenchError> {
        let start = Instant::now();
        let (mut now, mut look) = (start, start + LOOK);
        let mut events = vec![EpollEvent::empty(); 64];
        while now < start + length {
            let ready = self.epoll.wait(&mut events, EpollTimeout::ZERO).map_err(io::Error::from)?;
            for event in &events[..ready] {
                self.step(usize::try_from(event.data()).unwrap_or(0))?;
            }
            if now >= look {
                look = now + LOOK;
                for index in 0..self.cyclers.len() {
                    if self.cyclers[index].caller.wake().is_some_and(|wake| wake <= now) {
                        self.step(index)?;
                    }
                }
            }
            let then = std::mem::replace(&mut now, Instant::now());
            if ready == 0 {
                self.idle += now - then;
            }
        }
        Ok(())
    }

    fn step(&mut self, index: usize) -> Result<(), BenchError> {
        let Cycler { caller, begun } = &mut self.cyclers[index];
        while let Some(event) = caller.step(&mut self.sender, &mut self.receiver)? {
            match event {
                Event::Allocated { .. } => {
                    caller.end(Instant::now());
                    continue;
                }
                Event::Refreshed(_) => {
                    self.cycles += 1;
                    self.latency.enter(begun.elapsed().as_nanos() as u64);
                }
                Event::Failed(method, failure) => {
                    self.failed += 1;
                    self.failure = Some((method, failure));
                }
                _ => continue,
            }
            self.cyclers[index] = self.newcomer(index)?;
            break;
        }
        Ok(())
    }
}
