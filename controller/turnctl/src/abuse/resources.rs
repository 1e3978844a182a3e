//! E: taking more than one's share, and whether it comes back. The numbers are the operator's: see the flags.

use std::net::UdpSocket;
use std::time::Duration;

use turn_core::Transport;
use turn_core::wire::AttributeType as A;

use super::strangers::load_allowed;
use crate::conform::allocate::{EVEN, EVEN_AND_NEXT};
use crate::conform::check::{Check, On, Step, expect, must, not_applicable};
use crate::conform::client::{Client, expect_code};
use crate::conform::craft::{CHANNEL_BIND, CREATE_PERMISSION, Craft, REFRESH};
use crate::conform::lab::{Lab, Login};

const SECTION: &str = "abuse E";

pub(super) const CHECKS: &[Check] = &[
    must("resources-churn", SECTION, "100 allocations made and deleted on one 5-tuple", churn).alone(),
    must("resources-quota", "abuse E, RFC 8656 §7.2", "one allocation more than the user's quota is 486", quota)
        .alone(),
    must("resources-quota-freed", SECTION, "a deleted allocation frees its place in the quota", quota_freed).alone(),
    must("resources-quota-retransmitted", SECTION, "a retransmitted Allocate does not count twice", quota_again)
        .on(On::Datagrams)
        .alone(),
    must("resources-ports", "abuse E, RFC 8656 §7.2", "without a free port Allocate is 508", ports).alone(),
    must("resources-ports-freed", SECTION, "a deleted allocation frees its port at once", ports_freed).alone(),
    must("resources-even-port", SECTION, "EVEN-PORT leaves no port behind", even_port).alone(),
    must(
        "resources-reservations",
        SECTION,
        "reservations are bounded and end in an error, not in silence",
        reservations,
    )
    .alone(),
    must("resources-permissions", "abuse E, RFC 8656 §10.2", "one permission more than the limit is 508", permissions)
        .alone(),
    must("resources-channels", "abuse E, RFC 8656 §12.2", "one channel more than the limit is 508", channels).alone(),
    must("resources-peer-flood", SECTION, "a flood at one relayed port hurts no other allocation", peer_flood)
        .on(On::Only(Transport::Udp))
        .alone(),
];

fn churn(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    for round in 0..100 {
        let reply = client.signed(lab.allocate())?;
        expect(reply.code() == 0, || format!("round {round}: {reply}"))?;
        let reply = client.signed(Craft::request(REFRESH).word(A::LIFETIME, 0))?;
        expect(reply.code() == 0, || format!("round {round}: {reply}"))?;
    }
    lab.alive()
}

/// Allocations of one user until one is refused; the code of the refusal.
fn fill(lab: &Lab<'_>, user: &Login, most: u32, request: &Craft) -> Step<(Vec<Client>, u16)> {
    let mut held = Vec::new();
    for _ in 0..=most {
        let mut client = lab.client_of(user.clone())?;
        // Another id for each: the request is a pattern.
        let reply = client.signed(request.again())?;
        match (reply.code(), reply.xor_address(A::XOR_RELAYED_ADDRESS)) {
            (0, Some(relayed)) => {
                client.adopt(relayed);
                held.push(client);
            }
            (code, _) => return Ok((held, code)),
        }
    }
    Ok((held, 0))
}

/// Deletes them and waits until the server has done it.
fn release(held: Vec<Client>) -> Step {
    held.into_iter().try_for_each(|mut client| client.delete().map(drop))
}

fn quota_of(lab: &Lab<'_>) -> Step<u32> {
    load_allowed(lab)?;
    lab.target.bounds.user_quota.map_or_else(|| not_applicable("needs --user-quota"), Ok)
}

fn quota(lab: &Lab<'_>) -> Step {
    let most = quota_of(lab)?;
    let (held, code) = fill(lab, &lab.user(), most, &lab.allocate())?;
    let count = held.len();
    release(held)?;
    expect(code == 486 && count == most as usize, || format!("{code} after {count} allocations"))
}

fn quota_freed(lab: &Lab<'_>) -> Step {
    let most = quota_of(lab)?;
    let user = lab.user();
    let (mut held, _) = fill(lab, &user, most, &lab.allocate())?;
    if let Some(mut client) = held.pop() {
        client.delete()?;
    }
    let mut client = lab.client_of(user)?;
    let came = client.allocate(lab.allocate()).map(drop);
    drop(client);
    release(held)?;
    came
}

fn quota_again(lab: &Lab<'_>) -> Step {
    let most = quota_of(lab)?;
    let user = lab.user();
    let mut held = Vec::new();
    for _ in 0..most {
        let mut client = lab.client_of(user.clone())?;
        let request = client.credentials.sign(lab.allocate());
        for _ in 0..3 {
            let reply = client.ask(&request)?;
            expect_code(&reply, 0)?;
            if let Some(relayed) = reply.xor_address(A::XOR_RELAYED_ADDRESS) {
                client.adopt(relayed);
            }
        }
        held.push(client);
    }
    release(held)
}

fn ports_of(lab: &Lab<'_>) -> Step<u32> {
    load_allowed(lab)?;
    match (lab.target.bounds.relay_ports, lab.target.bounds.user_quota) {
        (None, _) => not_applicable("needs --relay-ports"),
        (Some(_), Some(_)) if matches!(lab.target.users, crate::conform::lab::Users::Fixed(..)) => {
            not_applicable("the user's quota is reached first: --secret gives more users")
        }
        (Some(ports), _) => Ok(ports),
    }
}

/// Takes every port, with as many users as it needs.
fn exhaust(lab: &Lab<'_>, ports: u32) -> Step<(Vec<Client>, u16)> {
    let mut held: Vec<Client> = Vec::new();
    loop {
        let (more, code) = fill(lab, &Lab::new(lab.target, lab.transport).user(), ports, &lab.allocate())?;
        let none = more.is_empty();
        held.extend(more);
        if code != 486 || none || held.len() > ports as usize {
            return Ok((held, code));
        }
    }
}

fn ports(lab: &Lab<'_>) -> Step {
    let ports = ports_of(lab)?;
    let (held, code) = exhaust(lab, ports)?;
    let count = held.len();
    release(held)?;
    expect(code == 508, || format!("{code} after {count} allocations"))?;
    lab.alive()
}

fn ports_freed(lab: &Lab<'_>) -> Step {
    let ports = ports_of(lab)?;
    let (mut held, code) = exhaust(lab, ports)?;
    expect(code == 508, || format!("{code} instead of 508"))?;
    let mut came = Ok(());
    for _ in 0..3 {
        if let Some(mut client) = held.pop() {
            client.delete()?;
        }
        let mut client = lab.client_of(Lab::new(lab.target, lab.transport).user())?;
        came = came.and(client.allocate(lab.allocate()).map(drop));
        held.push(client);
    }
    release(held.into_iter().filter(|client| client.relayed().is_ok()).collect())?;
    came
}

fn even_port(lab: &Lab<'_>) -> Step {
    let ports = ports_of(lab)?;
    let mut client = lab.client()?;
    for round in 0..ports * 2 {
        let reply = client.signed(lab.allocate().attr(A::EVEN_PORT, &EVEN))?;
        expect(reply.code() == 0, || format!("round {round}: {reply}"))?;
        client.expect(0, Craft::request(REFRESH).word(A::LIFETIME, 0))?;
    }
    Ok(())
}

fn reservations(lab: &Lab<'_>) -> Step {
    let ports = ports_of(lab)?;
    let mut client = lab.client()?;
    let mut code = 0;
    for _ in 0..=ports {
        let reply = client.signed(lab.allocate().attr(A::EVEN_PORT, &EVEN_AND_NEXT))?;
        code = reply.code();
        if code != 0 {
            break;
        }
        client.expect(0, Craft::request(REFRESH).word(A::LIFETIME, 0))?;
    }
    // A server may hold a reservation as long as its allocation lives; then there is nothing to exhaust.
    expect(matches!(code, 0 | 486 | 508), || format!("{code}"))?;
    lab.alive()
}

/// Fills a table of an allocation, one peer a time, up to its limit and one beyond.
fn beyond(lab: &Lab<'_>, most: Option<u32>, flag: &str, request: fn(u32) -> Craft) -> Step {
    load_allowed(lab)?;
    let Some(most) = most else { return not_applicable(format!("needs {flag}")) };
    let mut client = lab.allocation()?;
    if !client.relayed()?.is_ipv4() {
        return not_applicable("needs an IPv4 allocation");
    }
    for number in 0..most {
        let reply = client.signed(request(number))?;
        expect(reply.code() == 0, || format!("number {number}: {reply}"))?;
    }
    client.expect(508, request(most))?;
    // What is there can still be refreshed.
    client.expect(0, request(0)).map(drop)
}

/// A peer on the internet, another for each number. Nothing is sent there.
fn somebody(number: u32) -> std::net::SocketAddr {
    (std::net::Ipv4Addr::from_bits(u32::from_be_bytes([203, 1, 0, 0]) + number), 9).into()
}

fn permissions(lab: &Lab<'_>) -> Step {
    beyond(lab, lab.target.bounds.permissions, "--max-permissions", |number| {
        Craft::request(CREATE_PERMISSION).peer(somebody(number))
    })
}

fn channels(lab: &Lab<'_>) -> Step {
    beyond(lab, lab.target.bounds.channels, "--max-channels", |number| {
        let peer = std::net::SocketAddr::new(somebody(0).ip(), 1024 + number as u16);
        Craft::request(CHANNEL_BIND).channel(0x4000 + number as u16).peer(peer)
    })
}

fn peer_flood(lab: &Lab<'_>) -> Step {
    load_allowed(lab)?;
    let (victim, mut other) = (lab.allocation()?, lab.allocation()?);
    let peer = lab.peer()?;
    other.bind(0x4000, &peer)?;
    let (flooded, relayed) = (victim.relayed()?, other.relayed()?);
    let flooder = UdpSocket::bind((lab.target.peer_ip, 0))?;
    let mut lost = 0;
    for round in 0..50_u32 {
        for _ in 0..200 {
            flooder.send_to(&[0; 100], flooded)?;
        }
        other.send_on(0x4000, &round.to_be_bytes())?;
        let got = peer.receive(Duration::from_millis(200));
        lost += u32::from(got.is_none_or(|(data, from)| data != round.to_be_bytes() || from != relayed));
    }
    expect(lost == 0, || format!("{lost} of 50 packets were lost"))
}
