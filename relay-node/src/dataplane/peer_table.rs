//! The peer data connections of the node (RFC 6062): who may claim them, and which worker has them now. Behind a lock;
//! the packet path never comes here.
//!
//! A connection belongs to an allocation, whose worker opened or accepted it, and ends up with the worker that accepted
//! the client data connection. In between its socket is parked here. What one worker has to tell the other is put into
//! the other's mailbox.

use std::collections::hash_map::Entry;
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustc_hash::FxHashMap;
use turn_core::{AccountId, ClaimError, Meters, PeerConnectionId, PeerEvent, RelayedAddr, WorkerId};

use crate::sys::epoll::Waker;

/// Names drawn before giving up: among 2^32 of them a free one is hit at once.
const ATTEMPTS: usize = 16;

/// See the module.
pub(super) struct PeerTable {
    most: usize,
    connections: Mutex<FxHashMap<PeerConnectionId, PeerConnection>>,
    /// By worker.
    mailboxes: Vec<Mailbox>,
}

struct PeerConnection {
    owner: WorkerId,
    relayed: RelayedAddr,
    place: Place,
}

/// Where the socket is.
enum Place {
    /// With the owner.
    Owner,
    /// Here, for this user.
    Parked { socket: TcpStream, waiting: Waiting },
    /// In a pipe of this worker.
    Pipe(WorkerId),
}

/// What has to be known of a parked connection.
pub(super) struct Waiting {
    /// Who may claim it.
    pub(super) username: Box<[u8]>,
    /// Where the control connection comes from.
    pub(super) client: SocketAddr,
    /// What its bytes are charged to: the allocation's meter comes to whichever worker claims it this way.
    pub(super) meters: Meters,
    /// Whose traffic they are.
    pub(super) account: AccountId,
}

/// The socket of a peer data connection for its pipe.
pub(super) struct Claimed {
    pub(super) socket: TcpStream,
    /// See [`Waiting::meters`].
    pub(super) meters: Meters,
    /// See [`Waiting::account`].
    pub(super) account: AccountId,
}

struct Mailbox {
    /// No more than the connections there are, twice.
    letters: Mutex<Vec<Letter>>,
    waker: Arc<Waker>,
}

/// What a worker has to know of what another one did.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Letter {
    /// To the worker of the allocation.
    Event { relayed: RelayedAddr, connection: PeerConnectionId, event: PeerEvent },
    /// To the worker of the pipe: it ends.
    Close(PeerConnectionId),
}

impl PeerTable {
    /// For at most `most` connections, and for the workers that these wake.
    pub(super) fn new(most: usize, wakers: &[Arc<Waker>]) -> Self {
        let mailbox = |waker: &Arc<Waker>| Mailbox { letters: Mutex::default(), waker: Arc::clone(waker) };
        Self { most, connections: Mutex::default(), mailboxes: wakers.iter().map(mailbox).collect() }
    }

    /// Names a connection of `owner`'s allocation at `relayed`; nothing, if there are as many as allowed.
    pub(super) fn open(&self, owner: WorkerId, relayed: RelayedAddr) -> Option<PeerConnectionId> {
        let mut connections = self.lock();
        if connections.len() >= self.most {
            return None;
        }
        for _ in 0..ATTEMPTS {
            // CSPRNG: who guesses a name still needs its user's credentials.
            let id = PeerConnectionId(getrandom::u32().ok()?);
            if let Entry::Vacant(free) = connections.entry(id) {
                free.insert(PeerConnection { owner, relayed, place: Place::Owner });
                return Some(id);
            }
        }
        None
    }

    /// Keeps the socket of a connection until its user claims it. The kernel keeps what the peer sends, and its window
    /// holds the peer back (RFC 6062 §5.2).
    pub(super) fn park(&self, id: PeerConnectionId, socket: TcpStream, waiting: Waiting) {
        if let Some(connection) = self.lock().get_mut(&id) {
            connection.place = Place::Parked { socket, waiting };
        }
    }

    /// Where the control connection of a parked one comes from.
    pub(super) fn control_of(&self, id: PeerConnectionId) -> Option<SocketAddr> {
        match &self.lock().get(&id)?.place {
            Place::Parked { waiting, .. } => Some(waiting.client),
            Place::Owner | Place::Pipe(_) => None,
        }
    }

    /// Gives a parked socket to a worker, with its meters, and tells the owner.
    ///
    /// # Errors
    /// See [`ClaimError`]; nothing changes then.
    pub(super) fn claim(&self, id: PeerConnectionId, username: &[u8], to: WorkerId) -> Result<Claimed, ClaimError> {
        let mut connections = self.lock();
        let connection = connections.get_mut(&id).ok_or(ClaimError::Unknown)?;
        match &connection.place {
            Place::Parked { waiting, .. } if *waiting.username == *username => {}
            Place::Parked { .. } => return Err(ClaimError::OtherUser),
            Place::Owner | Place::Pipe(_) => return Err(ClaimError::Unknown),
        }
        let Place::Parked { socket, waiting } = std::mem::replace(&mut connection.place, Place::Pipe(to)) else {
            return Err(ClaimError::Unknown);
        };
        let PeerConnection { owner, relayed, .. } = *connection;
        drop(connections);
        self.post(owner, Letter::Event { relayed, connection: id, event: PeerEvent::Bound });
        // Whichever worker it is.
        Ok(Claimed { socket, meters: waiting.meters, account: waiting.account.crossed() })
    }

    /// Ends a connection for its owner: a parked socket closes, a pipe is told.
    pub(super) fn close(&self, id: PeerConnectionId) {
        let ended = self.lock().remove(&id);
        if let Some(PeerConnection { place: Place::Pipe(worker), .. }) = ended {
            self.post(worker, Letter::Close(id));
        }
    }

    /// A pipe has ended by itself: the owner is told.
    pub(super) fn ended(&self, id: PeerConnectionId) {
        let ended = self.lock().remove(&id);
        if let Some(PeerConnection { owner, relayed, .. }) = ended {
            self.post(owner, Letter::Event { relayed, connection: id, event: PeerEvent::Closed });
        }
    }

    /// What came for a worker, oldest first.
    pub(super) fn letters(&self, worker: WorkerId) -> Vec<Letter> {
        let mailbox = self.mailboxes.get(usize::from(worker.0));
        mailbox.map_or_else(Vec::new, |mailbox| {
            std::mem::take(&mut *mailbox.letters.lock().unwrap_or_else(PoisonError::into_inner))
        })
    }

    fn post(&self, worker: WorkerId, letter: Letter) {
        if let Some(mailbox) = self.mailboxes.get(usize::from(worker.0)) {
            mailbox.letters.lock().unwrap_or_else(PoisonError::into_inner).push(letter);
            mailbox.waker.wake();
        }
    }

    fn lock(&self) -> MutexGuard<'_, FxHashMap<PeerConnectionId, PeerConnection>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpListener;

    use super::*;

    const OWNER: WorkerId = WorkerId(0);
    const OTHER: WorkerId = WorkerId(1);

    fn table(most: usize) -> std::io::Result<PeerTable> {
        Ok(PeerTable::new(most, &[Arc::new(Waker::new()?), Arc::new(Waker::new()?)]))
    }

    fn relayed() -> RelayedAddr {
        let address = SocketAddr::from(([192, 0, 2, 1], 50_000));
        RelayedAddr { bound: address, advertised: address }
    }

    fn alices() -> Waiting {
        Waiting {
            username: (*b"alice").into(),
            client: relayed().bound,
            meters: Meters::default(),
            account: AccountId::NONE,
        }
    }

    /// A connection's two ends.
    fn pair() -> std::io::Result<(TcpStream, TcpStream)> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let one = TcpStream::connect(listener.local_addr()?)?;
        Ok((one, listener.accept()?.0))
    }

    #[test]
    fn only_its_user_claims_it_and_only_once() -> std::io::Result<()> {
        let table = table(9)?;
        let id = table.open(OWNER, relayed()).expect("room");
        assert_eq!(table.claim(id, b"alice", OTHER).err(), Some(ClaimError::Unknown), "not parked yet");
        table.park(id, pair()?.0, alices());
        assert_eq!(table.control_of(id), Some(relayed().bound));
        assert_eq!(table.claim(id, b"bob", OTHER).err(), Some(ClaimError::OtherUser));
        assert!(table.letters(OWNER).is_empty());
        assert!(table.claim(id, b"alice", OTHER).is_ok());
        let bound = Letter::Event { relayed: relayed(), connection: id, event: PeerEvent::Bound };
        assert_eq!(table.letters(OWNER), [bound]);
        assert_eq!(table.claim(id, b"alice", OTHER).err(), Some(ClaimError::Unknown), "claimed");
        Ok(())
    }

    #[test]
    fn either_side_ends_it_and_the_other_is_told() -> std::io::Result<()> {
        let table = table(9)?;
        let claimed = || {
            let id = table.open(OWNER, relayed()).expect("room");
            table.park(id, pair().expect("a pair").0, alices());
            table.claim(id, b"alice", OTHER).expect("parked");
            table.letters(OWNER);
            id
        };
        let id = claimed();
        table.close(id);
        assert_eq!(table.letters(OTHER), [Letter::Close(id)]);
        table.ended(id);
        assert!(table.letters(OWNER).is_empty(), "it had ended there");

        let id = claimed();
        table.ended(id);
        let closed = Letter::Event { relayed: relayed(), connection: id, event: PeerEvent::Closed };
        assert_eq!(table.letters(OWNER), [closed]);
        table.close(id);
        assert!(table.letters(OTHER).is_empty());
        Ok(())
    }

    #[test]
    fn what_is_parked_closes_with_its_entry_and_there_are_only_so_many() -> std::io::Result<()> {
        let table = table(1)?;
        let id = table.open(OWNER, relayed()).expect("room");
        assert_eq!(table.open(OWNER, relayed()), None);
        let (parked, mut peer) = pair()?;
        table.park(id, parked, alices());
        table.close(id);
        assert_eq!(peer.read(&mut [0; 1])?, 0, "closed");
        let id = table.open(OWNER, relayed()).expect("room again");
        // Its end came first.
        table.close(id);
        let (late, mut peer) = pair()?;
        table.park(id, late, alices());
        assert_eq!(peer.read(&mut [0; 1])?, 0);
        Ok(())
    }
}
