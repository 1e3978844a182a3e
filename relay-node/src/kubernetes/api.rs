//! The API server over HTTPS: one request per connection, as few bytes as the question takes.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt as _, Empty};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Request, Response, StatusCode, Uri, header};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::config::KubernetesSettings;

/// From the first packet to the head of an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// The largest answer that is read, and the largest event of a watch: a Node with its images is some 50 KiB.
const LARGEST: usize = 4 << 20;

/// Why the API server did not answer as it should. One line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApiError {
    /// A file of the service account is missing or not what it should be.
    #[error("{file}: {why}")]
    Credentials {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// No connection, or a broken one.
    #[error("the API server {server} cannot be reached: {why}")]
    Unreachable {
        /// Where it should be.
        server: String,
        /// What the system says.
        why: String,
    },
    /// It refuses.
    #[error("the API server answers {path} with {status}{hint}")]
    Refused {
        /// What was asked for.
        path: String,
        /// Its status.
        status: StatusCode,
        /// What to do.
        hint: &'static str,
    },
    /// The answer is too large or not what was asked for.
    #[error("the API server's answer to {path} cannot be read: {why}")]
    Answer {
        /// What was asked for.
        path: String,
        /// What is wrong with it.
        why: String,
    },
}

/// The API server and this pod's credentials for it.
#[derive(Clone, Debug)]
pub struct Api {
    server: Uri,
    credentials: PathBuf,
}

impl Api {
    /// Opens nothing yet; token and authority are read with each request, because they are replaced while a pod runs.
    pub fn new(settings: &KubernetesSettings) -> Self {
        Self { server: settings.api.clone(), credentials: settings.credentials.clone() }
    }

    /// The namespace of this pod.
    ///
    /// # Errors
    /// When the service account's file cannot be read.
    pub fn namespace(&self) -> Result<String, ApiError> {
        Ok(self.read("namespace")?.trim().to_owned())
    }

    /// Reads an object.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        timeout(PATIENCE, async {
            let mut body = self.ask(path).await?.into_body();
            let mut whole = Vec::new();
            while let Some(more) = self.next(path, &mut body).await? {
                add(path, &mut whole, &more)?;
            }
            decode(path, &whole)
        })
        .await
        .unwrap_or_else(|_| Err(self.unreachable("no answer within 5 s")))
    }

    /// Begins to watch; events come one by one from `Events::next`.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub async fn watch(&self, path: &str) -> Result<Events<'_>, ApiError> {
        let answer = timeout(PATIENCE, self.ask(path)).await;
        let body = answer.unwrap_or_else(|_| Err(self.unreachable("no answer within 5 s")))?.into_body();
        Ok(Events { api: self, path: path.to_owned(), body, read: Vec::new() })
    }

    async fn ask(&self, path: &str) -> Result<Response<Incoming>, ApiError> {
        let token = self.read("token")?;
        let host = self.server.host().unwrap_or_default();
        let name = host.trim_matches(['[', ']']);
        let server_name = ServerName::try_from(name.to_owned()).map_err(|error| self.unreachable(error))?;
        let port = self.server.port_u16().unwrap_or(443);
        let tcp = TcpStream::connect((name, port)).await.map_err(|error| self.unreachable(error))?;
        let tls = TlsConnector::from(self.tls()?).connect(server_name, tcp).await;
        let tls = tls.map_err(|error| self.unreachable(error))?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(tls)).await.map_err(|error| self.unreachable(error))?;
        // Ends with the last of its requests.
        tokio::spawn(connection);
        let request = Request::get(path)
            .header(header::HOST, format!("{host}:{port}"))
            .header(header::AUTHORIZATION, format!("Bearer {}", token.trim()))
            .header(header::ACCEPT, "application/json")
            .header(header::USER_AGENT, concat!("turnpike-relay/", env!("CARGO_PKG_VERSION")))
            .body(Empty::<Bytes>::new())
            .map_err(|error| ApiError::Answer { path: path.to_owned(), why: error.to_string() })?;
        let response = sender.send_request(request).await.map_err(|error| self.unreachable(error))?;
        let status = response.status();
        if status == StatusCode::OK {
            return Ok(response);
        }
        let hint = match status {
            StatusCode::UNAUTHORIZED => "; is the service account's token mounted?",
            StatusCode::FORBIDDEN => "; bind the roles of deploy/kubernetes/base/relay to this service account",
            StatusCode::NOT_FOUND => "; there is no such object",
            _ => "",
        };
        Err(ApiError::Refused { path: path.to_owned(), status, hint })
    }

    async fn next(&self, path: &str, body: &mut Incoming) -> Result<Option<Bytes>, ApiError> {
        let broken = |error: hyper::Error| ApiError::Answer { path: path.to_owned(), why: error.to_string() };
        loop {
            let Some(frame) = body.frame().await else { return Ok(None) };
            if let Ok(data) = frame.map_err(broken)?.into_data() {
                return Ok(Some(data));
            }
        }
    }

    fn tls(&self) -> Result<Arc<ClientConfig>, ApiError> {
        let wrong = |why: String| ApiError::Credentials { file: self.file("ca.crt"), why };
        let text = self.read("ca.crt")?;
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(text.as_bytes()) {
            let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
            roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| wrong(error.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Arc::new(config))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.credentials.join(name)
    }

    fn read(&self, name: &str) -> Result<String, ApiError> {
        let file = self.file(name);
        std::fs::read_to_string(&file).map_err(|error| ApiError::Credentials { file, why: error.to_string() })
    }

    fn unreachable(&self, why: impl std::fmt::Display) -> ApiError {
        ApiError::Unreachable { server: self.server.to_string(), why: why.to_string() }
    }
}

/// The events of a watch.
pub struct Events<'a> {
    api: &'a Api,
    path: String,
    body: Incoming,
    /// Read and not yet handed out.
    read: Vec<u8>,
}

impl Events<'_> {
    /// The next event; none when the server ends the watch, as it does now and then.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, ApiError> {
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.read.drain(..=end).collect();
                return decode(&self.path, &line).map(Some);
            }
            let Some(more) = self.api.next(&self.path, &mut self.body).await? else { return Ok(None) };
            add(&self.path, &mut self.read, &more)?;
        }
    }
}

fn add(path: &str, whole: &mut Vec<u8>, more: &[u8]) -> Result<(), ApiError> {
    if whole.len() + more.len() > LARGEST {
        return Err(ApiError::Answer { path: path.to_owned(), why: format!("it is larger than {LARGEST} bytes") });
    }
    whole.extend_from_slice(more);
    Ok(())
}

fn decode<T: DeserializeOwned>(path: &str, bytes: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(bytes).map_err(|error| ApiError::Answer { path: path.to_owned(), why: error.to_string() })
}
