//! Readiness of descriptors, and waking a thread that waits for it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::Duration;

use tokio::io::unix::AsyncFd;

use super::check;

/// What to wait for on a descriptor. Errors and hang-ups are always reported. Level-triggered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Interest {
    /// Errors only.
    None,
    /// Something to read.
    Read,
    /// Room to write.
    Write,
    /// Both.
    ReadWrite,
}

impl Interest {
    fn bits(self) -> u32 {
        let bits = match self {
            Self::None => 0,
            Self::Read => libc::EPOLLIN | libc::EPOLLRDHUP,
            Self::Write => libc::EPOLLOUT,
            Self::ReadWrite => libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLOUT,
        };
        bits.cast_unsigned()
    }
}

/// One descriptor's readiness.
#[derive(Clone, Copy, Debug)]
pub struct Readiness {
    /// What the descriptor was registered with.
    pub token: u64,
    /// Something to read, or the end of a stream.
    pub readable: bool,
    /// Room to write.
    pub writable: bool,
    /// An error is pending, perhaps on the error queue.
    pub error: bool,
}

/// Room for the events of one [`Epoll::wait`].
pub struct Events {
    list: Vec<libc::epoll_event>,
    ready: usize,
}

impl Events {
    /// At most `capacity` events at once.
    pub fn with_capacity(capacity: usize) -> Self {
        Self { list: vec![libc::epoll_event { events: 0, u64: 0 }; capacity], ready: 0 }
    }

    /// How many the last wait brought.
    pub fn len(&self) -> usize {
        self.ready
    }

    /// Whether the last wait ended by its timeout.
    pub fn is_empty(&self) -> bool {
        self.ready == 0
    }

    /// The event at `index`, below [`Events::len`].
    pub fn at(&self, index: usize) -> Readiness {
        let event = self.list[index];
        let bits = event.events.cast_signed();
        Readiness {
            token: event.u64,
            readable: bits & (libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLHUP) != 0,
            writable: bits & libc::EPOLLOUT != 0,
            error: bits & libc::EPOLLERR != 0,
        }
    }
}

/// An epoll(7) instance.
pub struct Epoll(OwnedFd);

impl Epoll {
    /// A new one, closed on exec.
    ///
    /// # Errors
    /// As epoll_create1(2).
    pub fn new() -> io::Result<Self> {
        // SAFETY: no memory is passed; a descriptor that is not negative is new and ours alone.
        let fd = unsafe { OwnedFd::from_raw_fd(check(libc::epoll_create1(libc::EPOLL_CLOEXEC))?) };
        Ok(Self(fd))
    }

    /// Registers a descriptor. Closing it ends the registration.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn add(&self, fd: BorrowedFd<'_>, token: u64, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, fd, token, interest)
    }

    /// Changes what to wait for.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn modify(&self, fd: BorrowedFd<'_>, token: u64, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_MOD, fd, token, interest)
    }

    /// Forgets a descriptor that stays open.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn remove(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_DEL, fd, 0, Interest::None)
    }

    fn control(&self, operation: libc::c_int, fd: BorrowedFd<'_>, token: u64, interest: Interest) -> io::Result<()> {
        let mut event = libc::epoll_event { events: interest.bits(), u64: token };
        // SAFETY: both descriptors are open while borrowed; `event` is a valid epoll_event the kernel only reads.
        check(unsafe { libc::epoll_ctl(self.0.as_raw_fd(), operation, fd.as_raw_fd(), &raw mut event) })?;
        Ok(())
    }

    /// Waits for events, at most `timeout` (rounded up to milliseconds; for ever without one). An interrupted wait
    /// brings no events.
    ///
    /// # Errors
    /// As epoll_wait(2), without EINTR.
    pub fn wait(&self, events: &mut Events, timeout: Option<Duration>) -> io::Result<()> {
        let milliseconds =
            timeout.map_or(-1, |time| i32::try_from(time.as_micros().div_ceil(1000)).unwrap_or(i32::MAX));
        let room = i32::try_from(events.list.len()).unwrap_or(i32::MAX);
        events.ready = 0;
        // SAFETY: the list has room for `room` events, which the kernel writes.
        let result =
            check(unsafe { libc::epoll_wait(self.0.as_raw_fd(), events.list.as_mut_ptr(), room, milliseconds) });
        match result {
            Ok(ready) => {
                events.ready = usize::try_from(ready).unwrap_or(0);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Wakes a thread out of [`Epoll::wait`]: an eventfd(2). Waking twice before it looks is one wake-up.
#[derive(Debug)]
pub struct Waker {
    event: std::fs::File,
    dozes: AtomicBool,
}

impl Waker {
    /// A new one that nobody has woken.
    ///
    /// # Errors
    /// As eventfd(2).
    pub fn new() -> io::Result<Self> {
        // SAFETY: no memory is passed; a descriptor that is not negative is new and ours alone.
        let fd = unsafe { OwnedFd::from_raw_fd(check(libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK))?) };
        Ok(Self { event: fd.into(), dozes: AtomicBool::new(false) })
    }

    /// Makes the descriptor readable. A counter that is full is readable already, so errors mean nothing.
    pub fn wake(&self) {
        let _ = io::Write::write(&mut &self.event, &1u64.to_ne_bytes());
    }

    /// Makes the descriptor quiet again; to be called before looking at what the wake-up was for.
    pub fn reset(&self) {
        let _ = io::Read::read(&mut &self.event, &mut [0; 8]);
    }

    /// A copy of the descriptor, for a thread that waits in tokio. In a context of tokio's with I/O.
    ///
    /// # Errors
    /// As dup(2) and epoll_ctl(2).
    pub fn bell(&self) -> io::Result<AsyncFd<OwnedFd>> {
        let event = self.event.as_fd().try_clone_to_owned()?;
        // SAFETY: the descriptor is owned by what is registered, so it is open and the same until it is deregistered.
        unsafe { AsyncFd::register_with_interest(event, tokio::io::Interest::READABLE) }.map_err(Into::into)
    }

    /// Its thread is about to wait, and looks once more at what it is to be woken for before it does.
    pub fn doze(&self) {
        self.dozes.store(true, Ordering::Relaxed);
        // With the fence below: either that look sees what was put there, or who put it there sees this.
        fence(Ordering::SeqCst);
    }

    /// Its thread looks at what it is to be woken for without being told.
    pub fn rise(&self) {
        self.dozes.store(false, Ordering::Relaxed);
    }

    /// As [`Waker::wake`], but only a thread that has begun to doze since it was last woken: nobody else needs it.
    pub fn wake_dozing(&self) {
        fence(Ordering::SeqCst);
        if self.dozes.load(Ordering::Relaxed) && self.dozes.swap(false, Ordering::Relaxed) {
            self.wake();
        }
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waker_is_ready_until_reset() -> io::Result<()> {
        let (epoll, waker, mut events) = (Epoll::new()?, Waker::new()?, Events::with_capacity(4));
        epoll.add(waker.as_fd(), 7, Interest::Read)?;
        epoll.wait(&mut events, Some(Duration::ZERO))?;
        assert!(events.is_empty(), "nobody has woken it");

        waker.wake();
        waker.wake();
        epoll.wait(&mut events, None)?;
        assert_eq!((events.len(), events.at(0).token, events.at(0).readable), (1, 7, true));

        waker.reset();
        epoll.wait(&mut events, Some(Duration::ZERO))?;
        assert!(events.is_empty(), "one reset takes both wake-ups");
        Ok(())
    }
}
