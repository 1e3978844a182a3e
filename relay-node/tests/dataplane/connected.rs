//! A relayed address that keeps sending to one peer gets a socket for it; nobody notices.

use std::net::{SocketAddr, UdpSocket};

use anyhow::{Context, Result, ensure};
use relay_node::dataplane::{DataplaneConfig, RelayedMode};
use turn_core::Transport;
use turn_core::client::Event;
use turn_core::wire::attribute::Icmp;

use crate::client::{TurnClient, config, eventually, heard, peer, start};

/// Remote ports of the sockets at a port of 127.0.0.1 (proc_pid_net(5)); 0 for one that is not connected.
fn remotes(port: u16) -> Result<Vec<u16>> {
    let table = std::fs::read_to_string("/proc/self/net/udp").context("the sockets of this machine")?;
    let at = |address: &str| u16::from_str_radix(address.split(':').nth(1)?, 16).ok();
    let rows = table.lines().skip(1).filter_map(|row| {
        let mut columns = row.split_whitespace().skip(1);
        Some((at(columns.next()?)?, at(columns.next()?)?))
    });
    let mut remotes: Vec<u16> = rows.filter(|(local, _)| *local == port).map(|(_, remote)| remote).collect();
    remotes.sort_unstable();
    Ok(remotes)
}

/// An allocation with its peers.
struct Call {
    client: TurnClient,
    relayed: SocketAddr,
    sent: u32,
}

impl Call {
    /// The client says so many things to a peer, each of which arrives once, in order, from the relayed address.
    fn say(&mut self, to: &UdpSocket, count: u32) -> Result<()> {
        for _ in 0..count {
            self.sent += 1;
            self.client.send(to.local_addr()?, &self.sent.to_be_bytes())?;
            ensure!(heard(to)? == (self.relayed, self.sent.to_be_bytes().to_vec()), "packet {}", self.sent);
        }
        Ok(())
    }

    /// A peer says something, which arrives.
    fn hear(&mut self, from: &UdpSocket) -> Result<()> {
        self.sent += 1;
        from.send_to(&self.sent.to_be_bytes(), self.relayed)?;
        ensure!(
            self.client.receive()? == (from.local_addr()?, self.sent.to_be_bytes().to_vec()),
            "packet {}",
            self.sent
        );
        Ok(())
    }

    /// Its sockets are the first, and one connected to this peer.
    fn is_connected_to(&self, peer: &UdpSocket) -> Result<bool> {
        Ok(remotes(self.relayed.port())? == [0, peer.local_addr()?.port()])
    }
}

#[test]
fn a_peer_that_is_sent_to_again_and_again_gets_a_socket_and_others_are_heard() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let config = DataplaneConfig { relayed: RelayedMode::Sockets, ..config("127.1.0.33", 1, directory.path()) };
    let (dataplane, _changes) = start(&config)?;
    let mut client = TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice")?;
    let relayed = client.allocate()?;
    let [first, second] = [peer("127.0.0.1")?, peer("127.0.0.1")?];
    client.permit(first.local_addr()?)?;
    client.bind_channel(0x4001, first.local_addr()?)?;
    let mut call = Call { client, relayed, sent: 0 };

    call.say(&first, 40)?;
    ensure!(remotes(relayed.port())? == [0], "not for so few");
    call.say(&first, 40)?;
    eventually("a socket for the first peer", || call.is_connected_to(&first).ok()?.then_some(()))?;
    for _ in 0..3 {
        call.say(&first, 1)?;
        call.hear(&first)?;
        // The other one in between goes by the first socket, both ways.
        call.say(&second, 1)?;
        call.hear(&second)?;
    }
    ensure!(call.is_connected_to(&first)?, "it stays");

    // The call goes on with another peer, which takes the place.
    call.say(&second, 150)?;
    eventually("a socket for the second peer", || call.is_connected_to(&second).ok()?.then_some(()))?;
    call.hear(&first)?;
    call.hear(&second)?;

    // Nobody else can have the port while it is in use, and anybody once it is not.
    ensure!(UdpSocket::bind(relayed).is_err(), "the port is in use");
    let closed = second.local_addr()?;
    drop(second);
    call.client.send(closed, b"nobody")?;
    ensure!(call.client.event()? == Event::Icmp(closed, Icmp { kind: 3, code: 3, data: 0 }), "an ICMP error");
    call.client.delete()?;
    UdpSocket::bind(relayed).context("the port is free")?;
    Ok(())
}
