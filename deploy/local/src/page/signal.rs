//! Signalling: a WebSocket for each peer at `/signal?room=ROOM&peer=NAME`.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::extract::{Query, State};
use axum::http::header::{HOST, ORIGIN};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio::time::{Instant, interval, timeout};

use super::rooms::{FromPeer, OUTBOX, Refused, Rooms, Seat, ToPeer};

/// A description with many candidates is a few kilobytes.
const MAX_MESSAGE: usize = 64 * 1024;
/// How often a browser is asked for a sign of life.
const PING: Duration = Duration::from_secs(10);
/// A connection this long without one is lost.
const SILENCE: Duration = Duration::from_secs(25);
/// A browser that does not take a message within this time is lost.
const SEND: Duration = Duration::from_secs(10);

/// The rooms of this server. The lock is held for a map access, never over a wait.
#[derive(Clone, Default)]
pub(super) struct Signalling(Arc<Mutex<Rooms>>);

impl Signalling {
    fn rooms<T>(&self, act: impl FnOnce(&mut Rooms) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Names in the address.
#[derive(Deserialize)]
pub(super) struct Names {
    room: String,
    peer: String,
}

#[allow(clippy::unused_async)] // what the router wants
pub(super) async fn connect(
    State(signalling): State<Signalling>,
    Query(names): Query<Names>,
    headers: HeaderMap,
    upgrade: WebSocketUpgrade,
) -> Response {
    for (what, name) in [("room", &names.room), ("peer", &names.peer)] {
        if !is_name(name) {
            let text = format!("{what}: 1 to 64 letters, digits, '-' and '_'\n");
            return (StatusCode::BAD_REQUEST, text).into_response();
        }
    }
    if !is_same_origin(&headers) {
        return (StatusCode::FORBIDDEN, "another site's page may not join\n").into_response();
    }
    upgrade
        .max_message_size(MAX_MESSAGE)
        .max_frame_size(MAX_MESSAGE)
        .on_upgrade(move |socket| serve(signalling, names, socket))
}

fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
}

/// Browsers send Origin with every WebSocket; other clients need not.
fn is_same_origin(headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(ORIGIN) else { return true };
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    let origin = origin.to_str().ok().and_then(|origin| origin.split_once("://"));
    origin.is_some_and(|(_, origin)| Some(origin) == host)
}

async fn serve(signalling: Signalling, names: Names, mut socket: WebSocket) {
    let (outbox, mut inbox) = mpsc::channel(OUTBOX);
    match signalling.rooms(|rooms| rooms.join(&names.room, &names.peer, outbox)) {
        Ok(seat) => {
            let orderly = talk(&signalling, &seat, &mut socket, &mut inbox).await;
            signalling.rooms(|rooms| rooms.leave(&seat, orderly));
        }
        Err(Refused::Full) => {
            // What follows is only a farewell: that it does not arrive changes nothing.
            let _ = send(&mut socket, &ToPeer::Full).await;
            close(socket, close_code::NORMAL, "the room is full").await;
        }
        Err(Refused::TooManyRooms) => close(socket, close_code::AGAIN, "too many rooms are open").await,
    }
}

/// Until one side ends it; whether that was in order.
async fn talk(
    signalling: &Signalling,
    seat: &Seat,
    socket: &mut WebSocket,
    inbox: &mut mpsc::Receiver<ToPeer>,
) -> bool {
    let mut pings = interval(PING);
    let mut heard = Instant::now();
    loop {
        tokio::select! {
            message = socket.recv() => {
                heard = Instant::now();
                match message {
                    Some(Ok(Message::Text(text))) => match serde_json::from_str(&text) {
                        Ok(FromPeer::Signal { data }) => signalling.rooms(|rooms| rooms.signal(seat, data)),
                        // What is not understood ends the connection like a farewell: no page of ours says it.
                        Ok(FromPeer::Bye) | Err(_) => return true,
                    },
                    Some(Ok(Message::Close(_))) => return true,
                    Some(Ok(_)) => {}
                    Some(Err(_)) | None => return false,
                }
            }
            Some(message) = inbox.recv() => {
                if !send(socket, &message).await {
                    return false;
                }
                if message == ToPeer::Replaced {
                    return true;
                }
            }
            _ = pings.tick() => {
                if heard.elapsed() > SILENCE || !put(socket, Message::Ping(Vec::new().into())).await {
                    return false;
                }
            }
        }
    }
}

async fn send(socket: &mut WebSocket, message: &ToPeer) -> bool {
    match serde_json::to_string(message) {
        Ok(text) => put(socket, Message::Text(text.into())).await,
        Err(_) => false,
    }
}

async fn put(socket: &mut WebSocket, message: Message) -> bool {
    matches!(timeout(SEND, socket.send(message)).await, Ok(Ok(())))
}

async fn close(mut socket: WebSocket, code: u16, reason: &'static str) {
    if put(&mut socket, Message::Close(Some(CloseFrame { code, reason: reason.into() }))).await {
        // The browser answers the close; until then the connection must not be cut.
        let _ = timeout(SEND, async { while let Some(Ok(_)) = socket.recv().await {} }).await;
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use futures_util::{SinkExt as _, StreamExt as _};
    use serde_json::{Value, json};
    use tokio_tungstenite::tungstenite::Message as Frame;
    use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

    use super::super::{Upstream, router};
    use super::*;

    type Browser = WebSocketStream<MaybeTlsStream<tokio::net::TcpStream>>;

    async fn server() -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("listener");
        let address = listener.local_addr().expect("address");
        let upstream = Upstream {
            client: crate::ready::client().expect("client"),
            base: "http://127.0.0.1:9".into(),
            ca: "/nowhere".into(),
        };
        tokio::spawn(async move { axum::serve(listener, router(upstream)).await });
        format!("ws://{address}/signal")
    }

    async fn join(server: &str, room: &str, peer: &str) -> Browser {
        connect_async(format!("{server}?room={room}&peer={peer}")).await.expect("connected").0
    }

    async fn hear(browser: &mut Browser) -> Value {
        loop {
            let frame = timeout(Duration::from_secs(20), browser.next()).await.expect("in time").expect("open");
            if let Frame::Text(text) = frame.expect("frame") {
                return serde_json::from_str(&text).expect("JSON");
            }
        }
    }

    async fn say(browser: &mut Browser, message: Value) {
        browser.send(Frame::text(message.to_string())).await.expect("sent");
    }

    #[tokio::test]
    async fn two_browsers_meet_talk_and_part() {
        let server = server().await;
        let mut a = join(&server, "red", "a").await;
        assert_eq!(hear(&mut a).await, json!({ "type": "welcome", "peer": null }));
        let mut b = join(&server, "red", "b").await;
        assert_eq!(hear(&mut b).await, json!({ "type": "welcome", "peer": "a" }));
        assert_eq!(hear(&mut a).await, json!({ "type": "joined", "peer": "b" }));
        say(&mut a, json!({ "type": "signal", "data": { "description": { "type": "offer" } } })).await;
        assert_eq!(hear(&mut b).await["data"]["description"]["type"], "offer");

        let mut third = join(&server, "red", "c").await;
        assert_eq!(hear(&mut third).await, json!({ "type": "full" }));

        say(&mut b, json!({ "type": "bye" })).await;
        assert_eq!(hear(&mut a).await, json!({ "type": "left", "orderly": true }));
    }

    #[tokio::test]
    async fn a_broken_connection_is_told_from_a_farewell() {
        let server = server().await;
        let mut a = join(&server, "red", "a").await;
        hear(&mut a).await;
        let b = join(&server, "red", "b").await;
        hear(&mut a).await;
        // Dropped without a close frame, as a phone that lost its network.
        drop(b);
        assert_eq!(hear(&mut a).await, json!({ "type": "left", "orderly": false }));
    }

    #[tokio::test]
    async fn names_that_are_none_are_refused() {
        let server = server().await;
        for query in ["?room=red", "?peer=a", "?room=&peer=a", "?room=a%20b&peer=a"] {
            assert!(connect_async(format!("{server}{query}")).await.is_err(), "{query}");
        }
    }

    #[test]
    fn only_pages_of_this_server_may_join() {
        for (origin, host, expected) in [
            (Some("http://127.0.0.1:8000"), "127.0.0.1:8000", true),
            (Some("https://192.0.2.2:8000"), "192.0.2.2:8000", true),
            (None, "127.0.0.1:8000", true),
            (Some("http://evil.example"), "127.0.0.1:8000", false),
            (Some("null"), "127.0.0.1:8000", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(HOST, HeaderValue::from_static(host));
            if let Some(origin) = origin {
                headers.insert(ORIGIN, HeaderValue::from_static(origin));
            }
            assert_eq!(is_same_origin(&headers), expected, "{origin:?}");
        }
    }
}
