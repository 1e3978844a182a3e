//! Who is in which room (pure). A room holds two; they are told of each other and what one says the other hears.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::mpsc;

/// Messages waiting for one peer; a browser that does not read is let go.
pub(super) const OUTBOX: usize = 128;
/// Rooms at one time: a bound on what strangers can make this process keep.
const MAX_ROOMS: usize = 1000;

/// What a peer is told.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub(super) enum ToPeer {
    /// First message: who else is here. The one who finds somebody is the polite one and waits for the offer.
    Welcome {
        /// The other one.
        peer: Option<String>,
    },
    /// Somebody came; the one who was here is the impolite one and offers.
    Joined {
        /// Who.
        peer: String,
    },
    /// The other one left.
    Left {
        /// Hung up or closed the page; otherwise the connection broke, and the call itself may go on.
        orderly: bool,
    },
    /// From the other one, as it came.
    Signal {
        /// A description or a candidate.
        data: Value,
    },
    /// The room has two already.
    Full,
    /// This peer came in again through another connection.
    Replaced,
}

/// What a peer says.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub(super) enum FromPeer {
    /// To the other one.
    Signal {
        /// A description or a candidate.
        data: Value,
    },
    /// Hanging up.
    Bye,
}

/// Why there is no seat.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Refused {
    /// Two are in the room.
    Full,
    /// Too many rooms are open.
    TooManyRooms,
}

/// A place in a room; given back by [`Rooms::leave`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Seat {
    room: String,
    number: u64,
}

#[derive(Debug)]
struct Taken {
    number: u64,
    peer: String,
    outbox: mpsc::Sender<ToPeer>,
}

/// All rooms.
#[derive(Debug, Default)]
pub(super) struct Rooms {
    rooms: HashMap<String, Vec<Taken>>,
    next: u64,
}

impl Rooms {
    /// Takes a seat for `peer`, a name the page chose for itself; a peer who comes again takes its old seat over.
    pub(super) fn join(&mut self, room: &str, peer: &str, outbox: mpsc::Sender<ToPeer>) -> Result<Seat, Refused> {
        if !self.rooms.contains_key(room) && self.rooms.len() >= MAX_ROOMS {
            return Err(Refused::TooManyRooms);
        }
        let seats = self.rooms.entry(room.to_owned()).or_default();
        if let Some(index) = seats.iter().position(|taken| taken.peer == peer) {
            tell(&seats.remove(index), ToPeer::Replaced);
        }
        if seats.len() >= 2 {
            return Err(Refused::Full);
        }
        self.next += 1;
        let taken = Taken { number: self.next, peer: peer.to_owned(), outbox };
        tell(&taken, ToPeer::Welcome { peer: seats.first().map(|other| other.peer.clone()) });
        for other in seats.iter() {
            tell(other, ToPeer::Joined { peer: peer.to_owned() });
        }
        seats.push(taken);
        Ok(Seat { room: room.to_owned(), number: self.next })
    }

    /// Hands `data` to the other one in the room, if there is one.
    pub(super) fn signal(&self, seat: &Seat, data: Value) {
        let seats = self.rooms.get(&seat.room).map_or(&[][..], Vec::as_slice);
        // One whose seat was taken over speaks for nobody.
        if seats.iter().any(|taken| taken.number == seat.number)
            && let Some(other) = seats.iter().find(|taken| taken.number != seat.number)
        {
            tell(other, ToPeer::Signal { data });
        }
    }

    /// Gives a seat back; the room goes with its last one.
    pub(super) fn leave(&mut self, seat: &Seat, orderly: bool) {
        let Some(seats) = self.rooms.get_mut(&seat.room) else { return };
        let before = seats.len();
        seats.retain(|taken| taken.number != seat.number);
        if seats.len() < before {
            for other in seats.iter() {
                tell(other, ToPeer::Left { orderly });
            }
        }
        if seats.is_empty() {
            self.rooms.remove(&seat.room);
        }
    }
}

/// A full outbox belongs to a connection that does not move: its task sees the loss of the message as little as the
/// browser does, and ends by its own silence limit.
fn tell(taken: &Taken, message: ToPeer) {
    let _ = taken.outbox.try_send(message);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    struct Peer {
        seat: Seat,
        inbox: mpsc::Receiver<ToPeer>,
    }

    impl Peer {
        fn join(rooms: &mut Rooms, room: &str, name: &str) -> Result<Self, Refused> {
            let (outbox, inbox) = mpsc::channel(OUTBOX);
            rooms.join(room, name, outbox).map(|seat| Self { seat, inbox })
        }

        fn heard(&mut self) -> Vec<ToPeer> {
            std::iter::from_fn(|| self.inbox.try_recv().ok()).collect()
        }
    }

    fn name(name: &str) -> String {
        name.to_owned()
    }

    #[test]
    fn two_meet_and_hear_each_other_and_nobody_else() {
        let mut rooms = Rooms::default();
        let mut a = Peer::join(&mut rooms, "red", "a").expect("first");
        let mut b = Peer::join(&mut rooms, "red", "b").expect("second");
        let mut c = Peer::join(&mut rooms, "blue", "c").expect("other room");
        assert_eq!(a.heard(), [ToPeer::Welcome { peer: None }, ToPeer::Joined { peer: name("b") }]);
        assert_eq!(b.heard(), [ToPeer::Welcome { peer: Some(name("a")) }]);
        rooms.signal(&a.seat, json!({ "offer": 1 }));
        rooms.signal(&b.seat, json!({ "answer": 2 }));
        assert_eq!(b.heard(), [ToPeer::Signal { data: json!({ "offer": 1 }) }]);
        assert_eq!(a.heard(), [ToPeer::Signal { data: json!({ "answer": 2 }) }]);
        assert_eq!(c.heard(), [ToPeer::Welcome { peer: None }]);
    }

    #[test]
    fn a_third_is_refused_and_has_a_place_once_one_left() {
        let mut rooms = Rooms::default();
        let mut a = Peer::join(&mut rooms, "red", "a").expect("first");
        let b = Peer::join(&mut rooms, "red", "b").expect("second");
        assert_eq!(Peer::join(&mut rooms, "red", "c").err(), Some(Refused::Full));
        a.heard();
        rooms.leave(&b.seat, true);
        assert_eq!(a.heard(), [ToPeer::Left { orderly: true }]);
        let mut c = Peer::join(&mut rooms, "red", "c").expect("the free place");
        assert_eq!(c.heard(), [ToPeer::Welcome { peer: Some(name("a")) }]);
    }

    #[test]
    fn one_who_comes_again_takes_its_own_seat_and_the_old_connection_is_mute() {
        let mut rooms = Rooms::default();
        let mut a = Peer::join(&mut rooms, "red", "a").expect("first");
        let mut b = Peer::join(&mut rooms, "red", "b").expect("second");
        a.heard();
        let mut again = Peer::join(&mut rooms, "red", "a").expect("not full: the same peer");
        assert_eq!(a.heard(), [ToPeer::Replaced]);
        assert_eq!(again.heard(), [ToPeer::Welcome { peer: Some(name("b")) }]);
        b.heard();
        rooms.signal(&a.seat, json!(1));
        rooms.leave(&a.seat, false);
        assert_eq!(b.heard(), [], "neither its words nor its end reach anybody");
        rooms.signal(&b.seat, json!(2));
        assert_eq!(again.heard(), [ToPeer::Signal { data: json!(2) }]);
    }

    #[test]
    fn rooms_end_with_their_last_one_and_are_bounded() {
        let mut rooms = Rooms::default();
        let peers: Vec<_> =
            (0..MAX_ROOMS).map(|number| Peer::join(&mut rooms, &number.to_string(), "a").expect("room")).collect();
        assert_eq!(Peer::join(&mut rooms, "one more", "a").err(), Some(Refused::TooManyRooms));
        Peer::join(&mut rooms, "7", "b").expect("a room that is open has its second place");
        for peer in &peers {
            rooms.leave(&peer.seat, false);
        }
        assert_eq!(rooms.rooms.len(), 1, "only room 7 has somebody left");
    }
}
