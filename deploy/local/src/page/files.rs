//! The page's own files, built into the binary.

use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderName, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};

/// The page runs its own scripts only. It may be told another discovery server (`?discovery=`), so it may connect
/// anywhere.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self' blob:; \
                      connect-src 'self' http: https: ws: wss:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'";
const PERMISSIONS: &str = "camera=(self), microphone=(self)";
const PERMISSIONS_POLICY: HeaderName = HeaderName::from_static("permissions-policy");

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

macro_rules! own {
    ($name:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/web/", $name))
    };
}

/// The console and the call page look alike because they share these.
macro_rules! shared {
    ($name:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../controller/web/", $name))
    };
}

const FILES: &[(&str, &str, &str)] = &[
    ("/", HTML, own!("index.html")),
    ("/call.css", CSS, own!("call.css")),
    ("/call.js", SCRIPT, own!("call.js")),
    ("/media.js", SCRIPT, own!("media.js")),
    ("/network.js", SCRIPT, own!("network.js")),
    ("/path.js", SCRIPT, own!("path.js")),
    ("/peer.js", SCRIPT, own!("peer.js")),
    ("/plot.js", SCRIPT, own!("plot.js")),
    ("/signal.js", SCRIPT, own!("signal.js")),
    ("/stats.js", SCRIPT, own!("stats.js")),
    ("/turnpike.js", SCRIPT, shared!("turnpike.js")),
    ("/shared/theme.css", CSS, shared!("theme.css")),
    ("/shared/format.js", SCRIPT, shared!("format.js")),
    ("/shared/keyed.js", SCRIPT, shared!("keyed.js")),
    ("/shared/logo.svg", SVG, shared!("logo.svg")),
];

/// Answers with one of the files.
#[allow(clippy::unused_async)] // what the router wants
pub(super) async fn serve(method: Method, uri: Uri) -> Response {
    let path = if uri.path() == "/index.html" { "/" } else { uri.path() };
    let Some((_, kind, text)) = FILES.iter().find(|(name, ..)| *name == path) else {
        return (StatusCode::NOT_FOUND, "There is no such page. The call page is at /\n").into_response();
    };
    if !matches!(method, Method::GET | Method::HEAD) {
        return (StatusCode::METHOD_NOT_ALLOWED, "GET or HEAD\n").into_response();
    }
    let headers = [
        (CONTENT_TYPE, *kind),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (PERMISSIONS_POLICY, PERMISSIONS),
        // A new build is seen at the next load.
        (CACHE_CONTROL, "no-cache"),
    ];
    (headers, *text).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file added to the page and forgotten in the table would be a page that does not work.
    #[test]
    fn everything_the_page_asks_for_is_there() {
        let known = |path: &str| FILES.iter().any(|(name, ..)| *name == path);
        let mut asked = 0;
        for (file, _, text) in FILES {
            for (before, after) in [("href=\"/", "\""), ("src=\"/", "\""), ("from \"/", "\""), ("from \"./", "\"")] {
                for rest in text.split(before).skip(1) {
                    let path = format!("/{}", rest.split(after).next().unwrap_or_default());
                    // Relative imports of the shared files stay among them.
                    let path = match file.strip_prefix("/shared/") {
                        Some(_) if before == "from \"./" => format!("/shared{path}"),
                        _ => path,
                    };
                    assert!(known(&path) || path == "/console", "{file} asks for {path}");
                    asked += 1;
                }
            }
        }
        assert!(asked > 10, "{asked}");
    }

    #[test]
    fn nothing_inline_that_the_policy_would_block() {
        let (_, _, page) = FILES[0];
        assert!(!page.contains("<style") && !page.contains(" style=") && !page.contains(" onclick="));
        assert!(page.split("<script").skip(1).all(|rest| rest.trim_start().starts_with("type=\"module\" src=\"/")));
    }
}
