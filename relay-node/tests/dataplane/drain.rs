//! Clients that are sent elsewhere, and the end of what cannot outlive the process.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use relay_node::certificates::{CertificateFiles, Certificates};
use relay_node::dataplane::{Dataplane, DataplaneConfig, Listen, StreamConfig};
use turn_core::{Alternate, Change, EndReason, Settings, Transport};

use crate::authority::Authority;
use crate::client::{self, TurnClient, again, config, eventually, settings, start};

fn to(transport: Transport, address: &str) -> Alternate {
    Alternate { transport, address: address.parse().expect("literal"), relays_ipv6: false }
}

fn drain(dataplane: &Dataplane) -> Result<()> {
    // A client over IPv6 asks for a relayed address of IPv6.
    let v6 = Alternate { relays_ipv6: true, ..to(Transport::Udp, "[::1]:9") };
    let alternates = vec![to(Transport::Udp, "127.9.9.9:3478"), to(Transport::Tcp, "127.9.9.9:3478"), v6];
    dataplane.configure(Arc::new(Settings { draining: true, alternates, ..(*settings()).clone() }));
    // What is asked next is answered after that.
    runtime()?.block_on(dataplane.records());
    Ok(())
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().build()?)
}

fn redirected(dataplane: &Dataplane) -> u64 {
    dataplane.snapshots().iter().map(|worker| worker.redirected[0]).sum()
}

#[test]
fn new_clients_are_sent_elsewhere_and_those_that_do_not_follow_are_served() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&config("127.1.8.1", 2, directory.path()))?;
    let mut held = TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice")?;
    held.allocate()?;
    drain(&dataplane)?;
    for (transport, local) in [(Transport::Udp, "127.0.0.1"), (Transport::Tcp, "127.0.0.1"), (Transport::Udp, "::1")] {
        let mut client = TurnClient::to(&dataplane, transport, local, "alice")?;
        assert_eq!(client.refused()?, 300, "{transport:?} from {local}");
        // The same socket asks again.
        client.allocate().with_context(|| format!("{transport:?} from {local}"))?;
        client.delete()?;
    }
    // Another socket of the same IP, whichever worker has it: a client that gave up at its 300 comes back.
    for transport in [Transport::Udp, Transport::Tcp] {
        eventually("the voucher is taken", || {
            let mut client = TurnClient::to(&dataplane, transport, "127.0.0.1", "alice").ok()?;
            client.allocate().ok()
        })?;
    }
    held.delete().context("what exists goes on")?;
    eventually("they are counted", || (redirected(&dataplane) >= 3).then_some(()))?;
    Ok(())
}

#[test]
fn allocations_are_counted_by_transport() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&config("127.1.8.2", 2, directory.path()))?;
    let mut clients = Vec::new();
    for transport in [Transport::Udp, Transport::Udp, Transport::Tcp] {
        let mut client = TurnClient::to(&dataplane, transport, "127.0.0.1", "alice")?;
        client.allocate()?;
        clients.push(client);
    }
    let counts = || {
        let snapshots = dataplane.snapshots();
        [0, 1, 2, 3].map(|index| snapshots.iter().map(|worker| worker.by_transport[index]).sum::<u64>())
    };
    eventually("all are counted", || (counts() == [2, 1, 0, 0]).then_some(()))?;
    clients[0].delete()?;
    clients.pop();
    eventually("and their ends", || (counts() == [1, 0, 0, 0]).then_some(()))?;
    Ok(())
}

/// Client, and whether the relay has said that nothing follows.
fn is_told(client: &mut TurnClient) -> Result<()> {
    match client.event() {
        Err(error) => {
            let text = format!("{error:#}");
            // The end of a stream (rustls tells one without close_notify apart), or of a DTLS session.
            let told = text.contains("closed") || text.contains("session has been shut down");
            if told { Ok(()) } else { bail!("not orderly: {text}") }
        }
        Ok(event) => bail!("still there: {event:?}"),
    }
}

#[test]
fn streams_and_sessions_end_in_order_and_udp_goes_on_after_the_restart() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let authority = Authority::new(directory.path())?;
    let (certificate, key) = {
        let files = authority.issue("a", &["turn.example.org"])?;
        (files.certificate, files.key)
    };
    let certificates = Certificates::load(&[CertificateFiles { certificate, key }]).map_err(|(_, error)| error)?;
    let ip = "127.1.8.3";
    let listen = |transport| Ok::<_, anyhow::Error>(Listen { transport, bind: format!("{ip}:0").parse()? });
    let streams = StreamConfig { certificates: Some(Arc::new(certificates)), ..StreamConfig::default() };
    let listen =
        vec![listen(Transport::Udp)?, listen(Transport::Tcp)?, listen(Transport::Tls)?, listen(Transport::Dtls)?];
    let config = DataplaneConfig { listen, streams, ..config(ip, 2, &directory.path().join("journal")) };
    std::fs::create_dir(&config.journal)?;
    let (dataplane, mut changes) = start(&config)?;
    let at = |transport| dataplane.listen().iter().find(|l| l.transport == transport).map(|l| l.bind).context("bound");

    let mut udp = TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice")?;
    udp.allocate()?;
    let mut sessions = vec![
        TurnClient::to(&dataplane, Transport::Tcp, "127.0.0.1", "alice")?,
        authority.turn_client(at(Transport::Tls)?, "turn.example.org", "alice")?,
        TurnClient::new(Transport::Dtls, "127.0.0.1", at(Transport::Dtls)?, "alice")?,
    ];
    for client in &mut sessions {
        client.allocate()?;
    }
    client::hear(&mut changes);
    let again = again(&config, &dataplane);
    runtime()?.block_on(dataplane.end_sessions());
    // Their ends are told, and in the journal, when it is done.
    let mut ended = 0;
    while let Ok(change) = changes.try_recv() {
        if let Change::End { reason, .. } = change {
            assert_eq!(reason, EndReason::Closed);
            ended += 1;
        }
    }
    assert_eq!(ended, 3);
    for client in &mut sessions {
        is_told(client)?;
    }
    dataplane.stop();
    let (_dataplane, _changes) = start(&again)?;
    udp.delete().context("the UDP client notices nothing")?;
    Ok(())
}
