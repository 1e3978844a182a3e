//! What ends with the process: connections, DTLS sessions and their allocations.

use super::worker::Worker;

impl Worker {
    /// Closes every connection and DTLS session, and journals what ends with them; pipes end with the allocations they
    /// are of. Clients are told as far as that takes no waiting: close_notify, then the end of the stream.
    pub(super) fn end_sessions(&mut self) {
        let connections: Vec<usize> = self.streams.table.iter().map(|(key, _)| key).collect();
        for key in connections {
            self.streams.close_soon(key);
        }
        for key in self.dtls.keys() {
            self.close_session(key);
        }
        self.finish_turn();
    }
}
