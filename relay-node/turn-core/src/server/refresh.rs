//! Refresh (RFC 8656 §8).

use super::allocate::{lifetime, remaining, within_session};
use super::auth::User;
use super::mobility::Resumption;
use super::reply::Request;
use super::table::Slot;
use super::{Now, Server, Verdict};
use crate::ticket::Ticket;
use crate::wire::ErrorCode;
use crate::wire::attribute::{Lifetime, MobilityTicket, RequestedAddressFamily};
use crate::{EndReason, Family};

impl Server {
    /// RFC 8656 §8.2. A deletion that comes again is 437, as its note says: the client takes it for success.
    pub(super) fn refresh(&mut self, request: &Request<'_>, user: &User<'_>) -> Result<Verdict, ErrorCode> {
        let ticket = request.message.attribute().map_err(|_| ErrorCode::BAD_REQUEST)?;
        let slot = match ticket {
            None => self.held(request, user)?,
            Some(MobilityTicket(text)) => match self.resumption(request, user, text)? {
                Resumption::Of(slot) => slot,
                Resumption::Again(slot) => return Ok(self.resumed_again(slot, request, user)),
            },
        };
        let requested = request.message.attribute().map_err(|_| ErrorCode::BAD_REQUEST)?;
        let family = self.family_of(slot, requested)?;
        let proposed = request.message.attribute().map_err(|_| ErrorCode::BAD_REQUEST)?;
        let mut next = None;
        let granted = if proposed == Some(Lifetime(0)) {
            self.delete(slot, family, request.now);
            Lifetime(0)
        } else {
            let lifetime = within_session(lifetime(proposed, &self.settings.limits), user.session, request.now);
            if ticket.is_some() {
                next = self.begin_move(slot, request);
            }
            self.table.get_mut(slot).set_session(user.session);
            self.table.set_deadline(slot, family, request.now.mono + lifetime);
            self.record(slot, request.now);
            remaining(lifetime)
        };
        Ok(self.refreshed(request, user, granted, next))
    }

    fn refreshed(
        &mut self,
        request: &Request<'_>,
        user: &User<'_>,
        granted: Lifetime,
        next: Option<Ticket>,
    ) -> Verdict {
        self.success(request, user, |writer| {
            writer.attribute(&granted);
            if let Some(ticket) = next {
                writer.attribute(&MobilityTicket(&ticket.text()));
            }
        })
    }

    /// RFC 8016 §3.2.2: a retransmission gets the answer that was lost.
    fn resumed_again(&mut self, slot: Slot, request: &Request<'_>, user: &User<'_>) -> Verdict {
        let allocation = self.table.get(slot);
        let end = allocation.relays().last_end().unwrap_or(request.now.mono);
        let left = remaining(end.saturating_duration_since(request.now.mono));
        let ticket = allocation.mobility().map(|mobility| mobility.ticket);
        self.refreshed(request, user, left, ticket)
    }

    /// RFC 8656 §8.1: which family a Refresh is about; without REQUESTED-ADDRESS-FAMILY all there are.
    fn family_of(&self, slot: Slot, requested: Option<RequestedAddressFamily>) -> Result<Option<Family>, ErrorCode> {
        let Some(RequestedAddressFamily(number)) = requested else {
            return Ok(None);
        };
        let mut held = self.table.get(slot).relays().iter().map(|relay| relay.address.family());
        // RFC 8656 §8.2: 443 for a family that the allocation has not.
        held.find(|family| *family as u8 == number).map(Some).ok_or(ErrorCode::PEER_ADDRESS_FAMILY_MISMATCH)
    }

    /// Ends an allocation, or the part of it in one family (RFC 8656 §8.1).
    fn delete(&mut self, slot: Slot, family: Option<Family>, now: Now) {
        match family {
            Some(family) if self.end_family(slot, family) => self.record(slot, now),
            _ => self.end(slot, EndReason::Deleted),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::lab::{Lab, USER, addr};
    use super::*;
    use crate::wire::{AttributeType, Method};
    use crate::{Change, ConnectionId, ListenerId, Out, Output, Path, Transport, Verdict};

    #[test]
    fn sets_the_lifetime() {
        // RFC 8656 §8.2: as for an Allocate; it may become shorter too.
        for (proposed, expected) in [(3600, 3600), (9999, 3600), (1, 600), (700, 700), (600, 600)] {
            let mut lab = Lab::allocated();
            lab.pass(100);
            let reply = lab.request(Method::Refresh, |writer| {
                writer.attribute(&Lifetime(proposed));
            });
            assert_eq!(reply.message().attribute(), Ok(Some(Lifetime(expected))));
            assert!(reply.message().contains(AttributeType::SOFTWARE));
            let end = lab.now.mono + Duration::from_secs(expected.into());
            assert_eq!(lab.server.poll_timeout(), Some(end));
            let changes = lab.changes();
            assert!(matches!(&changes[..], [Change::Put(record)] if record.sequence == 2));
        }
        let mut lab = Lab::allocated();
        lab.refresh(3600);
        lab.refresh(600);
        assert_eq!(lab.server.poll_timeout(), Some(lab.now.mono + Duration::from_secs(600)));
    }

    #[test]
    fn zero_deletes_at_once() {
        let mut lab = Lab::allocated();
        let with = lab.credentials();
        let packet = lab.packet(Some(&with), Method::Refresh, |writer| {
            writer.attribute(&Lifetime(0));
        });
        let reply = lab.exchange(&packet);
        assert_eq!(reply.message().attribute(), Ok(Some(Lifetime(0))));
        assert!(reply.message().verify_integrity(&with.key()));
        let relayed = lab.relayed();
        let outputs = lab.outputs();
        assert!(matches!(
            &outputs[..],
            [
                Output::Record(Change::End { reason: EndReason::Deleted, sequence: 2, epoch: 1, .. }),
                Output::Release { relayed: released, quota_key },
            ] if *released == relayed && **quota_key == *USER
        ));
        assert_eq!((lab.server.allocations(), lab.server.poll_timeout()), (0, None));
        // RFC 8656 §8.2, note.
        let again = lab.exchange(&packet);
        assert_eq!(again.code(), 437);
        assert!(again.message().verify_integrity(&with.key()));
        // The five-tuple is free.
        assert_eq!(lab.allocate(), 0);
    }

    #[test]
    fn what_is_refused() {
        let mut lab = Lab::allocated();
        let mut code = |attribute, value: &'static [u8]| {
            lab.request(Method::Refresh, |writer| writer.raw(attribute, value)).code()
        };
        assert_eq!(code(0x0017, &[2, 0, 0, 0]), 443, "the other family");
        assert_eq!(code(0x0017, &[1, 0, 0, 0]), 0, "its own family");
        assert_eq!(code(0x0017, &[1]), 400, "malformed family");
        assert_eq!(code(0x000D, &[0]), 400, "LIFETIME of 1 byte");
        assert_eq!(code(0x000D, &[]), 400, "empty LIFETIME");
        assert_eq!(lab.server.allocations(), 1);
    }

    #[test]
    fn foreign_allocations_are_441() {
        // RFC 8656 §5; abuse.md C.
        let mut lab = Lab::allocated();
        let other = lab.rest(lab.now.wall / 1000 + 60);
        for method in [Method::Refresh, Method::CreatePermission, Method::ChannelBind] {
            let reply = lab.signed(&other, method, |writer| {
                writer.raw(0x000D, &[0; 4]);
            });
            assert_eq!(reply.code(), 441);
            assert!(reply.message().verify_integrity(&other.key()));
        }
        assert_eq!(lab.server.allocations(), 1);
        assert!(lab.outputs().is_empty());
    }

    #[test]
    fn other_five_tuples_have_no_allocation() {
        for change in [
            |lab: &mut Lab| lab.from.client = addr("203.0.113.9:7"),
            |lab: &mut Lab| lab.from.client = addr("203.0.113.10:51234"),
            |lab: &mut Lab| lab.from.server = addr("198.51.100.7:3479"),
            |lab: &mut Lab| {
                lab.from.transport = Transport::Tcp;
                lab.path = Path::Connection(ConnectionId(1));
            },
        ] {
            let mut lab = Lab::allocated();
            change(&mut lab);
            assert_eq!(lab.refresh(0), 437);
            assert_eq!(lab.server.allocations(), 1);
        }
    }

    #[test]
    fn unsigned_attributes_delete_nothing() {
        // abuse.md B: coturn acted on an unsigned LIFETIME=0.
        let mut lab = Lab::allocated();
        let with = lab.credentials();
        let mut packet = lab.packet(Some(&with), Method::Refresh, |_| {});
        packet.extend([0, 0x0D, 0, 4, 0, 0, 0, 0]);
        let len = u16::try_from(packet.len() - 20).expect("short");
        packet[2..4].copy_from_slice(&len.to_be_bytes());
        let reply = lab.exchange(&packet);
        assert_eq!(reply.message().attribute(), Ok(Some(Lifetime(600))));
        assert_eq!(lab.server.allocations(), 1);
    }

    #[test]
    fn the_way_back_follows_the_requests() {
        let mut lab = Lab::allocated();
        assert_eq!(lab.bind(0x4000, "192.0.2.1:9"), 0);
        lab.path = Path::Listener(ListenerId(3));
        assert_eq!(lab.refresh(600), 0);
        let Verdict::Send { out, .. } = lab.peer_packet("192.0.2.1:9", b"x").verdict else { panic!("not relayed") };
        let (to, path) = (lab.from, lab.path);
        assert_eq!(out, Out::Client { to, path });
    }
}
