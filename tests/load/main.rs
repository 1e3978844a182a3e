//! What grows with the size of a cluster, measured against it; and that the bench measures right.

mod counting;
mod memory;
mod restore;
