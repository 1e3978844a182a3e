//! Rows of words in a file, mapped: what is stored in them is the page cache's at once, so it outlives the process that
//! stored it, however that ends.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::check;

/// Words of a row: two cache lines.
pub const WORDS: usize = 16;
/// Bytes of a row.
pub const ROW: usize = WORDS * 8;

/// A row. Each word is written whole, whatever becomes of the process meanwhile.
pub type Row = [AtomicU64; WORDS];

/// The rows of a file.
#[derive(Debug)]
pub struct Rows {
    base: NonNull<Row>,
    file: File,
    most: u32,
    /// Rows that have their place on the disk.
    reserved: AtomicU32,
}

// SAFETY: the memory is there until `drop`, belongs to no thread, and everything in it is read and written atomically.
unsafe impl Send for Rows {}
// SAFETY: as above.
unsafe impl Sync for Rows {}

impl Rows {
    /// Maps up to `most` rows of a file that nobody makes shorter; none can be used before [`Rows::reserve`].
    ///
    /// # Errors
    /// As mmap(2).
    pub fn map(file: File, most: u32) -> io::Result<Self> {
        let length = most as usize * ROW;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice, of a descriptor that is open during the call.
        let address = unsafe { libc::mmap(ptr::null_mut(), length, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(address.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { base, file, most, reserved: AtomicU32::new(0) })
    }

    /// Makes the first `rows` rows usable, new ones zero. They get their place on the disk now: a disk that is full when
    /// a mapped page is written ends the process.
    ///
    /// # Errors
    /// As posix_fallocate(3); those that were usable stay so. More than were mapped are [`io::ErrorKind::StorageFull`].
    pub fn reserve(&self, rows: u32) -> io::Result<()> {
        if rows > self.most {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let length = libc::off_t::from(rows) * ROW as libc::off_t;
        // SAFETY: takes no pointer; the descriptor is open during the call.
        let error = unsafe { libc::posix_fallocate(self.file.as_raw_fd(), 0, length) };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        self.reserved.fetch_max(rows, Ordering::Release);
        Ok(())
    }

    /// Rows that can be used.
    pub fn usable(&self) -> u32 {
        self.reserved.load(Ordering::Acquire)
    }

    /// The row of an index, if it can be used.
    pub fn get(&self, index: u32) -> Option<&Row> {
        // SAFETY: the mapping holds that many rows, the file is at least as long, and both stay so as long as `self`;
        // page and row alignment are those of the words, for which any bits are good.
        (index < self.usable()).then(|| unsafe { self.base.add(index as usize).as_ref() })
    }

    /// Brings everything to the disk.
    ///
    /// # Errors
    /// As fsync(2).
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }
}

impl Drop for Rows {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length; nothing borrowed from it outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.most as usize * ROW) };
    }
}

/// A file that no directory names and no disk holds.
///
/// # Errors
/// As memfd_create(2).
pub fn memory_file() -> io::Result<File> {
    // SAFETY: the name is a string that ends with a zero.
    let descriptor = check(unsafe { libc::memfd_create(c"turnpike".as_ptr(), libc::MFD_CLOEXEC) })?;
    // SAFETY: the call has just opened it for us alone.
    Ok(unsafe { File::from_raw_fd(descriptor) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_is_in_the_file_and_there_is_no_more_than_was_mapped() -> io::Result<()> {
        let file = tempfile::tempfile()?;
        let rows = Rows::map(file.try_clone()?, 100)?;
        assert!(rows.get(0).is_none(), "nothing is reserved");
        rows.reserve(3)?;
        rows.get(2).expect("reserved")[15].store(0x0123_4567_89AB_CDEF, Ordering::Relaxed);
        assert!(rows.get(3).is_none());
        assert_eq!(rows.reserve(101).map_err(|error| error.kind()), Err(io::ErrorKind::StorageFull));
        rows.reserve(100)?;
        assert_eq!(rows.get(99).expect("reserved")[0].load(Ordering::Relaxed), 0);
        drop(rows);
        let again = Rows::map(file, 100)?;
        again.reserve(100)?;
        assert_eq!(again.get(2).expect("reserved")[15].load(Ordering::Relaxed), 0x0123_4567_89AB_CDEF);
        Ok(())
    }

    #[test]
    fn memory_serves_where_there_is_no_disk() -> io::Result<()> {
        let rows = Rows::map(memory_file()?, 10)?;
        rows.reserve(10)?;
        rows.get(9).expect("reserved")[0].fetch_add(7, Ordering::Relaxed);
        assert_eq!(rows.get(9).expect("reserved")[0].load(Ordering::Relaxed), 7);
        rows.sync()
    }
}
