//! RFC 8489 §9.2.1 and §9.2.4 on SHA-256, anonymous user names and bid-down protection.

use turn_core::wire::AttributeType as A;

use super::check::{Check, Step, expect, fail, must, not_offered};
use super::client::{Client, expect_code};
use super::craft::{Craft, REFRESH};
use super::lab::Lab;
use super::reply::Reply;

/// PASSWORD-ALGORITHM values (RFC 8489 §18.5.1).
const MD5: [u8; 4] = [0, 1, 0, 0];
const SHA256: [u8; 4] = [0, 2, 0, 0];

pub(super) const CHECKS: &[Check] = &[
    must("algorithms-bit", "RFC 8489 §9.2.4", "PASSWORD-ALGORITHMS and its bit in the nonce come together", bit),
    must("algorithms-401", "RFC 8489 §9.2.4", "a 401 for an unknown user lists PASSWORD-ALGORITHMS too", on_401),
    must("algorithms-438", "RFC 8489 §9.2.4", "a 438 lists PASSWORD-ALGORITHMS too", on_438),
    must("sha256", "RFC 8489 §9.2.4", "SHA-256 authenticates, and the answer is signed by it", |lab| {
        let (client, reply) = with(lab, |client| Some((client.algorithms.clone()?, SHA256.to_vec())))?;
        expect_code(&reply, 0)?;
        signed(&client, &reply)
    }),
    must("sha256-again", "RFC 8489 §9.2.4", "what was allocated with SHA-256 is refreshed with it", again),
    must(
        "md5-chosen",
        "RFC 8489 §9.2.4",
        "MD5 chosen out of the list is answered with MESSAGE-INTEGRITY-SHA256",
        chosen,
    ),
    must("md5-silent", "RFC 8489 §9.2.4", "without any algorithm MD5 is taken", |lab| {
        let mut client = offered(lab)?;
        let reply = client.allocate(lab.allocate())?;
        super::auth::signed(&client, &reply)
    }),
    must("algorithm-alone", "RFC 8489 §9.2.4", "PASSWORD-ALGORITHM without the list is 400", |lab| {
        refused(lab, |_| Some((Vec::new(), SHA256.to_vec())))
    }),
    must("algorithms-alone", "RFC 8489 §9.2.4", "the list without PASSWORD-ALGORITHM is 400", |lab| {
        refused(lab, |client| Some((client.algorithms.clone()?, Vec::new())))
    }),
    must("algorithms-bid-down", "RFC 8489 §9.2.1", "a shortened list is 400", |lab| {
        refused(lab, |_| Some((MD5.to_vec(), MD5.to_vec())))
    }),
    must("algorithm-unlisted", "RFC 8489 §9.2.4", "an algorithm that is not in the list is 400", |lab| {
        refused(lab, |client| Some((client.algorithms.clone()?, vec![0, 9, 0, 0])))
    }),
    must("nonce-bid-down", "RFC 8489 §9.2.1", "a nonce whose feature bits were cleared is not valid", bits_cleared),
    must(
        "sha256-truncated",
        "RFC 8489 §14.6",
        "a MESSAGE-INTEGRITY-SHA256 of 12 bytes does not authenticate",
        truncated,
    ),
    must("sha256-unoffered", "RFC 8489 §9.2.4", "SHA-256 that was not offered does not authenticate", unoffered),
    must("userhash", "RFC 8489 §9.2.4", "USERHASH in the place of USERNAME authenticates", |lab| {
        expect_code(&hashed(lab, |_| {})?, 0)
    }),
    must("userhash-wrong", "RFC 8489 §9.2.4", "the USERHASH of nobody is 401", |lab| {
        expect_code(&hashed(lab, |hash| hash[0] ^= 1)?, 401)
    }),
];

/// Whether a security feature bit (0 or 1) is set in the nonce (RFC 8489 §18.1).
fn feature(nonce: &[u8], bit: u32) -> bool {
    const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let first = nonce.strip_prefix(b"obMatJos2").and_then(|rest| rest.first());
    let value = first.and_then(|first| BASE64.iter().position(|byte| byte == first)).unwrap_or(0);
    value & (0x20 >> bit) != 0
}

/// A client of a server that offers SHA-256.
fn offered(lab: &Lab<'_>) -> Step<Client> {
    let client = lab.client()?;
    match &client.algorithms {
        Some(list) if list.chunks_exact(4).any(|entry| entry == SHA256) => Ok(client),
        Some(_) => not_offered("SHA-256 is not in PASSWORD-ALGORITHMS"),
        None => not_offered("no PASSWORD-ALGORITHMS in the 401"),
    }
}

fn bit(lab: &Lab<'_>) -> Step {
    let client = lab.client()?;
    let (bit, list) = (feature(&client.credentials.nonce, 0), client.algorithms.is_some());
    expect(bit == list, || format!("the bit is {bit}, PASSWORD-ALGORITHMS {list}"))
}

fn on_401(lab: &Lab<'_>) -> Step {
    let mut client = offered(lab)?;
    client.credentials.username = b"nobody-of-this-name".to_vec();
    let request = client.credentials.sign(lab.allocate());
    let reply = client.ask(&request)?;
    expect_code(&reply, 401)?;
    expect(reply.has(A::PASSWORD_ALGORITHMS), || "it does not".into())
}

fn on_438(lab: &Lab<'_>) -> Step {
    let mut client = offered(lab)?;
    client.credentials.nonce = b"a nonce nobody gave out".to_vec();
    let request = client.credentials.sign(lab.allocate());
    let reply = client.ask(&request)?;
    expect_code(&reply, 438)?;
    expect(reply.has(A::PASSWORD_ALGORITHMS), || "it does not".into())
}

/// What a request holds as PASSWORD-ALGORITHMS and PASSWORD-ALGORITHM.
type Choose = fn(&Client) -> Option<(Vec<u8>, Vec<u8>)>;

/// An Allocate request with a list and an algorithm, either of which may be empty and is left out then.
fn with(lab: &Lab<'_>, choose: Choose) -> Step<(Client, Reply)> {
    let mut client = offered(lab)?;
    let (list, algorithm) = choose(&client).unwrap_or_default();
    let request = sha256(&client, lab.allocate(), &list, &algorithm);
    let reply = client.ask(&request)?;
    Ok((client, reply))
}

fn sha256(client: &Client, request: Craft, list: &[u8], algorithm: &[u8]) -> Craft {
    let mut request = client.credentials.names(request);
    for (attribute, value) in [(A::PASSWORD_ALGORITHMS, list), (A::PASSWORD_ALGORITHM, algorithm)] {
        if !value.is_empty() {
            request = request.attr(attribute, value);
        }
    }
    let key = if algorithm == MD5 { client.credentials.key() } else { client.credentials.key_sha256() };
    request.integrity_sha256(&key, 32)
}

fn signed(client: &Client, reply: &Reply) -> Step {
    expect(reply.signed_by_sha256(&client.credentials.key_sha256()), || {
        format!("{reply} without a right MESSAGE-INTEGRITY-SHA256")
    })
}

fn again(lab: &Lab<'_>) -> Step {
    let (mut client, reply) = with(lab, |client| Some((client.algorithms.clone()?, SHA256.to_vec())))?;
    expect_code(&reply, 0)?;
    let list = client.algorithms.clone().unwrap_or_default();
    let request = sha256(&client, Craft::request(REFRESH), &list, &SHA256);
    let reply = client.ask(&request)?;
    expect_code(&reply, 0)?;
    signed(&client, &reply)
}

fn chosen(lab: &Lab<'_>) -> Step {
    let mut client = offered(lab)?;
    let list = client.algorithms.clone().unwrap_or_default();
    if !list.chunks_exact(4).any(|entry| entry == MD5) {
        return not_offered("MD5 is not in the list");
    }
    let request = sha256(&client, lab.allocate(), &list, &MD5);
    let reply = client.ask(&request)?;
    expect_code(&reply, 0)?;
    expect(reply.signed_by_sha256(&client.credentials.key()), || "it is not".into())
}

fn refused(lab: &Lab<'_>, choose: Choose) -> Step {
    expect_code(&with(lab, choose)?.1, 400)
}

fn bits_cleared(lab: &Lab<'_>) -> Step {
    let mut client = offered(lab)?;
    // What an attacker would do to make the client believe that the server is an old one.
    client.credentials.nonce[9..13].copy_from_slice(b"AAAA");
    let request = client.credentials.sign(lab.allocate());
    let reply = client.ask(&request)?;
    match reply.code() {
        438 | 401 | 400 => Ok(()),
        0 => fail("it was accepted"),
        code => fail(format!("{code}")),
    }
}

fn truncated(lab: &Lab<'_>) -> Step {
    let mut client = offered(lab)?;
    let list = client.algorithms.clone().unwrap_or_default();
    let request = client.credentials.names(lab.allocate());
    let request = request.attr(A::PASSWORD_ALGORITHMS, &list).attr(A::PASSWORD_ALGORITHM, &SHA256);
    let request = request.integrity_sha256(&client.credentials.key_sha256(), 12);
    let reply = client.ask(&request)?;
    expect(matches!(reply.code(), 400 | 401), || format!("{reply}"))
}

fn unoffered(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    if client.algorithms.is_some() {
        return not_offered("SHA-256 is offered: see the checks on it");
    }
    let request = client.credentials.names(lab.allocate()).attr(A::PASSWORD_ALGORITHM, &SHA256);
    let request = request.integrity_sha256(&client.credentials.key_sha256(), 32);
    let reply = client.ask(&request)?;
    expect(matches!(reply.code(), 400 | 401 | 420), || format!("{reply}"))
}

fn hashed(lab: &Lab<'_>, change: fn(&mut Vec<u8>)) -> Step<Reply> {
    let mut client = offered(lab)?;
    if !feature(&client.credentials.nonce, 1) {
        return not_offered("the nonce lacks the bit of anonymous user names");
    }
    let mut hash = client.credentials.userhash();
    change(&mut hash);
    let list = client.algorithms.clone().unwrap_or_default();
    let request = lab
        .allocate()
        .attr(A::USERHASH, &hash)
        .attr(A::REALM, &client.credentials.realm)
        .attr(A::NONCE, &client.credentials.nonce)
        .attr(A::PASSWORD_ALGORITHMS, &list)
        .attr(A::PASSWORD_ALGORITHM, &SHA256)
        .integrity_sha256(&client.credentials.key_sha256(), 32);
    client.ask(&request)
}
