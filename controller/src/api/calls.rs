//! What every gRPC call goes through, as a tower layer: a span with a request id, a trace that goes on the caller's, a bound on unary calls at once
//! (beyond it they are refused at once instead of queueing), a time limit for unary calls, and one count with the
//! final status. Streams are bounded by the listener's connections and have no time limit.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, HeaderValue, Request, Response};
use futures_util::future::BoxFuture;
use hyper::body::{Body as HttpBody, Bytes, Frame};
use tokio::sync::Semaphore;
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::Instrument as _;
use turnpike_proto::trace;

use crate::metrics;

const REQUEST_ID: &str = "x-request-id";

/// Limits of [`Calls`].
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Unary calls at once.
    pub concurrent: usize,
    /// Time a unary call may take.
    pub timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { concurrent: 512, timeout: Duration::from_secs(10) }
    }
}

/// The layer.
#[derive(Clone, Debug)]
pub struct Calls {
    timeout: Duration,
    slots: Arc<Semaphore>,
}

impl Calls {
    /// With these limits, shared by every connection.
    pub fn new(limits: Limits) -> Self {
        Self { timeout: limits.timeout, slots: Arc::new(Semaphore::new(limits.concurrent)) }
    }
}

impl<S> Layer<S> for Calls {
    type Service = CallService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        CallService { calls: self.clone(), inner }
    }
}

/// A service behind [`Calls`].
#[derive(Clone, Debug)]
pub struct CallService<S> {
    calls: Calls,
    inner: S,
}

impl<S> Service<Request<Body>> for CallService<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // The clone has not been asked whether it is ready; the original has.
        let clone = self.inner.clone();
        let inner = std::mem::replace(&mut self.inner, clone);
        let calls = self.calls.clone();
        let method = Method::of(request.uri().path());
        let id = request_id(request.headers());
        let span = tracing::info_span!("call", method = method.label, id = %id);
        let traced = tracing::debug_span!(
            target: trace::TARGET, parent: None, "grpc", otel.name = method.label, otel.kind = "server", id = %id
        );
        if let Some(caller) = request.headers().get(trace::TRACEPARENT).and_then(|value| value.to_str().ok()) {
            trace::adopt(&traced, caller);
        }
        let mut count = Count::start(method.label);
        let future = async move {
            let mut response = calls.run(method, request, inner).await;
            if let Ok(id) = HeaderValue::from_str(&id) {
                response.headers_mut().insert(REQUEST_ID, id);
            }
            count.settle(response.headers());
            Ok(response.map(|inner| Body::new(Counted { inner, count })))
        };
        Box::pin(future.instrument(span).instrument(traced))
    }
}

impl Calls {
    async fn run<S>(&self, method: Method, request: Request<Body>, mut inner: S) -> Response<Body>
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    {
        if method.streams {
            let Ok(response) = inner.call(request).await;
            return response;
        }
        let Ok(_slot) = self.slots.try_acquire() else {
            return Status::resource_exhausted("the controller is busy; try again").into_http();
        };
        match tokio::time::timeout(self.timeout, inner.call(request)).await {
            Ok(Ok(response)) => response,
            Err(_) => Status::deadline_exceeded(format!("took longer than {:?}", self.timeout)).into_http(),
        }
    }
}

/// A method as metrics and spans name it: a closed set, because the path comes from the wire.
#[derive(Clone, Copy, Debug)]
struct Method {
    label: &'static str,
    streams: bool,
}

impl Method {
    fn of(path: &str) -> Self {
        const UNARY: &[&str] = &[
            "/turnpike.v1.Steering/Discover",
            "/turnpike.v1.Steering/Credentials",
            "/turnpike.v1.Steering/Regions",
            "/turnpike.v1.Steering/Explain",
            "/turnpike.v1.Steering/NetcheckTargets",
            "/turnpike.v1.Steering/ReportNetcheck",
            "/turnpike.v1.Admin/Status",
            "/turnpike.v1.Admin/ListNodes",
            "/turnpike.v1.Admin/ListAllocations",
            "/turnpike.v1.Admin/GetAllocation",
            "/turnpike.v1.Admin/RevokeAllocation",
            "/turnpike.v1.Admin/DrainNodes",
            "/turnpike.v1.Admin/UncordonNodes",
            "/turnpike.v1.Admin/ListKeys",
            "/turnpike.v1.Admin/RotateKeys",
            "/turnpike.v1.Admin/RetireKey",
            "/turnpike.v1.Admin/ListUsage",
            "/turnpike.v1.Admin/ListLinks",
            "/turnpike.v1.Admin/RevokeRelay",
            "/turnpike.v1.Admin/ReinstateRelay",
            "/turnpike.v1.Admin/ListAudit",
            "/turnpike.v1.Fleet/Locate",
            "/grpc.health.v1.Health/Check",
        ];
        const STREAMS: &[&str] = &[
            "/turnpike.v1.Fleet/Session",
            "/turnpike.v1.Fleet/Restore",
            "/turnpike.v1.Steering/Watch",
            "/turnpike.v1.Admin/Events",
            "/grpc.health.v1.Health/Watch",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        ];
        let find = |list: &[&'static str]| list.iter().copied().find(|known| *known == path);
        if let Some(label) = find(STREAMS) {
            return Self { label, streams: true };
        }
        Self { label: find(UNARY).unwrap_or("other"), streams: false }
    }
}

/// The caller's request id where it is short and plain, else a random one.
fn request_id(headers: &HeaderMap) -> String {
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok()).filter(|id| {
        (1..=64).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    });
    given.map_or_else(|| format!("{:016x}", getrandom::u64().unwrap_or_default()), str::to_owned)
}

/// Counts a call once, when its response is dropped: at its end, or when the caller is gone.
struct Count {
    method: &'static str,
    started: Instant,
    /// Cancelled until a status is seen: what is dropped before has not been told the caller.
    code: Code,
    _in_flight: metrics::InFlight,
}

impl Count {
    fn start(method: &'static str) -> Self {
        Self { method, started: Instant::now(), code: Code::Cancelled, _in_flight: metrics::InFlight::grpc() }
    }

    /// An error without a body has its status in the headers, everything else in the trailers.
    fn settle(&mut self, headers: &HeaderMap) {
        if let Some(status) = Status::from_header_map(headers) {
            self.code = status.code();
        }
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        let took = self.started.elapsed();
        metrics::grpc_call(self.method, self.code, took);
        tracing::debug!(method = self.method, code = ?self.code, ?took, "call ended");
    }
}

/// A response body that tells the status in its trailers, which is where a handler's answer has it.
struct Counted {
    inner: Body,
    count: Count,
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = Pin::new(&mut self.inner).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &frame
            && let Some(trailers) = frame.trailers_ref()
        {
            self.count.settle(trailers);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use tokio::sync::Notify;
    use tower::ServiceExt as _;

    use super::*;

    const UNARY: &str = "/turnpike.v1.Admin/Status";
    const STREAM: &str = "/turnpike.v1.Admin/Events";

    #[tokio::test]
    async fn unary_calls_end_in_time_and_streams_need_not() {
        let limits = Limits { concurrent: 8, timeout: Duration::from_millis(20) };
        let slow = Calls::new(limits).layer(tower::service_fn(async |_: Request<Body>| {
            tokio::time::sleep(Duration::from_millis(200)).await;
            Ok(Response::new(Body::empty()))
        }));
        assert_eq!(code(slow.clone().oneshot(request(UNARY)).await), Some(Code::DeadlineExceeded));
        assert_eq!(code(slow.clone().oneshot(request("/nobody/knows")).await), Some(Code::DeadlineExceeded));
        assert_eq!(code(slow.oneshot(request(STREAM)).await), None);
    }

    #[tokio::test]
    async fn what_is_too_much_is_refused_at_once_and_streams_are_not_counted() {
        let gate = Arc::new(Notify::new());
        let limits = Limits { concurrent: 2, timeout: Duration::from_secs(60) };
        let waiting = gate.clone();
        let service = Calls::new(limits).layer(tower::service_fn(move |_: Request<Body>| {
            let gate = waiting.clone();
            async move {
                gate.notified().await;
                Ok(Response::new(Body::empty()))
            }
        }));
        let mut held = tokio::task::JoinSet::new();
        for path in [STREAM, UNARY, UNARY] {
            held.spawn(service.clone().oneshot(request(path)));
        }
        while service.calls.slots.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(code(service.clone().oneshot(request(UNARY)).await), Some(Code::ResourceExhausted));
        while !held.is_empty() {
            gate.notify_waiters();
            let _ = tokio::time::timeout(Duration::from_millis(1), held.join_next()).await;
        }
        assert_eq!(service.calls.slots.available_permits(), 2);
    }

    #[tokio::test]
    async fn request_ids_are_kept_or_made() {
        let service = Calls::new(Limits::default())
            .layer(tower::service_fn(async |_: Request<Body>| Ok(Response::new(Body::empty()))));
        let cases = [("abc-1_Z", true), ("", false), ("a b", false), (&"x".repeat(65), false)];
        for (given, kept) in cases {
            let mut request = request(UNARY);
            request.headers_mut().insert(REQUEST_ID, given.parse().expect("a header"));
            let Ok(answer) = service.clone().oneshot(request).await;
            let id = answer.headers()[REQUEST_ID].to_str().expect("text");
            assert_eq!(id == given, kept, "{given:?} {id:?}");
            assert!(!id.is_empty());
        }
    }

    /// The generated descriptors say which methods there are and which of them stream.
    #[test]
    fn every_method_is_known() {
        let set = prost_types::FileDescriptorSet::decode(turnpike_proto::v1::FILE_DESCRIPTOR_SET).expect("descriptors");
        for file in &set.file {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    let known = Method::of(&path);
                    assert_eq!(known.label, path);
                    assert_eq!(known.streams, method.client_streaming() || method.server_streaming(), "{path}");
                }
            }
        }
        assert_eq!(set.file.iter().map(|file| file.service.len()).sum::<usize>(), 3, "Fleet, Steering, Admin");
        assert_eq!(Method::of("/turnpike.v1.Admin/Nothing").label, "other");
    }

    fn request(path: &str) -> Request<Body> {
        Request::builder().uri(path).body(Body::empty()).expect("a request")
    }

    fn code(answer: Result<Response<Body>, Infallible>) -> Option<Code> {
        let Ok(answer) = answer;
        Status::from_header_map(answer.headers()).map(|status| status.code())
    }
}
