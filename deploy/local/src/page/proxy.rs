//! Discovery and console of the controller under the call page's origin.

use std::sync::Arc;

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::header::{
    ACCEPT, AUTHORIZATION, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderMap, HeaderName,
};
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};

use super::Upstream;

/// A TURN REST request is a few hundred bytes.
const MAX_BODY: usize = 16 * 1024;

const REQUEST_HEADERS: [HeaderName; 4] = [ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderName::from_static("x-api-key")];
const RESPONSE_HEADERS: [HeaderName; 3] = [CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE];

/// Hands a request to the controller and its answer back, as it comes: the console's events have no end.
pub(super) async fn pass_on(State(upstream): State<Arc<Upstream>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    if !matches!(parts.method, Method::GET | Method::HEAD | Method::POST) {
        return (StatusCode::METHOD_NOT_ALLOWED, "GET, HEAD or POST\n").into_response();
    }
    let Ok(body) = to_bytes(body, MAX_BODY).await else {
        return (StatusCode::PAYLOAD_TOO_LARGE, "the request is too long\n").into_response();
    };
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let sent = upstream
        .client
        .request(parts.method, format!("{}{path}", upstream.base))
        .headers(only(&REQUEST_HEADERS, &parts.headers))
        .body(body)
        .send()
        .await;
    match sent {
        Ok(answer) => {
            let (status, headers) = (answer.status(), only(&RESPONSE_HEADERS, answer.headers()));
            (status, headers, Body::from_stream(answer.bytes_stream())).into_response()
        }
        Err(_) => failure("the controller does not answer"),
    }
}

fn only(names: &[HeaderName], headers: &HeaderMap) -> HeaderMap {
    let kept = names.iter().filter_map(|name| Some((name.clone(), headers.get(name)?.clone())));
    kept.collect()
}

/// 502 as discovery's own errors look.
pub(super) fn failure(error: &str) -> Response {
    (StatusCode::BAD_GATEWAY, axum::Json(serde_json::json!({ "error": error }))).into_response()
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::routing::post;

    use super::super::router;
    use super::*;

    async fn start(app: Router) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("listener");
        let address = listener.local_addr().expect("address");
        tokio::spawn(async move { axum::serve(listener, app).await });
        format!("http://{address}")
    }

    fn page(base: String) -> Router {
        router(Upstream { client: crate::ready::client().expect("client"), base, ca: "/nowhere".into() })
    }

    #[tokio::test]
    async fn requests_reach_the_controller_with_query_and_key_but_not_with_cookies() {
        let echo = post(|headers: HeaderMap, uri: axum::http::Uri, body: String| async move {
            let key = headers.get("x-api-key").map(|key| format!("{key:?}"));
            format!("{uri} {body} {key:?} {}", headers.contains_key("cookie"))
        });
        let base = start(page(start(Router::new().route("/v1/turn", echo)).await)).await;
        let client = crate::ready::client().expect("client");
        let request =
            client.post(format!("{base}/v1/turn?service=turn")).header("x-api-key", "k").header("cookie", "a=b");
        let answer = request.body("username=a").send().await.expect("answer").text().await.expect("text");
        assert_eq!(answer, r#"/v1/turn?service=turn username=a Some("\"k\"") false"#);
    }

    #[tokio::test]
    async fn without_a_controller_the_answer_says_so() {
        let base = start(page("http://127.0.0.1:9".into())).await;
        let client = crate::ready::client().expect("client");
        let answer = client.get(format!("{base}/v1/ice-servers")).send().await.expect("answer");
        assert_eq!(answer.status(), StatusCode::BAD_GATEWAY);
        assert_eq!(answer.text().await.expect("text"), r#"{"error":"the controller does not answer"}"#);
    }
}
