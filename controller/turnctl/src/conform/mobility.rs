//! RFC 8016, mobility, and RFC 7635, third-party authorization.

use turn_core::wire::AttributeType as A;

use super::check::{Check, Step, expect, fail, must, not_offered};
use super::client::{Client, expect_code};
use super::craft::{Craft, REFRESH};
use super::lab::{Lab, Login};
use super::stun::unknown_types;

pub(super) const CHECKS: &[Check] = &[
    must("mobility-ticket", "RFC 8016 §3.1.2", "an empty MOBILITY-TICKET gives a ticket, 405, or is ignored", |lab| {
        mobile(lab).map(drop)
    }),
    must("mobility-not-empty", "RFC 8016 §3.1.2", "a MOBILITY-TICKET with a value in an Allocate is 400", |lab| {
        drop(mobile(lab)?);
        lab.client()?.expect(400, lab.allocate().attr(A::MOBILITY_TICKET, b"what is this")).map(drop)
    }),
    must(
        "mobility-move",
        "RFC 8016 §3.2.2",
        "Refresh with the ticket from a new address succeeds with a new ticket",
        |lab| moved(lab).map(drop),
    ),
    must("mobility-data", "RFC 8016 §3.2.2", "after the move data passes on the new 5-tuple", data),
    must("mobility-forged", "RFC 8016 §3.2.2", "a forged ticket is 400", |lab| {
        let (_first, mut ticket) = mobile(lab)?;
        if let Some(last) = ticket.last_mut() {
            *last ^= 1;
        }
        lab.client()?.expect(400, Craft::request(REFRESH).attr(A::MOBILITY_TICKET, &ticket)).map(drop)
    }),
    must("mobility-same-address", "RFC 8016 §3.2.2", "the ticket from the allocation's own address is 400", |lab| {
        let (mut client, ticket) = mobile(lab)?;
        client.expect(400, Craft::request(REFRESH).attr(A::MOBILITY_TICKET, &ticket)).map(drop)
    }),
    must("mobility-gone", "RFC 8016 §3.2.2", "the ticket of a deleted allocation is 437", |lab| {
        let (mut client, ticket) = mobile(lab)?;
        client.delete()?;
        let mut other = lab.client_of(user_of(&client))?;
        other.expect(437, Craft::request(REFRESH).attr(A::MOBILITY_TICKET, &ticket)).map(drop)
    }),
    must("mobility-thief", "RFC 8016 §3.2.2", "another user's Refresh with the ticket is 441", |lab| {
        let (mut owner, ticket) = mobile(lab)?;
        let mut thief = lab.client_of(lab.other_user()?)?;
        thief.expect(441, Craft::request(REFRESH).attr(A::MOBILITY_TICKET, &ticket))?;
        owner.expect(0, Craft::request(REFRESH)).map(drop)
    }),
    must("token-declined", "RFC 7635 §9", "an ACCESS-TOKEN that is not valid does not authenticate", token),
    must("token-named", "RFC 7635 §6.1", "who takes tokens names the authorization server in the 401", named),
];

fn user_of(client: &Client) -> Login {
    let credentials = &client.credentials;
    Login { username: credentials.username.clone(), password: credentials.password.clone() }
}

/// A client with an allocation that can move, and its ticket.
fn mobile(lab: &Lab<'_>) -> Step<(Client, Vec<u8>)> {
    let mut client = lab.client()?;
    let reply = client.signed(lab.allocate().attr(A::MOBILITY_TICKET, &[]))?;
    match (reply.code(), reply.get(A::MOBILITY_TICKET)) {
        (405, _) => not_offered("forbidden with 405"),
        (0, None) => not_offered("ignored"),
        (0, Some([])) => fail("an empty ticket"),
        (0, Some(ticket)) => {
            let ticket = ticket.to_vec();
            if let Some(relayed) = reply.xor_address(A::XOR_RELAYED_ADDRESS) {
                client.adopt(relayed);
            }
            Ok((client, ticket))
        }
        (code, _) => fail(format!("{code}")),
    }
}

/// The client at its new address, and the one it was.
fn moved(lab: &Lab<'_>) -> Step<(Client, Client)> {
    let (mut old, ticket) = mobile(lab)?;
    let relayed = old.relayed()?;
    let mut new = lab.client_of(user_of(&old))?;
    let reply = new.expect(0, Craft::request(REFRESH).attr(A::MOBILITY_TICKET, &ticket))?;
    match reply.get(A::MOBILITY_TICKET) {
        Some(fresh) if fresh != ticket => {}
        Some(_) => return fail("the ticket is the old one"),
        None => return fail("no new ticket"),
    }
    old.forget();
    new.adopt(relayed);
    Ok((new, old))
}

fn data(lab: &Lab<'_>) -> Step {
    let (mut new, _old) = moved(lab)?;
    let peer = lab.peer()?;
    new.permit(&peer)?;
    new.send_to(peer.address, b"from elsewhere")?;
    peer.must_get(b"from elsewhere", new.relayed()?, lab.target.patience)?;
    peer.send(new.relayed()?, b"to elsewhere")?;
    new.must_get(peer.address, b"to elsewhere")
}

fn token(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let request = lab.allocate().attr(A::ACCESS_TOKEN, &[7; 64]);
    // Signed by a key that nobody sealed into a token.
    let mut forged = client.credentials.clone();
    forged.password = b"not the password".to_vec();
    let reply = client.ask(&forged.sign(request))?;
    expect(matches!(reply.code(), 400 | 401 | 420), || format!("{reply}"))?;
    let with_password = client.credentials.sign(lab.allocate().attr(A::ACCESS_TOKEN, &[7; 64]));
    let reply = client.ask(&with_password)?;
    match reply.code() {
        420 if unknown_types(&reply) == [A::ACCESS_TOKEN.0] => not_offered("declined with 420"),
        0 => fail("a token of nobody was passed over"),
        _ => Ok(()),
    }
}

fn named(lab: &Lab<'_>) -> Step {
    let reply = lab.stranger()?.ask(&lab.allocate())?;
    expect_code(&reply, 401)?;
    match reply.get(A::THIRD_PARTY_AUTHORIZATION) {
        None => not_offered("no THIRD-PARTY-AUTHORIZATION in the 401"),
        Some(name) => expect(std::str::from_utf8(name).is_ok_and(|name| !name.is_empty()), || "it has no name".into()),
    }
}
