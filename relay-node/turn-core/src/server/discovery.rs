//! NAT behaviour discovery (RFC 5780): Binding answers that say where they come from and where else they could come
//! from, and come from there when asked to.

use std::net::SocketAddr;

use super::binding::mapped;
use super::reply::Request;
use super::{Server, Verdict};
use crate::wire::attribute::{ChangeRequest, MappedAddress, OtherAddress, ResponseOrigin, XorMappedAddress};
use crate::wire::{AttributeSet, AttributeType, Class, ErrorCode};
use crate::{FiveTuple, ListenerId, Path, Transport};

/// One of the four addresses (RFC 5780 §6).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DiscoveryPlace {
    /// The address as packets carry it to this machine.
    pub bound: SocketAddr,
    /// The address as clients know it; another one behind a one-to-one NAT.
    pub advertised: SocketAddr,
    /// The datagram socket that answers from it.
    pub listener: ListenerId,
}

/// Two IPs with the same two ports each, in the order of RFC 5780 §6.1: A1:P1, A1:P2, A2:P1, A2:P2.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct NatDiscovery(pub [DiscoveryPlace; 4]);

/// Bits of a place in the table, and what CHANGE-REQUEST calls them (RFC 5780 §7.2).
const OTHER_PORT: (usize, u32) = (1, 2);
const OTHER_IP: (usize, u32) = (2, 4);

/// CHANGE-REQUEST is known where there is another address.
const KNOWN: AttributeSet = AttributeSet::of(&[AttributeType::CHANGE_REQUEST]);

impl NatDiscovery {
    fn find(&self, from: &FiveTuple) -> Option<usize> {
        // The pairs of ports that RFC 5780 §6 wants for TCP and TLS too are not offered: no other address there.
        let is_udp = from.transport == Transport::Udp;
        self.0.iter().position(|place| is_udp && place.bound == from.server)
    }
}

impl Server {
    /// Offers NAT discovery; to be called before the first input.
    pub fn set_nat_discovery(&mut self, discovery: NatDiscovery) {
        self.nat_discovery = Some(Box::new(discovery));
    }

    /// A Binding request that came to an address with alternates; none for any other (RFC 5780 §6.1).
    pub(super) fn discover(&mut self, request: &Request<'_>) -> Option<Verdict> {
        let discovery = self.nat_discovery.as_deref()?;
        // A proxy sees answers from the address it sent to only.
        let Path::Listener(_) = request.path else { return None };
        let at = discovery.find(&request.from)?;
        // PADDING and RESPONSE-PORT stay unknown: both are optional (RFC 5780 §3.3, §7.5), and either would let a
        // stranger have more sent, or sent elsewhere, than what it sent itself.
        let unknown = request.message.unknown_attributes(self.declined().without(KNOWN));
        let changes = request.message.attribute::<ChangeRequest>();
        let changes = match changes {
            _ if !unknown.is_empty() => {
                return Some(self.error(request, ErrorCode::UNKNOWN_ATTRIBUTE, None, |writer| {
                    writer.attribute(&unknown);
                }));
            }
            Ok(changes) => changes.map_or(0, |ChangeRequest(flags)| flags),
            Err(_) => return Some(self.error(request, ErrorCode::BAD_REQUEST, None, |_| {})),
        };
        let change = |(bit, flag): (usize, u32)| if changes & flag == 0 { 0 } else { bit };
        let origin = discovery.0[at ^ change(OTHER_PORT) ^ change(OTHER_IP)];
        let other = discovery.0[at ^ OTHER_PORT.0 ^ OTHER_IP.0];
        let XorMappedAddress(client) = mapped(request.from.client);
        let answered = Request {
            from: FiveTuple { server: origin.bound, ..request.from },
            path: Path::Listener(origin.listener),
            ..*request
        };
        Some(self.reply_with(&answered, Class::Success, None, |writer| {
            writer.attribute(&XorMappedAddress(client));
            writer.attribute(&MappedAddress(client));
            writer.attribute(&ResponseOrigin(origin.advertised));
            writer.attribute(&OtherAddress(other.advertised));
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::lab::{Lab, addr};
    use super::super::{Out, Verdict};
    use super::*;
    use crate::wire::{Message, MessageWriter, Method};

    /// 10.0.0.7 and 10.0.0.8 behind a one-to-one NAT.
    fn lab() -> Lab {
        let place = |index: u16, ip: u8, port: u16| DiscoveryPlace {
            bound: SocketAddr::from(([10, 0, 0, ip], port)),
            advertised: SocketAddr::from(([198, 51, 100, ip], port)),
            listener: ListenerId(index),
        };
        let mut lab = Lab::new();
        lab.server.set_nat_discovery(NatDiscovery([
            place(0, 7, 3478),
            place(5, 7, 3479),
            place(6, 8, 3478),
            place(7, 8, 3479),
        ]));
        lab
    }

    fn ask(lab: &mut Lab, server: &str, flags: Option<u32>) -> (FiveTuple, Path, Vec<u8>, usize) {
        lab.from.server = addr(server);
        let packet = lab.packet(None, Method::Binding, |writer| {
            if let Some(flags) = flags {
                writer.attribute(&ChangeRequest(flags));
            }
        });
        match lab.client_packet(&packet).verdict {
            Verdict::Reply { out: Out::Client { to, path } } => (to, path, lab.server.reply().to_vec(), packet.len()),
            other => panic!("no answer: {other:?}"),
        }
    }

    #[test]
    fn answers_come_from_where_they_are_asked_to() {
        // RFC 5780 §6.1, Table 1.
        let rows = [
            ("10.0.0.7:3478", None, "10.0.0.7:3478", 0, "198.51.100.8:3479"),
            ("10.0.0.7:3478", Some(0), "10.0.0.7:3478", 0, "198.51.100.8:3479"),
            ("10.0.0.7:3478", Some(4), "10.0.0.8:3478", 6, "198.51.100.8:3479"),
            ("10.0.0.7:3478", Some(2), "10.0.0.7:3479", 5, "198.51.100.8:3479"),
            ("10.0.0.7:3478", Some(6), "10.0.0.8:3479", 7, "198.51.100.8:3479"),
            ("10.0.0.7:3479", Some(6), "10.0.0.8:3478", 6, "198.51.100.8:3478"),
            ("10.0.0.8:3478", Some(2), "10.0.0.8:3479", 7, "198.51.100.7:3479"),
            ("10.0.0.8:3479", Some(4), "10.0.0.7:3479", 5, "198.51.100.7:3478"),
            // Other bits mean nothing.
            ("10.0.0.8:3479", Some(!6), "10.0.0.8:3479", 7, "198.51.100.7:3478"),
        ];
        for (server, flags, from, listener, other) in rows {
            let mut lab = lab();
            let (to, path, reply, asked) = ask(&mut lab, server, flags);
            let message = Message::parse(&reply).expect("our own message");
            let row = format!("{server} {flags:?}");
            assert_eq!((to.client, to.server), (lab.from.client, addr(from)), "{row}");
            assert_eq!(path, Path::Listener(ListenerId(listener)), "{row}");
            let origin = addr(&from.replace("10.0.0", "198.51.100"));
            assert_eq!(message.attribute(), Ok(Some(ResponseOrigin(origin))), "{row}");
            assert_eq!(message.attribute(), Ok(Some(OtherAddress(addr(other)))), "{row}");
            // §6.1: both.
            assert_eq!(message.attribute(), Ok(Some(MappedAddress(lab.from.client))), "{row}");
            assert_eq!(message.attribute(), Ok(Some(XorMappedAddress(lab.from.client))), "{row}");
            // abuse.md D, IP and UDP headers counted.
            assert!(reply.len() + 28 <= 3 * (asked + 28), "{} for {asked}", reply.len());
        }
    }

    #[test]
    fn answers_of_ipv6_stay_below_three_times_the_question() {
        let place = |index: u16, ip: u16, port: u16| DiscoveryPlace {
            bound: SocketAddr::from(([0x2001, 0xdb8, 0, 0, 0, 0, 0, ip], port)),
            advertised: SocketAddr::from(([0x2001, 0xdb8, 0, 0, 0, 0, 0, ip], port)),
            listener: ListenerId(index),
        };
        let mut lab = Lab::new();
        lab.client(addr("[2001:db8::9]:51234"));
        lab.server.set_nat_discovery(NatDiscovery([
            place(0, 7, 3478),
            place(1, 7, 3479),
            place(2, 8, 3478),
            place(3, 8, 3479),
        ]));
        let (_, _, reply, asked) = ask(&mut lab, "[2001:db8::7]:3478", None);
        assert_eq!((asked, reply.len()), (20, 20 + 4 * 24));
        assert!(reply.len() + 48 <= 3 * (asked + 48));
    }

    #[test]
    fn other_servers_addresses_transports_and_attributes_have_no_alternates() {
        // RFC 5780 §6: no OTHER-ADDRESS, and CHANGE-REQUEST is unknown.
        let mut lab = lab();
        for (server, transport) in [("10.0.0.9:3478", Transport::Udp), ("10.0.0.7:3478", Transport::Tcp)] {
            lab.from = FiveTuple { transport, server: addr(server), ..lab.from };
            let reply = lab.unsigned(Method::Binding, |_| {});
            assert_eq!((reply.code(), reply.bytes.len()), (0, 32), "{server}");
            let reply = lab.unsigned(Method::Binding, |writer| {
                writer.attribute(&ChangeRequest(6));
            });
            assert_eq!(reply.code(), 420, "{server}");
        }
        lab.from = FiveTuple { transport: Transport::Udp, server: addr("10.0.0.7:3478"), ..lab.from };
        let code = |lab: &mut Lab, write: fn(&mut MessageWriter<'_>)| lab.unsigned(Method::Binding, write).code();
        assert_eq!(code(&mut lab, |writer| writer.raw(0x0026, &[0; 500])), 420, "PADDING");
        assert_eq!(code(&mut lab, |writer| writer.raw(0x0027, &[0; 4])), 420, "RESPONSE-PORT");
        assert_eq!(code(&mut lab, |writer| writer.raw(0x7FFF, &[])), 420, "unknown");
        assert_eq!(code(&mut lab, |writer| writer.raw(0x0003, &[0; 3])), 400, "a CHANGE-REQUEST of 3 bytes");
        assert_eq!(lab.unsigned(Method::Allocate, |_| {}).code(), 401);
    }
}
