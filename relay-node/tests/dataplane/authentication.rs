//! How many strangers are answered, and whom that leaves alone (abuse.md D).

use std::net::UdpSocket;
use std::sync::Arc;

use anyhow::{Result, ensure};
use relay_node::dataplane::Dataplane;
use turn_core::client::Event;
use turn_core::{Settings, Transport};

use crate::client::{TurnClient, config, dropped, eventually, settings};

/// The smallest Allocate there is.
const BARE_ALLOCATE: &[u8] = b"\x00\x03\x00\x00\x21\x12\xA4\x42abcdefghijkl";

#[test]
fn a_prefix_that_floods_silences_itself_and_nobody_else() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut limited = Settings::clone(&settings());
    limited.limits.strangers_per_prefix = 200;
    let (dataplane, _changes) =
        Dataplane::start(config("127.1.0.41", 1, directory.path()), Arc::new(limited), Vec::new())?;
    let mut holder = TurnClient::to(&dataplane, Transport::Udp, "127.77.0.1", "alice")?;
    holder.allocate()?;

    // Sources all over one /24, far more a second than it may have answered, for as long as the others need.
    let relay = dataplane.listen()[0].bind;
    let flooders: Vec<UdpSocket> = (2..18)
        .map(|host| UdpSocket::bind(("127.77.0.".to_owned() + &host.to_string(), 0)))
        .collect::<Result<_, _>>()?;
    let flood = || -> Result<()> {
        for _ in 0..60 {
            for flooder in &flooders {
                flooder.send_to(BARE_ALLOCATE, relay)?;
            }
        }
        Ok(())
    };
    flood()?;
    eventually("the flood is noticed", || (dropped(&dataplane, "too_many_strangers") > 200).then_some(()))?;
    for _ in 0..20 {
        flood()?;
        let event = holder.perform(|client, now| client.refresh(now, 600))?;
        ensure!(event == Event::Refreshed(600), "{event:?}");
        TurnClient::to(&dataplane, Transport::Udp, "127.78.0.1", "bob")?.allocate()?;
        // A connection has shown where it comes from.
        TurnClient::to(&dataplane, Transport::Tcp, "127.77.0.1", "bob")?.allocate()?;
    }
    Ok(())
}
