//! What a client asks for beyond one relayed address: dual allocations (RFC 8656 §7.1), mobility (RFC 8016),
//! DONT-FRAGMENT (RFC 8656 §11.1).

use std::net::SocketAddr;
use std::time::Instant;

use super::{Client, Event, Request, transaction};
use crate::wire::attribute::{
    self, AdditionalAddressFamily, DontFragment, Icmp, MobilityTicket, XorPeerAddress, XorRelayedAddress,
};
use crate::wire::{Class, Message, MessageWriter, Method};

/// What an Allocate asks for; nothing by default.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Extensions {
    /// ADDITIONAL-ADDRESS-FAMILY: an IPv6 address beside the IPv4 one. The client's family is not asked for then.
    pub dual: bool,
    /// MOBILITY-TICKET.
    pub mobility: bool,
}

impl Client {
    /// Asks for these from now on.
    pub fn extend(&mut self, extensions: Extensions) {
        self.extensions = extensions;
    }

    /// Goes on with the allocation from another five-tuple (RFC 8016 §3.2.1), from which the packets are sent from now
    /// on. The ticket is that of the last [`Event::Ticket`].
    pub fn resume(&mut self, now: Instant, ticket: &[u8]) {
        self.request(now, Request::Resume(ticket.to_vec()));
    }

    /// Sends application data in a Send indication with DONT-FRAGMENT.
    pub fn send_unfragmented(&mut self, to: SocketAddr, data: &[u8]) {
        let id = transaction::random_id(&mut self.random);
        let mut packet = vec![0; data.len() + 68];
        let mut writer = MessageWriter::new(&mut packet, Class::Indication, Method::Send, id);
        writer.attribute(&XorPeerAddress(to)).attribute(&DontFragment).attribute(&attribute::Data(data));
        if let Ok(len) = writer.finish() {
            packet.truncate(len);
            self.transmit.push_back(packet);
        }
    }

    /// What an Allocate has beside the rest.
    pub(super) fn write_extensions(&self, writer: &mut MessageWriter<'_>) {
        if self.extensions.dual {
            writer.attribute(&AdditionalAddressFamily(2));
        }
        if self.extensions.mobility {
            writer.attribute(&MobilityTicket(b""));
        }
    }

    /// What a success answer has beside the rest.
    pub(super) fn read_extensions(&mut self, request: &Request, message: &Message<'_>) {
        if let Request::Allocate(_) = request {
            let more = message.relayed_addresses().skip(1).flatten();
            self.events.extend(more.map(|XorRelayedAddress(relayed)| Event::AlsoRelayed(relayed)));
        }
        if let Ok(Some(MobilityTicket(ticket))) = message.attribute() {
            self.events.push_back(Event::Ticket(ticket.to_vec()));
        }
    }

    /// A Data indication that tells of an ICMP error (RFC 8656 §11.6).
    pub(super) fn on_icmp(&mut self, message: &Message<'_>) {
        if let (Ok(Some(XorPeerAddress(peer))), Ok(Some(icmp))) = (message.attribute(), message.attribute::<Icmp>()) {
            self.events.push_back(Event::Icmp(peer, icmp));
        }
    }
}
