//! Clients that have moved (RFC 8016): what one worker receives and another one serves; see [`super::whereabouts`].

use turn_core::{AccountId, ConnectionId, FiveTuple, Head, Input, IpMeta, Path, WorkerId};

use super::apply::{Applied, Gathered, Origin};
use super::counters::{Direction, Loss};
use super::outgoing::Body;
use super::packet::PacketRef;
use super::ring::Meaning;
use super::streams::owner_of;
use super::worker::Worker;

/// What a packet that crosses because of a move is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Crossing {
    /// A client that the other worker serves sent it. It is plain: of TLS and DTLS what was inside.
    FromClient { from: FiveTuple, path: Path, ip: IpMeta },
    /// For a client whose connection the other worker has: so many bytes of head, the payload, so much padding.
    ToClient {
        to: FiveTuple,
        connection: ConnectionId,
        ip: IpMeta,
        head: u8,
        padding: u8,
        direction: Option<Direction>,
        account: AccountId,
    },
    /// The connection has closed.
    Closed(ConnectionId),
}

impl Worker {
    /// The other worker that serves this client, if it is one that has moved.
    #[inline]
    pub(super) fn served_elsewhere(&self, from: &FiveTuple) -> Option<WorkerId> {
        self.relayed.whereabouts().of_client(from).filter(|worker| *worker != self.id)
    }

    /// Hands a packet of a client to the worker that serves it. Whether it is on its way.
    pub(super) fn pass_on(&mut self, worker: WorkerId, origin: &Origin, packet: PacketRef) -> bool {
        let Origin::Client { from, path, ip } = *origin else {
            return false;
        };
        self.counters.crossed += 1;
        let meaning = Meaning::Moved(Crossing::FromClient { from, path, ip });
        self.send_to_worker(worker, meaning, &Head::EMPTY, packet)
    }

    /// Queues for a connection of this worker, or hands to the worker that has it.
    pub(super) fn queue_to_connection(
        &mut self,
        to: &FiveTuple,
        connection: ConnectionId,
        gathered: &Gathered<'_>,
    ) -> Option<Applied> {
        let worker = owner_of(connection);
        if worker == self.id {
            return None;
        }
        let Gathered { head, body, padding, ip, direction, account } = *gathered;
        let account = account.crossed();
        if direction.is_none() {
            // The other worker does not wait for this one's journal.
            self.commit();
        }
        let bytes = match body {
            Body::Packet(packet) => self.packets.bytes(packet),
            Body::Reply { start, end } => self.outgoing.reply(start..end),
        };
        // No head is longer.
        let length = head.as_slice().len() as u8;
        let meaning =
            Meaning::Moved(Crossing::ToClient { to: *to, connection, ip, head: length, padding, direction, account });
        let parts = [head.as_slice(), bytes, &[]];
        let outbox = self.outboxes.get_mut(usize::from(worker.0)).and_then(Option::as_mut);
        if outbox.is_some_and(|outbox| outbox.push(meaning, parts).is_ok()) {
            return Some(Applied::Done);
        }
        self.counters.lost(Loss::RingFull);
        Some(Applied::Dropped)
    }

    /// Takes what another worker sent because of a move.
    pub(super) fn take_moved(&mut self, crossing: Crossing, packet: PacketRef) {
        match crossing {
            Crossing::FromClient { from, path, ip } => drop(self.feed(&Origin::Client { from, path, ip }, packet)),
            Crossing::ToClient { to, connection, ip, head, padding, direction, account } => {
                let (front, payload) = (usize::from(head), packet.range(usize::from(head)..packet.len()));
                let Some(head) = Head::from_slice(&self.packets.bytes(packet)[..front]) else {
                    return;
                };
                let gathered = Gathered { head: &head, body: Body::Packet(payload), padding, ip, direction, account };
                self.queue_to_client(&to, &Path::Connection(connection), &gathered);
            }
            Crossing::Closed(connection) => self.handle(Input::Closed(connection)),
        }
    }

    /// A connection or session of this worker has closed: whoever serves its client is told.
    pub(super) fn tell_closed(&mut self, connection: ConnectionId, five_tuple: &FiveTuple) {
        match self.served_elsewhere(five_tuple) {
            None => self.handle(Input::Closed(connection)),
            // A ring without room loses it: the allocation then ends with its lifetime.
            Some(worker) => {
                let meaning = Meaning::Moved(Crossing::Closed(connection));
                self.send_to_worker(worker, meaning, &Head::EMPTY, PacketRef::EMPTY);
            }
        }
    }

    /// This worker's core serves a five-tuple from now on, or no more.
    pub(super) fn serve_client(&mut self, five_tuple: FiveTuple, path: Path, served: bool) {
        self.relayed.whereabouts().serve(five_tuple, self.id, served);
        if let (false, Path::Connection(connection)) = (served, path) {
            self.streams.leave(connection, self.now.mono);
            self.dtls.leave(connection, self.now.mono);
        }
    }
}
