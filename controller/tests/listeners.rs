//! The listeners against clients that are slow, silent or many.

mod site;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use controller::server::Limits;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use self::site::{Pki, Site};

const PATIENCE: Duration = Duration::from_secs(10);
const SHORT: Limits =
    Limits { connections: 8, handshakes: 4, handshake: Duration::from_millis(300), drain: Duration::from_millis(200) };

#[tokio::test]
async fn a_request_that_never_ends_is_cut() -> Result<()> {
    let site = Site::with_limits(&[], SHORT).await?;
    let mut half = TcpStream::connect(site.http).await?;
    half.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n").await?;
    assert!(closes(&mut half).await?, "a half head");
    let mut silent = TcpStream::connect(site.http).await?;
    assert!(closes(&mut silent).await?, "nothing at all");
    assert!(answers(site.http).await?);
    Ok(())
}

#[tokio::test]
async fn a_handshake_that_never_ends_is_cut() -> Result<()> {
    let site = Site::with_limits(&[], SHORT).await?;
    let mut silent = TcpStream::connect(site.grpc).await?;
    assert!(closes(&mut silent).await?, "nothing at all");
    let mut garbage = TcpStream::connect(site.grpc).await?;
    garbage.write_all(b"PRI * HTTP/2.0\r\n\r\n").await?;
    assert!(closes(&mut garbage).await?, "HTTP/2 in the clear");
    Ok(())
}

#[tokio::test]
async fn one_connection_too_many_is_closed_at_once() -> Result<()> {
    let limits = Limits { handshake: Duration::from_secs(60), ..SHORT };
    let site = Site::with_limits(&[], limits).await?;
    for (address, most) in [(site.http, limits.connections), (site.grpc, limits.handshakes)] {
        let mut held = Vec::new();
        for _ in 0..most {
            held.push(TcpStream::connect(address).await?);
        }
        let mut more = TcpStream::connect(address).await?;
        assert!(closes(&mut more).await?, "{address}");
        for stream in &mut held {
            let still_open = timeout(Duration::from_millis(20), stream.read_u8()).await.is_err();
            assert!(still_open, "{address}: the ones before it stay");
        }
    }
    // Those are gone now: there is room again.
    let waiting = async {
        while !answers(site.http).await.unwrap_or(false) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, waiting).await.context("no room was made")
}

#[tokio::test]
async fn certificates_are_replaced_while_it_serves() -> Result<()> {
    let site = Site::with_limits(&[], Limits::default()).await?;
    let before = viewer(&site.pki, site.grpc).await?;
    // Another authority's: only who trusts it gets through from now on, and only with its certificates.
    let successor = Pki::new()?;
    assert!(viewer(&successor, site.grpc).await.is_err());
    for name in ["ca.pem", "controller-c1.pem", "controller-c1.key"] {
        std::fs::copy(successor.directory.path().join(name), site.pki.directory.path().join(name))?;
    }
    let replaced = async {
        while viewer(&successor, site.grpc).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, replaced).await.context("not replaced")?;
    // The connection from before is not touched.
    let mut health = HealthClient::new(before);
    health.check(HealthCheckRequest::default()).await?;
    Ok(())
}

/// A connection of somebody with this authority's certificate.
async fn viewer(pki: &Pki, address: SocketAddr) -> Result<Channel> {
    let (certificate, key) = pki.issue("viewer", "ann")?;
    let tls = ClientTlsConfig::new()
        .domain_name("controller.turnpike")
        .ca_certificate(Certificate::from_pem(pki.ca()?))
        .identity(Identity::from_pem(certificate, key));
    let channel = Endpoint::from_shared(format!("https://{address}"))?.tls_config(tls)?.connect().await?;
    // With TLS 1.3 a client learns with its first call whether its own certificate is taken.
    HealthClient::new(channel.clone()).check(HealthCheckRequest::default()).await?;
    Ok(channel)
}

/// Whether the other side ends the connection; what it says before is of no interest.
async fn closes(stream: &mut TcpStream) -> Result<bool> {
    let mut buffer = Vec::new();
    // A reset is an end, too.
    Ok(timeout(PATIENCE, stream.read_to_end(&mut buffer)).await.is_ok())
}

async fn answers(http: SocketAddr) -> Result<bool> {
    Ok(reqwest::get(format!("http://{http}/livez")).await?.status() == 200)
}
