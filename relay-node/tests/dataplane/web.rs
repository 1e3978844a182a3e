//! HTTPS and TURN on one port: ClientHellos for another host or protocol reach the web server as they are.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use axum::Router;
use axum::extract::ConnectInfo;
use axum::routing::get;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use relay_node::dataplane::{Dataplane, DataplaneConfig, WebServer};
use rustls::ServerConfig;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_rustls::TlsAcceptor;
use turn_core::Transport;

use crate::authority::{Authority, TlsStream, address, is_closed, is_served, shake, tls_config};
use crate::client::{PATIENCE, connect, eventually, refused, start};

/// A web server of its own, with TLS; where it is told by PROXY headers who its clients are it says so on /.
fn serve(runtime: &Runtime, tls: Arc<ServerConfig>, proxied: bool) -> Result<SocketAddr> {
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
    let address = listener.local_addr()?;
    runtime.spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let acceptor = TlsAcceptor::from(Arc::clone(&tls));
            tokio::spawn(async move {
                let mut header = [0; 28];
                if proxied {
                    stream.read_exact(&mut header).await?;
                }
                let client = u16::from_be_bytes([header[24], header[25]]);
                let router = Router::new()
                    .route("/", get(|ConnectInfo(port): ConnectInfo<u16>| async move { format!("hello {port}") }))
                    .route("/long", get(|| async { "x".repeat(1_000_000) }))
                    .layer(axum::Extension(ConnectInfo(client)));
                let stream = TokioIo::new(acceptor.accept(stream).await?);
                let served = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new())
                    .serve_connection(stream, TowerToHyperService::new(router))
                    .await;
                served.map_err(anyhow::Error::from_boxed)
            });
        }
    });
    Ok(address)
}

/// A data plane in front of a web server.
struct Site {
    runtime: Runtime,
    authority: Authority,
    config: DataplaneConfig,
}

impl Site {
    fn new(ip: &str, directory: &Path, proxied: bool, most: usize) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let authority = Authority::new(directory)?;
        let files = [authority.issue("turn", &["turn.example.org"])?];
        let names = ["www.example.org", "turn.example.org"];
        let web = serve(&runtime, authority.server(&names, &[b"http/1.1"])?, proxied)?;
        let mut config = tls_config(ip, 2, directory, &files)?;
        config.streams.web_server = Some(WebServer::new(web, proxied, most, runtime.handle().clone()));
        config.streams.public_host = Some("relay.example.org".into());
        Ok(Self { runtime, authority, config })
    }

    fn start(&self) -> Result<(Dataplane, SocketAddr)> {
        let (dataplane, _changes) = start(&self.config)?;
        let tls = address(&dataplane, Transport::Tls)?;
        Ok((dataplane, tls))
    }
}

/// A page over TLS.
fn page(stream: &mut TlsStream, path: &str) -> Result<String> {
    stream.sock.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut text = Vec::new();
    stream.read_to_end(&mut text)?;
    let text = String::from_utf8(text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("a header")?;
    anyhow::ensure!(head.starts_with("HTTP/1.1 200"), "{head}");
    Ok(body.to_owned())
}

#[test]
fn a_foreign_name_or_protocol_reaches_the_web_server() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let site = Site::new("127.1.5.1", directory.path(), false, 100)?;
    let (dataplane, tls) = site.start()?;
    let authority = &site.authority;
    // Another host; ours, but HTTP is asked for.
    let http: &[&[u8]] = &[b"http/1.1"];
    for (name, protocols) in [("www.example.org", &[][..]), ("www.example.org", http), ("turn.example.org", http)] {
        let mut stream = authority.dial(tls, name, protocols)?;
        assert_eq!(page(&mut stream, "/")?, "hello 0", "{name}");
        assert_eq!(page(&mut authority.dial(tls, name, protocols)?, "/long")?.len(), 1_000_000);
    }
    // Ours are served here.
    let turn: &[&[u8]] = &[b"stun.turn", b"http/1.1"];
    for protocols in [&[][..], turn] {
        is_served(&mut authority.dial(tls, "turn.example.org", protocols)?)?;
    }
    // A name of ours without a certificate gets the default one.
    let error = authority.dial(tls, "relay.example.org", &[]).map(drop).expect_err("not in it");
    assert!(error.to_string().contains("not valid for name"), "{error}");
    eventually("no connection is left", || {
        (dataplane.snapshots().iter().map(|worker| worker.connections).sum::<u64>() == 0).then_some(())
    })?;
    Ok(())
}

#[test]
fn a_client_hello_in_single_bytes_and_many_records_is_understood() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let site = Site::new("127.1.5.2", directory.path(), false, 100)?;
    let (_dataplane, tls) = site.start()?;
    for (name, protocols, ours) in [("www.example.org", &[][..], false), ("turn.example.org", &[], true)] {
        let mut config = site.authority.client(protocols)?;
        // RFC 8446 §5.1: a handshake message may lie in several records.
        config.max_fragment_size = Some(64);
        let stream = connect(tls)?;
        let mut stream = shake(stream, name, config)?;
        if ours {
            drop(is_served(&mut stream)?);
        } else {
            assert_eq!(page(&mut stream, "/")?, "hello 0");
        }

        let config = Arc::new(site.authority.client(protocols)?);
        let mut session = rustls::ClientConnection::new(config, name.to_owned().try_into()?)?;
        let mut hello = Vec::new();
        session.write_tls(&mut hello)?;
        let mut socket = connect(tls)?;
        for byte in &hello {
            socket.write_all(&[*byte])?;
        }
        socket.set_read_timeout(Some(PATIENCE))?;
        let mut stream = TlsStream::new(session, socket);
        stream.conn.complete_io(&mut stream.sock)?;
        assert!(!stream.conn.is_handshaking());
    }
    // One that never ends is closed once it is longer than any there is.
    let mut endless = connect(tls)?;
    for _ in 0..20 {
        let record = [&b"\x16\x03\x01\x04\x00"[..], &[1, 0, 0xff, 0xff], &[0; 1020]].concat();
        if endless.write_all(&record).is_err() {
            break;
        }
    }
    is_closed(&mut endless)?;
    Ok(())
}

#[test]
fn the_web_server_is_told_who_its_client_is() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let site = Site::new("127.1.5.3", directory.path(), true, 100)?;
    let (_dataplane, tls) = site.start()?;
    let mut stream = site.authority.dial(tls, "www.example.org", &[])?;
    let expected = format!("hello {}", stream.sock.local_addr()?.port());
    assert_eq!(page(&mut stream, "/")?, expected);
    Ok(())
}

#[test]
fn connections_to_the_web_server_are_bounded() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let site = Site::new("127.1.5.4", directory.path(), false, 1)?;
    let (dataplane, tls) = site.start()?;
    let held = site.authority.dial(tls, "www.example.org", &[])?;
    assert!(site.authority.dial(tls, "www.example.org", &[]).is_err(), "one too many");
    eventually("it is counted", || (refused(&dataplane, "web_server_busy") == 1).then_some(()))?;
    // TURN is not hurt.
    is_served(&mut site.authority.dial(tls, "turn.example.org", &[])?)?;
    drop(held);
    eventually("there is room again", || site.authority.dial(tls, "www.example.org", &[]).ok())?;
    Ok(())
}

#[test]
fn a_web_server_that_is_not_there_costs_nothing_but_the_visit() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut site = Site::new("127.1.5.5", directory.path(), false, 1)?;
    // Nobody listens at port 1 of this address.
    let handle = site.runtime.handle().clone();
    site.config.streams.web_server = Some(WebServer::new("127.1.5.5:1".parse()?, false, 1, handle));
    let (_dataplane, tls) = site.start()?;
    let began = Instant::now();
    for _ in 0..3 {
        let mut stream = connect(tls)?;
        let mut session =
            rustls::ClientConnection::new(Arc::new(site.authority.client(&[])?), "www.example.org".try_into()?)?;
        session.write_tls(&mut stream)?;
        is_closed(&mut stream)?;
    }
    assert!(began.elapsed() < Duration::from_secs(5));
    is_served(&mut site.authority.dial(tls, "turn.example.org", &[])?)?;
    Ok(())
}
