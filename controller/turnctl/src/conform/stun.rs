//! RFC 8489 §5 to §7 and §14: the grammar of messages, Binding, unknown attributes, FINGERPRINT.

use turn_core::Transport;
use turn_core::wire::AttributeType as A;

use super::check::{Check, On, Step, expect, fail, must, should};
use super::client::{Silence, expect_code};
use super::craft::{ALLOCATE, BINDING, Craft, ERROR, SUCCESS, UDP};
use super::lab::Lab;
use super::reply::Reply;

/// A comprehension-required attribute that nobody has assigned.
const UNKNOWN: A = A(0x7F17);
/// Another one.
const ALSO_UNKNOWN: A = A(0x7F18);
/// A comprehension-optional attribute that nobody has assigned.
const OPTIONAL: A = A(0xFF17);

pub(super) const CHECKS: &[Check] = &[
    must("binding", "RFC 8489 §6.3.1", "a Binding request is answered with success, without credentials", binding),
    must(
        "binding-mapped",
        "RFC 8489 §6.3.1.1",
        "the answer to Binding holds the request's source address in XOR-MAPPED-ADDRESS",
        mapped,
    ),
    must("binding-source", "RFC 8489 §6.3.1.2", "the answer comes from the address the request went to", source)
        .on(On::Only(Transport::Udp)),
    must("binding-again", "RFC 8489 §6.3.1", "a retransmitted Binding request gets the same answer", again),
    must("binding-indication", "RFC 8489 §6.3.2", "a Binding indication is not answered", indication),
    must("wrong-cookie", "RFC 8489 §6.3", "a message with another magic cookie is discarded", wrong_cookie)
        .on(On::Datagrams),
    must("classic-stun", "RFC 8656 §5", "a request of RFC 3489 is discarded: TURN has no such compatibility", classic)
        .on(On::Datagrams),
    must("first-bits", "RFC 8489 §6.3", "a message whose first two bits are not zero is discarded", first_bits)
        .on(On::Datagrams),
    must("length-odd", "RFC 8489 §5", "a message whose length is no multiple of 4 is discarded", length_odd)
        .on(On::Datagrams),
    must("length-long", "RFC 8489 §6.3", "a datagram shorter than its length says is discarded", length_long)
        .on(On::Datagrams),
    must("length-short", "RFC 8489 §6.3", "a datagram longer than its length says is discarded", length_short)
        .on(On::Datagrams),
    must("header-cut", "RFC 8489 §6.3", "a datagram of fewer than 20 bytes is discarded", header_cut).on(On::Datagrams),
    should(
        "attribute-overrun",
        "RFC 8489 §14",
        "an attribute longer than the message is no reason to answer with success",
        overrun,
    ),
    must("method-unknown", "RFC 8489 §6.3", "a request of an unknown method is discarded", method_unknown),
    must("class-success", "RFC 8489 §6.3", "a success response nobody asked for is discarded", class_success),
    must("class-error", "RFC 8489 §6.3", "an error response nobody asked for is discarded", class_error),
    must("class-wrong", "RFC 8489 §6.3", "Allocate as an indication is discarded", class_wrong),
    must("fingerprint-right", "RFC 8489 §14.7", "a right FINGERPRINT is accepted", fingerprint_right),
    must("fingerprint-wrong", "RFC 8489 §6.3", "a message with a wrong FINGERPRINT is discarded", fingerprint_wrong),
    must(
        "fingerprint-length",
        "RFC 8489 §14.7",
        "the CRC covers the header's length, FINGERPRINT included",
        fingerprint_length,
    ),
    must(
        "fingerprint-last",
        "RFC 8489 §14.7",
        "where the server writes FINGERPRINT it is right and the last attribute",
        fingerprint_last,
    ),
    must("unknown-required", "RFC 8489 §6.3.1", "an unknown comprehension-required attribute is 420", unknown_required),
    must(
        "unknown-list",
        "RFC 8489 §6.3.1.1",
        "a 420 lists every unknown attribute in UNKNOWN-ATTRIBUTES and no other",
        unknown_list,
    ),
    must("unknown-optional", "RFC 8489 §6.3", "an unknown comprehension-optional attribute is ignored", optional),
    must(
        "unknown-indication",
        "RFC 8489 §6.3.2",
        "an indication with an unknown comprehension-required attribute is discarded",
        unknown_indication,
    ),
    should("known-unexpected", "RFC 8489 §6.3", "a known attribute that has no business there is ignored", unexpected),
    must("duplicate", "RFC 8489 §14", "of two attributes of one type the first counts", duplicate),
    must("padding-ignored", "RFC 8489 §14", "the padding of attributes may be any bytes", padding),
    must("error-code", "RFC 8489 §6.3.1.1", "an error response holds ERROR-CODE with class and number", error_code),
    must("reason-phrase", "RFC 8489 §14.8", "the reason phrase is UTF-8 of at most 127 characters", reason),
    must("answer-id", "RFC 8489 §6", "the answer's transaction id and method are the request's", answer_id),
    should("software", "RFC 8656 §5", "answers to Allocate hold SOFTWARE", software),
    must("software-long", "RFC 8489 §14.14", "SOFTWARE of 763 bytes in a request is read", software_long),
    must("pipelined", "RFC 8489 §6.2", "several requests sent before the first answer are all answered", pipelined),
];

fn binding(lab: &Lab<'_>) -> Step {
    let reply = lab.stranger()?.ask(&Craft::request(BINDING))?;
    expect_code(&reply, 0)?;
    expect(reply.class() == SUCCESS, || format!("{reply}"))
}

fn mapped(lab: &Lab<'_>) -> Step {
    let mut client = lab.stranger()?;
    let first = client.ask(&Craft::request(BINDING))?.xor_address(A::XOR_MAPPED_ADDRESS);
    let second = client.ask(&Craft::request(BINDING))?.xor_address(A::XOR_MAPPED_ADDRESS);
    let Some(mapped) = first else { return fail("no readable XOR-MAPPED-ADDRESS") };
    // Behind a NAT it is another than ours; then at least it is always the same.
    expect(mapped == client.wire.local || second == first, || format!("{mapped}, then {second:?}"))?;
    expect(mapped.is_ipv4() == client.wire.server.is_ipv4(), || format!("{mapped} is of another family"))
}

fn source(lab: &Lab<'_>) -> Step {
    let mut client = lab.stranger()?;
    client.ask(&Craft::request(BINDING))?;
    let (source, server) = (client.wire.source, client.wire.server);
    expect(source == server, || format!("sent to {server}, answered from {source}"))
}

fn again(lab: &Lab<'_>) -> Step {
    let mut client = lab.stranger()?;
    let request = Craft::request(BINDING);
    let (first, second) = (client.ask(&request)?, client.ask(&request)?);
    expect(
        first.code() == second.code()
            && first.xor_address(A::XOR_MAPPED_ADDRESS) == second.xor_address(A::XOR_MAPPED_ADDRESS),
        || format!("{first}, then {second}"),
    )
}

/// Nothing comes back and the socket goes on being served.
fn ignored(lab: &Lab<'_>, bytes: &[u8]) -> Step {
    match lab.stranger()?.silence(bytes)? {
        Silence::Ignored => Ok(()),
        Silence::Closed => fail("the server closed the connection"),
    }
}

fn indication(lab: &Lab<'_>) -> Step {
    ignored(lab, Craft::indication(BINDING).bytes())
}

fn wrong_cookie(lab: &Lab<'_>) -> Step {
    let mut bytes = Craft::request(BINDING).into_bytes();
    bytes[7] ^= 1;
    ignored(lab, &bytes)
}

fn classic(lab: &Lab<'_>) -> Step {
    let mut bytes = Craft::request(BINDING).into_bytes();
    bytes[4..8].copy_from_slice(&[0x5A, 0x17, 0x33, 0x90]);
    ignored(lab, &bytes)
}

fn first_bits(lab: &Lab<'_>) -> Step {
    let mut bytes = Craft::request(BINDING).into_bytes();
    bytes[0] |= 0x80;
    ignored(lab, &bytes)
}

fn length_odd(lab: &Lab<'_>) -> Step {
    let mut bytes = Craft::request(BINDING).into_bytes();
    bytes[3] = 3;
    bytes.extend([0, 0, 0]);
    ignored(lab, &bytes)
}

fn length_long(lab: &Lab<'_>) -> Step {
    let mut bytes = Craft::request(BINDING).into_bytes();
    bytes[3] = 8;
    ignored(lab, &bytes)
}

fn length_short(lab: &Lab<'_>) -> Step {
    let mut bytes = Craft::request(BINDING).attr(A::SOFTWARE, b"abcd").into_bytes();
    bytes[3] = 0;
    ignored(lab, &bytes)
}

fn header_cut(lab: &Lab<'_>) -> Step {
    let bytes = Craft::request(BINDING).into_bytes();
    let mut client = lab.stranger()?;
    for len in [1, 2, 4, 8, 19] {
        client.silence(&bytes[..len])?;
    }
    Ok(())
}

fn overrun(lab: &Lab<'_>) -> Step {
    let mut bytes = Craft::request(BINDING).attr(A::SOFTWARE, b"abcd").into_bytes();
    bytes[23] = 0x20;
    let mut client = lab.stranger()?;
    // Silence is what RFC 8489 says; 400 does no harm.
    client.send(&bytes)?;
    let deadline = std::time::Instant::now() + lab.target.settle;
    match client.answer_to(&bytes[8..20], deadline) {
        Ok(Some(reply)) if reply.code() == 0 => fail("success"),
        _ => lab.alive(),
    }
}

fn method_unknown(lab: &Lab<'_>) -> Step {
    ignored(lab, Craft::request(0x0F5).bytes())
}

fn class_success(lab: &Lab<'_>) -> Step {
    ignored(lab, Craft::of(SUCCESS, BINDING).bytes())
}

fn class_error(lab: &Lab<'_>) -> Step {
    ignored(lab, Craft::of(ERROR, ALLOCATE).attr(A::ERROR_CODE, b"\0\0\x04\0").bytes())
}

fn class_wrong(lab: &Lab<'_>) -> Step {
    ignored(lab, Craft::indication(ALLOCATE).attr(A::REQUESTED_TRANSPORT, &UDP).bytes())
}

fn fingerprint_right(lab: &Lab<'_>) -> Step {
    let reply = lab.stranger()?.ask(&Craft::request(BINDING).attr(A::SOFTWARE, b"abc").fingerprint())?;
    expect_code(&reply, 0)
}

fn fingerprint_wrong(lab: &Lab<'_>) -> Step {
    let mut bytes = Craft::request(BINDING).fingerprint().into_bytes();
    if let Some(last) = bytes.last_mut() {
        *last ^= 1;
    }
    ignored(lab, &bytes)
}

fn fingerprint_length(lab: &Lab<'_>) -> Step {
    // A CRC over the header without the attribute's own length, as some early agents wrote it.
    let plain = Craft::request(BINDING);
    let crc = crc32fast::hash(plain.bytes()) ^ 0x5354_554E;
    ignored(lab, plain.word(A::FINGERPRINT, crc).bytes())
}

fn fingerprint_last(lab: &Lab<'_>) -> Step {
    let mut client = lab.stranger()?;
    for request in [Craft::request(BINDING).fingerprint(), Craft::request(ALLOCATE).fingerprint()] {
        let reply = client.ask(&request)?;
        let Some(value) = reply.word(A::FINGERPRINT) else { continue };
        expect(reply.types().last() == Some(A::FINGERPRINT.0), || "FINGERPRINT is not the last attribute".into())?;
        let bytes = reply.bytes();
        let expected = crc32fast::hash(&bytes[..bytes.len() - 8]) ^ 0x5354_554E;
        expect(value == expected, || "the server's FINGERPRINT is wrong".into())?;
    }
    Ok(())
}

fn unknown_required(lab: &Lab<'_>) -> Step {
    let reply = lab.stranger()?.ask(&Craft::request(BINDING).attr(UNKNOWN, b"what"))?;
    expect_code(&reply, 420)
}

/// The types in UNKNOWN-ATTRIBUTES.
pub(super) fn unknown_types(reply: &Reply) -> Vec<u16> {
    let value = reply.get(A::UNKNOWN_ATTRIBUTES).unwrap_or_default();
    let mut types: Vec<u16> = value.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect();
    types.sort_unstable();
    // RFC 3489 padded an odd number of types by repeating one.
    types.dedup();
    types
}

fn unknown_list(lab: &Lab<'_>) -> Step {
    let request = Craft::request(BINDING).attr(UNKNOWN, b"").attr(OPTIONAL, b"o").attr(ALSO_UNKNOWN, b"what");
    let reply = lab.stranger()?.ask(&request)?;
    expect_code(&reply, 420)?;
    let types = unknown_types(&reply);
    expect(types == [UNKNOWN.0, ALSO_UNKNOWN.0], || format!("UNKNOWN-ATTRIBUTES lists {types:#06x?}"))
}

fn optional(lab: &Lab<'_>) -> Step {
    let reply = lab.stranger()?.ask(&Craft::request(BINDING).attr(OPTIONAL, b"anything"))?;
    expect_code(&reply, 0)
}

fn unknown_indication(lab: &Lab<'_>) -> Step {
    ignored(lab, Craft::indication(BINDING).attr(UNKNOWN, b"what").bytes())
}

fn unexpected(lab: &Lab<'_>) -> Step {
    let reply = lab.stranger()?.ask(&Craft::request(BINDING).word(A::LIFETIME, 600))?;
    expect_code(&reply, 0)
}

fn duplicate(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    // The second is a protocol no server has: 442 if it counted. Refusing both is allowed.
    let reply = client.signed(lab.allocate().attr(A::REQUESTED_TRANSPORT, &[99, 0, 0, 0]))?;
    expect(matches!(reply.code(), 0 | 400), || format!("{reply}"))
}

fn padding(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let with = client.credentials.clone();
    let request = lab
        .allocate()
        .padded_with(A::SOFTWARE, b"a", 0xFF)
        .padded_with(A::USERNAME, &with.username, 0xEE)
        .padded_with(A::REALM, &with.realm, b' ')
        .padded_with(A::NONCE, &with.nonce, 0x80)
        .integrity(&with.key());
    expect_code(&client.ask(&request)?, 0)
}

fn error_code(lab: &Lab<'_>) -> Step {
    let reply = lab.stranger()?.ask(&lab.allocate())?;
    let value = reply.get(A::ERROR_CODE).unwrap_or_default();
    let right = matches!(value, [_, _, class, number, ..] if (3..=6).contains(&(class & 7)) && *number < 100);
    expect(right, || format!("ERROR-CODE of {} bytes: {value:02x?}", value.len()))
}

fn reason(lab: &Lab<'_>) -> Step {
    let reply = lab.stranger()?.ask(&lab.allocate())?;
    let phrase = reply.get(A::ERROR_CODE).and_then(|value| value.get(4..)).unwrap_or_default();
    let right = std::str::from_utf8(phrase).is_ok_and(|text| text.chars().count() < 128);
    expect(right, || format!("a reason phrase of {} bytes", phrase.len()))
}

fn answer_id(lab: &Lab<'_>) -> Step {
    let mut client = lab.stranger()?;
    for method in [BINDING, ALLOCATE] {
        let request = Craft::request(method);
        let reply = client.ask(&request)?;
        expect(reply.id() == request.id() && reply.method() == method, || format!("{reply}"))?;
    }
    Ok(())
}

fn software(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let reply = client.allocate(lab.allocate())?;
    expect(reply.has(A::SOFTWARE), || "no SOFTWARE".into())
}

fn software_long(lab: &Lab<'_>) -> Step {
    let reply = lab.stranger()?.ask(&Craft::request(BINDING).attr(A::SOFTWARE, &[b's'; 763]))?;
    expect_code(&reply, 0)
}

fn pipelined(lab: &Lab<'_>) -> Step {
    let mut client = lab.stranger()?;
    let requests: Vec<Craft> = (0..5).map(|_| Craft::request(BINDING)).collect();
    let together: Vec<u8> = requests.iter().flat_map(|request| request.bytes().to_vec()).collect();
    if client.is_stream() {
        client.send(&together)?;
    } else {
        requests.iter().try_for_each(|request| client.send(request.bytes()))?;
    }
    let mut waiting: Vec<_> = requests.iter().map(Craft::id).collect();
    while !waiting.is_empty() {
        let packet = client.next()?;
        waiting.retain(|id| packet.get(8..20) != Some(&id[..]));
    }
    Ok(())
}
