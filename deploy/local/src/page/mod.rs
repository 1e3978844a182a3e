//! The call page: its files, signalling, and discovery passed on to the controller, all from one origin, so that the
//! page works over https without mixed content and needs no CORS.

mod files;
mod proxy;
mod rooms;
mod signal;
mod tls;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};

use self::signal::Signalling;

/// What stands behind the page.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// For requests to the controller.
    pub client: reqwest::Client,
    /// The controller's base URL, without a slash at its end.
    pub base: String,
    /// The authority's certificate, for those who want to trust it.
    pub ca: PathBuf,
}

/// Everything the call page's server answers.
pub fn router(upstream: Upstream) -> Router {
    let upstream = Arc::new(upstream);
    let passed_on = any(proxy::pass_on);
    Router::new()
        .route("/signal", get(signal::connect))
        .with_state(Signalling::default())
        .merge(
            Router::new()
                .route("/v1/{*rest}", passed_on.clone())
                .route("/console", passed_on.clone())
                .route("/console/{*rest}", passed_on)
                .route("/ca.pem", get(authority))
                .with_state(upstream),
        )
        .fallback(files::serve)
}

async fn authority(State(upstream): State<Arc<Upstream>>) -> Response {
    match tokio::fs::read(&upstream.ca).await {
        Ok(pem) => ([(CONTENT_TYPE, "application/x-x509-ca-cert")], pem).into_response(),
        Err(error) => proxy::failure(&format!("cannot read the authority's certificate: {error}")),
    }
}

/// Binds `address` and gives the work of serving `app` there, over TLS when a certificate and its key are given.
///
/// # Errors
/// One line: the address cannot be bound, the certificate cannot be used.
pub fn serve(
    address: SocketAddr,
    certificate: Option<(PathBuf, PathBuf)>,
    app: Router,
) -> Result<impl Future<Output = ()> + Send + 'static> {
    let bind = || {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        tokio::net::TcpListener::from_std(listener)
    };
    let listener = bind().with_context(|| format!("call page: cannot bind {address}"))?;
    let tls = certificate.map(|(certificate, key)| tls::server(&certificate, &key)).transpose()?;
    Ok(async move {
        // Neither listener ever reports an error: they wait and accept again.
        let served = match tls {
            Some(config) => axum::serve(tls::Listener::new(listener, config), app).await,
            None => axum::serve(listener, app).await,
        };
        debug_assert!(served.is_ok());
    })
}
