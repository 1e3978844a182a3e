//! The ledger says what was sent (P11): through a kill, an orderly restart and a lost state directory, as `turnctl usage`
//! shows it.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use harness::caller::echo;
use harness::cluster::{Cluster, RelayOptions, Store};
use harness::etcd::Etcd;
use harness::place::Place;
use harness::turn::{Login, TurnClient};
use harness::{Host, eventually, run_within};
use serde_json::Value;
use turn_core::Transport;

const PATIENCE: Duration = Duration::from_secs(20);
/// The store has what happened longer ago than this (P2: 250 ms).
const STORED: Duration = Duration::from_millis(500);

/// What one client has used: packets and bytes, the same in both directions.
pub(super) struct Talk {
    pub(super) client: TurnClient,
    peer: SocketAddr,
    pub(super) packets: u64,
    bytes: u64,
}

impl Talk {
    /// Allocates, and talks for the first time.
    pub(super) async fn begin(
        from: &Place,
        login: &Login,
        relay: SocketAddr,
        transport: Transport,
        peer: SocketAddr,
    ) -> Result<Self> {
        let mut client = TurnClient::open(&from.host, from.address, relay, transport, login).await?;
        client.allocate().await?;
        client.permit(peer.ip()).await?;
        let mut talk = Self { client, peer, packets: 0, bytes: 0 };
        talk.talk().await?;
        Ok(talk)
    }

    /// Twenty packets there and back.
    pub(super) async fn talk(&mut self) -> Result<()> {
        for number in 0..20usize {
            let data = vec![number as u8; number * 50];
            self.client.send(self.peer, &data).await?;
            ensure!(self.client.receive(PATIENCE).await? == (self.peer, data), "packet {number} did not come back");
            self.packets += 1;
            self.bytes += number as u64 * 50;
        }
        Ok(())
    }
}

#[test]
fn the_ledger_says_what_was_sent() -> Result<()> {
    run_within(Duration::from_secs(120), async |test| {
        let etcd = Etcd::start(Place::on_loopback(1), test.path()).await?;
        let mut cluster = Cluster::new(test.path())?;
        let controller = cluster.controller(&Place::on_loopback(2), Store::Etcd(&etcd), "").await?;
        let options = RelayOptions { workers: 2, ..RelayOptions::in_region("eu") };
        let mut relay = cluster.relay("eu-1", &Place::on_loopback(11), &options).await?;
        let peer = echo(&Place::on_loopback(50)).await?;
        let from = Place::on_loopback(100);
        let mut talks = Vec::new();
        for (user, transport) in [("alice", Transport::Udp), ("bob", Transport::Tcp)] {
            talks.push(Talk::begin(&from, &controller.login(user).await?, relay.address(), transport, peer).await?);
        }
        let [mut alice, mut bob] = <[Talk; 2]>::try_from(talks).map_err(|_| anyhow!("two clients"))?;
        bob.client.refresh(0).await?;
        let of_bob = closed(&cluster, &Host::Machine, "bob").await?;
        check(&of_bob, &bob, "deleted", false)?;

        relay.kill()?;
        relay.start().await?;
        alice.talk().await?;
        ensure!(relay.stop().await?.success(), "an orderly end");
        relay.start().await?;
        alice.talk().await?;
        alice.client.refresh(0).await?;
        let of_alice = closed(&cluster, &Host::Machine, "alice").await?;
        check(&of_alice, &alice, "deleted", false)?;

        // What was counted since the last checkpoint goes with the state directory.
        let mut eve =
            Talk::begin(&from, &controller.login("eve").await?, relay.address(), Transport::Udp, peer).await?;
        tokio::time::sleep(STORED).await;
        relay.kill()?;
        std::fs::remove_dir_all(cluster.state_of("eu-1"))?;
        relay.start().await?;
        let before = (eve.packets, eve.bytes);
        eve.talk().await?;
        eve.client.refresh(0).await?;
        let of_eve = closed(&cluster, &Host::Machine, "eve").await?;
        ensure!(of_eve["unclean"] == true, "{of_eve}");
        let counted = of_eve["packets_to_peer"].as_u64().context("a number")?;
        ensure!((eve.packets - before.0..=eve.packets).contains(&counted), "{of_eve}");

        let by_user = cluster.turnctl_json(&Host::Machine, &["usage", "--by-user"]).await?;
        let users = by_user["users"].as_array().context("a list")?;
        ensure!(users.len() == 3 && users[0]["username"] == "alice", "{by_user}");
        ensure!(users[0]["bytes_to_client"] == alice.bytes, "{by_user}");
        Ok(())
    })
}

/// The closed entry of a user's only allocation.
pub(super) async fn closed(cluster: &Cluster, host: &Host, user: &str) -> Result<Value> {
    let (entry, _) = eventually("the entry is closed", PATIENCE, async || {
        let shown = cluster.turnctl_json(host, &["usage", "--user", user]).await?;
        match shown["usage"].as_array().map(Vec::as_slice) {
            Some([entry]) if entry["state"] != "live" => Ok(entry.clone()),
            _ => Err(anyhow!("{shown}")),
        }
    })
    .await?;
    Ok(entry)
}

/// The entry says what the client knows.
pub(super) fn check(entry: &Value, talk: &Talk, state: &str, unclean: bool) -> Result<()> {
    let exact = ["to_peer", "to_client"].into_iter().all(|direction| {
        entry[format!("packets_{direction}")] == talk.packets && entry[format!("bytes_{direction}")] == talk.bytes
    });
    ensure!(exact, "{} packets, {} bytes each way: {entry}", talk.packets, talk.bytes);
    ensure!(entry["state"] == state && entry["unclean"] == unclean, "{entry}");
    Ok(())
}
