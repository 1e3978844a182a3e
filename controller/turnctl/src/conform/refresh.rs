//! RFC 8656 §8: refreshing and deleting.

use std::ops::RangeInclusive;

use turn_core::wire::AttributeType as A;

use super::allocate::{IPV4, IPV6};
use super::check::{Check, On, Step, expect, fail, must, should};
use super::client::expect_code;
use super::craft::{Craft, REFRESH};
use super::lab::Lab;
use super::reply::Reply;

pub(super) const CHECKS: &[Check] = &[
    must("refresh", "RFC 8656 §8.2", "Refresh succeeds and says the LIFETIME", |lab| {
        granted(lab, None, 600, u32::MAX)
    }),
    must("refresh-short", "RFC 8656 §8.2", "a LIFETIME below the default gives the default", |lab| {
        granted(lab, Some(5), 600, 3600)
    }),
    must("refresh-as-asked", "RFC 8656 §8.2", "a LIFETIME above the default is never exceeded", |lab| {
        granted(lab, Some(900), 600, 900)
    }),
    should("refresh-maximum", "RFC 8656 §8.2", "no lifetime is longer than an hour", |lab| {
        granted(lab, Some(u32::MAX), 600, 3600)
    }),
    must("delete", "RFC 8656 §8.2", "Refresh with LIFETIME 0 succeeds and says 0", delete),
    must("delete-at-once", "RFC 8656 §8.2", "after it the 5-tuple has no allocation: a Refresh is 437", deleted),
    must("delete-new", "RFC 8656 §8.2", "after it a new Allocate on the 5-tuple succeeds at once", renewed),
    must("delete-data", "RFC 8656 §8.2", "after it packets to the old relayed address reach nobody", unreachable),
    must("delete-channel", "RFC 8656 §8.2", "after it the channels are gone", channels_gone),
    must("delete-again", "RFC 8656 §8.2", "a retransmitted delete gets success or 437", delete_again).on(On::Datagrams),
    must("refresh-family", "RFC 8656 §8.2", "REQUESTED-ADDRESS-FAMILY of another family is 443", other_family),
    must("refresh-same-family", "RFC 8656 §8.2", "REQUESTED-ADDRESS-FAMILY of its own family succeeds", same_family),
    must("refresh-keeps", "RFC 8656 §8.2", "permissions outlive a Refresh", keeps),
];

fn granted(lab: &Lab<'_>, asked: Option<u32>, least: u32, most: u32) -> Step {
    let mut client = lab.allocation()?;
    expect_lifetime(Craft::request(REFRESH), asked, least..=most, |request| client.expect(0, request))
}

/// The answer to `request`, with a LIFETIME where one is `asked` for, grants one within `bounds`.
pub(super) fn expect_lifetime(
    request: Craft,
    asked: Option<u32>,
    bounds: RangeInclusive<u32>,
    ask: impl FnOnce(Craft) -> Step<Reply>,
) -> Step {
    let request = match asked {
        Some(seconds) => request.word(A::LIFETIME, seconds),
        None => request,
    };
    let granted = ask(request)?.word(A::LIFETIME);
    expect(granted.is_some_and(|granted| bounds.contains(&granted)), || format!("LIFETIME {granted:?}"))
}

fn delete(lab: &Lab<'_>) -> Step {
    let lifetime = lab.allocation()?.delete()?.word(A::LIFETIME);
    expect(lifetime == Some(0), || format!("LIFETIME {lifetime:?}"))
}

fn deleted(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    client.delete()?;
    client.expect(437, Craft::request(REFRESH)).map(drop)
}

fn renewed(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    client.delete()?;
    let reply = client.signed(lab.allocate())?;
    expect_code(&reply, 0)
}

fn unreachable(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let peer = lab.peer()?;
    client.permit(&peer)?;
    let relayed = client.relayed()?;
    client.delete()?;
    peer.send(relayed, b"nobody is there")?;
    lab.settle();
    client.quiet().map(drop)
}

fn channels_gone(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let peer = lab.peer()?;
    client.bind(0x4000, &peer)?;
    client.delete()?;
    client.send_on(0x4000, b"nobody relays this")?;
    peer.must_get_nothing(lab.target.settle)
}

fn delete_again(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let request = client.credentials.sign(Craft::request(REFRESH).word(A::LIFETIME, 0));
    expect_code(&client.ask(&request)?, 0)?;
    client.forget();
    let reply = client.ask(&request)?;
    expect(matches!(reply.code(), 0 | 437), || format!("{reply}"))
}

fn other_family(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let other = if client.relayed()?.is_ipv4() { IPV6 } else { IPV4 };
    client.expect(443, Craft::request(REFRESH).attr(A::REQUESTED_ADDRESS_FAMILY, &other))?;
    client.expect(0, Craft::request(REFRESH)).map(drop)
}

fn same_family(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let same = if client.relayed()?.is_ipv4() { IPV4 } else { IPV6 };
    client.expect(0, Craft::request(REFRESH).attr(A::REQUESTED_ADDRESS_FAMILY, &same)).map(drop)
}

fn keeps(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let peer = lab.peer()?;
    client.permit(&peer)?;
    client.expect(0, Craft::request(REFRESH))?;
    client.send_to(peer.address, b"still")?;
    match peer.receive(lab.target.patience) {
        Some((data, _)) if data == b"still" => Ok(()),
        _ => fail("the permission is gone"),
    }
}
