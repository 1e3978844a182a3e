//! Several workers in one relay: the kernel hands every packet to the worker that owns its client.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use harness::cluster::{Cluster, Relay, RelayOptions};
use harness::coturn::rest_credentials;
use harness::place::Place;
use harness::traffic::Pair;
use harness::turn::{Login, TurnClient};
use harness::{Host, Scenario, eventually, run, run_within};
use tokio::net::UdpSocket;
use turn_core::Transport;

/// Secret of the relay, which stands alone here: no controller has a part in what its workers do.
const SECRET: &str = "secret-of-a-lone-relay";

fn options(workers: u16) -> RelayOptions {
    RelayOptions { workers, more: format!("rest_secrets = [{SECRET:?}]"), ..RelayOptions::in_region("eu") }
}

async fn lone_relay(test: &Scenario, workers: u16) -> Result<(Cluster, Relay, Login)> {
    let cluster = Cluster::new(test.path())?;
    let relay = cluster.relay("eu-1", &Place::on_loopback(11), &options(workers)).await?;
    Ok((cluster, relay, rest_credentials(SECRET.as_bytes(), "workers")?))
}

async fn allocated(relay: SocketAddr, transport: Transport, login: &Login) -> Result<TurnClient> {
    let from = Place::on_loopback(100).address;
    let mut client = TurnClient::open(&Host::Machine, from, relay, transport, login).await?;
    client.allocate().await?;
    Ok(client)
}

/// Pairs on one node, half of them of clients on different workers: nothing is lost, and every message comes from the
/// relayed address of its sender. UDP and TCP clients, mixed.
#[test]
fn pairs_meet_across_workers() -> Result<()> {
    run(async |test| {
        let (_cluster, relay, login) = lone_relay(test, 2).await?;
        let address = relay.address();
        let mut pairs = Vec::new();
        for number in 0..40 {
            let (first, second) = match number % 4 {
                0 | 1 => (Transport::Udp, Transport::Udp),
                2 => (Transport::Udp, Transport::Tcp),
                _ => (Transport::Tcp, Transport::Tcp),
            };
            let login = login.clone();
            pairs.push(tokio::spawn(async move {
                let first = allocated(address, first, &login).await?;
                let second = allocated(address, second, &login).await?;
                let mut pair = Pair::join(first, second).await?;
                pair.exchange(200).await?;
                Ok::<_, anyhow::Error>(pair)
            }));
        }
        // Kept until all are done: a port that is given back may be given out again.
        let mut done = Vec::new();
        for pair in pairs {
            done.push(pair.await??);
        }
        // Published once a second.
        eventually("the metrics show pairs on both workers", Duration::from_secs(10), async || {
            let held = (
                relay_metric(&relay, "turn_allocations", "0").await?,
                relay_metric(&relay, "turn_allocations", "1").await?,
            );
            if held.0 > 0.0 && held.1 > 0.0 && held.0 + held.1 == 80.0 { Ok(()) } else { Err(anyhow!("{held:?}")) }
        })
        .await?;
        Ok(())
    })
}

async fn relay_metric(relay: &Relay, name: &str, worker: &str) -> Result<f64> {
    relay.metric(name, &format!("worker=\"{worker}\"")).await
}

/// Every packet of 1,000 clients lands on the worker that owns its allocation, also when the relay has been started
/// again with another number of workers.
#[test]
fn a_thousand_clients_land_on_their_workers() -> Result<()> {
    run_within(Duration::from_secs(180), async |test| {
        let (cluster, mut relay, login) = lone_relay(test, 2).await?;
        let echo = UdpSocket::bind((Place::on_loopback(200).address, 0)).await?;
        let peer = echo.local_addr()?;
        let echo = tokio::spawn(async move {
            let mut buffer = [0; 2048];
            loop {
                let Ok((length, from)) = echo.recv_from(&mut buffer).await else { continue };
                let _ = echo.send_to(&buffer[..length], from).await;
            }
        });

        let mut clients = Vec::new();
        for number in 0..1000 {
            let mut client = allocated(relay.address(), Transport::Udp, &login).await?;
            // Channels and indications take different ways through the core.
            if number % 2 == 0 {
                client.bind_channel(0x4000, peer).await?;
            } else {
                client.permit(peer.ip()).await?;
            }
            clients.push(client);
        }
        for workers in [2, 3, 1] {
            if workers != 2 {
                relay.kill()?;
                cluster.configure(&relay, &options(workers))?;
                relay.start().await?;
            }
            for (number, client) in clients.iter_mut().enumerate() {
                let message = format!("client {number}, {workers} workers");
                client.send(peer, message.as_bytes()).await?;
                let (from, data) = client.receive(Duration::from_secs(5)).await?;
                ensure!(from == peer && data == message.as_bytes(), "client {number} received {data:?} from {from}");
            }
            // Published once a second.
            eventually("the metrics know all allocations and packets", Duration::from_secs(10), async || {
                let held = relay.metric("turn_allocations", "").await?;
                let relayed = relay.metric("turn_relayed_packets_total", "").await?;
                if held == 1000.0 && relayed >= 2000.0 {
                    Ok(())
                } else {
                    Err(anyhow!("{held} held, {relayed} relayed"))
                }
            })
            .await?;
            let mut held = Vec::new();
            for worker in 0..workers {
                held.push(relay_metric(&relay, "turn_allocations", &worker.to_string()).await?);
            }
            let crossed = relay.metric("turn_crossed_packets_total", "").await?;
            test.figure(
                &format!("{workers} workers: allocations of each, packets that crossed"),
                format!("{held:?}, {crossed}"),
            );
            ensure!(
                relay.metrics().await?.contains("turn_crossed_packets_total"),
                "there is no count of crossed packets"
            );
            ensure!(crossed == 0.0, "{crossed} packets landed on another worker");
            let share = 1000.0 / f64::from(workers);
            ensure!(held.iter().all(|&n| n > share / 2.0), "unevenly spread: {held:?}");
        }
        echo.abort();
        Ok(())
    })
}
