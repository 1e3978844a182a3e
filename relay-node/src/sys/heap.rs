//! How the C library's allocator gives memory back.

/// Blocks from this size on have pages of their own, which go back to the system with them.
#[cfg(target_env = "gnu")]
const OWN_PAGES: libc::c_int = 128 << 10;

/// A table that has grown leaves pages behind, not holes between what lives: without this glibc takes the size of the
/// largest block that was ever freed (up to 32 MiB) for one that comes again, and keeps it. To be called before there
/// are other threads.
pub fn give_back_large_blocks() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number of the allocator; other allocators do not know the call, and are not linked here.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_PAGES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 8 * OWN_PAGES);
    }
}
