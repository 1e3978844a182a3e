//! RFC 8656 §7: allocations, their addresses, lifetimes and reservations.

use std::time::{Duration, Instant};

use turn_core::wire::AttributeType as A;

use super::check::{Check, On, Step, expect, fail, must, not_applicable, not_offered, should};
use super::client::expect_code;
use super::craft::{ALLOCATE, Craft, UDP};
use super::lab::Lab;
use super::refresh::expect_lifetime;
use super::stun::unknown_types;

/// EVEN-PORT with and without the R bit.
pub(crate) const EVEN: [u8; 1] = [0];
pub(crate) const EVEN_AND_NEXT: [u8; 1] = [0x80];
/// Families, as the attributes write them.
pub(crate) const IPV4: [u8; 4] = [1, 0, 0, 0];
pub(crate) const IPV6: [u8; 4] = [2, 0, 0, 0];

pub(super) const CHECKS: &[Check] = &[
    must(
        "allocate-answer",
        "RFC 8656 §7.2",
        "success holds XOR-RELAYED-ADDRESS, LIFETIME and XOR-MAPPED-ADDRESS",
        answer,
    ),
    must("allocate-mapped", "RFC 8656 §7.2", "XOR-MAPPED-ADDRESS of an Allocate is that of Binding", mapped),
    must("allocate-ipv4", "RFC 8656 §7.2", "without REQUESTED-ADDRESS-FAMILY the relayed address is IPv4", ipv4),
    should("allocate-port-range", "RFC 8656 §7.2", "relayed ports are of 49152-65535", port_range),
    should("allocate-port-random", "RFC 8656 §7.2", "relayed ports are no sequence that one could guess", random_ports),
    must("transport-missing", "RFC 8656 §7.2", "Allocate without REQUESTED-TRANSPORT is 400", |lab| {
        lab.client()?.expect(400, Craft::request(ALLOCATE)).map(drop)
    }),
    must("transport-malformed", "RFC 8656 §7.2", "a REQUESTED-TRANSPORT of 2 bytes is 400", |lab| {
        lab.client()?.expect(400, Craft::request(ALLOCATE).attr(A::REQUESTED_TRANSPORT, &[17, 0])).map(drop)
    }),
    must("transport-unsupported", "RFC 8656 §7.2", "a protocol other than UDP and TCP is 442", |lab| {
        lab.client()?.expect(442, Craft::request(ALLOCATE).attr(A::REQUESTED_TRANSPORT, &[99, 0, 0, 0])).map(drop)
    }),
    must("transport-rffu", "RFC 8656 §18.8", "the reserved bytes of REQUESTED-TRANSPORT are ignored", |lab| {
        let request = Craft::request(ALLOCATE).attr(A::REQUESTED_TRANSPORT, &[17, 1, 2, 3]);
        lab.client()?.allocate(request).map(drop)
    }),
    must("allocate-twice", "RFC 8656 §7.2", "a second Allocate on the 5-tuple is 437", twice),
    must("allocate-order", "RFC 8656 §7.2", "437 comes before what is wrong with the request", order),
    must("allocate-again", "RFC 8489 §6.3.1", "a retransmitted Allocate gets the same answer", again).on(On::Datagrams),
    must("allocate-five", "RFC 8489 §6.3.1", "five copies of one Allocate at once make one allocation", five)
        .on(On::Datagrams),
    must("lifetime-default", "RFC 8656 §7.2", "without LIFETIME an allocation lives 600 s or longer", |lab| {
        lifetime(lab, None, 600, u32::MAX)
    }),
    must("lifetime-short", "RFC 8656 §7.2", "a LIFETIME below the default gives the default", |lab| {
        lifetime(lab, Some(1), 600, 3600)
    }),
    must("lifetime-zero", "RFC 8656 §7.2", "LIFETIME 0 in an Allocate gives the default", |lab| {
        lifetime(lab, Some(0), 600, 3600)
    }),
    must("lifetime-as-asked", "RFC 8656 §7.2", "a LIFETIME above the default is never exceeded", |lab| {
        lifetime(lab, Some(900), 600, 900)
    }),
    should("lifetime-maximum", "RFC 8656 §7.2", "no lifetime is longer than an hour", |lab| {
        lifetime(lab, Some(u32::MAX), 600, 3600)
    }),
    must("even-port", "RFC 8656 §7.2", "EVEN-PORT gives an even port", even_port),
    must("even-port-pair", "RFC 8656 §7.2", "EVEN-PORT with the R bit gives an even port and a token", even_pair),
    must("reservation", "RFC 8656 §7.2", "the token gives the next port, to any 5-tuple", reservation),
    must("reservation-once", "RFC 8656 §7.2", "a token that was used is 508", reservation_once),
    must("reservation-unknown", "RFC 8656 §7.2", "a token nobody gave out is 508", |lab| {
        lab.client()?.expect(508, lab.allocate_plain().attr(A::RESERVATION_TOKEN, b"notoken!")).map(drop)
    }),
    must("reservation-malformed", "RFC 8656 §18.10", "a token of 5 bytes is an error", |lab| {
        let reply = lab.client()?.signed(lab.allocate_plain().attr(A::RESERVATION_TOKEN, b"short"))?;
        expect(matches!(reply.code(), 400 | 508), || format!("{reply}"))
    }),
    must("reservation-even", "RFC 8656 §7.2", "RESERVATION-TOKEN with EVEN-PORT is 400", |lab| {
        token_with(lab, A::EVEN_PORT, &EVEN)
    }),
    must("reservation-family", "RFC 8656 §7.2", "RESERVATION-TOKEN with REQUESTED-ADDRESS-FAMILY is 400", |lab| {
        token_with(lab, A::REQUESTED_ADDRESS_FAMILY, &IPV4)
    }),
    must("reservation-additional", "RFC 8656 §7.2", "RESERVATION-TOKEN with ADDITIONAL-ADDRESS-FAMILY is 400", |lab| {
        token_with(lab, A::ADDITIONAL_ADDRESS_FAMILY, &IPV6)
    }),
    must("reservation-hold", "RFC 8656 §7.2", "a reservation holds for 29 s at least", hold).slow(),
    must("no-token-unasked", "RFC 8656 §7.2", "without EVEN-PORT there is no RESERVATION-TOKEN", |lab| {
        let reply = lab.client()?.allocate(lab.allocate())?;
        expect(!reply.has(A::RESERVATION_TOKEN), || "there is one".into())
    }),
    must("family-ipv4", "RFC 8656 §7.2", "REQUESTED-ADDRESS-FAMILY IPv4 gives IPv4", |lab| family(lab, IPV4)),
    must("family-ipv6", "RFC 8656 §7.2", "REQUESTED-ADDRESS-FAMILY IPv6 gives IPv6, or 440", |lab| family(lab, IPV6)),
    must("family-unknown", "RFC 8656 §7.2", "a family that does not exist is 440", |lab| {
        let request = lab.allocate_plain().attr(A::REQUESTED_ADDRESS_FAMILY, &[5, 0, 0, 0]);
        let reply = lab.client()?.signed(request)?;
        // 400 for what is no family at all is as good.
        expect(matches!(reply.code(), 400 | 440), || format!("{reply}"))
    }),
    must("family-both", "RFC 8656 §7.2", "REQUESTED- with ADDITIONAL-ADDRESS-FAMILY is 400", |lab| {
        additional(lab, A::REQUESTED_ADDRESS_FAMILY, &IPV4, &IPV6)
    }),
    must("additional-even", "RFC 8656 §7.2", "ADDITIONAL-ADDRESS-FAMILY with EVEN-PORT and R is 400", |lab| {
        additional(lab, A::EVEN_PORT, &EVEN_AND_NEXT, &IPV6)
    }),
    must("additional-ipv4", "RFC 8656 §7.2", "ADDITIONAL-ADDRESS-FAMILY IPv4 is 400", |lab| {
        lab.client()?.expect(400, lab.allocate_plain().attr(A::ADDITIONAL_ADDRESS_FAMILY, &IPV4)).map(drop)
    }),
    must(
        "additional-dual",
        "RFC 8656 §7.2",
        "ADDITIONAL-ADDRESS-FAMILY IPv6 gives two addresses, or one and ADDRESS-ERROR-CODE",
        dual,
    ),
    must("dont-fragment", "RFC 8656 §7.2", "DONT-FRAGMENT is supported, or 420 that names it", dont_fragment),
];

impl Lab<'_> {
    /// An Allocate request with nothing but its protocol.
    pub(crate) fn allocate_plain(&self) -> Craft {
        Craft::request(ALLOCATE).attr(A::REQUESTED_TRANSPORT, &UDP)
    }
}

fn answer(lab: &Lab<'_>) -> Step {
    let reply = lab.client()?.allocate(lab.allocate())?;
    expect(reply.word(A::LIFETIME).is_some(), || "no LIFETIME".into())?;
    expect(reply.xor_address(A::XOR_MAPPED_ADDRESS).is_some(), || "no XOR-MAPPED-ADDRESS".into())
}

fn mapped(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let binding = client.ask(&Craft::request(super::craft::BINDING))?.xor_address(A::XOR_MAPPED_ADDRESS);
    let allocate = client.allocate(lab.allocate())?.xor_address(A::XOR_MAPPED_ADDRESS);
    expect(binding == allocate, || format!("{binding:?} and {allocate:?}"))
}

fn ipv4(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let reply = client.signed(lab.allocate_plain())?;
    if reply.code() == 440 {
        return not_offered("IPv4 is declined with 440");
    }
    expect_code(&reply, 0)?;
    let relayed = reply.xor_address(A::XOR_RELAYED_ADDRESS);
    expect(relayed.is_some_and(|relayed| relayed.is_ipv4()), || format!("{relayed:?}"))
}

fn port_range(lab: &Lab<'_>) -> Step {
    let port = lab.allocation()?.relayed()?.port();
    expect(port >= 49_152, || format!("port {port}"))
}

fn random_ports(lab: &Lab<'_>) -> Step {
    let clients = (0..4).map(|_| lab.allocation()).collect::<Step<Vec<_>>>()?;
    let ports = clients.iter().map(|client| Ok(client.relayed()?.port())).collect::<Step<Vec<_>>>()?;
    let sequence = ports.windows(2).all(|pair| pair[1].wrapping_sub(pair[0]) <= 2);
    expect(!sequence, || format!("ports {ports:?}"))
}

fn twice(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    client.expect(437, lab.allocate()).map(drop)
}

fn order(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    client.expect(437, Craft::request(ALLOCATE)).map(drop)
}

fn again(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let request = client.credentials.sign(lab.allocate());
    let (first, second) = (client.ask(&request)?, client.ask(&request)?);
    expect_code(&first, 0)?;
    let relayed = first.xor_address(A::XOR_RELAYED_ADDRESS);
    expect(second.code() == 0 && second.xor_address(A::XOR_RELAYED_ADDRESS) == relayed, || format!("{second}"))?;
    super::auth::signed(&client, &second)
}

fn five(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let request = client.credentials.sign(lab.allocate());
    for _ in 0..5 {
        client.send(request.bytes())?;
    }
    let mut relayed = Vec::new();
    let deadline = Instant::now() + lab.target.patience;
    while relayed.len() < 5 {
        let Some(reply) = client.answer_to(&request.id(), deadline)? else { break };
        expect_code(&reply, 0)?;
        relayed.extend(reply.xor_address(A::XOR_RELAYED_ADDRESS));
    }
    relayed.dedup();
    expect(relayed.len() == 1, || format!("relayed addresses {relayed:?}"))
}

fn lifetime(lab: &Lab<'_>, asked: Option<u32>, least: u32, most: u32) -> Step {
    let mut client = lab.client()?;
    expect_lifetime(lab.allocate(), asked, least..=most, |request| client.allocate(request))
}

fn even_port(lab: &Lab<'_>) -> Step {
    // One in 2^4 servers that do not look would pass.
    for _ in 0..4 {
        let mut client = lab.client()?;
        client.allocate(lab.allocate().attr(A::EVEN_PORT, &EVEN))?;
        let port = client.relayed()?.port();
        expect(port % 2 == 0, || format!("port {port}"))?;
    }
    Ok(())
}

/// A pair: the client that asked, and the token.
fn pair(lab: &Lab<'_>) -> Step<(super::client::Client, Vec<u8>)> {
    let mut client = lab.client()?;
    let reply = client.allocate(lab.allocate().attr(A::EVEN_PORT, &EVEN_AND_NEXT))?;
    match reply.get(A::RESERVATION_TOKEN) {
        Some(token) if token.len() == 8 => Ok((client, token.to_vec())),
        Some(token) => fail(format!("a token of {} bytes", token.len())),
        None => fail("no RESERVATION-TOKEN"),
    }
}

fn even_pair(lab: &Lab<'_>) -> Step {
    let port = pair(lab)?.0.relayed()?.port();
    expect(port % 2 == 0, || format!("port {port}"))
}

fn claim(lab: &Lab<'_>, token: &[u8]) -> Step<super::client::Client> {
    let mut client = lab.client()?;
    client.allocate(lab.allocate_plain().attr(A::RESERVATION_TOKEN, token))?;
    Ok(client)
}

fn reservation(lab: &Lab<'_>) -> Step {
    let (first, token) = pair(lab)?;
    let second = claim(lab, &token)?;
    let (first, second) = (first.relayed()?, second.relayed()?);
    expect(second.ip() == first.ip() && second.port() == first.port() + 1, || format!("{first}, then {second}"))
}

fn reservation_once(lab: &Lab<'_>) -> Step {
    let (_first, token) = pair(lab)?;
    let _second = claim(lab, &token)?;
    lab.client()?.expect(508, lab.allocate_plain().attr(A::RESERVATION_TOKEN, &token)).map(drop)
}

fn hold(lab: &Lab<'_>) -> Step {
    let (_first, token) = pair(lab)?;
    std::thread::sleep(Duration::from_secs(29));
    claim(lab, &token).map(drop)
}

fn token_with(lab: &Lab<'_>, attribute: A, value: &[u8]) -> Step {
    let request = lab.allocate_plain().attr(A::RESERVATION_TOKEN, b"notoken!").attr(attribute, value);
    lab.client()?.expect(400, request).map(drop)
}

fn family(lab: &Lab<'_>, family: [u8; 4]) -> Step {
    let mut client = lab.client()?;
    let reply = client.signed(lab.allocate_plain().attr(A::REQUESTED_ADDRESS_FAMILY, &family))?;
    if reply.code() == 440 {
        return not_offered("declined with 440");
    }
    expect_code(&reply, 0)?;
    let relayed = reply.xor_addresses(A::XOR_RELAYED_ADDRESS);
    expect(relayed.len() == 1 && relayed[0].is_ipv4() == (family == IPV4), || format!("{relayed:?}"))
}

fn additional(lab: &Lab<'_>, attribute: A, value: &[u8], family: &[u8]) -> Step {
    let request = lab.allocate_plain().attr(attribute, value).attr(A::ADDITIONAL_ADDRESS_FAMILY, family);
    lab.client()?.expect(400, request).map(drop)
}

fn dual(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let reply = client.signed(lab.allocate_plain().attr(A::ADDITIONAL_ADDRESS_FAMILY, &IPV6))?;
    expect_code(&reply, 0)?;
    let relayed = reply.xor_addresses(A::XOR_RELAYED_ADDRESS);
    let families: Vec<bool> = relayed.iter().map(std::net::SocketAddr::is_ipv4).collect();
    match (&families[..], reply.get(A::ADDRESS_ERROR_CODE)) {
        ([true, false] | [false, true], None) => Ok(()),
        ([_], Some([_, _, 4, 40, ..] | [_, _, 5, 8, ..])) => not_offered("ADDRESS-ERROR-CODE says that one is missing"),
        ([_], None) => fail("one address and no ADDRESS-ERROR-CODE"),
        _ => fail(format!("{relayed:?}")),
    }
}

fn dont_fragment(lab: &Lab<'_>) -> Step {
    if !lab.target.peer_ip.is_ipv4() {
        return not_applicable("the DF bit is one of IPv4");
    }
    let mut client = lab.client()?;
    let reply = client.signed(lab.allocate().attr(A::DONT_FRAGMENT, &[]))?;
    match reply.code() {
        0 => Ok(()),
        420 if unknown_types(&reply) == [A::DONT_FRAGMENT.0] => not_offered("declined with 420"),
        _ => fail(format!("{reply}")),
    }
}
