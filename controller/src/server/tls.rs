//! The TLS side of the gRPC listener: own certificate, and peers' certificates that go back to the cluster's CA. The files
//! are read again when they change; connections that exist are not touched.

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use crate::config::{ConfigError, TlsFiles};
use crate::identity::{Identity, Role};

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(2);

/// What new connections are met with.
pub struct ServerTls {
    files: TlsFiles,
    id: String,
    current: RwLock<Arc<ServerConfig>>,
}

/// Reads the files. The certificate has to be made out to this controller.
///
/// # Errors
/// The `tls.*` key whose file is missing, unreadable or does not fit.
pub fn load(files: &TlsFiles, id: &str) -> Result<Arc<ServerTls>, ConfigError> {
    let current = RwLock::new(read(files, id)?);
    Ok(Arc::new(ServerTls { files: files.clone(), id: id.to_owned(), current }))
}

impl ServerTls {
    /// The configuration for a connection that begins now.
    pub fn current(&self) -> Arc<ServerConfig> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes changed files into use, for ever. What does not fit is refused with one line, and the old ones stay.
    pub async fn watch(&self) {
        let mut seen = self.contents();
        loop {
            tokio::time::sleep(LOOK).await;
            let contents = self.contents();
            if contents == seen {
                continue;
            }
            // Files are not replaced at once: what does not fit now may at the next look, and is then another change.
            seen = contents;
            match read(&self.files, &self.id) {
                Ok(config) => {
                    *self.current.write().unwrap_or_else(PoisonError::into_inner) = config;
                    tracing::info!("the certificate of the gRPC listener was replaced");
                }
                Err(error) => tracing::warn!("the certificate of the gRPC listener is not replaced: {error}"),
            }
        }
    }

    fn contents(&self) -> [Option<Vec<u8>>; 3] {
        [&self.files.ca, &self.files.certificate, &self.files.key].map(|file| std::fs::read(file).ok())
    }
}

fn read(files: &TlsFiles, id: &str) -> Result<Arc<ServerConfig>, ConfigError> {
    let provider = Arc::new(ring::default_provider());
    let wrong = |key: &str, path: &Path, why: &dyn std::fmt::Display| {
        ConfigError::new(key, format!("{}: {why}", path.display()))
    };

    let mut roots = RootCertStore::empty();
    for certificate in certificates("tls.ca", &files.ca)? {
        roots.add(certificate).map_err(|error| wrong("tls.ca", &files.ca, &error))?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .map_err(|error| wrong("tls.ca", &files.ca, &error))?;

    let chain = certificates("tls.certificate", &files.certificate)?;
    let identity = chain.first().map(|leaf| Identity::from_der(leaf));
    let why = match identity {
        Some(Ok(identity)) if identity.role == Role::Controller && identity.name == id => None,
        Some(Ok(identity)) => Some(format!("is made out to {identity}, not to controller/{id} (see the key id)")),
        Some(Err(error)) => Some(error.to_string()),
        None => Some("holds no certificate".to_owned()),
    };
    if let Some(why) = why {
        return Err(wrong("tls.certificate", &files.certificate, &why));
    }
    let key =
        PrivateKeyDer::from_pem_file(&files.key).map_err(|error| wrong("tls.key", &files.key, &reason(&error)))?;

    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| ConfigError::new("tls", error.to_string()))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|error| {
            wrong("tls.key", &files.key, &format!("does not fit {}: {error}", files.certificate.display()))
        })?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

fn certificates(key: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    let wrong = |why: String| ConfigError::new(key, format!("{}: {why}", path.display()));
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| wrong(reason(&error)))?;
    if certificates.is_empty() {
        return Err(wrong("holds no certificate".to_owned()));
    }
    Ok(certificates)
}

fn reason(error: &pem::Error) -> String {
    match error {
        pem::Error::Io(error) => error.to_string(),
        pem::Error::NoItemsFound => "holds nothing of the kind in PEM".to_owned(),
        other => other.to_string(),
    }
}
