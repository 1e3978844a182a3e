//! The ways in: gRPC for relays and operators, HTTP for clients and the console. They decode, call and encode.

pub mod admin;
mod calls;
mod clients;
pub mod console;
mod draining;
mod events;
pub mod fleet;
pub mod grpc;
mod limit;
mod load;
mod netcheck;
mod params;
pub mod rest;
pub mod steering;
pub mod view;
mod watch;

use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use tower::ServiceBuilder;
use tower_http::set_header::SetResponseHeaderLayer;
use tower_http::timeout::TimeoutLayer;
use tower_http::trace::{DefaultOnFailure, TraceLayer};
use tracing::{Instrument as _, Level, Span};
use turnpike_proto::trace;

pub use self::calls::{Calls, Limits as CallLimits};
pub use self::clients::Peer;
pub use self::limit::{Limiter, Rates, TooOften};
use crate::health::{self, Health};
use crate::metrics;

/// Longest body of an HTTP request: a form with a user name in it.
const MAX_BODY: usize = 16 * 1024;
/// Time to the head of an HTTP answer; event streams go on after it.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Everything HTTP serves.
pub fn http(health: Health, cors_origins: &[String], feed: console::Feed, prometheus: PrometheusHandle) -> Router {
    let always = |name, value| SetResponseHeaderLayer::overriding(name, HeaderValue::from_static(value));
    let layers = ServiceBuilder::new()
        .layer(
            TraceLayer::new_for_http()
                .make_span_with(|request: &Request| {
                    // The query is left out: it may hold an API key.
                    tracing::info_span!("http", method = %request.method(), path = request.uri().path())
                })
                // A 503 is an answer here, not news for an operator.
                .on_failure(DefaultOnFailure::new().level(Level::DEBUG)),
        )
        .layer(always(header::CACHE_CONTROL, "no-store"))
        .layer(always(header::X_CONTENT_TYPE_OPTIONS, "nosniff"))
        .layer(TimeoutLayer::with_status_code(StatusCode::SERVICE_UNAVAILABLE, TIMEOUT));
    Router::new()
        .merge(health::router(health.clone()))
        .merge(rest::router(health.clone(), cors_origins))
        .merge(console::router(health, feed))
        .route("/metrics", get(async move || prometheus.render()))
        .route_layer(middleware::from_fn(count))
        .fallback(async || rest::ApiError::new(StatusCode::NOT_FOUND, "there is nothing at this path"))
        .method_not_allowed_fallback(rest::method_not_allowed)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(layers)
}

/// The trace of a discovery, which goes on the client's; the rest of HTTP has none.
fn traced(route: &str, request: &Request) -> Span {
    if !matches!(route, "/v1/turn" | "/v1/ice-servers") {
        return Span::none();
    }
    let span = tracing::debug_span!(
        target: trace::TARGET, parent: None, "http", otel.name = format!("{} {route}", request.method()), otel.kind = "server"
    );
    if let Some(caller) = request.headers().get(trace::TRACEPARENT).and_then(|value| value.to_str().ok()) {
        trace::adopt(&span, caller);
    }
    span
}

async fn count(route: MatchedPath, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let traced = traced(route.as_str(), &request);
    let response = next.run(request).instrument(traced).await;
    metrics::http_request(route.as_str().to_owned(), response.status().as_u16(), started.elapsed());
    response
}
