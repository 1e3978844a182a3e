//! A web server with a certificate, and one page.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::certificate::Pair;
use crate::process::Host;

/// Serves `page` on `host` by HTTPS, whatever is asked for, until the host's runtime ends.
///
/// # Errors
/// The certificate cannot be read, or the address is taken.
pub async fn serve(host: &Host, at: SocketAddr, certificate: &Pair, page: &str) -> Result<()> {
    let chain = CertificateDer::pem_file_iter(&certificate.certificate)?.collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_file(&certificate.key)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let mut config = builder.with_no_client_auth().with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let answer: Arc<str> = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{page}",
        page.len()
    )
    .into();
    host.run(async move {
        let listener = TcpListener::bind(at).await.with_context(|| format!("listen on {at}"))?;
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // A browser that goes away in the middle is none of the test's business.
                tokio::spawn(answer_one(acceptor.clone(), stream, Arc::clone(&answer)));
            }
        });
        Ok(())
    })
    .await
}

async fn answer_one(acceptor: TlsAcceptor, stream: TcpStream, answer: Arc<str>) -> std::io::Result<()> {
    let mut stream = acceptor.accept(stream).await?;
    let (mut request, mut chunk) = (Vec::<u8>::new(), [0; 2048]);
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        match stream.read(&mut chunk).await? {
            0 => return Ok(()),
            length => request.extend(&chunk[..length]),
        }
    }
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await
}
