//! What addresses do not tell: which worker has the allocation of a client that has moved (RFC 8016), and of a ticket.
//!
//! A mobile client's allocation stays with the worker that made it, though its new address hashes to another one: both
//! five-tuples of a move are served in one place, and no socket changes hands. The worker that receives such a client's
//! packets passes them on by a ring; what goes back to a datagram client leaves by the owner's own socket of the same
//! address. After a restart the record is dealt by the new address, and nothing has to be passed on.
//!
//! Read per packet while there is any moved client, so without a lock: small lists, replaced whole by whoever changes
//! them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arc_swap::ArcSwap;
use turn_core::{FiveTuple, Ticket, WorkerId};

use super::shard::{SHARDS, shard};

/// Node-wide; see the module.
#[derive(Default)]
pub(super) struct Whereabouts {
    moved: Lists<FiveTuple>,
    tickets: Lists<Ticket>,
}

impl Whereabouts {
    /// The worker that serves a five-tuple, if it is that of a client that has moved.
    #[inline]
    pub(super) fn of_client(&self, five_tuple: &FiveTuple) -> Option<WorkerId> {
        if self.moved.is_empty() {
            return None;
        }
        self.moved.find(shard(five_tuple.client) as usize, five_tuple)
    }

    /// The worker that has the allocation of a ticket.
    pub(super) fn of_ticket(&self, ticket: &Ticket) -> Option<WorkerId> {
        self.tickets.find(ticket.as_bytes()[0].into(), ticket)
    }

    /// A worker serves a five-tuple from now on, or no more.
    pub(super) fn serve(&self, five_tuple: FiveTuple, worker: WorkerId, served: bool) {
        self.moved.set(shard(five_tuple.client) as usize, five_tuple, worker, served);
    }

    /// A worker has the allocation of a ticket from now on, or no more.
    pub(super) fn hold(&self, ticket: Ticket, worker: WorkerId, held: bool) {
        self.tickets.set(ticket.as_bytes()[0].into(), ticket, worker, held);
    }
}

type List<K> = ArcSwap<Vec<(K, WorkerId)>>;

/// A map in as many lists as there are shards.
struct Lists<K> {
    lists: Box<[List<K>]>,
    len: AtomicUsize,
}

impl<K> Default for Lists<K> {
    fn default() -> Self {
        Self { lists: (0..SHARDS).map(|_| ArcSwap::default()).collect(), len: AtomicUsize::new(0) }
    }
}

impl<K: Copy + PartialEq> Lists<K> {
    fn is_empty(&self) -> bool {
        // Relaxed: a packet that overtakes its client's move is lost, as on any network; the answer that tells the client
        // of its move leaves later than this by a system call at least.
        self.len.load(Ordering::Relaxed) == 0
    }

    fn find(&self, list: usize, key: &K) -> Option<WorkerId> {
        let list = self.lists[list].load();
        list.iter().find(|(known, _)| known == key).map(|(_, worker)| *worker)
    }

    /// The last one who says so has it; only who has it lets it go.
    fn set(&self, list: usize, key: K, worker: WorkerId, held: bool) {
        let before = self.lists[list].rcu(|before| {
            let keep = |(known, owner): &&(K, WorkerId)| *known != key || !held && *owner != worker;
            let mut after: Vec<_> = before.iter().filter(keep).copied().collect();
            if held {
                after.push((key, worker));
            }
            Arc::new(after)
        });
        let owner = before.iter().find(|(known, _)| *known == key).map(|(_, owner)| *owner);
        if held && owner.is_none() {
            self.len.fetch_add(1, Ordering::Relaxed);
        } else if !held && owner == Some(worker) {
            self.len.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use turn_core::Transport;

    use super::*;

    fn client(number: u16) -> FiveTuple {
        FiveTuple {
            transport: Transport::Udp,
            client: ([192, 0, 2, 1], number).into(),
            server: ([198, 51, 100, 1], 3478).into(),
        }
    }

    #[test]
    fn the_last_word_counts_and_only_the_owner_lets_go() {
        let whereabouts = Whereabouts::default();
        let (one, other) = (WorkerId(1), WorkerId(2));
        assert_eq!(whereabouts.of_client(&client(1)), None);
        for number in 0..1000 {
            whereabouts.serve(client(number), one, true);
        }
        whereabouts.serve(client(7), other, true);
        whereabouts.serve(client(7), one, false);
        assert_eq!(whereabouts.of_client(&client(7)), Some(other));
        assert_eq!(whereabouts.of_client(&client(8)), Some(one));
        assert_eq!(whereabouts.of_client(&client(1000)), None);
        whereabouts.serve(client(7), other, false);
        whereabouts.serve(client(7), other, false);
        (0..1000).for_each(|number| whereabouts.serve(client(number), one, false));
        assert!(whereabouts.moved.is_empty());
        let ticket = Ticket::from_bytes([9; 24]);
        whereabouts.hold(ticket, one, true);
        assert_eq!(whereabouts.of_ticket(&ticket), Some(one));
        whereabouts.hold(ticket, one, false);
        assert_eq!(whereabouts.of_ticket(&ticket), None);
    }

    #[test]
    fn changes_of_two_workers_are_not_lost() {
        let whereabouts = Whereabouts::default();
        std::thread::scope(|scope| {
            for worker in 0..2 {
                let whereabouts = &whereabouts;
                scope.spawn(move || {
                    (0..500).for_each(|at| whereabouts.serve(client(at * 2 + worker), WorkerId(worker), true));
                });
            }
        });
        for number in 0..1000 {
            assert_eq!(whereabouts.of_client(&client(number)), Some(WorkerId(number % 2)));
        }
        assert_eq!(whereabouts.moved.len.load(Ordering::Relaxed), 1000);
    }
}
