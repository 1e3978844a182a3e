//! §10, §14.15: ALTERNATE-SERVER; RFC 8656 §7.2, item 11.

use turn_core::{Alternate, Settings, Transport};

use crate::support::addr;
use crate::support::rig::Rig;
use crate::support::stun::{
    self, ALLOCATE, ALTERNATE_SERVER, BINDING, Builder, CHANNEL_BIND, CREATE_PERMISSION, Class, MESSAGE_INTEGRITY,
    MESSAGE_INTEGRITY_SHA256, NONCE, REALM, REFRESH, SOFTWARE, additional, family, raw, transport,
};

const OTHER: &str = "198.51.100.8:3478";

fn to(transport: Transport, address: &str) -> Alternate {
    Alternate { transport, address: addr(address), relays_ipv6: false }
}

fn draining(settings: &mut Settings) {
    settings.draining = true;
    settings.alternates = vec![
        to(Transport::Tcp, "198.51.100.8:443"),
        to(Transport::Udp, "[2001:db8::8]:3478"),
        to(Transport::Udp, OTHER),
        to(Transport::Udp, "198.51.100.9:3478"),
    ];
}

#[test]
fn a_new_client_is_sent_to_an_alternate() {
    // RFC 8489 §10: a 300 with ALTERNATE-SERVER.
    let mut rig = Rig::with(draining);
    let answer = rig.ask_unsigned(ALLOCATE, &[transport(17)]).answer();
    assert_eq!((answer.class, answer.code()), (Class::Error, 300));
    assert_eq!(answer.find(ALTERNATE_SERVER), Some(&stun::address(addr(OTHER))[..]));
    // It asks before it has realm and nonce, and takes none along: the alternate tells it its own.
    for absent in [REALM, NONCE, MESSAGE_INTEGRITY, MESSAGE_INTEGRITY_SHA256, SOFTWARE] {
        assert!(!answer.has(absent), "{absent:#06x}");
    }
    assert_eq!((rig.server.allocations(), rig.desk.bindings.len()), (0, 0));
}

#[test]
fn the_alternate_is_of_the_family_of_the_source() {
    // RFC 8489 §14.15: the family MUST be that of the source IP address of the request. The transport stays what it is.
    let mut rig = Rig::with(draining);
    rig.client("[2001:db8:1::9]:5000");
    let answer = rig.ask_unsigned(ALLOCATE, &[transport(17)]).answer();
    assert_eq!(answer.find(ALTERNATE_SERVER), Some(&stun::address(addr("[2001:db8::8]:3478"))[..]));
    // An IPv6 socket took it in.
    rig.client("[::ffff:203.0.113.77]:5000");
    let answer = rig.ask_unsigned(ALLOCATE, &[transport(17)]).answer();
    assert_eq!(answer.find(ALTERNATE_SERVER), Some(&stun::address(addr(OTHER))[..]));
    let mut rig = Rig::with(draining).on_stream();
    let answer = rig.ask_unsigned(ALLOCATE, &[transport(17)]).answer();
    assert_eq!(answer.find(ALTERNATE_SERVER), Some(&stun::address(addr("198.51.100.8:443"))[..]));
    // No alternate of the kind: it is served.
    rig.client("[2001:db8:1::9]:5000");
    assert_eq!(rig.ask_unsigned(ALLOCATE, &[transport(17)]).code(), 401);
}

#[test]
fn nothing_but_an_allocate_is_redirected() {
    // RFC 8656 §7.2, item 11 is of Allocate; what exists goes on.
    let mut rig = Rig::allocated();
    rig.configure(draining);
    assert_eq!(rig.refresh(&[]).code(), 0);
    assert_eq!(rig.permit("192.0.2.1:1"), 0);
    assert_eq!(rig.bind(0x4000, "192.0.2.1:1"), 0);
    assert_eq!(rig.channel_data(0x4000, b"on").peer_gets().2, b"on");
    assert_eq!(rig.peer_sends("192.0.2.1:1", b"x").client_gets(), stun::channel_data(0x4000, b"x"));
    for method in [REFRESH, CREATE_PERMISSION, CHANNEL_BIND] {
        assert_eq!(rig.ask_unsigned(method, &[]).code(), 401);
    }
    assert_eq!(rig.ask_unsigned(BINDING, &[]).code(), 0);
    // Nor one on a five-tuple that has an allocation.
    assert_eq!(rig.ask_unsigned(ALLOCATE, &[transport(17)]).code(), 401);
    assert_eq!(rig.allocate(&[]).code(), 437);
}

#[test]
fn whoever_was_challenged_is_served() {
    // clients.md: after a 401 a client follows a 300 with this server's realm and nonce, and a 401 there is fatal.
    let mut rig = Rig::new();
    rig.signer();
    rig.configure(draining);
    assert_eq!(rig.allocate(&[]).code(), 0);
    // Whatever it brings of a challenge, well or badly signed; that is judged as ever.
    let mut rig = Rig::new();
    let signer = rig.signer();
    rig.configure(draining);
    for item in signer.items() {
        assert_eq!(rig.ask_unsigned(ALLOCATE, &[transport(17), item]).code(), 401);
    }
    rig.user(b"user", b"wrong");
    assert_eq!(rig.allocate(&[]).code(), 401);
    rig.user(b"user", b"password");
    rig.clock.elapsed += std::time::Duration::from_secs(4000);
    assert_eq!(rig.allocate(&[]).code(), 438, "with a nonce of long ago");
}

#[test]
fn a_reserved_port_is_here() {
    // RFC 8656 §7.2, item 5: no other server has it. EVEN-PORT asks for one, wherever.
    let mut rig = Rig::new();
    let answer = rig.allocate(&[stun::even_port(true)]).answer();
    let reserved = answer.find(stun::RESERVATION_TOKEN).expect("a token").try_into().expect("8 bytes");
    rig.configure(draining);
    rig.client("203.0.113.1:5001");
    assert_eq!(rig.ask_unsigned(ALLOCATE, &[transport(17), stun::token(reserved)]).code(), 401);
    rig.client("203.0.113.1:5002");
    assert_eq!(rig.ask_unsigned(ALLOCATE, &[transport(17), stun::even_port(true)]).code(), 300);
}

#[test]
fn who_asks_for_ipv6_is_sent_where_there_is_some() {
    for wish in [family(2), additional(2)] {
        let mut rig = Rig::with(draining);
        assert_eq!(rig.ask_unsigned(ALLOCATE, &[transport(17), wish.clone()]).code(), 401);
        rig.configure(|settings| settings.alternates[3].relays_ipv6 = true);
        let answer = rig.ask_unsigned(ALLOCATE, &[transport(17), wish]).answer();
        assert_eq!(answer.find(ALTERNATE_SERVER), Some(&stun::address(addr("198.51.100.9:3478"))[..]));
        assert_eq!(rig.ask_unsigned(ALLOCATE, &[transport(17), family(1)]).code(), 401, "another transaction");
    }
}

#[test]
fn a_retransmission_gets_the_same_answer() {
    // RFC 8489 §6.3.1.
    let mut rig = Rig::with(draining);
    let packet = rig.unsigned(ALLOCATE, &[transport(17)]);
    let first = rig.hand_in(&packet).answer();
    assert_eq!(first.code(), 300);
    for seconds in [0, 1, 8, 30] {
        rig.pass(seconds);
        assert_eq!(rig.hand_in(&packet).answer().bytes, first.bytes);
    }
}

#[test]
fn a_client_that_does_not_follow_is_served() {
    // design.md, "Redirect": pion, aioice, werift and ice4j do not know 300.
    let mut rig = Rig::with(draining);
    let first = rig.unsigned(ALLOCATE, &[transport(17)]);
    assert_eq!(rig.hand_in(&first).code(), 300);
    rig.clock.elapsed += std::time::Duration::from_millis(9_999);
    assert_eq!(rig.ask_unsigned(ALLOCATE, &[transport(17)]).code(), 401);
    assert_eq!(rig.hand_in(&first).code(), 300, "a copy that was late");
    assert_eq!(rig.allocate(&[]).code(), 0);

    // Later than that it is a new client.
    let mut rig = Rig::with(draining);
    assert_eq!(rig.ask_unsigned(ALLOCATE, &[transport(17)]).code(), 300);
    rig.clock.elapsed += std::time::Duration::from_secs(10);
    assert_eq!(rig.ask_unsigned(ALLOCATE, &[transport(17)]).code(), 300);
}

#[test]
fn a_client_that_comes_back_from_another_port_is_served() {
    // Such a client gives its socket up with the 300. The other sockets of one that follows come at once.
    let mut rig = Rig::with(draining);
    assert_eq!(rig.ask_unsigned(ALLOCATE, &[transport(17)]).code(), 300);
    rig.client("203.0.113.1:5001");
    assert_eq!(rig.ask_unsigned(ALLOCATE, &[transport(17)]).code(), 300);
    rig.pass(1);
    rig.client("203.0.113.1:5002");
    let again = rig.unsigned(ALLOCATE, &[transport(17)]);
    assert_eq!(rig.hand_in(&again).code(), 401);
    assert_eq!(rig.hand_in(&again).code(), 401, "and so is its retransmission");
    assert_eq!(rig.allocate(&[]).code(), 0);
    // Both sockets that were sent away, and no more.
    rig.client("203.0.113.1:5003");
    assert_eq!(rig.ask_unsigned(ALLOCATE, &[transport(17)]).code(), 401);
    rig.client("203.0.113.1:5006");
    assert_eq!(rig.ask_unsigned(ALLOCATE, &[transport(17)]).code(), 300);
    // Of this IP, and by this transport.
    rig.pass(1);
    rig.client("203.0.113.2:5003");
    assert_eq!(rig.ask_unsigned(ALLOCATE, &[transport(17)]).code(), 300);
    rig.client("203.0.113.1:5004");
    rig.from.transport = Transport::Tcp;
    assert_eq!(rig.ask_unsigned(ALLOCATE, &[transport(17)]).code(), 300);
}

#[test]
fn without_an_alternate_new_clients_are_served() {
    // A call is better than none.
    let mut rig = Rig::with(|settings| settings.draining = true);
    assert_eq!(rig.ask_unsigned(ALLOCATE, &[transport(17)]).code(), 401);
    assert_eq!(rig.allocate(&[]).code(), 0);
    // Up to what there is: RFC 8656 §7.2, item 10.
    rig.client("203.0.113.1:5001");
    rig.desk.exhausted = true;
    assert_eq!(rig.allocate(&[]).code(), 508);
}

#[test]
fn an_alternate_without_reason_is_nothing() {
    let mut rig = Rig::with(|settings| {
        draining(settings);
        settings.draining = false;
    });
    assert_eq!(rig.ask_unsigned(ALLOCATE, &[transport(17)]).code(), 401);
    rig.configure(|settings| settings.overloaded = true);
    assert_eq!(rig.ask_unsigned(ALLOCATE, &[transport(17)]).code(), 300);
    assert_eq!((rig.server.redirected().draining, rig.server.redirected().overloaded), (0, 1));
}

#[test]
fn nobody_is_sent_back_where_it_asks() {
    // RFC 8489 §10: that would be a loop.
    let mut rig = Rig::with(|settings| settings.draining = true);
    let own = rig.from.server.to_string();
    rig.configure(|settings| settings.alternates = vec![to(Transport::Udp, &own)]);
    assert_eq!(rig.ask_unsigned(ALLOCATE, &[transport(17)]).code(), 401);
}

#[test]
fn two_servers_that_point_at_each_other_end_in_service() {
    // RFC 8489 §10: the client MUST NOT be sent round; a member may hear late that another one drains too.
    let (a, b) = ("198.51.100.1:3478", "198.51.100.2:3478");
    let pointing = |other: &'static str| {
        Rig::with(|settings| {
            settings.draining = true;
            settings.alternates = vec![to(Transport::Udp, other)];
        })
    };
    let mut servers = [(a, pointing(b)), (b, pointing(a))];
    for (own, server) in &mut servers {
        server.from.server = addr(own);
    }
    let mut at = a.to_owned();
    let mut hops = 0;
    let served = loop {
        let (_, server) = servers.iter_mut().find(|(own, _)| *own == at).expect("one of the two");
        let answer = server.ask_unsigned(ALLOCATE, &[transport(17)]).answer();
        match answer.code() {
            300 => {
                let value = answer.find(ALTERNATE_SERVER).expect("where to");
                at = [a, b].into_iter().find(|to| stun::address(addr(to)) == value).expect("one of the two").to_owned();
                hops += 1;
                assert!(hops <= 2, "each sends it away once at most");
            }
            code => break code,
        }
    };
    assert_eq!((served, hops, at.as_str()), (401, 2, a));
    assert_eq!(servers[0].1.allocate(&[]).code(), 0);
}

#[test]
fn a_stranger_gets_at_most_three_times_what_it_sent() {
    // abuse.md D; the shortest request there is, and one with FINGERPRINT.
    let mut rig = Rig::with(draining);
    for client in ["203.0.113.1:5000", "[2001:db8:1::9]:5000"] {
        rig.client(client);
        let short = rig.unsigned(ALLOCATE, &[]);
        let answer = rig.hand_in(&short).answer();
        assert_eq!(answer.code(), 300);
        assert!(answer.bytes.len() + 28 <= 3 * (short.len() + 28));
    }
    rig.client("203.0.113.1:5009");
    let packet = Builder::new(Class::Request, ALLOCATE, [3; 12]).fingerprint().bytes();
    let answer = rig.hand_in(&packet).answer();
    assert!(answer.has(stun::FINGERPRINT) && answer.code() == 300);
}

#[test]
fn strangers_have_their_share_of_300s_too() {
    // abuse.md D: an answer like any other.
    let mut rig = Rig::with(|settings| {
        draining(settings);
        settings.limits.strangers_per_prefix = 200;
    });
    let mut answered = 0;
    for port in 1..=300 {
        rig.client(&format!("203.0.113.1:{port}"));
        answered += usize::from(!rig.ask_unsigned(ALLOCATE, &[transport(17)]).is_silence());
    }
    assert_eq!(answered, 200);
    assert_eq!(rig.server.redirected().draining, 200);
}

#[test]
fn an_unknown_optional_attribute_changes_nothing() {
    let mut rig = Rig::with(draining);
    assert_eq!(rig.ask_unsigned(ALLOCATE, &[transport(17), raw(0xFFFF, b"abc")]).code(), 300);
}
