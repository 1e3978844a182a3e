//! Limits and floods over real sockets (abuse.md E).

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use relay_node::dataplane::Dataplane;
use turn_core::{Limits, Settings, Transport};

use crate::client::{TurnClient, config, dropped, eventually, heard, peer, settings, start};

fn limited(ip: &str, limits: Limits) -> Result<(Dataplane, tempfile::TempDir)> {
    let directory = tempfile::tempdir()?;
    let settings = Arc::new(Settings { limits, ..Settings::clone(&settings()) });
    let (dataplane, _changes) = Dataplane::start(config(ip, 2, directory.path()), settings, Vec::new())?;
    Ok((dataplane, directory))
}

#[test]
fn bandwidth_is_cut_per_allocation_user_and_node() -> Result<()> {
    let none = Limits::default();
    let cases = [
        ("127.1.6.1", Limits { bytes_per_allocation: 20_000, ..none.clone() }, 2),
        ("127.1.6.2", Limits { bytes_per_user: 20_000, ..none.clone() }, 1),
        ("127.1.6.3", Limits { bytes_per_node: 20_000, ..none }, 1),
    ];
    for (ip, limits, shares) in cases {
        let (dataplane, _directory) = limited(ip, limits)?;
        let peer = peer("127.0.0.1")?;
        peer.set_nonblocking(true)?;
        let mut clients = Vec::new();
        for _ in 0..2 {
            let mut client = TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice")?;
            client.allocate()?;
            client.permit(peer.local_addr()?)?;
            clients.push(client);
        }
        // 200 packets of 1000 bytes with headers, at once: a second's burst of each share is 20 of them.
        let began = Instant::now();
        for _ in 0..100 {
            for client in &mut clients {
                client.send(peer.local_addr()?, &[7; 972])?;
            }
        }
        let lost = eventually("most are dropped", || {
            let count = dropped(&dataplane, "bandwidth");
            (count >= 100).then_some(count)
        })?;
        let mut arrived = 0;
        while heard(&peer).is_ok() {
            arrived += 1;
        }
        let allowed = shares * (22 + 20 * (began.elapsed().as_secs() + 1));
        assert!((20 * shares..=allowed).contains(&arrived), "{ip}: {arrived} arrived, {lost} dropped");
        clients[0].bind_channel(0x4000, peer.local_addr()?)?;
    }
    Ok(())
}

#[test]
fn permissions_and_channels_have_their_bounds() -> Result<()> {
    let limits = Limits { permissions_per_allocation: 3, channels_per_allocation: 2, ..Limits::default() };
    let (dataplane, _directory) = limited("127.1.6.4", limits)?;
    let mut client = TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice")?;
    client.allocate()?;
    for number in 1..=2u16 {
        client.bind_channel(0x4000 + number, format!("127.0.0.{number}:9").parse()?)?;
    }
    let refused = client.bind_channel(0x4003, "127.0.0.3:9".parse()?).expect_err("a channel too many");
    assert!(refused.to_string().contains("508"), "{refused}");
    client.permit("127.0.0.3:9".parse()?)?;
    let refused = client.permit("127.0.0.4:9".parse()?).expect_err("a permission too many");
    assert!(refused.to_string().contains("508"), "{refused}");
    Ok(())
}

#[test]
fn a_flood_at_one_relayed_port_hurts_no_other_call() -> Result<()> {
    const PACKETS: u32 = 400;
    let directory = tempfile::tempdir()?;
    // One worker: what is flooded and what is called share everything but the socket.
    let (dataplane, _changes) = start(&config("127.1.6.5", 1, directory.path()))?;
    let mut victim = TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice")?;
    let mut call = TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "bob")?;
    let (flooded, relayed) = (victim.allocate()?, call.allocate()?);
    let speaker = peer("127.0.0.1")?;
    let address = speaker.local_addr()?;
    call.bind_channel(0x4000, address)?;
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let flood = {
        let stop = Arc::clone(&stop);
        let stranger = peer("127.0.0.66")?;
        std::thread::spawn(move || {
            let mut sent = 0u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                sent += u64::from(stranger.send_to(&[0; 1200], flooded).is_ok());
            }
            sent
        })
    };
    eventually("the flood arrives", || (dropped(&dataplane, "no_permission") > 1000).then_some(()))?;
    for number in 0..PACKETS {
        speaker.send_to(&number.to_be_bytes(), relayed)?;
        assert_eq!(call.receive()?, (address, number.to_be_bytes().to_vec()));
        call.send(address, &number.to_be_bytes())?;
        assert_eq!(heard(&speaker)?, (relayed, number.to_be_bytes().to_vec()));
        std::thread::sleep(Duration::from_millis(1));
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let sent = flood.join().expect("the flood");
    assert!(sent > u64::from(PACKETS), "{sent}");
    Ok(())
}
