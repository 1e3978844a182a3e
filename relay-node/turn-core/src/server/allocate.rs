//! Allocate (RFC 8656 §7).

use std::time::Duration;

use rand_core::Rng;

use super::auth::User;
use super::binding::mapped;
use super::relays::{Relay, Relays, bind_both, bind_one};
use super::reply::Request;
use super::table::{Beginning, Slot};
use super::{BindRequest, Host, Now, PortRequest, RESERVED_FOR, Server, Verdict};
use crate::wire::attribute::{
    AdditionalAddressFamily, EvenPort, Lifetime, MobilityTicket, RequestedAddressFamily, RequestedTransport,
    ReservationToken, XorRelayedAddress,
};
use crate::wire::{ErrorCode, Message};
use crate::{AllocationId, Family, Limits, Session, credential, policy};

/// RFC 8656 §6: the default lifetime of an allocation, in seconds.
const DEFAULT_LIFETIME: u32 = 600;

/// RFC 8656 §7.2 and §8.2: the proposed lifetime up to the maximum, but not below the default.
pub(super) fn lifetime(proposed: Option<Lifetime>, limits: &Limits) -> Duration {
    let Lifetime(proposed) = proposed.unwrap_or(Lifetime(DEFAULT_LIFETIME));
    let seconds = proposed.max(DEFAULT_LIFETIME).min(limits.max_lifetime);
    Duration::from_secs(seconds.into())
}

/// RFC 7635 §9: no longer than the access token lasts.
pub(super) fn within_session(lifetime: Duration, session: Option<Session>, now: Now) -> Duration {
    match session {
        Some(session) => lifetime.min(Duration::from_millis(session.expires_at.saturating_sub(now.wall))),
        None => lifetime,
    }
}

/// LIFETIME of what is left, rounded up so that a new allocation shows the whole of it.
pub(super) fn remaining(left: Duration) -> Lifetime {
    Lifetime(u32::try_from(left.as_nanos().div_ceil(1_000_000_000)).unwrap_or(u32::MAX))
}

/// EVEN-PORT and RESERVATION-TOKEN, which exclude each other (RFC 8656 §7.2).
fn port_request(message: &Message<'_>) -> Result<PortRequest, ErrorCode> {
    let even: Option<EvenPort> = message.attribute().map_err(|_| ErrorCode::BAD_REQUEST)?;
    let token: Option<ReservationToken> = message.attribute().map_err(|_| ErrorCode::BAD_REQUEST)?;
    match (even, token) {
        (None, None) => Ok(PortRequest::Any),
        (Some(EvenPort { reserve_next: false }), None) => Ok(PortRequest::Even),
        (Some(EvenPort { reserve_next: true }), None) => Ok(PortRequest::EvenAndNext),
        (None, Some(token)) => Ok(PortRequest::Reserved(token)),
        (Some(_), Some(_)) => Err(ErrorCode::BAD_REQUEST),
    }
}

impl Server {
    /// RFC 8656 §7.2, in its order.
    pub(super) fn allocate(
        &mut self,
        request: &Request<'_>,
        user: &User<'_>,
        host: &mut impl Host,
    ) -> Result<Verdict, ErrorCode> {
        let message = &request.message;
        if let Some(slot) = self.table.by_five_tuple(&request.from) {
            let allocation = self.table.get(slot);
            // RFC 8656 §7.2, note: the transaction that made it is answered again from what is stored.
            let again =
                allocation.transaction_id == Some(message.transaction_id()) && *allocation.username == *user.name;
            return if again { Ok(self.allocated(slot, request, user)) } else { Err(ErrorCode::ALLOCATION_MISMATCH) };
        }
        // RFC 8656 §21.4: no allocation for a tunneled address.
        if policy::is_tunneled(request.from.client.ip()) {
            return Err(ErrorCode::FORBIDDEN);
        }
        let transport = match message.attribute() {
            Ok(Some(RequestedTransport(number))) => self.peer_transport(request, number)?,
            Ok(None) | Err(_) => return Err(ErrorCode::BAD_REQUEST),
        };
        let requested: Option<RequestedAddressFamily> = message.attribute().map_err(|_| ErrorCode::BAD_REQUEST)?;
        // RFC 8656 §18.11: IPv6 is the only valid value; items 6 and 9.
        let additional: Option<AdditionalAddressFamily> = message.attribute().map_err(|_| ErrorCode::BAD_REQUEST)?;
        if additional.is_some_and(|family| requested.is_some() || family != AdditionalAddressFamily(Family::V6 as u8)) {
            return Err(ErrorCode::BAD_REQUEST);
        }
        let proposed = message.attribute().map_err(|_| ErrorCode::BAD_REQUEST)?;
        let port = port_request(message)?;
        // A port held under a token is of the family it was reserved in, and nothing else may be asked for.
        if matches!(port, PortRequest::Reserved(_)) && (requested.is_some() || additional.is_some())
            || port == PortRequest::EvenAndNext && additional.is_some()
        {
            return Err(ErrorCode::BAD_REQUEST);
        }
        let mobile = self.asks_for_ticket(request, transport)?;
        let family = match requested {
            None | Some(RequestedAddressFamily(1)) => Family::V4,
            Some(RequestedAddressFamily(2)) => Family::V6,
            Some(RequestedAddressFamily(_)) => return Err(ErrorCode::ADDRESS_FAMILY_NOT_SUPPORTED),
        };
        let quota_key = credential::quota_key(user.name);
        let wanted = BindRequest { family, transport, quota_key, port };
        let bound = if additional.is_some() { bind_both(host, wanted) } else { bind_one(host, wanted) }?;
        let lifetime = within_session(lifetime(proposed, &self.settings.limits), user.session, request.now);
        let deadline = request.now.mono + lifetime;
        let addresses = [Some(bound.first), bound.second].map(|bound| bound.map(|bound| bound.relayed));
        let relays = Relays::new(addresses.into_iter().flatten().map(|address| Relay { address, deadline }));

        let mut random = [0; 10];
        self.rng.fill_bytes(&mut random);
        let Some(slot) = self.table.insert(Beginning {
            id: AllocationId::new(request.now.wall, random),
            five_tuple: request.from,
            path: request.path,
            relays,
            peer_transport: transport,
            username: user.name.into(),
            created_at: request.now.wall,
        }) else {
            // A host that binds an address twice: the one that has it keeps it.
            let bound: Vec<_> = addresses.into_iter().flatten().collect();
            self.release_all(&bound, user.name);
            return Err(ErrorCode::INSUFFICIENT_CAPACITY);
        };
        let allocation = self.table.get_mut(slot);
        allocation.transaction_id = Some(message.transaction_id());
        let reserved_until = request.now.wall.saturating_add(RESERVED_FOR.as_millis() as u64);
        let reservation = bound.first.reservation.map(|token| (token, reserved_until));
        allocation.set_answer(bound.refused, reservation);
        allocation.set_session(user.session);
        self.join_meters(slot, host);
        self.open_account(slot, false, host);
        if mobile {
            self.make_mobile(slot);
        }
        self.record(slot, request.now);
        Ok(self.allocated(slot, request, user))
    }

    fn allocated(&mut self, slot: Slot, request: &Request<'_>, user: &User<'_>) -> Verdict {
        let allocation = self.table.get(slot);
        let relays = allocation.relays().clone();
        let end = relays.last_end().unwrap_or(request.now.mono);
        let lifetime = remaining(end.saturating_duration_since(request.now.mono));
        let (reservation, address_error) = (allocation.reservation(), allocation.address_error());
        let ticket = allocation.mobility().map(|mobility| mobility.ticket.text());
        self.success(request, user, |writer| {
            for relay in relays.iter() {
                writer.attribute(&XorRelayedAddress(relay.address.advertised));
            }
            writer.attribute(&mapped(request.from.client));
            writer.attribute(&lifetime);
            if let Some((token, _)) = &reservation {
                writer.attribute(token);
            }
            if let Some(error) = &address_error {
                writer.attribute(error);
            }
            if let Some(ticket) = &ticket {
                writer.attribute(&MobilityTicket(ticket));
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::lab::{Lab, Reply, USER, addr, udp};
    use super::*;
    use crate::wire::attribute::{Software, XorMappedAddress};
    use crate::wire::{AttributeType, MessageWriter, Method, UnknownAttributes};
    use crate::{BindError, Change, ConnectionId, Output, Path, Transport};

    fn lifetime_of(reply: &Reply) -> u32 {
        let Ok(Some(Lifetime(seconds))) = reply.message().attribute() else { panic!("no LIFETIME") };
        seconds
    }

    #[test]
    fn success_has_what_rfc_8656_7_2_lists() {
        let mut lab = Lab::new();
        let reply = lab.request(Method::Allocate, udp);
        assert_eq!(reply.code(), 0);
        let message = reply.message();
        assert_eq!(message.attribute(), Ok(Some(XorRelayedAddress(lab.relayed().advertised))));
        assert_eq!(message.attribute(), Ok(Some(XorMappedAddress(addr("203.0.113.9:51234")))));
        assert_eq!(lifetime_of(&reply), 600);
        assert!(message.contains(AttributeType::SOFTWARE));
        assert!(message.verify_integrity(&lab.credentials().key()));

        let changes = lab.changes();
        let [Change::Put(record)] = &changes[..] else { panic!("{changes:?}") };
        assert_eq!((record.epoch, record.sequence), (1, 1));
        assert_eq!(record.username, USER);
        assert_eq!(record.relayed, [lab.relayed()]);
        assert_eq!(record.five_tuple.client, addr("203.0.113.9:51234"));
        assert_eq!((record.created_at, record.expires_at), (lab.now.wall, lab.now.wall + 600_000));
    }

    #[test]
    fn what_is_refused() {
        type Case = (&'static str, fn(&mut MessageWriter<'_>), u16);
        let cases: &[Case] = &[
            ("no REQUESTED-TRANSPORT", |_| {}, 400),
            ("REQUESTED-TRANSPORT of 1 byte", |w| w.raw(0x0019, &[17]), 400),
            ("empty REQUESTED-TRANSPORT", |w| w.raw(0x0019, &[]), 400),
            ("TCP over UDP", |w| w.raw(0x0019, &[6, 0, 0, 0]), 400),
            ("protocol 0", |w| w.raw(0x0019, &[0, 0, 0, 0]), 442),
            (
                "the first counts",
                |w| {
                    w.raw(0x0019, &[1, 0, 0, 0]);
                    udp(w);
                },
                442,
            ),
            (
                "LIFETIME of 2 bytes",
                |w| {
                    udp(w);
                    w.raw(0x000D, &[1, 2]);
                },
                400,
            ),
            (
                "family 1",
                |w| {
                    udp(w);
                    w.raw(0x0017, &[1, 0, 0, 0]);
                },
                0,
            ),
            (
                "family 2, which the host lacks",
                |w| {
                    udp(w);
                    w.raw(0x0017, &[2, 0, 0, 0]);
                },
                440,
            ),
            (
                "family 3",
                |w| {
                    udp(w);
                    w.raw(0x0017, &[3, 0, 0, 0]);
                },
                440,
            ),
            (
                "family of 1 byte",
                |w| {
                    udp(w);
                    w.raw(0x0017, &[1]);
                },
                400,
            ),
            (
                "both family attributes",
                |w| {
                    udp(w);
                    w.raw(0x0017, &[1, 0, 0, 0]);
                    w.raw(0x8000, &[2, 0, 0, 0]);
                },
                400,
            ),
            (
                "additional family 1",
                |w| {
                    udp(w);
                    w.raw(0x8000, &[1, 0, 0, 0]);
                },
                400,
            ),
            (
                "EVEN-PORT",
                |w| {
                    udp(w);
                    w.raw(0x0018, &[0]);
                },
                0,
            ),
            (
                "EVEN-PORT of 2 bytes",
                |w| {
                    udp(w);
                    w.raw(0x0018, &[0, 0]);
                },
                400,
            ),
            (
                "EVEN-PORT with R and an additional family",
                |w| {
                    udp(w);
                    w.raw(0x0018, &[0x80]);
                    w.raw(0x8000, &[2, 0, 0, 0]);
                },
                400,
            ),
            (
                "a RESERVATION-TOKEN nobody gave",
                |w| {
                    udp(w);
                    w.raw(0x0022, &[9; 8]);
                },
                508,
            ),
            (
                "RESERVATION-TOKEN of 7 bytes",
                |w| {
                    udp(w);
                    w.raw(0x0022, &[0; 7]);
                },
                400,
            ),
            (
                "RESERVATION-TOKEN and EVEN-PORT",
                |w| {
                    udp(w);
                    w.raw(0x0022, &[0; 8]);
                    w.raw(0x0018, &[0]);
                },
                400,
            ),
            (
                "RESERVATION-TOKEN and a family",
                |w| {
                    udp(w);
                    w.raw(0x0022, &[0; 8]);
                    w.raw(0x0017, &[1, 0, 0, 0]);
                },
                400,
            ),
            (
                "DONT-FRAGMENT",
                |w| {
                    udp(w);
                    w.raw(0x001A, &[]);
                },
                0,
            ),
            (
                "ACCESS-TOKEN",
                |w| {
                    udp(w);
                    w.raw(0x001B, &[0; 4]);
                },
                420,
            ),
            (
                "PADDING",
                |w| {
                    udp(w);
                    w.raw(0x0026, &[0; 4]);
                },
                420,
            ),
            (
                "unknown, required",
                |w| {
                    udp(w);
                    w.raw(0x7FFF, &[]);
                },
                420,
            ),
            (
                "unknown, optional",
                |w| {
                    udp(w);
                    w.raw(0xFFFF, &[1, 2, 3]);
                },
                0,
            ),
            (
                "MOBILITY-TICKET",
                |w| {
                    udp(w);
                    w.raw(0x8030, &[]);
                },
                0,
            ),
        ];
        for (what, write, expected) in cases {
            let mut lab = Lab::new();
            let reply = lab.request(Method::Allocate, write);
            assert_eq!(reply.code(), *expected, "{what}");
            assert!(reply.message().verify_integrity(&lab.credentials().key()), "{what}");
            assert_eq!(lab.server.allocations(), usize::from(*expected == 0), "{what}");
            assert_eq!(lab.changes().len(), usize::from(*expected == 0), "{what}");
            assert_eq!(lab.host.bound(), usize::from(*expected == 0), "{what}");
        }
    }

    #[test]
    fn a_pair_of_ports_is_one_allocation_and_a_token() {
        // RFC 8656 §7.2: R=1 holds N+1 under a token, which any five-tuple may bring.
        let mut lab = Lab::new();
        let pair = lab.request(Method::Allocate, |w| {
            udp(w);
            w.raw(0x0018, &[0x80]);
        });
        assert_eq!(pair.code(), 0);
        let Ok(Some(token)) = pair.message().attribute::<ReservationToken>() else { panic!("no RESERVATION-TOKEN") };
        let even = lab.relayed().advertised.port();
        assert!(even.is_multiple_of(2));

        lab.from.client = addr("203.0.113.10:4000");
        let bring = |w: &mut MessageWriter<'_>| {
            udp(w);
            w.attribute(&token);
        };
        let next = lab.request(Method::Allocate, bring);
        let Ok(Some(XorRelayedAddress(relayed))) = next.message().attribute() else { panic!("{}", next.code()) };
        assert_eq!(relayed.port(), even + 1);
        assert!(!next.message().contains(AttributeType::RESERVATION_TOKEN));

        lab.from.client = addr("203.0.113.11:4000");
        assert_eq!(lab.request(Method::Allocate, bring).code(), 508, "a token is good for one");
    }

    #[test]
    fn unknown_attributes_are_listed() {
        let mut lab = Lab::new();
        let reply = lab.request(Method::Allocate, |writer| {
            udp(writer);
            writer.raw(0x0026, &[0; 4]);
            writer.raw(0x001B, &[]);
            writer.raw(0x7001, &[]);
            writer.attribute(&Software(b"client"));
        });
        let Ok(Some(unknown)) = reply.message().attribute::<UnknownAttributes>() else {
            panic!("no UNKNOWN-ATTRIBUTES")
        };
        let types: Vec<u16> = unknown.iter().map(|attribute| attribute.0).collect();
        assert_eq!(types, [0x0026, 0x001B, 0x7001]);
    }

    #[test]
    fn what_the_host_refuses() {
        let cases = [(BindError::FamilyUnsupported, 440), (BindError::QuotaReached, 486), (BindError::NoPort, 508)];
        for (error, expected) in cases {
            let mut lab = Lab::new();
            lab.host.refuse = Some(error);
            assert_eq!(lab.request(Method::Allocate, udp).code(), expected);
            // And recovery, from the same five-tuple (abuse.md E).
            lab.host.refuse = None;
            assert_eq!(lab.request(Method::Allocate, udp).code(), 0);
        }
    }

    #[test]
    fn lifetimes() {
        // RFC 8656 §7.2.
        let cases: &[(Option<u32>, u32, u32)] = &[
            (None, 3600, 600),
            (Some(0), 3600, 600),
            (Some(1), 3600, 600),
            (Some(600), 3600, 600),
            (Some(601), 3600, 601),
            (Some(3600), 3600, 3600),
            (Some(3601), 3600, 3600),
            (Some(u32::MAX), 3600, 3600),
            (None, 300, 300),
            (Some(u32::MAX), 300, 300),
            (Some(u32::MAX), u32::MAX, u32::MAX),
        ];
        for (proposed, max, expected) in cases {
            let mut lab = Lab::new();
            lab.configure(|settings| settings.limits.max_lifetime = *max);
            let reply = lab.request(Method::Allocate, |writer| {
                udp(writer);
                if let Some(proposed) = proposed {
                    writer.attribute(&Lifetime(*proposed));
                }
            });
            assert_eq!(lifetime_of(&reply), *expected, "{proposed:?} of {max}");
        }
    }

    #[test]
    fn retransmissions_get_the_same_answer() {
        // RFC 8656 §7.2, note; five at once too.
        let mut lab = Lab::new();
        let with = lab.credentials();
        let packet = lab.packet(Some(&with), Method::Allocate, |writer| {
            udp(writer);
            writer.raw(0x8000, &[2, 0, 0, 0]);
        });
        let first = lab.exchange(&packet);
        assert_eq!(first.code(), 0);
        assert!(first.message().contains(AttributeType::ADDRESS_ERROR_CODE));
        assert_eq!(lab.outputs().len(), 1);
        for _ in 0..5 {
            assert_eq!(lab.exchange(&packet).bytes, first.bytes);
        }
        lab.pass(10);
        assert_eq!(lifetime_of(&lab.exchange(&packet)), 590);
        assert!(lab.outputs().is_empty());
        assert_eq!((lab.server.allocations(), lab.host.bound()), (1, 1));
    }

    #[test]
    fn another_transaction_is_437() {
        // RFC 8656 §7.2, item 2; only after authentication (abuse.md C).
        let mut lab = Lab::allocated();
        assert_eq!(lab.unsigned(Method::Allocate, udp).code(), 401);
        assert_eq!(lab.request(Method::Allocate, udp).code(), 437);
        assert_eq!(lab.request(Method::Allocate, |_| {}).code(), 437);
        // Also for another user who repeats the transaction id.
        let mut lab = Lab::new();
        let with = lab.credentials();
        let packet = lab.packet(Some(&with), Method::Allocate, udp);
        assert_eq!(lab.exchange(&packet).code(), 0);
        let other = lab.rest(lab.now.wall / 1000 + 60);
        let mut packet = lab.packet_of(&packet[8..20], Some(&other), Method::Allocate, udp);
        assert_eq!(lab.exchange(&packet).code(), 437);
        packet[19] ^= 1;
        assert_eq!(lab.exchange(&packet).code(), 401);
    }

    #[test]
    fn ends_by_itself() {
        let mut lab = Lab::allocated();
        assert_eq!(lab.server.poll_timeout(), Some(lab.now.mono + Duration::from_secs(600)));
        lab.bind(0x4000, "192.0.2.1:9");
        lab.outputs();
        lab.pass(600);
        // Even before the timer is handed in.
        assert_eq!(lab.channel_data(0x4000, b"x").dropped(), Some(crate::DropReason::NoAllocation));
        assert_eq!(lab.peer_packet("192.0.2.1:9", b"x").dropped(), Some(crate::DropReason::NoAllocation));
        lab.timeout();
        let relayed = lab.relayed();
        let outputs = lab.outputs();
        assert!(matches!(
            &outputs[..],
            [
                Output::Record(Change::End { reason: crate::EndReason::Expired, sequence: 3, epoch: 1, .. }),
                Output::Release { relayed: released, quota_key },
            ] if *released == relayed && **quota_key == *USER
        ));
        assert_eq!(lab.server.poll_timeout(), None);
        assert_eq!(lab.server.allocations(), 0);
    }

    #[test]
    fn a_new_allocation_may_follow_at_once() {
        let mut lab = Lab::allocated();
        lab.pass(600);
        // The old one has ended, though no timer said so yet.
        assert_eq!(lab.request(Method::Allocate, udp).code(), 0);
        let kinds: Vec<bool> = lab.changes().iter().map(|change| matches!(change, Change::Put(_))).collect();
        assert_eq!(kinds, [false, true]);
    }

    #[test]
    fn ipv6() {
        let mut lab = Lab::allocated_v6();
        assert!(lab.relayed().advertised.is_ipv6());
        // The client and the relayed address are of different families.
        assert!(lab.from.client.is_ipv4());
        let sequence = lab.changes().len();
        assert_eq!(sequence, 0);
    }

    #[test]
    fn quota_is_counted_for_the_user_behind_the_time() {
        let mut lab = Lab::new();
        let with = lab.rest(lab.now.wall / 1000 + 60);
        assert_eq!(lab.signed(&with, Method::Allocate, udp).code(), 0);
        assert_eq!(lab.host.quota_keys, [b"bob".to_vec()]);
    }

    #[test]
    fn a_connection_ends_its_allocation() {
        // RFC 8656 §5 with §12.5: streams.
        let mut lab = Lab::new();
        lab.from.transport = Transport::Tcp;
        lab.path = Path::Connection(ConnectionId(5));
        assert_eq!(lab.request(Method::Allocate, udp).code(), 0);
        lab.outputs();
        lab.closed(ConnectionId(6));
        assert!(lab.outputs().is_empty());
        lab.closed(ConnectionId(5));
        let outputs = lab.outputs();
        assert!(matches!(
            &outputs[..],
            [Output::Record(Change::End { reason: crate::EndReason::Closed, .. }), Output::Release { .. }]
        ));
    }

    #[test]
    fn a_new_connection_from_the_same_port_ends_the_old_one() {
        let mut lab = Lab::new();
        lab.from.transport = Transport::Tcp;
        lab.path = Path::Connection(ConnectionId(5));
        assert_eq!(lab.request(Method::Allocate, udp).code(), 0);
        lab.path = Path::Connection(ConnectionId(6));
        assert_eq!(lab.request(Method::Refresh, |_| {}).code(), 437);
        assert_eq!(lab.server.allocations(), 0);
        assert_eq!(lab.request(Method::Allocate, udp).code(), 0);
        lab.closed(ConnectionId(5));
        assert_eq!(lab.server.allocations(), 1);
    }
}
