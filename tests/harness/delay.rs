//! A longer way: UDP that arrives at an address is handed on to a server behind it, late in both directions. The kernels of
//! the machines that tests run on have no netem.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::net::UdpSocket;
use tokio::task::JoinSet;

/// The way, for as long as this lives.
pub struct Delay {
    _tasks: JoinSet<()>,
}

impl Delay {
    /// Hands on what comes to `at` to `server` and back, so that a round trip takes `round_trip` longer.
    ///
    /// # Errors
    /// The address cannot be had.
    pub async fn start(at: SocketAddr, server: SocketAddr, round_trip: Duration) -> Result<Self> {
        let outside = Arc::new(UdpSocket::bind(at).await.with_context(|| format!("listen on {at}"))?);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut clients: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
            let mut ways = JoinSet::new();
            let mut bytes = [0; 2048];
            loop {
                let Ok((len, client)) = outside.recv_from(&mut bytes).await else { continue };
                let inside = match clients.get(&client) {
                    Some(inside) => inside.clone(),
                    None => {
                        let Ok(inside) = UdpSocket::bind((inside_of(server), 0)).await else { continue };
                        let inside = Arc::new(inside);
                        clients.insert(client, inside.clone());
                        ways.spawn(back(inside.clone(), outside.clone(), client, round_trip / 2));
                        inside
                    }
                };
                let packet = bytes[..len].to_vec();
                ways.spawn(async move {
                    tokio::time::sleep(round_trip / 2).await;
                    // As a network would: what cannot be sent is lost.
                    let _ = inside.send_to(&packet, server).await;
                });
            }
        });
        Ok(Self { _tasks: tasks })
    }
}

/// The address of a socket that reaches the server.
fn inside_of(server: SocketAddr) -> Ipv4Addr {
    if server.ip().is_loopback() { Ipv4Addr::LOCALHOST } else { Ipv4Addr::UNSPECIFIED }
}

async fn back(inside: Arc<UdpSocket>, outside: Arc<UdpSocket>, client: SocketAddr, late: Duration) {
    let mut ways = JoinSet::new();
    let mut bytes = [0; 2048];
    loop {
        let Ok(len) = inside.recv(&mut bytes).await else { continue };
        let (packet, outside) = (bytes[..len].to_vec(), outside.clone());
        ways.spawn(async move {
            tokio::time::sleep(late).await;
            let _ = outside.send_to(&packet, client).await;
        });
    }
}
