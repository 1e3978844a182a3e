//! Pairs of clients on one node meet in memory under the rules of packets that cross the kernel; and who floods a relayed
//! address takes nothing from others.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};
use relay_node::dataplane::{Dataplane, shard};
use turn_core::{Limits, Settings, Transport};

use crate::client::{TurnClient, config, dropped, eventually, heard, peer, settings, start};

/// Two clients, of one worker or of two.
fn pair(dataplane: &Dataplane, apart: bool) -> Result<[TurnClient; 2]> {
    let client = |worker| {
        eventually("a port of that worker", || {
            let client = TurnClient::to(dataplane, Transport::Udp, "127.0.0.1", "alice").ok()?;
            (shard::worker(client.local().ok()?, 2).0 == worker).then_some(client)
        })
    };
    Ok([client(0)?, client(u16::from(apart))?])
}

fn count(dataplane: &Dataplane, direction: usize) -> (u64, u64) {
    let snapshots = dataplane.snapshots();
    snapshots
        .iter()
        .fold((0, 0), |(packets, bytes), worker| (packets + worker.packets[direction], bytes + worker.bytes[direction]))
}

#[test]
fn both_allocations_of_a_pair_are_asked_and_counted() -> Result<()> {
    for (ip, apart) in [("127.1.16.1", false), ("127.1.16.2", true)] {
        let directory = tempfile::tempdir()?;
        let (dataplane, _changes) = start(&config(ip, 2, directory.path()))?;
        let [mut alice, mut bob] = pair(&dataplane, apart)?;
        let (of_alice, of_bob) = (alice.allocate()?, bob.allocate()?);
        // Alice may send to bob, but bob has not said that he takes it.
        alice.bind_channel(0x4000, of_bob)?;
        for _ in 0..7 {
            alice.send(of_bob, b"unasked")?;
        }
        eventually("bob's permissions count", || (dropped(&dataplane, "no_permission") == 7).then_some(()))?;
        // Bob may send to nobody: his own side refuses it.
        bob.send(of_alice, b"not permitted")?;
        eventually("the sender's too", || (dropped(&dataplane, "no_permission") == 8).then_some(()))?;
        bob.permit(of_alice)?;
        for number in 0..50u32 {
            alice.send(of_bob, &number.to_be_bytes())?;
            assert_eq!(bob.receive()?, (of_alice, number.to_be_bytes().to_vec()));
            bob.send(of_alice, b"six by")?;
            assert_eq!(alice.receive()?, (of_bob, b"six by".to_vec()));
        }
        // What alice sent left her allocation, whatever bob's said of it; both have 50 packets each way beside that.
        let counted = || {
            let (to_peer, to_client) = (count(&dataplane, 0), count(&dataplane, 1));
            (to_peer == (107, 7 * 7 + 50 * 10) && to_client == (100, 50 * 10)).then_some(())
        };
        eventually("both directions of both are counted", counted)?;
    }
    Ok(())
}

#[test]
fn the_bandwidth_of_both_allocations_of_a_pair_is_kept() -> Result<()> {
    // A burst of 20 packets of 1000 bytes with headers.
    let limits = Limits { bytes_per_allocation: 20_000, ..Limits::default() };
    for (ip, apart) in [("127.1.16.3", false), ("127.1.16.4", true)] {
        let directory = tempfile::tempdir()?;
        let settings = Arc::new(Settings { limits: limits.clone(), ..Settings::clone(&settings()) });
        let (dataplane, _changes) = Dataplane::start(config(ip, 2, directory.path()), settings, Vec::new())?;
        let [mut alice, mut bob] = pair(&dataplane, apart)?;
        let [mut carol, _] = pair(&dataplane, apart)?;
        let of_bob = bob.allocate()?;
        for sender in [&mut alice, &mut carol] {
            let relayed = sender.allocate()?;
            bob.permit(relayed)?;
            sender.bind_channel(0x4000, of_bob)?;
        }
        // Each is within its own burst; together they are beyond what bob may get.
        for _ in 0..16 {
            alice.send(of_bob, &[7; 972])?;
            carol.send(of_bob, &[7; 972])?;
        }
        let lost =
            eventually("bob's limit is kept", || Some(dropped(&dataplane, "bandwidth")).filter(|lost| *lost > 0))?;
        assert!(count(&dataplane, 0).0 <= 32 && lost <= 13, "{lost} dropped");
        eventually("the senders are within theirs", || (count(&dataplane, 0).0 == 32).then_some(()))?;
        // Beyond her own burst alice is stopped before she troubles bob.
        let began = Instant::now();
        for _ in 0..100 {
            alice.send(of_bob, &[7; 972])?;
        }
        eventually("alice's limit is kept", || (dropped(&dataplane, "bandwidth") >= lost + 40).then_some(()))?;
        let allowed = 32 + 22 + 20 * (began.elapsed().as_secs() + 1);
        assert!(count(&dataplane, 0).0 <= allowed, "{:?} left her", count(&dataplane, 0));
    }
    Ok(())
}

#[test]
fn a_flooded_relayed_address_leaves_others_their_turn() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&config("127.1.16.5", 1, directory.path()))?;
    let mut victim = TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice")?;
    let flooded = victim.allocate()?;
    let mut other = TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "bob")?;
    let relayed = other.allocate()?;
    let peer = peer("127.0.0.1")?;
    other.bind_channel(0x4000, peer.local_addr()?)?;
    let stopped = AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<()> {
        // Without a permission: the worker has nothing to send, and the flood never waits for it.
        for _ in 0..2 {
            scope.spawn(|| {
                let Ok(flooder) = std::net::UdpSocket::bind("127.0.0.1:0") else { return };
                while !stopped.load(Ordering::Relaxed) {
                    // What does not fit is lost.
                    let _ = flooder.send_to(b"flood", flooded);
                }
            });
        }
        let mut talk = || -> Result<()> {
            for number in 0..300u32 {
                other.send(peer.local_addr()?, &number.to_be_bytes())?;
                assert_eq!(heard(&peer)?, (relayed, number.to_be_bytes().to_vec()));
                peer.send_to(&number.to_be_bytes(), relayed)?;
                assert_eq!(other.receive()?, (peer.local_addr()?, number.to_be_bytes().to_vec()));
            }
            Ok(())
        };
        let talked = talk();
        stopped.store(true, Ordering::Relaxed);
        talked.context("beside a flood")
    })?;
    let floods =
        eventually("the flood was seen", || Some(dropped(&dataplane, "no_permission")).filter(|seen| *seen > 0))?;
    assert!(floods > 600, "{floods} packets are no flood");
    Ok(())
}
