//! The two listeners: gRPC over mTLS, HTTP in the clear. An accept loop never waits for a client: handshakes and
//! requests run in tasks of their own, with bounds on how many and how long, and end with their server.

pub mod tls;

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::{Connected, TcpConnectInfo, TlsConnectInfo};
use tower::util::ServiceExt as _;

use self::tls::ServerTls;
use crate::api::grpc::Switch;
use crate::api::{Calls, Peer};
use crate::metrics;

/// Bounds of a listener.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Open connections; one more is closed at once.
    pub connections: usize,
    /// TLS handshakes under way; one more is closed at once.
    pub handshakes: usize,
    /// Time for a TLS handshake, and for the head of an HTTP request.
    pub handshake: Duration,
    /// Time that open calls get to end after a shutdown was asked for.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 8192, handshakes: 256, handshake: Duration::from_secs(10), drain: Duration::from_secs(5) }
    }
}

/// Binds a listener. `key` is the configuration key that names the address.
///
/// # Errors
/// One line with key and address.
pub async fn bind(key: &str, address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|error| BindError { key: key.to_owned(), address, error })
}

/// An address cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} ({key}): {error}")]
pub struct BindError {
    key: String,
    address: SocketAddr,
    #[source]
    error: io::Error,
}

/// Serves gRPC until `shutdown`, then for as long as open calls take, at most [`Limits::drain`].
pub async fn serve_grpc(
    listener: TcpListener,
    tls: Arc<ServerTls>,
    routes: Switch,
    limits: Limits,
    shutdown: CancellationToken,
) {
    let (sender, accepted) = mpsc::channel(64);
    let server = tonic::transport::Server::builder()
        .layer(Calls::new(crate::api::CallLimits::default()))
        .max_concurrent_streams(256)
        .http2_keepalive_interval(Some(Duration::from_secs(15)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .http2_max_header_list_size(16 * 1024)
        .serve_with_incoming_shutdown(
            routes,
            ReceiverStream::new(accepted).map(Ok::<_, io::Error>),
            shutdown.clone().cancelled_owned(),
        );
    let accepting = accept_tls(listener, &tls, sender, limits, shutdown.clone());
    let serving = async {
        if let Err(error) = server.await {
            tracing::error!(%error, "the gRPC server ended");
        }
    };
    let served = async { tokio::join!(accepting, until_drained(serving, limits.drain, &shutdown)) };
    tokio::select! {
        ((), ()) = served => {}
        () = tls.watch() => {}
    }
}

async fn accept_tls(
    listener: TcpListener,
    tls: &ServerTls,
    accepted: mpsc::Sender<Connection>,
    limits: Limits,
    shutdown: CancellationToken,
) {
    let handshakes = Arc::new(Semaphore::new(limits.handshakes));
    let connections = Arc::new(Semaphore::new(limits.connections));
    let mut tasks = JoinSet::new();
    while let Some((stream, _)) = next_connection(&listener, &shutdown, &mut tasks).await {
        let permits = (handshakes.clone().try_acquire_owned(), connections.clone().try_acquire_owned());
        let (Ok(handshake), Ok(connection)) = permits else {
            metrics::refused("grpc");
            continue;
        };
        let acceptor = TlsAcceptor::from(tls.current());
        let accepted = accepted.clone();
        tasks.spawn(async move {
            let outcome = match timeout(limits.handshake, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    drop(handshake);
                    let open = metrics::InFlight::connection("grpc");
                    // Fails only while the server is going down.
                    let _ = accepted.send(Connection { stream, _slot: connection, _open: open }).await;
                    "ok"
                }
                Ok(Err(error)) => {
                    tracing::debug!(%error, "a TLS handshake failed");
                    "failed"
                }
                Err(_) => "timeout",
            };
            metrics::handshake(outcome);
        });
    }
}

/// Serves HTTP until `shutdown`, then for as long as open requests take, at most [`Limits::drain`].
pub async fn serve_http(listener: TcpListener, router: Router, limits: Limits, shutdown: CancellationToken) {
    let connections = Arc::new(Semaphore::new(limits.connections));
    let mut tasks = JoinSet::new();
    while let Some((stream, peer)) = next_connection(&listener, &shutdown, &mut tasks).await {
        let Ok(slot) = connections.clone().try_acquire_owned() else {
            metrics::refused("http");
            continue;
        };
        tasks.spawn(http_connection((stream, Peer(peer)), router.clone(), limits, slot, shutdown.clone()));
    }
    let rest = async { while tasks.join_next().await.is_some() {} };
    until_drained(rest, limits.drain, &shutdown).await;
}

async fn http_connection(
    (stream, peer): (TcpStream, Peer),
    router: Router,
    limits: Limits,
    _slot: OwnedSemaphorePermit,
    shutdown: CancellationToken,
) {
    let _open = metrics::InFlight::connection("http");
    let mut builder = auto::Builder::new(hyper_util::rt::TokioExecutor::new()).http1_only();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(limits.handshake);
    let service = router.map_request(move |mut request: Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(peer);
        request.map(axum::body::Body::new)
    });
    let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error, "an HTTP connection broke");
    }
}

/// The next connection, or `None` after `shutdown`. Reaps ended tasks meanwhile.
async fn next_connection(
    listener: &TcpListener,
    shutdown: &CancellationToken,
    tasks: &mut JoinSet<()>,
) -> Option<(TcpStream, SocketAddr)> {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return None,
            Some(_) = tasks.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    // Small messages must not wait for each other; a socket that refuses is about to fail anyway.
                    let _ = stream.set_nodelay(true);
                    return Some((stream, peer));
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection cannot be accepted");
                    // Out of descriptors, most likely: trying again at once would only burn the processor.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
}

async fn until_drained(work: impl Future<Output = ()>, drain: Duration, shutdown: &CancellationToken) {
    let deadline = async {
        shutdown.cancelled().await;
        tokio::time::sleep(drain).await;
    };
    tokio::select! {
        () = work => {}
        () = deadline => tracing::info!("calls that did not end in {drain:?} are cut"),
    }
}

/// An accepted connection and its place among the open ones.
struct Connection {
    stream: TlsStream<TcpStream>,
    _slot: OwnedSemaphorePermit,
    _open: metrics::InFlight,
}

impl Connected for Connection {
    type ConnectInfo = TlsConnectInfo<TcpConnectInfo>;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
