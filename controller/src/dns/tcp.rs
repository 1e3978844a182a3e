//! DNS over TCP (RFC 7766): bounded in connections, in time, and one question at once on each.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hickory_server::net::xfer::Protocol;
use hickory_server::proto::serialize::binary::BinEncoder;
use hickory_server::server::Request;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{Answers, is_sane};

/// Open connections; one more is closed at once.
const CONNECTIONS: usize = 512;
/// Time for a question, and between two of them.
const PATIENCE: Duration = Duration::from_secs(5);
/// Longest question: a name, EDNS and what resolvers pad it to.
const MAX_QUESTION: usize = 4096;

/// Accepts until `shutdown`.
pub(super) async fn serve(listener: TcpListener, answers: Arc<Answers>, shutdown: CancellationToken) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    let Ok(slot) = slots.clone().try_acquire_owned() else { continue };
                    let answers = answers.clone();
                    connections.spawn(async move {
                        let _slot = slot;
                        if let Err(error) = connection(stream, peer, &answers).await {
                            tracing::debug!(%error, "a DNS connection broke");
                        }
                    });
                }
                Err(error) => {
                    tracing::debug!(%error, "a DNS connection cannot be accepted");
                    // Out of descriptors, most likely: trying again at once would only burn the processor.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
}

async fn connection(mut stream: TcpStream, peer: SocketAddr, answers: &Answers) -> io::Result<()> {
    if !is_sane(peer.ip()) {
        return Ok(());
    }
    loop {
        let question = async {
            let len = usize::from(stream.read_u16().await?);
            if len > MAX_QUESTION {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a question that is too long"));
            }
            let mut question = vec![0; len];
            stream.read_exact(&mut question).await?;
            Ok(question)
        };
        let question = match timeout(PATIENCE, question).await {
            Ok(Ok(question)) => question,
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Ok(Err(error)) => return Err(error),
            // Nobody asks any more.
            Err(_) => return Ok(()),
        };
        let Ok(request) = Request::from_bytes(question, peer, Protocol::Tcp) else { return Ok(()) };
        let answer = answers.answer(&request);
        let mut bytes = vec![0; 2];
        let mut encoded = Vec::with_capacity(512);
        let mut encoder = BinEncoder::new(&mut encoded);
        encoder.set_max_size(u16::MAX);
        answer.response(&request).destructive_emit(&mut encoder).map_err(io::Error::other)?;
        let len = u16::try_from(encoded.len()).map_err(io::Error::other)?;
        bytes[..2].copy_from_slice(&len.to_be_bytes());
        bytes.extend(encoded);
        timeout(PATIENCE, stream.write_all(&bytes)).await??;
    }
}
