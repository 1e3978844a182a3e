//! What takes minutes to see: expiry of permissions, channels and allocations.

use std::time::Duration;

use super::check::{Check, Step, expect, must};
use super::craft::{CHANNEL_BIND, Craft, REFRESH};
use super::lab::Lab;

pub(super) const CHECKS: &[Check] = &[
    must("permission-lifetime", "RFC 8656 §9", "a permission ends after 300 s, whatever is sent", permission).slow(),
    must("channel-lifetime", "RFC 8656 §12", "a channel lasts 600 s, and its number is free afterwards", channel)
        .slow(),
    must("allocation-lifetime", "RFC 8656 §7.2", "an allocation of 600 s ends by itself", allocation).slow(),
];

fn permission(lab: &Lab<'_>) -> Step {
    let (mut client, peer) = (lab.allocation()?, lab.peer()?);
    client.permit(&peer)?;
    for _ in 0..5 {
        std::thread::sleep(Duration::from_secs(58));
        // Data must not refresh it (RFC 8656 §11.2).
        client.send_to(peer.address, b"alive")?;
        peer.must_get(b"alive", client.relayed()?, lab.target.patience)?;
    }
    std::thread::sleep(Duration::from_secs(15));
    client.send_to(peer.address, b"too late")?;
    peer.must_get_nothing(lab.target.settle)?;
    peer.send(client.relayed()?, b"too late")?;
    lab.settle();
    client.quiet().map(drop)
}

fn channel(lab: &Lab<'_>) -> Step {
    let (mut client, peer, other) = (lab.allocation()?, lab.peer()?, lab.peer()?);
    client.bind(0x4000, &peer)?;
    for _ in 0..4 {
        std::thread::sleep(Duration::from_secs(145));
        client.expect(0, Craft::request(REFRESH))?;
        client.permit(&peer)?;
    }
    client.send_on(0x4000, b"still bound")?;
    peer.must_get(b"still bound", client.relayed()?, lab.target.patience)?;
    std::thread::sleep(Duration::from_secs(25));
    client.send_on(0x4000, b"not any more")?;
    peer.must_get_nothing(lab.target.settle)?;
    let reply = client.signed(Craft::request(CHANNEL_BIND).channel(0x4000).peer(other.address))?;
    expect(reply.code() == 0, || format!("{reply}"))
}

fn allocation(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    std::thread::sleep(Duration::from_secs(590));
    client.expect(0, Craft::request(REFRESH).word(turn_core::wire::AttributeType::LIFETIME, 1))?;
    std::thread::sleep(Duration::from_secs(605));
    client.expect(437, Craft::request(REFRESH))?;
    client.forget();
    Ok(())
}
