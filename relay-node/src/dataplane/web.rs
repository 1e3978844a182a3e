//! HTTPS on TURN's port: TLS connections that are not for this relay, carried to a web server as they are. Runs on the
//! control plane's threads; the packet threads only hand connections over.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncWriteExt, copy_bidirectional};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::prefixes::Place;
use super::proxy;

/// How long the web server may take to accept.
const CONNECT: Duration = Duration::from_secs(5);

/// Where TLS connections for another host or protocol go.
#[derive(Clone, Debug)]
pub struct WebServer {
    address: SocketAddr,
    /// Whether it is told by a PROXY header (version 2) who its client is.
    proxy_protocol: bool,
    room: Arc<Semaphore>,
    runtime: tokio::runtime::Handle,
}

/// A connection on its way to the web server.
pub(super) struct Visitor {
    pub(super) socket: TcpStream,
    /// What was read of it.
    pub(super) first: Vec<u8>,
    pub(super) client: SocketAddr,
    pub(super) server: SocketAddr,
    /// Its place among the connections of its source, held to its end.
    pub(super) place: Option<Place>,
}

impl WebServer {
    /// At most `most` connections at a time, carried by tasks of `runtime`.
    pub fn new(address: SocketAddr, proxy_protocol: bool, most: usize, runtime: tokio::runtime::Handle) -> Self {
        let room = Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS)));
        Self { address, proxy_protocol, room, runtime }
    }

    /// Takes a connection over. Whether there was room.
    pub(super) fn take(&self, visitor: Visitor) -> bool {
        let Ok(permit) = Arc::clone(&self.room).try_acquire_owned() else {
            return false;
        };
        let this = self.clone();
        self.runtime.spawn(async move {
            if let Err(error) = this.carry(visitor, permit).await {
                tracing::debug!(%error, "a connection to the web server ended");
            }
        });
        true
    }

    async fn carry(&self, visitor: Visitor, _permit: OwnedSemaphorePermit) -> io::Result<()> {
        let Visitor { socket, first, client, server, place: _place } = visitor;
        let mut outside = tokio::net::TcpStream::from_std(socket)?;
        let mut inside = match timeout(CONNECT, tokio::net::TcpStream::connect(self.address)).await {
            Ok(Ok(inside)) => inside,
            Ok(Err(error)) => {
                tracing::warn!(web_server = %self.address, %error, "web_server: cannot connect");
                return Err(error);
            }
            Err(_) => {
                tracing::warn!(web_server = %self.address, "web_server: does not accept connections");
                return Err(io::ErrorKind::TimedOut.into());
            }
        };
        inside.set_nodelay(true)?;
        if self.proxy_protocol {
            inside.write_all(&proxy::encode(client, server)).await?;
        }
        inside.write_all(&first).await?;
        copy_bidirectional(&mut outside, &mut inside).await?;
        Ok(())
    }
}
