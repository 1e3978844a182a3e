//! The parameters of an HTTP request: its query, and behind it the form in its body; where it is from. Values are bytes:
//! names of users need not be text.

use std::net::IpAddr;

use axum::RequestExt as _;
use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header};

use turn_core::policy::Network;

use super::clients::{self, Peer};
use super::rest::ApiError;

/// Parameters and headers of a request.
#[derive(Debug)]
pub(super) struct Params {
    pairs: Vec<(Vec<u8>, Vec<u8>)>,
    headers: HeaderMap,
    peer: Option<IpAddr>,
    body: Bytes,
}

impl<S: Send + Sync> FromRequest<S> for Params {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let mut pairs = parse(request.uri().query().unwrap_or_default().as_bytes());
        let headers = request.headers().clone();
        let peer = request.extensions().get::<Peer>().map(|peer| peer.0.ip());
        let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let is = |wanted: &str| kind.to_ascii_lowercase().starts_with(wanted);
        let (form, json) = (is("application/x-www-form-urlencoded"), is("application/json"));
        let mut body = Bytes::new();
        if form || json {
            body = request.extract().await.map_err(|error: axum::extract::rejection::BytesRejection| {
                ApiError::new(error.status(), "the body cannot be read or is too long")
            })?;
        }
        if form {
            pairs.extend(parse(&body));
        }
        Ok(Self { pairs, headers, peer, body })
    }
}

impl Params {
    /// The first value of this name; Janus repeats its query as a form, so later ones add nothing.
    pub(super) fn bytes(&self, name: &str) -> Option<&[u8]> {
        let pair = self.pairs.iter().find(|(key, _)| key == name.as_bytes());
        pair.map(|(_, value)| value.as_slice())
    }

    /// As [`Params::bytes`], as text.
    pub(super) fn text(&self, name: &str) -> Result<Option<&str>, ApiError> {
        self.bytes(name)
            .map(|value| {
                std::str::from_utf8(value)
                    .map_err(|_| ApiError::new(StatusCode::BAD_REQUEST, format!("{name} is not UTF-8")))
            })
            .transpose()
    }

    /// The body of a form or of JSON.
    pub(super) fn body(&self) -> &[u8] {
        &self.body
    }

    /// Where the request is from.
    pub(super) fn connected(&self, trusted: &[Network]) -> Option<IpAddr> {
        self.peer.map(|peer| clients::client(peer, &self.headers, trusted))
    }

    /// Whom it is for: the one it names, else where it is from.
    pub(super) fn client(&self, trusted: &[Network]) -> Result<Option<IpAddr>, ApiError> {
        match self.text("client")? {
            None | Some("") => Ok(self.connected(trusted)),
            Some(named) => named
                .parse()
                .map(Some)
                .map_err(|_| ApiError::new(StatusCode::BAD_REQUEST, "client must be an IP address")),
        }
    }

    /// A key in a header, which neither other pages nor logs of proxies get hold of.
    pub(super) fn header_keys(&self) -> impl Iterator<Item = &[u8]> {
        let bearer = self.headers.get(header::AUTHORIZATION).and_then(|value| {
            let (scheme, key) = value.as_bytes().split_at_checked(7)?;
            scheme.eq_ignore_ascii_case(b"bearer ").then_some(key.trim_ascii())
        });
        let header = self.headers.get("x-api-key").map(|value| value.as_bytes());
        [bearer, header].into_iter().flatten()
    }

    /// Everything that may be an API key: `Authorization: Bearer`, `X-API-Key`, `key` and `api`.
    pub(super) fn api_keys(&self) -> impl Iterator<Item = &[u8]> {
        self.header_keys().chain([self.bytes("key"), self.bytes("api")].into_iter().flatten())
    }
}

/// `a=b&c=d` of application/x-www-form-urlencoded. What is not well-formed stands for itself.
fn parse(query: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
    query
        .split(|b| *b == b'&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let mut halves = pair.splitn(2, |b| *b == b'=');
            let mut next = || decode(halves.next().unwrap_or_default());
            (next(), next())
        })
        .collect()
}

fn decode(text: &[u8]) -> Vec<u8> {
    let digit = |i: usize| text.get(i).and_then(|b| char::from(*b).to_digit(16));
    let mut decoded = Vec::with_capacity(text.len());
    let mut i = 0;
    while let Some(byte) = text.get(i) {
        match (byte, digit(i + 1), digit(i + 2)) {
            (b'%', Some(high), Some(low)) => {
                decoded.extend(u8::try_from(high * 16 + low));
                i += 2;
            }
            (b'+', ..) => decoded.push(b' '),
            _ => decoded.push(*byte),
        }
        i += 1;
    }
    decoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_decode() {
        type Pairs = &'static [(&'static [u8], &'static [u8])];
        let cases: &[(&[u8], Pairs)] = &[
            (b"", &[]),
            (b"a=b&c=d", &[(b"a", b"b"), (b"c", b"d")]),
            (b"&&a&=b&a=", &[(b"a", b""), (b"", b"b"), (b"a", b"")]),
            (b"a=b=c", &[(b"a", b"b=c")]),
            (b"u=%00%2F+%ff%41", &[(b"u", b"\0/ \xffA")]),
            (b"u=%4&v=%&w=%zz", &[(b"u", b"%4"), (b"v", b"%"), (b"w", b"%zz")]),
        ];
        for (query, expected) in cases {
            let expected: Vec<_> = expected.iter().map(|(k, v)| (k.to_vec(), v.to_vec())).collect();
            assert_eq!(parse(query), expected, "{}", query.escape_ascii());
        }
    }
}
